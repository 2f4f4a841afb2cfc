"""A KV connector driven by hand, without an engine: found, built, looked up, a small tensor saved, loaded elsewhere and compared.

    python -m ingest.vllm.kv.by_hand CONFIG_JSON DTYPE DEVICE SECONDS [PROFILE]

Prints one JSON line when a stage begins and one when it ends, so that whoever started it knows where it hangs. The probe's tokens are
random: the first look-up has to be a miss, and what is saved is of no use to anybody.
"""

from __future__ import annotations

import cProfile
import inspect
import os
import pickle
import pstats
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BLOCK, BLOCKS, LAYERS, HEADS, HEAD_SIZE = 16, 3, 2, 2, 8
"""The tensor: so many blocks of so many tokens, of a model with two small layers."""
MORE = 3
"""Tokens of a last block that is not whole: connectors save and look up whole blocks only."""
WRITTEN, READ = range(1, BLOCKS + 2), range(BLOCKS + 2, 2 * BLOCKS + 3)
"""Blocks that the first request has, and those of the second; block 0 is nobody's."""
APART = ("0.24.", "0.25.")
"""Versions of vLLM whose GPUs keep keys and values apart."""
ROUNDS = 20
"""How often all is done again for a profile, each time with other tokens."""
POLL_S = 0.02
"""Between two questions whether an asynchronous transfer has ended."""

Say = Callable[[str, str, str, str], None]
"""Told (check, state, detail, cure) when a stage begins (state `begun`) and when it has ended."""

CURES = {
    "configuration": "kv_connector names a connector, kv_role is kv_producer, kv_consumer or kv_both",
    "module": "check kv_connector_module_path and PYTHONPATH: each process of the engine has to be able to import it",
    "class": "derive from KVConnectorBase_V1, implement its abstract methods and take (vllm_config, role, kv_cache_config)",
    "path": "create the folder, and let the user of the engine write there; every worker has to see the same one",
    "store": "start the store, or correct its address; a firewall between engine and store looks the same",
    "device": "kv_buffer_device and the connector's tensors have to be on a device that is here",
    "dtype": "let the connector keep the dtype of the cache, or cast on load",
    "time-out": "look at the store's log and at its own time-outs; a connector that waits holds the engine up",
    "metadata": "what build_connector_meta returns goes to other processes: keep it picklable",
    "lookup": "get_num_new_matched_tokens must tell whole blocks that are there, and 0 for what was never saved",
    "compare": "what was loaded is not what was saved: look at slot mapping and layout",
    "connector": "the connector's own fault, where the named line raised it",
    "set-up": "doctor builds neither a model nor tensors of an engine: start vLLM with it, and `tokentape kv` tells its calls",
}
"""What to do, by the name of what is wrong."""

_NOT_BUILT = re.compile(r"model_config|hf_config|hf_text_config|kv_cache_tensors")
"""What a line reads that fails for want of it: an engine has it and this drive has not."""

_DTYPE = re.compile(r"dtype|Half|BFloat16|scalar type", re.IGNORECASE)
_DEVICE = re.compile(r"\bdevice\b|CUDA|cuda|NVIDIA")


class Wrong(Exception):
    """A stage found a fault: `check` is a key of CURES."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(detail)
        self.check = check


def kind_of(error: BaseException) -> str:
    """Which part is at fault, by what was raised: a key of CURES."""
    text = f"{error}"
    if isinstance(error, Wrong):
        return error.check
    if (raised := _raised(error)) and _NOT_BUILT.search(raised.line or ""):
        return "set-up"
    if isinstance(error, ImportError):
        return "module"
    if isinstance(error, TimeoutError):
        return "time-out"
    if isinstance(error, ConnectionError) or re.search(r"connect|refused|unreachable|resolve", text, re.IGNORECASE):
        return "store"
    if isinstance(error, OSError):
        return "path"
    if _DTYPE.search(text):
        return "dtype"
    if _DEVICE.search(text):
        return "device"
    return "class" if isinstance(error, TypeError) and re.search(r"abstract|__init__|argument", text) else "connector"


def _raised(error: BaseException) -> traceback.FrameSummary | None:
    """The line that raised it, None where that is one of this module's."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1] if frames and frames[-1].filename != __file__ else None


def _told(error: BaseException, stage: str, fault: str) -> str:
    """An error in one line: what it says, or the line that says it where it is silent, where it was raised and in which stage."""
    if isinstance(error, Wrong):
        return f"{error} (while: {stage})" if fault != stage else str(error)
    raised = _raised(error)
    said = str(error) or (raised.line if raised else None) or "without a word"
    where = [f"at {raised.filename}:{raised.lineno}"] if raised else []
    return f"{type(error).__name__}: {said} ({', '.join([*where, f'while: {stage}'])})"


def examine(
    transfer: dict[str, Any], say: Say, *, dtype: str = "bfloat16", device: str = "cpu", seconds: float = 10.0, profile: Path | None = None
) -> bool:
    """Drive the connector of a `kv_transfer_config` through all stages; False when one of them failed, which ends it.

    With `profile` it is driven through them `ROUNDS` times more, and what Python's profiler counts of the calls goes to that file.
    """
    try:
        with _stage(say, "module", "configuration and class"):
            config = _config(transfer, device)
            connector = _class_of(config.kv_transfer_config)
        with _stage(say, "class", f"{connector.__module__}:{connector.__qualname__}, vLLM {_version()}"):
            _suits(connector)
        with _stage(say, "built", "scheduler's and worker's side"):
            drive = _Drive(config, connector, dtype, device, seconds)
        with _stage(say, "lookup", f"{BLOCK * BLOCKS} tokens that nobody saved are not found"):
            drive.misses()
        with _stage(say, "save", f"{LAYERS} layers of {BLOCKS} blocks, {dtype} on {device}"):
            drive.save()
        with _stage(say, "load", "looked up again, found and loaded into other blocks"):
            matched = drive.load()
        with _stage(say, "compare", f"{matched} tokens are bit for bit what was saved"):
            drive.compare(matched)
        if profile is not None:
            measured = Measured()
            with _stage(say, "profile", measured.words):
                for number in range(ROUNDS):
                    say("profile", "begun", f"round {number + 1} of {ROUNDS}", "")
                    drive.again(measured)
                measured.write(profile)
    except _Ended:
        return False
    return True


class _Ended(Exception):
    """A stage failed and has been told."""


@contextmanager
def _stage(say: Say, check: str, detail: str | Callable[[], str]) -> Iterator[None]:
    """A stage; a `detail` that is known only afterwards is called for then."""
    say(check, "begun", detail if isinstance(detail, str) else "", "")
    try:
        yield
    except Exception as error:
        fault = kind_of(error)
        say(fault, "warn" if fault == "set-up" else "bad", _told(error, check, fault), CURES[fault])
        raise _Ended from error
    say(check, "ok", detail if isinstance(detail, str) else detail(), "")


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def _config(transfer: dict[str, Any], device: str) -> Any:
    import torch
    from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, VllmConfig

    if device != "cpu" and not torch.cuda.is_available():
        raise Wrong("device", f"no {device} is here")
    try:
        made = KVTransferConfig(**transfer)
    except (TypeError, ValueError) as error:
        raise Wrong("configuration", str(error).splitlines()[0]) from error
    if not made.kv_connector:
        raise Wrong("configuration", "kv_connector is not set")
    if made.kv_buffer_device not in ("cpu", device):
        raise Wrong("device", f"kv_buffer_device is {made.kv_buffer_device!r}, and the engine would run on {device}")
    _class_of(made)  # before VllmConfig asks for it: its own words would hide whose fault it is
    return VllmConfig(cache_config=CacheConfig(block_size=BLOCK), device_config=DeviceConfig(device), kv_transfer_config=made)


def _class_of(transfer: Any) -> type:
    """The class; vLLM's own factory has the last word."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    path, name = transfer.kv_connector_module_path, transfer.kv_connector
    if path:
        module = import_module(path)
        if not hasattr(module, name):
            raise Wrong("class", f"the module {path} has no class {name}")
        if not isinstance(getattr(module, name), type):
            raise Wrong("class", f"{path}:{name} is not a class")
    elif name not in KVConnectorFactory._registry:
        known = ", ".join(sorted(KVConnectorFactory._registry))
        raise Wrong("module", f"vLLM registers no connector {name!r} and kv_connector_module_path is not set; it knows {known}")
    try:
        found: type = KVConnectorFactory.get_connector_class(transfer)
    except ValueError as error:
        raise Wrong("class", str(error)) from error
    return found


def _suits(connector: type) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    if not isinstance(connector, type) or not issubclass(connector, KVConnectorBase_V1):
        raise Wrong("class", f"{connector!r} is no KVConnectorBase_V1")
    if missing := sorted(getattr(connector, "__abstractmethods__", ())):
        raise Wrong("class", f"it does not implement {', '.join(missing)}")


class Measured:
    """What a connector's calls took, in seconds by stage, and which functions took it."""

    def __init__(self) -> None:
        self.took: dict[str, list[float]] = {}
        self._profiler = cProfile.Profile()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage of one round."""
        began = time.perf_counter()
        self._profiler.enable()
        try:
            yield
        finally:
            self._profiler.disable()
            self.took.setdefault(name, []).append(time.perf_counter() - began)

    def write(self, path: Path) -> None:
        """Write what `pstats` and its viewers read."""
        self._profiler.dump_stats(path)

    def words(self) -> str:
        """Medians by stage, and the functions that took most."""
        medians = ", ".join(f"{name} {statistics.median(took) * 1e3:.2f} ms" for name, took in self.took.items())
        stats: Any = pstats.Stats(self._profiler)  # typeshed does not know what it counts
        own = sorted(((count[2], place) for place, count in stats.stats.items()), reverse=True)[:3]
        most = ", ".join(f"{_function(place)} {took / max(stats.total_tt, 1e-9):.0%}" for took, place in own)
        return f"medians of {ROUNDS} rounds under the profiler: {medians}; most of it in {most}"


def _function(place: tuple[str, int, str]) -> str:
    """A function by its name and file; those of the interpreter have no file."""
    file, line, name = place
    return name.strip("<>") if file == "~" else f"{name} ({Path(file).name}:{line})"


@dataclass
class _Drive:
    """Both sides of one connector, and a cache of which some blocks are saved and others loaded into."""

    config: Any
    connector: type
    dtype: str
    device: str
    seconds: float

    def __post_init__(self) -> None:
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

        self._torch: Any = torch
        kv_dtype = getattr(torch, self.dtype, None)
        if not isinstance(kv_dtype, torch.dtype):
            raise Wrong("dtype", f"torch has no dtype {self.dtype!r}")
        self._names = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS)]
        self._spec = _spec(kv_dtype)
        self._caches = {name: self._tensor(kv_dtype) for name in self._names}
        layers = {name: SimpleNamespace(kv_cache=cache) for name, cache in self._caches.items()}
        self.config.compilation_config.static_forward_context.update(layers)
        cache_config = self._cache_config()
        with set_current_vllm_config(self.config):
            self._scheduler: Any = self.connector(self.config, KVConnectorRole.SCHEDULER, cache_config)
            self._worker: Any = self.connector(self.config, KVConnectorRole.WORKER, cache_config)
        self._worker.register_kv_caches(self._caches)
        self._layers = layers
        self._round = 0
        self._tokens = [int.from_bytes(os.urandom(2), "big") for _ in range(BLOCK * BLOCKS + MORE)]
        self._saved = {name: cache.clone() for name, cache in self._caches.items()}

    def _tensor(self, dtype: Any) -> Any:
        """A layer's cache: [block, head, slot, keys and values], in APART on GPUs [block, keys or values, slot, head, value]."""
        count = READ.stop
        apart = self.device != "cpu" and _version().startswith(APART)
        shape = (count, 2, BLOCK, HEADS, HEAD_SIZE) if apart else (count, HEADS, BLOCK, 2 * HEAD_SIZE)
        return self._torch.randn(shape).to(dtype).to(self.device)

    def _cache_config(self) -> Any:
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

        return KVCacheConfig(num_blocks=READ.stop, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(self._names, self._spec)])

    def misses(self) -> None:
        """What nobody saved is not found."""
        matched, _ = self._scheduler.get_num_new_matched_tokens(self._request("a"), 0)
        if matched:
            raise Wrong("lookup", f"{matched} tokens were found that nobody saved: it does not look at the tokens")

    def save(self) -> None:
        """One step in which the first blocks are computed."""
        request, blocks = self._request("a"), list(WRITTEN)
        self._scheduler.update_state_after_alloc(request, _blocks(blocks), 0)
        self._step(request, blocks, computed=0, saves=True)
        kept, _ = self._finish(request, blocks)
        if kept:
            self._await(request.request_id, sending=True)

    def load(self) -> int:
        """One step in which other blocks are filled from the store; the tokens found."""
        request, blocks = self._request("b"), list(READ)
        matched, later = self._ask(request)
        if not matched:
            raise Wrong("lookup", "what was saved is not found: was it saved at all, and under the keys that are looked up?")
        self._scheduler.update_state_after_alloc(request, _blocks(blocks), matched)
        for name in self._names:
            self._slots(name, blocks).zero_()
        self._step(request, blocks, computed=matched, saves=False)
        if later:
            self._await(request.request_id, sending=False)
        return int(matched)

    def compare(self, matched: int) -> None:
        """What was loaded against what was saved."""
        for name in self._names:
            before = self._slots(name, WRITTEN, self._saved[name]).flatten(0, 1)[:matched]
            after = self._slots(name, READ).flatten(0, 1)[:matched]
            if not self._torch.equal(before, after):
                off = (before.float() - after.float()).abs().max().item()
                if 0 < off <= 0.05 * before.float().abs().max().item():  # close, and not equal: it went through another format
                    raise Wrong(
                        "dtype", f"values of {name} come back up to {off:.2g} off: they were kept in another dtype than {self.dtype}"
                    )
                raise Wrong("compare", f"values of {name} come back up to {off:.2g} off")

    def again(self, measured: Measured) -> None:
        """All of it once more, with other tokens and other requests."""
        self._tokens = [int.from_bytes(os.urandom(2), "big") for _ in self._tokens]
        self._round += 1
        with measured.stage("lookup"):
            self.misses()
        with measured.stage("save"):
            self.save()
        with measured.stage("load"):
            matched = self.load()
        self.compare(matched)

    def _slots(self, name: str, blocks: Any, of: Any = None) -> Any:
        """The tokens of some blocks: [block, slot, …], a view where `of` is the cache."""
        cache = self._caches[name] if of is None else of
        first, last = min(blocks), max(blocks) + 1
        return cache[first:last].transpose(1, 2)

    def _ask(self, request: Any) -> tuple[int | None, bool]:
        deadline = time.monotonic() + self.seconds
        while True:
            matched, later = self._scheduler.get_num_new_matched_tokens(request, 0)
            if matched or time.monotonic() > deadline:
                return matched, later
            if matched == 0:  # saves may be on their way for a moment
                time.sleep(min(POLL_S * 10, self.seconds / 10))
                matched, later = self._scheduler.get_num_new_matched_tokens(request, 0)
                if matched == 0:
                    return matched, later
            time.sleep(POLL_S)

    def _step(self, request: Any, blocks: list[int], *, computed: int, saves: bool) -> None:
        """What scheduler and worker call in one step, in their order."""
        meta = self._scheduler.build_connector_meta(_scheduled(request, blocks, computed))
        try:
            meta = pickle.loads(pickle.dumps(meta))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise Wrong("metadata", f"{type(meta).__name__} cannot be sent to a worker: {error}") from error
        slots = self._torch.tensor([block * BLOCK + i for block in blocks for i in range(BLOCK)])[: len(self._tokens)]
        attention = SimpleNamespace(num_actual_tokens=len(self._tokens) - computed, slot_mapping=slots)
        context = SimpleNamespace(
            no_compile_layers=self._layers, attn_metadata=dict.fromkeys(self._names, attention), slot_mapping={}, virtual_engine=0
        )
        self._worker.bind_connector_metadata(meta)
        self._worker.start_load_kv(context)
        for name in self._names:
            self._worker.wait_for_layer_load(name)
            if saves:
                self._worker.save_kv_layer(name, self._caches[name], attention)
        self._worker.wait_for_save()
        if errors := self._worker.get_block_ids_with_load_errors():
            raise Wrong("connector", f"blocks {sorted(errors)} failed to load")
        self._worker.clear_connector_metadata()

    def _finish(self, request: Any, blocks: list[int]) -> tuple[bool, Any]:
        groups = getattr(self._scheduler, "request_finished_all_groups", None)
        answer: tuple[bool, Any] = groups(request, (blocks,)) if groups else self._scheduler.request_finished(request, blocks)
        return answer

    def _await(self, name: str, *, sending: bool) -> None:
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            sent, received = self._worker.get_finished({name} if sending else set())
            if name in ((sent if sending else received) or ()):
                return
            time.sleep(POLL_S)
        raise Wrong("time-out", f"it did not say within {self.seconds:g} s that it has {'saved' if sending else 'loaded'}")

    def _request(self, name: str) -> Any:
        from vllm import SamplingParams
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.request import Request

        hashing = _hashing()
        kv_cache_utils.init_none_hash(hashing)
        given = {
            "request_id": f"{name}{self._round}",
            "prompt_token_ids": list(self._tokens),
            "sampling_params": SamplingParams(max_tokens=1),
            "pooling_params": None,
            "eos_token_id": None,
            "block_hasher": kv_cache_utils.get_request_block_hasher(BLOCK, hashing),
        }
        known = inspect.signature(Request.__init__).parameters
        return Request(**{key: value for key, value in given.items() if key in known})


def _hashing() -> Any:
    from vllm.utils.hashing import get_hash_fn_by_name

    return get_hash_fn_by_name("sha256")


def _spec(dtype: Any) -> Any:
    """vLLM's specification of the cache."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    known = inspect.signature(FullAttentionSpec).parameters
    given = {"block_size": BLOCK, "num_kv_heads": HEADS, "head_size": HEAD_SIZE, "dtype": dtype, "use_mla": False}
    return FullAttentionSpec(**{key: value for key, value in given.items() if key in known})


def _blocks(ids: list[int]) -> Any:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    return KVCacheBlocks(([KVCacheBlock(block) for block in ids],))


def _scheduled(request: Any, blocks: list[int], computed: int) -> Any:
    """A step that admits one request."""
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    request.num_computed_tokens = computed
    tokens = len(request.prompt_token_ids) - computed
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = [NewRequestData.from_request(request, (blocks,))]
    output.num_scheduled_tokens, output.total_num_scheduled_tokens = {request.request_id: tokens}, tokens
    return output


def main() -> int:
    """The command line."""
    import json

    from ingest.vllm.kv.outlet import outlet

    transfer, dtype, device, seconds, *profile = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")  # what vLLM and the connector print goes elsewhere
    os.dup2(2, 1)

    def say(*told: str) -> None:
        out.write(json.dumps(told) + "\n")
        out.flush()

    into = Path(profile[0]) if profile else None
    good = examine(json.loads(transfer), say, dtype=dtype, device=device, seconds=float(seconds), profile=into)
    outlet.close()
    os._exit(0 if good else 1)  # threads of a connector may not want to end


if __name__ == "__main__":
    main()
