"""Tables of the catalog, and shards, segments and ranges as their rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from schemas.events import SAMPLED_OUT
from store.shards import Mark, Position, Range, Sealed, Segment, Shard

LAYOUT = "1"
"""Version of these tables; a file of another version is refused."""

SHOWN, REWRITTEN = "visibility", "rewritten"
"""Facts that are the counters of `store.shards.Changes`."""

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


# A tail is missing once its partition was read to a moment after the heartbeat that claims it.
TAILS = """
    SELECT claim_seq.log_id, claim_seq.partition, claim_seq.producer_id, coalesce(mark.seq + 1, 0), claim_seq.seq,
           'tail', position.offset_next, claim_seq.appended_at
    FROM claim_seq JOIN position USING (log_id, partition) LEFT JOIN mark USING (log_id, partition, producer_id)
    WHERE claim_seq.seq > coalesce(mark.seq, -1) AND position.caught_up_at > claim_seq.appended_at
"""


def prune(session: bytes | None, span: tuple[int, int] | None) -> tuple[str, tuple[Any, ...]]:
    """Further conditions of a WHERE clause, and their values."""
    where = ""
    values: list[Any] = []
    if session is not None:
        where += " AND session_min <= ? AND session_max >= ?"
        values += [session, session]
    if span is not None:
        where += " AND time_min <= ? AND time_max >= ?"
        values += [span[1], span[0]]
    return where, tuple(values)


def insert(connection: sqlite3.Connection, table: str, row: Sequence[Any], verb: str = "INSERT OR REPLACE") -> None:
    """Put one row into a table, all its columns given."""
    connection.execute(f"{verb} INTO {table} VALUES ({', '.join('?' * len(row))})", row)


def insert_shard(connection: sqlite3.Connection, shard: Shard) -> None:
    """List a live shard and its ranges; a name that is listed already is an error."""
    insert(connection, "shard", (*shard_to_row(shard), "live", 0), "INSERT")
    insert_ranges(connection, shard.name, shard.ranges)


def insert_ranges(connection: sqlite3.Connection, name: str, ranges: Sequence[Range]) -> None:
    """List what a shard or segment covers."""
    for span in ranges:
        insert(connection, "range", range_to_row(name, span))


def insert_sealed(connection: sqlite3.Connection, sealed: Sealed) -> None:
    """Bring positions and marks forward and add what a sealed tail found missing."""
    for position in sealed.positions:
        caught_up = "SELECT caught_up_at FROM position WHERE log_id = ? AND partition = ?"
        row = connection.execute(caught_up, (position.log_id, position.partition)).fetchone()
        insert(connection, "position", position_to_row(replace(position, caught_up_at=row[0] if row else 0)))
    for table, marks in (("mark", sealed.marks), ("claim_seq", sealed.claims)):
        for mark in marks:
            row = (mark.log_id, mark.partition, mark.producer_id, mark.seq, mark.appended_at)
            newer = "ON CONFLICT DO UPDATE SET seq = excluded.seq, appended_at = excluded.appended_at WHERE excluded.seq > seq"
            connection.execute(f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?) {newer}", row)
    for gap in sealed.gaps:
        row_gap = (gap.log_id, gap.partition, gap.producer_id, gap.seq_first, gap.seq_last, gap.kind, gap.offset, gap.appended_at)
        insert(connection, "gap", row_gap)
    for item in sealed.duplicates:
        insert(connection, "duplicate", (item.log_id, item.partition, item.offset, item.sha256))
    for counter, more in ((SAMPLED_OUT, sealed.sampled_out), (SHOWN, sealed.shown)):
        if more:
            count(connection, counter, more)
    for record, raw in zip(sealed.quarantined, sealed.raw, strict=True):
        head = (record.log_id, record.partition, record.offset, record.appended_at, record.error, record.size, record.sha256)
        insert(connection, "quarantine", (*head, 0, raw))


def count(connection: sqlite3.Connection, counter: str, more: int = 1) -> None:
    """Add to a counter among the facts."""
    added = "ON CONFLICT DO UPDATE SET value = CAST(CAST(value AS INTEGER) + excluded.value AS TEXT)"
    connection.execute(f"INSERT INTO fact VALUES (?, ?) {added}", (counter, str(more)))


def counted(connection: sqlite3.Connection, counter: str) -> int:
    """Where a counter stands."""
    row = connection.execute("SELECT value FROM fact WHERE key = ?", (counter,)).fetchone()
    return int(row[0]) if row else 0


def fill_gap(connection: sqlite3.Connection, number: Mark) -> None:
    """Take one number out of the gap that holds it."""
    place = (number.log_id, number.partition, number.producer_id)
    row = connection.execute(
        "SELECT * FROM gap WHERE log_id = ? AND partition = ? AND producer_id = ? AND seq_first <= ? AND seq_last >= ?",
        (*place, number.seq, number.seq),
    ).fetchone()
    if row is None:
        return
    connection.execute("DELETE FROM gap WHERE log_id = ? AND partition = ? AND producer_id = ? AND seq_first = ?", (*place, row[3]))
    for first, last in ((row[3], number.seq - 1), (number.seq + 1, row[4])):
        if first <= last:
            insert(connection, "gap", (*place, first, last, *row[5:]))


def position_to_row(position: Position) -> tuple[Any, ...]:
    """Columns of `position`."""
    head = (position.log_id, position.partition, position.offset_next, position.digest, position.day)
    return (*head, position.appended_at, position.caught_up_at, position.duplicates, position.quarantined)


def replace_log(connection: sqlite3.Connection, log_id: str, now: int) -> None:
    """Put the tables of the attached catalog `anew` in the place of what stands here for one log."""
    rewritten = counted(connection, REWRITTEN)
    own = "(SELECT name FROM main.range WHERE log_id = ?)"
    connection.execute(f"UPDATE main.shard SET state = 'retired', retired_at = ? WHERE state = 'live' AND name IN {own}", (now, log_id))
    for table in ("shard", "range"):
        connection.execute(f"INSERT INTO main.{table} SELECT * FROM anew.{table}")
    for table in ("mark", "claim_seq", "gap", "duplicate", "quarantine"):
        connection.execute(f"DELETE FROM main.{table} WHERE log_id = ?", (log_id,))
        connection.execute(f"INSERT INTO main.{table} SELECT * FROM anew.{table}")
    for table in ("fact", "position"):
        connection.execute(f"DELETE FROM main.{table}")
        connection.execute(f"INSERT INTO main.{table} SELECT * FROM anew.{table}")
    count(connection, REWRITTEN, rewritten + 1)
