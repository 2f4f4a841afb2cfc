"""The OpenAPI document of the API, from the table of its routes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ingest.gateway.bodies import PROBLEM, Schema
from ingest.gateway.keys import ROLES
from tokentape import __version__
from tokentape.api.routing import PREFIX, Route

_PROBLEMS = ("400", "401", "403", "404", "405", "409", "413", "415", "422", "503")
READ: dict[str, Schema] = {"application/json": {"type": "object"}, "application/x-protobuf": {"type": "string", "format": "binary"}}
"""Bodies of somebody else's format, of which their own specification says more."""
_REF = "#/components/schemas/{model}"


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The document."""
    schemas: dict[str, Schema] = {"Problem": PROBLEM}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(PREFIX + route.path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tokentape",
            "version": __version__,
            "description": "Sessions on the tape of LLM inference: searched, looked at, replayed, queried and kept.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}, "schemas": schemas},
        "security": [{}, {"bearer": []}],
    }


def _operation(route: Route, schemas: dict[str, Schema]) -> dict[str, Any]:
    problem = {"description": "A problem (RFC 9457).", "content": {"application/problem+json": {"schema": {"$ref": _of("Problem")}}}}
    good: dict[str, Any] = {"description": "The answer."}
    if route.status != 204:
        good["content"] = {media: {"schema": route.answer} if media == "application/json" else {} for media in route.media}
    roles = [role for role in ROLES if role in route.roles] or ["admin"]
    made: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.summary,
        "description": f"Roles: {', '.join(roles)}." + (" Each call is an `access_logged` event." if route.content else ""),
        "tags": [route.path.split("/")[1]],
        "parameters": [*_path(route), *_query(route, schemas), *_headers(route)],
        "responses": {str(route.status): good, **dict.fromkeys(_PROBLEMS, problem)},
    }
    if route.method == "GET":
        made["responses"]["304"] = {"description": "What the client has is what there is."}
    if route.body is not None:
        schema = route.body.model_json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        required = bool(schema.get("required"))
        made["requestBody"] = {"required": required, "content": {"application/json": {"schema": schema}}}
    if route.reads:
        made["requestBody"] = {"required": True, "content": {media: {"schema": READ[media]} for media in route.reads}}
    return made


def _path(route: Route) -> list[Schema]:
    schema = {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}
    return [{"name": name, "in": "path", "required": True, "schema": schema} for name in re.findall(r"\{(\w+)\}", route.path)]


def _query(route: Route, schemas: dict[str, Schema]) -> list[Schema]:
    schema = route.query.model_json_schema(ref_template=_REF)
    schemas |= schema.pop("$defs", {})
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": field} for name, field in schema.get("properties", {}).items()
    ]


def _headers(route: Route) -> list[Schema]:
    if not route.writes:
        return []
    text = "Sent again under the same key, the request is answered as it was and not done again."
    return [
        {"name": "Idempotency-Key", "in": "header", "description": text, "schema": {"type": "string", "minLength": 1, "maxLength": 200}}
    ]


def _of(name: str) -> str:
    return _REF.format(model=name)
