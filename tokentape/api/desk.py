"""What the handlers work with: one installation, opened for many callers at once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ingest.debug.desk import Desk
from ingest.traces.taking import Traces
from lifecycle.runs import RunLedger
from replay.fold import Until
from replay.player import Player
from replay.state import SessionState
from schemas.errors import TokentapeError, UsageError
from store.control import ControlLog
from store.directory import SessionDirectory
from store.log import open_log
from store.log.base import Log
from store.rows import StoredEvent
from store.sql import completeness
from tokentape.api.access import Gate, Principal
from tokentape.api.work import Works
from tokentape.installation import Installation

FRESH_S = 1.0
"""How old the index may be when it is asked: looking more often would seal a shard for every look."""

STALE_S = 5.0
"""An older index is waited for; between the two it is made fresh behind the answer."""

PATIENCE_S = 5.0
"""A look that takes longer is not waited for: so much is in the log that answers are of what is indexed, and say how fresh that is."""

BEHIND_MAX = 20_000
"""Events that indexers are waited for: more than a fraction of a second's work, and nobody waits."""

LISTED_S = 0.5
"""So long what was looked at waits for its place in a list of which the first reading is under way."""

LATE_S = 30.0
"""For so long after a look that did not see the end of the log nobody waits for the next: it would not see it either."""

TAPES_KEPT = 8
"""Sessions kept in memory, so that a scrubber does not read one again for every step."""


class Tape:
    """One session's events, played to any of them."""

    def __init__(self, events: list[StoredEvent]) -> None:
        self.events = events
        self._player = Player(events)
        self._lock = threading.Lock()

    def at(self, text: str | None) -> SessionState:
        """The session at a moment, or at its end.

        Raises:
            UsageError: no such event, or no moment.
        """
        with self._lock:
            return self._player.seek(len(self.events)) if text is None else self._player.to(Until.parse(text))


@dataclass
class Desks:
    """The parts of the API; every method may be called from several threads."""

    installation: Installation
    control: ControlLog
    directory: SessionDirectory
    gate: Gate
    works: Works
    runs: RunLedger
    _fresh: threading.Lock = field(default_factory=threading.Lock)
    _beginning: threading.Lock = field(default_factory=threading.Lock)
    _looking: threading.Thread | None = None
    _began_at: float = float("-inf")
    _fault: TokentapeError | None = None
    _fresh_at: float = float("-inf")
    _written_at: float = float("-inf")
    _late_at: float = float("-inf")
    _closed: bool = False
    _tapes: OrderedDict[tuple[bytes, frozenset[str]], Tape] = field(default_factory=OrderedDict)
    _tapes_lock: threading.Lock = field(default_factory=threading.Lock)
    custody: threading.Lock = field(default_factory=threading.Lock)

    def freshen(self, *, whole: bool = False) -> None:
        """Have indexed what the log holds, unless that was done a moment ago; nobody waits for it who may have what is a little older.

        An act on what is recorded is on the `whole` of it, and waits for what came until now; not where indexers are far behind.

        Raises:
            TokentapeError: the log cannot be read.
        """
        if whole:
            self.written()
        now = time.monotonic()
        age, late = now - self._fresh_at, now - self._late_at < LATE_S
        if self._fresh_at <= self._written_at and not late:
            self._look()
        elif age >= FRESH_S:
            begun = self._begin()
            if age >= STALE_S and not late:
                begun.join(max(0.0, self._began_at + PATIENCE_S - now))
                if self._fault is not None and not begun.is_alive():
                    raise self._fault

    def _begin(self) -> threading.Thread:
        """A look behind the answers: the one that is under way, or a new one."""
        with self._beginning:
            if self._looking is None or not self._looking.is_alive():
                self._began_at = time.monotonic()
                self._looking = threading.Thread(target=self._look_behind, name="freshen", daemon=True)
                self._looking.start()
            return self._looking

    def _look(self) -> None:
        """One at a time: a log is used by one thread."""
        with self._fresh:
            began = time.monotonic()
            if not self._closed and (began - self._fresh_at >= FRESH_S or self._fresh_at <= self._written_at):
                told = self.directory.told
                complete = self.installation.freshen(behind_max=BEHIND_MAX)
                self.directory.renew(told if complete else 0, patience_s=LISTED_S)
                self._late_at = float("-inf") if complete else time.monotonic()
                self._fresh_at = began  # what came during the look may not be in it

    def _look_behind(self) -> None:
        """What is wrong is told to whoever waits."""
        try:
            self._look()
            self._fault = None
        except TokentapeError as error:
            self._fault = error

    def close(self) -> None:
        """Return when nobody looks any more."""
        with self._fresh:
            self._closed = True

    def written(self) -> None:
        """Something was recorded for a caller, who will look for it: the next look is a fresh one."""
        self._written_at = time.monotonic()

    def completeness(self) -> dict[str, Any]:
        """How complete an answer is."""
        return completeness(self.installation.catalog).document()

    @contextlib.contextmanager
    def log(self) -> Iterator[Log]:
        """A log to append to: the installation's own is the recorder's."""
        log = open_log(self.installation.settings.log, self.installation.settings.data)
        try:
            yield log
        finally:
            log.close()

    def tape(self, session_id: bytes) -> Tape:
        """The events of a session as they are stored now."""
        snapshot = self.installation.catalog.snapshot(session=session_id)
        key = session_id, frozenset({*(shard.name for shard in snapshot.shards), *(segment.key for segment in snapshot.segments)})
        with self._tapes_lock:
            if key in self._tapes:
                self._tapes.move_to_end(key)
                return self._tapes[key]
        tape = Tape(self.installation.session_events(session_id.hex()))
        with self._tapes_lock:
            self._tapes[key] = tape
            while len(self._tapes) > TAPES_KEPT:
                self._tapes.popitem(last=False)
        return tape

    @cached_property
    def traces(self) -> Traces:
        """Spans on their way to the tape. What others wrote of their sessions in the last seconds may be unseen; see `freshen`."""
        return Traces(self.installation.settings, self._recorded)

    def _recorded(self, sessions: Sequence[bytes]) -> dict[bytes, list[StoredEvent]]:
        self.freshen()
        return self.installation.reader.sessions(sessions)

    def debug(self, principal: Principal) -> Desk:
        """Breakpoints and stopped requests, as this person decides about them."""
        return Desk(self.control, principal.name, answer_timeout_s=self.installation.settings.debug.answer_timeout_s)


def custodian(principal: Principal) -> str:
    """The name under which an act of custody is signed.

    Raises:
        UsageError: a caller without a key has none.
    """
    if principal.owner is None:
        raise UsageError("an act of custody needs a key of its own", operation="custody", hint="`tokentape keys create --role custodian`")
    return principal.owner
