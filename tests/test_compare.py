"""Compare replay without an engine: the statistics of drift, the verdicts, what is recorded, and servers that misbehave."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from replay.compare import run_compare
from replay.drift import beyond_limit, judge, worst
from replay.engines.base import Alternatives, Forced, Generated, Refused, Request, Scored, Spoken
from replay.engines.openai import OpenAIEngine
from replay.engines.recorded import RecordedEngine
from replay.floors import Floor, floor_of, measured
from replay.fold import fold
from replay.render import OutcomeView
from replay.sampling import is_greedy
from schemas import events as e
from schemas.errors import EngineUnavailable, UnknownSession, UsageError
from schemas.sink import SessionContext
from store.rows import StoredEvent
from tests.tape import QUESTION, START, Tape, environment, finish, ident, incident
from tests.test_timeline import drawn

FLOOR = Floor(0.1, "test")


def scored(logprobs: list[float], tops: list[float] | None = None) -> Scored:
    """Scores whose likeliest token is the token itself, unless told otherwise."""
    return Scored(tuple(logprobs), (1,) * len(logprobs), tuple(tops or logprobs))


class Sink:
    """Keeps what a replay records."""

    def __init__(self) -> None:
        self.recorded: list[tuple[SessionContext, e.Payload]] = []

    def record(self, session: SessionContext, payload: e.Payload) -> None:
        """Keep it."""
        self.recorded.append((session, payload))

    def events(self) -> list[StoredEvent]:
        """What was recorded, as the log would hold it."""
        stored = []
        for i, (session, payload) in enumerate(self.recorded):
            event = e.Event(
                event_id=session.session_id[8:] + i.to_bytes(8, "big"), session_id=session.session_id, salt=session.salt,
                tenant=session.tenant, source="replay", producer_id=session.session_id[8:], producer_seq=i,
                recorded_at=START + i, payload=payload,
            )  # fmt: skip
            stored.append(StoredEvent(event, "log", 0, i, START))
        return stored


class Scorer:
    """An engine whose scores a test decides: `view` maps recorded ids to scores."""

    def __init__(self, view: Callable[[tuple[int, ...]], Scored | Refused], present: e.EnvironmentCaptured | None = None) -> None:
        self.view, self.present, self.asked = view, present, 0

    name = "scorer"

    def fingerprint(self, recorded: e.EnvironmentCaptured | None = None) -> e.EnvironmentCaptured | None:
        """The environment that the test gave."""
        return self.present

    def generate(self, request: Request) -> Generated | Refused:
        """Not asked here."""
        return Refused("not asked")

    def force(self, request: Request, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> Scored | Refused:
        """What the test decides."""
        self.asked += 1
        return self.view(token_ids)

    def render(self, request: Request) -> tuple[int, ...] | Refused:
        """Not asked here."""
        return Refused("not asked")

    def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
        """One after another."""
        return [self.generate(request) for request in requests]

    def force_all(self, several: Sequence[Forced]) -> list[Scored | Refused]:
        """One after another."""
        return [self.force(each.request, each.prompt_token_ids, each.token_ids) for each in several]

    def close(self) -> None:
        """Nothing."""


def taped(
    logprobs: list[float], *, temperature: float | None = 0.0, ids: bool = True, told: e.EnvironmentCaptured | None = None, **fields: Any
) -> Tape:
    """A session of one generation with these logprobs; token i has id i."""
    tape = Tape()
    first = told or environment()
    tape.add(first)
    parameters = {"model": "tiny", "temperature": temperature, **fields}
    g = tape.request("g", [QUESTION], 0, environment_id=first.environment_id, parameters=parameters)
    tape.started(g, 1, 1, range(5))
    count = max(len(logprobs), 1)
    tape.tokens(g, 0, [float(i) for i in range(count)], ["x"] * count, ids=range(count) if ids else (), logprobs=logprobs)
    finish(tape, g, 0, [count], 100)
    return tape


def test_equal_logprobs_are_identical() -> None:
    """Also where both are minus infinity, and where printing changed the last bit."""
    recorded = [-1.0, float("-inf"), -9.123456]
    found = judge(recorded, scored([-1.0, -9999.0, -9.1234569]), floor=FLOOR, greedy=True)

    assert ("identical", None, 3) == (found.verdict, found.first_telling, found.scored)


def test_noise_under_the_floor_is_numeric_drift() -> None:
    """The first differing token is named, and mean, p99 and maximum are those of the drift."""
    found = judge([-1.0, -2.0, -3.0], scored([-1.0, -2.05, -3.01]), floor=FLOOR, greedy=False)

    assert ("numeric_drift", 1) == (found.verdict, found.first_telling)
    assert [0.02, 0.05, 0.05] == [pytest.approx(value) for value in (found.drift_mean, found.drift_p99, found.drift_max)]


@pytest.mark.parametrize(
    "present",
    [
        [-1.0] * 39 + [-1.9],
        [-1.11] * 5 + [-1.0] * 35,
        [-1.06] * 40,
        [-1.0] * 39 + [float("-inf")],
    ],
)
def test_more_than_noise_is_another_model(present: list[float]) -> None:
    """One token far off, too many above the floor, a mean too high, or a token that became impossible: each alone tells."""

    assert "model_differs" == judge([-1.0] * 40, scored(present), floor=FLOOR, greedy=False).verdict


def test_a_greedy_token_that_is_not_the_likeliest_is_another_sampling() -> None:
    """Only beyond noise and ties, and only where the request was greedy."""
    logprobs, tops = [-0.5] * 20, [-0.5] * 20
    tops[7] = -0.1

    assert "identical" == judge(logprobs, scored(logprobs, tops), floor=FLOOR, greedy=True).verdict
    tops[11] = -0.05
    found = judge(logprobs, scored(logprobs, tops), floor=FLOOR, greedy=True)
    assert ("sampling_differs", 11) == (found.verdict, found.first_telling)
    assert "identical" == judge(logprobs, scored(logprobs, tops), floor=FLOOR, greedy=False).verdict


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 512])
def test_noise_hardly_ever_raises_an_alarm(tokens: int) -> None:
    """Of 1,500 sequences whose drift has its 99th percentile at the floor, no more than two are called another model."""
    rng = np.random.default_rng(tokens)
    drift = rng.exponential(FLOOR.nats / math.log(100), (1500, tokens))
    recorded = [-2.0] * tokens
    alarms = sum(judge(recorded, scored((-2.0 - row).tolist()), floor=FLOOR, greedy=False).verdict == "model_differs" for row in drift)

    assert alarms <= 2


def _binomial(n: int, k: int) -> float:
    choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(choose + k * math.log(0.01) + (n - k) * math.log(0.99))


def test_the_count_limit_is_the_binomial_one() -> None:
    """At each length, exceeding the limit has a chance of at most 1e-4, and the limit below would not."""
    for tokens in (1, 10, 100, 1000, 20_000):
        limit = beyond_limit(tokens)
        pmf = [_binomial(tokens, k) for k in range(limit + 1)]

        assert 1 - sum(pmf) <= 1.001e-4 < 1 - sum(pmf[:-1]) + 1e-9


def test_floors_follow_the_environment() -> None:
    """By dtype, the wider of both sides; unknown is taken as bfloat16, and on a CPU its floor is known to be lower."""
    single = environment(**{"config.model_config.dtype": "torch.float32"})
    half = environment(**{"config.model_config.dtype": "torch.bfloat16"})
    cpu = environment(**{"config.model_config.dtype": "torch.bfloat16", "config.device_config.device_type": "cpu"})

    assert [1e-4, 0.16, 0.16, 3e-2, 0.16, 0.16] == [
        floor_of(each).nats for each in ([single], [half], [single, half], [cpu, cpu], [cpu, half], [environment()])
    ]
    assert 0.16 == floor_of([None]).nats


class Noisy(Scorer):
    """An engine whose prefill differs from what it said by `noise` nats at each token."""

    def __init__(self, noise: float, said: int = 64) -> None:
        super().__init__(lambda ids: scored([-1.0 - noise] * len(ids)), environment())
        self.said = said

    def generate(self, request: Request) -> Generated | Refused:
        """One sequence of logprobs -1."""
        return Generated((Spoken(0, "", tuple(range(self.said)), (-1.0,) * self.said),), (1, 2))


@pytest.mark.parametrize(
    ("noise", "said", "expected"),
    [(0.0, 64, 0.03), (0.02, 64, 0.04), (0.5, 64, 0.16), (0.0, 8, 0.16), (0.0, 0, 0.16)],
)
def test_an_engine_measures_its_own_floor(noise: float, said: int, expected: float) -> None:
    """Twice its own noise, between what rounding explains and the default; too few tokens measure nothing."""

    assert expected == pytest.approx(measured(Noisy(noise, said), "tiny", floor_of([None])).nats)


def test_a_measured_floor_sees_what_the_default_hides() -> None:
    """A drift of 0.05 nats is another model to an engine without noise, and noise to one with other kernels than recorded."""
    tape = taped([-1.0] * 40)
    engine = Noisy(0.0)
    engine.view = lambda ids: scored([-1.05] * 40 if len(ids) == 40 else [-1.0] * len(ids))

    assert "model_differs" == run_compare(tape.events, engine, Sink()).verdict
    engine.present = environment("0.33.0")
    assert "numeric_drift" == run_compare(tape.events, engine, Sink()).verdict


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0.0, "presence_penalty": 0, "tool_choice": "auto"}, True),
        ({"temperature": 0, "response_format": {"type": "text"}}, True),
        ({}, False),
        (None, False),
        ({"temperature": 0.7}, False),
        ({"temperature": 0, "logit_bias": {"5": 100}}, False),
        ({"temperature": 0, "presence_penalty": 1}, False),
        ({"temperature": 0, "repetition_penalty": 1.0}, True),
        ({"temperature": 0, "repetition_penalty": 1.1}, False),
        ({"temperature": 0, "tool_choice": "required"}, False),
        ({"temperature": 0, "response_format": {"type": "json_object"}}, False),
        ({"temperature": 0, "guided_regex": "a*"}, False),
        ({"temperature": 0, "thinking_token_budget": 16}, False),
        ({"temperature": 0, "thinking_token_budget": -1}, True),
        ({"temperature": 0, "watermarking": True}, False),
    ],
)
def test_greedy_means_nothing_bends_the_choice(document: dict[str, Any] | None, expected: bool) -> None:
    """Penalties, biases, grammars and forced tools let greedy decoding take another token than the likeliest."""

    assert expected is is_greedy(document)


NAMED = {"repetition_penalty": 1.0, "presence_penalty": 0, "frequency_penalty": 0}


@pytest.mark.parametrize(
    ("defaults", "likelier", "fields", "verdict"),
    [
        (None, 3, {}, "inconclusive"),
        (None, 900, {}, "sampling_differs"),
        (None, 3, NAMED, "sampling_differs"),
        ({}, 3, {}, "sampling_differs"),
        ({"repetition_penalty": 1.05}, 3, {}, "identical"),
        ({"repetition_penalty": 1.05}, 3, NAMED, "sampling_differs"),
    ],
)
def test_a_penalty_of_the_server_is_not_held_against_greedy_tokens(
    defaults: dict[str, Any] | None, likelier: int, fields: dict[str, Any], verdict: str
) -> None:
    """Where it is not told what a server sets for all, a token that had occurred may have been passed over; one that had not cannot."""
    items: dict[str, Any] = {} if defaults is None else {"sampling.defaults": defaults}
    tape = taped([-1.0] * 20, told=environment(**items), **fields)
    tops = [-1.0] * 20
    tops[7] = -0.1

    def view(ids: tuple[int, ...]) -> Scored:
        places = [
            Alternatives(np.array([token, likelier]), np.array([-1.0, tops[i] if i == 7 else -2.0]), False) for i, token in enumerate(ids)
        ]
        return replace(scored([-1.0] * len(ids), tops), alternatives=tuple(places))

    outcome = run_compare(tape.events, Scorer(view), Sink())

    assert verdict == outcome.verdict
    assert ("what it sets is not told" in outcome.reason) is (verdict == "inconclusive")


def test_why_choices_are_not_made_again() -> None:
    """An engine that is not known on both sides may well be calibrated."""
    tape, known = taped([-1.0], temperature=1.0, seed=1), environment()

    def reason(present: e.EnvironmentCaptured | None) -> str:
        return run_compare(tape.events, Scorer(lambda _: scored([-1.0]), present), Sink()).reason

    assert "the environment is not known on both sides" in reason(None)
    assert "the engine is not calibrated" in reason(known)
    assert "computes in another way" in reason(environment("0.31.0"))


FORMS = ({"response_format": {"type": "json_object"}}, {"tool_choice": "required"}, {"structured_outputs": {"choice": ["a", "b"]}})


@pytest.mark.parametrize("form", FORMS)
def test_what_a_grammar_left_out_is_not_held_against_the_model(form: dict[str, Any]) -> None:
    """It raises the logprobs of what is left, to 0 where nothing else is: nothing is told by that, and all by one that is lower."""
    own, raised = [-9.0, -4.0, -2.0, -0.5], [0.0, -4.0, -0.3, -0.5]

    def verdict(present: list[float]) -> tuple[str, str]:
        found = run_compare(taped(raised, temperature=1.0, **form).events, Scorer(lambda _: scored(present)), Sink())
        return found.verdict, found.reason

    assert "inconclusive" == verdict(own)[0]
    assert "a grammar left tokens out" in verdict(own)[1]
    assert "identical" == verdict(raised)[0]
    assert "model_differs" == verdict([-9.0, -0.01, -2.0, -0.5])[0]


def test_without_a_grammar_a_raised_logprob_is_another_model() -> None:
    """What bends the choice after logprobs were taken does not excuse them."""
    for more in ({}, {"presence_penalty": 1.0}, {"logit_bias": {"5": 3}}, {"response_format": {"type": "text"}}):
        tape = taped([0.0, -1.0], temperature=1.0, **more)

        assert "model_differs" == run_compare(tape.events, Scorer(lambda _: scored([-9.0, -1.0])), Sink()).verdict


@pytest.mark.parametrize(
    ("mode", "asked", "expected"),
    [
        ("raw_logprobs", {"temperature": 0.5}, "model_differs"),
        ("processed_logprobs", {"temperature": 0.5}, "inconclusive"),
        ("LogprobsMode.processed_logprobs", {"temperature": 1.0, "top_k": 5}, "inconclusive"),
        ("processed_logprobs", {"temperature": 1.0, "presence_penalty": 1.0}, "inconclusive"),
        ("processed_logprobs", {"temperature": 1.0, "top_k": -1, "top_p": 1.0}, "model_differs"),
        ("processed_logprobs", {"temperature": 0.0, "top_k": 5}, "model_differs"),
        ("raw_logits", {"temperature": 1.0}, "inconclusive"),
    ],
)
def test_other_numbers_than_logprobs_of_the_model_are_not_compared(mode: str, asked: dict[str, Any], expected: str) -> None:
    """A server may give what it drew from, or logits; where that is the same as the model's own logprobs it counts."""
    told = environment(**{"config.model_config.logprobs_mode": mode})
    found = run_compare(taped([-3.0, -3.0], told=told, **asked).events, Scorer(lambda _: scored([-1.0, -1.0]), told), Sink())

    assert expected == found.verdict
    assert ("--logprobs-mode" in found.reason) == (expected == "inconclusive")


def test_what_differs_outweighs_what_could_not_be_told() -> None:
    """And what could not be told outweighs agreement; of nothing nothing can be told."""

    assert "model_differs" == worst(["identical", "inconclusive", "model_differs", "sampling_differs"])
    assert "inconclusive" == worst(["identical", "inconclusive", "numeric_drift"])
    assert "numeric_drift" == worst(["identical", "numeric_drift"])
    assert "inconclusive" == worst([])


def test_a_replay_is_recorded_in_a_session_of_its_own() -> None:
    """Every event goes to a new session that names the replayed one as its parent; what was found can be folded and shown."""
    tape, sink = incident(), Sink()
    subject = fold(tape.events)
    outcome = run_compare(tape.events, RecordedEngine(subject), sink, actor="dev:bo")

    assert ("identical", False, True) == (outcome.verdict, outcome.refused, outcome.environment_known)
    assert {outcome.session_id} == {session.session_id for session, _ in sink.recorded}
    assert subject.session_id not in {session.session_id for session, _ in sink.recorded}
    assert {("acme", "replay", "dev:bo")} == {(session.tenant, session.source, session.actor) for session, _ in sink.recorded}
    kinds = [payload.KIND for _, payload in sink.recorded]
    expected = ["session_opened", "environment_captured", "replay_started", *["sequence_compared"] * 5, "replay_finished", "session_closed"]
    assert expected == kinds
    state = fold(sink.events())
    assert [] == list(state.anomalies)
    assert state.opened is not None
    assert (subject.session_id, tape.events[-1].event.event_id) == (state.opened.parent_session, state.opened.parent_event)
    (replay,) = state.replays.values()
    assert replay.finished is not None
    assert ("identical", 4, 5, 204) == (
        replay.finished.verdict,
        replay.finished.generations,
        replay.finished.sequences,
        replay.finished.tokens,
    )
    assert "the choice of sampled tokens is not recomputed" in (replay.compared[0].reason or "")


def test_the_outcome_is_json_and_readable() -> None:
    """Program and person get the same: verdicts, figures, the environment's differences by name."""
    tape = taped([-1.0] * 20)
    engine = Scorer(lambda ids: scored([-1.0 - 0.5 * (i > 4) for i in ids]), environment("0.33.0"))
    outcome = run_compare(tape.events, engine, Sink())
    document = json.loads(json.dumps(outcome.document()))
    text = drawn(OutcomeView(outcome), 200)

    assert "model_differs" == document["verdict"]
    assert 5 == document["generations"][0]["sequences"][0]["first_telling"]
    assert ["version"] == [difference["key"] for difference in document["differences"]]
    assert "version (numeric): the version of vLLM: 0.32.0 → 0.33.0" in text
    assert "verdict: model differs" in text
    assert "first at token 5" in text


def test_strict_refuses_a_differing_environment_and_loose_records_it() -> None:
    """Strict asks the engine for nothing; loose goes on; both record the difference."""
    tape = taped([-1.0] * 20)
    engine = Scorer(lambda ids: scored([-1.0] * len(ids)), environment("0.33.0"))
    sink = Sink()
    outcome = run_compare(tape.events, engine, sink, strict=True)

    assert ("inconclusive", True, 0) == (outcome.verdict, outcome.refused, engine.asked)
    assert "strict: the environment is not the recorded one (1 difference: version)" == outcome.reason
    assert "replay_finished" in [payload.KIND for _, payload in sink.recorded]
    loose = run_compare(tape.events, engine, Sink())
    assert ("identical", ["version"]) == (loose.verdict, [difference.key for difference in loose.differences])
    same = Scorer(engine.view, environment())
    assert "identical" == run_compare(tape.events, same, Sink(), strict=True).verdict


def test_strict_refuses_an_unknown_environment() -> None:
    """What cannot be asked cannot be the same."""
    outcome = run_compare(taped([-1.0]).events, Scorer(lambda ids: scored([-1.0])), Sink(), strict=True)

    assert outcome.refused
    assert "not known on both sides" in outcome.reason


@pytest.mark.parametrize(
    ("tape", "reason"),
    [
        (taped([], ids=False), "the recording has no token ids"),
        (taped([]), "the recording has no logprobs; all 1 greedy tokens still are the likeliest"),
        (taped([], temperature=0.8), "the recording has no logprobs"),
    ],
)
def test_a_recording_that_lacks_something_is_inconclusive_with_the_reason(tape: Tape, reason: str) -> None:
    """Without ids nothing can be forced; without logprobs only greedy tokens can be looked at."""
    outcome = run_compare(tape.events, Scorer(lambda ids: scored([-1.0] * len(ids))), Sink())

    assert ("inconclusive", reason) == (outcome.sequences[0].judgement.verdict, outcome.sequences[0].judgement.reason)


def test_greedy_tokens_without_logprobs_that_no_longer_lead_are_named() -> None:
    """The weaker test cannot tell model from sampling, but says where they part."""
    engine = Scorer(lambda ids: scored([-9.0] * len(ids), [-0.1] * len(ids)))
    outcome = run_compare(taped([]).events, engine, Sink())

    assert 0 == outcome.sequences[0].judgement.first_telling
    assert "model or sampling differs" in outcome.reason


def test_images_and_holes_are_told() -> None:
    """A prompt with an image is not forced; tokens behind a hole are left out and the reason says so."""
    tape = Tape()
    message = {"role": "user", "content": [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": "data:"}}]}
    g = tape.request("g", [message], 0)
    tape.started(g, 1, 1, range(3))
    tape.tokens(g, 0, [1.0], ["x"], ids=[1], logprobs=[-1.0])
    engine = Scorer(lambda ids: scored([-1.0] * len(ids)))
    pictured = run_compare(tape.events, engine, Sink())

    assert "its prompt holds image_url, which token ids do not carry" == pictured.sequences[0].judgement.reason
    holed = taped([-1.0, -1.0])
    holed.tokens(ident("g"), 0, [9.0], ["x"], position=5, ids=[5], logprobs=[-1.0])
    outcome = run_compare(holed.events, engine, Sink())
    assert "2 of 3 tokens scored, as tokens 2 to 4 are not on the tape" in outcome.sequences[0].judgement.reason


def test_an_engine_that_dies_in_the_middle_leaves_the_rest_inconclusive() -> None:
    """What was judged stays judged; the engine is not asked again; the replay still ends properly."""
    tape, sink = incident(), Sink()
    calls = []

    def view(ids: tuple[int, ...]) -> Scored:
        calls.append(ids)
        if len(calls) > 2:
            raise EngineUnavailable("gone", operation="ask engine")
        return scored([-1.0] * len(ids))

    outcome = run_compare(tape.events, Scorer(view), sink)

    assert 3 == len(calls)
    assert ["model_differs"] * 2 + ["inconclusive"] * 3 == [s.judgement.verdict for s in outcome.sequences]
    assert "ask engine: gone" == outcome.sequences[4].judgement.reason
    assert "session_closed" == sink.recorded[-1][1].KIND


def test_a_session_without_events_is_unknown() -> None:
    """Nothing is recorded for it."""
    sink = Sink()
    with pytest.raises(UnknownSession):
        run_compare([], Scorer(lambda ids: Refused("")), sink)

    assert [] == sink.recorded


def test_a_session_without_tokens_has_nothing_to_compare() -> None:
    """Failed requests are counted beside, and the verdict says why there is none."""
    tape = Tape()
    tape.request("g", [QUESTION], 0)
    outcome = run_compare(tape.events, Scorer(lambda ids: Refused("")), Sink())

    assert ("inconclusive", "no recorded tokens", 1) == (outcome.verdict, outcome.reason, outcome.skipped)


# servers that misbehave: each is a real HTTP server with a fixed answer


@contextmanager
def server(status: int, body: bytes, *, keep: bool = True) -> Iterator[str]:
    """A server that answers every POST alike; without `keep` it says that it keeps the connection and closes it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = not keep

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join()


def forced(url: str, ids: tuple[int, ...] = (1, 2)) -> Scored | Refused:
    """One attempt to force tokens."""
    engine = OpenAIEngine(url, timeout_s=10)
    try:
        return engine.force(Request("m"), (7,), ids)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (200, b'{"choices":[{"text":"x"}]}', "without prompt_logprobs"),
        (200, b'{"choices":[{"prompt_logprobs":[null]}]}', "scored 1 tokens of 3"),
        (200, b'{"choices":[]}', "no completion"),
        (200, b"<html>", "no completion"),
        (200, b"[1]", "no completion"),
        (404, b'{"detail":"Not Found"}', "no /v1/completions"),
        (
            404,
            b'{"error":{"message":"The model `m` does not exist.\\nValid: n"}}',
            "The model `m` does not exist.⏎Valid: n; name the model",
        ),
        (400, b'{"error":{"message":"Token id 5 is out of vocabulary"}}', "out of vocabulary"),
        (400, b"", "no explanation"),
    ],
)
def test_a_server_that_cannot_score_is_refused_with_its_reason(status: int, body: bytes, reason: str) -> None:
    """Each answer that is no score becomes one line, never an exception."""
    with server(status, body) as url:
        found = forced(url)

    assert isinstance(found, Refused)
    assert reason in found.reason
    assert "\n" not in found.reason


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_a_server_that_may_answer_later_is_unavailable(status: int) -> None:
    """Keys, limits and inner errors are the server's state, not the recording's."""
    with server(status, b'{"error":{"message":"busy"}}') as url, pytest.raises(EngineUnavailable) as caught:
        forced(url)

    assert f"status {status}: busy" in str(caught.value)
    assert caught.value.hint


def test_nobody_there_silence_and_noise_are_unavailable() -> None:
    """A closed port, a listener that says nothing in time, one that speaks no HTTP, and a name that does not resolve."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(EngineUnavailable, match="does not answer"):
        forced(f"http://127.0.0.1:{port}")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = OpenAIEngine(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
        with pytest.raises(EngineUnavailable, match="no answer in time"):
            engine.force(Request("m"), (1,), (2,))
    with pytest.raises(EngineUnavailable, match="does not answer"):
        forced("http://name.invalid:1")


def test_a_connection_closed_meanwhile_is_opened_anew() -> None:
    """A kept connection that the server dropped is no outage."""
    body = b'{"choices":[{"prompt_logprobs":[null,{"1":{"logprob":-1.5,"rank":2},"9":{"logprob":-0.5,"rank":1}}]}]}'
    with server(200, body, keep=False) as url:
        engine = OpenAIEngine(url, timeout_s=10)
        answers = [engine.force(Request("m"), (7,), (1,)) for _ in range(3)]
        engine.close()

    assert [Scored((-1.5,), (2,), (-0.5,))] * 3 == answers


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://u:secret@host:1/v1/", "http://host:1"),
        ("https://host/prefix/v1?key=secret", "https://host/prefix"),
    ],
)
def test_addresses_are_shown_without_credentials(url: str, place: str) -> None:
    """With or without /v1, scheme and path; secrets never reach a report."""

    assert f"openai {place}" == OpenAIEngine(url).name


@pytest.mark.parametrize("url", ["", "ftp://host", "http://", "http://host:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    """At once, with an example."""
    with pytest.raises(UsageError) as caught:
        OpenAIEngine(url)

    assert "http://127.0.0.1:8000" in caught.value.hint
