"""Tokens of a sequence as runs: stretches without a stall, each with its pace, however many tokens there are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from replay.state import Chunk, Sequence

STALL_MEDIANS = 10
"""A gap is a stall when it is this many times the sequence's median gap …"""
STALL_US_MIN = 200_000
"""… and at least this long: what a person watching a stream takes for a hitch."""
QUOTE_CHARACTERS = 240
"""Characters of a run's text that are kept for showing; the state has the rest."""
PACE_CELLS = 12
PACE_TOKENS_MIN = 24
"""Tokens below which a pace is a matter of chance."""

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens `first` to `last` of one channel, from `start_us` to `end_us` after the request was forwarded.

    `stall_us` is the gap before the run where that is a stall, in `stall_medians` medians (0 where the median is 0). `text`
    is the beginning of what they say, None once erased. `pace` is the token count of each twelfth of the run's time.
    """

    first: int
    last: int
    channel: str
    start_us: int
    end_us: int
    tokens: int
    gap_us_median: int
    gap_us_max: int
    stall_us: int | None
    stall_medians: int
    text: str | None
    characters: int
    pace: tuple[int, ...]

    @property
    def rate(self) -> float | None:
        """Tokens per second between the first and the last, None where that means nothing."""
        return (self.tokens - 1) * 1e6 / (self.end_us - self.start_us) if self.tokens > 1 and self.end_us > self.start_us else None


def runs(sequence: Sequence) -> list[Run]:
    """The runs of a sequence in order; a new one begins after a stall and where the channel changes."""
    chunks = [chunk for chunk in sequence.ordered() if chunk.offsets_us]
    if not chunks:
        return []
    offsets = np.fromiter((us for chunk in chunks for us in chunk.offsets_us), np.int64)
    sizes = np.fromiter((len(chunk.offsets_us) for chunk in chunks), np.int64, len(chunks))
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    gaps = np.diff(offsets)
    median = int(np.median(gaps)) if len(gaps) else 0
    stalls = set((np.flatnonzero(gaps > max(STALL_MEDIANS * median, STALL_US_MIN)) + 1).tolist())
    turns = {int(starts[i]) for i in range(1, len(chunks)) if chunks[i].channel != chunks[i - 1].channel}
    bounds = sorted({0, len(offsets)} | stalls | turns)
    stretches = itertools.pairwise(bounds)
    return [_run(chunks, starts, offsets, gaps, median, a, b, a in stalls) for a, b in stretches]


def _run(chunks: list[Chunk], starts: Longs, offsets: Longs, gaps: Longs, median: int, a: int, b: int, stalled: bool) -> Run:
    """The run of entries a to b (exclusive) of all that a sequence has."""
    inside = gaps[a : b - 1]
    stall = int(gaps[a - 1]) if stalled else None
    at = int(np.searchsorted(starts, a, side="right")) - 1
    text, characters = _quote(chunks, starts, at, a, b)
    last = int(np.searchsorted(starts, b - 1, side="right")) - 1
    return Run(
        first=chunks[at].position + a - int(starts[at]),
        last=chunks[last].position + b - 1 - int(starts[last]),
        channel=chunks[at].channel,
        start_us=int(offsets[a]),
        end_us=int(offsets[b - 1]),
        tokens=b - a,
        gap_us_median=int(np.median(inside)) if len(inside) else 0,
        gap_us_max=int(inside.max()) if len(inside) else 0,
        stall_us=stall,
        stall_medians=stall // median if stall is not None and median > 0 else 0,
        text=text,
        characters=characters,
        pace=_pace(offsets[a:b]),
    )


def _quote(chunks: list[Chunk], starts: Longs, at: int, a: int, b: int) -> tuple[str | None, int]:
    """The beginning of what entries a to b say, and how many characters that is in all; None where a part was erased."""
    said, characters = "", 0
    while at < len(chunks) and int(starts[at]) < b:
        chunk, start = chunks[at], int(starts[at])
        if chunk.text is None:
            return None, 0
        whole = start >= a and start + len(chunk.offsets_us) <= b
        text = chunk.text if whole else "".join(entry.text or "" for entry in list(chunk.entries())[max(0, a - start) : b - start])
        characters += len(text)
        said = said if len(said) >= QUOTE_CHARACTERS else said + text[:QUOTE_CHARACTERS]
        at += 1
    return said[:QUOTE_CHARACTERS], characters


def _pace(offsets: Longs) -> tuple[int, ...]:
    if len(offsets) < PACE_TOKENS_MIN or offsets[-1] <= offsets[0]:
        return ()
    counts, _ = np.histogram(offsets, bins=PACE_CELLS)
    return tuple(int(n) for n in counts)
