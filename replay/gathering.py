"""One engine for many replays at once: it works on what all of them ask, as much of it at a time as it can.

An engine is far faster at a batch than at one sequence after the other, and a replay only knows its own session. So the
engine has a thread of its own, which everybody asks. An engine that takes sequences in while it is at work (`Continuous`) gets each
as soon as it is asked for, and has a full batch all the time; any other gets what waits when it is free again, as in the
group commit of a log.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple, TypeVar

from replay.engines.base import Continuous, Engine, Forced, Generated, Refused, Rendering, Request, Scored, SomeFailed, same
from schemas import events as e

T = TypeVar("T")


class _Call(NamedTuple):
    """What a replay waits for: `ask` names the engine's method for several, or is "alone" where `what` is to be called."""

    ask: str
    what: Any
    answer: Future[Any]


class Gathered:
    """An `Engine` that many threads may use. `close` ends its own thread and leaves the engine to its owner.

    Whatever the engine raises is raised to each that waits for it; what failed of several, each for itself, to that one alone.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._continuous = engine if isinstance(engine, Continuous) else None
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._waiting: deque[_Call] = deque()
        self._begun: dict[Hashable, _Call] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=f"gather {engine.name}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The engine's."""
        return self._engine.name

    @property
    def waiting(self) -> int:
        """How many sequences and requests wait for the engine to take them in."""
        return self._calls.qsize() + len(self._waiting)

    def fingerprint(self, recorded: e.EnvironmentCaptured | None = None) -> e.EnvironmentCaptured | None:
        """See `Engine.fingerprint`."""
        return self._alone(lambda: self._engine.fingerprint(recorded))

    def render(self, request: Request) -> tuple[int, ...] | Refused:
        """See `Engine.render`."""
        answer: tuple[int, ...] | Refused = self._gather("render_all", [request])[0]()
        return answer

    def generate(self, request: Request) -> Generated | Refused:
        """See `Engine.generate`."""
        return self.generate_all([request])[0]

    def force(self, request: Request, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> Scored | Refused:
        """See `Engine.force`."""
        return self.force_all([Forced(request, prompt_token_ids, token_ids)])[0]

    def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
        """See `Engine.generate_all`."""
        return [read() for read in self._gather("generate_all", requests)]

    def force_all(self, several: Sequence[Forced]) -> list[Scored | Refused]:
        """See `Engine.force_all`."""
        return [read() for read in self._gather("force_all", several)]

    def asking(self, what: Forced | Rendering) -> Future[Callable[[], Any]]:
        """As `force` or `render`, without waiting: what reads the answer out, once it is there."""
        if isinstance(what, Forced):
            call = _Call("force_all", what, Future())
        else:
            call = _Call("render_all", what.request, Future())
        self._calls.put(call)
        return call.answer

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

    def _alone(self, ask: Callable[[], T]) -> T:
        """Ask for what goes with nothing else, when the engine is free."""
        answer: T = self._gather("alone", [ask])[0]()
        return answer

    def _serve(self) -> None:
        while self._take():
            ask = self._waiting[0].ask if self._waiting else "force_all"
            if any(call.ask == "render_all" for call in self._waiting):  # which goes beside everything
                self._answer(self._taken("render_all"))
            elif ask == "force_all" and self._continuous:
                self._work(self._continuous)
            elif self._begun:  # what is next wants the engine for itself
                self._step()
            else:
                self._answer(self._taken(ask))

    def _taken(self, ask: str) -> list[_Call]:
        """All that wait for this, and wait no longer."""
        calls = [call for call in self._waiting if call.ask == ask]
        self._waiting = deque(call for call in self._waiting if call.ask != ask)
        return calls

    def _take(self) -> bool:
        """Take in what was asked, waiting only where there is nothing to do; False when it is time to end."""
        while not self._calls.empty() or not (self._waiting or self._begun):
            call = self._calls.get()
            if call is None:
                return False
            self._waiting.append(call)
        return True

    def _work(self, engine: Continuous) -> None:
        """Begin what waits, up to what does not go with it, and let the engine work for a moment."""
        while self._waiting and self._waiting[0].ask == "force_all":
            call = self._waiting.popleft()
            try:
                name = engine.begin(call.what)
            except BaseException as error:
                call.answer.set_exception(error)
                continue
            if isinstance(name, Refused):
                call.answer.set_result(partial(same, name))
            else:
                self._begun[name] = call
        if self._begun:
            self._step()

    def _step(self) -> None:
        assert self._continuous is not None, "only such an engine has begun anything"
        try:
            done = self._continuous.step()
        except BaseException as error:
            begun, self._begun = self._begun, {}
            for call in begun.values():
                call.answer.set_exception(error)
            return
        for name, read in done:
            if name in self._begun:  # one of before a failure may still be told
                self._begun.pop(name).answer.set_result(read)

    def _answer(self, calls: list[_Call]) -> None:
        """Answer calls of one kind: together those that the engine takes together, each by itself any other."""
        ask = calls[0].ask
        several = getattr(self._engine, ask, None)  # not every engine renders several
        for together in [calls] if several else [[call] for call in calls]:
            what = [call.what for call in together]
            try:
                try:
                    answers = several(what) if several else [what[0]() if ask == "alone" else self._engine.render(what[0])]
                except SomeFailed as error:
                    answers = error.answers
                pairs = list(zip(together, answers, strict=True))
            except BaseException as error:
                pairs = [(call, error) for call in together]
            for call, answer in pairs:
                if isinstance(answer, BaseException):
                    call.answer.set_exception(answer)
                else:
                    call.answer.set_result(partial(same, answer))
