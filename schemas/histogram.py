"""Times counted by bounds: cheap to add to, and enough for any quantile that somebody asks for later."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any


class Histogram:
    """Times in µs by upper bounds given in seconds."""

    __slots__ = ("bounds_us", "counts", "sum_us")

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self.bounds_us = [round(bound * 1e6) for bound in bounds_s]
        self.counts = [0] * (len(bounds_s) + 1)
        self.sum_us = 0

    def observe(self, us: int) -> None:
        """Count one time."""
        self.counts[bisect_left(self.bounds_us, us)] += 1
        self.sum_us += us

    @property
    def total(self) -> int:
        """How many times were counted."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """The bound in seconds that this share of the times does not exceed, the last one also where it does; None without any."""
        wanted, seen = share * self.total, 0
        for bound_us, count in zip(self.bounds_us, self.counts, strict=False):
            seen += count
            if seen and seen >= wanted:
                return bound_us / 1e6
        return self.bounds_us[-1] / 1e6 if self.total else None

    def to_json(self) -> dict[str, int]:
        """Counts by upper bound in µs, `more` beyond the last; only those that are not 0."""
        names = [*map(str, self.bounds_us), "more"]
        return {name: count for name, count in zip(names, self.counts, strict=True) if count}

    def add_json(self, counted: Mapping[str, Any]) -> None:
        """Add what `to_json` of one with the same bounds gave; counts under other bounds are left out."""
        places = {str(bound): place for place, bound in enumerate(self.bounds_us)} | {"more": len(self.bounds_us)}
        for name, count in counted.items():
            if name in places:
                self.counts[places[name]] += int(count)


ENCODE_S = tuple(digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 5))
"""Bounds for encoding one event: 1 µs to 5 s."""

SAVE_S = tuple(digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5))
"""Bounds for saving one session's snapshots: 0.1 ms to 50 s."""
