"""The noise floor of drift: what 99 of 100 tokens stay under while weights are the same, by default and as measured.

A default is by dtype, and wide, because it must hold for any hardware. It hides small changes of a model. Where nothing
says that other kernels are at work than those that recorded, the engine of today measures itself: it says something
freely and then scores it, which is decode against prefill, the very difference that a replay meets. Twice the 99th percentile
of that is the floor, no lower than rounding of the dtype explains and no higher than the default.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from replay.engines.base import Engine, Refused, Request
from schemas.errors import EngineUnavailable
from schemas.events import Difference, EnvironmentCaptured

FLOORS: dict[tuple[str, str], float] = {
    ("float32", ""): 1e-4,  # vLLM 0.32 on CPU: p99 7.6e-6, max 1.8e-5 over 1152 tokens; other kernels sum in other orders
    ("float16", ""): 2e-2,  # not measured: three bits of mantissa more than bfloat16, an eighth of its floor
    ("bfloat16", "cpu"): 3e-2,  # vLLM 0.32 on CPU: p99 2.8e-2, max 5.2e-2 over 1152 tokens
    ("bfloat16", ""): 0.16,  # vLLM 0.32 on an H200: p99 0.15, max 0.26 over 65,536 tokens, decode against prefill
}
"""The 99th percentile of drift in nats that the same weights may show, by dtype and device ("" is any)."""
LOWEST = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""No measurement goes below: about one unit in the last place of a logit of 8 to 16, which other kernels may round otherwise."""
DTYPE_UNKNOWN = "bfloat16"
"""Taken where the environment does not tell: what nearly all models are served in, and the widest floor."""

MEASURED_TIMES = 2.0
"""Margin over the measured percentile: it is an estimate from one text and an otherwise idle engine."""
MEASURED_TOKENS_MIN = 32
MEASURE = {
    "messages": [{"role": "user", "content": "Describe an ordinary day at an airport, from the first flight to the last."}],
    "max_tokens": 64,
    "n": 2,
    "temperature": 1.0,
    "seed": 1,
}
"""What the engine is asked to say: sampled, so that likely and unlikely tokens are among it, and seeded, so that it is repeatable."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The noise floor in nats and where it comes from."""

    nats: float
    source: str
    dtype: str = DTYPE_UNKNOWN


def floor_of(environments: Iterable[EnvironmentCaptured | None]) -> Floor:
    """The widest default floor of the environments that took part."""
    floors = [_floor(environment) for environment in environments if environment is not None] or [_floor(None)]
    return max(floors, key=lambda floor: floor.nats)


def _floor(environment: EnvironmentCaptured | None) -> Floor:
    items = {pair.key: pair.value for pair in environment.items} if environment else {}
    dtype = _named(items, ("config.model_config.dtype", "dtype")).removeprefix("torch.")
    device = _named(items, ("config.device_config.device_type", "config.device_config.device", "engine.device", "device"))
    known = dtype if (dtype, "") in FLOORS else DTYPE_UNKNOWN
    nats = FLOORS.get((known, device), FLOORS[(known, "")])
    source = f"default for {dtype}" if dtype else f"default for {known}, as the environment tells no dtype"
    return Floor(nats, source + (f" on {device}" if (known, device) in FLOORS and device else ""), known)


def _named(items: dict[str, str], keys: Sequence[str]) -> str:
    for key in keys:
        try:
            value = json.loads(items.get(key, "null"))
        except ValueError:
            continue
        if isinstance(value, str):
            return value
    return ""


PRECISION = (
    "config.model_config.dtype",
    "config.model_config.quantization",
    "cache.cache_dtype",
    "config.cache_config.cache_dtype",
    "dtype",
)
"""What was changed on purpose and moves every logprob a little: noise as measured with the one says nothing of the other."""


def same_precision(differences: Iterable[Difference]) -> bool:
    """Whether weights, cache and sums are kept with the same number of bits as far as both sides tell."""
    return not any(difference.key in PRECISION for difference in differences)


def same_kernels(differences: Iterable[Difference]) -> bool:
    """Whether nothing that computes differs as far as both sides tell; a probe's scores differ with the weights, too."""
    return not any(difference.digest == "numeric" and not difference.key.startswith("probe.") for difference in differences)


def measured(engine: Engine, model: str | None, default: Floor) -> Floor:
    """The floor of this engine as it is now; the default where it cannot be measured."""
    try:
        drift = _decode_against_prefill(engine, model)
    except EngineUnavailable:
        return default  # the replay itself will meet the same outage and say so
    if len(drift) < MEASURED_TOKENS_MIN:
        return default
    p99 = sorted(drift)[math.ceil(0.99 * len(drift)) - 1]
    nats = min(max(MEASURED_TIMES * p99, LOWEST[default.dtype]), default.nats)
    return Floor(nats, f"measured on this engine now: p99 {p99:.2g} over {len(drift)} tokens", default.dtype)


def _decode_against_prefill(engine: Engine, model: str | None) -> list[float]:
    """Drift of what the engine says freely and then scores; empty where it does not tell enough."""
    request = Request(model, {**MEASURE})
    said = engine.generate(request)
    if isinstance(said, Refused) or not said.prompt_token_ids:
        return []
    drift: list[float] = []
    for sequence in said.sequences:
        if not sequence.token_ids or len(sequence.logprobs) != len(sequence.token_ids):
            continue
        scored = engine.force(request, said.prompt_token_ids, sequence.token_ids)
        if isinstance(scored, Refused):
            return []
        pairs = zip(sequence.logprobs, scored.logprobs, strict=True)
        drift += [abs(spoken - own) for spoken, own in pairs if own is not None and math.isfinite(spoken - own)]
    return drift
