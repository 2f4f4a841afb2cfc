"""Making the hot index anew: from the log, behind what the cold tier holds already, with the same digests.

The new shards are made beside the old ones and take their place in one transaction of the catalog, so readers see the
old index or the new one, and a process killed in between leaves the old one.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from schemas.errors import ConflictError, Fenced, TokentapeError
from schemas.registry import SchemaRegistry
from schemas.settings import Settings
from store import duck
from store.catalog import Catalog, Mark, Position, Range, Sealed, Shard
from store.coverage import coverage_from_json
from store.crashpoints import crash_point
from store.fences import FileLock, fence_path, tier_lock_path, waiting
from store.indexer import Indexed, Indexer
from store.ingest_batch import day_of
from store.ledger import open_ledger
from store.log.base import Log
from store.objects.base import ObjectStore
from store.sealing import NO_SESSION, recover
from store.tail import sync_file

# How long a presigned address of a segment must last: one scan of three columns.
_URL_S = 3600


@dataclass(frozen=True, slots=True)
class Cold:
    """What the cold tier holds: ranges of offsets with running digests, the keys of its segments, and what its producers sent.

    `marks` has log, partition, producer (hex), highest number and its append time (µs): rows may have gone since, and entries
    of earlier versions have none, so the segments that are left are asked as well.
    """

    ranges: tuple[Range, ...] = ()
    keys: tuple[str, ...] = ()
    marks: tuple[tuple[str, int, str, int, int], ...] = ()


def rebuild(
    settings: Settings,
    log: Log,
    objects: ObjectStore,
    catalog: Catalog,
    *,
    registry: SchemaRegistry | None = None,
    cold: Cold | None = None,
) -> dict[str, Any]:
    """Make hot anew; what came of it as a flat dict, in which `differ` lists partitions whose digest is not what it was.

    Offsets that the cold tier covers are not read again: `cold` says which, by default the ledger's manifests do.
    Shards of an earlier log, which nobody can read again, stay.

    Raises:
        Fenced: an indexer runs, or a lock was taken away meanwhile.
        ConflictError: tiering, retention or an erasure is at work.
        LogChanged: the log no longer holds the first offset that cold does not cover.
        LogUnavailable, StoreUnavailable: a part does not answer; the old index stands.
        CorruptStore: a segment cannot be read; the old index stands.
    """
    token = f"rebuild-{secrets.token_hex(4)}"
    folder = settings.data / "hot.rebuild"
    with _all_locks(catalog.path.parent, log.partitions, token) as locks:
        with contextlib.suppress(TokentapeError):
            recover(catalog.path.parent, catalog, token)
        shutil.rmtree(folder, ignore_errors=True)
        before = {at.partition: at for at in catalog.positions() if at.log_id == log.log_id}
        starts = _seed(folder, catalog, log.log_id, objects, read_cold(settings, objects) if cold is None else cold)
        compared = {partition: at for partition, at in before.items() if at.offset_next >= _start(starts, partition)}
        done, differ = _index(settings, log, registry, folder, compared)
        crash_point("rebuild.indexed")
        with waiting(catalog.path.parent / "fences" / "recover.lock", token):
            _move_in(folder, catalog, locks)
        shutil.rmtree(folder, ignore_errors=True)
    summary = {"events": done.rows, "shards": done.shards, "duplicates": done.duplicates, "quarantined": done.quarantined}
    return {**summary, "digests_equal": len(compared) - len(differ), "differ": differ}


def read_cold(settings: Settings, objects: ObjectStore) -> Cold:
    """What the ledger's manifests say that the cold tier holds.

    Raises:
        ProofError: the ledger is not intact. StoreUnavailable: the store does not answer.
    """
    entries = [entry for entry in open_ledger(settings, objects).entries() if entry.type in ("segments", "rewritten")]
    ranges = [coverage_from_json(item).span for entry in entries for item in entry.body.get("coverage", ())]
    gone = {key for entry in entries for key in entry.body.get("erased", ())}
    keys = [item["key"] for entry in entries for item in entry.body["segments"]]
    marks = [tuple(mark) for entry in entries for mark in entry.body.get("marks", ())]
    return Cold(tuple(ranges), tuple(key for key in keys if key not in gone), tuple(marks))


@contextlib.contextmanager
def _all_locks(hot: Path, partitions: int, token: str) -> Iterator[list[FileLock]]:
    """The fences of all partitions, and the lock of tiering: what is cold must not change while it is decided what is hot."""
    with contextlib.ExitStack() as stack:
        tiering = FileLock.take(tier_lock_path(hot), token)
        if tiering is None:
            raise ConflictError("tiering or retention is at work", operation="rebuild", place=str(hot), hint="try again when it is done")
        stack.callback(tiering.release)
        locks = [tiering]
        for partition in range(partitions):
            fence = FileLock.take(fence_path(hot, partition), token)
            if fence is None:
                hint = "stop the indexers (`tokentape up`), then rebuild"
                raise Fenced(f"an indexer holds partition {partition}", operation="rebuild", place=str(hot), hint=hint)
            stack.callback(fence.release)
            locks.append(fence)
        yield locks


def _starts(coverage: Sequence[Range], log_id: str) -> dict[int, Range]:
    """Last covered range of each partition of this log: hot begins behind it. Ranges without digests stand alone and do not count."""
    found: dict[int, Range] = {}
    for span in coverage:
        if span.log_id == log_id and span.digest_next is not None and span.offset_next > _start(found, span.partition):
            found[span.partition] = span
    return found


def _start(starts: Mapping[int, Range], partition: int) -> int:
    return starts[partition].offset_next if partition in starts else 0


def _seed(folder: Path, catalog: Catalog, log_id: str, objects: ObjectStore, cold: Cold) -> dict[int, Range]:
    """A new catalog that stands behind what cold covers; where each covered partition begins."""
    anew = Catalog(folder / "catalog.sqlite")
    anew.shards_folder.mkdir(parents=True, exist_ok=True)
    starts = _starts(cold.ranges, log_id)
    if starts:
        entered = [(partition, bytes.fromhex(producer), *rest) for log, partition, producer, *rest in cold.marks if log == log_id]
        anew.restore(_known(catalog, log_id, starts, [*entered, *_marks(objects, cold.keys, log_id)]))
    anew.close()
    return starts


def _known(catalog: Catalog, log_id: str, starts: Mapping[int, Range], marks: Sequence[tuple[Any, ...]]) -> Sealed:
    """What is known of the records that cold covers, as a shard without rows."""
    old = {at.partition: at for at in catalog.positions() if at.log_id == log_id}
    last = {partition: max((row[3] for row in marks if row[0] == partition), default=0) for partition in starts}
    days = {partition: _day(last[partition]) for partition in starts}
    positions = [
        Position(log_id, p, span.offset_next, span.digest_next or b"", days[p], last[p], 0, *_counts(catalog, log_id, p, span, old))
        for p, span in starts.items()
    ]
    below = {partition: span.offset_next for partition, span in starts.items()}
    quarantined = [item for item in catalog.quarantine() if item.log_id == log_id and item.offset < below.get(item.partition, 0)]
    return Sealed(
        Shard("", Path(), "sealed", "", (), *NO_SESSION, 0, 0, 0, 0),
        tuple(positions),
        tuple(Mark(log_id, partition, producer, seq) for partition, producer, seq, _ in marks),
        (),
        tuple(gap for gap in catalog.gaps(log_id=log_id) if gap.kind == "jump" and gap.offset < below.get(gap.partition, 0)),
        tuple(item for p, span in starts.items() for item in catalog.duplicates(log_id, p, 0, span.offset_next)),
        tuple(quarantined),
        tuple(catalog.quarantined_bytes(item.log_id, item.partition, item.offset) for item in quarantined),
    )


def _counts(catalog: Catalog, log_id: str, partition: int, span: Range, old: Mapping[int, Position]) -> tuple[int, int]:
    """Duplicates and quarantined records below a range's end."""
    if partition not in old:
        return 0, 0
    below = [item for item in catalog.quarantine(requeued=True) if (item.log_id, item.partition) == (log_id, partition)]
    quarantined = sum(item.offset < span.offset_next for item in below)
    return len(catalog.duplicates(log_id, partition, 0, span.offset_next)), quarantined


def _day(appended_at: int) -> str:
    return day_of(appended_at) if appended_at else ""


def _marks(objects: ObjectStore, keys: Sequence[str], log_id: str) -> list[tuple[Any, ...]]:
    """Partition, producer, highest number and last append time (µs) of what the segments hold."""
    if not keys:
        return []
    urls = [objects.read_url(key, expires_s=_URL_S) for key in keys]
    extensions = ("httpfs",) if any(url.startswith("http") for url in urls) else ()
    with duck.connect(extensions=extensions, threads=2) as connection:
        try:
            return connection.execute(
                'SELECT "partition", producer_id, max(producer_seq), epoch_us(max(appended_at)) FROM'
                " read_parquet(?, hive_partitioning = false, union_by_name = true) WHERE log_id = ? GROUP BY ALL",
                [urls, log_id],
            ).fetchall()
        except duckdb.Error as problem:
            raise duck.mapped(problem, operation="rebuild", place="events/") from problem


def _index(
    settings: Settings, log: Log, registry: SchemaRegistry | None, folder: Path, before: Mapping[int, Position]
) -> tuple[Indexed, list[str]]:
    """Index up to where the old index stood, compare the digests, then on to the end."""
    indexer = Indexer(settings, log, registry, hot=folder)
    done = indexer.run_once(until={partition: at.offset_next for partition, at in before.items()}) if before else Indexed()
    now = {at.partition: at for at in indexer.catalog.positions() if at.log_id == log.log_id}
    differ = [
        f"partition {partition} up to offset {at.offset_next}: the records are not those that were indexed before"
        for partition, at in sorted(before.items())
        if partition not in now or (now[partition].offset_next, now[partition].digest) != (at.offset_next, at.digest)
    ]
    rest = indexer.run_once()
    for name in ("rows", "duplicates", "quarantined", "lost", "shards"):
        setattr(rest, name, getattr(rest, name) + getattr(done, name))
    indexer.catalog.close()
    return rest, differ


def _move_in(folder: Path, catalog: Catalog, locks: Sequence[FileLock]) -> None:
    """Put the new shards beside the old ones, then let the catalog name them instead, if nobody came between."""
    catalog.shards_folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((folder / "shards").glob("*.duckdb")):
        path.replace(catalog.shards_folder / path.name)
    sync_file(catalog.shards_folder)
    crash_point("rebuild.before_replace")
    for lock in locks:
        lock.check()
    catalog.replace(folder / "catalog.sqlite")
    crash_point("rebuild.replaced")
