"""One engine for many replays at once: what they ask while it is at work goes as one batch when it is free again.

An engine is far faster at a batch than at one sequence after the other, and a replay only knows its own session. So each
replay asks in a thread of its own and waits; the batch is whatever waits, as in the group commit of a log.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from replay.engines.base import Engine, Forced, Generated, Refused, Request, Scored
from schemas import events as e

T = TypeVar("T")


class _Call(NamedTuple):
    """What a replay waits for: `ask` names the engine's method for several."""

    ask: str
    what: Any
    answer: Future[Any]


class Gathered:
    """An `Engine` that many threads may use. `close` ends its own thread and leaves the engine to its owner.

    Whatever the engine raises for a batch is raised to each that waits for a part of it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._asking = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=f"gather {engine.name}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The engine's."""
        return self._engine.name

    @property
    def waiting(self) -> int:
        """How many sequences and requests wait for the engine to be free."""
        return self._calls.qsize()

    def fingerprint(self, recorded: e.EnvironmentCaptured | None = None) -> e.EnvironmentCaptured | None:
        """See `Engine.fingerprint`."""
        return self._between(lambda: self._engine.fingerprint(recorded))

    def render(self, request: Request) -> tuple[int, ...] | Refused:
        """See `Engine.render`."""
        return self._between(lambda: self._engine.render(request))

    def generate(self, request: Request) -> Generated | Refused:
        """See `Engine.generate`."""
        return self.generate_all([request])[0]

    def force(self, request: Request, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> Scored | Refused:
        """See `Engine.force`."""
        return self.force_all([Forced(request, prompt_token_ids, token_ids)])[0]

    def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
        """See `Engine.generate_all`."""
        return self._gather("generate_all", requests)

    def force_all(self, several: Sequence[Forced]) -> list[Scored | Refused]:
        """See `Engine.force_all`."""
        return self._gather("force_all", several)

    def close(self) -> None:
        """End the thread that asks; may be called twice. Nobody may wait any more."""
        if not self._closed:
            self._closed = True
            self._calls.put(None)
            self._thread.join()

    def _gather(self, ask: str, several: Sequence[Any]) -> list[Any]:
        calls = [_Call(ask, what, Future()) for what in several]
        for call in calls:
            self._calls.put(call)
        return [call.answer.result() for call in calls]

    def _between(self, ask: Callable[[], T]) -> T:
        """Ask for what has no batches, between two of them."""
        with self._asking:
            return ask()

    def _serve(self) -> None:
        while True:
            calls = [self._calls.get()]
            while not self._calls.empty():
                calls.append(self._calls.get())
            for ask in ("force_all", "generate_all"):
                self._answer(ask, [call for call in calls if call is not None and call.ask == ask])
            if calls[-1] is None:
                return

    def _answer(self, ask: str, calls: list[_Call]) -> None:
        if not calls:
            return
        try:
            answers = self._between(lambda: getattr(self._engine, ask)([call.what for call in calls]))
        except BaseException as error:
            for call in calls:
                call.answer.set_exception(error)
        else:
            for call, answer in zip(calls, answers, strict=True):
                call.answer.set_result(answer)
