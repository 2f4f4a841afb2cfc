"""How a generation can fail at the gateway, and the words in which each kind of client is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson

DONE = b"data: [DONE]\n\n"

JSON = (b"content-type", b"application/json")

LAST_WORDS_S = 5.0
"""How long a client that does not read may delay the end of a failed exchange."""


@dataclass(frozen=True)
class Fault:
    """One way to fail: `error_type` and `origin` as `generation_failed` has them, `status` as the client sees it."""

    error_type: str
    origin: str
    status: int
    retryable: bool
    api_type: str


CLIENT_DISCONNECTED = Fault("client_disconnected", "client", 499, True, "client_error")
INVALID_REQUEST = Fault("invalid_request", "client", 400, False, "invalid_request_error")
TOO_LARGE = Fault("invalid_request", "client", 413, False, "invalid_request_error")
TOO_SLOW = Fault("invalid_request", "client", 408, True, "invalid_request_error")
"""A request that was not complete in time."""
UNREACHABLE = Fault("upstream_unreachable", "upstream", 502, True, "upstream_error")
TIMEOUT = Fault("upstream_timeout", "upstream", 504, True, "upstream_error")
DISCONNECTED = Fault("upstream_disconnected", "upstream", 502, True, "upstream_error")
MALFORMED = Fault("upstream_malformed", "upstream", 502, True, "upstream_error")
UPSTREAM_ERROR = Fault("upstream_error", "upstream", 502, False, "upstream_error")
REFUSED = Fault("refused", "gateway", 403, False, "permission_error")
"""Somebody, or a rule, refused a request that had stopped at a breakpoint."""
SHUTDOWN = Fault("shutdown", "gateway", 503, True, "server_error")
NOT_RECORDED = Fault("not_recorded", "gateway", 503, True, "server_error")
"""Only in `strict` mode: what cannot be recorded is not served."""
INTERNAL = Fault("gateway_error", "gateway", 500, True, "server_error")
NOT_SERVED = Fault("not_found", "client", 404, False, "invalid_request_error")
WRONG_METHOD = Fault("method_not_allowed", "client", 405, False, "invalid_request_error")
NO_MODEL = Fault("model_not_found", "client", 404, False, "invalid_request_error")
NO_RESPONSE = Fault("previous_response_not_found", "client", 404, False, "invalid_request_error")
OVERLOADED = Fault("overloaded", "gateway", 503, True, "server_error")
UNKNOWN_KEY = Fault("invalid_api_key", "client", 401, False, "authentication_error")
FORBIDDEN = Fault("permission_denied", "client", 403, False, "permission_error")
REQUESTS_LIMITED = Fault("rate_limit_exceeded", "client", 429, True, "requests")
TOKENS_LIMITED = Fault("rate_limit_exceeded", "client", 429, True, "tokens")
SPENT = Fault("insufficient_quota", "client", 429, False, "insufficient_quota")
KEYS_AWAY = Fault("keys_unavailable", "gateway", 503, True, "server_error")
"""Only for keys that this worker does not know yet: whether they are valid cannot be read now."""


@dataclass(eq=False)
class Failure(Exception):
    """A fault that happened. `message` is for the client; `status` overrides the fault's; `param` names a request field.

    `retry_after_s` is when asking again makes sense; infinite where it never will without somebody's doing.
    """

    fault: Fault
    message: str
    status: int = 0
    param: str | None = None
    detail: str | None = field(default=None, repr=False)  # what is recorded where it is more than the client is told
    retry_after_s: float | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)
        self.status = self.status or self.fault.status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What an error answer's headers say about asking again; clients of OpenAI's heed both. An unread request ends its connection."""
        if self.fault in (TOO_LARGE, TOO_SLOW):
            return [(b"connection", b"close")]
        if self.retry_after_s is None:
            return []
        if math.isinf(self.retry_after_s):
            return [(b"x-should-retry", b"false")]
        return [(b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s)))]


@dataclass(frozen=True)
class Shape:
    """How the clients of one provider are told of a failure: their own exceptions come of it."""

    body: Callable[[Failure], bytes]
    """The body of an error answer."""
    event: Callable[[Failure], bytes]
    """The last bytes of a stream that has begun."""
    waiting: bytes = b": stopped at a breakpoint\n\n"
    """What a client that streams gets while its request is stopped; empty where there is nothing that it would skip."""


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> bytes:
    """`{"error": {message, type, param, code}}`."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def _openai_body(failure: Failure) -> bytes:
    return error_body(failure.message, failure.fault.api_type, failure.fault.error_type, failure.param)


def _openai_event(failure: Failure) -> bytes:
    return b"data: " + _openai_body(failure) + b"\n\n" + DONE


OPENAI = Shape(_openai_body, _openai_event)
"""OpenAI's clients raise on an error in mid-stream, and the stream ends as they expect."""


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def _anthropic_body(failure: Failure) -> bytes:
    kind = _ANTHROPIC_TYPES.get(failure.status, "api_error")
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": failure.message}})


def _anthropic_event(failure: Failure) -> bytes:
    return b"event: error\ndata: " + _anthropic_body(failure) + b"\n\n"


ANTHROPIC = Shape(_anthropic_body, _anthropic_event)


def _responses_event(failure: Failure) -> bytes:
    error = orjson.loads(_openai_body(failure))["error"]
    return (
        b"event: error\ndata: "
        + orjson.dumps({"type": "error", **{k: error[k] for k in ("message", "code", "param")}, "error": error})
        + b"\n\n"
    )


RESPONSES = Shape(_openai_body, _responses_event)
"""OpenAI's clients raise on the `error` in it; the rest is the event as it is documented."""


_GOOGLE_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "INVALID_ARGUMENT",
    413: "INVALID_ARGUMENT",
    422: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
    529: "UNAVAILABLE",
}
"""Google's own names (google.rpc.Code) by HTTP status."""


def _gemini_body(failure: Failure) -> bytes:
    status = _GOOGLE_STATUS.get(failure.status, "INTERNAL")
    return orjson.dumps({"error": {"code": failure.status, "message": failure.message, "status": status}})


def _gemini_event(failure: Failure) -> bytes:
    return b"data: " + _gemini_body(failure) + b"\n\n"


def _gemini_entry(failure: Failure) -> bytes:
    return b",\n" + _gemini_body(failure) + b"]"


GEMINI = Shape(_gemini_body, _gemini_event, waiting=b"\n")
"""Google's clients take a comment for data; an empty line they skip."""

GEMINI_ARRAY = Shape(_gemini_body, _gemini_entry, waiting=b"")
"""A stream that is one JSON array; it begins with its first entry."""
