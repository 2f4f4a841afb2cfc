"""Two sides of the same words, token by token: a recording and its replay, or two recordings, with what moved and what may have moved it.

A replay is read from its own tape, so nothing is asked of an engine here. Two recordings are compared as far as they say the
same tokens after the same prompt; where they part is the token that tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Several
from typing import Any, NamedTuple

from replay.differences import report, sentence
from replay.drift import Judgement, drift_of, judge, worst
from replay.engines.base import Scored
from replay.floors import floor_of
from replay.sections import alternatives_column
from replay.state import Entry, Environment, Generation, Replay, Sequence, SessionState
from replay.taped import taped
from replay.words import count, uuid
from schemas import events as e
from schemas.environment import compare as compare_environments
from schemas.errors import UnknownName, UsageError

FAR_NATS = 9999.0
"""What stands for infinity, which JSON has no word for."""


class Side(NamedTuple):
    """A generation in its session."""

    state: SessionState
    generation: Generation


def subject_of(state: SessionState) -> bytes | None:
    """The session that a replay recorded here is about; None where none is."""
    started = [replay.started for replay in state.replays.values() if replay.started]
    return started[-1].subject_session if started else None


def replay_document(state: SessionState, subject: SessionState) -> dict[str, Any]:
    """The last replay that `state` records, beside the session that it replayed.

    Raises:
        UsageError: no replay is recorded there.
    """
    kept = [(key, replay) for key, replay in state.replays.items() if replay.started]
    if not kept:
        hint = "name two generations, or the session in which a replay was recorded"
        raise UsageError("this session records no replay", operation="compare", hint=hint)
    replay_id, replay = kept[-1]
    started, finished = replay.started, replay.finished
    assert started is not None
    recorded = _captured(subject.environments, started.environment_recorded)
    present = _captured(state.environments, started.environment_present)
    return {
        "kind": "replay",
        "replay": uuid(replay_id),
        "engine": started.engine,
        "mode": started.mode,
        "run": state.opened.workflow if state.opened else None,
        "first": {"session_id": _session(subject), "environment_id": _hex(started.environment_recorded)},
        "second": {"session_id": _session(state), "environment_id": _hex(started.environment_present)},
        "verdict": finished.verdict if finished else None,
        "reason": finished.reason if finished else "it has not ended",
        "environment": _environment(recorded, present, started.differences),
        "sequences": [_replayed(subject, compared) for compared in _latest(replay)],
    }


def generations_document(
    state: SessionState, other_state: SessionState, generation: str | None = None, other_generation: str | None = None
) -> dict[str, Any]:
    """Two generations as far as they can be compared, with a verdict on each pair of sequences of one index.

    Raises:
        UnknownName: one of them is not there.
        UsageError: they are one and the same.
    """
    first, second = _named(state, generation), _named(other_state, other_generation)
    if first.generation.generation_id == second.generation.generation_id:
        hint = "name both generations, or another session; or the session in which a replay was recorded"
        raise UsageError("a generation is not compared with itself", operation="compare", hint=hint)
    one, other = (each.state.environment_of(each.generation) for each in (first, second))
    environments = (one.event if one else None, other.event if other else None)
    differences = compare_environments(one.event, other.event) if one and other else ()
    unlike = _prompts_differ(first, second)
    others = {sequence.index: sequence for sequence in second.generation.sequences}
    pairs = [(sequence, others[sequence.index]) for sequence in first.generation.sequences if sequence.index in others]
    judged = [_pair(first, second, *pair, environments, unlike) for pair in pairs]
    verdict = worst(judgement.verdict for judgement, _ in judged)
    reasons = [judgement.reason for judgement, _ in judged if judgement.verdict == verdict]
    return {
        "kind": "generations",
        "first": _side(first, one),
        "second": _side(second, other),
        "verdict": verdict,
        "reason": reasons[0] if reasons else "they have no sequence in common",
        "environment": _environment(*environments, differences),
        "sequences": [document for _, document in judged],
    }


def _named(state: SessionState, generation: str | None) -> Side:
    """The generation that an id or a unique beginning or end of one names, by default the last one with tokens."""
    there = [each for each in state.generations.values() if each.recording and each.recording.tokens]
    digits = (generation or "").replace("-", "").lower()
    found = [each for each in there if each.generation_id.hex().startswith(digits) or each.generation_id.hex().endswith(digits)]
    if not found or (digits and len(found) > 1):
        hint = f"with tokens: {', '.join(uuid(each.generation_id) for each in there[-5:]) or 'none'}"
        fault = f"no generation {generation!r} with tokens" if digits else "the session has no generation with tokens"
        raise UnknownName(fault, operation="compare", hint=hint)
    return Side(state, found[-1])


def _latest(replay: Replay) -> list[e.SequenceCompared]:
    return list({(compared.generation_id, compared.index): compared for compared in replay.compared}.values())


def _replayed(subject: SessionState, compared: e.SequenceCompared) -> dict[str, Any]:
    """What a replay recorded of one sequence, beside its tokens as the subject has them now."""
    generation = subject.generations.get(compared.generation_id)
    sequences = generation.sequences if generation else []
    sequence = next((each for each in sequences if each.index == compared.index), None)
    entries = sequence.entries() if sequence else []
    scored = len(taped(sequence).token_ids) if sequence else 0
    content = compared.content
    # Places without a score are left out of the event, so that a shorter list cannot be put beside its tokens.
    present = content.logprobs if content and len(content.logprobs) == scored else []
    ranks = content.ranks if content and len(content.ranks) == len(present) else []
    names = ("index", "verdict", "reason", "tokens", "first_telling", "drift_mean", "drift_p99", "drift_max", "noise_floor")
    return {
        "generation_id": uuid(compared.generation_id),
        **{name: _finite(getattr(compared, name)) for name in names},
        "scored": compared.tokens_scored,
        "first": _columns(entries),
        "second": {"logprob": [_finite(value) for value in present], "rank": list(ranks)},
        "drift": _drifts([entry.logprob for entry in entries], present),
    }


def _pair(
    first: Side,
    second: Side,
    one: Sequence,
    other: Sequence,
    environments: tuple[e.EnvironmentCaptured | None, e.EnvironmentCaptured | None],
    unlike: str | None,
) -> tuple[Judgement, dict[str, Any]]:
    mine, theirs = one.entries(), other.entries()
    common = _common(mine, theirs)
    before, after = ([entry.logprob for entry in entries[:common]] for entries in (mine, theirs))
    parted = common if common < max(len(mine), len(theirs)) else None
    if unlike is not None:
        judgement = Judgement("inconclusive", unlike, len(mine), 0, parted)
        before, after = [], []
    else:
        floor = floor_of(environments)
        found = judge(before, Scored(tuple(after), (None,) * common, (None,) * common), floor=floor, greedy=False)
        judgement = found if parted is None or found.verdict == "model_differs" else _parted(found, first, second, mine, theirs, parted)
    names = ("verdict", "reason", "scored", "first_telling", "drift_mean", "drift_p99", "drift_max")
    document = {
        "generation_id": uuid(first.generation.generation_id),
        "index": one.index,
        **{name: _finite(getattr(judgement, name)) for name in names},
        "tokens": len(mine),
        "common": common,
        "noise_floor": judgement.floor.nats if judgement.floor else None,
        "first": _columns(mine),
        "second": _columns(theirs),
        "drift": _drifts(before, after),
    }
    return judgement, document


def _parted(found: Judgement, first: Side, second: Side, mine: Several[Entry], theirs: Several[Entry], at: int) -> Judgement:
    """Both thought alike of the tokens that they share, and then one took another."""
    parts = [entries[at] if at < len(entries) else None for entries in (mine, theirs)]
    alike = len({part.text for part in parts if part}) < 2 and None not in parts  # other tokens may read alike
    says = [f"{part.text!r}" + (f" (id {part.token_id})" if alike else "") if part else "nothing more" for part in parts]
    reason = f"the same for {count(at, 'token')}; then the first says {says[0]}, the second {says[1]}"
    asked = [each.generation.request for each in (first, second)]
    if any(request and request.seed is None and request.temperature != 0 for request in asked):
        reason += "; choices were not seeded, so that this may be chance"
    elif len(told := dict.fromkeys((request.seed, request.temperature) for request in asked if request)) > 1:
        reason += "; they were asked with " + " and ".join(f"seed {seed}, temperature {temperature}" for seed, temperature in told)
    figures = (found.drift_mean, found.drift_p99, found.drift_max)
    return Judgement("sampling_differs", reason, len(mine), found.scored, at, *figures, found.floor)


def _common(mine: Several[Entry], theirs: Several[Entry]) -> int:
    """How many tokens both begin with: by their ids, or by their text where one side has no ids."""
    at = 0
    for one, other in zip(mine, theirs, strict=False):
        told = one.token_id is not None and other.token_id is not None
        if (one.token_id != other.token_id) if told else (one.text is None or one.text != other.text):
            break
        at += 1
    return at


def _prompts_differ(first: Side, second: Side) -> str | None:
    """Why what both say cannot be compared; None where they were asked the same."""
    ids = [each.generation.recording.prompt_token_ids if each.generation.recording else () for each in (first, second)]
    if all(ids):
        at = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
        return None if ids[0] == ids[1] else f"the prompts differ from token {at} on, so what follows cannot be compared by its logprobs"
    documents = [each.state.edited(each.generation) for each in (first, second)]
    if None in documents:
        return "a prompt is erased or was not recorded"
    said = [
        {name: document.get(name) for name in ("messages", "input", "prompt", "contents", "tools")} for document in documents if document
    ]
    return None if said[0] == said[1] else "the prompts differ, so what follows cannot be compared by its logprobs"


def _environment(
    recorded: e.EnvironmentCaptured | None, present: e.EnvironmentCaptured | None, differences: Several[e.Difference]
) -> dict[str, Any]:
    """What differs between the environments, in words; `lines` as `env diff` prints them."""
    known = recorded is not None and present is not None
    lines = list(report(recorded, present, differences)) if recorded and present else ["one side's environment is not known"]
    told = [{"key": each.key, "class": each.digest, "words": sentence(each)} for each in differences]
    return {"known": known, "differences": told, "lines": lines}


def _captured(environments: Iterable[Environment], wanted: bytes | None) -> e.EnvironmentCaptured | None:
    return next((each.event for each in environments if each.event.environment_id == wanted), None)


def _side(each: Side, environment: Environment | None) -> dict[str, Any]:
    request = each.generation.request
    return {
        "session_id": _session(each.state),
        "generation_id": uuid(each.generation.generation_id),
        "model": request.model if request else None,
        "environment_id": _hex(environment.event.environment_id) if environment else None,
    }


def _session(state: SessionState) -> str | None:
    return uuid(state.session_id) if state.session_id else None


def _hex(digest: bytes | None) -> str | None:
    return digest.hex() if digest else None


def _columns(entries: Several[Entry]) -> dict[str, Any]:
    """Tokens column by column; `alternatives` is None where none was recorded."""
    columns = {name: [_finite(getattr(entry, name)) for entry in entries] for name in ("text", "token_id", "logprob")}
    return {**columns, "alternatives": alternatives_column(entries)}


def _drifts(before: Several[float | None], after: Several[float | None]) -> list[float | None]:
    """The drift of each place where both are known."""
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(before, after, strict=False)) if a is not None and b is not None]
    drifts: list[float | None] = [None] * min(len(before), len(after))
    for (i, _, _), drift in zip(pairs, drift_of([a for _, a, _ in pairs], [b for _, _, b in pairs]), strict=True):
        drifts[i] = _finite(float(drift))
    return drifts


def _finite(value: Any) -> Any:
    return max(-FAR_NATS, min(FAR_NATS, value)) if isinstance(value, float) else value
