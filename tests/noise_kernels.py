"""The noise of the V2 runner as Triton's own functions and vLLM's own kernel draw it, on a GPU or in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.noise_kernels

prints whether numpy draws the same, bit for bit; on a GPU leave the variable out.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from replay.noise import Floats, Ids, murmur_uniform, philox_uniform

TOKENS = 1024
IMPORT = "from vllm.triton_utils import"
PLAIN = "import triton\nimport triton.language as tl\n"
"""In place of vLLM's import, which gives nothing where there is no GPU."""


@triton.jit  # type: ignore[untyped-decorator]  # Triton is not typed
def _philox(out, seeds, positions, size: tl.constexpr):  # type: ignore[no-untyped-def]  # it compiles annotations, too
    """Each row of `out` by its seed and position, as vLLM's kernel up to 0.30 draws it."""
    row = tl.program_id(0)
    key = tl.randint(tl.load(seeds + row), tl.load(positions + row))
    tokens = tl.arange(0, size)
    tl.store(out + row * size + tokens, tl.maximum(tl.rand(key, tokens), 4.6566127342e-10))


def philox_of_triton(seeds: list[int], positions: list[int], device: str) -> Floats:
    """The uniform numbers of TOKENS tokens for each seed and position."""
    out = torch.empty(len(seeds), TOKENS, device=device)
    arguments = (torch.tensor(each, dtype=torch.int64, device=device) for each in (seeds, positions))
    _philox[(len(seeds),)](out, *arguments, TOKENS)
    found: Floats = out.cpu().numpy()
    return found


def gumbel_module() -> Any:
    """vLLM's `gumbel.py` as it is installed, with Triton imported whatever the platform."""
    folder = Path((importlib.util.find_spec("vllm") or sys.exit("vLLM is not installed")).submodule_search_locations[0])  # type: ignore[index]  # a package has one
    lines = (folder / "v1/worker/gpu/sample/gumbel.py").read_text(encoding="utf-8").splitlines(keepends=True)
    copy = Path(tempfile.mkdtemp()) / "gumbel_of_vllm.py"
    copy.write_text("".join(PLAIN if line.startswith(IMPORT) else line for line in lines), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chosen_by_vllm(logits: Floats, seeds: list[int], positions: list[int], device: str) -> list[int]:
    """The tokens that vLLM's kernel draws at temperature 1, row by row."""
    places = torch.arange(len(seeds), dtype=torch.int32, device=device)
    arguments = (torch.tensor(each, dtype=torch.int64, device=device) for each in (seeds, positions))
    ones = torch.ones(len(seeds), device=device)
    given = torch.from_numpy(logits).to(device)
    said = gumbel_module().gumbel_sample(given, places, ones, *arguments, apply_temperature=False, is_drafting=False)
    return [int(token) for token in said.cpu()]


def chosen(logits: Floats, seeds: list[int], positions: list[int], uniform: Any) -> list[int]:
    """The same by numpy."""
    tokens: Ids = np.arange(logits.shape[1])
    rows = zip(logits, seeds, positions, strict=True)
    return [int((row - np.log(-np.log1p(-uniform(seed, position, tokens)))).argmax()) for row, seed, position in rows]


def compared(device: str, rows: int = 16) -> dict[str, Any]:
    """How many of the numbers and choices agree, and how many do under another seed."""
    rng = np.random.default_rng(0)
    seeds = [int(seed) for seed in rng.integers(-(2**63), 2**63 - 1, rows)]
    positions = [int(position) for position in rng.integers(0, 2**17, rows)]
    tokens: Ids = np.arange(TOKENS)
    theirs = philox_of_triton(seeds, positions, device)
    ours = np.stack([philox_uniform(seed, position, tokens) for seed, position in zip(seeds, positions, strict=True)])
    logits = rng.normal(0, 2, (rows, 8 * TOKENS)).astype(np.float32)
    drawn = chosen_by_vllm(logits, seeds, positions, device)
    again, wrong = (chosen(logits, each, positions, murmur_uniform) for each in (seeds, [seed + 1 for seed in seeds]))
    return {
        "philox_numbers": int(ours.size),
        "philox_equal": int((ours == theirs).sum()),
        "murmur_choices": rows,
        "murmur_equal": sum(a == b for a, b in zip(drawn, again, strict=True)),
        "murmur_equal_under_another_seed": sum(a == b for a, b in zip(drawn, wrong, strict=True)),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compared("cuda" if torch.cuda.is_available() else "cpu")) + "\n")
