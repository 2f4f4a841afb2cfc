"""One HTTP exchange with a client: its request, its answer, and the ways in which it can be cut short.

Whatever cuts an exchange short (the client hangs up, a deadline passes, the gateway stops) comes as `abort`: the task
that serves the exchange is cancelled and finds the reason in `aborted`. So there is one place that ends a generation.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable, MutableMapping
from typing import Any

from ingest.gateway import errors
from ingest.gateway.errors import Failure

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

DISCARD_FACTOR = 8
"""A body over the limit is read to its end and discarded up to this many times the limit, so that the client gets its 413."""


class Exchange:
    """One request and its answer. Use from the task that serves it; `abort` may be called from anywhere in its loop."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, body_bytes_max: int, body_timeout_s: float | None = None) -> None:
        self.scope = scope
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.started = False
        self.settled = False  # how it ends is decided: nothing can abort it any more
        self.aborted: Failure | None = None
        self.shape = errors.OPENAI  # how the client is told of a failure
        self.body_bytes = 0
        self._receive = receive
        self._send = send
        self._body_bytes_max = body_bytes_max
        self._body_timeout_s = body_timeout_s
        task = asyncio.current_task()
        assert task is not None
        self.task: asyncio.Task[Any] = task
        self._watcher: asyncio.Task[None] | None = None
        self._answer: tuple[int, Headers] = (200, [])

    def header(self, name: str) -> str | None:
        """A header's value; bytes that are not UTF-8 are read as Latin-1, as HTTP once had it."""
        value = self.headers.get(name.encode())
        if value is None:
            return None
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.decode("latin-1")

    @property
    def client(self) -> str | None:
        """The client's address."""
        peer = self.scope.get("client")
        return str(peer[0]) if peer else None

    async def body(self) -> bytes:
        """The request's body.

        Raises:
            Failure: over the limit, not complete in time, or the client hung up before its end.
        """
        pieces: list[bytes] = []
        rest = begun(self._read_into(pieces))  # most bodies are there with their head, and need no clock
        try:
            if rest is not None:
                async with asyncio.timeout(self._body_timeout_s):
                    await rest
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        except TimeoutError:
            raise Failure(errors.TOO_SLOW, f"The request was not complete after {self._body_timeout_s:g} s.") from None

    async def _read_into(self, pieces: list[bytes]) -> None:
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Failure(errors.CLIENT_DISCONNECTED, "The client hung up before its request was complete.")
            self.body_bytes += len(message.get("body", b""))
            more = message.get("more_body", False) and self.body_bytes <= DISCARD_FACTOR * self._body_bytes_max
            if self.body_bytes <= self._body_bytes_max:
                pieces.append(message.get("body", b""))
        if self.body_bytes > self._body_bytes_max:
            raise Failure(errors.TOO_LARGE, f"The body is over the limit of {self._body_bytes_max} bytes.")

    async def pieces(self) -> AsyncIterator[bytes]:
        """The request's body as it comes, for who keeps no more of it and has a limit of its own.

        Raises:
            Failure: the client hung up before its end.
        """
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Failure(errors.CLIENT_DISCONNECTED, "The client hung up before its request was complete.")
            yield message.get("body", b"")
            more = message.get("more_body", False)

    def watch(self) -> None:
        """From here on a client that hangs up aborts the exchange; call when the body was read."""
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self.abort(Failure(errors.CLIENT_DISCONNECTED, "The client hung up."))

    def abort(self, failure: Failure) -> None:
        """End the exchange for this reason, unless its end is decided already."""
        if not self.settled and self.aborted is None:
            self.aborted = failure
            self.task.cancel()

    def reason(self) -> Failure:
        """Why the serving task was cancelled; the task lives on to say so."""
        self.task.uncancel()
        return self.aborted or Failure(errors.SHUTDOWN, "The gateway is stopping.")

    def answer(self, status: int, headers: Headers) -> None:
        """What the answer will begin with once there is something to write: until then it can still become an error."""
        self._answer = (status, headers)

    async def write(self, data: bytes) -> None:
        """Send a piece of the body; waits while the client does not read."""
        if not self.started:
            await self._start(*self._answer)
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    def write_now(self, data: bytes) -> Awaitable[None] | None:
        """Send a piece of the body at once, from whatever callback; what to wait for where the client does not read, else None."""
        return begun(self.write(data))

    async def end(self, data: bytes = b"") -> None:
        """Send the last piece."""
        self.settled = True
        if not self.started:
            await self._start(*self._answer)
        await self._send({"type": "http.response.body", "body": data})

    async def respond(self, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send a whole answer; where a stream has begun already (its client waited at a breakpoint), as its last event."""
        self.settled = True
        if self.started:
            return await self.end(b"data: " + b"\ndata: ".join(body.splitlines()) + b"\n\n" + errors.DONE)
        await self._start(status, [*headers, (b"content-length", b"%d" % len(body))])
        return await self._send({"type": "http.response.body", "body": body})

    async def fail(self, failure: Failure, headers: Headers) -> None:
        """Tell the client: as an error status before the first byte, as the last chunk of a stream after it."""
        self.settled = True
        if failure.fault is errors.CLIENT_DISCONNECTED:
            return
        try:
            async with asyncio.timeout(errors.LAST_WORDS_S):
                if self.started:
                    await self.end(self.shape.event(failure))
                else:
                    await self.respond(failure.status, self.shape.body(failure), [errors.JSON, *failure.headers, *headers])
        except TimeoutError:
            pass  # returning with an incomplete answer closes the connection

    async def _start(self, status: int, headers: Headers) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def close(self) -> None:
        """Let go of the watcher."""
        self.settled = True
        if self._watcher is not None:
            self._watcher.cancel()


def begun(coroutine: Coroutine[Any, Any, None]) -> Awaitable[None] | None:
    """Run a coroutine to where it first has to wait; the rest of it, None if nothing is left."""
    try:
        waits_for = coroutine.send(None)
    except StopIteration:
        return None
    return _Rest(coroutine, waits_for)


class _Rest:
    """The rest of a coroutine that has begun already; await it once."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        try:
            yield self._waits_for
        except BaseException:
            self._coroutine.close()
            raise
        yield from self._coroutine.__await__()


class Deadline:
    """Aborts an exchange when nothing came for too long. Moving it costs one clock reading, not a timer."""

    def __init__(self, expire: Callable[[float], None], seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._expire = expire
        self._seconds = seconds
        self._at = self._loop.time() + seconds
        self._left = seconds
        self._timer = self._loop.call_at(self._at, self._check)

    def move(self, seconds: float) -> None:
        """From now on this long."""
        self._at = self._loop.time() + seconds
        if seconds < self._seconds:  # the timer might ring too late
            self._timer.cancel()
            self._timer = self._loop.call_at(self._at, self._check)
        self._seconds = seconds

    def pause(self) -> None:
        """No deadline until it is moved or resumed: it is not the upstream that we wait for."""
        self._left = self._at - self._loop.time()
        self._at = math.inf

    def resume(self) -> None:
        """Go on with what was left."""
        self._at = self._loop.time() + self._left

    def stop(self) -> None:
        """No deadline any more."""
        self._timer.cancel()

    def _check(self) -> None:
        now = self._loop.time()
        if now >= self._at:
            self._expire(self._seconds)
        else:
            self._timer = self._loop.call_at(min(self._at, now + self._seconds), self._check)
