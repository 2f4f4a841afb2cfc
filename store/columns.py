"""The columns of the table `events`, hot and cold alike, derived from the Avro schema without any library: the sandbox starts often."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

LOG_COLUMNS = {
    "kind": "VARCHAR",
    "log_id": "VARCHAR",
    "partition": "INTEGER",
    "offset": "BIGINT",
    "appended_at": "TIMESTAMP",
    "schema": "BLOB",
}
"""What the index keeps beside the event, the first columns of each table; all after them are the event's own fields."""

_TYPES = {
    "string": "VARCHAR",
    "bytes": "BLOB",
    "fixed": "BLOB",
    "enum": "VARCHAR",
    "boolean": "BOOLEAN",
    "int": "INTEGER",
    "long": "BIGINT",
    "float": "FLOAT",
    "double": "DOUBLE",
}


@cache
def current_columns() -> dict[str, str]:
    """`columns` of the current schema."""
    return columns(json.loads(resources.files("schemas").joinpath("event.avsc").read_text(encoding="utf-8")))


def columns(definition: dict[str, Any]) -> dict[str, str]:
    """Columns of `events` and their DuckDB types, in order, as `read_avro` gives them for a schema (enums as text)."""
    named: dict[str, Any] = {}
    return {**LOG_COLUMNS, **{field["name"]: _type(field["type"], named) for field in definition["fields"]}}


def _type(schema: Any, named: dict[str, Any]) -> str:
    if isinstance(schema, list):
        return _type(next(branch for branch in schema if branch != "null"), named)
    if isinstance(schema, str):
        return _TYPES[schema] if schema in _TYPES else _type(named[schema], named)
    if "name" in schema:
        named[schema["name"]] = schema
    if schema["type"] == "record":
        return "STRUCT(" + ", ".join(f'"{field["name"]}" {_type(field["type"], named)}' for field in schema["fields"]) + ")"
    if schema["type"] == "array":
        return _type(schema["items"], named) + "[]"
    if schema.get("logicalType") == "timestamp-micros":
        return "TIMESTAMP"
    return _TYPES[schema["type"]]
