"""Puts cold segments in the place of others: without rows that are to go, without content, or several as one.

The order is the contract. New segments are written, put and read back while the old ones serve; one ledger entry is the
commit point; one catalog transaction then makes readers take the new ones; only then the old objects go, with all their
versions, and it is checked that they are gone. The entry is made under the number that was expected, or not at all: so
every hold with a smaller number was respected. A run that was killed anywhere is finished by the next one: `Tiering.reconcile`
brings the catalog to the ledger, and `sweep` removes what no live segment is.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import structlog

from lifecycle.register import HOLD_PLACED, Hold, Register
from lifecycle.selectors import Matching
from lifecycle.tiering import OWNER, RACES_MAX, REWRITTEN, Stored, Tiering, segment_to_json, segments_of
from schemas import clock
from schemas.errors import ConflictError, CorruptStore, StoreUnavailable, UsageError
from schemas.registry import CURRENT
from store import duck
from store.catalog import Segment
from store.cold import Draft, Part, plan_parts, read_content, read_sorted, write_part
from store.columns import current_columns
from store.crashpoints import crash_point
from store.erasing import commit_rows, erased_sql
from store.hot import attach, detach
from store.ledger import Entry
from store.ledger.merkle import root_of_packed
from store.recode import recode
from store.views import events_sql

log = structlog.get_logger("tokentape.rewriting")

CRASH_POINTS = ("written", "put", "before_commit", "committed", "swapped", "purged_one", "purged")
"""Every step of a rewrite that changes durable state, as `rewrite.NAME` for `store.crashpoints`."""

ORPHAN_S = 3600.0
"""An object that no entry names is left alone for so long: somebody may be about to enter it."""


@dataclass(frozen=True, slots=True)
class Change:
    """What to do with some segments of one tenant, day and class.

    Rows that satisfy `drop` go; of those that satisfy `strip` the content goes. Both are SQL, empty for none. `whole`
    says that every row is known to go. `facts` are put into the ledger entry.
    """

    why: str
    segments: tuple[Segment, ...]
    drop: str = ""
    strip: str = ""
    whole: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def loses(self) -> bool:
        """Whether anything is lost by it, so that a hold matters."""
        return bool(self.drop or self.strip or self.whole)

    @property
    def rows(self) -> int:
        """Rows before."""
        return sum(segment.rows for segment in self.segments)


@dataclass
class Done:
    """What rewrites came to: rows that went, rows whose content and salt went, those of them that had content, segments that went and
    came, bytes and versions that are gone."""

    events: int = 0
    stripped: int = 0
    filled: int = 0
    segments: int = 0
    segments_new: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_gone: int = 0
    versions_gone: int = 0
    entries: list[int] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


@contextlib.contextmanager
def rewriting(tiering: Tiering, register: Register) -> Iterator[Rewriting]:
    """A run with a connection and a folder of its own. Only within `Tiering.alone` may it change anything."""
    settings = tiering.settings
    root = settings.data / "tmp"
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"rewrite-{os.getpid()}-", dir=root))
    extensions = ("httpfs",) if settings.cold.kind != "local" else ()
    limits: dict[str, Any] = {"threads": settings.sql.threads, "memory_limit": f"{settings.sql.memory_mb}MB"}
    try:
        with duck.connect(folder / "work.duckdb", extensions=extensions, temp_directory=str(folder), **limits) as connection:
            yield Rewriting(tiering, register, connection, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Rewriting:
    """A rewriting run."""

    tiering: Tiering
    register: Register
    connection: duckdb.DuckDBPyConnection
    folder: Path
    _followed: set[tuple[str, frozenset[str]]] = field(default_factory=set)

    @cached_property
    def matching(self) -> Matching:
        """Conditions on this run's connection."""
        return Matching(self.connection, self.everything)

    def apply(self, plan: Callable[[], Change | None], done: Done) -> None:
        """Carry out what `plan` says; it is asked again when a hold was placed in between.

        Raises:
            CorruptStore: a segment is not what was entered, or what was written is not what was meant; nothing is changed then.
            ConflictError: another process rewrites as well.
            StoreUnavailable, StorageFull: the next run completes what this one began.
        """
        for _ in range(RACES_MAX):
            self.register.refresh()
            change = plan()
            if change is None:
                return
            made = None if change.whole else self._make(change)
            if made is not None and made.nothing:
                return
            entry = self._commit(change, made)
            if entry is not None:
                self._finish(change, made, entry, done)
                return
            if made is not None and made.stored is not None:
                self.tiering.objects.purge(made.stored.key)
        raise ConflictError("the ledger is too busy", operation="rewrite", place="ledger", hint="try again later")

    def sweep(self, *, orphan_s: float = ORPHAN_S) -> tuple[int, int, int]:
        """Remove what no live segment is: how many keys, versions and bytes. Old versions and delete markers count.

        What a lock keeps is left for a later run.
        """
        objects = self.tiering.objects
        live = {segment.key for segment in self.tiering.catalog.snapshot().segments}
        stale = [key for key, _ in objects.remains("events/") if key not in live]
        if not stale:
            return 0, 0, 0
        self.register.refresh()
        limit = clock.now() - dt.timedelta(seconds=orphan_s)
        keys = versions = size = 0
        for key in stale:
            info = objects.head(key)
            if key in self.register.gone or info is None or info.modified_at < limit:
                with contextlib.suppress(ConflictError):  # locked: a later run
                    versions, keys, size = versions + self._purge(key), keys + 1, size + (info.size if info else 0)
        return keys, versions, size

    # One change

    def _make(self, change: Change) -> _Made:
        """Write the new segment, put it and read it back."""
        connection, first = self.connection, change.segments[0]
        kept = self._kept(change)
        stripped = filled = 0
        if change.strip:
            where = f"salt IS NOT NULL AND coalesce({change.strip}, false)"
            stripped, filled = commit_rows(connection, kept, where, self.tiering.registry, "erased_rows")
            kept = erased_sql(kept, "erased_rows")
        relation = f"(SELECT *, '{first.day}' AS day FROM {kept})"
        parts = plan_parts(connection, relation, 1, 1 << 60, 1 << 60)
        rows = sum(part.rows for part in parts)
        if len(parts) > 1:
            raise CorruptStore("rows of another tenant or class in a segment", operation="rewrite", place=first.key)
        if rows == change.rows and not stripped and len(change.segments) == 1:
            return _Made(None, nothing=True)
        if not parts:
            return _Made(None, stripped=stripped, filled=filled)
        root = self._root(relation, parts[0])
        draft = write_part(connection, relation, parts[0], self.folder / "new.parquet")
        crash_point("rewrite.written")
        if len(change.segments) == 1 and rows == change.rows and root != first.root:
            raise CorruptStore("without content the leaves are not the same", operation="rewrite", place=first.key)
        return _Made(self._store(draft, root), stripped=stripped, filled=filled)

    def _kept(self, change: Change) -> str:
        """The rows that stay, as a table of the run's own file: what is made of them reads them again, and the old segments are large."""
        paths = [self._fetch(segment, self.folder / f"{number}.old") for number, segment in enumerate(change.segments)]
        old = events_sql([], [str(path) for path in paths])
        where = f" WHERE NOT coalesce({change.drop}, false)" if change.drop else ""
        try:
            kinds = {kind for (kind,) in self.connection.execute(f"SELECT DISTINCT kind FROM ({old})").fetchall()}
            # Fields of kinds that are not there are most of a row, and reading their nulls takes nearly half of the time.
            null = ", ".join(f'CAST(NULL AS {current_columns()[kind]}) AS "{kind}"' for kind in CURRENT.kinds if kind not in kinds)
            select = f"SELECT * REPLACE ({null})" if null else "SELECT *"
            self.connection.execute(f"CREATE OR REPLACE TABLE kept_rows AS {select} FROM ({old}){where}")
        except duckdb.Error as error:
            raise duck.mapped(error, operation="rewrite", place=change.segments[0].key) from error
        for path in paths:
            path.unlink()
        return "kept_rows"

    def _fetch(self, segment: Segment, path: Path) -> Path:
        """A segment as a local file, its bytes held against the catalog's."""
        try:
            data = self.tiering.objects.get(segment.key)
        except KeyError:
            hint = "`tokentape verify` says what is missing; nothing was changed"
            raise CorruptStore("the segment is not there", operation="rewrite", place=segment.key, hint=hint) from None
        if hashlib.sha256(data).hexdigest() != segment.sha256:
            hint = "`tokentape verify` says what was modified; nothing was changed"
            raise CorruptStore("the segment is not what was entered", operation="rewrite", place=segment.key, hint=hint)
        path.write_bytes(data)
        return path

    def _root(self, relation: str, part: Part) -> bytes:
        """Merkle root over the leaves of the rows as they are meant to be, made before they are written."""
        reader = read_sorted(self.connection, relation, part)
        return root_of_packed(b"".join(piece.leaves for batch in reader for piece in recode(batch, self.tiering.registry)))

    def _store(self, draft: Draft, root: bytes) -> Stored:
        tiering, part = self.tiering, draft.part
        key = draft.key(self.register.size)
        tiering.objects.create_from_file(key, draft.path, lock=tiering.segment_lock(part.tenant, part.retention_class, part.day))
        draft.path.unlink()
        crash_point("rewrite.put")
        content = read_content(tiering.objects.get(key), tiering.registry, sha256=draft.sha256, place=key)
        if content.root != root or content.rows != part.rows:
            raise CorruptStore("what came back is not what was meant", operation="rewrite", place=key)
        return Stored(key, draft, content)

    def _commit(self, change: Change, made: _Made | None) -> Entry | None:
        """Enter it; None when a hold came first, so that it has to be planned again."""
        stored = made.stored if made is not None else None
        schemas = {fingerprint: self.tiering.put_schema(fingerprint) for fingerprint in (stored.content.schemas if stored else ())}
        objects = [{"key": stored.key, "bytes": stored.draft.bytes, "sha256": stored.draft.sha256}] if stored else []
        kept = stored.content.rows if stored else 0
        body = {
            "why": change.why,
            "day": change.segments[0].day,
            "erased": [segment.key for segment in change.segments],
            "replaced": [{"key": s.key, "rows": s.rows, "bytes": s.bytes, "root": s.root.hex()} for s in change.segments],
            "objects": [*objects, *schemas.values()],
            "segments": [segment_to_json(stored, schemas)] if stored else [],
            "events": change.rows - kept,
            "contents": made.stripped if made is not None else 0,
            "filled": made.filled if made is not None else 0,
            **change.facts,
        }
        crash_point("rewrite.before_commit")
        for _ in range(RACES_MAX):
            self.tiering.check_alone()
            try:
                entry = self.tiering.ledger.append(REWRITTEN, body, expected=self.register.size)
            except ConflictError:
                news = self.register.refresh()
                if any(item.type == REWRITTEN for item in news):
                    hint = "try again when it is done"
                    raise ConflictError("another process rewrites segments", operation="rewrite", place="ledger", hint=hint) from None
                if change.loses and any(item.type == HOLD_PLACED for item in news):
                    return None
                continue
            crash_point("rewrite.committed")
            return entry
        return None

    def _finish(self, change: Change, made: _Made | None, entry: Entry, done: Done) -> None:
        self.register.refresh()
        new = segments_of(entry)
        self.tiering.catalog.swap(retire_segments=[segment.key for segment in change.segments], segments=new, owner=OWNER)
        crash_point("rewrite.swapped")
        self.follow_holds(new)
        if self.tiering.withdraw is not None:
            self.tiering.withdraw()
        for segment in change.segments:
            done.versions_gone += self._purge(segment.key)
            crash_point("rewrite.purged_one")
        done.events += int(entry.body["events"])
        done.stripped += int(entry.body["contents"])
        done.filled += int(entry.body["filled"])
        done.segments += len(change.segments)
        done.segments_new += len(new)
        done.bytes_read += 0 if made is None else sum(segment.bytes for segment in change.segments)
        done.bytes_written += sum(segment.bytes for segment in new)
        done.bytes_gone += sum(segment.bytes for segment in change.segments)
        done.entries.append(entry.sequence)
        done.keys += [segment.key for segment in change.segments]
        crash_point("rewrite.purged")
        log.info("rewrite.done", why=change.why, day=change.segments[0].day, segments=len(change.segments), ledger_entry=entry.sequence)

    def _purge(self, key: str) -> int:
        """Remove an object and look whether it is gone. What is still held of it stands in its successor by now."""
        objects = self.tiering.objects
        if self.register.holds or self.register.released:
            with contextlib.suppress(KeyError, UsageError):  # gone, or a bucket that keeps no holds
                objects.set_hold(key, False)
        versions = objects.purge(key)
        if left := dict(objects.remains(key)).get(key):
            raise StoreUnavailable(f"{left} versions are still there", operation="purge", place=key, hint="the next run tries again")
        return versions

    def locked_until(self, segment: Segment) -> dt.datetime | None:
        """Until when a compliance lock keeps a segment from being removed; None where none does."""
        try:
            lock = self.tiering.objects.lock_of(segment.key)
        except KeyError:
            return None  # reading it will say that it is not there
        return lock.until if lock.mode == "compliance" and lock.until is not None and lock.until > clock.now() else None

    # Holds of the object store

    def hold_objects(self, segments: Sequence[Segment]) -> int:
        """Put those segments under the store's own legal hold that a hold touches, and end it for others; how many are held."""
        held = 0
        holds = list(self.register.holds.values())
        for segment in segments:
            touching = [hold for hold in holds if hold.selector.may_touch(segment)]
            there = bool(touching) and self._touched(segment, touching)
            self.tiering.objects.set_hold(segment.key, there)
            held += there
        return held

    def follow_holds(self, segments: Sequence[Segment]) -> None:
        """`hold_objects` for segments that are new to these holds; a bucket that keeps no holds does not stop anything."""
        holds = frozenset(self.register.holds)
        wanted = [segment for segment in segments if any(hold.selector.may_touch(segment) for hold in self.register.holds.values())]
        try:
            self.hold_objects([segment for segment in wanted if (segment.key, holds) not in self._followed])
            self._followed |= {(segment.key, holds) for segment in wanted}
        except UsageError as error:
            log.warning("rewrite.no_object_holds", error=str(error))

    def _touched(self, segment: Segment, holds: Sequence[Hold]) -> bool:
        return self.count([segment], " OR ".join(hold.selector.condition(self.matching) for hold in holds)) > 0

    # What is there

    @contextlib.contextmanager
    def everything(self) -> Iterator[str]:
        """A SELECT over all rows, hot and cold."""
        snapshot = self.tiering.catalog.snapshot()
        shards = [shard for shard in snapshot.shards if shard.rows]
        attach(self.connection, shards)
        yield events_sql([f"hot_{number}" for number, _ in enumerate(shards)], [self.url(segment) for segment in snapshot.segments])
        detach(self.connection, shards)

    def events(self, urls: Sequence[str]) -> str:
        """A SELECT over the rows of some segments."""
        return events_sql([], urls)

    def url(self, segment: Segment) -> str:
        """Where DuckDB reads a segment."""
        return self.tiering.objects.read_url(segment.key, expires_s=3600)

    def count(self, segments: Sequence[Segment], condition: str) -> int:
        """Rows of segments that satisfy a condition; raises as `counts`."""
        return self.counts(segments, [condition])[0]

    def counts(self, segments: Sequence[Segment], conditions: Sequence[str]) -> tuple[int, ...]:
        """Rows of segments that satisfy each of some conditions.

        Raises:
            CorruptStore: a segment is not there or cannot be read.
        """
        events = events_sql([], [self.url(segment) for segment in segments])
        wanted = ", ".join(f"count(*) FILTER (WHERE {condition})" for condition in conditions)
        try:
            return tuple(self.connection.execute(f"SELECT {wanted} FROM ({events})").fetchall()[0])
        except duckdb.Error as error:
            hint = "`tokentape verify` says what is missing or modified; nothing was changed"
            raise CorruptStore(str(error).splitlines()[0], operation="count rows", place=segments[0].key, hint=hint) from error


@dataclass(frozen=True, slots=True)
class _Made:
    """What was written in the place of segments: nothing at all, a segment, or none because every row went."""

    stored: Stored | None
    stripped: int = 0
    filled: int = 0
    nothing: bool = False
