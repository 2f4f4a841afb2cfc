"""What arrives when: requests of the tape, or of a public trace with prompts made up to its lengths."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from replay.drive.traces import Row
from replay.state import Generation, Recording, SessionState
from schemas.errors import UsageError
from schemas.requests.recorded import CHAT, COMPLETIONS, as_generation

WORDS = (
    *("time", "people", "water", "light", "state", "house", "world", "night", "point", "money"),
    *("right", "place", "small", "great", "large", "order", "early", "later"),
)
"""Short English words, of which most tokenizers make one token each."""
NO_LIMITS = ("max_completion_tokens", "stop", "stop_token_ids")
"""Fields that would end an answer elsewhere than the recorded one ended."""


class Past(NamedTuple):
    """How a request went when it was recorded; times in µs since it was forwarded."""

    first_token_us: int | None
    gaps_us: tuple[int, ...]
    duration_us: int | None
    tokens: int
    failed: bool


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request `at_us` after the first one, and how it went then, where that is known."""

    at_us: int
    path: str
    document: dict[str, Any]
    past: Past | None = None


def arrival_of(state: SessionState, generation: Generation, *, held: bool) -> Arrival | str:
    """The request of a generation with its time since the epoch, or why it cannot be sent; `held` to the recorded answer's length."""
    document, request = state.edited(generation), generation.request
    if document is None or request is None or generation.submitted_at is None:
        return "its request is not on the tape"
    try:
        asked = as_generation(request.endpoint, document)
    except UsageError as error:
        return str(error.fault)
    past = _past(generation.recording)
    if held and past.tokens and not past.failed:
        sequences = max(1, len(generation.sequences))
        asked = {name: value for name, value in asked.items() if name not in NO_LIMITS} | _length(-(-past.tokens // sequences))
    path = COMPLETIONS if request.endpoint == COMPLETIONS else CHAT
    return Arrival(generation.submitted_at, path, {"model": request.model, **asked}, past)


def arrivals_of_trace(rows: Iterable[Row], model: str, pool: tuple[int, ...] | None) -> list[Arrival]:
    """Completions of made-up prompts, the same for the same trace: token ids out of `pool`, or where there is none one word a token."""
    found = []
    for number, row in enumerate(rows):
        draw = random.Random(number)
        prompt: Any = draw.choices(pool, k=row.prompt_tokens) if pool else " ".join(draw.choices(WORDS, k=row.prompt_tokens))
        document = {"model": model, "prompt": prompt, "temperature": 1.0, **_length(row.answer_tokens)}
        found.append(Arrival(row.at_us, COMPLETIONS, document))
    return found


def in_order(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """The arrivals by time, the first one at 0."""
    found = sorted(arrivals, key=lambda arrival: arrival.at_us)
    return [replace(arrival, at_us=arrival.at_us - found[0].at_us) for arrival in found]


def _length(tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True}


def _past(recording: Recording | None) -> Past:
    if recording is None:
        return Past(None, (), None, 0, True)
    gaps: list[int] = []
    for sequence in recording.lanes:
        times = [offset for chunk in sequence.ordered() for offset in chunk.offsets_us]
        gaps += [after - before for before, after in pairwise(times) if after > before]
    finished, failed = recording.finished, bool(len(recording.failures))
    tokens = (finished.completion_tokens if finished else None) or recording.tokens
    return Past(recording.first_token_us, tuple(gaps), finished.offset_us if finished else None, tokens, failed)
