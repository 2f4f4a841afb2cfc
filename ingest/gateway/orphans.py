"""Requests that were stopped in a worker that died: the tape is told what became of them, once, by one of the others."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from ingest.debug import commands, workers
from ingest.gateway import errors
from ingest.gateway.tape import Recording
from schemas import clock
from schemas.events import BreakpointReleased, FailureContent, GenerationFailed, ReleaseContent
from schemas.sink import SessionContext
from store.control import ControlLog, ControlView, Value

log = structlog.get_logger(__name__)

CLAIM = "claim"
"""Kind of facts by which a worker takes an orphan: key generation/worker. Of living workers' claims the first counts."""

DURABLE_WAIT_S = 10.0
"""How long the recorder may take to make the record durable before the orphan is left for the next time."""

Write = Callable[[str, str, Value | None], asyncio.Future[bool]]


class Orphans:
    """Sees to requests whose worker is gone."""

    def __init__(self, worker_id: str, control: ControlLog, shared: ControlView, recorder: Recording) -> None:
        self._worker_id = worker_id
        self._control = control
        self._shared = shared
        self._recorder = recorder
        self._workers = workers.Workers()

    async def settle(self, write: Write) -> None:
        """Record the end of each orphan, and take dead workers' facts away."""
        known = self._shared.latest(workers.KIND)
        stopped = self._shared.latest(commands.STOPPED)
        lost = {str(fact.get("worker")) for fact in stopped.values()} - {self._worker_id}
        dead = {worker for worker in lost | known.keys() - {self._worker_id} if self._workers.dead(worker, known)}
        for generation, fact in stopped.items():
            if fact.get("worker") in dead and not fact.get("outcome"):
                await self._settle(generation, fact, write)
        for worker in dead & known.keys():
            await write(workers.KIND, worker, None)

    async def _settle(self, generation: str, fact: Mapping[str, Any], write: Write) -> None:
        claim = f"{generation}/{self._worker_id}"
        if not await write(CLAIM, claim, {"at": clock.now_s()}):
            return
        try:
            if await asyncio.to_thread(self._first, generation) != self._worker_id:
                return
            self._record(generation, fact)
            async with asyncio.timeout(DURABLE_WAIT_S):
                await self._recorder.durable()
            outcome = {"action": "lost", "actor": "gateway", "at": clock.now_s(), "time": commands.said(clock.now_s()), "forwarded": False}
            await write(commands.STOPPED, generation, {**fact, "outcome": outcome})
            log.warning("a stopped request was lost with its worker", generation=generation, worker=fact.get("worker"))
        finally:
            await write(CLAIM, claim, None)

    def _first(self, generation: str) -> str | None:
        """The living worker whose claim came first, as the log itself has it; None where the request was settled meanwhile.

        Who lives is read there too: a worker says that it does before it claims anything.
        """
        claims: dict[str, int] = {}
        known: dict[str, Value] = {}
        for record in self._control.follow(0):
            if record.kind == workers.KIND:
                known.pop(record.key, None)
                if record.value is not None:
                    known[record.key] = record.value
            if record.kind == commands.STOPPED and record.key == generation and (record.value or {"outcome": 1}).get("outcome"):
                return None
            if record.kind == CLAIM and record.key.startswith(f"{generation}/"):
                claims.pop(record.key, None)
                if record.value is not None:
                    claims[record.key] = record.position
        living = [key for key in claims if (worker := key.partition("/")[2]) == self._worker_id or not self._workers.dead(worker, known)]
        return min(living, key=claims.__getitem__).partition("/")[2] if living else None

    def _record(self, generation: str, fact: Mapping[str, Any]) -> None:
        session_id, actor = uuid.UUID(fact["session"]).bytes, fact.get("actor") or ""
        content = bool(fact.get("content"))  # a fact that does not say may be of a tenant that wants none
        session = SessionContext(session_id, fact["tenant"], "gateway", actor, fact["retention_class"], content=content)
        generation_id = uuid.UUID(generation).bytes
        message = f"gateway worker {fact.get('worker')} ended while the request was stopped"
        self._recorder.record(
            session,
            BreakpointReleased(
                breakpoint_id=fact["breakpoint"], generation_id=generation_id, action="lost", content=ReleaseContent(reason=message)
            ),
        )
        self._recorder.record(
            session,
            GenerationFailed(
                generation_id=generation_id,
                error_type=errors.SHUTDOWN.error_type,
                origin=errors.SHUTDOWN.origin,
                status=errors.SHUTDOWN.status,
                retryable=True,
                content=FailureContent(message=message),
            ),
        )
