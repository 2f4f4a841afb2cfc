"""The contract of an engine: what it is, what it says when free, what it thinks of tokens that were said before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from schemas.events import EnvironmentCaptured
from schemas.requests.recorded import CHAT


@dataclass(frozen=True, slots=True)
class Request:
    """A recorded request, for an engine: its document as the client wrote it (after edits), the model it named, and where it went."""

    model: str | None
    document: dict[str, Any] = field(default_factory=dict)
    endpoint: str = CHAT


@dataclass(frozen=True, slots=True)
class Scored:
    """What an engine thinks of tokens that it was made to say; one entry per token, in their order.

    `logprobs` are natural logarithms before temperature, penalties and masks; None where the engine gave none (the very
    first token of an empty prompt, or a token that did not fit). `ranks` are 1 for the likeliest, counting ties upwards.
    `top_logprobs` is the likeliest token's logprob at that place: under ties it equals `logprobs` at rank 2 as well.
    """

    logprobs: tuple[float | None, ...]
    ranks: tuple[int | None, ...]
    top_logprobs: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine answered, but cannot do this: a reason a person can act on. Not an outage, which is EngineUnavailable."""

    reason: str


@dataclass(frozen=True, slots=True)
class Spoken:
    """One sequence that an engine generated freely; ids and logprobs are empty where it does not tell them."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None


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

    def close(self) -> None:
        """Let go of connections; may be called twice."""
        ...
