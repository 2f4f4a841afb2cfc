"""Events to bytes and back: Avro single-object encoding with canonical bodies, and the leaf hash that proofs stand on.

Encoding is deterministic, so a row read back from DuckDB or Parquet re-encodes to the very bytes that were in the log.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import fastavro

from schemas.errors import InvalidEvent, NewerSchema
from schemas.events import ENVELOPE, PAYLOADS, SOURCES, Event, Record
from schemas.registry import CURRENT, HEADER_BYTES, MAGIC, Schema, SchemaRegistry

ID_SLICE = slice(HEADER_BYTES, HEADER_BYTES + 16)
"""Where the event id stands in a framed event."""

NO_CONTENT = bytes(32)
"""The commitment of an event that never had content."""

_SOURCE_BYTES = {name: bytes([i * 2]) for i, name in enumerate(SOURCES)}


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


_LAST = [_varint(n) for n in range(1 << 14)]
"""Variable-length bytes of every number of up to 14 bits: looking up is three times faster than computing."""

_MORE = [bytes((n & 0x7F | 0x80, n >> 7 | 0x80)) for n in range(1 << 14)]
"""Fourteen bits that more bytes follow."""


def zigzag(value: int) -> bytes:
    """Avro's variable-length encoding of a long (1 to 10 bytes).

    Raises:
        InvalidEvent: more than 64 bits.
    """
    n = value << 1 if value >= 0 else ~(value << 1)
    if n < 0x4000:
        return _LAST[n]
    if n < 0x10000000:
        return _MORE[n & 0x3FFF] + _LAST[n >> 14]
    if n >> 64:
        raise InvalidEvent(f"{value} does not fit 64 bits", operation="encode")
    out = _MORE[n & 0x3FFF] + _MORE[n >> 14 & 0x3FFF]
    n >>= 28
    while n > 0x3FFF:
        out += _MORE[n & 0x3FFF]
        n >>= 14
    return out + _LAST[n]


def zigzags(values: Sequence[int]) -> bytes:
    """The same for one or more, end to end. Raises as `zigzag` does."""
    if min(values) < 0:
        return b"".join(map(zigzag, values))
    return b"".join(
        [
            _LAST[n] if (n := value << 1) < 0x4000 else _MORE[n & 0x3FFF] + _LAST[n >> 14] if n < 0x10000000 else zigzag(value)
            for value in values
        ]
    )


def _string(value: str) -> bytes:
    data = value.encode()
    return zigzag(len(data)) + data


def encode_session(session_id: bytes, salt: bytes | None, tenant: str, retention_class: str, actor: str, source: str) -> bytes:
    """The part of the envelope that all events of one session context share: session id to source, no commitment."""
    salted = b"\x00" if salt is None else b"\x02" + salt
    names = _string(tenant) + _string(retention_class) + _string(actor)
    return session_id + salted + b"\x00" + names + _SOURCE_BYTES[source]


def encode_payload(kind: str, payload: dict[str, Any], schema: Schema = CURRENT) -> bytes:
    """All payload fields of an event, of which one is there.

    Raises:
        InvalidEvent: a value that the schema does not take.
    """
    before, record, after = schema.writers[kind]
    out = io.BytesIO()
    out.write(before)
    _write(out, record, payload, kind)
    out.write(after)
    return out.getvalue()


def _write(out: io.BytesIO, schema: Any, datum: dict[str, Any], what: str) -> None:
    try:
        fastavro.schemaless_writer(out, schema, datum)
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError) as error:
        raise InvalidEvent(f"{what}: {error}", operation="encode") from error


def join(event_id: bytes, session: bytes, producer_id: bytes, producer_seq: int, recorded_at: int, payload: bytes) -> bytes:
    """A framed event of its parts, as `encode_session` and `encode_payload` give them."""
    return CURRENT.header + event_id + session + producer_id + zigzag(producer_seq) + zigzag(recorded_at) + payload


def encode(event: Event) -> bytes:
    """The framed bytes of an event under the current schema.

    Raises:
        InvalidEvent: a value that the schema does not take.
    """
    return encode_datum(event.to_datum(), CURRENT)


def encode_datum(datum: dict[str, Any], schema: Schema) -> bytes:
    """The framed bytes of an Avro datum (or a row as a dict, extra keys ignored) under the schema that wrote it.

    Raises:
        InvalidEvent: a value that the schema does not take.
    """
    kind = kind_of(datum, schema)
    out = io.BytesIO()
    out.write(schema.header)
    _write(out, schema.envelope, datum, "envelope")
    return out.getvalue() + encode_payload(kind, datum[kind], schema)


def kind_of(datum: dict[str, Any], schema: Schema) -> str:
    """The kind of a datum.

    Raises:
        InvalidEvent: not exactly one payload is there.
    """
    kinds = [kind for kind in schema.kinds if datum.get(kind) is not None]
    if len(kinds) != 1:
        raise InvalidEvent(f"{len(kinds)} payloads in one event, valid is exactly one", operation="encode")
    return kinds[0]


def decode_datum(framed: bytes, registry: SchemaRegistry) -> tuple[dict[str, Any], Schema]:
    """The Avro datum of a framed event and the schema that wrote it.

    Raises:
        UnknownSchema: no registry explains the fingerprint.
        InvalidEvent: not framed, cut off, or followed by trailing bytes.
    """
    if framed[:2] != MAGIC or len(framed) < HEADER_BYTES:
        raise InvalidEvent("no Avro single-object header (C3 01)", operation="decode")
    schema = registry.get(framed[2:HEADER_BYTES])
    body = io.BytesIO(framed)
    body.seek(HEADER_BYTES)
    try:
        datum = fastavro.schemaless_reader(body, schema.parsed, None)
    except Exception as error:  # fastavro raises whatever its reader meets in broken bytes
        raise InvalidEvent(f"body does not decode: {error!r}", operation="decode") from error
    if body.tell() != len(framed):
        raise InvalidEvent(f"{len(framed) - body.tell()} trailing bytes", operation="decode")
    assert isinstance(datum, dict)
    return datum, schema


def decode(framed: bytes, registry: SchemaRegistry) -> Event:
    """The event of framed bytes, upcast to the current schema.

    Raises:
        UnknownSchema, InvalidEvent: as `decode_datum`.
        NewerSchema: it says something that this version has no field for.
    """
    return event_of(decode_datum(framed, registry)[0])


def event_of(datum: dict[str, Any]) -> Event:
    """The event of a datum of any version: what an older one lacks is None, and what a newer one adds must be null.

    Raises:
        InvalidEvent: not exactly one payload, or a value out of its range.
        NewerSchema: a field or kind that this version does not know is not null.
    """
    try:
        return Event.from_datum(datum)
    except InvalidEvent:
        fitted = _fitted(datum, "event", dict.fromkeys(ENVELOPE) | PAYLOADS)
        if fitted == datum:
            raise
        return Event.from_datum(fitted)


def _fitted(value: dict[str, Any], path: str, known: Mapping[str, type[Record] | None]) -> dict[str, Any]:
    """A record without the null fields that are not known; `known` names each field's record model, if it has one."""
    lost = sorted(name for name, item in value.items() if name not in known and item is not None)
    if lost:
        fault = f"{path} has a field that this version does not know: {lost[0]}"
        raise NewerSchema(fault, operation="decode", hint="upgrade this installation; nothing is dropped")
    return {name: _fitted_item(item, f"{path}.{name}", known[name]) for name, item in value.items() if name in known}


def _fitted_item(item: Any, path: str, model: type[Record] | None) -> Any:
    if model is None or item is None:
        return item
    if isinstance(item, list):
        return [_fitted_item(part, path, model) for part in item]
    return _fitted(item, path, {name: _model_of(info.annotation) for name, info in model.model_fields.items()})


def _model_of(annotation: Any) -> type[Record] | None:
    """The record model inside an annotation such as `list[Message]` or `BlobRef | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _model_of(part))), None)


def leaf_hash(datum: dict[str, Any], schema: Schema) -> bytes:
    """SHA-256(0x00 || M || C), the RFC 9162 leaf of an event, the same before and after erasure.

    M is the framed event with content, salt and commitment null. C is HMAC-SHA256(salt, canonical bytes of the
    content record); after erasure the commitment that took its place; 32 zero bytes where there never was content.
    """
    commitment = datum.get("commitment") or commit(datum, schema)
    return hashlib.sha256(b"\x00" + encode_metadata(datum, schema) + commitment).digest()


def encode_metadata(datum: dict[str, Any], schema: Schema) -> bytes:
    """M of an event: what is left of its framed bytes once it was erased, but for the commitment."""
    kind = kind_of(datum, schema)
    bare = {**datum, "salt": None, "commitment": None, kind: {**datum[kind], "content": None}}
    return encode_datum(bare, schema)


def encode_content(datum: dict[str, Any], schema: Schema) -> bytes | None:
    """The canonical bytes of an event's content record; None where there is none."""
    kind = kind_of(datum, schema)
    content = datum[kind].get("content")
    if content is None:
        return None
    out = io.BytesIO()
    fastavro.schemaless_writer(out, _content_schema(schema, kind), content)
    return out.getvalue()


def commit(datum: dict[str, Any], schema: Schema) -> bytes:
    """C of an event whose content is there: what `commitment` holds once the content is erased.

    Raises:
        InvalidEvent: content without a salt, which nobody could erase.
    """
    content = encode_content(datum, schema)
    if content is None:
        return NO_CONTENT
    if datum.get("salt") is None:
        raise InvalidEvent("content without a salt", operation="commit", hint="record it in a session with a salt")
    return hmac.digest(datum["salt"], content, "sha256")


def erase(datum: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """The datum with content and salt gone and the commitment in their place; its leaf stays."""
    kind = kind_of(datum, schema)
    if datum[kind].get("content") is None:
        return {**datum, "salt": None}
    return {**datum, "commitment": commit(datum, schema), "salt": None, kind: {**datum[kind], "content": None}}


_CONTENT: dict[tuple[bytes, str], Any] = {}


def _content_schema(schema: Schema, kind: str) -> Any:
    """The record schema of a kind's content, standing alone."""
    key = (schema.fingerprint, kind)
    if key not in _CONTENT:
        _CONTENT[key] = fastavro.parse_schema(schema.contents[kind])
    return _CONTENT[key]


def uuid7(milliseconds: int, counter: int, tail: int) -> bytes:
    """UUIDv7 (RFC 9562): 48 bits of time, a 12-bit counter, then 62 bits of `tail`, random per producer.

    A constant tail lets ids of one producer compress to a few bytes; time and counter keep them apart.
    """
    value = (milliseconds & 0xFFFFFFFFFFFF) << 80 | 0x7 << 76 | (counter & 0xFFF) << 64 | 0x2 << 62 | tail & (1 << 62) - 1
    return value.to_bytes(16, "big")
