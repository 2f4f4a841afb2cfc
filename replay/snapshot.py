"""A state as bytes and back, so that a fold can go on where an earlier one stopped.

A snapshot is only a cache: one of another version is refused, and the events give the same state again.
"""

from __future__ import annotations

import math
from base64 import urlsafe_b64encode
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError

from replay.persistent import Map, Vector
from replay.state import SessionState
from schemas.errors import CorruptStore

FORMAT = "tokentape.session-state"
VERSION = 1
"""Raised with every change of the state's shape or of a rule that fills it."""

_HINT = "fold the session's events instead; they give the same state"


def dump(state: SessionState) -> bytes:
    """The snapshot of a state: JSON; bytes as base64, infinite numbers as text."""
    return orjson.dumps(document_of(plain(state)))


def document_of(plain: Any) -> dict[str, Any]:
    """The document of a snapshot around a state in plain values."""
    return {"format": FORMAT, "version": VERSION, "state": plain}


def load(data: bytes) -> SessionState:
    """The state of a snapshot, equal to the one that was dumped.

    Raises:
        CorruptStore: not a snapshot, or one of another version.
    """
    try:
        return state_of(orjson.loads(data))
    except ValueError as error:
        raise CorruptStore(f"snapshot does not read: {error}", operation="load snapshot", hint=_HINT) from error


def state_of(document: Any) -> SessionState:
    """The state of a snapshot's document; raises as `load` does."""
    try:
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CorruptStore("no snapshot of a session", operation="load snapshot", hint=_HINT)
        if document.get("version") != VERSION:
            fault = f"snapshot of version {document.get('version')}, valid is {VERSION}"
            raise CorruptStore(fault, operation="load snapshot", hint=_HINT)
        return _adapter().validate_python(document["state"])
    except (ValueError, KeyError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise CorruptStore(f"snapshot does not read: {reason}", operation="load snapshot", hint=_HINT) from error


@cache
def _adapter() -> TypeAdapter[SessionState]:
    return TypeAdapter(SessionState)


def plain(value: Any) -> Any:
    """A part of a state in what JSON can say."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, bytes):
        return urlsafe_b64encode(value).decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, tuple | list | Vector):
        return [plain(item) for item in value]
    if isinstance(value, Map):
        return [[plain(key), plain(item)] for key, item in value.items()]
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    assert is_dataclass(value), f"a state holds no {type(value).__name__}"
    return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
