"""Reads the log ahead of the indexer in a thread of its own, so that reading and preparing overlap with inserting."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from schemas import clock
from schemas.errors import NewerSchema
from store.ingest_batch import Prepared, Preparer
from store.log.base import Log

# How long the log is asked to wait for something new; also how soon a stop is noticed.
_WAIT_S = 0.1
# A round that is not full is held back this long for company, since each commit costs milliseconds. While the rounds
# before it wait to be inserted it goes on growing: what is behind is caught up with in few large commits.
_LINGER_S = 0.3
# A round that could be handed over waits this long for a fetch that is on its way.
_FETCH_S = 0.01
# Rounds waiting to be inserted; one is in the making besides.
_AHEAD = 1
# A round ends here whatever its number of records, so that large events do not fill the memory.
_ROUND_BYTES_MAX = 64 << 20


@dataclass(slots=True)
class Round:
    """Prepared records, and for each partition that was read to its end: (offset, wall clock µs before looking)."""

    prepared: list[Prepared] = field(default_factory=list)
    caught_up: dict[int, tuple[int, int]] = field(default_factory=dict)
    records: int = 0
    bytes: int = 0


@dataclass(slots=True)
class Cursor:
    """Where reading stands in a partition."""

    offset: int
    day: str


class Follower(threading.Thread):
    """Follows partitions of a log and hands rounds over through `rounds`; None is the end, an exception its cause."""

    def __init__(
        self,
        log: Log,
        preparer: Preparer,
        cursors: Mapping[int, Cursor],
        *,
        limit: int,
        until: Mapping[int, int] | None = None,
    ) -> None:
        """Follow from the cursors on; with `until` the thread ends when each partition has reached that offset."""
        super().__init__(name="follower", daemon=True)
        self.rounds: queue.Queue[Round | BaseException | None] = queue.Queue(_AHEAD)
        self.hurry = threading.Event()
        self.newer: dict[int, NewerSchema] = {}
        self.acknowledged: dict[int, int] = {}
        self._log = log
        self._preparer = preparer
        self._cursors = dict(cursors)
        self._limit = limit
        self._until = until
        self._over = threading.Event()

    def run(self) -> None:
        """Read until stopped, or until the offsets asked for are reached."""
        try:
            while not self._over.is_set() and (active := self._active()):
                self._put(self._round(active))
                self._acknowledge()
            self._put(None)
        except BaseException as problem:
            self._put(problem)

    def stop(self) -> None:
        """End the thread and wait for it; files of rounds nobody took are removed."""
        self._over.set()
        while self.is_alive() or not self.rounds.empty():
            try:
                item = self.rounds.get(timeout=0.01)
            except queue.Empty:
                continue
            if isinstance(item, Round):
                self._preparer.discard(item.prepared)

    def _put(self, item: Round | BaseException | None) -> None:
        while True:
            try:
                self.rounds.put(item, timeout=_WAIT_S)
            except queue.Full:
                if self._over.is_set() and not isinstance(item, Round):
                    return
                continue
            return

    def _active(self) -> dict[int, int]:
        """Offset of each partition that is to be read on."""
        return {
            partition: cursor.offset
            for partition, cursor in self._cursors.items()
            if partition not in self.newer and (self._until is None or cursor.offset < self._until.get(partition, 0))
        }

    def _round(self, active: dict[int, int]) -> Round:
        """What there is, waiting a little for company while nobody is in a hurry."""
        found = Round()
        deadline = time.monotonic() + _LINGER_S
        while active and not self._over.is_set():
            before = clock.now_us()
            ready = self._log.wait(active, wait_s=self._patience_s(found, deadline))
            found.caught_up.update({partition: (active[partition], before) for partition in active.keys() - ready})
            for partition in self._oldest(ready):
                self._read(partition, found)
            full = found.records >= self._limit or found.bytes >= _ROUND_BYTES_MAX
            wanted = time.monotonic() >= deadline and not self.rounds.full()
            if full or wanted or (not ready and not self._lingers(found)):
                break
            active = self._active()
        return found

    def _lingers(self, found: Round) -> bool:
        """Whether a round that is not full is held back although nothing is ready."""
        return found.records > 0 and self._until is None and not self.hurry.is_set()

    def _patience_s(self, found: Round, deadline: float) -> float:
        """How long to wait for more: a fetch may be on its way even when somebody is in a hurry."""
        if not found.records:
            return _WAIT_S
        return max(_FETCH_S, min(_WAIT_S, deadline - time.monotonic())) if self._lingers(found) else _FETCH_S

    def _oldest(self, ready: set[int]) -> list[int]:
        """Those of the earliest day: a shard holds one day, so partitions that are behind come first."""
        if not ready:
            return []
        earliest = min(self._cursors[partition].day for partition in ready)
        return sorted(partition for partition in ready if self._cursors[partition].day == earliest)

    def _read(self, partition: int, found: Round) -> None:
        cursor = self._cursors[partition]
        limit = max(1, self._limit // max(1, len(self._cursors)))
        if self._until is not None:
            limit = min(limit, self._until[partition] - cursor.offset)
        batch = self._log.read(partition, cursor.offset, limit=limit, wait_s=0)
        if not batch.values:
            return
        prepared, newer = self._preparer.prepare(batch, cursor.day)
        for item in prepared:
            found.prepared.append(item)
            found.records += len(item.hashes)
            cursor.offset, cursor.day = item.offset_next, item.day
        found.bytes += sum(map(len, batch.values))
        found.caught_up.pop(partition, None)
        if newer is not None:
            self.newer[partition] = newer

    def _acknowledge(self) -> None:
        """Telemetry, from this thread because a log is read by one thread at a time."""
        offsets, self.acknowledged = self.acknowledged, {}
        if offsets:
            self._log.acknowledge(offsets)
