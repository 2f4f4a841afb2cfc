"""What a client asks of an engine, read just far enough to be recorded: the engine is the judge of the rest.

Later endpoints (completions, responses, messages) get their reader here beside `read_chat`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from schemas.errors import UsageError
from schemas.events import clean_text


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion request: `body` as received, `fields` as parsed, `messages` out of them.

    Fields of a wrong type read as if absent; they reach the engine as they are and it answers for them.
    """

    body: bytes
    fields: dict[str, Any]
    messages: list[Any]

    @property
    def stream(self) -> bool:
        """Whether the client wants server-sent events."""
        return self.fields.get("stream") is True

    @property
    def model(self) -> str | None:
        """The model asked for."""
        return text_of(self.fields.get("model"))

    @property
    def n(self) -> int:
        """How many sequences are asked for."""
        return long_of(self.fields.get("n")) or 1

    @property
    def max_tokens(self) -> int | None:
        """The limit under its new name, else under its old one."""
        limit = long_of(self.fields.get("max_completion_tokens"))
        return long_of(self.fields.get("max_tokens")) if limit is None else limit

    @property
    def tools(self) -> int:
        """How many tools are offered."""
        tools = self.fields.get("tools")
        return len(tools) if isinstance(tools, list) else 0

    @property
    def usage_asked(self) -> bool:
        """Whether the client wants the usage chunk of a stream."""
        options = self.fields.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    @cached_property
    def parameters(self) -> str:
        """The JSON text of the request without its messages."""
        return dump({name: value for name, value in self.fields.items() if name != "messages"}).decode()


def read_chat(body: bytes) -> ChatRequest:
    """The chat request of a body.

    Raises:
        UsageError: not JSON, not an object, or without a list of messages; `place` names the field.
    """
    try:
        fields = load(body)
    except ValueError as error:
        raise UsageError(f"the body is not valid JSON: {error}", operation="read request", hint="send one JSON object") from error
    if not isinstance(fields, dict):
        raise UsageError("the body is not a JSON object", operation="read request", hint="send one JSON object")
    messages = fields.get("messages")
    if not isinstance(messages, list):
        raise UsageError("messages must be an array", operation="read request", place="messages", hint="send a list of messages")
    return ChatRequest(body, fields, messages)


def load(data: bytes) -> Any:
    """A JSON value; what only Python's reader takes (NaN, lone surrogates, huge integers) is taken too.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return orjson.loads(data)
    except ValueError:
        try:
            return json.loads(data.decode())
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def dump(value: Any, *, sort_keys: bool = False) -> bytes:
    """The compact JSON text of a value, in UTF-8; lone surrogates become U+FFFD."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS if sort_keys else None)
    except TypeError:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys)
        return clean_text(text).encode()


def splice(request: ChatRequest, extra: dict[str, Any]) -> bytes:
    """The request's body with `extra` fields: the client's own bytes stay as they are unless one of them has to change."""
    if not extra:
        return request.body
    if any(name in request.fields for name in extra) or not request.fields:
        return dump({**request.fields, **extra})
    head = request.body.rstrip(b" \t\r\n")[:-1]
    return head + b"," + dump(extra)[1:]


def text_of(value: Any) -> str | None:
    """The value if it is a text."""
    return value if isinstance(value, str) else None


def long_of(value: Any) -> int | None:
    """The value if it is an integer of 64 bits."""
    return value if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63 else None


def double_of(value: Any) -> float | None:
    """The value if it is a number other than NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number
