"""A real vLLM recorded under load and played again in a fresh process: every token and every logprob, bit for bit."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from schemas.enginerun.calls import Preempt
from schemas.events import TokenChunk
from tests.conftest import VllmService
from tests.engine_load import bits, make_model
from tests.engine_log import await_end, events_of, runs_of
from tests.program import DRIVER

STOPPED = "tests.engine_log.stopped"
"""A debugger that only says that it was reached."""


def again(env: dict[str, str], *commands: list[str]) -> list[dict[str, Any]]:
    """What each of some replays says, in one process that imports vLLM once; the debugger is reached where it is asked for."""
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env={**env, "PYTHONBREAKPOINT": STOPPED},
        input=json.dumps(commands).encode(),
        check=True,
        stdout=subprocess.PIPE,
    )
    answers = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith(b"[")]
    assert [("--debug" in command, 0) for command in commands] == [("stopped in a debugger" in err, code) for code, _, err in answers], (
        answers
    )
    return [json.loads(base64.b64decode(out).splitlines()[-1]) for _, out, _ in answers]


def _likeliest(data: Path) -> list[list[Any]]:
    """The alternatives of each sequence's tokens, as the tape has them: id and bits of the logprob."""
    found: dict[tuple[bytes, int], list[Any]] = {}
    for event in events_of(data):
        content = event.payload.content if isinstance(event.payload, TokenChunk) else None
        if isinstance(event.payload, TokenChunk) and content is not None and (told := content.alternatives) is not None:
            each = [[token_id, bits(logprob)] for token_id, logprob in zip(told.token_ids, told.logprobs, strict=True)]
            found.setdefault((event.payload.generation_id, event.payload.index), []).extend([one] for one in each)
    return list(found.values())


@pytest.mark.timeout(900)
def test_a_run_is_reproduced_bit_for_bit(tmp_path: Path, vllm: VllmService) -> None:
    """Twelve requests with caching, preemption, priorities, n > 1, stop strings and an abort; whole, in part, forced, compared."""
    model, data, out = tmp_path / "model", tmp_path / "data", tmp_path / "got.json"
    make_model(model, hidden=256, layers=2, intermediate=704)
    env = {name: value for name, value in os.environ.items() if not name.startswith("TOKENTAPE_")}
    env |= {"TOKENTAPE_DATA": str(data), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker beside the scheduler, as with one GPU, and not in a process of its own
    small = json.dumps({"num_gpu_blocks_override": 24, "max_model_len": 640})  # of which eight at once need far more
    traffic = ["--requests", "12", "--gap", "0.02", "--longest", "96", "--engine", small]
    subprocess.run([sys.executable, "-m", "tests.engine_load", str(model), str(out), *traffic], env=env, check=True)
    await_end(data)
    run = runs_of(data)[0]
    got = json.loads(out.read_text())["got"].values()
    wanted = run.requests[6].place[0]
    replay = ["replay-batch", "--exact", "--format", "json", "--engine-run", run.engine_run.hex()]
    roomier = ["--forced", "--engine-arg", "max_num_seqs=16"]
    compare = ["replay-batch", "--where", "workflow = 'engine'", "--engine", f"vllm:{model}", "--format", "json"]
    alike = [word for option in ("dtype=bfloat16", "max_model_len=640") for word in ("--engine-option", option)]
    commands = (replay, [*replay, "--until", wanted.hex(), "--debug"], [*replay, *roomier], [*compare, *alike])
    outcome, part, forced, compared = again(env, *commands)
    preempted = [call for step in run.steps for call in step.calls if isinstance(call, Preempt)]
    taped = [list(said.token_ids) for said in run.said.values()]

    assert all(one["ids"] in [ids[: len(one["ids"])] for ids in taped] for one in got)
    assert all(one["likeliest"] in [told[: len(one["ids"])] for told in _likeliest(data)] for one in got)
    assert preempted
    assert "reproduced" == outcome["verdict"], outcome["reason"]
    assert len(run.requests) == outcome["sequences_reproduced"] > 12
    assert outcome["logprobs"] == outcome["logprobs_equal"] == outcome["tokens"]
    assert ("reproduced", True) == (part["verdict"], part["steps"] <= outcome["steps"]), part["reason"]
    assert f"{part['tokens_equal']:,} tokens and {part['logprobs_equal']:,} logprobs bit for bit" in part["reason"]
    assert sum(len(run.said[place].token_ids) for place in run.places_of(wanted)) <= part["tokens_equal"] <= outcome["tokens"]
    assert ["config.scheduler_config.max_num_seqs"] == [other["key"] for other in forced["differences"]]
    assert {"identical": 1} == compared["verdicts"] or {"numeric_drift": 1} == compared["verdicts"], compared
    assert outcome["tokens"] == compared["tokens"]
    assert ("reproduced", outcome["tokens"]) == (forced["verdict"], forced["logprobs_equal"]), forced["reason"]
