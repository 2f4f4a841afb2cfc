"""What each tour shows: pages of text and drawings, made of one recorded run, or of two that are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import NamedTuple

from replay.words import duration, shorten
from tokentape.tours.tape import Row, Tape

WIDE = 96
"""Steps that a drawing shows side by side."""
FEW = 12
"""Rows of a table on a page."""


class Page(NamedTuple):
    """A page: what it is about, what to know, and what the tape shows of it."""

    title: str
    text: str
    lines: list[str]


def initialisation(tape: Tape) -> Iterator[Page]:
    """What an engine decides before its first step."""
    facts, block = tape.run.facts, tape.block
    config = {key.removeprefix("config."): value for key, value in facts.items()}
    model = [f"{name:28} {config.get(f'model_config.{name}')}" for name in ("model", "dtype", "quantization", "enforce_eager", "seed")]
    yield Page("The model", "Weights are read once; the digest is over their bytes, so another file is another model.", model)
    cache = [f"{tape.blocks} blocks of {block} tokens: room for {tape.blocks * block:,} tokens, whoever they belong to"]
    cache += [f"prefix caching               {config.get('cache_config.prefix_caching')}"]
    yield Page("The cache", "What memory is left becomes blocks of keys and values. A sequence gets them one by one, as it grows.", cache)
    limits = ("max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "async_scheduling", "policy")
    scheduler = [f"{name:28} {config.get(f'scheduler_config.{name}')}" for name in limits]
    yield Page("The scheduler", "Before each step it decides who computes how many tokens, within these limits.", scheduler)
    workers = [str(worker) for worker in config.get("workers") or ()] or ["(not told)"]
    yield Page("The workers", f"One per rank, runner {config.get('runner')}. They compute what the scheduler decided.", workers)


def generation(tape: Tape) -> Iterator[Page]:
    """One request, token by token."""
    number = max(tape.run.requests, key=lambda each: len(tape.said(each)))
    request, ids, offsets = tape.run.requests[number], tape.said(number), tape.offsets[number]
    mine = [row for row in tape.rows if number in row.tokens]
    first = mine[0]
    found = first.cached.get(number, 0)
    prefill = [
        f"step {first.number}: {first.tokens[number]} of {len(request.prompt)} prompt tokens computed at once, {found} from the cache",
        f"it took {duration(first.duration_us)} and gave the first token after {duration(offsets[0])}",
    ]
    yield Page(f"{tape.name(number)}: the prompt", "All tokens of a prompt are known, so they are computed together.", prefill)
    words, logprobs = tape.words(number), tape.logprobs(number) or [float("nan")] * len(ids)
    lines = ["token    id     logprob   after the one before   text"]
    for i, token in enumerate(ids):
        gap = offsets[i] - (offsets[i - 1] if i else 0)
        lines.append(f"{i:5} {token:6} {logprobs[i]:10.4f} {duration(gap):>15}          {words[i]!r}")
    text = "Each further token needs the one before, so each costs a step. Its logprob is what the model thought of its own choice."
    yield Page(f"{tape.name(number)}: {len(ids)} tokens", text, lines)


def paged_attention(tape: Tape) -> Iterator[Page]:
    """Blocks of sequences over steps."""
    block = tape.block
    number = max(tape.run.requests, key=lambda each: len(tape.run.requests[each].prompt) + len(tape.said(each)))
    lines, shown = [], 0
    for row in tape.rows:
        if number in row.computed and (held := -(-row.computed[number] // block)) != shown:
            shown, full = held, row.computed[number] % block or block
            lines.append(f"step {row.number:4}  {row.computed[number]:4} tokens  {'▣' * (held - 1)}□ the last one holds {full} of {block}")
    text = f"A block holds {block} tokens. A sequence takes another when its last is full: at most {block - 1} places are ever wasted."
    yield Page(f"{tape.name(number)} grows", text, lines)
    shared = [
        f"{tape.name(number)} found {tokens} tokens, {tokens // block} blocks, that another sequence had left"
        for row in tape.rows
        for number, tokens in row.cached.items()
    ]
    text = "Blocks are named by what they hold, so a prompt that begins alike takes those that are there. It computes only the rest."
    yield Page("Blocks that are shared", text, shared or ["no prompt began like another one here"])
    yield Page(
        "All blocks",
        "What the engine said of its cache. Blocks of those that ended are free, and found again until somebody else takes them.",
        _usage(tape),
    )


def _usage(tape: Tape) -> list[str]:
    told = [row for row in tape.rows if row.kv_used is not None]
    every = max(1, len(told) // FEW)
    return [f"step {row.number:4}  {row.kv_used or 0:6.1%}  {'█' * round(60 * (row.kv_used or 0))}" for row in told[::every]]


def continuous_batching(tape: Tape) -> Iterator[Page]:
    """Who was in which step."""
    came = {number: row.number for row in tape.rows for number in row.arrived}
    text = "A request joins at the next step that has room and leaves when it is done; nobody waits for a batch to end."
    legend = "▓ prompt   ■ one token   ░ waiting   ! preempted"
    lines = [legend]
    rows = tape.rows[:WIDE]
    for number in sorted(tape.run.requests):
        last = max((row.number for row in tape.rows if number in row.tokens), default=-1)
        lines.append(f"{tape.name(number):>6} {''.join(_mark(row, number, came.get(number, 0), last) for row in rows)}")
    lines.append(f"{'in all':>6} {''.join(str(min(9, len(row.tokens))) for row in rows)}")
    yield Page("Who was in which step", text, lines)
    sizes = [len(row.tokens) for row in tape.rows if row.tokens]
    alone = sum(len(tape.said(number)) for number in tape.run.requests)
    waited = [row.waiting for row in tape.rows]
    yield Page(
        "What it is good for",
        "The weights are read once per step, whoever is in it; so tokens of several sequences cost little more than one's.",
        [
            f"{alone} tokens of {len(tape.run.requests)} requests in {len(sizes)} steps, {mean(sizes):.2f} sequences in each",
            f"one after another they would have taken at least {alone} steps",
            f"at most {max(waited)} waited for one of {tape.run.facts.get('config.scheduler_config.max_num_seqs')} places",
        ],
    )


def _mark(row: Row, number: int, came: int, last: int) -> str:
    if number in row.preempted:
        return "!"
    if number in row.tokens:
        return "▓" if row.tokens[number] > 1 or number in row.cached else "■"
    return "░" if came <= row.number <= last else " "


def profiling(tape: Tape) -> Iterator[Page]:
    """Where the time went."""
    kinds: dict[str, list[Row]] = {"prompts": [], "tokens": []}
    for row in tape.rows:
        if row.tokens:
            kinds["prompts" if max(row.tokens.values()) > 1 else "tokens"].append(row)
    total = sum(row.duration_us for rows in kinds.values() for row in rows) or 1
    lines = ["steps with   steps   tokens   time        median      tokens/s   share"]
    for kind, rows in kinds.items():
        if rows:
            tokens, us = sum(sum(row.tokens.values()) for row in rows), sum(row.duration_us for row in rows)
            middle = duration(int(median(row.duration_us for row in rows)))
            rate = tokens / max(us, 1) * 1e6
            lines.append(f"{kind:12} {len(rows):5} {tokens:8}   {duration(us):10}  {middle:10} {rate:9,.0f}   {us / total:5.0%}")
    text = "A prompt's tokens are computed together, which uses the arithmetic; single tokens mostly wait for weights to be read."
    yield Page("Prompts and tokens", text, lines)
    slow = sorted(tape.rows, key=lambda row: -row.duration_us)[:FEW]
    lines = [
        f"step {row.number:4}  {duration(row.duration_us):>9}  {sum(row.tokens.values()):4} tokens of {len(row.tokens)}" for row in slow
    ]
    yield Page("The slowest steps", "The first of each kind pays for what is compiled or allocated once.", lines)
    by_size: dict[int, list[int]] = {}
    for row in kinds["tokens"]:
        by_size.setdefault(len(row.tokens), []).append(row.duration_us)
    lines = [
        f"{size} sequences: {duration(int(median(took))):>9} a step, {size / median(took) * 1e6:8,.0f} tokens/s"
        for size, took in sorted(by_size.items())
    ]
    yield Page("What company costs", "The same step with more sequences in it: the price of one more is what batching lives on.", lines)


def tensor_parallelism(one: Tape, two: Tape) -> Iterator[Page]:
    """One rank beside two."""
    workers = [f"{label}: {tape.run.facts.get('config.workers')}" for label, tape in (("one rank", one), ("two ranks", two))]
    text = "Each rank holds half of every matrix and half of the heads, computes its part, and the parts are summed: twice per layer."
    yield Page("Who computes", text, workers)
    yield _compared(
        "The sum is added up in another order", "so logprobs differ in their last digits, and a near tie may fall otherwise.", one, two
    )
    yield Page(
        "What it costs here", "On one machine's memory there is nothing to win; on GPUs each reads half of the weights.", _pace(one, two)
    )


def kv_quantisation(full: Tape, small: Tape) -> Iterator[Page]:
    """The cache in full beside the cache in eight bits."""
    kinds = [f"{label}: {tape.run.facts.get('config.cache_config.cache_dtype')}" for label, tape in (("full", full), ("small", small))]
    text = "Keys and values in eight bits take half the room, so twice as many tokens fit; each is rounded when it is stored."
    yield Page("What is stored", text, kinds)
    yield _compared(
        "What the rounding does", "to logprobs of the same tokens, as long as both said the same; then each goes its own way.", full, small
    )
    yield Page("What it costs here", "The pace of both, from their own steps.", _pace(full, small))


def _compared(title: str, text: str, first: Tape, second: Tape) -> Page:
    """Drift of the second run against the first over tokens that both said."""
    lines = ["request   tokens   alike until   drift mean   drift max   (nats)"]
    every: list[float] = []
    for number in sorted(first.run.requests):
        a, b = first.said(number), second.said(number)
        alike = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        drift = [abs(x - y) for x, y in zip(first.logprobs(number)[:alike], second.logprobs(number)[:alike], strict=True)]
        every += drift
        until = "the end" if alike == len(a) == len(b) else str(alike)
        lines.append(f"{first.name(number):>7} {len(a):8} {until:>13} {mean(drift or [0]):12.2g} {max(drift or [0]):11.2g}")
    lines.append(f"over {len(every)} tokens: mean {mean(every or [0]):.3g}, largest {max(every or [0]):.3g} nats")
    return Page(title, text, lines)


def _pace(*tapes: Tape) -> list[str]:
    """Median time of a step without a prompt."""
    found = []
    for tape in tapes:
        took = [row.duration_us for row in tape.rows if row.tokens and max(row.tokens.values()) == 1]
        kind, ranks = tape.run.facts.get("config.cache_config.cache_dtype"), len(tape.run.facts.get("config.workers") or ())
        found.append(f"cache {shorten(str(kind), 10)}, {ranks} rank(s): {duration(int(median(took or [0])))} a step")
    return found


SINGLE: dict[str, Callable[[Tape], Iterator[Page]]] = {
    "initialisation": initialisation,
    "generation": generation,
    "paged-attention": paged_attention,
    "continuous-batching": continuous_batching,
    "profiling": profiling,
}
"""Tours of one run; any recorded engine run will do."""
PAIRS: dict[str, tuple[Callable[[Tape, Tape], Iterator[Page]], dict[str, object]]] = {
    "tensor-parallelism": (tensor_parallelism, {"tensor_parallel_size": 2}),
    "kv-quantisation": (kv_quantisation, {"kv_cache_dtype": "fp8"}),
}
"""Tours of two runs, the second with these options."""
