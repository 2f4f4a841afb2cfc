"""The contract of an engine: what it is, what it says when free, what it thinks of tokens that were said before."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from schemas.errors import RequestFailed
from schemas.events import EnvironmentCaptured
from schemas.requests.recorded import CHAT

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """A recorded request, for an engine: its document as the client wrote it (after edits), the model it named, and where it went.

    `alternatives` is how many of the likeliest tokens `force` is to report at each place; an engine may report fewer.
    """

    model: str | None
    document: dict[str, Any] = field(default_factory=dict)
    alternatives: int = 0
    endpoint: str = CHAT


class Alternatives(NamedTuple):
    """The likeliest tokens at one place, the forced one among them, in any order; `whole` says that it is the vocabulary."""

    token_ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    whole: bool


@dataclass(frozen=True, slots=True)
class Forced:
    """Tokens that an engine is to be made to say."""

    request: Request
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A request whose prompt an engine is to render."""

    request: Request


@dataclass(frozen=True, slots=True)
class Scored:
    """What an engine thinks of tokens that it was made to say; one entry per token, in their order.

    `logprobs` are natural logarithms before temperature, penalties and masks; None where the engine gave none (the very
    first token of an empty prompt, or a token that did not fit). `ranks` are 1 for the likeliest, counting ties upwards.
    `top_logprobs` is the likeliest token's logprob at that place: under ties it equals `logprobs` at rank 2 as well.
    `alternatives` is empty where none were asked for or none are told. `how` is what the engine did: it scored the tokens as
    a prompt, or decoded them one by one as when they were first said.
    """

    logprobs: tuple[float | None, ...]
    ranks: tuple[int | None, ...]
    top_logprobs: tuple[float | None, ...]
    alternatives: tuple[Alternatives | None, ...] = ()
    how: str = "scoring"

    def with_last_unknown(self) -> Scored:
        """The same with one more token of which the engine says nothing."""
        others = (*self.alternatives, None) if self.alternatives else ()
        return Scored((*self.logprobs, None), (*self.ranks, None), (*self.top_logprobs, None), others, self.how)


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine answered, but cannot do this: a reason a person can act on. Not an outage, which is EngineUnavailable."""

    reason: str


class SomeFailed(RequestFailed):
    """Of several that were asked for at once some failed, each for itself: `answers` are all, in their order, a failure in its place."""

    def __init__(self, answers: Sequence[Any]) -> None:
        first = next(answer for answer in answers if isinstance(answer, RequestFailed))
        super().__init__(first.fault, operation=first.operation, place=first.place, hint=first.hint)
        self.answers = answers


def same(answer: T) -> T:
    """An answer as it is, where something that reads it out is wanted: `partial(same, answer)`, which can be pickled."""
    return answer


@dataclass(frozen=True, slots=True)
class Spoken:
    """One sequence that an engine generated freely; ids and logprobs are empty where it does not tell them.

    `pieces` are the texts of its tokens, empty where they are not told or do not spell `text`.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """What an engine said freely."""

    sequences: tuple[Spoken, ...]
    prompt_token_ids: tuple[int, ...] = ()


class Engine(Protocol):
    """Something that can say recorded requests again. Calls block; one engine is used by one thread at a time."""

    @property
    def name(self) -> str:
        """What to call it in reports: its kind and place, without credentials."""
        ...

    def fingerprint(self, recorded: EnvironmentCaptured | None = None) -> EnvironmentCaptured | None:
        """The environment as it is now; None if it cannot be asked. `recorded` steadies probes that are subject to noise.

        Raises:
            EngineUnavailable: it does not answer.
        """
        ...

    def generate(self, request: Request) -> Generated | Refused:
        """The answer to a request, generated freely.

        Raises:
            EngineUnavailable: it does not answer.
        """
        ...

    def force(self, request: Request, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> Scored | Refused:
        """The engine's own view of `token_ids` (n of them, n >= 1) after the prompt: n entries.

        Raises:
            EngineUnavailable: it does not answer.
        """
        ...

    def render(self, request: Request) -> tuple[int, ...] | Refused:
        """The prompt's token ids as the engine's template and tokenizer make them today.

        Raises:
            EngineUnavailable: it does not answer.
        """
        ...

    def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
        """As `generate`, for several that the engine may work on at once; answers in their order.

        Raises:
            SomeFailed: at some of them it failed.
            EngineUnavailable: it does not answer.
        """
        ...

    def force_all(self, several: Sequence[Forced]) -> list[Scored | Refused]:
        """As `force`, for several that the engine may work on at once; answers in their order.

        Raises:
            SomeFailed: at some of them it failed.
            EngineUnavailable: it does not answer.
        """
        ...

    def close(self) -> None:
        """Let go of connections; may be called twice."""
        ...


@runtime_checkable
class Continuous(Protocol):
    """What an engine has besides that takes sequences in while it is at work on others (continuous batching).

    Beside those that were begun, and have not ended, only `render` may be asked.
    """

    def begin(self, forced: Forced) -> Hashable | Refused:
        """Take a sequence in: what it is called in `step`.

        Raises:
            EngineUnavailable: the engine has failed.
        """
        ...

    def step(self) -> list[tuple[Hashable, Callable[[], Scored | Refused]]]:
        """Work for a moment: the sequences that are done, each with what reads its answer out, in whatever thread.

        Raises:
            EngineUnavailable: the engine has failed.
        """
        ...
