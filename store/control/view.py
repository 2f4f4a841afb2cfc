"""A worker's own copy of the control log: followed by a thread, asked without waiting.

While the log is away the copy stays what it was; what was written meanwhile is caught up with when it is back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from schemas import clock
from schemas.errors import LogChanged, TokentapeError
from store.control.base import TOMBSTONE_S, ControlLog, ControlRecord, Value

log = structlog.get_logger(__name__)

Listener = Callable[[ControlRecord], None]

# How long one look at the log waits for news: a stop waits for it.
_WAIT_S = 0.2
# Between two tries at a log that is away.
_RETRY_S = 0.5


class ControlView:
    """What holds now, by kind and key."""

    def __init__(self, control: ControlLog) -> None:
        """Read all that holds, so that the first request meets it, then follow.

        Raises:
            LogUnavailable: the log does not answer.
        """
        self._control = control
        self._listeners: list[Listener] = []
        self._facts: dict[str, dict[str, Value]] = {}
        self._lock = threading.RLock()
        self._position = 0
        self._read_at = time.monotonic()
        self._stop = threading.Event()
        self._away = False
        self._take(list(control.follow(0)))
        self._thread = threading.Thread(target=self._follow, name="control", daemon=True)
        self._thread.start()

    @property
    def position(self) -> int:
        """How far this copy has read."""
        return self._position

    @property
    def away(self) -> bool:
        """Whether the log did not answer when it was last asked: what is here may be old."""
        return self._away

    def listen(self, listener: Listener) -> None:
        """Call `listener` with each fact that holds now, then with each change, in the log's order and one at a time.

        It is called in the following thread (the facts of now: in this one) and MUST be quick. After a log that was
        replaced, or was away for so long that a deletion may have been missed, it hears all facts again, and first a
        deletion for each that is no more.
        """
        with self._lock:
            for kind, facts in self._facts.items():
                for key, value in facts.items():
                    listener(ControlRecord(0, kind, key, value, clock.now_s()))
            self._listeners.append(listener)

    def get(self, kind: str, key: str) -> Value | None:
        """One fact as far as this copy is. MUST NOT be changed by the caller."""
        return self._facts.get(kind, {}).get(key)

    def latest(self, kind: str) -> dict[str, Value]:
        """What holds as far as this copy is, by key. The mapping is the caller's own, its values are not."""
        with self._lock:
            return dict(self._facts.get(kind, {}))

    def close(self) -> None:
        """Stop following; the log itself stays open."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self._look()
            except TokentapeError as error:
                if not self._away:
                    log.warning("control log away: going on with what is known", error=str(error))
                self._away = True
                self._stop.wait(_RETRY_S)

    def _look(self) -> None:
        if time.monotonic() - self._read_at > TOMBSTONE_S / 2:
            self._position = 0
        try:
            again = self._position == 0
            found = list(self._control.follow(self._position, wait_s=_WAIT_S))
        except LogChanged:
            self._position = 0
            return
        if again:
            found = self._gone(found) + found
        self._read_at, self._away = time.monotonic(), False
        self._take(found)

    def _gone(self, found: list[ControlRecord]) -> list[ControlRecord]:
        """Deletions of what is known here and does not stand in a log read from its beginning."""
        held = {(record.kind, record.key) for record in found}
        lost = [(kind, key) for kind, facts in self._facts.items() for key in facts if (kind, key) not in held]
        return [ControlRecord(0, kind, key, None, clock.now_s()) for kind, key in lost]

    def _take(self, records: list[ControlRecord]) -> None:
        for record in records:
            with self._lock:
                facts = self._facts.setdefault(record.kind, {})
                if record.value is None:
                    facts.pop(record.key, None)
                else:
                    facts[record.key] = record.value
                for listener in self._listeners:
                    _tell(listener, record)
            self._position = max(self._position, record.position)


def _tell(listener: Listener, record: ControlRecord) -> None:
    """Call a listener; one that fails keeps no other from hearing."""
    try:
        listener(record)
    except Exception:
        log.exception("a listener of the control log failed", kind=record.kind)
