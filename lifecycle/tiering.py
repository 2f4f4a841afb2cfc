"""Moves closed days from hot shards into cold segments: write, put, read back, check, commit to the ledger, swap.

The order is the contract. Until the ledger entry stands the segments are orphans and hot serves the rows; the entry is
the commit point; one catalog transaction then makes readers take the segments instead of the shards. A run that was
killed anywhere is finished or repeated by the next one, which begins by `reconcile`. Each day is an entry of its own,
so that a day is served wholly from hot or wholly from cold.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import itertools
import json
import os
import secrets
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import structlog

from lifecycle.policies import Policies
from schemas import clock
from schemas.errors import AlreadyExists, ConflictError, CorruptStore
from schemas.events import SegmentSealed
from schemas.registry import Schema, SchemaRegistry
from schemas.settings import Settings
from schemas.sink import EventSink, platform_session
from store import duck
from store.catalog import Catalog, Range, Segment, Shard
from store.cold import ATTACHED_MAX, SEGMENT_BYTES_MAX, SEGMENT_ROWS_MAX, Draft, SegmentContent, plan_parts, read_content, stage, write_part
from store.coverage import Coverage, cover, coverage_from_json, coverage_to_json, from_parquet, spans_of, to_parquet
from store.crashpoints import crash_point
from store.fences import FileLock, tier_lock_path
from store.hot import attach
from store.ledger import Entry, Ledger
from store.objects.base import NO_LOCK, Lock, ObjectStore
from store.stored_schemas import schema_key

log = structlog.get_logger("tokentape.tiering")

ENTRY_TYPE = "segments"
"""Ledger entries of this type commit the segments of one day and the coverage of the offsets that they hold."""

REWRITTEN = "rewritten"
"""Ledger entries of this type put segments in the place of others, or of nothing (`lifecycle.rewriting`)."""

CLAIM_S = 3600.0
"""How long a day's shards are kept from being merged; renewed with every segment."""

WAIT_S = 600.0
"""How long retention, erasure and compaction wait for a run that is at work."""

_POLL_S = 0.1

RACES_MAX = 100
"""Entries of others that may come between before a commit gives up."""

OWNER = "tier"
"""Who claims: one name for all runs, of which a lock lets one go at a time, so that the next finishes a killed one's work."""

CRASH_POINTS = ("staged", "written", "put_one", "put", "read_back", "coverage_put", "before_commit", "committed", "swapped", "announced")
"""Every step of a day that changes durable state, as `tier.NAME` for `store.crashpoints`."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A segment in the store, read back."""

    key: str
    draft: Draft
    content: SegmentContent


@dataclass(frozen=True)
class Tiering:
    """What a tiering run works on; a segment rolls at `segment_bytes_max`, and at `segment_rows_max`.

    `withdraw` is called when segments were replaced and before they are removed, so that others who read them stop to.
    """

    settings: Settings
    catalog: Catalog
    objects: ObjectStore
    ledger: Ledger
    registry: SchemaRegistry
    sink: EventSink | None = None
    segment_bytes_max: int = SEGMENT_BYTES_MAX
    segment_rows_max: int = SEGMENT_ROWS_MAX
    withdraw: Callable[[], None] | None = None
    _held: list[FileLock] = field(default_factory=list, init=False, repr=False, compare=False)

    def run(self, *, all_days: bool = False, dry_run: bool = False) -> dict[str, Any]:
        """Tier every shard of a day older than `jobs.tier_after_days`, or of any day; what was done as a flat dict.

        Raises:
            CorruptStore: rows whose bytes are not those of the log; that day was not swapped and nothing of it dropped.
            ConflictError: another run is at work, or the shards are being merged.
            StoreUnavailable, StorageFull: the next run completes what this one began.
        """
        if dry_run:
            return self._preview(self._closed(all_days))
        with self.alone():
            return self.run_alone(all_days=all_days)

    def run_alone(self, *, all_days: bool = False) -> dict[str, Any]:
        """`run` for who is alone already."""
        self.clear()
        size = self.ledger.head()
        finished = self.reconcile_alone()
        shards = self._closed(all_days)
        segments: list[Segment] = []
        for _, group in itertools.groupby(shards, key=lambda shard: shard.day):
            entry = self._tier_day(list(group), size)
            segments += segments_of(entry)
            size = entry.sequence + 1
        summary = {"shards": len(shards), "events": sum(shard.rows for shard in shards), "finished_earlier": finished}
        size = sum(segment.bytes for segment in segments)
        return {**summary, "segments": len(segments), "bytes": size, "keys": [segment.key for segment in segments]}

    def clear(self) -> None:
        """Remove the scratch folders of killed runs; `rewrite-PID-…` may be that of somebody who only looks."""
        folder = self.settings.data / "tmp"
        looking = [path for path in folder.glob("rewrite-*") if not _runs(int(path.name.split("-")[1]))]
        for left in (*folder.glob("tier-*"), *looking):
            shutil.rmtree(left, ignore_errors=True)

    def reconcile(self) -> int:
        """Finish what killed runs committed but did not swap; how many ledger entries that were, 0 while a run is at work.

        A catalog that was lost gets all its segments back this way.
        """
        try:
            with self.alone():
                return self.reconcile_alone()
        except ConflictError:
            return 0

    @contextlib.contextmanager
    def alone(self, *, wait_s: float = 0.0) -> Iterator[None]:
        """One run at a time, waited for up to `wait_s`; the lock dies with its process.

        Raises:
            ConflictError: another run is at work.
        """
        path, deadline = tier_lock_path(self.catalog.path.parent), time.monotonic() + wait_s
        while (lock := FileLock.take(path, secrets.token_hex(8))) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if lock is None:
            raise ConflictError("another tiering run is at work", operation="tier", place=str(path), hint="try again when it is done")
        self._held.append(lock)
        try:
            yield
        finally:
            self._held.remove(lock)
            lock.release()

    def check_alone(self) -> None:
        """Raise unless the lock still keeps others out: they may have removed what is about to be entered, as left behind by a dead run.

        Raises:
            ConflictError: it does not.
        """
        for lock in self._held:
            if not lock.holds():
                fault, hint = "the lock file was removed or replaced", "another run may be at work; the next one does this again"
                raise ConflictError(fault, operation="commit", place=str(lock.path), hint=hint)

    def _closed(self, all_days: bool) -> list[Shard]:
        """The shards to tier by day. Days never run backwards along a partition, so they are the beginning of each."""
        limit = clock.now() - dt.timedelta(days=Policies.of(self.settings).hot_days(self.settings.jobs.tier_after_days))
        shards = self.catalog.snapshot().shards
        closed = [shard for shard in shards if all_days or shard.day < limit.strftime("%Y-%m-%d")]
        return sorted(closed, key=lambda shard: (shard.day, shard.name))

    def _preview(self, shards: Sequence[Shard]) -> dict[str, Any]:
        by_day: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for shard in shards:
            by_day[shard.day][0] += 1
            by_day[shard.day][1] += shard.rows
        would = [f"{day}: {events:,} events in {count:,} shard(s)" for day, (count, events) in sorted(by_day.items())]
        return {"shards": len(shards), "events": sum(shard.rows for shard in shards), "would_tier": would}

    # One day

    def _tier_day(self, shards: Sequence[Shard], size: int) -> Entry:
        """Move the shards of one day, seen when the ledger had `size` entries."""
        names = [shard.name for shard in shards]
        self._claim(names)
        scratch = self.settings.data / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="tier-", dir=scratch))
        try:
            drafts, marks = self._write(shards, folder)
            stored = [self._store(key, draft, names) for key, draft in self._keyed(drafts)]
            crash_point("tier.put")
            entry = self._commit(shards, stored, marks, size)
            segments = segments_of(entry)
            self.catalog.swap(retire=names, segments=segments, owner=OWNER)
            crash_point("tier.swapped")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self.catalog.release(names, OWNER)
        self._announce(segments)
        crash_point("tier.announced")
        log.info("tier.done", day=shards[0].day, shards=len(shards), segments=len(segments), ledger_entry=entry.sequence)
        return entry

    def _claim(self, names: Sequence[str]) -> None:
        if not self.catalog.claim(names, OWNER, CLAIM_S):
            raise ConflictError("the shards are being merged", operation="tier", place=names[0], hint="try again when that is done")

    def _write(self, shards: Sequence[Shard], folder: Path) -> tuple[list[Draft], list[Any]]:
        """The segments as local files, and the marks of their producers."""
        filled = [shard for shard in shards if shard.rows]
        if not filled:
            return [], []
        expected = sum(shard.rows for shard in filled)
        staged = folder / "staged.duckdb"
        in_place = len(filled) <= ATTACHED_MAX
        if not in_place:
            with self._connected(staged) as connection:
                stage(connection, filled)
        size = sum(shard.bytes for shard in filled) if in_place else staged.stat().st_size
        crash_point("tier.staged")
        with self._reading(filled, staged) as (connection, relation):
            parts = plan_parts(connection, relation, size / expected, self.segment_bytes_max, self.segment_rows_max)
            marks = _marks(connection, relation)
        if (rows := sum(part.rows for part in parts)) != expected:
            raise CorruptStore(f"{rows} rows in shards that say {expected}", operation="tier", place=filled[0].day)
        drafts = []
        for number, part in enumerate(parts):
            with self._reading(filled, staged) as (connection, relation):
                drafts.append(write_part(connection, relation, part, folder / f"{number}.parquet"))
        crash_point("tier.written")
        staged.unlink(missing_ok=True)
        return drafts, marks

    def _connected(self, staged: Path) -> duckdb.DuckDBPyConnection:
        sql = self.settings.sql
        return duck.connect(staged, threads=sql.threads, memory_limit=f"{sql.memory_mb}MB", temp_directory=str(staged.parent))

    @contextlib.contextmanager
    def _reading(self, shards: Sequence[Shard], staged: Path) -> Iterator[tuple[duckdb.DuckDBPyConnection, str]]:
        """The rows of shards as a relation of a connection of their own: what one took of memory is given back when it closes."""
        with self._connected(staged) as connection:
            yield connection, attach(connection, shards, day=True) if len(shards) <= ATTACHED_MAX else "staged"

    def _keyed(self, drafts: Sequence[Draft]) -> Iterator[tuple[str, Draft]]:
        numbers: dict[tuple[str, str, str], int] = defaultdict(int)
        for segment in self.catalog.snapshot().segments:
            numbers[segment.tenant, segment.day, segment.retention_class] += 1
        for draft in drafts:
            place = (draft.part.tenant, draft.part.day, draft.part.retention_class)
            yield draft.key(numbers[place]), draft
            numbers[place] += 1

    def _store(self, key: str, draft: Draft, names: Sequence[str]) -> Stored:
        """Put a segment and read back what the store really holds, not the local file."""
        part = draft.part
        if not draft.path.exists():
            raise _overtaken(key)
        self.objects.create_from_file(key, draft.path, lock=self.segment_lock(part.tenant, part.retention_class, part.day))
        crash_point("tier.put_one")
        draft.path.unlink(missing_ok=True)  # who took this run for dead has cleared its scratch folder
        self._claim(names)
        try:
            content = read_content(self.objects.get(key), self.registry, sha256=draft.sha256, place=key)
        except KeyError as error:
            raise _overtaken(key) from error
        if content.rows != draft.part.rows:
            raise CorruptStore(f"{content.rows} rows came back, {draft.part.rows} were written", operation="tier", place=key)
        crash_point("tier.read_back")
        return Stored(key, draft, content)

    def segment_lock(self, tenant: str, retention_class: str, day: str) -> Lock:
        """The lock of a segment: what its policies ask for, else that of the settings."""
        own = Policies.of(self.settings).lock(tenant, retention_class, day)
        return self._lock() if own is None else own

    def _lock(self) -> Lock:
        """Retention is sent with every PUT: a store that is left to its default may keep none."""
        cold = self.settings.cold
        if cold.lock == "none":
            return NO_LOCK
        return Lock(cold.lock, clock.now() + dt.timedelta(days=cold.lock_days))

    def _commit(self, shards: Sequence[Shard], stored: Sequence[Stored], marks: Sequence[Any], size: int) -> Entry:
        """Check that the segments hold what the log held, and enter them."""
        keys = [item.key for item in stored]
        coverage = cover(self.catalog, shards, keys, [item.content for item in stored])
        manifest = self._put_coverage(shards[0].day, coverage)
        schemas = {fingerprint: self.put_schema(fingerprint) for item in stored for fingerprint in item.content.schemas}
        objects = [{"key": item.key, "bytes": item.draft.bytes, "sha256": item.draft.sha256} for item in stored]
        body = {
            "day": shards[0].day,
            "objects": [*objects, manifest, *schemas.values()],
            "segments": [segment_to_json(item, schemas) for item in stored],
            "coverage_key": manifest["key"],
            "coverage": [coverage_to_json(item) for item in coverage],
            "marks": marks,
        }
        entry = self._enter(body, [shard.name for shard in shards], size)
        crash_point("tier.committed")
        return entry

    def _enter(self, body: Mapping[str, Any], names: Sequence[str], size: int) -> Entry:
        """Append the entry while nobody has moved anything since the shards were seen: of two runs whose lock failed them one wins."""
        for _ in range(RACES_MAX):
            self._claim(names)
            crash_point("tier.before_commit")
            self.check_alone()
            try:
                return self.ledger.append(ENTRY_TYPE, body, expected=size)
            except ConflictError:
                news = list(self.ledger.entries(size))
                if any(entry.type in (ENTRY_TYPE, REWRITTEN) for entry in news):
                    hint = "try again when it is done"
                    raise ConflictError("another tiering run is at work", operation="tier", place="ledger", hint=hint) from None
                size += len(news)
        raise ConflictError("the ledger is too busy", operation="tier", place="ledger", hint="try again later")

    def _put_coverage(self, day: str, coverage: Sequence[Coverage]) -> dict[str, Any]:
        data = to_parquet(coverage)
        sha256 = hashlib.sha256(data).hexdigest()
        key = f"coverage/day={day}/{sha256[:16]}.parquet"
        self.objects.create(key, data, lock=self._lock())
        crash_point("tier.coverage_put")
        return {"key": key, "bytes": len(data), "sha256": sha256}

    def put_schema(self, fingerprint: bytes) -> dict[str, Any]:
        """Put a writer schema beside the segments, which explain themselves then; what the ledger is to say of the object.

        Raises:
            CorruptStore: another schema stands under the fingerprint.
        """
        schema = self.registry.get(fingerprint)
        key, data = schema_key(fingerprint), schema.json().encode()
        try:
            self.objects.create(key, data, lock=self._lock())
        except AlreadyExists:
            data = self.objects.get(key)
            if not says(data, schema):
                raise CorruptStore("another schema stands under this fingerprint", operation="tier", place=key) from None
        return {"key": key, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def _announce(self, segments: Sequence[Segment]) -> None:
        """Record that segments were sealed. It is told once: should the process die before, the ledger still says it."""
        if self.sink is None or not segments:
            return
        session = platform_session("lifecycle", "job:tier")
        for segment in segments:
            self.sink.record(
                session,
                SegmentSealed(
                    segment=segment.key,
                    segment_tenant=segment.tenant,
                    day=segment.day,
                    segment_class=segment.retention_class,
                    events=segment.rows,
                    bytes=segment.bytes,
                    root=segment.root,
                    ledger_entry=segment.ledger_entry,
                ),
            )

    # After a kill

    def reconcile_alone(self) -> int:
        """`reconcile` for who is alone already: one step, in which no segment shows that a later entry replaced."""
        snapshot = self.catalog.snapshot()
        known = max((segment.ledger_entry for segment in snapshot.segments), default=-1)
        entries = [entry for entry in self.ledger.entries(known + 1) if entry.type in (ENTRY_TYPE, REWRITTEN)]
        gone = {key for entry in entries if entry.type == REWRITTEN for key in entry.body["erased"]}
        segments = [segment for entry in entries for segment in segments_of(entry) if segment.key not in gone]
        retire = [segment.key for segment in snapshot.segments if segment.key in gone]
        shards = [name for entry in entries if entry.type == ENTRY_TYPE for name in self._covered(entry)]
        if shards or segments or retire:
            self.catalog.swap(retire=shards, segments=segments, retire_segments=retire, owner=OWNER)
            sealed = {entry.sequence for entry in entries if entry.type == ENTRY_TYPE}
            self._announce([segment for segment in segments if segment.ledger_entry in sealed])
        return len({segment.ledger_entry for segment in segments}) or int(bool(shards or retire))

    def _covered(self, entry: Entry) -> list[str]:
        """The hot shards whose offsets an entry covers.

        Raises:
            ConflictError: a shard holds offsets of the entry and others, so that neither can be served alone.
        """
        spans = [coverage_from_json(item) for item in entry.body["coverage"]]
        live = self.catalog.snapshot().shards
        touched = [shard for shard in live if any(_overlap(item.span, span) for item in spans for span in shard.ranges)]
        coverage = from_parquet(self.objects.get(entry.body["coverage_key"]), spans, place=entry.body["coverage_key"]) if touched else []
        covered = [shard.name for shard in touched if all(_is_covered(span, coverage) for span in shard.ranges)]
        mixed = [shard.name for shard in touched if shard.name not in covered and any(_is_covered(span, coverage) for span in shard.ranges)]
        if mixed:
            hint = "run `tokentape rebuild`: it makes the shards anew behind what is cold"
            raise ConflictError(f"shard {mixed[0]} is cold in part", operation="tier", place=entry.key, hint=hint)
        return covered


def _marks(connection: duckdb.DuckDBPyConnection, relation: str) -> list[Any]:
    """Log, partition, producer (hex), its highest number, and when the log had it (µs): by them an event that comes again is
    known when its row has long gone."""
    columns = 'log_id, "partition", lower(hex(producer_id)), max(producer_seq), epoch_us(max(appended_at))'
    return [list(row) for row in connection.execute(f"SELECT {columns} FROM {relation} GROUP BY ALL ORDER BY ALL").fetchall()]


def _runs(pid: int) -> bool:
    """Whether a process of this machine is alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _overlap(one: Range, other: Range) -> bool:
    same = (one.log_id, one.partition) == (other.log_id, other.partition)
    return same and one.offset_first < other.offset_next and other.offset_first < one.offset_next


def _is_covered(span: Range, coverage: Sequence[Coverage]) -> bool:
    """Whether a shard's range is cold. A requeued record is so only when its row is: its offset was covered before, without one."""
    if span.digest_next is None:
        return any(item.holds(span) for item in coverage)
    return any(item.contains(span) for item in coverage)


def says(data: bytes, schema: Schema) -> bool:
    """Whether a stored schema object is this schema, however it is spelled: 64 bits of fingerprint alone could be forged."""
    try:
        return Schema(json.loads(data)).sha256 == schema.sha256
    except Exception:  # whatever the parser meets in bytes that are no schema
        return False


def segment_to_json(item: Stored, schemas: Mapping[bytes, Mapping[str, Any]]) -> dict[str, Any]:
    """A segment as it stands in the ledger; `schemas` are the objects of its writer schemas."""
    part = item.draft.part
    return {
        "key": item.key,
        "sha256": item.draft.sha256,
        "bytes": item.draft.bytes,
        "rows": part.rows,
        "root": item.content.root.hex(),
        "tenant": part.tenant,
        "day": part.day,
        "retention_class": part.retention_class,
        "session_min": part.session_first.hex(),
        "session_max": part.session_last.hex(),
        "time_min": item.draft.time_min,
        "time_max": item.draft.time_max,
        "schemas": [schemas[fingerprint]["key"] for fingerprint in item.content.schemas],
        "ranges": [[span.log_id, span.partition, span.offset_first, span.offset_next] for span in spans_of(item.content)],
    }


def segments_of(entry: Entry) -> list[Segment]:
    """The segments that a ledger entry committed."""
    return [
        Segment(
            key=item["key"],
            sha256=item["sha256"],
            bytes=item["bytes"],
            rows=item["rows"],
            tenant=item["tenant"],
            day=item["day"],
            retention_class=item["retention_class"],
            session_min=bytes.fromhex(item["session_min"]),
            session_max=bytes.fromhex(item["session_max"]),
            time_min=item["time_min"],
            time_max=item["time_max"],
            ranges=tuple(Range(*span) for span in item["ranges"]),
            ledger_entry=entry.sequence,
            root=bytes.fromhex(item["root"]),
        )
        for item in entry.body["segments"]
    ]


def _overtaken(key: str) -> ConflictError:
    """Who was taken for dead, and finds that its files are gone."""
    fault = "another run took this one for dead and removed what it had written"
    return ConflictError(fault, operation="tier", place=key, hint="two schedulers work on one data folder: end one of them")
