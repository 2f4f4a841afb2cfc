"""Cold segments: sorted zstd Parquet of one tenant, day and retention class each, written once and named by content.

The columns are those of the hot table, so one query serves both. Bloom filters are off: with them DuckDB 1.5.5 finds no
row by equality on a binary column.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import CorruptStore
from schemas.registry import CURRENT, SchemaRegistry
from store import duck
from store.columns import current_columns
from store.hot import attach, detach
from store.ledger.merkle import root_of_packed
from store.recode import Recoded, recode
from store.shards import Shard
from store.tables import value

SEGMENT_BYTES_MAX = 256 << 20
"""Where a segment rolls; estimated from the hot rows, which are never smaller than the cold ones."""

ROW_GROUP_ROWS = 20_480
"""A multiple of DuckDB's vector of 2,048: small enough that one session touches one or two groups."""

SEGMENT_ROWS_MAX = 10 * ROW_GROUP_ROWS
"""Where a segment rolls however small its rows are: writing one and making one anew takes some kB of memory for each."""

_COPY = (
    f"FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 15, PARQUET_VERSION V2, ROW_GROUP_SIZE {ROW_GROUP_ROWS}, WRITE_BLOOM_FILTER false"
)
"""Measured on real text: level 15 saves 8 % over level 3 for a tenth of the time that reading back takes; V2's encodings
(DELTA_BINARY_PACKED, BYTE_STREAM_SPLIT for logprobs) save another 8 %."""

_NAME_MAX = 100
"""Characters of a tenant or class in a key; longer ones are cut and get a hash."""

ATTACHED_MAX = 32
"""Shards read in place; each holds a file open, and a plan over more gets slow."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one segment is to hold: rows of one tenant, day and class whose session lies in [first, last]."""

    tenant: str
    day: str
    retention_class: str
    session_first: bytes
    session_last: bytes
    rows: int


@dataclass(frozen=True, slots=True)
class Draft:
    """A segment written to a local file, not yet in the store. `sha256` is hex over the file, times are µs."""

    part: Part
    path: Path
    sha256: str
    bytes: int
    time_min: int
    time_max: int

    def key(self, number: int) -> str:
        """The object's key; `number` counts the segments of its tenant, day and class."""
        part = self.part
        folder = f"events/tenant={_name(part.tenant)}/day={part.day}"
        return f"{folder}/{_name(part.retention_class)}-{number:04d}-{self.sha256[:8]}.parquet"


def _name(text: str) -> str:
    """Text from events as part of a key: whatever a producer sent, it must not block the tier."""
    quoted = quote(text, safe="-_.~").replace(".", "%2E", 1) if text.startswith(".") else quote(text, safe="-_.~")
    return quoted if len(quoted) <= _NAME_MAX else f"{quoted[:_NAME_MAX]}~{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def stage(connection: duckdb.DuckDBPyConnection, shards: Sequence[Shard]) -> None:
    """Rows of many shards, with the `day` that each was filed under, in the table `staged` of the connection's own file.

    Raises:
        CorruptStore: a shard is damaged. StoreUnavailable: one is gone. StorageFull: no room.
    """
    definition = ", ".join(f'"{name}" {kind}' for name, kind in {**current_columns(), "day": "VARCHAR"}.items())
    try:
        connection.execute(f"CREATE TABLE staged ({definition})")
        for start in range(0, len(shards), ATTACHED_MAX):
            group = shards[start : start + ATTACHED_MAX]
            connection.execute(f"INSERT INTO staged BY NAME SELECT * FROM {attach(connection, group, day=True)}")
            detach(connection, group)
        connection.execute("CHECKPOINT")
    except duckdb.Error as error:
        raise duck.mapped(error, operation="stage shards", place="staged") from error


def plan_parts(connection: duckdb.DuckDBPyConnection, relation: str, bytes_per_row: float, bytes_max: int, rows_max: int) -> list[Part]:
    """Cut the rows of a relation with a `day` column into parts, between sessions, each below both limits if it can be.

    Raises:
        CorruptStore: the rows cannot be read.
    """
    rows_max = max(1, min(rows_max, int(bytes_max / max(bytes_per_row, 1.0))))
    query = f"SELECT tenant, day, retention_class, session_id, count(*) FROM {relation} GROUP BY ALL ORDER BY ALL"
    try:
        groups = connection.execute(query).fetchall()
    except duckdb.Error as error:
        raise duck.mapped(error, operation="plan segments", place="hot") from error
    parts: list[Part] = []
    for tenant, day, retention_class, session, count in groups:
        last = parts[-1] if parts else None
        if last and (last.tenant, last.day, last.retention_class) == (tenant, day, retention_class) and last.rows + count <= rows_max:
            parts[-1] = Part(tenant, day, retention_class, last.session_first, session, last.rows + count)
        else:
            parts.append(Part(tenant, day, retention_class, session, session, count))
    return parts


def read_sorted(connection: duckdb.DuckDBPyConnection, relation: str, part: Part) -> pa.RecordBatchReader:
    """The rows of a part by session, partition and offset, in batches of a row group at the most; without the payload columns that no
    row has. The connection is in use until all are read.

    Sorted a slice of sessions at a time: in a sort each row takes the room of all 180 fields, whichever of them are null.

    Raises:
        CorruptStore: the rows cannot be read; while they are read DuckDB's own errors.
    """
    try:
        counted = f"SELECT session_id, kind, count(*) FROM {relation} WHERE {_where(part)} GROUP BY ALL ORDER BY ALL"
        counts = connection.execute(counted).fetchall()
        kinds = {kind for _, kind, _ in counts}
        slices = [replace(part, session_first=first, session_last=last) for first, last in _slices(counts)]
        names = ", ".join(f'"{name}"' for name in _columns_of(connection, relation) if name in kinds or name not in CURRENT.kinds)
        select = f"SELECT {names} FROM {relation}"
        schema = connection.execute(f"{select} LIMIT 0").to_arrow_table().schema
    except duckdb.Error as error:
        raise duck.mapped(error, operation="read rows", place=part.day) from error

    def batches() -> Iterator[pa.RecordBatch]:
        for piece in slices:
            query = f'{select} WHERE {_where(piece)} ORDER BY session_id, "partition", "offset"'
            # Batches as DuckDB makes them: of one that Arrow cut out of a larger one it reads nested values at the wrong places.
            yield from connection.execute(query).to_arrow_reader(ROW_GROUP_ROWS)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _where(part: Part) -> str:
    """Condition of the rows of a part."""
    sessions = f"session_id BETWEEN {value(part.session_first)} AND {value(part.session_last)}"
    return f"tenant = {value(part.tenant)} AND day = {value(part.day)} AND retention_class = {value(part.retention_class)} AND {sessions}"


def _columns_of(connection: duckdb.DuckDBPyConnection, relation: str) -> dict[str, str]:
    """Columns of a relation but `day`, and their types; those of a newer version among them."""
    described = connection.execute(f"DESCRIBE SELECT * EXCLUDE (day) FROM {relation}").fetchall()
    return {name: kind for name, kind, *_ in described}


def _slices(counts: Sequence[tuple[bytes, str, int]]) -> Iterator[tuple[bytes, bytes]]:
    """First and last session of slices of a row group each, from rows by session and kind; a longer session is one of its own."""
    first, last, rows = b"", b"", 0
    for session, group in itertools.groupby(counts, key=itemgetter(0)):
        count = sum(number for *_, number in group)
        if rows and rows + count > ROW_GROUP_ROWS:
            yield first, last
            rows = 0
        first, last, rows = (first if rows else session), session, rows + count
    if rows:
        yield first, last


def write_part(connection: duckdb.DuckDBPyConnection, relation: str, part: Part, path: Path) -> Draft:
    """Write one part to a local Parquet file, sorted by session, partition and offset.

    Raises:
        CorruptStore: the rows cannot be read, or are not those that were planned.
        StorageFull: no room for the file.
    """
    reader = read_sorted(connection, relation, part)
    there = set(reader.schema.names)
    try:
        types = _columns_of(connection, relation)
        columns = ", ".join(f'"{name}"' if name in there else f'CAST(NULL AS {kind}) AS "{name}"' for name, kind in types.items())
        with connection.cursor() as writer:  # the connection itself reads meanwhile
            writer.register("sorted_rows", reader)
            writer.execute(f"COPY (SELECT {columns} FROM sorted_rows) TO {_literal(path)} ({_COPY})")
        facts = "epoch_us(min(recorded_at)), epoch_us(max(recorded_at)), count(*)"
        written = f"SELECT {facts} FROM read_parquet({_literal(path)}, hive_partitioning = false)"
        time_min, time_max, rows = connection.execute(written).fetchall()[0]
    except duckdb.Error as error:
        raise duck.mapped(error, operation="write segment", place=str(path)) from error
    if rows != part.rows:
        raise CorruptStore(f"{rows} rows were written, {part.rows} were planned", operation="write segment", place=str(path))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Draft(part, path, digest, path.stat().st_size, time_min, time_max)


def _literal(path: Path) -> str:
    """A path in SQL."""
    return "'" + str(path).replace("'", "''") + "'"


@dataclass(frozen=True, slots=True)
class Held:
    """The records of one partition in a segment, in no order: offsets, and beside each the SHA-256 of the framed bytes.

    40 bytes a record, because a whole day of them is in memory at once. `hashes` has shape (n, 32), dtype uint8.
    """

    log_id: str
    partition: int
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    hashes: np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class SegmentContent:
    """What reading a segment back shows: number of rows, RFC 9162 root over their leaves in row order, the records as the
    log held them, and the fingerprints of the schemas that wrote them."""

    rows: int
    root: bytes
    held: tuple[Held, ...]
    schemas: tuple[bytes, ...]


def read_content(data: bytes, registry: SchemaRegistry, *, sha256: str, place: str) -> SegmentContent:
    """Check a segment's bytes, then re-encode every row to the bytes that were in the log.

    Raises:
        CorruptStore: bytes with another SHA-256 (hex), not a Parquet file, or rows that no event explains.
        UnknownSchema: a writer schema that the registry does not know.
    """
    _check_bytes(data, sha256, place)
    leaves, schemas = bytearray(), set[bytes]()
    pieces: dict[tuple[str, int], list[tuple[Any, Any]]] = defaultdict(list)
    for piece in _recoded(data, registry, place):
        leaves += piece.leaves
        schemas |= piece.schemas
        hashes = np.frombuffer(piece.hashes, np.uint8).reshape(-1, 32)
        for log_id, partition, rows in _by_partition(piece):
            pieces[log_id, partition].append((piece.offsets[rows], hashes[rows]))
    held = tuple(
        Held(*where, np.concatenate([item[0] for item in parts]).astype(np.int64), np.concatenate([item[1] for item in parts]))
        for where, parts in sorted(pieces.items())
    )
    return SegmentContent(len(leaves) // 32, root_of_packed(bytes(leaves)), held, tuple(sorted(schemas)))


def read_leaves(data: bytes, registry: SchemaRegistry, *, sha256: str, place: str) -> bytes:
    """The leaf hashes of a segment's rows in their order, 32 bytes each. Raises as `read_content` does."""
    _check_bytes(data, sha256, place)
    return b"".join(piece.leaves for piece in _recoded(data, registry, place))


def _check_bytes(data: bytes, sha256: str, place: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CorruptStore(f"SHA-256 is {found[:16]}…, entered as {sha256[:16]}…", operation="read segment", place=place)


def _recoded(data: bytes, registry: SchemaRegistry, place: str) -> Iterator[Recoded]:
    try:
        # Without Arrow's threads, which a process that ends at once after reading can trip over; encoding takes the time anyway.
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        for batch in file.iter_batches(batch_size=ROW_GROUP_ROWS, use_threads=False):
            yield from recode(batch, registry)
    except CorruptStore as error:
        raise CorruptStore(error.fault, operation="read segment", place=place) from error
    except (OSError, ValueError, KeyError) as error:  # Arrow's errors derive from these
        raise CorruptStore(f"not a readable segment: {error}", operation="read segment", place=place) from error


def _by_partition(piece: Recoded) -> Iterator[tuple[str, int, Any]]:
    """Places of a piece's rows by log and partition."""
    coded = piece.log_ids.dictionary_encode()
    numbers = coded.indices.to_numpy(zero_copy_only=False)
    for number, log_id in enumerate(coded.dictionary.to_pylist()):
        for partition in np.unique(piece.partitions[numbers == number]):
            yield log_id, int(partition), np.flatnonzero((numbers == number) & (piece.partitions == partition))
