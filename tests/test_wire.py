"""The gateway's HTTP client, against a server that says what it is told over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
import uvloop

from ingest.gateway import errors, wire
from ingest.gateway.errors import Failure
from ingest.gateway.wire import READ_BUFFER_BYTES, Wire

T = TypeVar("T")
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CLOSE = b"<close>"
PATIENCE_S = 60.0


@dataclass
class Server:
    """Answers the n-th request with the n-th answer; after one that ends with `CLOSE` it closes the connection."""

    answers: list[bytes]
    url: str = ""
    heads: list[bytes] = field(default_factory=list)
    connections: int = 0
    sent: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
                told = self.answers.pop(0)
                answer = told.removesuffix(CLOSE)
                for at in range(0, len(answer), 1 << 16):
                    writer.write(answer[at : at + (1 << 16)])
                    await writer.drain()
                    self.sent += 1
                if told != answer:
                    break
        writer.close()


@contextlib.asynccontextmanager
async def serving(*answers: bytes, prefix: str = "") -> AsyncIterator[tuple[Server, Wire]]:
    """A server and a client of it."""
    server = Server(list(answers))
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://{prefix}127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    client = Wire(server.url, 5.0)
    try:
        yield server, client
    finally:
        client.close()
        listener.close()
        await asyncio.sleep(0)  # transports let go of their sockets in the loop's next round


def run(main: Callable[[], Awaitable[T]]) -> T:
    """In the loop that serves, and never for ever."""

    async def limited() -> T:
        async with asyncio.timeout(PATIENCE_S):
            return await main()

    return uvloop.run(limited())


async def ask(client: Wire, body: bytes = b"{}") -> tuple[int, bytes]:
    """Status and body of one answer."""
    reply = await client.post("/v1/x", [("content-type", "application/json")], body)
    try:
        return reply.status, await reply.read()
    finally:
        reply.close()


def test_a_connection_is_used_again() -> None:
    """Answers that say how long they are leave their connection for the next request."""

    async def main() -> tuple[list[tuple[int, bytes]], int]:
        async with serving(OK, OK, OK) as (server, client):
            return [await ask(client) for _ in range(3)], server.connections

    assert run(main) == ([(200, b"ok")] * 3, 1)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok" + CLOSE,
        b"HTTP/1.0 200 OK\r\n\r\nok" + CLOSE,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK,
        OK + b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
        OK + b"and what is no HTTP",
    ],
)
def test_every_end_of_a_body(answer: bytes) -> None:
    """By length, by chunks, with the connection; what goes before an answer or follows it is not of it, and spoils its connection."""

    async def main() -> tuple[tuple[int, bytes], tuple[int, bytes]]:
        async with serving(answer, OK) as (_, client):
            return await ask(client), await ask(client)

    assert run(main) == ((200, b"ok"), (200, b"ok"))


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (CLOSE, errors.DISCONNECTED),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nok" + CLOSE, errors.DISCONNECTED),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nok" + CLOSE, errors.DISCONNECTED),
        (b"SSH-2.0-OpenSSH_9.6\r\n", errors.MALFORMED),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * (wire.HEAD_BYTES_MAX + 1), errors.MALFORMED),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", errors.MALFORMED),
    ],
)
def test_what_is_no_answer(answer: bytes, fault: errors.Fault) -> None:
    """A connection that ends in the middle and bytes that are no HTTP are failures of the upstream's, each by its name."""

    async def main() -> errors.Fault:
        async with serving(answer) as (_, client):
            with pytest.raises(Failure) as caught:
                await ask(client)
            return caught.value.fault

    assert run(main) is fault


def test_nobody_there() -> None:
    """A port on which nobody listens."""

    async def main() -> errors.Fault:
        async with serving() as (_, client):
            pass
        with pytest.raises(Failure) as caught:
            await ask(client)
        return caught.value.fault

    assert run(main) is errors.UNREACHABLE


def test_credentials_of_the_address_and_no_line_breaks() -> None:
    """User and password of the address become a header, unless the request has one of its own; a header cannot smuggle another."""

    async def main() -> list[bytes]:
        async with serving(OK, OK, prefix="me:secret@") as (server, client):
            await ask(client)
            (await client.post("/v1/x", [("authorization", "Bearer other")], b"")).close()
            with pytest.raises(Failure, match="line break"):
                await client.post("/v1/x", [("x", "a\r\ny: b")], b"")
            return [next(line for line in head.split(b"\r\n") if line.lower().startswith(b"authorization")) for head in server.heads]

    assert run(main) == [b"authorization: Basic bWU6c2VjcmV0", b"authorization: Bearer other"]


def test_what_is_not_taken_waits_with_the_server() -> None:
    """Of a body that nobody reads only a buffer is taken from the server; when it is read all of it comes."""
    size = 64 << 20

    async def main() -> tuple[bool, int]:
        head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size
        async with serving(head + bytes(size)) as (server, client):
            reply = await client.post("/v1/x", [], b"")
            before = -1
            while before != server.sent:
                before = server.sent
                await asyncio.sleep(0.5)
            held = sum(map(len, reply._pieces)) < 8 * READ_BUFFER_BYTES and before < size >> 16
            body = await reply.read()
            reply.close()
            return held, len(body)

    assert run(main) == (True, size)


def test_taking_stops_and_goes_on() -> None:
    """Where the taker says stop the rest is kept for the next, in order; what it raises comes out of `pump`."""
    pieces = [b"5\r\n%05d\r\n" % number for number in range(50_000)]
    taken: list[bytes] = []

    def once(piece: bytes) -> bool:
        taken.append(piece)
        return True

    def broken(piece: bytes) -> bool:
        taken.append(piece)
        raise LookupError("no")

    async def main() -> bool:
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        async with serving(head + b"".join(pieces) + b"0\r\n\r\n") as (_, client):
            reply = await client.post("/v1/x", [], b"")
            stopped = await reply.pump(once)
            with pytest.raises(LookupError):
                await reply.pump(broken)
            taken.append(await reply.read())
            reply.close()
            return stopped

    assert run(main)
    assert b"".join(taken) == b"".join(b"%05d" % number for number in range(len(pieces)))


def test_idle_connections_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that was not used for a while is closed by us, before the server does it in the middle of a request."""
    monkeypatch.setattr(wire, "KEEPALIVE_S", 0.05)

    async def main() -> int:
        async with serving(OK, OK) as (server, client):
            await ask(client)
            while client._open:  # noqa: ASYNC110  there is no event of it: a timer closes them
                await asyncio.sleep(0.01)
            await ask(client)
            return server.connections

    assert run(main) == 2
