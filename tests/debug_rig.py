"""What the tests of debug mode share: a gateway whose requests stop, the desks of two people, and clients that wait."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from ingest.debug.desk import Desk
from replay.fold import fold
from replay.state import Generation
from schemas.events import Event
from store.control import ControlLog, open_control
from store.rows import StoredEvent
from tests.gateway_rig import DONE, HELLO, Peer, Rig, broken, chunk, running
from tests.program import until

SETTINGS: dict[str, Any] = {"deadline_s": 60.0, "keepalive_s": 0.3, "answer_timeout_s": 10.0}


class Debugged:
    """A gateway, the desk of a person elsewhere, and clients that wait."""

    def __init__(self, rig: Rig, control: ControlLog) -> None:
        self.rig = rig
        self.desk = Desk(control, "user:ann", answer_timeout_s=10.0)
        self.other = Desk(control, "user:bob", answer_timeout_s=10.0)
        self.pool = ThreadPoolExecutor(16)

    def stop(self, **document: Any) -> str:
        """Set a breakpoint and return when the worker knows it."""
        made = self.desk.add(document)
        wait_known(self.rig.url, made.breakpoint_id)
        return made.breakpoint_id

    def ask(self, **request: Any) -> Future[Any]:
        """A chat completion in a thread: its text."""
        return self.pool.submit(self._ask, {"model": "m", "messages": HELLO, **request})

    def _ask(self, request: dict[str, Any]) -> Any:
        headers = request.pop("headers", {})
        answer = self.rig.client().chat.completions.create(extra_headers=headers, **request)
        if request.get("stream"):
            return "".join(part.choices[0].delta.content or "" for part in answer if part.choices)
        return answer.choices[0].message.content

    def waiting(self, count: int = 1) -> list[str]:
        """The ids of what is stopped, once so many are."""
        rows = until(lambda: found if len(found := self.desk.stopped()) == count else None)
        return [row["generation"] for row in rows]


def wait_known(url: str, name: str) -> None:
    """Return when the gateway has read a breakpoint."""
    until(lambda: any(known["breakpoint_id"] == name for known in httpx.get(f"{url}/api/v1/breakpoints").json()["breakpoints"]))


def payloads(events: list[Event], kind: type[Any]) -> list[Any]:
    """The payloads of one kind in the order of the log."""
    return [event.payload for event in events if isinstance(event.payload, kind)]


def folded(events: list[Event]) -> list[Generation]:
    """The generations of the tape, session by session, after checking that the fold found nothing odd."""
    found: list[Generation] = []
    for session in {event.session_id: None for event in events}:
        own = [StoredEvent(event, "log", 0, i, 0) for i, event in enumerate(events) if event.session_id == session]
        state = fold(own)
        assert list(state.anomalies) == []
        found += state.generations.values()
    return found


def documents(events: list[Event]) -> tuple[Any, Any]:
    """The only request as submitted and as edited, as the fold of the tape tells them."""
    own = [StoredEvent(event, "log", 0, i, 0) for i, event in enumerate(events)]
    state = fold(own)
    (generation,) = state.generations.values()
    return state.submitted(generation), state.edited(generation)


async def echo(peer: Peer) -> None:
    """Answers with the last message's text, as asked: streamed or whole."""
    request = json.loads(peer.body)
    said = str(request["messages"][-1]["content"])
    if request.get("stream"):
        await peer.begin_chunked()
        await peer.chunk(chunk(said, finish="stop"))
        await peer.chunk(DONE)
        await peer.send(b"0\r\n\r\n")
        peer.kept = True
        return
    message = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [message]}
    await peer.whole(b"200 OK", b"application/json", json.dumps(body).encode())


@contextlib.contextmanager
def debugging(folder: Path, *, upstream: str | None = None, debug: dict[str, Any] | None = None, **gateway: Any) -> Iterator[Debugged]:
    """A gateway, by default before an upstream that repeats what it is told."""
    with broken(echo) as repeating, running(folder, upstream or repeating.url, debug={**SETTINGS, **(debug or {})}, **gateway) as rig:
        control = open_control(rig.settings)
        made = Debugged(rig, control)
        try:
            yield made
        finally:
            rig.stop()
            made.pool.shutdown()
            control.close()
