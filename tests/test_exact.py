"""A real vLLM recorded under load and played again in a fresh process: every token and every logprob, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.enginerun.calls import Preempt
from tests.conftest import VllmService
from tests.engine_load import make_model
from tests.engine_log import await_end, runs_of


@pytest.mark.timeout(900)
def test_a_run_is_reproduced_bit_for_bit(tmp_path: Path, vllm: VllmService) -> None:
    """Twelve requests with caching, preemption, priorities, n > 1, stop strings and an abort; the tape holds what their clients got."""
    model, data, out = tmp_path / "model", tmp_path / "data", tmp_path / "got.json"
    make_model(model, hidden=256, layers=2, intermediate=704)
    env = {name: value for name, value in os.environ.items() if not name.startswith("TOKENTAPE_")}
    env |= {"TOKENTAPE_DATA": str(data), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    small = json.dumps({"num_gpu_blocks_override": 24, "max_model_len": 640})  # of which eight at once need far more
    load = [sys.executable, "-m", "tests.engine_load", str(model), str(out), "--requests", "12", "--gap", "0.02", "--engine", small]
    subprocess.run(load, env=env, check=True)
    await_end(data)
    run = runs_of(data)[0]
    got = json.loads(out.read_text())["got"].values()
    program = [sys.executable, "-m", "tokentape.cli", "replay-batch", "--exact", "--format", "json", "--engine-run", run.engine_run.hex()]
    outcome = json.loads(subprocess.run(program, env=env, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    preempted = [call for step in run.steps for call in step.calls if isinstance(call, Preempt)]
    taped = [list(said.token_ids) for said in run.said.values()]

    assert all(one["ids"] in [ids[: len(one["ids"])] for ids in taped] for one in got)
    assert preempted
    assert "reproduced" == outcome["verdict"], outcome["reason"]
    assert len(run.requests) == outcome["sequences_reproduced"] > 12
    assert outcome["logprobs"] == outcome["logprobs_equal"] == outcome["tokens"]
