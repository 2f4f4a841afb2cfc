"""Are the noise functions of GPUs those of vLLM there? Prints one JSON object, and ends with 1 where one is not.

    python -m tests.noise_gpu FOLDER [float32|bfloat16]

FOLDER gets a small random model. Beside vLLM this needs orjson and rfc8785, and no network. Each runner says seeded tokens in a
process of its own; they are made again with the right seed, which must work, and with another, which must not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from replay.engines.base import Forced, Generated, Request, Scored
from replay.engines.vllm import VllmEngine
from replay.measurement import TOLERANCE_DRIFTS, TOLERANCE_NATS, measure
from replay.noise import CUDA_LOG_OFF, KNOWN, Noise, cuda_exponential, possible
from replay.sampling import made_again, sampler_of
from schemas.probe import item
from tests.engine_load import make_model

RUNNERS = {"0": "vllm-0.24-v1-cuda", "1": "vllm-0.31-v2-cuda"}
"""What VLLM_USE_V2_MODEL_RUNNER says, and the noise that belongs to it."""
SIZES = (512, 32_000, 128_256, 151_936, 262_144)
"""Vocabularies of models that are in use."""
WITHIN = 1e-5
"""Relative, beside `CUDA_LOG_OFF`: a GPU's fast logarithm differs in the last bits."""
RIGHT_SHARE, WRONG_SHARE = 0.99, 0.5
"""Of the tokens, how many the right seed has to make again at least, and another at most: it draws many likely ones too."""
REQUESTS, TOKENS = 32, 64
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 0},
)


def exponentials() -> list[dict[str, Any]]:
    """PyTorch's own draws beside ours, for several vocabularies, in the first five steps."""
    import torch

    found = []
    for size in SIZES:
        generator = torch.Generator("cuda").manual_seed(7)
        batch = torch.empty(3, size, device="cuda")
        off = []
        for step in range(5):
            theirs = batch[1].exponential_(generator=generator).cpu().numpy()
            ours = cuda_exponential(7, step, np.arange(size))
            off.append(float((np.abs(ours - theirs) / (CUDA_LOG_OFF + WITHIN * theirs)).max()))
        another = cuda_exponential(8, 0, np.arange(size))
        found.append({"size": size, "off_max": max(off), "another_seed_off_median": float(np.median(np.abs(another / theirs - 1)))})
    return found


def made(engine: VllmEngine, noise: Noise, tolerance: float) -> dict[str, Any]:
    """Seeded answers in a batch with greedy ones, and how many of their tokens each seed makes again."""
    documents = [
        {"prompt": [20 + i, *range(30, 40 + i)], "max_tokens": TOKENS, "seed": 100 + i, "ignore_eos": True, **SAMPLINGS[i % len(SAMPLINGS)]}
        for i in range(REQUESTS)
    ]
    requests = [Request(None, document, alternatives=1024, endpoint="/v1/completions") for document in documents]
    answers = engine.generate_all(requests)
    said = [answer for answer in answers if isinstance(answer, Generated)]
    assert len(answers) == len(said), answers
    scores = engine.force_all(
        [Forced(request, answer.prompt_token_ids, answer.sequences[0].token_ids) for request, answer in zip(requests, said, strict=True)]
    )
    environment = engine.fingerprint()
    assert environment is not None
    counts = {"tokens": 0, "right": 0, "wrong": 0}
    for request, answer, score in zip(requests, said, scores, strict=True):
        assert isinstance(score, Scored), score
        for which, shift in (("right", 0), ("wrong", 1)):
            sampler = sampler_of(request.document, request.document["seed"] + shift, 0)
            if isinstance(sampler, str):
                continue
            again = made_again(
                answer.sequences[0].token_ids, score.alternatives, sampler, noise,
                prompt_tokens=len(answer.prompt_token_ids), vocabulary=item(environment, "model.vocabulary"), tolerance=tolerance,
            )  # fmt: skip
            assert not isinstance(again, str), again
            counts[which] += again.count(True)
            counts["tokens"] += len(again) * (shift == 0)
    return counts


def by_engine(folder: str, runner: str, dtype: str) -> dict[str, Any]:
    """What a whole engine of this runner says, and what its calibration finds."""
    engine = VllmEngine(folder, options={"dtype": dtype, "max_model_len": 1024, "gpu_memory_utilization": 0.3})
    environment = engine.fingerprint()
    assert environment is not None
    offered = [noise.name for noise in possible(environment)]
    noise = next(noise for noise in KNOWN if noise.name == RUNNERS[runner])
    calibration = measure(engine, None, sequences=16, tokens=64)
    counts = made(engine, noise, max(TOLERANCE_DRIFTS * calibration.p99, TOLERANCE_NATS))
    engine.close()
    return {
        "runner": item(environment, "engine.runner"),
        "device": item(environment, "engine.device"),
        "version": item(environment, "version"),
        "offered": offered,
        "expected": noise.name,
        **counts,
        "calibrated": [calibration.noise, calibration.noise_misses, calibration.noise_tokens],
    }


def main() -> None:
    """The command line."""
    folder, dtype, runner = [*sys.argv[1:], *("float32", "")[len(sys.argv) - 2 :]]
    if runner:  # in a process of its own
        sys.stdout.write(json.dumps(by_engine(folder, runner, dtype)) + "\n")
        return
    import torch

    if not Path(folder, "config.json").exists():
        make_model(Path(folder))
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "exponential": exponentials()}
    kernels = _last_line([sys.executable, "-m", "tests.noise_kernels"], {})
    engines = {
        runner: _last_line([sys.executable, "-m", "tests.noise_gpu", folder, dtype, runner], {"VLLM_USE_V2_MODEL_RUNNER": runner})
        for runner in RUNNERS
    }
    found |= {"kernels": kernels, "engines": list(engines.values())}
    found["faults"] = [*_faults_of_numbers(found["exponential"], kernels), *(fault for each in engines.values() for fault in _faults(each))]
    sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(bool(found["faults"]))


def _faults_of_numbers(exponential: list[dict[str, Any]], kernels: dict[str, Any]) -> list[str]:
    faults = [
        f"exponential_ of {each['size']} differs" for each in exponential if each["off_max"] > 1 or each["another_seed_off_median"] < 0.1
    ]
    if kernels.get("philox_numbers") != kernels.get("philox_equal") or "error" in kernels:
        faults.append("Triton's Philox differs")
    if kernels.get("murmur_choices") != kernels.get("murmur_equal") or kernels.get("murmur_equal_under_another_seed", 0) > 1:
        faults.append("vLLM's kernel draws otherwise")
    return faults


def _faults(engine: dict[str, Any]) -> list[str]:
    if "error" in engine:
        return [engine["error"]]
    name = f"runner {engine['runner']}"
    faults = [] if engine["expected"] in engine["offered"] else [f"{name}: {engine['expected']} is not offered"]
    if engine["right"] < RIGHT_SHARE * engine["tokens"]:
        faults.append(f"{name}: the right seed makes {engine['right']} of {engine['tokens']} again")
    if engine["wrong"] > WRONG_SHARE * engine["tokens"]:
        faults.append(f"{name}: another seed makes {engine['wrong']} of {engine['tokens']} again")
    if engine["calibrated"][0] != engine["expected"]:
        faults.append(f"{name}: calibrating finds {engine['calibrated'][0]}")
    return faults


def _last_line(command: list[str], env: dict[str, str]) -> dict[str, Any]:
    ended = subprocess.run(command, env={**os.environ, "VLLM_NO_USAGE_STATS": "1", **env}, capture_output=True, text=True)
    try:
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"{' '.join(command[2:])} ended with {ended.returncode}: {ended.stderr[-1500:]}"}
    return found


if __name__ == "__main__":
    main()
