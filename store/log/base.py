"""The contract of an event log: durable, ordered, partitioned append of opaque byte strings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.errors import InvalidEvent, LogChanged

# The largest value that each backend takes: below Kafka's largest request (100 MiB by default), above any event
# that the index takes.
ENTRY_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One framed event on its way into the log; `key` is the session id (16 bytes), which decides the partition."""

    partition: int
    key: bytes
    value: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """Contiguous records of one partition: record i stands at offset `offset_first + i`.

    `appended_at` holds the log's own append time of each record in microseconds since the epoch,
    which never decreases along a partition of the embedded log (Kafka: broker time, may step).
    An empty batch has `values == []` and `offset_first` equal to the offset asked for.
    """

    partition: int
    offset_first: int
    appended_at: list[int]
    values: list[bytes]

    @property
    def offset_next(self) -> int:
        """The offset after the last record."""
        return self.offset_first + len(self.values)


@dataclass(frozen=True, slots=True)
class Taken:
    """What a log takes: bytes of all its copies, and the taken share of the fullest disk that holds one (None: nobody knows)."""

    bytes: int
    disk_share: float | None


class Log(Protocol):
    """A log. Every method raises `LogUnavailable` when the log does not answer.

    Instances are used by one thread at a time, except that `append` and `read` may run in two
    different threads at once.
    """

    @property
    def log_id(self) -> str:
        """Identity of this log: the same as long as its offsets mean the same (Kafka: cluster and topic id)."""
        ...

    @property
    def partitions(self) -> int:
        """Number of partitions, fixed for a log id."""
        ...

    @property
    def retention_s(self) -> float | None:
        """After this many seconds the log forgets a record by itself, read or not; None: it waits for `trim`."""
        ...

    def append(self, entries: Sequence[Entry]) -> None:
        """Append in order. MUST NOT return before every entry is durable; order within a partition is kept.

        After an exception any prefix per partition may have been written: the caller sends the same entries
        again, and the indexer drops duplicates by `producer_seq`.

        Raises:
            LogUnavailable: not durable within the time-out, or refused.
            StorageFull: the disk of an embedded log is full.
            InvalidEvent: one entry is larger than the log takes (`ENTRY_BYTES_MAX`); none was written.
        """
        ...

    def read(self, partition: int, offset: int, *, limit: int, wait_s: float = 0.0) -> Batch:
        """At most `limit` contiguous records from `offset` on, waiting up to `wait_s` for the first.

        A caller may read several partitions in turn; a backend MAY prefetch.

        Raises:
            LogChanged: `offset` lies before the first retained record or beyond the end, or the topic was recreated.
        """
        ...

    def wait(self, offsets: dict[int, int], *, wait_s: float) -> set[int]:
        """Partitions that hold a record at or beyond the given offset, waiting up to `wait_s` for one.

        Raises:
            LogChanged: as `read`.
        """
        ...

    def bounds(self, partition: int) -> tuple[int, int]:
        """First retained offset and the offset after the last durable record."""
        ...

    def acknowledge(self, offsets: dict[int, int]) -> None:
        """Tell the log how far an indexer is: telemetry only (Kafka: committed offset), never used to resume."""
        ...

    def trim(self, partition: int, before_offset: int) -> None:
        """Forget the records of a partition below `before_offset`, which lies at or before the end."""
        ...

    def taken(self) -> Taken:
        """What it takes where it is kept."""
        ...

    def close(self) -> None:
        """Release everything; safe to call twice."""
        ...


@functools.lru_cache(maxsize=65_536)
def partition_of(key: bytes, partitions: int) -> int:
    """The partition of a session: Kafka's murmur2 of the 16 key bytes, as its Java client computes it."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def murmur2(data: bytes) -> int:
    """32-bit murmur2 with Kafka's seed (source: `org.apache.kafka.common.utils.Utils.murmur2`)."""
    m, r, mask = 0x5BD1E995, 24, 0xFFFFFFFF
    h = (0x9747B28C ^ len(data)) & mask
    whole = len(data) & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & mask
        k = (k ^ (k >> r)) * m & mask
        h = (h * m & mask) ^ k
    if len(data) > whole:
        h = (h ^ int.from_bytes(data[whole:], "little")) * m & mask
    h = (h ^ (h >> 13)) * m & mask
    return h ^ (h >> 15)


def check_entries(entries: Sequence[Entry], partitions: int, bytes_max: int = ENTRY_BYTES_MAX, *, place: str) -> None:
    """Refuse entries that no log takes, before any of them is written.

    Raises:
        InvalidEvent: a value of more than `bytes_max` bytes.
        LogChanged: a partition that the log does not have.
    """
    largest = max(len(entry.value) for entry in entries)
    if largest > bytes_max:
        hint = "put large bodies into the blob store"
        raise InvalidEvent(f"an event of {largest} bytes; the log takes {bytes_max}", operation="append", place=place, hint=hint)
    strangers = {entry.partition for entry in entries} - set(range(partitions))
    if strangers:
        hint = "partitions are counted from 0; compute them with partition_of"
        raise LogChanged(f"no partition {min(strangers)}: the log has {partitions}", operation="append", place=place, hint=hint)
