"""How long until an acknowledged event is in a query's answer: when the reader asks for fresh, and when it does not."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ingest.recorder import Recorder
from schemas.events import SessionAnnotated
from schemas.settings import Settings
from schemas.sink import SessionContext, new_id
from store.indexer import ensure_fresh
from store.log import open_log
from store.sql import SqlService

ROUNDS = 15


def run() -> list[dict[str, Any]]:
    """Rows: asked and not asked, p50 and worst, beside a query that needs nothing new."""
    with tempfile.TemporaryDirectory() as folder, _indexer(Path(folder)) as settings:
        log = open_log(settings.log, settings.data)
        recorder = Recorder(log, settings.recorder, source="sdk")
        service = SqlService(settings, keep_warm=True)
        try:
            asked = [_until_seen(settings, log, recorder, service, ask=True) for _ in range(ROUNDS)]
            waited = [_until_seen(settings, log, recorder, service, ask=False) for _ in range(5)]
            plain = [_query(service) for _ in range(ROUNDS)]
        finally:
            service.close()
            recorder.close()
            log.close()
    beside = statistics.median(plain)
    return [
        _row("acknowledged → in the answer, reader asks for fresh, p50", statistics.median(asked), beside, ""),
        _row("acknowledged → in the answer, reader asks for fresh, worst", max(asked), beside, "≤ 1 s"),
        _row("acknowledged → in the answer, reader does not ask, worst", max(waited), beside, "≤ 6 s"),
    ]


def _row(what: str, value: float, beside: float, reach: str) -> dict[str, Any]:
    return {
        "what": what,
        "value": value,
        "unit": "s",
        "beside": "the same query, nothing new",
        "beside_value": beside,
        "ratio": value / beside,
        "reach": reach,
    }


@contextmanager
def _indexer(folder: Path) -> Iterator[Settings]:
    """A running indexer on a fresh data directory."""
    command = [sys.executable, "-m", "tokentape.cli", "--data", str(folder), "up", "--only", "indexer"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((folder / "run").glob("indexer-*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        yield Settings(data=folder)
    finally:
        process.terminate()
        process.wait(60)


def _until_seen(settings: Settings, log: Any, recorder: Recorder, service: SqlService, *, ask: bool) -> float:
    """Seconds from the acknowledgement of an event to the first answer that holds it."""
    session = SessionContext(new_id(), "default", "sdk")
    recorder.record(session, SessionAnnotated(tags_added=["fresh"]))
    recorder.flush()
    began = time.perf_counter()
    while time.perf_counter() - began < 30:
        if ask:
            ensure_fresh(settings, log)
        answer = service.query(f"SELECT count(*) FROM events WHERE session_id = uuid_blob('{uuid.UUID(bytes=session.session_id)}')")
        if answer.table.column(0)[0].as_py():
            return time.perf_counter() - began
    raise TimeoutError("the event did not show within 30 s")


def _query(service: SqlService) -> float:
    began = time.perf_counter()
    service.query("SELECT count(*) FROM events WHERE kind = 'session_annotated'")
    return time.perf_counter() - began
