"""Compare replay of many sessions: each once, by as many engines as there are, whatever dies on the way.

What is done stands on the tape: a replay's session bears the run's name as its workflow, and one that ended is not begun
again. So a run that was killed goes on by being started again, and needs no state of its own.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from replay.calibration import Calibrations
from replay.compare import Outcome, run_compare
from replay.engines.base import Engine
from replay.gathering import Gathered
from replay.memory import Memory
from schemas.errors import EngineUnavailable, TokentapeError, UnknownSession
from schemas.sink import EventSink
from store.rows import StoredEvent

AHEAD = 32
"""Sessions read at once: one query costs tens of milliseconds, whatever it finds."""
WORST = 5
"""Tokens named in a summary."""


class Token(NamedTuple):
    """A token that moved far, and where it is."""

    drift_max: float
    session: bytes
    generation: bytes
    sequence: int
    first_telling: int | None


@dataclass
class Summary:
    """What a run found so far, of the sessions that this process replayed."""

    verdicts: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    unknown: int = 0
    worst: list[Token] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one more."""
        self.verdicts[outcome.verdict] += 1
        self.tokens += sum(sequence.judgement.scored for sequence in outcome.sequences)
        found = [
            Token(s.judgement.drift_max, outcome.subject_session, g.generation_id, s.index, s.judgement.first_telling)
            for g in outcome.generations
            for s in g.sequences
            if s.judgement.drift_max
        ]
        self.worst = sorted([*self.worst, *found], key=lambda token: -token.drift_max)[:WORST]


class Batch:
    """One run over `sessions`. `events_of` reads several at once; `told` hears of each outcome, in the thread of its replay."""

    def __init__(
        self,
        sessions: Iterable[str],
        events_of: Callable[[Sequence[str]], Mapping[str, list[StoredEvent]]],
        sink: EventSink,
        *,
        run: str,
        actor: str = "",
        calibrations: Calibrations | None = None,
        told: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        self._waiting = deque(sessions)
        self._unread = dict.fromkeys(self._waiting)
        self._events_of, self._sink, self._run, self._actor = events_of, sink, run, actor
        self._calibrations, self._told = calibrations, told
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._read: dict[str, list[StoredEvent]] = {}
        self._changed = threading.Condition(self._lock)
        self._at_work = 0
        self._faults: list[BaseException] = []
        self.summary = Summary()

    def run(self, engines: Sequence[Engine], *, at_once: int = 1) -> Summary:
        """Replay all sessions, `at_once` of them beside one another on each engine. One that fails gives its sessions to the others.

        Raises:
            EngineUnavailable: no engine is left; what was done stays done.
        """
        began = time.monotonic()
        gathered = [Gathered(engine) for engine in engines]
        share = min(at_once, math.ceil(len(self._waiting) / max(1, len(engines))))  # what is left is shared by all, and none is idle
        threads = [
            threading.Thread(target=self._work, args=(engine, memory), name=f"replay {number} {engine.name}", daemon=True)
            for engine, memory in [(engine, Memory()) for engine in gathered]
            for number in range(share)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for engine in gathered:
            engine.close()
        self.summary.seconds = time.monotonic() - began
        if other := next((fault for fault in self._faults if not isinstance(fault, EngineUnavailable)), None):
            raise other
        if self._waiting:
            done = self.summary.verdicts.total()
            fault = f"no engine is left after {done} sessions, {len(self._waiting)} wait: {self._faults[-1] if self._faults else 'none'}"
            raise EngineUnavailable(fault, operation="replay-batch", hint="start an engine and run the same command again: it goes on")
        return self.summary

    def _work(self, engine: Engine, memory: Memory) -> None:
        while (session := self._next()) is not None:
            try:
                self._one(engine, session, memory)
            except UnknownSession:  # erased since it was listed
                self._done(unknown=1)
            except BaseException as error:
                self._done(again=session, fault=error)
                if not isinstance(error, TokentapeError):
                    raise
                return
            else:
                self._done()

    def _next(self) -> str | None:
        """The next session; None when none is left. One that is at work may come back, so its end is waited for."""
        with self._changed:
            while not self._waiting and self._at_work and not self._stopped():
                self._changed.wait()
            if not self._waiting or self._stopped():
                return None
            self._at_work += 1
            return self._waiting.popleft()

    def _done(self, *, unknown: int = 0, again: str | None = None, fault: BaseException | None = None) -> None:
        with self._changed:
            self._at_work -= 1
            self.summary.unknown += unknown
            if again is not None and fault is not None:
                self._waiting.appendleft(again)
                self._faults.append(fault)
            self._changed.notify_all()

    def _stopped(self) -> bool:
        return any(not isinstance(fault, EngineUnavailable) for fault in self._faults)

    def _one(self, engine: Engine, session: str, memory: Memory) -> None:
        events = self._events(session)
        outcome = run_compare(events, engine, self._sink, actor=self._actor, calibrations=self._calibrations, run=self._run, memory=memory)
        with self._lock:
            self.summary.add(outcome)
            self._told(outcome)

    def _events(self, session: str) -> list[StoredEvent]:
        """The session's events, read together with those of the sessions that come next; none where it is not known any more."""
        with self._reading:  # the reader of events is one connection
            while session not in self._read:
                ahead = list(itertools.islice(self._unread, AHEAD)) if session in self._unread else [session]  # one that came back
                for name in ahead:
                    self._unread.pop(name, None)
                self._read |= {name: [] for name in ahead} | dict(self._events_of(ahead))
            return self._read.pop(session)
