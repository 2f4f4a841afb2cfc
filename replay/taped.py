"""The tokens of a recorded sequence as an engine takes them: ids from the start on, and what is missing said in words."""

from __future__ import annotations

from typing import NamedTuple

from replay.state import Sequence


class Taped(NamedTuple):
    """The longest beginning of a sequence whose ids are all known; `missing` says why it is not the whole, None if it is."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    missing: str | None


def taped(sequence: Sequence) -> Taped:
    """The tokens of a sequence that can be forced."""
    return _whole(sequence) or _beginning(sequence)


def _whole(sequence: Sequence) -> Taped | None:
    """All tokens of a sequence that is whole and came in its order, as most do: taken by chunks; None for any other."""
    ids: list[int] = []
    logprobs: list[float | None] = []
    for chunk in sequence.ordered():
        tokens = len(chunk.offsets_us)
        if chunk.position != len(ids) or len(chunk.token_ids) != tokens:
            return None
        ids += chunk.token_ids
        logprobs += chunk.logprobs if len(chunk.logprobs) == tokens else (None,) * tokens
    return Taped(tuple(ids), tuple(logprobs), None)


def _beginning(sequence: Sequence) -> Taped:
    entries = sequence.entries()
    ids: list[int] = []
    logprobs: list[float | None] = []
    for expected, entry in enumerate(entries):
        if entry.position != expected:
            return Taped(tuple(ids), tuple(logprobs), f"tokens {expected} to {entry.position - 1} are not on the tape")
        if entry.token_id is None:
            why = "its content was erased or never recorded" if entry.text is None else "the recording has no token ids"
            return Taped(tuple(ids), tuple(logprobs), why if expected == 0 else f"{why} from token {expected} on")
        ids.append(entry.token_id)
        logprobs.append(entry.logprob)
    return Taped(tuple(ids), tuple(logprobs), None)
