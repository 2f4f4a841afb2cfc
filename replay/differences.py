"""What differs between two environments, in words: what changed, from what to what, and what that may mean for an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from replay.words import count, shorten
from schemas.environment import CLASSES, Class
from schemas.events import Difference, EnvironmentCaptured

MEANING: dict[Class, str] = {
    "semantic": "what the model is: it may answer differently",
    "numeric": "what computes it: logprobs may move a little",
    "scheduling": "how work is packed: numbers move only with the composition of batches",
}

NAMES: tuple[tuple[str, str], ...] = (
    ("weights.sha256", "the weights"),
    ("tokenizer.sha256", "the tokenizer's files"),
    ("tokenizer_info.sha256", "the tokenizer's configuration"),
    ("chat_template.sha256", "the chat template"),
    ("model.sha256", "the model's configuration files"),
    ("model.vocabulary", "the size of the vocabulary"),
    ("lora.", "adapters (LoRA): "),
    ("config.lora_config.", "adapters (LoRA): "),
    ("config.model_config.dtype", "the dtype"),
    ("config.model_config.quantization", "the quantisation"),
    ("config.model_config.seed", "the engine's own seed"),
    ("config.model_config.enforce_eager", "whether compiled graphs are left out"),
    ("config.cache_config.cache_dtype", "the dtype of the KV cache"),
    ("cache.cache_dtype", "the dtype of the KV cache"),
    ("config.cache_config.", "cache: "),
    ("cache.", "cache: "),
    ("config.scheduler_config.", "scheduler: "),
    ("config.parallel_config.", "parallelism: "),
    ("config.compilation_config.", "compilation: "),
    ("config.model_config.", "model: "),
    ("config.", "configuration: "),
    ("limits.max_model_len", "how long a text it takes"),
    ("models", "which models are served"),
    ("probe.tokenizer", "the token ids of a fixed text"),
    ("probe.chat_template", "the token ids of a fixed conversation"),
    ("probe.choices", "the model's own choices in a fixed text"),
    ("probe.logprobs", "the logprobs of a fixed text"),
    ("sampling.defaults", "sampling parameters of requests that name none"),
    ("version", "the version of vLLM"),
    ("library.", "library "),
    ("hardware.", "hardware: "),
    ("engine.threads", "how many threads compute"),
    ("engine.split_kv", "whether attention splits the cache over threads"),
    ("engine.runner", "the model runner"),
    ("engine.attention_backends", "the attention backend"),
    ("engine.", "engine: "),
    ("env.CUDA_VISIBLE_DEVICES", "which devices are visible (CUDA_VISIBLE_DEVICES)"),
    ("env.VLLM_LOGGING_LEVEL", "the log level (VLLM_LOGGING_LEVEL)"),
    ("env.CUDA_LAUNCH_BLOCKING", "whether CUDA launches block (CUDA_LAUNCH_BLOCKING)"),
    ("env.HF_ENDPOINT", "the model mirror (HF_ENDPOINT)"),
    ("env.", "variable "),
    ("vllm_env.", "variable "),
    ("system_env.", "system: "),
)
"""The first beginning that fits names an item; one that ends in a space or colon is followed by the rest of the key."""

OPAQUE = ("sha256", "probe.")
"""Items whose values are digests or long lists: that they differ is all that a person can read in them."""


def name_of(key: str) -> str:
    """What a person calls an item."""
    for beginning, words in NAMES:
        if key.startswith(beginning):
            return words + key.removeprefix(beginning).replace("_", " ") if words.endswith(" ") else words
    return key


def sentence(difference: Difference) -> str:
    """One difference in words."""
    name, before, after = name_of(difference.key), difference.recorded, difference.present
    if before is None or after is None:
        side, value = ("second", after) if before is None else ("first", before)
        return f"{name}: only the {side} tells it" + ("" if _opaque(difference.key) else f" ({_value(value)})")
    if _opaque(difference.key):
        return f"{name} differ" + ("s" if name.split()[-1] in ("template", "tokenizer", "configuration", "text") else "")
    return f"{name}: {_value(before)} → {_value(after)}"


def report(recorded: EnvironmentCaptured, present: EnvironmentCaptured, differences: Iterable[Difference]) -> Iterator[str]:
    """The lines of a comparison: class by class, then what could not be compared."""
    found = list(differences)
    if not found:
        yield "no difference" if recorded.origin == present.origin else "no difference in what both tell"
    for kind in CLASSES:
        those = [difference for difference in found if difference.digest == kind]
        if those:
            yield f"{count(len(those), 'difference')} in {MEANING[kind]}"
            yield from (f"  {sentence(difference)}" for difference in those)
    if recorded.origin != present.origin:
        yield f"captured in two ways ({recorded.origin}, {present.origin}): compared is only what both tell"
    for which, environment in (("first", recorded), ("second", present)):
        if environment.unknown:
            yield f"not told by the {which}: {', '.join(environment.unknown)}"


def _opaque(key: str) -> bool:
    return key.endswith(OPAQUE[0]) or key.startswith(OPAQUE[1])


def _value(text: str | None) -> str:
    try:
        value = json.loads(text or "null")
    except ValueError:
        value = text
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shorten(plain.removeprefix("torch."), 80) or "nothing"
