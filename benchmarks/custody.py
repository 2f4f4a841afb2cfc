"""Tiering and verification beside what they must do at least, the erasure of one session, and one session in a year of days.

`BENCH_CUSTODY_EVENTS` scales it. Segments of `DAYS` days are made by tiering a share of the events under each day; the last
day's rows are also written by DuckDB's COPY alone, as segments are, and what is verified is also read by SHA-256 alone. The year
(`BENCH_CUSTODY_YEAR` days, four tenants) stands in MinIO behind a relay that counts requests.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.query import minio, relay
from lifecycle.erasure import Erasures
from schemas.settings import ColdSettings, Settings
from store import duck
from store.control import open_control
from store.hot import attach
from store.indexer import Indexer
from store.reader import EventReader
from tests.eventgen import conversation, many
from tests.tiered import Tiered, tiered

EVENTS = int(os.environ.get("BENCH_CUSTODY_EVENTS", "200000"))

DAYS = 10
"""As many closed days; all but the last are due."""

YEAR = int(os.environ.get("BENCH_CUSTODY_YEAR", "365"))
LOOKED_AT = 30

COPY = "FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 15, PARQUET_VERSION V2, ROW_GROUP_SIZE 20480, WRITE_BLOOM_FILTER false"
"""As segments are written."""

COPY_MEMORY = "8GB"
"""What DuckDB may take for it: with the 2 GB that the program gives it, it ends at a million rows, sorted as they have to be."""

_BATCH = 10_000
_TENANTS = ("acme", "beta", "gamma", "zeta")


def run() -> list[dict[str, Any]]:
    """Rows: rates beside what is the least, seconds, bytes and requests."""
    with tempfile.TemporaryDirectory() as folder, tiered(Settings(data=Path(folder), cold=ColdSettings(lock="none"))) as rig:
        copied, took, peaks = list[float](), list[float](), list[float]()

        def tier() -> None:
            copied.append(_copy_of_hot(rig))
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                seconds, peak = alone.submit(_tier_alone, rig.settings).result()
            took.append(seconds)
            peaks.append(peak)

        sessions = list(fill(rig, tier=tier))
        tiering = _rate("tiering, write, read back and prove", EVENTS // DAYS, took, "DuckDB COPY of the same rows", copied, "≥ 0.6")
        what = "memory at its peak of a process that tiers, all of it"
        memory = {"what": what, "value": max(peaks), "unit": "MB", "reach": "≤ 1,000 at 10 M"}
        rows = [tiering, memory, *_verified(rig), *_erase(rig, sessions[-1])]
    with tempfile.TemporaryDirectory() as folder:
        return [*rows, *_year(Path(folder))]


def _tier_alone(settings: Settings) -> tuple[float, float]:
    """Seconds that tiering takes, and the most memory (MB) of the process, which does nothing else."""
    with tiered(settings) as rig:
        with timed() as took:
            rig.tier()
        return took[0], peak_mb()


def fill(rig: Tiered, *, days: int = DAYS, tier: Callable[[], object] | None = None) -> Iterator[str]:
    """Tier a day's share of the events at a time, by `tier` if that is given; the sessions, hex."""
    for day in range(1, days + 1):
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
        (tier or rig.tier)()
        yield from seen


def _copy_of_hot(rig: Tiered) -> float:
    """Seconds in which DuckDB alone writes what is hot to a file, sorted and compressed as a segment is."""
    with duck.connect(threads=rig.settings.sql.threads, memory_limit=COPY_MEMORY, temp_directory=str(rig.settings.data)) as connection:
        hot = attach(connection, rig.catalog.snapshot().shards)
        target = rig.settings.data / "copy.parquet"
        with timed() as took:
            order = 'ORDER BY session_id, "partition", "offset"'
            connection.execute(f"COPY (SELECT * FROM {hot} {order}) TO '{target}' ({COPY})")
        target.unlink()
    return took[0]


def _verified(rig: Tiered) -> Iterator[dict[str, Any]]:
    """Both ways of verifying, beside SHA-256 over the bytes of all objects."""
    with timed() as hashed:
        for info in rig.objects.list("events/"):
            hashlib.sha256(rig.objects.get(info.key)).digest()
    for what, deep, reach in (("by segment", False, "≥ 1,000,000/s"), ("deep", True, "≥ 50,000/s")):
        with timed() as took:
            found = rig.verification().report(deep=deep)
        if found.exit_code or (deep and found.events != EVENTS):
            raise RuntimeError(f"verification says {found.to_dict()}")
        yield _rate(f"verify {what}", EVENTS, took, "hashlib.sha256 over the same bytes", hashed, reach)


def _rate(what: str, events: int, took: list[float], beside: str, theirs: list[float], reach: str) -> dict[str, Any]:
    """Events per second, at the medians."""
    value, other = (events / statistics.median(seconds) for seconds in (took, theirs))
    return {
        "what": what,
        "value": value,
        "unit": "events/s",
        "beside": beside,
        "beside_value": other,
        "ratio": value / other,
        "reach": reach,
    }


def _year(folder: Path) -> list[dict[str, Any]]:
    """One session out of a year's segments in MinIO."""
    with minio(folder) as cold, relay(cold.endpoint) as (endpoint, counted):
        settings = Settings(data=folder, cold=cold)
        sessions = []
        with tiered(settings) as rig:
            for day in range(YEAR):
                rig.producer.clock_us += 86_400_000_000
                contexts = [rig.producer.session(tenant=tenant) for tenant in _TENANTS]
                rig.ingest([entry for context in contexts for entry in conversation(rig.producer, session=context)])
                rig.set_day((dt.date(2026, 1, 1) + dt.timedelta(days=day)).isoformat())
                rig.tier()
                sessions += contexts
            away = settings.model_copy(update={"cold": cold.model_copy(update={"endpoint": endpoint})})
            reader = EventReader(away, rig.catalog)
            took, gets = [], []
            for context in random.Random(7).sample(sessions, min(LOOKED_AT, len(sessions))):
                before = counted()
                with timed() as seconds:
                    found = reader.table(context.session_id).num_rows
                if found != 27:
                    raise RuntimeError(f"{found} events of a session that has 27")
                took += seconds
                gets.append(counted() - before)
            reader.close()
            segments = len(rig.catalog.snapshot().segments)
    what = f"look-up of a session in {YEAR} days × {len(_TENANTS)} tenants, {segments:,} segments in MinIO"
    return [
        {"what": f"{what}, first of a process", "value": took[0] * 1e3, "unit": "ms", "reach": "≤ 300"},
        {"what": f"{what}, p50 of others", "value": statistics.median(took[1:]) * 1e3, "unit": "ms", "reach": "≤ 300"},
        {"what": "its requests, most", "value": max(gets), "unit": "GET", "reach": "≤ 10"},
    ]


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


def peak_mb(*, reset: bool = False) -> float:
    """The most memory that this process had since the last reset; Linux counts it."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
