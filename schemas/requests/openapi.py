"""Google's schemas, a dialect of OpenAPI 3.0, as the JSON schemas that they mean."""

from __future__ import annotations

from typing import Any

_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_ONE, _SEVERAL, _NAMED = ("items",), ("anyOf",), ("properties",)


def to_json_schema(schema: Any) -> Any:
    """The JSON schema of a Google one: types in small letters, `nullable` as a type, counts as numbers, properties in their order."""
    if not isinstance(schema, dict):
        return schema
    out = {name: _value(name, value) for name, value in schema.items() if name not in ("nullable", "propertyOrdering")}
    order = schema.get("propertyOrdering")
    named = out.get("properties")
    if isinstance(order, list) and isinstance(named, dict):
        first = {name: named[name] for name in order if isinstance(name, str) and name in named}
        out["properties"] = first | named
    if schema.get("nullable") is not True:
        return out
    if "anyOf" in out and isinstance(out["anyOf"], list):
        return {**out, "anyOf": [*out["anyOf"], {"type": "null"}]}
    if isinstance(out.get("enum"), list):
        out["enum"] = [*out["enum"], None]
    return {**out, "type": [out["type"], "null"]} if isinstance(out.get("type"), str) else out


def _value(name: str, value: Any) -> Any:
    if name == "type" and isinstance(value, str):
        return value.lower()
    if name in _COUNTS and isinstance(value, str) and value.isdigit():
        return int(value)
    if name in _ONE:
        return to_json_schema(value)
    if name in _SEVERAL and isinstance(value, list):
        return [to_json_schema(inner) for inner in value]
    if name in _NAMED and isinstance(value, dict):
        return {key: to_json_schema(inner) for key, inner in value.items()}
    return value


_KEPT = ("args", "response", "parameters", "parametersJsonSchema", "responseSchema", "responseJsonSchema", "labels")
"""Fields whose content is the client's own, however it is spelled."""


def in_camel_case(value: Any) -> Any:
    """A document of Gemini's with the names of its fields in camel case: Google takes both spellings."""
    if isinstance(value, list):
        return [in_camel_case(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    out: dict[str, Any] = {}
    for name, inner in value.items():
        spelled = _camel(name)
        out[spelled] = inner if spelled in _KEPT else in_camel_case(inner)
    return out


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest) if first and name.islower() else name
