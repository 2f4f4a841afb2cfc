"""A load on a real vLLM with capture on: staggered arrivals, shared prefixes, aborts, n > 1, stop strings, priorities, small cache.

    python -m tests.engine_load MODEL OUT.json [--requests N] [--free] [--gap SECONDS] [--longest N] [--engine JSON]

Runs in a process of its own, with the settings of the installation in its environment, and writes what its clients got.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import struct
import time
from pathlib import Path
from typing import Any

RECORDING = "ingest.vllm.scheduler.RecordingScheduler"


def make_model(folder: Path, *, hidden: int = 512, layers: int = 4, intermediate: int = 1408) -> None:
    """Write a random bf16 Llama whose logits nearly tie, the hardest case for exactness, with the tokenizer of the tiny model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from scripts.tiny_model import _tokenizer

    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=2048,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def workload(requests: int, gap_s: float, seed: int = 1, longest: int = 192) -> list[dict[str, Any]]:
    """Requests as (id, prompt ids, sampling parameters, priority, seconds since the one before, tokens after which it is aborted)."""
    draw = random.Random(seed)
    prefixes = [[draw.randrange(10, 500) for _ in range(192)] for _ in range(4)]
    load = []
    for i in range(requests):
        prompt = draw.choice(prefixes)[: draw.choice([64, 128, 192])] if i % 3 else []
        prompt = prompt + [draw.randrange(10, 500) for _ in range(draw.randint(8, 160))]
        parameters: dict[str, Any] = {"max_tokens": draw.randint(longest // 4, longest), "logprobs": 1, "temperature": 0.0}
        if i % 2:
            parameters |= {"temperature": 1.0, "seed": 1000 + i}
        if i % 10 == 3:
            parameters["n"] = 2 + i % 2
        if i % 8 == 5:
            parameters["stop"] = ["ing", " th"]
        request = {"id": f"q{i}", "prompt": prompt, "parameters": parameters, "priority": draw.choice([0, 0, 0, 1, 2])}
        load.append({**request, "gap_s": draw.choice([0, 0, 1, 1, 2, 4]) * gap_s, "abort_after": 20 if i % 12 == 7 else None})
    return load


def bits(value: float) -> str:
    """A logprob as the hex digits of its 32 bits."""
    return struct.pack("<f", value).hex()


async def serve(arguments: dict[str, Any], load: list[dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """What each client got, by request and index, and the seconds it took."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    got: dict[str, Any] = {}

    async def one(request: dict[str, Any]) -> None:
        parameters = SamplingParams(**request["parameters"], output_kind=RequestOutputKind.DELTA)
        async for output in engine.generate(
            {"prompt_token_ids": request["prompt"]},
            parameters,
            request["id"],
            priority=request["priority"] if PRIORITIES in arguments.values() else 0,
        ):
            for part in output.outputs:
                said = got.setdefault(f"{request['id']}/{part.index}", {"ids": [], "logprobs": [], "likeliest": [], "end": None})
                said["ids"] += part.token_ids
                said["logprobs"] += [bits(step[t].logprob) for t, step in zip(part.token_ids, part.logprobs or [], strict=False)]
                said["likeliest"] += [[(t, bits(one.logprob)) for t, one in step.items() if one.rank == 1] for step in part.logprobs or []]
                said["end"] = part.finish_reason or said["end"]
                if request["abort_after"] and len(said["ids"]) >= request["abort_after"]:
                    await engine.abort(request["id"])
                    return

    began = time.perf_counter()
    tasks = []
    for request in load:
        await asyncio.sleep(request["gap_s"])
        tasks.append(asyncio.create_task(one(request)))
    await asyncio.gather(*tasks)
    took = time.perf_counter() - began
    await asyncio.sleep(0.5)
    engine.shutdown()
    return got, took


PRIORITIES = "priority"


def engine_arguments(model: str, *, record: bool, **changed: Any) -> dict[str, Any]:
    """Arguments of an engine on a CPU with caching, priorities and a cache that is too small for all."""
    arguments = {
        "model": model,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 8,
        "enable_chunked_prefill": False,  # a seeded request on a CPU cannot do it, see the reference of `replay.exact`
        "enable_prefix_caching": True,
        "block_size": 32,
        "scheduling_policy": PRIORITIES,
        "num_gpu_blocks_override": 80,
        "seed": 0,
        **changed,
    }
    return arguments | ({"scheduler_cls": RECORDING} if record else {})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--gap", type=float, default=0.05)
    parser.add_argument("--longest", type=int, default=192, help="tokens of an answer at most")
    parser.add_argument("--free", action="store_true")
    parser.add_argument("--engine", type=json.loads, default={})
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    arguments = engine_arguments(given.model, record=not given.free, **given.engine)
    got, took = asyncio.run(serve(arguments, workload(given.requests, given.gap, longest=given.longest)))
    given.out.write_text(json.dumps({"seconds": took, "got": got}))


if __name__ == "__main__":
    main()
