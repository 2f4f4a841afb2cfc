"""The wall clock, in one place: what is filed, aged, locked and signed by it can be driven through years in minutes.

Waiting and measuring go by `time.monotonic`, which nobody sets; this is the clock that people and courts read.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def _real() -> int:
    return time.time_ns() // 1000


_source: Callable[[], int] = _real
"""Gives microseconds since the epoch."""


def now_us() -> int:
    """Microseconds since the epoch."""
    return _source()


def now_s() -> float:
    """Seconds since the epoch."""
    return _source() / 1e6


def now() -> dt.datetime:
    """The same as a time in UTC."""
    return at(_source())


def at(moment_us: int) -> dt.datetime:
    """A moment in microseconds since the epoch as a time in UTC, to the microsecond."""
    return dt.datetime.fromtimestamp(moment_us // 1_000_000, dt.UTC).replace(microsecond=moment_us % 1_000_000)


@contextmanager
def driven_by(source: Callable[[], int]) -> Iterator[None]:
    """Let another clock (µs since the epoch) say the time, to all threads of this process, until the block ends."""
    global _source
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before
