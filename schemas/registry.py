"""Every writer schema ever used, by fingerprint; old events are decoded with the schema that wrote them and upcast."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from importlib import resources
from typing import Any

import fastavro
import fastavro.schema

from schemas.errors import UnknownSchema

MAGIC = b"\xc3\x01"
"""First two bytes of Avro's single-object encoding."""

HEADER_BYTES = 10
"""Magic and CRC-64-AVRO fingerprint in front of each body."""


class Schema:
    """One version of the event's schema. `fingerprint` is the 8 bytes (little-endian CRC-64-AVRO) that framing uses."""

    def __init__(self, definition: dict[str, Any]) -> None:
        self.definition = definition
        self.canonical = fastavro.schema.to_parsing_canonical_form(definition)
        self.fingerprint = bytes.fromhex(fastavro.schema.fingerprint(self.canonical, "CRC-64-AVRO"))
        self.header = MAGIC + self.fingerprint

    @cached_property
    def parsed(self) -> Any:
        """For fastavro, without logical types: timestamps stay integers, which is faster and has the same bytes."""
        return fastavro.parse_schema(_without_logical_types(self.definition))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the canonical form in hex: 64 bits are no protection against a forged collision."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()

    @cached_property
    def fields(self) -> list[str]:
        """Names of the top-level fields in order."""
        return [field["name"] for field in self.definition["fields"]]

    @cached_property
    def kinds(self) -> dict[str, dict[str, Any]]:
        """Record schema of each kind that this version knows, by name, expanded so that each stands alone."""
        named = _named(self.definition)
        expanded = {field["name"]: _define(field["type"], named, set()) for field in self.definition["fields"]}
        return {name: kind[1] for name, kind in expanded.items() if isinstance(kind, list) and _is_record(kind[1])}

    @cached_property
    def writers(self) -> dict[str, tuple[bytes, Any, bytes]]:
        """By kind: the null branches before it, its own branch's schema for fastavro, the null branches after it.

        Null fields are one zero byte each, so that only envelope and payload have to be walked: four times faster.
        """
        kinds = list(self.kinds)
        return {
            kind: (bytes(i) + b"\x02", fastavro.parse_schema(record), bytes(len(kinds) - 1 - i))
            for i, (kind, record) in enumerate(self.kinds.items())
        }

    @cached_property
    def envelope(self) -> Any:
        """The fields before the first kind as a record of their own, for fastavro.

        Raises:
            ValueError: a field that is no kind stands after a kind; no version may have that.
        """
        split = self.fields.index(next(iter(self.kinds)))
        if any(name not in self.kinds for name in self.fields[split:]):
            raise ValueError("a field that is no kind stands after the first kind")
        head = {**self.definition, "fields": self.definition["fields"][:split]}
        return fastavro.parse_schema(_without_logical_types(head))

    @cached_property
    def contents(self) -> dict[str, dict[str, Any]]:
        """Record schema of each kind's content, expanded so that each stands alone."""
        named = _named(self.definition)
        found = {}
        for kind, record in self.kinds.items():
            for field in record["fields"]:
                if field["name"] == "content":
                    definition = field["type"][1]
                    name = definition if isinstance(definition, str) else definition["name"]
                    found[kind] = _define(named[name], named, set())
        return found

    def json(self) -> str:
        """The schema as it is stored, with logical types and defaults."""
        return self._json

    @cached_property
    def _json(self) -> str:
        return json.dumps(self.definition, indent=1) + "\n"


class SchemaRegistry:
    """Schemas by fingerprint: those in `schemas/history`, those added, then those that `fetch` finds."""

    def __init__(self, fetch: Callable[[bytes], dict[str, Any] | None] | None = None) -> None:
        self._fetch = fetch
        self._schemas: dict[bytes, Schema] = {}
        for path in resources.files("schemas").joinpath("history").iterdir():
            if path.name.endswith(".avsc"):
                self.add(json.loads(path.read_text(encoding="utf-8")))

    def add(self, definition: dict[str, Any]) -> Schema:
        """Make a schema known."""
        schema = Schema(definition)
        return self._schemas.setdefault(schema.fingerprint, schema)

    def get(self, fingerprint: bytes) -> Schema:
        """The schema of a fingerprint.

        Raises:
            UnknownSchema: neither the history nor the store explains it.
        """
        schema = self._schemas.get(fingerprint)
        if schema is not None:
            return schema
        definition = self._fetch(fingerprint) if self._fetch is not None else None
        if definition is not None and Schema(definition).fingerprint == fingerprint:
            return self.add(definition)
        raise UnknownSchema(
            f"schema fingerprint {fingerprint.hex()} is unknown",
            operation="decode",
            hint="put the writer's .avsc into the cold store under schemas/ and requeue",
        )

    def all(self) -> list[Schema]:
        """Every schema known by now."""
        return list(self._schemas.values())


def _load_current() -> Schema:
    return Schema(json.loads(resources.files("schemas").joinpath("event.avsc").read_text(encoding="utf-8")))


def _is_record(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "record"


def _without_logical_types(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {key: _without_logical_types(value) for key, value in schema.items() if key != "logicalType"}
    if isinstance(schema, list):
        return [_without_logical_types(item) for item in schema]
    return schema


def _named(schema: Any) -> dict[str, Any]:
    """Every named type of a schema by its name."""
    if isinstance(schema, list):
        return {name: found for item in schema for name, found in _named(item).items()}
    if not isinstance(schema, dict):
        return {}
    found = {schema["name"]: schema} if schema["type"] in ("record", "fixed", "enum") else {}
    for inner in (schema.get("items"), *(field["type"] for field in schema.get("fields", []))):
        found |= _named(inner)
    return found


def _define(schema: Any, named: dict[str, Any], local: set[str]) -> Any:
    """The schema with the first use of each name defined in place, as fastavro needs it to stand alone."""
    if isinstance(schema, str):
        if schema not in named or schema in local:
            return schema
        return _define(named[schema], named, local)
    if isinstance(schema, list):
        return [_define(item, named, local) for item in schema]
    result = dict(schema)
    if schema["type"] in ("record", "fixed", "enum"):
        local.add(schema["name"])
    if schema["type"] == "record":
        result["fields"] = [{**field, "type": _define(field["type"], named, local)} for field in schema["fields"]]
    elif schema["type"] == "array":
        result["items"] = _define(schema["items"], named, local)
    return result


CURRENT = _load_current()
