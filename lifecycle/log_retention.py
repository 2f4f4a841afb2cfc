"""Records leave the embedded log once they are cold and old enough; Kafka does that by itself (`retention.ms`)."""

from __future__ import annotations

from schemas import clock
from schemas.settings import Settings
from store.catalog import Catalog
from store.log.base import Log
from store.log.embedded import EmbeddedLog

_DAY_US = 86_400_000_000


def trim(settings: Settings, log: Log, catalog: Catalog) -> int:
    """Forget records older than `log.retention_days` that no hot shard needs any more; how many.

    Raises:
        LogUnavailable: the log does not answer.
    """
    if not isinstance(log, EmbeddedLog):
        return 0
    limit = clock.now_us() - int(settings.log.retention_days * _DAY_US)
    count = 0
    for partition, end in cold_to(log, catalog).items():
        first, _ = log.bounds(partition)
        place = first_after(log, partition, first, end, limit)
        if place > first:
            log.trim(partition, place)
            count += place - first
    return count


def cold_to(log: Log, catalog: Catalog) -> dict[int, int]:
    """Up to which offset each partition is in the cold tier and nowhere else but in the log."""
    snapshot = catalog.snapshot()
    found = {at.partition: at.offset_next for at in catalog.positions() if at.log_id == log.log_id}
    for span in (span for shard in snapshot.shards for span in shard.ranges):
        if span.log_id == log.log_id and span.partition in found:
            found[span.partition] = min(found[span.partition], span.offset_first)
    return found


def first_after(log: Log, partition: int, first: int, end: int, limit: int) -> int:
    """The first offset from `first` on whose record was appended after `limit` (µs); `end` where there is none before it."""
    while first < end:
        middle = (first + end) // 2
        if log.read(partition, middle, limit=1).appended_at[0] > limit:
            end = middle
        else:
            first = middle + 1
    return first
