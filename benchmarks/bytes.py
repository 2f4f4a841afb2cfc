"""Bytes per token in log, hot and cold tier, with id, logprob, time and text of each token, on real text.

The text is what people wrote about the packages that are installed here: descriptions, licences, documentation strings.
A byte-pair encoding is trained on it; the logprob of each token is that of an interpolated trigram model, trained on the
other half of the text, mixed with a cache of the words that came before, as a 32-bit float, so that hardly two values are
equal, as with a neural model. Tokens arrive at 30 to 80 a second in each of several streams, go through the recorder's
own coalescing, the embedded log, the indexer and tiering.
"""

from __future__ import annotations

import ast
import contextlib
import heapq
import importlib.metadata
import itertools
import math
import random
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ingest.coalesce import Coalescer, delta_of
from ingest.encoding import Stamp, encode
from lifecycle.tiering import Tiering
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
from schemas.registry import SchemaRegistry
from schemas.settings import RecorderSettings, Settings
from schemas.sink import SessionContext, new_id
from store.catalog import open_catalog
from store.indexer import Indexer
from store.ledger import open_ledger
from store.log import open_log
from store.log.base import Entry
from store.merge import merge
from store.objects import open_store

VOCABULARY = 32_000
"""Tokens of the byte-pair encoding, as many as small models have."""

CHARACTERS_MAX = 3_000_000
"""Text read at most; half of it is streamed, the other half teaches the model."""

STREAMS = 24
"""Generations under way at the same time."""

TOKENS = (60, 600)
"""Shortest and longest generation."""

REACH = 6.0
"""Bytes per token to reach in the cold tier."""

COMMIT_US = 50_000
"""How much time one append to the log spans: the coalescing makes events come in such steps."""

THREE = ("token_chunk.content.token_ids.list.element", "token_chunk.content.logprobs.list.element", "token_chunk.offsets_us.list.element")
"""Columns of id, logprob and time."""

COLUMNS_SHOWN = 12
"""Columns that have a row of their own in the table."""


def documents() -> list[str]:
    """Texts of the installed packages in a fixed order, without repeats."""
    found: dict[str, None] = {}
    total = 0
    for distribution in sorted(importlib.metadata.distributions(), key=lambda item: item.metadata["Name"] or ""):
        texts = [(distribution.read_text("METADATA") or "").partition("\n\n")[2], *_files(distribution)]
        for text in texts:
            if len(text) > 400 and text not in found:
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
    base = time.time_ns() // 1000
    coalescer = Coalescer(span_s=settings.coalesce_ms / 1000, tokens_max=settings.coalesce_tokens)
    tokens = heapq.merge(*(_timeline(number, stream) for number, stream in enumerate(all_streams)))
    for at_us, number, place in tokens:
        stream = all_streams[number]
        for chunk in coalescer.due(at_us / 1e6):
            yield at_us, stamp.entry(chunk.session, chunk.encode(), chunk.recorded_at)
        if place < 0:
            for payload in _opening(stream):
                yield at_us, stamp.entry(stream.session, encode(payload), base + at_us)
        else:
            token = (stream.ids[place],), stream.pieces[place], (stream.logprobs[place],)
            delta = delta_of(stream.generation_id, 0, place, stream.offsets_us[place], "content", *token)
            for chunk in coalescer.add(stream.session, delta, base + at_us, at_us / 1e6):
                yield at_us, stamp.entry(chunk.session, chunk.encode(), chunk.recorded_at)
        if place == len(stream.ids) - 1:
            for chunk in coalescer.end(stream.session.session_id):
                yield at_us, stamp.entry(chunk.session, chunk.encode(), chunk.recorded_at)
            for payload in _ending(stream):
                yield at_us, stamp.entry(stream.session, encode(payload), base + at_us)


def _timeline(number: int, stream: Stream) -> Iterator[tuple[int, int, int]]:
    yield stream.start_us, number, -1
    for place, offset in enumerate(stream.offsets_us):
        yield stream.start_us + offset, number, place


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


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of one installation: the log's file, what was sent to it, the merged hot shard, segments and what proves them."""

    tokens: int
    events: int
    framed: int
    log: int
    hot: int
    cold: int
    proof: int
    columns: dict[str, int]
    """Compressed bytes of each column of the segments."""


def run() -> list[dict[str, Any]]:
    """Rows of the table."""
    rng = random.Random(5)
    texts = documents()
    rng.shuffle(texts)
    tokenizer = tokenizer_of(texts)
    half = len(texts) // 2
    model = Model([encoding.ids for encoding in tokenizer.encode_batch(texts[:half])], tokenizer.get_vocab_size())
    made = streams(texts[half:], tokenizer, model, rng)
    with tempfile.TemporaryDirectory() as folder:
        sizes = _measure(Path(folder), made)
    return [*_totals(sizes), *_columns(sizes), *_limits(made, sizes)]


def _measure(folder: Path, made: Sequence[Stream]) -> Sizes:
    """Send all of it through an embedded installation."""
    settings = Settings(data=folder / "data")
    log = open_log(settings.log, settings.data)
    registry = SchemaRegistry()
    timed = list(events(made, Stamp(log.partitions)))
    commits = [[entry for _, entry in group] for _, group in itertools.groupby(timed, key=lambda item: item[0] // COMMIT_US)]
    for part in (commits[: len(commits) // 2], commits[len(commits) // 2 :]):  # two shards, so that there is something to merge
        for commit in part:
            log.append(commit)
        Indexer(settings, log, registry).run_once()
    log.close()
    hot = _merged(settings)
    cold, proof, columns = _tiered(settings, registry)
    log_bytes = sum(path.stat().st_size for path in (settings.data / "log").iterdir())
    framed = sum(len(entry.value) for _, entry in timed)
    return Sizes(sum(len(stream.ids) for stream in made), len(timed), framed, log_bytes, hot, cold, proof, columns)


def _merged(settings: Settings) -> int:
    """Bytes of the hot tier once its day is over."""
    catalog = open_catalog(settings.data)
    with contextlib.closing(sqlite3.connect(catalog.path)) as connection, connection:
        connection.execute("UPDATE shard SET day = '2026-01-01'")
    merge(settings, catalog, grace_s=0)
    return sum(shard.bytes for shard in catalog.snapshot().shards)


def _tiered(settings: Settings, registry: SchemaRegistry) -> tuple[int, int, dict[str, int]]:
    """Bytes of the segments, of all other objects, and of each column."""
    catalog, objects = open_catalog(settings.data), open_store(settings.cold, settings.data)
    Tiering(settings, catalog, objects, open_ledger(settings, objects), registry).run(all_days=True)
    columns: Counter[str] = Counter()
    cold = 0
    for segment in catalog.snapshot().segments:
        cold += segment.bytes
        metadata = pq.ParquetFile(objects.read_url(segment.key, expires_s=60)).metadata
        columns["footer"] += metadata.serialized_size
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                columns[column.path_in_schema] += column.total_compressed_size
    other = sum(info.size for info in objects.list("") if not info.key.startswith(("events/", "schemas/")))
    return cold, other, dict(columns)


def _totals(sizes: Sizes) -> list[dict[str, Any]]:
    tokens, framed = sizes.tokens, sizes.framed / sizes.tokens
    three = sum(sizes.columns.get(name, 0) for name in THREE) / tokens
    return [
        _row("tokens per event (50 ms or 64 tokens)", tokens / sizes.events, "", "events", sizes.events),
        _row("log: Avro as sent", framed, "B/token"),
        _row("log: the SQLite file", sizes.log / tokens, "B/token", "Avro as sent", framed),
        _row("hot: a merged day shard", sizes.hot / tokens, "B/token", "Avro as sent", framed),
        _row("cold: segments, everything", sizes.cold / tokens, "B/token", "Avro as sent", framed, f"≤ {REACH:g}"),
        _row("cold: columns of id, logprob and time alone", three, "B/token", "segments", sizes.cold / tokens, f"≤ {REACH:g}"),
        _row("cold: coverage, ledger and checkpoints", sizes.proof / tokens, "B/token", "segments", sizes.cold / tokens),
    ]


def _columns(sizes: Sizes) -> list[dict[str, Any]]:
    """Where the bytes of the cold tier go."""
    largest = sorted(sizes.columns.items(), key=lambda item: -item[1])[:COLUMNS_SHOWN]
    rest = sum(sizes.columns.values()) - sum(size for _, size in largest)
    named = [(f"cold column: {name.replace('.list.element', '[]')}", size) for name, size in largest]
    return [
        _row(name, size / sizes.tokens, "B/token", "segments", sizes.cold / sizes.tokens)
        for name, size in [*named, ("cold: other columns", rest)]
    ]


def _limits(made: Sequence[Stream], sizes: Sizes) -> list[dict[str, Any]]:
    """Entropies of what was recorded, each value taken alone: about what an encoding can reach that knows nothing of the text."""
    ids = np.array([token for stream in made for token in stream.ids])
    logprobs = np.array([value for stream in made for value in stream.logprobs], np.float32)
    gaps = np.concatenate([np.diff(np.array(stream.offsets_us)) for stream in made])
    predicted = -float(logprobs.astype(np.float64).mean()) / math.log(2) / 8
    values, times = _float_entropy(logprobs), _entropy(gaps >> 4) + 0.5
    total = predicted + values + times

    def beside(name: str) -> tuple[str, float]:
        return "column as stored", sizes.columns.get(name, 0) / sizes.tokens

    return [
        _row("entropy of ids", _entropy(ids), "B/token", *beside(THREE[0])),
        _row("entropy of ids under the model that made the logprobs", predicted, "B/token", *beside(THREE[0])),
        _row("entropy of logprobs as 32-bit floats", values, "B/token", *beside(THREE[1])),
        _row("entropy of times: gap to the token before in µs", times, "B/token", *beside(THREE[2])),
        _row("entropy of id (under the model), logprob and time together", total, "B/token", "reach", REACH),
    ]


def _entropy(values: np.ndarray[Any, Any]) -> float:
    """Entropy of values taken one at a time, in bytes."""
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) / 8


def _float_entropy(values: np.ndarray[Any, Any]) -> float:
    """Entropy of 32-bit floats in bytes: of the upper half, then of each lower byte given the byte before it.

    The values themselves are nearly all distinct, so that counting them would only measure how many there are.
    """
    bits = values.view(np.uint32)
    third, last = bits >> 8 & 0xFF, bits & 0xFF
    second = bits >> 16 & 0xFF
    upper = _entropy(bits >> 16)
    return upper + _entropy(second << 8 | third) - _entropy(second) + _entropy(third << 8 | last) - _entropy(third)


def _row(what: str, value: float, unit: str, beside: str = "", beside_value: float | None = None, reach: str = "") -> dict[str, Any]:
    ratio = value / beside_value if beside_value else None
    return {"what": what, "value": value, "unit": unit, "beside": beside, "beside_value": beside_value, "ratio": ratio, "reach": reach}
