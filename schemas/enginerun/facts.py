"""What an engine was built of: arguments that build it again, and facts of which a difference would move its numbers.

Reads vLLM's configuration objects by name and imports nothing of vLLM, so that recorder and replay read alike.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "model_config": (
        *("model", "tokenizer", "tokenizer_mode", "skip_tokenizer_init", "trust_remote_code", "dtype", "seed", "revision"),
        *("tokenizer_revision", "max_model_len", "quantization", "enforce_eager", "max_logprobs", "logprobs_mode"),
        *("disable_sliding_window", "disable_cascade_attn", "served_model_name"),
    ),
    "cache_config": (
        *("block_size", "gpu_memory_utilization", "enable_prefix_caching", "prefix_caching_hash_algo", "calculate_kv_scales"),
        "kv_cache_memory_bytes",
    ),
    "scheduler_config": (
        *("max_num_batched_tokens", "max_num_seqs", "max_num_active_seqs", "max_num_partial_prefills", "max_long_partial_prefills"),
        *("long_prefill_token_threshold", "enable_chunked_prefill", "async_scheduling", "disable_hybrid_kv_cache_manager"),
        *("scheduler_reserve_full_isl", "watermark", "stream_interval"),
    ),
    "parallel_config": (
        *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend"),
        "disable_custom_all_reduce",
    ),
    "load_config": ("load_format",),
}
"""Arguments of vLLM's engine that stand under the same name in a part of its configuration."""

RENAMED = {
    "scheduling_policy": ("scheduler_config", "policy"),
    "kv_cache_dtype": ("cache_config", "cache_dtype"),
    "num_gpu_blocks_override": ("cache_config", "num_gpu_blocks"),
}
"""Arguments that stand there under another name. The number of blocks was measured; a replay takes it as given."""

COMPILATION = ("mode", "cudagraph_mode", "cudagraph_capture_sizes", "max_cudagraph_capture_size")

VARIABLES = (
    *("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_ATTN_SPLIT_KV"),
    *("VLLM_BATCH_INVARIANT", "VLLM_ATTENTION_BACKEND", "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_USE_V2_MODEL_RUNNER"),
    *("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO"),
)
"""Variables of the environment that decide which kernels run and how they cut their work."""

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
"""Files of a model folder that hold weights."""

GRAMMAR = "structured output, whose grammar becomes ready by the clock"
"""Of what keeps a request from being repeated exactly the one that does not keep its tokens from being scored again."""

_CHUNK = 1 << 22


def arguments_of(config: Any) -> dict[str, Any]:
    """The arguments of an engine with this `VllmConfig`, as JSON types."""
    found = {name: getattr(getattr(config, part, None), name, None) for part, names in ARGUMENTS.items() for name in names}
    found |= {name: getattr(getattr(config, part, None), own, None) for name, (part, own) in RENAMED.items()}
    plain = {name: _plain(value) for name, value in found.items() if value is not None}
    plain["compilation_config"] = {
        name: _plain(value) for name in COMPILATION if (value := getattr(config.compilation_config, name, None)) is not None
    }
    return plain


def _plain(value: Any) -> Any:
    """A value of a configuration as JSON types."""
    if isinstance(value, enum.Enum):
        return value.value if isinstance(value.value, str | int) and not isinstance(value, _GRAPHS) else value.name
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value).removeprefix("torch.")  # a dtype


class _Graphs(type):
    def __instancecheck__(cls, value: object) -> bool:
        return type(value).__name__ == "CUDAGraphMode"


class _GRAPHS(metaclass=_Graphs):
    """vLLM's modes of CUDA graphs, whose values are pairs or numbers and whose names are what it reads."""


def facts_of(config: Any, *, version: str, workers: Any) -> dict[str, Any]:
    """Facts by the key under which they stand in `environment_captured`; `workers` is what `worker_facts` said in each."""
    arguments = arguments_of(config)
    scheduler, model = config.scheduler_config, config.model_config
    return {
        "version": version,
        "config.runner": "v2" if getattr(config, "use_v2_model_runner", False) else "v1",
        "config.device_config.device": str(getattr(config.device_config, "device_type", "")),
        "config.model_config.model": arguments["model"],
        "config.model_config.dtype": arguments["dtype"],
        "config.model_config.quantization": arguments.get("quantization"),
        "config.model_config.seed": model.seed,
        "config.model_config.enforce_eager": bool(model.enforce_eager),
        "config.compilation_config.graphs": arguments["compilation_config"],
        "config.parallel": {name: arguments.get(name) for name in ARGUMENTS["parallel_config"]},
        "config.cache_config.blocks": arguments.get("num_gpu_blocks_override"),
        "config.cache_config.block_size": arguments.get("block_size"),
        "config.cache_config.prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "config.cache_config.cache_dtype": arguments.get("kv_cache_dtype"),
        "config.scheduler_config.policy": str(scheduler.policy),
        **{f"config.scheduler_config.{name}": arguments.get(name) for name in ARGUMENTS["scheduler_config"]},
        "config.workers": workers,
        "config.variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def worker_facts(_worker: Any = None) -> dict[str, Any]:
    """What a worker runs on: asked in the worker itself, since only there the number of threads is the effective one."""
    import torch

    version = str(torch.__version__)
    if torch.cuda.is_available():  # threads of the host compute nothing there
        return {"torch": version, "device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return {"torch": version, "threads": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0))}


def unrepeatable(config: Any) -> Iterator[str]:
    """What of a configuration keeps a run from being replayed exactly, in words."""
    if getattr(config, "speculative_config", None) is not None:
        yield "speculative decoding"
    if getattr(config, "kv_transfer_config", None) is not None:
        yield f"the KV connector {config.kv_transfer_config.kv_connector}, whose loads become ready by the clock"
    if getattr(config, "ec_transfer_config", None) is not None:
        yield "an encoder-cache connector"
    if config.parallel_config.data_parallel_size > 1:
        yield "data parallelism, where the ranks wait for one another"
    if config.parallel_config.pipeline_parallel_size > 1:
        yield "pipeline parallelism"
    if getattr(config.model_config, "runner_type", "generate") != "generate":
        yield f"a model that does not generate ({config.model_config.runner_type})"


def weights_digest(folder: Path) -> str | None:
    """SHA-256 over names and bytes of a model's weights and its config.json; None where there is no such folder."""
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}) if folder.is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for path in [folder / "config.json", *files]:
        if path.exists():
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()


def items_of(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Facts as items of `environment_captured`: key and JSON text."""
    return [(key, json.dumps(value, sort_keys=True)) for key, value in facts.items()]
