"""The noise of vLLM's runners, made again by numpy: against published vectors, PyTorch's own generator and Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from replay.engines.base import Alternatives
from replay.noise import CUDA_LOG_OFF, KNOWN, Stream, cpu_exponential, cuda_exponential, murmur3, named, philox, possible, unknown
from replay.sampling import Sampler, made_again
from tests.program import ROOT
from tests.tape import environment

ONES = 2**32 - 1


@pytest.mark.parametrize(
    ("key", "counter", "word"),
    [
        (0, (0, 0, 0, 0), 0x6627E8D5),
        (2**64 - 1, (ONES, ONES, ONES, ONES), 0x408F276D),
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0xD16CFE09),
    ],
)
def test_philox_is_the_published_one(key: int, counter: tuple[int, int, int, int], word: int) -> None:
    """The known answers of Random123 for Philox 4x32-10."""

    assert word == philox(key, *counter)


def test_murmur_is_murmur() -> None:
    """The hash of sixteen zero bytes; and each word of the seed and of the place counts."""
    hashed = [int(murmur3(seed, position, np.array([0]))[0]) for seed, position in ((0, 0), (1, 0), (2**32, 0), (0, 1))]

    assert 0x8134CDF8 == hashed[0]
    assert 4 == len(set(hashed))


def test_exponentials_of_a_cpu_are_pytorchs() -> None:
    """Bit for bit, call after call, for seeds of any sign and size."""
    torch = pytest.importorskip("torch")
    for seed in (0, 5, 2**40 + 7, -3):
        generator = torch.Generator("cpu").manual_seed(seed)
        for ours in islice(cpu_exponential(seed, 515), 3):
            assert np.array_equal(ours, torch.empty(515).exponential_(generator=generator).numpy())


def test_the_v2_runner_draws_so_in_tritons_interpreter() -> None:
    """Triton's Philox number by number, and vLLM's kernel choice by choice; another seed draws other tokens."""
    pytest.importorskip("triton")
    pytest.importorskip("vllm")
    command = [sys.executable, "-m", "tests.noise_kernels"]
    ended = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert 0 == ended.returncode, ended.stderr[-2000:]
    found = json.loads(ended.stdout)

    assert (16384, 16) == (found["philox_equal"], found["murmur_equal"])
    assert found["murmur_equal_under_another_seed"] <= 1


@pytest.mark.parametrize("noise", [noise for noise in KNOWN if noise.name != "vllm-0.32-v1-cpu"], ids=lambda noise: noise.name)
def test_another_seed_draws_other_tokens(noise: object) -> None:
    """What each noise draws by one seed it draws again by the same, and mostly not by another; a step that is not told is passed over."""
    known = named(getattr(noise, "name", None))
    assert known is not None
    rng = np.random.default_rng(1)
    places = [Alternatives(np.arange(50), np.log(rng.dirichlet(np.ones(50))).astype(np.float32), whole=True) for _ in range(40)]
    draw = known.start(Stream(9, 7, 50))
    assert not isinstance(draw, str)
    said = [draw(place.logprobs, 0, 0.0) for place in places]

    def again(seed: int, prompt_tokens: int = 7) -> list[bool | None]:
        told = [None, *places[1:]]
        found = made_again(said, told, Sampler(seed, 1.0, 0, 1.0, 0.0), known, prompt_tokens=prompt_tokens, vocabulary=50, tolerance=1e-6)
        assert not isinstance(found, str)
        return found

    assert [None] + [True] * 39 == again(9)
    assert again(10).count(True) < 10
    assert (again(9, 8).count(True) < 10) == (known.runner == "v2")


def test_the_doubt_of_a_gpus_logarithm_is_for_the_recorded_token() -> None:
    """Among many tokens the smallest draws win, of which a GPU's fast logarithm is some per cent off; another seed still wins nothing."""
    noise, size, steps = named("vllm-0.24-v1-cuda"), 150_000, 40
    assert noise is not None
    flat = Alternatives(np.arange(size), np.full(size, -np.log(size), np.float32), whole=True)
    said = []
    for step in range(steps):
        exact = cuda_exponential(3, step, np.arange(size))
        two = np.argsort(exact)[:2]
        off = CUDA_LOG_OFF * np.where(np.arange(size) == two[1], -1, 1)
        said.append(int((exact + off).argmin()))

    def again(seed: int) -> list[bool | None] | str:
        sampler = Sampler(seed, 1.0, 0, 1.0, 0.0)
        return made_again(said, [flat] * steps, sampler, noise, prompt_tokens=1, vocabulary=size, tolerance=1e-6)

    assert [True] * steps == again(3)
    assert [False] * steps == again(4)


def test_noise_functions_are_offered_by_version_runner_and_device() -> None:
    """What an environment does not tell excludes none; where none is known the reason says why."""

    def offered(version: str, runner: str, device: str) -> list[str]:
        return [noise.name for noise in possible(environment(version, **{"engine.runner": runner, "engine.device": device}))]

    assert ["vllm-0.32-v1-cpu"] == offered("0.32.0", "v1", "cpu")
    assert ["vllm-0.29-v1-cpu"] == offered("0.29.1", "v1", "cpu") == offered("0.31.0", "v1", "cpu")
    assert [] == offered("0.28.0", "v1", "cpu") == offered("0.33.0", "v2", "cuda")
    assert [] == possible(None)
    assert ["vllm-0.24-v2-cuda"] == offered("0.24.0", "v2", "cuda") == offered("0.30.0", "v2", "cuda")
    assert ["vllm-0.31-v2-cuda"] == offered("0.31.0", "v2", "cuda")
    assert ["vllm-0.24-v1-cuda"] == offered("0.32.0", "v1", "cuda")
    assert 3 == len(possible(environment()))
    assert "uses no seed where" in unknown(environment("0.28.0", **{"engine.device": "cpu"}))
    assert "not known" in unknown(environment("0.33.0"))


def test_a_noise_that_goes_by_the_vocabulary_needs_its_size() -> None:
    """Where an engine does not tell it the reason does."""
    noise = named("vllm-0.29-v1-cpu")
    assert noise is not None

    assert "vocabulary" in str(noise.start(Stream(1, 1)))
