"""Tokens of one sequence that come close together become one event: a pure state machine, time is passed in."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from ingest.encoding import Alternatives, encode_bare_chunk, encode_chunk
from schemas.events import Alternative, clean_text
from schemas.sink import SessionContext

ALTERNATIVES_MAX = 100
"""Alternatives of one token that are kept: five times what OpenAI gives at most; some servers give the whole vocabulary when asked."""

Delta = tuple[bytes, int, int, int, str, Sequence[int], str | Sequence[str], Sequence[float], Sequence[Sequence[Alternative]]]
"""One delta of a stream: generation id, index, position, offset in µs, channel, token ids, text, logprobs, alternatives.

The text is one, which belongs to the last entry, or of a run of tokens one for each. The alternatives are those of each entry, or none.
"""


@dataclass(slots=True)
class Chunk:
    """Consecutive entries of one sequence and channel, see `schemas.events.TokenChunk`.

    `recorded_at` is the time of the last delta in µs since the epoch; `deadline_s` is on the clock that the caller of
    `Coalescer.add` uses.
    """

    session: SessionContext
    generation_id: bytes
    index: int
    position: int
    channel: str
    deadline_s: float
    recorded_at: int = 0
    offsets_us: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    lengths: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    alternatives: list[Alternative] = field(default_factory=list)
    open: bool = True

    def encode(self) -> bytes:
        """Payload bytes; raises InvalidEvent for a number that does not fit."""
        if not self.session.content:
            return encode_bare_chunk(self.generation_id, self.index, self.position, self.channel, self.offsets_us)
        return encode_chunk(
            self.generation_id,
            self.index,
            self.position,
            self.channel,
            self.offsets_us,
            self.token_ids,
            self.text,
            self.lengths,
            self.logprobs,
            self._alternatives() if self.counts else None,
        )

    def _alternatives(self) -> Alternatives:
        texts, ids, logprobs = zip(*self.alternatives, strict=True)
        counts = self.counts + [0] * (len(self.offsets_us) - len(self.counts))
        return counts, () if None in ids else ids, list(map(clean_text, texts)), logprobs


class Coalescer:
    """Open chunks by session and sequence.

    A chunk ends when it holds `tokens_max` entries or `span_s` have passed since it was opened, when the sequence
    changes its channel, skips a position, or begins or ceases to give token ids or logprobs, and when anything else of
    its session is recorded. Within a session, chunks that end together leave in the order in which they were opened.
    """

    def __init__(self, *, span_s: float, tokens_max: int) -> None:
        self._span_s = span_s
        self._span_us = span_s * 1e6
        self._tokens_max = tokens_max
        self._sessions: dict[bytes, dict[tuple[bytes, int], Chunk]] = {}
        # Every chunk lives for the same span, so that they expire in the order of opening.
        self._by_age: deque[Chunk] = deque()

    def add(self, session: SessionContext, delta: Delta, recorded_at: int, now_s: float) -> list[Chunk]:
        """Take one delta; the chunks that are complete now, oldest first."""
        generation_id, index, _, offset_us, _, token_ids, text, logprobs, alternatives = delta
        done: list[Chunk] = []
        chunks = self._sessions.get(session.session_id)
        chunk = chunks.get((generation_id, index)) if chunks is not None else None
        if chunk is None or not self._fits(chunk, session, delta):
            if chunk is not None:
                done.append(self._close(chunk))
            chunk = self._open(session, delta, now_s)
        entries = len(token_ids) or 1
        if isinstance(text, str):
            text = text if text.isascii() else clean_text(text)
            chunk.lengths += [0] * (entries - 1)
            chunk.lengths.append(len(text))
            chunk.text += text
        else:
            texts = [one if one.isascii() else clean_text(one) for one in text]
            chunk.lengths += map(len, texts)
            chunk.text += "".join(texts)
        if alternatives:
            chunk.counts += [0] * (len(chunk.offsets_us) - len(chunk.counts))
            chunk.counts += map(len, alternatives)
            chunk.alternatives += chain.from_iterable(alternatives)
        chunk.offsets_us += [offset_us] * entries
        chunk.token_ids += token_ids
        chunk.logprobs += logprobs
        chunk.recorded_at = recorded_at
        if len(chunk.offsets_us) >= self._tokens_max or self._span_s <= 0:
            done.append(self._close(chunk))
        return done

    def _open(self, session: SessionContext, delta: Delta, now_s: float) -> Chunk:
        generation_id, index, position, _, channel, _, _, _, _ = delta
        chunk = Chunk(session, generation_id, index, position, clean_text(channel), now_s + self._span_s)
        self._sessions.setdefault(session.session_id, {})[(generation_id, index)] = chunk
        if self._tokens_max > 1 and self._span_s > 0:
            self._by_age.append(chunk)
        return chunk

    def end(self, session_id: bytes) -> list[Chunk]:
        """End all chunks of a session, in the order of opening."""
        chunks = self._sessions.pop(session_id, None)
        if chunks is None:
            return []
        for chunk in chunks.values():
            chunk.open = False
        return list(chunks.values())

    def end_all(self) -> list[Chunk]:
        """End every chunk, in the order of opening."""
        done = [chunk for chunk in self._by_age if chunk.open]
        for chunk in done:
            self._close(chunk)
        self._by_age.clear()
        return done

    def due(self, now_s: float) -> list[Chunk]:
        """End the chunks whose time is over."""
        done = []
        while self._by_age and (self._by_age[0].deadline_s <= now_s or not self._by_age[0].open):
            chunk = self._by_age.popleft()
            if chunk.open:
                done.append(self._close(chunk))
        return done

    @property
    def deadline_s(self) -> float:
        """When `due` has something to do next; infinite when no chunk is open."""
        return self._by_age[0].deadline_s if self._by_age else math.inf

    def _close(self, chunk: Chunk) -> Chunk:
        chunk.open = False
        chunks = self._sessions[chunk.session.session_id]
        del chunks[(chunk.generation_id, chunk.index)]
        if not chunks:
            del self._sessions[chunk.session.session_id]
        return chunk

    def _fits(self, chunk: Chunk, session: SessionContext, delta: Delta) -> bool:
        """Whether a delta may join a chunk: `lengths`, ids and logprobs of one chunk are all known or all unknown."""
        _, _, position, offset_us, channel, token_ids, _, logprobs, _ = delta
        entries = len(chunk.offsets_us)
        return (
            position == chunk.position + entries
            and channel == chunk.channel
            and entries + (len(token_ids) or 1) <= self._tokens_max
            and offset_us - chunk.offsets_us[0] <= self._span_us
            and (not token_ids) == (not chunk.token_ids)
            and (not logprobs) == (not chunk.logprobs)
            and (session is chunk.session or session.encoded == chunk.session.encoded)
        )


def delta_of(
    generation_id: bytes,
    index: int,
    position: int,
    offset_us: int,
    channel: str,
    token_ids: tuple[int, ...],
    text: str,
    logprobs: tuple[float, ...],
    alternatives: Sequence[Sequence[Alternative]] = (),
) -> Delta:
    """A delta whose logprobs and alternatives belong to its entries; others, and those with a NaN, count as unknown."""
    if logprobs and (len(logprobs) != (len(token_ids) or 1) or (math.isnan(sum(logprobs)) and any(map(math.isnan, logprobs)))):
        logprobs = ()
    if alternatives:
        told = [[one for one in each[:ALTERNATIVES_MAX] if not math.isnan(one.logprob)] for each in alternatives]
        alternatives = told if len(told) == (len(token_ids) or 1) and any(told) else ()
    return generation_id, index, position, offset_us, channel, token_ids, text, logprobs, alternatives
