"""The recorder of an engine: a process that reads the frames of one engine run, or of a worker of one, from standard input."""

from __future__ import annotations

import contextlib
import marshal
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingest.vllm.scribe import Frame

CHUNK_BYTES = 1 << 20
"""Read from the pipe at once."""
REST_S = 0.2
"""So long frames gather in the pipe while there are few: an engine without a core to spare has to wait for each time this process wakes."""
COALESCE_MS_MIN = 500.0
"""Tokens of a sequence wait at least this long for company: the pipe outlives the engine, so that nothing is at stake."""


def frames(pipe: int) -> Iterator[Frame]:
    """The frames of a file descriptor; one that a killed engine left unfinished is not among them."""
    from ingest.vllm.tap import SIZE

    waiting = bytearray()
    while chunk := os.read(pipe, CHUNK_BYTES):
        waiting += chunk
        at = 0
        while len(waiting) >= at + SIZE.size:
            end = at + SIZE.size + SIZE.unpack_from(waiting, at)[0]
            if len(waiting) < end:
                break
            yield marshal.loads(memoryview(waiting)[at + SIZE.size : end])
            at = end
        del waiting[:at]
        if not waiting and len(chunk) < CHUNK_BYTES // 4:
            time.sleep(REST_S)


def main() -> int:
    """Record one engine run, in a process that is nobody's child."""
    if os.fork():  # before anything is imported that makes threads
        return 0
    from schemas.errors import TokentapeError
    from tokentape import config, logs
    from tokentape.installation import Installation

    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)  # it ends with the engine, whose end it still has to write down
    with contextlib.suppress(OSError):
        os.nice(5)  # the engine comes first
    try:
        settings = config.load()
        logs.configure(settings.logging, part="engine recorder")
        taste = settings.recorder.model_copy(update={"coalesce_ms": max(settings.recorder.coalesce_ms, COALESCE_MS_MIN)})
        with Installation(settings.model_copy(update={"recorder": taste}), source="engine") as installation:
            _record(installation)
    except TokentapeError as error:
        sys.stderr.write(f"tokentape: {error}\n")
        return error.exit_code
    return 0


def _record(installation: Any) -> None:
    from ingest.vllm.scribe import Scribe, WorkerScribe

    scribe: Scribe | WorkerScribe | None = None
    for frame in frames(sys.stdin.fileno()):
        if scribe is None:
            own = installation.recorder, installation.settings
            kind, header = frame[0]
            scribe = Scribe(*own) if kind == "header" else WorkerScribe(*own, header)
        scribe.frame(frame)
    if scribe is not None:
        scribe.close()


if __name__ == "__main__":
    raise SystemExit(main())
