"""What the draws of a sequence's tokens, made again, add to the judgement on its logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from replay.calibration import Calibration
from replay.drift import Judgement
from replay.engines.base import Scored
from replay.noise import named, unknown
from replay.sampling import Sampler, made_again
from schemas.probe import item


def judged_by_draws(
    judgement: Judgement,
    sampler: Sampler | str,
    prompt_tokens: int,
    token_ids: Sequence[int],
    scored: Scored,
    calibration: Calibration | str,
    false_alarm: float,
) -> Judgement:
    """The judgement after the seeded choices were made again, or with why they could not be: `calibration` and `sampler` say it too."""
    if isinstance(calibration, str):
        return _undrawn(judgement, calibration)
    noise = named(calibration.noise)
    if noise is None:
        return _undrawn(judgement, unknown(calibration.environment))
    if isinstance(sampler, str):
        return _undrawn(judgement, sampler)
    vocabulary = item(calibration.environment, "model.vocabulary") or 0
    made = made_again(
        token_ids, scored.alternatives, sampler, noise,
        prompt_tokens=prompt_tokens, vocabulary=vocabulary, tolerance=calibration.noise_tolerance,
    )  # fmt: skip
    if isinstance(made, str):
        return _undrawn(judgement, made)
    told = [one for one in made if one is not None]
    misses, limit = told.count(False), calibration.limit_of_misses(len(told), false_alarm)
    if misses <= limit:
        return replace(judgement, reason=f"{judgement.reason}; {len(told) - misses} of {len(told)} seeded choices made again")
    drawn = f"seed {sampler.seed} and temperature {sampler.temperature:g}"
    reason = f"logprobs agree, but {misses} of {len(told)} tokens are not what {drawn} draw; noise would explain {limit}"
    return replace(judgement, verdict="sampling_differs", reason=reason, first_telling=made.index(False))


def _undrawn(judgement: Judgement, why: str) -> Judgement:
    return replace(judgement, reason=f"{judgement.reason}; the choice of sampled tokens is not recomputed: {why}")
