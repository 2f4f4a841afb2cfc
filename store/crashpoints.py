"""Labelled steps at which a test kills the process: one for every step that changes durable state.

Set `TOKENTAPE_CRASH_AT` to a label and the process dies there as by a power cut, without any clean-up. `LABEL:3`
dies the third time that it comes by. Unset, which is always outside tests, a crash point is two comparisons.
`watched` hands every step to a simulation in the same process instead.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

VARIABLE = "TOKENTAPE_CRASH_AT"

_label, _, _count = os.environ.get(VARIABLE, "").partition(":")
_left = int(_count or 1)
_watch: Callable[[str], None] | None = None


def crash_point(label: str) -> None:
    """Die here by SIGKILL if the environment names this label; tell a simulation that the step is reached."""
    global _left
    if _watch is not None:
        _watch(label)
    if label != _label:
        return
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def watched(watch: Callable[[str], None]) -> Iterator[None]:
    """Call `watch` with the label of every step until the block ends; what it raises is raised at the step."""
    global _watch
    before, _watch = _watch, watch
    try:
        yield
    finally:
        _watch = before
