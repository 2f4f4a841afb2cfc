"""Retention over many cold events of which 1 % of the sessions are held, and the erasure of one session among them.

`BENCH_CUSTODY_EVENTS` scales it. Segments of `DAYS` days and two tenants are made by tiering one day's events under several days.
"""

from __future__ import annotations

import datetime as dt
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lifecycle.erasure import Erasures
from lifecycle.holds import Holds
from lifecycle.retention import Retention
from lifecycle.selectors import Selector
from schemas.settings import ColdSettings, RetentionPolicy, RetentionSettings, Settings
from store.control import open_control
from store.indexer import Indexer
from tests.eventgen import many
from tests.tiered import Tiered, tiered

EVENTS = int(os.environ.get("BENCH_CUSTODY_EVENTS", "200000"))

DAYS = 10
"""As many closed days; all but the last are due."""

_BATCH = 10_000


def run() -> list[dict[str, Any]]:
    """Rows: rates, seconds, bytes and memory."""
    policy = RetentionPolicy(name="all", max_days=30)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data=Path(folder), cold=ColdSettings(lock="none"), retention=RetentionSettings(policies=[policy]))
        with tiered(settings) as rig:
            sessions = list(_fill(rig))
            return [*_erase(rig, sessions[-1]), *_retain(rig, sessions)]


def _fill(rig: Tiered) -> Iterator[str]:
    """Tier a day's share of the events at a time; the sessions, hex."""
    for day in range(1, DAYS + 1):
        seen: dict[str, None] = {}
        batch = []
        for entry in many(rig.producer, EVENTS // DAYS):
            seen[entry.key.hex()] = None
            batch.append(entry)
            if len(batch) == _BATCH:
                rig.log.append(batch)
                batch = []
        if batch:
            rig.log.append(batch)
        Indexer(rig.settings, rig.log, rig.registry).run_once()
        rig.set_day(f"2026-01-{day:02d}")
        rig.tier()
        yield from seen


def _erase(rig: Tiered, session: str) -> list[dict[str, Any]]:
    control = open_control(rig.settings)
    erasures = Erasures(rig.tiering(), rig.log, control)
    asked = erasures.request((session,), None, by="ada", reason="asked")
    with _timed() as took:
        done = erasures.approve(asked, by="bob")
    control.close()
    live = len(rig.catalog.snapshot().segments)
    return [
        {"what": f"erasure of 1 session among {EVENTS:,} events", "value": took[0], "unit": "s"},
        {"what": "segments rewritten for it", "value": done["segments"], "unit": "", "beside": "segments there are", "beside_value": live},
        {
            "what": "bytes read for it",
            "value": done["bytes_read"],
            "unit": "B",
            "beside": "bytes written",
            "beside_value": done["bytes_written"],
        },
    ]


def _retain(rig: Tiered, sessions: list[str]) -> list[dict[str, Any]]:
    control = open_control(rig.settings)
    Holds(rig.tiering(), control).place(Selector(sessions=tuple(sessions[::100])), by="ada", reason="matter")
    control.close()
    before, rows = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rig.table("kind = 'session_opened'").num_rows
    with _timed() as took:
        done = Retention(rig.tiering(), now=lambda: dt.datetime(2026, 11, 20, tzinfo=dt.UTC)).apply()
    live = {segment.key for segment in rig.catalog.snapshot().segments}
    left = dict(rig.objects.remains("events/"))
    if set(left) != live or any(count != 1 for count in left.values()):
        raise RuntimeError("objects are left that no live segment is")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    return [
        {"what": f"retention over {EVENTS:,} events, {rows:,} sessions, 1 % held", "value": took[0], "unit": "s"},
        {"what": "events gone", "value": done["events"], "unit": "", "beside": "held", "beside_value": done["held"]},
        {"what": "bytes gone, listed", "value": done["bytes"], "unit": "B"},
        {"what": "memory beyond what tiering used", "value": grown, "unit": "MB", "reach": "flat"},
    ]


@contextmanager
def _timed() -> Iterator[list[float]]:
    took: list[float] = []
    began = time.monotonic()
    yield took
    took.append(time.monotonic() - began)
