"""Moves closed days from hot shards into cold segments: write, check, put, read back, commit to the ledger, swap.

The order is the contract. Until the ledger entry stands the segments are orphans and hot serves the rows; the entry is
the commit point; one catalog transaction then makes readers take the segments instead of the shards. A run that was
killed anywhere is finished or repeated by the next one, which begins by `reconcile`.
"""

from __future__ import annotations

import datetime as dt
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from schemas.errors import ConflictError, CorruptStore
from schemas.events import SegmentSealed
from schemas.registry import SchemaRegistry
from schemas.settings import Settings
from schemas.sink import EventSink, platform_session
from store import duck
from store.catalog import Catalog, Range, Segment, Shard
from store.cold import Draft, SegmentContent, plan_parts, read_content, write_part
from store.coverage import Coverage, cover, coverage_from_json, coverage_to_json, spans_of
from store.crashpoints import crash_point
from store.hot import attach
from store.ledger import Entry, Ledger
from store.objects.base import NO_LOCK, Lock, ObjectStore

log = structlog.get_logger()

ENTRY_TYPE = "segments"
"""Ledger entries of this type commit segments and the coverage of the offsets that they hold."""

CLAIM_S = 3600.0
"""How long a tiering run may keep its shards from being merged."""

OWNER = "tier"
"""Who claims: one name for all runs, of which the ledger of runs lets one go at a time, so that the next finishes a killed one's work."""


@dataclass(frozen=True)
class Tiering:
    """What a tiering run works on."""

    settings: Settings
    catalog: Catalog
    objects: ObjectStore
    ledger: Ledger
    registry: SchemaRegistry
    sink: EventSink | None = None

    def run(self, *, all_days: bool = False, dry_run: bool = False) -> dict[str, Any]:
        """Tier every shard of a day older than `jobs.tier_after_days`, or of any day; what was done as a flat dict.

        Raises:
            CorruptStore: rows whose bytes are not those of the log; nothing was swapped and nothing dropped.
            ConflictError: another run has claimed the shards.
        """
        finished = 0 if dry_run else self.reconcile()
        shards = self._closed(all_days)
        summary = {"shards": len(shards), "events": sum(shard.rows for shard in shards), "finished_earlier": finished}
        if dry_run:
            return {**summary, "would_tier": [f"{shard.name}: {shard.day}, {shard.rows:,} events" for shard in shards]}
        if not shards:
            return {**summary, "segments": 0}
        names = [shard.name for shard in shards]
        if not self.catalog.claim(names, OWNER, CLAIM_S):
            raise ConflictError("the shards are being merged or tiered", operation="tier", hint="try again later")
        try:
            segments = self._tier(shards)
        finally:
            self.catalog.release(names, OWNER)
        cold = sum(segment.bytes for segment in segments)
        return {**summary, "segments": len(segments), "bytes": cold, "keys": [segment.key for segment in segments]}

    def reconcile(self) -> int:
        """Finish what earlier runs committed but did not swap; how many ledger entries that were.

        A catalog that was lost gets all its segments back this way.
        """
        known = max((segment.ledger_entry for segment in self.catalog.snapshot().segments), default=-1)
        finished = 0
        for entry in self.ledger.entries(known + 1):
            if entry.type == ENTRY_TYPE:
                self._swap(segments_of(entry), [coverage_from_json(item) for item in entry.body["coverage"]])
                finished += 1
        return finished

    def _closed(self, all_days: bool) -> list[Shard]:
        """The shards to tier. Days never run backwards along a partition, so they are the beginning of each."""
        limit = dt.datetime.now(dt.UTC) - dt.timedelta(days=self.settings.jobs.tier_after_days)
        shards = self.catalog.snapshot().shards
        return [shard for shard in shards if all_days or shard.day < limit.strftime("%Y-%m-%d")]

    def _tier(self, shards: Sequence[Shard]) -> list[Segment]:
        scratch = self.settings.data / "tmp"
        scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="tier-", dir=scratch))
        try:
            drafts = self._write(shards, folder)
            crash_point("tier.written")
            keyed = self._put(drafts)
            crash_point("tier.put")
            contents = [self._read_back(key, draft) for key, draft in keyed]
            coverage = cover(self.catalog, shards, contents)
            crash_point("tier.before_commit")
            entry = self.ledger.append(ENTRY_TYPE, self._manifest(keyed, contents, coverage))
            crash_point("tier.committed")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        segments = segments_of(entry)
        self._swap(segments, coverage)
        crash_point("tier.swapped")
        self._announce(segments)
        return segments

    def _write(self, shards: Sequence[Shard], folder: Path) -> list[Draft]:
        filled = [shard for shard in shards if shard.rows]
        if not filled:
            return []
        bytes_per_row = sum(shard.bytes for shard in filled) / sum(shard.rows for shard in filled)
        with duck.connect(threads=self.settings.sql.threads, memory_limit=f"{self.settings.sql.memory_mb}MB") as connection:
            connection.execute(f"SET temp_directory='{folder}'")
            relation = attach(connection, filled, day=True)
            parts = plan_parts(connection, relation, bytes_per_row)
            return [write_part(connection, relation, part, folder / f"{number}.parquet") for number, part in enumerate(parts)]

    def _put(self, drafts: Sequence[Draft]) -> list[tuple[str, Draft]]:
        numbers: dict[tuple[str, str, str], int] = defaultdict(int)
        for segment in self.catalog.snapshot().segments:
            numbers[segment.tenant, segment.day, segment.retention_class] += 1
        keyed = []
        for draft in drafts:
            place = (draft.part.tenant, draft.part.day, draft.part.retention_class)
            key = draft.key(numbers[place])
            numbers[place] += 1
            self.objects.create_from_file(key, draft.path, lock=self._lock())
            keyed.append((key, draft))
        return keyed

    def _lock(self) -> Lock:
        """Retention is sent with every PUT: a store that is left to its default may keep none."""
        cold = self.settings.cold
        if cold.kind == "local" or cold.lock == "none":
            return NO_LOCK
        return Lock(cold.lock, dt.datetime.now(dt.UTC) + dt.timedelta(days=cold.lock_days))

    def _read_back(self, key: str, draft: Draft) -> SegmentContent:
        """The content of what the store really holds, not of the local file."""
        content = read_content(self.objects.get(key), self.registry, sha256=draft.sha256, place=key)
        if len(content.records) != draft.part.rows:
            raise CorruptStore(f"{len(content.records)} rows came back, {draft.part.rows} were written", operation="tier", place=key)
        return content

    def _manifest(
        self, keyed: Sequence[tuple[str, Draft]], contents: Sequence[SegmentContent], coverage: Sequence[Coverage]
    ) -> dict[str, Any]:
        segments = [_segment_to_json(key, draft, content) for (key, draft), content in zip(keyed, contents, strict=True)]
        return {"segments": segments, "coverage": [coverage_to_json(item) for item in coverage]}

    def _swap(self, segments: Sequence[Segment], coverage: Sequence[Coverage]) -> None:
        """Serve the segments instead of every live shard whose offsets they cover."""
        covered = [shard.name for shard in self.catalog.snapshot().shards if _is_covered(shard, coverage)]
        self.catalog.swap(retire=covered, segments=segments, owner=OWNER)

    def _announce(self, segments: Sequence[Segment]) -> None:
        if self.sink is None:
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


def _is_covered(shard: Shard, coverage: Sequence[Coverage]) -> bool:
    """Whether every offset of a shard is in the coverage."""
    return all(any(item.contains(span) for item in coverage) for span in shard.ranges)


def _segment_to_json(key: str, draft: Draft, content: SegmentContent) -> dict[str, Any]:
    part = draft.part
    return {
        "key": key,
        "sha256": draft.sha256,
        "bytes": draft.bytes,
        "rows": part.rows,
        "root": content.root.hex(),
        "tenant": part.tenant,
        "day": part.day,
        "retention_class": part.retention_class,
        "session_min": part.session_first.hex(),
        "session_max": part.session_last.hex(),
        "time_min": draft.time_min,
        "time_max": draft.time_max,
        "schemas": content.schemas,
        "ranges": [[span.log_id, span.partition, span.offset_first, span.offset_next] for span in spans_of(content)],
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
