"""A profile of a connector inside a running engine, on demand.

`"tokentape_profile": FOLDER` in the connector's extra configuration names where it is asked for: while a file `on` lies there, the calls
run under Python's profiler, and when it is gone, or the process ends, each connector leaves `ROLE-PID.pstats` there. Elsewhere that
costs a test of an attribute a call, and four looks a second at the folder.
"""

from __future__ import annotations

import cProfile
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ON = "on"


class Profile:
    """What one connector's calls take, while it is asked for. One call at a time is seen, as it is with most connectors."""

    def __init__(self, folder: Path, role: str) -> None:
        self._on, self._path = folder / ON, folder / f"{role}-{os.getpid()}.pstats"
        self._profiler: cProfile.Profile | None = None
        self._busy = threading.Lock()

    def look(self, *, last: bool = False) -> None:
        """Begin or end by what lies in the folder; `last` ends it in any case. A folder that cannot be written to gets nothing."""
        on = self._on.exists() and not last
        if on == (self._profiler is not None):
            return
        with self._busy:
            ended, self._profiler = self._profiler, cProfile.Profile() if on else None
        if ended is not None:
            try:
                partial = self._path.with_suffix(".partial")
                ended.dump_stats(partial)
                partial.rename(self._path)
            except OSError:
                return

    def call(self, method: Callable[..., Any], args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        """Call a method, under the profiler where it is wanted and no other tool has the interpreter's ear."""
        profiler = self._profiler
        if profiler is None or not self._busy.acquire(blocking=False):
            return method(*args, **more)
        try:
            try:
                profiler.enable()
            except ValueError:
                return method(*args, **more)
            try:
                return method(*args, **more)
            finally:
                profiler.disable()
        finally:
            self._busy.release()
