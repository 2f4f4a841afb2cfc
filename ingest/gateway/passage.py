"""One request's way from its client to an upstream that answers: who asks, where it goes, when its turn is, where it goes next.

A request is tried again only while its client has seen no byte and the tape no token: after a connection that failed or ended,
and after 502, 503 and 504. Other errors are answers: a request that makes one upstream fail would make the next one fail too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from ingest.gateway import errors
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Exchange
from ingest.gateway.keys import Caller
from ingest.gateway.parts import Parts
from ingest.gateway.queueing import PRIORITY_HEADER, Priority, priority_of
from ingest.gateway.routes import HARDWARE_HEADER, Lane, wishes
from ingest.gateway.tape import Tape
from ingest.gateway.upstream import Upstream

log = structlog.get_logger(__name__)

ELSEWHERE = frozenset((502, 503, 504))
"""Answers that say that the upstream is not there, and nothing about the request."""


class Passage:
    """The way of one request. `ready`, then `turn` around each attempt, then `elsewhere` after one that failed."""

    def __init__(self, parts: Parts, exchange: Exchange, caller: Caller) -> None:
        self.caller = caller
        self.authorization = caller.authorization
        self.priority: Priority | None = None  # None until it is known to be a valid one
        self.lane: Lane | None = None
        self.attempt = 1
        self._repeats = 0
        self._parts = parts
        self._routes = parts.routes
        self._admitted = False
        self._exchange = exchange
        self._hardware = wishes(exchange.header(HARDWARE_HEADER))
        self._model: str | None = None
        self._tried: list[Lane] = []

    @property
    def upstream(self) -> Upstream:
        """The upstream that was chosen; before that the first, which stands for all where nothing depends on it."""
        return (self.lane or self._routes.lanes[0]).upstream

    @property
    def upstream_name(self) -> str | None:
        """The chosen upstream as the tape names it; None where none was chosen among several."""
        return self.upstream.name if self.lane or not self._routes.several else None

    @property
    def authorization_upstream(self) -> str | None:
        """The Authorization header for the chosen upstream."""
        return self.upstream.authorization(self.authorization)

    async def ready(self, model: str | None) -> str:
        """Choose an upstream for this model and return its kind.

        Raises:
            Failure: the caller may not ask for it or not so much, the request names no valid priority, nobody serves the model, or
                nobody who does answers.
        """
        self._model = model
        self.priority = priority_of(self._exchange.header(PRIORITY_HEADER))
        await self._admit(model)
        self.lane = await self._routes.find(model, self._hardware, self.priority, self.allowed)
        return await self._kind()

    def allowed(self, model: str) -> bool:
        """Whether the caller may ask for a model."""
        return self.caller.key is None or self.caller.key.allows(model)

    async def _admit(self, model: str | None) -> None:
        key = self.caller.key
        if key is None:
            return
        if not self.allowed(model or ""):
            may = f"It may ask for: {', '.join(key.models)}." if key.models else "It may ask for none."
            raise Failure(errors.FORBIDDEN, f"This key may not ask for the model {str(model)[:200]!r}. {may}", param="model")
        if not self._admitted:
            await self._parts.quotas.admit(key)
            self._parts.keyring.enter(key, self._exchange)
            self._admitted = True

    def close(self, tokens: int) -> None:
        """The request is over, and took this many tokens."""
        if self.caller.key is not None and self._admitted:
            self._parts.keyring.leave(self.caller.key, self._exchange)
            self._parts.quotas.spend(self.caller.key, tokens)

    @asynccontextmanager
    async def turn(self, tape: Tape) -> AsyncIterator[None]:
        """The request's time at the chosen upstream.

        Raises:
            Failure: too many wait before it, or it waited too long.
        """
        assert self.lane is not None
        assert self.priority is not None
        async with self.lane.turnstile.turn(self.priority) as queued_us:
            tape.queued_us += queued_us
            yield

    def answered(self, status: int) -> None:
        """The upstream answered the request with this status."""
        if self.lane:
            self.lane.answered(status)
        if status in ELSEWHERE:
            self.upstream.doubt()

    def spare(self, status: int) -> bool:
        """Whether an answer of this status can be left alone, since another upstream can be asked."""
        return status in ELSEWHERE and self._routes.can_serve(self._model, self._excluded)

    async def elsewhere(self, failure: Failure, tape: Tape) -> str:
        """After an attempt that failed: choose another upstream and return its kind.

        Raises:
            Failure: the same, where the client or the tape holds something of the answer or there is no other upstream.
        """
        retry = failure.fault in (errors.UNREACHABLE, errors.DISCONNECTED) or failure.status in ELSEWHERE
        ours = failure.fault.origin != "upstream" or failure.fault is errors.TIMEOUT
        if ours or not retry or self._exchange.started or tape.started:
            raise failure
        self._leave(failure, again=True)
        kind = await self._kind()
        tape.moved(self.upstream.name)
        return kind

    async def _kind(self) -> str:
        """The kind of the chosen upstream, or of the next one that answers."""
        while True:
            try:
                return await self.upstream.ready(self.authorization)
            except Failure as failure:
                self._leave(failure)

    def _leave(self, failure: Failure, *, again: bool = False) -> None:
        """Turn to another upstream, or `again` to the same where there is no other."""
        assert self.lane is not None
        if failure.fault is errors.UNREACHABLE:
            self.lane.unreachable(failure.detail or failure.message)
            self.upstream.lost()
        elif failure.fault is errors.DISCONNECTED:
            self.lane.answered(failure.status)
        other = self._other() or (self._same() if again else None)
        if other is None:
            raise failure
        log.warning("request goes elsewhere", of=self.lane.entry.name, to=other.entry.name, why=failure.detail or failure.message)
        self._tried.append(self.lane)
        self.lane = other
        self.attempt += 1

    def _other(self) -> Lane | None:
        return self._routes.choose(self._model, self._hardware, self.priority or "interactive", self._excluded)

    def _same(self) -> Lane | None:
        """The only upstream once more: a connection may have been closed just when the request went into it."""
        self._repeats += 1
        alone = not self._routes.several and self._repeats <= self._parts.settings.gateway.retries
        return self.lane if alone else None

    @property
    def _excluded(self) -> list[Lane]:
        """The upstreams that are not asked any more: those that were, or all once enough were."""
        asked = [*self._tried, self.lane] if self.lane else []
        return asked if len(asked) < self._routes.attempts_max else self._routes.lanes
