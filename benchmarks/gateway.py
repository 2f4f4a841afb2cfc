"""What the gateway adds: beside its bare upstream, a pass-through of uvicorn and aiohttp, and LiteLLM's proxy.

Processes over real sockets: a stub that streams like vLLM (64 tokens; ids and logprobs when asked for) and the load on one
core, what is measured on another. Runs of the targets alternate, so that noise of the machine meets all of them; the
ratios are of medians over the rounds. Latency is measured with as many paced streams as take half of the gateway's core, and
LiteLLM's with as many as take half of its own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import orjson
import uvicorn
import uvloop

from benchmarks.litellm import proxy
from ingest.gateway import serve
from ingest.gateway.app import listen, url_of
from ingest.recorder import Recorder
from schemas.settings import GatewaySettings, LogSettings, RecorderSettings, Settings
from store.log import open_log

TOKENS = 64
# Paced streams show latency: one token in this time, a fast engine's pace for one stream.
_PACE_S = 0.004
_LATENCY_ROUNDS, _STREAMS_EACH = 3, 4
# Unpaced streams show throughput: as many at once as keep both cores busy.
_LOAD_ROUNDS, _LOAD_STREAMS, _LOAD_PARALLEL = 3, 320, 16
# So many paced streams at once tell what one costs; the slowest rival can carry them.
_PROBED = 4
# A rival that is slower by orders gets fewer streams, or a round would take minutes.
_RIVAL_STREAMS = 32

RIVALS = ("upstream", "pass-through", "litellm")
REACH = {"pass-through": "0.70", "litellm": "5"}

# A conversation has so many turns: each of them a session of its own would be the worst case, one for all the best.
_TURNS = 4

_WORDS = ["The", " tape", " keeps", " every", " token", ",", " and", " nothing", " is", " lost", ".", " Größe", " 東京", "\n"]


def run() -> list[dict[str, Any]]:
    """Rows of the table: what, value, unit, beside, ratio."""
    with ExitStack() as stack:
        targets = _targets(stack)
        for target in targets.values():
            measure(target.url, streams=32, parallel=8)  # connections, caches and the environment's capture
        load: dict[str, list[_Measured]] = {name: [] for name in targets}
        processor: dict[str, list[float]] = {name: [] for name in targets}
        for _ in range(_LOAD_ROUNDS):
            for name, target in targets.items():
                streams, before = _RIVAL_STREAMS if name == "litellm" else _LOAD_STREAMS, _processor_s(target.pid)
                load[name].append(measure(target.url, streams=streams, parallel=_LOAD_PARALLEL))
                processor[name].append((_processor_s(target.pid) - before) / streams)
        latency: dict[str, list[_Measured]] = {name: [] for name in targets}
        half = {name: _half_load(targets["litellm" if name == "litellm" else "gateway"]) for name in targets}
        for _ in range(_LATENCY_ROUNDS):
            for name, target in targets.items():
                parallel = half[name]
                latency[name].append(measure(target.url, paced=True, streams=_STREAMS_EACH * parallel, parallel=parallel))
    return [*_load_rows(load), *_processor_rows(processor), *_latency_rows(latency)]


def _half_load(target: Target) -> int:
    """How many paced streams at once take half of a core: paced tokens come one by one, so a stream costs more than under full load."""
    before = _processor_s(target.pid)
    measure(target.url, paced=True, streams=4 * _PROBED, parallel=_PROBED)
    spent = (_processor_s(target.pid) - before) / (4 * _PROBED)
    return max(1, round(0.5 / spent * TOKENS * _PACE_S))


class Target(NamedTuple):
    """A process that serves."""

    url: str
    pid: int


class _Measured:
    """Times of one run in seconds: to the first token, between reads after it, of whole streams, and of all."""

    def __init__(self, firsts: list[float], gaps: list[float], wholes: list[float], elapsed: float) -> None:
        self.firsts, self.gaps, self.wholes = sorted(firsts), sorted(gaps), sorted(wholes)
        self.elapsed = elapsed

    @property
    def streams_per_s(self) -> float:
        return len(self.wholes) / self.elapsed


def _latency_rows(latency: dict[str, list[_Measured]]) -> Iterator[dict[str, Any]]:
    for part, what in (("firsts", "first token"), ("gaps", "between tokens"), ("wholes", f"whole stream of {TOKENS}")):
        for quantile, share in (("p50", 0.5), ("p99", 0.99)):
            values = {
                name: statistics.median(getattr(run, part)[int(share * (len(getattr(run, part)) - 1))] for run in runs) * 1e3
                for name, runs in latency.items()
            }
            for rival in RIVALS:
                reach = "1 ms" if quantile == "p50" and rival == "pass-through" and part != "wholes" else None
                yield _row(f"added to {what}, {quantile}, half load", values["gateway"] - values[rival], "ms", rival, values, reach)


def _load_rows(load: dict[str, list[_Measured]]) -> Iterator[dict[str, Any]]:
    speeds = {name: statistics.median(run.streams_per_s for run in runs) for name, runs in load.items()}
    for rival in RIVALS:
        yield _row("streams, recording on", speeds["gateway"], "1/s", rival, speeds, REACH.get(rival))
    tokens = {name: speed * TOKENS for name, speed in speeds.items()}
    for rival in RIVALS[1:]:
        yield _row("tokens, recording on", tokens["gateway"], "1/s", rival, tokens, REACH.get(rival))


def _processor_rows(processor: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    """Processor time: what a core allows, which is the limit whatever else the machine does."""
    spent = {name: statistics.median(runs) * 1e3 for name, runs in processor.items()}
    for rival in RIVALS:
        yield _row("processor time of a stream", spent["gateway"], "ms", rival, spent, None)


def _row(what: str, value: float, unit: str, beside: str, values: dict[str, float], reach: str | None) -> dict[str, Any]:
    rival = values[beside]
    ratio = values["gateway"] / rival if rival else None
    return {"what": what, "value": value, "unit": unit, "beside": beside, "beside_value": rival, "ratio": ratio, "reach": reach}


def _processor_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _targets(stack: ExitStack) -> dict[str, Target]:
    """The targets, each a process on the last core; the stub, on the others with the load, is upstream of the rest."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    cores = os.sched_getaffinity(0)
    measured = {max(cores)}
    stack.callback(os.sched_setaffinity, 0, cores)
    os.sched_setaffinity(0, cores - measured or cores)
    upstream = stack.enter_context(process(stub))
    os.sched_setaffinity(0, measured)  # children inherit it
    through = stack.enter_context(process(_pass_through, upstream.url))
    ours = stack.enter_context(process(gateway, upstream.url, folder))
    rival = stack.enter_context(proxy(upstream.url, Path(folder)))
    os.sched_setaffinity(0, cores - measured or cores)
    return {"upstream": upstream, "pass-through": through, "gateway": ours, "litellm": Target(*rival)}


@contextmanager
def process(target: Callable[..., None], *arguments: str) -> Iterator[Target]:
    """A process that says its URL, and ends when the pipe to it closes."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=target, args=(theirs, *arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        yield Target(ours.recv(), child.pid or 0)
    finally:
        ours.close()
        child.join(30)


def _stop_event(pipe: Connection) -> threading.Event:
    stop = threading.Event()

    def wait() -> None:
        try:
            pipe.recv()
        except EOFError:
            stop.set()

    threading.Thread(target=wait, daemon=True).start()
    return stop


def gateway(pipe: Connection, upstream: str, folder: str) -> None:
    """The gateway before an upstream, recording into the embedded log of a folder."""
    settings = Settings(
        data=Path(folder), gateway=GatewaySettings(port=0, upstream=upstream), log=LogSettings(), recorder=RecorderSettings()
    )
    log = open_log(settings.log, settings.data)
    recorder = Recorder(log, settings.recorder, source="gateway")
    serve(settings, recorder, _stop_event(pipe), ready=pipe.send)
    recorder.close()
    log.close()


def _pass_through(pipe: Connection, upstream: str) -> None:
    """The least that a proxy does which is made of a common server and client library: no parsing, no recording, no time-outs."""
    client: list[aiohttp.ClientSession] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] == "lifespan.startup":
                client.append(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)))
                await send({"type": "lifespan.startup.complete"})
            await client[0].close()
            await send({"type": f"{message['type']}.complete"})
            return
        body = (await receive())["body"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"] if name not in (b"host", b"content-length")}
        async with client[0].post(upstream + scope["path"], data=body, headers=headers) as answer:
            passed = [(name, value) for name, value in answer.raw_headers if name.lower() != b"transfer-encoding"]
            await send({"type": "http.response.start", "status": answer.status, "headers": passed})
            while piece := await answer.content.readany():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        app, loop="none", http="httptools", ws="none", log_config=None, access_log=False, date_header=False, server_header=False
    )
    pipe.send(url_of(listener))
    server = uvicorn.Server(config)
    stop = _stop_event(pipe)

    def end() -> None:
        stop.wait()
        server.should_exit = True

    threading.Thread(target=end, daemon=True).start()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve(sockets=[listener]))


def stub(pipe: Connection) -> None:
    """Answers as vLLM does: a role, 64 tokens in a piece each, usage when asked for, [DONE]."""
    listener = listen("127.0.0.1", 0)
    pipe.send(url_of(listener))
    stop = _stop_event(pipe)

    async def main() -> None:
        server = await asyncio.start_server(_answer, sock=listener)
        await asyncio.to_thread(stop.wait)
        server.close()

    uvloop.run(main())


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
            body = await reader.readexactly(length)
            if head.startswith(b"POST /v1/chat/completions"):
                await _stream(writer, orjson.loads(body))
            else:
                version = b'{"version":"0.32.0"}' if head.startswith(b"GET /version") else b"{}"
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(version), version))
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def _stream(writer: asyncio.StreamWriter, request: dict[str, Any]) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n")
    kind, _, pace = str(request.get("user")).partition(" ")
    pause = float(pace or _PACE_S) if kind == "paced" else 0
    tokens = int(request.get("max_tokens") or TOKENS)
    chunks = _chunks(bool(request.get("return_token_ids")), bool((request.get("stream_options") or {}).get("include_usage")), tokens)
    for chunk in chunks:
        writer.write(chunk)
        await asyncio.sleep(pause)
    writer.write(b"0\r\n\r\n")


@cache
def _chunks(ids: bool, usage: bool, tokens: int = TOKENS) -> list[bytes]:
    """The pieces of a stream as they go over the wire."""
    base = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1_795_442_774, "model": "tiny"}
    role: dict[str, Any] = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    events = [{**base, "choices": [role], "prompt_token_ids": list(range(100, 148)) if ids else None, "prompt_text": None}]
    for at in range(tokens):
        text = _WORDS[at % len(_WORDS)]
        score = {"token": text, "logprob": -1.0625 - at / 7, "bytes": list(text.encode()), "top_logprobs": []}
        choice: dict[str, Any] = {"index": 0, "delta": {"content": text}, "logprobs": {"content": [score]} if ids else None}
        choice["finish_reason"] = "length" if at == tokens - 1 else None
        choice["token_ids"] = [300 + at] if ids else None
        events.append({**base, "choices": [choice]})
    if usage:
        events.append({**base, "choices": [], "usage": {"prompt_tokens": 48, "total_tokens": 48 + tokens, "completion_tokens": tokens}})
    pieces = [b"data: " + orjson.dumps(event) + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]
    return [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]


def measure(url: str, *, streams: int, parallel: int, paced: bool = False) -> _Measured:
    """Run streams, so many at once, from a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as pool:
        return _Measured(*pool.apply(_drive, (url, streams, parallel, paced)))


def _drive(url: str, streams: int, parallel: int, paced: bool) -> tuple[list[float], list[float], list[float], float]:
    host, _, port = url.removeprefix("http://").partition(":")
    messages = [{"role": "system", "content": "You answer briefly."}, {"role": "user", "content": "What does the tape keep? " * 8}]
    body = orjson.dumps({"model": "tiny", "messages": messages, "stream": True, "user": "paced" if paced else "fast"})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    firsts: list[float] = []
    gaps: list[float] = []
    wholes: list[float] = []

    async def client(number: int, count: int) -> None:
        if paced:  # arriving apart, or each would wait for all the others
            await asyncio.sleep(number / parallel * TOKENS * _PACE_S)
        reader, writer = await asyncio.open_connection(host, int(port))
        session = uuid.uuid4()
        writer.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for turn in range(count):
            session = uuid.uuid4() if turn % _TURNS == 0 else session
            request = f"{head}x-tokentape-session: {session}\r\n\r\n".encode() + body
            began = time.perf_counter()
            writer.write(request)
            seen, first, last, tail = 0, 0.0, 0.0, b""
            while not tail.endswith(b"0\r\n\r\n"):
                piece = await reader.read(65536)
                if not piece:
                    raise ConnectionError(f"{url} ended a stream")
                seen += len(piece)
                now = time.perf_counter()
                if first:
                    gaps.append(now - last)
                elif b'"content":"The"' in piece:
                    first = now
                last = now
                tail = (tail + piece)[-16:]
            firsts.append((first or time.perf_counter()) - began)
            wholes.append(time.perf_counter() - began)
        writer.close()

    async def main() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(client(number, streams // parallel) for number in range(parallel)))
        return time.perf_counter() - began

    elapsed = uvloop.run(main())
    return firsts, gaps, wholes, elapsed
