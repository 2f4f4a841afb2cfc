"""The Avro schema of an event, derived from the pydantic models so that every field is written once."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from schemas.events import ENVELOPE, PAYLOADS, SOURCES, Event, Fixed, Float32

NAMESPACE = "tokentape"
_FIXED_NAMES = {8: "Bytes8", 16: "Bytes16", 32: "Bytes32"}
_PRIMITIVES: dict[Any, str] = {str: "string", int: "long", float: "double", bool: "boolean", bytes: "bytes"}


def derive() -> dict[str, Any]:
    """The schema of `Event` as JSON-able dict: envelope, then one nullable field per kind."""
    seen: set[str] = set()
    fields = [_field(name, Event.model_fields[name], seen) for name in ENVELOPE]
    for kind, model in PAYLOADS.items():
        fields.append({"name": kind, "type": ["null", _record(model, seen)], "default": None})
    return {"type": "record", "name": "Event", "namespace": NAMESPACE, "fields": fields}


def _record(model: type[BaseModel], seen: set[str]) -> Any:
    if model.__name__ in seen:
        return model.__name__
    seen.add(model.__name__)
    fields = [_field(name, info, seen) for name, info in model.model_fields.items()]
    return {"type": "record", "name": model.__name__, "fields": fields}


def _field(name: str, info: FieldInfo, seen: set[str]) -> dict[str, Any]:
    if name == "source":
        return {"name": name, "type": {"type": "enum", "name": "Source", "symbols": list(SOURCES)}}
    if name == "recorded_at":
        return {"name": name, "type": {"type": "long", "logicalType": "timestamp-micros"}}
    field = {"name": name, "type": _type(info.annotation, tuple(info.metadata), seen)}
    if isinstance(field["type"], list):
        field["default"] = None
    return field


def _type(annotation: Any, metadata: tuple[Any, ...], seen: set[str]) -> Any:
    if typing.get_origin(annotation) is typing.Annotated:
        base, *extra = typing.get_args(annotation)
        return _type(base, (*metadata, *extra), seen)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = next(arg for arg in typing.get_args(annotation) if arg is not type(None))
        return ["null", _type(inner, metadata, seen)]
    if typing.get_origin(annotation) is list:
        return {"type": "array", "items": _type(typing.get_args(annotation)[0], (), seen)}
    for mark in metadata:
        if isinstance(mark, Fixed):
            return _fixed(mark.size, seen)
        if isinstance(mark, Float32):
            return "float"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _record(annotation, seen)
    return _PRIMITIVES[annotation]


def _fixed(size: int, seen: set[str]) -> Any:
    name = _FIXED_NAMES[size]
    if name in seen:
        return name
    seen.add(name)
    return {"type": "fixed", "name": name, "size": size}
