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
from ingest.vllm.tap import Logprobs
from schemas import events as e
from schemas.enginerun import calls, facts
from schemas.enginerun.decisions import Decision, Differences, Place
from schemas.enginerun.sessions import CUT_OFF, ENDED, steps_session
from schemas.environment import capture
from schemas.errors import InvalidEvent, TokentapeError
from schemas.requests.recorded import ENGINE
from schemas.settings import Settings
from schemas.sink import SessionContext, new_id

log = structlog.get_logger(__name__)

Frame = list[tuple[Any, ...]]


ENGINE_AHEAD, RECORDER_FAILED = "engine_ahead", "recorder_failed"
"""Why calls of an engine are not on the tape: the recorder could not follow, or could not record them."""
_NOBODY = Decision((), ())
"""The decision of a step that is not known."""


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


class _Calls:
    """Does what the calls of a frame say. One that cannot be recorded is told of, and those after it are recorded."""

    def frame(self, frame: Frame) -> None:
        """Record the calls of a frame. Raises what keeps all from being recorded: the event log's own errors."""
        for kind, *said in frame:
            try:
                getattr(self, f"_on_{kind}")(*said)
            except Exception as error:
                if isinstance(error, TokentapeError) and not isinstance(error, InvalidEvent):
                    raise
                log.exception("a call of the engine is not recorded", call=kind)
                self._failed(kind, f"{type(error).__name__}: {error}")

    def _failed(self, kind: str, why: str) -> None:
        raise NotImplementedError


class Scribe(_Calls):
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
        self._open = 0
        self._last = _NOBODY
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
        self._reason: str | None = None

    def close(self) -> None:
        """The engine has ended: what was still open stays as it is, and the last calls are written down."""
        if self._pending:
            self._record_step(self._decided[0][1] if self._decided else _NOBODY, [], 0, (0, 0, None))
        working = self._open or self._places.keys() - self._ended
        reason = self._reason or (CUT_OFF if working else ENDED)  # vLLM kills an engine that has no more work, too
        if self._kv is not None:
            self._kv.close(reason)
        for context in (self._owner, self._steps):
            self._recorder.record(context, e.SessionClosed(reason=reason))

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

    def _failed(self, kind: str, why: str) -> None:
        if kind == "kv":
            self._on_kv_lost(1, RECORDER_FAILED)
        else:
            self._on_lost(1, why, list(self._places), self._open)

    def _on_kv_lost(self, count: int, reason: str = ENGINE_AHEAD) -> None:
        if self._kv is not None:
            self._kv.lost(count, reason)

    def _on_lost(self, count: int, why: str, live: list[int], still_open: int) -> None:
        """What the live ones said meanwhile is missing, so they stay as they are: without an end, in a session that says so."""
        self._pending.append(calls.Unrepeatable(f"calls not recorded ({count}): {why or 'the recorder could not follow'}"))
        self._tell_loss(count, RECORDER_FAILED if why else ENGINE_AHEAD)
        for by_request in (self._sequences, self._parents, self._taken, self._ended):
            by_request.clear()
        known = set(live)
        self._places = {number: place for number, place in self._places.items() if number in known}
        self._differences.restart()
        self._open = still_open
        self._decided = deque([(0, _NOBODY)] * still_open)
        self._last, self._outputs, self._rows = _NOBODY, [], []

    def _on_end(self) -> None:
        self._reason = ENDED

    def _on_over(self, why: str) -> None:
        self._reason = f"no longer recorded: {why}"
        self._tell_loss(1, RECORDER_FAILED)

    def _tell_loss(self, count: int, reason: str) -> None:
        for context in (self._owner, self._steps):
            self._recorder.record(context, e.RecordsLost(reason=reason, count=count, kinds=[e.Count(key="engine_call", count=count)]))

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
        self._open += 1
        if rows is None:
            decision = replace(self._last, tokens=(1,) * len(self._last.numbers), computed=(), preempted=())
        else:
            assert tokens is not None
            pairs = zip(array("q", rows), array("q", tokens), strict=True)
            known = {number: count for number, count in pairs if number in self._places}
            decision = Decision(tuple(known), tuple(known.values()), tuple(computed or ()), tuple(preempted or ()))
        self._last = decision
        self._pending.append(calls.Schedule())
        if decision.preempted:
            self._pending.append(calls.Preempt(decision.preempted))
        for number, cached in decision.computed:
            if cached:
                self._pending.append(calls.Cached(number, cached))
            sequence = self._sequences.get(number)
            if sequence is not None and sequence.generation.cached is None:
                sequence.generation.cached = cached
        self._decided.append((at_ns, decision))

    def _on_update(
        self,
        at_ns: int,
        outputs: bytes | None,
        tokens: bytes | None,
        lengths: list[int] | None,
        ends: list[tuple[int, str, Any]] | None,
        logprobs: Logprobs | None,
        state: tuple[int, int, float],
    ) -> None:
        self._open -= 1
        if outputs is not None:
            self._outputs = array("q", outputs).tolist()
        self._pending.append(calls.Update())
        self._tokens(at_ns, tokens, lengths, logprobs)
        begun_ns, decision = self._decided.popleft() if self._decided else (at_ns, _NOBODY)
        finished = [number for number, _, _ in ends or ()]
        self._record_step(decision, finished, (at_ns - max(begun_ns, self._updated_ns)) // 1000, state)
        self._updated_ns = at_ns
        for number, reason, stop in ends or ():
            self._end(number, at_ns, reason, stop)

    def _tokens(self, at_ns: int, said: bytes | None, lengths: list[int] | None, logprobs: Logprobs | None) -> None:
        scores: tuple[float, ...] = ()
        others: _Read | None = None
        tokens = array("q", said or b"").tolist()
        if logprobs is not None:
            rows, ids, logprob, beside = logprobs
            others = None if beside is None else _read(*beside)
            self._rows = rows if rows is not None else self._rows
            scores = struct.unpack(f"<{len(logprob) // 4}f", logprob)
            if ids is not None:
                by_row = struct.unpack(f"<{len(ids) // 4}i", ids)
                tokens = [by_row[row] for row in self._rows]
        at = 0
        for place, number in enumerate(self._outputs):
            size = 1 if lengths is None else lengths[place]
            sequence = self._sequences.get(number)
            if size and sequence is not None:
                row = self._rows[place] if scores and sequence.alternatives is not None and size == 1 else None
                score = () if row is None else (scores[row],)
                asked = sequence.alternatives
                told = [_alternatives(others, row, asked)] if others and asked and row is not None else []
                self._said(sequence, at_ns, tokens[at : at + size], score, told)
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
        sequence = self._sequences.pop(number, None)
        if number in self._places:
            self._ended.add(number)
        if sequence is None:  # it lived through a loss
            return
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


class WorkerScribe(_Calls):
    """Turns the frames of a worker's process, or of an engine whose scheduler is not recorded, into events: KV operations."""

    def __init__(self, recorder: Recorder, settings: Settings, engine_id: str) -> None:
        self._kv = KvScribe(recorder, settings, engine_id, None, content=content_allowed(settings))
        self._reason = ENDED  # of a worker nobody asks whether it ended by itself

    def close(self) -> None:
        """The process has ended."""
        self._kv.close(self._reason)

    def _failed(self, kind: str, why: str) -> None:
        self._kv.lost(1, RECORDER_FAILED)

    def _on_kv_header(self, engine_id: str) -> None:
        """It is what this object was made for."""

    def _on_kv(self, operation: dict[str, Any]) -> None:
        self._kv.told(operation)

    def _on_kv_lost(self, count: int) -> None:
        self._kv.lost(count, ENGINE_AHEAD)

    def _on_over(self, why: str) -> None:
        self._reason = f"no longer recorded: {why}"
        self._kv.lost(1, RECORDER_FAILED)


_Read = tuple[int, tuple[int, ...], tuple[float, ...]]
"""What else might have been said: how many in a row, their ids, their logprobs."""


def _read(width: int, ids: bytes, logprobs: bytes) -> _Read:
    return width, struct.unpack(f"<{len(ids) // 4}i", ids), struct.unpack(f"<{len(logprobs) // 4}f", logprobs)


def _alternatives(others: _Read, row: int, count: int) -> list[e.Alternative]:
    """The likeliest of a row by id, for the engine has no texts; `count` -1 is all there are. What cannot be said is none."""
    width, ids, logprobs = others
    first = row * width
    part = slice(first, first + (width if count < 0 else min(count, width)))
    return [e.Alternative("", *found) for found in zip(ids[part], logprobs[part], strict=True) if found[1] > -math.inf]


def _beside(generation: _Generation, child: int, index: int, document: dict[str, Any], prompt: bytes) -> calls.Call:
    """The arrival of a further sequence: like the first but for its name and its seed, which rises."""
    first, own = dict(generation.document), dict(document)
    before, after = first.pop("sampling_params") or {}, own.pop("sampling_params") or {}
    more = (after.get("seed") or 0) - (before.get("seed") or 0)
    del first["request_id"], own["request_id"]
    if prompt != generation.prompt or first != own or {**before, "seed": None} != {**after, "seed": None} or more < 0:
        return calls.Unrepeatable("sequences of one request that were asked for differently")
    return calls.ArriveBeside(generation.first, child, index, more)
