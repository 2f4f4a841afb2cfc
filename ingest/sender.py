"""The thread that brings entries from outboxes into the log, again and again until the log has them."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator

import structlog

from ingest.outbox import Outbox
from schemas.errors import InvalidEvent, TokentapeError
from store.crashpoints import crash_point
from store.log.base import Entry, Log

logger = structlog.get_logger("tokentape.recorder")

# First and longest pause after the log failed; each is double the one before, and a part of it is chance.
_BACKOFF_S, _BACKOFF_S_MAX = 0.05, 2.0
# An append that takes longer than this counts as a log that is away, long before its own time-out says so.
_PATIENCE_S = 1.0
# How often spools are looked for whose owner died beside us.
_ADOPT_S = 30.0


class Sender:
    """Sends the outboxes of dead producers first, then the own one, each in order.

    `adopt` gives orphaned outboxes; it is asked at the start and now and then. `progress` is called after each append
    that the log has; `refused` for an entry that the log will never take.
    """

    def __init__(
        self,
        log: Log,
        own: Outbox,
        *,
        adopt: Callable[[], Iterator[Outbox]],
        progress: Callable[[], None],
        refused: Callable[[Entry, InvalidEvent], None],
    ) -> None:
        self.acknowledged = 0
        self.adopted = 0
        self.orphans: list[Outbox] = []
        self._log = log
        self._own = own
        self._adopt = adopt
        self._progress = progress
        self._refused = refused
        self._work = threading.Event()
        self._stop = threading.Event()
        self._failure: str | None = None
        self._backoff_s = _BACKOFF_S
        self._sending_since = 0.0
        self._adopted_at = -_ADOPT_S
        self._thread = threading.Thread(target=self._run, name="tokentape-sender", daemon=True)

    def start(self) -> None:
        """Send in a thread from now on."""
        self._thread.start()

    @property
    def available(self) -> bool:
        """Whether the log took the last append, and does not make the present one wait."""
        since = self._sending_since
        return self._failure is None and (not since or time.monotonic() - since < _PATIENCE_S)

    @property
    def failed(self) -> bool:
        """Whether the log refused the last append or let it time out."""
        return self._failure is not None

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk in all outboxes."""
        return self._own.disk_bytes + sum(orphan.disk_bytes for orphan in self.orphans)

    def kick(self) -> None:
        """Something was appended."""
        self._work.set()

    def stop(self, timeout_s: float) -> bool:
        """End after the present append, at most `timeout_s` from now; whether the thread is gone."""
        self._stop.set()
        self._work.set()
        self._thread.join(max(timeout_s, 0.0))
        for orphan in self.orphans:
            orphan.close()
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._work.clear()
            if not self.step():
                self._work.wait(_ADOPT_S)

    def step(self) -> bool:
        """Look for orphaned outboxes if it is time, and send one batch; False when there was none."""
        if time.monotonic() - self._adopted_at >= _ADOPT_S:
            self._find_orphans()
            self._adopted_at = time.monotonic()
        return self._send(self._next())

    def _find_orphans(self) -> None:
        with self._reporting("adopt spools"):
            self.orphans += self._adopt()

    def _next(self) -> Outbox:
        """The outbox whose turn it is: orphans come first, since the same sessions may go on in the own one."""
        while self.orphans and self.orphans[0].empty:
            self.orphans.pop(0).close()
        return self.orphans[0] if self.orphans else self._own

    def _send(self, outbox: Outbox) -> bool:
        """Send one batch; False when there is none."""
        entries: list[Entry] | None = None
        with self._reporting("send"):
            entries = outbox.peek()
            if entries:
                self._append(entries)
                crash_point("sender.sent")
                outbox.acknowledge()
                crash_point("sender.acknowledged")
                self._count(outbox, len(entries))
                self._progress()
        return entries is None or bool(entries) or outbox is not self._own

    def _append(self, entries: list[Entry]) -> None:
        self._sending_since = time.monotonic()
        try:
            self._log.append(entries)
        except InvalidEvent:
            # One entry is larger than this log takes, and nobody but the log knows its limit.
            for entry in entries:
                self._append_single(entry)
        finally:
            self._sending_since = 0.0

    def _append_single(self, entry: Entry) -> None:
        try:
            self._log.append([entry])
        except InvalidEvent as problem:
            logger.error("recorder_event_refused", bytes=len(entry.value), problem=str(problem))
            self._refused(entry, problem)

    def _count(self, outbox: Outbox, entries: int) -> None:
        if outbox is self._own:
            self.acknowledged += entries
        else:
            self.adopted += entries
        if self._failure is not None:
            logger.info("recorder_log_back", spool_bytes=self.disk_bytes)
        self._failure = None
        self._backoff_s = _BACKOFF_S

    @contextlib.contextmanager
    def _reporting(self, operation: str) -> Iterator[None]:
        """Say once what is wrong and wait a little; this thread must outlive every fault."""
        try:
            yield
        except Exception as problem:
            known = isinstance(problem, TokentapeError)
            fault = str(problem) if known else repr(problem)
            if fault != self._failure and not self._stop.is_set():
                hint = getattr(problem, "hint", "")
                logger.error("recorder_log_away", operation=operation, problem=fault, hint=hint, exc_info=not known)
            self._failure = fault
            self._progress()
            self._stop.wait(self._backoff_s * random.uniform(0.5, 1.0))
            self._backoff_s = min(self._backoff_s * 2, _BACKOFF_S_MAX)
