"""Bytes per token in log, hot and cold tier, with id, logprob, time and text of each token, on real text.

The text is what people wrote about the packages that are installed here: descriptions, licences, documentation strings.
A byte-pair encoding is trained on it; the logprob of each token is that of an interpolated trigram model, trained on the
other half of the text, mixed with a cache of the words that came before, as a 32-bit float, so that hardly two values are
equal, as with a neural model. Tokens arrive at 30 to 80 a second in each of several streams, go through the recorder's
own coalescing, the embedded log, the indexer and tiering.
"""

from __future__ import annotations

import ast
import heapq
import importlib.metadata
import itertools
import math
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ingest.coalesce import Chunk, Coalescer, delta_of
from ingest.encoding import Stamp, encode
from schemas.events import (
    GenerationContent,
    GenerationFinished,
    GenerationStarted,
    Message,
    RequestContent,
    RequestSubmitted,
    SequenceFinished,
    SequenceStarted,
    SessionOpened,
)
from schemas.settings import RecorderSettings, Settings
from schemas.sink import SessionContext, new_id
from store.log.base import Entry

VOCABULARY = 32_000
"""Tokens of the byte-pair encoding, as many as small models have."""

CHARACTERS_MAX = 6_000_000
"""Text read at most; half of it is streamed, the other half teaches the model."""

STREAMS = 24
"""Generations under way at the same time."""

TOKENS = (60, 600)
"""Shortest and longest generation."""

REACH = 6.0
"""Bytes per token to reach in the cold tier."""


def documents() -> list[str]:
    """Texts of the installed packages in a fixed order, without repeats."""
    found: dict[str, None] = {}
    total = 0
    for distribution in sorted(importlib.metadata.distributions(), key=lambda item: item.metadata["Name"] or ""):
        texts = [distribution.metadata.get_payload() or "", *_files(distribution)]
        for text in texts:
            if isinstance(text, str) and len(text) > 400 and text not in found:
                found[text] = None
                total += len(text)
        if total > CHARACTERS_MAX:
            break
    return list(found)


def _files(distribution: importlib.metadata.Distribution) -> Iterator[str]:
    """Licences and documentation strings of a distribution."""
    for path in (distribution.files or [])[:400]:
        if path.suffix not in (".py", ".txt", ".md", ".rst") and "LICENSE" not in path.name:
            continue
        try:
            text = Path(str(path.locate())).read_text(encoding="utf-8")
            yield "\n\n".join(_docstrings(text)) if path.suffix == ".py" else text
        except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
            continue


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def tokenizer_of(texts: Sequence[str]) -> Tokenizer:
    """A byte-level byte-pair encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Model:
    """Interpolated trigrams (Witten-Bell) and a decaying cache of the tokens before (Kuhn and De Mori, 1990)."""

    def __init__(self, sequences: Sequence[Sequence[int]], vocabulary: int) -> None:
        self._grams: list[Counter[Any]] = [Counter(), Counter(), Counter()]
        self._kinds: list[Counter[Any]] = [Counter(), Counter(), Counter()]
        self._totals: list[Counter[Any]] = [Counter(), Counter(), Counter()]
        self._vocabulary = vocabulary
        for ids in sequences:
            for order in range(3):
                self._grams[order].update(zip(*(ids[i:] for i in range(order + 1)), strict=False))
        for order in range(3):
            for gram, count in self._grams[order].items():
                self._totals[order][gram[:-1]] += count
                self._kinds[order][gram[:-1]] += 1

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Natural logarithm of the probability of each token after those before it."""
        cache: dict[int, tuple[float, int]] = {}
        found, mass = [], 0.0
        for place, token in enumerate(ids):
            probability = 1.0 / self._vocabulary
            for order in range(3):
                context = tuple(ids[max(0, place - order) : place])
                if len(context) == order and (total := self._totals[order].get(context)):
                    kinds = self._kinds[order][context]
                    probability = (self._grams[order].get((*context, token), 0) + kinds * probability) / (total + kinds)
            weight, at = cache.get(token, (0.0, place))
            recent = weight * 0.995 ** (place - at)
            if mass:
                probability = 0.85 * probability + 0.15 * recent / mass
            found.append(math.log(probability))
            cache[token] = (recent + 1.0, place)
            mass = mass * 0.995 + 1.0
        return found


@dataclass(frozen=True, slots=True)
class Token:
    """One token as it arrives: when (µs since the start), which stream, which place in it."""

    at_us: int
    stream: int
    place: int


@dataclass(slots=True)
class Stream:
    """One generation: prompt, what is generated, when each token comes (µs after the request)."""

    session: SessionContext
    generation_id: bytes
    start_us: int
    prompt: str
    prompt_ids: list[int]
    ids: list[int]
    pieces: list[str]
    logprobs: list[float]
    offsets_us: list[int]


def streams(texts: Sequence[str], tokenizer: Tokenizer, model: Model, rng: random.Random) -> list[Stream]:
    """The texts cut into generations that run side by side."""
    free_at = [rng.randrange(2_000_000) for _ in range(STREAMS)]
    made = []
    for text in texts:
        encoding = tokenizer.encode(text)
        ids, logprobs, cut = encoding.ids, model.logprobs(encoding.ids), 0
        while cut < len(ids) - TOKENS[0]:
            size = rng.randint(*TOKENS)
            lane = min(range(STREAMS), key=free_at.__getitem__)
            prompt = ids[max(0, cut - 40) : cut]
            mine = slice(cut, cut + size)
            offsets = _arrivals(len(ids[mine]), rng)
            session = SessionContext(new_id(), "acme", "gateway", "key-7")
            pieces = _pieces(tokenizer, ids[mine])
            made.append(
                Stream(session, new_id(), free_at[lane], tokenizer.decode(prompt), prompt, ids[mine], pieces, logprobs[mine], offsets)
            )
            free_at[lane] += offsets[-1] + rng.randrange(500_000, 4_000_000)
            cut += size
    return made


def _arrivals(count: int, rng: random.Random) -> list[int]:
    """Arrival times in µs: a rate of 30 to 80 tokens a second, network and scheduler jitter on each, and now and then a stall."""
    gap = 1e6 / rng.uniform(30, 80)
    at, found = rng.uniform(100_000, 800_000), []
    for _ in range(count):
        found.append(int(at + abs(rng.gauss(0, 400))))
        at += gap * rng.lognormvariate(0, 0.08) + (rng.expovariate(1 / 60_000) if rng.random() < 0.01 else 0)
    return list(itertools.accumulate(found, max))


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Text of each token as a stream gives it: a character that several tokens make comes with the last of them."""
    found, held = [], []
    for token in ids:
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith("\ufffd") and len(held) < 4:
            found.append("")
            continue
        found.append(text)
        held = []
    return found


def events(all_streams: Sequence[Stream], stamp: Stamp) -> Iterator[tuple[int, Entry]]:
    """Log entries of all streams in the order of time, each with its time in µs, coalesced as the recorder does it."""
    settings = RecorderSettings()
    coalescer = Coalescer(span_s=settings.coalesce_ms / 1000, tokens_max=settings.coalesce_tokens)
    base = 1_790_000_000_000_000
    tokens = heapq.merge(*(_timeline(number, stream) for number, stream in enumerate(all_streams)))
    for at_us, number, place in tokens:
        stream = all_streams[number]
        for chunk in coalescer.due(at_us / 1e6):
            yield at_us, _entry(stamp, chunk, base)
        if place < 0:
            for payload in _opening(stream):
                yield at_us, stamp.entry(stream.session, encode(payload), base + at_us)
        if place >= 0:
            delta = delta_of(
                stream.generation_id,
                0,
                place,
                stream.offsets_us[place],
                "content",
                (stream.ids[place],),
                stream.pieces[place],
                (stream.logprobs[place],),
            )
            for chunk in coalescer.add(stream.session, delta, base + at_us, at_us / 1e6):
                yield at_us, _entry(stamp, chunk, base)
        if place == len(stream.ids) - 1:
            for chunk in coalescer.end(stream.session.session_id):
                yield at_us, _entry(stamp, chunk, base)
            for payload in _ending(stream):
                yield at_us, stamp.entry(stream.session, encode(payload), base + at_us)


def _timeline(number: int, stream: Stream) -> Iterator[tuple[int, int, int]]:
    yield stream.start_us, number, -1
    for place, offset in enumerate(stream.offsets_us):
        yield stream.start_us + offset, number, place


def _entry(stamp: Stamp, chunk: Chunk, base: int) -> Entry:
    return stamp.entry(chunk.session, chunk.encode(), chunk.recorded_at)


def _opening(stream: Stream) -> list[Any]:
    generation = stream.generation_id
    body = RequestContent(
        messages=[Message(message_id=new_id(), role="user", body=stream.prompt)], parameters='{"temperature":0.7,"stream":true}'
    )
    return [
        SessionOpened(client="openai-python"),
        RequestSubmitted(generation_id=generation, endpoint="/v1/chat/completions", model="tiny", stream=True, content=body),
        GenerationStarted(
            generation_id=generation, authoritative="gateway", status=200, content=GenerationContent(prompt_token_ids=stream.prompt_ids)
        ),
        SequenceStarted(generation_id=generation, index=0, role="assistant", offset_us=stream.offsets_us[0]),
    ]


def _ending(stream: Stream) -> list[Any]:
    end: dict[str, Any] = {"generation_id": stream.generation_id, "offset_us": stream.offsets_us[-1]}
    return [
        SequenceFinished(index=0, tokens=len(stream.ids), finish_reason="stop", **end),
        GenerationFinished(sequences=1, tokens_recorded=len(stream.ids), **end),
    ]
