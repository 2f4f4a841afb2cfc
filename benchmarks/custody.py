"""The erasure of one session among many cold events; and those events, for `benchmarks.retention`.

`BENCH_CUSTODY_EVENTS` scales it. Segments of `DAYS` days are made by tiering a share of the events under each day.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lifecycle.erasure import Erasures
from schemas.settings import ColdSettings, Settings
from store.control import open_control
from store.indexer import Indexer
from tests.eventgen import many
from tests.tiered import Tiered, tiered

EVENTS = int(os.environ.get("BENCH_CUSTODY_EVENTS", "200000"))

DAYS = 10
"""As many closed days; all but the last are due."""

_BATCH = 10_000


def run() -> list[dict[str, Any]]:
    """Rows: seconds and bytes."""
    with tempfile.TemporaryDirectory() as folder, tiered(Settings(data=Path(folder), cold=ColdSettings(lock="none"))) as rig:
        return _erase(rig, list(fill(rig))[-1])


def fill(rig: Tiered) -> Iterator[str]:
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
    with timed() as took:
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


@contextmanager
def timed() -> Iterator[list[float]]:
    """Seconds that the block took."""
    took: list[float] = []
    began = time.monotonic()
    yield took
    took.append(time.monotonic() - began)
