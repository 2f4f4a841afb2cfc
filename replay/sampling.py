"""The choice of seeded tokens made again: from what an engine thinks of each place, with the noise that its runner draws.

A recorded token is *made again* if the draw gives it, or would after a favour as large as drift may have cost it. Where the
engine tells only the likeliest tokens, the recorded one has to win against those, which another seed or temperature would
not let it do either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from replay.engines.base import Alternatives, Scored
from replay.noise import Floats, Noise, Stream
from schemas.events import EnvironmentCaptured
from schemas.probe import DEFAULTS, item

GREEDY_BELOW = 1e-5
"""Temperatures that vLLM takes as 0."""
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
"""What a server may set for all requests that do not name it, and what makes it pass over the likeliest token."""
NOT_BENDING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_tokens"), (None, 0)),
    "repetition_penalty": (None, 1),
    "thinking_token_budget": (None, -1),
    **dict.fromkeys(("use_beam_search", "watermarking"), (None, False)),
    **dict.fromkeys(("logit_bias", "bad_words", "allowed_token_ids", "structured_outputs", "logits_processors"), (None, {}, [])),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), (None,)),
}
"""Parameters that change the distribution by what was said before or by rules that are not computed here, so that even greedy decoding
may take another token than the bare model's likeliest; and the values that do not."""
GRAMMARS = frozenset({"structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"})
"""Those of them by which a grammar says what may come next."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """How a sequence's tokens were to be drawn."""

    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float


def defaults_of(environment: EnvironmentCaptured | None) -> dict[str, Any] | None:
    """The sampling parameters of requests that name none, as a server sets them; None where its environment does not tell."""
    told = item(environment, DEFAULTS) if environment else None
    return told if isinstance(told, dict) else None


def effective(document: Mapping[str, Any], defaults: Mapping[str, Any] | None) -> dict[str, Any]:
    """A request with what the server put in for what it does not name."""
    return {**(defaults or {}), **{name: value for name, value in document.items() if value is not None}}


def bent_by(document: Mapping[str, Any]) -> str | None:
    """What of a request bends the distribution, None if nothing does."""
    if found := [name for name, plain in NOT_BENDING.items() if document.get(name) not in plain]:
        return found[0]
    form = document.get("response_format")
    formed = form is not None and not (isinstance(form, dict) and form.get("type") in (None, "text"))
    return "structured output" if formed or document.get("tool_choice") not in (None, "auto", "none") else None


def has_grammar(document: Mapping[str, Any] | None) -> bool:
    """Whether a grammar left tokens out. vLLM takes logprobs after that, of what was left, and before all else that bends."""
    plain = {name: value for name, value in (document or {}).items() if name not in NOT_BENDING or name in GRAMMARS}
    return bent_by(plain) is not None


def takes_processed(document: Mapping[str, Any] | None) -> bool:
    """Whether logprobs of the distribution that was drawn from are others than the model's own."""
    asked = document or {}
    masked = [
        name for name, plain in (("top_k", (None, 0, -1)), ("top_p", (None, 1)), ("min_p", (None, 0))) if asked.get(name) not in plain
    ]
    return bent_by(asked) is not None or (asked.get("temperature") not in (0, 1, None) or bool(masked and asked.get("temperature") != 0))


def is_greedy(document: Mapping[str, Any] | None) -> bool:
    """Whether each token was to be the bare model's likeliest: temperature 0 and nothing that bends the distribution."""
    if document is None or document.get("temperature") not in (0, 0.0) or isinstance(document.get("temperature"), bool):
        return False
    return bent_by(document) is None


def astray_beyond_penalties(prompt: Sequence[int], token_ids: Sequence[int], scored: Scored, nats: float) -> int | None:
    """The first token that was chosen over a likelier one by more than `nats`, where neither had occurred before.

    A penalty lowers or raises what has occurred, so that none, whatever a server sets, can have made that choice.
    """
    seen = set(prompt)
    for at, (token, own, place) in enumerate(zip(token_ids, scored.logprobs, scored.alternatives, strict=False)):
        if own is not None and place is not None:
            best = int(np.argmax(place.logprobs))
            if place.logprobs[best] - own > nats and not seen & {token, int(place.token_ids[best])}:
                return at
        seen.add(token)
    return None


def sampler_of(document: Mapping[str, Any] | None, seed: int | None, index: int) -> Sampler | str:
    """How sequence `index` of a request was to be drawn, or why that cannot be told; vLLM seeds each sequence by its index.

    `document` is the request as it took effect (`effective`).
    """
    if document is None:
        return "the request's parameters are not known"
    if bent := bent_by(document):
        return f"{bent} is not recomputed"
    if seed is None:
        return "the request had no seed"
    temperature, top_k, top_p, min_p = (
        value if (value := document.get(name)) is not None else plain
        for name, plain in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    )
    if temperature < GREEDY_BELOW:
        return "nothing is drawn at temperature 0"
    return Sampler(seed + index, max(float(temperature), 0.01), max(int(top_k), 0), float(top_p), float(min_p))


def made_again(
    token_ids: Sequence[int],
    places: Sequence[Alternatives | None],
    sampler: Sampler,
    noise: Noise,
    *,
    prompt_tokens: int,
    vocabulary: int,
    tolerance: float,
) -> list[bool | None] | str:
    """Per token whether the draw gives it again; None where the engine told nothing. A text says why none can be recomputed.

    `vocabulary` is 0 where it is not told, `tolerance` is in nats of the bare model's logprobs.
    """
    draw = noise.start(Stream(sampler.seed, prompt_tokens, vocabulary))
    if isinstance(draw, str):
        return draw
    if not places:
        return "the engine tells no alternatives"
    found: list[bool | None] = []
    for token, place in zip(token_ids, places, strict=True):
        if place is None:
            draw(np.zeros(1, np.float32), 0, 0.0)  # the step has to be drawn all the same
            found.append(None)
            continue
        masked = _masked(place, sampler)
        if masked is None:
            return "top_p needs the whole distribution, and the engine tells the likeliest tokens only"
        logits = np.full(int(place.token_ids.max()) + 1, -np.inf, np.float32)
        logits[place.token_ids] = masked
        found.append(draw(logits, token, 2 * tolerance / sampler.temperature) == token)
    return found


def _masked(place: Alternatives, sampler: Sampler) -> Floats | None:
    """Logits after temperature, top_k, top_p and min_p, as vLLM masks them."""
    logits = (place.logprobs / np.float32(sampler.temperature)).astype(np.float32)
    if sampler.min_p > 0:
        logits = np.where(logits < logits.max() + np.log(sampler.min_p), -np.inf, logits).astype(np.float32)
    inside = 0 < sampler.top_k <= len(logits)
    if inside:
        logits = np.where(logits < np.sort(logits)[-sampler.top_k], -np.inf, logits).astype(np.float32)
    if sampler.top_p < 1.0:
        if not (place.whole or inside):
            return None
        order = np.argsort(logits, kind="stable")
        shares = np.exp(logits[order] - logits.max())
        cut = np.cumsum(shares / shares.sum()) <= 1 - sampler.top_p
        cut[-1] = False
        logits[order[cut]] = -np.inf
    return logits
