"""The drive: arrivals at their time, whatever becomes of those before them; or flat out with so many under way.

An open loop: a request is sent when it is due, not when an answer makes room. A closed loop slows down with the server and
hides what its users would have waited (coordinated omission). How late the driver itself was is measured and told.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from replay.drive.arrivals import Arrival
from replay.drive.client import Driven, Target

GRACE_S = 1.0
"""After a stop, requests under way may end for so long; then they are given up and counted as unfinished."""


@dataclass(slots=True)
class Driving:
    """What was driven so far: requests in the order of their arrival, those not sent left out, and how long it took.

    `paced` says that each had its time; flat out none can be late.
    """

    driven: list[Driven] = field(default_factory=list)
    planned: int = 0
    seconds: float = 0.0
    stopped: bool = False
    paced: bool = True


def drive(
    arrivals: Sequence[Arrival], target: Target, *, speed: float | None, in_flight: int, told: Callable[[Driving], None] = lambda _: None
) -> Driving:
    """Drive arrivals in order at `speed` times their pace; with `speed` None flat out, with `in_flight` under way at once.

    Ctrl-C ends it with what was driven so far. `told` hears of each request that ended.
    """
    return asyncio.run(_Drive(arrivals, target, speed, in_flight, told).run())


class _Drive:
    """One drive on its way."""

    def __init__(
        self, arrivals: Sequence[Arrival], target: Target, speed: float | None, in_flight: int, told: Callable[[Driving], None]
    ) -> None:
        self._arrivals, self._target, self._speed, self._told = arrivals, target, speed, told
        self._room = asyncio.Semaphore(in_flight) if speed is None else None
        self._stop = asyncio.Event()
        self._driving = Driving(planned=len(arrivals), paced=speed is not None)
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = 0

    async def run(self) -> Driving:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # a thread that is not the main one gets no signals
            loop.add_signal_handler(signal.SIGINT, self._stop.set)
        async with self._target.session() as client:
            self._began = time.monotonic_ns()
            for arrival in self._arrivals:
                if not await self._turn(arrival):
                    break
                self._send(client, arrival)
            await self._end()
        self._driving.seconds = (time.monotonic_ns() - self._began) / 1e9
        return self._driving

    async def _turn(self, arrival: Arrival) -> bool:
        """Wait until an arrival is due, or there is room; whether it is still to be sent."""
        if self._room is not None:
            await self._or_stop(self._room.acquire())
        elif self._speed and (ahead_s := arrival.at_us / self._speed / 1e6 - self._now_us() / 1e6) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), ahead_s)
        return not self._stop.is_set()

    async def _or_stop(self, waited: object) -> None:
        tasks = [asyncio.ensure_future(waited), asyncio.ensure_future(self._stop.wait())]  # type: ignore[call-overload]  # a coroutine
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    def _send(self, client: object, arrival: Arrival) -> None:
        sent = self._now_us()
        late = max(0, sent - round(arrival.at_us / self._speed)) if self._speed else 0
        driven = Driven(arrival, sent, late)
        self._driving.driven.append(driven)
        task = asyncio.create_task(self._target.send(client, driven))  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._room is not None:
            self._room.release()
        self._told(self._driving)

    async def _end(self) -> None:
        """Wait for what is under way; after a stop only for a moment."""
        while self._tasks and not self._stop.is_set():
            await self._or_stop(asyncio.wait(set(self._tasks), return_when=asyncio.FIRST_COMPLETED))
        self._driving.stopped = self._stop.is_set()
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=GRACE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _now_us(self) -> int:
        return (time.monotonic_ns() - self._began) // 1000
