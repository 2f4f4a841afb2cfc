"""A conversation that brings its whole history with each turn: what the tape holds, beside the text that is new.

200 turns through the gateway, recorded by the embedded log. The new text is that of each message once, as the client sent it.
"""

from __future__ import annotations

import random
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson

from benchmarks.gateway import _WORDS, process, stub
from ingest.gateway import serve
from ingest.recorder import Recorder
from schemas.codec import decode
from schemas.events import RequestSubmitted
from schemas.registry import SchemaRegistry
from schemas.requests import dump
from schemas.settings import GatewaySettings, Settings
from store.log import open_log

TURNS = 200

CHARACTERS = (400, 4_000)
"""Shortest and longest message: a question, and an answer of some hundred tokens."""

REACH = 1.3
"""Bytes of requests on the tape for each byte of new text."""


def run() -> list[dict[str, Any]]:
    """Rows: bytes of the requests on the tape, whole and halfway, beside the new text and what was sent."""
    messages = list(_messages())
    requests = [messages[: 2 * turn + 1] for turn in range(TURNS)]
    with tempfile.TemporaryDirectory() as folder:
        taped = _taped(Path(folder), requests)
    sizes = [len(dump(message)) for message in messages]
    new, sent = sum(sizes[: 2 * TURNS - 1]), sum(sum(sizes[: 2 * turn + 1]) for turn in range(TURNS))
    half, new_half = sum(taped[: TURNS // 2]), sum(sizes[: TURNS - 1])
    total = sum(taped)
    return [
        _row(f"requests of {TURNS} turns on the tape", total, "new text", new, f"≤ {REACH}"),
        _row(f"requests of the first {TURNS // 2} turns", half, "new text", new_half, f"≤ {REACH}"),
        _row(f"requests of {TURNS} turns on the tape", total, "what clients sent", sent, None),
    ]


def _row(what: str, value: int, beside: str, beside_value: int, reach: str | None) -> dict[str, Any]:
    row = {"what": what, "value": value, "unit": "bytes", "beside": beside, "beside_value": beside_value, "ratio": value / beside_value}
    return {**row, "reach": reach}


def _messages() -> Iterator[dict[str, str]]:
    """A question and an answer in turn, seeded, so that each run has the same."""
    chance = random.Random(7)
    for number in range(2 * TURNS):
        length, text = chance.randint(*CHARACTERS), ""
        while len(text) < length:
            text += chance.choice(_WORDS)
        yield {"role": "assistant" if number % 2 else "user", "content": text}


def _taped(folder: Path, requests: list[list[dict[str, str]]]) -> list[int]:
    """The bytes of each request's event in the log."""
    with process(stub) as upstream, _gateway(folder, upstream.url) as (url, log, recorder):
        headers = {"x-tokentape-session": str(uuid.uuid4())}
        with httpx.Client(timeout=60) as client:
            for messages in requests:
                body = orjson.dumps({"model": "tiny", "messages": messages, "stream": True})
                client.post(f"{url}/v1/chat/completions", content=body, headers=headers).raise_for_status()
        recorder.flush(60)
        framed = [value for partition in range(log.partitions) for value in log.read(partition, 0, limit=1_000_000).values]
    registry = SchemaRegistry()
    return [len(value) for value in framed if isinstance(decode(value, registry).payload, RequestSubmitted)]


@contextmanager
def _gateway(folder: Path, upstream: str) -> Iterator[tuple[str, Any, Recorder]]:
    settings = Settings(data=folder, gateway=GatewaySettings(port=0, upstream=upstream))
    log = open_log(settings.log, folder)
    recorder = Recorder(log, settings.recorder, source="gateway")
    stop, ready, urls = threading.Event(), threading.Event(), list[str]()

    def started(url: str) -> None:
        urls.append(url)
        ready.set()

    thread = threading.Thread(target=serve, args=(settings, recorder, stop), kwargs={"ready": started})
    thread.start()
    ready.wait(60)
    try:
        yield urls[0], log, recorder
    finally:
        stop.set()
        thread.join()
        recorder.close()
        log.close()


def main() -> None:
    """Print the rows."""
    for row in run():
        print(f"{row['what']:42} {row['value']:>12,} {row['unit']}  {row['ratio']:>7.3f} x {row['beside']}")


if __name__ == "__main__":
    main()
