"""A profile of a connector inside a running engine, on demand.

`"tokentape_profile": FOLDER` in the connector's extra configuration names where it is asked for: while a file `on` lies there, the calls
run under Python's profiler, and when it is gone, or the process ends, each connector leaves `ROLE-PID.pstats` there. Elsewhere that
costs a test of an attribute a call, and four looks a second at the folder.
"""

from __future__ import annotations

import contextlib
import cProfile
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ON = "on"
END_S = 1.0
"""How long the end of the process waits for a call that is under way."""


class Profile:
    """What one connector's calls take, while it is asked for. One call at a time is seen, as it is with most connectors.

    From Python 3.12 on the profiler hears all threads of the process, so what others do meanwhile is in it as well.
    """

    def __init__(self, folder: Path, role: str) -> None:
        self._on, self._path = folder / ON, folder / f"{role}-{os.getpid()}.pstats"
        self._profiler: cProfile.Profile | None = None
        self._busy = threading.Lock()

    def look(self, *, last: bool = False) -> None:
        """Begin or end by what lies in the folder; `last` ends it in any case. It waits for no call and raises nothing."""
        on = not last and os.path.exists(self._on)
        if on == (self._profiler is not None) or not self._busy.acquire(timeout=END_S if last else 0):
            return
        try:
            ended, self._profiler = self._profiler, cProfile.Profile() if on else None
        finally:
            self._busy.release()
        if ended is not None:
            partial = self._path.with_suffix(".partial")
            with contextlib.suppress(OSError):  # a folder that cannot be written to gets nothing
                ended.dump_stats(partial)
                partial.rename(self._path)

    def call(self, method: Callable[..., Any], args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        """Call a method, under the profiler where it is wanted and no other one listens."""
        if self._profiler is None or not self._busy.acquire(blocking=False):
            return method(*args, **more)
        try:
            with self._listening():
                return method(*args, **more)
        finally:
            self._busy.release()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        profiler = self._profiler
        if profiler is None or sys.getprofile() is not None:
            yield
            return
        try:
            profiler.enable()
        except ValueError:  # as Python 3.12 says that another one listens
            yield
            return
        try:
            yield
        finally:
            profiler.disable()
