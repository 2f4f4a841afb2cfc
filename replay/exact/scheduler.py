"""The replaying scheduler: vLLM's own, with the recorded arrivals and aborts put back between the same calls.

vLLM decides again, really computes and really samples; every decision's checksum is compared. In forced mode recorded
decisions are imposed as well, so that it also holds where another configuration would decide otherwise.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from replay.exact.run import Run
from replay.exact.script import Diverged, Imposed, Script
from replay.words import count
from schemas.enginerun import calls
from schemas.enginerun.decisions import Decision, decision_of


class _Replaying:
    """What is put before a scheduler class. `script`, `make` and `forced` are set on the subclass made for one replay."""

    replays = True
    script: Script
    make: Any
    forced: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.numbers: dict[str, int] = {}
        self.names: dict[int, str] = {}
        self.decided: deque[Decision] = deque()
        self._own = False
        if self.forced:
            self._cap: dict[str, int] = {}
            self._cap_cache_hits()

    def has_requests(self) -> bool:
        return self.script.next_is(calls.Schedule)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        return super().finish_requests(request_ids, finished_status) if self._own else []  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._put_back()
        self.script.take(calls.Schedule)
        imposed = self.script.imposed.popleft()
        output = self._imposed(imposed, *args, **kwargs) if self.forced else super().schedule(*args, **kwargs)  # type: ignore[misc]
        decision = decision_of(output, self.numbers)
        if self.forced and imposed.rows != dict(zip(decision.numbers, decision.tokens, strict=True)):
            fault = f"the recorded decision cannot be imposed on this engine: {_why(self.script.run, decision, imposed.rows, [])}"
            raise Diverged(fault, self.script.step)
        self.decided.append(decision)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._put_back()
        step = self.script.take(calls.Update)
        self._own = True
        try:
            outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        finally:
            self._own = False
        decision = self.decided.popleft()
        ended = [o.request_id for part in outputs.values() for o in part.outputs if o.finish_reason is not None]
        if decision.checksum(self.numbers[name] for name in ended) != step.checksum and not self.forced:
            raise Diverged(_why(self.script.run, decision, step.rows, ended), step.number)
        for name in ended:
            del self.numbers[name]
        return outputs

    def _put_back(self) -> None:
        """What came from outside before this call comes again."""
        from vllm.v1.request import RequestStatus

        for call in self.script.between():
            if isinstance(call, calls.Arrive | calls.ArriveBeside):
                request = self.script.arrive()
                made = type(self).make(request)
                self.numbers[made.request_id] = request.number
                self.names[request.number] = made.request_id
                self.add_request(made)  # type: ignore[attr-defined]
            elif isinstance(call, calls.Finish):
                self._own = True
                for number in call.numbers:
                    self.finish_requests(self.names[number], RequestStatus[call.status])
                    self.numbers.pop(self.names[number], None)
                self._own = False
            elif isinstance(call, calls.Reset):
                self.reset_prefix_cache(call.running)  # type: ignore[attr-defined]

    def _cap_cache_hits(self) -> None:
        """A cache that is larger than the recorded one may hit more: then only what was hit is taken."""
        manager = self.kv_cache_manager  # type: ignore[attr-defined]
        look = manager.get_computed_blocks

        def capped(request: Any) -> Any:
            blocks, tokens, *rest = look(request)
            wanted = self._cap.get(request.request_id, tokens)
            if tokens < wanted:
                raise Diverged(f"{tokens} tokens of a prompt are cached, the record has {wanted}", self.script.step)
            return (manager.truncate_computed_blocks(blocks, wanted) if tokens > wanted else blocks, wanted, *rest)

        manager.get_computed_blocks = capped

    def _imposed(self, imposed: Imposed, *args: Any, **kwargs: Any) -> Any:
        """Decide as recorded: these are admitted and preempted, with this budget."""
        from vllm.v1.core.sched.request_queue import create_request_queue

        known: dict[str, Any] = self.requests  # type: ignore[attr-defined]
        running: list[Any] = self.running  # type: ignore[attr-defined]
        for request in [r for r in reversed(running) if self.numbers[r.request_id] in imposed.preempted]:
            running.remove(request)
            self._preempt_request(request, time.monotonic())  # type: ignore[attr-defined]
        now = [known[self.names[number]] for number in imposed.rows]
        admit = [request for request in now if request not in running]
        self._cap = {r.request_id: imposed.cached.get(self.numbers[r.request_id], 0) for r in admit}
        rest = [request for request in self.waiting if request not in admit]  # type: ignore[has-type]
        self.waiting = create_request_queue(self.policy)  # type: ignore[attr-defined]
        for request in admit:
            self.waiting.add_request(request)
        limits = ("max_num_scheduled_tokens", "max_num_running_reqs", "max_num_active_reqs")
        saved = {name: getattr(self, name) for name in limits if hasattr(self, name)}
        self.max_num_scheduled_tokens = sum(imposed.rows.values())
        # Who waits only for a result that is under way runs beside those of the step.
        self.max_num_running_reqs = self.max_num_active_reqs = max(saved["max_num_running_reqs"], len(running) + len(admit))
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        for name, value in saved.items():
            setattr(self, name, value)
        for request in rest:
            self.waiting.add_request(request)
        return output


def replaying(scheduler: type, script: Script, make: Any, *, forced: bool) -> type:
    """The replaying subclass of a scheduler class, for one script."""
    return type(f"Replaying{scheduler.__name__}", (_Replaying, scheduler), {"script": script, "make": staticmethod(make), "forced": forced})


def _why(run: Run, decision: Decision, rows: dict[int, int], ended: list[str]) -> str:
    """In words, how a decision is another than the recorded one."""
    now = dict(zip(decision.numbers, decision.tokens, strict=True))
    if list(rows) != list(now):
        missing, extra = sorted(rows.keys() - now.keys()), sorted(now.keys() - rows.keys())
        if not missing and not extra:
            return f"the same {count(len(now), 'request')} in another order"
        return f"other requests in the step: {_listed('missing', missing)}{_listed('new', extra)}".rstrip("; ")
    if rows != now:
        number = next(number for number in rows if rows[number] != now[number])
        return f"request {number} computes {now[number]} tokens, recorded {rows[number]}"
    return f"another cache hit, preemption or end; ended now: {', '.join(ended) or 'none'}"


def _listed(word: str, numbers: list[int]) -> str:
    return f"{word} {', '.join(map(str, numbers[:8]))}; " if numbers else ""
