"""An engine run on the tape, without an engine: calls and decisions there and back, names, and what is refused by name."""

from __future__ import annotations

import contextlib
import json
import marshal
import math
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.vllm.kv.outlet import Outlet
from ingest.vllm.names import named, request_name
from ingest.vllm.tap import SIZE, Tap, marshal_safe
from replay.compare import Outcome, run_compare
from replay.engines.base import Refused, Scored
from replay.exact import replay as exact
from replay.exact.engine import _config, check, check_room, refuse_differences
from replay.exact.run import Request, Run, Said, Step, describe, load
from replay.exact.scheduler import replaying
from replay.exact.script import Diverged, Script
from schemas.enginerun import calls, facts, versions
from schemas.enginerun.decisions import Decision, Differences
from schemas.enginerun.sessions import CUT_OFF, ENDED, kv_session, steps_session
from schemas.errors import ConflictError, InvalidEvent, UnknownSession, UsageError
from schemas.events import (
    PLATFORM_TENANT,
    ChunkAlternatives,
    EngineStep,
    Event,
    GenerationStarted,
    RecordsLost,
    RequestSubmitted,
    SessionClosed,
    TokenChunk,
)
from schemas.sink import SessionContext, new_id
from scripts.native.tools import ROOT
from store.rows import StoredEvent
from tests.engine_log import await_end, events_of, runs_of
from tests.engine_replay import Nowhere
from tests.test_compare import Scorer, Sink, scored
from tokentape.config import load as load_settings
from tokentape.engineruns import RUNS
from tokentape.installation import Installation

NUMBER = st.integers(0, 100_000)
CALL = st.one_of(
    st.builds(calls.Schedule),
    st.builds(calls.Update),
    st.builds(calls.Arrive),
    st.builds(calls.ArriveBeside, NUMBER, NUMBER, NUMBER, NUMBER),
    st.builds(calls.Finish, st.lists(NUMBER, max_size=4).map(tuple), st.sampled_from(calls.STATUSES)),
    st.builds(calls.Reset, st.booleans()),
    st.builds(calls.Idle),
    st.builds(calls.Preempt, st.lists(NUMBER, max_size=4).map(tuple)),
    st.builds(calls.Cached, NUMBER, NUMBER),
    st.builds(calls.Unrepeatable, st.text(max_size=20)),
)


@given(st.lists(CALL, max_size=30))
def test_calls_there_and_back(made: list[calls.Call]) -> None:
    """Whatever calls there are, their bytes give them back."""

    assert made == list(calls.decode(calls.encode(made)))


def test_a_step_without_anything_between_is_one_byte() -> None:
    """The most frequent step of all."""

    assert 1 == len(calls.encode([calls.Schedule(), calls.Update()]))


def test_bytes_that_are_no_calls() -> None:
    """An unknown code and an end in the middle are said, not guessed."""
    for data in (b"\xff", calls.encode([calls.Cached(5, 300)])[:-1]):
        with pytest.raises(InvalidEvent):
            list(calls.decode(data))


@given(st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), unique_by=lambda row: row[0], max_size=6), max_size=12))
def test_differences_there_and_back(steps: list[list[tuple[int, int]]]) -> None:
    """Who is in a step, with how many tokens and in which order, comes back from what changed."""
    run = new_id()
    there, back = Differences(run), Differences(run)
    for rows in steps:
        decision = Decision(tuple(n for n, _ in rows), tuple(tokens for _, tokens in rows))
        entries = there.entries(decision, lambda n: (bytes([n]) * 16, n))

        assert list(dict(rows).items()) == list(back.rows(entries, lambda place: place[1]).items())


def test_a_steady_step_has_no_entries() -> None:
    """Eight that decode as in the step before are not listed again."""
    differences = Differences(new_id())
    decision = Decision(tuple(range(8)), (1,) * 8)

    assert [8, 0] == [len(differences.entries(decision, lambda n: (bytes(16), n))) for _ in range(2)]


def test_a_checksum_tells_order_and_ends() -> None:
    """Exchanged neighbours, another count, another cache hit and another end are all other decisions."""
    first = Decision((1, 2), (1, 1))
    others = [Decision((2, 1), (1, 1)), Decision((1, 2), (1, 2)), Decision((1, 2), (1, 1), ((1, 32),)), Decision((1, 2), (1, 1), (), (3,))]

    assert 5 == len({decision.checksum(()) for decision in (first, *others)})
    assert first.checksum((1,)) != first.checksum(())


@pytest.mark.parametrize(
    ("request_id", "external", "child", "prompt", "ours"),
    [
        ("chatcmpl-abc-0123abcd", "chatcmpl-abc", 0, 0, False),
        ("1_chatcmpl-abc-0123abcd", "chatcmpl-abc", 1, 0, False),
        ("plain", "plain", 0, 0, False),
        (f"chatcmpl-{request_name(bytes(range(16)))}-0123abcd", f"chatcmpl-{request_name(bytes(range(16)))}", 0, 0, True),
        (f"2_cmpl-{request_name(bytes(range(16)))}-3-0123abcd", f"cmpl-{request_name(bytes(range(16)))}-3", 2, 3, True),
    ],
)
def test_names_of_requests(request_id: str, external: str, child: int, prompt: int, ours: bool) -> None:
    """What the engine core calls a request says whose it is and which of n."""
    found = named(request_id)

    assert (external, child, prompt) == (found.external, found.child, found.prompt)
    assert (bytes(range(16)) if ours else None) == found.generation_id


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0", "0.32.1+cpu"])
def test_supported_versions(version: str) -> None:
    """0.24 to 0.32 pass."""
    versions.check(version, operation="capture")


@pytest.mark.parametrize("version", ["0.23.9", "0.33.0", "1.0", "dev"])
def test_other_versions_are_refused(version: str) -> None:
    """Any other is refused in one line that says what is valid."""
    with pytest.raises(UsageError, match=r"not supported, valid is 0\.24 to 0\.32"):
        versions.check(version, operation="capture")


def test_weights_are_told_by_content(tmp_path: Path) -> None:
    """A changed byte is another model; a folder without weights has no digest."""
    (tmp_path / "config.json").write_text("{}")
    assert facts.weights_digest(tmp_path) is None
    digests = []
    for content in (b"one", b"two"):
        (tmp_path / "model.safetensors").write_bytes(content)
        digests.append(facts.weights_digest(tmp_path))

    assert 2 == len(set(digests))


class _Fake:
    """An engine core that makes the calls it is told to make, through the real tap and the real recorder's process."""

    def __init__(
        self, data: Path, monkeypatch: pytest.MonkeyPatch, *, unrepeatable: list[str] | None = None, kv_engine: str | None = None
    ) -> None:
        monkeypatch.setenv("TOKENTAPE_DATA", str(data))
        self.header: dict[str, Any] = {
            "model": "none",
            "arguments": {"model": "none", "seed": 0},
            "facts": {"version": "0.32.0", "config.workers": [{"threads": 2}], "config.device_config.device": "cpu"},
            "unrepeatable": unrepeatable or [],
            "kv_engine": kv_engine,
        }
        self.data = data
        self.tap = Tap(self.header, caching=False)
        self.live: list[str] = []
        self.logprobs: dict[str, float] = {}
        self.first = 0

    def arrive(self, name: str, *, lora_request: str | None = None, **parameters: Any) -> None:
        said = _Struct({"temperature": 0.0, "seed": None, "max_tokens": 4, "logprobs": 1, **parameters})
        said.structured_outputs = parameters.get("structured_outputs")
        request = SimpleNamespace(
            request_id=name, sampling_params=said, prompt_token_ids=[5, 6, 7], arrival_time=1.5, priority=0, client_index=0
        )
        request.pooling_params, request.lora_request, request.cache_salt = None, lora_request, None
        self.tap.arrived(request, idle=not self.live)
        self.live.append(name)

    def step(self, *, first: bool = False, ends: tuple[str, ...] = ()) -> None:
        self.schedule(dict.fromkeys(self.live, 3 if first else 1), cached=dict.fromkeys(self.live, 0) if first else None)
        said = self.live
        self.live = [name for name in self.live if name not in ends]
        self.update({name: 40 + i for i, name in enumerate(said)}, ends=dict.fromkeys(ends, "stop"))

    def schedule(self, counts: dict[str, int], *, cached: dict[str, int] | None = None, preempted: set[str] | None = None) -> None:
        """Decide on a step; `cached` tells of those admitted how much was computed already."""
        self.tap.scheduling()
        self.tap.scheduled(
            SimpleNamespace(
                num_scheduled_tokens=counts,
                total_num_scheduled_tokens=sum(counts.values()),
                scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=tokens) for name, tokens in (cached or {}).items()],
                scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(), req_ids=[], num_computed_tokens=[]),
                preempted_req_ids=preempted,
            )
        )

    def update(self, said: dict[str, int | None], *, ends: dict[str, str] | None = None, rows: list[str] | None = None) -> None:
        """Take a step's result in: a token of each, None for one that only ends. Rows of the batch: who says something, or `rows`."""
        import numpy

        rows = [name for name, token in said.items() if token is not None] if rows is None else rows
        outputs = [
            SimpleNamespace(
                request_id=name, new_token_ids=[] if token is None else [token], finish_reason=(ends or {}).get(name), stop_reason=None
            )
            for name, token in said.items()
        ]
        scores = numpy.tile(numpy.array([-0.5, -0.25, -2.0, -math.inf], dtype="f4"), (len(rows), 1))
        ids = numpy.array([[self.first or said.get(name) or 0, 90, said.get(name) or 0, 91] for name in rows]).reshape(-1, 4)
        result = SimpleNamespace(logprobs=SimpleNamespace(logprobs=scores, logprob_token_ids=ids), req_ids=list(rows))
        for row, name in enumerate(rows):
            scores[row, 0] = self.logprobs.get(name, -0.5)
        requests = {name: SimpleNamespace(is_finished=lambda: False) for name in self.live}
        scheduler = SimpleNamespace(running=self.live, waiting=[], kv_cache_manager=SimpleNamespace(usage=0.25), requests=requests)
        self.tap.updated({0: SimpleNamespace(outputs=outputs)}, result, scheduler, ended=bool(ends))

    def close(self) -> tuple[Run, list[Event]]:
        """The engine ends; what the tape then has."""
        self.tap.close()
        await_end(self.data)
        return _run(self.data)


class _Struct(dict[str, Any]):
    """Sampling parameters that msgspec takes for plain ones."""

    structured_outputs: Any = None


def _run(data: Path) -> tuple[Run, list[Event]]:
    """The one run of an installation's log."""
    events = events_of(data)
    engine_run = next(event.payload.engine_run for event in events if isinstance(event.payload, EngineStep))
    stored = [StoredEvent(event, "log", 0, at, event.recorded_at) for at, event in enumerate(events)]
    owned = [one for one in stored if one.event.session_id == engine_run]
    stepped = [one for one in stored if one.event.session_id == steps_session(engine_run)]
    return load(engine_run, owned, stepped), events


def _recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, list[Event]]:
    engine = _Fake(tmp_path, monkeypatch)
    engine.arrive("a-0000000a")
    engine.step(first=True)
    engine.step(ends=("a-0000000a",))
    engine.arrive(f"chatcmpl-{request_name(bytes(range(16)))}-0000000b", seed=7, temperature=1.0)
    engine.arrive(f"1_chatcmpl-{request_name(bytes(range(16)))}-0000000b", seed=8, temperature=1.0)
    engine.step(first=True)
    engine.tap.finished([engine.live.pop()], "FINISHED_ABORTED", idle=False)
    engine.step(ends=tuple(engine.live))
    engine.tap.close()
    await_end(tmp_path)
    return _run(tmp_path)


def test_a_run_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests, n sequences of one, steps, tokens, logprobs and an abort stand on the tape and come back."""
    run, events = _recorded(tmp_path, monkeypatch)
    started = [event.payload for event in events if isinstance(event.payload, GenerationStarted)]

    assert ["engine", "gateway"] == [one.authoritative for one in started]
    assert 3 == len(run.requests)
    assert (bytes(range(16)), 1) == run.requests[2].place
    assert 8 == run.requests[2].parameters["seed"]
    assert (5, 6, 7) == run.requests[2].prompt
    assert [2, 2, 1] == [len(run.said[request.place].token_ids) for request in run.requests.values()]
    assert {-0.5} == {value for said in run.said.values() for value in said.logprobs}
    assert "abort" == run.said[run.requests[2].place].finish_reason
    assert 4 == len(run.steps)


def _compared(run: Run, events: list[Event], view: Callable[[tuple[int, ...]], Scored | Refused], **options: Any) -> Outcome:
    """What a compare replay finds of the session of an engine run."""
    owned = [StoredEvent(event, "log", 0, at, event.recorded_at) for at, event in enumerate(events) if event.session_id == run.engine_run]
    return run_compare(owned, Scorer(view), Sink(), **options)


def test_what_an_engine_recorded_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the prompt that it recorded and by the parameters that it resolved; of greedy tokens also whether they are the likeliest."""
    run, events = _recorded(tmp_path, monkeypatch)
    same = _compared(run, events, lambda ids: scored([-0.5] * len(ids)))
    passed_over = _compared(run, events, lambda ids: scored([-0.5] * len(ids), [-0.5, *[2.0] * (len(ids) - 1)]))

    assert ["identical"] * 3 == [each.judgement.verdict for each in same.sequences], same.reason
    assert ["sampling_differs", "identical", "identical"] == [each.judgement.verdict for each in passed_over.sequences]
    assert (0, "model_differs") == (same.skipped, _compared(run, events, lambda ids: scored([-4.0] * len(ids))).verdict)


def test_what_the_ids_of_an_engine_do_not_carry_is_inconclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter, and all but the first of several prompts under one request, are named; a grammar only keeps a run from being exact."""
    ours = request_name(bytes(range(16)))
    engine = _Fake(tmp_path, monkeypatch)
    engine.arrive(f"cmpl-{ours}-0-0000000b")
    engine.arrive(f"cmpl-{ours}-1-0000000c")
    engine.arrive("a-0000000a", lora_request="adapter")
    engine.arrive("g-0000000d", structured_outputs={"json": "{}"})
    engine.step(first=True, ends=tuple(engine.live))
    engine.tap.close()
    await_end(tmp_path)
    outcome = _compared(*_run(tmp_path), lambda ids: scored([-0.5] * len(ids)))

    assert [
        ("identical", "1 logprob equal"),
        ("inconclusive", "its request had several prompts, and which of them is this one's is not told"),
        ("inconclusive", "it had a LoRA adapter, which token ids do not carry"),
        ("identical", "1 logprob equal"),
    ] == [(each.judgement.verdict, each.judgement.reason.partition(";")[0]) for each in outcome.sequences]


def test_alternatives_are_each_request_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as were asked for, by id; nothing that cannot be said, and none where none were asked for."""
    engine = _Fake(tmp_path, monkeypatch)
    for name, wanted in (("a", 2), ("b", 0), ("c", None), ("d", 1), ("e", -1)):
        engine.arrive(f"{name}-0000000{name}", logprobs=wanted)
    engine.step(first=True, ends=tuple(engine.live))
    engine.tap.close()
    await_end(tmp_path)
    chunks = [event.payload for event in events_of(tmp_path) if isinstance(event.payload, TokenChunk)]
    told = [chunk.content for chunk in chunks if chunk.content is not None]
    alternatives = {content.token_ids[0]: content.alternatives for content in told}
    ids = {token: one and one.token_ids for token, one in alternatives.items()}

    assert ids == {40: [90, 40], 41: None, 42: None, 43: [90], 44: [90, 44]}
    assert alternatives[40] == ChunkAlternatives(counts=[2], token_ids=[90, 40], texts=["", ""], logprobs=[-0.25, -2.0])
    assert {token: len(content.logprobs) for content in told for token in content.token_ids} == {40: 1, 41: 1, 42: 0, 43: 1, 44: 1}


def test_a_replay_begins_at_the_last_idle_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before an engine that held nothing need not be done again for a later generation."""
    run, _ = _recorded(tmp_path, monkeypatch)
    whole, late = Script(run), Script(run, until=bytes(range(16)))

    assert 0 == whole.first_step
    assert 2 == late.first_step
    assert [calls.Idle, calls.Arrive, calls.ArriveBeside] == [type(call) for call in late.between()]
    assert 1 == late.arrive().number


def test_decisions_of_an_engine_that_schedules_ahead_are_imposed_on_their_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it takes in a step it has decided on the next: cache hits and preemptions go with the rows that they were decided with."""
    engine = _Fake(tmp_path, monkeypatch)
    a, b = "a-0000000a", "b-0000000b"
    engine.arrive(a)
    engine.schedule({a: 3}, cached={a: 0})
    engine.schedule({a: 1})
    engine.update({a: 40})
    engine.arrive(b)
    engine.schedule({a: 1, b: 1}, cached={b: 2})
    engine.update({a: 40})
    engine.schedule({b: 1}, preempted={a})
    engine.update({a: 40, b: 41})
    engine.schedule({b: 1})  # it dies before it has taken in this one
    engine.update({b: 40})
    engine.tap.close()
    await_end(tmp_path)
    imposed = list(Script(_run(tmp_path)[0]).imposed)

    assert [({0: 3}, {}, ()), ({0: 1}, {}, ()), ({0: 1, 1: 1}, {1: 2}, ()), ({1: 1}, {}, (0,))] == [
        (each.rows, each.cached, each.preempted) for each in imposed[:4]
    ]
    assert 5 == len(imposed)


def test_what_cannot_be_replayed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speculative decoding, said when the engine started, is the reason given."""
    engine = _Fake(tmp_path, monkeypatch, unrepeatable=["speculative decoding"])
    engine.arrive("a-0000000a")
    engine.step(first=True, ends=("a-0000000a",))
    engine.tap.close()
    await_end(tmp_path)
    with pytest.raises(ConflictError, match="speculative decoding"):
        check(_run(tmp_path)[0], forced=False)


def test_a_difference_is_named_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of threads is refused with both numbers; another cache only without --forced."""
    run, _ = _recorded(tmp_path, monkeypatch)
    with pytest.raises(ConflictError, match=r"workers: recorded \[\{'threads': 2\}\], now \[\{'threads': 1\}\]"):
        refuse_differences(run, run.facts | {"config.workers": [{"threads": 1}]}, forced=True)
    run.facts["config.cache_config.blocks"] = 10
    present = run.facts | {"config.cache_config.blocks": 20}
    with pytest.raises(ConflictError, match="blocks"):
        refuse_differences(run, present, forced=False)

    assert [("config.cache_config.blocks", 10, 20)] == refuse_differences(run, present, forced=True)


def _made(*sequences: tuple[int, int, float], steps: int, idle: Iterable[int] = (), closed: str | None = ENDED) -> Run:
    """A run of sequences that each come in a step, say a token in each of so many steps and have this temperature."""
    requests, said = {}, {}
    for number, (_, tokens, temperature) in enumerate(sequences):
        place = (bytes([number]) * 16, 0)
        requests[number] = Request(number, place, {"request_id": str(number), "sampling_params": {"temperature": temperature}}, (5, 6))
        said[place] = Said(array("q", [40] * tokens), array("f", [-0.5] * tokens), "stop")
    made = []
    for at in range(steps):
        came = [calls.Arrive() for begun, _, _ in sequences if begun == at]
        rows = {number: 2 if begun == at else 1 for number, (begun, tokens, _) in enumerate(sequences) if begun <= at < begun + tokens}
        made.append(Step(at, (*[calls.Idle()] * (at in idle), *came, calls.Schedule(), calls.Update()), b"", rows))
    return Run(bytes(16), {"version": "0.32.0"}, {}, None, requests, tuple(made), said, (), closed)


class _Engine:
    """An engine that computes what was recorded, but for sequences that it loses; each says so much at the most."""

    version = "0.32.0"

    def __init__(self, run: Run, script: Script, limits: dict[int, int]) -> None:
        self.run, self.script, self.limits = run, script, limits

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def facts(self) -> dict[str, Any]:
        return dict(self.run.facts)

    def outputs(self) -> Iterator[tuple[int, str, list[int], list[float]]]:
        left = dict(self.limits)
        while not self.script.over:
            list(self.script.between())
            self.script.take(calls.Schedule)
            step = self.script.take(calls.Update)
            for number in step.rows:
                left[number] = left.get(number, 1000) - 1
                if left[number] >= 0:
                    yield step.number, str(number), [40], [-0.5]


def _played(
    run: Run, monkeypatch: pytest.MonkeyPatch, limits: dict[int, int] | None = None, *, forced: bool = True, until: int | None = None
) -> exact.Outcome:
    """What a replay says whose engine gives of some sequences only so many tokens."""
    monkeypatch.setattr(exact, "ExactEngine", lambda run, script, **_: _Engine(run, script, limits or {}))
    context = SessionContext(new_id(), "default", "replay")
    generation = None if until is None else bytes([until]) * 16
    return exact.ExactReplay(run, Nowhere(), context, generation, forced).execute()


def test_a_sequence_that_does_not_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recorded sequence must come out: of one that is left out, and of one that ends early, it is said how much and from where."""
    run = _made((0, 4, 0), (1, 3, 0), (2, 6, 0), steps=9)
    whole, less = _played(run, monkeypatch), _played(run, monkeypatch, {1: 0, 2: 2})
    first, second = (str(UUID(bytes=bytes([n]) * 16)) for n in (1, 2))

    assert ("reproduced", []) == (whole.verdict, whole.document()["missing"])
    assert ("diverged", 3, 1, 13) == (less.verdict, *(less.document()[name] for name in ("sequences", "sequences_reproduced", "tokens")))
    assert [(first, 3, 1), (second, 4, 4)] == [(m["generation"], m["tokens"], m["from_step"]) for m in less.document()["missing"]]
    assert "2 sequences of 3 otherwise" in less.reason
    assert {1: 0, 2: 2} == {one.place[0][0]: one.first_telling for one in less.missing}


def test_up_to_a_generation_only_what_ended_before_must_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was under way still is no fault, one that should have been over is; and one that came later is no part of it."""
    run = _made((0, 4, 0), (0, 2, 0), (1, 8, 0), (6, 2, 0), steps=9)
    part = _played(run, monkeypatch, until=0)

    assert ("reproduced", 4, 3) == (part.verdict, part.steps, len(part.sequences))
    assert "diverged" == _played(run, monkeypatch, {1: 1}, until=0).verdict


def test_how_far_a_run_is_known_is_told_with_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine that was killed, or is recorded still, the verdict holds up to a step; a generation that had ended is whole."""
    cut, still = (_made((0, 4, 0), (3, 9, 0), steps=6, closed=closed) for closed in (CUT_OFF, None))
    cut.said[bytes([1]) * 16, 0] = Said(array("q", [40] * 3), array("f", [-0.5] * 3))

    assert _played(cut, monkeypatch).reason.endswith("; the engine was cut off, and is known up to step 5")
    assert _played(cut, monkeypatch).document()["known"] == "the engine was cut off, and is known up to step 5"
    assert "cut off" in _played(cut, monkeypatch, until=1).reason
    assert _played(cut, monkeypatch, until=0).reason.endswith("in 4 steps")
    assert "still being recorded" in describe(still)


@pytest.mark.parametrize(
    ("draws", "wanted", "first", "last"),
    [
        ((), 2, 6, 7),
        ((5,), 2, 6, 7),  # after it
        ((4,), 2, 6, 7),  # never computed
        ((0,), 2, 6, 7),  # before the engine held nothing
        ((2,), 2, 0, 7),  # itself
        ((3,), 2, 0, 7),  # beside it
        ((5,), 0, 0, 1),
    ],
)
def test_who_draws_from_the_engine_s_seed_decides_where_a_replay_begins(draws: tuple[int, ...], wanted: int, first: int, last: int) -> None:
    """Only where the generation or one that it shared steps with was drawn from it are all draws before needed."""
    begun = ((0, 2), (3, 2), (6, 2), (7, 2), (7, 0), (10, 2))
    run = _made(*((at, tokens, 1.0 if n in draws else 0.0) for n, (at, tokens) in enumerate(begun)), steps=12, idle=(0, 3, 6, 10))
    script = Script(run, until=bytes([wanted]) * 16)

    assert (first, last) == (script.first_step, script.run.steps[-1].number)


def test_a_generation_that_was_never_computed_is_refused() -> None:
    """There is no step with which it could end."""
    run = _made((0, 2, 0), (1, 0, 0), steps=3)
    with pytest.raises(ConflictError, match="never computed anything of generation 01010101"):
        Script(run, until=bytes([1]) * 16)


def test_what_has_no_room_is_refused_before_anything_starts() -> None:
    """Fewer sequences or tokens at once, or shorter ones, than were recorded cannot be imposed; only what is replayed counts."""
    run = _made((0, 2, 0), (0, 2, 0), (4, 5, 0), steps=9, idle=(4,))
    for name, least, what in (
        ("max_num_seqs", 2, "2 sequences in one step"),
        ("max_num_batched_tokens", 4, "4 tokens in one step"),
        ("max_model_len", 7, "7 tokens in one sequence"),
    ):
        check_room(Script(run), {name: least})
        with pytest.raises(ConflictError, match=f"{name}={least - 1} is too little: the recorded engine had {what}"):
            check_room(Script(run), {name: least - 1})

    check_room(Script(run, until=bytes([2]) * 16), {"max_num_seqs": 1})


def test_an_engine_argument_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that vLLM does not have, given now, is named with those like it; one of the record is what its version tells of."""
    made: dict[str, Any] = {}
    arguments = type("EngineArgs", (), {"__dataclass_fields__": {"max_num_seqs": None}, "create_engine_config": lambda _: made})
    for name in ("vllm", "vllm.engine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", SimpleNamespace(EngineArgs=lambda **given: made.update(given) or arguments()))
    sys.modules["vllm.engine.arg_utils"].EngineArgs.__dataclass_fields__ = {"max_num_seqs": None}
    with pytest.raises(UsageError, match="vLLM has no engine argument max_num_sequences") as refused:
        _config({"max_num_sequences": 1}, {"max_num_sequences": 1})

    assert "max_num_seqs" in str(refused.value.hint)
    assert {"max_num_seqs": 2} == _config({"max_num_seqs": 2, "of_another_version": 1}, {"max_num_seqs": 2})


class _Base:
    """As much of a scheduler as imposing needs. It takes `wide` at once at the most, whatever it is told."""

    policy = "fcfs"
    max_num_scheduled_tokens = 100
    max_num_running_reqs = 1
    wide = 8

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.running: list[Any] = []
        self.waiting: Any = _Queue()
        self.kv_cache_manager = SimpleNamespace(get_computed_blocks=lambda _: (None, 0))

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def schedule(self) -> Any:
        while self.waiting and len(self.running) < min(self.max_num_running_reqs, self.wide):
            self.running.append(self.waiting.pop(0))
        cached = SimpleNamespace(resumed_req_ids=set(), req_ids=[], num_computed_tokens=[])
        scheduled = {request.request_id: 2 for request in self.running}
        return SimpleNamespace(num_scheduled_tokens=scheduled, scheduled_new_reqs=[], scheduled_cached_reqs=cached, preempted_req_ids=None)


class _Queue(list[Any]):
    add_request = list.append


def test_a_decision_that_cannot_be_imposed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that leaves one out after all is no replay; its own limit on those that run does not leave any out."""
    for name in ("vllm", "vllm.v1", "vllm.v1.core", "vllm.v1.core.sched"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.v1.request", SimpleNamespace(RequestStatus={}))
    monkeypatch.setitem(sys.modules, "vllm.v1.core.sched.request_queue", SimpleNamespace(create_request_queue=lambda _: _Queue()))
    run = _made((0, 2, 0), (0, 2, 0), steps=2)

    def made(request: Request) -> Any:
        return SimpleNamespace(request_id=str(request.number), number=request.number)

    scheduler = replaying(_Base, Script(run), made, forced=True)()
    scheduler.schedule()

    assert ["0", "1"] == [request.request_id for request in scheduler.running]
    assert 1 == scheduler.max_num_running_reqs
    scheduler = replaying(type("Narrow", (_Base,), {"wide": 1}), Script(run), made, forced=True)()
    with pytest.raises(
        Diverged, match="step 0: the recorded decision cannot be imposed on this engine: other requests in the step: missing 1"
    ):
        scheduler.schedule()


def test_a_model_is_told_by_content(tmp_path: Path) -> None:
    """The same bytes in another folder are the recorded model; a folder that is not there is said before anything starts."""
    run = _made((0, 1, 0), steps=1)
    run.facts.update({"config.model_config.model": "/a", "config.model_config.weights": "5f"})
    run.arguments["model"] = str(tmp_path / "a")
    elsewhere = {**run.facts, "config.model_config.model": "/b"}

    assert [] == refuse_differences(run, elsewhere, forced=False)
    for digest in ("60", None):
        with pytest.raises(ConflictError, match=r"model_config\.model: recorded /a, now /b"):
            refuse_differences(run, {**elsewhere, "config.model_config.weights": digest}, forced=False)
    for model in (None, "tiny", "/nope"):
        with pytest.raises(UsageError, match=f"no model lies at {model or run.arguments['model']}") as refused:
            check(run, forced=False, model=model)
        assert "--model FOLDER" in str(refused.value.hint)
    (tmp_path / "config.json").write_text("{}")
    check(run, forced=False, model=str(tmp_path))
    run.facts["config.model_config.weights"] = None
    check(run, forced=False, model="some/name-on-a-hub")


def _state(data: Path) -> tuple[Any, Any]:
    """What `engine-runs` shows of the one run: its state, and whether it has an end."""
    with Installation(load_settings(), source="test") as installation:
        installation.freshen()
        (row,) = installation.sql.query(RUNS).table.to_pylist()
    return row["state"], row["ended"] is not None


def test_how_a_run_ended_is_on_the_tape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that says that it ends has ended, as has one that is killed without work; one that is killed over its work was cut off."""
    found = {}
    for name in ("ended", "killed", "killed without work", "killed in a first step"):
        engine = _Fake(tmp_path / name, monkeypatch)
        engine.arrive(A)
        engine.step(first=True, ends=() if name in ("ended", "killed") else (A,))
        engine.tap._send()
        if name == "killed in a first step":
            engine.arrive(B)
        engine.tap.close() if name == "ended" else engine.tap.pipe.close()
        await_end(tmp_path / name)
        run = _run(tmp_path / name)[0]
        found[name] = (run.closed, run.known, *_state(tmp_path / name))

    assert {
        "ended": (ENDED, None, "ended", True),
        "killed": (CUT_OFF, "the engine was cut off, and is known up to step 0", "cut off", True),
        "killed without work": (ENDED, None, "ended", True),
        "killed in a first step": (CUT_OFF, "the engine was cut off, and is known up to step 1", "cut off", True),
    } == found


def test_a_program_that_ends_without_ending_its_engine(tmp_path: Path) -> None:
    """What the engine had not handed over yet is handed over, and the run has ended."""
    program = (
        "import pathlib, pytest, sys; from tests.test_enginerun import A, _Fake; f = _Fake(pathlib.Path(sys.argv[1]), pytest.MonkeyPatch())"
    )
    subprocess.run(
        [sys.executable, "-c", f"{program}; f.arrive(A); f.schedule({{A: 3}}, cached={{A: 0}})", str(tmp_path)], check=True, timeout=120
    )
    await_end(tmp_path)
    run, _ = _run(tmp_path)

    assert (ENDED, 1) == (run.closed, len(run.requests))


def test_missing_steps_and_requests_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape with a gap is refused with the gap."""
    _, events = _recorded(tmp_path, monkeypatch)
    engine_run = next(event.payload.engine_run for event in events if isinstance(event.payload, EngineStep))
    stored = [StoredEvent(event, "log", 0, at, event.recorded_at) for at, event in enumerate(events)]
    without = [one for one in stored if not (isinstance(one.event.payload, EngineStep) and one.event.payload.step == 1)]
    with pytest.raises(ConflictError, match="steps 1 to 1 of the run are not on the tape"):
        load(engine_run, stored, without)
    with pytest.raises(ConflictError, match="request 0 of the run is not on the tape"):
        load(engine_run, [one for one in stored if one.event.kind != "request_submitted"], stored)
    with pytest.raises(UnknownSession, match="no steps of an engine run"):
        load(new_id(), [], [])


def test_a_frame_cut_short_is_left_out(tmp_path: Path) -> None:
    """An engine that is killed while it sends leaves a whole tape of all before, closed in order."""
    header = {"model": "none", "arguments": {}, "facts": {"config.workers": None}, "unrepeatable": []}
    document = {"request_id": "a", "priority": 0, "sampling_params": {"seed": 1}, "unrepeatable": []}
    frame = marshal.dumps([("header", header), ("idle",), ("arrive", 1, 0, document, array("q", [1]).tobytes())])
    program = [sys.executable, "-m", "tokentape.engine"]
    sent = SIZE.pack(len(frame)) + frame + SIZE.pack(1000) + b"cut"
    subprocess.run(program, input=sent, env={"TOKENTAPE_DATA": str(tmp_path), "PATH": ""}, check=True, timeout=120)
    await_end(tmp_path)
    events = events_of(tmp_path)
    kinds = [event.kind for event in events]

    assert [CUT_OFF] * 2 == [event.payload.reason for event in events if isinstance(event.payload, SessionClosed)]
    assert 1 == kinds.count("request_submitted")
    assert 2 == kinds.count("session_closed")
    assert json.dumps(kinds).count("engine_step") == 1


A, B, C = "a-0000000a", "b-0000000b", "c-0000000c"


def _answers(run: Run, events: list[Event]) -> dict[str, tuple[list[int], list[float], str | None]]:
    """Token ids, logprobs and end of each request by its first letter."""
    named_ids = {e.payload.generation_id: e.payload.client_request_id for e in events if isinstance(e.payload, RequestSubmitted)}
    found = {str(named_ids[place[0]]): said for place, said in run.said.items()}
    return {name: (list(said.token_ids), list(said.logprobs), said.finish_reason) for name, said in sorted(found.items())}


def _losses(events: list[Event]) -> list[tuple[str, str]]:
    """What was lost, and in whose session: the engine run's own or that of its steps."""
    return [(e.payload.reason, "steps" if e.tenant == PLATFORM_TENANT else "own") for e in events if isinstance(e.payload, RecordsLost)]


def test_one_that_fails_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grammar that does not compile ends a request that has no row in the batch; the others go on."""
    engine = _Fake(tmp_path, monkeypatch)
    engine.arrive(A)
    engine.arrive(B)
    engine.schedule({A: 3}, cached={A: 0})
    engine.live = [A]
    engine.update({A: 40, B: None}, ends={B: "error"})
    engine.step(ends=(A,))
    run, events = engine.close()

    assert _answers(run, events) == {"a": ([40, 40], [-0.5, -0.5], "stop"), "b": ([], [], "error")}
    assert not _losses(events)


def test_one_that_a_reset_preempted_and_its_client_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM still counts it among the preempted of the next step; an abort told twice is one."""
    engine = _Fake(tmp_path, monkeypatch)
    engine.arrive(A)
    engine.step(first=True)
    engine.tap.reset(True, emptied=False)
    engine.tap.finished([A, A], "FINISHED_ABORTED", idle=False)
    engine.live = []
    engine.arrive(B)
    engine.schedule({B: 3}, cached={B: 0}, preempted={A})
    engine.live = []
    engine.update({B: 41}, ends={B: "stop"})
    run, events = engine.close()

    assert _answers(run, events) == {"a": ([40], [-0.5], "abort"), "b": ([41], [-0.5], "stop")}
    assert not _losses(events)


def test_a_turn_of_an_input_that_is_still_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is a turn's; the request lives on and has one end, the last."""
    engine = _Fake(tmp_path, monkeypatch)
    engine.arrive(A)
    engine.schedule({A: 3}, cached={A: 0})
    engine.update({A: 40}, ends={A: "stop"})
    engine.schedule({A: 1})
    engine.live = []
    engine.update({A: 41}, ends={A: "length"})
    run, events = engine.close()

    assert _answers(run, events) == {"a": ([40, 41], [-0.5, -0.5], "length")}
    assert [e.kind for e in events].count("sequence_finished") == 1


def test_rows_of_the_batch_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request has its own tokens and logprobs, also one step ahead and while nothing but them is new; the runner may exchange rows."""
    engine = _Fake(tmp_path, monkeypatch)
    engine.logprobs = {A: -0.25, B: -0.75}
    engine.arrive(A)
    engine.arrive(B)
    engine.schedule({A: 3, B: 3}, cached={A: 0, B: 0})
    for at in range(5):
        engine.schedule({A: 1, B: 1})
        engine.update({A: 50 + at, B: 60 + at}, rows=[B, A] if at < 3 else [A, B])
    engine.live = []
    engine.update({A: 55, B: 65}, ends={A: "stop", B: "length"}, rows=[A, B])
    run, events = engine.close()

    assert _answers(run, events) == {
        "a": ([50, 51, 52, 53, 54, 55], [-0.25] * 6, "stop"),
        "b": ([60, 61, 62, 63, 64, 65], [-0.75] * 6, "length"),
    }


def test_a_runner_whose_rows_begin_with_another_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said is what the engine gave out, not what stands where the token of other runners does."""
    engine = _Fake(tmp_path, monkeypatch)
    engine.first = 7
    engine.arrive(A)
    engine.schedule({A: 3}, cached={A: 0})
    for at in range(3):
        engine.schedule({A: 1})
        engine.update({A: 50 + at})
    engine.live = []
    engine.update({A: 53}, ends={A: "stop"})
    run, events = engine.close()

    assert _answers(run, events) == {"a": ([50, 51, 52, 53], [-0.5] * 4, "stop")}


def test_a_step_of_nobody_after_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for one like that before the loss."""
    engine = _Fake(tmp_path, monkeypatch)
    engine.arrive(A)
    engine.step(first=True)
    engine.tap.scheduled(SimpleNamespace())
    engine.update({})
    engine.schedule({})
    engine.update({})
    run, _ = engine.close()

    assert [[0], [], []] == [list(step.rows) for step in run.steps]


def test_a_recorder_that_cannot_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was let go is told in both sessions; who lived through it has no end, and who came later is recorded whole and as itself."""
    engine = _Fake(tmp_path, monkeypatch)
    engine.logprobs = {A: -0.25, B: -0.75, C: -1.0}
    engine.arrive(A)
    engine.schedule({A: 3}, cached={A: 0})
    engine.tap._send()
    put = engine.tap.pipe.put
    monkeypatch.setattr(engine.tap.pipe, "put", lambda calls, epoch: False)
    engine.arrive(B)  # nobody hears of it
    engine.schedule({A: 1, B: 3}, cached={B: 0})
    engine.update({A: 40})
    engine.tap._send()
    engine.update({A: 41, B: 40}, rows=[B, A])
    engine.schedule({A: 1, B: 1})
    engine.tap._send()
    monkeypatch.setattr(engine.tap.pipe, "put", put)
    engine.arrive(C)
    engine.schedule({A: 1, B: 1, C: 3}, cached={C: 0})
    engine.update({A: 42, B: 41}, rows=[B, A])
    engine.live = [B, C]
    engine.update({A: 43, B: 42, C: 40}, rows=[C, B, A], ends={A: "stop"})
    engine.schedule({B: 1, C: 1})
    engine.live = []
    engine.update({B: 43, C: 41}, rows=[C, B], ends={B: "stop", C: "stop"})
    run, events = engine.close()

    assert _answers(run, events) == {"c": ([40, 41], [-1.0, -1.0], "stop")}
    assert sorted(_losses(events)) == [("engine_ahead", "own"), ("engine_ahead", "steps")]
    assert [0, 1] == sorted(run.requests)
    assert [[0, 1], [1]] == [sorted(step.rows) for step in run.steps[-2:]]
    with pytest.raises(ConflictError, match=r"calls not recorded \(5\): the recorder could not follow"):
        check(run, forced=False)


def test_a_loss_at_the_very_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that ends while too much waits still says that something is missing."""
    engine = _Fake(tmp_path, monkeypatch)
    engine.arrive(A)
    engine.step(first=True)
    engine.tap._send()
    monkeypatch.setattr("ingest.vllm.tap.WAITING_BYTES_MAX", -1)
    engine.step(ends=(A,))
    run, events = engine.close()

    assert _answers(run, events) == {"a": ([40], [-0.5], None)}
    assert sorted(_losses(events)) == [("engine_ahead", "own"), ("engine_ahead", "steps")]


def test_operations_of_a_connector_that_found_no_room_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, in the session of the operations, though none comes after them."""
    engine, outlet = _Fake(tmp_path, monkeypatch, kv_engine="one"), Outlet()
    outlet.attach(engine.tap.pipe)
    monkeypatch.setattr("ingest.vllm.tap.WAITING_BYTES_MAX", -1)
    outlet.put({"operation": "lookup"})
    outlet.put({"operation": "load"})
    outlet.detach(engine.tap.pipe)
    engine.tap.close()
    await_end(tmp_path)
    told = [event.payload for event in events_of(tmp_path) if event.session_id == kv_session("one")]

    assert [("engine_ahead", 2)] == [(each.reason, each.count) for each in told if isinstance(each, RecordsLost)]


def test_what_the_tap_does_not_understand_never_ends_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result of another shape is a call that is missing, and says so; requests that come later are recorded."""
    engine = _Fake(tmp_path, monkeypatch)
    engine.arrive(A)
    engine.schedule({A: 3}, cached={A: 0})
    engine.tap.updated({0: SimpleNamespace()}, None, SimpleNamespace(requests={}), ended=False)
    engine.tap.scheduled(SimpleNamespace())
    engine.tap.updated({0: SimpleNamespace()}, None, SimpleNamespace(requests={}), ended=False)
    engine.live = []
    engine.arrive(B)
    engine.step(first=True, ends=(B,))
    run, events = engine.close()

    assert _answers(run, events) == {"b": ([40], [-0.5], "stop")}
    assert {("recorder_failed", "own"), ("recorder_failed", "steps")} == set(_losses(events))


def test_what_the_recorder_does_not_understand_is_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that make no sense are counted, and the run is recorded to its end; so is a request after them."""
    engine = _Fake(tmp_path, monkeypatch)
    engine.arrive(A)
    engine.step(first=True)
    engine.tap._calls += [("update", None), ("unheard of",), ("kv", {"operation": "lookup"}), ("schedule", 1, b"odd", None, None, None)]
    engine.step(ends=(A,))
    engine.arrive(B)
    engine.step(first=True, ends=(B,))
    run, events = engine.close()

    assert _answers(run, events) == {"a": ([40], [-0.5], None), "b": ([40], [-0.5], "stop")}
    assert {("recorder_failed", "own"), ("recorder_failed", "steps")} == set(_losses(events))
    assert ["engine ended"] * 2 == [e.payload.reason for e in events if isinstance(e.payload, SessionClosed)]


def test_what_cannot_be_sent_ends_the_record_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Sessions say why nothing more follows, and so does a line for the engine's operator."""
    engine = _Fake(tmp_path, monkeypatch)
    engine.arrive(A)
    engine.step(first=True)
    engine.tap._calls.append(("reset", object()))
    engine.step(ends=(A,))
    engine.tap.close()
    await_end(tmp_path)
    events = events_of(tmp_path)

    assert ["no longer recorded: ValueError('unmarshallable object')"] * 2 == [
        e.payload.reason for e in events if isinstance(e.payload, SessionClosed)
    ]
    assert 2 == len(_losses(events))
    assert "nothing more of this engine run is recorded: unmarshallable object" in capfd.readouterr().err


def test_an_engine_that_is_killed_right_after_its_last_answer(tmp_path: Path) -> None:
    """What it said is on the tape to its end."""
    program = f"""
import msgspec, os, pathlib, pytest, signal
from tests.test_enginerun import A, _Fake
engine = _Fake(pathlib.Path({str(tmp_path)!r}), pytest.MonkeyPatch())
engine.arrive(A)
engine.step(first=True)
engine.step(ends=(A,))
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    await_end(tmp_path)
    run, events = _run(tmp_path)

    assert -signal.SIGKILL == killed.returncode
    assert _answers(run, events) == {"a": ([40, 40], [-0.5, -0.5], "stop")}


def test_a_recorder_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one begins, with a run of its own, which says so; what comes later is recorded whole."""
    engine = _Fake(tmp_path, monkeypatch)
    engine.arrive(A)
    engine.step(first=True)
    engine.tap._send()
    _kill_recorder(tmp_path)
    while not engine.tap.pipe.epoch:
        engine.step()
        engine.tap._send()
        time.sleep(0.05)
    engine.step(ends=(A,))
    engine.arrive(B)
    engine.step(first=True)
    engine.step(ends=(B,))
    engine.tap.close()
    await_end(tmp_path)
    (run,) = [one for one in runs_of(tmp_path) if one.requests and one.requests[0].document["request_id"] == B]
    events = [e for e in events_of(tmp_path) if e.session_id in (run.engine_run, steps_session(run.engine_run))]

    assert _answers(run, events) == {"b": ([40, 40], [-0.5, -0.5], "stop")}
    assert ["calls not recorded (1): RecorderEnded()"] == [what.replace("(2)", "(1)").replace("(3)", "(1)") for what in run.hindrances]
    assert {("recorder_failed", "own"), ("recorder_failed", "steps")} == set(_losses(events))


def _kill_recorder(data: Path) -> None:
    """As the system does when memory runs out; it is nobody's child."""
    wanted = f"TOKENTAPE_DATA={data}".encode()
    while True:
        for found in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                arguments, environment = ((found / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
                if b"tokentape.engine" in arguments and wanted in environment and events_of(data):
                    os.kill(int(found.name), signal.SIGKILL)
                    return
        time.sleep(0.05)


def test_numbers_of_numpy_are_numbers() -> None:
    """A connector may answer any kind of number; bytes stay bytes."""
    import numpy

    said = {"tokens_matched": numpy.int64(16), "bytes": numpy.float32(0.5), "hashes": b"ab", "sent": {"y", "x"}, "ok": True}

    assert marshal_safe(said) == {"tokens_matched": 16, "bytes": 0.5, "hashes": b"ab", "sent": ["x", "y"], "ok": True}
    assert [int, float, bool] == [type(marshal_safe(said)[key]) for key in ("tokens_matched", "bytes", "ok")]
