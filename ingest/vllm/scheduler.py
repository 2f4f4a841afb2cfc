"""The recording scheduler: vLLM's own, whichever is in force, with a tap on its calls.

    vllm serve MODEL --scheduler-cls ingest.vllm.scheduler.RecordingScheduler

or, without an argument, `TOKENTAPE_ENGINE__CAPTURE=on` (see `ingest.vllm.plugin`). It decides nothing differently.
"""

from __future__ import annotations

import sys
from functools import cache
from types import FrameType
from typing import Any

from ingest.vllm.kv.outlet import outlet
from ingest.vllm.tap import Tap
from schemas.enginerun import facts, versions


class _Recording:
    """What is put before a scheduler class: every call is passed on, and told to the tap."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tap = Tap(_header(self.vllm_config), caching=self.cache_config.enable_prefix_caching)  # type: ignore[attr-defined]
        outlet.attach(self._tap.pipe)
        self._in_update = False

    def add_request(self, request: Any) -> Any:
        self._tap.arrived(request, idle=not self.requests)  # type: ignore[attr-defined]
        return super().add_request(request)  # type: ignore[misc]

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        if self._in_update:  # the scheduler itself ends requests that failed
            return super().finish_requests(request_ids, finished_status)  # type: ignore[misc]
        names = [request_ids] if isinstance(request_ids, str) else list(self.requests if request_ids is None else request_ids)  # type: ignore[attr-defined]
        live = [name for name in names if (r := self.requests.get(name)) is not None and not r.is_finished()]  # type: ignore[attr-defined]
        if len(live) < 2:
            ended = super().finish_requests(request_ids, finished_status)  # type: ignore[misc]
        else:  # vLLM frees in the order of a set; one by one it is an order that can be had again
            parts = [super(_Recording, self).finish_requests(name, finished_status) for name in live]  # type: ignore[misc]
            ended = [one for part in parts if isinstance(part, list) for one in part] if isinstance(parts[0], list) else None
        if live:
            self._tap.finished(live, finished_status.name, idle=not self.requests)  # type: ignore[attr-defined]
        return ended

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
        done = super().reset_prefix_cache(*args, **kwargs)  # type: ignore[misc]
        running = bool(args[0] if args else kwargs.get("reset_running_requests", False))
        self._tap.reset(running, emptied=bool(done) and not self.requests)  # type: ignore[attr-defined]
        return done

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._tap.scheduling()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._tap.scheduled(output)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._in_update, ended = True, len(self.finished_req_ids)  # type: ignore[attr-defined]
        try:
            outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        finally:
            self._in_update = False
        self._tap.updated(outputs, model_runner_output, self, ended=len(self.finished_req_ids) != ended)  # type: ignore[attr-defined]
        return outputs

    def shutdown(self) -> None:
        outlet.detach(self._tap.pipe)
        self._tap.close()
        super().shutdown()  # type: ignore[misc]


@cache
def recording(scheduler: type) -> type:
    """The recording subclass of a scheduler class; one that replays a record makes none of its own."""
    if issubclass(scheduler, _Recording) or getattr(scheduler, "replays", False):
        return scheduler
    return type(f"Recording{scheduler.__name__}", (_Recording, scheduler), {"__module__": __name__})


def is_recording(scheduler: Any) -> bool:
    """Would an engine with this scheduler class be recorded?"""
    return isinstance(scheduler, type) and issubclass(scheduler, _Recording | RecordingScheduler)


class RecordingScheduler:
    """For `--scheduler-cls`: the recording subclass of the scheduler that this configuration would have without it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A scheduler. Raises `UsageError` for a version of vLLM that is not supported."""
        import vllm
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler

        versions.check(vllm.__version__, operation="capture in the engine")
        config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        return recording(AsyncScheduler if config.scheduler_config.async_scheduling else Scheduler)(*args, **kwargs)


def _header(config: Any) -> dict[str, Any]:
    """What the tape has to know of an engine, as JSON types."""
    import vllm

    workers = _ask_workers()
    return {
        "version": vllm.__version__,
        "model": config.model_config.model,
        "arguments": facts.arguments_of(config),
        "facts": facts.facts_of(config, version=vllm.__version__, workers=workers),
        "unrepeatable": list(facts.unrepeatable(config)),
        "kv_engine": getattr(config.kv_transfer_config, "engine_id", None),
    }


def _ask_workers() -> list[dict[str, Any]] | None:
    """The facts of all workers. The executor is known to the engine core alone, which is making this scheduler just now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        executor = getattr(frame.f_locals.get("self"), "model_executor", None)
        if executor is not None:
            said: list[dict[str, Any]] = executor.collective_rpc(facts.worker_facts)
            return said
        frame = frame.f_back
    return None
