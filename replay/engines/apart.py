"""vLLM in another process: while it works, this one reads tapes and reaches verdicts, and neither waits for the other.

In one process both would share one interpreter, and the device would wait whenever a verdict is being reached. vLLM's own
split leaves its front end here, through which the logprobs of each token of each step go, pickled one by one; of a sequence
that is scored only the end matters, so what travels here are the flat numbers of whole sequences. An engine that takes
its process down, as one that runs out of memory does, leaves this one to say so.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from replay.engines.base import Forced, Generated, Refused, Request, Scored, same
from schemas.errors import EngineUnavailable, TokentapeError
from schemas.events import EnvironmentCaptured

STEP_S = 0.01
"""A step returns at the latest then, so that what is asked for meanwhile is taken in."""
Done = list[tuple[Hashable, Callable[[], Scored | Refused]]]
CLOSE_S = 10.0
"""How long the process may take to end before it is made to."""


class Elsewhere(ABC):
    """An engine that another process hosts (`Hosted`), as seen from here."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._names = count()

    def fingerprint(self, recorded: EnvironmentCaptured | None = None) -> EnvironmentCaptured | None:
        """See `Engine.fingerprint`."""
        found: EnvironmentCaptured | None = self._call("fingerprint", recorded)
        return found

    def render(self, request: Request) -> tuple[int, ...] | Refused:
        """See `Engine.render`."""
        found: tuple[int, ...] | Refused = self._call("render", request)
        return found

    def render_all(self, requests: Sequence[Request]) -> list[tuple[int, ...] | Refused]:
        """As `render`, for several by one question."""
        found: list[tuple[int, ...] | Refused] = self._call("render_all", list(requests))
        return found

    def generate(self, request: Request) -> Generated | Refused:
        """See `Engine.generate`."""
        return self.generate_all([request])[0]

    def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
        """See `Engine.generate_all`."""
        found: list[Generated | Refused] = self._call("generate_all", list(requests))
        return found

    def force(self, request: Request, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> Scored | Refused:
        """See `Engine.force`."""
        return self.force_all([Forced(request, prompt_token_ids, token_ids)])[0]

    def force_all(self, several: Sequence[Forced]) -> list[Scored | Refused]:
        """See `Engine.force_all`."""
        found: list[Scored | Refused] = self._call("force_all", list(several))
        return found

    def begin(self, forced: Forced) -> Hashable | Refused:
        """See `Continuous.begin`; that it is refused is told by `step`."""
        name = next(self._names)
        self._begin(name, forced)
        return name

    @abstractmethod
    def step(self) -> Done:
        """See `Continuous.step`."""

    @abstractmethod
    def close(self) -> None:
        """See `Engine.close`."""

    @abstractmethod
    def _call(self, method: str, *arguments: Any) -> Any:
        """What the engine's method gives; raises what it raises, and EngineUnavailable where the process has ended."""

    @abstractmethod
    def _begin(self, name: int, forced: Forced) -> None:
        """Have `Hosted.begin` called, without waiting for it."""


class Hosted:
    """The other side: a `VllmEngine`, whose errors are answers."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._begun: dict[Hashable, Hashable] = {}
        self._done: Done = []
        self._fault: TokentapeError | None = None

    def load(self, model: str, options: dict[str, Any] | None = None, digests: Path | None = None) -> str | TokentapeError:
        """Load the model; the engine's name."""
        from replay.engines.vllm import VllmEngine

        try:
            self._engine = VllmEngine(model, options=options, digests=digests)
        except TokentapeError as error:
            return error
        return str(self._engine.name)

    def call(self, method: str, *arguments: Any) -> Any:
        """What the engine's method gives, or the error that it raises."""
        try:
            return getattr(self._engine, method)(*arguments)
        except TokentapeError as error:
            return error
        except Exception as error:
            fault, hint = f"{type(error).__name__}: {error}", "its output says more; what was compared before stands"
            return EngineUnavailable(fault, operation="ask engine", hint=hint)

    def begin(self, name: Hashable, forced: Forced) -> None:
        """Take a sequence in; whatever comes of it is told by `step`."""
        own: Any
        try:
            own = self._engine.begin(forced)
        except TokentapeError as error:
            own = error
        except Exception as error:  # of one sequence; the others have nothing to do with it
            own = Refused(f"the engine does not take it: {type(error).__name__}: {error}")
        if isinstance(own, Refused):
            self._done.append((name, partial(same, own)))
        elif isinstance(own, TokentapeError):
            self._fault = own
        else:
            self._begun[own] = name

    @property
    def idle(self) -> bool:
        """Nothing was begun that has not ended."""
        return not (self._begun or self._done or self._fault)

    def step(self, seconds: float) -> Done | TokentapeError:
        """Work that long: what was done by then."""
        until = time.monotonic() + seconds
        while self._begun and not self._fault:
            answer = self.call("step")
            if isinstance(answer, TokentapeError):
                self._fault = answer
            else:
                self._done += [(self._begun.pop(own), read) for own, read in answer]
            if time.monotonic() >= until:
                break
        if self._done:
            done, self._done = self._done, []
            return done
        if self._fault is not None:
            fault, self._fault = self._fault, None
            self._begun.clear()
            return fault
        return []

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


class Apart(Elsewhere):
    """A `VllmEngine` in a process of its own; arguments as there.

    Raises:
        UsageError: as there.
    """

    def __init__(self, model: str, *, options: dict[str, Any] | None = None, digests: Path | None = None) -> None:
        """Returns when the model is loaded."""
        super().__init__(f"vllm {model}")
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self._told, theirs = context.Pipe()
        self._early: list[Done | TokentapeError] = []
        self._process = context.Process(target=_serve, args=(theirs, model, options, digests), name=self.name)
        self._process.start()
        theirs.close()
        atexit.register(self.close)
        try:
            self._answer()
        except TokentapeError:
            self.close()
            raise

    def step(self) -> Done:
        """See `Continuous.step`."""
        if not self._early:
            if not self._told.poll(STEP_S):  # at its end the process says so too
                return []
            self._early.append(self._received()[1])
        done: Done = _raised(self._early.pop(0))
        return done

    def close(self) -> None:
        """End the process; may be called twice."""
        atexit.unregister(self.close)
        self._told.close()  # which it takes for the end
        self._process.join(CLOSE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _call(self, method: str, *arguments: Any) -> Any:
        self._send("call", method, *arguments)
        return self._answer()

    def _begin(self, name: int, forced: Forced) -> None:
        self._send("begin", name, forced)

    def _send(self, *message: Any) -> None:
        try:
            self._told.send(message)
        except OSError as error:
            raise self._gone() from error

    def _answer(self) -> Any:
        while True:
            stepped, answer = self._received()
            if not stepped:
                return _raised(answer)
            self._early.append(answer)  # for `step`, a fault as well

    def _received(self) -> tuple[bool, Any]:
        """Whether what it said next came of a step, and what it is."""
        try:
            stepped, answer = self._told.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        return stepped, answer

    def _gone(self) -> EngineUnavailable:
        self._process.join(CLOSE_S)
        ended = f"its process has ended with code {self._process.exitcode}"
        hint = "its output says more; what was compared before stands"
        return EngineUnavailable(ended, operation="ask engine", place=self.name, hint=hint)


def _raised(answer: Any) -> Any:
    """An answer that is no error."""
    if isinstance(answer, TokentapeError):
        raise answer
    return answer


def _serve(told: Connection, model: str, options: dict[str, Any] | None, digests: Path | None) -> None:
    """The process: it ends when nobody listens any more."""
    hosted = Hosted()
    name = hosted.load(model, options, digests)
    told.send((False, name))
    if isinstance(name, TokentapeError):
        return
    said: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    # A pipe holds little: were this one to wait until its answer is read, and the other side until its request is, both would for ever.
    threading.Thread(target=_send_all, args=(told, said), name="answers", daemon=True).start()
    try:
        while True:
            while hosted.idle or told.poll():
                kind, *rest = told.recv()
                if kind == "begin":
                    hosted.begin(*rest)
                else:
                    said.put((False, hosted.call(*rest)))
            if answer := hosted.step(0):
                said.put((True, answer))
    except (EOFError, OSError):
        hosted.close()


def _send_all(told: Connection, said: queue.SimpleQueue[tuple[bool, Any]]) -> None:
    """Send what is said until nobody listens any more."""
    with contextlib.suppress(OSError):
        while True:
            told.send(said.get())
