"""Cold segments: sorted zstd Parquet of one tenant, day and retention class each, written once and named by content.

The columns are those of the hot table, so one query serves both. Bloom filters are off: with them DuckDB 1.5.5 finds no
row by equality on a binary column.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.codec import leaf_hash
from schemas.errors import CorruptStore
from schemas.registry import SchemaRegistry
from store import duck
from store.ledger.merkle import root_of
from store.rows import Row, framed, rows_to_datums

SEGMENT_BYTES_MAX = 256 << 20
"""Where a segment rolls; estimated from the hot rows, which are never smaller than the cold ones."""

ROW_GROUP_ROWS = 20_480
"""A multiple of DuckDB's vector of 2,048: small enough that one session touches one or two groups."""

_COPY = (
    "FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 6, PARQUET_VERSION V2, "
    f"ROW_GROUP_SIZE {ROW_GROUP_ROWS}, WRITE_BLOOM_FILTER false, DICTIONARY_SIZE_LIMIT 65536"
)


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
        return f"events/tenant={part.tenant}/day={part.day}/{part.retention_class}-{number:04d}-{self.sha256[:8]}.parquet"


def plan_parts(connection: duckdb.DuckDBPyConnection, relation: str, bytes_per_row: float) -> list[Part]:
    """Cut the rows of a relation with a `day` column into parts, between sessions, each below `SEGMENT_BYTES_MAX` if it can be."""
    rows_max = max(1, int(SEGMENT_BYTES_MAX / max(bytes_per_row, 1.0)))
    groups = connection.execute(
        f"SELECT tenant, day, retention_class, session_id, count(*) FROM {relation} GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    parts: list[Part] = []
    for tenant, day, retention_class, session, count in groups:
        last = parts[-1] if parts else None
        if last and (last.tenant, last.day, last.retention_class) == (tenant, day, retention_class) and last.rows + count <= rows_max:
            parts[-1] = Part(tenant, day, retention_class, last.session_first, session, last.rows + count)
        else:
            parts.append(Part(tenant, day, retention_class, session, session, count))
    return parts


def write_part(connection: duckdb.DuckDBPyConnection, relation: str, part: Part, path: Path) -> Draft:
    """Write one part to a local Parquet file, sorted by session, partition and offset.

    Raises:
        StorageFull: no room for the file.
    """
    where = "tenant = $tenant AND day = $day AND retention_class = $class AND session_id BETWEEN $first AND $last"
    values = {
        "tenant": part.tenant,
        "day": part.day,
        "class": part.retention_class,
        "first": part.session_first,
        "last": part.session_last,
    }
    select = f'SELECT * EXCLUDE (day) FROM {relation} WHERE {where} ORDER BY session_id, "partition", "offset"'
    try:
        connection.execute(f"COPY ({select}) TO '{path}' ({_COPY})", values)
        time_min, time_max, rows = connection.execute(
            f"SELECT epoch_us(min(recorded_at)), epoch_us(max(recorded_at)), count(*) FROM read_parquet('{path}')"
        ).fetchall()[0]
    except duckdb.Error as error:
        raise duck.mapped(error, operation="write segment", place=str(path)) from error
    if rows != part.rows:
        raise CorruptStore(f"{rows} rows were written, {part.rows} were planned", operation="write segment", place=str(path))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Draft(part, path, digest, path.stat().st_size, time_min, time_max)


@dataclass(frozen=True, slots=True)
class RecordDigest:
    """One row of a segment as the log held it: its place and the SHA-256 of its framed bytes."""

    log_id: str
    partition: int
    offset: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class SegmentContent:
    """What reading a segment back shows: the RFC 9162 root over its leaves in row order, and each record's digest."""

    root: bytes
    records: list[RecordDigest]
    schemas: list[str]
    """SHA-256 (hex) of each writer schema's canonical form: 64 bits of fingerprint alone could be forged."""


def read_content(data: bytes, registry: SchemaRegistry, *, sha256: str, place: str) -> SegmentContent:
    """Check a segment's bytes, then re-encode every row to the bytes that were in the log.

    Raises:
        CorruptStore: bytes with another SHA-256 (hex), not a Parquet file, or rows that no event explains.
        UnknownSchema: a writer schema that the registry does not know.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CorruptStore(f"SHA-256 is {found[:16]}…, entered as {sha256[:16]}…", operation="read segment", place=place)
    leaves: list[bytes] = []
    records: list[RecordDigest] = []
    schemas: set[str] = set()
    for row in _rows(data, place):
        schema = registry.get(row.fingerprint)
        schemas.add(schema.sha256)
        leaves.append(leaf_hash(row.datum, schema))
        digest = hashlib.sha256(framed(row.datum, row.fingerprint, registry)).digest()
        records.append(RecordDigest(row.log_id, row.partition, row.offset, digest))
    return SegmentContent(root_of(leaves), records, sorted(schemas))


def _rows(data: bytes, place: str) -> Iterator[Row]:
    try:
        for batch in pq.ParquetFile(pa.BufferReader(data)).iter_batches():
            yield from rows_to_datums(batch)
    except (OSError, ValueError) as error:  # Arrow's errors derive from both
        raise CorruptStore(f"not a readable segment: {error}", operation="read segment", place=place) from error
