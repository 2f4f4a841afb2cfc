"""Tables of the catalog, and shards, segments and ranges as their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from store.shards import Range, Segment, Shard

LAYOUT = "1"
"""Version of these tables; a file of another version is refused."""

TABLES = (
    "CREATE TABLE IF NOT EXISTS fact (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS shard (name TEXT PRIMARY KEY, level TEXT NOT NULL, day TEXT NOT NULL, session_min BLOB NOT NULL,"
    " session_max BLOB NOT NULL, time_min INTEGER NOT NULL, time_max INTEGER NOT NULL, rows INTEGER NOT NULL, bytes INTEGER NOT NULL,"
    " state TEXT NOT NULL, retired_at INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS segment (key TEXT PRIMARY KEY, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, rows INTEGER NOT NULL,"
    " tenant TEXT NOT NULL, day TEXT NOT NULL, retention_class TEXT NOT NULL, session_min BLOB NOT NULL, session_max BLOB NOT NULL,"
    " time_min INTEGER NOT NULL, time_max INTEGER NOT NULL, ledger_entry INTEGER NOT NULL, root BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS range (name TEXT NOT NULL, log_id TEXT NOT NULL, partition INTEGER NOT NULL, offset_first INTEGER NOT NULL,"
    " offset_next INTEGER NOT NULL, digest_first BLOB, digest_next BLOB, PRIMARY KEY (name, log_id, partition, offset_first))",
    "CREATE TABLE IF NOT EXISTS claim (name TEXT PRIMARY KEY, owner TEXT NOT NULL, until INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS position (log_id TEXT NOT NULL, partition INTEGER NOT NULL, offset_next INTEGER NOT NULL,"
    " digest BLOB NOT NULL, day TEXT NOT NULL, appended_at INTEGER NOT NULL, caught_up_at INTEGER NOT NULL,"
    " duplicates INTEGER NOT NULL, quarantined INTEGER NOT NULL, PRIMARY KEY (log_id, partition))",
    "CREATE TABLE IF NOT EXISTS mark (log_id TEXT NOT NULL, partition INTEGER NOT NULL, producer_id BLOB NOT NULL, seq INTEGER NOT NULL,"
    " appended_at INTEGER NOT NULL, PRIMARY KEY (log_id, partition, producer_id)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS claim_seq (log_id TEXT NOT NULL, partition INTEGER NOT NULL, producer_id BLOB NOT NULL,"
    " seq INTEGER NOT NULL, appended_at INTEGER NOT NULL, PRIMARY KEY (log_id, partition, producer_id)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS gap (log_id TEXT NOT NULL, partition INTEGER NOT NULL, producer_id BLOB NOT NULL,"
    " seq_first INTEGER NOT NULL, seq_last INTEGER NOT NULL, kind TEXT NOT NULL, offset INTEGER NOT NULL, appended_at INTEGER NOT NULL,"
    " PRIMARY KEY (log_id, partition, producer_id, seq_first))",
    "CREATE TABLE IF NOT EXISTS duplicate (log_id TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL, sha256 BLOB NOT NULL,"
    " PRIMARY KEY (log_id, partition, offset)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS quarantine (log_id TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,"
    " appended_at INTEGER NOT NULL, error TEXT NOT NULL, size INTEGER NOT NULL, sha256 BLOB NOT NULL, requeued INTEGER NOT NULL,"
    " raw BLOB NOT NULL, PRIMARY KEY (log_id, partition, offset))",
    "CREATE TABLE IF NOT EXISTS seal_request (id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, targets TEXT NOT NULL)",
)


def shard_to_row(shard: Shard) -> tuple[Any, ...]:
    """Columns of `shard` up to `bytes`."""
    spans = (shard.session_min, shard.session_max, shard.time_min, shard.time_max)
    return shard.name, shard.level, shard.day, *spans, shard.rows, shard.bytes


def shard_from_row(row: Sequence[Any], folder: Path, ranges: tuple[Range, ...]) -> Shard:
    """The shard of a row of `shard`; its file stands in `folder`."""
    name, level, day, session_min, session_max, time_min, time_max, rows, size = row[:9]
    return Shard(name, folder / f"{name}.duckdb", level, day, ranges, session_min, session_max, time_min, time_max, rows, size)


def segment_to_row(segment: Segment) -> tuple[Any, ...]:
    """Columns of `segment`."""
    head = (segment.key, segment.sha256, segment.bytes, segment.rows, segment.tenant, segment.day, segment.retention_class)
    spans = (segment.session_min, segment.session_max, segment.time_min, segment.time_max)
    return *head, *spans, segment.ledger_entry, segment.root


def segment_from_row(row: Sequence[Any], ranges: tuple[Range, ...]) -> Segment:
    """The segment of a row of `segment`."""
    return Segment(*(*row[:11], ranges, *row[11:]))


def range_to_row(name: str, span: Range) -> tuple[Any, ...]:
    """Columns of `range`; `name` is the shard's name or the segment's key."""
    return name, span.log_id, span.partition, span.offset_first, span.offset_next, span.digest_first, span.digest_next


def range_from_row(row: Sequence[Any]) -> Range:
    """The range of a row of `range`."""
    return Range(*row[1:])
