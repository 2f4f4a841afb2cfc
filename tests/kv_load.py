"""Requests to a real vLLM whose KV connector is recorded: first seen, seen again, too short, salted, and from the engine's own cache.

    python -m tests.kv_load MODEL KV_TRANSFER_CONFIG_JSON

Runs in a process of its own, with the settings of the installation in its environment, and prints the tokens of each request.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ingest.vllm.kv.outlet import WATCH_S
from ingest.vllm.kv.profile import ON
from tests.program import until

BLOCK = 32
PROMPT = [(7 * i) % 400 + 20 for i in range(5 * BLOCK + 3)]
OTHER = [(11 * i) % 400 + 30 for i in range(4 * BLOCK + 5)]


def main() -> None:
    """The command line."""
    from vllm import LLM, SamplingParams

    model, transfer = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(
        model=model,
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=4,
        block_size=BLOCK,
        kv_transfer_config=transfer,
        disable_hybrid_kv_cache_manager=True,
    )
    parameters = SamplingParams(max_tokens=4, temperature=0)

    def say(prompt: list[int], salt: str | None = None, *, forget: bool = True) -> None:
        asked: dict[str, Any] = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
        said = llm.generate([asked], parameters, use_tqdm=False)[0]
        sys.stdout.write(json.dumps(list(said.outputs[0].token_ids)) + "\n")
        if forget:
            llm.reset_prefix_cache()

    folder = transfer["kv_connector_extra_config"].get("tokentape_profile")
    if folder:  # the engine is there, and is asked for a profile of what comes now
        Path(folder, ON).touch()
        time.sleep(4 * WATCH_S)
    say(PROMPT)  # never seen
    say(PROMPT)  # the connector has it
    say(OTHER, forget=False)  # never seen
    say(OTHER)  # the engine has it itself
    say(PROMPT[: BLOCK // 2])  # not a block
    say(PROMPT, salt="tenant b")  # the same words under other hashes
    if folder:
        Path(folder, ON).unlink()
        until(lambda: len(list(Path(folder).glob("*.pstats"))) == 2)


if __name__ == "__main__":
    main()
