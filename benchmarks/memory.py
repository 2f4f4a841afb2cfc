"""Memory of indexer and gateway while millions of events go by: the curve, and how much it grew after the first tenth."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from benchmarks.gateway import TOKENS, gateway, measure, process, stub
from schemas.settings import Settings
from store.log import open_log
from tests.eventgen import Producer, many

EVENTS = int(os.environ.get("BENCH_EVENTS", "5000000"))
POINTS = 20

STREAMS = EVENTS // 125
"""Streams through the gateway, of about eight events and 64 tokens each: as many as pass in a few minutes."""


def run() -> list[dict[str, Any]]:
    """Rows: resident memory of the indexer and of the gateway along the way, and its growth."""
    with tempfile.TemporaryDirectory() as folder:
        indexer = _indexer_curve(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        passed = _gateway_curve(Path(folder))
    return [*_rows("indexer", "events", indexer), *_rows("gateway", f"streams of {TOKENS} tokens", passed)]


def _rows(part: str, unit: str, curve: list[tuple[int, float]]) -> list[dict[str, Any]]:
    early = curve[len(curve) // 10][1]
    rows = [{"what": f"{part} resident after {count:,} {unit}", "value": mb, "unit": "MB"} for count, mb in curve]
    grown = {"what": f"{part} growth from the first tenth to the end", "value": curve[-1][1] - early, "unit": "MB"}
    return [*rows, {**grown, "beside": "after the first tenth", "beside_value": early, "ratio": curve[-1][1] / early, "reach": "flat"}]


def _gateway_curve(folder: Path) -> list[tuple[int, float]]:
    """Streams in batches, and the gateway's memory after each."""
    curve = []
    with process(stub) as upstream, process(gateway, upstream.url, str(folder)) as target:
        for point in range(1, POINTS + 1):
            measure(target.url, streams=STREAMS // POINTS, parallel=16)
            curve.append((point * (STREAMS // POINTS), _resident_mb(target.pid)))
    return curve


def _indexer_curve(folder: Path) -> list[tuple[int, float]]:
    settings = Settings(data=folder)
    log = open_log(settings.log, folder)
    command = [sys.executable, "-m", "tokentape.cli", "--data", str(folder), "up", "--only", "indexer"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    curve, batch, done = [], [], 0
    try:
        for entry in many(Producer(partitions=log.partitions), EVENTS):
            batch.append(entry)
            if len(batch) == 5000:
                log.append(batch)
                done, batch = done + len(batch), []
                if done % (EVENTS // POINTS) < 5000:
                    curve.append((done, _resident_mb(process.pid)))
        _until_idle(process.pid)
        curve.append((EVENTS, _resident_mb(process.pid)))
    finally:
        log.close()
        process.terminate()
        process.wait(120)
    return curve


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _until_idle(pid: int) -> None:
    """Wait until the process uses no processor time any more: it has caught up."""
    last, quiet = -1, 0
    while quiet < 8:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        used = int(fields[11]) + int(fields[12])
        quiet = quiet + 1 if used - last < 10 else 0
        last = used
        threading.Event().wait(0.5)
