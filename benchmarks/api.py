"""The REST API in a process of its own: how far a followed session is behind its events, and the list beside an indexer at full rate.

`BENCH_API_EVENTS` is the tape that the list is of; as many again are in the log when the indexer is let loose on them.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from ingest.recorder import Recorder
from schemas.events import SessionAnnotated
from schemas.settings import Settings
from schemas.sink import SessionContext, new_id
from store.indexer import Indexer
from store.log import open_log
from tests.eventgen import Producer, many

EVENTS = int(os.environ.get("BENCH_API_EVENTS", "1000000"))
RATE, SECONDS = 50, 20
"""Requests per second, begun at their times whatever the answers do, and for how long."""
FOLLOWED = 20
"""Events that a follower waits for."""
LIST = "/api/v1/debug-sessions?limit=20"


def run() -> list[dict[str, Any]]:
    """Rows: the follower's lag, the first list, and times of the list."""
    with tempfile.TemporaryDirectory() as name:
        settings = Settings(data=Path(name))
        log = open_log(settings.log, settings.data)
        producer = Producer(partitions=log.partitions)
        _fill(log, producer)
        Indexer(settings, log).run_once()
        with _part(settings, "api") as url:
            began = time.perf_counter()
            httpx.get(url + LIST, timeout=120).raise_for_status()
            first = time.perf_counter() - began
            quiet = asyncio.run(_load(url))
            with _part(settings, "indexer"):
                behind = _followed(settings, log, url)
            _fill(log, producer)
            waits = _lag(url)
            with _part(settings, "indexer"):
                busy = asyncio.run(_load(url))
                left = _lag(url)
        log.close()
    rate = f"{RATE} requests/s"
    indexed = f"an indexer that took {waits - left:,} events meanwhile"
    return [
        {"what": "an event at who follows its session, p50", "value": statistics.median(behind), "unit": "s", "reach": "≤ 2 s"},
        {"what": "an event at who follows its session, worst", "value": max(behind), "unit": "s", "reach": "≤ 2 s"},
        {"what": f"first list of an API that was just started over {EVENTS:,} events", "value": first, "unit": "s"},
        _row(f"list of sessions at {rate} beside {indexed}, p50", 50, busy, quiet, None),
        _row(f"list of sessions at {rate} beside {indexed}, p99", 99, busy, quiet, "≤ 100 ms"),
    ]


def _row(what: str, percent: int, took: list[float], alone: list[float], reach: str | None) -> dict[str, Any]:
    value, other = (sorted(times)[percent * len(times) // 100] * 1e3 for times in (took, alone))
    beside = {"beside": "without the indexer", "beside_value": other, "ratio": value / other}
    return {"what": what, "value": value, "unit": "ms", **beside, "reach": reach}


def _fill(log: Any, producer: Producer) -> None:
    batch = []
    for entry in many(producer, EVENTS):
        batch.append(entry)
        if len(batch) == 5000:
            log.append(batch)
            batch = []
    log.append(batch)


@contextmanager
def _part(settings: Settings, name: str) -> Iterator[str]:
    """A part of the installation as `tokentape up` runs it; its address, if it has one."""
    options = ["--data", str(settings.data), "--set", "api.port=0", "--set", "gateway.port=0"]
    command = [sys.executable, "-m", "tokentape.cli", *options, "up", "--only", name]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            while not (told := list((settings.data / "run").glob(f"{name}-*.json"))):
                if process.poll() is not None:
                    raise RuntimeError(f"tokentape up --only {name} ended with {process.returncode}")
                time.sleep(0.05)
            yield str(json.loads(told[0].read_text()).get("url"))
        finally:
            process.terminate()


def _lag(url: str) -> int:
    """Events in the log that are not indexed."""
    return int(httpx.get(f"{url}/api/v1/status", timeout=120).json()["log"]["lag"])


async def _load(url: str) -> list[float]:
    """Seconds that each request took, from when it was due."""
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=64, keepalive_expiry=2)) as client:
        began = time.perf_counter()

        async def one(number: int) -> float:
            due = began + number / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            (await client.get(LIST)).raise_for_status()
            return time.perf_counter() - due

        return list(await asyncio.gather(*(one(number) for number in range(RATE * SECONDS))))


def _followed(settings: Settings, log: Any, url: str) -> list[float]:
    """Seconds from the call that records an event to its arrival at who follows the session."""
    session = SessionContext(new_id(), "default", "sdk")
    recorder = Recorder(log, settings.recorder, source="sdk")
    came: dict[str, float] = {}
    recorded: dict[str, float] = {}
    all_there = threading.Event()

    def annotate(tag: str) -> None:
        recorded[tag] = time.perf_counter()
        recorder.record(session, SessionAnnotated(tags_added=[tag]))

    def listen() -> None:
        path = f"{url}/api/v1/debug-sessions/{uuid.UUID(bytes=session.session_id)}/events"
        with httpx.stream("GET", path, headers={"accept": "text/event-stream"}, timeout=120) as answer:
            for line in answer.iter_lines():
                for tag in [tag for tag in recorded if tag not in came and f'"{tag}"' in line]:
                    came[tag] = time.perf_counter()
                if len(came) > FOLLOWED:
                    return all_there.set()
        return None

    try:
        annotate("first")
        recorder.flush()
        time.sleep(8)  # until it is in an answer at all
        threading.Thread(target=listen, daemon=True).start()
        for number in range(FOLLOWED):
            time.sleep(0.63)
            annotate(f"event {number}")
        if not all_there.wait(60):
            raise RuntimeError(f"{len(came)} of {FOLLOWED + 1} events came to who follows")
    finally:
        recorder.close()
    return [came[tag] - recorded[tag] for tag in recorded if tag != "first"]
