"""What servers answer over HTTP, read into the engines' own terms."""

from __future__ import annotations

from typing import Any

import numpy as np

from replay.engines.base import Alternatives, Generated, Refused, Scored, Spoken

NOT_SCORING = "it answers, but without prompt_logprobs: recorded tokens are scored by vLLM's /v1/completions only"
NO_IDS = "it tells no token ids: tokens are forced and told by vLLM only"
MINUS_INFINITY = -9999.0
"""What vLLM writes into JSON where a logprob is -inf."""


def scored(value: Any, ids: list[int], start: int, *, alternatives: bool = False) -> Scored | Refused:
    """The scores of `ids[start:]` out of a completion's `prompt_logprobs`."""
    try:
        entries = value["choices"][0].get("prompt_logprobs") or value.get("prompt_logprobs")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Refused("its answer is no completion")
    if not isinstance(entries, list):
        return Refused(NOT_SCORING)
    if len(entries) != len(ids):
        return Refused(f"it scored {len(entries)} tokens of {len(ids)}")
    logprobs: list[float | None] = []
    ranks: list[int | None] = []
    tops: list[float | None] = []
    for token_id, entry in zip(ids[start:], entries[start:], strict=True):
        own = entry.get(str(token_id)) if isinstance(entry, dict) else None
        logprobs.append(_number(own.get("logprob")) if own else None)
        ranks.append(own.get("rank") if own else None)
        tops.append(max((_number(other["logprob"]) for other in entry.values()), default=None) if own else None)
    others = tuple(_alternatives(entry) for entry in entries[start:]) if alternatives else ()
    return Scored(tuple(logprobs), tuple(ranks), tuple(tops), others)


def _alternatives(entry: Any) -> Alternatives | None:
    if not isinstance(entry, dict):
        return None
    logprobs = [_number(other["logprob"]) for other in entry.values()]
    return Alternatives(np.array([int(token) for token in entry], np.int64), np.array(logprobs, np.float32), whole=False)


def _number(value: Any) -> float:
    number = float(value)
    return float("-inf") if number <= MINUS_INFINITY else number


def generated(value: Any) -> Generated | None:
    """The sequences of a chat completion; None if it is none."""
    try:
        spoken = [_spoken(choice) for choice in value["choices"]]
        return Generated(tuple(spoken), tuple(value.get("prompt_token_ids") or ()))
    except (KeyError, TypeError, AttributeError):
        return None


def _spoken(choice: dict[str, Any]) -> Spoken:
    entries = (choice.get("logprobs") or {}).get("content") or []
    logprobs = tuple(_number(entry["logprob"]) for entry in entries)
    text = choice["message"].get("content") or ""
    return Spoken(choice.get("index", 0), text, tuple(choice.get("token_ids") or ()), logprobs, choice.get("finish_reason"))


def completed(value: Any, prompt: list[int]) -> Generated | Refused:
    """The sequences of a completion of these ids; refused where the server tells no ids, or took other ids for the prompt."""
    try:
        choices = [_completed(choice) for choice in value["choices"]]
        taken = value["choices"][0].get("prompt_token_ids") or value.get("prompt_token_ids") or prompt
    except (KeyError, IndexError, TypeError, AttributeError):
        return Refused("its answer is no completion")
    if not all(spoken.token_ids for spoken in choices):
        return Refused(NO_IDS)
    if list(taken) != prompt:
        return Refused("it took other token ids for the prompt than it was sent")
    return Generated(tuple(choices), tuple(prompt))


def _completed(choice: dict[str, Any]) -> Spoken:
    told = choice.get("logprobs") or {}
    logprobs = tuple(_number(value) for value in told.get("token_logprobs") or ())
    text, pieces, ids = choice.get("text") or "", tuple(told.get("tokens") or ()), tuple(choice.get("token_ids") or ())
    spelled = len(pieces) == len(ids) and "".join(pieces) == text
    return Spoken(choice.get("index", 0), text, ids, logprobs, choice.get("finish_reason"), pieces if spelled else ())
