"""What an exact replay has to do, call by call, and where it may begin and end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from replay.exact.run import Request, Run, Step
from schemas.enginerun import calls
from schemas.errors import TokentapeError


class Diverged(TokentapeError):
    """The engine did something else than the recorded one."""

    exit_code = 6

    def __init__(self, fault: str, step: int) -> None:
        super().__init__(f"step {step}: {fault}", operation="exact replay")
        self.step = step


@dataclass(frozen=True, slots=True)
class Imposed:
    """A recorded decision, for an engine that would decide otherwise: rows in order, cached tokens of those admitted, the preempted."""

    rows: dict[int, int]
    cached: dict[int, int]
    preempted: tuple[int, ...]


class _Moment(NamedTuple):
    """A moment of a run: before this call of this step, after so many requests."""

    step: int
    call: int
    arrived: int


class Script:
    """The calls of a run from a moment on. The replaying scheduler takes them one by one."""

    def __init__(self, run: Run, *, until: bytes | None = None) -> None:
        """`until` is a generation: the script ends with it, and begins at the last moment from which it can be had."""
        self.run = run = run.up_to(until) if until else run
        begin = _beginning(run, until)
        self.first_step, self.first_request = begin.step, begin.arrived
        self._arrived = begin.arrived
        self._calls = deque(_numbered(run.steps[begin.step :]))
        for _ in range(begin.call):
            self._calls.popleft()
        before = [call for step in run.steps[: begin.step] for call in step.calls] + list(run.steps[begin.step].calls[: begin.call])
        self.imposed = deque(decisions(run)[sum(isinstance(call, calls.Schedule) for call in before) :])
        self.step = begin.step

    def next_is(self, kind: type[calls.Schedule] | type[calls.Update]) -> bool:
        """Whether this is the engine's next call."""
        return next((type(call) for _, call in self._calls if isinstance(call, calls.Schedule | calls.Update)), None) is kind

    @property
    def over(self) -> bool:
        """Whether the engine has no more calls to make."""
        return not any(isinstance(call, calls.Schedule | calls.Update) for _, call in self._calls)

    def between(self) -> Iterator[calls.Call]:
        """What comes before the engine's next call."""
        while self._calls and not isinstance(self._calls[0][1], calls.Schedule | calls.Update):
            self.step, call = self._calls.popleft()
            yield call

    def take(self, kind: type[calls.Schedule] | type[calls.Update]) -> Step:
        """The engine makes a call; the step whose event it belongs to.

        Raises:
            Diverged: the recorded engine made another.
        """
        if not self._calls or type(self._calls[0][1]) is not kind:
            recorded = type(self._calls[0][1]).__name__.lower() if self._calls else "nothing more"
            raise Diverged(f"the engine calls {kind.__name__.lower()}, the record has {recorded}", self.step)
        self.step, _ = self._calls.popleft()
        return self.run.steps[self.step]

    def arrive(self) -> Request:
        """The request whose turn it is."""
        number, self._arrived = self._arrived, self._arrived + 1
        return self.run.requests[number]


def _numbered(steps: tuple[Step, ...]) -> Iterator[tuple[int, calls.Call]]:
    return ((step.number, call) for step in steps for call in step.calls)


def decisions(run: Run) -> list[Imposed]:
    """What the engine decided at each of its schedules, in their order.

    An engine that schedules ahead has decided on the next step when it takes one in, so that the decision's calls stand in the record
    of the step before. Rows stand in the record of their own step; there are none of what an engine that died had not taken in.
    """
    found: list[tuple[dict[int, int], list[int]]] = []
    for call in (call for step in run.steps for call in step.calls):
        if isinstance(call, calls.Schedule):
            found.append(({}, []))
        elif isinstance(call, calls.Cached):
            found[-1][0][call.number] = call.tokens
        elif isinstance(call, calls.Preempt):
            found[-1][1].extend(call.numbers)
    rows = [step.rows for step in run.steps]
    return [Imposed(rows[at] if at < len(rows) else {}, cached, tuple(gone)) for at, (cached, gone) in enumerate(found)]


def _beginning(run: Run, until: bytes | None) -> _Moment:
    """Where to begin for a generation: the last idle moment before it, if nothing was cached then.

    It is the start of the run where something from there on hangs on the engine's own seed, of which the requests before have drawn: the
    generation itself, or one beside it, whose tokens decide how long it shares the steps. What came before that moment, or comes when
    the run is over, may draw as it likes.
    """
    start = found = _Moment(0, 0, 0)
    if until is None:
        return start
    wanted = min(run.number_of(place) for place in run.places_of(until))
    arrived = 0
    for step in run.steps:
        for at, call in enumerate(step.calls):
            if isinstance(call, calls.Idle):
                found = _Moment(step.number, at, arrived)
            elif isinstance(call, calls.Arrive | calls.ArriveBeside):
                if arrived == wanted:
                    computed = {number for later in run.steps[found.step :] for number in later.rows}
                    hangs = any(request.depends_on_engine_seed for number, request in run.requests.items() if number in computed)
                    return start if hangs else found
                arrived += 1
    return start
