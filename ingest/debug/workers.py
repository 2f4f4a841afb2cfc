"""Which gateway workers live: each says so in the control log, and the others tell a silent one from a dead one.

On one machine a process is looked up; elsewhere a worker that has said nothing new for `LEASE_S` counts as dead. The time
is the observer's own, so that clocks that differ do no harm.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schemas import clock

KIND = "worker"
"""Kind of the control log's facts that are workers; the key is a random id of one process."""

HEARTBEAT_S = 5.0
"""How often a worker says that it lives."""

LEASE_S = 30.0
"""How long a worker on another machine may be silent before what it held counts as lost."""


class Worker:
    """This process as the others see it."""

    def __init__(self) -> None:
        self.worker_id = f"w-{uuid.uuid4().hex[:12]}"
        self._facts = {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}

    def document(self) -> dict[str, Any]:
        """What it says now."""
        return {**self._facts, "at": clock.now_s()}


class Workers:
    """The other workers, judged by what this process sees."""

    def __init__(self) -> None:
        self._changed: dict[str, tuple[Any, float]] = {}

    def dead(self, worker_id: str, known: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether a worker is gone, `known` being the facts of kind `KIND`. One that ended well has taken its fact away."""
        fact = known.get(worker_id)
        if fact is None:
            return True
        runs = runs_here(fact)
        if runs is not None:
            return not runs
        said, since = self._changed.get(worker_id, (None, 0.0))
        if said != fact.get("at"):
            self._changed[worker_id] = (fact.get("at"), time.monotonic())
            return False
        return time.monotonic() - since > LEASE_S


def runs_here(fact: Mapping[str, Any]) -> bool | None:
    """Whether a worker's process runs on this machine; None where that cannot be seen from here."""
    if fact.get("host") != _host() or not isinstance(fact.get("pid"), int) or fact.get("started") is None:
        return None
    started = _started(fact["pid"])
    return started is not None and started == fact.get("started")


def _host() -> str:
    """A machine and the space in which its process ids count."""
    boot = _read("/proc/sys/kernel/random/boot_id")
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()}/{boot or 'unknown'}/{space}"


def _started(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None where it is gone, is a zombie, or the kernel does not say."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
