"""Events put into hot shards and cold segments by hand, for tests of what reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from schemas.codec import encode, zigzag
from schemas.events import Event
from schemas.registry import CURRENT, HEADER_BYTES, Schema
from schemas.settings import Settings
from store.catalog import Catalog, Range, Segment, Shard
from store.columns import LOG_COLUMNS, current_columns
from store.duck import connect
from store.objects.base import ObjectStore

DAY = "2026-11-23"
LOG_ID = "log"
APPENDED = 1_795_442_800_000_000


def insert(
    duck: duckdb.DuckDBPyConnection,
    folder: Path,
    framed: Sequence[bytes],
    *,
    offset: int = 0,
    partition: int = 0,
    appended_at: int = 0,
    schema: Schema = CURRENT,
    log_id: str = LOG_ID,
) -> None:
    """Insert framed events, one offset and one µs of append time after the other, into `events` with DuckDB's Avro reader."""
    path = folder / "batch.avro"
    path.write_bytes(_container(schema, framed))
    have = {field["name"] for field in schema.definition["fields"]}
    own = {name: kind for name, kind in current_columns().items() if name not in LOG_COLUMNS}
    columns = ", ".join(f'CAST({name if name in have else "NULL"} AS {kind}) AS "{name}"' for name, kind in own.items())
    kinds = " ".join(f"WHEN {kind} IS NOT NULL THEN '{kind}'" for kind in schema.kinds)
    definition = ", ".join(f'"{name}" {kind}' for name, kind in current_columns().items())
    duck.execute(f"CREATE TABLE IF NOT EXISTS events ({definition})")
    duck.execute(
        f"INSERT INTO events SELECT CASE {kinds} END, '{log_id}', {partition}, {offset} + i, make_timestamp({appended_at} + i),"
        f" unhex('{schema.fingerprint.hex()}'), {columns}"
        f" FROM (SELECT *, row_number() OVER () - 1 AS i FROM read_avro('{path}')) ORDER BY i"
    )
    path.unlink()


def _container(schema: Schema, framed: Sequence[bytes]) -> bytes:
    """An Avro object container file of one block."""
    meta = {"avro.schema": json.dumps(schema.definition).encode(), "avro.codec": b"null"}
    pairs = b"".join(zigzag(len(key)) + key.encode() + zigzag(len(value)) + value for key, value in meta.items())
    body = b"".join(raw[HEADER_BYTES:] for raw in framed)
    sync = bytes(16)
    return b"Obj\x01" + zigzag(len(meta)) + pairs + b"\0" + sync + zigzag(len(framed)) + zigzag(len(body)) + body + sync


def put_hot(catalog: Catalog, name: str, events: Sequence[Event], *, offset: int = 0, partition: int = 0) -> Shard:
    """A sealed shard of these events, listed in the catalog."""
    catalog.shards_folder.mkdir(parents=True, exist_ok=True)
    path = catalog.shards_folder / f"{name}.duckdb"
    with connect(path, extensions=("avro",)) as duck:
        insert(duck, catalog.shards_folder, [encode(event) for event in events], offset=offset, partition=partition, appended_at=APPENDED)
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
        insert(duck, folder, [encode(event) for event in events], offset=offset, partition=partition, appended_at=APPENDED)
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
