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
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from replay.calibration import Calibrations
from replay.compare import Asking, Outcome, comparing
from replay.engines.base import Engine, Refused, Scored
from replay.gathering import Gathered
from replay.memory import Memory
from schemas.errors import EngineUnavailable, TokentapeError, UnknownSession
from schemas.sink import EventSink
from store.rows import StoredEvent

AHEAD = 32
"""Sessions read at once: one query costs tens of milliseconds, whatever it finds."""
THREADS = 4
"""Of each engine. What they do is short, and waiting for the engine takes none of them."""
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


@dataclass(frozen=True, slots=True)
class _Step:
    """What a thread does next: begin a session, or go on with one whose sequence has been answered."""

    session: str
    events: list[StoredEvent]
    replay: Asking[Outcome] | None = None
    answer: Future[Callable[[], Scored | Refused]] | None = None


class _Desk:
    """An engine with the sessions that are open on it; each `EngineUnavailable` takes one place from it."""

    def __init__(self, engine: Engine, places: int) -> None:
        self.engine, self.memory, self.places, self.open = Gathered(engine), Memory(), places, 0
        self.answered: deque[_Step] = deque()


class Batch:
    """One run over `sessions`. `events_of` reads several at once; `told` hears of each outcome, in some thread, one at a time."""

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
        self._unread = deque(sessions)
        self._events_of, self._sink, self._run, self._actor = events_of, sink, run, actor
        self._calibrations, self._told = calibrations, told
        self._changed = threading.Condition()
        self._waiting: deque[_Step] = deque()
        self._desks: list[_Desk] = []
        self._faults: list[BaseException] = []
        self.summary = Summary()

    def run(self, engines: Sequence[Engine], *, at_once: int = 1) -> Summary:
        """Replay all sessions, `at_once` of them beside one another on each engine. One that fails gives its sessions to the others.

        Raises:
            EngineUnavailable: no engine is left; what was done stays done.
        """
        began = time.monotonic()
        share = min(at_once, math.ceil(len(self._unread) / max(1, len(engines))))  # what is left is shared by all, and none is idle
        self._desks = [_Desk(engine, share) for engine in engines]
        threads = [threading.Thread(target=self._read, name="replay reader", daemon=True)] if engines else []
        threads += [
            threading.Thread(target=self._work, args=(desk,), name=f"replay {number} {desk.engine.name}", daemon=True)
            for desk in self._desks
            for number in range(min(share, THREADS))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for desk in self._desks:
            desk.engine.close()
        self.summary.seconds = time.monotonic() - began
        if other := next((fault for fault in self._faults if not isinstance(fault, EngineUnavailable)), None):
            raise other
        if left := len(self._unread) + len(self._waiting):
            done = self.summary.verdicts.total()
            fault = f"no engine is left after {done} sessions, {left} wait: {self._faults[-1] if self._faults else 'none'}"
            raise EngineUnavailable(fault, operation="replay-batch", hint="start an engine and run the same command again: it goes on")
        return self.summary

    # Reading

    def _read(self) -> None:
        """Read the tapes of sessions ahead of who wants them."""
        try:
            while ahead := self._next_unread():
                found = self._events_of(ahead)
                with self._changed:
                    self._waiting.extend(_Step(session, found.get(session, [])) for session in ahead)
                    for _ in ahead:
                        self._unread.popleft()
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._faults.append(error)
                self._changed.notify_all()
            if not isinstance(error, TokentapeError):
                raise

    def _next_unread(self) -> list[str]:
        """The sessions to be read next; nothing when all are read, or nobody is left who wants any."""
        with self._changed:
            while self._unread and len(self._waiting) >= AHEAD and not self._over():
                self._changed.wait()
            return [] if self._over() else list(itertools.islice(self._unread, AHEAD))

    # Replaying

    def _work(self, desk: _Desk) -> None:
        while (step := self._next(desk)) is not None:
            try:
                self._advance(desk, step)
            except StopIteration as end:
                self._done(desk, outcome=end.value)
            except UnknownSession:  # erased since it was listed
                self._done(desk)
            except BaseException as error:
                self._done(desk, again=_Step(step.session, step.events), fault=error)
                if not isinstance(error, TokentapeError):
                    raise

    def _next(self, desk: _Desk) -> _Step | None:
        """What is to be done on a desk; None when nothing will be any more. A session that is open anywhere may come back."""
        with self._changed:
            while not self._over():
                if self._waiting and desk.open < desk.places:  # first of all the engine has to have work
                    desk.open += 1
                    self._changed.notify_all()  # the reader, too
                    return self._waiting.popleft()
                if desk.answered:
                    return desk.answered.popleft()
                if not desk.open and not desk.places:
                    return None
                self._changed.wait()
            return None

    def _over(self) -> bool:
        """Nothing is left to do, or nobody to do it, or something failed that is no engine's fault."""
        if any(not isinstance(fault, EngineUnavailable) for fault in self._faults):
            return True
        if any(desk.open for desk in self._desks):
            return False
        return not (self._unread or self._waiting) or not any(desk.places for desk in self._desks)

    def _advance(self, desk: _Desk, step: _Step) -> None:
        """Take a replay to where it needs the engine again. Raises StopIteration at its end, and whatever stops it."""
        replay = step.replay
        if replay is None or step.answer is None:
            run, known = self._run, self._calibrations
            replay = comparing(step.events, desk.engine, self._sink, actor=self._actor, calibrations=known, run=run, memory=desk.memory)
            forced = next(replay)
        elif error := step.answer.exception():
            forced = replay.throw(error)
        else:
            forced = replay.send(step.answer.result()())
        answer = desk.engine.forcing(forced)
        on = _Step(step.session, step.events, replay, answer)
        answer.add_done_callback(lambda _: self._answered(desk, on))

    def _answered(self, desk: _Desk, step: _Step) -> None:
        with self._changed:
            desk.answered.append(step)
            self._changed.notify_all()

    def _done(self, desk: _Desk, *, outcome: Outcome | None = None, again: _Step | None = None, fault: BaseException | None = None) -> None:
        with self._changed:
            desk.open -= 1
            if outcome is not None:
                self.summary.add(outcome)
                self._told(outcome)
            elif again is not None and fault is not None:
                desk.places -= 1
                self._waiting.appendleft(again)
                self._faults.append(fault)
            else:
                self.summary.unknown += 1
            self._changed.notify_all()
