"""Rows of the embedded log: record batches and partition ends as SQLite columns, each under a CRC-32C."""

from __future__ import annotations

import itertools
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import crc32c

# Offsets take the low 48 bits of a row id; the highest of 1024 partitions still fits a signed 64-bit integer.
_OFFSET_BITS = 48
# A row is cut here so that a reader with a small limit does not load a whole huge append to see its head.
_ROW_BYTES_MAX = 1 << 20

TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE batch (id INTEGER PRIMARY KEY, count INTEGER NOT NULL, appended_at INTEGER NOT NULL,"
    " lengths BLOB NOT NULL, data BLOB NOT NULL, crc INTEGER NOT NULL)",
    "CREATE TABLE tail (partition INTEGER PRIMARY KEY, offset_first INTEGER NOT NULL,"
    " offset_next INTEGER NOT NULL, appended_at INTEGER NOT NULL, crc INTEGER NOT NULL)",
)


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """Values that were appended at once to one partition, the first at `offset_first`, `appended_at` in µs."""

    partition: int
    offset_first: int
    appended_at: int
    values: list[bytes]

    @property
    def offset_next(self) -> int:
        """The offset after the last value."""
        return self.offset_first + len(self.values)


@dataclass(frozen=True, slots=True)
class Tail:
    """First retained offset, next offset, and the append time that the next batch must not fall below."""

    partition: int
    offset_first: int = 0
    offset_next: int = 0
    appended_at: int = 0


def row_id(partition: int, offset: int) -> int:
    """The row id of a batch: rows of one partition lie together, in the order of their offsets."""
    return partition << _OFFSET_BITS | offset


def batch_to_row(batch: StoredBatch) -> tuple[int, int, int, bytes, bytes, int]:
    """Columns of `batch`. Lengths are 32-bit little-endian, data is the values end to end."""
    lengths = array("I", map(len, batch.values))
    if sys.byteorder == "big":
        lengths.byteswap()
    numbers = (row_id(batch.partition, batch.offset_first), len(batch.values), batch.appended_at)
    data = b"".join(batch.values)
    return *numbers, lengths.tobytes(), data, _crc(numbers, lengths.tobytes(), data)


def batch_from_row(row: Sequence[Any]) -> StoredBatch | None:
    """The batch in columns of `batch`, or None when they do not match their checksum."""
    try:
        identity, count, appended_at, packed, data, crc = row
        if _crc((identity, count, appended_at), packed, data) != crc:
            return None
        lengths = array("I", packed)
        if sys.byteorder == "big":
            lengths.byteswap()
        ends = list(itertools.accumulate(lengths))
        values = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    except (TypeError, ValueError, struct.error):
        # A flipped bit in SQLite's own record header turns a column into another type.
        return None
    partition, offset = divmod(identity, 1 << _OFFSET_BITS)
    return StoredBatch(partition, offset, appended_at, values)


def tail_to_row(tail: Tail) -> tuple[int, int, int, int, int]:
    """Columns of `tail`."""
    numbers = (tail.partition, tail.offset_first, tail.offset_next, tail.appended_at)
    return *numbers, _crc(numbers)


def tail_from_row(row: Sequence[Any] | None) -> Tail | None:
    """The end of a partition, or None when the row is missing or does not match its checksum."""
    try:
        if row is None or _crc(row[:4]) != row[4]:
            return None
    except (TypeError, struct.error):
        return None
    return Tail(*row[:4])


def chunks(values: list[bytes]) -> Iterator[list[bytes]]:
    """`values` in order, cut into rows."""
    start, size = 0, 0
    for index, value in enumerate(values):
        if size + len(value) > _ROW_BYTES_MAX and index > start:
            yield values[start:index]
            start, size = index, 0
        size += len(value)
    yield values[start:]


def _crc(numbers: Sequence[int], *parts: bytes) -> int:
    crc = crc32c.crc32c(struct.pack(f"<{len(numbers)}q", *numbers))
    for part in parts:
        crc = crc32c.crc32c(part, crc)
    return crc
