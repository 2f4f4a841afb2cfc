"""Regression suites: recorded generations as a file that lives in git, and the verdict on each by an engine of today.

The file has one case a line, so that a change of a case is a change of a line. It holds what a verdict needs: the request, the
prompt's ids, what was said with ids and logprobs, and the environment; nobody's name, key or address.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, ValidationError

from replay.calibration import Calibrations
from replay.compare import Outcome, run_compare
from replay.engines.base import Engine
from replay.memory import Memory
from replay.sampling import has_grammar
from replay.state import Generation, SessionState
from replay.taped import taped
from replay.words import content_text, count, shorten, uuid
from schemas import events as e
from schemas.environment import capture
from schemas.errors import DataError, UsageError
from schemas.requests.recorded import as_generation, sampled_as
from schemas.sink import EventSink, new_id
from store.rows import StoredEvent

FORMAT, VERSION = "tokentape.suite", 1
"""What the file calls itself; a version is raised when an older program could misread the file."""
PERSONAL = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields of a request that say who asked and change nothing of the answer."""
PASSING = ("identical", "numeric_drift")
TITLE_CHARACTERS = 60
LOGPROB_DIGITS = 6
"""Decimal places of a logprob in the file: a tenth of what rounding of 32-bit floats is at -10 nats."""
_OPERATION = "read suite"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Said(_Model):
    """One recorded sequence; logprobs are None where one of them is not on the tape."""

    index: int
    token_ids: list[int]
    logprobs: list[float] | None
    text: str
    finish_reason: str | None = None


class Case(_Model):
    """One recorded generation."""

    generation: UUID
    session: UUID
    title: str
    model: str | None
    endpoint: str
    seed: int | None
    request: dict[str, Any]
    prompt_token_ids: list[int]
    environment: str | None
    sequences: list[Said]

    @property
    def under_grammar(self) -> bool:
        """Whether a grammar shaped what was said, so that logprobs hardly ever tell the model."""
        try:
            return has_grammar(sampled_as(self.endpoint, self.request))
        except UsageError:  # of an endpoint whose answers are not compared
            return False


class Captured(_Model):
    """An environment: items are JSON texts by key, as they were captured, so that the digests come out again."""

    origin: str
    items: dict[str, str]
    unknown: list[str] = []


class Suite(_Model):
    """A suite. `environments` by digest."""

    format: str = FORMAT
    version: int = VERSION
    where: str
    environments: dict[str, Captured]
    cases: list[Case]


class Result(NamedTuple):
    """A case and what became of it."""

    case: Case
    outcome: Outcome

    @property
    def passed(self) -> bool:
        """Whether the engine still says what was recorded, up to noise."""
        return self.outcome.verdict in PASSING


def case_of(state: SessionState, generation: Generation) -> Case | str:
    """The case that a generation makes, or why it makes none."""
    document, recording, request = state.edited(generation), generation.recording, generation.request
    if document is None or request is None:
        return "its request is not on the tape"
    if recording is None or not recording.prompt_token_ids:
        return "its prompt has no token ids on the tape"
    sequences = []
    for sequence in generation.sequences:
        tape = taped(sequence)
        if tape.missing or not tape.token_ids:
            return tape.missing or "it said nothing"
        logprobs = [round(value, LOGPROB_DIGITS) for value in tape.logprobs if value is not None]
        ended = sequence.finished.finish_reason if sequence.finished else None
        whole = logprobs if len(logprobs) == len(tape.token_ids) else None
        text = "".join(entry.text or "" for entry in sequence.entries())
        sequences.append(Said(index=sequence.index, token_ids=list(tape.token_ids), logprobs=whole, text=text, finish_reason=ended))
    if not sequences:
        return "it said nothing"
    environment = state.environment_of(generation)
    return Case(
        generation=UUID(bytes=generation.generation_id),
        session=UUID(bytes=state.session_id),
        title=_title(request.endpoint, document),
        model=request.model,
        endpoint=request.endpoint,
        seed=request.seed,
        request={name: value for name, value in document.items() if name not in PERSONAL},
        prompt_token_ids=list(recording.prompt_token_ids),
        environment=environment.event.environment_id.hex() if environment else None,
        sequences=sequences,
    )


def suite_of(where: str, cases: Iterable[tuple[SessionState, Case]]) -> Suite:
    """The suite of these cases, each with the state that it comes from."""
    kept, environments = [], {}
    for state, case in cases:
        kept.append(case)
        for environment in state.environments:
            if environment.event.environment_id.hex() == case.environment:
                environments[case.environment] = _captured(environment.event)
    return Suite(where=where, environments=dict(sorted(environments.items())), cases=kept)


def dumps(suite: Suite) -> str:
    """The text of a suite's file."""
    head = suite.model_dump(mode="json", exclude={"cases", "environments"})
    lines = [f'  "{key}": {_line(value)}' for key, value in head.items()]
    environments = ",\n".join(f'    "{key}": {_line(value.model_dump(mode="json"))}' for key, value in suite.environments.items())
    cases = ",\n".join(f"    {_line(case.model_dump(mode='json'))}" for case in suite.cases)
    return "{\n" + ",\n".join([*lines, f'  "environments": {{\n{environments}\n  }}', f'  "cases": [\n{cases}\n  ]']) + "\n}\n"


def read_suite(path: Path) -> Suite:
    """The suite of a file.

    Raises:
        UsageError: there is no such file.
        DataError: it is no suite, or one of a version that this program does not read.
    """
    hint = "make one with: tokentape suite record --where SQL -o FILE"
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise DataError("it is no suite", operation=_OPERATION, place=str(path), hint=hint)
        if document.get("version") != VERSION:
            fault = f"it is of version {document.get('version')!r}, this program reads {VERSION}"
            raise DataError(fault, operation=_OPERATION, place=str(path), hint="use the program that wrote it, or record it again")
        return Suite.model_validate(document)
    except OSError as error:
        raise UsageError(error.strerror or "not readable", operation=_OPERATION, place=str(path), hint=hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        fault = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise DataError(fault, operation=_OPERATION, place=str(path), hint=hint) from error
    except ValueError as error:
        raise DataError(f"it is not JSON: {error}", operation=_OPERATION, place=str(path), hint=hint) from error


def run_suite(
    suite: Suite,
    engine: Engine,
    sink: EventSink,
    *,
    tenant: str,
    run: str,
    strict: bool = False,
    actor: str = "",
    calibrations: Calibrations | None = None,
    told: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """The verdict on every case; each is recorded as a replay of its own, whose workflow is `run`.

    Raises:
        EngineUnavailable: the engine does not answer.
    """
    memory, results = Memory(), []
    for case in suite.cases:
        events = list(events_of(suite, case, tenant))
        outcome = run_compare(events, engine, sink, strict=strict, actor=actor, calibrations=calibrations, run=run, memory=memory)
        results.append(Result(case, outcome))
        told(results[-1])
    return results


def events_of(suite: Suite, case: Case, tenant: str) -> Iterator[StoredEvent]:
    """A case as the events that recorded it, as far as a replay reads them."""
    for number, payload in enumerate(_payloads(suite, case)):
        event = e.Event(
            event_id=new_id(),
            session_id=case.session.bytes,
            tenant=tenant,
            source="gateway",
            producer_id=bytes(8),
            producer_seq=number,
            recorded_at=0,
            payload=payload,
        )
        yield StoredEvent(event, "suite", 0, number, 0)


def _payloads(suite: Suite, case: Case) -> Iterator[e.Payload]:
    generation_id, request = case.generation.bytes, case.request
    captured = suite.environments.get(case.environment or "")
    environment = captured and capture(captured.items.items(), origin=captured.origin, unknown=captured.unknown)
    if environment:
        yield environment
    yield e.RequestSubmitted(
        generation_id=generation_id,
        endpoint=case.endpoint,
        model=case.model,
        n=len(case.sequences),
        seed=case.seed,
        environment_id=environment.environment_id if environment else None,
        content=e.RequestContent(parameters=json.dumps(request)),
    )
    content = e.GenerationContent(prompt_token_ids=case.prompt_token_ids)
    yield e.GenerationStarted(generation_id=generation_id, authoritative="gateway", content=content)
    for said in case.sequences:
        tokens = len(said.token_ids)
        chunk = e.ChunkContent(
            token_ids=said.token_ids, text=said.text, lengths=[0] * (tokens - 1) + [len(said.text)], logprobs=said.logprobs or []
        )
        yield e.TokenChunk(generation_id=generation_id, index=said.index, position=0, offsets_us=[0] * tokens, content=chunk)
        yield e.SequenceFinished(generation_id=generation_id, index=said.index, tokens=tokens, finish_reason=said.finish_reason)
    tokens = sum(len(said.token_ids) for said in case.sequences)
    yield e.GenerationFinished(generation_id=generation_id, sequences=len(case.sequences), tokens_recorded=tokens)


def _captured(event: e.EnvironmentCaptured) -> Captured:
    return Captured(origin=event.origin, items={pair.key: pair.value for pair in event.items}, unknown=event.unknown)


def _title(endpoint: str, document: dict[str, Any]) -> str:
    """The last thing that was asked, in a few words."""
    try:
        asked = as_generation(endpoint, document)
    except UsageError:
        return endpoint
    messages = asked.get("messages")
    last = (
        messages[-1].get("content") if isinstance(messages, list) and messages and isinstance(messages[-1], dict) else asked.get("prompt")
    )
    if isinstance(last, list) and last and isinstance(last[0], int):
        return count(len(last), "token id")
    return shorten(content_text(last), TITLE_CHARACTERS)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(", ", ":"))


def name_of(case: Case) -> str:
    """What to call a case: its generation, and what was asked."""
    return f"{uuid(case.generation.bytes)} {case.title}"
