"""How vLLM draws a seeded token: the noise of each runner that is known, so that a recorded choice can be made again.

The draw is no public interface and changes between versions, so functions are kept by version, runner and device. That one
of them is at work is not assumed either: `replay.measurement` sees whether it gives an engine's own seeded tokens back.

Known is vLLM 0.32 on CPUs (V1 runner): each step draws one integer below 2**31 from the request's generator, and that
seeds the Gumbel noise of every token. The method is that of Token-DiFR (Karvonen et al., 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from schemas.events import EnvironmentCaptured
from schemas.probe import item

Floats = npt.NDArray[np.float32]


class Draw(Protocol):
    """The draws of one sequence, in their order: each call is a step and gives the chosen index."""

    def __call__(self, logits: Floats, favoured: int, favour: float) -> int:
        """The token drawn from `logits` (masked ones -inf), after `favour` was added to the one at `favoured`."""
        ...


class Noise(NamedTuple):
    """A known noise function: `start(seed)` begins a sequence; None from it says that this machine cannot compute it."""

    name: str
    versions: tuple[tuple[int, int], tuple[int, int]]
    runner: str
    device: str
    start: Callable[[int], Draw | None]


def _gumbel_on_cpu(seed: int) -> Draw | None:
    """vLLM 0.32, `TopKTopPSampler.forward_cpu`."""
    kernel = _kernel()
    if kernel is None:
        return None
    import torch  # there only where vLLM is

    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(logits: Floats, favoured: int, favour: float) -> int:
        step = torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
        row = torch.from_numpy(logits.copy())
        row[favoured] += favour
        return int(kernel(row.unsqueeze(0), step)[0])

    return draw


def _kernel() -> Any:
    """vLLM's own kernel for it, None where it is not installed."""
    try:
        import torch
        from vllm.platforms import current_platform

        if not hasattr(torch.ops._C, "fused_gumbel_argmax"):
            current_platform.import_kernels()
        return torch.ops._C.fused_gumbel_argmax
    except (ImportError, AttributeError, RuntimeError):
        return None


KNOWN: tuple[Noise, ...] = (Noise("vllm-0.32-v1-cpu", ((0, 32), (0, 32)), "v1", "cpu", _gumbel_on_cpu),)


def possible(environment: EnvironmentCaptured | None) -> list[Noise]:
    """Those that may be at work in an environment; what it does not tell excludes none."""
    if environment is None:
        return []
    version, runner, device = (item(environment, key) for key in ("version", "engine.runner", "engine.device"))
    return [
        noise for noise in KNOWN if _within(version, noise.versions) and runner in (None, noise.runner) and device in (None, noise.device)
    ]


def named(name: str | None) -> Noise | None:
    """The noise of this name."""
    return next((noise for noise in KNOWN if noise.name == name), None)


def _within(version: object, span: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    parts = str(version).split(".")[:2]
    if len(parts) < 2 or not all(part.isdecimal() for part in parts):
        return False
    return span[0] <= (int(parts[0]), int(parts[1])) <= span[1]
