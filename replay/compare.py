"""Compare replay: an engine of today scores what was said then, and every sequence, generation and the session get a verdict.

Texts are never compared: recorded tokens are forced, so that one early difference cannot hide the rest. The replay is
recorded in a session of its own; the session that it replays is only read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypedDict, TypeVar, Unpack

from replay.calibration import FALSE_ALARM, Calibration, Calibrations
from replay.draws import judged_by_draws
from replay.drift import Judgement, Verdict, astray_nats, judge, worst
from replay.engines.base import Engine, Forced, Refused, Rendering, Request, Scored
from replay.floors import Floor, floor_of, same_kernels, same_precision
from replay.fold import Until, fold
from replay.measurement import alternatives_for
from replay.memory import Memory
from replay.prompts import needs_rendering, prompt_of
from replay.sampling import (
    PENALTIES,
    Sampler,
    astray_beyond_penalties,
    defaults_of,
    effective,
    has_grammar,
    is_greedy,
    sampler_of,
    takes_processed,
)
from replay.state import Generation, Sequence, SessionState
from replay.taped import taped
from replay.words import count, uuid
from schemas import events as e
from schemas.enginerun.facts import GRAMMAR
from schemas.environment import compare as compare_environments
from schemas.errors import EngineUnavailable, UnknownSession, UsageError
from schemas.probe import item
from schemas.requests.recorded import CHAT, ENGINE, media_of, sampled_as
from schemas.sink import EventSink, SessionContext, new_id
from store.rows import StoredEvent

T = TypeVar("T")
Asking: TypeAlias = Generator[Forced | Rendering, Any, T]
"""What comes to a T by asking an engine: it yields what is to be forced or rendered, and is sent the answer."""


LOGPROBS_MODE = "config.model_config.logprobs_mode"
"""The item of an environment that says which numbers a server gives as logprobs."""


@dataclass(frozen=True, slots=True)
class SequenceOutcome:
    """One sequence's verdict, with the engine's own view of its tokens."""

    index: int
    judgement: Judgement
    scored: Scored | None = None


@dataclass(frozen=True, slots=True)
class GenerationOutcome:
    """One generation's verdict: the worst of its sequences."""

    generation_id: bytes
    verdict: Verdict
    sequences: tuple[SequenceOutcome, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a compare replay found. `session_id` is where it is recorded; `refused` says that strict did not let it begin."""

    replay_id: bytes
    session_id: bytes
    subject_session: bytes
    engine: str
    verdict: Verdict
    reason: str
    strict: bool
    refused: bool
    environment_known: bool
    differences: tuple[e.Difference, ...]
    generations: tuple[GenerationOutcome, ...]
    skipped: int
    duration_us: int

    @property
    def sequences(self) -> list[SequenceOutcome]:
        """All sequences that were judged."""
        return [sequence for generation in self.generations for sequence in generation.sequences]

    def document(self) -> dict[str, Any]:
        """The outcome as JSON types, without the logprobs: those are in the replay's own events."""
        ids = {"replay": uuid(self.replay_id), "recorded_in": uuid(self.session_id), "session": uuid(self.subject_session)}
        return {
            **ids,
            "engine": self.engine,
            "verdict": self.verdict,
            "reason": self.reason,
            "strict": self.strict,
            "refused": self.refused,
            "environment_known": self.environment_known,
            "differences": [difference.model_dump() for difference in self.differences],
            "generations": [_generation_document(generation) for generation in self.generations],
            "generations_without_tokens": self.skipped,
            "duration_us": self.duration_us,
        }


def _generation_document(generation: GenerationOutcome) -> dict[str, Any]:
    sequences = [{"index": s.index, **_judgement_document(s.judgement)} for s in generation.sequences]
    return {"generation": uuid(generation.generation_id), "verdict": generation.verdict, "sequences": sequences}


def _judgement_document(judgement: Judgement) -> dict[str, Any]:
    names = ("verdict", "reason", "tokens", "scored", "first_telling", "drift_mean", "drift_p99", "drift_max")
    floor = judgement.floor
    return {
        **{name: getattr(judgement, name) for name in names},
        "noise_floor": floor and floor.nats,
        "noise_floor_source": floor and floor.source,
    }


class Options(TypedDict, total=False):
    """How a session is compared; see `comparing`."""

    strict: bool
    actor: str
    until: Until | None
    calibrations: Calibrations | None
    run: str | None
    memory: Memory | None
    on_sequence: Callable[[bytes, SequenceOutcome], None] | None


def run_compare(events: Iterable[StoredEvent], engine: Engine, sink: EventSink, **options: Unpack[Options]) -> Outcome:
    """Compare one session with an engine, which is waited for. Options, what is recorded and what is raised as of `comparing`."""
    asks = comparing(events, engine, sink, **options)
    try:
        asked = next(asks)
        while True:
            try:
                answer = (
                    engine.render(asked.request)
                    if isinstance(asked, Rendering)
                    else engine.force(asked.request, asked.prompt_token_ids, asked.token_ids)
                )
            except EngineUnavailable as error:
                asked = asks.throw(error)
            else:
                asked = asks.send(answer)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome


def comparing(
    events: Iterable[StoredEvent],
    engine: Engine,
    sink: EventSink,
    *,
    strict: bool = False,
    actor: str = "",
    until: Until | None = None,
    calibrations: Calibrations | None = None,
    run: str | None = None,
    memory: Memory | None = None,
    on_sequence: Callable[[bytes, SequenceOutcome], None] | None = None,
) -> Asking[Outcome]:
    """Compare one session with an engine and record the replay in a session of its own.

    What the engine has to render, or to be forced to say, is yielded, its answer is sent, and what it raises is thrown: so one
    thread has many sessions on the way.

    With a calibration of the recorded environment the chance of a false *model differs* or *sampling differs* is at most
    `FALSE_ALARM`, for the session as for each of its sequences: n sequences are tested at an n-th of it each. `on_sequence` is
    told each sequence's outcome as it comes. An engine that fails in the middle makes the rest inconclusive; as part of a
    `run`, whose name is then the workflow of the replay's session, it leaves the replay unfinished instead, to be done again.

    Raises:
        UnknownSession: no events.
        EngineUnavailable: the engine does not answer at all, and nothing is recorded; or it fails in a run.
    """
    state = fold(events, until=until)
    if state.session_id is None or state.last is None:
        raise UnknownSession("no event of this session is known", operation="replay", hint="list sessions with: tokentape sessions")
    begun = time.monotonic_ns()
    subjects = [g for g in state.generations.values() if g.recording and g.recording.tokens]
    recorded = _recorded_environments(state, subjects or list(state.generations.values()))
    memory = memory or Memory()
    present = memory.environment(engine, recorded[-1] if recorded else None)
    tests = sum(1 for g in subjects for sequence in g.sequences if sequence.tokens)
    replay = _Run(state, engine, sink, strict, present, recorded, _context(state, actor), memory, calibrations, tests, run)
    replay.start(state.last.event_id)
    outcomes = []
    for generation in subjects if not replay.refused else ():
        outcome = yield from replay.generation(generation, on_sequence)
        outcomes.append(outcome)
    return replay.finish(outcomes, len(state.generations) - len(subjects), (time.monotonic_ns() - begun) // 1000)


def _context(state: SessionState, actor: str) -> SessionContext:
    return SessionContext(new_id(), state.tenant, "replay", actor, state.retention_class or "standard")


def _recorded_environments(state: SessionState, subjects: list[Generation]) -> list[e.EnvironmentCaptured]:
    """The distinct environments that produced these generations, in order."""
    found: dict[bytes, e.EnvironmentCaptured] = {}
    for generation in subjects:
        environment = state.environment_of(generation)
        if environment:
            found[environment.event.environment_id] = environment.event
    return list(found.values())


class _Run:
    """One replay on its way: what all its sequences share."""

    def __init__(
        self,
        state: SessionState,
        engine: Engine,
        sink: EventSink,
        strict: bool,
        present: e.EnvironmentCaptured | None,
        recorded: list[e.EnvironmentCaptured],
        context: SessionContext,
        memory: Memory,
        calibrations: Calibrations | None,
        tests: int,
        run: str | None,
    ) -> None:
        self.state, self.engine, self.sink, self.strict, self.context = state, engine, sink, strict, context
        self.present, self.recorded = present, recorded
        self.replay_id = new_id()
        self.known = present is not None and bool(recorded)
        self.differences = _differences(recorded, present)
        self._alike = self.known and same_kernels(self.differences) and same_precision(self.differences)
        self.refused = strict and (bool(self.differences) or not self.known or any(r.origin != present.origin for r in recorded if present))
        self._false_alarm = FALSE_ALARM / max(tests, 1)
        self._run = run
        self._calibration = self._calibrated(calibrations)
        self._memory = memory
        self._down: str | None = None

    def start(self, until: bytes) -> None:
        """Record that the replay began, and against what."""
        subject = self.state.session_id or b""
        self._record(e.SessionOpened(workflow=self._run, purpose="replay", parent_session=subject, parent_event=until))
        if self.present is not None:
            self._record(self.present)
        self._record(
            e.ReplayStarted(
                replay_id=self.replay_id,
                subject_session=subject,
                subject_until=until,
                mode="compare",
                engine=self.engine.name,
                strict=self.strict,
                environment_recorded=self.recorded[-1].environment_id if self.recorded else None,
                environment_present=self.present.environment_id if self.present else None,
                differences=list(self.differences),
            )
        )

    def generation(self, generation: Generation, on_sequence: Callable[[bytes, SequenceOutcome], None] | None) -> Asking[GenerationOutcome]:
        """Compare and record each sequence of a generation."""
        outcomes = []
        for sequence in generation.sequences:
            if not sequence.tokens:
                continue
            outcome = yield from self._sequence(generation, sequence)
            self._record(_compared(self.replay_id, generation.generation_id, outcome))
            if on_sequence:
                on_sequence(generation.generation_id, outcome)
            outcomes.append(outcome)
        return GenerationOutcome(generation.generation_id, worst(o.judgement.verdict for o in outcomes), tuple(outcomes))

    def _sequence(self, generation: Generation, sequence: Sequence) -> Asking[SequenceOutcome]:
        tape = taped(sequence)
        asked = generation.request
        model, endpoint = (asked.model, asked.endpoint) if asked else (None, CHAT)
        edited = self.state.edited(generation)
        try:
            named = sampled_as(endpoint, edited) if edited else None
        except UsageError as error:
            return _inconclusive(sequence, str(error.fault))
        defaults = self._defaults(generation)
        document = effective(named, defaults) if named else None
        request = Request(model, edited or {}, self._alternatives(document), endpoint)
        try:
            rendered: tuple[int, ...] | Refused | None = None
            if not self._down and needs_rendering(generation, self.differences):
                rendered = yield Rendering(request)
            prompt = prompt_of(generation, rendered)
            why = self._down or _of_an_engine(generation, sequence, edited)
            why = why or _other_logprobs(self._mode(generation), document)
            if why := why or hindrance(document, prompt.token_ids, tape.token_ids, tape.missing):
                return _inconclusive(sequence, why)
            calibration = self._calibration if self._calibration and self._calibration.reaches(len(tape.token_ids)) else None
            floor = self._floor(request.model, calibration)  # before it has work: to measure one it has to be idle
            forced = Forced(request, prompt.token_ids, tape.token_ids)
            scored: Scored | Refused = yield forced
            if isinstance(scored, Refused):
                return _inconclusive(sequence, scored.reason)
            greedy, alarm = is_greedy(document), self._false_alarm
            judged = partial(judge, scored=scored, floor=floor, greedy=greedy, calibration=calibration, false_alarm=alarm)
            judgement = judged(tape.logprobs)
            if judgement.verdict == "model_differs" and has_grammar(document):
                judgement = _beside_grammar(judgement, judged(_raised_aside(tape.logprobs, scored)))
            if greedy and (untold := _untold(named, defaults)):
                judgement = yield from _whatever_was_set(judgement, untold, forced, astray_nats(floor, calibration))
        except EngineUnavailable as error:
            if self._run is not None:
                self._record(e.SessionClosed(reason="the engine failed"))
                raise
            self._down = str(error)
            return _inconclusive(sequence, self._down)
        if self._calibration and not calibration:
            measured = count(self._calibration.tokens_median, "token")
            judgement = replace(judgement, reason=f"{judgement.reason}; not by the calibration, which measured sequences of {measured}")
        judgement = prompt.judged(judgement)
        if not greedy and judgement.verdict in ("identical", "numeric_drift"):
            drawn = _sampler(document, defaults, generation, sequence)
            noise = self._calibration or self._uncalibrated()
            judgement = judged_by_draws(judgement, drawn, len(prompt.token_ids), tape.token_ids, scored, noise, alarm / 2)
        kept = replace(scored, alternatives=())  # a vocabulary per token is for the judgement alone
        return SequenceOutcome(sequence.index, _qualified(judgement, sequence, tape.missing), kept)

    def _mode(self, generation: Generation) -> str | None:
        """What the server gave as logprobs; None where nobody knows."""
        environment = self.state.environment_of(generation)
        told = item(environment.event, LOGPROBS_MODE) if environment else None
        return None if told is None else str(told).rpartition(".")[2].lower()

    def _defaults(self, generation: Generation) -> dict[str, Any] | None:
        """What the server puts in for sampling parameters that a request does not name; None where nobody knows.

        Nothing is put in for what an engine recorded, which is resolved. An engine that makes again all choices of requests that name none
        puts in nothing: a calibration shows that where nobody told.
        """
        if generation.request is not None and generation.request.endpoint == ENGINE:
            return {}
        environment = self.state.environment_of(generation)
        told = defaults_of(environment.event if environment else None)
        shown = self._calibration is not None and self._calibration.noise is not None and not self._calibration.noise_misses
        return {} if told is None and shown else told

    def _alternatives(self, document: dict[str, Any] | None) -> int:
        return alternatives_for(document or {}) if self._calibration and self._calibration.noise else 0

    def _calibrated(self, calibrations: Calibrations | None) -> Calibration | None:
        """The calibration of the recorded environment, where nothing says that today's noise is another."""
        found = calibrations.of(self.recorded[-1]) if calibrations and self._alike else None
        return found if found and all(found.fits(environment) for environment in self.recorded) else None

    def _uncalibrated(self) -> str:
        """Why there is no calibration to judge by."""
        if not self.known:
            return "the environment is not known on both sides, so that no calibration is known to be its own"
        if not self._alike:
            return "the environment computes in another way than the recorded one"
        return "the engine is not calibrated"

    def _floor(self, model: str | None, calibration: Calibration | None) -> Floor:
        """The noise floor for a model: calibrated, or measured, once, where the same kernels are at work as far as is told."""
        default = floor_of([*self.recorded, self.present])
        if calibration:
            source = f"calibrated {calibration.made_at:%Y-%m-%d}: p99 over {calibration.tokens:,} tokens"
            return Floor(calibration.p99, source, default.dtype)
        return self._memory.floor(self.engine, model, default) if self._alike else default

    def finish(self, generations: list[GenerationOutcome], skipped: int, duration_us: int) -> Outcome:
        """Record the verdict on the whole and close the replay's session."""
        verdict = worst(g.verdict for g in generations)
        reason = self._reason(generations, verdict)
        sequences = [s for g in generations for s in g.sequences]
        tokens = sum(s.judgement.scored for s in sequences)
        counts = {"generations": len(generations), "sequences": len(sequences), "tokens": tokens, "duration_us": duration_us}
        self._record(e.ReplayFinished(replay_id=self.replay_id, verdict=verdict, reason=reason, **counts))
        self._record(e.SessionClosed(reason="replay finished"))
        subject = self.state.session_id or b""
        head = (self.replay_id, self.context.session_id, subject, self.engine.name, verdict, reason, self.strict, self.refused)
        return Outcome(*head, self.known, self.differences, tuple(generations), skipped, duration_us)

    def _reason(self, generations: list[GenerationOutcome], verdict: Verdict) -> str:
        if self.refused:
            keys = ", ".join(difference.key for difference in self.differences[:5])
            unlike = "it is not known on both sides" if not self.known else "it was captured in another way, which tells other things"
            what = f"{count(len(self.differences), 'difference')}: {keys}" if self.differences else unlike
            return f"strict: the environment is not the recorded one ({what})"
        sequences = [s for g in generations for s in g.sequences]
        if not sequences:
            return "no recorded tokens"
        those = [s for s in sequences if s.judgement.verdict == verdict]
        return f"{len(those)} of {count(len(sequences), 'sequence')}: {those[0].judgement.reason}"

    def _record(self, payload: e.Payload) -> None:
        self.sink.record(self.context, payload)


def _differences(recorded: list[e.EnvironmentCaptured], present: e.EnvironmentCaptured | None) -> tuple[e.Difference, ...]:
    """What differs between any recorded environment and the present one; nothing where one side is unknown."""
    if present is None:
        return ()
    found = {(d.key, d.recorded): d for environment in recorded for d in compare_environments(environment, present)}
    return tuple(found.values())


def _of_an_engine(generation: Generation, sequence: Sequence, document: dict[str, Any] | None) -> str | None:
    """Why a sequence that was recorded inside the engine cannot be forced by its ids, if it cannot."""
    if generation.request is None or generation.request.endpoint != ENGINE:
        return None
    if generation.recording and generation.recording.starts > 1 and sequence.index:
        return "its request had several prompts, and which of them is this one's is not told"
    unlike = (document or {}).get("unrepeatable")
    found = [what for what in unlike if what != GRAMMAR] if isinstance(unlike, list) else []
    return f"it had {found[0]}, which token ids do not carry" if found else None


def hindrance(document: dict[str, Any] | None, prompt: tuple[int, ...], ids: tuple[int, ...], missing: str | None) -> str | None:
    """Why a sequence cannot be forced, if it cannot."""
    if not ids:
        return missing or "it has no tokens"
    if not prompt:
        return "the recording has no prompt token ids"
    parts = media_of(document or {})
    return f"its prompt holds {', '.join(parts)}, which token ids do not carry" if parts else None


def _other_logprobs(mode: str | None, document: dict[str, Any] | None) -> str | None:
    """Why a server's numbers are none of the model's own distribution, which is what an engine scores; None if they are."""
    if mode in (None, "raw_logprobs") or (mode == "processed_logprobs" and not takes_processed(document)):
        return None
    return f"the server gave {mode.replace('_', ' ')} (--logprobs-mode), and an engine scores by the model's own logprobs"


def _raised_aside(recorded: Iterable[float | None], scored: Scored) -> list[float | None]:
    """Recorded logprobs, but for those that are higher than the engine's: they count as equal."""
    return [min(r, s) if r is not None and s is not None else r for r, s in zip(recorded, scored.logprobs, strict=False)]


def _beside_grammar(judgement: Judgement, lowered: Judgement) -> Judgement:
    """A grammar takes tokens away before logprobs are taken, which raises the others: only what is lower than noise explains tells."""
    if lowered.verdict == "model_differs":
        return lowered
    reason = "a grammar left tokens out before logprobs were taken, which raises those of the others, and none is lower than noise explains"
    return replace(judgement, verdict="inconclusive", reason=reason, first_telling=None)


def _untold(named: dict[str, Any] | None, defaults: dict[str, Any] | None) -> list[str]:
    """Penalties of which nobody knows whether the server put them in."""
    return [name for name in PENALTIES if (named or {}).get(name) is None] if defaults is None else []


def _whatever_was_set(judgement: Judgement, untold: list[str], forced: Forced, nats: float) -> Asking[Judgement]:
    """The judgement on greedy tokens that passed over likelier ones: it stands where no penalty can have made them do so.

    Which tokens those were is asked for here, since hardly a sequence needs to know.
    """
    if judgement.first_telling is None or judgement.verdict not in ("sampling_differs", "inconclusive"):
        return judgement
    scored = yield replace(forced, request=replace(forced.request, alternatives=2))
    proof = None if isinstance(scored, Refused) else astray_beyond_penalties(forced.prompt_token_ids, forced.token_ids, scored, nats)
    if proof is not None:
        return judgement
    reason = f"{judgement.reason}; a {untold[0]} that the server sets for all may have done that, and what it sets is not told"
    return replace(judgement, verdict="inconclusive", reason=reason)


def _sampler(document: dict[str, Any] | None, defaults: dict[str, Any] | None, generation: Generation, sequence: Sequence) -> Sampler | str:
    """How a sequence's tokens were to be drawn, or why that cannot be told."""
    if defaults is None and document is not None and document.get("temperature") is None:
        return "the request names no temperature, and which one the server sets then is not told"
    return sampler_of(document, generation.request.seed if generation.request else None, sequence.index)


def _inconclusive(sequence: Sequence, reason: str) -> SequenceOutcome:
    return SequenceOutcome(sequence.index, Judgement("inconclusive", reason, tokens=sequence.tokens))


def _qualified(judgement: Judgement, sequence: Sequence, missing: str | None) -> Judgement:
    """The judgement with the tokens that it does not cover said in its reason."""
    notes = [judgement.reason]
    if judgement.scored < sequence.tokens:
        notes.append(f"{judgement.scored} of {sequence.tokens} tokens scored" + (f", as {missing}" if missing else ""))
    return replace(judgement, tokens=sequence.tokens, reason="; ".join(notes))


def _compared(replay_id: bytes, generation_id: bytes, outcome: SequenceOutcome) -> e.SequenceCompared:
    judgement, scored = outcome.judgement, outcome.scored
    content = None
    if scored is not None:
        logprobs = [value for value in scored.logprobs if value is not None]
        ranks = [value for value in scored.ranks if value is not None]
        content = e.ComparedContent(logprobs=logprobs, ranks=ranks if len(ranks) == len(logprobs) else [])
    return e.SequenceCompared(
        replay_id=replay_id,
        generation_id=generation_id,
        index=outcome.index,
        verdict=judgement.verdict,
        reason=judgement.reason,
        tokens=judgement.tokens,
        tokens_scored=judgement.scored,
        first_telling=judgement.first_telling,
        drift_mean=judgement.drift_mean,
        drift_p99=judgement.drift_p99,
        drift_max=judgement.drift_max,
        noise_floor=judgement.floor.nats if judgement.floor else None,
        content=content,
    )
