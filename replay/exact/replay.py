"""Exact replay from the tape to the verdict: build, drive, compare bit for bit, record what was found.

A forced replay imposes the batches, not where a cached block comes from: in a larger cache a prefix may still lie that was
computed anew when it was recorded. Where a processor rounds decoding and prefill differently (seen with AMX, from about 100
tokens on), such a sequence differs, and the first one that does is named.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from replay.exact.engine import ExactEngine, check, check_room, refuse_differences
from replay.exact.run import Run, Said
from replay.exact.script import Diverged, Script
from replay.words import count, uuid
from schemas import events as e
from schemas.enginerun.decisions import Place
from schemas.environment import classify
from schemas.sink import EventSink, SessionContext, new_id

REPRODUCED, DIVERGED = "reproduced", "diverged"


@dataclass(slots=True)
class Compared:
    """One sequence as it was recorded and as it came now: entries that are alike bit for bit, up to the first that is not."""

    place: Place
    recorded: Said
    tokens: int = 0
    tokens_equal: int = 0
    logprobs_equal: int = 0
    first_telling: int | None = None
    missing_from: int | None = None
    """The recorded step from which on nothing came of it any more, though more was recorded."""

    def take(self, token_ids: list[int], logprobs: list[float]) -> str | None:
        """Compare the next tokens; in words what is not alike, None if all is."""
        fault = None
        for at, token in enumerate(token_ids):
            position = self.tokens
            self.tokens += 1
            if position >= len(self.recorded.token_ids):  # what the client never got was not recorded either
                continue
            if token != self.recorded.token_ids[position]:
                fault = fault or f"token {position} is {token}, recorded {self.recorded.token_ids[position]}"
            else:
                self.tokens_equal += 1
            if self.scored and at < len(logprobs):
                if _bits(logprobs[at]) == _bits(self.recorded.logprobs[position]):
                    self.logprobs_equal += 1
                else:
                    fault = fault or f"the logprob of token {position} is {logprobs[at]!r}, recorded {self.recorded.logprobs[position]!r}"
            if fault and self.first_telling is None:
                self.first_telling = position
        return fault

    @property
    def scored(self) -> bool:
        """Whether logprobs are on the tape: one for each token."""
        return len(self.recorded.logprobs) == len(self.recorded.token_ids)

    @property
    def missing(self) -> int:
        """Tokens that were recorded and did not come."""
        return max(0, len(self.recorded.token_ids) - self.tokens)

    @property
    def reproduced(self) -> bool:
        """Whether it is the recorded sequence, bit for bit."""
        size = len(self.recorded.token_ids)
        return self.tokens_equal == size and (not self.scored or self.logprobs_equal == size)


def _bits(value: float) -> bytes:
    return struct.pack("<f", value + 0.0)


@dataclass(frozen=True)
class Outcome:
    """What an exact replay found. `steps` is how many were compared; `divergence` names the first that was another."""

    replay_id: bytes
    session_id: bytes
    run: Run
    verdict: str
    reason: str
    steps: int
    sequences: tuple[Compared, ...]
    differences: tuple[tuple[str, Any, Any], ...]
    divergence: Diverged | None
    duration_us: int

    @property
    def missing(self) -> tuple[Compared, ...]:
        """Sequences that did not come, or not to their recorded end, though they should have."""
        return tuple(one for one in self.sequences if one.missing_from is not None)

    def document(self) -> dict[str, Any]:
        """The outcome as JSON types."""
        return {
            "replay": uuid(self.replay_id),
            "recorded_in": uuid(self.session_id),
            "engine_run": uuid(self.run.engine_run),
            "verdict": self.verdict,
            "reason": self.reason,
            "steps": self.steps,
            "sequences": len(self.sequences),
            "sequences_reproduced": sum(c.reproduced for c in self.sequences),
            "tokens": sum(len(c.recorded.token_ids) for c in self.sequences),
            "tokens_equal": sum(c.tokens_equal for c in self.sequences),
            "logprobs": sum(len(c.recorded.logprobs) for c in self.sequences if c.scored),
            "logprobs_equal": sum(c.logprobs_equal for c in self.sequences),
            "diverged_at_step": self.divergence.step if self.divergence else None,
            "missing": [
                {"generation": uuid(c.place[0]), "sequence": c.place[1], "tokens": c.missing, "from_step": c.missing_from}
                for c in self.missing
            ],
            "known": self.run.known or "to its end",
            "differences": [{"key": k, "recorded": before, "present": after} for k, before, after in self.differences],
            "duration_us": self.duration_us,
        }


@dataclass
class ExactReplay:
    """One exact replay. `before` is called when the engine is built; `on_step` hears how far it is: the step and the last of all."""

    run: Run
    sink: EventSink
    context: SessionContext
    until: bytes | None = None
    forced: bool = False
    model: str | None = None
    changed: dict[str, Any] = field(default_factory=dict)
    before: Callable[[], None] | None = None
    on_step: Callable[[int, int], None] | None = None

    def execute(self) -> Outcome:
        """Replay and record the outcome.

        Raises:
            ConflictError: the run or the engine is not such that it could be reproduced; nothing is recorded then.
            EngineUnavailable: vLLM cannot be built or fails.
        """
        check(self.run, forced=self.forced, model=self.model)
        began = time.perf_counter_ns()
        script = Script(self.run, until=self.until)
        check_room(script, self.changed)
        with ExactEngine(self.run, script, model=self.model, changed=self.changed, forced=self.forced) as engine:
            differences = refuse_differences(self.run, engine.facts(), forced=self.forced)
            replay_id = self._start(engine, differences)
            compared, divergence = self._compare(engine, script)
        steps = script.step - script.first_step + 1
        verdict, reason = self._judge(compared, divergence, steps)
        took = (time.perf_counter_ns() - began) // 1000
        outcome = Outcome(
            *(replay_id, self.context.session_id, self.run, verdict, reason, steps, tuple(compared), tuple(differences), divergence, took)
        )
        self._finish(outcome)
        return outcome

    def _compare(self, engine: ExactEngine, script: Script) -> tuple[list[Compared], Diverged | None]:
        places = {request.document["request_id"]: request.place for request in self.run.requests.values()}
        compared: dict[Place, Compared] = {}
        came: dict[Place, int] = {}
        last = script.run.steps[-1].number
        divergence, through = None, last
        if self.before:
            self.before()
        try:
            for step, name, token_ids, logprobs in engine.outputs():
                place = places[name]
                came[place] = step
                one = compared.get(place) or compared.setdefault(place, Compared(place, self.run.said.get(place, Said())))
                fault = one.take(token_ids, logprobs)
                if fault and not self.forced:
                    raise Diverged(f"generation {uuid(place[0])}, sequence {place[1]}: {fault}", step)
                if self.on_step:
                    self.on_step(step, last)
        except Diverged as error:
            divergence, through = error, script.step - 1
        self._miss(compared, came, script, through)
        return [compared[request.place] for request in self.run.requests.values() if request.place in compared], divergence

    def _miss(self, compared: dict[Place, Compared], came: dict[Place, int], script: Script, through: int) -> None:
        """Mark what should have come whole by a step: no output says that a sequence is missing."""
        computed: dict[int, list[int]] = {}
        for step in self.run.steps[script.first_step :]:
            for number in step.rows:
                computed.setdefault(number, []).append(step.number)
        for number, steps in computed.items():
            place = self.run.requests[number].place
            one = compared.get(place) or Compared(place, self.run.said.get(place, Said()))
            if one.missing and steps[-1] <= through:
                compared[place] = one
                one.missing_from = next((step for step in steps if step > came.get(place, -1)), steps[-1])
                one.first_telling = one.tokens if one.first_telling is None else one.first_telling

    def _judge(self, compared: list[Compared], divergence: Diverged | None, steps: int) -> tuple[str, str]:
        if divergence is not None:
            return DIVERGED, str(divergence.fault)
        other = [
            c for c in compared if not c.reproduced and (self.until is None or c.place[0] == self.until or c.first_telling is not None)
        ]
        if other:
            first = other[0]
            said = (
                f"{count(len(other), 'sequence')} of {len(compared):,} otherwise, first generation {uuid(first.place[0])}, {first.place[1]}"
            )
            if first.missing_from is not None:
                said += f", of which {count(first.missing, 'token')} did not come, from step {first.missing_from:,} on"
            return DIVERGED, said
        scored = sum(c.logprobs_equal for c in compared)  # of sequences that were still under way at `until` only what came
        tokens = sum(c.tokens_equal for c in compared)
        said = f"{count(len(compared), 'sequence')}, {count(tokens, 'token')} and {count(scored, 'logprob')}"
        known = f"; {self.run.known}" if self.run.known and not self._ended(compared) else ""
        return REPRODUCED, f"{said} bit for bit in {count(steps, 'step')}{known}"

    def _ended(self, compared: list[Compared]) -> bool:
        """Whether what was asked for had ended on the tape."""
        return self.until is not None and all(c.recorded.finish_reason is not None for c in compared if c.place[0] == self.until)

    def _start(self, engine: ExactEngine, differences: list[tuple[str, Any, Any]]) -> bytes:
        replay_id = new_id()
        self._record(e.SessionOpened(purpose="replay", parent_session=self.run.engine_run))
        said = [
            e.Difference(key=key, recorded=repr(before), present=repr(after), digest=classify(key)) for key, before, after in differences
        ]
        self._record(
            e.ReplayStarted(
                replay_id=replay_id,
                subject_session=self.run.engine_run,
                mode="exact, forced" if self.forced else "exact",
                engine=f"vLLM {engine.version} in process",
                strict=not self.forced,
                environment_recorded=self.run.environment_id,
                differences=said,
            )
        )
        return replay_id

    def _finish(self, outcome: Outcome) -> None:
        for one in outcome.sequences:
            self._record(
                e.SequenceCompared(
                    replay_id=outcome.replay_id,
                    generation_id=one.place[0],
                    index=one.place[1],
                    verdict=REPRODUCED if one.reproduced else DIVERGED if one.first_telling is not None else "inconclusive",
                    tokens=len(one.recorded.token_ids),
                    tokens_scored=one.tokens_equal,
                    first_telling=one.first_telling,
                )
            )
        self._record(
            e.ReplayFinished(
                replay_id=outcome.replay_id,
                verdict=outcome.verdict,
                reason=outcome.reason,
                generations=len({one.place[0] for one in outcome.sequences}),
                sequences=len(outcome.sequences),
                tokens=sum(one.tokens_equal for one in outcome.sequences),
                duration_us=outcome.duration_us,
            )
        )
        self._record(e.SessionClosed(reason="replay finished"))

    def _record(self, payload: e.Payload) -> None:
        self.sink.record(self.context, payload)
