"""An installation asked over its REST API, as anybody else asks it: with the roles of a key, and each look on the tape."""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any

import pyarrow as pa

from schemas.codec import decode
from schemas.errors import ConflictError, QueryError, TokentapeError, Unavailable, UnknownSession, UsageError
from schemas.registry import SchemaRegistry
from store.rows import StoredEvent

TIMEOUT_S = 120.0
"""A session of a million tokens takes some ten seconds to be told."""
POLL_S = 0.2
"""Between two looks at a replay that runs."""
_ERRORS: dict[int, type[TokentapeError]] = {404: UnknownSession, 409: ConflictError, 422: QueryError}


class Service:
    """See `tokentape.connection.Place`."""

    def __init__(self, url: str, token: str | None) -> None:
        """Raises `TokentapeError` where nobody answers, or where the token opens nothing."""
        parts = urllib.parse.urlsplit(url)
        path = parts.path.rstrip("/").removesuffix("/api/v1")
        self.name = urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, "", ""))
        self._token = token
        self._registry = SchemaRegistry()
        # No redirect is followed and no proxy asked: the token is for this address.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay())
        self._ask("GET", "me")

    def sessions(self, q: str, limit: int) -> list[dict[str, Any]]:
        """See `Place`."""
        found: list[dict[str, Any]] = []
        while len(found) < limit:
            asked = urllib.parse.urlencode({"q": q, "limit": min(500, limit - len(found)), "offset": len(found)})
            page = self._ask("GET", f"debug-sessions?{asked}")
            found += page["sessions"]
            if not page["sessions"] or len(found) >= page["total"]:
                break
        return found

    def sql(self, statement: str, tenant: str | None) -> tuple[pa.Table, dict[str, Any]]:
        """See `Place`."""
        asked = {"query": statement, "format": "arrow", **({"tenant": tenant} if tenant else {})}
        body, headers = self._send("POST", "sql", asked)
        return pa.ipc.open_stream(body).read_all(), json.loads(headers["x-tokentape-completeness"])

    def find(self, name: str) -> str:
        """See `Place`."""
        digits = name.strip().lower().replace("-", "")
        if len(digits) != 32:
            found = [row["session_id"] for row in self.sessions(name.strip().lower(), 500)]
            begun = [each for each in found if each.replace("-", "").startswith(digits)]
            if len(begun) > 1:
                raise UsageError(f"more than one session begins with {name}", operation="find session", hint=", ".join(begun[:5]))
            digits = begun[0] if begun else digits
        try:
            whole = str(uuid.UUID(digits))
        except ValueError:
            hint = "`.sessions()` lists those that this key may see"
            raise UnknownSession(f"no session {name}", operation="find session", hint=hint) from None
        self._ask("GET", f"debug-sessions/{whole}/events?limit=1")
        return whole

    def events(self, session_id: str) -> list[StoredEvent]:
        """See `Place`; where an event stood is told, when the log took it is not."""
        found = []
        for line in self._ask("GET", f"debug-sessions/{session_id}/export")["events"]:
            event = decode(base64.b64decode(line["avro"]), self._registry)
            found.append(StoredEvent(event, "", line["partition"], line["offset"], event.recorded_at))
        return found

    def compare(self, session_id: str, engine: str | None, model: str | None, strict: bool) -> dict[str, Any]:
        """See `Place`: a job there, which is waited for, and cancelled where the wait is interrupted."""
        asked = {"mode": "compare", "compare_with": engine, "environment": {"model": model}, "strict": strict}
        job = self._ask("POST", f"debug-sessions/{session_id}/replay", asked)
        try:
            while job["ended_at"] is None:
                time.sleep(POLL_S)
                job = self._ask("GET", f"jobs/{job['job']}")
        except KeyboardInterrupt:
            self._ask("DELETE", f"jobs/{job['job']}")
            raise
        if job["state"] != "done":
            problem = job["problem"] or {"status": 409, "detail": f"the replay was {job['state']}"}
            raise self._error(problem["status"], problem, "compare")
        result: dict[str, Any] = job["result"]
        return result

    def close(self) -> None:
        """See `Place`: there is nothing to let go of."""

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return json.loads(self._send(method, path, body)[0])

    def _send(self, method: str, path: str, body: Any = None) -> tuple[bytes, Any]:
        request = urllib.request.Request(f"{self.name}/api/v1/{path}", method=method)
        if self._token is not None:
            request.add_header("Authorization", f"Bearer {self._token}")
        if body is not None:
            request.add_header("Content-Type", "application/json")
            request.data = json.dumps(body).encode()
        try:
            with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                return answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                raise self._error(error.code, _problem(error.read()), path.partition("?")[0]) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            hint = "`tokentape up` serves it, beside the gateway; `tokentape status` says where"
            raise Unavailable(f"no answer: {reason}", operation="connect", place=self.name, hint=hint) from error

    def _error(self, status: int, problem: dict[str, Any], operation: str) -> TokentapeError:
        kind = _ERRORS.get(status, Unavailable if status >= 500 else UsageError)
        hint = problem.get("hint", "" if problem else "the address of the API, which is not the gateway's")
        return kind(problem.get("detail", f"HTTP status {status}"), operation=operation, place=self.name, hint=hint)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """A redirect is an error."""


def _problem(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
