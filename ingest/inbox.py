"""The bounded queue between the request path and the recorder's thread: what happens when it is full is the mode."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from schemas import clock
from schemas.events import Count, RecordsLost
from schemas.sink import SessionContext, platform_session

# How often a caller that waits for room looks again by itself, should a wake-up be missed.
_RECHECK_S = 0.1
# Sessions whose losses are told in the session itself; those of more are told together in one platform session.
_SESSIONS_MAX = 1024

Item = tuple[SessionContext | None, Any, int]
"""A session, a payload or delta, and the time in µs since 1970; a mark stands without a session."""


@dataclass(slots=True)
class Loss:
    """What one session lost since it was last told; times in µs since the epoch."""

    session: SessionContext
    reason: str
    kinds: Counter[str] = field(default_factory=Counter)
    first: int = 0
    last: int = 0

    def payload(self) -> RecordsLost:
        """The event that tells."""
        kinds = [Count(key=kind, count=count) for kind, count in sorted(self.kinds.items())]
        total = sum(self.kinds.values())
        return RecordsLost(reason=self.reason, count=total, first_recorded_at=self.first, last_recorded_at=self.last, kinds=kinds)


class Inbox:
    """A queue of many producers and one consumer that costs a producer one append.

    The consumer is only signalled while it rests. The bound may be exceeded by as many items as threads put at the
    same moment, and by what tells of losses.
    """

    def __init__(self, *, items_max: int, enough: int, shed: bool, source: str, start: Callable[[], None]) -> None:
        """`start` brings the consumer to life; it is called with the first item. It waits for no more once `enough` items wait."""
        self.queue: deque[Item] = deque()
        self.resting = True
        self.lost = 0
        self._start: Callable[[], None] | None = start
        self._hurry = False
        self._items_max = items_max
        self._enough = min(enough, items_max // 2)
        self._shed = shed
        self._wake = threading.Event()
        self._room = threading.Condition()
        self._waiting = 0
        self._closed = False
        self._losses: dict[tuple[bytes, str], Loss] = {}
        self._loss_lock = threading.Lock()
        self._strangers = platform_session(source, "recorder")

    def put(self, session: SessionContext, payload: Any, kind: str) -> None:
        """Queue one payload with the time of now."""
        now = clock.now_us()
        depth = len(self.queue)
        if depth >= self._items_max and not self._find_room(session, kind, now):
            return
        self.queue.append((session, payload, now))
        if self.resting or depth + 1 == self._enough:
            self.wake()

    def put_mark(self, mark: object) -> None:
        """Queue something that is no event and needs no room."""
        self.queue.append((None, mark, 0))
        self._hurry = True
        self.wake()

    def wake(self) -> None:
        """End the consumer's rest."""
        self.resting = False
        self._wake.set()
        if self._start is not None:
            self._start()
            self._start = None

    def close(self) -> None:
        """Take nothing more: callers that wait for room are let go, and what they brought is lost and counted."""
        self._closed = True
        self._items_max = 0
        with self._room:
            self._room.notify_all()

    def _find_room(self, session: SessionContext, kind: str, now: int) -> bool:
        """Wait for room or count the loss, as the mode says."""
        if not self._shed:
            with self._room:
                self._waiting += 1
                while len(self.queue) >= self._items_max and not self._closed:
                    self.wake()
                    self._room.wait(_RECHECK_S)
                self._waiting -= 1
        if len(self.queue) < self._items_max:
            return True
        self.lose(session, kind, "recorder_closed" if self._closed else "queue_full", now)
        return False

    # The consumer's side

    @property
    def idle(self) -> bool:
        """Whether there is nothing to take and nothing to tell."""
        return not self.queue and not self._losses

    def rest(self, timeout_s: float | None, *, gather_s: float) -> None:
        """Sleep until something is put or the time is over; then let company come, unless enough wait or a mark hurries."""
        self.resting = True
        if self.idle:
            self._wake.wait(timeout_s)
        self.resting = False
        self._wake.clear()
        if 0 < len(self.queue) < self._enough and not (self._hurry or self._closed):
            self._wake.wait(gather_s)

    def take(self, limit: int) -> list[Item]:
        """The oldest items; what was lost by now is queued behind them and what else waits."""
        hurried, self._hurry = self._hurry, False
        queue = self.queue
        items = [queue.popleft() for _ in range(min(limit, len(queue)))]
        if hurried and queue:
            self._hurry = True  # a mark may be among those that are left
        if self._losses:
            self._tell()
        if self._waiting:
            with self._room:
                self._room.notify_all()
        return items

    def lose(self, session: SessionContext, kind: str, reason: str, at: int) -> None:
        """Count an event that goes no further; the session is told when there is room."""
        with self._loss_lock:
            self.lost += 1
            if len(self._losses) >= _SESSIONS_MAX and (session.session_id, reason) not in self._losses:
                session = self._strangers
            loss = self._losses.setdefault((session.session_id, reason), Loss(session, reason, first=at))
            loss.kinds[kind] += 1
            loss.last = max(loss.last, at)

    def _tell(self) -> None:
        with self._loss_lock:
            losses, self._losses = self._losses, {}
        now = clock.now_us()
        self.queue.extend((loss.session, loss.payload(), now) for loss in losses.values())
