"""What requests and answers look like, as JSON Schema for the OpenAPI document.

The fields that this gateway reads or translates; all others pass through, so every body may have more. The engine is the judge
of what a field may hold.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
INTEGER: Schema = {"type": "integer"}
BOOLEAN: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}


def array(items: Schema, **bounds: int) -> Schema:
    """A list."""
    return {"type": "array", "items": items, **bounds}


def record(required: str = "", **fields: Schema) -> Schema:
    """An object of these fields and perhaps more; `required` names, with spaces between, those that must be there."""
    schema: Schema = {"type": "object", "properties": fields}
    return schema | ({"required": required.split()} if required else {})


def either(*schemas: Schema) -> Schema:
    """One of several."""
    return {"anyOf": list(schemas)}


def choice(*values: str) -> Schema:
    """One of some texts."""
    return {"type": "string", "enum": list(values)}


_PARTS = array(record("type", type=TEXT, text=TEXT))
_CONTENT = either(TEXT, _PARTS)
_CALL = record("function", id=TEXT, type=choice("function"), function=record("name arguments", name=TEXT, arguments=TEXT))
_FUNCTION = record("name", name=TEXT, description=TEXT, parameters=OBJECT, strict=BOOLEAN)
_STREAM_OPTIONS = record(include_usage=BOOLEAN)
_SAMPLING = {"temperature": NUMBER, "top_p": NUMBER, "seed": INTEGER, "frequency_penalty": NUMBER, "presence_penalty": NUMBER}
_COMMON = {"model": TEXT, "stream": BOOLEAN, "metadata": OBJECT, "user": TEXT}

REQUESTS: dict[str, Schema] = {
    "/v1/chat/completions": record(
        "model messages",
        **_COMMON,
        **_SAMPLING,
        messages=array(
            record(
                "role",
                role=choice("system", "developer", "user", "assistant", "tool"),
                content=either(_CONTENT, {"type": "null"}),
                tool_calls=array(_CALL),
                tool_call_id=TEXT,
            ),
            minItems=1,
        ),
        n=INTEGER,
        max_tokens=INTEGER,
        max_completion_tokens=INTEGER,
        stop=either(TEXT, array(TEXT)),
        logprobs=BOOLEAN,
        top_logprobs=INTEGER,
        tools=array(record("type function", type=choice("function"), function=_FUNCTION)),
        tool_choice=either(choice("none", "auto", "required"), OBJECT),
        response_format=record("type", type=choice("text", "json_object", "json_schema"), json_schema=OBJECT),
        stream_options=_STREAM_OPTIONS,
    ),
    "/v1/completions": record(
        "model prompt",
        **_COMMON,
        **_SAMPLING,
        prompt=either(TEXT, array(TEXT, minItems=1), array(INTEGER, minItems=1)),
        n=INTEGER,
        max_tokens=INTEGER,
        logprobs=INTEGER,
        echo=BOOLEAN,
        stop=either(TEXT, array(TEXT)),
        stream_options=_STREAM_OPTIONS,
    ),
    "/v1/embeddings": record(
        "model input",
        model=TEXT,
        user=TEXT,
        input=either(TEXT, array(TEXT, minItems=1), array(INTEGER, minItems=1)),
        encoding_format=choice("float", "base64"),
        dimensions=INTEGER,
    ),
    "/v1/messages": record(
        "model messages max_tokens",
        model=TEXT,
        stream=BOOLEAN,
        metadata=OBJECT,
        messages=array(record("role content", role=choice("user", "assistant"), content=_CONTENT), minItems=1),
        max_tokens=INTEGER,
        system=_CONTENT,
        temperature=NUMBER,
        top_p=NUMBER,
        top_k=INTEGER,
        stop_sequences=array(TEXT),
        tools=array(record("name input_schema", name=TEXT, description=TEXT, input_schema=OBJECT)),
        tool_choice=record("type", type=choice("auto", "any", "tool", "none"), name=TEXT, disable_parallel_tool_use=BOOLEAN),
        thinking=record("type", type=choice("enabled", "disabled", "adaptive"), budget_tokens=INTEGER),
    ),
    "/v1/responses": record(
        "model input",
        model=TEXT,
        stream=BOOLEAN,
        metadata=OBJECT,
        input=either(TEXT, array(OBJECT, minItems=1)),
        instructions=TEXT,
        max_output_tokens=INTEGER,
        temperature=NUMBER,
        top_p=NUMBER,
        tools=array(record("type", type=TEXT, name=TEXT, description=TEXT, parameters=OBJECT)),
        tool_choice=either(choice("none", "auto", "required"), OBJECT),
        text=record(format=record("type", type=TEXT)),
        reasoning=record(effort=TEXT),
        parallel_tool_calls=BOOLEAN,
    ),
}
"""By endpoint."""

ANSWERS: dict[str, Schema] = {
    "/v1/chat/completions": record("choices", id=TEXT, model=TEXT, choices=array(OBJECT), usage=either(OBJECT, {"type": "null"})),
    "/v1/completions": record("choices", id=TEXT, model=TEXT, choices=array(OBJECT), usage=either(OBJECT, {"type": "null"})),
    "/v1/embeddings": record("data", model=TEXT, data=array(OBJECT), usage=either(OBJECT, {"type": "null"})),
    "/v1/messages": record("type role content usage", id=TEXT, type=choice("message"), role=TEXT, content=array(OBJECT), usage=OBJECT),
    "/v1/responses": record("output status", id=TEXT, output=array(OBJECT), status=TEXT, usage=either(OBJECT, {"type": "null"})),
}
"""By endpoint, where the answer is no stream."""

COUNTED: Schema = record("input_tokens", input_tokens=INTEGER)
MODELS: Schema = record("data", object=TEXT, data=array(record("id", id=TEXT, object=TEXT)))

OPENAI_ERROR: Schema = record("error", error=record("message type", message=TEXT, type=TEXT, param={"type": ["string", "null"]}, code={}))
ANTHROPIC_ERROR: Schema = record("type error", type=choice("error"), error=record("type message", type=TEXT, message=TEXT))
GEMINI_ERROR: Schema = record("error", error=record("code message status", code=INTEGER, message=TEXT, status=TEXT))
PROBLEM: Schema = record("type title status detail instance", type=TEXT, title=TEXT, status=INTEGER, detail=TEXT, instance=TEXT, hint=TEXT)

_UPSTREAM = record(
    "name live ready", name=TEXT, live=BOOLEAN, ready={"type": ["boolean", "null"]}, ejected=BOOLEAN, open=INTEGER, queued=INTEGER
)
HEALTH: Schema = record("status active upstreams", status=choice("ok"), active=INTEGER, upstreams=array(_UPSTREAM))
READY: Schema = record("status upstreams", status=choice("ready", "not ready"), upstreams=array(_UPSTREAM))

STOPPED: Schema = record("generation state", generation=TEXT, state=TEXT, stopped_at=NUMBER, decided_by={"type": ["string", "null"]})
SHOWN: Schema = record("generation request version", generation=TEXT, request=TEXT, submitted=TEXT, edits=array(OBJECT), version=INTEGER)
DECIDED: Schema = record("action actor", action=TEXT, actor=TEXT)
EDITED: Schema = record("edit_id actor patch version", edit_id=TEXT, actor=TEXT, patch=array(OBJECT), version=INTEGER)
REASON: Schema = record(reason={"type": "string", "maxLength": 2000}) | {"additionalProperties": False}
PATCH: Schema = array(
    record("op path", op=choice("add", "remove", "replace", "move", "copy", "test"), path=TEXT, value={}, **{"from": TEXT})
)
"""RFC 6902."""
EDIT: Schema = record("patch", patch=PATCH, reason=TEXT, version=INTEGER) | {"additionalProperties": False}
