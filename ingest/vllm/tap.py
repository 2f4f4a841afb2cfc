"""What an engine core says of its calls, in a few microseconds each: all encoding is done by a process of its own.

The engine's thread makes bytes of what it has at hand while it is still in the processor's cache, and notes only what is not
as it was in the step before. A few times a second another thread hands that, as one frame, to the recorder's process
(`tokentape.engine`). That one outlives the engine: what was sent is on the tape even if the engine is killed. A recorder
that cannot follow never holds the engine up, and what goes wrong here never ends it: calls are let go and counted, the tape
says so, and those that come later are told anew.
"""

from __future__ import annotations

import atexit
import fcntl
import marshal
import queue
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from numbers import Integral, Real
from typing import Any

from ingest.coalesce import ALTERNATIVES_MAX
from schemas.enginerun.decisions import admitted, preempted
from schemas.enginerun.facts import GRAMMAR

FRAME_CALLS = 64
"""Calls in one frame at most …"""
FRAME_NS = 50_000_000
"""… and this is how long one waits for company while the engine works."""
WAITING_BYTES_MAX = 512 * 1024 * 1024
"""Frames that wait for the recorder before calls are let go: some twenty minutes of an engine that says 20,000 tokens a second. So long may
the recorder take to begin, for it reads all weights once."""
RESTART_S, RESTART_MAX_S = 1.0, 600.0
"""A recorder that ended is followed by another: at once, or where each ends soon after its start, each time after twice as long."""
HANDOVER_S = 0.05
"""How long an engine that has nothing more to do waits at most until what it said is out of its hands; it takes some 200 µs."""
CLOSE_S = 5.0
"""How long the end of an engine waits until all that it said is handed over; vLLM kills an engine that takes longer."""
PIPE_BYTES = 1 << 20
"""What the system holds for a recorder that rests; what is in there outlives the engine."""
PROGRAM = "tokentape.engine"
"""The module that runs as the recorder's process."""
SIZE = struct.Struct("<I")
UNKNOWN = -1
"""The number of a request whose arrival was not told: after a loss, what concerns it is left out."""

Call = tuple[Any, ...]
"""What was called, and what there is to say of it."""

Others = tuple[int, bytes, bytes]
"""What else might have been said, by row of a batch: how many in a row, their ids (int32) and their logprobs (float32), likeliest first."""

Logprobs = tuple[list[int] | None, bytes | None, bytes, Others | None]
"""In which row of the batch each output is, None: as before; by row of the batch the sampled tokens' ids (int32), None: they stand with
the outputs, and their logprobs (float32); and the others, where somebody asked for any."""


class RecorderEnded(Exception):
    """The process that recorded this engine run was killed, or could not go on."""


class Tap:
    """One engine run's calls on their way to the recorder: numbers for names, and nothing that is as before.

    Its methods are called by the engine's thread alone, and raise nothing.
    """

    def __init__(self, header: dict[str, Any], *, caching: bool) -> None:
        self._caching = caching
        self._speculative = "speculative decoding" in header["unrepeatable"]
        self._by_row = not self._speculative
        self._clean = True
        self._open: deque[list[str]] = deque()  # names of those in the steps that are scheduled and not yet taken in
        self._numbers: dict[str, int] = {}  # of the live requests
        self._arrived = 0
        # What the recorder was told last: names of the step's rows, of the outputs, and of the rows with logprobs.
        self._rows: list[str] = []
        self._outputs: list[str] = []
        self._scored: list[str] = []
        self._calls: list[Call] = [("header", marshal_safe(header))]
        self._begun_ns = self._sent_ns = time.monotonic_ns()
        self.pipe, self._epoch = Pipe(), 0
        atexit.register(self.close)  # for a program that ends without ending its engine
        self._send()

    def arrived(self, request: Any, *, idle: bool) -> None:
        """A request came."""
        if idle and not self._open and (self._clean or not self._caching):
            self._calls.append(("idle",))
        self._clean = False
        number, self._arrived = self._arrived, self._arrived + 1
        self._numbers[request.request_id] = number
        self._calls.append(("arrive", time.monotonic_ns(), number, request))
        if idle:
            self._send()  # whatever becomes of the first step, the tape knows that there was work

    def finished(self, names: Sequence[str], status: str, *, idle: bool) -> None:
        """Requests were ended from outside."""
        numbers = [self._numbers.pop(name) for name in names if name in self._numbers]
        self._calls.append(("finish", time.monotonic_ns(), numbers, status))
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
        try:
            self._calls.append(self._schedule(output))
            self._open.append(self._rows)
        except Exception as error:  # whatever it is, the engine goes on
            self._open.append([])
            self._lose([], error)

    def updated(self, outputs: Any, result: Any, scheduler: Any, *, ended: bool) -> None:
        """`update_from_output` took the oldest step's result in; `ended`: it has finished requests."""
        now_ns = time.monotonic_ns()
        try:
            step = self._open.popleft()
            update = self._steady(step, outputs, result) if not ended else None
            said = update or self._update(step, outputs, result, scheduler.requests)
            state = (len(scheduler.running), len(scheduler.waiting), scheduler.kv_cache_manager.usage)
            self._calls.append(("update", now_ns, *said, state))
        except Exception as error:  # whatever it is, the engine goes on
            self._lose([], error)
        if not scheduler.requests:
            self._send()
            self.pipe.await_handover()  # vLLM kills an engine core right after its last answer, if it is to stop
        elif len(self._calls) >= FRAME_CALLS or now_ns - self._sent_ns > FRAME_NS:
            self._send()

    def close(self) -> None:
        """The engine ends: hand over all of it, or say that it is missing, and that this was all. Safe to call twice."""
        atexit.unregister(self.close)
        self._send()
        if self._calls:
            self.pipe.put(self._calls, epoch=self._epoch, room=True)
        self.pipe.put([("end",)], room=True)
        self._calls = []
        self.pipe.close()

    def _schedule(self, output: Any) -> Call:
        scheduled = output.num_scheduled_tokens
        names = list(scheduled)
        # Everybody decodes one token, as in the step before: nothing to say.
        if names == self._rows and output.total_num_scheduled_tokens == len(names) and not output.preempted_req_ids:
            return "schedule", self._begun_ns, None, None, None, None
        self._rows = names
        rows, tokens = self._numbers_of(names), array("q", scheduled.values()).tobytes()
        return "schedule", self._begun_ns, rows, tokens, admitted(output, self._numbers), preempted(output, self._numbers)

    def _steady(self, step: list[str], outputs: Any, result: Any) -> tuple[Any, ...] | None:
        """What there is to say where all that are in the step say one token as in the step before: no output is looked at. None elsewhere.

        The token that was sampled is the first of its row of logprobs (`vllm.v1.outputs.LogprobsLists`), as the steps before have shown.
        """
        found = getattr(result, "logprobs", None)
        if step is not self._outputs or found is None or not self._by_row or len(outputs) != 1:
            return None
        (part,) = outputs.values()
        if not len(part.outputs) == len(step) == len(self._scored) == len(found.logprobs) or result.req_ids != self._scored:
            return None
        ids = found.logprob_token_ids[:, 0].astype("int32").tobytes()
        return None, None, None, None, (None, ids, *_scores(found))

    def _update(self, step: list[str], outputs: Any, result: Any, requests: Any) -> tuple[Any, ...]:
        said = [output for part in outputs.values() for output in part.outputs]
        names = [output.request_id for output in said]
        rows = self._numbers_of(names) if names != self._outputs else None
        self._outputs = step if names == step else names
        lists = [output.new_token_ids for output in said]
        lengths = None
        try:
            tokens = [token for (token,) in lists]
        except ValueError:  # not one token each
            tokens, lengths = list(chain.from_iterable(lists)), list(map(len, lists))
        logprobs = self._logprobs(result, anew=rows is not None)
        if logprobs is not None and logprobs[0] is not None and lengths is None:
            first = result.logprobs.logprob_token_ids[:, 0].tolist()
            self._by_row &= tokens == [first[row] for row in logprobs[0]]
        ended = [output for output in said if output.finish_reason is not None]
        return rows, array("q", tokens).tobytes(), lengths, self._ends(ended, requests) if ended else None, logprobs

    def _logprobs(self, result: Any, *, anew: bool) -> Logprobs | None:
        found = getattr(result, "logprobs", None)
        if found is None or self._speculative:
            return None
        places = None
        if anew or result.req_ids != self._scored:
            self._scored = list(result.req_ids)
            at = {name: row for row, name in enumerate(self._scored)}
            places = [at.get(name, 0) for name in self._outputs]  # who failed before its first step has an end and no row
        return places, None, *_scores(found)

    def _ends(self, ended: list[Any], requests: Any) -> list[tuple[int, str, Any]] | None:
        """A turn of an input that is still being sent ends too, and its request lives on."""
        final = [one for one in ended if one.request_id not in requests or requests[one.request_id].is_finished()]
        return [(self._numbers.pop(one.request_id, UNKNOWN), str(one.finish_reason), marshal_safe(one.stop_reason)) for one in final]

    def _numbers_of(self, names: list[str]) -> bytes:
        return array("q", [self._numbers.get(name, UNKNOWN) for name in names]).tobytes()

    def _send(self) -> None:
        calls, self._calls = self._calls, []
        self._sent_ns = time.monotonic_ns()
        if self._epoch != self.pipe.epoch:  # to another recorder it is another run
            self._epoch, self._arrived = self.pipe.epoch, 0
            self._numbers.clear()
            self._lose(calls, RecorderEnded())
        elif calls and not self.pipe.put(calls, epoch=self._epoch):
            self._lose(calls)

    def _lose(self, calls: list[Call], error: Exception | None = None) -> None:
        """These calls, or one that failed, will not be known: say how many, who lives and how many steps are open, and all else anew."""
        for call in calls:
            if call[0] == "arrive":
                self._numbers.pop(call[3].request_id, None)
                self._arrived = min(self._arrived, call[2])  # numbers on the tape have no gap
        lost = sum(call[1] if call[0] == "lost" else 1 for call in calls) or 1
        self._calls.append(("lost", lost, repr(error) if error else "", list(self._numbers.values()), len(self._open)))
        self._rows, self._outputs, self._scored = [], [], []


class Pipe:
    """The recorder's process and the two threads that feed it.

    One makes bytes of calls as soon as they come, the other writes them when the recorder takes them. What waits for a slow
    recorder is so a few objects and not the engine's own lists, of which thousands would keep the garbage collector at work.
    """

    def __init__(self) -> None:
        self.over = False
        self.epoch = 0
        """How many recorders have ended: the one of now knows the first frame, and what was put in its own epoch or in none."""
        self._packed = self._written = 0  # bytes, each counted by one thread
        self._put = self._done = 0  # frames
        self._counting = threading.Lock()
        self._calls: queue.SimpleQueue[tuple[int | None, list[Call]] | None] = queue.SimpleQueue()
        self._frames: queue.SimpleQueue[tuple[int | None, bytes] | None] = queue.SimpleQueue()
        self._patience_s = RESTART_S
        self._process = self._start()
        self._threads = [threading.Thread(target=work, name="tokentape-tap", daemon=True) for work in (self._pack, self._write)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def put(self, calls: list[Call], *, epoch: int | None = None, room: bool = False) -> bool:
        """Take calls in, of an epoch or for any; False when too much waits already, unless there is to be room for these."""
        if not self.over:
            if self._packed - self._written > WAITING_BYTES_MAX and not room:
                return False
            with self._counting:
                self._put += 1
            self._calls.put((epoch, calls))
        return True

    def await_handover(self) -> None:
        """Return when all that was put is in the pipe, which outlives this process; a recorder that takes nothing is not waited for."""
        deadline = time.monotonic() + HANDOVER_S
        while self._done < self._put and not self.over and time.monotonic() < deadline:
            if self._packed - self._written > PIPE_BYTES:
                break
            time.sleep(HANDOVER_S / 500)

    def close(self) -> None:
        """Hand over what waits; the recorder then ends by itself. Safe to call twice."""
        atexit.unregister(self.close)
        self._calls.put(None)
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _pack(self) -> None:
        while (item := self._calls.get()) is not None:
            epoch, calls = item
            try:
                frame = marshal.dumps([_plain(call) for call in calls])
            except Exception as error:  # whatever it is, the tape says it
                self._end(error)
                frame = marshal.dumps([("over", repr(error))])
            del item, calls  # while the next ones are waited for nothing of the engine is held
            self._packed += len(frame)
            self._frames.put((epoch, SIZE.pack(len(frame)) + frame))
            if self.over:
                break
        self._frames.put(None)

    def _write(self) -> None:
        first: bytes | None = None
        while (item := self._frames.get()) is not None:
            epoch, frame = item
            first = first or frame
            if epoch in (None, self.epoch):
                try:
                    self._hand_over(frame)
                except OSError as error:
                    self._restart(first, error)
            self._written += len(frame) - SIZE.size
            self._done += 1
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()

    def _hand_over(self, frame: bytes) -> None:
        out = self._process.stdin
        assert out is not None
        out.write(frame)
        out.flush()

    def _start(self) -> subprocess.Popen[bytes]:
        """It leaves the engine's family at once: what stops or kills that does not stop who writes down how it ended."""
        self._began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", PROGRAM], stdin=subprocess.PIPE, start_new_session=True)
        with suppress(OSError, AttributeError):  # a system may allow less, or have no such thing
            fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)  # type: ignore[arg-type]
        return process

    def _restart(self, first: bytes, error: OSError) -> None:
        """Begin with another recorder, for which this is another engine run. One that ends at once is waited for longer each time."""
        sys.stderr.write(f"tokentape: the recorder of this engine has ended ({error}); another one begins\n")
        while True:
            lived_s = time.monotonic() - self._began
            self._patience_s = min(2 * self._patience_s, RESTART_MAX_S) if lived_s < RESTART_MAX_S else RESTART_S
            time.sleep(max(0.0, self._patience_s / 2 - lived_s))
            with suppress(OSError):
                self._process.stdin.close()  # type: ignore[union-attr]
            self._process.wait()
            with suppress(OSError):  # this one has ended too, or there is no room for a process
                self._process = self._start()
                self._hand_over(first)
                break
        self.epoch += 1

    def _end(self, error: Exception) -> None:
        self.over = True
        sys.stderr.write(f"tokentape: nothing more of this engine run is recorded: {error or 'its recorder has ended'}\n")


def _plain(call: Call) -> Call:
    """A call without objects of vLLM or of a KV connector."""
    if call[0] == "arrive":
        _, at_ns, number, request = call
        prompt = array("q", request.prompt_token_ids or ()).tobytes()
        return "arrive", at_ns, number, marshal_safe(request_document(request)), prompt
    return ("kv", marshal_safe(call[1])) if call[0] == "kv" else call


def _scores(logprobs: Any) -> tuple[bytes, Others | None]:
    """Copies, for the arrays may be written again in the next step: the first column, which is the sampled token's, and the others."""
    return logprobs.logprobs[:, 0].tobytes(), _others(logprobs) if logprobs.logprobs.shape[1] > 1 else None


def _others(logprobs: Any) -> Others:
    """All columns but the first."""
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
    """A value made of what marshal takes: JSON types and bytes; sets become sorted lists."""
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, Integral | Real | str):  # subclasses and NumPy's numbers: enumerations, versions
        return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else str(value)
    if isinstance(value, dict):
        return {str(key): marshal_safe(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(marshal_safe(item) for item in value)
    if isinstance(value, list | tuple):
        return [marshal_safe(item) for item in value]
    return str(value)
