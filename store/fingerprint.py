"""The environment of a vLLM engine in this process, from its own configuration and the files of its model.

It stands in `store` because capture and replay both need it and never import one another. Nothing here starts vLLM: a
caller hands over what its engine holds, and pays for reading the weights once per file (`store.digests`).
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from schemas.environment import capture
from schemas.events import EnvironmentCaptured
from schemas.probe import DEFAULTS, flat, is_secret, sampling_defaults
from schemas.requests import dump
from store.digests import FileDigests, combined

ORIGIN = "process"

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "*.tiktoken", "tekken.json",
)  # fmt: skip
CONFIGURATION = ("config.json", "generation_config.json", "preprocessor_config.json", "hf_quant_config.json", "quantize_config.json")

LIBRARIES = ("torch", "triton", "flashinfer-python", "transformers", "tokenizers", "xgrammar", "numpy")

VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF",
    "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE",
)  # fmt: skip
"""Variables that are recorded beside those of vLLM (VLLM_…) and NCCL (NCCL_…)."""
_PLACES = re.compile(r"(_PATH|_ROOT|_DIR|_IP|_HOST|_PORT|_FILE|_ID|_INTERFACE|_IDENT|_NAME)$")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}")

_NOT_RECORDED = frozenset(
    f"config.{name}"
    for name in (
        "instance_id", "additional_config",
        "model_config.model", "model_config.tokenizer", "model_config.served_model_name", "model_config.hf_config_path",
        "model_config.model_weights", "model_config.hf_config", "model_config.hf_text_config", "model_config.hf_image_processor_config",
        "model_config.generation_config", "model_config.allowed_local_media_path", "load_config.download_dir",
        "parallel_config.data_parallel_master_ip", "parallel_config.data_parallel_master_port", "parallel_config.data_parallel_rpc_port",
        "parallel_config.master_addr", "parallel_config.master_port", "parallel_config.placement_group",
        "parallel_config.ray_workers_use_nsight",
        "compilation_config.cache_dir", "compilation_config.local_cache_dir", "compilation_config.debug_dump_path",
        "compilation_config.compilation_time", "compilation_config.encoder_compilation_time", "compilation_config.enabled_custom_ops",
        "compilation_config.disabled_custom_ops", "compilation_config.traced_files", "compilation_config.static_forward_context",
    )
)  # fmt: skip
"""Places, names and what changes from run to run: two engines that would say the same must have the same digests."""
_WATCHING = ("config.profiler_config.", "config.observability_config.", "config.parallel_config._", "config.model_config._")
"""Sections that only say how the engine is watched, and private fields."""


def environment_of(config: Any, worker: Mapping[str, Any], digests: FileDigests, probes: Mapping[str, Any]) -> EnvironmentCaptured:
    """The environment of an engine with this `VllmConfig`.

    `worker` is what its worker says of itself (`worker_facts`); `probes` are items as `schemas.probe` asks for them, so that
    this environment can be compared with one that was asked for over HTTP.
    """
    items: dict[str, Any] = {"kind": "vllm", **probes}
    unknown: set[str] = set()
    for part in (_model(config, digests), _configuration(config), _libraries(), _hardware(), _variables()):
        items.update(part)
    items.update({f"engine.{name}": value for name, value in worker.items() if value is not None})
    unknown |= {name for name in ("weights.sha256", "tokenizer.sha256", "chat_template.sha256") if name not in items}
    pairs = [(key, dump(value, sort_keys=True).decode()) for key, value in items.items()]
    return capture(pairs, origin=ORIGIN, unknown=unknown)


def worker_facts(worker: Any) -> dict[str, Any]:
    """What only the worker knows: runner, attention backends, threads that compute. Runs in the worker (`collective_rpc`)."""
    import torch  # imported where it is used: this module is read where there is none

    runner = getattr(worker, "model_runner", None)
    groups = getattr(runner, "attn_groups", None) or []
    backends = sorted({group.backend.__name__ for each in groups for group in each})
    module = type(runner).__module__
    facts: dict[str, Any] = {
        "runner": "v2" if ".gpu.model_runner" in module else "v1",
        "runner_class": type(runner).__name__,
        "attention_backends": backends or None,
        "device": str(getattr(getattr(worker, "device", None), "type", "")) or None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "split_kv": _split_kv() if "CPU" in type(runner).__name__ else None,
    }
    return facts


def _split_kv() -> bool | None:
    """Whether attention on a CPU splits the keys and values over its threads, which changes the order of sums."""
    from vllm import envs

    try:
        return bool(envs.VLLM_CPU_ATTN_SPLIT_KV)
    except AttributeError:
        return None


def _model(config: Any, digests: FileDigests) -> Iterator[tuple[str, Any]]:
    """Contents of the model's files, where they lie on this machine."""
    model = config.model_config
    yield "model.vocabulary", model.get_vocab_size()
    yield DEFAULTS, sampling_defaults(model.get_diff_sampling_param())
    folder, tokenizer = Path(str(model.model)), Path(str(model.tokenizer))
    for name, place, patterns in (
        ("weights", folder, WEIGHTS),
        ("tokenizer", tokenizer, TOKENIZER),
        ("model", folder, CONFIGURATION),
    ):
        files = [path for pattern in patterns for path in place.glob(pattern)] if place.is_dir() else []
        if files:
            yield f"{name}.sha256", combined(digests.of(files))
    if lora := getattr(config, "lora_config", None):
        yield "lora.max_rank", getattr(lora, "max_lora_rank", None)


def _configuration(config: Any) -> Iterator[tuple[str, Any]]:
    """The whole of `VllmConfig` but places, names, secrets and what differs from run to run."""
    from pydantic import TypeAdapter  # only this function needs it

    document = TypeAdapter(type(config)).dump_python(config, mode="json", fallback=str, warnings=False)
    for key, value in flat("config", document, 2):
        if (
            key not in _NOT_RECORDED
            and not key.startswith(_WATCHING)
            and not _ADDRESS.search(text := dump(value).decode())
            and len(text) < 4096
        ):
            yield key, value


def _libraries() -> Iterator[tuple[str, Any]]:
    import torch
    import vllm

    yield "version", vllm.__version__
    commit = getattr(getattr(vllm, "_version", None), "__commit_id__", None)
    if commit:
        yield "library.vllm_commit", commit
    for name in LIBRARIES:
        try:
            yield f"library.{name}", version(name)
        except PackageNotFoundError:
            continue
    yield "library.cuda", torch.version.cuda
    yield "library.python", platform.python_version()


def _hardware() -> Iterator[tuple[str, Any]]:
    import torch

    yield "hardware.cpu", _cpu()
    yield "hardware.cores", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if torch.cuda.is_available():
        yield "hardware.gpus", [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield "hardware.driver", _driver()


def _cpu() -> str:
    """The processor's name, its architecture where none is told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str | None:
    """The version of NVIDIA's kernel driver."""
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None


def _variables() -> Iterator[tuple[str, Any]]:
    """Variables that steer vLLM and its libraries; no secrets, no places, no credentials inside an address."""
    for name, value in sorted(os.environ.items()):
        steers = name in VARIABLES or name.startswith(("VLLM_", "NCCL_"))
        if steers and not is_secret(name) and not _PLACES.search(name):
            yield f"env.{name}", _CREDENTIALS.sub("", value)
