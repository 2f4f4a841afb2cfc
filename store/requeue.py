"""Quarantined records tried again, once their schema is known or this program reads them."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.codec import decode_datum, kind_of
from schemas.errors import DataError, NewerSchema
from schemas.registry import SchemaRegistry
from schemas.settings import Settings
from store import tables
from store.catalog import Catalog, Mark, Quarantined, Range, Shard
from store.container import MARK_BYTES
from store.ingest_batch import Prepared, Preparer, day_of
from store.log.base import Batch
from store.sealing import remove, shard_facts
from store.tail import open_file, sync_file


@dataclass(frozen=True, slots=True)
class _Readable:
    """A quarantined record that can be read now, and the number that its producer gave it."""

    item: Quarantined
    raw: bytes
    number: Mark


def requeue(
    settings: Settings, catalog: Catalog, registry: SchemaRegistry, *, only: Collection[tuple[int, int]] | None = None
) -> dict[str, Any]:
    """Index quarantined records that can be read now, all or `only` those (partition, offset); what happened to each.

    They keep their offsets and stand in shards of their own, and the gaps that they left are closed. One whose number
    is no longer missing was sent again meanwhile; it stays where it is.

    Raises:
        StorageFull, CorruptStore: nothing was changed for the day that failed.
    """
    days: dict[tuple[str, str], list[_Readable]] = defaultdict(list)
    still: list[str] = []
    for item in catalog.quarantine():
        if only is None or (item.partition, item.offset) in only:
            found = _try(catalog, registry, item)
            if isinstance(found, _Readable):
                days[item.log_id, day_of(item.appended_at)].append(found)
            else:
                still.append(f"partition {item.partition}, offset {item.offset}: {found}")
    for (log_id, day), records in sorted(days.items()):
        _index(settings, catalog, registry, log_id, day, records)
    return {"requeued": sum(map(len, days.values())), "still": still}


def _try(catalog: Catalog, registry: SchemaRegistry, item: Quarantined) -> _Readable | str:
    """The record if it can be read now and is missing, or why not."""
    raw = catalog.quarantined_bytes(item.log_id, item.partition, item.offset)
    try:
        datum, schema = decode_datum(raw, registry)
        tables.check_columns(schema)
        kind_of(datum, schema)
    except (DataError, NewerSchema) as error:
        return str(error)
    number = Mark(item.log_id, item.partition, datum["producer_id"], datum["producer_seq"], item.appended_at)
    missing = any(
        gap.producer_id == number.producer_id and gap.seq_first <= number.seq <= gap.seq_last
        for gap in catalog.gaps(log_id=item.log_id, partition=item.partition)
    )
    unseen = number.seq > catalog.marks(item.log_id, item.partition).get(number.producer_id, -1)
    return _Readable(item, raw, number) if missing or unseen else "it was sent again and is indexed"


def _index(settings: Settings, catalog: Catalog, registry: SchemaRegistry, log_id: str, day: str, records: list[_Readable]) -> None:
    """Write a shard of these records and list it."""
    name = f"requeued-{secrets.token_hex(8)}"
    mark = secrets.token_bytes(MARK_BYTES)
    scratch = settings.data / "tmp" / name
    preparer = Preparer(registry, scratch, mark, max(len(record.raw) for record in records))
    prepared = [_prepared(preparer, record, day) for record in records]
    target = catalog.shards_folder / f"{name}.duckdb"
    draft = target.with_name(target.name + ".merging")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        facts = _fill(draft, name, day, log_id, prepared, mark)
        sync_file(draft)
        draft.rename(target)
        sync_file(target.parent)
    finally:
        remove(draft)
        preparer.discard(prepared)
        scratch.rmdir()
    ranges = tuple(Range(log_id, record.item.partition, record.item.offset, record.item.offset + 1) for record in records)
    shard = Shard(name, target, "sealed", day, ranges, *facts, target.stat().st_size)
    catalog.register_requeued(shard, [record.number for record in records])


def _prepared(preparer: Preparer, record: _Readable, day: str) -> Prepared:
    item = record.item
    parts, _ = preparer.prepare(Batch(item.partition, item.offset, [item.appended_at], [record.raw]), day)
    return parts[0]


def _fill(draft: Path, name: str, day: str, log_id: str, prepared: list[Prepared], mark: bytes) -> tuple[bytes, bytes, int, int, int]:
    with open_file(draft) as connection:
        connection.execute(tables.STATE_TABLES[0])
        connection.execute("INSERT INTO meta VALUES (?, 'requeued', ?, ?)", [name, day, log_id])
        for group in (group for item in prepared for group in item.groups):
            tables.create_table(connection, group.kind)
            select = tables.select_container(group.schema, log_id, mark, kind=group.kind)
            connection.execute(f"INSERT INTO {tables.table_of(group.kind)} {select}", [[str(group.path)]])
        tables.finish(connection)
        facts = shard_facts(connection, "events")
        connection.execute("CHECKPOINT")
    if facts[4] != len(prepared):
        remove(draft)
        raise DataError(f"{len(prepared) - facts[4]} records decode singly, but DuckDB does not read them", operation="requeue")
    return facts
