"""A gateway in a thread with a real recorder and an embedded log, and upstreams that misbehave on cue over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import orjson

from ingest.gateway import serve
from ingest.recorder import Recorder
from schemas.codec import decode
from schemas.events import Event, GenerationFailed
from schemas.registry import SchemaRegistry
from schemas.requests import load
from schemas.settings import DebugSettings, GatewaySettings, LogSettings, RecorderSettings, Settings, TelemetrySettings
from store.log import open_log
from tests.program import until

DEADLINE_S = 30.0
T = TypeVar("T")
RECORDED = ("/v1/chat", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1beta/models/")
"""Paths that a broken upstream acts on; all others are 404."""
HELLO: Any = [{"role": "user", "content": "Say something about the sea."}]


class Rig:
    """A running gateway; `events` reads what it recorded."""

    def __init__(self, settings: Settings, grace_s: float = 5.0) -> None:
        self.settings = settings
        self.url = ""
        self.log = open_log(settings.log, settings.data)
        self.recorder = Recorder(self.log, settings.recorder, source="gateway")
        self.grace_s = grace_s
        self.error: BaseException | None = None
        self._clients: list[Any] = []
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateway")
        self._thread.start()
        self._ready.wait(DEADLINE_S)

    def _run(self) -> None:
        try:
            serve(self.settings, self.recorder, self._stop, ready=self._started, grace_s=self.grace_s)
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()

    def _started(self, url: str) -> None:
        self.url = url
        self._ready.set()

    def stop(self) -> None:
        """Stop as SIGTERM would; returns when the gateway has ended."""
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def close(self) -> None:
        """Stop and release everything."""
        for client in self._clients:
            client.close()
        self.stop()
        self.recorder.close()
        self.log.close()

    def client(self, **options: Any) -> Any:
        """The official client (its own types are too narrow for tests of odd requests); it retries nothing unless told to."""
        key = options.pop("api_key", "sk-test-0123456789")
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, **options})
        return self.keep(client)

    def keep(self, client: Any) -> Any:
        """A client that is closed with the rig."""
        self._clients.append(client)
        return client

    def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        """A request over plain HTTP: bytes go as they are, all else as JSON."""
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        named = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
        return httpx.post(f"{self.url}{path}", content=content, headers=named, timeout=DEADLINE_S)

    def framed(self) -> list[bytes]:
        """The bytes of all events in the log, partition by partition."""
        assert self.recorder.flush(DEADLINE_S)
        return [value for partition in range(self.log.partitions) for value in self.log.read(partition, 0, limit=100_000).values]

    def events(self) -> list[Event]:
        """All events but heartbeats."""
        registry = SchemaRegistry()
        events = [decode(value, registry) for value in self.framed()]
        return [event for event in events if event.kind != "producer_heartbeat"]

    def wait_for(self, kind: str) -> list[Event]:
        """All events, once one of this kind is among them."""

        def seen() -> list[Event] | None:
            events = self.events()
            return events if any(event.kind == kind for event in events) else None

        return until(seen)

    def failure(self) -> GenerationFailed:
        """The one failure that was recorded."""
        failures = [event.payload for event in self.wait_for("generation_failed") if event.kind == "generation_failed"]
        assert len(failures) == 1
        assert isinstance(failures[0], GenerationFailed)
        return failures[0]


@contextlib.contextmanager
def running(
    data: Path,
    upstream: str,
    *,
    mode: str = "block",
    grace_s: float = 5.0,
    debug: dict[str, Any] | None = None,
    telemetry: dict[str, Any] | None = None,
    **gateway: Any,
) -> Iterator[Rig]:
    """A gateway before an upstream."""
    settings = Settings(
        data=data,
        gateway=GatewaySettings(port=0, upstream=upstream, **gateway),
        debug=DebugSettings.model_validate(debug or {}),
        telemetry=TelemetrySettings.model_validate(telemetry or {}),
        log=LogSettings(partitions=2),
        recorder=RecorderSettings.model_validate({"mode": mode, "coalesce_ms": 5.0}),
    )
    rig = Rig(settings, grace_s)
    try:
        assert rig.error is None
        yield rig
    finally:
        rig.close()


Act = Callable[["Peer"], Awaitable[None]]


@dataclass
class Peer:
    """One connection of a client to a broken upstream, its request read."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    path: str
    body: bytes
    head: bytes
    kept: bool = False

    async def send(self, data: bytes) -> None:
        """Write and flush."""
        self.writer.write(data)
        await self.writer.drain()

    async def begin_stream(self, content_type: bytes = b"text/event-stream") -> None:
        """A head without length: the body ends with the connection."""
        await self.send(b"HTTP/1.1 200 OK\r\ncontent-type: " + content_type + b"\r\nconnection: close\r\n\r\n")

    async def begin_chunked(self) -> None:
        """A head whose body has an end of its own."""
        await self.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        """A piece of a chunked body."""
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def whole(self, status: bytes, content_type: bytes, body: bytes, more: bytes = b"") -> None:
        """A whole answer; `more` are further lines of its head."""
        head = b"HTTP/1.1 %b\r\ncontent-type: %b\r\n%bcontent-length: %d\r\n\r\n" % (status, content_type, more, len(body))
        await self.send(head + body)
        self.kept = True

    async def gone(self) -> None:
        """Wait until the other end closes."""
        while await self.reader.read(4096):
            continue


@dataclass
class BrokenUpstream:
    """Answers what is recorded as `act` says; it is no vLLM, so `/version` is 404."""

    act: Act
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    version: bytes | None = None
    instance: int | None = None  # of vLLM's kind: which start of it this is
    models: tuple[str, ...] = ()
    port: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                peer = await _read(reader, writer)
                self.paths.append(peer.path)
                if not peer.path.startswith(RECORDED):
                    if peer.path == "/version" and self.version:
                        await peer.whole(b"200 OK", b"application/json", self.version)
                    elif peer.path == "/metrics" and self.instance:
                        await peer.whole(b"200 OK", b"text/plain", b"process_start_time_seconds %d\n" % self.instance)
                    elif peer.path == "/v1/models" and self.models:
                        listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
                        await peer.whole(b"200 OK", b"application/json", orjson.dumps(listed))
                    else:
                        await peer.whole(b"404 Not Found", b"application/json", b"{}")
                    continue
                self.bodies.append(load(peer.body))
                self.heads.append(peer.head)
                await self.act(peer)
                if not peer.kept:
                    break
        self.left.set()
        writer.close()


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Peer:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    return Peer(reader, writer, head.split(b" ")[1].decode(), await reader.readexactly(length), head)


@contextlib.contextmanager
def broken(act: Act, **options: Any) -> Iterator[BrokenUpstream]:
    """A misbehaving upstream on a port of its own, in a loop of its own."""
    upstream = BrokenUpstream(act, **options)
    started = threading.Event()
    stop: list[Callable[[], Any]] = []

    async def run() -> None:
        server = await asyncio.start_server(upstream._serve, "127.0.0.1", upstream.port)
        upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        over = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(over.set))
        started.set()
        await over.wait()
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in upstream.writers:
            writer.transport.abort()
        await asyncio.sleep(0)  # a transport lets go of its socket in the loop's next round

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    started.wait()
    try:
        yield upstream
    finally:
        stop[0]()
        thread.join()


def chunk(text: str = "", *, index: int = 0, finish: str | None = None, **extra: Any) -> bytes:
    """An event as OpenAI's API streams it."""
    choice = {"index": index, "delta": {"content": text} if text else {}, "finish_reason": finish, **extra}
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + orjson.dumps(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"
