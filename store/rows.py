"""Rows of the `events` table, hot or cold, back to Avro datums, events and the very bytes that were in the log."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.codec import encode_datum, event_of
from schemas.events import Event
from schemas.registry import SchemaRegistry
from store.columns import LOG_COLUMNS

_CHUNK = 4096  # Rows turned into Python objects at once: enough to be columnar, few enough to be cheap for the garbage collector.


class Row(NamedTuple):
    """One row: the Avro datum (its own kind's payload only), the writer schema's fingerprint, where it stood in the log."""

    datum: dict[str, Any]
    fingerprint: bytes
    partition: int
    offset: int
    appended_at: int
    log_id: str


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event and where it stands in the log; `appended_at` is the log's append time in µs since the epoch."""

    event: Event
    log_id: str
    partition: int
    offset: int
    appended_at: int


def rows_to_datums(rows: pa.Table | pa.RecordBatch) -> Iterator[Row]:
    """The rows in order. `rows` has the columns of `events`; timestamps come as integers, so that no value overflows."""
    table = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
    for batch in table.to_batches(max_chunksize=_CHUNK):
        yield from _batch_to_rows(batch)


def stored_events(rows: pa.Table | pa.RecordBatch) -> Iterator[StoredEvent]:
    """The rows as events of the current version (older ones upcast).

    Raises:
        InvalidEvent: a value out of its range.
        NewerSchema: a field or kind that this version does not know.
    """
    for row in rows_to_datums(rows):
        yield StoredEvent(event_of(row.datum), row.log_id, row.partition, row.offset, row.appended_at)


def framed(datum: dict[str, Any], fingerprint: bytes, registry: SchemaRegistry) -> bytes:
    """The bytes that stood in the log for a row's datum.

    Raises:
        UnknownSchema: no registry explains the fingerprint.
        InvalidEvent: a value that the writer schema does not take.
    """
    return encode_datum(datum, registry.get(fingerprint))


def _batch_to_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    columns = {name: batch.column(name) for name in batch.schema.names}
    log = {name: _values(columns.pop(name)) for name in LOG_COLUMNS}
    plain = [name for name, column in columns.items() if not pa.types.is_struct(column.type)]
    envelopes = zip(*(_values(columns[name]) for name in plain), strict=True)
    payloads = _payloads(columns, batch.column("kind"))
    places = zip(*(log[name] for name in LOG_COLUMNS), strict=True)
    for (kind, log_id, partition, offset, appended_at, fingerprint), envelope, payload in zip(places, envelopes, payloads, strict=True):
        datum = dict(zip(plain, envelope, strict=True))
        datum[kind] = payload
        yield Row(datum, fingerprint, partition, offset, appended_at, log_id)


def _payloads(columns: dict[str, pa.Array], kinds: pa.Array) -> list[Any]:
    """The one payload of each row: of each kind's column only the rows of that kind are converted."""
    payloads: list[Any] = [None] * len(kinds)
    for kind in pc.unique(kinds).to_pylist():
        places = np.flatnonzero(pc.equal(kinds, kind).to_numpy(zero_copy_only=False))
        column = columns[kind] if len(places) == len(kinds) else columns[kind].take(pa.array(places))
        for place, payload in zip(places.tolist(), _values(column), strict=True):
            payloads[place] = payload
    return payloads


def _values(column: pa.Array) -> list[Any]:
    """An Arrow array as Python values: `to_pylist`, many times faster because whole columns are converted in C."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _values(column.dictionary_decode())
    if pa.types.is_timestamp(kind):
        return _values(column.cast(pa.int64()))
    if pa.types.is_struct(kind):
        return _structs(column)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _lists(column)
    if pa.types.is_null(kind):
        return [None] * len(column)
    return _scalars(column)


def _scalars(column: pa.Array) -> list[Any]:
    kind = column.type
    if column.null_count == 0 or not (pa.types.is_primitive(kind) or pa.types.is_boolean(kind)):
        values: list[Any] = column.to_numpy(zero_copy_only=False).tolist()
        return values
    # NumPy has no null integer: it would turn the column into floats.
    filler = False if pa.types.is_boolean(kind) else 0
    values = column.fill_null(filler).to_numpy(zero_copy_only=False).tolist()
    return _masked(values, column)


def _masked(values: list[Any], column: pa.Array) -> list[Any]:
    if column.null_count:
        for i in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
            values[i] = None
    return values


def _structs(column: pa.Array) -> list[Any]:
    names = [field.name for field in column.type]
    fields = [_values(column.field(i)) for i in range(len(names))]  # `field` honours the slice's offset
    return _masked([dict(zip(names, row, strict=True)) for row in zip(*fields, strict=True)], column)


def _lists(column: pa.Array) -> list[Any]:
    offsets = column.offsets.to_numpy().tolist()
    start = offsets[0] if offsets else 0
    items = _values(column.values.slice(start, offsets[-1] - start))
    return _masked([items[a - start : b - start] for a, b in itertools.pairwise(offsets)], column)
