"""Seeded, realistic events in bulk: sessions with requests, streamed chunks and ends, numbered like a recorder's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from schemas import events
from schemas.codec import encode_payload, join, uuid7
from schemas.events import Payload
from schemas.sink import SessionContext
from store.log.base import Entry, partition_of

START_US = 1_770_000_000_000_000
"""`recorded_at` of the first event: 2 February 2026."""

_SENTENCE = "the model answers slowly when a cache misses and every token waits for its turn in one long queue of work"
_WORDS = _SENTENCE.split(" ")


@dataclass
class Producer:
    """One recorder instance as the log sees it: numbers events per partition, ids and times grow."""

    seed: int = 0
    partitions: int = 4
    clock_us: int = START_US
    rng: random.Random = field(init=False)
    producer_id: bytes = field(init=False)
    seqs: dict[int, int] = field(default_factory=dict)
    made: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.producer_id = self.rng.randbytes(8)
        self._tail = self.rng.getrandbits(62)

    def session(self, tenant: str = "acme", source: str = "gateway") -> SessionContext:
        """A new session; its id sorts by time."""
        self.made += 1
        session_id = uuid7(self.clock_us // 1000, self.made, self.rng.getrandbits(62))
        return SessionContext(session_id, tenant, source, actor="key-7", salt=self.rng.randbytes(16))

    def entry(self, session: SessionContext, payload: Payload) -> Entry:
        """The next event of a session."""
        return self.encoded(session, encode_payload(payload.KIND, payload.model_dump()))

    def encoded(self, session: SessionContext, payload: bytes) -> Entry:
        """The next event of a session, its payload encoded already."""
        partition = partition_of(session.session_id, self.partitions)
        seq = self.seqs[partition] = self.seqs.get(partition, -1) + 1
        self.clock_us += 137
        self.made += 1
        event_id = uuid7(self.clock_us // 1000, self.made, self._tail)
        value = join(event_id, session.encoded, self.producer_id, seq, self.clock_us, payload)
        return Entry(partition, session.session_id, value)

    def heartbeat(self, session: SessionContext, *, closed: bool = False, ahead: int = 0) -> Entry:
        """What the producer gave out so far by partition, `ahead` more than it really sent."""
        positions = [events.SequencePosition(partition=p, seq=seq + ahead) for p, seq in sorted(self.seqs.items())]
        return self.entry(session, events.ProducerHeartbeat(positions=positions, closed=closed, host="test", pid=1))


def conversation(producer: Producer, *, chunks: int = 20, session: SessionContext | None = None) -> Iterator[Entry]:
    """One session with one generation of `chunks` token chunks: `chunks + 7` events."""
    context = session or producer.session()
    rng, generation = producer.rng, producer.rng.randbytes(16)
    yield producer.entry(context, events.SessionOpened(client="test", tags=["a", "b"]))
    content = events.RequestContent(
        messages=[events.Message(message_id=rng.randbytes(16), role="user", body=_text(rng, 30))], parameters='{"temperature":0.7}'
    )
    yield producer.entry(
        context,
        events.RequestSubmitted(generation_id=generation, endpoint="/v1/chat/completions", model="tiny", stream=True, content=content),
    )
    prompt = events.GenerationContent(prompt_token_ids=[rng.randrange(32_000) for _ in range(40)])
    yield producer.entry(context, events.GenerationStarted(generation_id=generation, authoritative="gateway", status=200, content=prompt))
    yield producer.entry(context, events.SequenceStarted(generation_id=generation, index=0, role="assistant", offset_us=5_000))
    for number in range(chunks):
        yield producer.entry(context, chunk(rng, generation, number))
    end: dict[str, Any] = {"generation_id": generation, "offset_us": 5_000 + chunks * 50_000}
    yield producer.entry(context, events.SequenceFinished(index=0, tokens=chunks * 8, finish_reason="stop", **end))
    yield producer.entry(context, events.GenerationFinished(sequences=1, tokens_recorded=chunks * 8, **end))
    yield producer.entry(context, events.SessionClosed(reason="done"))


def chunk(rng: random.Random, generation: bytes, number: int, tokens: int = 8) -> events.TokenChunk:
    """One chunk of `tokens` tokens with ids, text, logprobs and times."""
    words = [rng.choice(_WORDS) + " " for _ in range(tokens)]
    content = events.ChunkContent(
        token_ids=[rng.randrange(32_000) for _ in range(tokens)],
        text="".join(words),
        lengths=[len(word) for word in words],
        logprobs=[-rng.expovariate(1.5) for _ in range(tokens)],
    )
    offsets = [5_000 + number * 50_000 + 6_000 * i + rng.randrange(900) for i in range(tokens)]
    return events.TokenChunk(generation_id=generation, index=0, position=number * tokens, offsets_us=offsets, content=content)


def many(producer: Producer, count: int, *, chunks: int = 40) -> Iterator[Entry]:
    """`count` events fast: conversations whose payloads are drawn from a pool that is encoded once."""
    pool = _pool(chunks)
    left = count
    while left > 0:
        context = producer.session()
        for payload in producer.rng.choice(pool)[:left]:
            yield producer.encoded(context, payload)
            left -= 1


def _pool(chunks: int, size: int = 25) -> list[list[bytes]]:
    """Encoded payloads of `size` whole conversations."""
    scratch = Producer(seed=99)
    found: list[list[bytes]] = []
    for _ in range(size):
        context = scratch.session()
        head = len(join(bytes(16), context.encoded, bytes(8), 0, START_US, b""))
        entries = list(conversation(scratch, chunks=chunks, session=context))
        found.append([_payload(entry.value, head) for entry in entries])
    return found


def _payload(value: bytes, head: int) -> bytes:
    """The payload of an event whose header is `head` bytes long if its number takes one byte; numbers here take one or two."""
    first = head - 9
    return value[head + (value[first] >> 7) :]


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def datum(entry: Entry) -> dict[str, Any]:
    """An entry decoded, for comparisons."""
    from schemas.codec import decode_datum
    from schemas.registry import SchemaRegistry

    return decode_datum(entry.value, SchemaRegistry())[0]
