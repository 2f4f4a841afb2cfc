"""An engine run recorded under load and played again in fresh processes, beside an ordinary rerun of the same load.

python -m benchmarks.exact [--requests N] [--replays N] [--model PATH] [--engine JSON]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.engine_load import make_model
from tests.engine_log import await_end


def run() -> list[dict[str, Any]]:
    """Rows of the table: 220 requests over more than 5,000 steps, ten replays."""
    return measured(requests=220, replays=10, gap_s=0.15)


def measured(
    *, requests: int, replays: int, gap_s: float, model: Path | None = None, engine: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Record, rerun without the record, and replay so often."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is None:
            model = folder / "model"
            make_model(model)
        env = {**os.environ, "TOKENTAPE_DATA": str(folder / "data"), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        load = ["tests.engine_load", str(model), "--requests", str(requests), "--gap", str(gap_s), "--engine", json.dumps(engine or {})]
        recorded, free = folder / "recorded.json", folder / "free.json"
        _python(env, *load, str(recorded))
        await_end(folder / "data", timeout_s=600)
        _python(env, *load, str(free), "--free")
        outcomes = [_replayed(env, folder / "data") for _ in range(replays)]
        return rows_of(outcomes, json.loads(recorded.read_text())["got"], json.loads(free.read_text())["got"])


def rows_of(outcomes: list[dict[str, Any]], recorded: dict[str, Any], free: dict[str, Any]) -> list[dict[str, Any]]:
    """The table's rows: a bitwise sequence has all of its tokens and all of its logprobs."""
    same = sum(one["ids"] == free.get(name, {}).get("ids") for name, one in recorded.items())
    bitwise = sum(one == free.get(name) for name, one in recorded.items())
    first, worst = outcomes[0], min(outcomes, key=lambda outcome: outcome["sequences_reproduced"])
    said = f"{first['requests']} requests, {first['recorded_steps']} steps, {first['preemptions']} preemptions, {len(outcomes)} replays"
    return [
        _row(
            f"sequences bit for bit, worst replay: {said}",
            worst["sequences_reproduced"],
            "a rerun without the record",
            bitwise,
            len(recorded),
        ),
        _row("sequences with the same tokens", worst["sequences_reproduced"], "a rerun without the record", same, len(recorded)),
        _row("tokens with the same logprob", worst["logprobs_equal"], "recorded", worst["logprobs"], worst["logprobs"]),
    ]


def _row(what: str, value: int, beside: str, beside_value: int, whole: int) -> dict[str, Any]:
    return {"what": what, "value": value, "unit": f"of {whole}", "beside": beside, "beside_value": beside_value, "reach": "all"}


def _replayed(env: dict[str, str], data: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(_python(env, "tests.engine_replay", str(data)).splitlines()[-1])
    return said


def _python(env: dict[str, str], module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=220)
    parser.add_argument("--replays", type=int, default=10)
    parser.add_argument("--gap", type=float, default=0.15)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--engine", type=json.loads, default={})
    given = parser.parse_args()
    found = measured(requests=given.requests, replays=given.replays, gap_s=given.gap, model=given.model, engine=given.engine)
    for row in found:
        print(f"{row['what']}: {row['value']} {row['unit']}; {row['beside']}: {row['beside_value']}")


if __name__ == "__main__":
    main()
