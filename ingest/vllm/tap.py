"""What an engine core says of its calls, in a few microseconds each: all encoding is done by a process of its own.

The engine's thread puts what it has at hand into a list. Some dozens of calls later another thread, which works while the
engine waits for its device, makes plain values of them and hands them, as one frame, to the recorder's process
(`tokentape.engine`). That one outlives the engine: what was sent is on the tape even if the engine is killed. A recorder
that cannot follow never holds the engine up: frames are let go and counted, and the tape says from where on the run
cannot be replayed.
"""

from __future__ import annotations

import atexit
import marshal
import queue
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Protocol

from ingest.coalesce import ALTERNATIVES_MAX
from schemas.enginerun.decisions import admitted, preempted
from schemas.enginerun.facts import GRAMMAR

FRAME_CALLS = 64
"""Calls in one frame at most …"""
FRAME_NS = 50_000_000
"""… and this is how long one waits for company while the engine works."""
KEPT_MAX = 256
"""Outputs of the engine that are kept for a frame at most. Each holds a list, and Python's garbage collector starts when 700 containers
more are alive than before: what survives ages, until a full collection stops the engine for a good part of a second."""
FRAMES_MAX = 32_768
"""Frames that wait for the recorder before further ones are let go: minutes of an engine at work."""
CLOSE_S = 5.0
"""How long the end of an engine waits until all that it said is handed over; vLLM kills an engine that takes longer."""
PROGRAM = "tokentape.engine"
"""The module that runs as the recorder's process."""
SIZE = struct.Struct("<I")

_name, _tokens, _reason = attrgetter("request_id"), attrgetter("new_token_ids"), attrgetter("finish_reason")


Others = tuple[int, bytes, bytes]
"""What else might have been said, by row of a batch: how many in a row, their ids (int32) and their logprobs (float32), likeliest first."""

Scores = tuple[bytes, Others | None]
"""The sampled tokens' logprobs (float32) by row of a batch, and the others, where somebody asked for any."""


class Tap:
    """One engine run's calls on their way to the recorder: the engine's thread only keeps hold of what it has made anyway."""

    def __init__(self, header: dict[str, Any], *, caching: bool) -> None:
        self._caching = caching
        self._clean = True
        self._open = 0  # steps scheduled and not yet taken in
        self._scored: list[str] = []
        self._calls: list[tuple[Any, ...]] = [("header", marshal_safe(header))]
        self._begun_ns = self._sent_ns = time.monotonic_ns()
        self._kept = 0
        self.pipe = Pipe(_Plain(speculative="speculative decoding" in header["unrepeatable"]))
        self._send()

    def arrived(self, request: Any, *, idle: bool) -> None:
        """A request came."""
        if idle and not self._open and (self._clean or not self._caching):
            self._calls.append(("idle",))
        self._clean = False
        self._calls.append(("arrive", time.monotonic_ns(), request))

    def finished(self, names: Sequence[str], status: str, *, idle: bool) -> None:
        """Requests were ended from outside."""
        self._calls.append(("finish", time.monotonic_ns(), names, status))
        if idle:
            self._send()

    def reset(self, running: bool, *, emptied: bool) -> None:
        """The prefix cache was emptied, or was to be."""
        self._clean |= emptied
        self._calls.append(("reset", running))

    def scheduling(self) -> None:
        """`schedule` begins."""
        self._begun_ns = time.monotonic_ns()

    def scheduled(self, output: Any) -> None:
        """`schedule` decided."""
        self._open += 1
        self._calls.append(("schedule", self._begun_ns, output))

    def updated(self, outputs: Any, result: Any, scheduler: Any) -> None:
        """`update_from_output` took the oldest step's result in."""
        self._open -= 1
        scores = rows = None
        if (logprobs := getattr(result, "logprobs", None)) is not None:
            # Copies: the arrays may be written again in the next step.
            scores = logprobs.logprobs[:, 0].tobytes(), _others(logprobs) if logprobs.logprobs.shape[1] > 1 else None
            if result.req_ids != self._scored:
                self._scored = rows = list(result.req_ids)
        state = (len(scheduler.running), len(scheduler.waiting), scheduler.kv_cache_manager.usage)
        now_ns = time.monotonic_ns()
        said = [part.outputs for part in outputs.values()]
        self._kept += sum(map(len, said))
        self._calls.append(("update", now_ns, said, rows, scores, state))
        full = len(self._calls) >= FRAME_CALLS or self._kept >= KEPT_MAX
        if full or now_ns - self._sent_ns > FRAME_NS or not scheduler.requests:
            self._send()

    def close(self) -> None:
        """The engine ends: hand over all of it."""
        self._send()
        self.pipe.close()

    def _send(self) -> None:
        calls, self._calls, self._kept = self._calls, [], 0
        self._sent_ns = time.monotonic_ns()
        if calls and not self.pipe.put(calls):
            self._calls = [("lost", len(calls))]


class _Plain:
    """Makes plain values of a run's calls, in the thread that sends them: numbers for names, and nothing that is as before."""

    def __init__(self, *, speculative: bool) -> None:
        self._speculative = speculative
        self._numbers: dict[str, int] = {}
        self._arrived = 0
        self._rows: list[str] = []
        self._outputs: list[str] = []
        self._index: dict[str, int] = {}
        self._places: list[int] = []

    def calls(self, calls: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The calls without objects of vLLM."""
        return [getattr(self, f"_{call[0]}", lambda *rest, kind=call[0]: (kind, *rest))(*call[1:]) for call in calls]

    def _arrive(self, at_ns: int, request: Any) -> tuple[Any, ...]:
        number, self._arrived = self._arrived, self._arrived + 1
        self._numbers[request.request_id] = number
        prompt = array("q", request.prompt_token_ids or ()).tobytes()
        return "arrive", at_ns, number, marshal_safe(request_document(request)), prompt

    def _finish(self, at_ns: int, names: Sequence[str], status: str) -> tuple[Any, ...]:
        return "finish", at_ns, [self._numbers.pop(name) for name in names], status

    def _schedule(self, at_ns: int, output: Any) -> tuple[Any, ...]:
        scheduled = output.num_scheduled_tokens
        names = list(scheduled)
        # Everybody decodes one token, as in the step before: nothing to say.
        if names == self._rows and output.total_num_scheduled_tokens == len(names) and not output.preempted_req_ids:
            return "schedule", at_ns, None, None, None, None
        self._rows = names
        rows, tokens = array("q", [self._numbers[name] for name in names]), array("q", scheduled.values())
        return "schedule", at_ns, rows.tobytes(), tokens.tobytes(), admitted(output, self._numbers), preempted(output, self._numbers)

    def _update(
        self, at_ns: int, parts: list[list[Any]], scored: list[str] | None, scores: Scores | None, state: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        said = parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))
        names = list(map(_name, said))
        rows = None
        if names != self._outputs:
            self._outputs = names
            rows = array("q", [self._numbers[name] for name in names]).tobytes()
        lists = list(map(_tokens, said))
        tokens = list(chain.from_iterable(lists))
        lengths = list(map(len, lists)) if self._speculative or len(tokens) != len(lists) else None
        logprobs = self._logprobs(names, scored, scores, anew=rows is not None)
        reasons = list(map(_reason, said))
        ends = None
        if reasons.count(None) != len(reasons):
            ended = [output for output in said if output.finish_reason is not None]
            ends = [(self._numbers.pop(o.request_id), str(o.finish_reason), o.stop_reason) for o in ended]
        return "update", at_ns, rows, array("q", tokens).tobytes(), lengths, ends, logprobs, state

    def _logprobs(
        self, names: list[str], scored: list[str] | None, scores: Scores | None, *, anew: bool
    ) -> tuple[list[int] | None, bytes, Others | None] | None:
        """The logprobs by row of the batch, and in which row each output is, unless as before."""
        if scored is not None:
            self._index = {name: row for row, name in enumerate(scored)}
        if scores is None or self._speculative:
            return None
        if scored is not None or anew:
            self._places = [self._index[name] for name in names]
            return self._places, *scores
        return None, *scores


class Translator(Protocol):
    """Makes plain values of calls, in the thread that sends them."""

    def calls(self, calls: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The calls as values that marshal takes."""
        ...


class Pipe:
    """The recorder's process and the two threads that feed it.

    One makes bytes of calls as soon as they come, the other writes them when the recorder takes them. What waits for a slow
    recorder is so a few objects and not the engine's own lists, of which thousands would keep the garbage collector at work.
    """

    def __init__(self, plain: Translator) -> None:
        self.over = False
        self._plain = plain
        self._calls: queue.SimpleQueue[list[tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # It leaves the engine's family at once: what stops or kills that does not stop who writes down how it ended.
        self._process = subprocess.Popen([sys.executable, "-m", PROGRAM], stdin=subprocess.PIPE, start_new_session=True)
        self._threads = [threading.Thread(target=work, name="tokentape-tap", daemon=True) for work in (self._pack, self._write)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def put(self, calls: list[tuple[Any, ...]]) -> bool:
        """Take calls in; False when too many wait already."""
        if not self.over:
            if self._calls.qsize() + self._frames.qsize() >= FRAMES_MAX:
                return False
            self._calls.put(calls)
        return True

    def close(self) -> None:
        """Hand over what waits; the recorder then ends by itself. Safe to call twice."""
        atexit.unregister(self.close)
        self._calls.put(None)
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _pack(self) -> None:
        while (calls := self._calls.get()) is not None:
            try:
                frame = marshal.dumps(self._plain.calls(calls))
            except (ValueError, TypeError, LookupError) as error:
                self._end(error)
                break
            del calls  # while the next ones are waited for nothing of the engine is held
            self._frames.put(SIZE.pack(len(frame)) + frame)
        self._frames.put(None)

    def _write(self) -> None:
        out = self._process.stdin
        assert out is not None
        try:
            while (frame := self._frames.get()) is not None:
                out.write(frame)
                out.flush()
            out.close()
            self._process.wait()
        except OSError as error:
            self._end(error)

    def _end(self, error: Exception) -> None:
        self.over = True
        sys.stderr.write(f"tokentape: nothing more of this engine run is recorded: {error or 'its recorder has ended'}\n")


def _others(logprobs: Any) -> Others:
    """All columns but the first, which is the sampled token's (`vllm.v1.outputs.LogprobsLists`)."""
    ids, scores = logprobs.logprob_token_ids[:, 1 : ALTERNATIVES_MAX + 1], logprobs.logprobs[:, 1 : ALTERNATIVES_MAX + 1]
    return ids.shape[1], ids.astype("int32").tobytes(), scores.tobytes()


def request_document(request: Any) -> dict[str, Any]:
    """A request of the engine core as JSON types, its prompt apart: everything that its numbers depend on."""
    import msgspec

    parameters = request.sampling_params
    return {
        "request_id": request.request_id,
        "arrival_time": request.arrival_time,
        "priority": request.priority,
        "client_index": request.client_index,
        "cache_salt": request.cache_salt,
        "sampling_params": msgspec.to_builtins(parameters, enc_hook=repr) if parameters is not None else None,
        "unrepeatable": _unrepeatable(request),
    }


def _unrepeatable(request: Any) -> list[str]:
    """What of a request keeps it from being replayed exactly, in words."""
    parameters = request.sampling_params
    said = {
        "a pooling request": request.pooling_params is not None,
        GRAMMAR: getattr(parameters, "structured_outputs", None) is not None,
        "images or other inputs that are no text": bool(getattr(request, "mm_features", None)),
        "prompt embeddings": getattr(request, "prompt_embeds", None) is not None,
        "a LoRA adapter": request.lora_request is not None,
        "an input that is still being sent": bool(getattr(request, "resumable", False)),
    }
    return [what for what, there in said.items() if there]


def marshal_safe(value: Any) -> Any:
    """A value made of what marshal takes: JSON types; sets become sorted lists."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kind in (int, float, str):  # subclasses: enumerations, versions
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        return {str(key): marshal_safe(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(marshal_safe(item) for item in value)
    if isinstance(value, list | tuple):
        return [marshal_safe(item) for item in value]
    return str(value)
