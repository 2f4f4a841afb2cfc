"""What capture costs an engine: the same vLLM with it and bare, taking turns in one process, and the hook's own µs a step.

python -m benchmarks.capture [--model PATH] [--streams N] [--tokens N] [--pairs N] [--engine JSON] [--apart]

The turns share one engine: for the bare ones the scheduler has vLLM's own methods back, so that not a line of the recorder
runs in its thread. In one process the engine, its front end and the tap share one interpreter, which is the least favourable
case; with --apart the engine core has a process of its own, as in `vllm serve`. What the captured turns said must be on the
tape at the end.

Where turns of the same engine differ by more than capture could cost, as on a GPU whose host has other guests, its share of
their time says more: how long the engine's thread was in the hook, and the processor time of the threads beside it. The recorder
itself has a process of its own, and so a core where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.engine_log import await_end, runs_of

COST = "BENCH_CAPTURE_COST"
# Steps of the synthetic engine that the hook is timed on; one of a GPU makes about a hundred a second.
_STEPS = 2_000
# What the recording scheduler has methods of its own for.
_TAPPED = ("finish_requests", "reset_prefix_cache", "schedule", "update_from_output")


class Alternating:
    """For `--scheduler-cls`: the recording scheduler, which is vLLM's own while requests come that say so.

    At its end it writes what capture took of the engine's time into the file that `COST` names.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A scheduler of this configuration."""
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        from ingest.vllm.scheduler import recording

        config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        own: Any = AsyncScheduler if config.scheduler_config.async_scheduling else Scheduler
        recorded: Any = recording(own)

        def add_request(self: Any, request: Any) -> Any:
            bare = request.sampling_params.extra_args["turn"] == "bare"
            for method in _TAPPED if not self.requests else ():
                self.__dict__.pop(method, None)
                if bare:
                    setattr(self, method, getattr(own, method).__get__(self))
            return (own if bare else recorded).add_request(self, request)

        def shutdown(self: Any) -> None:
            self._tap.close()  # whose threads have then ended; vLLM may kill what takes long from here on
            Path(os.environ[COST]).write_text(json.dumps(took))
            recorded.shutdown(self)

        took = _clocked()
        return type("Alternating", (recorded,), {"add_request": add_request, "shutdown": shutdown})(*args, **kwargs)


def _clocked() -> dict[str, float]:
    """Seconds that the tap takes from now on: of the engine's thread, and of the processor for the two threads that pack and write."""
    from ingest.vllm.tap import Pipe, Tap

    took = {"hook": 0.0, "pack": 0.0}

    def clock(owner: type, method: str, what: str, now: Callable[[], float]) -> None:
        call = getattr(owner, method)

        def clocked(*args: Any, **kwargs: Any) -> Any:
            began = now()
            try:
                return call(*args, **kwargs)
            finally:
                took[what] += now() - began

        setattr(owner, method, clocked)

    for method in ("arrived", "scheduling", "scheduled", "updated"):
        clock(Tap, method, "hook", time.perf_counter)
    for method in ("_pack", "_write"):  # what these threads run from their beginning to their end
        clock(Pipe, method, "pack", time.thread_time)
    return took


def run() -> list[dict[str, Any]]:
    """Rows of the table."""
    from tests.engine_load import make_model

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model, hidden=768, layers=12, intermediate=2048)  # 75 M weights, a step of 10 ms
        found = measured(["--model", str(model), "--streams", "8", "--tokens", "96", "--pairs", "30"])
    return [*rows_of(found), *_hook_rows()]


def measured(arguments: list[str]) -> dict[str, Any]:
    """What this module, run as a program of its own, found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        env = {**os.environ, "TOKENTAPE_DATA": str(Path(folder) / "data")}
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        subprocess.run([sys.executable, "-m", "benchmarks.capture", *arguments, "--out", str(out)], env=env, check=True)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The table's rows of one measurement."""
    bare, captured = statistics.median(found["bare"]), statistics.median(found["captured"])
    ratios = sorted(c / b for b, c in zip(found["bare"], found["captured"], strict=True))
    noise = statistics.median(abs(a / b - 1) for a, b in zip(found["bare"], found["bare"][1:], strict=False))
    where = f"{found['streams']} streams, {found['device']}, engine core {'apart, as in a server' if found['apart'] else 'in one process'}"
    return [
        {
            "what": f"tokens/s with capture, {where}",
            "value": captured,
            "unit": "tok/s",
            "beside": "the same engine bare",
            "beside_value": bare,
            "ratio": statistics.median(ratios),
            "reach": "≥ 0.995 (GPU), ≥ 0.98 (CPU)",
        },
        {"what": f"bare turn against bare turn, {where}", "value": 100 * noise, "unit": "%", "beside": "noise of the measurement"},
        *_shares(found, where),
    ]


def _shares(found: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """What the tap took of the captured turns' time."""
    whats = {"hook": "engine's thread in the hook", "pack": "processor time of the threads that pack and write"}
    beside = {"unit": "%", "beside": "time of the captured turns", "reach": "≤ 0.5 together (GPU)"}
    return [{"what": f"{whats[name]}, {where}", "value": 100 * s / found["captured_s"], **beside} for name, s in found["took"].items()]


def _hook_rows() -> list[dict[str, Any]]:
    rows = []
    for streams in (8, 64, 256):
        value = hook_us(streams)
        rows.append({"what": f"hook, {streams} in the step", "value": value, "unit": "µs/step", "beside": "", "reach": "10 at 8 streams"})
    return rows


def hook_us(streams: int) -> float:
    """µs that one step of so many sequences costs the engine's thread, tokens and logprobs included."""
    import numpy

    from ingest.vllm.tap import Tap

    os.environ["TOKENTAPE_DATA"] = tempfile.mkdtemp()
    tap = Tap({"model": "none", "facts": {"config.workers": 1}, "arguments": {}, "unrepeatable": []}, caching=False)
    names = [f"{i}-{i:08x}" for i in range(streams)]
    for name in names:
        parameters = SimpleNamespace(structured_outputs=None)
        tap.arrived(_request(name, parameters), idle=False)
    cached = SimpleNamespace(resumed_req_ids=set(), req_ids=names, num_computed_tokens=[5] * streams)
    output = SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys(names, 1),
        total_num_scheduled_tokens=streams,
        scheduled_new_reqs=[],
        scheduled_cached_reqs=cached,
        preempted_req_ids=None,
    )
    scheduler = SimpleNamespace(running=names, waiting=[], kv_cache_manager=SimpleNamespace(usage=0.5), requests=names)
    outputs = {0: SimpleNamespace(outputs=[SimpleNamespace(request_id=n, new_token_ids=[7], finish_reason=None) for n in names])}
    logprobs = SimpleNamespace(logprobs=numpy.zeros((streams, 2), dtype="f4"), logprob_token_ids=numpy.full((streams, 2), 7))
    result = SimpleNamespace(logprobs=logprobs, req_ids=names)
    took = []
    for _ in range(_STEPS):
        began = time.perf_counter_ns()
        tap.scheduling()
        tap.scheduled(output)
        tap.updated(outputs, result, scheduler, ended=False)
        took.append(time.perf_counter_ns() - began)
        time.sleep(0.001)  # as an engine would, so that the thread that sends is not starved
    tap.close()
    return float(statistics.median(took)) / 1000


def _request(name: str, parameters: Any) -> Any:
    fields = ("pooling_params", "lora_request", "cache_salt", "mm_features", "prompt_embeds", "resumable")
    nothing = dict.fromkeys(fields)
    return SimpleNamespace(
        request_id=name, sampling_params=None, prompt_token_ids=[1, 2], arrival_time=0.0, priority=0, client_index=0, **nothing
    )


def _engine(given: argparse.Namespace) -> Any:
    from vllm import LLM

    own = {"scheduler_cls": f"benchmarks.capture.{Alternating.__name__}", "skip_tokenizer_init": True, "enable_prefix_caching": False}
    return LLM(given.model, max_num_seqs=given.streams, **own, **given.engine)


def _turn(engine: Any, given: argparse.Namespace, number: int, name: str) -> float:
    """Seconds of one batch."""
    from vllm import SamplingParams

    draw = random.Random(number)
    prompts = [{"prompt_token_ids": [draw.randrange(10, 500) for _ in range(draw.randrange(16, 64))]} for _ in range(given.streams)]
    common = {"max_tokens": given.tokens, "ignore_eos": True, "detokenize": False, "logprobs": 1, "extra_args": {"turn": name}}
    parameters = [SamplingParams(**common, temperature=i % 2, seed=i) for i in range(given.streams)]
    time.sleep(0.3)  # the step that an engine may have begun ahead belongs to the turn before
    began = time.perf_counter()
    engine.generate(prompts, parameters, use_tqdm=False)
    return time.perf_counter() - began


def main() -> None:
    """Take turns and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--engine", type=json.loads, default={})
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(given.apart))
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()  # PyTorch, asked, would be at home on the GPU, which processes forked from here then cannot use
    if on_cpu:
        given.engine = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 512, "enable_chunked_prefill": False, **given.engine}
        given.engine.setdefault("max_num_batched_tokens", 1024)
    os.environ[COST] = f"{given.out}.cost"
    engine = _engine(given)
    found: dict[str, Any] = {"bare": [], "captured": [], "captured_s": 0.0, "streams": given.streams, "apart": given.apart, "took": {}}
    found["device"] = "CPU" if on_cpu else current_platform.get_device_name()
    for number in range(given.pairs + 2):
        for name in ("bare", "captured")[:: -1 if number % 2 else 1]:  # what is slow because it is the first is none of capture's
            took_s = _turn(engine, given, number, name)
            found["captured_s"] += took_s if name == "captured" else 0
            if number >= 2:  # the first ones warm kernels up
                found[name].append(given.streams * given.tokens / took_s)
        given.out.write_text(json.dumps(found))  # what there is, should the time end
    engine.llm_engine.engine_core.shutdown()
    found["took"] = json.loads(Path(os.environ[COST]).read_text())
    given.out.write_text(json.dumps(found))
    await_end(Path(os.environ["TOKENTAPE_DATA"]), timeout_s=600)
    (run,) = runs_of(Path(os.environ["TOKENTAPE_DATA"]))
    taped, said = len(run.requests), (given.pairs + 2) * given.streams
    assert taped == said, f"{taped} of {said} captured requests are on the tape"


if __name__ == "__main__":
    main()
