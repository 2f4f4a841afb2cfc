"""Merging: many small sealed shards become few large ones, whose rows are sorted by session.

A merged file is written under another name, renamed, and then takes the place of its parts in one transaction of the
catalog. The parts stay on disk for a grace period, for readers that took their snapshot before.
"""

from __future__ import annotations

import os
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import structlog

from schemas import clock
from schemas.errors import ConflictError
from schemas.settings import Settings
from store import duck, tables
from store.catalog import Catalog, Level, Range, Shard
from store.crashpoints import crash_point
from store.fences import FileLock
from store.hot import attach
from store.sealing import remove, shard_facts
from store.tail import sync_file

log = structlog.get_logger("tokentape.merge")

# Shards of one size class are merged once there are so many: each row is then rewritten once per class.
_FAN_IN = 8
# Size classes grow by this factor; the smallest holds shards up to this many rows.
_CLASS_ROWS = 10_000
# A shard of more rows than this is not merged any more.
_ROWS_MAX = 50_000_000
# Longer than any query may take by default, so that no reader loses a file under its hands.
_GRACE_S = 300.0
# How long a merge may keep its shards from being tiered.
_CLAIM_S = 3600.0
# Who claims: one name for all merges, of which a lock lets one go at a time, so that the next frees what a killed one held.
_OWNER = "merge"
_MEMORY = "2GB"
# Small enough that a look-up of one session reads little, large enough to compress.
_ROW_GROUP = 32_768
# Merged shards below this have one wide table only: their number counts in every query, their size does not.
_NARROW_ROWS_MIN = 50_000


@dataclass(frozen=True, slots=True)
class Plan:
    """Shards of one day to merge, and what they become."""

    day: str
    level: Level
    shards: tuple[Shard, ...]


def merge(settings: Settings, catalog: Catalog, *, dry_run: bool = False, grace_s: float = _GRACE_S) -> dict[str, Any]:
    """Merge what is worth it and delete what was retired more than `grace_s` ago; what was done as a flat dict.

    Raises:
        CorruptStore: a shard cannot be read. StorageFull: no room; nothing was changed.
    """
    plans = plan(catalog, clock.now().strftime("%Y-%m-%d"))
    summary: dict[str, Any] = {"merges": len(plans), "shards": sum(len(item.shards) for item in plans)}
    summary["events"] = sum(shard.rows for item in plans for shard in item.shards)
    expired = _expired(catalog, grace_s)
    if dry_run:
        would = [f"{item.day}: {len(item.shards)} shards into one {item.level} shard" for item in plans]
        return {**summary, "would_merge": would, "would_delete": [shard.name for shard in expired]}
    lock = FileLock.take(catalog.path.parent / "fences" / "merge.lock", secrets.token_hex(8))
    if lock is None:
        return {"merges": 0, "shards": 0, "events": 0, "deleted": 0, "busy": 1}
    try:
        catalog.release([name for name, owner in catalog.claimed().items() if owner == _OWNER], _OWNER)
        _sweep(catalog)
        done = [merged for item in plans if (merged := _merge(settings, catalog, item)) is not None]
        _delete(catalog, expired)
    finally:
        lock.release()
    return {**summary, "merges": len(done), "deleted": len(expired)}


def plan(catalog: Catalog, today: str) -> list[Plan]:
    """What is worth merging: a day that is over becomes one shard, else whatever has enough company of its size."""
    open_from = min([at.day for at in catalog.positions() if at.day] + [today])
    claimed = {name for name, owner in catalog.claimed().items() if owner != _OWNER}
    days: dict[str, list[Shard]] = defaultdict(list)
    for shard in catalog.snapshot().shards:
        if shard.name not in claimed and shard.rows < _ROWS_MAX:
            days[shard.day].append(shard)
    plans = []
    for day, shards in sorted(days.items()):
        if day < open_from and len(shards) > 1:
            plans.append(Plan(day, "day", tuple(shards)))
        elif day >= open_from:
            plans += [Plan(day, "hour", tuple(group)) for group in _classes(shards) if len(group) >= _FAN_IN]
    return plans


def _classes(shards: Sequence[Shard]) -> list[list[Shard]]:
    """Shards by size class."""
    found: dict[int, list[Shard]] = defaultdict(list)
    for shard in shards:
        size, limit = 0, _CLASS_ROWS
        while shard.rows > limit:
            size, limit = size + 1, limit * _FAN_IN
        found[size].append(shard)
    return list(found.values())


def _merge(settings: Settings, catalog: Catalog, item: Plan) -> Shard | None:
    """Carry out one plan; None when somebody else has claimed its shards meanwhile."""
    names = [shard.name for shard in item.shards]
    if not catalog.claim(names, _OWNER, _CLAIM_S):
        return None
    try:
        merged = _write(settings, catalog, item)
        crash_point("merge.before_swap")
        catalog.swap(retire=names, shards=[merged], owner=_OWNER)
        crash_point("merge.swapped")
    except ConflictError:
        return None
    finally:
        catalog.release(names, _OWNER)
    log.info("merge.done", shard=merged.name, parts=len(names), rows=merged.rows)
    return merged


def _write(settings: Settings, catalog: Catalog, item: Plan) -> Shard:
    name = f"{item.level}-{item.day}-{secrets.token_hex(6)}"
    target = catalog.shards_folder / f"{name}.duckdb"
    draft = target.with_name(target.name + ".merging")
    scratch = settings.data / "tmp" / f"merge-{os.getpid()}"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        facts = _fill(draft, name, item, scratch)
    except duckdb.Error as problem:
        remove(draft)
        raise duck.mapped(problem, operation="merge", place=str(draft)) from problem
    finally:
        for path in scratch.glob("*"):
            path.unlink(missing_ok=True)
        scratch.rmdir()
    sync_file(draft)
    crash_point("merge.before_rename")
    draft.rename(target)
    sync_file(target.parent)
    return Shard(name, target, item.level, item.day, joined(item.shards), *facts, target.stat().st_size)


def _fill(draft: Path, name: str, item: Plan, scratch: Path) -> tuple[bytes, bytes, int, int, int]:
    """Write the rows in the order of session, partition and offset; facts about them for the catalog."""
    expected = sum(shard.rows for shard in item.shards)
    with duck.connect(threads=2, memory_limit=_MEMORY, temp_directory=str(scratch)) as connection:
        relation = attach(connection, [shard for shard in item.shards if shard.rows])
        use_new(connection, draft)
        connection.execute(tables.STATE_TABLES[0])
        connection.execute("INSERT INTO meta VALUES (?, ?, ?, '')", [name, item.level, item.day])
        lay_out(connection, relation, expected)
        facts = shard_facts(connection, "events")
        if facts[4] != expected:
            raise duckdb.Error(f"{facts[4]} rows of {expected} arrived")
        connection.execute("CHECKPOINT")
        connection.execute("USE memory")
        connection.execute("DETACH merged")
    return facts


def use_new(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Make a merged shard's file and use it, under the name `merged`."""
    connection.execute("ATTACH '{}' AS merged (ROW_GROUP_SIZE {})".format(str(path.absolute()).replace("'", "''"), _ROW_GROUP))
    connection.execute("USE merged")


def lay_out(connection: duckdb.DuckDBPyConnection, relation: str, rows: int) -> None:
    """Write a relation of so many rows into the tables of a merged shard, in the order of session, partition and offset."""
    narrow = tables.NARROW if rows >= _NARROW_ROWS_MIN else ()
    for kind in (*narrow, None):
        tables.create_table(connection, kind)
        columns = ", ".join(f'"{column}"' for column in tables.table_columns(kind))
        chosen = f"SELECT {columns} FROM {relation} WHERE {_belongs(kind, narrow)}"
        connection.execute(f'INSERT INTO {tables.table_of(kind)} {chosen} ORDER BY session_id, "partition", "offset"')
    tables.finish(connection)


def _belongs(kind: str | None, narrow: Sequence[str]) -> str:
    """Condition on the rows of one table."""
    if kind is not None:
        return f"kind = '{kind}'"
    return " AND ".join(["true", *(f"kind <> '{other}'" for other in narrow)])


def joined(shards: Sequence[Shard]) -> tuple[Range, ...]:
    """The ranges of shards, neighbours that continue one another joined into one."""
    spans = sorted((span for shard in shards for span in shard.ranges), key=lambda span: (span.log_id, span.partition, span.offset_first))
    found: list[Range] = []
    for span in spans:
        last = found[-1] if found else None
        if last is not None and _continues(last, span):
            found[-1] = Range(last.log_id, last.partition, last.offset_first, span.offset_next, last.digest_first, span.digest_next)
        else:
            found.append(span)
    return tuple(found)


def _continues(last: Range, span: Range) -> bool:
    same = (last.log_id, last.partition, last.offset_next) == (span.log_id, span.partition, span.offset_first)
    return same and last.digest_next is not None and last.digest_next == span.digest_first


def delete_retired(catalog: Catalog) -> int:
    """Delete every retired shard now, whoever may still read it: an erasure cannot wait. How many there were."""
    retired = _expired(catalog, 0)
    _delete(catalog, retired)
    return len(retired)


def _expired(catalog: Catalog, grace_s: float) -> list[Shard]:
    limit = clock.now_us() - int(grace_s * 1e6)
    return [shard for shard, retired_at in catalog.shards(retired=True) if 0 < retired_at <= limit]


def _delete(catalog: Catalog, shards: Sequence[Shard]) -> None:
    """Files first: a name in the catalog without a file is deleted again, a file without a name would be taken for an orphan."""
    for shard in shards:
        remove(shard.path)
        crash_point("merge.deleted")
    catalog.forget([shard.name for shard in shards])


def _sweep(catalog: Catalog) -> None:
    """Remove what killed merges left: drafts, and renamed files that never took their place."""
    for path in catalog.shards_folder.glob("*.merging*"):
        path.unlink(missing_ok=True)
    for level in ("hour", "day"):
        for path in catalog.shards_folder.glob(f"{level}-*.duckdb"):
            if not catalog.knows(path.stem):
                remove(path)
