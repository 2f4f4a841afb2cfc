"""`/v1/chat/completions`: one generation from the client's request to the last byte of its answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import structlog

from ingest.gateway import errors
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Deadline, Exchange, Headers
from ingest.gateway.headers import answer_headers, request_facts, session_facts, upstream_headers
from ingest.gateway.parts import Parts
from ingest.gateway.sessions import GENERATION_HEADER, SESSION_HEADER, Session
from ingest.gateway.sse import Block, EventParser, EventTooLong
from ingest.gateway.tape import Tape
from ingest.gateway.upstream import failure_of
from ingest.gateway.veil import Veil, additions
from schemas.errors import TokentapeError, UsageError
from schemas.requests import ChatRequest, load, read_chat, splice

log = structlog.get_logger(__name__)

PATH = "/v1/chat/completions"

DRAIN_S = 1.0
"""How long the end of an upstream's answer is waited for after its [DONE], so that its connection can be used again."""

_ODD = (TypeError, AttributeError, LookupError, ValueError)
"""What reading an answer raises that is valid JSON and yet no answer."""


async def chat_completions(parts: Parts, exchange: Exchange) -> None:
    """Serve one request; every way in which it can end is recorded and told to the client."""
    await Generation(parts, exchange).serve()


class Generation:
    """One request to `PATH` and its answer."""

    def __init__(self, parts: Parts, exchange: Exchange) -> None:
        self.parts = parts
        self.exchange = exchange
        self.upstream = parts.upstream
        self.settings = parts.settings.gateway
        self.strict = parts.settings.recorder.mode == "strict"
        self.authorization = exchange.header("authorization")
        self.misnamed: Failure | None = None
        self.session = self._session()
        redactor = parts.redactor.for_tenant(self.session.context.tenant)
        self.tape = Tape(parts.recorder, self.session, redactor.with_token(self.authorization), PATH)

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
            added = additions(request, kind) if kind else {}
            extra = {name: value for name, value in added.items() if name not in self.upstream.refused}
            self._submitted(request, extra)
        await self._durable()
        try:
            if await self._forward(request, extra, kind, attempt=1):
                self.upstream.refused.add("stream_options")
                del extra["stream_options"]
                await self._forward(request, extra, kind, attempt=2)
        except (aiohttp.ClientError, OSError) as error:
            raise failure_of(error) from error

    def _session(self) -> Session:
        user = self.parts.redactor.for_tenant(self.parts.settings.tenant).clean(self.exchange.header("x-tokentape-user"))
        actor = user or self.parts.sessions.key_id(self.authorization) or ""
        try:
            return self.parts.sessions.find(self.exchange.header(SESSION_HEADER), actor)
        except Failure as failure:
            self.misnamed = failure
            return self.parts.sessions.find(None, actor)

    async def _request(self) -> ChatRequest:
        """The request, or the record of what came in its place.

        Raises:
            Failure: it cannot be read.
        """
        body = b""
        try:
            body = await self.exchange.body()
            if self.misnamed:
                raise self.misnamed
            return read_chat(body)
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

    def _submitted(self, request: ChatRequest, extra: dict[str, Any]) -> None:
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

    async def _forward(self, request: ChatRequest, extra: dict[str, Any], kind: str, *, attempt: int) -> bool:
        """Send the request upstream and pass the answer on; True if it is to be sent again without an addition."""
        deadline = Deadline(self._expired, self.settings.first_token_timeout_s)
        self.tape.forwarded(attempt)
        url = self.upstream.url_of(PATH, self.exchange.scope["query_string"])
        headers = upstream_headers(self.exchange, self.upstream.authorization(self.authorization))
        if kind == "vllm":
            headers += [(SESSION_HEADER, self.session.name), (GENERATION_HEADER, self.tape.name)]
        try:
            async with self.upstream.client.post(url, data=splice(request, extra), headers=headers, allow_redirects=False) as response:
                self.tape.answered(response.status)
                veil = Veil(extra, kind, request.n, self.upstream.fingerprint)
                if response.status >= 300:
                    return await self._refused(response, may_retry=attempt == 1 and "stream_options" in extra)
                if response.content_type == "text/event-stream":
                    await self._stream(response, veil, deadline)
                else:
                    await self._whole(response, veil)
                return False
        finally:
            deadline.stop()

    def _expired(self, seconds: float) -> None:
        self.exchange.abort(Failure(errors.TIMEOUT, f"The upstream was silent for {seconds:g} s."))

    async def _refused(self, response: aiohttp.ClientResponse, *, may_retry: bool) -> bool:
        """Pass an error answer on, in its own words if they are JSON; True if it was an addition that was refused."""
        body = await response.read()
        if may_retry and response.status in (400, 422) and b"stream_options" in body:
            return True
        failure = _error_of(body, response.status)
        self.tape.failed(failure)
        await self._durable()
        if failure.fault is errors.MALFORMED:
            await self.exchange.respond(failure.status, failure.body, [errors.JSON, *self._own_headers()])
        else:
            await self.exchange.respond(response.status, body, self._headers(response))
        return False

    async def _whole(self, response: aiohttp.ClientResponse, veil: Veil) -> None:
        body = await response.read()
        try:
            answer = load(body)
            self.tape.whole(answer, self.tape.now_us())
            body = veil.whole(answer, body)
        except _ODD as error:
            raise _malformed(f"{response.content_type}: {error}") from error
        await self._finished()
        await self.exchange.respond(response.status, body, self._headers(response))

    async def _stream(self, response: aiohttp.ClientResponse, veil: Veil, deadline: Deadline) -> None:
        self.exchange.answer(response.status, self._headers(response))
        parser = EventParser()
        async for piece in _pieces(response):
            if await self._pass_on(_feed(parser, piece), veil, deadline):
                return await self._drain(response)
        rest = parser.close()
        if rest and await self._pass_on([rest], veil, deadline):
            return None
        if not self.tape.complete and not self.tape.ended:
            raise Failure(errors.DISCONNECTED, "The upstream ended its answer in the middle.")
        await self._finished()
        return await self.exchange.end(veil.rest())

    async def _pass_on(self, blocks: list[Block], veil: Veil, deadline: Deadline) -> bool:
        """Record and send what came in one piece; True if it was the end."""
        offset_us = self.tape.now_us()
        out: list[bytes] = []
        failure = end = None
        for block in blocks:
            if block.data is None:
                out.append(block.raw)
            elif block.data == b"[DONE]":
                end = block
                break
            else:
                try:
                    out.append(self._event(block, veil, offset_us))
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
            await self.exchange.end(sent + veil.rest() + end.raw)
        elif any(block.data is not None for block in blocks):
            deadline.move(self.settings.between_tokens_timeout_s)
        else:
            deadline.resume()
        return end is not None

    def _event(self, block: Block, veil: Veil, offset_us: int) -> bytes:
        """Record one event of the stream; the bytes to send for it.

        Raises:
            Failure: it is not a chunk.
        """
        assert block.data is not None
        try:
            chunk = load(block.data)
            if "error" in chunk and not chunk.get("choices"):
                self.tape.failed(_failure_in(chunk, 200))
                return veil.rest() + block.raw
            self.tape.chunk(chunk, offset_us)
            return veil.chunk(chunk, block.raw)
        except _ODD as error:
            raise _malformed(f"{error}: {block.data[:200]!r}") from error

    async def _finished(self) -> None:
        """The answer is complete: recorded, and in strict mode durable, before the client sees its end."""
        self.exchange.settled = True
        self.tape.finished()
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

    def _headers(self, response: aiohttp.ClientResponse) -> Headers:
        return answer_headers(response.raw_headers) + self._own_headers()


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
