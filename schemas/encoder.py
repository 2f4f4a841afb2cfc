"""Avro bytes of payload models, by writers that are made once per kind instead of walking a schema for each event.

The bytes are those of `schemas.codec.encode_payload`, which a property test holds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from schemas.codec import zigzag, zigzags
from schemas.errors import InvalidEvent
from schemas.events import Payload, clean_text
from schemas.registry import CURRENT, Schema

Add = Callable[[bytes], object]
Writer = Callable[[Add, Any], None]
"""Adds the bytes of one value; raises whatever a value of a wrong type leads to."""

_NULL, _THERE = b"\x00", b"\x02"
_TRUE, _FALSE = b"\x01", b"\x00"
_FAULTS = (TypeError, ValueError, AttributeError, LookupError, OverflowError, struct.error)


class Encoder:
    """Writers of all kinds of one schema."""

    def __init__(self, schema: Schema) -> None:
        self._kinds = {kind: (before, _record(schema.kinds[kind], {}), after) for kind, (before, _, after) in schema.writers.items()}

    def __call__(self, payload: Payload) -> bytes:
        """All payload fields of an event, of which this is the one that is there.

        Raises:
            InvalidEvent: a value that the schema does not take.
        """
        before, write, after = self._kinds[payload.KIND]
        parts = [before]
        try:
            write(parts.append, payload)
            parts.append(after)
            return b"".join(parts)
        except _FAULTS as error:
            raise InvalidEvent(f"{payload.KIND}: {error}", operation="encode") from error


def _writer(schema: Any, named: dict[str, Any]) -> Writer:
    """The writer of a type; `named` are the named types that were met before it."""
    if isinstance(schema, str):
        return _writer(named[schema], named) if schema in named else _PRIMITIVES[schema]
    if isinstance(schema, list):
        return _nullable(_writer(schema[1], named))
    kind = schema["type"]
    if kind == "array":
        return _array(_writer(schema["items"], named))
    if kind == "record":
        named[schema["name"]] = schema
        return _record(schema, named)
    if kind == "fixed":
        named[schema["name"]] = schema
        return _fixed(schema["size"])
    return _PRIMITIVES[kind]


def _record(schema: Any, named: dict[str, Any]) -> Writer:
    fields = [(field["name"], _writer(field["type"], named)) for field in schema["fields"]]

    def write(add: Add, value: Any) -> None:
        values = value.__dict__
        for name, write_field in fields:
            write_field(add, values[name])

    return write


def _nullable(inner: Writer) -> Writer:
    def write(add: Add, value: Any) -> None:
        if value is None:
            add(_NULL)
        else:
            add(_THERE)
            inner(add, value)

    return write


def _array(inner: Writer) -> Writer:
    if inner is _long:
        return _longs
    if inner is _float:
        return _floats

    def write(add: Add, values: Any) -> None:
        if values:
            add(zigzag(len(values)))
            for value in values:
                inner(add, value)
        add(_NULL)

    return write


def _longs(add: Add, values: Any) -> None:
    if values:
        add(zigzag(len(values)))
        add(zigzags(values))
    add(_NULL)


def _floats(add: Add, values: Any) -> None:
    if values:
        add(zigzag(len(values)))
        add(struct.pack(f"<{len(values)}f", *values))
    add(_NULL)


def _fixed(size: int) -> Writer:
    def write(add: Add, value: Any) -> None:
        if len(value) != size:
            raise ValueError(f"{len(value)} bytes, valid is exactly {size}")
        add(value)

    return write


def _string(add: Add, value: str) -> None:
    try:
        data = value.encode()
    except UnicodeEncodeError:
        data = clean_text(value).encode()
    add(zigzag(len(data)))
    add(data)


def _bytes(add: Add, value: bytes) -> None:
    add(zigzag(len(value)))
    add(value)


def _long(add: Add, value: int) -> None:
    add(zigzag(value))


def _boolean(add: Add, value: bool) -> None:
    add(_TRUE if value else _FALSE)


def _float(add: Add, value: float) -> None:
    add(struct.pack("<f", value))


def _double(add: Add, value: float) -> None:
    add(struct.pack("<d", value))


_PRIMITIVES: dict[str, Writer] = {
    "string": _string,
    "bytes": _bytes,
    "long": _long,
    "boolean": _boolean,
    "float": _float,
    "double": _double,
}

encode_model = Encoder(CURRENT)
"""The payload bytes of a model under the current schema."""
