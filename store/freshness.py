"""Making the index fresh for a reader: indexing here, or asking the indexers that run to seal what they have."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from schemas import clock
from schemas.errors import NewerSchema
from schemas.registry import SchemaRegistry
from schemas.settings import Settings
from store.catalog import Catalog, open_catalog
from store.fences import fence_path, is_held
from store.log.base import Log

# How often the catalog is looked at while another process seals.
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Freshness:
    """Every event acknowledged before `fresh_to` is in the catalogued shards; None while some partition has none yet.

    `complete` says whether all that the log held when the question was asked is there; `stopped` names the partitions
    that wait for a newer version of this program.
    """

    fresh_to: datetime | None
    complete: bool
    stopped: Mapping[int, NewerSchema] = field(default_factory=dict)


def ensure_fresh(
    settings: Settings, log: Log, *, timeout_s: float = 10.0, behind_max: int | None = None, registry: SchemaRegistry | None = None
) -> Freshness:
    """Bring what the log holds by now into catalogued shards, waiting up to `timeout_s` for indexers that run.

    Indexers that are more than `behind_max` events behind are not waited for. Partitions whose fence nobody holds are indexed in this
    process, however long that takes.

    Raises:
        LogUnavailable: the log does not answer.
        LogChanged: the index belongs to another log.
    """
    from store.indexer import Indexer

    catalog = open_catalog(settings.data)
    deadline = time.monotonic() + timeout_s
    asked, stopped = False, {}  # type: bool, dict[int, NewerSchema]
    before = clock.now_us()
    targets = {partition: log.bounds(partition)[1] for partition in range(log.partitions)}
    indexer = Indexer(settings, log, registry)
    while behind := {
        partition: missing for partition, missing in _behind(catalog, log.log_id, targets).items() if partition not in stopped
    }:
        if any(not is_held(fence_path(indexer.hot, partition)) for partition in behind):
            stopped |= indexer.run_once().stopped
            continue
        if behind_max is not None and sum(behind.values()) > behind_max:
            break
        if not asked:
            catalog.request_seal(targets)
            asked = True
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    # What was acknowledged before the question lies below the targets; where they are reached it is there.
    catalog.caught_up(log.log_id, {partition: (offset, before) for partition, offset in targets.items()})
    return Freshness(_fresh_to(catalog, log), not behind and not stopped, stopped)


def _behind(catalog: Catalog, log_id: str, targets: Mapping[int, int]) -> dict[int, int]:
    """Partitions that are not yet at their target, and by how many events."""
    known = {at.partition: at.offset_next for at in catalog.positions() if at.log_id == log_id}
    missing = {partition: offset - known.get(partition, -1) for partition, offset in targets.items()}
    return {partition: events for partition, events in missing.items() if events > 0}


def _fresh_to(catalog: Catalog, log: Log) -> datetime | None:
    times = [at.fresh_to for at in catalog.positions() if at.log_id == log.log_id]
    if len(times) < log.partitions:
        return None
    return datetime.fromtimestamp(min(times) / 1e6, UTC)
