"""Which headers pass in either direction, and what of them is recorded: names of people and traces, never credentials."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import parse_qs

from ingest.gateway.exchange import Exchange, Headers

Clean = Callable[[str | None], str | None]
"""Takes secrets out of a text."""

# RFC 9110, section 7.6.1: these belong to one connection, not to the message.
_HOP = {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
# The client library writes these itself; what is compressed could not be read.
_NOT_UPSTREAM = _HOP | {b"host", b"content-length", b"accept-encoding", b"authorization", b"expect", b"proxy-connection"}
_KEY_HEADERS = ("x-api-key", "x-goog-api-key")
_KEY_HEADER_OF = {"anthropic": "x-api-key", "gemini": "x-goog-api-key"}
_NOT_UPSTREAM |= {name.encode() for name in _KEY_HEADERS}
_NOT_DOWNSTREAM = _HOP | {b"content-length", b"content-encoding"}
_OWN = b"x-tokentape-"

ANTHROPIC_VERSION = "2023-06-01"
"""The version of its API that Anthropic is asked for where the client names none."""

HEADER_CHARACTERS_MAX = 512
"""Of a header's value this much is recorded."""


def authorization_of(exchange: Exchange) -> str | None:
    """The credential that came with a request, as a bearer token: each provider's clients have a header of their own for it."""
    if authorization := exchange.header("authorization"):
        return authorization
    named = parse_qs(exchange.scope["query_string"].decode("latin-1")).get("key")
    key = next((value for name in _KEY_HEADERS if (value := exchange.header(name))), named[0] if named else None)
    return f"Bearer {key}" if key else None


def upstream_headers(exchange: Exchange, authorization: str | None, kind: str = "") -> list[tuple[str, str]]:
    """The client's headers for the upstream, whose kind says in which header a credential stands."""
    passed = [(name, value) for name, value in exchange.scope["headers"] if name not in _NOT_UPSTREAM and not name.startswith(_OWN)]
    headers = [(name.decode("latin-1"), value.decode("utf-8", "replace")) for name, value in passed]
    headers.append(("accept-encoding", "identity"))
    if kind == "anthropic" and not exchange.header("anthropic-version"):
        headers.append(("anthropic-version", ANTHROPIC_VERSION))
    if authorization:
        own = authorization == exchange.header("authorization")
        headers.append(("authorization", authorization) if own else credential_header(authorization, kind))
    return headers


def credential_header(authorization: str, kind: str | None) -> tuple[str, str]:
    """The header in which a kind of upstream wants a credential."""
    name = _KEY_HEADER_OF.get(kind or "")
    return (name, authorization.removeprefix("Bearer ")) if name else ("authorization", authorization)


def answer_headers(raw: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The upstream's headers for the client."""
    return [(name.lower(), value) for name, value in raw if name.lower() not in _NOT_DOWNSTREAM]


def request_facts(exchange: Exchange, clean: Clean) -> dict[str, Any]:
    """Fields of `request_submitted` that tie it to the world."""
    return {
        "body_bytes": exchange.body_bytes,
        "trace_id": trace_id(exchange.header("traceparent")),
        "client_request_id": _short(clean(exchange.header("x-request-id"))),
        "client_address": exchange.client,
    }


def session_facts(exchange: Exchange, clean: Clean, sample_rate: float) -> dict[str, Any]:
    """Fields of `session_opened`."""
    facts: dict[str, Any] = {name: _short(clean(exchange.header(f"x-tokentape-{name}"))) for name in ("user", "workflow", "purpose")}
    facts["client"] = _short(clean(exchange.header("user-agent")))
    facts["recorder_version"] = recorder_version()
    facts["sample_rate"] = sample_rate if sample_rate < 1 else None
    return facts


def tags_of(exchange: Exchange, clean: Clean) -> list[str]:
    """The tags that a request names."""
    tags = clean(exchange.header("x-tokentape-tags")) or ""
    return [tag.strip()[:HEADER_CHARACTERS_MAX] for tag in tags.split(",") if tag.strip()]


def trace_id(traceparent: str | None) -> str | None:
    """The trace id of a W3C traceparent header, None for one that is not valid."""
    parts = (traceparent or "").strip().split("-")
    if len(parts) < 4 or len(parts[1]) != 32 or set(parts[1]) - set("0123456789abcdef") or set(parts[1]) == {"0"}:
        return None
    return parts[1]


def _short(text: str | None) -> str | None:
    return text[:HEADER_CHARACTERS_MAX] if text else None


@functools.cache
def recorder_version() -> str | None:
    """The version of this program."""
    try:
        return version("tokentape")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return None
