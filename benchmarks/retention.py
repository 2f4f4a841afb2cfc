"""Retention over many cold events of which 1 % of the sessions are held, beside DuckDB's COPY of the rows that stay.

COPY only writes the rows to a file: it removes nothing, proves nothing, and looks at no policy. `BENCH_CUSTODY_EVENTS`
scales it; 10,000,000 is the figure to reach. One day is recorded, indexed and tiered; the others hold the same rows, as objects,
entries and segments of their own, because to make ten million events takes an hour and to remove them does not ask how they came.
"""

from __future__ import annotations

import datetime as dt
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson

from benchmarks.custody import COPY, DAYS, EVENTS, fill, peak_mb, timed
from lifecycle.holds import Holds
from lifecycle.retention import Retention
from lifecycle.selectors import Selector
from lifecycle.tiering import ENTRY_TYPE
from schemas.settings import ColdSettings, RetentionPolicy, RetentionSettings, Settings
from store import duck
from store.control import open_control
from store.views import events_sql
from tests.tiered import Tiered, tiered

NOW = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)
"""Long after the last of the days."""


def run() -> list[dict[str, Any]]:
    """Rows: seconds of wall and processor, bytes and memory."""
    policy = RetentionPolicy(name="all", max_days=30)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data=Path(folder), cold=ColdSettings(lock="none"), retention=RetentionSettings(policies=[policy]))
        with tiered(settings) as rig:
            sessions = list(fill(rig, days=1))
            _repeat(rig)
            held = sessions[::100]
            return _retain(rig, sessions, held, _copy(rig, held))


def _repeat(rig: Tiered) -> None:
    """Put the segments of the first day under each other day too, and enter them."""
    (first,) = rig.ledger.entries(0)
    for day in range(2, DAYS + 1):
        name = f"2026-01-{day:02d}"
        text = orjson.dumps(first.body).replace(first.body["day"].encode(), name.encode())
        body = {**orjson.loads(text), "coverage": []}
        for old, new in zip(first.body["segments"], body["segments"], strict=True):
            rig.objects.create(new["key"], rig.objects.get(old["key"]))
        rig.ledger.append(ENTRY_TYPE, body)
    rig.tiering().reconcile()


def _copy(rig: Tiered, held: list[str]) -> tuple[float, float]:
    """Seconds (wall, processor) in which DuckDB alone writes the rows of the held sessions to files."""
    settings = rig.settings.sql
    with duck.connect(threads=settings.threads, memory_limit=f"{settings.memory_mb}MB") as connection:
        connection.execute("CREATE TABLE held (session_id BLOB)")
        connection.executemany("INSERT INTO held VALUES (?)", [[bytes.fromhex(session)] for session in held])
        began = time.process_time()
        with timed() as took:
            for number, segment in enumerate(rig.catalog.snapshot().segments):
                kept = f"SELECT * FROM ({events_sql([], [rig.objects.read_url(segment.key, expires_s=60)])})"
                order = 'ORDER BY session_id, "partition", "offset"'
                target = rig.settings.data / f"{number}.parquet"
                connection.execute(f"COPY ({kept} WHERE session_id IN (FROM held) {order}) TO '{target}' ({COPY})")
        return took[0], time.process_time() - began


def _retain(rig: Tiered, sessions: list[str], held: list[str], copied: tuple[float, float]) -> list[dict[str, Any]]:
    control = open_control(rig.settings)
    Holds(rig.tiering(), control).place(Selector(sessions=tuple(held)), by="ada", reason="matter")
    control.close()
    before, began = peak_mb(reset=True), time.process_time()
    with timed() as took:
        done = Retention(rig.tiering(), now=lambda: NOW).apply()
    used, grown = time.process_time() - began, peak_mb() - before
    live = {segment.key for segment in rig.catalog.snapshot().segments}
    left = dict(rig.objects.remains("events/"))
    if set(left) != live or any(count != 1 for count in left.values()):
        raise RuntimeError("objects are left that no live segment is")
    what = f"{EVENTS:,} events of {DAYS} days, {DAYS * len(sessions):,} sessions by day, 1 % held"
    return [
        _beside(f"retention over {what}", took[0], "s", copied[0]),
        _beside("its processor time", used, "s", copied[1]),
        {"what": "events gone", "value": done["events"], "unit": "", "beside": "held", "beside_value": done["held"]},
        {"what": "bytes gone, listed", "value": done["bytes"], "unit": "B"},
        {"what": "memory at its peak beyond what was used before", "value": grown, "unit": "MB", "reach": "flat"},
    ]


def _beside(what: str, value: float, unit: str, beside: float) -> dict[str, Any]:
    row = {"what": what, "value": value, "unit": unit, "beside": "DuckDB COPY of what stays", "beside_value": beside}
    return {**row, "ratio": value / beside, "reach": "≤ 60 s at 10 M" if "retention" in what else None}
