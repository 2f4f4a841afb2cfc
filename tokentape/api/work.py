"""Work that takes longer than an answer: it runs in a thread, says how far it is, can be cancelled, and keeps its result a while."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import structlog

from ingest.gateway.problems import problem_document, status_of
from schemas import clock
from schemas.errors import ConflictError, TokentapeError, UnknownName
from tokentape.api.access import Principal

log = structlog.get_logger(__name__)

AT_ONCE = 2
"""Pieces of work that run at a time; more wait their turn."""
KEPT = 200
"""Pieces of work that are remembered once they ended."""


@dataclass
class Work:
    """One piece of work. Times are seconds since the epoch; `state` is waiting, running, done, failed or cancelled."""

    work_id: str
    kind: str
    subject: str
    principal: Principal
    made_at: float
    state: str = "waiting"
    done: int = 0
    total: int | None = None
    ended_at: float | None = None
    result: Any = None
    problem: dict[str, Any] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def step(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count

    def document(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "job": self.work_id,
            "kind": self.kind,
            "subject": self.subject,
            "by": self.principal.name,
            "state": self.state,
            "progress": {"done": self.done, "total": self.total},
            "made_at": self.made_at,
            "ended_at": self.ended_at,
            "result": self.result,
            "problem": self.problem,
        }


class Works:
    """All work of this process. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._works: dict[str, Work] = {}
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="work")

    def begin(self, kind: str, subject: str, principal: Principal, act: Callable[[Work], Any]) -> Work:
        """Have `act` done; what it returns is the result, in JSON types."""
        work = Work(uuid.uuid4().hex, kind, subject, principal, clock.now_s())
        with self._lock:
            ended = [known.work_id for known in self._works.values() if known.ended_at is not None]
            for work_id in ended[: max(0, len(self._works) - KEPT)]:
                del self._works[work_id]
            self._works[work.work_id] = work
        self._pool.submit(self._run, work, act)
        return work

    def find(self, principal: Principal, work_id: str) -> Work:
        """A piece of work that this caller may see.

        Raises:
            UnknownName: there is none.
        """
        with self._lock:
            work = self._works.get(work_id)
        if work is None or principal.tenant not in (None, work.principal.tenant):
            raise UnknownName(f"no job {work_id[:40]!r}", operation="find job", hint="GET /api/v1/jobs lists them; an old one is forgotten")
        return work

    def all(self, principal: Principal) -> list[Work]:
        """What this caller may see, newest first."""
        with self._lock:
            return [work for work in reversed(self._works.values()) if principal.tenant in (None, work.principal.tenant)]

    def cancel(self, work: Work) -> None:
        """Have it end as soon as it can.

        Raises:
            ConflictError: it has ended.
        """
        if work.ended_at is not None:
            raise ConflictError(f"the job is {work.state} already", operation="cancel job", hint="nothing is left to cancel")
        work.cancelled.set()

    def close(self) -> None:
        """Cancel everything and wait for it."""
        with self._lock:
            works = list(self._works.values())
        for work in works:
            work.cancelled.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, work: Work, act: Callable[[Work], Any]) -> None:
        state = "cancelled"
        try:
            if not work.cancelled.is_set():
                work.state = "running"
                work.result = act(work)
                state = "cancelled" if work.cancelled.is_set() else "done"
        except TokentapeError as error:
            state = "cancelled" if work.cancelled.is_set() else "failed"
            work.problem = problem_document(status_of(error), str(error), error.hint, f"/api/v1/jobs/{work.work_id}")
        except Exception as error:
            log.exception("work failed", kind=work.kind, subject=work.subject)
            state, fault = "failed", f"unexpected {type(error).__name__}"
            work.problem = problem_document(500, fault, "the log of the API says where", f"/api/v1/jobs/{work.work_id}")
        work.state, work.ended_at = state, clock.now_s()
