"""A log that is a Kafka topic: everything that does not depend on the client library.

Readers ask for partitions in turn, a consumer is fastest when it stays assigned to all of them. So the consumer
follows every partition that was ever asked for, and records that came for another partition wait in memory.
"""

from __future__ import annotations

import abc
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from schemas.errors import LogChanged, LogUnavailable
from schemas.settings import LogSettings
from store.log.admin import TopicAdmin, place
from store.log.base import Batch, Entry, Taken, check_entries
from store.log.forks import forget

# Records fetched by one poll at most: enough to make its cost vanish, few enough to keep the pipeline moving.
POLL_RECORDS_MAX = 10_000
# A poll is cut into steps of this length, so that a time-out is kept.
_POLL_S_MAX = 0.5
# Above this, partitions whose records wait already are paused until they are read.
_HELD_BYTES_MAX = 64 << 20
# A read ends here even below its limit, so that large entries do not fill the memory.
_READ_BYTES_MAX = 64 << 20
# Fetched records are handed out only if the topic was the right one at most this long ago. Within it nobody can
# delete a topic, make it again and fill it beyond the offset that the reader had reached.
_VERIFIED_READ_S = 0.1
# Appended events may land in a topic made anew for this long until the writer is told.
_VERIFIED_APPEND_S = 1.0


@dataclass(slots=True)
class Run:
    """Records of one partition as a client delivered them, in order. `start` counts those
    already handed out, `size` is all of their bytes."""

    partition: int
    offset_first: int
    offset_last: int
    appended_at: list[int]
    values: list[bytes]
    start: int = 0
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = sum(map(len, self.values))

    @property
    def offset(self) -> int:
        """Offset of the next record to hand out."""
        return self.offset_first + self.start


class OutOfRange(Exception):
    """The broker does not hold the offset that was asked for; stays inside the log rooms."""

    def __init__(self, partition: int) -> None:
        super().__init__(partition)
        self.partition = partition


class TopicLog(abc.ABC):
    """A log over a Kafka topic. `append` may run in one thread beside `read`, `wait`, `bounds` in another."""

    _paused: set[int]

    def __init__(self, settings: LogSettings, *, create: bool = True) -> None:
        """Open or, with `create`, make the topic.

        Raises:
            LogUnavailable: no broker answers within `settings.timeout_s`, or the topic is missing.
            LogChanged: the topic has another number of partitions than the settings.
            SettingsError: the topic is unfit for a log, or cannot be made as the settings say.
        """
        self._settings = settings
        self._closed = False
        self._start()
        self._admin = TopicAdmin(settings)
        try:
            self._topic = self._admin.ensure(create=create)
        except BaseException:
            self._admin.close()
            raise

    @property
    def log_id(self) -> str:
        """Cluster id and topic id: a topic that is deleted and made again is another log."""
        return self._topic.log_id

    @property
    def partitions(self) -> int:
        """Number of partitions when the log was opened; a change is reported as `LogChanged`."""
        return self._topic.partitions

    @property
    def retention_s(self) -> float | None:
        """The topic's `retention.ms` when the log was opened."""
        return self._topic.retention_s

    # Writing

    def append(self, entries: Sequence[Entry]) -> None:
        """Send all of the entries; returns when every in-sync replica has them (`acks=all`).

        When the time is up nothing more of them is sent: what was written is a prefix in each partition.

        Raises:
            LogUnavailable: not acknowledged within `settings.timeout_s`, or refused.
            InvalidEvent: an entry is larger than the topic takes.
            LogChanged: the topic was made again.
        """
        self._check_usable()
        if not entries:
            return
        check_entries(entries, self.partitions, self._topic.entry_bytes_max, place=place(self._settings))
        with self._append_lock:
            self._produce(entries)
        self._verify(_VERIFIED_APPEND_S)

    @abc.abstractmethod
    def _produce(self, entries: Sequence[Entry]) -> None:
        """Send and wait for all acknowledgements. After a failure the producer MUST send nothing more of `entries`."""

    # Reading

    def read(self, partition: int, offset: int, *, limit: int, wait_s: float = 0.0) -> Batch:
        """At most `limit` records from `offset` on, fewer once 64 MiB are exceeded or a fetched run ends.

        Empty only if there was no record at `offset` when `wait_s` had passed.

        Raises:
            LogChanged: the offset has expired or lies beyond the end, records are missing, or the topic was made again.
            LogUnavailable: the broker does not answer.
        """
        self.wait({partition: offset}, wait_s=wait_s)
        with self._read_lock:
            return self._take(partition, offset, limit)

    def wait(self, offsets: dict[int, int], *, wait_s: float) -> set[int]:
        """Partitions with a record at the given offset, waiting up to `wait_s` for one.

        Raises:
            LogChanged: as `read`.
        """
        self._check_usable()
        self._check_partitions(offsets)
        deadline = time.monotonic() + wait_s
        pause = min(wait_s, _POLL_S_MAX)
        with self._read_lock:
            self._follow(offsets)
            while not (ready := self._ready(offsets)):
                self._fill(offsets, pause)
                left = deadline - time.monotonic()
                if left <= 0 and not self._ready(offsets):
                    # What is durable must be handed out even without waiting: a fetch takes its time.
                    if not self._behind(offsets):
                        return set()
                    if left < -self._settings.timeout_s:
                        raise self._unavailable("read", "records are there but do not come")
                pause = min(left, _POLL_S_MAX) if left > 0 else _POLL_S_MAX
            self._verify(_VERIFIED_READ_S)
            return ready

    def bounds(self, partition: int) -> tuple[int, int]:
        """First retained offset and the offset after the last durable record."""
        self._check_usable()
        self._check_partitions((partition,))
        self._verify(_VERIFIED_READ_S)
        return self._admin.firsts([partition])[partition], self._admin.ends([partition])[partition]

    def acknowledge(self, offsets: dict[int, int]) -> None:
        """Commit the offsets of `settings.group`, for lag monitors."""
        self._check_usable()
        self._admin.commit(offsets)

    def trim(self, partition: int, before_offset: int) -> None:
        """Delete the records of a partition below `before_offset`; the broker drops whole segments of them in its own time."""
        self._check_usable()
        self._check_partitions((partition,))
        self._admin.delete(partition, before_offset)

    def taken(self) -> Taken:
        """Bytes of every copy of the topic, as the brokers tell, and the share of their fullest disk that holds one."""
        self._check_usable()
        return self._admin.taken()

    @abc.abstractmethod
    def _assign(self, positions: dict[int, int]) -> None:
        """Follow exactly these partitions, the next fetched record being at the given offset."""

    @abc.abstractmethod
    def _pause(self, partitions: set[int]) -> None:
        """Fetch nothing from these partitions, and from all other assigned ones again."""

    @abc.abstractmethod
    def _poll(self, wait_s: float) -> list[Run]:
        """What arrived, waiting up to `wait_s`. Raises `OutOfRange`."""

    def _follow(self, offsets: dict[int, int]) -> None:
        """Make the next record handed out, or fetched, of each partition the one at its offset."""
        for partition, offset in offsets.items():
            held = self._held.setdefault(partition, deque())
            while held and held[0].offset < offset and held[0].offset_last < offset:
                self._held_bytes -= held.popleft().size
            if held and held[0].offset <= offset:
                held[0].start += offset - held[0].offset
            elif held or self._positions.get(partition) != offset:
                self._held_bytes -= sum(run.size for run in held)
                held.clear()
                self._positions[partition] = offset
                self._assigned = False

    def _fill(self, asked: dict[int, int], wait_s: float) -> None:
        """Fetch once. A partition that nobody asked for now and that cannot be read is no longer followed."""
        if not self._assigned:
            self._assign(self._positions)
            self._assigned = True
            self._paused = set()
        full = {p for p, held in self._held.items() if held} if self._held_bytes > _HELD_BYTES_MAX else set()
        if full != self._paused:
            self._pause(full)
            self._paused = full
        try:
            runs = self._poll(wait_s)
        except OutOfRange as problem:
            offset = self._positions.pop(problem.partition)
            self._assigned = False
            if problem.partition in asked:
                raise self._out_of_range(problem.partition, offset) from problem
            return
        for run in runs:
            self._keep(run)

    def _keep(self, run: Run) -> None:
        expected = self._positions.get(run.partition)
        if expected is None:
            return
        if run.offset_first != expected or run.offset_last - run.offset_first != len(run.values) - 1:
            fault = f"partition {run.partition}: records are missing between offsets {expected} and {run.offset_last}"
            raise self._changed(fault, "was the topic compacted, or written in transactions? a log is neither")
        self._positions[run.partition] = run.offset_last + 1
        self._held[run.partition].append(run)
        self._held_bytes += run.size

    def _ready(self, offsets: dict[int, int]) -> set[int]:
        return {partition for partition in offsets if self._held.get(partition)}

    def _behind(self, offsets: dict[int, int]) -> bool:
        """Whether the broker holds a record at one of the offsets; an offset beyond its end is an error."""
        self._verify(_VERIFIED_READ_S)
        ends = self._admin.ends(offsets)
        for partition, offset in offsets.items():
            if offset > ends[partition]:
                raise self._out_of_range(partition, offset)
        return any(offset < ends[partition] for partition, offset in offsets.items())

    def _take(self, partition: int, offset: int, limit: int) -> Batch:
        held = self._held[partition]
        batch = Batch(partition, offset, [], [])
        size = 0
        while held and len(batch.values) < limit and size < _READ_BYTES_MAX:
            run = held[0]
            end = min(len(run.values), run.start + limit - len(batch.values))
            taken = run.values[run.start : end]
            batch.values.extend(taken)
            batch.appended_at.extend(run.appended_at[run.start : end])
            size += sum(map(len, taken))
            run.start = end
            if end == len(run.values):
                self._held_bytes -= held.popleft().size
        return batch

    # State

    def _start(self) -> None:
        """Begin with nothing: clients and locks that came over a fork may not be used."""
        self._pid = os.getpid()
        self._append_lock = threading.Lock()
        self._read_lock = threading.RLock()
        self._positions: dict[int, int] = {}
        self._held: dict[int, deque[Run]] = {}
        self._held_bytes = 0
        self._paused = set()
        # Stays false until the client has taken the positions: it may fail to, and is asked again then.
        self._assigned = False
        self._verified_at = 0.0
        self._change: LogChanged | None = None

    @abc.abstractmethod
    def _forget_clients(self) -> None:
        """Leave the clients of a parent process alone, and open others when they are needed."""

    @abc.abstractmethod
    def _close_clients(self) -> None:
        """Close what is open."""

    def _check_usable(self) -> None:
        if self._closed:
            raise self._unavailable("use log", "the log is closed")
        if self._pid != os.getpid():
            forget(self._admin)
            self._forget_clients()
            self._start()
            self._admin = TopicAdmin(self._settings)
        if self._change is not None:
            raise self._change

    def _check_partitions(self, partitions: Iterable[int]) -> None:
        for partition in partitions:
            if not 0 <= partition < self.partitions:
                fault = f"no partition {partition}: the log has {self.partitions}"
                raise LogChanged(fault, operation="read", place=place(self._settings), hint="partitions are counted from 0")

    def _verify(self, age_s_max: float) -> None:
        """Check that the topic is the one that was opened, unless that was seen a moment ago."""
        asked_at = time.monotonic()
        if asked_at - self._verified_at <= age_s_max:
            return
        try:
            self._admin.verify(self._topic)
        except LogChanged as problem:
            self._change = problem
            raise
        self._verified_at = asked_at

    def close(self) -> None:
        """Release everything; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._pid != os.getpid():
            forget(self._admin)
            self._forget_clients()
            return
        self._close_clients()
        self._admin.close()

    # Errors

    def _unavailable(self, operation: str, fault: str) -> LogUnavailable:
        return LogUnavailable(fault, operation=operation, place=place(self._settings), hint="is the broker up? see log.bootstrap_servers")

    def _changed(self, fault: str, hint: str) -> LogChanged:
        return LogChanged(fault, operation="read", place=place(self._settings), hint=hint)

    def _out_of_range(self, partition: int, offset: int) -> LogChanged:
        self._verify(0.0)
        first, end = self._admin.firsts([partition])[partition], self._admin.ends([partition])[partition]
        fault = f"partition {partition} holds offsets {first} to {end}, not {offset}"
        return self._changed(fault, "they expired, or the topic was replaced; `tokentape rebuild` makes the index again")
