"""Compare replay of many sessions: each once, by as many engines as there are, whatever dies on the way.

What is done stands on the tape: a replay's session bears the run's name as its workflow, and one that ended is not begun
again. So a run that was killed goes on by being started again, and needs no state of its own.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

from replay.calibration import Calibrations
from replay.compare import Asking, Outcome, comparing
from replay.engines.base import Continuous, Engine, Forced, Refused, Rendering
from replay.gathering import Gathered
from replay.memory import Memory
from schemas.errors import EngineUnavailable, RequestFailed, UnknownSession
from schemas.sink import EventSink
from store.rows import StoredEvent

AHEAD = 32
"""Sessions read at once, until it is known how long they are."""
AHEAD_MAX, AHEAD_EVENTS = 64, 2048
"""And then as many as have so many events: one query costs tens of milliseconds, whatever it finds."""
THREADS = 4
"""Of each engine. What they do is short, and waiting for the engine takes none of them."""
COLLECT_EVERY = 50_000
"""Objects until the garbage collector looks: what is open are a million of them and no garbage, and looking was a third of the work."""
TRIES = 3
"""Times that engines may fail at one session until that is its own fault, where they answer others."""
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
    unjudged: Counter[str] = field(default_factory=Counter)
    """Why sessions were inconclusive."""
    tokens: int = 0
    unknown: int = 0
    worst: list[Token] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count one more."""
        self.verdicts[outcome.verdict] += 1
        if outcome.verdict == "inconclusive":
            reasons = {s.judgement.reason for s in outcome.sequences if s.judgement.verdict == "inconclusive"}
            self.unjudged.update(reasons or [outcome.reason])
        self.tokens += sum(sequence.judgement.scored for sequence in outcome.sequences)
        found = [
            Token(s.judgement.drift_max, outcome.subject_session, g.generation_id, s.index, s.judgement.first_telling)
            for g in outcome.generations
            for s in g.sequences
            if s.judgement.drift_max
        ]
        self.worst = sorted([*self.worst, *found], key=lambda token: -token.drift_max)[:WORST]


class _Open(NamedTuple):
    """A session whose replay waits for what it asked of its engine, or has been answered."""

    session: str
    replay: Asking[Outcome]
    asked: Forced | Rendering
    answer: Future[Callable[[], Any]]


_Step: TypeAlias = tuple[str, list[StoredEvent]] | _Open
"""What is to be done: a session from its start, or from an answer."""


class _Desk:
    """An engine with the sessions that are open on it.

    An `EngineUnavailable` takes one place from it; where only a request failed, until as many others are answered as it then has places.
    """

    def __init__(self, engine: Engine, places: int) -> None:
        own = isinstance(engine, Continuous)  # nobody puts another in the place of an engine that this run hosts
        self.engine, self.memory = Gathered(engine), Memory(math.inf) if own else Memory()
        self.places = self.places_max = places
        self.open = 0
        self.answered: deque[_Open] = deque()
        self._shortest: Forced | None = None
        self._answers = 0

    def has_answered(self, asked: Forced | Rendering) -> bool:
        """Remember that the engine is well; whether it has a place back by that."""
        if isinstance(asked, Forced) and (self._shortest is None or _length(asked) < _length(self._shortest)):
            self._shortest = asked
        self._answers += 1
        if back := 0 < self.places < self.places_max and self._answers >= self.places:
            self.places, self._answers = self.places + 1, 0
        return back

    def is_well(self, failed: Forced | Rendering) -> bool:
        """Whether the engine, which failed at something, answers the shortest that it answered before, or the beginning of that."""
        ask = self._shortest
        if ask is None and isinstance(failed, Forced):
            ask = replace(failed, prompt_token_ids=failed.prompt_token_ids[:1], token_ids=failed.token_ids[:1])
        try:
            return ask is not None and bool(self.engine.force_all([ask]))
        except Exception:
            return False


def _length(forced: Forced) -> int:
    return len(forced.prompt_token_ids) + len(forced.token_ids)


@contextlib.contextmanager
def _collecting_less() -> Iterator[None]:
    usual = gc.get_threshold()
    if 0 < usual[0] < COLLECT_EVERY:
        gc.set_threshold(COLLECT_EVERY, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


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
        self._changed, self._telling = threading.Condition(), threading.Lock()
        self._waiting: deque[tuple[str, list[StoredEvent]]] = deque()
        self._failed_at: dict[str, list[_Desk]] = {}
        self._reading, self._ahead = 0, AHEAD
        self._desks: list[_Desk] = []
        self._failed: BaseException | None = None
        self._engine_failed: EngineUnavailable | None = None
        self.summary = Summary()

    def run(self, engines: Sequence[Engine], *, at_once: int = 1) -> Summary:
        """Replay all sessions, `at_once` of them beside one another on each engine. One that fails gives its sessions to the others.

        A session at which engines failed `TRIES` times is inconclusive, if the engine then answers another.
        Whatever else fails ends the run when what was begun is done, and is raised then.

        Raises:
            EngineUnavailable: no engine is left; what was done stays done.
        """
        began = time.monotonic()
        share = min(at_once, math.ceil(len(self._unread) / max(1, len(engines))))  # what is left is shared by all, and none is idle
        self._desks = [_Desk(engine, share) for engine in engines]
        threads = [threading.Thread(target=self._guarded, args=(self._read,), name="replay reader", daemon=True)]
        threads += [
            threading.Thread(target=self._guarded, args=(self._work, desk), name=f"replay {number} {desk.engine.name}", daemon=True)
            for desk in self._desks
            for number in range(min(share, THREADS))
        ]
        with _collecting_less():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for desk in self._desks:
            desk.engine.close()
        self.summary.seconds = time.monotonic() - began
        if self._failed is not None:
            raise self._failed
        if left := len(self._unread) + len(self._waiting):
            done, why = self.summary.verdicts.total(), self._engine_failed or "none"
            fault = f"no engine is left after {done} sessions, {left} wait: {why}"
            raise EngineUnavailable(fault, operation="replay-batch", hint="start an engine and run the same command again: it goes on")
        return self.summary

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        """A thread's work; what it raises ends the run."""
        try:
            work(*arguments)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failed = self._failed or error
            self._changed.notify_all()

    # Reading

    def _read(self) -> None:
        """Read the tapes of sessions ahead of who wants them; of those that come back, too."""
        while ahead := self._next_unread():
            try:
                found = self._events_of(ahead)
            except BaseException:
                with self._changed:
                    self._unread.extendleft(reversed(ahead))
                raise
            with self._changed:
                self._waiting.extend((session, found.get(session, [])) for session in ahead)
                self._reading = 0
                events = sum(map(len, found.values()))
                self._ahead = max(1, min(AHEAD_MAX, AHEAD_EVENTS * len(ahead) // max(1, events)))
                self._changed.notify_all()

    def _next_unread(self) -> list[str]:
        """The sessions to be read next; nothing when none will be wanted any more."""
        with self._changed:
            while not self._over() and (not self._unread or len(self._waiting) >= self._ahead):
                self._changed.wait()
            if self._over():
                return []
            ahead = [self._unread.popleft() for _ in range(min(self._ahead, len(self._unread)))]
            self._reading = len(ahead)
            return ahead

    # Replaying

    def _work(self, desk: _Desk) -> None:
        while (step := self._next(desk)) is not None:
            try:
                outcome = self._advance(desk, step)
            except UnknownSession:  # erased since it was listed
                self._done(desk, unknown=1)
            except EngineUnavailable as error:
                self._put_back(desk, step, error)
            except BaseException as error:
                self._fail(error)
                self._done(desk, again=step[0])
            else:
                if outcome is not None:
                    self._done(desk)
                    self._tell(outcome)

    def _tell(self, outcome: Outcome) -> None:
        """Count an outcome and tell of it; a display that fails ends the run, and no thread before what was begun is done."""
        with self._telling:
            try:
                self.summary.add(outcome)
                if self._failed is None:
                    self._told(outcome)
            except BaseException as error:
                self._fail(error)

    def _next(self, desk: _Desk) -> _Step | None:
        """What is to be done on a desk; None when nothing will be any more. A session that is open anywhere may come back."""
        with self._changed:
            while True:
                if desk.open < desk.places and self._failed is None and (session := self._first_for(desk)):  # first it has to have work
                    desk.open += 1
                    self._changed.notify_all()  # the reader, too
                    return session
                if desk.answered:
                    return desk.answered.popleft()
                if not desk.open and (self._failed or not desk.places or self._over()):
                    return None
                self._changed.wait()

    def _first_for(self, desk: _Desk) -> tuple[str, list[StoredEvent]] | None:
        """Take the first session that waits; one at which this engine failed is for those that did not, while there are any."""
        for place, waits in enumerate(self._waiting):
            failed = self._failed_at.get(waits[0], [])
            if desk not in failed or not any(other.places and other not in failed for other in self._desks):
                del self._waiting[place]
                return waits
        return None

    def _over(self) -> bool:
        """Nobody will begin a session any more: all are done, or something failed, or no engine is left."""
        if self._failed is not None or not any(desk.places for desk in self._desks):
            return True
        return not (self._unread or self._reading or self._waiting or any(desk.open for desk in self._desks))

    def _advance(self, desk: _Desk, step: _Step) -> Outcome | None:
        """Take a replay to where it needs the engine again, or to its end: its outcome. Raises whatever stops it."""
        try:
            if isinstance(step, _Open):
                session, replay = step.session, step.replay
                try:
                    answer = self._answer(desk, step)
                except BaseException as error:
                    asked = replay.throw(error.with_traceback(None))  # one error may go to many, and would gather their frames
                else:
                    asked = replay.send(answer)
            else:
                session, events = step
                run, known = self._run, self._calibrations
                replay = comparing(events, desk.engine, self._sink, actor=self._actor, calibrations=known, run=run, memory=desk.memory)
                asked = next(replay)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome
        opened = _Open(session, replay, asked, desk.engine.asking(asked))
        opened.answer.add_done_callback(lambda _: self._answered(desk, opened))
        return None

    def _answer(self, desk: _Desk, opened: _Open) -> Any:
        """What an engine answered. One that answers others but fails at this again and again has refused it."""
        try:
            answer = opened.answer.result()()
        except RequestFailed as error:
            if len(self._failed_at.get(opened.session, [])) < TRIES - 1 or not desk.is_well(opened.asked):
                raise
            return Refused(f"the engine failed at it {TRIES} times: {error}")
        with self._changed:
            if desk.has_answered(opened.asked):
                self._changed.notify_all()
        return answer

    def _answered(self, desk: _Desk, opened: _Open) -> None:
        with self._changed:
            desk.answered.append(opened)
            self._changed.notify_all()

    def _put_back(self, desk: _Desk, step: _Step, fault: EngineUnavailable) -> None:
        """Give back a session that an engine failed at, and take a place from the engine; its last one only where it answers nothing."""
        own = isinstance(fault, RequestFailed) and isinstance(step, _Open)
        with self._changed:
            failed = self._failed_at.setdefault(step[0], [])
            failed += [desk] * own
            passing = own and len(failed) < TRIES  # what goes on for ever takes all places in the end
            last = passing and desk.places == 1
            desk.places_max -= not passing
            desk.places = max(0, desk.places - (not last))
        if last and isinstance(step, _Open) and not desk.is_well(step.asked):
            with self._changed:
                desk.places = max(0, desk.places - 1)
        self._engine_failed = fault
        self._done(desk, again=step[0])

    def _done(self, desk: _Desk, *, unknown: int = 0, again: str | None = None) -> None:
        with self._changed:
            desk.open -= 1
            self.summary.unknown += unknown
            if again is not None:
                self._unread.appendleft(again)
            self._changed.notify_all()
