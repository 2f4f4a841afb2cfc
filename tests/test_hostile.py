"""Clients and upstreams at their worst: drips, floods, a client that reads slowly, a thousand that hang up, answers that are odd."""

from __future__ import annotations

import asyncio
import gzip
import random
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import zstandard

from schemas.events import GenerationFailed, GenerationFinished, RequestSubmitted, SequenceFinished, TokenChunk
from store.indexer import Indexer
from tests.debug_rig import payloads
from tests.gateway_rig import DEADLINE_S, DONE, HELLO, Act, Peer, Rig, broken, chunk, running
from tests.program import until
from tests.tiered import tiered

ASKED: dict[str, Any] = {"model": "m", "messages": HELLO, "stream": True}
_SECRET_HEADERS = ("authorization", "x-api-key", "x-goog-api-key", "proxy-authorization", "cookie", "x-anything")
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens")


async def _answer(peer: Peer) -> None:
    await peer.whole(b"200 OK", b"application/json", b'{"choices": []}')


@pytest.fixture(scope="module")
def strict_limits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A gateway with small limits before an upstream that answers at once."""
    limits: dict[str, Any] = {"body_bytes_max": 50_000, "request_timeout_s": 0.5, "connections_max": 8}
    with broken(_answer) as upstream, running(tmp_path_factory.mktemp("limits"), upstream.url, **limits) as rig:
        yield rig


def _connection(rig: Rig) -> socket.socket:
    host, port = rig.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


def _all_of(connection: socket.socket) -> bytes:
    """What comes until the other end closes."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def _drip(connection: socket.socket, data: bytes) -> bytes:
    """Send a byte at a time until somebody has had enough; what was answered."""
    over = threading.Event()

    def send() -> None:
        for at in range(len(data)):
            if over.wait(0.02):
                return
            try:
                connection.sendall(data[at : at + 1])
            except OSError:
                return

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return _all_of(connection)
    finally:
        over.set()
        sender.join()


class TestTooMuch:
    @pytest.mark.parametrize("chunked", [False, True])
    @pytest.mark.parametrize("path", PATHS)
    def test_body_over_the_limit(self, strict_limits: Rig, path: str, chunked: bool) -> None:
        """A body over the limit is a 413 in the words of the endpoint's own clients, whether or not its length was said before."""
        body = b'{"model": "m", "input": "' + b"x" * 60_000 + b'"}'
        content = iter([body[:30_000], body[30_000:]]) if chunked else body
        answer = httpx.post(f"{strict_limits.url}{path}", content=content, headers={"content-type": "application/json"}, timeout=DEADLINE_S)
        document = answer.json()

        assert answer.status_code == 413
        assert "limit of 50000 bytes" in document["error"]["message"]
        assert document["error"]["type"] == ("request_too_large" if "messages" in path else "invalid_request_error")

    def test_body_without_end(self, strict_limits: Rig) -> None:
        """A body that never ends is answered and its connection closed: it is neither kept nor read for ever."""
        with _connection(strict_limits) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
            with pytest.raises(OSError, match=r"reset|pipe"):
                _flood(connection)


def _flood(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")


class TestTooSlow:
    def test_dripped_head(self, strict_limits: Rig) -> None:
        """A head that comes a byte at a time is given up."""
        with _connection(strict_limits) as connection:
            answer = _drip(connection, b"POST /v1/chat/completions HTTP/1.1\r\n" + b"x-more: and more\r\n" * 1000)

        assert answer.startswith(b"HTTP/1.1 408 ")
        assert orjson.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"].startswith("The head of the request was not complete")

    def test_dripped_second_head(self, strict_limits: Rig) -> None:
        """The same on a connection that has served a request before."""
        with _connection(strict_limits) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            first = connection.recv(65536)
            rest = _drip(connection, b"GET /health HTTP/1.1\r\n" + b"x-more: and more\r\n" * 1000)

        assert first.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 408 " in rest

    def test_silent_connection(self, strict_limits: Rig) -> None:
        """A connection on which no request ever begins is closed."""
        with _connection(strict_limits) as connection:
            assert _all_of(connection) == b""

    def test_dripped_body(self, strict_limits: Rig) -> None:
        """A body that comes a byte at a time is a 408, on the tape with what of it had come."""
        before = len(payloads(strict_limits.events(), GenerationFailed))
        with _connection(strict_limits) as connection:
            connection.sendall(b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 9000\r\n\r\n")
            answer = _drip(connection, b'{"model": "m", ' + b" " * 8000)
        failures = until(lambda: found if len(found := payloads(strict_limits.events(), GenerationFailed)) > before else None)

        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"not complete after 0.5 s" in answer
        assert b'"type":"error"' in answer
        assert ("client", 408) in [(failure.origin, failure.status) for failure in failures]

    def test_too_many_connections(self, strict_limits: Rig) -> None:
        """One connection too many is told so at once, and when others go it is served."""
        held = [_connection(strict_limits) for _ in range(8)]
        with _connection(strict_limits) as connection:
            refused = _all_of(connection)
        for connection in held:
            connection.close()

        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in refused
        assert until(lambda: _serves(strict_limits))


def _serves(rig: Rig) -> bool:
    try:
        return httpx.get(f"{rig.url}/health").status_code == 200
    except httpx.HTTPError:
        return False


class TestSlowReader:
    def test_the_upstream_waits_with_the_client(self, tmp_path: Path) -> None:
        """While a client does not read, the upstream is held back and memory stays bounded; then all of it comes, and is on the tape."""
        pieces, text = 600, "x" * 100_000
        sent = 0

        async def act(peer: Peer) -> None:
            nonlocal sent
            await peer.begin_chunked()
            for number in range(pieces):
                await peer.chunk(chunk(text, finish="stop" if number == pieces - 1 else None))
                sent += 1
            await peer.chunk(DONE)
            await peer.chunk(b"")
            peer.kept = True

        with broken(act) as upstream, running(tmp_path, upstream.url, between_tokens_timeout_s=0.5) as rig:
            with httpx.stream("POST", f"{rig.url}/v1/chat/completions", json=ASKED, timeout=DEADLINE_S) as answer:
                stalled = until(lambda: _still(lambda: sent))
                received = b"".join(answer.iter_bytes()).count(b'"chat.completion.chunk"')
            events = rig.wait_for("generation_finished")
        finished = payloads(events, GenerationFinished)[0]
        on_tape = sum(len(part.content.text) for part in payloads(events, TokenChunk))

        assert 0 < stalled < pieces / 2  # what the buffers of four sockets hold, and not the answer
        assert received == pieces
        assert finished.tokens_recorded == pieces
        assert on_tape == pieces * len(text)


def _still(count: Any) -> int | None:
    """The count once it has not moved for a second."""
    before = count()
    time.sleep(1.0)
    return before if before and count() == before else None


def test_no_secret_of_a_header_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Credentials in headers and in the query are in no event, hot or cold, in no blob, no file and no line of the log."""
    secrets = {name: f"sk-{number:02}-4f9a7c31d8e25b60" for number, name in enumerate(_SECRET_HEADERS)}
    headers = {name: f"Bearer {secret}" if name == "authorization" else secret for name, secret in secrets.items()}
    said = secrets["authorization"]
    with broken(_answer) as upstream, running(tmp_path, upstream.url, upstream_key="sk-up-000111222333") as rig:
        for text in (f"my key is {said}", f"my key is {said}" + " and more" * 10_000):
            rig.post(
                {"model": "m", "messages": [{"role": "user", "content": text}]}, "/v1/chat/completions?key=sk-query-0011223344", **headers
            )
        rig.post(f'{{"broken": "{said}'.encode(), **headers)
        until(lambda: len(payloads(rig.events(), RequestSubmitted)) == 3 or None)
        settings = rig.settings
    with tiered(settings) as parts:
        Indexer(settings, parts.log, parts.registry).run_once()
        hot = b"".join(parts.records().values())
        parts.tier()
        cold = b"".join(parts.records().values())
    blobs = [zstandard.ZstdDecompressor().decompress(path.read_bytes()) for path in tmp_path.rglob("blobs/**/*.zst")]
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    everything = hot + cold + b"".join(blobs) + files + "".join(capfd.readouterr()).encode()

    assert hot
    assert cold == hot
    assert len(blobs) == 1
    assert [secret for secret in (*secrets.values(), "sk-up-000111222333", "sk-query-0011223344") if secret.encode() in everything] == []


DISCONNECTS = 1000
AT_ONCE = 40


class TestDisconnects:
    def test_a_thousand_at_random_positions(self, tmp_path: Path) -> None:
        """Each client that hangs up leaves one generation on the tape with the position that it reached.

        The position is the number of tokens that the gateway had taken from the upstream. What is on the tape is the beginning
        of the stream, that long: no less than the client saw, no more than was sent, and exactly what was sent where the
        upstream had paused and the client had seen it all.
        """
        plans = _plans(random.Random(1847))
        sent: Counter[int] = Counter()
        left: Counter[int] = Counter()

        async def act(peer: Peer) -> None:
            number = int(orjson.loads(peer.body)["user"])
            tokens, _ = plans[number]
            gone = asyncio.create_task(peer.gone())
            try:
                await peer.begin_chunked()
                for at in range(tokens):
                    sent[number] += 1
                    await peer.chunk(chunk(f"{number}.{at} "))
                await gone
            finally:
                gone.cancel()
                left[number] += 1

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            seen = asyncio.run(_hang_up_all(rig.url, plans))
            until(lambda: len(left) == DISCONNECTS or None)
            active = until(lambda: httpx.get(f"{rig.url}/health").json()["active"] == 0)
            events = rig.events()
        numbers = {part.generation_id: int(orjson.loads(part.content.parameters)["user"]) for part in payloads(events, RequestSubmitted)}
        failures = {numbers[part.generation_id]: part for part in payloads(events, GenerationFailed)}
        texts = dict.fromkeys(range(DISCONNECTS), "")
        for part in payloads(events, TokenChunk):
            texts[numbers[part.generation_id]] += part.content.text

        assert active
        assert payloads(events, GenerationFinished) == []
        assert {failure.error_type for failure in failures.values()} == {"client_disconnected"}
        assert set(left.values()) == {1}
        for number, (tokens, wanted) in enumerate(plans):
            position = failures[number].position
            assert texts[number] == "".join(f"{number}.{at} " for at in range(position))
            assert wanted <= seen[number] <= position <= sent[number]
            assert wanted < tokens or position == tokens == sent[number]


def _plans(chance: random.Random) -> list[tuple[int, int]]:
    """For each client: how many tokens its upstream sends before it pauses, and after how many it hangs up at the earliest."""
    plans = []
    for number in range(DISCONNECTS):
        tokens = chance.randint(1, 40)
        plans.append((tokens, tokens if number % 2 else chance.randint(0, tokens)))
    return plans


async def _hang_up_all(url: str, plans: list[tuple[int, int]]) -> list[int]:
    """What each client had seen when it hung up."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, wanted: int) -> int:
        async with places:
            return await _hang_up(url, number, wanted)

    return await asyncio.gather(*(one(number, wanted) for number, (_, wanted) in enumerate(plans)))


async def _hang_up(url: str, number: int, wanted: int) -> int:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = orjson.dumps({**ASKED, "user": str(number)})
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    received = await reader.readuntil(b"\r\n\r\n")
    while received.count(b'"finish_reason"') < wanted:
        received += await reader.read(4096)
    writer.transport.abort()
    return received.count(b'"finish_reason"')


def _whole(text: str, *more: Any) -> bytes:
    choices = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}, *more]
    return orjson.dumps({"id": "x", "object": "chat.completion", "model": "m", "choices": choices})


STREAM = chunk("one") + chunk("two", finish="stop") + DONE


def _encoded(encoding: bytes, content_type: bytes, body: bytes) -> Act:
    """An answer in an encoding that nobody asked for."""

    async def act(peer: Peer) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-encoding: %b\r\ncontent-length: %d\r\n\r\n"
        await peer.send(head % (content_type, encoding, len(body)) + body)
        peer.kept = True

    return act


def _streams(*pieces: bytes) -> Act:
    async def act(peer: Peer) -> None:
        await peer.begin_stream()
        for piece in pieces:
            await peer.send(piece)

    return act


class TestOddAnswers:
    @pytest.mark.parametrize(
        ("encoding", "packed"),
        [(b"gzip", gzip.compress), (b"deflate", zlib.compress)],
    )
    @pytest.mark.parametrize("stream", [True, False])
    def test_compressed(self, tmp_path: Path, stream: bool, encoding: bytes, packed: Any) -> None:
        """An upstream that compresses unasked is read all the same, and the client gets plain text with a head that says so."""
        body = STREAM if stream else _whole("onetwo")
        act = _encoded(encoding, b"text/event-stream" if stream else b"application/json", packed(body))
        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            answer = rig.post({**ASKED, "stream": stream})
            events = rig.wait_for("generation_finished")

        assert b"accept-encoding: identity" in upstream.heads[0].lower()
        assert "content-encoding" not in answer.headers
        assert answer.content == body
        assert "".join(part.content.text for part in payloads(events, TokenChunk)) == "onetwo"

    @pytest.mark.parametrize(
        ("encoding", "body"),
        [
            (b"gzip", b"this is no gzip"),
            (b"gzip", gzip.compress(STREAM, mtime=0)[:40]),
            (b"br", b"\x00\x01\x02"),
            (b"made-up", b"\x00\x01\x02"),
        ],
    )
    def test_broken_compression(self, tmp_path: Path, encoding: bytes, body: bytes) -> None:
        """What does not unpack is a failure of the upstream's, in words, and on the tape."""
        with broken(_encoded(encoding, b"text/event-stream", body)) as upstream, running(tmp_path, upstream.url) as rig:
            answer = rig.post(ASKED)
            failure = rig.failure()

        assert b'"error"' in answer.content
        assert (failure.origin, failure.error_type) in {("upstream", "upstream_malformed"), ("upstream", "upstream_disconnected")}

    def test_after_done_comes_more(self, tmp_path: Path) -> None:
        """What follows [DONE] belongs to no answer: it is neither passed on nor recorded, and the next request is not harmed."""
        with broken(_streams(STREAM, chunk("three") + DONE)) as upstream, running(tmp_path, upstream.url) as rig:
            answers = [rig.post(ASKED).content for _ in range(2)]
            events = until(lambda: found if len(payloads(found := rig.events(), GenerationFinished)) == 2 else None)

        assert answers == [STREAM, STREAM]
        assert [end.tokens_recorded for end in payloads(events, GenerationFinished)] == [2, 2]
        assert "three" not in "".join(part.content.text for part in payloads(events, TokenChunk))

    def test_one_index_twice(self, tmp_path: Path) -> None:
        """Two choices of one index are taken for one sequence, in a stream as in a whole answer; it ends once."""
        again = {"index": 0, "delta": {"content": "again"}, "finish_reason": "stop"}
        event = orjson.loads(chunk("one", finish="stop")[6:])
        event["choices"].append(again)
        twice = b"data: " + orjson.dumps(event) + b"\n\n" + DONE
        with broken(_streams(twice)) as upstream, running(tmp_path, upstream.url) as rig:
            answer = rig.post(ASKED)
            events = rig.wait_for("generation_finished")

        assert answer.content == twice
        assert "".join(part.content.text for part in payloads(events, TokenChunk)) == "oneagain"
        assert [end.index for end in payloads(events, SequenceFinished)] == [0]
