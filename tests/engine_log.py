"""Engine runs read from an embedded log as it is, without an index: for tests, and for machines that have no DuckDB."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from replay.exact.run import Run, load
from schemas.codec import decode
from schemas.enginerun.sessions import steps_session
from schemas.events import EngineStep, Event
from schemas.registry import SchemaRegistry
from schemas.settings import LogSettings
from store.log import open_log
from store.rows import StoredEvent


def events_of(data: Path) -> list[Event]:
    """All events of the log but heartbeats, partition by partition."""
    registry, log = SchemaRegistry(), open_log(LogSettings(), data)
    try:
        found = []
        for partition in range(log.partitions):
            at = 0
            while values := (batch := log.read(partition, at, limit=10_000)).values:
                found += [decode(value, registry) for value in values]
                at = batch.offset_next
    finally:
        log.close()
    return [event for event in found if event.kind != "producer_heartbeat"]


def runs_of(data: Path) -> list[Run]:
    """The engine runs of the log."""
    events = events_of(data)
    stored = [StoredEvent(event, "log", 0, at, event.recorded_at) for at, event in enumerate(events)]
    runs = list(dict.fromkeys(event.payload.engine_run for event in events if isinstance(event.payload, EngineStep)))
    return [load(run, _session(stored, run), _session(stored, steps_session(run))) for run in runs]


def _session(stored: list[StoredEvent], session_id: bytes) -> list[StoredEvent]:
    return [one for one in stored if one.event.session_id == session_id]


def await_end(data: Path, runs: int = 1, timeout_s: float = 120.0) -> None:
    """Return when the recorders of so many engine runs have written their last events."""
    deadline = time.monotonic() + timeout_s
    while _ended(data) < 2 * runs:
        if time.monotonic() > deadline:
            raise TimeoutError("the recorder of the engine has not ended")
        time.sleep(0.1)


def _ended(data: Path) -> int:
    """Sessions of engine runs that are closed."""
    if not (data / "log" / "log.sqlite").exists():
        return 0
    return sum(event.kind == "session_closed" and event.source == "engine" for event in events_of(data))


def stopped() -> None:
    """What PYTHONBREAKPOINT may name where nobody sits at a debugger."""
    sys.stderr.write("stopped in a debugger\n")
