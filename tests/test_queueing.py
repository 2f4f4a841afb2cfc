"""Whose turn it is: the bound, interactive before batch, and nobody forever last."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from ingest.gateway.errors import Failure
from ingest.gateway.queueing import OLDEST_EVERY, Priority, Turnstile, priority_of


class Line:
    """Requests before a turnstile; `went` names those that had their turn, in order. Each goes on when `leave` is called."""

    def __init__(self, turnstile: Turnstile) -> None:
        self.turnstile = turnstile
        self.went: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._go: dict[str, asyncio.Event] = {}

    async def come(self, name: str, priority: Priority = "interactive") -> None:
        """One request comes."""
        self._go[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._request(name, priority))
        await settle()

    async def _request(self, name: str, priority: Priority) -> None:
        async with self.turnstile.turn(priority):
            self.went.append(name)
            await self._go[name].wait()

    async def leave(self, name: str) -> None:
        """One request is done."""
        self._go[name].set()
        await settle()


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(6):
        await asyncio.sleep(0)


def run(story: Callable[[Line], Awaitable[None]], *, concurrency_max: int = 1, queue_max: int = 100, timeout_s: float = 60.0) -> Line:
    """A story in a loop of its own; who is left at its end is sent home."""

    async def told() -> Line:
        line = Line(Turnstile(concurrency_max, queue_max, timeout_s))
        await story(line)
        for task in line.tasks.values():
            task.cancel()
        await asyncio.gather(*line.tasks.values(), return_exceptions=True)
        return line

    return asyncio.run(told())


def test_interactive_goes_before_batch() -> None:
    """A batch request waits until no interactive one does."""

    async def story(line: Line) -> None:
        await line.come("first")
        await line.come("batch", "batch")
        await line.come("late")
        await line.leave("first")
        await line.leave("late")

    assert run(story).went == ["first", "late", "batch"]


def test_nobody_starves() -> None:
    """A batch request has its turn within the stated number of turns, however many interactive ones keep coming."""

    async def story(line: Line) -> None:
        await line.come("i0")
        await line.come("batch", "batch")
        for number in range(1, 3 * OLDEST_EVERY):
            await line.come(f"i{number}")
            await line.leave(line.went[-1])

    went = run(story).went

    assert went.index("batch") <= OLDEST_EVERY


def test_the_queue_is_bounded_and_says_when_to_come_again() -> None:
    """A request beyond the bound is refused with 503 and Retry-After, and takes no place."""

    async def story(line: Line) -> None:
        for name in ("at work", "a", "b"):
            await line.come(name)
        with pytest.raises(Failure) as refused:
            async with line.turnstile.turn("interactive"):
                raise AssertionError("had a turn")

        assert refused.value.status == 503
        assert int(dict(refused.value.headers)[b"retry-after"]) >= 1
        assert line.turnstile.queued == 2

    run(story, queue_max=2)


def test_batch_leaves_room_for_interactive() -> None:
    """Batch fills half of the queue at most."""

    async def story(line: Line) -> None:
        await line.come("at work")
        for name in ("b1", "b2", "b3"):
            await line.come(name, "batch")
        await line.come("i1")

        assert isinstance(line.tasks["b3"].exception(), Failure)
        assert line.turnstile.queued == 3

    run(story, queue_max=4)


def test_who_gives_up_leaves_the_queue() -> None:
    """A request that is cut short while it waits, or just as its turn comes, blocks no place."""

    async def story(line: Line) -> None:
        for name in ("at work", "gone", "lucky", "last"):
            await line.come(name)
        line.tasks["gone"].cancel()
        await settle()
        assert line.turnstile.queued == 2
        line._go["at work"].set()
        await asyncio.sleep(0)
        line.tasks["lucky"].cancel()
        await settle()
        await line.leave("lucky")
        await line.leave("last")

        assert (line.turnstile.open, line.turnstile.queued) == (0, 0)

    assert run(story).went[-1] == "last"


def test_a_wait_ends() -> None:
    """After the longest wait a request is refused as one beyond the bound is."""

    async def story(line: Line) -> None:
        await line.come("at work")
        with pytest.raises(Failure, match=r"waited 0\.01 s"):
            async with line.turnstile.turn("interactive"):
                raise AssertionError("had a turn")

        assert line.turnstile.queued == 0

    run(story, timeout_s=0.01)


def test_priorities_by_name() -> None:
    """A header names a priority, whatever its case; another word is refused with the valid ones."""
    assert [priority_of(value) for value in (None, "", " Batch ", "interactive")] == ["interactive", "interactive", "batch", "interactive"]
    with pytest.raises(Failure, match="must be one of interactive, batch"):
        priority_of("urgent")
