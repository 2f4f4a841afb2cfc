"""Events to log entries at the speed of the token stream: a hand-written encoder for the hot kind, ids and sequence numbers."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from schemas.codec import uuid7, zigzag, zigzags
from schemas.encoder import encode_model
from schemas.errors import InvalidEvent
from schemas.events import Payload, TokenChunk, floats32
from schemas.registry import CURRENT
from schemas.sink import SessionContext
from store.log.base import ENTRY_BYTES_MAX, Entry, partition_of

_BEFORE, _, _AFTER = CURRENT.writers[TokenChunk.KIND]
# Both nullable parts of an event that a writer cannot do without are one byte: branch 0 is null, branch 1 is the value.
_NULL, _THERE = b"\x00", b"\x02"
# A float of four zero bytes but for the sign; canonical bytes have only the positive zero.
_MINUS_ZERO = struct.pack("<f", -0.0)
# The counter of an id has 12 bits; after that the next millisecond is borrowed.
_COUNTER_MAX = (1 << 12) - 1

Alternatives = tuple[Sequence[int], Sequence[int], Sequence[str], Sequence[float]]
"""The columns of `schemas.events.ChunkAlternatives`."""


class Stamp:
    """One producer: its id, the ids of its events, and how far it is in each partition.

    Event ids of one stamp rise strictly, also when the clock steps back or stands still, so they never collide.
    `seqs[p]` is the last `producer_seq` given out for partition p.
    """

    def __init__(self, partitions: int) -> None:
        self.producer_id = os.urandom(8)
        self.partitions = partitions
        self.seqs: dict[int, int] = {}
        self._tail = int.from_bytes(os.urandom(8), "big")
        self._milliseconds = 0
        self._counter = 0

    def entry(self, session: SessionContext, payload: bytes, recorded_at: int) -> Entry:
        """The log entry of an encoded payload; `recorded_at` in µs since the epoch.

        Raises:
            InvalidEvent: the session id or salt has the wrong length, or the event is larger than the log takes;
                no sequence number is spent then.
        """
        key = session.session_id
        if len(key) != 16 or len(session.salt or key) != 16:
            raise InvalidEvent("a session id and a salt have 16 bytes", operation="encode")
        envelope = session.encoded
        if len(payload) + len(envelope) + 64 > ENTRY_BYTES_MAX:
            hint = "put large bodies into the blob store"
            raise InvalidEvent(f"an event of {len(payload)} bytes; the log takes {ENTRY_BYTES_MAX}", operation="encode", hint=hint)
        partition = partition_of(key, self.partitions)
        seq = self.seqs.get(partition, -1) + 1
        parts = (CURRENT.header, self._event_id(recorded_at // 1000), envelope, self.producer_id, zigzag(seq), zigzag(recorded_at), payload)
        entry = Entry(partition, key, b"".join(parts))
        self.seqs[partition] = seq
        return entry

    def _event_id(self, milliseconds: int) -> bytes:
        if milliseconds > self._milliseconds:
            self._milliseconds, self._counter = milliseconds, 0
        elif self._counter < _COUNTER_MAX:
            self._counter += 1
        else:
            self._milliseconds, self._counter = self._milliseconds + 1, 0
        return uuid7(self._milliseconds, self._counter, self._tail)


def encode(payload: Payload) -> bytes:
    """All payload fields of an event, the same bytes that `schemas.codec.encode_payload` gives.

    Raises:
        InvalidEvent: a value that the schema does not take.
    """
    if payload.__class__ is not TokenChunk:
        return encode_model(payload)
    assert isinstance(payload, TokenChunk)
    content = payload.content
    head = _chunk_head(payload.generation_id, payload.index, payload.position, payload.channel, payload.offsets_us)
    if content is None:
        return b"".join((*head, _NULL, _AFTER))
    told = content.alternatives
    alternatives = (told.counts, told.token_ids, told.texts, told.logprobs) if told is not None else None
    return b"".join((*head, *_chunk_content(content.token_ids, content.text, content.lengths, content.logprobs, alternatives), _AFTER))


def encode_chunk(
    generation_id: bytes,
    index: int,
    position: int,
    channel: str,
    offsets_us: Sequence[int],
    token_ids: Sequence[int],
    text: str,
    lengths: Sequence[int],
    logprobs: Sequence[float],
    alternatives: Alternatives | None = None,
) -> bytes:
    """The payload bytes of a `token_chunk` with content, without a model in between: six times as fast as one.

    Texts and channel MUST be without lone surrogates and logprobs without NaN.

    Raises:
        InvalidEvent: the generation id has not 16 bytes, or a number does not fit.
    """
    head = _chunk_head(generation_id, index, position, channel, offsets_us)
    return b"".join((*head, *_chunk_content(token_ids, text, lengths, logprobs, alternatives), _AFTER))


def encode_bare_chunk(generation_id: bytes, index: int, position: int, channel: str, offsets_us: Sequence[int]) -> bytes:
    """The payload bytes of a `token_chunk` without content. Raises `InvalidEvent` as `encode_chunk` does."""
    return b"".join((*_chunk_head(generation_id, index, position, channel, offsets_us), _NULL, _AFTER))


def _chunk_head(generation_id: bytes, index: int, position: int, channel: str, offsets_us: Sequence[int]) -> tuple[bytes, ...]:
    if len(generation_id) != 16:
        raise InvalidEvent(f"a generation id of {len(generation_id)} bytes, valid is 16", operation="encode")
    return _BEFORE, generation_id, zigzag(index), zigzag(position), *_string(channel), _longs(offsets_us)


def _chunk_content(
    token_ids: Sequence[int], text: str, lengths: Sequence[int], logprobs: Sequence[float], alternatives: Alternatives | None
) -> tuple[bytes, ...]:
    told = _NULL if alternatives is None else _alternatives(*alternatives)
    return _THERE, _longs(token_ids), *_string(text), _longs(lengths), _floats(logprobs), told


def _alternatives(counts: Sequence[int], token_ids: Sequence[int], texts: Sequence[str], logprobs: Sequence[float]) -> bytes:
    spelled = b"".join([part for text in texts for part in _string(text)])
    head = zigzag(len(texts)) if texts else b""
    return b"".join((_THERE, _longs(counts), _longs(token_ids), head, spelled, _NULL, _floats(logprobs)))


def _string(value: str) -> tuple[bytes, bytes]:
    data = value.encode()
    return zigzag(len(data)), data


def _longs(values: Sequence[int]) -> bytes:
    """An array of longs in one block."""
    if not values:
        return b"\x00"
    if len(values) == 1:
        return b"\x02" + zigzag(values[0]) + b"\x00"
    return zigzag(len(values)) + zigzags(values) + b"\x00"


def _floats(values: Sequence[float]) -> bytes:
    """An array of 32-bit floats in one block; -0.0, also from rounding, becomes 0.0."""
    if not values:
        return b"\x00"
    packed = _pack(values)
    if _MINUS_ZERO in packed:
        packed = _pack(floats32(values))
    return zigzag(len(values)) + packed + b"\x00"


def _pack(values: Sequence[float]) -> bytes:
    try:
        return struct.pack(f"<{len(values)}f", *values)
    except OverflowError:
        return struct.pack(f"<{len(values)}f", *floats32(values))
