"""A person is forgotten: content is nowhere any more, metadata and every proof stand, and what is pending is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from lifecycle.erasure import Erasures
from lifecycle.holds import Holds
from lifecycle.proving import Prover
from lifecycle.selectors import Selector
from replay.versioning import open_versions
from schemas.errors import ConflictError, UnknownName, UsageError
from schemas.events import ErasureApplied
from schemas.settings import LogSettings, RetentionPolicy, RetentionSettings, Settings
from schemas.sink import SessionContext
from store.control import open_control
from store.ledger.entry import decode_entry
from store.log.base import Entry
from store.reader import EventReader
from store.versions import Version
from tests.eventgen import conversation, datum
from tests.program import Program
from tests.tiered import Tiered, tiered


def erasures(rig: Tiered) -> Erasures:
    """The rig's erasures."""
    return Erasures(rig.tiering(), rig.log, open_control(rig.settings))


def talk(rig: Tiered, count: int = 2, tenant: str = "acme") -> list[Entry]:
    """Conversations in the log and in hot."""
    entries = [entry for _ in range(count) for entry in conversation(rig.producer, chunks=4, session=rig.producer.session(tenant))]
    rig.ingest(entries)
    return entries


def prompt(entries: list[Entry], session: bytes) -> bytes:
    """What the person of a session wrote."""
    (request,) = [datum(entry)["request_submitted"] for entry in entries if entry.key == session and datum(entry)["request_submitted"]]
    return str(request["content"]["messages"][0]["body"]).encode()


def test_content_goes_and_every_proof_stands(rig: Tiered) -> None:
    """Cold and hot rows of one session lose content and salt; roots are those that were signed; only its segments are rewritten."""
    first = talk(rig, 1)
    rig.tier()
    session = first[0].key
    untouched = talk(rig, 1, "zeta")
    rig.tier()
    hot = list(conversation(rig.producer, chunks=4, session=_again(rig, session)))
    rig.ingest(hot)
    roots = {segment.key: segment.root for segment in rig.catalog.snapshot().segments}
    rows = rig.table().num_rows
    erasure_id = erasures(rig).request((session.hex(),), None, by="ada", reason="asked to be forgotten")
    done = erasures(rig).approve(erasure_id[:30], by="bob")
    table, live = rig.table(), rig.catalog.snapshot().segments
    mine = [row for row in table.to_pylist() if row["session_id"] == session]

    assert table.num_rows == rows
    assert done["events"] == len(mine) == len(first) + len(hot)
    assert done["contents"] == sum(row["commitment"] is not None for row in mine) < len(mine)  # as `show` counts them
    assert all(row["salt"] is None and not row[row["kind"]].get("content") for row in mine)
    assert all(row["salt"] for row in table.to_pylist() if row["session_id"] == untouched[0].key)
    assert {segment.tenant for segment in live if segment.key in roots} == {"zeta"}
    assert {segment.root for segment in live} >= set(roots.values())
    assert dict(rig.objects.remains("events/")) == {segment.key: 1 for segment in live}
    assert list((rig.settings.data / "hot" / "shards").glob("*.duckdb")) == []
    assert not any(prompt(first, session) in rig.objects.get(key) for key, _ in rig.objects.remains(""))
    assert any(line.startswith("log, partition") for line in done["pending"])
    rig.checkpoint()
    report = rig.verification().report()
    prover = Prover(EventReader(rig.settings, rig.catalog, rig.objects), rig.objects, rig.ledger, rig.registry)

    assert report.exit_code == 0, report.findings
    assert report.events >= rows
    assert prover.event(mine[1]["event_id"]).check(rig.ledger.verifier)
    (told,) = [payload for payload in rig.sink.payloads if isinstance(payload, ErasureApplied)]
    assert (told.approvers, told.events) == (["ada", "bob"], len(mine))
    certificate = json.loads(erasures(rig).certificate(erasure_id))
    entry = decode_entry(certificate["sequence"], erasures(rig).certificate(erasure_id))
    entry.check(rig.ledger.verifier, rig.ledger.origin)

    assert (entry.body["events"], entry.body["contents"]) == (len(mine), done["contents"])
    assert b"asked to be forgotten" not in entry.data


def _again(rig: Tiered, session: bytes) -> SessionContext:
    """The same session goes on."""
    return replace(rig.producer.session(), session_id=session)


def test_what_was_pending_is_followed_up(local: Tiered) -> None:
    """When the log's retention has passed the records, the job enters that all is done; by an actor, every session of theirs."""
    talk(local, 2)
    preview = erasures(local).preview((), "key-7")
    erasure_id = erasures(local).request((), "key-7", by="ada", reason="asked")
    waits = erasures(local).everything()[0]
    first = erasures(local).approve(erasure_id, by="bob")
    again = erasures(local).follow_up()
    local.settings = local.settings.model_copy(update={"log": LogSettings(retention_days=0)})
    last = erasures(local).follow_up()

    assert (len(preview["sessions"]), preview["events"], preview["contents"], preview["held"]) == (2, 22, 12, [])
    assert (waits["erasure"], waits["what"], waits["reason"]) == (erasure_id, "2 sessions of key-7", "asked")
    assert first["events"] == 22
    assert (again["finished"], len(again["waiting"])) == (0, len(first["pending"]))
    assert (last["open"], last["finished"], last["waiting"]) == (1, 1, [])
    assert [item["state"] for item in erasures(local).everything()] == ["finished"]
    assert all(local.log.bounds(p)[0] == local.log.bounds(p)[1] for p in range(local.log.partitions))
    assert erasures(local).follow_up()["open"] == 0
    assert local.verification().report().exit_code == 0


def test_what_is_derived_and_what_nobody_could_read(local: Tiered) -> None:
    """Snapshots of the session go at once, and so do the bytes of records in quarantine that hold its id; those of others stay."""
    entries = talk(local, 2)
    session, other = dict.fromkeys(entry.key for entry in entries)
    local.ingest([replace(entry, value=entry.value + b"\0") for entry in (entries[0], entries[-1])])
    versions = open_versions(local.settings.data)
    for key in (session, other):
        version = Version(key, 1, bytes(16), 1, b"basis", bytes(16), "stopped", "ada", 0, "root", 4)
        versions.add([version], {"root": b"text"}, bytes_max=1000)
    own = replace(erasures(local), forget=versions.forget)
    done = own.approve(own.request((session.hex(),), None, by="ada", reason="asked"), by="bob")
    left = [local.catalog.quarantined_bytes(item.log_id, item.partition, item.offset) for item in local.catalog.quarantine()]

    assert versions.sessions() == [other]
    assert done["quarantined"] == 1
    assert sorted(left) == [b"", entries[-1].value + b"\0"]
    assert local.verification().report().exit_code == 0


def test_refusals(local: Tiered) -> None:
    """One custodian alone, a held session, nothing to erase, no reason, an unknown id: one line each, and nothing is changed."""
    session = talk(local)[0].key.hex()
    local.tier()
    before = local.table()
    own = erasures(local)
    with pytest.raises(UsageError, match="nothing to erase"):
        own.request(("ab" * 16,), None, by="ada", reason="x")
    with pytest.raises(UsageError, match="nothing to erase"):
        own.request((), "nobody", by="ada", reason="x")
    with pytest.raises(UsageError, match="needs a reason"):
        own.request((session,), None, by="ada", reason="")
    with pytest.raises(UnknownName, match="is no erasure"):
        own.approve("abcd", by="ada")
    asked = own.request((session,), None, by="ada", reason="x")
    with pytest.raises(UsageError, match="ada requested it and cannot approve it"):
        own.approve(asked, by="ada")
    with pytest.raises(UsageError, match="it is only requested"):
        own.certificate(asked)
    Holds(local.tiering(), own.control).place(Selector(sessions=(session,)), by="eve", reason="matter")
    with pytest.raises(ConflictError, match="keeps 11 of its events"):
        own.approve(asked, by="bob")
    with pytest.raises(ConflictError, match="keeps 11 of its events"):
        own.request((session,), None, by="ada", reason="x")

    assert local.table() == before


def test_a_compliance_lock_forbids_it_until_a_date(rig: Tiered) -> None:
    """It stays approved, says not before when, and the job goes on saying so."""
    policy = RetentionPolicy(name="law", min_days=3650, lock="compliance")
    rig.settings = rig.settings.model_copy(update={"retention": RetentionSettings(policies=[policy])})
    session = talk(rig, 1)[0].key.hex()
    rig.tier()
    before = rig.table()
    asked = erasures(rig).request((session,), None, by="ada", reason="x")
    with pytest.raises(ConflictError, match="compliance lock") as refused:
        erasures(rig).approve(asked, by="bob")

    assert refused.value.hint.startswith("not before 20")
    assert "not before 20" in erasures(rig).follow_up()["waiting"][0]
    assert rig.table() == before


def test_the_commands(tmp_path: Path) -> None:
    """Keep, hold, forget as custodians do it, with keys; every refusal is one line."""
    settings = Settings(data=tmp_path / "data")
    with tiered(settings) as rig:
        sessions = list(dict.fromkeys(entry.key.hex() for entry in talk(rig)))
        rig.set_day("2026-01-10")
        rig.tier()
    program = Program(tmp_path, settings)
    with program.file.open("a") as file:
        file.write('\n[[retention.policies]]\nname = "all"\nmax_days = 1\n')
    create = ["keys", "create", "--no-models", "--owner"]
    made = program.batch(
        [*create, "ada", "--role", "custodian"], [*create, "bob", "--role", "custodian"], [*create, "eve", "--role", "reader"]
    )
    ada, bob, eve = ([f"--set=custody.key={ran.text.strip()}"] for ran in made)
    hold = ["hold", "place", "--session", sessions[0], "--reason", "matter 1"]
    none, wrong, nothing, placed, listed, preview, applied = program.batch(
        hold,
        [*eve, *hold],
        [*ada, "hold", "place", "--where", "tenant = 'x'", "--reason", "r"],
        [*ada, *hold],
        ["hold", "list", "--format", "json"],
        ["retention", "preview", "--format", "json"],
        ["retention", "apply"],
        code=None,
    )
    held, request = placed.text.strip(), ["erase", "request", "--session", sessions[0], "--reason", "asked"]
    foreseen, unheld, kept, _, requested = program.batch(
        ["erase", "preview", "--session", sessions[0], "--format", "json"],
        [*eve, "hold", "release", held, "--reason", "x"],
        [*ada, *request],
        [*bob, "hold", "release", held[:30], "--reason", "closed"],
        [*ada, *request],
        code=None,
    )
    erasure_id = requested.text.strip()
    alone, approved, certificate, verified = program.batch(
        [*ada, "erase", "approve", erasure_id],
        [*bob, "erase", "approve", erasure_id],
        ["erase", "certificate", erasure_id],
        ["verify"],
        code=None,
    )

    assert [ran.code for ran in (none, wrong, nothing, unheld, kept, alone)] == [2, 2, 2, 2, 7, 2]
    assert [ran.code for ran in (placed, listed, preview, applied, requested, approved, certificate, verified)] == [0] * 8
    assert "needs a key with the role custodian" in none.complaint
    assert "of eve has reader; custody needs custodian" in wrong.complaint
    assert "nothing is held" in nothing.complaint
    assert [(row["what"], row["by"], row["reason"]) for row in listed.rows] == [(f"session {UUID(sessions[0])}", "ada", "matter 1")]
    assert [(row["events"], row["held"]) for row in preview.rows] == [(11, 11)]
    assert "events: 11" in applied.text
    assert [(row["events"], row["held"]) for row in foreseen.rows] == [(11, [{"hold": held, "events": 11}])]
    assert "of eve has reader" in unheld.complaint
    assert "keeps 11 of its events" in kept.complaint
    assert "ada requested it and cannot approve it" in alone.complaint
    assert "events: 11" in approved.text
    assert json.loads(certificate.text)["body"]["requested_by"] == "ada"
    assert "good" in verified.text
