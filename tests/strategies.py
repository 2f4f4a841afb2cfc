"""Events of every kind, derived from the models: random ones full of nasty values for Hypothesis, and fixed ones for golden files."""

from __future__ import annotations

import functools
import math
import types
import typing
from typing import Any

from hypothesis import strategies as st

from schemas.events import PAYLOADS, SOURCES, Event, Fixed, Float32, Payload, Record

LONGS = (0, 1, -1, 63, 64, -64, -65, 127, 128, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, -(2**63))
"""Longs at the edges of Avro's variable-length encoding, of floats and of the type."""

TEXTS = (
    "",
    "\0",
    "a\0b",
    "\x00\x01\x7f",
    "é",
    "\U0001f469\u200d\U0001f4bb",
    "\ud800",
    "a\udfffb",
    "\ufeff",
    "'\"\\\n",
    "NULL",
    "x" * 70_000,
)
"""Texts that somebody's storage gets wrong: NUL, emoji, lone surrogates, a byte order mark, quotes, long ones."""

FLOATS = (0.0, -0.0, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, 3.4028235e38, 1e-46, -1.5)


def texts() -> st.SearchStrategy[str]:
    """Any text, lone surrogates included."""
    return st.sampled_from(TEXTS) | st.text(st.characters(), max_size=30)


def longs() -> st.SearchStrategy[int]:
    """Any long, the edges more often."""
    return st.sampled_from(LONGS) | st.integers(-(2**63), 2**63 - 1)


def floats() -> st.SearchStrategy[float]:
    """Any float but NaN."""
    return st.sampled_from(FLOATS) | st.floats(allow_nan=False)


def fixed(size: int) -> st.SearchStrategy[bytes]:
    """Bytes of one length."""
    return st.sampled_from((bytes(size), b"\xff" * size)) | st.binary(min_size=size, max_size=size)


@functools.cache
def payloads(kind: str) -> st.SearchStrategy[Payload]:
    """Payloads of a kind."""
    return typing.cast("st.SearchStrategy[Payload]", _records(PAYLOADS[kind]))


def events(kind: str | None = None) -> st.SearchStrategy[Event]:
    """Whole events, with a salt wherever there is content to hide."""
    chosen = payloads(kind) if kind else st.sampled_from(sorted(PAYLOADS)).flatmap(payloads)
    return st.builds(
        Event,
        event_id=fixed(16),
        session_id=fixed(16),
        salt=fixed(16),
        tenant=texts(),
        retention_class=texts(),
        actor=texts(),
        source=st.sampled_from(SOURCES),
        producer_id=fixed(8),
        producer_seq=st.sampled_from((0, 63, 64, 2**63 - 1)) | st.integers(0, 2**63 - 1),
        recorded_at=longs(),
        payload=chosen,
    )


@functools.cache
def _records(model: type[Record]) -> st.SearchStrategy[Any]:
    return st.builds(model, **{name: _values(info.annotation, tuple(info.metadata)) for name, info in model.model_fields.items()})


def _values(annotation: Any, marks: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        base, *extra = typing.get_args(annotation)
        return _values(base, (*marks, *extra))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = next(part for part in typing.get_args(annotation) if part is not type(None))
        return st.none() | _values(inner, marks)
    if typing.get_origin(annotation) is list:
        return st.lists(_values(typing.get_args(annotation)[0], ()), max_size=3)
    for mark in marks:
        if isinstance(mark, Fixed):
            return fixed(mark.size)
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return _records(annotation)
    plain: dict[Any, st.SearchStrategy[Any]] = {
        str: texts(),
        int: longs(),
        float: floats(),
        bool: st.booleans(),
        bytes: st.binary(max_size=20),
    }
    return plain[annotation]


def sample(kind: str, *, full: bool, turn: int = 0) -> Event:
    """One fixed event of a kind: with every field set to something that `turn` chooses, or with nothing that may be left out."""
    source = SOURCES[(turn + sorted(PAYLOADS).index(kind)) % len(SOURCES)]
    payload = typing.cast("Payload", _sample_record(PAYLOADS[kind], full, turn))
    return Event(
        event_id=_bytes(16, turn),
        session_id=_bytes(16, turn + 1),
        salt=_bytes(16, turn + 2),
        tenant="acme" if full else "",
        retention_class="standard" if full else "",
        actor="user:42" if full else "",
        source=typing.cast("Any", source),
        producer_id=_bytes(8, turn + 3),
        producer_seq=LONGS[-2] if full else 0,
        recorded_at=1_795_442_717_123_456 if turn == 0 else LONGS[turn % len(LONGS)],
        payload=payload,
    )


def _sample_record(model: type[Record], full: bool, turn: int) -> Record:
    values = {}
    for place, (name, info) in enumerate(model.model_fields.items()):
        if full or info.is_required():
            values[name] = _sample(info.annotation, tuple(info.metadata), full, turn + place)
    return model(**values)


def _sample(annotation: Any, marks: tuple[Any, ...], full: bool, turn: int) -> Any:
    if typing.get_origin(annotation) is typing.Annotated:
        base, *extra = typing.get_args(annotation)
        return _sample(base, (*marks, *extra), full, turn)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _sample(next(part for part in typing.get_args(annotation) if part is not type(None)), marks, full, turn)
    if typing.get_origin(annotation) is list:
        return [_sample(typing.get_args(annotation)[0], (), full, turn + i) for i in range(3 if full else 0)]
    for mark in marks:
        if isinstance(mark, Fixed):
            return _bytes(mark.size, turn)
        if isinstance(mark, Float32):
            return (-0.25, -math.inf, 0.0)[turn % 3]
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return _sample_record(annotation, full, turn)
    plain: dict[Any, Any] = {
        str: (TEXTS[:-1] if full else ("",))[turn % (len(TEXTS) - 1 if full else 1)],
        int: LONGS[turn % len(LONGS)] if full else 0,
        float: FLOATS[turn % len(FLOATS)],
        bool: bool(turn % 2),
        bytes: b"\0\xff",
    }
    return plain[annotation]


def _bytes(size: int, turn: int) -> bytes:
    return bytes((turn * 31 + i * 7) % 256 for i in range(size))
