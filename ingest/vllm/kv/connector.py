"""The recording KV connector: any connector that vLLM can load, with its calls timed and told.

    --kv-transfer-config '{"kv_connector": "ExampleConnector", "kv_role": "kv_both",
                           "kv_connector_module_path": "ingest.vllm.kv.connector"}'

The name is one that vLLM knows, or MODULE:CLASS for any other; with `TOKENTAPE_ENGINE__CAPTURE=on` the configuration stays as it was,
since the plugin puts the recording class in. It is a subclass, not a wrapper: what vLLM asks of a class (`SupportsHMA`, its class
methods, its name) holds as before, and methods that a version added or dropped are what they are. Nothing a connector raises is
held back, and nothing that recording does can raise.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ingest.vllm.kv import facts
from ingest.vllm.kv.outlet import Operation, outlet
from ingest.vllm.kv.profile import Profile
from schemas.enginerun import versions

STATE = "_tokentape"
"""The attribute of a connector that holds what is kept of it."""
NOTABLE_NS = 1_000_000
"""A call of each step that took so long, failed or moved a block stands for itself …"""
FOLD_NS = 1_000_000_000
"""… and others are counted together for so long."""
HANG_S = 10.0
"""A call that has not come back by then is told as hanging; `tokentape_hang_s` in the connector's extra configuration says otherwise."""
MEMORY_NS = 500_000_000
"""How often the memory of the process is looked up."""

_nested = threading.local()


def __getattr__(name: str) -> type:
    """The recording class of a connector that vLLM registers under `name`, or of MODULE:CLASS: how vLLM's factory asks for it."""
    if name.startswith("__"):
        raise AttributeError(name)
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    versions.check(vllm.__version__, operation="record a KV connector")
    module, _, own = name.rpartition(":")
    if module:
        return recording(getattr(importlib.import_module(module), own))
    if name not in KVConnectorFactory._registry:
        raise AttributeError(f"vLLM registers no KV connector {name!r}; name another as MODULE:CLASS")
    return recording(KVConnectorFactory.get_connector_class_by_name(name))


@cache
def recording(connector: type) -> type:
    """The recording subclass of a connector class, under the same name, which vLLM compares at places."""
    if hasattr(connector, "records_calls"):
        return connector
    own: dict[str, Any] = {"__module__": __name__, "__doc__": connector.__doc__, "records_calls": True}
    for name in dir(connector):
        found = inspect.getattr_static(connector, name)
        if not name.startswith("_") and inspect.isfunction(found) and not getattr(found, "__isabstractmethod__", False):
            own[name] = _told(name, found)
    own["__init__"] = _made(connector)
    return type(connector)(connector.__name__, (connector,), own)


def _made(connector: type) -> Callable[..., None]:
    initialise: Any = connector.__init__  # type: ignore[misc]  # a class that is not known has whatever constructor it has

    @functools.wraps(initialise)
    def __init__(self: Any, vllm_config: Any, role: Any, *rest: Any, **more: Any) -> None:
        calls = _Calls(
            f"{connector.__module__}:{connector.__qualname__}", vllm_config, role, rest[0] if rest else more.get("kv_cache_config")
        )
        self.__dict__[STATE] = calls
        calls.run("construct", initialise, (self, vllm_config, role, *rest), more)

    return __init__


def _told(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **more: Any) -> Any:
        if getattr(_nested, "within", False):
            return method(self, *args, **more)
        calls: _Calls = self.__dict__[STATE]
        return calls.run(name, method, (self, *args), more)

    return call


class _Calls:
    """What is kept of one connector: its running sums of a step, and calls that are counted together."""

    def __init__(self, name: str, config: Any, role: Any, kv_cache_config: Any) -> None:
        transfer = config.kv_transfer_config
        extra = transfer.kv_connector_extra_config
        self._base: Operation = {"role": role.name.lower(), "connector": name}
        self._hang_ns = int(float(extra.get("tokentape_hang_s", HANG_S)) * 1e9)
        self._sizes = facts.Sizes.of(config, kv_cache_config)
        self._sums: dict[str, Operation] = {}
        self._folded: dict[str, tuple[int, int, int]] = {}
        self._memory_ns = 0
        folder = extra.get("tokentape_profile")
        self._profile = Profile(Path(folder), role.name.lower()) if folder else None
        outlet.opened(("kv_header", str(transfer.engine_id)), self.flush, self._profile)

    def run(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        """Call a method and tell of it; what it raises passes."""
        if name in facts.AT_WORK:
            outlet.working()
        said = facts.asked(name, args[1:], more)
        _nested.within = True
        begun_ns = time.monotonic_ns()
        ticket = outlet.begin(self._base | said | {"operation": facts.OPERATIONS.get(name, name)}, self._hang_ns)
        try:
            answer = method(*args, **more) if self._profile is None else self._profile.call(method, args, more)
        except BaseException as error:
            outlet.working()
            took = {
                "outcome": "error",
                "duration_us": (time.monotonic_ns() - begun_ns) // 1000,
                "error": f"{type(error).__name__}: {error}",
            }
            self._tell(name, said | took)
            outlet.flush()  # vLLM may end the process for it
            raise
        finally:
            outlet.end(ticket)
            _nested.within = False
        self._done(name, said, answer, args[1:], time.monotonic_ns() - begun_ns)
        return answer

    def _done(self, name: str, said: Operation, answer: Any, args: tuple[Any, ...], took_ns: int) -> None:
        found = said | facts.answered(name, answer, args, self._sizes) | {"duration_us": took_ns // 1000}
        if name in facts.SUMMED:
            self._sum(name, found, took_ns)
        elif name in facts.ALWAYS or took_ns >= NOTABLE_NS or found.pop("notable", False):
            self._tell(name, found)
        elif name in facts.OPERATIONS:
            self._fold(facts.OPERATIONS[name], took_ns)

    def _sum(self, name: str, found: Operation, took_ns: int) -> None:
        """Layers of a step are one load and one save, told when the step's last call of a connector has been made."""
        operation = facts.OPERATIONS[name]
        total = self._sums.setdefault(operation, {"duration_ns": 0, "bytes": 0, "tokens_asked": 0})
        total["duration_ns"] += took_ns
        total["bytes"] += found.get("bytes") or 0
        total["tokens_asked"] = max(total["tokens_asked"], found.get("tokens_asked") or 0)
        if name == "wait_for_save":
            sums, self._sums = self._sums, {}
            for kind, step in sums.items():
                if step["duration_ns"] >= NOTABLE_NS or step["tokens_asked"] >= self._sizes.block_tokens:
                    moved = {"bytes": step["bytes"] or None, "tokens_asked": step["tokens_asked"] or None}
                    self._tell(kind, moved | {"duration_us": step["duration_ns"] // 1000})
                else:
                    self._fold(kind, step["duration_ns"])

    def _tell(self, name: str, found: Operation) -> None:
        found.pop("notable", None)
        now = time.monotonic_ns()
        if now - self._memory_ns > MEMORY_NS:
            self._memory_ns, found["memory_bytes"] = now, facts.memory_bytes(Path("/proc/self/statm"))
        outlet.put(self._base | {"operation": facts.OPERATIONS.get(name, name), "outcome": "ok"} | found)

    def _fold(self, operation: str, took_ns: int) -> None:
        since, calls, total = self._folded.get(operation, (time.monotonic_ns(), 0, 0))
        self._folded[operation] = (since, calls + 1, total + took_ns)
        if time.monotonic_ns() - since > FOLD_NS:
            self._unfold(operation)

    def _unfold(self, operation: str) -> None:
        _, calls, total = self._folded.pop(operation)
        self._tell(operation, {"calls": calls, "duration_us": total // 1000})

    def flush(self) -> None:
        """Tell of what was only counted."""
        for operation in list(self._folded):
            self._unfold(operation)
