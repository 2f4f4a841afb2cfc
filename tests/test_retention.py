"""What is due goes, with every old version; what a minimum or a hold keeps stays; and all proofs stand."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from lifecycle.compaction import Compaction
from lifecycle.holds import Holds
from lifecycle.retention import Retention
from lifecycle.rewriting import CRASH_POINTS, Change, Rewriting
from lifecycle.selectors import Selector
from schemas.errors import ConflictError, CorruptStore, SettingsError, UnknownName, UsageError
from schemas.events import HoldPlaced, HoldReleased, RetentionApplied
from schemas.settings import RetentionPolicy, RetentionSettings, Settings
from store.catalog import Segment
from store.control import open_control
from store.crashpoints import VARIABLE
from store.log.base import Entry
from store.reader import EventReader
from store.rebuild import rebuild
from store.sql import query
from tests.eventgen import conversation
from tests.indexed import offsets
from tests.tiered import Tiered
from tokentape import config

ROOT = Path(__file__).parents[1]
OLD, NEW = "2026-01-10", "2026-11-01"
NOW = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)


def policies(rig: Tiered, *given: dict[str, Any]) -> Settings:
    """The rig's settings with some policies, named by their order."""
    items = [RetentionPolicy(name=f"p{number}", **values) for number, values in enumerate(given)]
    rig.settings = rig.settings.model_copy(update={"retention": RetentionSettings(policies=items)})
    return rig.settings


def retention(rig: Tiered) -> Retention:
    """A retention run of the rig, on 20 November 2026."""
    return Retention(rig.tiering(), now=lambda: NOW)


def holds(rig: Tiered) -> Holds:
    """The rig's holds."""
    return Holds(rig.tiering(), open_control(rig.settings))


def talk(rig: Tiered, day: str, *, tenants: Sequence[str] = ("acme", "zeta"), retention_class: str = "standard") -> list[str]:
    """One tiered conversation of each tenant, filed under a day; the sessions in hex."""
    entries: list[Entry] = []
    for tenant in tenants:
        context = dataclasses.replace(rig.producer.session(tenant=tenant), retention_class=retention_class)
        entries += conversation(rig.producer, chunks=4, session=context)
    rig.ingest(entries)
    rig.set_day(day)
    rig.tier()
    return list(dict.fromkeys(entry.key.hex() for entry in entries))


def sessions(rig: Tiered) -> set[str]:
    """Sessions that have a row."""
    return {value.hex() for value in rig.table().column("session_id").to_pylist()}


def check(rig: Tiered, kinds: set[str]) -> None:
    """Everything verifies, findings are only of these harmless kinds, and what is listed is exactly what is live."""
    report = rig.verification().report()
    live = {segment.key for segment in rig.catalog.snapshot().segments}

    assert report.exit_code == 0, report.findings
    assert {finding.kind for finding in report.findings} == kinds
    assert dict(rig.objects.remains("events/")) == dict.fromkeys(live, 1)


class TestRetention:
    def test_what_is_due_goes_and_the_rest_stays(self, rig: Tiered) -> None:
        """Preview says it and changes nothing; apply does just that; old versions are gone; a second run does nothing."""
        old, new = talk(rig, OLD), talk(rig, NEW)
        policies(rig, {"tenant": "acme", "min_days": 30, "max_days": 90})
        before = {key: rig.objects.get(key) for key, _ in rig.objects.remains("")}
        (due,) = retention(rig).preview()

        assert (due.events, due.held, due.kept, due.segment.tenant, due.segment.day) == (11, 0, 0, "acme", OLD)
        assert {key: rig.objects.get(key) for key, _ in rig.objects.remains("")} == before
        done = retention(rig).apply()
        again = retention(rig).apply()

        assert (done["events"], done["segments"], done["bytes"]) == (11, 1, due.segment.bytes)
        assert (again["events"], again["entry"]) == (0, None)
        assert sessions(rig) == {old[1], *new}
        assert rig.records() == {place: value for place, value in offsets(rig.log).items() if value[26:42].hex() != old[0]}
        (told,) = [payload for payload in rig.sink.payloads if isinstance(payload, RetentionApplied)]
        assert (told.events, told.segments, told.ledger_entry) == (11, 1, done["entry"])
        check(rig, {"erased-with-proof"})

    def test_content_goes_earlier_and_every_root_stays(self, rig: Tiered) -> None:
        """Content and salt are gone, commitments stand, the Merkle root is the one that was signed; a second run does nothing."""
        talk(rig, OLD, tenants=("acme",))
        (before,) = rig.catalog.snapshot().segments
        policies(rig, {"content_days": 10, "max_days": 3650})
        done = retention(rig).apply()
        (after,) = rig.catalog.snapshot().segments
        table = rig.table()

        assert (done["events"], done["contents"]) == (0, 11)
        assert (after.root, after.rows) == (before.root, before.rows)
        assert table.column("salt").null_count == 11
        assert table.column("commitment").null_count == 5  # of a request, a prompt and four chunks there is one
        assert not any(_content(row).get("content") for row in table.to_pylist())
        assert retention(rig).apply()["contents"] == 0
        check(rig, {"erased-with-proof"})

    def test_what_is_done_is_not_read_again(self, local: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
        """A segment that retention made is settled until its policies change, also when it was merged; one with held rows is not."""
        read: list[str] = []
        counts = Rewriting.counts

        def counted(run: Rewriting, segments: Sequence[Segment], conditions: Sequence[str]) -> tuple[int, ...]:
            read.extend(segment.key for segment in segments)
            return counts(run, segments, conditions)

        monkeypatch.setattr(Rewriting, "counts", counted)
        (held,) = talk(local, OLD, tenants=("zeta",))
        talk(local, OLD, tenants=("acme",))
        talk(local, OLD, tenants=("acme",))
        hold = holds(local).place(Selector(sessions=(held,)), by="ada", reason="matter")["hold"]
        policies(local, {"content_days": 10})

        def run() -> tuple[int, set[str]]:
            read.clear()
            contents = retention(local).apply()["contents"]
            return contents, {key.partition("tenant=")[2].partition("/")[0] for key in read}

        assert run() == (22, {"acme", "zeta"})
        assert run() == (0, {"zeta"})
        assert Compaction(local.tiering()).run()["segments"] == 2
        assert run() == (0, {"zeta"})
        holds(local).release(hold, by="ada", reason="settled")
        assert run() == (11, {"zeta"})
        assert run() == (0, set())
        policies(local, {"content_days": 11})
        assert run() == (0, {"acme", "zeta"})
        check(local, {"erased-with-proof"})

    def test_content_first_and_rows_later(self, local: Tiered) -> None:
        """One policy has both ages: that its first act is done settles nothing of its second."""
        talk(local, OLD, tenants=("acme",))
        policies(local, {"content_days": 10, "max_days": 10_000})
        first = retention(local).apply()
        later = Retention(local.tiering(), now=lambda: NOW + dt.timedelta(days=20_000)).apply()

        assert (first["contents"], later["events"]) == (11, 11)
        assert sessions(local) == set()

    def test_a_hold_released_during_a_rewrite(self, local: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was written by a plan that spared held rows is not settled, though no hold stands by the time that it is entered."""
        (held,) = talk(local, OLD, tenants=("zeta",))
        talk(local, OLD, tenants=("zeta",))
        Compaction(local.tiering()).run()
        hold = holds(local).place(Selector(sessions=(held,)), by="ada", reason="matter")["hold"]
        policies(local, {"content_days": 10})
        make = Rewriting._make

        def released(run: Rewriting, change: Change) -> Any:
            made = make(run, change)
            monkeypatch.setattr(Rewriting, "_make", make)
            holds(local).release(hold, by="ada", reason="settled")
            return made

        monkeypatch.setattr(Rewriting, "_make", released)
        done = [retention(local).apply()["contents"] for _ in range(3)]

        assert done == [11, 11, 0]

    def test_kind_and_tag_select_rows(self, local: Tiered) -> None:
        """Rows of a kind go alone; a tag decides for its sessions; the longest minimum beats the shortest maximum."""
        (session,) = talk(local, OLD, tenants=("acme",))
        policies(local, {"kind": "token_chunk", "max_days": 30}, {"tag": "a", "min_days": 3650})
        kept = retention(local).preview()
        policies(local, {"kind": "token_chunk", "max_days": 30}, {"tag": "nobody", "min_days": 3650})
        done = retention(local).apply()

        assert [(due.events, due.kept) for due in kept] == [(0, 4)]
        assert done["events"] == 4
        assert local.table("kind = 'token_chunk'").num_rows == 0
        assert local.table().num_rows == 7
        assert sessions(local) == {session}
        check(local, {"erased-with-proof"})

    def test_versions_of_policies_are_entered(self, local: Tiered) -> None:
        """Each change once, with the policies in full."""
        for days in (100, 100, 200):
            policies(local, {"max_days": days})
            retention(local).apply()
        entries = [entry.body for entry in local.ledger.entries() if entry.type == "policies"]

        assert [(body["version"], body["policies"][0]["max_days"]) for body in entries] == [(1, "100"), (2, "200")]

    def test_a_day_is_never_younger_than_its_end(self, local: Tiered) -> None:
        """An age counts from the end of the day; a clock that went back deletes nothing."""
        talk(local, OLD)
        policies(local, {"max_days": 9})
        found = []
        for day in (2, 19, 20):
            now = partial(dt.datetime, 2026, 1, day, 23, tzinfo=dt.UTC)
            found.append(len(Retention(local.tiering(), now=now).preview()))

        assert found == [0, 0, 2]

    @pytest.mark.parametrize("damage", ["removed", "replaced"])
    def test_what_was_changed_behind_our_back_stops_it(self, local: Tiered, damage: str) -> None:
        """A segment that is gone or another one is said, and nothing of it is rewritten."""
        talk(local, OLD, tenants=("acme",))
        (segment,) = local.catalog.snapshot().segments
        path = local.settings.data / "cold" / segment.key
        path.unlink()
        if damage == "replaced":
            path.write_bytes(b"PAR1 something else PAR1")
        policies(local, {"kind": "token_chunk", "max_days": 1})
        with pytest.raises(CorruptStore, match=segment.key.rpartition("/")[2]):
            retention(local).apply()

        assert [item.key for item in local.catalog.snapshot().segments] == [segment.key]
        assert local.verification().report().exit_code in (10, 11)

    def test_a_compliance_lock_says_not_before(self, rig: Tiered) -> None:
        """What a lock forbids stays whole and is said with its date."""
        policies(rig, {"tenant": "acme", "min_days": 3650, "lock": "compliance"})
        talk(rig, OLD, tenants=("acme",))
        (segment,) = rig.catalog.snapshot().segments
        lock = rig.objects.lock_of(segment.key)

        assert lock.mode == "compliance"
        assert lock.until is not None
        assert lock.until.year == 2036
        with pytest.raises(ConflictError, match="locked") as refused:
            rig.objects.purge(segment.key)
        assert "not before 2036" in refused.value.hint


def _content(row: dict[str, Any]) -> dict[str, Any]:
    payload: dict[str, Any] = row[row["kind"]]
    return payload


POLICY = '[[retention.policies]]\nname = "a"\n'


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (POLICY + "min_days = 30\nmax_days = 10\n", "policy a: max_days 10 would delete under its own min_days 30"),
        (POLICY + "min_days = 30\ncontent_days = 10\n", "policy a: content_days 10 would delete under its own min_days 30"),
        (POLICY + "max_days = 10\ncontent_days = 20\n", "policy a: content_days 20 is more than max_days 10"),
        (POLICY + "max_days = 10\nhot_days = 20\n", "policy a: max_days 10 is less than hot_days 20"),
        (POLICY + 'kind = "token_chunk"\nlock = "none"\n', "policy a: lock and hot_days hold for whole segments"),
        (POLICY + POLICY, "two policies are called 'a'"),
        (POLICY + 'max_days = 1\n[[retention.policies]]\nname = "b"\nmax_days = 2\n', "policies a and b contradict each other"),
        (POLICY + 'max_days = 1\n[cold]\nlock = "compliance"\n', "policy a deletes after 1 days, cold.lock = compliance forbids it for 30"),
    ],
)
def test_policies_that_contradict_are_refused_at_start(tmp_path: Path, text: str, fault: str) -> None:
    """One line that names the policy and what clashes."""
    (tmp_path / "tokentape.toml").write_text(text)
    with pytest.raises(SettingsError, match=fault.replace("(", r"\(")) as refused:
        config.load(file=tmp_path / "tokentape.toml", environ={})

    assert "\n" not in str(refused.value)


class TestHolds:
    def test_a_hold_beats_everything(self, rig: Tiered) -> None:
        """It survives retention and merge, the store's own legal hold stands, and what was released goes."""
        one, _ = talk(rig, OLD, tenants=("acme", "acme"))
        policies(rig, {"max_days": 30})
        placed = holds(rig).place(Selector(sessions=(one,)), by="ada", reason="matter 1")
        (listed,) = holds(rig).standing()
        done = retention(rig).apply()
        (segment,) = rig.catalog.snapshot().segments

        assert (placed["events"], placed["objects"], placed["warning"]) == (11, 1, "")
        assert (listed["by"], listed["reason"], listed["what"]) == ("ada", "matter 1", f"session {UUID(one)}")
        assert (done["events"], done["held"]) == (11, 11)
        assert sessions(rig) == {one}
        with pytest.raises(ConflictError, match=r"legal hold|locked"):
            rig.objects.purge(segment.key)
        holds(rig).release(placed["hold"][:30], by="bob", reason="closed")
        done = retention(rig).apply()

        assert (done["events"], done["held"]) == (11, 0)
        assert sessions(rig) == set()
        assert holds(rig).standing() == []
        assert [type(payload) for payload in rig.sink.payloads if isinstance(payload, HoldPlaced | HoldReleased)] == [
            HoldPlaced,
            HoldReleased,
        ]
        assert b"matter 1" not in b"".join(entry.data for entry in rig.ledger.entries())
        check(rig, {"erased-with-proof"})

    @pytest.mark.parametrize(
        "selector", [{"tenant": "acme"}, {"tag": "b", "tenant": "acme"}, {"tenant": "acme", "since": 0, "until": 2**52}]
    )
    def test_every_selector(self, local: Tiered, selector: dict[str, Any]) -> None:
        """Tenant, tag and time each keep what they name, and no more."""
        kept, gone = talk(local, OLD)
        holds(local).place(Selector.model_validate(selector), by="ada", reason="matter 2")
        policies(local, {"max_days": 30})
        retention(local).apply()

        assert sessions(local) == {kept}
        assert gone not in sessions(local)

    def test_a_hold_in_the_middle_of_a_cleanup(self, local: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is entered between plan and commit: the commit is refused and planned again, and what is held stays."""
        one, _ = talk(local, OLD, tenants=("acme", "acme"))
        policies(local, {"max_days": 30})
        append, placed = local.ledger.append, list[bool]()

        def late(type: str, body: Any, **how: Any) -> Any:
            if type == "rewritten" and not placed:
                placed.append(True)
                append("hold_placed", {"hold_id": "ab" * 16, "selector": {"sessions": [one]}, "by": "ada", "reason_sha256": ""})
            return append(type, body, **how)

        monkeypatch.setattr(local.ledger, "append", late)
        retention(local).apply()

        assert one in sessions(local)
        done = retention(local).apply()

        assert sessions(local) == {one}
        assert done["held"] == 11
        check(local, {"erased-with-proof"})

    def test_refusals(self, local: Tiered) -> None:
        """A hold on nothing, without reason or selector, an unknown release, a release without reason: one line each."""
        talk(local, OLD)
        own = holds(local)
        cases: list[tuple[Selector, str, str]] = [
            (Selector(sessions=("ab" * 16,)), "x", "no such event, so nothing is held"),
            (Selector(tenant="nobody"), "x", "no such event, so nothing is held"),
            (Selector(), "x", "nothing is selected"),
            (Selector(tenant="acme"), " ", "a hold needs a reason"),
            (Selector(since=5, until=5), "x", "the time range is empty"),
        ]
        for selector, reason, fault in cases:
            with pytest.raises(UsageError, match=fault):
                own.place(selector, by="ada", reason=reason)
        with pytest.raises(UnknownName, match="is no hold"):
            own.release("abc", by="ada", reason="x")
        with pytest.raises(UsageError, match="needs a reason"):
            own.release("abc", by="ada", reason="")

        assert own.standing() == []


class TestCompaction:
    def test_small_segments_become_one(self, rig: Tiered) -> None:
        """Rows, SQL and readers give the same before and after, and what was read before is still answered."""
        for _ in range(3):
            talk(rig, OLD, tenants=("acme",))
        before, asked = rig.table(), query(rig.settings, "SELECT kind, count(*) n FROM events GROUP BY ALL ORDER BY ALL").table
        reader = EventReader(rig.settings, rig.catalog, rig.objects)
        session = rig.catalog.snapshot().segments[0].session_min
        read = list(reader.session(session))
        rows = rig.catalog.snapshot().segments[0].rows
        assert Compaction(rig.tiering(segment_rows_max=2 * rows - 1)).run()["segments"] == 0  # too many for one
        would = Compaction(rig.tiering()).run(dry_run=True)
        done = Compaction(rig.tiering()).run()

        assert would == {"would_merge": [f"acme {OLD}: 3 segments"]}
        assert (done["segments"], done["segments_new"]) == (3, 1)
        assert rig.table() == before
        assert list(reader.session(session)) == read
        assert query(rig.settings, "SELECT kind, count(*) n FROM events GROUP BY ALL ORDER BY ALL").table == asked
        assert rig.records() == offsets(rig.log)
        assert Compaction(rig.tiering()).run()["segments"] == 0
        check(rig, {"erased-with-proof"})

    def test_a_lost_catalog_follows_the_ledger(self, local: Tiered) -> None:
        """What was merged or removed does not come back."""
        talk(local, OLD)
        talk(local, OLD, tenants=("acme",))
        policies(local, {"tenant": "zeta", "max_days": 30})
        retention(local).apply()
        Compaction(local.tiering()).run()
        before = local.catalog.snapshot().segments
        for segment in before:
            local.catalog.swap(retire_segments=[segment.key])
        local.tiering().reconcile()

        assert local.catalog.snapshot().segments == before


def test_what_is_sent_again_when_its_row_has_gone(local: Tiered) -> None:
    """An index that is made anew still knows it: nothing that retention removed comes back through a sender that was late."""
    entries = list(conversation(local.producer, chunks=2))
    local.ingest(entries)
    local.set_day(OLD)
    local.tier()
    policies(local, {"max_days": 30})
    retention(local).apply()
    rebuild(local.settings, local.log, local.objects, local.catalog)
    local.ingest([*entries, *conversation(local.producer, chunks=1)])

    assert local.table().num_rows == 8
    assert len(local.catalog.duplicates(local.log.log_id, entries[0].partition, 0, 100)) == len(entries)


def test_every_step_is_killed() -> None:
    """None is forgotten below."""
    assert {step for steps in KILLED.values() for step in steps} == set(CRASH_POINTS)


CHILD = """
import pickle, sys
import datetime as dt
from lifecycle.compaction import Compaction
from lifecycle.retention import Retention
from tests.tiered import tiered
with tiered(pickle.load(open(sys.argv[1], "rb"))) as rig:
    if sys.argv[2] == "merge":
        Compaction(rig.tiering()).run()
    else:
        Retention(rig.tiering(), now=lambda: dt.datetime(2026, 11, 20, tzinfo=dt.UTC)).apply()
"""


KILLED = {"merge": ("put", "committed", "swapped", "purged_one"), "retention": ("written", "before_commit", "purged")}
"""Every step once: what is killed is the same rewrite."""


@pytest.mark.parametrize("what", KILLED)
def test_killed_at_every_step(local: Tiered, tmp_path: Path, what: str) -> None:
    """Each row is in an answer once, or not at all once its removal was entered; the next run finishes and nothing is left over."""
    policies(local, {"kind": "token_chunk", "max_days": 30} if what == "retention" else {"tenant": "nobody", "max_days": 1})
    file = tmp_path / "settings"
    file.write_bytes(pickle.dumps(local.settings))
    for step in KILLED[what]:
        talk(local, OLD, tenants=("acme",))
        if what == "merge":
            talk(local, OLD, tenants=("acme",))
        events = local.table().num_rows
        environment = {**os.environ, VARIABLE: f"rewrite.{step}", "PYTHONPATH": str(ROOT)}
        child = subprocess.run([sys.executable, "-c", CHILD, str(file), what], env=environment, cwd=ROOT, check=False, capture_output=True)

        assert child.returncode == -signal.SIGKILL, (step, child.stderr.decode()[-2000:])
        local.tiering().reconcile()
        now = local.records()

        assert len(now) == local.table().num_rows
        assert local.table().num_rows in ((events,) if what == "merge" else (events, events - 4))
    for path in (local.settings.data / "cold" / "events").rglob("*.parquet"):
        os.utime(path, (0, 0))  # so that objects which were never entered count as left behind
    retention(local).apply()
    Compaction(local.tiering()).run()

    assert list((local.settings.data / "tmp").glob("rewrite-*")) == []
    if what == "merge":
        assert local.records() == offsets(local.log)
    else:
        assert local.table("kind = 'token_chunk'").num_rows == 0
    check(local, {"erased-with-proof"})
