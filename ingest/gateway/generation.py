"""One generation from the client's request to the last byte of its answer, whatever the endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import structlog

from ingest.gateway import errors
from ingest.gateway.endpoints.base import Answer, Endpoint, Sending
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Deadline, Exchange, Headers
from ingest.gateway.headers import answer_headers, authorization_of, request_facts, session_facts, upstream_headers
from ingest.gateway.parts import Parts
from ingest.gateway.sessions import GENERATION_HEADER, SESSION_HEADER, Session
from ingest.gateway.sse import Block, EventParser, EventTooLong
from ingest.gateway.tape import Tape
from ingest.gateway.upstream import failure_of
from schemas.errors import TokentapeError, UsageError
from schemas.requests import ClientRequest, load

log = structlog.get_logger(__name__)

DRAIN_S = 1.0
"""How long the end of an upstream's answer is waited for after its [DONE], so that its connection can be used again."""

_ODD = (TypeError, AttributeError, LookupError, ValueError)
"""What reading an answer raises that is valid JSON and yet no answer."""


class Generation:
    """One request to an endpoint and its answer; every way in which it can end is recorded and told to the client."""

    def __init__(self, parts: Parts, exchange: Exchange, endpoint: Endpoint) -> None:
        self.parts = parts
        self.exchange = exchange
        self.endpoint = endpoint
        exchange.shape = endpoint.shape
        self.upstream = parts.upstream
        self.settings = parts.settings.gateway
        self.strict = parts.settings.recorder.mode == "strict"
        self.authorization = authorization_of(exchange)
        self.misnamed: Failure | None = None
        self.session = self._session()
        redactor = parts.redactor.for_tenant(self.session.context.tenant)
        self.tape = Tape(parts.recorder, self.session, redactor.with_token(self.authorization), endpoint.path)

    async def serve(self) -> None:
        """From the request to the last byte."""
        try:
            await self._serve()
        except Failure as failure:
            await self._fail(failure)
        except asyncio.CancelledError:
            await self._fail(self.exchange.reason())
        except Exception as error:
            log.exception("gateway failed", generation=self.tape.generation_id.hex())
            await self._fail(Failure(errors.INTERNAL, "The gateway failed.", detail=repr(error)))
        finally:
            self.exchange.close()

    async def _serve(self) -> None:
        request = await self._request()
        self.exchange.watch()
        kind = ""
        try:
            kind = await self.upstream.ready(self.authorization)
        finally:  # also where nothing answers: the request is recorded before its failure
            added = self.endpoint.additions(request, kind) if kind else {}
            extra = {name: value for name, value in added.items() if name not in self.upstream.refused}
            self._submitted(request, extra)
        await self._durable()
        await self._attempts(request, extra, kind)

    def _session(self) -> Session:
        user = self.parts.redactor.for_tenant(self.parts.settings.tenant).clean(self.exchange.header("x-tokentape-user"))
        actor = user or self.parts.sessions.key_id(self.authorization) or ""
        try:
            return self.parts.sessions.find(self.exchange.header(SESSION_HEADER), actor)
        except Failure as failure:
            self.misnamed = failure
            return self.parts.sessions.find(None, actor)

    async def _request(self) -> ClientRequest:
        """The request, or the record of what came in its place.

        Raises:
            Failure: it cannot be read.
        """
        body = b""
        try:
            body = await self.exchange.body()
            if self.misnamed:
                raise self.misnamed
            return self.endpoint.read(self.exchange, body)
        except UsageError as error:
            failure = Failure(errors.INVALID_REQUEST, str(error.fault), param=error.place or None)
            self._unreadable(body)
            raise failure from error
        except (Failure, asyncio.CancelledError):
            self._unreadable(body)
            raise

    def _unreadable(self, body: bytes) -> None:
        self._open()
        self.tape.unreadable(body, self._facts(body))

    def _submitted(self, request: ClientRequest, extra: dict[str, Any]) -> None:
        self._open()
        environment = self.upstream.environment
        self.tape.environment(environment)
        facts = self._facts(request.body)
        facts["environment_id"] = environment.environment_id if environment else None
        self.tape.submitted(request, facts, extra)

    def _open(self) -> None:
        self.tape.opened(session_facts(self.exchange, self.tape.clean, self.parts.settings.recorder.sample_rate))

    def _facts(self, body: bytes) -> dict[str, Any]:
        return request_facts(self.exchange, self.tape.clean) | {
            "upstream": self.upstream.name,
            "api_key_id": self.parts.sessions.key_id(self.authorization),
            "request_digest": self.session.digest(body),
        }

    async def _attempts(self, request: ClientRequest, extra: dict[str, Any], kind: str) -> None:
        """Forward until an answer has begun or nothing more is to be tried.

        Raises:
            Failure: the last attempt failed.
        """
        attempt = failed = 1
        while True:
            try:
                if not await self._forward(request, extra, kind, attempt=attempt):
                    return
                self.upstream.refused.add("stream_options")
                del extra["stream_options"]
            except (aiohttp.ClientError, OSError) as error:
                failure = failure_of(error)
                begun = self.exchange.started or self.tape.begun or failure.fault is errors.MALFORMED
                if begun or failed > self.settings.retries:
                    raise failure from error
                log.warning("upstream failed before its answer: asked again", generation=self.tape.name, error=failure.detail)
                failed += 1
            attempt += 1

    async def _forward(self, request: ClientRequest, extra: dict[str, Any], kind: str, *, attempt: int) -> bool:
        """Send the request upstream and pass the answer on; True if it is to be sent again without an addition."""
        deadline = Deadline(self._expired, self.settings.first_token_timeout_s)
        overdue = asyncio.get_running_loop().call_later(self.settings.total_timeout_s, self._overdue)
        self.tape.forwarded(attempt)
        sending = self._sending(request, extra, kind)
        url = self.upstream.url_of(sending.path, sending.query)
        headers = self._outgoing_headers(sending, kind)
        try:
            async with self.upstream.client.post(url, data=sending.body, headers=headers, allow_redirects=False) as response:
                self.tape.answered(response.status)
                answer = self.endpoint.answer(request, extra, kind, self.upstream.fingerprint)
                if response.status >= 300:
                    return await self._refused(response, answer, may_retry="stream_options" in extra)
                streams = response.content_type == "text/event-stream"
                if answer.content_type is not None and streams != request.stream:
                    raise _malformed(f"{response.content_type} where {'a stream' if request.stream else 'none'} was asked for")
                if streams:
                    await self._stream(response, answer, deadline)
                else:
                    await self._whole(response, answer)
                return False
        finally:
            overdue.cancel()
            deadline.stop()

    def _sending(self, request: ClientRequest, extra: dict[str, Any], kind: str) -> Sending:
        try:
            return self.endpoint.sending(self.exchange, request, extra, kind)
        except UsageError as error:
            raise Failure(errors.INVALID_REQUEST, str(error.fault), param=error.place or None) from error

    def _outgoing_headers(self, sending: Sending, kind: str) -> list[tuple[str, str]]:
        headers = upstream_headers(self.exchange, self.upstream.authorization(self.authorization), kind)
        if sending.translated:
            headers = [(name, value) for name, value in headers if name != "content-type"] + [("content-type", "application/json")]
        if kind == "vllm":
            headers += [(SESSION_HEADER, self.session.name), (GENERATION_HEADER, self.tape.name)]
        return headers

    def _expired(self, seconds: float) -> None:
        self.exchange.abort(Failure(errors.TIMEOUT, f"The upstream was silent for {seconds:g} s."))

    def _overdue(self) -> None:
        seconds = self.settings.total_timeout_s
        self.exchange.abort(Failure(errors.TIMEOUT, f"The answer was not complete after {seconds:g} s."))

    async def _refused(self, response: aiohttp.ClientResponse, answer: Answer, *, may_retry: bool) -> bool:
        """Pass an error answer on, in its own words if they are JSON; True if it was an addition that was refused."""
        body = await response.read()
        if may_retry and response.status in (400, 422) and b"stream_options" in body:
            return True
        failure = _error_of(body, response.status)
        self.tape.failed(failure)
        await self._durable()
        if failure.fault is errors.MALFORMED or answer.content_type is not None:
            await self.exchange.respond(failure.status, self.exchange.shape.body(failure), [errors.JSON, *self._own_headers()])
        else:
            await self.exchange.respond(response.status, body, self._headers(response, answer))
        return False

    async def _whole(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        body = await response.read()
        try:
            document = load(body)
            completion = answer.read_whole(document)
            self.tape.whole(completion, self.tape.now_us())
            body = answer.write_whole(document, completion, body)
        except _ODD as error:
            raise _malformed(f"{response.content_type}: {error}") from error
        await self._finished()
        await self.exchange.respond(response.status, body, self._headers(response, answer))

    async def _stream(self, response: aiohttp.ClientResponse, answer: Answer, deadline: Deadline) -> None:
        self.exchange.answer(response.status, self._headers(response, answer))
        parser = EventParser()
        async for piece in _pieces(response):
            if await self._pass_on(_feed(parser, piece), answer, deadline):
                return await self._drain(response)
        rest = parser.close()
        if rest and await self._pass_on([rest], answer, deadline):
            return None
        if not self.tape.complete and not self.tape.ended:
            raise Failure(errors.DISCONNECTED, "The upstream ended its answer in the middle.")
        await self._finished()
        return await self.exchange.end(answer.end(b""))

    async def _pass_on(self, blocks: list[Block], answer: Answer, deadline: Deadline) -> bool:
        """Record and send what came in one piece; True if it was the end."""
        offset_us = self.tape.now_us()
        out: list[bytes] = []
        failure = end = None
        for block in blocks:
            if block.data is None:
                out.append(block.raw)
            elif answer.ends(block):
                end = block
                break
            else:
                try:
                    out.append(self._event(block, answer, offset_us))
                except Failure as malformed:
                    failure = malformed
                    break
        deadline.pause()
        sent = b"".join(out)
        if sent and (failure or self.strict or not end):
            await self.exchange.write(sent)
            sent = b""
        if failure:
            raise failure
        if end:
            await self._finished()
            await self.exchange.end(sent + answer.end(end.raw))
        elif any(block.data is not None for block in blocks):
            deadline.move(self.settings.between_tokens_timeout_s)
        else:
            deadline.resume()
        return end is not None

    def _event(self, block: Block, answer: Answer, offset_us: int) -> bytes:
        """Record one event of the stream; the bytes to send for it.

        Raises:
            Failure: it is not a chunk.
        """
        assert block.data is not None
        try:
            event = load(block.data)
            if "error" in event and not event.get("choices"):
                failure = _failure_in(event, 200)
                if answer.content_type is not None:
                    raise failure
                self.tape.failed(failure)
                return answer.end(block.raw)
            chunk = answer.read(event)
            if chunk is not None:
                self.tape.chunk(chunk, offset_us)
            return answer.write(event, chunk, block.raw)
        except _ODD as error:
            raise _malformed(f"{error}: {block.data[:200]!r}") from error

    async def _finished(self) -> None:
        """The answer is complete: recorded, and in strict mode durable, before the client sees its end."""
        self.exchange.settled = True
        self.tape.finished()
        if self.tape.unreconciled:
            log.warning("tokens do not reconcile", generation=self.tape.name, **self.tape.unreconciled)
        if self.tape.fingerprint:
            self.upstream.saw_fingerprint(self.tape.fingerprint)
        await self._durable()

    async def _drain(self, response: aiohttp.ClientResponse) -> None:
        """Take in what follows [DONE], which is nothing; a connection that is not read to its end is closed."""
        try:
            async with asyncio.timeout(DRAIN_S):
                await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError):
            response.close()

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

    def _headers(self, response: aiohttp.ClientResponse, answer: Answer) -> Headers:
        headers = answer_headers(response.raw_headers)
        if answer.content_type is not None:
            headers = [(name, value) for name, value in headers if name != b"content-type"] + [(b"content-type", answer.content_type)]
        return headers + self._own_headers()


async def _pieces(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body as it arrives."""
    while piece := await response.content.readany():
        yield piece


def _feed(parser: EventParser, piece: bytes) -> list[Block]:
    try:
        return parser.feed(piece)
    except EventTooLong as error:
        raise _malformed(str(error)) from error


def _malformed(detail: str) -> Failure:
    return Failure(errors.MALFORMED, "The upstream sent something that is not an answer.", detail=detail)


def _error_of(body: bytes, status: int) -> Failure:
    """The failure that an error answer is: in its own words if it has any, malformed if it is no JSON object."""
    try:
        answer = load(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        shown = body[:200].decode(errors="replace")
        message = f"The upstream answered with status {status} and no JSON."
        return Failure(errors.MALFORMED, message, status=status if status >= 400 else 502, detail=f"status {status}: {shown}")
    return _failure_in(answer, status)


def _failure_in(answer: dict[str, Any], status: int) -> Failure:
    error = answer.get("error", answer)
    message = error.get("message") if isinstance(error, dict) else error
    code = error.get("code") if isinstance(error, dict) else None
    known = status if status >= 400 else code if isinstance(code, int) and 400 <= code < 600 else 502
    return Failure(errors.UPSTREAM_ERROR, message if isinstance(message, str) else "The upstream reported an error.", status=known)
