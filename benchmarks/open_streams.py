"""Two thousand streams open at once at ten tokens a second each: does one get lost, what does each cost, does memory grow."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import uvloop

from benchmarks.gateway import gateway, process, stub

STREAMS = int(os.environ.get("BENCH_STREAMS", "2000"))
SECONDS = 40
# A token of each stream comes in this time; on a machine that cannot carry the load itself, a longer one still shows memory.
PACE_S = float(os.environ.get("BENCH_PACE_S", "0.1"))
# What is needed once (connections, buffers, the log's cache) has been taken after so long.
_SETTLE_S = 5.0


def run() -> list[dict[str, Any]]:
    """Rows: streams that came through whole, memory per open stream, and the slope while all were open."""
    with tempfile.TemporaryDirectory() as folder, process(stub) as upstream, process(gateway, upstream.url, folder) as target:
        _in_child(target.url, 64, 10)
        idle = _resident_mb(target.pid)
        curve: list[tuple[float, float]] = []
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=(target.pid, curve, done))
        watch.start()
        whole, tokens, elapsed, opened, ended = _in_child(target.url, STREAMS, round(SECONDS / PACE_S))
        done.set()
        watch.join()
    began = curve[0][0]
    steady = [(at - began, mb) for at, mb in curve if opened + _SETTLE_S < at - began < ended]
    if not steady:
        raise RuntimeError(
            f"not all streams were open at once: this machine does not carry {STREAMS / PACE_S:,.0f} tokens/s; BENCH_PACE_S=0.2"
        )
    peak = max(mb for _, mb in steady)
    return [
        {"what": "open streams that came through whole", "value": whole, "unit": "streams", "beside": "opened", "beside_value": STREAMS,
         "ratio": whole / STREAMS, "reach": "1"},
        {"what": "their tokens", "value": tokens / elapsed, "unit": "1/s", "beside": "paced at", "beside_value": STREAMS / PACE_S,
         "ratio": tokens / elapsed * PACE_S / STREAMS},
        {"what": "memory per open stream", "value": (peak - idle) * 1e3 / STREAMS, "unit": "kB"},
        {"what": f"slope while {STREAMS:,} are open", "value": _slope(steady) * 60, "unit": "MB/min", "beside": "MB at the peak",
         "beside_value": peak, "reach": "flat"},
    ]  # fmt: skip


def _in_child(url: str, streams: int, tokens: int) -> tuple[int, int, float, float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: tuple[int, int, float, float, float] = pool.apply(_drive, (url, streams, tokens))
    return found


def _drive(url: str, streams: int, tokens: int) -> tuple[int, int, float, float, float]:
    """Streams that came whole, their tokens, how long all took, when the last was opened, and when the first ended."""
    _allow_files()
    host, _, port = url.removeprefix("http://").partition(":")
    body = orjson.dumps(
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Go on."}],
            "stream": True,
            "user": f"paced {PACE_S}",
            "max_tokens": tokens,
        }
    )
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    opened, ended = 0.0, math.inf

    async def client(number: int) -> int:
        nonlocal opened, ended
        await asyncio.sleep(number * 0.005)  # arriving one by one
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + body)
        seen, tail = 0, b""
        while not tail.endswith(b"0\r\n\r\n"):
            piece = await reader.read(65536)
            if not piece:
                break
            opened = opened if seen else time.perf_counter() - began
            seen += piece.count(b'"content":"') - piece.count(b'"content":""')
            tail = (tail + piece)[-32:]
        writer.close()
        ended = min(ended, time.perf_counter() - began)
        return seen if b"[DONE]" in tail else -1

    async def main() -> list[int]:
        return await asyncio.gather(*map(client, range(streams)))

    began = time.perf_counter()
    counts = uvloop.run(main())
    return counts.count(tokens), sum(counts), time.perf_counter() - began, opened, ended


def _allow_files() -> None:
    """A socket per stream."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _watch(pid: int, curve: list[tuple[float, float]], done: threading.Event) -> None:
    while not done.wait(0.5):
        curve.append((time.perf_counter(), _resident_mb(pid)))


def _slope(curve: list[tuple[float, float]]) -> float:
    """MB per second of the line that fits best."""
    at, mb = (sum(column) / len(curve) for column in zip(*curve, strict=True))
    slope: float = sum((x - at) * (y - mb) for x, y in curve) / sum((x - at) ** 2 for x, _ in curve)
    return slope


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
