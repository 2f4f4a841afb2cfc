"""Sessions read back as events, hot and cold as one: the trusted path of timelines, folds and replays."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import StoreUnavailable, UnknownSession, UsageError
from schemas.settings import Settings
from store.blobs import MARK
from store.catalog import Catalog, Range, Segment, Shard, Snapshot, open_catalog
from store.columns import current_columns
from store.duck import connect, mapped
from store.objects import open_store
from store.objects.base import ObjectStore
from store.rows import StoredEvent, stored_events
from store.views import events_sql, literal

_ATTACHED_MAX = 64  # a plan over more shards gets slow; those not used for longest are detached
_URL_S = 3600  # life of a presigned URL; the same one is used again, because DuckDB's caches go by URL
_ATTEMPTS = 3  # a shard can be merged away between snapshot and attach
_ID_SPREAD_US = 60_000_000  # how far the time in an event's id may lie from `recorded_at`: an id is never smaller than the one before
_MATCHES_SHOWN = 5  # sessions named when a prefix is not unique


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """One line about a session; times are `recorded_at` in µs since the epoch, both inclusive."""

    session_id: bytes
    tenant: str
    started_at: int
    last_event_at: int
    events: int
    requests: int
    failures: int
    title: str | None


class EventReader:
    """Reads sessions through one connection that keeps shards attached and footers cached. Safe for threads."""

    def __init__(self, settings: Settings, catalog: Catalog | None = None, objects: ObjectStore | None = None) -> None:
        self._settings = settings
        self._catalog = catalog or open_catalog(settings.data)
        self._objects = objects
        self._lock = threading.Lock()
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._attached: OrderedDict[Path, str] = OrderedDict()
        self._count = 0
        self._urls: dict[str, tuple[str, float]] = {}

    def session(self, session_id: bytes) -> Iterator[StoredEvent]:
        """The events of a session in the order of the log, by partition and offset; nothing when it is not known.

        Raises:
            CorruptStore: a shard or segment cannot be read.
            StoreUnavailable: the object store does not answer.
        """
        return stored_events(self.table(session_id))

    def sessions(self, session_ids: Sequence[bytes]) -> dict[bytes, list[StoredEvent]]:
        """The events of many sessions by one query, each in the order of the log; those that are not known are left out.

        Best asked for sessions that began one after the other, whose ids lie together.

        Raises:
            CorruptStore, StoreUnavailable: as `session`.
        """
        if not session_ids:
            return {}
        low, high = min(session_ids), max(session_ids)
        # By hexadecimal digits, because equality on a BLOB can lose rows of Parquet files with bloom filters.
        digits = ", ".join(f"'{each.hex().upper()}'" for each in session_ids)
        where = f"session_id BETWEEN {blob(low)} AND {blob(high)} AND hex(session_id) IN ({digits})"
        table = self._read(lambda: _overlapping(self._catalog.snapshot(), low, high), lambda snapshot: self._session(snapshot, where))
        found: dict[bytes, list[StoredEvent]] = {}
        for stored in stored_events(table):
            found.setdefault(stored.event.session_id, []).append(stored)
        return found

    def table(self, session_id: bytes) -> pa.Table:
        """The rows of a session as an Arrow table with the columns of `events`; kinds that it does not have may be missing."""
        # BETWEEN, because equality on a BLOB can lose rows of Parquet files with bloom filters.
        where = f"session_id BETWEEN {blob(session_id)} AND {blob(session_id)}"
        return self._read(lambda: self._catalog.snapshot(session=session_id), lambda snapshot: self._session(snapshot, where))

    def _session(self, snapshot: Snapshot, where: str) -> pa.Table:
        only = None
        if not snapshot.segments:  # a second look would cost requests there, and only time here
            kinds = self._query(snapshot, "SELECT DISTINCT kind FROM events", where, ("kind",)).column(0).to_pylist()
            only = _envelope() | set(kinds)
        return _by_log(self._query(snapshot, 'SELECT * FROM events ORDER BY "partition", "offset"', where, only))

    def find(self, text: str) -> bytes:
        """The session that a UUID, 32 hex digits or a unique beginning of them names.

        Raises:
            UnknownSession: none is so named.
            UsageError: not hexadecimal, or more than one.
        """
        digits = text.strip().lower().replace("-", "")
        if not re.fullmatch(r"[0-9a-f]{1,32}", digits):
            raise UsageError(f"{text!r} is no session id", operation="find session", hint="a UUID or its first digits")
        low, high = bytes.fromhex(digits.ljust(32, "0")), bytes.fromhex(digits.ljust(32, "f"))
        where = f"session_id BETWEEN {blob(low)} AND {blob(high)}"
        sql = f"SELECT DISTINCT session_id FROM events ORDER BY session_id LIMIT {_MATCHES_SHOWN}"
        table = self._read(lambda: _overlapping(self._catalog.snapshot(), low, high), lambda snapshot: self._query(snapshot, sql, where))
        found = table.column(0).to_pylist()
        if not found:
            raise UnknownSession(f"no session {text}", operation="find session", hint="`tokentape sessions` lists them")
        if len(found) > 1:
            raise UsageError(
                f"more than one session begins with {text}",
                operation="find session",
                hint=", ".join(str(uuid.UUID(bytes=each)) for each in found),
            )
        return bytes(found[0])

    def sessions_with(self, kinds: Collection[str], marks: Mapping[tuple[str, int], int]) -> set[tuple[bytes, str]]:
        """Each session that has events of some kinds, with each of these kinds.

        Shards and segments that end before `marks` (an offset, by log and partition) are left out.
        """
        where = f"kind IN ({', '.join(map(literal, kinds))})"
        sql = "SELECT DISTINCT session_id, kind FROM events"
        table = self._read(
            lambda: _since(self._catalog.snapshot(), marks), lambda snapshot: self._query(snapshot, sql, where, ("session_id", "kind"))
        )
        return set(zip(*(column.to_pylist() for column in table.columns), strict=True))

    def place_of(self, event_id: bytes) -> Segment | Shard | None:
        """What holds an event now; None when nothing does.

        Looks first where the time in a UUIDv7 points to: the clock of the one who recorded it made both.
        """
        at = int.from_bytes(event_id[:6], "big") * 1000
        near = self._catalog.snapshot(time=(at - _ID_SPREAD_US, at + _ID_SPREAD_US))
        return self._holder(near, event_id) or self._holder(self._catalog.snapshot(), event_id)

    def session_of(self, event_id: bytes) -> bytes | None:
        """The session that an event belongs to; None where there is no such event."""
        place = self.place_of(event_id)
        if place is None:
            return None
        where = f"event_id BETWEEN {blob(event_id)} AND {blob(event_id)}"
        one = Snapshot((), (place,)) if isinstance(place, Segment) else Snapshot((place,), ())
        found = self.ask(one, "SELECT session_id FROM events", where, ("event_id", "session_id")).column(0).to_pylist()
        return bytes(found[0]) if found else None

    def _holder(self, snapshot: Snapshot, event_id: bytes) -> Segment | Shard | None:
        """The first part of a snapshot with this event: hot ones first, which are quick to ask."""
        for shard in snapshot.shards:
            if shard.rows and self._holds(Snapshot((shard,), ()), event_id):
                return shard
        return next((segment for segment in snapshot.segments if self._holds(Snapshot((), (segment,)), event_id)), None)

    def _holds(self, snapshot: Snapshot, event_id: bytes) -> bool:
        where = f"event_id BETWEEN {blob(event_id)} AND {blob(event_id)}"
        found = self._read(lambda: snapshot, lambda only: self._query(only, "SELECT count(*) FROM events", where, ("event_id",)))
        return bool(found.column(0)[0].as_py())

    def recent(self, limit: int = 50, *, tenant: str | None = None) -> list[SessionSummary]:
        """The sessions with the latest events, newest first; those of the platform itself only when asked for by tenant."""
        condition = "tenant <> '_platform'" if tenant is None else "tenant = '{}'".format(tenant.replace("'", "''"))
        found = self._summaries(self._hot_only, condition, limit)
        # A session of the cold tier is only of interest when hot has too few.
        return found if len(found) == limit else self._summaries(self._catalog.snapshot, condition, limit)

    def ask(self, snapshot: Snapshot, sql: str, where: str, only: Collection[str] | None = None) -> pa.Table:
        """A query of one's own over `events` in a part of the catalog; `where` and `only` as in `store.views.events_sql`."""
        return self._read(lambda: snapshot, lambda taken: self._query(taken, sql, where, only))

    def saying(self, snapshot: Snapshot, words: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Sessions (hex) of a part of the catalog in whose messages or answers some words (lower case) stand, a bit for each word."""
        bits = " + ".join(f"CASE WHEN bool_or(contains(said, {literal(word)})) THEN {1 << i} ELSE 0 END" for i, word in enumerate(words))
        sql = (
            "SELECT lower(hex(session_id)) AS session, mask FROM (SELECT session_id, " + bits + " AS mask FROM ("
            "SELECT session_id, lower(message.body) AS said FROM (SELECT session_id, unnest(request_submitted.content.messages) AS message "
            "FROM events WHERE kind = 'request_submitted') UNION ALL SELECT session_id, lower(string_agg(token_chunk.content.text, '' "
            "ORDER BY token_chunk.\"position\")) FROM events WHERE kind = 'token_chunk' "
            'GROUP BY session_id, token_chunk.generation_id, token_chunk."index", source) GROUP BY session_id) WHERE mask > 0'
        )
        only = ("kind", "session_id", "source", "request_submitted", "token_chunk")
        kinds = "kind IN ('request_submitted', 'token_chunk')"
        table = self.ask(snapshot, sql, kinds, only)
        yield from zip(*(column.to_pylist() for column in table.columns), strict=True)

    def blob_names(self) -> set[str]:
        """The names of all blobs that an event refers to, in hexadecimal."""
        sql = (
            "SELECT DISTINCT name FROM (WITH asked AS (SELECT request_submitted.content AS content FROM events), "
            "said AS (SELECT unnest(content.messages) AS message FROM asked) "
            "SELECT lower(hex(content.parameters_blob.blob_id)) AS name FROM asked "
            "UNION ALL SELECT lower(hex(message.blob.blob_id)) FROM said "
            f"UNION ALL SELECT unnest(regexp_extract_all(message.body, '{MARK.pattern}', 1)) FROM said) WHERE name IS NOT NULL"
        )
        columns = ("kind", "request_submitted")
        table = self._read(self._catalog.snapshot, lambda snapshot: self._query(snapshot, sql, "kind = 'request_submitted'", columns))
        return set(table.column(0).to_pylist())

    def close(self) -> None:
        """Release files and connections; safe to call twice, and the next call opens them again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            self._attached.clear()

    def _hot_only(self) -> Snapshot:
        return Snapshot(self._catalog.snapshot().shards, ())

    def _summaries(self, take: Callable[[], Snapshot], condition: str, limit: int) -> list[SessionSummary]:
        sql = (
            "SELECT session_id, any_value(tenant), epoch_us(min(recorded_at)), epoch_us(max(recorded_at)) AS last, count(*), "
            "count(request_submitted), count(generation_failed), any_value(session_opened.content.title) "
            f"FROM events GROUP BY session_id ORDER BY last DESC, session_id LIMIT {int(limit)}"
        )
        table = self._read(take, lambda snapshot: self._query(snapshot, sql, condition))
        columns = [column.to_pylist() for column in table.columns]
        return [SessionSummary(*row) for row in zip(*columns, strict=True)]

    def _read(self, take: Callable[[], Snapshot], ask: Callable[[Snapshot], pa.Table]) -> pa.Table:
        """Ask over a fresh snapshot; again with another one when a shard vanished meanwhile."""
        with self._lock:
            for attempt in range(_ATTEMPTS):
                snapshot = take()
                try:
                    return ask(snapshot)
                except duckdb.Error as error:
                    vanished = any(not shard.path.exists() for shard in snapshot.shards) or superseded(self._catalog, snapshot.segments)
                    if not vanished or attempt == _ATTEMPTS - 1:
                        raise self._mapped(error) from error
        raise AssertionError("unreachable")

    def _query(self, snapshot: Snapshot, sql: str, where: str, only: Collection[str] | None = None) -> pa.Table:
        connection = self._connect()
        shards = self._attach(connection, [shard for shard in snapshot.shards if shard.rows])
        events = events_sql(shards, [self._url(segment) for segment in snapshot.segments], where=where, only=only)
        return connection.execute(f"WITH events AS ({events}) {sql}").to_arrow_table()

    def _connect(self) -> duckdb.DuckDBPyConnection:
        if self._connection is None:
            remote = self._settings.cold.kind != "local"
            # A look-up is one row group's work: more threads would only wait for one another.
            self._connection = connect(extensions=("httpfs",) if remote else (), threads=1)
            self._connection.execute("SET parquet_metadata_cache = true")
            if remote:
                self._connection.execute("SET http_keep_alive = true; SET enable_http_metadata_cache = true")
        return self._connection

    def _attach(self, connection: duckdb.DuckDBPyConnection, shards: Sequence[Shard]) -> list[str]:
        """Attach what is not attached yet; the names in order."""
        for shard in shards:
            if shard.path not in self._attached:
                self._count += 1
                name = f"shard_{self._count}"
                connection.execute(f"ATTACH '{str(shard.path.absolute()).replace(chr(39), chr(39) * 2)}' AS {name} (READ_ONLY)")
                self._attached[shard.path] = name
            self._attached.move_to_end(shard.path)
        names = [self._attached[shard.path] for shard in shards]
        while len(self._attached) > max(_ATTACHED_MAX, len(shards)):
            connection.execute(f"DETACH {self._attached.popitem(last=False)[1]}")
        return names

    def _url(self, segment: Segment) -> str:
        url, until = self._urls.get(segment.key, ("", 0.0))
        if until < time.monotonic():
            if self._objects is None:
                self._objects = open_store(self._settings.cold, self._settings.data)
            url = self._objects.read_url(segment.key, expires_s=_URL_S)
            self._urls[segment.key] = (url, time.monotonic() + _URL_S / 2)
        return url

    def _mapped(self, error: duckdb.Error) -> Exception:
        text = str(error).splitlines()[0]
        for key, (url, _) in self._urls.items():
            text = text.replace(url, key)
        if isinstance(error, duckdb.HTTPException) or "Could not establish connection" in text or "HTTP" in text:
            return StoreUnavailable(text, operation="read session", place="cold store", hint="see whether the object store answers")
        return mapped(type(error)(text), operation="read session", place=str(self._settings.data))


def superseded(catalog: Catalog, segments: Sequence[Segment]) -> bool:
    """Whether one of some segments has been replaced meanwhile, so that its object may be gone."""
    return not {segment.key for segment in segments} <= {segment.key for segment in catalog.snapshot().segments}


def _by_log(table: pa.Table) -> pa.Table:
    """Rows of the log that is older first: one that was made anew counts its offsets from 0 again."""
    if len(pc.unique(table.column("log_id"))) < 2:
        return table
    first = table.group_by("log_id").aggregate([("appended_at", "min")]).sort_by("appended_at_min").column("log_id").to_pylist()
    return pa.concat_tables([table.filter(pc.equal(table.column("log_id"), log_id)) for log_id in first])


def _envelope() -> set[str]:
    """The columns of `events` that are no kind's."""
    return {name for name, kind in current_columns().items() if not kind.startswith("STRUCT")}


def blob(value: bytes) -> str:
    """A BLOB as a SQL constant, which DuckDB uses to skip row groups."""
    return "'" + "".join(f"\\x{byte:02X}" for byte in value) + "'::BLOB"


def _since(snapshot: Snapshot, marks: Mapping[tuple[str, int], int]) -> Snapshot:
    """What may hold events at or after some offsets."""

    def later(ranges: Sequence[Range]) -> bool:
        return any(span.offset_next > marks.get((span.log_id, span.partition), 0) for span in ranges)

    return Snapshot(
        tuple(shard for shard in snapshot.shards if later(shard.ranges)),
        tuple(segment for segment in snapshot.segments if later(segment.ranges)),
    )


def _overlapping(snapshot: Snapshot, low: bytes, high: bytes) -> Snapshot:
    """What may hold sessions between two ids."""
    return Snapshot(
        tuple(shard for shard in snapshot.shards if shard.session_min <= high and low <= shard.session_max),
        tuple(segment for segment in snapshot.segments if segment.session_min <= high and low <= segment.session_max),
    )
