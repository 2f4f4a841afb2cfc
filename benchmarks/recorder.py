"""What recording costs the caller, and how fast one core encodes: figures that a request path depends on."""

from __future__ import annotations

import queue
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ingest.coalesce import Coalescer, delta_of
from ingest.encoding import Stamp, encode
from ingest.recorder import Recorder
from schemas.codec import encode_payload, join
from schemas.events import (
    ChunkContent,
    GenerationContent,
    GenerationStarted,
    Message,
    Payload,
    RequestContent,
    RequestSubmitted,
    SequenceFinished,
    TokenChunk,
)
from schemas.settings import LogSettings, RecorderSettings
from schemas.sink import SessionContext, new_id
from store.log import open_log

# Calls per measurement of latency; p99 then stands on five hundred calls.
_CALLS = 50_000
# A busy gateway records about this often; between two calls its thread does other things.
_PAUSE_S = 20e-6
_EVENTS = 100_000
# The same of what takes fastavro ten times as long.
_SLOW = 10_000


def run() -> list[dict[str, Any]]:
    """Rows of the table: what, value, unit, beside, ratio."""
    return [*_latency(), *_throughput()]


def main() -> None:
    """Print the rows."""
    for row in run():
        print(f"{row['what']:58} {row['value']:>12,.2f} {row['unit']:10} {row['ratio']:>8.2f} x {row['beside']}")


def _latency() -> list[dict[str, Any]]:
    """`record` with a log behind it against an empty call and `queue.put`, each between pauses."""
    session = SessionContext(new_id(), "benchmark", "sdk")
    payload = SequenceFinished(generation_id=new_id(), index=0, tokens=1)
    generation = new_id()
    empty = _quantiles(lambda i: None)
    bounded: queue.Queue[Any] = queue.Queue(2 * _CALLS)
    put = _quantiles(lambda i: bounded.put((session, payload)))
    with tempfile.TemporaryDirectory() as folder:
        log = open_log(LogSettings(), Path(folder))
        recorder = Recorder(log, RecorderSettings(queue_max=4 * _CALLS))
        record = _quantiles(lambda i: recorder.record(session, payload))
        tokens = _quantiles(lambda i: recorder.tokens(session, generation, 0, i, i, token_ids=(i,), text=" word"))
        recorder.close()
        log.close()
    rows = []
    for name, (p50, p99) in (("record()", record), ("tokens(), one token", tokens)):
        for quantile, value, base, other in (("p50", p50, empty[0], put[0]), ("p99", p99, empty[1], put[1])):
            rows.append(_row(f"{name} {quantile}", value, "µs", "an empty call", value / base))
            rows.append(_row(f"{name} {quantile}", value, "µs", f"queue.put ({other:.2f} µs)", value / other))
    return rows


def _quantiles(call: Callable[[int], object]) -> tuple[float, float]:
    """p50 and p99 of one call in µs."""
    clock = time.perf_counter_ns
    times = []
    for i in range(_CALLS):
        start = clock()
        call(i)
        times.append(clock() - start)
        until = start + int(_PAUSE_S * 1e9)
        while clock() < until:
            pass
    times.sort()
    return times[len(times) // 2] / 1000, times[len(times) * 99 // 100] / 1000


def _throughput() -> list[dict[str, Any]]:
    """Events per second from payload or delta to log entry in one thread."""
    rows = []
    for tokens in (1, 4):
        payload = _chunk(tokens)
        base = _generic(payload)
        for name, rate in (("record(TokenChunk) to entry", _encoding(payload)), ("tokens() to entry", _coalescing(tokens))):
            rows.append(_row(f"{name}, {tokens} token(s) per event", rate, "events/s", f"fastavro ({base:,.0f} events/s)", rate / base))
    for payload in (_request(), _started()):
        base = _rate(lambda: encode_payload(payload.KIND, payload.model_dump()), _SLOW)  # noqa: B023  measured at once
        rate = _rate(lambda: encode(payload), _SLOW)  # noqa: B023  measured at once
        rows.append(_row(f"{payload.KIND} to bytes", rate, "events/s", f"fastavro ({base:,.0f} events/s)", rate / base))
    rate = _whole()
    rows.append(_row("record() to durable in the embedded log, whole process", rate, "events/s", "60,000 events/s", rate / 60_000))
    return rows


def _chunk(tokens: int) -> Payload:
    content = ChunkContent(token_ids=[35_012] * tokens, text=" word" * tokens, lengths=[5] * tokens, logprobs=[-0.25] * tokens)
    return TokenChunk(generation_id=new_id(), index=0, position=17, offsets_us=[1_234_567] * tokens, content=content)


def _request() -> Payload:
    """A request of two messages, as a gateway's clients send it."""
    messages = [Message(message_id=new_id(), role=role, body="What does the tape keep? " * 8) for role in ("system", "user")]
    ids, content = [message.message_id for message in messages], RequestContent(messages=messages, parameters='{"stream":true}')
    facts: dict[str, Any] = {"model": "tiny", "stream": True, "seed": 1847, "client_address": "127.0.0.1", "priority": "interactive"}
    return RequestSubmitted(generation_id=new_id(), endpoint="/v1/chat/completions", message_ids=ids, content=content, **facts)


def _started() -> Payload:
    """An answer to a prompt of 48 tokens."""
    content = GenerationContent(prompt_token_ids=list(range(35_000, 35_048)))
    return GenerationStarted(generation_id=new_id(), authoritative="gateway", model="tiny", prompt_tokens=48, content=content)


def _generic(payload: Payload) -> float:
    session, now = SessionContext(new_id(), "benchmark", "sdk"), time.time_ns() // 1000
    event_id, producer_id = new_id(), bytes(8)

    def one() -> None:
        join(event_id, session.encoded, producer_id, 1, now, encode_payload(payload.KIND, payload.model_dump()))

    return _rate(one)


def _encoding(payload: Payload) -> float:
    session, stamp = SessionContext(new_id(), "benchmark", "sdk"), Stamp(4)
    now = time.time_ns() // 1000
    return _rate(lambda: stamp.entry(session, encode(payload), now))


def _coalescing(tokens: int) -> float:
    session, stamp, generation = SessionContext(new_id(), "benchmark", "sdk"), Stamp(4), new_id()
    coalescer = Coalescer(span_s=1.0, tokens_max=tokens)
    now = time.time_ns() // 1000

    def one() -> None:
        for i in range(tokens):
            delta = delta_of(generation, 0, i, 1_234_567, "content", (35_012,), " word", (-0.25,))
            for chunk in coalescer.add(session, delta, now, 0.0):
                stamp.entry(session, chunk.encode(), now)

    return _rate(one)


def _whole() -> float:
    """Two threads and the disk as well, so less than encoding alone."""
    session, payload = SessionContext(new_id(), "benchmark", "sdk"), _chunk(1)
    with tempfile.TemporaryDirectory() as folder:
        log = open_log(LogSettings(), Path(folder))
        recorder = Recorder(log, RecorderSettings())
        start = time.perf_counter()
        for _ in range(_EVENTS):
            recorder.record(session, payload)
        recorder.flush()
        took = time.perf_counter() - start
        recorder.close()
        log.close()
    return _EVENTS / took


def _rate(call: Callable[[], object], times: int = _EVENTS) -> float:
    """Events per second, the best of three runs."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for _ in range(times):
            call()
        best = min(best, time.process_time() - start)
    return times / best


def _row(what: str, value: float, unit: str, beside: str, ratio: float) -> dict[str, Any]:
    return {"what": what, "value": value, "unit": unit, "beside": beside, "ratio": ratio}


if __name__ == "__main__":
    main()
