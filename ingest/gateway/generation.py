"""One generation from the client's request to the last byte of its answer, whatever the endpoint."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import Any

import structlog

from ingest.gateway import errors
from ingest.gateway.endpoints.base import Answer, Endpoint, Sending
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Deadline, Exchange, Headers
from ingest.gateway.headers import answer_headers, request_facts, upstream_headers
from ingest.gateway.kept import Response, continued, owner_of
from ingest.gateway.keys import Caller
from ingest.gateway.parts import Parts
from ingest.gateway.passage import Passage
from ingest.gateway.placement import Asker, labels, tags_named
from ingest.gateway.sessions import GENERATION_HEADER, SESSION_HEADER, Session
from ingest.gateway.stream import ODD, Stream, error_of, malformed
from ingest.gateway.tape import Tape
from ingest.gateway.upstream import Upstream
from ingest.gateway.wire import Reply
from ingest.vllm.names import REQUEST_HEADER, request_name
from schemas.errors import TokentapeError, UsageError
from schemas.requests import ClientRequest, load
from schemas.requests.client import ResponsesRequest

log = structlog.get_logger(__name__)

DRAIN_S = 1.0
"""How long the end of an upstream's answer is waited for after its [DONE], so that its connection can be used again."""


class Generation:
    """One request to an endpoint and its answer; every way in which it can end is recorded and told to the client."""

    def __init__(self, parts: Parts, exchange: Exchange, endpoint: Endpoint, caller: Caller) -> None:
        self.parts = parts
        self.exchange = exchange
        self.endpoint = endpoint
        exchange.shape = endpoint.shape
        self.passage = Passage(parts, exchange, caller)
        self.settings = parts.settings.gateway
        self.strict = parts.settings.recorder.mode == "strict"
        self.authorization = self.passage.authorization
        self.caller = caller
        self.misnamed: Failure | None = None
        self._earlier: Response | None = None
        self._asked: ClientRequest | None = None
        self.session = self._session()
        redactor = parts.redactor.for_tenant(self.session.context.tenant)
        self.tape = Tape(parts.recorder, self.session, redactor.with_token(caller.credential), endpoint.path)
        tracing = parts.tracing
        self._trace = {"trace_id": tracing.begin(self.tape.generation_id, exchange, endpoint.path)} if tracing else {}

    @property
    def upstream(self) -> Upstream:
        """The upstream that answers, or will."""
        return self.passage.upstream

    @property
    def _key_id(self) -> str | None:
        """The key that the client sent, by a name that says nothing about it."""
        return self.caller.key.key_id if self.caller.key else self.parts.sessions.key_id(self.authorization)

    async def serve(self) -> None:
        """From the request to the last byte."""
        try:
            await self._serve()
        except Failure as failure:
            await self._fail(failure)
        except asyncio.CancelledError:
            await self._fail(self.exchange.reason())
        except Exception as error:
            log.exception("gateway failed", generation=self.tape.name)
            await self._fail(Failure(errors.INTERNAL, "The gateway failed.", detail=repr(error)))
        finally:
            self.passage.close(self.tape.tokens)
            self.exchange.close()

    async def _serve(self) -> None:
        request = self._asked = await self._request()
        self._place(request)
        self.exchange.watch()
        kind = ""
        try:
            kind = await self.passage.ready(request.model)
        finally:  # also where nothing answers: the request is recorded before its failure
            extra = self._additions(request, kind) if kind else {}
            self._submitted(request, extra)
        await self._durable()
        asked, request = request, await self._passed(request)
        if request is not asked:
            kind = await self.passage.ready(request.model)
            extra = self._added_again(request, kind, extra)
        while not await self._attempted(request, extra, kind):
            added = self._additions(request, kind := self.upstream.kind or "openai")
            extra = {name: value for name, value in extra.items() if name in added}

    def _additions(self, request: ClientRequest, kind: str) -> dict[str, Any]:
        """What the gateway adds for the tape, but for what the chosen upstream has refused before."""
        added = self.endpoint.additions(request, kind)
        return {name: value for name, value in added.items() if name not in self.upstream.refused}

    async def _passed(self, request: ClientRequest) -> ClientRequest:
        """The request once no breakpoint holds it, perhaps edited."""
        return await self.parts.stops.pass_by(self.exchange, self.tape, request, self._read, self._own_headers(), self._key_id)

    def _added_again(self, request: ClientRequest, kind: str, before: dict[str, Any]) -> dict[str, Any]:
        """What is added to an edited request; a seed that is on the tape as injected stays the same."""
        added = self._additions(request, kind)
        return {name: before.get(name, value) if name == "seed" else value for name, value in added.items()}

    async def _attempted(self, request: ClientRequest, extra: dict[str, Any], kind: str) -> bool:
        """Ask the chosen upstream; False if another one is to be asked."""
        try:
            async with self.passage.turn(self.tape):
                if await self._forward(request, extra, kind):
                    self.upstream.refused.add("stream_options")
                    del extra["stream_options"]
                    self.passage.attempt += 1
                    await self._forward(request, extra, kind)
            return True
        except Failure as failure:
            await self.passage.elsewhere(failure, self.tape)
            return False

    def _session(self) -> Session:
        key = self.caller.key
        tenant = key.tenant if key else None
        user = self.parts.redactor.for_tenant(tenant or self.parts.settings.tenant).clean(self.exchange.header("x-tokentape-user"))
        actor = key.owner if key else user or self.parts.sessions.key_id(self.authorization) or ""
        try:
            return self.parts.sessions.find(self.exchange.header(SESSION_HEADER) if not self.caller.refusal else None, actor, tenant)
        except Failure as failure:
            self.misnamed = failure
            return self.parts.sessions.find(None, actor, tenant)

    async def _request(self) -> ClientRequest:
        """The request, or the record of what came in its place.

        Raises:
            Failure: it cannot be read.
        """
        body = b""
        try:
            if self.caller.refusal:  # whoever that is, nothing of the body is kept
                raise self.caller.refusal
            body = await self.exchange.body()
            if self.misnamed:
                raise self.misnamed
            return self._read(body)
        except UsageError as error:
            failure = Failure(errors.INVALID_REQUEST, str(error.fault), param=error.place or None)
            self._unreadable(body)
            raise failure from error
        except (Failure, asyncio.CancelledError):
            self._unreadable(body)
            raise

    def _read(self, body: bytes) -> ClientRequest:
        request = self.endpoint.read(self.exchange, body)
        if not isinstance(request, ResponsesRequest):
            return request
        owner = owner_of(self.session.context.tenant, self._key_id, self.exchange.client)
        request, earlier = continued(self.parts.kept, owner, request, lambda: self.session)
        self._earlier = self._earlier or earlier
        return request

    def _unreadable(self, body: bytes) -> None:
        self._open({})
        self.tape.unreadable(body, self._facts(body))

    def _place(self, request: ClientRequest) -> None:
        """Find the session of a request, before anything is recorded of it."""
        named = self.exchange.header(SESSION_HEADER) is not None
        session = self._earlier.session if self._earlier and not named else self.session
        self.session = self.parts.placement.place(self.exchange, request, session, self._asker, self.tape.clean)
        self.tape.move(self.session)

    def _remember(self) -> None:
        """Before the client knows the end of an answer, a request that goes on from it can be told."""
        if self._asked:
            self.parts.placement.answered(self.exchange, self._asked, self.session, self._asker, self.tape.answers)

    @property
    def _asker(self) -> Asker:
        return Asker(self.session.context.tenant, self._key_id, self.exchange.client)

    def _submitted(self, request: ClientRequest, extra: dict[str, Any]) -> None:
        self._open(request.fields)
        environment = self.upstream.environment
        self.tape.environment(environment)
        facts = self._facts(request.body)
        facts |= {"environment_id": environment.environment_id if environment else None, "priority": self.passage.priority}
        self.tape.submitted(request, facts, extra)

    def _open(self, fields: dict[str, Any]) -> None:
        if self.session.opened:
            return self.tape.tagged(tags_named(self.exchange, fields, self.tape.clean))
        own = self.session.context.sample_rate
        rate = self.parts.settings.recorder.sample_rate if own is None else own
        return self.tape.opened(labels(self.exchange, fields, self.tape.clean, rate))

    def _facts(self, body: bytes) -> dict[str, Any]:
        return request_facts(self.exchange, self.tape.clean) | {
            "upstream": self.passage.upstream_name,
            "api_key_id": self._key_id,
            "request_digest": self.session.digest(body),
            **self._trace,
        }

    async def _forward(self, request: ClientRequest, extra: dict[str, Any], kind: str) -> bool:
        """Send the request upstream and pass the answer on; True if it is to be sent again without an addition."""
        deadline = Deadline(self._expired, self.settings.first_token_timeout_s)
        overdue = asyncio.get_running_loop().call_later(self.settings.total_timeout_s, self._overdue)
        self.tape.forwarded(self.passage.attempt)
        sending = self._sending(request, extra, kind)
        headers = self._outgoing_headers(sending, kind)
        reply = None
        try:
            reply = await self.upstream.wire.post(self.upstream.target_of(sending.path, sending.query), headers, sending.body)
            self.tape.answered(reply.status, partial(self.upstream.environment_over, reply.since))
            self.passage.answered(reply.status)
            answer = self.endpoint.answer(request, extra, kind, self.upstream.fingerprint)
            if reply.status >= 300:
                return await self._refused(reply, answer, may_retry="stream_options" in extra)
            streams = reply.content_type == "text/event-stream"
            if answer.content_type is not None and streams != request.stream:
                raise malformed(f"{reply.content_type} where {'a stream' if request.stream else 'none'} was asked for")
            if streams:
                await self._stream(reply, answer, deadline)
            else:
                await self._whole(reply, answer)
            return False
        finally:
            overdue.cancel()
            deadline.stop()
            if reply is not None:
                reply.close()

    def _sending(self, request: ClientRequest, extra: dict[str, Any], kind: str) -> Sending:
        try:
            return self.endpoint.sending(self.exchange, request, extra, kind)
        except UsageError as error:
            raise Failure(errors.INVALID_REQUEST, str(error.fault), param=error.place or None) from error

    def _outgoing_headers(self, sending: Sending, kind: str) -> list[tuple[str, str]]:
        headers = upstream_headers(self.exchange, self.passage.authorization_upstream, kind)
        if sending.translated:
            headers = [(name, value) for name, value in headers if name != "content-type"] + [("content-type", "application/json")]
        if kind == "vllm":
            headers = [(name, value) for name, value in headers if name != REQUEST_HEADER]
            headers.append((REQUEST_HEADER, request_name(self.tape.generation_id)))  # the engine records under the same id
            headers += [(SESSION_HEADER, self.session.name), (GENERATION_HEADER, self.tape.name)]
        tracing = self.parts.tracing
        return tracing.outgoing(self.tape.generation_id, headers, self.upstream.url, kind) if tracing else headers

    def _expired(self, seconds: float) -> None:
        self.exchange.abort(Failure(errors.TIMEOUT, f"The upstream was silent for {seconds:g} s."))

    def _overdue(self) -> None:
        seconds = self.settings.total_timeout_s
        self.exchange.abort(Failure(errors.TIMEOUT, f"The answer was not complete after {seconds:g} s."))

    async def _refused(self, reply: Reply, answer: Answer, *, may_retry: bool) -> bool:
        """Pass an error answer on, in its own words if they are JSON; True if it was an addition that was refused."""
        body = await reply.read()
        if may_retry and reply.status in (400, 422) and b"stream_options" in body:
            return True
        failure = error_of(body, reply.status)
        if self.passage.spare(reply.status):
            raise failure
        self.tape.failed(failure)
        await self._durable()
        reworded = self.exchange.started and self.exchange.shape is not errors.OPENAI
        if failure.fault is errors.MALFORMED or answer.content_type is not None or reworded:
            await self.exchange.fail(failure, self._own_headers())
        else:
            await self.exchange.respond(reply.status, body, self._headers(reply, answer))
        return False

    async def _whole(self, reply: Reply, answer: Answer) -> None:
        body = await reply.read()
        try:
            document = load(body)
            completion = answer.read_whole(document)
            self.tape.whole(completion, self.tape.now_us())
            body = answer.write_whole(document, completion, body)
        except ODD as error:
            raise malformed(f"{reply.content_type}: {error}") from error
        await self._finished()
        await self.exchange.respond(reply.status, body, self._headers(reply, answer))

    async def _stream(self, reply: Reply, answer: Answer, deadline: Deadline) -> None:
        self.exchange.answer(reply.status, self._headers(reply, answer))
        between_s = self.settings.between_tokens_timeout_s
        stream = Stream(self.exchange, self.tape, answer, deadline, between_s=between_s, hurry=self.strict)
        while stream.end is None and await reply.pump(stream.take):
            await stream.caught_up()
        if stream.end is None and stream.close():
            await stream.caught_up()
        deadline.pause()
        if stream.end is None and not self.tape.complete and not self.tape.ended:
            raise Failure(errors.DISCONNECTED, "The upstream ended its answer in the middle.")
        await self._finished()
        await self.exchange.end(stream.unsent + answer.end(stream.end.raw if stream.end else b""))
        if not reply.complete:
            await self._drain(reply)

    async def _finished(self) -> None:
        """The answer is complete: recorded, and in strict mode durable, before the client sees its end."""
        self.exchange.settled = True
        self._remember()
        self.tape.finished()
        if self.tape.unreconciled:
            log.warning("tokens do not reconcile", generation=self.tape.name, **self.tape.unreconciled)
        if self.tape.fingerprint:
            self.upstream.saw_fingerprint(self.tape.fingerprint)
        await self._durable()

    async def _drain(self, reply: Reply) -> None:
        """Take in what follows [DONE], which is nothing; a connection that is not read to its end is closed."""
        with contextlib.suppress(TimeoutError, Failure):
            async with asyncio.timeout(DRAIN_S):
                await reply.read()

    async def _durable(self) -> None:
        """In strict mode wait until all that was recorded is durable.

        Raises:
            Failure: the recorder cannot make it so.
        """
        if not self.strict:
            return
        try:
            async with asyncio.timeout(self.parts.settings.log.timeout_s):
                await self.parts.recorder.durable()
        except (TimeoutError, TokentapeError) as error:
            message = "The request cannot be recorded, and this gateway serves nothing unrecorded."
            raise Failure(errors.NOT_RECORDED, message, detail=str(error)) from error

    async def _fail(self, failure: Failure) -> None:
        self.exchange.settled = True
        self._remember()
        if failure.fault is errors.UNREACHABLE:
            self.upstream.lost()
        self.tape.failed(failure)
        try:
            await self._durable()
        except Failure as unrecorded:
            failure = unrecorded
        await self.exchange.fail(failure, self._own_headers())

    def _own_headers(self) -> Headers:
        return [(SESSION_HEADER.encode(), self.session.name.encode()), (GENERATION_HEADER.encode(), self.tape.name.encode())]

    def _headers(self, reply: Reply, answer: Answer) -> Headers:
        headers = answer_headers(reply.headers)
        if answer.content_type is not None:
            headers = [(name, value) for name, value in headers if name != b"content-type"] + [(b"content-type", answer.content_type)]
        return headers + self._own_headers()
