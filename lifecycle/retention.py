"""Retention: what its policies say is due goes, rows or content only, and nothing that a minimum or a hold keeps.

Rows are in the cold tier by the time that they are due, so a run tiers closed days first. `preview` says what `apply`
would do and changes nothing. Of segments whose every row is due nothing is read: one signed entry, one catalog
transaction, and the objects go. What stays provable: the entries that committed them, their Merkle roots, and that, when
and under which version of the policies they went.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from lifecycle.policies import ALL, Policies, age_of
from lifecycle.register import POLICIES, Register
from lifecycle.rewriting import Change, Done, Rewriting, rewriting
from lifecycle.tiering import WAIT_S, Tiering
from schemas import clock
from schemas.events import RetentionApplied
from schemas.sink import platform_session
from store.catalog import Segment

log = structlog.get_logger("tokentape.retention")

APPLIED = "retention_applied"
"""Ledger entries of this type end a run that removed something."""

WHY = "retention"


@dataclass(frozen=True, slots=True)
class Due:
    """What is due in one segment: `events` go, of `contents` only the content; holds keep `held`, minimum ages `kept`.

    `drop` and `strip` are the SQL conditions that say which.
    """

    segment: Segment
    names: tuple[str, ...]
    acts: tuple[str, ...]
    drop: str
    strip: str
    events: int
    contents: int
    held: int
    kept: int
    locked_until: dt.datetime | None = None
    """A compliance lock keeps all of it until then."""

    @property
    def whole(self) -> bool:
        """Whether every row goes."""
        return self.events == self.segment.rows and self.locked_until is None

    @property
    def anything(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.events or self.contents) and self.locked_until is None

    def to_row(self) -> dict[str, Any]:
        """A line of the preview."""
        segment = self.segment
        return {
            "policy": ", ".join(dict.fromkeys(self.names)),
            "tenant": segment.tenant,
            "class": segment.retention_class,
            "day": segment.day,
            "events": self.events,
            "contents": self.contents,
            "bytes": segment.bytes if self.whole else round(segment.bytes * self.events / max(1, segment.rows)),
            "objects": int(self.whole),
            "held": self.held,
            "kept": self.kept,
            "locked_until": self.locked_until,
            "key": segment.key,
        }


@dataclass(frozen=True)
class Retention:
    """A retention run. `collect` removes blobs that nothing refers to any more; `now` is for tests."""

    tiering: Tiering
    collect: Callable[[], dict[str, Any]] | None = None
    now: Callable[[], dt.datetime] = clock.now

    def preview(self) -> list[Due]:
        """What is due, segment by segment, and what of it is held back; nothing is changed.

        Raises:
            CorruptStore: a segment is not there or cannot be read.
        """
        register = Register.of(self.tiering.ledger)
        with rewriting(self.tiering, register) as run:
            return list(self._due(run))

    def apply(self) -> dict[str, Any]:
        """Tier closed days, remove what is due, look whether it is gone, and enter it; what was done as a flat dict.

        Raises:
            CorruptStore: a segment is not what was entered; nothing of it is changed.
            ConflictError: another run is at work, or a compliance lock forbids it.
            StoreUnavailable, StorageFull: the next run completes what this one began.
        """
        done = Done()
        with self.tiering.alone(wait_s=WAIT_S):
            self.tiering.run_alone()
            register = Register.of(self.tiering.ledger)
            version = self._enter_policies(register)
            with rewriting(self.tiering, register) as run:
                swept = run.sweep()
                due, seen = list(self._due(run)), frozenset(run.register.holds)
                held, locked = sum(item.held for item in due), sum(item.events + item.contents for item in due if item.locked_until)
                for group in _groups(due):
                    run.apply(partial(self._change, run, group, version, seen), done)
                run.sweep()
                run.follow_holds(self.tiering.catalog.snapshot().segments)
        blobs = self.collect()["collected"] if self.collect is not None else 0
        entry = self._enter(done, held, version)
        summary = {"events": done.events, "contents": done.stripped, "segments": done.segments, "bytes": done.bytes_gone}
        summary |= {"versions": done.versions_gone, "held": held, "locked": locked, "swept": swept[0], "blobs": blobs}
        return {**summary, "entry": entry}

    def _due(self, run: Rewriting) -> Iterator[Due]:
        policies = Policies.of(self.tiering.settings)
        if not policies.items:
            return
        for segment in self.tiering.catalog.snapshot().segments:
            if found := self._due_in(run, policies, segment):
                yield replace(found, locked_until=run.locked_until(segment)) if found.anything else found

    def _due_in(self, run: Rewriting, policies: Policies, segment: Segment) -> Due | None:
        age = age_of(segment.day, self.now())
        verdict = policies.verdict(segment.tenant, segment.retention_class, age, run.matching.tagged)
        if verdict is None or _settled(run.register, policies, segment, verdict.acts):
            return None
        holds = [hold for hold in run.register.holds.values() if hold.selector.may_touch(segment)]
        held = " OR ".join(hold.selector.condition(run.matching) for hold in holds)
        drop, strip = _kept_from(verdict.drop, verdict.kept, held), _kept_from(verdict.strip, verdict.kept, held)
        if drop == ALL:
            return Due(segment, verdict.names, verdict.acts, drop, "", segment.rows, 0, 0, 0)
        wanted = " OR ".join(filter(None, (verdict.drop, verdict.strip and f"(salt IS NOT NULL AND ({verdict.strip}))")))
        strip_only = f"salt IS NOT NULL AND ({strip or 'false'}) AND NOT coalesce({drop or 'false'}, false)"
        conditions = [drop or "false", strip_only, f"({wanted}) AND ({held or 'false'})", f"({wanted}) AND ({verdict.kept or 'false'})"]
        events, contents, in_hold, kept = run.counts([segment], conditions)
        return Due(segment, verdict.names, verdict.acts, drop, strip, events, contents, in_hold, kept)

    def _change(self, run: Rewriting, group: list[Due], version: int, seen: frozenset[str]) -> Change | None:
        """What to do with a group by the holds of now; the plan was made when those in `seen` stood, and holds if they still do."""
        policies = Policies.of(self.tiering.settings)
        live = {segment.key for segment in self.tiering.catalog.snapshot().segments}
        same = frozenset(run.register.holds) == seen
        fresh = [
            due
            for item in group
            if item.anything
            and item.segment.key in live
            and (due := item if same else self._due_in(run, policies, item.segment)) is not None
        ]
        whole = [due for due in fresh if due.whole]
        facts = {"policies": version, "names": sorted({name for due in fresh for name in due.names})}
        if len(group) > 1 or whole:
            # A hold that came meanwhile takes its segments out; the next run looks at their other rows.
            return Change(WHY, tuple(due.segment for due in whole), whole=True, facts=facts) if whole else None
        for due in fresh:
            if due.anything:
                facts |= {"acts": sorted(due.acts), "left": due.held + due.kept}
                return Change(WHY, (due.segment,), drop=due.drop, strip=due.strip, facts=facts)
        return None

    def _enter_policies(self, register: Register) -> int:
        """Enter the policies if they are not those that were entered last; the number of their version."""
        policies = Policies.of(self.tiering.settings)
        version, sha256 = register.policies
        if policies.sha256 == sha256 or (not policies.items and not sha256):
            return version
        body = {"version": version + 1, "sha256": policies.sha256, "policies": policies.to_json()}
        self.tiering.ledger.append(POLICIES, body)
        register.refresh()
        return version + 1

    def _enter(self, done: Done, held: int, version: int) -> int | None:
        """Enter the end of a run that removed something, and record it."""
        if not done.entries:
            return None
        stays = "entries, Merkle roots and counts of what went, in the entries named here; every proof of what is left"
        body = {
            "policies": version,
            "rewritten": done.entries,
            "events": done.events,
            "contents": done.stripped,
            "segments": done.segments,
            "bytes": done.bytes_gone,
            "versions": done.versions_gone,
            "held": held,
            "checked": "no version and no delete marker of a removed object is listed",
            "stays": stays,
        }
        entry = self.tiering.ledger.append(APPLIED, body)
        if self.tiering.sink is not None:
            names = ", ".join(policy.name for policy in Policies.of(self.tiering.settings).items)
            counts = {"segments": done.segments, "events": done.events, "bytes": done.bytes_gone, "held_back": held}
            event = RetentionApplied(policy=f"version {version}", selector=names, ledger_entry=entry.sequence, **counts)
            self.tiering.sink.record(platform_session("lifecycle", "job:retention"), event)
        log.info("retention.applied", events=done.events, segments=done.segments, held=held, ledger_entry=entry.sequence)
        return entry.sequence


def _settled(register: Register, policies: Policies, segment: Segment, acts: tuple[str, ...]) -> bool:
    """Whether a segment was made by a run that left nothing in it of what is due; then it need not be read again."""
    settled = register.settled.get(segment.key)
    if settled is None or register.policies != (settled.version, policies.sha256):
        return False
    return settled.acts.issuperset(acts) and not policies.tags  # tags come and go


def _kept_from(wanted: str, kept: str, held: str) -> str:
    """What is wanted and neither kept by a minimum nor held."""
    against = " OR ".join(filter(None, (kept, held)))
    return f"(({wanted}) AND NOT coalesce(({against}), false))" if wanted and against else wanted


def _groups(due: list[Due]) -> Iterator[list[Due]]:
    """What goes in one entry: of one day all segments that go whole, and each other segment by itself."""
    for _, items in itertools.groupby(due, key=lambda item: item.segment.day):
        day = list(items)
        if whole := [item for item in day if item.whole]:
            yield whole
        yield from ([item] for item in day if item.anything and not item.whole)
