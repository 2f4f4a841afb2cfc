"""An engine that works off a small load with capture on, in a process of its own: `python -m tokentape.tours.engine SPEC_JSON`.

SPEC is {"model", "options", "load": [{"prompt": ids, "parameters", "after": step}]}; a request comes when so many steps have been made.
"""

from __future__ import annotations

import json
import sys
from typing import Any

PREFIX = list(range(20, 84))
"""Words that several prompts begin with: two blocks of 32, which a prefix cache keeps."""


def load(kind: str) -> list[dict[str, Any]]:
    """The requests of a tour: `shared` is six that come and go, `alone` two that are compared between engines."""
    if kind == "alone":
        return [_request([*range(40 + 9 * i, 100 + 9 * i)], 48, after=0) for i in range(2)]
    lengths = ((70, 40, 0), (10, 12, 0), (25, 30, 0), (90, 20, 4), (5, 8, 10), (40, 16, 22))
    return [_request([*(PREFIX if i in (0, 3) else []), *range(100 + i, 100 + i + n)], m, after) for i, (n, m, after) in enumerate(lengths)]


def _request(prompt: list[int], tokens: int, after: int) -> dict[str, Any]:
    parameters = {"max_tokens": tokens, "min_tokens": tokens, "temperature": 0.0, "logprobs": 1}
    return {"prompt": prompt, "parameters": parameters, "after": after}


def main() -> None:
    """The command line."""
    from vllm import LLM, SamplingParams

    spec = json.loads(sys.argv[1])
    engine = LLM(spec["model"], **spec["options"]).llm_engine
    waiting = list(enumerate(spec["load"]))
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][1]["after"] <= step:
            number, asked = waiting.pop(0)
            engine.add_request(f"r{number + 1}", {"prompt_token_ids": asked["prompt"]}, SamplingParams(**asked["parameters"]))
        engine.step()
        step += 1
    engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
