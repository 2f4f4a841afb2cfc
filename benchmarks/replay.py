"""Batch compare replay, from the tape to verdicts on the tape, beside the same engine that is only made to say the tokens.

python -m benchmarks.replay --model PATH [--sessions N] [--tokens N] [--at-once N] [--pairs N] [--actors N] [--engine JSON] --out FILE

Where the runner has vLLM's trace replay the tokens are decoded again, elsewhere they are scored as a prompt; either way the
bare engine, another one on the same device, gets all sequences in one call of `LLM.generate`, which is the most that it can do.

With `--actors` a run over all goes beside one over a single one, each actor in its turn; a turn that is not counted comes first.

Without a GPU an engine of a GPU's pace is fed as well: what a run loses there is what this side of it costs.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from replay.engines.base import Forced, Generated, Refused, Request, Scored, Spoken
from replay.engines.vllm import _scored, _Told
from schemas.events import EnvironmentCaptured

WARM = 64
"""Sessions of each engine that are not counted: what is compiled and measured once is no part of a run's pace."""
SLOTS, BEAT_S = 512, 0.018
"""Sequences at once and seconds a token of a 1B model on an H200."""


def run() -> list[dict[str, Any]]:
    """Rows of the table."""
    from tests.engine_load import make_model

    rows = []
    for shape in ({"hidden": 768, "layers": 12, "intermediate": 2048}, {}):
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            make_model(model, **shape)
            out = Path(folder) / "out.json"
            env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
            command = [sys.executable, "-m", "benchmarks.replay", "--model", str(model), "--sessions", "768", "--pairs", "3"]
            subprocess.run([*command, "--out", str(out)], env=env, check=True)
            rows += rows_of(json.loads(out.read_text()), f", {_millions(model)} M weights")
    return [*rows, _paced()]


def _millions(model: Path) -> int:
    return round((model / "model.safetensors").stat().st_size / 2 / 1e6)  # bf16


def rows_of(found: dict[str, Any], more: str = "") -> list[dict[str, Any]]:
    """The table's rows of one measurement."""
    what = f"{found['sessions']} sessions of {found['tokens']} tokens on average, {found['device']}{more}"
    if found["actors"] > 1:
        over = f"tokens/s of replay-batch over {found['actors']} Ray actors, {what}"
        return [_row(over, found["batch"], "one of them", found["one actor"], "≥ 1.9")]
    return [_row(f"tokens/s of replay-batch, {what}", found["batch"], f"the same engine bare, {found['how']}", found["bare"], "≥ 0.95")]


def _row(what: str, rates: list[float], beside: str, others: list[float], reach: str) -> dict[str, Any]:
    ratio = statistics.median(rate / other for rate, other in zip(rates, others, strict=True))
    values = {"value": statistics.median(rates), "unit": "tok/s", "beside": beside, "beside_value": statistics.median(others)}
    return {"what": what, **values, "ratio": ratio, "reach": reach}


class Paced:
    """An engine that says a token of each of its sequences a beat, and no more than that: what it costs is elsewhere."""

    name = "paced"

    def __init__(self, environment: EnvironmentCaptured) -> None:
        self._environment = environment
        self._names = count()
        self._waiting: deque[tuple[int, Forced]] = deque()
        self._running: list[tuple[int, int, bytes]] = []
        self._beat, self._next = 0, 0.0

    def fingerprint(self, recorded: EnvironmentCaptured | None = None) -> EnvironmentCaptured:
        """The one that was recorded."""
        return self._environment

    def render(self, request: Request) -> tuple[int, ...]:
        """The prompt as it stands."""
        return tuple(request.document["prompt"])

    def generate(self, request: Request) -> Refused:
        """Nothing: it has no words of its own."""
        return Refused("it only has a pace")

    def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
        """See `generate`."""
        return [self.generate(request) for request in requests]

    def force(self, request: Request, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> Scored | Refused:
        """Not asked: it is continuous."""
        return Refused("begin it")

    def force_all(self, several: Sequence[Forced]) -> list[Scored | Refused]:
        """See `force`."""
        return [Refused("begin it") for _ in several]

    def begin(self, forced: Forced) -> int:
        """Take a sequence in."""
        self._waiting.append((next(self._names), forced))
        return self._waiting[-1][0]

    def step(self) -> list[tuple[int, Callable[[], Scored]]]:
        """A beat: those that end with it, with what a process beside this one would have sent of them."""
        now = time.perf_counter()
        self._next = (self._next if self._running else now) + BEAT_S  # who comes late finds it ahead, as a process of its own would be
        while self._waiting and len(self._running) < SLOTS:
            name, forced = self._waiting.popleft()
            ids = np.repeat(np.array(forced.token_ids, np.int64), 2)
            ends = np.arange(2, len(ids) + 2, 2, dtype=np.int32)
            told = _Told(ends - 2, ends, ids, np.full(len(ids), -1.0, np.float32), np.ones(len(ids), np.int32))
            answer = pickle.dumps(partial(_scored, told, forced.token_ids, "decoding", others=False))
            heapq.heappush(self._running, (self._beat + len(forced.token_ids), name, answer))
        time.sleep(max(0.0, self._next - time.perf_counter()))
        self._beat += 1
        ended = []
        while self._running and self._running[0][0] <= self._beat:
            _, name, answer = heapq.heappop(self._running)
            ended.append((name, pickle.loads(answer)))
        return ended

    def close(self) -> None:
        """Nothing."""


def _paced(sessions: int = 3072, tokens: int = 256) -> dict[str, Any]:
    """The row of the paced engine: a run over it beside the same engine that has all sequences from the start."""
    from replay.batch import Batch
    from schemas.settings import Settings
    from tests.tape import environment
    from tokentape.commands.replay_batch import OF_ITS_OWN
    from tokentape.installation import Installation

    draw, given, known = random.Random(0), argparse.Namespace(tokens=tokens), environment()
    asked = [Request(None, {"prompt": list(range(10, 90)), **_parameters(given, i)}, 0, COMPLETIONS) for i in range(sessions)]
    said = [tuple(draw.randrange(10, 500) for _ in range(each.document["max_tokens"])) for each in asked]
    total = sum(map(len, said))
    bare = Paced(known)
    for request, ids in zip(asked, said, strict=True):
        bare.begin(Forced(request, (1,), ids))
    began = time.perf_counter()
    left = sessions
    while left:
        left -= len(bare.step())
    most = total / (time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as folder, Installation(Settings(data=Path(folder))) as installation:
        answers = [Generated((Spoken(0, "", ids, (-1.0,) * len(ids), "length", ()),), tuple(range(10, 90))) for ids in said]
        names = [_record(installation, request, answer, known) for request, answer in zip(asked, answers, strict=True)]
        installation.recorder.flush(60)
        installation.freshen()
        batch = Batch(names, installation.events_of_sessions, installation.recorder, run="paced")
        summary = batch.run([Paced(known)], at_once=OF_ITS_OWN)
        assert summary.tokens == total, summary
    what = f"the same over an engine that has the pace of an H200 ({SLOTS} at once, {BEAT_S * 1000:.0f} ms a token), {sessions:,} sessions"
    return _row(what, [total / summary.seconds], "that engine with all of them from the start", [most], "≥ 0.95")


def _measure(given: argparse.Namespace, data: Path) -> None:
    from replay.batch import Batch
    from replay.engines.apart import Apart
    from replay.engines.cluster import Cluster
    from replay.engines.vllm import VllmEngine
    from schemas.settings import Settings
    from tokentape.installation import Installation

    bare = VllmEngine(str(given.model), options=given.engine)
    cluster = Cluster("local") if given.actors else None
    hosted: list[Any] = (
        cluster.engines(str(given.model), given.engine, given.actors) if cluster else [Apart(str(given.model), options=given.engine)]
    )
    draw = random.Random(0)
    asked = [
        Request(
            None, {"prompt": [draw.randrange(10, 500) for _ in range(draw.randrange(32, 128))], **_parameters(given, i)}, 0, COMPLETIONS
        )
        for i in range(given.sessions)
    ]
    said = [each for each in bare.generate_all(asked) if isinstance(each, Generated)]
    forced = [Forced(r, s.prompt_token_ids, s.sequences[0].token_ids) for r, s in zip(asked, said, strict=True)]
    with Installation(Settings(data=data)) as installation:
        environment = bare.fingerprint()
        sessions = [_record(installation, each, answer, environment) for each, answer in zip(asked, said, strict=True)]
        installation.recorder.flush(60)
        installation.freshen()
        found: dict[str, Any] = {"sessions": given.sessions, "tokens": given.tokens, "device": _device(), "actors": len(hosted)}
        found["how"] = getattr(bare.force_all(forced[:1])[0], "how", "refused")
        tokens = sum(len(each.token_ids) for each in forced)

        def replay(engines: list[Any], some: list[str], run: str) -> None:
            batch = Batch(some, installation.events_of_sessions, installation.recorder, run=run)
            summary = batch.run(engines, at_once=given.at_once)
            assert summary.tokens == tokens or len(some) < len(sessions), summary
            installation.recorder.flush(60)

        replay(hosted, sessions[: WARM * len(hosted)], "warm")
        for turn in range(given.pairs):
            for name in ("one actor" if len(hosted) > 1 else "bare", "batch")[:: 1 if turn % 2 else -1]:
                prepared = [each for one in forced if not isinstance(each := bare._asked(one), Refused)]
                began = time.perf_counter()
                if name == "bare":
                    bare._run([each.text for each in prepared], [each.parameters for each in prepared])
                else:
                    engines = [hosted[turn % len(hosted)]] if name == "one actor" else hosted
                    replay(engines, sessions, f"{name[:3]}{turn}")
                found.setdefault(name, []).append(tokens / (time.perf_counter() - began))
            given.out.write_text(json.dumps(found))  # what there is, should the time end
    bare.close()
    for engine in hosted:
        engine.close()
    if cluster:
        cluster.close()


COMPLETIONS = "/v1/completions"


def _parameters(given: argparse.Namespace, i: int) -> dict[str, Any]:
    """Lengths are drawn: sequences that end together leave a batch that no prompt disturbs, which is nobody's traffic."""
    length = random.Random(i).randint(given.tokens // 4, given.tokens * 7 // 4)
    return {"max_tokens": length, "ignore_eos": True, "temperature": i % 2, "seed": i}


def _record(installation: Any, request: Any, said: Any, environment: Any) -> str:
    """Put one generation on the tape, as a gateway does; its session."""
    from replay.words import uuid
    from schemas.sink import SessionContext, new_id
    from tests.tape import Tape, finish

    tape, spoken = Tape("benchmark"), said.sequences[0]
    tape.add(environment)
    fields = {"parameters": request.document, "environment_id": environment.environment_id, "endpoint": COMPLETIONS}
    g = tape.request("g", [], 0, model="m", **fields)
    tape.started(g, 1, 1, said.prompt_token_ids)
    count = len(spoken.token_ids)
    for first in range(0, count, 64):
        part = slice(first, first + 64)
        times = [float(i) for i in range(count)][part]
        tape.tokens(g, 0, times, ["x"] * len(times), position=first, ids=spoken.token_ids[part], logprobs=spoken.logprobs[part])
    finish(tape, g, 0, [count], count + 10)
    context = SessionContext(new_id(), "default", "gateway")
    for stored in tape.events:
        installation.recorder.record(context, stored.event.payload)
    return uuid(context.session_id)


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main() -> None:
    """Take turns and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--sessions", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=768)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--actors", type=int, default=0, help="Ray actors instead of one process")
    parser.add_argument("--engine", type=json.loads, default={})
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _measure(given, Path(folder))


if __name__ == "__main__":
    main()
