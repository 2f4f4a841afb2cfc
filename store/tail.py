"""The tail: the one DuckDB file that an indexer writes, until it is sealed into an immutable shard.

A commit is one transaction: rows, next offsets, running digests, producers' marks, gaps, duplicates, quarantine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from schemas.codec import ID_SLICE
from schemas.errors import CorruptStore, StorageFull
from store import duck, tables
from store.crashpoints import crash_point
from store.digest import DIGEST_START, advance
from store.ingest_batch import Group, Prepared, Preparer
from store.sequence import Judgement, judge

# Two cores insert as fast as the log can be read; more memory than this only delays writing.
_THREADS = 2
_MEMORY = "2GB"
# Whole row groups go straight into the file, the rest of a commit through the write-ahead log, at ten times the bytes.
_ROW_GROUP = 32_768
# The write-ahead log is folded in when the tail is sealed, which is soon.
_WAL_MAX = "1GB"
# Rows of one statement when small tables are filled.
_VALUES_MAX = 500


@dataclass
class PartitionState:
    """Where one partition stands after the last commit; `offset_first` and `digest_first` are those of the tail's beginning."""

    partition: int
    offset_next: int
    digest: bytes = DIGEST_START
    day: str = ""
    appended_at: int = 0
    duplicates: int = 0
    quarantined: int = 0
    marks: dict[bytes, int] = field(default_factory=dict)
    offset_first: int = 0
    digest_first: bytes = DIGEST_START
    rows: int = 0
    dropped: int = 0

    def begin(self) -> None:
        """A new tail begins here."""
        self.offset_first, self.digest_first = self.offset_next, self.digest
        self.rows = self.dropped = 0


@dataclass(frozen=True, slots=True)
class Committed:
    """What one commit did, in records."""

    rows: int = 0
    duplicates: int = 0
    quarantined: int = 0
    lost: int = 0


class Tail:
    """An open tail. Only its owner opens it; whoever finds it after the owner's death goes through `store.sealing`."""

    def __init__(self, path: Path, log_id: str, day: str, preparer: Preparer) -> None:
        """Make a new tail.

        Raises:
            StorageFull, CorruptStore: the file cannot be made.
        """
        self.path = path
        self.name = path.stem
        self.day = day
        self._log_id = log_id
        self._preparer = preparer
        path.parent.mkdir(parents=True, exist_ok=True)
        self.connection = open_file(path)
        with self._mapped("create tail"), self._transaction():
            for statement in tables.STATE_TABLES:
                self.connection.execute(statement)
            self._fill("meta", [(self.name, "sealed", day, log_id)])
        crash_point("tail.created")

    def commit(self, batch: Sequence[Prepared], states: dict[int, PartitionState], fence: Callable[[], None]) -> Committed:
        """Insert prepared records, each continuing its partition's state, and bring the states forward.

        Records that cannot be read go to quarantine; `fence` is asked last before the transaction commits.

        Raises:
            Fenced: what `fence` raises; nothing was committed.
            StorageFull, CorruptStore: the file cannot be written; the tail must be opened anew.
        """
        saved = {item.partition: _copy(states[item.partition]) for item in batch}
        try:
            with self._mapped("commit"):
                total = self._commit(batch, states, fence)
        except BaseException:
            states.update(saved)
            raise
        crash_point("indexer.after_commit")
        return total

    def _commit(self, batch: Sequence[Prepared], states: dict[int, PartitionState], fence: Callable[[], None]) -> Committed:
        try:
            with self._transaction():
                return self._insert(batch, states, fence)
        except (_NotOneToOne, duckdb.Error) as problem:
            sifted = self._sift(batch, problem)
        with self._transaction():
            return self._insert(sifted, states, fence)

    def _sift(self, batch: Sequence[Prepared], problem: Exception) -> list[Prepared]:
        """The batch without the records that cannot be read; the problem itself when it lies elsewhere."""
        if isinstance(problem, duckdb.Error) and isinstance(duck.mapped(problem, operation="", place=""), StorageFull):
            raise problem
        with duck.connect(extensions=("avro",), threads=1) as probe:
            sifted = [self._preparer.sift(item, probe) for item in batch]
        if all(len(after.bad) == len(before.bad) for after, before in zip(sifted, batch, strict=True)):
            raise problem
        return sifted

    def _insert(self, batch: Sequence[Prepared], states: dict[int, PartitionState], fence: Callable[[], None]) -> Committed:
        crash_point("indexer.before_insert")
        inserted = self._insert_rows(batch)
        arrived = self._arrived(batch)
        if not _one_to_one(batch, inserted, arrived):
            raise _NotOneToOne
        total = self._bring_forward(batch, states, arrived)
        self._write_positions(batch, states)
        crash_point("indexer.before_commit")
        fence()
        return total

    def _insert_rows(self, batch: Sequence[Prepared]) -> int:
        """Let DuckDB read the container files, those of one schema and table in one statement; how many rows came out."""
        together: dict[tuple[bytes, str | None], list[Group]] = {}
        for item in batch:
            for group in item.groups:
                together.setdefault((group.schema.fingerprint, group.kind), []).append(group)
        inserted = 0
        for (_, kind), groups in together.items():
            tables.create_table(self.connection, kind)
            select = tables.select_container(groups[0].schema, self._log_id, self._preparer.mark, kind=kind)
            files = [str(group.path) for group in groups]
            row = self.connection.execute(f"INSERT INTO {tables.table_of(kind)} {select}", [files]).fetchone()
            inserted += row[0] if row else 0
        return inserted

    def _arrived(self, batch: Sequence[Prepared]) -> _Arrived:
        """Ids, producers and numbers of the rows just inserted, in the order of partition and offset."""
        spans = [f'("partition" = {item.partition} AND "offset" BETWEEN {item.offset_first} AND {item.offset_next - 1})' for item in batch]
        columns = '"partition", "offset", appended_at, event_id, producer_id, producer_seq, kind = \'producer_heartbeat\' AS heartbeat'
        kinds = {group.kind for item in batch for group in item.groups}
        selects = [f"SELECT {columns} FROM {tables.table_of(kind)} WHERE {' OR '.join(spans)}" for kind in kinds]
        if not selects:
            return _Arrived.nothing()
        return _Arrived.of(self.connection.execute(" UNION ALL ".join(selects)).to_arrow_table())

    def _bring_forward(self, batch: Sequence[Prepared], states: dict[int, PartitionState], arrived: _Arrived) -> Committed:
        """Judge duplicates and gaps, fill the small tables, and advance the states."""
        total = Committed()
        for item in sorted(batch, key=lambda item: item.offset_first):
            state = states[item.partition]
            if state.offset_next != item.offset_first:
                raise CorruptStore(
                    f"partition {item.partition} stands at {state.offset_next}, the batch begins at {item.offset_first}",
                    operation="index",
                    place=str(self.path),
                )
            mine = arrived.of_span(item.partition, item.offset_first, item.offset_next)
            judgement = judge(mine.producers, mine.seqs, state.marks)
            self._write_judgement(item, mine, judgement)
            self._write_quarantine(item)
            state.marks.update(judgement.marks)
            _advance(state, item, len(mine.offsets) - len(judgement.duplicates), len(judgement.duplicates))
            total = Committed(
                total.rows + len(mine.offsets) - len(judgement.duplicates),
                total.duplicates + len(judgement.duplicates),
                total.quarantined + len(item.bad),
                total.lost + sum(last - first + 1 for _, _, first, last in judgement.gaps),
            )
        return total

    def _write_judgement(self, item: Prepared, mine: _Arrived, judgement: Judgement) -> None:
        partition = item.partition
        offsets = [int(mine.offsets[index]) for index in judgement.duplicates]
        if offsets:
            listed = ", ".join(map(str, offsets))
            for kind in {group.kind for group in item.groups}:
                where = f'"partition" = {partition} AND "offset" IN ({listed})'
                self.connection.execute(f"DELETE FROM {tables.table_of(kind)} WHERE {where}")
        self._fill("duplicate", [(partition, offset, item.hashes[offset - item.offset_first]) for offset in offsets])
        self._fill("mark", [(partition, producer, seq) for producer, seq in judgement.marks.items()])
        at = [(int(mine.offsets[index]), int(mine.appended_at[index])) for index, *_ in judgement.gaps]
        gaps = zip(judgement.gaps, at, strict=True)
        self._fill("gap", [(partition, producer, first, last, *where) for (_, producer, first, last), where in gaps])
        if mine.heartbeats.any():
            self._write_claims(item)

    def _write_claims(self, item: Prepared) -> None:
        """What heartbeats say that their producers gave out, in whatever partition."""
        self.connection.execute(
            "INSERT INTO claim_seq SELECT position.partition, producer_id, max(position.seq), max(epoch_us(appended_at)) FROM"
            " (SELECT producer_id, appended_at, unnest(producer_heartbeat.positions) AS position FROM"
            f" {tables.table_of(None)} WHERE kind = 'producer_heartbeat' AND \"partition\" = {item.partition}"
            f' AND "offset" BETWEEN {item.offset_first} AND {item.offset_next - 1}) GROUP BY ALL'
        )

    def _write_quarantine(self, item: Prepared) -> None:
        for bad in item.bad:
            row = (item.partition, bad.offset, bad.appended_at, bad.error, bad.sha256, bad.raw)
            self.connection.execute("INSERT INTO quarantine VALUES (?, ?, ?, ?, ?, ?)", row)

    def _write_positions(self, batch: Sequence[Prepared], states: dict[int, PartitionState]) -> None:
        touched = sorted({item.partition for item in batch})
        self.connection.execute(f"DELETE FROM position WHERE partition IN ({', '.join(map(str, touched))})")
        self._fill("position", [_position_row(states[partition]) for partition in touched])

    def _fill(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        for start in range(0, len(rows), _VALUES_MAX):
            part = rows[start : start + _VALUES_MAX]
            values = ", ".join("(" + ", ".join(map(tables.value, row)) + ")" for row in part)
            self.connection.execute(f"INSERT INTO {table} VALUES {values}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing."""
        self.connection.execute("BEGIN")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(duckdb.Error):
                self.connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _mapped(self, operation: str) -> Iterator[None]:
        try:
            yield
        except _NotOneToOne as problem:
            raise CorruptStore("records do not come out one to one", operation=operation, place=str(self.path)) from problem
        except duckdb.Error as problem:
            raise duck.mapped(problem, operation=operation, place=str(self.path)) from problem

    def close(self) -> None:
        """Leave the file as the last commit left it; safe to call twice."""
        self.connection.close()


class _NotOneToOne(Exception):
    """The rows are not the records; stays inside this module."""


@dataclass(frozen=True, slots=True)
class _Arrived:
    """Columns of inserted rows in the order of partition and offset: ids as pairs of 64-bit numbers, producers as one each."""

    partitions: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    appended_at: np.ndarray[Any, Any]
    ids: np.ndarray[Any, Any]
    producers: np.ndarray[Any, Any]
    seqs: np.ndarray[Any, Any]
    heartbeats: np.ndarray[Any, Any]

    @classmethod
    def nothing(cls) -> _Arrived:
        none = np.empty(0, np.int64)
        return cls(none, none, none, np.empty((0, 2), np.uint64), np.empty(0, np.uint64), none, np.empty(0, bool))

    @classmethod
    def of(cls, table: Any) -> _Arrived:
        columns = [table.column(name).combine_chunks() for name in table.column_names]
        partitions, offsets = (column.to_numpy(zero_copy_only=False).astype(np.int64) for column in columns[:2])
        times = columns[2].cast("int64").to_numpy(zero_copy_only=False)
        flags = columns[6].to_numpy(zero_copy_only=False).astype(bool)
        seqs = columns[5].to_numpy(zero_copy_only=False).astype(np.int64)
        rest = (partitions, offsets, times, _numbers(columns[3], 2), _numbers(columns[4], 1)[:, 0], seqs, flags)
        return cls(*rest).take(np.lexsort((offsets, partitions)))

    def take(self, places: Any) -> _Arrived:
        return _Arrived(
            self.partitions[places],
            self.offsets[places],
            self.appended_at[places],
            self.ids[places],
            self.producers[places],
            self.seqs[places],
            self.heartbeats[places],
        )

    def of_span(self, partition: int, offset_first: int, offset_next: int) -> _Arrived:
        return self.take((self.partitions == partition) & (self.offsets >= offset_first) & (self.offsets < offset_next))


def _numbers(column: Any, width: int) -> np.ndarray[Any, Any]:
    """A BLOB column of fixed size as rows of `width` big-endian 64-bit numbers; other sizes give no rows, which fails the check."""
    data = b"".join(column.to_pylist())
    if len(data) != len(column) * width * 8:
        return np.empty((0, width), np.uint64)
    return np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, width)


def _one_to_one(batch: Sequence[Prepared], inserted: int, arrived: _Arrived) -> bool:
    """Whether the rows are exactly the records, each at its offset with the id that its bytes begin with."""
    groups = [group.records for item in batch for group in item.groups]
    expected = sum(map(len, groups))
    if inserted != expected or len(arrived.offsets) != expected or len(arrived.ids) != expected:
        return False
    if not expected:
        return True
    partitions = np.concatenate([np.full(len(records), records.partition) for records in groups])
    offsets = np.concatenate([np.asarray(records.offsets, np.int64) for records in groups])
    data = b"".join([value[ID_SLICE] for records in groups for value in records.values])
    ids = np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, 2)
    order = np.lexsort((offsets, partitions))
    same = (partitions[order] == arrived.partitions).all() and (offsets[order] == arrived.offsets).all()
    return bool(same and (ids[order] == arrived.ids).all())


def _advance(state: PartitionState, item: Prepared, rows: int, duplicates: int) -> None:
    state.digest = advance(state.digest, item.hashes)
    state.offset_next = item.offset_next
    state.day = item.day
    state.appended_at = max(state.appended_at, item.appended_at)
    state.rows += rows
    state.duplicates += duplicates
    state.quarantined += len(item.bad)
    state.dropped += duplicates + len(item.bad)


def _copy(state: PartitionState) -> PartitionState:
    saved = PartitionState(**state.__dict__)
    saved.marks = dict(state.marks)
    return saved


def _position_row(state: PartitionState) -> tuple[Any, ...]:
    span = (state.partition, state.offset_first, state.digest_first, state.offset_next, state.digest, state.day)
    return (*span, state.appended_at, state.duplicates, state.quarantined, state.rows, state.dropped)


def open_file(path: Path, *, read_only: bool = False) -> duckdb.DuckDBPyConnection:
    """A connection to a tail or shard file.

    Raises:
        CorruptStore: the file is damaged. StorageFull: no room.
    """
    connection = duck.connect(extensions=() if read_only else ("avro",), threads=_THREADS, memory_limit=_MEMORY)
    options = "READ_ONLY" if read_only else f"ROW_GROUP_SIZE {_ROW_GROUP}"
    try:
        connection.execute("ATTACH '{}' AS tail ({})".format(str(path.absolute()).replace("'", "''"), options))
        connection.execute("USE tail")
        # Rows carry their offsets, so their place in the file says nothing; files of several partitions then go in side by side.
        connection.execute(f"SET wal_autocheckpoint = '{_WAL_MAX}'; SET preserve_insertion_order = false")
    except duckdb.Error as problem:
        connection.close()
        raise duck.mapped(problem, operation="open", place=str(path)) from problem
    return connection


def sync_file(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
