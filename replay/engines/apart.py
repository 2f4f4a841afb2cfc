"""vLLM in a process of its own: while it works, this one reads tapes and reaches verdicts, and neither waits for the other.

In one process both would share one interpreter, and the device would wait whenever a verdict is being reached. vLLM's own
split leaves its front end here, through which the logprobs of each token of each step go, pickled one by one; of a sequence
that is scored only the end matters, so what travels here are the flat numbers of whole sequences. An engine that takes
its process down, as one that runs out of memory does, leaves this one to say so.
"""

from __future__ import annotations

import atexit
import multiprocessing
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from replay.engines.base import Forced, Generated, Refused, Request, Scored
from schemas.errors import EngineUnavailable, TokentapeError
from schemas.events import EnvironmentCaptured

STEP_S = 0.01
"""A step returns at the latest then, so that what is asked for meanwhile is taken in."""
CLOSE_S = 10.0
"""How long the process may take to end before it is made to."""


class Apart:
    """A `VllmEngine` in a process of its own; arguments as there.

    Raises:
        UsageError: as there.
    """

    def __init__(self, model: str, *, options: dict[str, Any] | None = None, digests: Path | None = None) -> None:
        """Returns when the model is loaded."""
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        self._told, theirs = context.Pipe()
        self._names = count()
        self._process = context.Process(target=_serve, args=(theirs, model, options, digests), name=f"vllm {model}")
        self.name = f"vllm {model}"
        self._process.start()
        theirs.close()
        atexit.register(self.close)
        try:
            self._answer()
        except TokentapeError:
            self.close()
            raise

    def fingerprint(self, recorded: EnvironmentCaptured | None = None) -> EnvironmentCaptured | None:
        """See `Engine.fingerprint`."""
        found: EnvironmentCaptured | None = self._ask("fingerprint", recorded)
        return found

    def render(self, request: Request) -> tuple[int, ...] | Refused:
        """See `Engine.render`."""
        found: tuple[int, ...] | Refused = self._ask("render", request)
        return found

    def generate(self, request: Request) -> Generated | Refused:
        """See `Engine.generate`."""
        return self.generate_all([request])[0]

    def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
        """See `Engine.generate_all`."""
        found: list[Generated | Refused] = self._ask("generate_all", list(requests))
        return found

    def force(self, request: Request, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> Scored | Refused:
        """See `Engine.force`."""
        return self.force_all([Forced(request, prompt_token_ids, token_ids)])[0]

    def force_all(self, several: Sequence[Forced]) -> list[Scored | Refused]:
        """See `Engine.force_all`."""
        found: list[Scored | Refused] = self._ask("force_all", list(several))
        return found

    def begin(self, forced: Forced) -> Hashable | Refused:
        """See `Continuous.begin`; what is refused is told by `step`."""
        name = next(self._names)
        self._send("begin", name, forced)
        return name

    def step(self) -> list[tuple[Hashable, Callable[[], Scored | Refused]]]:
        """See `Continuous.step`."""
        return self._answer() if self._told.poll(STEP_S) else []  # at its end the process says so too

    def close(self) -> None:
        """End the process; may be called twice."""
        atexit.unregister(self.close)
        self._told.close()  # which it takes for the end
        self._process.join(CLOSE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, method: str, *arguments: Any) -> Any:
        self._send("ask", method, arguments)
        return self._answer()

    def _send(self, *message: Any) -> None:
        try:
            self._told.send(message)
        except OSError as error:
            raise self._gone() from error

    def _answer(self) -> Any:
        try:
            answer = self._told.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        if isinstance(answer, TokentapeError):
            raise answer
        return answer

    def _gone(self) -> EngineUnavailable:
        self._process.join(CLOSE_S)
        ended = f"its process has ended with code {self._process.exitcode}"
        hint = "its output says more; what was compared before stands"
        return EngineUnavailable(ended, operation="ask engine", place=self.name, hint=hint)


def _serve(told: Connection, model: str, options: dict[str, Any] | None, digests: Path | None) -> None:
    """The process: it ends when nobody listens any more."""
    from replay.engines.vllm import VllmEngine

    try:
        engine = VllmEngine(model, options=options, digests=digests)
    except TokentapeError as error:
        told.send(error)
        return
    told.send(engine.name)
    begun: dict[Hashable, Hashable] = {}
    try:
        while True:
            while not begun or told.poll():
                kind, what, arguments = told.recv()
                if kind == "begin":
                    name = _said(partial(engine.begin, arguments))
                    if isinstance(name, Refused):
                        told.send([(what, _Known(name))])
                    elif isinstance(name, TokentapeError):
                        told.send(name)
                    else:
                        begun[name] = what
                else:
                    told.send(_said(partial(getattr(engine, what), *arguments)))
            done = _said(engine.step)
            if isinstance(done, TokentapeError):
                begun.clear()
                told.send(done)
            elif done:
                told.send([(begun.pop(name), read) for name, read in done])
    except (EOFError, OSError):
        engine.close()


class _Known:
    """An answer that is known already, as what reads it; a lambda cannot travel."""

    def __init__(self, answer: Refused) -> None:
        self._answer = answer

    def __call__(self) -> Refused:
        return self._answer


def _said(ask: Callable[[], Any]) -> Any:
    """What the engine answers, or the error that it raises."""
    try:
        return ask()
    except TokentapeError as error:
        return error
