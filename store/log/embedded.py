"""The embedded log: one SQLite file, many writing processes, one row per appended batch and partition.

A row is what Kafka calls a record batch (`store.log.rows`), so that an event costs no row and reading only slices.
A commit is on disk before `append` returns; callers that wait for one another share it.

How many events were acknowledged stands in a file beside it (`-end`) too, and a log with fewer is refused (`store.log.sqlite`).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from schemas import clock
from schemas.errors import CorruptStore, LogChanged, LogUnavailable, TokentapeError
from store.crashpoints import crash_point
from store.log.base import Batch, Entry, Taken, check_entries
from store.log.forks import forget
from store.log.rows import TABLES, StoredBatch, Tail, batch_from_row, batch_to_row, chunks, row_id, tail_from_row, tail_to_row
from store.log.sqlite import EndNote, connect, mapped

# A read ends here even below its limit, so that large entries do not fill the memory.
_READ_BYTES_MAX = 64 << 20
# How often a waiting reader looks: far below the second within which an event must be fresh.
_POLL_S = 0.01
# Version of the tables; a file of another version is refused.
_LAYOUT = "1"
# Pages given back to the file system by one `trim`.
_VACUUM_PAGES = 4096


@dataclass(slots=True)
class _Ticket:
    """One caller of `append` who waits for a transaction."""

    entries: Sequence[Entry]
    done: bool = False
    error: TokentapeError | None = None


class EmbeddedLog:
    """A log in one SQLite file (`path`, beside it `-wal` and `-shm`).

    `append` and `trim` may be called by many threads, and `read`, `wait` and `bounds` beside them. After a fork
    the child goes on with connections of its own.
    """

    def __init__(self, path: Path, *, partitions: int | None, create: bool = True, timeout_s: float = 30.0) -> None:
        """Open or, with `create`, make the log; `partitions=None` takes the number that the file says.

        Raises:
            LogUnavailable: the file is missing (without `create`) or stays locked for `timeout_s`.
            LogChanged: the file was made with another number of partitions.
            CorruptStore: the file is not an embedded log.
        """
        self._path = path
        self._timeout_s = timeout_s
        self._closed = False
        self._end = EndNote(path, "events")
        self._start()
        if not create and not (path.exists() and path.stat().st_size):
            raise self._missing()
        with self._mapped("open log"):
            noted = self._end.read()  # before the log itself, which others may append to
            if create:
                _make_folder(path.parent)
                self._create(partitions or 1, noted)
            self._log_id, self._partitions = self._identity()
            self._check_end(noted)
        if partitions is not None and partitions != self._partitions:
            self.close()
            raise LogChanged(
                f"the log has {self._partitions} partitions, the settings say {partitions}",
                operation="open log",
                place=str(path),
                hint=f"set log.partitions = {self._partitions}: the number is fixed when a log is created",
            )

    @property
    def log_id(self) -> str:
        """A random id given to the file when it was made."""
        return self._log_id

    @property
    def partitions(self) -> int:
        """Number of partitions, fixed for a log id."""
        return self._partitions

    @property
    def retention_s(self) -> float | None:
        """Nothing goes by itself."""
        return None

    # Writing

    def append(self, entries: Sequence[Entry]) -> None:
        """Append all of the entries in one transaction that is on disk when this returns; else none of them.

        Raises:
            LogUnavailable: another process kept the file locked for the time-out.
            StorageFull: no room; nothing was written.
            InvalidEvent: an entry is larger than `ENTRY_BYTES_MAX`.
        """
        self._check_usable()
        if not entries:
            return
        check_entries(entries, self._partitions, place=str(self._path))
        ticket = _Ticket(entries)
        self._waiting.append(ticket)
        with self._write_lock:
            if not ticket.done:
                self._commit_waiting()
        if ticket.error is not None:
            raise ticket.error

    def _commit_waiting(self) -> None:
        """Write what every waiting caller brought, in one transaction; all of them learn how it went."""
        group = []
        while self._waiting:
            group.append(self._waiting.popleft())
        error: TokentapeError | None = self._unavailable("the append was interrupted")
        try:
            with self._mapped("append"), self._transaction() as connection:
                self._insert(connection, [entry for ticket in group for entry in ticket.entries])
                count = _count(connection)
            self._end.write(uuid.UUID(self._log_id).bytes, count)
            error = None
        except TokentapeError as problem:
            error = problem
        finally:
            for ticket in group:
                ticket.error, ticket.done = error, True

    def _insert(self, connection: sqlite3.Connection, entries: Sequence[Entry]) -> None:
        values: dict[int, list[bytes]] = defaultdict(list)
        for entry in entries:
            values[entry.partition].append(entry.value)
        for partition, own in values.items():
            tail = self._tail(connection, partition)
            # The wall clock may step back; append times of one partition do not.
            tail = replace(tail, appended_at=max(clock.now_us(), tail.appended_at))
            for chunk in chunks(own):
                batch = StoredBatch(partition, tail.offset_next, tail.appended_at, chunk)
                connection.execute("INSERT INTO batch VALUES (?, ?, ?, ?, ?, ?)", batch_to_row(batch))
                tail = replace(tail, offset_next=batch.offset_next)
            _put_tail(connection, tail)

    def trim(self, partition: int, before_offset: int) -> None:
        """Forget the records of a partition below `before_offset`; whole batches of them leave the file, overwritten.

        Raises:
            LogChanged: `before_offset` lies beyond the end.
        """
        self._check_usable()
        with self._write_lock, self._mapped("trim"):
            with self._transaction() as connection:
                tail = self._tail(connection, partition)
                if before_offset > tail.offset_next:
                    raise self._out_of_range(tail, before_offset)
                if before_offset <= tail.offset_first:
                    return
                span = (row_id(partition, 0), row_id(partition, before_offset), row_id(partition, before_offset))
                connection.execute("DELETE FROM batch WHERE id >= ? AND id < ? AND id + count <= ?", span)
                _put_tail(connection, replace(tail, offset_first=before_offset))
            crash_point("log.trimmed")
            # `execute` would give back one page only: this statement makes a step of each.
            connection.executescript(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")
            # What was overwritten still stands in the write-ahead log until it is cut back.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    # Reading

    def read(self, partition: int, offset: int, *, limit: int, wait_s: float = 0.0) -> Batch:
        """At most `limit` records from `offset` on, fewer once 64 MiB are exceeded.

        Raises:
            LogChanged: the offset is not in the log, or the file was replaced.
            CorruptStore: a batch does not match its checksum.
        """
        self.wait({partition: offset}, wait_s=wait_s)
        values: list[bytes] = []
        times: list[int] = []
        size = 0
        with self._reading("read") as connection:
            tail = self._tail(connection, partition)
            while (at := offset + len(values)) < tail.offset_next and len(values) < limit and size < _READ_BYTES_MAX:
                batch = self._batch(connection, partition, at)
                start = at - batch.offset_first
                taken = batch.values[start : start + limit - len(values)]
                values += taken
                times += [batch.appended_at] * len(taken)
                size += sum(map(len, taken))
        return Batch(partition, offset, times, values)

    def wait(self, offsets: dict[int, int], *, wait_s: float) -> set[int]:
        """Partitions with a record at the given offset, waiting up to `wait_s` for one.

        Raises:
            LogChanged: an offset lies before the first retained record or beyond the end.
        """
        deadline = time.monotonic() + wait_s
        while True:
            ready = self._ready(offsets)
            left = deadline - time.monotonic()
            if ready or left <= 0:
                return ready
            time.sleep(min(_POLL_S, left))

    def bounds(self, partition: int) -> tuple[int, int]:
        """First retained offset and the offset after the last record."""
        with self._reading("bounds") as connection:
            tail = self._tail(connection, partition)
        return tail.offset_first, tail.offset_next

    def acknowledge(self, offsets: dict[int, int]) -> None:
        """Nothing to tell: the index keeps its own offsets, and a note here would cost a disk flush."""

    def _ready(self, offsets: dict[int, int]) -> set[int]:
        with self._reading("read") as connection:
            tails = [self._tail(connection, partition) for partition in offsets]
        for tail in tails:
            if not tail.offset_first <= offsets[tail.partition] <= tail.offset_next:
                raise self._out_of_range(tail, offsets[tail.partition])
        return {tail.partition for tail in tails if offsets[tail.partition] < tail.offset_next}

    def _batch(self, connection: sqlite3.Connection, partition: int, offset: int) -> StoredBatch:
        """The batch that holds `offset`; the last one of each partition is kept for a reader that took a part of it."""
        kept = self._kept.get(partition)
        if kept is not None and kept.offset_first <= offset < kept.offset_next:
            return kept
        row = connection.execute(
            "SELECT * FROM batch WHERE id <= ? AND id >= ? ORDER BY id DESC LIMIT 1",
            (row_id(partition, offset), row_id(partition, 0)),
        ).fetchone()
        batch = batch_from_row(row) if row is not None else None
        if batch is None or not batch.offset_first <= offset < batch.offset_next:
            raise self._corrupt(f"partition {partition}: the batch of offset {offset} is missing or does not match its checksum")
        if len(batch.values) > 1:
            self._kept[partition] = batch
        return batch

    def _tail(self, connection: sqlite3.Connection, partition: int) -> Tail:
        if not 0 <= partition < self._partitions:
            raise LogChanged(f"no partition {partition}: the log has {self._partitions}", operation="use log", place=str(self._path))
        row = connection.execute("SELECT * FROM tail WHERE partition = ?", (partition,)).fetchone()
        tail = tail_from_row(row)
        if tail is None:
            raise self._corrupt(f"the end of partition {partition} is missing or does not match its checksum")
        return tail

    # Identity

    def _create(self, partitions: int, noted: tuple[bytes, int] | None) -> None:
        with self._transaction() as connection:
            # Any table means that the log stands already: a damaged one must never be made anew over its events.
            if connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                return
            if noted is not None:
                raise self._end.cut(noted[1])
            for table in TABLES:
                connection.execute(table)
            facts = {"log_id": str(uuid.uuid4()), "partitions": str(partitions), "layout": _LAYOUT}
            connection.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())
            for partition in range(partitions):
                _put_tail(connection, Tail(partition))

    def _identity(self) -> tuple[str, int]:
        with self._reading("open log") as connection:
            if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise self._missing()
            facts = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        try:
            layout, log_id, partitions = facts["layout"], str(uuid.UUID(facts["log_id"])), int(facts["partitions"])
        except (KeyError, ValueError) as problem:
            raise self._corrupt("the file does not say which log it is") from problem
        if layout != _LAYOUT:
            raise self._corrupt(f"the file has layout {layout}; this version reads {_LAYOUT}")
        return log_id, partitions

    def _check_end(self, noted: tuple[bytes, int] | None) -> None:
        if noted is None:
            return
        with self._reading("open log") as connection:
            count = _count(connection) if noted[0] == uuid.UUID(self._log_id).bytes else 0
        if count < noted[1]:
            self.close()
            raise self._end.cut(noted[1] - count)

    # Connections

    def _start(self) -> None:
        """Begin with nothing: connections and locks that came over a fork may not be used."""
        self._pid = os.getpid()
        self._inode: tuple[int, int] | None = None
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._waiting: deque[_Ticket] = deque()
        self._kept: dict[int, StoredBatch] = {}

    def _check_usable(self) -> None:
        """Raise unless the log is open and its file is the one that was opened; start afresh after a fork."""
        if self._closed:
            raise self._unavailable("the log is closed")
        if self._pid != os.getpid():
            forget(self._writer, self._reader)
            self._start()
        if self._inode is not None and self._inode != _inode(self._path):
            raise LogChanged("the file was removed or replaced while in use", operation="use log", place=str(self._path), hint="restart")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: all of it or nothing."""
        if self._writer is None:
            self._writer = self._connect()
            self._writer.execute("PRAGMA busy_timeout=0")
        connection = self._writer
        self._begin(connection)
        try:
            yield connection
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Take the write lock, trying again in short random steps: SQLite's own grow to 100 ms and starve some."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as problem:
                if problem.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(random.uniform(0.0005, 0.004))

    @contextlib.contextmanager
    def _reading(self, operation: str) -> Iterator[sqlite3.Connection]:
        """One consistent view of the file."""
        self._check_usable()
        with self._read_lock, self._mapped(operation):
            if self._reader is None:
                self._reader = self._connect()
            self._reader.execute("BEGIN")
            try:
                yield self._reader
            finally:
                self._reader.execute("ROLLBACK")

    def _connect(self) -> sqlite3.Connection:
        connection = connect(self._path, timeout_s=self._timeout_s)
        self._inode = self._inode or _inode(self._path)
        return connection

    def taken(self) -> Taken:
        """Bytes of its files, and how full the disk under them is."""
        size = 0
        for path in self._path.parent.iterdir():
            with contextlib.suppress(OSError):  # SQLite's own files come and go
                size += path.stat().st_size
        usage = shutil.disk_usage(self._path.parent)
        return Taken(size, usage.used / (usage.used + usage.free))

    def close(self) -> None:
        """Release the file; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._end.close()
        if self._pid != os.getpid():
            forget(self._writer, self._reader)
            return
        with self._write_lock, self._read_lock:
            for connection in (self._writer, self._reader):
                if connection is not None:
                    connection.close()

    # Errors

    def _mapped(self, operation: str) -> contextlib.AbstractContextManager[None]:
        return mapped(operation, self._path)

    def _unavailable(self, fault: str, hint: str = "try again") -> LogUnavailable:
        return LogUnavailable(fault, operation="use log", place=str(self._path), hint=hint)

    def _missing(self) -> LogUnavailable:
        return self._unavailable("no log there", hint="record something first, or name another data directory")

    def _corrupt(self, fault: str) -> CorruptStore:
        hint = "restore the file from a copy; events already indexed are safe"
        return CorruptStore(fault, operation="read log", place=str(self._path), hint=hint)

    def _out_of_range(self, tail: Tail, offset: int) -> LogChanged:
        fault = f"partition {tail.partition} holds offsets {tail.offset_first} to {tail.offset_next}, not {offset}"
        hint = "the log was trimmed or replaced; `tokentape rebuild` makes the index again"
        return LogChanged(fault, operation="read", place=str(self._path), hint=hint)


def _count(connection: sqlite3.Connection) -> int:
    """How many events were ever appended."""
    return int(connection.execute("SELECT sum(offset_next) FROM tail").fetchone()[0] or 0)


def _put_tail(connection: sqlite3.Connection, tail: Tail) -> None:
    connection.execute("INSERT OR REPLACE INTO tail VALUES (?, ?, ?, ?, ?)", tail_to_row(tail))


def _inode(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, None when it is gone."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _make_folder(folder: Path) -> None:
    """Make a folder that is still there after a power cut."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
