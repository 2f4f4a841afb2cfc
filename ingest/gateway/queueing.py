"""Whose turn it is at an upstream: a bound on what is at work, a bounded queue before it, and a rule that starves nobody.

Interactive requests go before batch, but every `OLDEST_EVERY`-th turn goes to whoever has waited longest: with m requests
before it in the queue, a batch request goes after at most `OLDEST_EVERY * (m + 1)` turns, however many come after it.
Batch may fill half of the queue only, so that a flood of it never refuses an interactive request.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from typing import Literal, get_args

from ingest.gateway import errors
from ingest.gateway.errors import Failure

Priority = Literal["interactive", "batch"]

PRIORITIES: tuple[Priority, ...] = get_args(Priority)
"""In the order in which they go."""

PRIORITY_HEADER = "x-tokentape-priority"

OLDEST_EVERY = 8
"""One turn in so many goes by age alone."""

RETRY_AFTER_S_MAX = 60
"""The longest time that a refused client is told to stay away: by then the queue is another one."""

_SMOOTHING = 0.1
"""Weight of the newest request in the average time that one is at work."""

Waiting = dict[int, asyncio.Future[None]]


class Turnstile:
    """Lets at most `concurrency_max` requests through at a time; at most `queue_max` wait. Use from one event loop."""

    def __init__(self, concurrency_max: int, queue_max: int, timeout_s: float) -> None:
        self.open = 0
        self._concurrency_max = concurrency_max
        self._queue_max = queue_max
        self._timeout_s = timeout_s
        self._waiting: dict[Priority, Waiting] = {priority: {} for priority in PRIORITIES}
        self._places = 0
        self._turns = 0
        self._held_s = 1.0  # how long a request is at work, on the average

    @property
    def queued(self) -> int:
        """How many wait."""
        return sum(len(waiting) for waiting in self._waiting.values())

    @property
    def free(self) -> bool:
        """Whether a request that comes now has its turn at once."""
        return self.open < self._concurrency_max and not self.queued

    def full(self, priority: Priority) -> bool:
        """Whether a request that comes now would be refused."""
        return not self.free and (self.queued >= self._queue_max or self._over_share(priority))

    @contextlib.asynccontextmanager
    async def turn(self, priority: Priority) -> AsyncIterator[int]:
        """One request's time at the upstream; gives the microseconds that it waited for it.

        Raises:
            Failure: the queue is full, or the turn did not come in time.
        """
        began_ns, waited_us = time.monotonic_ns(), 0
        if self.free:
            self.open += 1
        else:
            await self._wait(priority)
            waited_us = (time.monotonic_ns() - began_ns) // 1000
            began_ns = time.monotonic_ns()
        try:
            yield waited_us
        finally:
            self._held_s += _SMOOTHING * ((time.monotonic_ns() - began_ns) / 1e9 - self._held_s)
            self._leave()

    async def _wait(self, priority: Priority) -> None:
        if self.full(priority):
            raise self._refusal("Too many requests wait for this model.")
        self._places += 1
        place, waiting = self._places, self._waiting[priority]
        turn = waiting[place] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._timeout_s):
                await turn
        except BaseException as error:
            waiting.pop(place, None)
            if turn.done() and not turn.cancelled():  # the turn came while the wait was cut short
                self._leave()
            if isinstance(error, TimeoutError):
                raise self._refusal(f"The request waited {self._timeout_s:g} s for its turn.") from error
            raise

    def _leave(self) -> None:
        self.open -= 1
        while self.open < self._concurrency_max and (turn := self._next()):
            self.open += 1
            turn.set_result(None)

    def _next(self) -> asyncio.Future[None] | None:
        """Take whose turn it is out of the queue; those that gave up are passed over."""
        while queues := [waiting for waiting in self._waiting.values() if waiting]:
            by_age = (self._turns + 1) % OLDEST_EVERY == 0
            waiting = min(queues, key=_oldest) if by_age else queues[0]
            turn = waiting.pop(_oldest(waiting))
            if not turn.done():
                self._turns += 1
                return turn
        return None

    def _over_share(self, priority: Priority) -> bool:
        return priority == "batch" and len(self._waiting["batch"]) >= math.ceil(self._queue_max / 2)

    def _refusal(self, message: str) -> Failure:
        ahead_s = (self.queued + 1) * self._held_s / self._concurrency_max
        return Failure(errors.OVERLOADED, message, retry_after_s=min(max(1.0, ahead_s), RETRY_AFTER_S_MAX))


def _oldest(waiting: Waiting) -> int:
    return next(iter(waiting))


def priority_of(value: str | None) -> Priority:
    """The priority that a header's value names; none is interactive.

    Raises:
        Failure: it names none.
    """
    named = (value or "interactive").strip().lower()
    for priority in PRIORITIES:
        if priority == named:
            return priority
    message = f"{PRIORITY_HEADER} must be one of {', '.join(PRIORITIES)}."
    raise Failure(errors.INVALID_REQUEST, message, param=PRIORITY_HEADER)
