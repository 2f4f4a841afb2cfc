"""Processes that outlive the script that started them, known again by process id and start time.

A process id alone is reused by the system; together with the start time it names one process for
good. Whatever is stopped here was checked that way first.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.1
"""Pause between two looks at a process or a port; short beside the fastest start (2 s)."""


PORTS = (20_000, 32_000)


class ServiceError(Exception):
    """A service that cannot be had; ``str()`` is the one line that a person reads."""


@dataclass(frozen=True)
class Process:
    """One process: id and start time (clock ticks since boot on Linux, else a date), and the boot it belongs to."""

    pid: int
    started: str
    boot: str


def spawn(argv: Sequence[str], *, log: Path, env: Mapping[str, str], cwd: Path, tied: bool) -> Process:
    """Start ``argv`` as leader of its own session, output appended to ``log``.

    ``tied`` asks the kernel to end it when the starting process dies, however that dies (Linux only).
    """
    command = [*_tie(), *argv] if tied else list(argv)
    with log.open("ab") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=dict(env), cwd=cwd, start_new_session=True
        )
    _children[child.pid] = child
    return Process(pid=child.pid, started=_start_time(child.pid) or "gone", boot=_boot())


_children: dict[int, subprocess.Popen[bytes]] = {}
"""Own children, kept so that they are reaped: a zombie would look alive."""


def _tie() -> list[str]:
    """The wrapper that sets the parent-death signal and becomes the program; empty where there is none."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []


def alive(process: Process) -> bool:
    """Whether this very process runs, not another one under its id."""
    child = _children.get(process.pid)
    if child is not None and child.poll() is not None:
        return False
    return process.boot == _boot() and _start_time(process.pid) == process.started


def stop(process: Process, *, grace_s: float) -> None:
    """End the process and what it started: SIGTERM to its group, SIGKILL after ``grace_s``. Never touches a stranger."""
    if alive(process):
        _signal_group(process.pid, signal.SIGTERM)
        wait(lambda: not alive(process), grace_s)
    elif process.boot != _boot() or _start_time(process.pid) is not None:
        return  # The id belongs to somebody else by now, hence its group as well.
    _signal_group(process.pid, signal.SIGKILL)
    wait(lambda: not alive(process) and not any(_members(process.pid)), grace_s)
    child = _children.pop(process.pid, None)
    if child is not None:
        child.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    """Signal a group whose leader is ours, or whose leader is gone: the system reuses no id that a group still bears."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def _members(group: int) -> Iterator[int]:
    """Living members of a process group (Linux; elsewhere nothing is listed)."""
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if fields and int(fields[2]) == group and fields[0] != "Z":
            yield int(entry.name)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the command's name (state first), empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _start_time(pid: int) -> str | None:
    """Start time of a living process, None when there is none; a zombie counts as gone."""
    if Path("/proc/self/stat").exists():
        fields = _stat(pid)
        return fields[19] if fields and fields[0] != "Z" else None
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _boot() -> str:
    """Identity of this boot, so that a state file from before a restart names nobody."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll until ``condition()`` holds; False when it did not within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago; who binds it must still expect to lose a race.

    It lies below those that systems give to connections that go out, any of which could take it meanwhile.
    """
    while port_in_use(port := random.randrange(*PORTS)):
        continue
    return port


def port_in_use(port: int) -> bool:
    """Whether somebody listens on, or otherwise holds, this port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
