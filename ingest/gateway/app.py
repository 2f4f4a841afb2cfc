"""The gateway as an ASGI application and as a server: routes, start, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import structlog
import uvicorn
import uvloop
from prometheus_client import CONTENT_TYPE_LATEST

from ingest.attachments import Attachments
from ingest.gateway import errors
from ingest.gateway.batch import api as batch_api
from ingest.gateway.batch.desk import BatchDesk
from ingest.gateway.batch.facts import Facts
from ingest.gateway.batch.metrics import families as batch_metrics
from ingest.gateway.batch.worker import Worker
from ingest.gateway.connection import limited
from ingest.gateway.counting import PATH as COUNT_TOKENS
from ingest.gateway.counting import count_contents, count_tokens
from ingest.gateway.debug_api import PREFIX as DEBUG
from ingest.gateway.debug_api import debug_api
from ingest.gateway.endpoints.base import Endpoint
from ingest.gateway.endpoints.chat import Chat
from ingest.gateway.endpoints.completions import Completions
from ingest.gateway.endpoints.embeddings import Embeddings
from ingest.gateway.endpoints.gemini import ARRAY, EVENTS, WHOLE, endpoint_of, method_of
from ingest.gateway.endpoints.messages import Messages
from ingest.gateway.endpoints.responses import Responses
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Exchange, Receive, Scope, Send
from ingest.gateway.generation import Generation
from ingest.gateway.kept import Kept
from ingest.gateway.kept_api import PATH as RESPONSE
from ingest.gateway.kept_api import kept_response
from ingest.gateway.keys import Keyring
from ingest.gateway.metrics import Meter, Metrics
from ingest.gateway.models import PATHS, asked_for, models
from ingest.gateway.offload import Offload
from ingest.gateway.openapi import PATH as OPENAPI
from ingest.gateway.openapi import openapi
from ingest.gateway.parts import Parts
from ingest.gateway.placement import Placement
from ingest.gateway.quotas import Quotas, WorkerName
from ingest.gateway.routes import Routes
from ingest.gateway.sessions import Sessions
from ingest.gateway.stops import Stops
from ingest.gateway.tape import Recording
from ingest.gateway.window import Window
from ingest.redaction import Redactor
from schemas.errors import ConflictError, SettingsError
from schemas.requests import dump
from schemas.settings import Settings
from store.blobs import BlobStore
from store.control import ControlView, open_control
from store.objects import open_store
from store.objects.base import ObjectStore
from store.work import WorkLogs

if TYPE_CHECKING:
    from ingest.gateway.tracing import Tracing

log = structlog.get_logger(__name__)

GRACE_S = 15.0
"""How long open streams may go on once the gateway is to stop; then they fail as `shutdown`, recorded and told."""

SWITCH_INTERVAL_S = 0.0005
"""How long the recorder's thread may keep the interpreter while a token waits; Python's own 5 ms is longer than a token."""

_KEEP_ALIVE_S = 75
_BACKLOG = 2048

Handler = Callable[[Parts, Exchange], Awaitable[None]]

ENDPOINTS: tuple[Endpoint, ...] = (Chat(), Completions(), Embeddings(), Messages(), Responses())
"""The endpoints that are recorded."""


class Gateway:
    """The application. Serves from one event loop."""

    def __init__(self, settings: Settings, recorder: Recording) -> None:
        """Make the application.

        Raises:
            StorageFull: the data directory cannot be written.
            LogUnavailable: the control log does not answer.
            SettingsError: a redaction rule that cannot be.
        """
        redactor = Redactor.of(settings)
        self.attachments = Attachments(settings.blobs, lambda: BlobStore(_blob_objects(settings), settings.data))
        routes, sessions = Routes(settings.gateway), Sessions(settings)
        meter = Meter(Window.before(Offload(recorder, self.attachments, settings.recorder), redactor))
        control = open_control(settings)
        shared = ControlView(control)
        self._name = WorkerName(settings.data / "control", sessions.installation)
        self._tracing = _tracing(settings, meter, self._name.name)
        self._metrics = Metrics(meter, recorder, routes, self.attachments, self._tracing)
        recorder = self._tracing or meter
        keyring = Keyring(shared, required=settings.gateway.auth == "required")
        quotas = Quotas(control, shared, self._name.name)
        stops = Stops(settings, recorder, control, shared)
        placement = Placement(settings.recorder, sessions.installation)
        self.parts = Parts(
            settings, recorder, routes, sessions, redactor, control, shared, stops, keyring, quotas, placement, Kept(), self._tracing
        )
        self.active: set[Exchange] = set()
        batchable = {endpoint.path: endpoint for endpoint in ENDPOINTS}
        desk = BatchDesk(settings, Facts(control, shared), WorkLogs(settings), batchable)
        self._batches = batch_api.BatchApi(self.parts, desk)
        self.worker = Worker(self.parts, desk, self.active, batchable)
        self._metrics.add(lambda: batch_metrics(self.worker))
        self._endpoints: dict[str, tuple[str, Handler]] = {
            **{endpoint.path: ("POST", _recorded(endpoint)) for endpoint in ENDPOINTS},
            COUNT_TOKENS: ("POST", count_tokens),
            **dict.fromkeys(PATHS, ("GET", models)),
            "/health": ("GET", self._health),
            "/ready": ("GET", _ready),
            "/metrics": ("GET", self._measured),
            OPENAPI: ("GET", _document),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection of ASGI's."""
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1003})
        limits = self.parts.settings.gateway
        exchange = Exchange(scope, receive, send, limits.body_bytes_max, limits.request_timeout_s)
        self.active.add(exchange)
        try:
            await self._route(exchange)
        finally:
            self.active.discard(exchange)

    async def drain(self, grace_s: float) -> None:
        """Wait for open exchanges, then end those that are left."""
        self.parts.stops.end()
        self.worker.end()
        if tasks := {exchange.task for exchange in self.active}:
            await asyncio.wait(tasks, timeout=grace_s)
        for exchange in list(self.active):
            exchange.abort(Failure(errors.SHUTDOWN, "The gateway is stopping."))

    def close(self) -> None:
        """Let go of what was opened; after the last exchange has ended."""
        self.parts.shared.close()
        self.parts.control.close()
        self._name.close()
        if self._tracing:
            self._tracing.close()

    async def _route(self, exchange: Exchange) -> None:
        path, method = exchange.scope["path"], exchange.scope["method"]
        wanted, endpoint = self._endpoints.get(path) or _named(path, method, exchange.scope["query_string"])
        if endpoint is None and batch_api.serves(path):
            return await self._batches(exchange)
        if endpoint is None and path.startswith(DEBUG):
            return await debug_api(self.parts, exchange)
        if path.startswith("/v1beta"):
            exchange.shape = errors.GEMINI
        if endpoint is None:
            served = ", ".join(f"{method} {path}" for method, path in (*((m, p) for p, (m, _) in self._endpoints.items()), *_NAMED))
            return await exchange.fail(Failure(errors.NOT_SERVED, f"Nothing is served at {path[:200]}. Served: {served}."), [])
        if method != wanted:
            failure = Failure(errors.WRONG_METHOD, f"{path[:200]} takes {wanted}, not {method}.")
            return await exchange.fail(failure, [(b"allow", wanted.encode())])
        return await endpoint(self.parts, exchange)

    async def _health(self, parts: Parts, exchange: Exchange) -> None:
        """That this process serves, and what it last knew of its upstreams."""
        answer: dict[str, Any] = {"status": "ok", "active": len(self.active) - 1, "upstreams": [lane.facts for lane in parts.routes.lanes]}
        if parts.settings.gateway.auth == "off":  # where everybody may ask, addresses are no secret
            first = parts.routes.lanes[0].upstream
            answer |= {"upstream": first.name, "upstream_kind": first.kind}
        await exchange.respond(200, dump(answer), [errors.JSON])

    async def _measured(self, parts: Parts, exchange: Exchange) -> None:
        """The metrics of this worker; they name upstreams and endpoints, never people or keys."""
        await exchange.respond(200, self._metrics.text(), [(b"content-type", CONTENT_TYPE_LATEST.encode())])

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.open()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.shut()
                return await send({"type": "lifespan.shutdown.complete"})

    async def open(self) -> None:
        """Begin, in the loop that serves."""
        await self.parts.routes.open()
        self.parts.keyring.open()
        self.parts.quotas.open()
        await self.parts.stops.start()
        self.worker.start()

    async def shut(self) -> None:
        """End what `open` began; after `drain`."""
        await self.worker.close()
        await self.parts.stops.close()
        await self.parts.keyring.close()
        await self.parts.quotas.close()
        await self.parts.routes.close()
        self.attachments.close()


async def _document(parts: Parts, exchange: Exchange) -> None:
    """The OpenAPI document; it says nothing that the README does not."""
    await exchange.respond(200, openapi(ENDPOINTS), [errors.JSON])


async def _ready(parts: Parts, exchange: Exchange) -> None:
    """Whether an upstream can take a request now: they are asked. 200 if one can, else 503."""
    await parts.routes.probe()
    ready = any(lane.ready for lane in parts.routes.lanes)
    answer = {"status": "ready" if ready else "not ready", "upstreams": [lane.facts for lane in parts.routes.lanes]}
    await exchange.respond(200 if ready else 503, dump(answer), [errors.JSON])


_NAMED = (
    ("GET", "/v1/models/{model}"),
    ("GET", "/v1beta/models/{model}"),
    ("GET", "/v1/responses/{id}"),
    ("DELETE", "/v1/responses/{id}"),
    *(("POST", f"/v1beta/models/{{model}}:{name}") for name in ("generateContent", "streamGenerateContent", "countTokens")),
)
"""What is served at paths that hold a name."""


def _named(path: str, method: str, query: bytes) -> tuple[str, Handler | None]:
    """What is served at a path that names a model or a response, and the method that it takes."""
    if path.startswith(RESPONSE) and len(path) > len(RESPONSE) and "/" not in path.removeprefix(RESPONSE):
        return ("DELETE" if method == "DELETE" else "GET"), kept_response
    if method_of(path)[1] == "countTokens":
        return "POST", count_contents
    if endpoint := endpoint_of(path, query):
        return "POST", _GENERATE[endpoint]
    return ("GET", models) if asked_for(path, method) else ("", None)


def _recorded(endpoint: Endpoint) -> Handler:
    async def handle(parts: Parts, exchange: Exchange) -> None:
        await Generation(parts, exchange, endpoint, await parts.keyring.caller(exchange)).serve()

    return handle


_GENERATE = {endpoint: _recorded(endpoint) for endpoint in (WHOLE, EVENTS, ARRAY)}


def _tracing(settings: Settings, recorder: Recording, instance: str) -> Tracing | None:
    """Spans where a collector is set; most gateways never need the SDK, which takes a fifth of a second to import."""
    if not settings.telemetry.otlp_endpoint:
        return None
    from ingest.gateway.tracing import Tracing

    return Tracing(settings.telemetry, recorder, instance)


def _blob_objects(settings: Settings) -> ObjectStore:
    """The store of the cold tier, with no more patience than events have that wait for it."""
    return open_store(settings.cold.model_copy(update={"timeout_s": min(settings.cold.timeout_s, settings.blobs.wait_s)}), settings.data)


def create_app(settings: Settings, recorder: Recording) -> Gateway:
    """The gateway as an ASGI application; it needs the lifespan protocol. The recorder stays the caller's to close."""
    return Gateway(settings, recorder)


class _Server(uvicorn.Server):
    """Uvicorn that ends when an event is set, and lets the gateway end its streams itself."""

    def __init__(
        self, config: uvicorn.Config, gateway: Gateway, stop: threading.Event, grace_s: float, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._stop = stop
        self._grace_s = grace_s
        self._started = started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the caller's: they set the event."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets)
        self._started()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, ten times a second."""
        return await super().on_tick(counter) or self._stop.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, let streams end or end them, then close."""
        draining = asyncio.create_task(self._gateway.drain(self._grace_s))
        await super().shutdown(sockets)
        draining.cancel()


def serve(
    settings: Settings,
    recorder: Recording,
    stop: threading.Event,
    *,
    ready: Callable[[str], AbstractContextManager[Any] | None] | None = None,
    grace_s: float = GRACE_S,
) -> None:
    """Serve until `stop` is set; returns when every exchange has ended and was recorded.

    `ready` is called with the base URL once connections are taken; a context manager that it returns is left at the end.
    The recorder stays the caller's to flush and close.

    Raises:
        ConflictError: the port is in use.
        SettingsError: there is no such address.
        StorageFull: the data directory cannot be written.
        LogUnavailable: the control log does not answer.
    """
    listener = listen(settings.gateway.host, settings.gateway.port)
    with ExitStack() as stack:
        stack.callback(listener.close)
        gateway = create_app(settings, recorder)
        stack.callback(gateway.close)

        def started() -> None:
            context = ready(url_of(listener)) if ready else None
            if context is not None:
                stack.enter_context(context)

        config = uvicorn.Config(
            gateway,
            loop="none",
            http=limited(settings.gateway.connections_max, settings.gateway.request_timeout_s),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            date_header=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(grace_s + 2 * errors.LAST_WORDS_S),
        )
        server = _Server(config, gateway, stop, grace_s, started)
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve(sockets=[listener]))


def listen(host: str, port: int, *, section: str = "gateway") -> socket.socket:
    """A listening socket; `section` of the settings says where.

    Raises:
        ConflictError: the port is in use.
        SettingsError: there is no such address.
    """
    place = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(error.strerror or str(error), operation="listen", place=place, hint=f"set {section}.host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if isinstance(error, PermissionError) or "assign" in str(error).lower():
            raise SettingsError(
                error.strerror or str(error), operation="listen", place=place, hint=f"set {section}.host and {section}.port"
            ) from error
        hint = f"stop what uses it, or set {section}.port (0 picks a free one)"
        raise ConflictError("the port is in use", operation="listen", place=place, hint=hint) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """The base URL of a listening socket; the loopback address stands for all addresses."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
