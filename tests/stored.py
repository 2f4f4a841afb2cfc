"""Events put into hot shards and cold segments by hand, for tests of what reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from schemas.codec import encode
from schemas.events import Event
from schemas.registry import CURRENT
from schemas.settings import Settings
from store import container, tables
from store.catalog import Catalog, Range, Segment, Shard
from store.duck import connect
from store.objects.base import ObjectStore

DAY = "2026-11-23"
LOG_ID = "log"


def insert(duck: duckdb.DuckDBPyConnection, folder: Path, events: Sequence[Event], *, offset: int, partition: int = 0) -> None:
    """Insert events into the table `events` as the indexer does, from an Avro container."""
    mark, path = os.urandom(container.MARK_BYTES), folder / "batch.avro"
    offsets = range(offset, offset + len(events))
    records = container.Records(partition, offsets, [event.recorded_at + 500 for event in events], [encode(event) for event in events])
    container.write(path, CURRENT, records, mark)
    duck.execute(f"INSERT INTO events {tables.select_container(CURRENT, LOG_ID, mark)}", [str(path)])
    path.unlink()


def put_hot(catalog: Catalog, name: str, events: Sequence[Event], *, offset: int = 0, partition: int = 0) -> Shard:
    """A sealed shard of these events, listed in the catalog."""
    catalog.shards_folder.mkdir(parents=True, exist_ok=True)
    path = catalog.shards_folder / f"{name}.duckdb"
    with connect(path, extensions=("avro",)) as duck:
        tables.create_events(duck)
        insert(duck, catalog.shards_folder, events, offset=offset, partition=partition)
    covered = _covered(events, offset, partition)
    shard = Shard(name=name, path=path, level="sealed", day=DAY, rows=len(events), bytes=path.stat().st_size, **covered)
    catalog.swap(shards=[shard])
    return shard


def put_cold(
    catalog: Catalog, objects: ObjectStore, folder: Path, events: Sequence[Event], *, tenant: str, offset: int = 0, partition: int = 0
) -> Segment:
    """A Parquet segment of these events (of one tenant), listed in the catalog."""
    path = folder / "segment.parquet"
    with connect(extensions=("avro",)) as duck:
        tables.create_events(duck)
        insert(duck, folder, events, offset=offset, partition=partition)
        order = 'ORDER BY session_id, "partition", "offset"'
        options = "FORMAT parquet, COMPRESSION zstd, PARQUET_VERSION v2, WRITE_BLOOM_FILTER false, ROW_GROUP_SIZE 20000"
        duck.execute(f"COPY (SELECT * FROM events {order}) TO '{path}' ({options})")
    data = path.read_bytes()
    path.unlink()
    digest = hashlib.sha256(data).hexdigest()
    key = f"events/tenant={tenant}/day={DAY}/standard-0-{digest[:8]}.parquet"
    objects.create(key, data)
    segment = Segment(
        key=key,
        sha256=digest,
        bytes=len(data),
        rows=len(events),
        tenant=tenant,
        day=DAY,
        retention_class="standard",
        ledger_entry=0,
        root=bytes(32),
        **_covered(events, offset, partition),
    )
    catalog.swap(segments=[segment])
    return segment


def _covered(events: Sequence[Event], offset: int, partition: int) -> dict[str, Any]:
    sessions = [event.session_id for event in events]
    times = [event.recorded_at for event in events]
    return {
        "ranges": (Range(LOG_ID, partition, offset, offset + len(events)),),
        "session_min": min(sessions),
        "session_max": max(sessions),
        "time_min": min(times),
        "time_max": max(times),
    }


def digests(settings: Settings, objects: ObjectStore) -> dict[str, str]:
    """SHA-256 of every file of the data directory's tiers and of every object."""
    files = [path for path in settings.data.rglob("*") if path.is_file() and "catalog.sqlite" not in path.name]
    found = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return found | {info.key: hashlib.sha256(objects.get(info.key)).hexdigest() for info in objects.list("")}
