"""Where the KV connectors of a process leave what they did: the pipe of its engine core, or one of their own in a worker's process.

A connector is made before its scheduler, so operations wait here until it is known which. A thread of its own hands them on and
looks after calls that do not come back: a hang is on the tape while it lasts.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ingest.vllm.kv.profile import Profile
from ingest.vllm.tap import Pipe

Operation = dict[str, Any]

WATCH_S = 0.25
"""How often operations are handed on and open calls looked at."""


class Outlet:
    """One for each process."""

    def __init__(self) -> None:
        self._waiting: deque[Operation] = deque()
        self._open: dict[int, tuple[int, int, Operation]] = {}
        self._tickets = itertools.count()
        self._pipe: Pipe | None = None
        self._own: Pipe | None = None
        self._header: tuple[Any, ...] | None = None
        self._flushed: list[Callable[[], None]] = []
        self._profiles: list[Profile] = []
        self._sending = threading.Lock()
        self._thread: threading.Thread | None = None

    def opened(self, header: tuple[Any, ...], flush: Callable[[], None], profile: Profile | None = None) -> None:
        """A connector is being made. `header` begins a pipe of its own, `flush` puts what it has held back; `profile` is looked after."""
        self._header = header
        self._flushed.append(flush)
        if profile is not None:
            self._profiles.append(profile)
            atexit.register(profile.look, last=True)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="tokentape-kv", daemon=True)
            self._thread.start()

    def attach(self, pipe: Pipe) -> None:
        """The engine core of this process is recorded: its connectors speak through the same pipe from now on."""
        self._pipe = pipe

    def detach(self, pipe: Pipe) -> None:
        """The pipe is about to be closed: hand over all of it."""
        if self._pipe is pipe:
            self.flush()
            self._pipe = None

    def working(self) -> None:
        """The engine is at work, so its scheduler exists: where none of ours is in this process there will not be one."""
        if self._pipe is None and self._own is None and self._header is not None:
            self._own = Pipe()
            self._own.put([self._header])
            atexit.register(self.close)

    def begin(self, operation: Operation, limit_ns: int) -> int:
        """A call begins; beyond `limit_ns` it counts as hanging."""
        ticket = next(self._tickets)
        self._open[ticket] = (time.monotonic_ns(), limit_ns, operation)
        return ticket

    def end(self, ticket: int) -> None:
        """A call came back, or raised."""
        self._open.pop(ticket, None)

    def put(self, operation: Operation) -> None:
        """Take an operation in, as JSON types and bytes."""
        self._waiting.append(operation)

    def flush(self) -> None:
        """Hand on what waits and what connectors held back."""
        for flush in self._flushed:
            flush()
        self._send()

    def close(self) -> None:
        """The process ends: hand over all of it, and close a pipe of its own."""
        self.flush()
        if self._own is not None:
            self._own.close()

    def _watch(self) -> None:
        while True:
            time.sleep(WATCH_S)
            self._look_after()
            for profile in self._profiles:
                profile.look()
            self._send()

    def _look_after(self) -> None:
        now = time.monotonic_ns()
        for ticket, (begun_ns, limit_ns, operation) in list(self._open.items()):
            if now - begun_ns > limit_ns and ticket in self._open:
                self._open.pop(ticket, None)  # told once; when it does come back, its end is an operation of its own
                self.working()
                self.put(operation | {"outcome": "hanging", "duration_us": (now - begun_ns) // 1000})

    def _send(self) -> None:
        with self._sending:  # the engine's end and the watching thread may both be here
            pipe = self._pipe or self._own
            if pipe is None:
                return
            operations = []
            while self._waiting:
                operations.append(("kv", self._waiting.popleft()))
            if operations and not pipe.put(operations):
                pipe.put([("kv_lost", len(operations))], room=True)


outlet = Outlet()
"""This process's."""
