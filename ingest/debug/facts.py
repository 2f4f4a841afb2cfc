"""What breakpoints may ask about a request, read when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ingest.debug.expressions import NAMES


class Readable(Protocol):
    """A request as a reader of `schemas.requests` gives it: `body` its bytes, `fields` the JSON object in them."""

    @property
    def body(self) -> bytes:
        """The body as it goes upstream."""
        ...

    @property
    def fields(self) -> dict[str, Any]:
        """The parsed body."""
        ...

    @property
    def model(self) -> str | None:
        """The model asked for."""
        ...

    @property
    def stream(self) -> bool:
        """Whether the client wants server-sent events."""
        ...


class RequestFacts(Mapping[str, Any]):
    """The names of `expressions.NAMES` for one request."""

    def __init__(self, request: Readable, *, endpoint: str, tags: Sequence[str], key: str | None, user: str | None) -> None:
        self._request = request
        self._fields = request.fields
        self._known = {"endpoint": endpoint, "tags": list(tags), "key": key, "user": user}

    def __getitem__(self, name: str) -> Any:
        if name in self._known:
            return self._known[name]
        return _READ[name](self._request)

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


def messages_of(fields: dict[str, Any]) -> list[Any]:
    """The conversation, under the name that its provider has for it; a text alone is one message."""
    for name in ("messages", "input", "contents", "prompt"):
        found = fields.get(name)
        if isinstance(found, list):
            return found
        if isinstance(found, str):
            return [found]
    return []


def said_in(message: Any) -> str:
    """The text of a message: its content's text, or that of its parts."""
    if isinstance(message, str):
        return message
    if not isinstance(message, dict):
        return ""
    content = message.get("content", message.get("parts", message.get("text")))
    if isinstance(content, list):
        return " ".join(text for part in content if (text := said_in(part)))
    return content if isinstance(content, str) else ""


def _last(request: Readable) -> str:
    messages = messages_of(request.fields)
    return said_in(messages[-1]) if messages else ""


def _limit(request: Readable) -> Any:
    fields = request.fields
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    return next((fields[name] for name in names if fields.get(name) is not None), None)


_READ: dict[str, Callable[[Readable], Any]] = {
    "model": lambda request: request.model,
    "messages": lambda request: messages_of(request.fields),
    "last": _last,
    "tools": lambda request: request.fields.get("tools") or [],
    "stream": lambda request: request.stream,
    "temperature": lambda request: request.fields.get("temperature"),
    "max_tokens": _limit,
    "n": lambda request: request.fields.get("n") or 1,
    "params": lambda request: request.fields,
}
