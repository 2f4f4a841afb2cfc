"""One attempt at a request of a batch: the way of an interactive request, without a connection."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from ingest.gateway import errors
from ingest.gateway.endpoints.base import Endpoint
from ingest.gateway.errors import Failure, Fault
from ingest.gateway.exchange import Exchange, Headers, Message
from ingest.gateway.generation import Generation
from ingest.gateway.parts import Parts
from ingest.gateway.queueing import PRIORITY_HEADER
from ingest.gateway.sessions import GENERATION_HEADER, SESSION_HEADER
from schemas.batches import Batch, WorkItem
from schemas.requests import dump, load

AWAY: tuple[Fault, ...] = (
    errors.UNREACHABLE,
    errors.OVERLOADED,
    errors.KEYS_AWAY,
    errors.NOT_RECORDED,
    errors.REQUESTS_LIMITED,
    errors.TOKENS_LIMITED,
)
"""Failures that say nothing about the request: it waits for as long as it takes."""

AWAY_STATUSES = frozenset((429, 502, 503))
"""The same in an upstream's own words."""

FINAL_BELOW = 500
"""An answer below this is one, however often it is asked for; 408 and 409 are not."""


@dataclass
class Answer:
    """What came of an attempt."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    failure: Failure | None = None

    @property
    def interrupted(self) -> bool:
        """Whether this worker stopped in the middle."""
        return self.status == 0 or (self.failure is not None and self.failure.fault is errors.SHUTDOWN)

    @property
    def away(self) -> bool:
        """Whether the failure says nothing about the request."""
        if self.failure is not None:
            return self.failure.fault in AWAY or self.failure.status in (502, 503)
        return self.status in AWAY_STATUSES and self.headers.get(b"x-should-retry") != b"false"

    @property
    def final(self) -> bool:
        """Whether asking again would change nothing."""
        return self.status < FINAL_BELOW and self.status not in (408, 409) and not self.away

    @property
    def wait_s(self) -> float:
        """How long the answer asks to be left alone."""
        if self.failure is not None:
            return self.failure.retry_after_s or 0.0
        try:
            return float(self.headers.get(b"retry-after", b"0"))
        except ValueError:
            return 0.0

    def line(self, item: WorkItem) -> dict[str, Any]:
        """The result as a line of the output file."""
        body = b"".join(self.pieces)
        try:
            shown = load(body)
        except ValueError:
            shown = {"error": {"message": body[:4096].decode("utf-8", "replace"), "type": "upstream_error", "param": None, "code": None}}
        generation = self.headers.get(GENERATION_HEADER.encode(), b"").decode("latin-1")
        response = {"status_code": self.status, "request_id": generation, "body": shown}
        return result(item, response, None)


def worn_out(attempts: int) -> Answer:
    """What a request gets whose last attempt ended with its worker."""
    message = f"The request was begun {attempts} times and never came to an answer: its worker died or failed each time."
    return Answer(status=500, pieces=[errors.error_body(message, "server_error", "attempts_exhausted")])


def result(item: WorkItem, response: dict[str, Any] | None, error: dict[str, str] | None) -> dict[str, Any]:
    """A line of an output or error file."""
    return {"id": f"batch_req_{item.session.replace('-', '')}", "custom_id": item.custom_id, "response": response, "error": error}


class Inside(Exchange):
    """An exchange whose client is the batch: nobody hangs up, and the answer is kept."""

    def __init__(self, batch: Batch, item: WorkItem, body_bytes_max: int) -> None:
        self.outcome = Answer()
        self._body: bytes | None = dump(item.body)
        scope = {"type": "http", "method": "POST", "path": item.url, "query_string": b"", "client": None, "headers": _headers(batch, item)}
        super().__init__(scope, self._give, self._take, max(body_bytes_max, len(self._body)))

    async def _give(self) -> Message:
        if self._body is None:
            await asyncio.Event().wait()  # until the watcher is let go
        body, self._body = self._body, None
        return {"type": "http.request", "body": body}

    async def _take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.outcome.status, self.outcome.headers = message["status"], dict(message["headers"])
        else:
            self.outcome.pieces.append(message.get("body", b""))

    async def fail(self, failure: Failure, headers: Headers) -> None:
        """Keep the failure, and its words for a client."""
        self.outcome.failure = failure
        await super().fail(failure, headers)


def _headers(batch: Batch, item: WorkItem) -> Headers:
    tags = ",".join([batch.batch_id, *_own_tags(batch.metadata)])
    named = {
        "content-type": "application/json",
        PRIORITY_HEADER: "batch",
        SESSION_HEADER: item.session,
        "x-tokentape-tags": tags,
        "x-tokentape-user": batch.owner.name,
        "x-request-id": item.custom_id,
    }
    for name in ("workflow", "purpose"):
        if name in batch.metadata:
            named[f"x-tokentape-{name}"] = batch.metadata[name]
    return [(name.encode(), value.encode("utf-8", "replace")) for name, value in named.items()]


def _own_tags(metadata: dict[str, str]) -> list[str]:
    return [tag.strip() for tag in metadata.get("tags", "").split(",") if tag.strip()]


async def attempt(parts: Parts, active: set[Exchange], endpoint: Endpoint, batch: Batch, item: WorkItem) -> Answer:
    """Ask once. Run it in a task of its own: what ends the exchange early cancels that task."""
    exchange = Inside(batch, item, parts.settings.gateway.body_bytes_max)
    active.add(exchange)
    try:
        await Generation(parts, exchange, endpoint, parts.keyring.holder(batch.owner.key_id)).serve()
    finally:
        active.discard(exchange)
    return exchange.outcome
