"""The calls of an engine core as events: the steps in a platform session, requests and tokens in a session of their owner."""

from __future__ import annotations

import json
import math
import struct
import uuid
from array import array
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from ingest.recorder import Recorder
from ingest.vllm.kv.scribe import KvScribe
from ingest.vllm.names import Named, named
from ingest.vllm.tap import Others
from schemas import events as e
from schemas.enginerun import calls, facts
from schemas.enginerun.decisions import Decision, Differences, Place
from schemas.enginerun.sessions import steps_session
from schemas.environment import capture
from schemas.requests.recorded import ENGINE
from schemas.settings import Settings
from schemas.sink import SessionContext, new_id

log = structlog.get_logger(__name__)

Frame = list[tuple[Any, ...]]

Logprobs = tuple[list[int] | None, bytes, Others | None]
"""In which row of the batch each output is, None: as before; the sampled tokens' logprobs (float32), and what else might have been said."""


@dataclass(slots=True)
class _Sequence:
    """One sequence while it is generated; `begun_ns` on the engine's clock."""

    number: int
    generation: _Generation
    index: int
    begun_ns: int
    alternatives: int | None
    """How many were asked for; None: no logprobs either."""
    started: bool = False
    tokens: int = 0


@dataclass(slots=True)
class _Generation:
    """The sequences of one request of a client."""

    generation_id: bytes
    first: int
    document: dict[str, Any]
    prompt: bytes
    begun_ns: int
    cached: int | None = None
    first_token_us: int | None = None
    live: int = 0
    sequences: int = 0
    tokens: int = 0


def content_allowed(settings: Settings) -> bool:
    """Patterns of redaction are looked for in texts; token ids spell a text out that none of them would see."""
    policy = settings.redaction.of(settings.tenant)
    return policy.content == "full" and not policy.builtin and not policy.rules


class Scribe:
    """Turns the frames of one engine run into events."""

    def __init__(self, recorder: Recorder, settings: Settings) -> None:
        self._recorder = recorder
        self._settings = settings
        self.engine_run = new_id()
        self._content = content_allowed(settings)
        self._owner = SessionContext(
            self.engine_run, settings.tenant, "engine", "", settings.retention_class, content=self._content, sample_rate=1.0
        )
        steps = steps_session(self.engine_run)
        self._steps = SessionContext(steps, e.PLATFORM_TENANT, "engine", salt=None, sample_rate=1.0)
        self._differences = Differences(self.engine_run)
        self._pending: list[calls.Call] = []
        self._decided: deque[tuple[int, Decision]] = deque()
        self._last = Decision((), ())
        self._sequences: dict[int, _Sequence] = {}
        self._places: dict[int, Place] = {}
        self._ended: set[int] = set()
        self._taken: dict[bytes, set[int]] = {}
        self._parents: dict[str, _Generation] = {}
        self._outputs: list[int] = []
        self._rows: list[int] = []
        self._step = 0
        self._updated_ns = 0
        self._model: str | None = None
        self._environment: bytes | None = None
        self._kv: KvScribe | None = None

    def frame(self, frame: Frame) -> None:
        """Record the calls of a frame."""
        for call in frame:
            getattr(self, f"_on_{call[0]}")(*call[1:])

    def close(self) -> None:
        """The engine has ended: what was still open stays as it is, and the last calls are written down."""
        if self._pending:
            self._record_step(self._decided[0][1] if self._decided else Decision((), ()), [], 0, (0, 0, None))
        if self._kv is not None:
            self._kv.close()
        for context in (self._owner, self._steps):
            self._recorder.record(context, e.SessionClosed(reason="engine ended"))

    def _on_header(self, header: dict[str, Any]) -> None:
        self._model = header["model"]
        found = header["facts"] | {"config.arguments": header["arguments"]}
        found["config.model_config.weights"] = facts.weights_digest(Path(header["model"]))
        event = capture(facts.items_of(found), origin="engine", unknown=[] if found["config.workers"] else ["config.workers"])
        self._environment = event.environment_id
        tags = ["engine"] if self._content else ["engine", "without content"]
        self._recorder.record(self._owner, e.SessionOpened(workflow="engine", purpose="engine run", tags=tags))
        self._recorder.record(self._owner, event)
        self._recorder.record(self._steps, e.SessionOpened(workflow="engine", purpose="engine steps", parent_session=self.engine_run))
        self._pending += [calls.Unrepeatable(what) for what in header["unrepeatable"]]
        if header.get("kv_engine"):
            self._kv = KvScribe(self._recorder, self._settings, header["kv_engine"], self.engine_run, content=self._content)
        log.info("engine run", engine_run=str(uuid.UUID(bytes=self.engine_run)), model=self._model, content=self._content)

    def _on_idle(self) -> None:
        self._pending.append(calls.Idle())

    def _on_reset(self, running: bool) -> None:
        self._pending.append(calls.Reset(running))

    def _on_kv(self, operation: dict[str, Any]) -> None:
        assert self._kv is not None, "an engine without a KV connector has no operations of one"
        self._kv.told(operation)

    def _on_lost(self, count: int) -> None:
        self._pending.append(calls.Unrepeatable(f"{count} calls that the recorder could not follow"))
        self._recorder.record(self._steps, e.RecordsLost(reason="engine_ahead", count=count))

    def _on_arrive(self, at_ns: int, number: int, document: dict[str, Any], prompt: bytes) -> None:
        name = named(document["request_id"])
        generation = self._parents.get(name.parent)
        first = generation is None
        if generation is None:
            generation = self._parents[name.parent] = _Generation(name.generation_id or new_id(), number, document, prompt, at_ns)
        index = self._free_index(generation.generation_id, name.prompt + name.child)
        generation.live += 1
        generation.sequences += 1
        parameters = document["sampling_params"] or {}
        self._sequences[number] = _Sequence(number, generation, index, at_ns, parameters.get("logprobs"))
        self._places[number] = (generation.generation_id, index)
        self._pending.append(calls.Arrive() if first else _beside(generation, name.child, index, document, prompt))
        self._pending += [calls.Unrepeatable(what) for what in document["unrepeatable"]]
        if first:
            self._record_request(generation, name, index)
            if self._kv is not None:
                self._kv.met(name.parent, generation.generation_id)

    def _free_index(self, generation_id: bytes, wanted: int) -> int:
        taken = self._taken.setdefault(generation_id, set())
        while wanted in taken:
            wanted += 1
        taken.add(wanted)
        return wanted

    def _record_request(self, generation: _Generation, name: Named, index: int) -> None:
        ids = array("q", generation.prompt).tolist()
        document = generation.document
        parameters = document["sampling_params"] or {}
        said = {"number": generation.first, "index": index, **document}
        self._recorder.record(
            self._owner,
            e.RequestSubmitted(
                generation_id=generation.generation_id,
                endpoint=ENGINE,
                model=self._model,
                seed=parameters.get("seed"),
                temperature=parameters.get("temperature"),
                max_tokens=parameters.get("max_tokens"),
                priority=str(document["priority"]),
                client_request_id=name.external,
                environment_id=self._environment,
                content=e.RequestContent(parameters=json.dumps(said, sort_keys=True)),
            ),
        )
        self._recorder.record(
            self._owner,
            e.GenerationStarted(
                generation_id=generation.generation_id,
                authoritative="gateway" if name.generation_id else "engine",
                upstream_id=name.external,
                model=self._model,
                prompt_tokens=len(ids),
                content=e.GenerationContent(prompt_token_ids=ids),
                environment_id=self._environment,
            ),
        )

    def _on_schedule(
        self, at_ns: int, rows: bytes | None, tokens: bytes | None, computed: list[tuple[int, int]] | None, preempted: list[int] | None
    ) -> None:
        if rows is None:
            decision = replace(self._last, tokens=(1,) * len(self._last.numbers), computed=(), preempted=())
        else:
            assert tokens is not None
            decision = Decision(tuple(array("q", rows)), tuple(array("q", tokens)), tuple(computed or ()), tuple(preempted or ()))
        self._last = decision
        self._pending.append(calls.Schedule())
        if decision.preempted:
            self._pending.append(calls.Preempt(decision.preempted))
        for number, cached in decision.computed:
            if cached:
                self._pending.append(calls.Cached(number, cached))
            generation = self._sequences[number].generation
            if generation.cached is None:
                generation.cached = cached
        self._decided.append((at_ns, decision))

    def _on_update(
        self,
        at_ns: int,
        outputs: bytes | None,
        tokens: bytes,
        lengths: list[int] | None,
        ends: list[tuple[int, str, Any]] | None,
        logprobs: Logprobs | None,
        state: tuple[int, int, float],
    ) -> None:
        if outputs is not None:
            self._outputs = array("q", outputs).tolist()
        self._pending.append(calls.Update())
        self._tokens(at_ns, array("q", tokens).tolist(), lengths, logprobs)
        begun_ns, decision = self._decided.popleft()
        finished = [number for number, _, _ in ends or ()]
        self._record_step(decision, finished, (at_ns - max(begun_ns, self._updated_ns)) // 1000, state)
        self._updated_ns = at_ns
        for number, reason, stop in ends or ():
            self._end(number, at_ns, reason, stop)

    def _tokens(self, at_ns: int, tokens: list[int], lengths: list[int] | None, logprobs: Logprobs | None) -> None:
        scores: tuple[float, ...] = ()
        others: Others | None = None
        if logprobs is not None:
            self._rows = logprobs[0] if logprobs[0] is not None else self._rows
            scores, others = struct.unpack(f"<{len(logprobs[1]) // 4}f", logprobs[1]), logprobs[2]
        at = 0
        for place, number in enumerate(self._outputs):
            size = 1 if lengths is None else lengths[place]
            if size:
                sequence = self._sequences[number]
                row = self._rows[place] if scores and sequence.alternatives is not None and size == 1 else None
                score = () if row is None else (scores[row],)
                asked = sequence.alternatives
                beside = [_alternatives(others, row, asked)] if others and asked and row is not None else []
                self._said(sequence, at_ns, tokens[at : at + size], score, beside)
            at += size

    def _said(
        self, sequence: _Sequence, at_ns: int, tokens: list[int], logprobs: tuple[float, ...], alternatives: list[list[e.Alternative]]
    ) -> None:
        generation = sequence.generation
        offset_us = (at_ns - generation.begun_ns) // 1000
        if not sequence.started:
            sequence.started = True
            started = e.SequenceStarted(generation_id=generation.generation_id, index=sequence.index, offset_us=offset_us)
            self._recorder.record(self._owner, started)
        if generation.first_token_us is None:
            generation.first_token_us = offset_us
        self._recorder.tokens(
            self._owner,
            generation.generation_id,
            sequence.index,
            sequence.tokens,
            offset_us,
            token_ids=tokens,
            logprobs=logprobs,
            alternatives=alternatives,
        )
        sequence.tokens += len(tokens)
        generation.tokens += len(tokens)

    def _on_finish(self, at_ns: int, numbers: list[int], status: str) -> None:
        self._pending.append(calls.Finish(tuple(numbers), status))
        for number in numbers:
            self._end(number, at_ns, "abort" if status == "FINISHED_ABORTED" else "error", None)

    def _end(self, number: int, at_ns: int, reason: str, stop: Any) -> None:
        sequence = self._sequences.pop(number)
        self._ended.add(number)
        generation = sequence.generation
        offset_us = (at_ns - generation.begun_ns) // 1000
        self._recorder.record(
            self._owner,
            e.SequenceFinished(
                generation_id=generation.generation_id,
                index=sequence.index,
                tokens=sequence.tokens,
                finish_reason=reason,
                stop_reason=None if stop is None else str(stop),
                offset_us=offset_us,
            ),
        )
        generation.live -= 1
        if not generation.live:
            self._finish(generation, offset_us)

    def _finish(self, generation: _Generation, offset_us: int) -> None:
        self._parents.pop(named(generation.document["request_id"]).parent, None)
        self._taken.pop(generation.generation_id, None)
        self._recorder.record(
            self._owner,
            e.GenerationFinished(
                generation_id=generation.generation_id,
                sequences=generation.sequences,
                tokens_recorded=generation.tokens,
                prompt_tokens=len(generation.prompt) // 8,
                completion_tokens=generation.tokens,
                cached_tokens=generation.cached,
                first_token_us=generation.first_token_us,
                offset_us=offset_us,
            ),
        )

    def _record_step(self, decision: Decision, finished: list[int], duration_us: int, state: tuple[int, int, float | None]) -> None:
        running, waiting, kv_used = state
        entries = self._differences.entries(decision, self._places.__getitem__)
        self._recorder.record(
            self._steps,
            e.EngineStep(
                engine_run=self.engine_run,
                step=self._step,
                duration_us=max(0, duration_us),
                waiting=waiting,
                running=running,
                preempted=len(decision.preempted),
                kv_used=kv_used,
                entries=entries,
                record=calls.encode(self._pending),
                checksum=decision.checksum(finished),
            ),
        )
        self._step += 1
        self._pending = []
        self._forget(decision)

    def _forget(self, decision: Decision) -> None:
        """Places of sequences that have ended and stand in no step any more need not be remembered."""
        still = {number for _, later in self._decided for number in later.numbers} | set(decision.numbers)
        for number in self._ended - still:
            self._ended.discard(number)
            del self._places[number]


class WorkerScribe:
    """Turns the frames of a worker's process, or of an engine whose scheduler is not recorded, into events: KV operations."""

    def __init__(self, recorder: Recorder, settings: Settings) -> None:
        self._recorder, self._settings = recorder, settings
        self._kv: KvScribe | None = None

    def frame(self, frame: Frame) -> None:
        """Record the operations of a frame."""
        for kind, what in frame:
            if kind == "kv_header":
                self._kv = KvScribe(self._recorder, self._settings, what, None, content=content_allowed(self._settings))
            elif kind == "kv" and self._kv is not None:
                self._kv.told(what)

    def close(self) -> None:
        """The process has ended."""
        if self._kv is not None:
            self._kv.close()


def _alternatives(others: Others, row: int, count: int) -> list[e.Alternative]:
    """The likeliest of a row by id, for the engine has no texts; `count` -1 is all there are. What cannot be said is none."""
    width, ids, logprobs = others
    taken = width if count < 0 else min(count, width)
    at = 4 * row * width
    found = zip(struct.unpack_from(f"<{taken}i", ids, at), struct.unpack_from(f"<{taken}f", logprobs, at), strict=True)
    return [e.Alternative("", token_id, logprob) for token_id, logprob in found if logprob > -math.inf]


def _beside(generation: _Generation, child: int, index: int, document: dict[str, Any], prompt: bytes) -> calls.Call:
    """The arrival of a further sequence: like the first but for its name and its seed, which rises."""
    first, own = dict(generation.document), dict(document)
    before, after = first.pop("sampling_params") or {}, own.pop("sampling_params") or {}
    more = (after.get("seed") or 0) - (before.get("seed") or 0)
    del first["request_id"], own["request_id"]
    if prompt != generation.prompt or first != own or {**before, "seed": None} != {**after, "seed": None} or more < 0:
        return calls.Unrepeatable("sequences of one request that were asked for differently")
    return calls.ArriveBeside(generation.first, child, index, more)
