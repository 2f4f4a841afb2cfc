"""Error answers of everything under `/api/v1`: problem documents (RFC 9457)."""

from __future__ import annotations

from typing import Any

from schemas.errors import ConflictError, QueryError, TokentapeError, Unavailable, UnknownEvent, UnknownName, UnknownSession, UsageError

PROBLEM_JSON = "application/problem+json"

TITLES = {
    400: "Not valid",
    401: "Not authenticated",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    406: "Not that format",
    409: "Conflict",
    413: "Too large",
    415: "Not JSON",
    422: "Query refused",
    500: "Unexpected error",
    503: "Not available",
}

_STATUSES: tuple[tuple[type[TokentapeError], int], ...] = (
    (UnknownName, 404),
    (UnknownSession, 404),
    (UnknownEvent, 404),
    (QueryError, 422),
    (UsageError, 400),
    (ConflictError, 409),
    (Unavailable, 503),
)


class Problem(Exception):
    """An error answer that is no `TokentapeError`."""

    def __init__(self, status: int, detail: str, hint: str = "", allow: str = "") -> None:
        """`allow` are the methods that would do, for a 405."""
        super().__init__(detail)
        self.status, self.detail, self.hint, self.allow = status, detail, hint, allow


def status_of(error: TokentapeError) -> int:
    """The HTTP status of an error."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)


def problem_document(status: int, detail: str, hint: str, path: str) -> dict[str, Any]:
    """The document of a problem at a path; a `hint` says what to do now."""
    document = {"type": "about:blank", "title": TITLES.get(status, "Error"), "status": status, "detail": detail, "instance": path}
    return document | ({"hint": hint} if hint else {})
