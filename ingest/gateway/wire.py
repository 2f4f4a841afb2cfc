"""The HTTP/1.1 client of one upstream: connections kept, and each piece of an answer given on in the callback that brought it.

A general client wakes a task for every piece, which for a stream of tokens costs more than all else that is done with it; here
nothing wakes before the answer ends or its client does not keep up. What it does not do: redirects, proxies, cookies.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence

import httptools
from yarl import URL

from ingest.gateway import errors
from ingest.gateway.errors import Failure

KEEPALIVE_S = 3.0
"""An idle connection is dropped before vLLM's server does (5 s), or a request could be sent into a closing one."""

READ_BUFFER_BYTES = 1 << 18
"""What may lie unread of one answer before the upstream has to wait."""

HEAD_BYTES_MAX = 1 << 16
"""A longer head is none: the parser itself would take one without end."""

_WINDOW_BITS = {b"gzip": 16 + zlib.MAX_WBITS, b"x-gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_PORTS = {"http": 80, "https": 443}

_LIVENESS = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *((socket.IPPROTO_TCP, getattr(socket, name), 5) for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT") if hasattr(socket, name)),
]
"""After 5 s without a word the server's machine is asked whether it is there, five times."""

Take = Callable[[bytes], bool]
"""Is given a piece of a body; returns True where no more is wanted for now."""


class Wire:
    """The connections to one server. Use from one event loop."""

    def __init__(self, url: str, connect_timeout_s: float) -> None:
        self.on_connect: Callable[[float | None], None] = lambda oldest: None
        """Told of each new connection, with the time since which the oldest of the others is open, None where there is none."""
        self.on_cut: Callable[[], None] = lambda: None
        """Told that the server ended a connection which was idle, in the middle of an answer or there as a sign."""
        server = URL(url)
        self._host, self._port = server.host or "", server.port or _PORTS.get(server.scheme, 80)
        self._name = server.raw_authority.rpartition("@")[2]
        self._user = base64.b64encode(f"{server.user or ''}:{server.password or ''}".encode()).decode() if server.user else None
        self._secure = ssl.create_default_context() if server.scheme == "https" else None
        self._connect_timeout_s = connect_timeout_s
        self._idle: deque[_Connection] = deque()
        self._open: dict[_Connection, None] = {}  # oldest first
        self._sweep: asyncio.TimerHandle | None = None
        self._sign: _Connection | None = None

    @property
    def oldest(self) -> float | None:
        """Since when the oldest connection stands, None where there is none."""
        first = next(iter(self._open), None)
        return first.since if first else None

    async def post(self, target: str, headers: Sequence[tuple[str, str]], body: bytes) -> Reply:
        """Send a request and return its answer once the head is there; the caller MUST close it.

        Raises:
            Failure: no connection, or one that ended or told something else than HTTP.
        """
        request = self._head(target, headers, len(body))
        connection = self._idle.pop() if self._idle else await self._connect()
        try:
            return await connection.ask(request, body)
        except BaseException:
            connection.abort()
            raise

    async def stand(self) -> None:
        """Hold a connection over which nothing is asked: it stands as long as the server does, where a used one is dropped soon.

        Raises:
            Failure: no connection.
        """
        if self._sign is None or self._sign not in self._open:
            self._sign = await self._connect()
            self._sign.stay()

    def close(self) -> None:
        """Cut all connections."""
        if self._sweep:
            self._sweep.cancel()
        for connection in list(self._open):
            connection.abort()

    def keep(self, connection: _Connection) -> None:
        """Take back a connection whose answer was read to its end."""
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(KEEPALIVE_S, self._drop_idle)

    def lost(self, connection: _Connection, *, unfinished: bool) -> None:
        """A connection is gone, `unfinished` where that is in the middle of an answer."""
        self._open.pop(connection, None)
        idle = connection in self._idle
        if idle:
            self._idle.remove(connection)
        if idle or unfinished or connection is self._sign:
            self.on_cut()

    def _head(self, target: str, headers: Sequence[tuple[str, str]], length: int) -> bytes:
        lines = [f"POST {target} HTTP/1.1", f"host: {self._name}", f"content-length: {length}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if self._user and not any(name.lower() == "authorization" for name, _ in headers):
            lines.append(f"authorization: Basic {self._user}")
        head = "\r\n".join([*lines, "", ""])
        if head.count("\n") != len(lines) + 1 or head.count("\r") != len(lines) + 1:
            raise Failure(errors.INVALID_REQUEST, "A header holds a line break.")
        return head.encode()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(lambda: _Connection(self), self._host, self._port, ssl=self._secure)
        except OSError as error:  # a time-out is one
            detail = str(error) or f"no connection to {self._name} within {self._connect_timeout_s:g} s"
            raise Failure(errors.UNREACHABLE, "The upstream does not answer.", detail=detail) from error
        oldest = self.oldest
        self._open[connection] = None
        self.on_connect(oldest)
        return connection

    def _drop_idle(self) -> None:
        loop = asyncio.get_running_loop()
        while self._idle and self._idle[0].idle_since + KEEPALIVE_S <= loop.time():
            self._idle.popleft().abort()
        self._sweep = loop.call_at(self._idle[0].idle_since + KEEPALIVE_S, self._drop_idle) if self._idle else None


class _Connection(asyncio.Protocol):
    """One connection and the answer that comes over it, if one is asked for."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.since = time.monotonic()
        self.idle_since = 0.0
        self._transport: asyncio.Transport
        self._reply: Reply | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it is one: of a TCP connection
        """Begin."""
        self._transport = transport

    def ask(self, head: bytes, body: bytes) -> asyncio.Future[Reply]:
        """Send a request; the future is done when the head of its answer is there."""
        reply = self._reply = Reply(self)
        self._transport.writelines((head, body))
        return reply.begun

    def data_received(self, data: bytes) -> None:
        """Something came; what nobody asked for makes the connection useless."""
        if self._reply is None:
            return self.abort()
        return self._reply.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of the connection is the end of an answer that has no other."""
        reply = self._reply
        if reply is not None:
            reply.cut(exc)
        self.wire.lost(self, unfinished=reply is not None and not reply.complete)

    def stay(self) -> None:
        """Nothing will be asked for long: a server that is gone without a word is found out all the same."""
        carrier = self._transport.get_extra_info("socket")
        for level, option, value in _LIVENESS if carrier is not None else ():
            carrier.setsockopt(level, option, value)

    def pause(self) -> None:
        """The upstream has to wait."""
        self._transport.pause_reading()

    def resume(self) -> None:
        """The upstream may go on."""
        self._transport.resume_reading()

    def release(self, *, keep: bool) -> None:
        """The answer is not needed any more."""
        self._reply = None
        if keep and not self._transport.is_closing():
            self.wire.keep(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once, whatever was not sent or read."""
        self._reply = None
        self._transport.abort()


class Reply:
    """One answer. `pump` or `read` its body, then `close` it."""

    def __init__(self, connection: _Connection) -> None:
        self.status = 0
        self.since = connection.since
        """Since when the connection is open over which it comes, by the monotonic clock."""
        self.headers: list[tuple[bytes, bytes]] = []
        self.content_type = ""
        self.complete = False
        self.begun: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._connection: _Connection | None = connection
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # the parser calls it for each chunk
        self._parser = httptools.HttpResponseParser(self)
        self._head_bytes = 0
        self._endless = False  # the end of the connection is its end
        self._keep = False
        self._paused = False
        self._unpacker: zlib._Decompress | None = None
        self._failure: Failure | None = None
        self._take: Take | None = None
        self._stopped: asyncio.Future[bool] | None = None

    async def pump(self, take: Take) -> bool:
        """Give `take` each piece of the body the moment it comes; False once the body has ended, True once `take` has stopped it.

        Raises:
            Failure: the connection ended in the middle, or what came is not HTTP. Whatever `take` raises.
        """
        self._take = take
        stopped: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._stopped = stopped
        try:
            self._give()
            if self._paused and self._connection is not None and not stopped.done():
                self._paused = False
                self._connection.resume()
            return await stopped
        finally:
            self._take = self._stopped = None
            if stopped.done() and not stopped.cancelled():
                stopped.exception()  # told already, or overtaken by the end of the whole exchange

    async def read(self) -> bytes:
        """The rest of the body. Raises as `pump` does."""
        pieces: list[bytes] = []

        def take(piece: bytes) -> bool:
            pieces.append(piece)
            return False

        await self.pump(take)
        return b"".join(pieces)

    def close(self) -> None:
        """Let go of the connection: it is used again if the answer was complete, else cut."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(keep=self.complete and self._keep)

    def feed(self, data: bytes) -> None:
        """Read what came."""
        if not self.status:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._keep = False
            if not self.complete:  # what follows a whole answer belongs to none
                self._failure = self._failure or _malformed(str(error) or repr(error))
        if not self.status and self._head_bytes > HEAD_BYTES_MAX:
            self._failure = _malformed(f"a head of more than {HEAD_BYTES_MAX} bytes")
        self._give()

    def cut(self, error: Exception | None) -> None:
        """The connection has ended."""
        self._connection = None
        if self.status and self._endless and error is None and self._failure is None:
            self.complete = True
        elif not self.complete:
            detail = str(error) if error else "the connection was closed"
            message = "The upstream closed the connection before its answer was complete."
            self._failure = self._failure or Failure(errors.DISCONNECTED, message, detail=detail)
        self._give()

    # Called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or one of a trailer, which is not needed."""
        if not self.status:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is there; one of 1xx goes before the answer's own."""
        if self.complete:
            raise ValueError("a second answer")
        if self._parser.get_status_code() < 200:
            return self.headers.clear()
        self.status = self._parser.get_status_code()
        named = {name.lower(): value for name, value in self.headers}
        self._endless = b"content-length" not in named and b"transfer-encoding" not in named
        self.content_type = named.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")
        encoding = named.get(b"content-encoding", b"identity").strip().lower()
        if encoding in _WINDOW_BITS:
            self._unpacker = zlib.decompressobj(_WINDOW_BITS[encoding])
        elif encoding not in (b"identity", b""):
            self._failure = _malformed(f"an encoding that was not asked for: {encoding[:40]!r}")
        if not self.begun.done():
            self.begun.set_result(self)
        return None

    def on_message_complete(self) -> None:
        """The body is complete."""
        if self.status:
            self.complete = True
            self._keep = self._parser.should_keep_alive()

    # Giving on

    def _give(self) -> None:
        """Give on what came, and then the end, to whoever takes it; what nobody takes is kept, up to a limit."""
        if self._failure is not None and not self.begun.done():
            return self.begun.set_exception(self._failure)
        if self._take is None or self._stopped is None or self._stopped.done():
            return self._hold()
        try:
            if self._pieces and self._take(self._piece()):
                return self._stopped.set_result(True)
            if self._failure is not None:
                raise self._failure
            if self.complete:
                if self._unpacker is not None and not self._unpacker.eof:
                    raise _malformed("its compressed body ends in the middle")
                self._stopped.set_result(False)
        except Exception as error:
            self._stopped.set_exception(error)
        return None

    def _piece(self) -> bytes:
        pieces = self._pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._unpacker is None or self._failure is not None:
            return piece
        try:
            unpacked: bytes = self._unpacker.decompress(piece)
        except zlib.error as error:
            raise _malformed(str(error)) from error
        return unpacked

    def _hold(self) -> None:
        waiting = not self._paused and self._connection is not None and not self.complete
        if waiting and self._pieces and sum(map(len, self._pieces)) > READ_BUFFER_BYTES:
            assert self._connection is not None
            self._paused = True
            self._connection.pause()


def _malformed(detail: str) -> Failure:
    return Failure(errors.MALFORMED, "The upstream sent something that is not HTTP.", detail=detail)
