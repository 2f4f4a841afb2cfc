"""Rows back to the very bytes that were in the log, whole columns at a time.

`schemas.codec` encodes one event in tens of microseconds, which is too slow to read a whole tier back. Avro's encoding
of a record is that of its fields one after another, so each column can be encoded alone, by NumPy and Arrow, and the
columns joined row by row: the same bytes in a few microseconds. A test holds the two against one another for every kind.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.codec import NO_CONTENT
from schemas.errors import CorruptStore
from schemas.registry import Schema, SchemaRegistry
from store.columns import LOG_COLUMNS

BATCH_BYTES_MAX = 64 << 20
"""Rows are encoded in pieces of this size, because several copies of a piece are in memory for a moment."""

_BYTES = pa.large_binary()
_NOTHING, _NULL, _THERE = (pa.scalar(value, _BYTES) for value in (b"", b"\x00", b"\x02"))
"""No bytes; Avro's null branch; the other branch of a nullable type."""

_Encoder = Callable[[pa.Array], pa.Array]
"""From an Arrow array without nulls to the Avro bytes of each value, as large binary."""


@dataclass(frozen=True, slots=True)
class Recoded:
    """Rows of one batch in their order: their places in the log, SHA-256 of their framed bytes, RFC 9162 leaf hashes.

    `hashes` and `leaves` stand one after another, 32 bytes each. `schemas` holds the writer schemas' fingerprints.
    """

    log_ids: pa.Array
    partitions: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    hashes: bytes
    leaves: bytes
    schemas: frozenset[bytes]


def recode(batch: pa.RecordBatch, registry: SchemaRegistry) -> Iterator[Recoded]:
    """Hashes of a batch with the columns of `events`, in pieces.

    Raises:
        CorruptStore: a row that no event explains: no payload or two, a value missing, content without a salt.
        UnknownSchema: a writer schema that the registry does not know.
    """
    if batch.num_rows > 1 and batch.nbytes > BATCH_BYTES_MAX:
        half = batch.num_rows // 2
        yield from recode(batch.slice(0, half), registry)
        yield from recode(batch.slice(half), registry)
        return
    if batch.num_rows:
        yield _recode(batch, registry)


def encode_rows(rows: pa.RecordBatch, schema: Schema, kind: str) -> Encoded:
    """Rows of one kind that one schema wrote.

    Raises:
        CorruptStore: a value that the schema needs is missing, or has another type.
    """
    try:
        return _encode(rows, schema, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, KeyError, ValueError) as error:
        raise CorruptStore(f"a row of kind {kind} is no event: {error}", operation="re-encode", place=kind) from error


@dataclass(frozen=True, slots=True)
class Encoded:
    """Events of one kind, row by row, as large binary: framed bytes; 0x00 and the framed bytes without salt, commitment
    and content; and salt, commitment and content's own bytes, which may be null."""

    framed: pa.Array
    bare: pa.Array
    salts: pa.Array
    commitments: pa.Array
    contents: pa.Array


def _recode(batch: pa.RecordBatch, registry: SchemaRegistry) -> Recoded:
    _check_payloads(batch)
    hashes, leaves = [b""] * batch.num_rows, [b""] * batch.num_rows
    keys = batch.select(["schema", "kind"])
    fingerprints = pc.unique(keys.column("schema")).to_pylist()
    for fingerprint in fingerprints:
        written = pc.equal(keys.column("schema"), pa.scalar(fingerprint, keys.column("schema").type))
        for kind in pc.unique(keys.column("kind").filter(written)).to_pylist():
            mask = pc.and_(written, pc.equal(keys.column("kind"), kind))
            places = np.flatnonzero(mask.to_numpy(zero_copy_only=False))
            schema = registry.get(fingerprint)
            names = [name for name in schema.fields if name not in schema.kinds or name == kind]
            rows = batch.select([name for name in names if name in batch.schema.names]).take(pa.array(places))
            _hash(encode_rows(rows, schema, kind), places.tolist(), hashes, leaves)
    return Recoded(
        batch.column("log_id"),
        batch.column("partition").to_numpy(zero_copy_only=False),
        batch.column("offset").to_numpy(zero_copy_only=False),
        b"".join(hashes),
        b"".join(leaves),
        frozenset(fingerprints),
    )


def _check_payloads(batch: pa.RecordBatch) -> None:
    """Exactly one payload in each row, the one that `kind` names: what stands in another column would be in no proof."""
    columns = [batch.column(name) for name in batch.schema.names if name not in LOG_COLUMNS and pa.types.is_struct(batch.column(name).type)]
    there = sum(len(column) - column.null_count for column in columns)
    named = 0
    for entry in pc.value_counts(batch.column("kind")).to_pylist():
        if entry["values"] in batch.schema.names:
            column = batch.column(entry["values"])
            mine = pc.equal(batch.column("kind"), entry["values"])
            named += pc.sum(pc.and_(mine, column.is_valid())).as_py() or 0
    if there != batch.num_rows or named != batch.num_rows:
        raise CorruptStore("a row has no payload, two, or not the one of its kind", operation="re-encode", place="rows")


def _hash(encoded: Encoded, places: list[int], hashes: list[bytes], leaves: list[bytes]) -> None:
    """Put the hashes of rows into their places."""
    sha256, mac = hashlib.sha256, hmac.digest
    parts = (encoded.framed, encoded.bare, encoded.salts, encoded.commitments, encoded.contents)
    for place, framed, bare, salt, commitment, content in zip(places, *map(_pieces, parts), strict=True):
        hashes[place] = sha256(framed).digest()
        if commitment is None:
            if content is None:
                commitment = NO_CONTENT
            elif salt is None:
                raise CorruptStore("content without a salt", operation="re-encode", place="rows")
            else:
                commitment = mac(salt, content, "sha256")
        leaf = sha256(bare)
        leaf.update(commitment)
        leaves[place] = leaf.digest()


def _pieces(column: pa.Array) -> Sequence[memoryview | None]:
    """The values of a large binary array as slices of one buffer: making bytes objects of them costs more than hashing them."""
    if column.null_count == len(column):
        return [None] * len(column)
    offsets = _offsets(column).tolist()
    data = memoryview(column.buffers()[2] or b"")
    found: list[memoryview | None] = [data[start:stop] for start, stop in itertools.pairwise(offsets)]
    if column.null_count:
        for place in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
            found[place] = None
    return found


def _encode(rows: pa.RecordBatch, schema: Schema, kind: str) -> Encoded:
    count = rows.num_rows
    salts, commitments = (_optional(rows, name) for name in ("salt", "commitment"))
    head, bare_head = [], []
    for name, encoder in _envelope(schema):
        column = encoder(_column(rows, name))
        head.append(column)
        bare_head.append(_NULL if name in ("salt", "commitment") else column)
    before, _, after = schema.writers[kind]
    fields, bare_fields, contents = _payload(rows.column(kind), schema, kind)
    whole = [pa.scalar(schema.header, _BYTES), *head, pa.scalar(before, _BYTES), *fields, pa.scalar(after, _BYTES)]
    bare = [pa.scalar(b"\x00" + schema.header, _BYTES), *bare_head, pa.scalar(before, _BYTES), *bare_fields, pa.scalar(after, _BYTES)]
    return Encoded(_join(whole, count), _join(bare, count), salts, commitments, contents)


def _optional(rows: pa.RecordBatch, name: str) -> pa.Array:
    return rows.column(name).cast(_BYTES) if name in rows.schema.names else pa.nulls(rows.num_rows, _BYTES)


def _payload(payload: pa.Array, schema: Schema, kind: str) -> tuple[list[pa.Array], list[pa.Array], pa.Array]:
    """Encoded fields of a payload, the same with a null content, and the content's own bytes."""
    fields, bare, contents = [], [], pa.nulls(len(payload), _BYTES)
    for name, encoder, content in _fields(schema, kind):
        column = _field(payload, name)
        if content is None:
            fields.append(encoder(column))
            bare.append(fields[-1])
        else:
            contents = _scattered(column, content)
            fields.append(_with_branch(contents))
            bare.append(_NULL)
    return fields, bare, contents


@cache
def _envelope(schema: Schema) -> list[tuple[str, _Encoder]]:
    """The fields before the first kind, each with its encoder."""
    named: dict[str, Any] = {}
    fields = [field for field in schema.definition["fields"] if field["name"] not in schema.kinds]
    return [(field["name"], _encoder(field["type"], named)) for field in fields]


@cache
def _fields(schema: Schema, kind: str) -> list[tuple[str, _Encoder, _Encoder | None]]:
    """The fields of a kind's payload, each with its encoder, and for `content` that of its record."""
    named: dict[str, Any] = {}
    found: list[tuple[str, _Encoder, _Encoder | None]] = []
    for field in schema.kinds[kind]["fields"]:
        encoder = _encoder(field["type"], named)
        content = _encoder(field["type"][1], named) if field["name"] == "content" else None
        found.append((field["name"], encoder, content))
    return found


# Columns


def _column(rows: pa.RecordBatch, name: str) -> pa.Array:
    """A column; one that a table of an older version lacks is null."""
    return rows.column(name) if name in rows.schema.names else pa.nulls(rows.num_rows)


def _field(column: pa.Array, name: str) -> pa.Array:
    """A field of a struct column."""
    index = column.type.get_field_index(name)
    return column.field(index) if index >= 0 else pa.nulls(len(column))


def _encoder(schema: Any, named: dict[str, Any]) -> _Encoder:
    """The encoder of an Avro type; `named` holds the types defined so far."""
    if isinstance(schema, list):
        inner = _encoder(next(branch for branch in schema if branch != "null"), named)
        return lambda column: _with_branch(_scattered(column, inner))
    if isinstance(schema, str):
        return _checked(_PRIMITIVES[schema]) if schema in _PRIMITIVES else _encoder(named[schema], named)
    if "name" in schema:
        named[schema["name"]] = schema
    if schema["type"] == "record":
        fields = [(field["name"], _encoder(field["type"], named)) for field in schema["fields"]]
        return _checked(lambda column: _join([encoder(_field(column, name)) for name, encoder in fields], len(column)))
    if schema["type"] == "array":
        items = _encoder(schema["items"], named)
        return _checked(lambda column: _array(column, items))
    if schema["type"] == "fixed":
        return _checked(lambda column: _fixed(column, schema["size"]))
    if schema["type"] == "enum":
        symbols = pa.array(schema["symbols"])
        return _checked(lambda column: _long(_checked_nulls(pc.index_in(column.cast(pa.string()), symbols))))
    return _encoder(schema["type"], named)


def _checked(encoder: _Encoder) -> _Encoder:
    return lambda column: encoder(_checked_nulls(column))


def _checked_nulls(column: pa.Array) -> pa.Array:
    if column.null_count:
        raise ValueError("a value is missing")
    return column


def _scattered(column: pa.Array, encoder: _Encoder) -> pa.Array:
    """Values encoded where they are there, null elsewhere."""
    if column.null_count == 0:
        return encoder(column)
    if column.null_count == len(column):
        return pa.nulls(len(column), _BYTES)
    valid = column.is_valid()
    places = np.cumsum(valid.to_numpy(zero_copy_only=False)) - 1
    return encoder(column.filter(valid)).take(pa.array(places, mask=~valid.to_numpy(zero_copy_only=False)))


def _with_branch(column: pa.Array) -> pa.Array:
    """Encoded values behind the branch number of a nullable type."""
    if column.null_count == len(column):
        return _NULL
    return _join([_THERE, column], len(column)).fill_null(_NULL) if column.null_count else _join([_THERE, column], len(column))


def _join(columns: Sequence[pa.Array], count: int) -> pa.Array:
    """Columns (or scalars) joined row by row; null where one of them is null."""
    if all(isinstance(column, pa.Scalar) for column in columns):
        value = b"".join(column.as_py() for column in columns)
        return _binary(value * count, np.arange(count + 1) * len(value))
    return pc.binary_join_element_wise(*columns, _NOTHING)


def _array(column: pa.Array, items: _Encoder) -> pa.Array:
    """One block: number of items, items, and an empty block; an empty array is the empty block alone."""
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    stops = np.concatenate(([0], np.cumsum(lengths)))
    encoded = items(column.flatten())
    if isinstance(encoded, pa.Scalar):
        encoded = _join([encoded], int(stops[-1]))
    body = _binary(encoded.buffers()[2], _offsets(encoded)[stops])
    counts = _long_of(lengths)
    empty = pa.array(lengths == 0)
    return _join([pc.if_else(empty, _NOTHING, counts), body, _NULL], len(column))


def _fixed(column: pa.Array, size: int) -> pa.Array:
    if pc.any(pc.not_equal(pc.binary_length(column), size)).as_py():
        raise ValueError(f"a value is not {size} bytes long")
    return column.cast(_BYTES)


def _variable(column: pa.Array) -> pa.Array:
    """Length and bytes. A column of few values, such as the tenant, is encoded once for each of them."""
    lengths = pc.binary_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    return _join([_long_of(lengths), column.cast(_BYTES)], len(column))


def _repeated(column: pa.Array) -> pa.Array:
    coded = column.dictionary_encode()
    if len(coded.dictionary) * 4 > len(column):
        return _variable(column)
    return _variable(coded.dictionary).take(coded.indices)


def _long(column: pa.Array) -> pa.Array:
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    return _long_of(column.to_numpy(zero_copy_only=False).astype(np.int64, casting="safe"))


def _long_of(values: np.ndarray[Any, Any]) -> pa.Array:
    """Zigzag, seven bits a byte, lowest first; every byte but the last says that more follow."""
    zigzag = ((values << 1) ^ (values >> 63)).view(np.uint64)
    widths = np.ones(len(values), np.int64)
    largest = int(zigzag.max()) if len(values) else 0
    width_max = max(1, -(-largest.bit_length() // 7))
    for width in range(1, width_max):
        widths += zigzag >= np.uint64(1 << 7 * width)
    offsets = np.concatenate(([0], np.cumsum(widths)))
    data = np.empty(int(offsets[-1]), np.uint8)
    data[offsets[:-1]] = (zigzag & np.uint64(0x7F)).astype(np.uint8) | np.where(widths > 1, 0x80, 0).astype(np.uint8)
    for place in range(1, width_max):
        (rows,) = np.nonzero(widths > place)
        rest = (zigzag[rows] >> np.uint64(7 * place) & np.uint64(0x7F)).astype(np.uint8)
        data[offsets[rows] + place] = rest | np.where(widths[rows] > place + 1, 0x80, 0).astype(np.uint8)
    return _binary(data, offsets)


def _boolean(column: pa.Array) -> pa.Array:
    data = column.to_numpy(zero_copy_only=False).astype(np.uint8)
    return _binary(data, np.arange(len(data) + 1))


def _float(column: pa.Array) -> pa.Array:
    return _plain(column.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False).astype("<f4"))


def _double(column: pa.Array) -> pa.Array:
    return _plain(column.cast(pa.float64()).to_numpy(zero_copy_only=False).astype("<f8"))


def _plain(values: np.ndarray[Any, Any]) -> pa.Array:
    return _binary(values.view(np.uint8), np.arange(len(values) + 1) * values.itemsize)


_PRIMITIVES: dict[str, _Encoder] = {
    "string": _repeated,
    "bytes": _variable,
    "long": _long,
    "int": _long,
    "boolean": _boolean,
    "float": _float,
    "double": _double,
}


def _binary(data: Any, offsets: np.ndarray[Any, Any]) -> pa.Array:
    """A large binary array over a buffer, which is not copied."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(offsets, np.int64)), pa.py_buffer(data if data is not None else b"")]
    return pa.Array.from_buffers(_BYTES, len(offsets) - 1, buffers)


def _offsets(column: pa.Array) -> np.ndarray[Any, Any]:
    """Where the values of a large binary array begin in its buffer, and where the last ends."""
    whole = np.frombuffer(column.buffers()[1], np.int64)
    return whole[column.offset : column.offset + len(column) + 1]
