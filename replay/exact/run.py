"""An engine run as the tape holds it: what the engine was, its requests, its calls, and what it said."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from replay.words import count, uuid
from schemas import events as e
from schemas.enginerun import calls
from schemas.enginerun.decisions import Differences, Place
from schemas.enginerun.sessions import CUT_OFF, ENDED
from schemas.errors import ConflictError, UnknownSession
from store.rows import StoredEvent

_OPERATION = "exact replay"


@dataclass(slots=True)
class Said:
    """What one sequence said: ids, and a logprob for each where they were asked for."""

    token_ids: array[int] = field(default_factory=lambda: array("q"))
    logprobs: array[float] = field(default_factory=lambda: array("f"))
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A request of the engine core: `document` as `ingest.vllm.tap.request_document` wrote it."""

    number: int
    place: Place
    document: dict[str, Any]
    prompt: tuple[int, ...]

    @property
    def parameters(self) -> dict[str, Any]:
        """Its sampling parameters."""
        return self.document.get("sampling_params") or {}

    @property
    def depends_on_engine_seed(self) -> bool:
        """Whether its tokens are drawn from what the engine's own seed gives."""
        return self.parameters.get("seed") is None and self.parameters.get("temperature", 1.0) > 0

    def beside(self, call: calls.ArriveBeside, number: int) -> Request:
        """A further sequence of it."""
        name = f"{call.child}_{self.document['request_id'].removeprefix('0_')}"
        parameters = dict(self.parameters)
        if parameters.get("seed") is not None:
            parameters["seed"] += call.seed_more
        document = {**self.document, "request_id": name, "sampling_params": parameters}
        return Request(number, (self.place[0], call.index), document, self.prompt)


@dataclass(frozen=True, slots=True)
class Step:
    """One `engine_step`: the calls since the one before, and in `rows` who computed how many tokens, in order."""

    number: int
    calls: tuple[calls.Call, ...]
    checksum: bytes
    rows: dict[int, int]


@dataclass(frozen=True)
class Run:
    """One run of an engine, or its part from an idle moment on."""

    engine_run: bytes
    facts: dict[str, Any]
    arguments: dict[str, Any]
    environment_id: bytes | None
    requests: dict[int, Request]
    steps: tuple[Step, ...]
    said: dict[Place, Said]
    hindrances: tuple[str, ...]
    closed: str | None = None
    """Why its session was closed; None: it is still being recorded."""

    @property
    def known(self) -> str | None:
        """In words, up to where it is on the tape; None: to its end."""
        if self.closed == ENDED:
            return None
        why = {None: "the engine is still being recorded", CUT_OFF: "the engine was cut off"}.get(self.closed, self.closed)
        return f"{why}, and is known up to step {self.steps[-1].number:,}"

    def number_of(self, place: Place) -> int:
        """The number of a sequence's request."""
        return next(number for number, request in self.requests.items() if request.place == place)

    def places_of(self, generation_id: bytes) -> set[Place]:
        """The sequences of a generation. Raises `UnknownSession` if it has none in this run."""
        found = {request.place for request in self.requests.values() if request.place[0] == generation_id}
        if not found:
            hint = "`tokentape engine-runs` lists the runs; the generation must be of that run"
            raise UnknownSession(f"generation {uuid(generation_id)} is not in this run", operation=_OPERATION, hint=hint)
        return found

    def up_to(self, generation_id: bytes) -> Run:
        """Its part that ends with the last step of a generation: what came later had no part in it.

        Raises:
            UnknownSession: there is no such generation in this run.
            ConflictError: no step ever computed it.
        """
        wanted = {self.number_of(place) for place in self.places_of(generation_id)}
        last = max((step.number for step in self.steps if not wanted.isdisjoint(step.rows)), default=None)
        if last is None:
            fault = f"the engine never computed anything of generation {uuid(generation_id)}"
            raise ConflictError(fault, operation=_OPERATION, hint="leave --until out")
        steps = self.steps[: last + 1]
        arrived = sum(isinstance(call, calls.Arrive | calls.ArriveBeside) for step in steps for call in step.calls)
        return replace(self, steps=steps, requests={n: request for n, request in self.requests.items() if n < arrived})


def load(engine_run: bytes, owned: Iterable[StoredEvent], stepped: Iterable[StoredEvent]) -> Run:
    """The run of the events of its two sessions.

    Raises:
        UnknownSession: it is not on the tape.
        ConflictError: a part of it is missing; it is named.
    """
    reader = _Reader(engine_run)
    for stored in owned:
        reader.own(stored.event)
    for stored in stepped:
        if isinstance(stored.event.payload, e.EngineStep):
            reader.step(stored.event.payload)
        elif isinstance(stored.event.payload, e.SessionClosed):
            reader.closed = stored.event.payload.reason
    return reader.run()


class _Reader:
    """Puts a run together, in one pass over its events."""

    def __init__(self, engine_run: bytes) -> None:
        self.engine_run = engine_run
        self.environment: e.EnvironmentCaptured | None = None
        self.documents: dict[int, tuple[bytes, dict[str, Any]]] = {}
        self.prompts: dict[bytes, list[tuple[int, ...]]] = {}
        self.asked: dict[bytes, list[int]] = {}
        self.requests: dict[int, Request] = {}
        self.numbers: dict[Place, int] = {}
        self.steps: list[Step] = []
        self.said: dict[Place, Said] = {}
        self.hindrances: list[str] = []
        self.closed: str | None = None
        self.differences = Differences(engine_run)

    def own(self, event: e.Event) -> None:
        payload = event.payload
        if isinstance(payload, e.EnvironmentCaptured):
            self.environment = payload
        elif isinstance(payload, e.RequestSubmitted) and payload.content is not None and payload.content.parameters:
            document = json.loads(payload.content.parameters)
            self.documents[document["number"]] = (payload.generation_id, document)
            self.asked.setdefault(payload.generation_id, []).append(document["number"])
        elif isinstance(payload, e.GenerationStarted) and payload.content is not None:
            self.prompts.setdefault(payload.generation_id, []).append(tuple(payload.content.prompt_token_ids))
        elif isinstance(payload, e.TokenChunk) and payload.content is not None:
            said = self.said.setdefault((payload.generation_id, payload.index), Said())
            said.token_ids.extend(payload.content.token_ids)
            said.logprobs.extend(payload.content.logprobs)
        elif isinstance(payload, e.SequenceFinished):
            self.said.setdefault((payload.generation_id, payload.index), Said()).finish_reason = payload.finish_reason

    def step(self, payload: e.EngineStep) -> None:
        if payload.step != len(self.steps):
            missing = f"steps {len(self.steps)} to {payload.step - 1} of the run are not on the tape"
            raise ConflictError(missing, operation=_OPERATION, hint="it can be replayed up to there only from a tape that has them")
        made = tuple(calls.decode(payload.record or b""))
        for call in made:
            if isinstance(call, calls.Arrive | calls.ArriveBeside):
                self._arrived(call)
            elif isinstance(call, calls.Unrepeatable) and call.what not in self.hindrances:
                self.hindrances.append(call.what)
        rows = self.differences.rows(payload.entries, self._number)
        self.steps.append(Step(payload.step, made, payload.checksum or b"", rows))

    def _number(self, place: Place) -> int:
        return self.numbers.get(place, -1)

    def _arrived(self, call: calls.Arrive | calls.ArriveBeside) -> None:
        number = len(self.requests)
        if isinstance(call, calls.ArriveBeside):
            request = self.requests[call.first].beside(call, number)
        else:
            request = self._request(number)
        self.requests[number] = request
        self.numbers[request.place] = number

    def _request(self, number: int) -> Request:
        if number not in self.documents:
            hint = "its content was erased or never recorded: engine content is kept where redaction has no rules"
            raise ConflictError(f"request {number} of the run is not on the tape", operation=_OPERATION, hint=hint)
        generation_id, document = self.documents[number]
        prompts = self.prompts.get(generation_id, [])
        at = self.asked[generation_id].index(number)
        if at >= len(prompts):
            hint = "its content was erased or never recorded"
            raise ConflictError(f"the prompt of request {number} of the run is not on the tape", operation=_OPERATION, hint=hint)
        return Request(number, (generation_id, document["index"]), document, prompts[at])

    def run(self) -> Run:
        if self.environment is None or not self.steps:
            hint = "`tokentape engine-runs` lists those there are"
            raise UnknownSession(f"no steps of an engine run {uuid(self.engine_run)}", operation=_OPERATION, hint=hint)
        facts = {pair.key: json.loads(pair.value) for pair in self.environment.items}
        arguments = facts.pop("config.arguments", {})
        return Run(
            self.engine_run,
            facts,
            arguments,
            self.environment.environment_id,
            self.requests,
            tuple(self.steps),
            self.said,
            tuple(self.hindrances),
            self.closed,
        )


def describe(run: Run) -> str:
    """A run in one line."""
    known = f"; {run.known}" if run.known else ""
    return f"{count(len(run.requests), 'request')} in {count(len(run.steps), 'step')}, vLLM {run.facts.get('version')}{known}"
