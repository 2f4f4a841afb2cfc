"""Labelled steps at which a test kills the process: one for every step that changes durable state.

Set `TOKENTAPE_CRASH_AT` to a label and the process dies there as by a power cut, without any clean-up. `LABEL:3`
dies the third time that it comes by. Unset, which is always outside tests, a crash point is one comparison.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "TOKENTAPE_CRASH_AT"

_label, _, _count = os.environ.get(VARIABLE, "").partition(":")
_left = int(_count or 1)


def crash_point(label: str) -> None:
    """Die here by SIGKILL if the environment names this label."""
    global _left
    if label != _label:
        return
    _left -= 1
    if _left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
