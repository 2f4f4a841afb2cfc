"""What must be so after a simulated run, worked out from what was really written, without the code under test."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from schemas import clock
from schemas.codec import decode_datum
from schemas.registry import SchemaRegistry
from schemas.settings import RetentionPolicy
from store.ledger.entry import ENTRIES
from store.log.base import Batch, Entry

_DAY_US = 86_400_000_000


@dataclass
class Fact:
    """One event: what was sent, where the log first had it, and under which day it has to be filed."""

    raw: bytes
    event_id: bytes
    session: str
    tenant: str
    retention_class: str
    kind: str
    recorded_at: int
    partition: int
    acknowledged: bool = False
    offset: int | None = None
    day: str = ""

    def age_days(self, at_us: int) -> float:
        """Days since the end of its day."""
        end = dt.datetime.fromisoformat(self.day).replace(tzinfo=dt.UTC) + dt.timedelta(days=1)
        return (at_us - end.timestamp() * 1e6) / _DAY_US


@dataclass
class Truth:
    """The books of a run, kept beside it. `violations` is what must never be."""

    policies: Sequence[RetentionPolicy]
    cold: Path
    registry: SchemaRegistry
    say: Callable[[str], None]
    facts: dict[bytes, Fact] = field(default_factory=dict)
    gone: set[bytes] = field(default_factory=set)
    stripped: set[bytes] = field(default_factory=set)
    holds: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    """Sessions by the erasure that was requested for them."""
    forgotten: set[str] = field(default_factory=set)
    """Sessions whose erasure was approved: the entry says so."""
    violations: list[str] = field(default_factory=list)
    latest_us: int = 0
    """The latest that any process saw on its clock."""
    _days: dict[int, str] = field(default_factory=dict)

    def sent(self, entries: Iterable[Entry]) -> list[Fact]:
        """A producer made these."""
        found = []
        for entry in entries:
            datum, _ = decode_datum(entry.value, self.registry)
            kind = next(name for name, value in datum.items() if isinstance(value, dict))
            session, tenant, retention_class = datum["session_id"].hex(), datum["tenant"], datum["retention_class"]
            known = (entry.value, datum["event_id"], session, tenant, retention_class, kind, datum["recorded_at"])
            fact = Fact(*known, entry.partition)
            self.facts[fact.event_id] = fact
            found.append(fact)
        return found

    def logged(self, batches: Sequence[Batch]) -> None:
        """The log has these; an event that comes again is a duplicate."""
        for batch in batches:
            for number, (value, at_us) in enumerate(zip(batch.values, batch.appended_at, strict=True)):
                day = clock.at(at_us).strftime("%Y-%m-%d")
                day = self._days[batch.partition] = max(self._days.get(batch.partition, ""), day)
                fact = self.facts[value[10:26]]
                if fact.offset is None:
                    fact.offset, fact.day = batch.offset_first + number, day

    def created(self, key: str, data: bytes) -> None:
        """An object was created; entries of the ledger are what counts."""
        if not key.startswith(ENTRIES):
            return
        entry = json.loads(data)
        self.say(f"ledger {entry['sequence']}: {entry['type']} {entry['body'].get('why', '')}")
        body = entry["body"]
        if entry["type"] == "hold_placed":
            self.holds[body["hold_id"]] = body["selector"]
        elif entry["type"] == "hold_released":
            self.holds.pop(body["hold_id"])
        elif entry["type"] == "erasure_approved":
            self.forgotten.add(self.asked[body["erasure_id"]])
        elif entry["type"] == "rewritten":
            self._rewritten(entry["sequence"], body)

    def _rewritten(self, number: int, body: dict[str, Any]) -> None:
        """Hold what goes by an entry against policies and holds as they are at this moment."""
        before, after = self._salted(body["erased"]), self._salted([item["key"] for item in body["segments"]])
        lost = before.keys() - after.keys()
        stripped = {event_id for event_id, salted in before.items() if salted and after.get(event_id) is False}
        for event_id in sorted(lost | stripped):
            fact, what = self.facts[event_id], "row" if event_id in lost else "content"
            if why := self._objection(fact, what, body["why"]):
                self._wrong(f"entry {number} removes the {what} of {fact.kind} in {fact.session[:8]} (day {fact.day}): {why}")
        if strangers := after.keys() - before.keys():
            self._wrong(f"entry {number} brings {len(strangers)} rows that were not there")
        self.gone |= lost
        self.stripped |= stripped

    def _salted(self, keys: Sequence[str]) -> dict[bytes, bool]:
        """Whether each row of some segments still has its salt, by event."""
        found: dict[bytes, bool] = {}
        for key in keys:
            if not (self.cold / key).exists():
                self._wrong(f"{key} is not there at the moment at which an entry speaks of it")
                continue
            table = pq.read_table(self.cold / key, columns=["event_id", "salt"])
            found |= {row["event_id"]: row["salt"] is not None for row in table.to_pylist()}
        return found

    def _objection(self, fact: Fact, what: str, why: str) -> str:
        """Why something must not go; empty when it may."""
        if self.is_held(fact):
            return "a hold keeps it"
        if why == "erasure" and what == "content":
            return "" if fact.session in self.forgotten else "nobody asked for it"
        if why != "retention":
            return f"a {why} removes nothing"
        return "" if self.is_due(fact, self.latest_us, content=what == "content") else "it is not due"

    def is_held(self, fact: Fact) -> bool:
        """Whether a hold that stands in the ledger selects it."""
        return any(
            ("sessions" not in s or fact.session in s["sessions"])
            and s.get("tenant") in (None, fact.tenant)
            and ("since" not in s or fact.recorded_at >= s["since"])
            and ("until" not in s or fact.recorded_at < s["until"])
            for s in self.holds.values()
        )

    def is_due(self, fact: Fact, at_us: int, *, content: bool = False) -> bool:
        """Whether the policies want it gone at a moment, and none keeps it."""
        age = fact.age_days(at_us)
        mine = [
            policy
            for policy in self.policies
            if policy.tenant in (None, fact.tenant)
            and policy.retention_class in (None, fact.retention_class)
            and policy.kind in (None, fact.kind)
        ]
        limits = [policy.content_days if content else policy.max_days for policy in mine]
        return any(limit is not None and limit <= age for limit in limits) and not any(policy.min_days > age for policy in mine)

    def check_rows(self, rows: dict[bytes, list[tuple[bytes, bool]]], at_us: int, positions: dict[int, int]) -> None:
        """Hold an answer over everything (framed bytes and whether there is a salt, by event) against the books.

        `positions` is how far each partition is indexed. A row whose removal is entered may still be there.
        """
        for event_id, found in rows.items():
            if len(found) > 1:
                self._wrong(f"{self.facts[event_id].kind} in {self.facts[event_id].session[:8]} is there {len(found)} times")
        for event_id, fact in self.facts.items():
            if (
                fact.offset is not None
                and fact.offset < positions.get(fact.partition, 0)
                and event_id not in rows | dict.fromkeys(self.gone)
            ):
                self._wrong(f"{fact.kind} in {fact.session[:8]} at {fact.partition}/{fact.offset} (day {fact.day}) is lost")
        for event_id, found in rows.items():
            if found[0][1] and found[0][0] and found[0][0] != self.facts[event_id].raw:
                self._wrong(f"{self.facts[event_id].kind} at {self.facts[event_id].offset} is not what was sent")

    def check_end(self, rows: dict[bytes, list[tuple[bytes, bool]]], at_us: int) -> None:
        """What must hold once everything has run to its end at this moment. A session of which a hold keeps a part is not erased."""
        kept = {fact.session for event_id, fact in self.facts.items() if event_id in rows and self.is_held(fact)}
        for event_id, fact in self.facts.items():
            where = f"{fact.kind} in {fact.session[:8]} (day {fact.day})"
            if fact.acknowledged and fact.offset is None:
                self._wrong(f"{where} was acknowledged and is not in the log")
            if event_id in rows and event_id in self.gone:
                self._wrong(f"{where} came back")
            if event_id not in rows or self.is_held(fact):
                continue
            if self.is_due(fact, at_us):
                self._wrong(f"{where} is kept beyond its maximum")
            salted = rows[event_id][0][1]
            if salted and (fact.session in self.forgotten - kept or self.is_due(fact, at_us, content=True)):
                self._wrong(f"{where} still has its content")
            if not salted and event_id not in self.stripped and decode_datum(fact.raw, self.registry)[0]["salt"] is not None:
                self._wrong(f"{where} has lost its content")

    def _wrong(self, what: str) -> None:
        if what not in self.violations:
            self.say(f"VIOLATION {what}")
            self.violations.append(what)
