"""The OpenAPI document of the gateway, at `/openapi.json`: every path that it serves, what is sent there, and each kind of error."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from ingest.debug.breakpoints import Breakpoint
from ingest.gateway import bodies, errors
from ingest.gateway.bodies import Schema
from ingest.gateway.endpoints.base import Endpoint
from ingest.gateway.headers import recorder_version
from schemas.requests import dump

PATH = "/openapi.json"

_ERRORS = ("400", "401", "403", "404", "413", "422", "429", "502", "503", "504")
"""Statuses with which a request may fail before its first byte, that of the upstream among them (`default` covers the rest)."""

_HEADERS = {
    "x-tokentape-session": "The session that the request belongs to, a UUID.",
    "x-tokentape-user": "Who asks, as it is recorded.",
    "x-tokentape-workflow": "What the request is part of.",
    "x-tokentape-purpose": "What the request is for.",
    "x-tokentape-tags": "Tags of the session, with commas between.",
    "x-tokentape-priority": "interactive or batch.",
    "x-tokentape-hardware": "Preferred hardware of the upstream, with commas between.",
    "traceparent": "W3C trace context.",
}
_OWN = {name: {"schema": {"type": "string", "format": "uuid"}} for name in ("x-tokentape-session", "x-tokentape-generation")}
_BREAKPOINT_OWN = ("created_by", "created_at")
"""Fields of a breakpoint that the gateway fills in."""


@functools.cache
def openapi(endpoints: tuple[Endpoint, ...]) -> bytes:
    """The document, as JSON."""
    return dump(document(endpoints))


def document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The document of a gateway with these recorded endpoints."""
    generating = {endpoint.path: {"post": _generation(endpoint)} for endpoint in endpoints}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tokentape gateway",
            "version": recorder_version() or "0",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": generating | _provider_paths() | _gemini_paths() | _own_paths() | _debug_paths(),
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "x-goog-api-key": {"type": "apiKey", "in": "header", "name": "x-goog-api-key"},
            },
            "schemas": {
                "OpenAIError": bodies.OPENAI_ERROR,
                "AnthropicError": bodies.ANTHROPIC_ERROR,
                "GeminiError": bodies.GEMINI_ERROR,
                "Problem": bodies.PROBLEM,
            },
        },
        "security": [{}, {"bearer": []}, {"x-api-key": []}, {"x-goog-api-key": []}],
    }


def _generation(endpoint: Endpoint) -> Schema:
    """A recorded endpoint: whole answers as JSON, streams as server-sent events, errors in its provider's shape."""
    path = endpoint.path
    streamed: Schema = {} if path == "/v1/embeddings" else {"text/event-stream": {}}
    answer = {"application/json": {"schema": bodies.ANSWERS.get(path, bodies.OBJECT)}, **streamed}
    return {
        "operationId": path.removeprefix("/v1/").replace("/", "_"),
        "tags": ["generation"],
        "parameters": [_header(name, text) for name, text in _HEADERS.items()],
        "requestBody": _body(bodies.REQUESTS.get(path, bodies.OBJECT)),
        "responses": {"200": {"description": "The answer.", "headers": _OWN, "content": answer}, **_failures(_error_of(endpoint))},
    }


def _provider_paths() -> dict[str, Schema]:
    """What providers serve too and is not recorded."""
    counted = {name: bodies.REQUESTS["/v1/messages"]["properties"][name] for name in ("model", "messages", "system", "tools")}
    return {
        "/v1/messages/count_tokens": {
            "post": {
                "operationId": "count_tokens",
                "tags": ["generation"],
                "requestBody": _body(bodies.record("model messages", **counted)),
                "responses": {**_ok(bodies.COUNTED), **_failures("AnthropicError")},
            }
        },
        "/v1/models": {
            "get": {"operationId": "models", "tags": ["generation"], "responses": {**_ok(bodies.MODELS), **_failures("OpenAIError")}}
        },
        "/v1/models/{model}": {"parameters": [_name("model", "The model's name.")], "get": _told("model", "OpenAIError")},
        "/v1/responses/{id}": {
            "parameters": [_name("id", "The response's id.")],
            "get": _told("response", "OpenAIError"),
            "delete": _told("delete_response", "OpenAIError"),
        },
    }


def _gemini_paths() -> dict[str, Schema]:
    """What Google's clients ask for; a stream is an array unless `alt` is `sse`."""
    model = [_name("model", "The model's name.")]
    asked = _body(bodies.record("contents", contents=bodies.array(bodies.OBJECT), generationConfig=bodies.OBJECT))
    headers = [_header(name, text) for name, text in _HEADERS.items()]
    events = {"name": "alt", "in": "query", "schema": {"enum": ["sse"]}}
    streamed: Schema = {"application/json": {"schema": bodies.array(bodies.OBJECT)}, "text/event-stream": {}}
    failures = _failures("GeminiError")
    whole = {"200": {"description": "The answer.", "headers": _OWN, "content": _json(bodies.OBJECT)}, **failures}
    stream = {"200": {"description": "The answer.", "headers": _OWN, "content": streamed}, **failures}
    methods: dict[str, Schema] = {
        "generateContent": {"parameters": headers, "responses": whole},
        "streamGenerateContent": {"parameters": [*headers, events], "responses": stream},
        "countTokens": {"responses": {**_ok(bodies.OBJECT), **failures}},
    }
    paths: dict[str, Schema] = {
        f"/v1beta/models/{{model}}:{name}": {
            "parameters": model,
            "post": {"operationId": name, "tags": ["generation"], "requestBody": asked, **operation},
        }
        for name, operation in methods.items()
    }
    paths["/v1beta/models"] = {"get": _told("gemini_models", "GeminiError")}
    paths["/v1beta/models/{model}"] = {"parameters": model, "get": _told("gemini_model", "GeminiError")}
    return paths


def _told(name: str, error: str) -> Schema:
    return {"operationId": name, "tags": ["generation"], "responses": {**_ok(bodies.OBJECT), **_failures(error)}}


def _own_paths() -> dict[str, Schema]:
    """What tells how this process is."""
    text = {"200": {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": bodies.TEXT}}}}
    ready = {**_ok(bodies.READY), "503": {"description": "No upstream can.", "content": _json(bodies.READY)}}
    return {
        "/health": _get("health", "Whether this process serves.", _ok(bodies.HEALTH)),
        "/ready": _get("ready", "Whether an upstream can take a request now.", ready),
        "/metrics": _get("metrics", "The metrics of this process.", text),
        PATH: _get("openapi", "This document.", _ok(bodies.OBJECT)),
    }


def _debug_paths() -> dict[str, Schema]:
    """Breakpoints and stopped requests."""
    asked = Breakpoint.model_json_schema()
    asked["properties"] = {name: field for name, field in asked["properties"].items() if name not in _BREAKPOINT_OWN}
    known = Breakpoint.model_json_schema(mode="serialization")
    one, stopped = _name("name", "The breakpoint's id."), _name("id", "The generation's id, or four digits or more of either end.")
    listed = {"name": "settled", "in": "query", "description": "Also what was decided lately.", "schema": bodies.BOOLEAN}
    edit = _body(bodies.EDIT)
    edit["content"]["application/json-patch+json"] = {"schema": bodies.PATCH}
    paths: dict[str, Schema] = {
        "/api/v1/breakpoints": {
            "get": _debug("breakpoints", _ok(bodies.record("breakpoints", breakpoints=bodies.array(known)))),
            "post": _debug("add_breakpoint", _ok(known, "201"), body=_body(asked, required=False)),
        },
        "/api/v1/breakpoints/{name}": {
            "parameters": [one],
            "get": _debug("breakpoint", _ok(known)),
            "delete": _debug("remove_breakpoint", {"204": {"description": "It is gone."}}),
        },
        "/api/v1/stopped": {"get": _debug("stopped", _ok(bodies.record("stopped", stopped=bodies.array(bodies.STOPPED))), [listed])},
        "/api/v1/stopped/{id}": {"parameters": [stopped], "get": _debug("stopped_request", _ok(bodies.SHOWN))},
    }
    verbs = {
        "edits": ("edit", _ok(bodies.EDITED, "201"), edit),
        "undo": ("undo", _ok(bodies.EDITED, "201"), _body(bodies.REASON, required=False)),
        "release": ("release", _ok(bodies.DECIDED), _body(bodies.REASON, required=False)),
        "refuse": ("refuse", _ok(bodies.DECIDED), _body(bodies.REASON, required=False)),
    }
    for word, (name, answers, body) in verbs.items():
        paths[f"/api/v1/stopped/{{id}}/{word}"] = {"parameters": [stopped], "post": _debug(name, answers, body=body)}
    return paths


def _debug(name: str, answers: Schema, parameters: Iterable[Schema] = (), body: Schema | None = None) -> Schema:
    problem = {"description": "A problem (RFC 9457).", "content": {"application/problem+json": {"schema": _ref("Problem")}}}
    statuses = ("400", "401", "403", "404", "409", "413", "415", "503")
    operation = {
        "operationId": name,
        "tags": ["debug"],
        "parameters": list(parameters),
        "responses": {**answers, **dict.fromkeys(statuses, problem)},
    }
    return operation | ({"requestBody": body} if body else {})


def _get(name: str, text: str, answers: Schema) -> dict[str, Schema]:
    return {"get": {"operationId": name, "summary": text, "tags": ["operation"], "responses": answers}}


def _header(name: str, text: str) -> Schema:
    return {"name": name, "in": "header", "description": text, "schema": bodies.TEXT}


def _name(name: str, text: str) -> Schema:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": text,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
    }


def _body(schema: Schema, *, required: bool = True) -> Schema:
    return {"required": required, "content": _json(schema)}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _ok(schema: Schema, status: str = "200") -> Schema:
    return {status: {"description": "The answer.", "content": _json(schema)}}


def _error_of(endpoint: Endpoint) -> str:
    return "AnthropicError" if endpoint.shape is errors.ANTHROPIC else "OpenAIError"


def _failures(name: str) -> Schema:
    failure = {"description": "The request failed; what came of it is on the tape.", "headers": {}, "content": _json(_ref(name))}
    limited = {**failure, "headers": {"retry-after": {"description": "Seconds.", "schema": bodies.INTEGER}}}
    return {status: limited if status in ("429", "503") else failure for status in (*_ERRORS, "default")}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
