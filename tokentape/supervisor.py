"""Runs the long-lived parts: one in this process, several as children that come and go together."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import structlog

from schemas import clock
from schemas.errors import Fenced, TokentapeError

log = structlog.get_logger()

PARTS = ("gateway", "api", "indexer", "scheduler")
"""Parts in the order in which they stop: what brings events in first, so that the others see the last of them."""

RESTARTS_MAX = 5
"""Restarts of one part within `RESTART_WINDOW_S` before the supervisor gives up."""

RESTART_WINDOW_S = 60.0

TOLD_S = 5.0
"""How often a part renews what it tells of itself."""

GRACE_S = 30.0
"""How long a part may take to stop before it is killed."""


@contextlib.contextmanager
def instance_lock(data: Path) -> Iterator[None]:
    """Own the data directory as the one instance that runs all parts.

    Raises:
        Fenced: another instance runs on it.
    """
    data.mkdir(parents=True, exist_ok=True)
    with (data / "instance.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            hint = "stop it, or give this one another --data directory"
            raise Fenced(f"process {owner} runs on this data directory", operation="up", place=str(data), hint=hint) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def announced(data: Path, part: str, *, told: Callable[[], dict[str, Any]] | None = None, **facts: Any) -> Iterator[None]:
    """Say in `run/` that a part runs in this process, for `status` and for whoever started it; what `told` gives is renewed."""
    path = data / "run" / f"{part}-{os.getpid()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"part": part, "pid": os.getpid(), "started_at": clock.now_s(), **facts}
    over = threading.Event()

    def say() -> None:
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(facts | (told() if told else {})))
        draft.replace(path)

    def renew() -> None:
        while not over.wait(TOLD_S):
            with contextlib.suppress(OSError):  # a full disk: the next time
                say()

    say()
    thread = threading.Thread(target=renew, name="announce", daemon=True)
    if told is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if told is not None:
            thread.join()
        path.unlink(missing_ok=True)


def running(data: Path) -> list[dict[str, Any]]:
    """The parts that run on a data directory, from `run/`; entries of dead processes are removed."""
    found = []
    for path in sorted((data / "run").glob("*.json")):
        try:
            facts = json.loads(path.read_text())
            os.kill(facts["pid"], 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (OSError, ValueError):
            continue
        else:
            found.append(facts)
    return found


def stop_event() -> threading.Event:
    """Set when SIGTERM or SIGINT comes, or when the supervisor that holds our standard input is gone."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if os.environ.get("TOKENTAPE_SUPERVISED") == "1":
        threading.Thread(target=_until_parent_is_gone, args=(stop,), daemon=True).start()
    return stop


def _until_parent_is_gone(stop: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            continue
    stop.set()


class _Child:
    """One part as a child process."""

    def __init__(self, part: str, command: Sequence[str]) -> None:
        self.part = part
        self._command = command
        self._starts: list[float] = []
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._starts.append(time.monotonic())
        environ = {**os.environ, "TOKENTAPE_SUPERVISED": "1"}
        return subprocess.Popen([*self._command, "--only", self.part], stdin=subprocess.PIPE, env=environ, start_new_session=True)

    def revive(self) -> None:
        """Start it again after it died.

        Raises:
            TokentapeError: it has died too often; its own last line says why.
        """
        code = self.process.returncode
        recent = [at for at in self._starts if time.monotonic() - at < RESTART_WINDOW_S]
        uptime = time.monotonic() - self._starts[-1]
        if len(recent) > RESTARTS_MAX or (len(self._starts) == 1 and uptime < 10 and 0 < code < 10):
            error = TokentapeError(f"{self.part} ended with exit code {code}", operation="up", hint="its own message stands above")
            error.exit_code = code if 0 < code < 10 else 1
            raise error
        log.warning("part.restarted", of=self.part, exit_code=code)
        self.process = self._start()

    def stop(self) -> None:
        """Ask it to stop, wait, and kill it only when it does not."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            log.error("part.killed", of=self.part, after_s=GRACE_S)
            self.process.kill()
            self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()


def supervise(parts: Sequence[str], options: Sequence[str], stop: threading.Event) -> None:
    """Run parts as children until `stop` is set; a child that dies is started again.

    `options` are the program's options before the command, which the children get too.

    Raises:
        TokentapeError: a part cannot run; the others were stopped first.
    """
    command = [sys.executable, "-m", "tokentape.cli", *options, "up"]
    children = []
    try:
        children = [_Child(part, command) for part in parts]
        while not stop.wait(0.1):
            for child in children:
                if child.process.poll() is not None and not stop.is_set():
                    child.revive()
    finally:
        for child in sorted(children, key=lambda child: PARTS.index(child.part)):
            child.stop()
