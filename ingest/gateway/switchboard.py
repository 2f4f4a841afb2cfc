"""A worker's line to the others: its facts out in order, commands in, answers both ways, all through the control log."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from ingest.debug import commands, workers
from ingest.gateway.orphans import Orphans
from ingest.gateway.tape import Recording
from schemas import clock
from schemas.errors import TokentapeError
from store.control import ControlLog, ControlRecord, ControlView, Value

log = structlog.get_logger(__name__)

CLOSE_WAIT_S = 5.0
"""How long the end of the gateway waits for what is still to be written."""

Handler = Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""Carries out a command for a generation; what it returns or raises is the answer."""
Holds = Callable[[str], bool]
"""Whether this worker is the one to answer for a generation."""


class Switchboard:
    """Use from one event loop, between `start` and `close`."""

    def __init__(self, control: ControlLog, shared: ControlView, recorder: Recording, answer_timeout_s: float) -> None:
        self.worker = workers.Worker()
        self._control = control
        self._shared = shared
        self._answer_timeout_s = answer_timeout_s
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="control-writer")  # one thread: facts are written in order
        self._orphans = Orphans(self.worker.worker_id, control, shared, recorder)
        self._questions: dict[str, asyncio.Future[Mapping[str, Any]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = self._ended = False

    async def start(self, handle: Handler, holds: Holds) -> None:
        """Say that this worker lives, see to what dead ones left behind, and follow."""
        self._loop = asyncio.get_running_loop()
        self._handle, self._holds = handle, holds
        self._open = True
        await asyncio.wait([self.write(workers.KIND, self.worker.worker_id, self.worker.document())], timeout=CLOSE_WAIT_S)
        self._shared.listen(self._heard)
        self._beating = asyncio.create_task(self._beat())

    async def close(self) -> None:
        """Write what is to be written, then take the worker's own fact away."""
        self._open = False
        self._beating.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._beating, *self._tasks, return_exceptions=True)
        await asyncio.wait([self.write(workers.KIND, self.worker.worker_id, None)], timeout=CLOSE_WAIT_S)
        self._ended = True
        self._writer.shutdown(wait=True, cancel_futures=True)

    def write(self, kind: str, key: str, value: Value | None) -> asyncio.Future[bool]:
        """Write a fact after those before it; whether it is durable. Never raises: a log that is away is only noted."""
        loop = asyncio.get_running_loop()
        if self._ended:
            nothing: asyncio.Future[bool] = loop.create_future()
            nothing.set_result(False)
            return nothing
        return loop.run_in_executor(self._writer, self._append, kind, key, value)

    async def caught_up(self, kind: str, key: str, value: Value | None) -> None:
        """Return when this worker's copy says so, or after a moment."""
        deadline = time.monotonic() + CLOSE_WAIT_S
        while self._shared.get(kind, key) != value and time.monotonic() < deadline:  # noqa: ASYNC110  another thread reads it
            await asyncio.sleep(0.01)

    def stopped(self) -> dict[str, Value]:
        """The facts of stopped requests, as far as this worker has read."""
        return self._shared.latest(commands.STOPPED)

    async def ask(self, generation: str, verb: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Have the worker that holds a request carry out a command.

        Raises:
            TokentapeError: what that worker says, or `Unavailable` where none answers in time.
        """
        question = uuid.uuid4().hex
        answered = self._questions[question] = asyncio.get_running_loop().create_future()
        try:
            await self.write(commands.COMMAND, question, {"generation": generation, "verb": verb, "at": clock.now_s(), **arguments})
            async with asyncio.timeout(self._answer_timeout_s):
                answer = await answered
            self.write(commands.ANSWER, question, None)
            return commands.result_of(answer)
        except TimeoutError:
            self.write(commands.COMMAND, question, None)
            raise commands.nobody_answered(generation, self._answer_timeout_s) from None
        finally:
            del self._questions[question]

    def _append(self, kind: str, key: str, value: Value | None) -> bool:
        try:
            self._control.append(kind, key, value)
        except TokentapeError as error:
            log.warning("not written to the control log", kind=kind, error=str(error))
            return False
        return True

    # Following: the view's thread hears, the loop acts

    def _heard(self, record: ControlRecord) -> None:
        if record.kind in (commands.COMMAND, commands.ANSWER) and record.value is not None and self._open:
            self._loop.call_soon_threadsafe(self._take, record)

    def _take(self, record: ControlRecord) -> None:
        value = record.value or {}
        if record.kind == commands.ANSWER:
            question = self._questions.get(record.key)
            if question is not None and not question.done():
                question.set_result(value)
        elif self._open and self._holds(str(value.get("generation"))):
            task = asyncio.create_task(self._answer(record.key, value))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, question: str, command: Mapping[str, Any]) -> None:
        try:
            answer: dict[str, Any] = {"result": await self._handle(str(command["generation"]), command)}
        except TokentapeError as error:
            answer = {"error": commands.error_document(error)}
        except Exception as error:
            log.exception("command failed", verb=command.get("verb"))
            answer = {"error": commands.error_document(TokentapeError(f"unexpected {type(error).__name__}", operation="command"))}
        self.write(commands.ANSWER, question, {**answer, "at": clock.now_s()})
        self.write(commands.COMMAND, question, None)

    # What comes again and again

    async def _beat(self) -> None:
        """Every few seconds: say that this worker lives, and sweep up after those that do not."""
        while True:
            try:
                await self._orphans.settle(self.write)
                await self._sweep()
            except Exception:
                log.exception("sweeping the control log failed")
            await asyncio.sleep(workers.HEARTBEAT_S)
            await self.write(workers.KIND, self.worker.worker_id, self.worker.document())

    async def _sweep(self) -> None:
        """Take away what was left behind, and decided requests that nobody asks about any more."""
        now = clock.now_s()
        for kind in (commands.COMMAND, commands.ANSWER):
            for key, value in self._shared.latest(kind).items():
                if now - float(value.get("at", 0)) > commands.LEFT_OVER_S:
                    await self.write(kind, key, None)
        for key, value in self._shared.latest(commands.STOPPED).items():
            outcome = value.get("outcome")
            if outcome and now - float(outcome.get("at", 0)) > commands.SETTLED_S:
                await self.write(commands.STOPPED, key, None)
