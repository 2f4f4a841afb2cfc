"""Whether an engine still thinks of recorded tokens what it thought then: drift per token, a noise floor, a verdict.

The drift of a token is |recorded - present| of its logprob, in nats. The same weights give slightly different logprobs when
batches, kernels or hardware differ; the noise floor is what 99 of 100 tokens stay under then. A verdict of *model differs*
needs more than noise explains, by any of three tests, each with the chance that pure noise sets it off in one sequence
(drifts taken as independent, their tail as exponential, which is heavier than what was measured):

- one token at more than 8 floors: below 1e-15 per token (0.01 to the power of 8);
- more tokens above the floor than a binomial with p = 0.01 exceeds with probability 1e-4;
- a mean above half the floor over 16 tokens or more: below 1e-4 (noise at the floor has a mean of a fifth of it).

Where the floor comes from is `replay.floors`'s. Where the engine was calibrated, `replay.calibration` has the test instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from replay.calibration import EQUAL_NATS, FALSE_ALARM, Calibration
from replay.engines.base import Scored
from replay.floors import Floor
from replay.words import count

Verdict = Literal["identical", "numeric_drift", "sampling_differs", "model_differs", "inconclusive"]

FAR_FLOORS = 8.0
"""Floors beyond which one token tells."""
BEYOND_SHARE = 0.01
"""Share of tokens above the floor under noise, by the floor's definition."""
COUNT_ALARM = 1e-4
"""Chance per sequence that the count of tokens above the floor raises an alarm under noise."""
MEAN_FLOORS = 0.5
MEAN_TOKENS_MIN = 16
"""Below this many tokens the mean is one or two tokens' doing."""
TOP_FLOORS = 4.0
"""Floors by which a greedy token may lie under the best one: both may have moved, each to the measured maximum of 2 floors."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one sequence. Drifts are in nats over the `scored` tokens; `first_telling` is a position in the sequence."""

    verdict: Verdict
    reason: str
    tokens: int = 0
    scored: int = 0
    first_telling: int | None = None
    drift_mean: float | None = None
    drift_p99: float | None = None
    drift_max: float | None = None
    floor: Floor | None = None


def judge(
    recorded: Sequence[float | None],
    scored: Scored,
    *,
    floor: Floor,
    greedy: bool,
    calibration: Calibration | None = None,
    false_alarm: float = FALSE_ALARM,
) -> Judgement:
    """The verdict on one sequence: `recorded` logprobs against what the engine says now, entry by entry.

    `greedy` says that each token was to be the likeliest one, with nothing that bends the distribution. With a calibration
    the chance of a false *model differs* is `false_alarm`; without one it is that of this module's own tests.
    """
    tokens = len(recorded)
    places = [i for i in range(tokens) if recorded[i] is not None and i < len(scored.logprobs) and scored.logprobs[i] is not None]
    astray = _first_astray(scored, astray_nats(floor, calibration)) if greedy else None
    if not places:
        return _without_logprobs(tokens, scored, astray, greedy, floor)
    drift = drift_of([recorded[i] or 0.0 for i in places], [scored.logprobs[i] or 0.0 for i in places])
    beyond = np.flatnonzero(drift > floor.nats)
    figures = (
        f"drift mean {drift.mean():.2g}, max {drift.max():.2g} nats; {len(beyond)} of {len(drift)} tokens above the floor of {floor.nats:g}"
    )
    why: str | None
    first: int | None
    if calibration:
        expected = np.array([recorded[i] for i in places], np.float64)
        why, first, _ = calibration.test(expected, drift, false_alarm=false_alarm)
    else:
        why, first = _beyond_noise(drift, beyond, floor)
    if why:
        telling = places[first or 0]
        verdict, reason = "model_differs", f"{why}: {figures}"
    elif astray is not None:
        verdict, telling = "sampling_differs", astray
        reason = f"logprobs agree, but token {astray} was not the likeliest although the temperature was 0"
    elif drift.max() <= EQUAL_NATS:
        verdict, telling, reason = "identical", None, f"{count(len(drift), 'logprob')} equal"
    else:
        verdict, telling, reason = "numeric_drift", places[int(np.flatnonzero(drift > EQUAL_NATS)[0])], figures
    p99 = float(np.sort(drift)[math.ceil(0.99 * len(drift)) - 1])
    return Judgement(
        verdict,  # type: ignore[arg-type]  # one of the four literals above
        reason,
        tokens,
        len(places),
        telling,
        float(drift.mean()),
        p99,
        float(drift.max()),
        floor,
    )


def drift_of(recorded: Sequence[float], present: Sequence[float]) -> npt.NDArray[np.float64]:
    """Drift per token: equal infinities are no drift, one infinity is an infinite one."""
    a, b = (np.maximum(np.asarray(values, np.float64), -9999.0) for values in (recorded, present))
    drift: npt.NDArray[np.float64] = np.abs(a - b)
    drift[(a <= -9999.0) != (b <= -9999.0)] = math.inf
    return drift


def _beyond_noise(drift: npt.NDArray[np.float64], beyond: npt.NDArray[np.intp], floor: Floor) -> tuple[str | None, int]:
    """Which test says that noise cannot explain these drifts, in words, None if it can; and the first token that tells."""
    first = int(beyond[0]) if len(beyond) else int(drift.argmax())
    if float(drift.max()) > FAR_FLOORS * floor.nats:
        return f"a token is more than {FAR_FLOORS:g} floors off", first
    if len(beyond) > beyond_limit(len(drift)):
        return f"more than {count(beyond_limit(len(drift)), 'token')} above the floor, which noise would explain", first
    if len(drift) >= MEAN_TOKENS_MIN and float(drift.mean()) > MEAN_FLOORS * floor.nats:
        return "the mean is above half the floor", first
    return None, first


@lru_cache(maxsize=1024)
def beyond_limit(tokens: int) -> int:
    """The most tokens above the floor that noise explains: P(Binomial(tokens, 0.01) > limit) <= 1e-4."""
    tail, k = 1.0, 0
    log_p, log_q = math.log(BEYOND_SHARE), math.log1p(-BEYOND_SHARE)
    while k <= tokens:
        log_choose = math.lgamma(tokens + 1) - math.lgamma(k + 1) - math.lgamma(tokens - k + 1)
        tail -= math.exp(log_choose + k * log_p + (tokens - k) * log_q)
        if tail <= COUNT_ALARM:
            return k
        k += 1
    return tokens


def astray_nats(floor: Floor, calibration: Calibration | None) -> float:
    """By how much a greedy token may lie under the best one by noise and ties."""
    return calibration.far_nats if calibration else TOP_FLOORS * floor.nats


def _first_astray(scored: Scored, nats: float) -> int | None:
    """The first token that is not the likeliest by more than so many nats."""
    for i, (own, top) in enumerate(zip(scored.logprobs, scored.top_logprobs, strict=True)):
        if own is not None and top is not None and top - own > nats:
            return i
    return None


def _without_logprobs(tokens: int, scored: Scored, astray: int | None, greedy: bool, floor: Floor) -> Judgement:
    """What can be said of a recording without logprobs: of greedy tokens, whether they still are the likeliest."""
    known = sum(value is not None for value in scored.logprobs)
    if known == 0:
        reason = "the engine scored none of its tokens"
    elif not greedy:
        reason = "the recording has no logprobs"
    elif astray is None:
        reason = f"the recording has no logprobs; all {known} greedy tokens still are the likeliest"
    else:
        reason = f"the recording has no logprobs; greedy token {astray} no longer is the likeliest: model or sampling differs"
    return Judgement("inconclusive", reason, tokens, known, astray, floor=floor)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a whole: what differs outweighs what could not be told, which outweighs agreement."""
    order: tuple[Verdict, ...] = ("model_differs", "sampling_differs", "inconclusive", "numeric_drift", "identical")
    found = set(verdicts)
    return next((verdict for verdict in order if verdict in found), "inconclusive")
