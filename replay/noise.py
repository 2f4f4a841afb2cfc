"""How vLLM draws a seeded token: the noise of each runner that is known, so that a recorded choice can be made again.

The draw is no public interface and changes between versions, so functions are kept by version, runner and device. That one
of them is at work is not assumed either: `replay.measurement` sees whether it gives an engine's own seeded tokens back.
The method is that of Token-DiFR (Karvonen et al., 2025).

- V1 runner, CUDA: a token's probability is divided by an exponential draw of the request's generator, which is PyTorch's:
  Philox 4x32-10 (Salmon et al., 2011), a thread a token, four numbers a step. That holds where the GPU runs at least as many
  threads at once as the vocabulary has tokens (270,336 on an H100); elsewhere calibrating finds that it does not.
- V1 runner, CPU, 0.29 to 0.31: the same with PyTorch's generator for CPUs, a Mersenne Twister. Each step takes two words for
  each token of the vocabulary, so its size has to be known.
- V1 runner, CPU, 0.32: each step draws one integer below 2**31 from the generator, and that seeds the Gumbel noise of every
  token, in a kernel of vLLM's.
- V2 runner, 0.24 to 0.30: Gumbel noise of Triton's Philox under a key drawn from seed and position.
- V2 runner, 0.31 and 0.32: Gumbel noise of MurmurHash3 over seed, position and token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from schemas.events import EnvironmentCaptured
from schemas.probe import item

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
"""Numbers of 32 bits in 64, so that a product of two is whole."""

LOW = 0xFFFFFFFF
SMALLEST = np.float32(4.6566127342e-10)
"""The step of Triton's uniform numbers, and what vLLM takes in place of a zero."""
_LEAST = np.finfo(np.float32).eps / np.float32(2)
"""What PyTorch takes in place of 0, which a uniform number of 1 would give."""
CUDA_LOG_OFF = np.float32(2**-21.41)
"""How far `__logf` may be off between 0.5 and 2, by the CUDA C++ Programming Guide."""


class Stream(NamedTuple):
    """What a sequence's draws go by. `vocabulary` is how many tokens the engine draws among, 0 where it does not tell."""

    seed: int
    prompt_tokens: int
    vocabulary: int = 0


class Draw(Protocol):
    """The draws of one sequence, in their order: each call is a step and gives the chosen index."""

    def __call__(self, logits: Floats, favoured: int, favour: float) -> int:
        """The token drawn from `logits` (masked ones -inf), after `favour` was added to the one at `favoured`."""
        ...


class Noise(NamedTuple):
    """A known noise function: `start` begins a sequence; a text from it says why it cannot be computed here."""

    name: str
    versions: tuple[tuple[int, int], tuple[int, int]]
    runner: str
    device: str
    start: Callable[[Stream], Draw | str]


def _drawn(gumbel: Callable[[int, Ids, npt.NDArray[np.bool_]], Floats]) -> Draw:
    """The choice by Gumbel noise of a step, counted from 0, and of tokens that are in question; the mask is of the favoured one."""
    steps = count()

    def draw(logits: Floats, favoured: int, favour: float) -> int:
        tokens = np.flatnonzero(logits > -np.inf)
        own = tokens == favoured
        scores = logits[tokens] + gumbel(next(steps), tokens, own)
        scores[own] += np.float32(favour)
        return int(tokens[scores.argmax()])

    return draw


def _exponential_on_cuda(stream: Stream) -> Draw:
    """V1, `random_sample`: `torch.Tensor.exponential_` of a CUDA generator, whose counter moves by four a step.

    The smallest draws win, and those are the ones that a GPU's logarithm is off by: the favoured token has the doubt.
    """

    def gumbel(step: int, tokens: Ids, own: npt.NDArray[np.bool_]) -> Floats:
        off = np.where(own, -CUDA_LOG_OFF, CUDA_LOG_OFF)
        noise: Floats = -np.log(np.maximum(cuda_exponential(stream.seed, step, tokens) + off, _LEAST))
        return noise

    return _drawn(gumbel)


def cuda_exponential(seed: int, step: int, tokens: Ids) -> Floats:
    """What `exponential_` gives at these places in its call `step` with a fresh generator of this seed."""
    uniform = philox(seed, step, 0, tokens, 0).astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)
    return np.where(uniform >= 1 - _LEAST, _LEAST, -np.log(uniform)).astype(np.float32)


def _exponential_on_cpu(stream: Stream) -> Draw | str:
    """V1 to 0.31, `TopKTopPSampler.forward_cpu`: `torch.Tensor.exponential_` of a CPU generator, in the order of the ids."""
    if not stream.vocabulary:
        return "its noise goes by the size of the vocabulary, which this engine does not tell"
    rows = cpu_exponential(stream.seed, stream.vocabulary)

    def gumbel(_: int, tokens: Ids, __: npt.NDArray[np.bool_]) -> Floats:
        with np.errstate(divide="ignore"):
            noise: Floats = -np.log(next(rows)[tokens])
        return noise

    return _drawn(gumbel)


def cpu_exponential(seed: int, size: int) -> Iterator[Floats]:
    """What call after call of `exponential_` gives with a CPU generator of this seed: two words a number, the first one higher."""
    words = np.random.RandomState(seed & LOW)  # seeded with one word, as PyTorch seeds its own
    while True:
        pairs = np.frombuffer(words.bytes(8 * size), "<u4").reshape(-1, 2).astype(np.uint64)
        bits = (pairs[:, 0] << np.uint64(32) | pairs[:, 1]) & np.uint64(2**53 - 1)
        yield (-np.log1p(-(bits * 2.0**-53))).astype(np.float32)


def _gumbel_on_cpu(stream: Stream) -> Draw | str:
    """V1 from 0.32, `TopKTopPSampler.forward_cpu`."""
    kernel = _kernel()
    if kernel is None:
        return "its noise needs vLLM for CPUs, which is not installed here"
    import torch  # there only where vLLM is

    generator = torch.Generator("cpu").manual_seed(stream.seed)

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


def _gumbel_on_v2(uniform: Callable[[int, int, Ids], Floats]) -> Callable[[Stream], Draw]:
    """V2, `gumbel_sample`: the noise goes by the position of the token that the engine reads, so it needs no generator."""

    def start(stream: Stream) -> Draw:
        def gumbel(step: int, tokens: Ids, _: npt.NDArray[np.bool_]) -> Floats:
            with np.errstate(divide="ignore"):  # a number may round to 1: noise without end, as in the kernel
                noise: Floats = -np.log(-np.log1p(-uniform(stream.seed, stream.prompt_tokens - 1 + step, tokens)))
            return noise

        return _drawn(gumbel)

    return start


def philox_uniform(seed: int, position: int, tokens: Ids) -> Floats:
    """V2 to 0.30: `tl.randint(seed, position)` is the key of `tl.rand(key, token)`."""
    key = philox(seed, position & LOW, position >> 32, np.zeros(1, np.int64), 0)
    signed = philox(int(key[0]), tokens, 0, 0, 0).astype(np.uint32).view(np.int32)
    found: Floats = np.maximum(np.where(signed < 0, ~signed, signed).astype(np.float32) * SMALLEST, SMALLEST)
    return found


def murmur_uniform(seed: int, position: int, tokens: Ids) -> Floats:
    """V2 from 0.31, `murmur3_uniform32`."""
    words = murmur3(seed, position, tokens)
    high, low = (words >> np.uint64(16)).astype(np.float32), (words & np.uint64(0xFFFF)).astype(np.float32)
    found: Floats = high * np.float32(2**-16) + (low + np.float32(0.5)) * np.float32(2**-32)
    return found


def philox(key: int, *counter: int | Ids) -> Words:
    """The first word of Philox 4x32-10 for each of the counters, four words that are broadcast against one another."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.int64).astype(np.uint64) & np.uint64(LOW) for word in counter))
    k0, k1 = key & LOW, key >> 32 & LOW
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = second >> np.uint64(32) ^ c1 ^ np.uint64(k0), second & np.uint64(LOW)
        c2, c3 = first >> np.uint64(32) ^ c3 ^ np.uint64(k1), first & np.uint64(LOW)
        k0, k1 = k0 + 0x9E3779B9 & LOW, k1 + 0xBB67AE85 & LOW
    return c0


def murmur3(seed: int, position: int, tokens: Ids) -> Words:
    """MurmurHash3 (32 bits) over the two words of the seed, the position's lower one and a token."""
    state = np.zeros(1, np.uint64)
    for word in (seed & LOW, seed >> 32 & LOW, position & LOW, tokens):
        key = _times(np.asarray(word, np.int64).astype(np.uint64), 0xCC9E2D51)
        state = _times(_rotated(state ^ _times(_rotated(key, 15), 0x1B873593), 13), 5) + np.uint64(0xE6546B64) & np.uint64(LOW)
    state = state ^ np.uint64(16)  # bytes hashed
    state = _times(state ^ state >> np.uint64(16), 0x85EBCA6B)
    state = _times(state ^ state >> np.uint64(13), 0xC2B2AE35)
    return state ^ state >> np.uint64(16)


def _times(words: Words, factor: int) -> Words:
    return words * np.uint64(factor) & np.uint64(LOW)


def _rotated(words: Words, bits: int) -> Words:
    return (words << np.uint64(bits) | words >> np.uint64(32 - bits)) & np.uint64(LOW)


KNOWN: tuple[Noise, ...] = (
    Noise("vllm-0.32-v1-cpu", ((0, 32), (0, 32)), "v1", "cpu", _gumbel_on_cpu),
    Noise("vllm-0.29-v1-cpu", ((0, 29), (0, 31)), "v1", "cpu", _exponential_on_cpu),
    Noise("vllm-0.31-v2-cuda", ((0, 31), (0, 32)), "v2", "cuda", _gumbel_on_v2(murmur_uniform)),
    Noise("vllm-0.24-v2-cuda", ((0, 24), (0, 30)), "v2", "cuda", _gumbel_on_v2(philox_uniform)),
    Noise("vllm-0.24-v1-cuda", ((0, 24), (0, 32)), "v1", "cuda", _exponential_on_cuda),
)
"""Each by the oldest version that has it."""
SEEDS_IGNORED = ((0, 24), (0, 28))
"""V1 on CPUs: in a step whose batch has one sequence without a generator, a greedy one for instance, no seed is used at all."""


def possible(environment: EnvironmentCaptured | None) -> list[Noise]:
    """Those that may be at work in an environment; what it does not tell excludes none."""
    if environment is None:
        return []
    version, runner, device = (item(environment, key) for key in ("version", "engine.runner", "engine.device"))
    return [
        noise for noise in KNOWN if _within(version, noise.versions) and runner in (None, noise.runner) and device in (None, noise.device)
    ]


def unknown(environment: EnvironmentCaptured) -> str:
    """Why no choice can be made again where none of them was seen at work."""
    version, device = item(environment, "version"), item(environment, "engine.device")
    if _within(version, SEEDS_IGNORED) and device == "cpu":
        return f"vLLM {version} on CPUs uses no seed where a batch has a request without one"
    return "the noise of its runner is not known"


def named(name: str | None) -> Noise | None:
    """The noise of this name."""
    return next((noise for noise in KNOWN if noise.name == name), None)


def _within(version: object, span: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    parts = str(version).split(".")[:2]
    if len(parts) < 2 or not all(part.isdecimal() for part in parts):
        return False
    return span[0] <= (int(parts[0]), int(parts[1])) <= span[1]
