"""What an environment's items mean: three digests over them, and the differences between two captures. Pure.

semantic: what the model is (weights, tokenizer, template, dtype); another value may mean another answer.
numeric: what computes it (versions, hardware, kernels); another value may move logprobs a little.
scheduling: how work is packed (batch sizes, caches); it moves numbers only through the composition of batches.
What an engine draws anew each time it starts (ids, ports, times) is no item: the same engine started again is the same environment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Literal

import rfc8785

from schemas.events import Difference, EnvironmentCaptured, Pair

Class = Literal["semantic", "numeric", "scheduling"]

CLASSES: tuple[Class, ...] = ("semantic", "numeric", "scheduling")

PLACING = (
    "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HF_", "TRANSFORMERS_OFFLINE",
    "VLLM_CONFIGURE_LOGGING", "VLLM_CPU_KVCACHE_SPACE", "VLLM_DO_NOT_TRACK", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_ENGINE",
    "VLLM_EXECUTE_MODEL_TIMEOUT", "VLLM_LOGGING", "VLLM_NO_USAGE_STATS", "VLLM_PLUGINS", "VLLM_TRACE_FUNCTION", "VLLM_USE_MODELSCOPE",
)  # fmt: skip
"""Variables that say where work runs, how it is watched and where files come from, not what is computed."""

_PREFIXES: tuple[tuple[str, Class], ...] = (
    ("cache.cache_dtype", "semantic"),
    ("cache.calculate_kv_scales", "semantic"),
    ("cache.", "scheduling"),
    ("config.cache_config.cache_dtype", "semantic"),
    ("config.cache_config.calculate_kv_scales", "semantic"),
    ("config.cache_config.", "scheduling"),
    ("config.compilation_config.", "numeric"),
    ("config.device_config.", "numeric"),
    ("config.kv_events_config", "scheduling"),
    ("config.kv_transfer_config", "scheduling"),
    ("config.lora_config.", "semantic"),
    ("config.model_config.enforce_eager", "numeric"),
    ("config.model_config.seed", "numeric"),
    ("config.model_config.max_model_len", "scheduling"),
    ("config.model_config.original_max_model_len", "scheduling"),
    ("config.model_config.max_logprobs", "scheduling"),
    ("config.model_config.", "semantic"),
    ("config.scheduler_config.", "scheduling"),
    ("config.quant_config", "semantic"),
    ("config.", "numeric"),
    *((f"env.{name}", "scheduling") for name in PLACING),
    ("limits.", "scheduling"),
    ("lora.", "semantic"),
    ("model.", "semantic"),
    ("models", "semantic"),
    ("probe.logprobs", "numeric"),
    ("probe.", "semantic"),
    ("sampling.", "semantic"),
    ("system_fingerprint", "scheduling"),  # a compile-cache key: it also changes with max_num_seqs
    ("tokenizer", "semantic"),
    ("chat_template", "semantic"),
    ("weights", "semantic"),
)
"""The first prefix that fits decides; what none fits is numeric."""


NOT_ALWAYS_TOLD = frozenset({"sampling.defaults"})
"""Items that captures of one server may tell or not, as older ones never did: only where both tell can they differ."""

DRAWN = frozenset(
    (
        "config.instance_id", "config.kv_transfer_config.engine_id", "config.ec_transfer_config.engine_id",
        "config.parallel_config.data_parallel_master_port", "config.parallel_config._data_parallel_master_port_list",
        "config.parallel_config.placement_group", "config.compilation_config.compilation_time",
        "config.compilation_config.encoder_compilation_time", "vllm_env.VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME",
        "env.VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME",
    )
)  # fmt: skip
"""Items that differ between two starts of one engine. They stand on tapes of earlier versions, and count nowhere."""

_VARIABLES = "system_env.env_vars"
"""All of vLLM's variables as one text of lines; those drawn at each start are among them."""


def lasting(items: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The items that are the same each time the same engine starts."""
    return {key: _undrawn(value) if key == _VARIABLES else value for key, value in items if key not in DRAWN}


def _undrawn(value: str) -> str:
    text = json.loads(value)
    lines = text.splitlines(keepends=True) if isinstance(text, str) else []
    kept = [line for line in lines if f"env.{line.partition('=')[0]}" not in DRAWN]
    return json.dumps("".join(kept), ensure_ascii=False) if len(kept) < len(lines) else value


def classify(key: str) -> Class:
    """The digest that an item belongs to."""
    return next((kind for prefix, kind in _PREFIXES if key.startswith(prefix)), "numeric")


def capture(items: Iterable[tuple[str, str]], *, origin: str, unknown: Iterable[str] = ()) -> EnvironmentCaptured:
    """The event of these items: key to JSON text, in any order, keys unique."""
    pairs = [Pair(key=key, value=value) for key, value in sorted(lasting(items).items())]
    parts = {kind: digest([pair for pair in pairs if classify(pair.key) == kind]) for kind in CLASSES}
    return EnvironmentCaptured(environment_id=digest(pairs), origin=origin, items=pairs, unknown=sorted(unknown), **parts)


def digest(pairs: Iterable[Pair]) -> bytes:
    """SHA-256 over the RFC 8785 JSON of one object, key to JSON text."""
    return hashlib.sha256(rfc8785.dumps({pair.key: pair.value for pair in pairs})).digest()


def compare(recorded: EnvironmentCaptured, present: EnvironmentCaptured) -> list[Difference]:
    """What differs, ordered by key; an item that only one side could ask is a difference with None on the other.

    What differs between any two starts of an engine is no difference, also where an earlier version took it for an item. Between
    captures of different origins only what both tell can differ: the one tells more than the other by its nature. So it is with
    items that are not always told.
    """
    before, after = (lasting((pair.key, pair.value) for pair in side.items) for side in (recorded, present))
    for key in before.keys() ^ after.keys():
        if recorded.origin != present.origin or key in NOT_ALWAYS_TOLD:
            before.pop(key, None)
            after.pop(key, None)
    return [
        Difference(key=key, recorded=before.get(key), present=after.get(key), digest=classify(key))
        for key in sorted(before.keys() | after.keys())
        if _plain(before.get(key)) != _plain(after.get(key))
    ]


def _plain(value: str | None) -> str | None:
    """A value as every origin tells it: a dtype stands with its module in vLLM's own configuration, and without in an engine's facts."""
    return value and value.replace('"torch.', '"')
