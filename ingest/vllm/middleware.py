"""Pure-ASGI middleware for `vllm serve`: records what the gateway would, inside the server and without a further hop.

    vllm serve MODEL --middleware tokentape.vllm_plugin.Middleware

Chat completions and completions are recorded; other paths, and requests that a gateway of ours sent, pass untouched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import structlog

from ingest.environment import ENVIRONMENT_AGE_MAX_S, capture_by
from ingest.gateway import errors
from ingest.gateway.endpoints.base import Answer, Endpoint
from ingest.gateway.endpoints.chat import Chat
from ingest.gateway.endpoints.completions import Completions
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Exchange, Headers, Message, Receive, Scope, Send
from ingest.gateway.headers import authorization_of, request_facts
from ingest.gateway.placement import labels
from ingest.gateway.sessions import GENERATION_HEADER, SESSION_HEADER, Sessions
from ingest.gateway.sse import EventParser
from ingest.gateway.tape import Tape
from ingest.recorder import Recorder
from ingest.redaction import Redactor
from ingest.vllm.names import REQUEST_HEADER, request_name
from schemas.errors import UsageError
from schemas.events import EnvironmentCaptured
from schemas.probe import Ask
from schemas.requests import load, splice
from schemas.settings import Settings

log = structlog.get_logger(__name__)

_ENDPOINTS: dict[str, Endpoint] = {endpoint.path: endpoint for endpoint in (Chat(), Completions())}
_ODD = (TypeError, AttributeError, LookupError, ValueError)

FIRST_CAPTURE_WAIT_S = 2.0
"""How long the first request waits for the environment; where that takes longer it is named once the answer begins, or not."""
ANSWER_WAIT_S = 60.0
"""How long an answer to one question may take."""


class _Environment:
    """What the server behind the middleware is, asked of its own application as a gateway asks over HTTP: the same items and digests."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._told: EnvironmentCaptured | None = None
        self._asked_at: float | None = None
        self._asking: asyncio.Task[None] | None = None

    def now(self) -> EnvironmentCaptured | None:
        """The environment, None while it is not known; this process ends with its server, so it is nobody else's."""
        return self._told

    async def look(self, scope: Scope) -> None:
        """Ask if that is due, beside the request of this scope; the first one waits a little."""
        due = self._asked_at is None or time.monotonic() - self._asked_at > ENVIRONMENT_AGE_MAX_S
        if due and self._asking is None:
            self._asking = asyncio.create_task(self._ask_all(scope))
        if self._told is None and self._asking is not None:
            await asyncio.wait([self._asking], timeout=FIRST_CAPTURE_WAIT_S)

    async def _ask_all(self, scope: Scope) -> None:
        try:
            told = await capture_by(lambda ask: self._ask(scope, ask), "vllm", previous=self._told)
            if "models" not in told.unknown:  # with a credential that the server does not take, nothing is told
                self._told, self._asked_at = told, time.monotonic()
        except Exception:
            self._asked_at = time.monotonic()  # what went wrong will not be better a moment later
            log.exception("environment not captured")
        finally:
            self._asking = None

    async def _ask(self, scope: Scope, ask: Ask) -> bytes | None:
        """The body of a 200 answer, None for any other and for none in time."""
        path, _, query = ask.path.partition("?")
        own = [(name, value) for name, value in scope["headers"] if name in (b"host", b"authorization")]
        body = ask.body or b""
        about = {
            "method": "GET" if ask.body is None else "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [*own, (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))],
            "state": dict(scope.get("state") or {}),
        }
        status, pieces = 0, []
        over = asyncio.Event()

        async def nothing_more() -> Message:
            await over.wait()
            return {"type": "http.disconnect"}

        async def said(message: Mapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            pieces.append(message.get("body", b""))

        try:
            async with asyncio.timeout(ANSWER_WAIT_S):
                await self._app({**scope, **about}, _replayed(body, nothing_more), said)
        except Exception as error:  # a question that the server cannot answer is none of the request's
            log.warning("question not answered", path=path, error=repr(error))
            return None
        finally:
            over.set()
        return b"".join(pieces) if status == 200 else None


class RecordingMiddleware:
    """Records the generations of the server behind it."""

    def __init__(self, app: Any, recorder: Recorder, settings: Settings) -> None:
        self._app = app
        self._recorder = recorder
        self._settings = settings
        self._sessions = Sessions(settings)
        self._redactor = Redactor.of(settings)
        self._environment = _Environment(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection; what is not recorded passes as it is."""
        endpoint = _ENDPOINTS.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if endpoint is None or any(name == GENERATION_HEADER.encode() for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self._settings.gateway.body_bytes_max)
        body = await _body(receive)
        exchange.body_bytes = len(body)
        await self._environment.look(scope)
        recorded = self._begin(exchange, endpoint, body)
        if recorded is None:
            await self._app(scope, _replayed(body, receive), send)
            return
        await recorded.serve(self._app, scope, receive, send)

    def _begin(self, exchange: Exchange, endpoint: Endpoint, body: bytes) -> _Recorded | None:
        """The recording of a request; None for one that cannot be read, which the server answers by itself."""
        try:
            request = endpoint.read(exchange, body)
            authorization = authorization_of(exchange)
            actor = self._sessions.key_id(authorization) or ""
            session = self._sessions.find(exchange.header(SESSION_HEADER), actor)
        except (UsageError, Failure) as error:
            log.warning("not recorded", reason=str(error))
            return None
        redactor = self._redactor.for_tenant(session.context.tenant).with_token((authorization or "").rpartition(" ")[2])
        tape = Tape(self._recorder, session, redactor, endpoint.path)
        extra = endpoint.additions(request, "vllm")
        tape.opened(labels(exchange, request.fields, tape.clean, self._settings.recorder.sample_rate))
        environment = self._environment.now()
        tape.environment(environment)
        facts = request_facts(exchange, tape.clean) | {"request_digest": session.digest(body)}
        facts["environment_id"] = environment.environment_id if environment else None
        tape.submitted(request, facts, extra)
        return _Recorded(tape, endpoint.answer(request, extra, "vllm", None), splice(request, extra), self._environment)


class _Recorded:
    """One generation between the server's application and its client."""

    def __init__(self, tape: Tape, answer: Answer, body: bytes, environment: _Environment) -> None:
        self._tape, self._answer, self._body, self._environment = tape, answer, body, environment
        self._parser = EventParser()
        self._start: Message = {}
        self._streams = False
        self._whole: list[bytes] = []
        self._gone = False

    async def serve(self, app: Any, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer, and write down what it says."""

        async def heard() -> Message:
            message = await receive()
            self._gone |= message["type"] == "http.disconnect"
            return message

        async def said(message: Message) -> None:
            for out in self._passed(message):
                await send(out)

        self._tape.forwarded(1)
        try:
            await app({**scope, "headers": self._headers(scope["headers"])}, _replayed(self._body, heard), said)
        finally:  # an answer without an end: the client went away, or the server broke off
            fault = errors.CLIENT_DISCONNECTED if self._gone else errors.DISCONNECTED
            self._tape.failed(Failure(fault, "The answer ended before its end."))

    def _headers(self, headers: Headers) -> Headers:
        """The request's headers for what is sent on: its new length, and the name under which the engine records it."""
        ours = {b"content-length": b"%d" % len(self._body), REQUEST_HEADER.encode(): request_name(self._tape.generation_id).encode()}
        return [(name, value) for name, value in headers if name not in ours] + list(ours.items())

    def _passed(self, message: Message) -> list[Message]:
        """What goes to the client in place of a message of the server."""
        if message["type"] == "http.response.start":
            return self._begun(message)
        if message["type"] != "http.response.body":
            return [message]
        data, more = message.get("body", b""), message.get("more_body", False)
        if self._streams:
            return [{**message, "body": self._streamed(data)}]
        self._whole.append(data)
        return [] if more else self._complete(message)

    def _begun(self, message: Message) -> list[Message]:
        headers = dict(message["headers"])
        self._tape.answered(message["status"], self._environment.now)
        self._streams = message["status"] < 300 and headers.get(b"content-type", b"").startswith(b"text/event-stream")
        own = [(SESSION_HEADER.encode(), self._tape.session.name.encode()), (GENERATION_HEADER.encode(), self._tape.name.encode())]
        kept = [(name, value) for name, value in message["headers"] if name.lower() != b"content-length"]
        self._start = {**message, "headers": [*kept, *own]}
        return [self._start] if self._streams else []

    def _streamed(self, data: bytes) -> bytes:
        offset_us = self._tape.now_us()
        out = []
        for block in self._parser.feed(data):
            if block.data is None:
                out.append(block.raw)
            elif self._answer.ends(block):
                self._tape.finished()
                out.append(self._answer.end(block.raw))
            else:
                out.append(self._event(block.data, block.raw, offset_us))
        return b"".join(out)

    def _event(self, data: bytes, raw: bytes, offset_us: int) -> bytes:
        """Record one event; what is no chunk passes as it is, and the generation has failed."""
        try:
            event = load(data)
            chunk = self._answer.read(event)
            if chunk is None or "error" in event:
                raise ValueError(f"an error: {data[:200]!r}")
            self._tape.chunk(chunk, offset_us)
            return self._answer.write(event, chunk, raw)
        except _ODD as error:
            self._tape.failed(Failure(errors.UPSTREAM_ERROR, "The server sent something that is not a chunk.", detail=str(error)))
            return raw

    def _complete(self, message: Message) -> list[Message]:
        body = b"".join(self._whole)
        try:
            document = load(body)
            if self._start["status"] >= 300:
                raise ValueError(body[:500].decode(errors="replace"))
            completion = self._answer.read_whole(document)
            self._tape.whole(completion, self._tape.now_us())
            body = self._answer.write_whole(document, completion, body)
            self._tape.finished()
        except _ODD as error:
            refused = 400 <= self._start["status"] < 500
            fault = errors.INVALID_REQUEST if refused else errors.UPSTREAM_ERROR
            self._tape.failed(Failure(fault, str(error), status=self._start["status"]))
        start = {**self._start, "headers": [*self._start["headers"], (b"content-length", b"%d" % len(body))]}
        return [start, {**message, "body": body}]


async def _body(receive: Receive) -> bytes:
    """The whole body, or as much of it as came before the client hung up."""
    pieces = []
    more = True
    while more:
        message = await receive()
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body first."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
