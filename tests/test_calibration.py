"""Calibrated verdicts without an engine: the chances that they state, where calibrations are kept, digests and words."""

from __future__ import annotations

import datetime as dt
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from replay.calibration import (
    FALSE_ALARM,
    Calibration,
    Calibrations,
    Measured,
    calibrated,
)
from replay.chances import binomial_limit, gamma_tail, upper_share
from replay.compare import run_compare
from replay.differences import report, sentence
from replay.drift import judge
from replay.engines.base import Request, Scored
from replay.floors import Floor
from replay.noise import KNOWN
from replay.sampling import Sampler, defaults_of, effective, sampler_of
from schemas.environment import capture, compare
from schemas.errors import CorruptStore
from schemas.events import EnvironmentCaptured
from store.digests import FileDigests, combined
from tests.tape import Tape, environment
from tests.test_compare import Scorer, Sink, scored, taped

RNG_SEEDS = range(3)
Floats = npt.NDArray[np.float64]


def noise(rng: np.random.Generator, sequences: int, tokens: int, *, nats: float = 0.01, shared: float = 0.0) -> list[tuple[Floats, Floats]]:
    """Logprobs and drifts: unlikely tokens drift more, and `shared` makes whole sequences drift more than others."""
    found = []
    for _ in range(sequences):
        logprobs = -rng.exponential(1.0, tokens)
        scale = nats * (0.2 + np.minimum(-logprobs, 3.0)) * math.exp(shared * rng.normal())
        found.append((logprobs, np.abs(rng.normal(0, scale))))
    return found


def calibration(rng: np.random.Generator, present: EnvironmentCaptured | None = None, **options: Any) -> Calibration:
    """A calibration from 64 sequences of 128 tokens of noise."""
    measured = [Measured("test", logprobs, drift) for logprobs, drift in noise(rng, 64, 128, **options)]
    return calibrated(present or environment(), "test", measured, dtype="bfloat16", made_at=dt.datetime.now(dt.UTC))


@pytest.mark.parametrize("shared", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [8, 64, 300])
def test_noise_hardly_ever_raises_an_alarm(tokens: int, shared: float) -> None:
    """Of 2,000 honest replays at most as many as the stated chance lets expect, also where sequences differ as a whole."""
    rng = np.random.default_rng(tokens)
    found = calibration(rng, shared=shared)
    alarms = sum(found.test(*one).reason is not None for one in noise(rng, 2000, tokens, shared=shared))

    assert alarms <= 6  # 2 are expected at most; more than 6 would come by chance once in 200 runs of a test that is exact


@pytest.mark.parametrize("seed", RNG_SEEDS)
def test_a_little_more_than_noise_is_told_within_300_tokens(seed: int) -> None:
    """Drift of twice the noise is no noise, and the first token that tells is one that was rare while calibrating."""
    rng = np.random.default_rng(seed)
    found = calibration(rng)
    for logprobs, drift in noise(rng, 20, 300, nats=0.02):
        tested = found.test(logprobs, drift)

        assert tested.reason is not None
        assert tested.telling is not None
        assert found.p_values(logprobs, drift)[tested.telling] <= 0.01


def test_one_impossible_token_tells_alone() -> None:
    """Where it stands is named; a drift that rounding explains is none, even if calibrating saw nothing move."""
    still = [Measured("still", np.full(64, -1.0), np.zeros(64))] * 8
    found = calibrated(environment(), "test", still, dtype="float32", made_at=dt.datetime.now(dt.UTC))
    drift = np.zeros(40)
    drift[7] = 1e-5

    assert found.test(np.full(40, -1.0), drift).reason is None
    drift[9] = 0.5
    assert 9 == found.test(np.full(40, -1.0), drift).telling


def test_chances_are_those_of_the_tables() -> None:
    """Gamma tails, binomial limits and upper shares against known values."""

    assert math.exp(-3) == pytest.approx(gamma_tail(1, 3))
    assert 0.5 == pytest.approx(gamma_tail(50, 49.667), abs=1e-3)
    assert 0.0699 == pytest.approx(gamma_tail(10, 15.0), abs=1e-4)
    assert 1.0 == gamma_tail(5, 0)
    assert 1e-40 > gamma_tail(300, 700)
    assert [0, 1, 8] == [binomial_limit(300, share, 1e-3) for share in (1e-6, 1e-4, 8e-3)]
    assert 9.2 / 1000 == pytest.approx(upper_share(0, 1000), rel=0.05)


def test_calibrations_are_found_by_what_they_hold_for(tmp_path: Path) -> None:
    """Another weight or kernel is another engine; scheduling and a probe's flutter are not."""
    rng = np.random.default_rng(0)
    probe: dict[str, Any] = {"probe.logprobs": [-1.0, -2.0], "probe.choices": [5, 6]}
    store = Calibrations(tmp_path / "calibrations")
    store.save(calibration(rng, environment(**probe)))
    present = environment(**{**probe, "probe.logprobs": [-1.02, -2.0], "cache.block_size": 32})

    found = store.of(present)
    assert found is not None
    assert found == store.all()[0]
    assert store.of(environment("0.33.0", **probe)) is None
    assert store.of(environment(**{**probe, "probe.logprobs": [-1.9, -2.0]})) is None
    assert store.of(environment(dtype="bfloat16", **probe)) is None


def test_a_damaged_calibration_is_one_line(tmp_path: Path) -> None:
    """It says which file, and what to do."""
    (tmp_path / "x.json").write_text('{"engine": 1}')
    with pytest.raises(CorruptStore) as caught:
        Calibrations(tmp_path).of(environment())

    assert "x.json" in str(caught.value)
    assert "tokentape calibrate" in caught.value.hint


def recorded_in(tape: Tape, present: EnvironmentCaptured) -> None:
    """Let a session of one request have been recorded in this environment."""
    for i, stored in enumerate(tape.events):
        payload = stored.event.payload
        if payload.KIND == "environment_captured":
            payload = present
        elif payload.KIND == "request_submitted":
            payload = payload.model_copy(update={"environment_id": present.environment_id})
        tape.events[i] = replace(stored, event=stored.event.model_copy(update={"payload": payload}))


def test_a_calibrated_replay_sees_what_the_default_hides(tmp_path: Path) -> None:
    """A hundredth of a nat on each token is under every default, and ten times this engine's own noise."""
    rng = np.random.default_rng(1)
    probe: dict[str, Any] = {"probe.logprobs": [-1.0], "probe.choices": [5]}
    here = environment(**probe)
    tape = taped([-1.0] * 60)
    recorded_in(tape, here)
    store = Calibrations(tmp_path)
    store.save(calibration(rng, here, nats=0.001))
    engine = Scorer(lambda ids: scored([-1.01] * len(ids)), here)
    assert "numeric_drift" == run_compare(tape.events, engine, Sink()).verdict
    outcome = run_compare(tape.events, engine, Sink(), calibrations=store)
    assert "model_differs" == outcome.verdict
    assert "the engine's own noise explains such drift with a chance of" in outcome.reason


def test_the_noisiest_condition_counts() -> None:
    """Batches that drift by nothing do not make the drift of a request alone look unheard of; far longer sequences are not measured."""
    rng = np.random.default_rng(3)
    loud = [Measured("alone", logprobs, drift) for logprobs, drift in noise(rng, 8, 128, nats=0.01)]
    still = [Measured("in a batch", logprobs, 0 * drift) for logprobs, drift in noise(rng, 64, 128)]
    found = calibrated(environment(), "test", [*still, *loud], dtype="bfloat16", made_at=dt.datetime.now(dt.UTC))
    alarms = [found.test(logprobs, drift).reason for logprobs, drift in noise(rng, 200, 128, nats=0.01)]

    assert [None] * 200 == alarms
    assert (True, False) == (found.reaches(256), found.reaches(257))


def test_several_sequences_share_the_chance_of_an_alarm() -> None:
    """What one sequence of one would be accused of, one of a hundred is not: the session keeps the stated chance."""
    found = calibration(np.random.default_rng(2))
    rng = np.random.default_rng(3)
    logprobs, drift = noise(rng, 1, 300)[0]
    scale = next(s for s in np.arange(1.0, 3.0, 0.01) if found.test(logprobs, drift * s).reason)
    present = Scored(tuple(logprobs - drift * scale), (None,) * 300, (None,) * 300)

    def verdict(false_alarm: float) -> str:
        recorded, floor = [float(x) for x in logprobs], Floor(found.p99, "test")
        return judge(recorded, present, floor=floor, greedy=False, calibration=found, false_alarm=false_alarm).verdict

    assert ("model_differs", "numeric_drift") == (verdict(FALSE_ALARM), verdict(FALSE_ALARM / 1e4))


class Templated(Scorer):
    """An engine whose template makes `prompt` of any messages."""

    def __init__(self, prompt: tuple[int, ...], present: EnvironmentCaptured) -> None:
        super().__init__(lambda ids: scored([-1.0] * len(ids)), present)
        self.prompt = prompt

    def render(self, request: Request) -> tuple[int, ...]:
        """Always the same."""
        return self.prompt


@pytest.mark.parametrize(
    ("rendered", "verdict", "reason"),
    [
        ((0, 1, 9, 9, 9, 9), "model_differs", "makes another prompt of the messages, from its token 2 on; behind the recorded prompt: "),
        ((0, 1, 9, 3, 4), "identical", "logprobs equal"),
        ((0, 1, 2, 3, 4), "identical", "logprobs equal"),
    ],
)
def test_another_template_or_tokenizer_is_another_model(rendered: tuple[int, ...], verdict: str, reason: str) -> None:
    """Where the environment says that it changed and it makes other ids; a date in it that moved on is no change."""
    tape = taped([-1.0] * 20)
    recorded_in(tape, environment(**{"probe.chat_template": "a"}))
    outcome = run_compare(tape.events, Templated(rendered, environment(**{"probe.chat_template": "b"})), Sink())

    assert verdict == outcome.verdict
    assert reason in outcome.reason


def test_a_prompt_without_ids_is_rendered_today() -> None:
    """The tokens are forced behind what today's template makes of the messages, and the reason says so."""
    tape = taped([-1.0] * 20)
    started = next(i for i, stored in enumerate(tape.events) if stored.event.kind == "generation_started")
    payload = tape.events[started].event.payload.model_copy(update={"content": None})
    tape.events[started] = replace(tape.events[started], event=tape.events[started].event.model_copy(update={"payload": payload}))
    outcome = run_compare(tape.events, Templated((1, 2), environment()), Sink())

    assert "identical" == outcome.verdict
    assert "today's template rendered it" in outcome.reason


@pytest.mark.parametrize(
    ("document", "seed", "expected"),
    [
        ({"temperature": 0.5}, 3, Sampler(5, 0.5, 0, 1.0, 0.0)),
        ({"top_k": 5, "top_p": 0.9, "min_p": 0.1}, 0, Sampler(2, 1.0, 5, 0.9, 0.1)),
        ({}, None, "the request had no seed"),
        (None, 1, "the request's parameters are not known"),
        ({"temperature": 0}, 1, "nothing is drawn at temperature 0"),
        ({"presence_penalty": 1}, 1, "presence_penalty is not recomputed"),
        ({"thinking_token_budget": 16}, 1, "thinking_token_budget is not recomputed"),
        ({"response_format": {"type": "json_object"}}, 1, "structured output is not recomputed"),
    ],
)
def test_how_a_token_was_to_be_drawn(document: dict[str, Any] | None, seed: int | None, expected: Sampler | str) -> None:
    """The third sequence of a request, or why its choices cannot be made again."""

    assert expected == sampler_of(document, seed, 2)


def test_what_a_server_sets_is_what_tokens_are_drawn_with() -> None:
    """What a request names goes before it; an environment that does not tell is no environment that sets nothing."""
    items: dict[str, Any] = {"sampling.defaults": {"temperature": 0.6, "top_k": 20}}
    told = environment(**items)

    assert Sampler(1, 0.6, 5, 1.0, 0.0) == sampler_of(effective({"top_k": 5, "temperature": None}, defaults_of(told)), 1, 0)
    assert [{"temperature": 0.6, "top_k": 20}, None, None] == [defaults_of(each) for each in (told, environment(), None)]


@pytest.mark.parametrize(("misses", "told", "guessed"), [(3, {}, True), (0, {}, False), (3, {"sampling.defaults": {}}, False)])
def test_a_temperature_that_nobody_told_is_not_guessed(misses: int, told: dict[str, Any], guessed: bool, tmp_path: Path) -> None:
    """Choices of a request that names none are made again where the environment tells which holds, or the engine made all its own again."""
    probe: dict[str, Any] = {"probe.logprobs": [-1.0], "probe.choices": [5]}
    tape, here, store = taped([-1.0] * 20, temperature=None, seed=3), environment(**probe, **told), Calibrations(tmp_path)
    recorded_in(tape, here)
    seen = {"noise": KNOWN[0].name, "noise_misses": misses, "noise_tokens": 1000}
    store.save(calibration(np.random.default_rng(0), here).model_copy(update=seen))
    outcome = run_compare(tape.events, Scorer(lambda ids: scored([-1.0] * len(ids)), here), Sink(), calibrations=store)

    assert guessed is ("which one the server sets then is not told" in outcome.reason)


def test_a_digest_is_taken_once(tmp_path: Path) -> None:
    """A file that stays the same is not read again, by this process or another; one that changes is."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"w" * 1000)
    cache = tmp_path / "digests.json"
    first, second = FileDigests(cache), FileDigests(cache)
    digest = first.of([weights])

    assert 1000 == first.read_bytes
    again = FileDigests(cache)
    assert digest == again.of([weights]) == second.of([weights])
    assert (0, 1000) == (again.read_bytes, second.read_bytes)
    weights.write_bytes(b"v" * 1000)
    os.utime(weights, ns=(1, 1))
    assert digest != again.of([weights])
    assert combined({"a": "1"}) != combined({"b": "1"})
    cache.write_text("[]")
    assert FileDigests(cache).of([weights]) == again.of([weights])


def test_differences_are_told_in_words() -> None:
    """By class, with what each may mean; digests are not read out, and what could not be compared is said."""
    first = capture([("weights.sha256", '"aa"'), ("config.model_config.dtype", '"torch.float32"'), ("version", '"1"')], origin="process")
    second = capture(
        [("weights.sha256", '"bb"'), ("config.model_config.dtype", '"torch.bfloat16"'), ("version", '"1"'), ("cache.block_size", "16")],
        origin="process", unknown=["hardware"],
    )  # fmt: skip
    lines = list(report(first, second, compare(first, second)))

    assert "2 differences in what the model is: it may answer differently" == lines[0]
    assert "  the dtype: float32 → bfloat16" in lines
    assert "  the weights differ" in lines
    assert "  cache: block size: only the second tells it (16)" in lines
    assert "not told by the second: hardware" == lines[-1]
    set_now = capture([("version", '"1"'), ("sampling.defaults", '{"repetition_penalty":1.05}')], origin="process")
    assert [] == compare(capture([("version", '"1"')], origin="process"), set_now)
    (difference,) = compare(capture([("version", '"1"'), ("sampling.defaults", "{}")], origin="process"), set_now)
    assert 'sampling parameters of requests that name none: {} → {"repetition_penalty": 1.05}' == sentence(difference)
    over_http = capture([("version", '"2"')], origin="http")
    assert ["the version of vLLM: 1 → 2"] == [sentence(difference) for difference in compare(first, over_http)]
    assert any("captured in two ways (process, http)" in line for line in report(first, over_http, compare(first, over_http)))
