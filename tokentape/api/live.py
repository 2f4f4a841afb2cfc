"""A session followed live: server-sent events, each numbered by its position, so that a client goes on where it was cut off."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.to_thread
import orjson
from starlette.responses import StreamingResponse

from schemas.errors import TokentapeError, UsageError
from store.rows import StoredEvent
from tokentape.api.routing import Call

EVENT_STREAM = "text/event-stream"
LOOK_S = 0.5
"""How often is looked for more; with `desk.FRESH_S` an event is told within two seconds."""
SIGN_OF_LIFE_S = 15.0
"""After so long without an event a comment says that the stream lives."""

Document = Callable[[StoredEvent, int], dict[str, Any]]


def follow(call: Call, session_id: bytes, offset: int, document: Document) -> StreamingResponse:
    """The stream from an offset on, or from what the client saw last.

    Raises:
        UsageError: `Last-Event-ID` is no position.
    """
    last = call.headers.get("last-event-id", "")
    if last and not last.isdecimal():
        raise UsageError(f"last-event-id {last[:20]!r} is no position", operation="follow", hint="the id of an event of this stream")
    return StreamingResponse(_stream(call, session_id, int(last or offset), document), media_type=EVENT_STREAM)


async def _stream(call: Call, session_id: bytes, position: int, document: Document) -> AsyncIterator[bytes]:
    def look() -> list[StoredEvent]:
        call.desks.freshen()
        call.desks.gate.session(call.principal, session_id.hex())  # who was shut out meanwhile sees no more
        return call.desks.tape(session_id).events

    yield b": follows\n\n"
    told_at = time.monotonic()
    while True:
        try:
            events = await anyio.to_thread.run_sync(look, abandon_on_cancel=True)
        except TokentapeError as error:
            yield b"event: error\ndata: " + orjson.dumps({"detail": str(error), "hint": error.hint}) + b"\n\n"
            return
        for stored in events[position:]:
            position += 1
            data = orjson.dumps(document(stored, position))
            yield b"id: %d\nevent: %b\ndata: %b\n\n" % (position, stored.event.kind.encode(), data)
            told_at = time.monotonic()
        if time.monotonic() - told_at > SIGN_OF_LIFE_S:
            yield b": still here\n\n"
            told_at = time.monotonic()
        await anyio.sleep(LOOK_S)
