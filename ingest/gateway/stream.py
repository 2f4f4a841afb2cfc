"""A streamed answer on its way: what comes is recorded and sent on in the callback that brought it, no task in between."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from typing import Any

from ingest.gateway import errors
from ingest.gateway.endpoints.base import Answer
from ingest.gateway.endpoints.chat import ChatAnswer
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Deadline, Exchange
from ingest.gateway.sse import Block, EventParser, EventTooLong
from ingest.gateway.tape import Tape
from schemas.requests import load

ODD = (TypeError, AttributeError, LookupError, ValueError)
"""What reading an answer raises that is valid JSON and yet no answer."""


class Stream:
    """One answer as it streams; `take` is given each piece, and who called for it goes on where it says stop."""

    def __init__(self, exchange: Exchange, tape: Tape, answer: Answer, deadline: Deadline, *, between_s: float, hurry: bool) -> None:
        """`between_s` may pass between two pieces; `hurry` sends what came before the end without waiting for the end."""
        self.end: Block | None = None
        self.unsent = b""  # what goes to the client together with the end
        self._exchange = exchange
        self._tape = tape
        self._answer = answer
        self._deadline = deadline
        self._between_s = between_s
        self._hurry = hurry
        self._parser = EventParser()
        self._waits: Awaitable[None] | None = None
        self._failure: Failure | None = None

    def take(self, piece: bytes) -> bool:
        """Record and send what came in one piece; True where reading has to stop: the end, or a client that does not keep up.

        Raises:
            Failure: it is not an answer, and what came before is sent.
        """
        offset_us = self._tape.now_us()
        return self._pass_on(self._parts(piece, offset_us), offset_us)

    def close(self) -> bool:
        """The upstream's answer is over: what it left without a blank line behind it is read too. Returns and raises as `take` does."""
        rest = self._parser.close()
        return rest is not None and self._pass_on(iter([rest]), self._tape.now_us())

    async def caught_up(self) -> None:
        """Return when the client has taken what was sent; time does not run against the upstream meanwhile.

        Raises:
            Failure: what `take` had to tell, had the client kept up.
        """
        if self._waits is not None:
            waits, self._waits = self._waits, None
            self._deadline.pause()
            await waits
            self._deadline.resume()
        if self._failure is not None:
            raise self._failure

    def _parts(self, piece: bytes, offset_us: int) -> Iterator[Block | bytes]:
        """A piece as blocks and, where tokens come in a run, the bytes of it for the client: that is recorded already.

        Each part MUST be recorded before the next is asked for.

        Raises:
            Failure: an event that never ends.
        """
        if not self._tape.started and (first := piece.find(b"\n\n") + 2) > 1:  # it opens the sequence of which a run is
            yield from self._feed(piece[:first])
            piece = piece[first:]
        answer = self._answer
        if isinstance(answer, ChatAnswer) and self._tape.runs and self._parser.between_events and (read := answer.runs.read(piece)):
            run, shown, piece = read
            self._tape.run(run, offset_us)
            yield shown
        if piece:
            yield from self._feed(piece)

    def _feed(self, piece: bytes) -> list[Block]:
        try:
            return self._parser.feed(piece)
        except EventTooLong as error:
            raise malformed(str(error)) from error

    def _pass_on(self, parts: Iterator[Block | bytes], offset_us: int) -> bool:
        out: list[bytes] = []
        progress = False
        try:
            for part in parts:
                if isinstance(part, bytes):
                    out.append(part)
                    progress = True
                elif part.data is None:
                    out.append(part.raw)
                elif self._answer.ends(part):
                    self.end = part
                    break
                else:
                    out.append(self._event(part, part.data, offset_us))
                    progress = True
        except Failure as failure:
            self._failure = failure
        self._send(b"".join(out))
        if self._failure is not None and self._waits is None:
            raise self._failure
        if progress:
            self._deadline.move(self._between_s)
        return self.end is not None or self._waits is not None

    def _send(self, data: bytes) -> None:
        if self.end is not None and not self._hurry:
            self.unsent = data
        elif data:
            self._waits = self._exchange.write_now(data)

    def _event(self, block: Block, data: bytes, offset_us: int) -> bytes:
        """Record one event of the stream; the bytes to send for it.

        Raises:
            Failure: it is not a chunk.
        """
        answer = self._answer
        try:
            event = load(data)
            if "error" in event and not event.get("choices"):
                failure = failure_in(event, 200)
                if answer.content_type is not None:
                    raise failure
                self._tape.failed(failure)
                return answer.end(block.raw)
            chunk = answer.read(event)
            if chunk is not None:
                self._tape.chunk(chunk, offset_us)
            return answer.write(event, chunk, block.raw)
        except ODD as error:
            raise malformed(f"{error}: {data[:200]!r}") from error


def malformed(detail: str) -> Failure:
    """An answer that is none."""
    return Failure(errors.MALFORMED, "The upstream sent something that is not an answer.", detail=detail)


def error_of(body: bytes, status: int) -> Failure:
    """The failure that an error answer is: in its own words if it has any, malformed if it is no JSON object."""
    try:
        answer = load(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        shown = body[:200].decode(errors="replace")
        message = f"The upstream answered with status {status} and no JSON."
        return Failure(errors.MALFORMED, message, status=status if status >= 400 else 502, detail=f"status {status}: {shown}")
    return failure_in(answer, status)


def failure_in(answer: dict[str, Any], status: int) -> Failure:
    """The failure that a document of the upstream's tells."""
    error = answer.get("error", answer)
    message = error.get("message") if isinstance(error, dict) else error
    code = error.get("code") if isinstance(error, dict) else None
    known = status if status >= 400 else code if isinstance(code, int) and 400 <= code < 600 else 502
    return Failure(errors.UPSTREAM_ERROR, message if isinstance(message, str) else "The upstream reported an error.", status=known)
