"""From tokens to bytes: the fast encoder, event ids, and the state machine that joins tokens."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.coalesce import Chunk, Coalescer, delta_of
from ingest.encoding import Stamp, encode, encode_chunk
from schemas.codec import ID_SLICE, decode_datum, encode_payload
from schemas.events import (
    Alternative,
    ChunkAlternatives,
    ChunkContent,
    TokenChunk,
)
from schemas.registry import SchemaRegistry
from schemas.sink import new_id
from tests.recording import (
    context,
)

# Encoding

LONG = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
FLOAT = st.floats(allow_nan=False, width=64) | st.sampled_from([-0.0, -1e-60, 1e300, -1e300, float("-inf")])


@st.composite
def chunks(draw: st.DrawFn) -> TokenChunk:
    """Any token chunk that the model takes."""
    told = st.builds(ChunkAlternatives, counts=st.lists(LONG), token_ids=st.lists(LONG), texts=st.lists(TEXT), logprobs=st.lists(FLOAT))
    content = st.builds(
        ChunkContent,
        token_ids=st.lists(LONG),
        text=TEXT,
        lengths=st.lists(LONG),
        logprobs=st.lists(FLOAT),
        alternatives=st.none() | told,
    )
    return TokenChunk(
        generation_id=draw(st.binary(min_size=16, max_size=16)),
        index=draw(LONG),
        position=draw(LONG),
        channel=draw(TEXT),
        offsets_us=draw(st.lists(LONG)),
        content=draw(st.none() | content),
    )


@given(chunks())
def test_the_fast_encoder_gives_the_bytes_of_the_generic_one(chunk: TokenChunk) -> None:
    """Whatever the values, a token chunk has one encoding."""
    expected = encode_payload(chunk.KIND, chunk.model_dump())

    assert encode(chunk) == expected


@given(chunks(), st.lists(FLOAT))
def test_encoding_without_a_model_gives_the_same_bytes(chunk: TokenChunk, logprobs: list[float]) -> None:
    """Raw logprobs become the 32-bit floats that the model would hold."""
    others = ChunkAlternatives(counts=[1], token_ids=chunk.offsets_us, texts=[chunk.channel], logprobs=logprobs)
    content = ChunkContent(token_ids=chunk.offsets_us, text=chunk.channel, lengths=[1], logprobs=logprobs, alternatives=others)
    expected = encode(chunk.model_copy(update={"content": content}))
    head = (chunk.generation_id, chunk.index, chunk.position, chunk.channel, chunk.offsets_us)

    told = ([1], chunk.offsets_us, [chunk.channel], logprobs)

    assert encode_chunk(*head, chunk.offsets_us, chunk.channel, [1], logprobs, told) == expected


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 10_000))
def test_event_ids_of_a_producer_rise_also_when_the_clock_does_not(steps: list[int], burst: int) -> None:
    """A clock that stands, jumps back, or is outrun by more events than a millisecond has ids."""
    stamp, session = Stamp(4), context()
    times = [10_000_000 - step * 1000 for step in steps] + [10_000_000] * burst
    ids = [stamp.entry(session, b"", at).value[ID_SLICE] for at in times]

    assert all(a < b for a, b in itertools.pairwise(ids))


def test_producers_differ() -> None:
    """Neither ids nor event ids of two recorders meet."""
    session = context()
    first, second = Stamp(4), Stamp(4)
    same = first.entry(session, b"", 1).value[ID_SLICE] == second.entry(session, b"", 1).value[ID_SLICE]

    assert (first.producer_id == second.producer_id, same) == (False, False)


# Coalescing

GENERATIONS = [new_id(), new_id()]
SESSIONS = [context(), context()]
REGISTRY = SchemaRegistry()
DELTAS = st.tuples(
    st.integers(0, 1),  # session
    st.integers(0, 1),  # generation
    st.integers(0, 2),  # sequence
    st.integers(0, 40_000),  # µs since the delta before
    st.sampled_from(["content", "content", "content", "reasoning"]),
    st.lists(st.integers(0, 200_000), max_size=5),
    st.sampled_from(["", "a", "héllo", "\ud83d", "x\ud83d\ude00y"]),
    st.booleans(),  # logprobs
    st.lists(st.lists(st.tuples(st.sampled_from(["b", "\ud83d", ""]), st.sampled_from([None, 7]), st.just(-2.5)), max_size=3), max_size=5),
)
EVENT = st.tuples(st.integers(0, 1), st.none())

Told = tuple[int, str, int | None, int, str, float | None, list[tuple[str, float]]]
"""What must come out for one entry: position, channel, id, offset, text, logprob, texts and logprobs of its alternatives."""


def told(chunk: Chunk) -> list[Told]:
    """Entries of a chunk."""
    found, at = [], 0
    content = decode_datum(Stamp(1).entry(chunk.session, chunk.encode(), 0).value, REGISTRY)[0]["token_chunk"]["content"]
    others = ChunkAlternatives(**(content["alternatives"] or {})).by_entry(len(chunk.offsets_us)) or [()] * len(chunk.offsets_us)
    assert (content["alternatives"] is None) == (not any(others))
    for i, (offset, length) in enumerate(zip(chunk.offsets_us, chunk.lengths, strict=True)):
        token = chunk.token_ids[i] if chunk.token_ids else None
        logprob = chunk.logprobs[i] if chunk.logprobs else None
        found.append(
            (chunk.position + i, chunk.channel, token, offset, chunk.text[at : at + length], logprob, [one[::2] for one in others[i]])
        )
        at += length
    assert at == len(chunk.text)
    return found


@settings(deadline=None)
@given(st.lists(st.one_of(DELTAS, DELTAS, EVENT), max_size=80), st.sampled_from([0.0, 0.01, 0.05]), st.sampled_from([1, 4, 64]))
def test_coalescing_loses_nothing_and_keeps_the_order(steps: list[Any], span_s: float, tokens_max: int) -> None:
    """Any interleaving gives each sequence its tokens with all that is known of them, and each session its order around other events."""
    coalescer = Coalescer(span_s=span_s, tokens_max=tokens_max)
    expected: dict[Any, list[Told | str]] = defaultdict(list)
    found: dict[Any, list[Told | str]] = defaultdict(list)
    positions: Counter[Any] = Counter()
    now_us = 0

    def emit(done: list[Chunk]) -> None:
        for chunk in done:
            found[chunk.session.session_id, chunk.generation_id, chunk.index] += told(chunk)

    for step in steps:
        session = SESSIONS[step[0]]
        if step[1] is None:
            emit(coalescer.end(session.session_id))
            for kept in (expected, found):
                for key in [key for key in kept if key[0] == session.session_id]:
                    kept[key].append("event")
            continue
        _, generation, index, later, channel, ids, text, scored, others = step
        now_us += later
        key = (session.session_id, GENERATIONS[generation], index)
        logprobs = tuple(-float(i) for i in range(len(ids) or 1)) if scored else ()
        others = [[Alternative(*one) for one in each] for each in others]
        delta = delta_of(key[1], index, positions[key], now_us, channel, tuple(ids), text, logprobs, others)
        clean = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        for i in range(len(ids) or 1):
            last = i == (len(ids) or 1) - 1
            told_of = others[i] if len(others) == (len(ids) or 1) else []
            entry = (positions[key], channel, ids[i] if ids else None, now_us, clean if last else "", logprobs[i] if scored else None)
            expected[key].append((*entry, [(one.text.replace("\ud83d", "\ufffd"), one.logprob) for one in told_of]))
            positions[key] += 1
        emit(coalescer.due(now_us / 1e6))
        emit(coalescer.add(session, delta, 0, now_us / 1e6))
    emit(coalescer.end_all())

    assert found == expected
