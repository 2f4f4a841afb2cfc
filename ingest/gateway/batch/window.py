"""How far a partition of batch work is worked off, and how often what is under way in it was begun."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from ingest.gateway.batch import facts as f
from ingest.gateway.batch.facts import Facts
from store.work import WorkLog


@dataclass
class Window:
    """A worker's place in a partition: everything before `offset` has its result, and of the rest what is in `done`."""

    model: str
    partition: int
    log_id: str
    offset: int
    read: int = 0
    done: set[int] = field(default_factory=set)
    written: int = -1
    attempts: dict[int, int] = field(default_factory=dict)
    """By offset the attempts that were begun and did not end well, the one under way among them."""
    _noted: dict[int, int] = field(default_factory=dict)
    _noting: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, facts: Facts, work: WorkLog, model: str, partition: int) -> Window:
        """Where a partition is to be read from: what was committed, as far as it is of this log and still there."""
        log_id, committed = facts.committed(model, partition)
        first, end = work.bounds(partition)
        offset = max(first, committed if log_id == work.log_id and committed <= end else 0)
        begun = facts.get(f.BEGUN, f"{partition}/{model}") or {}
        attempts = begun.get("attempts", {}) if begun.get("log_id") == work.log_id else {}
        known = {int(at): int(count) for at, count in attempts.items() if int(at) >= offset}
        return cls(model, partition, work.log_id, offset, read=offset, attempts=known, _noted=dict(known))

    def finish(self, offset: int) -> None:
        """The record at an offset has its result."""
        self.attempts.pop(offset, None)
        self.done.add(offset)
        while self.offset in self.done:
            self.done.remove(self.offset)
            self.offset += 1

    def note_attempts(self, facts: Facts) -> None:
        """Make the attempts durable. Those who come while it is written are written together, by the first of them."""
        with self._noting:
            if (attempts := dict(self.attempts)) != self._noted:
                counts = {str(offset): count for offset, count in attempts.items() if count}
                facts.note(f.BEGUN, f"{self.partition}/{self.model}", {"log_id": self.log_id, "attempts": counts})
                self._noted = attempts

    def commit(self, facts: Facts) -> None:
        """Make durable how far the partition is worked off."""
        if (offset := self.offset) > self.written:
            facts.write(f.COMMITTED, f"{self.partition}/{self.model}", {"log_id": self.log_id, "offset": offset})
            self.written = offset


def done_with(windows: Iterable[Window], model: str, log_id: str) -> dict[int, int]:
    """By partition before which offset of a model's log nothing is needed; a place in another log says nothing of this one."""
    own = (window for window in windows if (window.model, window.log_id) == (model, log_id))
    return {window.partition: window.written for window in own if window.written > 0}
