"""What an engine says freely to the requests of a suite: twice by the same seed, and over a grid of parameters."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from replay.engines.base import Engine, Generated, Refused, Request
from replay.suite import Case, Suite
from schemas.errors import UsageError
from schemas.requests.recorded import COMPLETIONS

SEED = 1
"""Seed of a request that was recorded without one."""


class Repeated(NamedTuple):
    """Whether a case came the same each time, None where the engine refused it; `reason` names the first token that did not, or why."""

    case: Case
    same: bool | None
    reason: str


class Point(NamedTuple):
    """One point of a grid over all cases. Lengths are tokens, logprobs nats; `as_recorded` is the share of equal sequences."""

    parameters: dict[str, Any]
    answers: int
    refused: int
    tokens_mean: float | None
    logprob_mean: float | None
    as_recorded: float | None
    common_prefix_mean: float | None
    distinct: int


def determinism(suite: Suite, engine: Engine, *, times: int = 2) -> Iterator[Repeated]:
    """Each case asked `times` times by the same seed, alone, so that nothing but the engine can differ.

    Raises:
        EngineUnavailable: the engine does not answer.
    """
    for case in suite.cases:
        answers = [engine.generate(request_of(case)) for _ in range(times)]
        refused = next((answer for answer in answers if isinstance(answer, Refused)), None)
        if refused:
            yield Repeated(case, None, refused.reason)
            continue
        first, *others = [answer for answer in answers if isinstance(answer, Generated)]
        reason = next((why for other in others if (why := _parted(first, other))), "")
        yield Repeated(case, not reason, reason)


def grid(suite: Suite, engine: Engine, axes: dict[str, list[Any]]) -> Iterator[Point]:
    """Every combination of the axes' values, over all cases at once.

    Raises:
        EngineUnavailable: the engine does not answer.
    """
    for values in itertools.product(*axes.values()):
        parameters = dict(zip(axes, values, strict=True))
        answers = engine.generate_all([request_of(case, **parameters) for case in suite.cases])
        yield _point(parameters, list(zip(suite.cases, answers, strict=True)))


def axes_of(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`NAME=VALUE,VALUE` words as axes; a value is JSON where it can be read as such.

    Raises:
        UsageError: not of that form, or an axis twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not name.isidentifier() or not values or name in axes:
            fault = f"{text!r} is no axis" if name not in axes else f"the axis {name} is given twice"
            raise UsageError(fault, operation="read --vary", hint="such as --vary temperature=0,0.7,1 --vary top_p=0.9,1")
        axes[name] = [_value(value) for value in values.split(",")]
    return axes


def request_of(case: Case, **changes: Any) -> Request:
    """The case's request with a seed; a completion is asked by its prompt's ids."""
    document = {**case.request, "seed": SEED if case.seed is None else case.seed, **changes}
    if case.endpoint == COMPLETIONS:
        document["prompt"] = case.prompt_token_ids
    return Request(case.model, document, endpoint=case.endpoint)


def _parted(first: Generated, other: Generated) -> str:
    """Where two answers part, in words; empty where they do not."""
    for a, b in zip(first.sequences, other.sequences, strict=False):
        if a.token_ids != b.token_ids or a.text != b.text:
            return f"sequence {a.index} is another from token {_common(a.token_ids, b.token_ids)} on"
    return "" if len(first.sequences) == len(other.sequences) else "another number of sequences"


def _point(parameters: dict[str, Any], answers: list[tuple[Case, Generated | Refused]]) -> Point:
    spoken = [(case, sequence) for case, answer in answers if isinstance(answer, Generated) for sequence in answer.sequences]
    recorded = {(case.generation, said.index): tuple(said.token_ids) for case, _ in answers for said in case.sequences}
    pairs = [(recorded[case.generation, s.index], s.token_ids) for case, s in spoken if (case.generation, s.index) in recorded]
    logprobs = [logprob for _, sequence in spoken for logprob in sequence.logprobs]
    return Point(
        parameters,
        answers=len(spoken),
        refused=sum(isinstance(answer, Refused) for _, answer in answers),
        tokens_mean=_mean([len(sequence.token_ids) for _, sequence in spoken]),
        logprob_mean=_mean(logprobs),
        as_recorded=_mean([before == now for before, now in pairs]),
        common_prefix_mean=_mean([_common(before, now) for before, now in pairs]),
        distinct=len({(case.generation, sequence.token_ids or sequence.text) for case, sequence in spoken}),
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
