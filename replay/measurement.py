"""Measures the drift of an engine against itself, and whether a known noise function makes its seeded tokens again.

The engine says something freely, alone and in a batch, and is then made to say it again: alone, in another batch and
order. Where nothing else changed, what differs is noise, by the very causes that a replay meets.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from replay.calibration import Calibration, Measured, calibrated
from replay.engines.base import Engine, Forced, Generated, Refused, Request, Scored, Spoken
from replay.floors import floor_of
from replay.noise import Noise, possible
from replay.sampling import defaults_of, effective, made_again, sampler_of
from schemas import clock
from schemas.errors import UsageError
from schemas.probe import item

SEQUENCES, TOKENS = 32, 128
"""What is said by default: about 4,000 tokens, each scored twice."""
ALONE = 16
"""Sequences said one at a time: each costs as many steps as a whole batch."""
ALTERNATIVES = 32
"""Likeliest tokens that a draw is made among: another seed or temperature rarely favours a token that is not among them."""
ALTERNATIVES_TOP_P = 1024
"""For top_p the mass of all matters: with so many a small vocabulary is whole."""
NOISE_MISSES_MAX = 0.05
"""A noise function that makes fewer of the tokens again than 95 % is not the one at work."""
TOLERANCE_DRIFTS = 2.0
"""Times the largest drift measured that a choice may be off."""
TOLERANCE_NATS = 1e-6

PROMPTS = (
    "Describe an ordinary day at an airport, from the first flight to the last.",
    "Write a function that sorts a list of numbers, and explain each line of it.",
    "Nenne drei Städte am Rhein und erzähle, was man dort sehen kann.",
    "What is 17 times 23? Show every step.",
    "Summarise: the engine schedules every sequence of a batch for one step at a time.",
    "Tell me a story about a lighthouse keeper who counts the ships, until one night he counts one too many. " * 8,
)
"""Prose, code, another language, numbers, and a prompt longer than a block of the cache: likely and unlikely tokens come up."""

Say = Callable[[str], None]


def measure(
    engine: Engine, model: str | None, *, sequences: int = SEQUENCES, tokens: int = TOKENS, say: Say = lambda _: None
) -> Calibration:
    """The calibration of an engine as it is now.

    Raises:
        UsageError: it cannot score its own tokens, or does not tell their ids and logprobs.
        EngineUnavailable: it does not answer.
    """
    environment = engine.fingerprint()
    if environment is None:
        raise UsageError("the environment of this engine cannot be asked, so nothing would find its calibration", operation="calibrate")
    alternatives = alternatives_for(defaults_of(environment) or {})
    requests = [_request(model, number, tokens, alternatives) for number in range(sequences)]
    say(f"{sequences} sequences of {tokens} tokens, in batches")
    together = _said(requests, engine.generate_all(requests))
    say(f"{ALONE} sequences alone")
    alone = _said(requests[:ALONE], [engine.generate(request) for request in requests[:ALONE]])
    say("scoring what was said, alone and in batches of another order")
    measured, scored = _measured(engine, together, alone)
    dtype = floor_of([environment]).dtype
    found = calibrated(environment, engine.name, measured, dtype=dtype, made_at=clock.now())
    say("making the seeded choices again")
    return _with_noise(found, together, scored, possible(environment))


def alternatives_for(document: Mapping[str, Any]) -> int:
    """How many of the likeliest tokens are needed to make the choices of a request again."""
    return ALTERNATIVES_TOP_P if document.get("top_p") not in (None, 1, 1.0) else ALTERNATIVES


def _request(model: str | None, number: int, tokens: int, alternatives: int) -> Request:
    """Three of four are sampled, and every other one of those leaves the temperature to the engine, whose default then shows."""
    document = {"messages": [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}], "max_tokens": tokens}
    if number % 4 == 3:
        return Request(model, {**document, "temperature": 0})
    temperature = {} if number % 2 else {"temperature": 1.0}
    return Request(model, {**document, **temperature, "seed": 1000 + number}, alternatives=alternatives)


class _Said:
    """One sequence that the engine said, and the request that it answered."""

    def __init__(self, request: Request, prompt: tuple[int, ...], spoken: Spoken) -> None:
        self.request, self.spoken = request, spoken
        self.forced = Forced(request, prompt, spoken.token_ids)


def _said(requests: Sequence[Request], answers: Sequence[Generated | Refused]) -> list[_Said]:
    found = []
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, Refused):
            raise UsageError(f"the engine cannot be calibrated: {answer.reason}", operation="calibrate")
        for spoken in answer.sequences:
            if not answer.prompt_token_ids or not spoken.token_ids or len(spoken.logprobs) != len(spoken.token_ids):
                raise UsageError(
                    "the engine cannot be calibrated: it tells no token ids and logprobs",
                    operation="calibrate",
                    hint="only vLLM tells them",
                )
            found.append(_Said(request, answer.prompt_token_ids, spoken))
    return found


def _measured(engine: Engine, together: Sequence[_Said], alone: Sequence[_Said]) -> tuple[list[Measured], list[Scored]]:
    """The drifts of every condition, and the scores of the batch in its own order."""
    order = list(range(len(together)))
    random.Random(0).shuffle(order)
    shuffled = _scores(engine.force_all([together[i].forced for i in order]))
    batched = [shuffled[order.index(i)] for i in range(len(order))]
    singly = _scores([engine.force(s.forced.request, s.forced.prompt_token_ids, s.forced.token_ids) for s in together])
    after = _scores(engine.force_all([each.forced for each in alone]))
    how = batched[0].how
    measured = [
        *_against(f"decoding in a batch, {how} alone", [s.spoken.logprobs for s in together], singly),
        *_against(f"decoding in a batch, {how} in another batch", [s.spoken.logprobs for s in together], batched),
        *_against(f"decoding alone, {how} in a batch", [s.spoken.logprobs for s in alone], after),
        *_against(f"{how} alone, {how} in a batch", [s.logprobs for s in singly], batched),
    ]
    return measured, batched


def _scores(answers: Sequence[Scored | Refused]) -> list[Scored]:
    refused = next((answer for answer in answers if isinstance(answer, Refused)), None)
    if refused:
        raise UsageError(f"the engine cannot be calibrated: {refused.reason}", operation="calibrate", hint="only vLLM scores tokens")
    return [answer for answer in answers if isinstance(answer, Scored)]


def _against(name: str, before: Sequence[Sequence[float | None]], after: Sequence[Scored]) -> Iterator[Measured]:
    for recorded, scored in zip(before, after, strict=True):
        pairs = [(a, b) for a, b in zip(recorded, scored.logprobs, strict=True) if a is not None and b is not None and math.isfinite(a - b)]
        if pairs:
            values = np.array(pairs)
            yield Measured(name, values[:, 0], np.abs(values[:, 0] - values[:, 1]))


def _with_noise(found: Calibration, said: Sequence[_Said], scored: Sequence[Scored], noises: Sequence[Noise]) -> Calibration:
    """The calibration with the first noise function that makes the seeded tokens again."""
    tolerance = max(TOLERANCE_DRIFTS * max(condition.p99 for condition in found.conditions), TOLERANCE_NATS)
    vocabulary, defaults = item(found.environment, "model.vocabulary") or 0, defaults_of(found.environment)
    for noise in noises:
        again: list[bool] = []
        for each, scores in zip(said, scored, strict=True):
            document = effective(each.request.document, defaults)
            sampler = sampler_of(document, document.get("seed"), each.spoken.index)
            if isinstance(sampler, str):
                continue
            prompt_tokens = len(each.forced.prompt_token_ids)
            made = made_again(
                each.spoken.token_ids, scores.alternatives, sampler, noise,
                prompt_tokens=prompt_tokens, vocabulary=vocabulary, tolerance=tolerance,
            )  # fmt: skip
            again += [] if isinstance(made, str) else [one for one in made if one is not None]
        if again and again.count(False) <= NOISE_MISSES_MAX * len(again):
            counts = {"noise_misses": again.count(False), "noise_tokens": len(again)}
            return found.model_copy(update={"noise": noise.name, "noise_tolerance": tolerance, **counts})
    return found
