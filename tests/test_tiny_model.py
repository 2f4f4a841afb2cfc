"""The tiny model in a real vLLM: what the engine tests and the demo rely on."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from tests.conftest import VllmService


def chat(vllm: VllmService, **options: Any) -> dict[str, Any]:
    """One chat completion with token ids and logprobs."""
    body = {
        "model": vllm.model,
        "messages": [{"role": "user", "content": "Why did it stop?"}],
        "max_tokens": 60,
        "logprobs": True,
        "return_token_ids": True,
        **options,
    }
    answer = httpx.post(f"{vllm.url}/v1/chat/completions", json=body, timeout=120)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def test_generations_are_varied_and_seeded(vllm: VllmService) -> None:
    """Two sequences differ, neither is one repeated word, and the same seed gives them again."""
    first, second = (chat(vllm, n=2, seed=7) for _ in range(2))
    sequences = [choice["token_ids"] for choice in first["choices"]]

    assert sequences == [choice["token_ids"] for choice in second["choices"]]
    assert sequences[0] != sequences[1]
    assert [len(set(sequence)) > 20 for sequence in sequences] == [True, True]


def test_probabilities_are_neither_flat_nor_certain(vllm: VllmService) -> None:
    """A sampled token has a logprob that tells something: well above that of a guess among 667, and below certainty."""
    tokens = chat(vllm, seed=3)["choices"][0]["logprobs"]["content"]

    assert -4.5 < statistics.mean(token["logprob"] for token in tokens) < -0.3


def test_recorded_tokens_can_be_scored(vllm: VllmService) -> None:
    """The engine gives a logprob for each token of a prompt made of ids, which is what compare replay stands on."""
    recorded = chat(vllm, seed=5)
    ids = recorded["prompt_token_ids"] + recorded["choices"][0]["token_ids"]
    body = {"model": vllm.model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
    answer = httpx.post(f"{vllm.url}/v1/completions", json=body, timeout=120).json()
    scored = [entry[str(token)]["logprob"] for entry, token in zip(answer["choices"][0]["prompt_logprobs"][1:], ids[1:], strict=True)]
    generated = [token["logprob"] for token in recorded["choices"][0]["logprobs"]["content"]]
    drift = [abs(then - now) for then, now in zip(generated, scored[-len(generated) :], strict=True)]

    assert statistics.median(drift) < 0.1


def test_model_is_made_on_the_spot(vllm: VllmService) -> None:
    """The served model has a tokenizer and a chat template of its own, and nothing was downloaded."""
    names = {path.name for path in Path(vllm.model_dir).iterdir()}

    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
