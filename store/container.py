"""Framed records of one kind as an Avro container file that DuckDB reads as rows, without decoding any of them here.

A record goes in as it came from the log, its ten header bytes included, and four fields of ours follow each: partition,
offset, append time, and a secret end mark. Avro has no markers between records, so a body that is too short or too long
shifts all that follows; then the mark does not come out in its place, and the count differs.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from schemas.codec import zigzag
from schemas.errors import StorageFull, StoreUnavailable
from schemas.registry import HEADER_BYTES, Schema

MARK_BYTES = 8
_VARINT_BYTES = 10
_HEAD: list[dict[str, Any]] = [{"name": "_frame", "type": {"type": "fixed", "name": "Frame", "size": HEADER_BYTES}}]
_SUFFIX: list[dict[str, Any]] = [
    {"name": "_partition", "type": "long"},
    {"name": "_offset", "type": "long"},
    {"name": "_appended_at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
    {"name": "_mark", "type": {"type": "fixed", "name": "Mark", "size": MARK_BYTES}},
]


@dataclass(frozen=True, slots=True)
class Records:
    """Framed records of one partition with the offset (ascending) and append time (µs) of each."""

    partition: int
    offsets: Sequence[int]
    appended_at: Sequence[int]
    values: Sequence[bytes]

    def part(self, start: int, stop: int) -> Records:
        """Records [start, stop)."""
        return Records(self.partition, self.offsets[start:stop], self.appended_at[start:stop], self.values[start:stop])

    def pick(self, indexes: Sequence[int]) -> Records:
        """The records at these places."""
        return Records(
            self.partition,
            [self.offsets[i] for i in indexes],
            [self.appended_at[i] for i in indexes],
            [self.values[i] for i in indexes],
        )

    def __len__(self) -> int:
        return len(self.values)


def write(path: Path, schema: Schema, records: Records, mark: bytes, *, kind: str | None = None) -> None:
    """Write a container of records that `schema` wrote, all of one kind if it is named; scratch, not flushed to disk.

    Raises:
        StorageFull: no room. StoreUnavailable: the folder cannot be written.
    """
    body = b"".join(itertools.chain.from_iterable(zip(records.values, _suffixes(records, mark), strict=True)))
    sync = os.urandom(16)
    try:
        with path.open("wb", buffering=0) as file:
            for part in (_header(schema, kind) + sync, zigzag(len(records)) + zigzag(len(body)), body, sync):
                _write_all(file.fileno(), part)
    except OSError as problem:
        error = StorageFull if problem.errno in (errno.ENOSPC, errno.EDQUOT) else StoreUnavailable
        raise error(problem.strerror or str(problem), operation="index", place=str(path), hint="free some disk space") from problem


def _write_all(descriptor: int, data: bytes) -> None:
    """One `write` takes at most 2 GiB."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@cache
def _header(schema: Schema, kind: str | None) -> bytes:
    """Magic and metadata of a container, whose writer schema is the event's between our own fields.

    In a container of one kind the others are null, one zero byte each: they are read as fixed bytes before and after
    the payload, so that DuckDB makes no columns of them. The payload follows its branch byte, a record like any other.
    """
    own = schema.definition["fields"] if kind is None else _fields_of(schema, kind)
    definition = _once({**schema.definition, "fields": [*_HEAD, *own, *_SUFFIX]}, set())
    meta = {"avro.schema": json.dumps(definition).encode(), "avro.codec": b"null"}
    items = b"".join(zigzag(len(key)) + key.encode() + zigzag(len(value)) + value for key, value in meta.items())
    return b"Obj\x01" + zigzag(len(meta)) + items + b"\x00"


def _fields_of(schema: Schema, kind: str) -> list[dict[str, Any]]:
    """Envelope and one payload."""
    number = list(schema.kinds).index(kind)
    after = len(schema.kinds) - 1 - number
    before = {"name": "_before", "type": {"type": "fixed", "name": "Before", "size": number + 1}}
    rest = [{"name": "_after", "type": {"type": "fixed", "name": "After", "size": after}}] if after else []
    envelope = [field for field in schema.definition["fields"] if field["name"] not in schema.kinds]
    return [*envelope, before, {"name": kind, "type": schema.kinds[kind]}, *rest]


def _once(schema: Any, defined: set[str]) -> Any:
    """The schema with each named type defined where it first occurs, and only there."""
    if isinstance(schema, list):
        return [_once(item, defined) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema["type"] in ("record", "fixed", "enum"):
        if schema["name"] in defined:
            return schema["name"]
        defined.add(schema["name"])
    result = dict(schema)
    if "fields" in schema:
        result["fields"] = [{**field, "type": _once(field["type"], defined)} for field in schema["fields"]]
    if "items" in schema:
        result["items"] = _once(schema["items"], defined)
    return result


def _suffixes(records: Records, mark: bytes) -> list[bytes]:
    """What follows each record: three longs in ten bytes each, so that all have one width, and the mark."""
    count, width = len(records), 3 * _VARINT_BYTES + MARK_BYTES
    table = np.empty((count, width), np.uint8)
    table[:, 0:10] = _varints(np.full(1, records.partition))
    table[:, 10:20] = _varints(np.asarray(records.offsets, np.int64))
    table[:, 20:30] = _varints(np.asarray(records.appended_at, np.int64))
    table[:, 30:] = np.frombuffer(mark, np.uint8)
    data = table.tobytes()
    return [data[start : start + width] for start in range(0, len(data), width)]


def _varints(values: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Avro longs of ten bytes each: every byte but the last says that more follow, which readers accept."""
    zigzagged = ((values << 1) ^ (values >> 63)).astype(np.uint64)
    table = np.empty((len(values), _VARINT_BYTES), np.uint8)
    for place in range(_VARINT_BYTES):
        more = 0x80 if place < _VARINT_BYTES - 1 else 0
        table[:, place] = ((zigzagged >> np.uint64(7 * place)) & np.uint64(0x7F)).astype(np.uint8) | more
    return table
