"""The catalog: which immutable shards and segments hold the events, how far each partition is, and what is missing.

One SQLite file that many processes share. Each change is one transaction, so a reader's snapshot has every row in
exactly one shard or segment. A sealed tail is only taken when it continues its partitions where the catalog stands,
so two indexers that both believe to own a partition can never both be right.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from schemas import clock
from schemas.errors import ConflictError, Fenced, UsageError
from store.catalog_file import CatalogFile
from store.catalog_tables import (
    REWRITTEN,
    SHOWN,
    TAILS,
    count,
    counted,
    fill_gap,
    insert,
    insert_ranges,
    insert_sealed,
    insert_shard,
    position_to_row,
    prune,
    range_from_row,
    replace_log,
    segment_from_row,
    segment_to_row,
    shard_from_row,
)
from store.log.base import partition_of
from store.shards import Changes, Duplicate, Gap, Level, Mark, Position, Quarantined, Range, Sealed, Segment, Shard, Snapshot

__all__ = [
    "Catalog",
    "Changes",
    "Duplicate",
    "Gap",
    "Level",
    "Mark",
    "Position",
    "Quarantined",
    "Range",
    "Sealed",
    "Segment",
    "Shard",
    "Snapshot",
    "open_catalog",
]

# Seal requests older than this are forgotten: whoever asked has given up.
_REQUEST_S = 600
# Facts whose key begins so are alarms.
_ALARM = "alarm."


def open_catalog(data: Path) -> Catalog:
    """The catalog of a data directory."""
    return Catalog(data / "hot" / "catalog.sqlite")


class Catalog(CatalogFile):
    """The catalog in `path` (`hot/catalog.sqlite`); the shards stand beside it in `shards/`.

    Safe for many processes and threads; after a fork the child opens a connection of its own.
    """

    # What holds the events

    def snapshot(self, *, session: bytes | None = None, time: tuple[int, int] | None = None) -> Snapshot:
        """Shards and segments that may hold rows of a session and of a span of `recorded_at` (µs, both inclusive)."""
        with self._reading("snapshot") as connection:
            where, values = prune(session, time)
            shards = connection.execute(f"SELECT * FROM shard WHERE state = 'live'{where} ORDER BY day, name", values).fetchall()
            segments = connection.execute(f"SELECT * FROM segment WHERE 1{where} ORDER BY day, key", values).fetchall()
            ranges = self._ranges(connection)
        snapshot = Snapshot(
            tuple(shard_from_row(row, self.shards_folder, ranges.get(row[0], ())) for row in shards),
            tuple(segment_from_row(row, ranges.get(row[0], ())) for row in segments),
        )
        return self._prune_partition(snapshot, session)

    def shards(self, *, retired: bool = False) -> list[tuple[Shard, int]]:
        """Every shard with the time (µs) at which it was retired, 0 for live ones; retired ones only when asked for."""
        with self._reading("list shards") as connection:
            rows = connection.execute("SELECT *, retired_at FROM shard WHERE state = 'live' OR ? ORDER BY day, name", (retired,)).fetchall()
            ranges = self._ranges(connection)
        return [(shard_from_row(row, self.shards_folder, ranges.get(row[0], ())), row[-1]) for row in rows]

    def swap(
        self,
        *,
        retire: Sequence[str] = (),
        shards: Sequence[Shard] = (),
        segments: Sequence[Segment] = (),
        retire_segments: Sequence[str] = (),
        owner: str = "",
    ) -> None:
        """Put shards and segments in the place of others, at one moment for every reader.

        Retired shards stay on disk for a grace period, for those who took a snapshot before. Where segments are retired, or nothing
        comes in the place of shards, other rows are there than before, which `changes` counts.

        Raises:
            ConflictError: a name to retire is not there (any more), or somebody else than `owner` has claimed it.
        """
        now = clock.now_us()
        with self._writing("swap") as connection:
            self._check_live(connection, retire, owner)
            for name in retire:
                connection.execute("UPDATE shard SET state = 'retired', retired_at = ? WHERE name = ?", (now, name))
                connection.execute("DELETE FROM claim WHERE name = ?", (name,))
            for key in retire_segments:
                if not connection.execute("DELETE FROM segment WHERE key = ?", (key,)).rowcount:
                    raise ConflictError(f"segment {key} is not in the catalog", operation="swap", place=str(self._path))
                connection.execute("DELETE FROM range WHERE name = ?", (key,))
            if retire_segments or not (shards or segments):
                count(connection, REWRITTEN)
            for shard in shards:
                insert_shard(connection, shard)
            for segment in segments:
                insert(connection, "segment", segment_to_row(segment))
                insert_ranges(connection, segment.key, segment.ranges)

    def forget(self, names: Sequence[str]) -> None:
        """Drop retired shards from the list, after their files are gone."""
        with self._writing("forget") as connection:
            for name in names:
                if connection.execute("DELETE FROM shard WHERE name = ? AND state = 'retired'", (name,)).rowcount:
                    connection.execute("DELETE FROM range WHERE name = ?", (name,))

    def knows(self, name: str) -> bool:
        """Whether a shard of that name is listed, live or retired."""
        with self._reading("look up") as connection:
            return connection.execute("SELECT 1 FROM shard WHERE name = ?", (name,)).fetchone() is not None

    def changes(self) -> Changes:
        """How much was catalogued that an answer MUST NOT be without."""
        with self._reading("changes") as connection:
            return Changes(counted(connection, SHOWN), counted(connection, REWRITTEN))

    # Claims: merge and tiering exclude one another

    def claim(self, names: Sequence[str], owner: str, ttl_s: float) -> bool:
        """Claim all of the shards for `owner` or none; claiming again renews. False when one is taken or gone."""
        until = clock.now_us() + int(ttl_s * 1e6)
        with self._writing("claim") as connection:
            try:
                self._check_live(connection, names, owner)
            except ConflictError:
                return False
            rows = [(name, owner, until) for name in names]
            connection.executemany("INSERT OR REPLACE INTO claim VALUES (?, ?, ?)", rows)
        return True

    def release(self, names: Sequence[str], owner: str) -> None:
        """Give claims back."""
        with self._writing("release") as connection:
            connection.executemany("DELETE FROM claim WHERE name = ? AND owner = ?", [(name, owner) for name in names])

    def claimed(self) -> dict[str, str]:
        """Owner of each claimed shard."""
        with self._reading("claims") as connection:
            return dict(connection.execute("SELECT name, owner FROM claim WHERE until > ?", (clock.now_us(),)).fetchall())

    def _check_live(self, connection: sqlite3.Connection, names: Sequence[str], owner: str) -> None:
        for name in names:
            if connection.execute("SELECT 1 FROM shard WHERE name = ? AND state = 'live'", (name,)).fetchone() is None:
                raise ConflictError(f"shard {name} is no longer there", operation="swap", place=str(self._path), hint="take a new snapshot")
            other = connection.execute(
                "SELECT owner FROM claim WHERE name = ? AND owner <> ? AND until > ?", (name, owner, clock.now_us())
            ).fetchone()
            if other is not None:
                raise ConflictError(
                    f"shard {name} is claimed by {other[0]}", operation="swap", place=str(self._path), hint="try again later"
                )

    # How far the log is indexed

    def register(self, sealed: Sealed) -> None:
        """List a sealed tail, its positions and what it found missing. Doing so twice does nothing.

        Raises:
            Fenced: a partition of it does not continue where the catalog stands: somebody else indexed those records.
        """
        with self._writing("register") as connection:
            if connection.execute("SELECT 1 FROM shard WHERE name = ?", (sealed.shard.name,)).fetchone():
                return
            for span in sealed.shard.ranges:
                self._check_continues(connection, span)
            insert_shard(connection, sealed.shard)
            insert_sealed(connection, sealed)

    def register_requeued(self, shard: Shard, numbers: Sequence[Mark]) -> None:
        """List a shard of records that were quarantined; their offsets lie below the positions. Their numbers leave the gaps.

        Raises:
            ConflictError: a record is not in quarantine (any more).
        """
        with self._writing("requeue") as connection:
            for span in shard.ranges:
                cursor = connection.execute(
                    "UPDATE quarantine SET requeued = 1, raw = x'' WHERE log_id = ? AND partition = ? AND offset = ? AND requeued = 0",
                    (span.log_id, span.partition, span.offset_first),
                )
                if not cursor.rowcount:
                    fault = f"partition {span.partition}, offset {span.offset_first} is not in quarantine"
                    raise ConflictError(fault, operation="requeue", place=str(self._path), hint="list the quarantine again")
            for number in numbers:
                fill_gap(connection, number)
            insert_shard(connection, shard)
            count(connection, REWRITTEN)

    def restore(self, sealed: Sealed) -> None:
        """Set positions, marks and what is missing, when an index is made anew behind segments; the shard is ignored."""
        with self._writing("restore") as connection:
            insert_sealed(connection, sealed)

    def replace(self, made_anew: Path) -> None:
        """Take over shards and state of another catalog of one log, in one transaction; the shards of that log here are retired.

        Segments stay, and so do the shards of other logs and what was found missing in them.
        """
        with self._lock, self._mapped("replace"):
            self._connected().execute("ATTACH ? AS anew", (str(made_anew),))
            try:
                with self._writing("replace") as connection:
                    log_id = connection.execute("SELECT value FROM anew.fact WHERE key = 'log_id'").fetchone()
                    replace_log(connection, log_id[0], clock.now_us())
            finally:
                self._connected().execute("DETACH anew")

    def _check_continues(self, connection: sqlite3.Connection, span: Range) -> None:
        row = connection.execute(
            "SELECT offset_next FROM position WHERE log_id = ? AND partition = ?", (span.log_id, span.partition)
        ).fetchone()
        if row is not None and row[0] != span.offset_first:
            fault = f"partition {span.partition} stands at offset {row[0]}, the shard begins at {span.offset_first}"
            raise Fenced(fault, operation="register", place=str(self._path), hint="another indexer took the partition over")

    def positions(self) -> list[Position]:
        """How far each partition is in catalogued shards."""
        with self._reading("positions") as connection:
            rows = connection.execute("SELECT * FROM position ORDER BY log_id, partition").fetchall()
        return [Position(*row) for row in rows]

    def begin(self, position: Position) -> Position:
        """Enter where a partition begins and say where it stands; who lost its fence meanwhile MUST NOT set back what another indexed."""
        with self._writing("set position") as connection:
            insert(connection, "position", position_to_row(position), "INSERT OR IGNORE")
            where = (position.log_id, position.partition)
            return Position(*connection.execute("SELECT * FROM position WHERE log_id = ? AND partition = ?", where).fetchone())

    def caught_up(self, log_id: str, at: dict[int, tuple[int, int]]) -> None:
        """Note, by partition, (offset_next, wall clock µs): whatever was appended before then is below that offset.

        Telemetry: not flushed to disk, and ignored where the catalog does not stand at that offset yet.
        """
        rows = [(moment, log_id, partition, offset) for partition, (offset, moment) in at.items()]
        with self._writing("note position", durable=False) as connection:
            connection.executemany(
                "UPDATE position SET caught_up_at = max(caught_up_at, ?) WHERE log_id = ? AND partition = ? AND offset_next >= ?", rows
            )

    def marks(self, log_id: str, partition: int) -> dict[bytes, int]:
        """Highest `producer_seq` seen of each producer of a partition."""
        with self._reading("marks") as connection:
            rows = connection.execute(
                "SELECT producer_id, seq FROM mark WHERE log_id = ? AND partition = ?", (log_id, partition)
            ).fetchall()
        return dict(rows)

    # What is missing

    def gaps(self, *, log_id: str | None = None, partition: int | None = None, time: tuple[int, int] | None = None) -> list[Gap]:
        """What producers numbered and the log never showed; `time` bounds `appended_at` (µs, both inclusive)."""
        with self._reading("gaps") as connection:
            rows = connection.execute("SELECT * FROM gap").fetchall() + connection.execute(TAILS).fetchall()
        gaps = [Gap(*row) for row in rows]
        kept = [gap for gap in gaps if log_id in (None, gap.log_id) and partition in (None, gap.partition)]
        if time is not None:
            kept = [gap for gap in kept if time[0] <= gap.appended_at <= time[1]]
        return sorted(kept, key=lambda gap: (gap.log_id, gap.partition, gap.appended_at, gap.seq_first))

    def quarantine(self, *, requeued: bool = False) -> list[Quarantined]:
        """Records that could not be read; with `requeued` also those that meanwhile could."""
        columns = "log_id, partition, offset, appended_at, error, size, sha256, requeued"
        with self._reading("quarantine") as connection:
            rows = connection.execute(
                f"SELECT {columns} FROM quarantine WHERE requeued = 0 OR ? ORDER BY log_id, partition, offset", (requeued,)
            ).fetchall()
        return [Quarantined(*(*row[:-1], bool(row[-1]))) for row in rows]

    def quarantined_bytes(self, log_id: str, partition: int, offset: int) -> bytes:
        """The raw bytes of a quarantined record.

        Raises:
            UsageError: there is no such record.
        """
        with self._reading("quarantine") as connection:
            row = connection.execute(
                "SELECT raw FROM quarantine WHERE log_id = ? AND partition = ? AND offset = ? AND requeued = 0", (log_id, partition, offset)
            ).fetchone()
        if row is None:
            fault = f"partition {partition}, offset {offset} is not in quarantine"
            raise UsageError(fault, operation="show quarantine", hint="`tokentape quarantine list` shows what is")
        return bytes(row[0])

    def erase_quarantined(self, needles: Sequence[bytes]) -> int:
        """Overwrite the bytes of quarantined records in which one of some byte strings stands; how many. Their digests stay."""
        with self._writing("erase quarantined records") as connection:
            connection.execute("PRAGMA secure_delete=ON")
            condition = "length(raw) > 0 AND instr(raw, ?) > 0"
            count = sum(connection.execute(f"UPDATE quarantine SET raw = x'' WHERE {condition}", (needle,)).rowcount for needle in needles)
        if count:
            with self._lock, self._mapped("erase quarantined records"):
                self._connected().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return count

    def duplicates(self, log_id: str, partition: int, offset_first: int, offset_next: int) -> list[Duplicate]:
        """Records that were dropped as sent twice, in offset order."""
        with self._reading("duplicates") as connection:
            rows = connection.execute(
                "SELECT * FROM duplicate WHERE log_id = ? AND partition = ? AND offset >= ? AND offset < ? ORDER BY offset",
                (log_id, partition, offset_first, offset_next),
            ).fetchall()
        return [Duplicate(*row) for row in rows]

    # Asking the running indexers to seal

    def request_seal(self, targets: dict[int, int]) -> int:
        """Ask whoever indexes to seal as soon as it has reached these offsets; the number of the request."""
        now = clock.now_us()
        with self._writing("request seal", durable=False) as connection:
            connection.execute("DELETE FROM seal_request WHERE at < ?", (now - _REQUEST_S * 1_000_000,))
            cursor = connection.execute("INSERT INTO seal_request (at, targets) VALUES (?, ?)", (now, json.dumps(targets)))
            return int(cursor.lastrowid or 0)

    def seal_requests(self, after: int) -> list[tuple[int, dict[int, int]]]:
        """Requests with a number above `after`, oldest first: number, and target offset by partition."""
        with self._reading("seal requests") as connection:
            rows = connection.execute("SELECT id, targets FROM seal_request WHERE id > ? ORDER BY id", (after,)).fetchall()
        return [(number, {int(key): value for key, value in json.loads(targets).items()}) for number, targets in rows]

    # Facts about the installation

    def fact(self, key: str) -> str | None:
        """One remembered fact, such as `log_id` or `partitions`."""
        with self._reading("facts") as connection:
            row = connection.execute("SELECT value FROM fact WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else None

    def remember(self, key: str, value: str) -> str:
        """Remember a fact unless one stands already; what then stands."""
        with self._writing("facts") as connection:
            connection.execute("INSERT OR IGNORE INTO fact VALUES (?, ?)", (key, value))
            row = connection.execute("SELECT value FROM fact WHERE key = ?", (key,)).fetchone()
        return str(row[0])

    def alarm(self, partition: int, text: str | None) -> None:
        """Note why a partition stands still, or with None that it does not."""
        with self._writing("alarm") as connection:
            connection.execute("DELETE FROM fact WHERE key = ?", (f"{_ALARM}{partition}",))
            if text is not None:
                connection.execute("INSERT INTO fact VALUES (?, ?)", (f"{_ALARM}{partition}", text))

    def alarms(self) -> dict[int, str]:
        """Why partitions stand still: those that wait for a newer version of this program."""
        with self._reading("alarms") as connection:
            rows = connection.execute("SELECT key, value FROM fact WHERE key LIKE ? ORDER BY key", (f"{_ALARM}%",)).fetchall()
        return {int(key.removeprefix(_ALARM)): str(value) for key, value in rows}

    def _ranges(self, connection: sqlite3.Connection) -> dict[str, tuple[Range, ...]]:
        found: dict[str, list[Range]] = {}
        for row in connection.execute("SELECT * FROM range ORDER BY name, log_id, partition, offset_first"):
            found.setdefault(row[0], []).append(range_from_row(row))
        return {name: tuple(ranges) for name, ranges in found.items()}

    def _prune_partition(self, snapshot: Snapshot, session: bytes | None) -> Snapshot:
        count = self.fact("partitions") if session is not None else None
        if session is None or count is None:
            return snapshot
        partition = partition_of(session, int(count))
        return Snapshot(
            tuple(shard for shard in snapshot.shards if any(span.partition == partition for span in shard.ranges)),
            tuple(segment for segment in snapshot.segments if any(span.partition == partition for span in segment.ranges)),
        )
