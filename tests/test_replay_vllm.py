"""Compare replay against the real vLLM: what it said itself is recognised, what was changed is told, what cannot be done is said."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from ingest.environment import capture_http
from replay.compare import Outcome, run_compare
from replay.engines.base import Generated, Refused, Request, Scored
from replay.engines.openai import OpenAIEngine
from replay.fold import fold
from schemas import events as e
from schemas.errors import EngineUnavailable
from store.rows import StoredEvent
from tests.conftest import VllmService
from tests.gateway_rig import running
from tests.tape import Tape, finish, ident
from tests.test_compare import Sink

MESSAGES = [{"role": "user", "content": "Tell me about the flight recorder."}]
TOKENS = 48


@pytest.fixture(scope="module")
def spoken(vllm: VllmService) -> dict[str, Generated]:
    """One greedy answer of the engine and three sampled ones, with ids and logprobs."""
    engine = OpenAIEngine(vllm.url)
    greedy = engine.generate(Request(vllm.model, {"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}))
    sampled = engine.generate(Request(vllm.model, {"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 1.0, "seed": 5, "n": 3}))
    engine.close()
    assert isinstance(greedy, Generated)
    assert isinstance(sampled, Generated)
    return {"greedy": greedy, "sampled": sampled}


@pytest.fixture
def engine(vllm: VllmService) -> Iterator[OpenAIEngine]:
    """The engine as replay uses it."""
    made = OpenAIEngine(vllm.url)
    yield made
    made.close()


async def _capture(url: str, previous: e.EnvironmentCaptured | None) -> e.EnvironmentCaptured:
    async with aiohttp.ClientSession() as client:
        return await capture_http(client, url, previous=previous)


def tape_of(
    said: Generated,
    model: str,
    *,
    temperature: float = 0.0,
    environment: e.EnvironmentCaptured | None = None,
    ids: dict[int, int] | None = None,
    shift: float = 0.0,
) -> Tape:
    """The session that recorded this answer; `ids` puts other tokens at some positions, `shift` moves every logprob."""
    tape = Tape("vllm")
    if environment:
        tape.add(environment)
    parameters = {"model": model, "temperature": temperature}
    digest = environment.environment_id if environment else None
    g = tape.request("g", MESSAGES, 0, model=model, parameters=parameters, n=len(said.sequences), environment_id=digest)
    tape.started(g, 1, 1, said.prompt_token_ids)
    for sequence in said.sequences:
        tokens = [(ids or {}).get(i, token) for i, token in enumerate(sequence.token_ids)]
        logprobs = [value + shift for value in sequence.logprobs]
        offsets = [float(i) for i in range(len(tokens))]
        tape.tokens(g, 0, offsets, ["x"] * len(tokens), index=sequence.index, ids=tokens, logprobs=logprobs)
    finish(tape, g, 0, [len(sequence.token_ids) for sequence in said.sequences], 100)
    return tape


def compared(tape: Tape, engine: OpenAIEngine, **options: Any) -> Outcome:
    """The outcome of a compare replay of this session."""
    return compared_events(tape.events, engine, **options)


def compared_events(events: list[StoredEvent], engine: OpenAIEngine, **options: Any) -> Outcome:
    """The outcome of a compare replay of these events."""
    return run_compare(events, engine, Sink(), **options)


def test_what_the_engine_said_itself_is_recognised(vllm: VllmService, spoken: dict[str, Generated], engine: OpenAIEngine) -> None:
    """Every token of greedy and sampled answers is scored, and drift stays under the noise floor."""
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        outcome = compared(tape_of(spoken[name], vllm.model, temperature=temperature), engine)

        assert outcome.verdict in ("identical", "numeric_drift"), outcome.reason
        assert len(spoken[name].sequences) == len(outcome.sequences)
        assert [len(s.token_ids) for s in spoken[name].sequences] == [s.judgement.scored for s in outcome.sequences]


def test_what_the_gateway_recorded_is_recognised(vllm: VllmService, engine: OpenAIEngine, tmp_path: Path) -> None:
    """A streamed conversation through the real gateway, recorder and log holds all that a replay needs, environment included."""
    with running(tmp_path, vllm.url) as rig:
        stream = rig.client().chat.completions.create(model=vllm.model, messages=MESSAGES, n=2, seed=1, max_tokens=32, stream=True)
        assert len(list(stream)) > 2
        events = rig.wait_for("generation_finished")
    stored = [StoredEvent(event, "log", 0, i, event.recorded_at) for i, event in enumerate(events)]
    assert [] == list(fold(stored).anomalies)
    outcome = compared_events(stored, engine, strict=True)

    assert outcome.verdict in ("identical", "numeric_drift"), outcome.reason
    assert [32, 32] == [sequence.judgement.scored for sequence in outcome.sequences]


def test_the_environment_is_the_same_and_strict_goes_on(vllm: VllmService, spoken: dict[str, Generated], engine: OpenAIEngine) -> None:
    """What the gateway captured a moment ago from the same engine has no difference; with another version strict refuses."""
    recorded = asyncio.run(_capture(vllm.url, None))
    outcome = compared(tape_of(spoken["greedy"], vllm.model, environment=recorded), engine, strict=True)

    assert ((), False) == (outcome.differences, outcome.refused)
    assert outcome.verdict in ("identical", "numeric_drift")
    items = [pair if pair.key != "version" else e.Pair(key="version", value='"0.1.0"') for pair in recorded.items]
    older = recorded.model_copy(update={"items": items, "environment_id": bytes(32)})
    refused = compared(tape_of(spoken["greedy"], vllm.model, environment=older), engine, strict=True)
    assert (["version"], True) == ([difference.key for difference in refused.differences], refused.refused)


def test_shifted_logprobs_are_another_model(vllm: VllmService, spoken: dict[str, Generated], engine: OpenAIEngine) -> None:
    """Every logprob a quarter nat lower than what the engine thinks: no noise does that."""
    outcome = compared(tape_of(spoken["sampled"], vllm.model, temperature=1.0, shift=-0.25), engine)

    assert "model_differs" == outcome.verdict
    assert 0 == outcome.sequences[0].judgement.first_telling


def test_slightly_shifted_logprobs_are_numeric_drift(vllm: VllmService, spoken: dict[str, Generated], engine: OpenAIEngine) -> None:
    """A hundredth of a nat is within what kernels do."""

    assert "numeric_drift" == compared(tape_of(spoken["sampled"], vllm.model, temperature=1.0, shift=-0.01), engine).verdict


def test_an_exchanged_token_tells_where(vllm: VllmService, spoken: dict[str, Generated], engine: OpenAIEngine) -> None:
    """One id is replaced by an unlikely one: its logprob no longer fits, and it is the first token that tells."""
    outcome = compared(tape_of(spoken["greedy"], vllm.model, ids={20: 3}), engine)

    assert ("model_differs", 20) == (outcome.verdict, outcome.sequences[0].judgement.first_telling)


def test_sampled_tokens_recorded_as_greedy_are_another_sampling(
    vllm: VllmService, spoken: dict[str, Generated], engine: OpenAIEngine
) -> None:
    """Logprobs agree, but tokens drawn at temperature 1 are not the likeliest that temperature 0 promises."""
    outcome = compared(tape_of(spoken["sampled"], vllm.model, temperature=0.0), engine)

    assert "sampling_differs" == outcome.verdict
    assert outcome.sequences[0].judgement.first_telling is not None


@pytest.mark.parametrize(
    ("prompt", "ids", "model", "reason"),
    [
        ((1, 2), (10**6,), None, "out of vocabulary"),
        ((1, 2), (-5,), None, "refused"),
        ((1,) * 4000, (5, 6), None, "status 400"),
        ((1, 2), (5,), "another", "does not exist"),
    ],
)
def test_what_the_engine_refuses_is_inconclusive_in_one_line(
    vllm: VllmService, engine: OpenAIEngine, prompt: tuple[int, ...], ids: tuple[int, ...], model: str | None, reason: str
) -> None:
    """Unknown ids, a sequence longer than the context, a model that is not served: the engine's words, no exception."""
    tape = Tape()
    g = tape.request("g", MESSAGES, 0, model=model or vllm.model)
    tape.started(g, 1, 1, prompt)
    tape.tokens(g, 0, [float(i) for i in range(len(ids))], ["x"] * len(ids), ids=ids, logprobs=[-1.0] * len(ids))
    outcome = compared(tape, engine)

    assert "inconclusive" == outcome.verdict
    assert reason in outcome.reason
    assert "\n" not in outcome.reason


def test_a_sequence_that_fills_the_context_is_scored_but_for_its_last_token(vllm: VllmService, engine: OpenAIEngine) -> None:
    """One token must be left to sample: the rest is scored, and the count says so."""
    limit = _max_model_len(vllm)
    found = engine.force(Request(vllm.model), (5,) * (limit - 8), (6,) * 8)

    assert isinstance(found, Scored)
    assert [True] * 7 + [False] == [value is not None for value in found.logprobs]


def _max_model_len(vllm: VllmService) -> int:
    parts = urlsplit(vllm.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    connection.request("GET", "/v1/models")
    limit = json.loads(connection.getresponse().read())["data"][0]["max_model_len"]
    connection.close()
    return int(limit)


def test_another_name_may_stand_in_for_the_model(vllm: VllmService, spoken: dict[str, Generated]) -> None:
    """A model that is served under another name today is compared when that name is given."""
    engine = OpenAIEngine(f"{vllm.url}/v1", model=vllm.model)
    outcome = compared(tape_of(spoken["greedy"], "yesterday"), engine)
    engine.close()

    assert outcome.verdict in ("identical", "numeric_drift")
    assert ident("g") == outcome.generations[0].generation_id


def test_an_engine_that_is_down_is_one_line_and_records_nothing(spoken: dict[str, Generated], vllm: VllmService) -> None:
    """Where the environment cannot even be asked the replay does not begin."""

    sink = Sink()
    with pytest.raises(EngineUnavailable):
        run_compare(tape_of(spoken["greedy"], vllm.model).events, OpenAIEngine("http://127.0.0.1:9"), sink)

    assert [] == sink.recorded


def test_a_refused_generation_is_no_exception(vllm: VllmService) -> None:
    """A request that the engine does not take comes back with its reason."""
    engine = OpenAIEngine(vllm.url)
    found = engine.generate(Request(vllm.model, {"messages": [], "temperature": -5}))
    engine.close()

    assert isinstance(found, Refused)
