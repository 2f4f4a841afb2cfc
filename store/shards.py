"""What the catalog tells about: shards, segments, positions, gaps and quarantine, as plain values."""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Level = Literal["sealed", "hour", "day"]

DIGEST_START = bytes(32)
"""Running digest of a partition before its first record."""


@dataclass(frozen=True, slots=True)
class Range:
    """Offsets [offset_first, offset_next) of one partition, with the partition's running digest before and after them.

    The digests are None where they are not known (a requeued event stands alone). Not every offset has a row: the
    range also covers what was dropped as a duplicate or went to quarantine.
    """

    log_id: str
    partition: int
    offset_first: int
    offset_next: int
    digest_first: bytes | None = None
    digest_next: bytes | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """One immutable DuckDB file with a table `events`. Times are `recorded_at` in µs since the epoch, both inclusive.

    An empty shard (every record of its ranges was dropped) has `rows == 0` and `session_min > session_max`.
    """

    name: str
    path: Path
    level: Level
    day: str
    ranges: tuple[Range, ...]
    session_min: builtins.bytes
    session_max: builtins.bytes
    time_min: int
    time_max: int
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """One Parquet object of the cold tier: key, SHA-256 (hex) and size of the object, what it covers, where it is entered.

    `root` is the Merkle root over its leaves, `ledger_entry` the number of the entry that committed it.
    """

    key: str
    sha256: str
    bytes: int
    rows: int
    tenant: str
    day: str
    retention_class: str
    session_min: builtins.bytes
    session_max: builtins.bytes
    time_min: int
    time_max: int
    ranges: tuple[Range, ...]
    ledger_entry: int
    root: builtins.bytes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What held every catalogued event at one moment: each row stands in exactly one shard or segment."""

    shards: tuple[Shard, ...] = ()
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """Two counters: events that say who may see a session, and changes to what was catalogued before (erased, deleted, made anew).

    As long as both stand, whatever else was catalogued takes nothing from an older answer that it was allowed to hold.
    """

    shown: int = 0
    rewritten: int = 0


@dataclass(frozen=True, slots=True)
class Position:
    """How far a partition is in catalogued shards: everything below `offset_next` is there, dropped or quarantined.

    `digest` is the running digest of all records below `offset_next` (`store.digest`). `appended_at` is the log's time
    of the last one, `day` the day it was filed under. Everything appended before `caught_up_at` (wall clock, µs) is
    below `offset_next`. `duplicates` and `quarantined` count records without a row since the partition began.
    """

    log_id: str
    partition: int
    offset_next: int
    digest: bytes = DIGEST_START
    day: str = ""
    appended_at: int = 0
    caught_up_at: int = 0
    duplicates: int = 0
    quarantined: int = 0

    @property
    def fresh_to(self) -> int:
        """Every event that the log acknowledged before this moment (µs since the epoch) is in a query's answer."""
        return max(self.caught_up_at, self.appended_at)


@dataclass(frozen=True, slots=True)
class Gap:
    """Records that a producer numbered and the log never showed: `seq_first` to `seq_last`, both inclusive.

    `kind` is jump (a later number came, at `offset`) or tail (a heartbeat claims more than came; it goes away if they
    still come). `appended_at` is when the log showed what revealed the gap.
    """

    log_id: str
    partition: int
    producer_id: bytes
    seq_first: int
    seq_last: int
    kind: Literal["jump", "tail"]
    offset: int
    appended_at: int

    @property
    def count(self) -> int:
        """How many events are missing."""
        return self.seq_last - self.seq_first + 1


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One record that could not be read; its bytes are `Catalog.quarantined_bytes`."""

    log_id: str
    partition: int
    offset: int
    appended_at: int
    error: str
    size: int
    sha256: bytes
    requeued: bool = False


@dataclass(frozen=True, slots=True)
class Duplicate:
    """One record that was dropped as sent twice: its bytes' SHA-256 keeps the running digest reproducible."""

    log_id: str
    partition: int
    offset: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """The highest `producer_seq` of a producer in a partition: seen in the log, or claimed by a heartbeat."""

    log_id: str
    partition: int
    producer_id: bytes
    seq: int
    appended_at: int = 0


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed tail on its way into the catalog: the shard and everything that its transactions decided.

    `raw` holds the bytes of the quarantined records in the same order; `sampled_out` sums what its producers told to have
    left out by sampling; `shown` counts events that say who may see a session.
    """

    shard: Shard
    positions: tuple[Position, ...]
    marks: tuple[Mark, ...] = ()
    claims: tuple[Mark, ...] = ()
    gaps: tuple[Gap, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    quarantined: tuple[Quarantined, ...] = ()
    raw: tuple[bytes, ...] = field(default=(), repr=False)
    sampled_out: int = 0
    shown: int = 0
