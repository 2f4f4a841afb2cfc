"""How the answers of chat completions are read: which texts came in which channel, and which tokens made them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from schemas.events import Alternative
from schemas.requests import double_of

Segment = tuple[str, str]
"""A channel (content, reasoning, refusal, tool) and the text that came in it."""

Delta = tuple[str, Sequence[int], str, Sequence[float], Sequence[Sequence[Alternative]]]
"""Channel, token ids, text, logprobs and alternatives of what is recorded as one."""

_AS_ID = "token_id:"
"""How vLLM begins a token's name where a client wants ids instead of texts (`return_tokens_as_token_ids`)."""

_ID_DIGITS_MAX = 19
"""Anything this long need not fit the 64 bits that the tape has for an id."""


@dataclass(slots=True)
class Tool:
    """A tool call as it grows."""

    call_id: str | None = None
    name: str | None = None
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Choice:
    """One of the n sequences as it grows."""

    index: int
    position: int = 0
    channel: str = "content"
    finished: bool = False
    tools: dict[int, Tool] = field(default_factory=dict)
    said: bytearray = field(default_factory=bytearray)  # its text in UTF-8: pieces, which StringIO keeps, would take ten times the memory

    def say(self, text: str) -> None:
        """Go on with its text."""
        self.said += text.encode("utf-8", "surrogatepass")

    @property
    def text(self) -> str:
        """Its text so far."""
        return self.said.decode("utf-8", "surrogatepass")


class Piece(NamedTuple):
    """One token as its logprob entry spells it; `logprob` is None where the engine gave none."""

    text: str
    logprob: float | None
    alternatives: Sequence[Alternative] = ()


def segments_of_delta(choice: Choice, delta: dict[str, Any]) -> list[Segment]:
    """The texts of a delta in the order in which a model writes them."""
    content = delta.get("content")
    if len(delta) == 1 and content.__class__ is str:  # most deltas
        return [("content", content)] if content else []
    reasoning = delta.get("reasoning") or delta.get("reasoning_content")
    calls = delta.get("tool_calls") or ()
    if function := delta.get("function_call"):  # the old name of the first tool call
        calls = [{"index": 0, "function": function}]
    texts = (("reasoning", reasoning), ("content", content), ("refusal", delta.get("refusal")), ("tool", _grow(choice, calls)))
    return [(channel, text) for channel, text in texts if text and isinstance(text, str)]


def segments_of_message(choice: Choice, message: dict[str, Any]) -> list[Segment]:
    """The texts of a whole message, which has the same parts as a delta."""
    return segments_of_delta(choice, message)


def _grow(choice: Choice, calls: Sequence[dict[str, Any]]) -> str:
    """Add pieces of tool calls to the choice; the text of their arguments."""
    texts = []
    for at, call in enumerate(calls):
        index = call.get("index")
        tool = choice.tools.setdefault(at if index is None else int(index), Tool())
        function = call.get("function") or {}
        tool.call_id = call.get("id") or tool.call_id
        tool.name = function.get("name") or tool.name
        if arguments := function.get("arguments"):
            tool.arguments.append(arguments)
            texts.append(arguments)
    return "".join(texts)


def align(ids: Sequence[int], scores: Sequence[dict[str, Any]]) -> list[Piece] | None:
    """The logprob entries as pieces, one per token id; None where they do not belong together one to one."""
    if not scores or (ids and len(ids) != len(scores)):
        return None
    return [Piece(score.get("token") or "", score.get("logprob"), alternatives_of(score)) for score in scores]


def alternatives_of(score: dict[str, Any]) -> Sequence[Alternative]:
    """What else a token might have been, as its logprob entry tells it; none where that names only the token itself.

    What is not shaped like one is left out: an answer is not refused for what stands beside it.
    """
    tops = score.get("top_logprobs")
    if not tops or not isinstance(tops, list):
        return ()
    told = [_alternative(top["token"], top.get("logprob")) for top in tops if isinstance(top, dict) and isinstance(top.get("token"), str)]
    found = [one for one in told if one is not None]
    return () if len(found) == 1 and tops[0].get("token") == score.get("token") else found


def _alternative(token: str, logprob: Any) -> Alternative | None:
    known = double_of(logprob)
    if known is None:
        return None
    number = token.removeprefix(_AS_ID) if token.startswith(_AS_ID) else ""
    if number.isdecimal() and len(number) < _ID_DIGITS_MAX:
        return Alternative("", int(number), known)
    return Alternative(token, None, known)


def spread(segments: Sequence[Segment], ids: Sequence[int], pieces: Sequence[Piece] | None) -> Iterator[Delta]:
    """Give each token its own text where the pieces spell the segments, else all tokens of a segment their text in one.

    A token id is given exactly once. Texts to which no token can be given become entries without one.
    """
    texts = [text for _, text in segments]
    if pieces and "".join(piece.text for piece in pieces) == "".join(texts):
        bounds = _bounds(texts, pieces)
        if bounds is not None:
            yield from _one_by_one(segments, ids, pieces, bounds)
            return
    bounds = _bounds(texts, pieces) if pieces and len(segments) > 1 else None
    values, others = _logprobs(pieces), _alternatives(pieces)
    starts = bounds or [0] + [len(ids)] * (len(segments) - 1)
    for (channel, text), start, end in zip(segments, starts, [*starts[1:], len(ids)], strict=True):
        own = values[start:end] if len(values) == len(ids) else values if end - start <= 1 else ()
        told = others[start:end] if len(others) == len(ids) else others if end - start <= 1 else ()
        yield channel, ids[start:end], text, own, told


def _one_by_one(segments: Sequence[Segment], ids: Sequence[int], pieces: Sequence[Piece], starts: Sequence[int]) -> Iterator[Delta]:
    for (channel, _), start, end in zip(segments, starts, [*starts[1:], len(pieces)], strict=True):
        for at in range(start, end):
            piece = pieces[at]
            others = (piece.alternatives,) if piece.alternatives else ()
            yield channel, ids[at : at + 1], piece.text, () if piece.logprob is None else (piece.logprob,), others


def _bounds(texts: Sequence[str], pieces: Sequence[Piece]) -> list[int] | None:
    """The first token of each text, where each text begins with a token; None if one does not.

    What stands between two texts (marks that a parser took out) counts to the text before it.
    """
    spelled = "".join(piece.text for piece in pieces)
    starts_at: dict[int, int] = {}
    at = 0
    for number, piece in enumerate(pieces):
        starts_at.setdefault(at, number)
        at += len(piece.text)
    bounds: list[int] = []
    cursor = 0
    for text in texts:
        found = spelled.find(text, cursor)
        if found < 0:
            return None
        if not bounds:
            bounds.append(0)
        elif found in starts_at:
            bounds.append(starts_at[found])
        else:
            return None
        cursor = found + len(text)
    return bounds


def _logprobs(pieces: Sequence[Piece] | None) -> Sequence[float]:
    """The logprobs of all tokens, or none if one is missing."""
    values = [piece.logprob for piece in pieces or ()]
    return [] if None in values else [value for value in values if value is not None]


def _alternatives(pieces: Sequence[Piece] | None) -> Sequence[Sequence[Alternative]]:
    """The alternatives of all tokens, nothing if none has any."""
    told = [piece.alternatives for piece in pieces or ()]
    return told if any(told) else ()
