"""Verdicts: what is told apart within 300 tokens, by how much, and how often an honest replay is accused.

A tiny Llama in 32 bits records in one batch and is replayed in others. Then something is changed and the recording still
claims what it claimed before: weights with noise of a thousandth, weights rounded to 8 bits, another chat template, another
seed, another temperature. Each sequence is judged by the tests of compare replay (`replay.calibration`, `replay.sampling`).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaForCausalLM

from replay.calibration import FALSE_ALARM, Calibration
from replay.drift import drift_of
from replay.engines.base import Forced, Generated, Request, Scored
from replay.engines.vllm import VllmEngine
from replay.measurement import ALTERNATIVES, measure
from replay.noise import named
from replay.sampling import made_again, sampler_of
from schemas.probe import item
from scripts.tiny_model import TEXT, make, perturb

HONEST = int(os.environ.get("BENCH_HONEST", "1024"))
CHANGED = int(os.environ.get("BENCH_CHANGED", "128"))
TOKENS = 300
CHUNK = 128
"""Sequences scored in one call: their alternatives have to fit into memory."""
OPTIONS = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 256}
AUC = "AUC ≥ 0.999"


class Recording(NamedTuple):
    """One sequence as it is on the tape: what it claims and what was said."""

    claimed: Request
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Judged(NamedTuple):
    """How far two statistics of a sequence are from what noise does, and whether the tests accuse it."""

    evidence: float
    misses: float
    model: bool
    sampling: bool


def run() -> list[dict[str, Any]]:
    """Rows: time of a fingerprint, false alarms of honest replays, and how well each change is told apart."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root / "model")
        perturb(root / "model", root / "noise", noise=1e-3)
        _round_to_8_bits(root / "model", root / "rounded")
        _other_template(root / "model", root / "template")
        recorded = {name: _recorded(root / name) for name in ("noise", "rounded", "template")}
        engine = VllmEngine(str(root / "model"), options=OPTIONS, digests=root / "digests.json")
        try:
            return [*_fingerprint(engine), *_verdicts(engine, recorded)]
        finally:
            engine.close()


def _fingerprint(engine: VllmEngine) -> list[dict[str, Any]]:
    times = []
    for _ in range(2):
        began = time.perf_counter()
        engine.fingerprint()
        times.append(time.perf_counter() - began)
    return [
        {
            "what": "fingerprint after engine start, weights read, in a process that ran engines before",
            "value": times[0],
            "unit": "s",
            "reach": "< 3 s",
        },
        {"what": "fingerprint, weights digest cached", "value": times[1], "unit": "s", "reach": "< 3 s"},
    ]


def _verdicts(engine: VllmEngine, recorded: dict[str, list[Recording]]) -> list[dict[str, Any]]:
    calibration = measure(engine, None, sequences=96, tokens=TOKENS)
    honest = _judged(engine, calibration, _said(engine, [_request(i) for i in range(HONEST)]))
    alarms = sum(one.model or one.sampling for one in honest)
    rows = [
        {"what": "calibration, tokens", "value": calibration.tokens, "unit": "tokens"},
        {"what": "noise: largest p99 of drift", "value": calibration.p99, "unit": "nats"},
        _alarms(len(honest), alarms),
    ]
    changes = {
        "other weights (noise 1e-3 relative)": recorded["noise"],
        "weights rounded to 8 bits": recorded["rounded"],
        "other chat template, prompt ids not recorded": _behind_todays_prompt(engine, recorded["template"]),
        "other seed": _claiming(engine, seed=1),
        "other temperature (0.8, claimed 1.0)": _claiming(engine, temperature=0.8),
    }
    for what, those in changes.items():
        rows.append(_row(what, honest, _judged(engine, calibration, those)))
    return rows


def _alarms(replays: int, alarms: int) -> dict[str, Any]:
    what, share = f"false alarms of {replays:,} honest replays", alarms / replays
    return {"what": what, "value": alarms, "unit": "", "beside": "share", "beside_value": share, "reach": f"≤ {FALSE_ALARM:g}"}


def _row(what: str, honest: Sequence[Judged], changed: Sequence[Judged]) -> dict[str, Any]:
    """By the statistic that tells this change better; and how many the tests called it."""
    of_model, of_sampling = (auc([getattr(o, n) for o in honest], [getattr(o, n) for o in changed]) for n in ("evidence", "misses"))
    told = sum(one.model or one.sampling for one in changed)
    called = f"{told} of {len(changed)} called {'model' if of_model >= of_sampling else 'sampling'} differs"
    return {"what": what, "value": max(of_model, of_sampling), "unit": "AUC", "beside": called, "ratio": told / len(changed), "reach": AUC}


def auc(negatives: Sequence[float], positives: Sequence[float]) -> float:
    """The chance that a positive lies above a negative, ties counting half."""
    below = np.sort(negatives)
    left, right = np.searchsorted(below, positives, "left"), np.searchsorted(below, positives, "right")
    return float((left + right).mean() / 2 / len(below))


def _request(number: int, **fields: Any) -> Request:
    """Every request asks about another line of the model's text, at temperature 1 and with a seed of its own."""
    lines = TEXT.splitlines()
    content = f"{number}: {lines[number % len(lines)]}"
    document = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
        "temperature": 1.0,
        "seed": number,
        "ignore_eos": True,
    }
    return Request(None, {**document, **fields}, ALTERNATIVES)


def _said(engine: VllmEngine, asked: Sequence[Request], claimed: Sequence[Request] | None = None) -> list[Recording]:
    """What an engine answered to `asked`, recorded as the answers to `claimed`."""
    found = []
    for claim, answer in zip(claimed or asked, engine.generate_all(asked), strict=True):
        assert isinstance(answer, Generated), answer
        spoken = answer.sequences[0]
        found.append(Recording(claim, answer.prompt_token_ids, spoken.token_ids, spoken.logprobs))
    return found


def _recorded(model: Path) -> list[Recording]:
    """What a changed model says."""
    engine = VllmEngine(str(model), options=OPTIONS)
    try:
        return _said(engine, [_request(i) for i in range(CHANGED)])
    finally:
        engine.close()


def _claiming(engine: VllmEngine, **truth: Any) -> list[Recording]:
    """Requests that were carried out otherwise than they say; a `seed` is added to the claimed one."""
    claimed = [_request(i) for i in range(CHANGED)]
    seed = truth.pop("seed", 0)
    asked = [replace(one, document={**one.document, **truth, "seed": one.document["seed"] + seed * 100_000}) for one in claimed]
    return _said(engine, asked, claimed)


def _behind_todays_prompt(engine: VllmEngine, recordings: Sequence[Recording]) -> list[Recording]:
    """The same tokens behind the prompt that today's template makes."""
    found = []
    for each in recordings:
        prompt = engine.render(each.claimed)
        assert isinstance(prompt, tuple), prompt
        found.append(each._replace(prompt=prompt))
    return found


def _judged(engine: VllmEngine, calibration: Calibration, recordings: Sequence[Recording]) -> list[Judged]:
    """Each recording replayed, in another order and other batches than it was said in."""
    shuffled = random.Random(1).sample(list(recordings), len(recordings))
    found = []
    for start in range(0, len(shuffled), CHUNK):
        chunk = shuffled[start : start + CHUNK]
        for each, scored in zip(chunk, engine.force_all([Forced(r.claimed, r.prompt, r.token_ids) for r in chunk]), strict=True):
            assert isinstance(scored, Scored), scored
            found.append(_judge(calibration, each, scored))
    return found


def _judge(calibration: Calibration, recording: Recording, scored: Scored) -> Judged:
    logprobs = np.array(recording.logprobs, np.float64)
    drift: npt.NDArray[np.float64] = drift_of(recording.logprobs, [value or 0.0 for value in scored.logprobs])
    evidence = float(-np.log(calibration.p_values(logprobs, drift)).sum())
    noise, sampler = named(calibration.noise), sampler_of(recording.claimed.document, recording.claimed.document["seed"], 0)
    assert noise is not None
    assert not isinstance(sampler, str), sampler
    vocabulary = item(calibration.environment, "model.vocabulary") or 0
    made = made_again(
        recording.token_ids, scored.alternatives, sampler, noise,
        prompt_tokens=len(recording.prompt), vocabulary=vocabulary, tolerance=calibration.noise_tolerance,
    )  # fmt: skip
    assert not isinstance(made, str), made
    misses = made.count(False)
    differs = calibration.test(logprobs, drift).reason is not None
    return Judged(evidence, misses / len(made), differs, not differs and misses > calibration.limit_of_misses(len(made), FALSE_ALARM / 2))


def _round_to_8_bits(source: Path, folder: Path) -> None:
    """A copy of a model whose weight matrices have 255 steps a row, as in int8 quantisation."""
    shutil.copytree(source, folder)
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                step = weight.abs().amax(dim=1, keepdim=True) / 127
                weight.copy_(torch.round(weight / step) * step)
    model.save_pretrained(folder)


def _other_template(source: Path, folder: Path) -> None:
    """A copy of a model whose template begins with a system message."""
    shutil.copytree(source, folder)
    path = folder / "chat_template.jinja"
    path.write_text("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + path.read_text())
