"""The coverage manifest: every offset of a partition is in a segment, was a duplicate, or is in quarantine.

Folding the digests of a partition's records in offset order, the dropped ones included, must give the running digest
that the indexer took at ingest: then the cold rows are, byte for byte, what was in the log.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from schemas.errors import CorruptStore
from store import digest
from store.catalog import Catalog, Range, Shard
from store.cold import SegmentContent

DUPLICATE, QUARANTINED = "duplicate", "quarantined"


@dataclass(frozen=True, slots=True)
class Coverage:
    """Offsets [offset_first, offset_next) of one partition and where each is.

    `runs` are `(offset_first, count, where)`: the index of a segment of the same manifest, "duplicate" or
    "quarantined". `skipped` holds the SHA-256 (hex) of each record that has no row, by offset, so that the running
    digest can be computed again without them.
    """

    span: Range
    runs: tuple[tuple[int, int, int | str], ...]
    skipped: tuple[tuple[int, str], ...]

    def contains(self, other: Range) -> bool:
        """Whether all offsets of a range are covered."""
        mine = self.span
        same = (mine.log_id, mine.partition) == (other.log_id, other.partition)
        return same and mine.offset_first <= other.offset_first and other.offset_next <= mine.offset_next


def cover(catalog: Catalog, shards: Sequence[Shard], contents: Sequence[SegmentContent]) -> list[Coverage]:
    """Assign every offset of the shards' ranges, and check the running digest of each range against the one taken at ingest.

    Raises:
        CorruptStore: an offset that is nowhere or in two places, or a digest that differs: the rows are not what the log held.
    """
    placed: dict[tuple[str, int], dict[int, tuple[int, bytes]]] = defaultdict(dict)
    for index, content in enumerate(contents):
        for record in content.records:
            offsets = placed[record.log_id, record.partition]
            if record.offset in offsets:
                raise CorruptStore(f"offset {record.offset} of partition {record.partition} is there twice", operation="tier")
            offsets[record.offset] = (index, record.sha256)
    return [_cover(catalog, span, placed[span.log_id, span.partition]) for span in _joined(shards)]


def _cover(catalog: Catalog, span: Range, placed: dict[int, tuple[int, bytes]]) -> Coverage:
    skipped = _skipped(catalog, span)
    runs: list[tuple[int, int, int | str]] = []
    running, lost = span.digest_first, []
    for offset in range(span.offset_first, span.offset_next):
        where, sha256 = placed.get(offset) or skipped.get(offset) or (None, b"")
        if where is None:
            raise CorruptStore(f"offset {offset} of partition {span.partition} is in no segment", operation="tier", place=span.log_id)
        if offset not in placed:
            lost.append((offset, sha256.hex()))
        if runs and runs[-1][2] == where:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, where)
        else:
            runs.append((offset, 1, where))
        running = digest.extend(running, sha256) if running is not None else None
    if span.digest_next is not None and running != span.digest_next:
        raise CorruptStore(
            f"partition {span.partition}, offsets {span.offset_first} to {span.offset_next}: the rows are not the bytes that were indexed",
            operation="tier",
            place=span.log_id,
            hint="run `tokentape rebuild`, then tier again; nothing was dropped",
        )
    return Coverage(span, tuple(runs), tuple(lost))


def _skipped(catalog: Catalog, span: Range) -> dict[int, tuple[str, bytes]]:
    """Records of a range without a row: by offset, why and the SHA-256 of their bytes."""
    found: dict[int, tuple[str, bytes]] = {}
    for item in catalog.duplicates(span.log_id, span.partition, span.offset_first, span.offset_next):
        found[item.offset] = (DUPLICATE, item.sha256)
    for record in catalog.quarantine(requeued=True):
        if (record.log_id, record.partition) == (span.log_id, span.partition):
            found[record.offset] = (QUARANTINED, record.sha256)
    return found


def _joined(shards: Sequence[Shard]) -> list[Range]:
    """The shards' ranges with neighbours joined. A range that stands alone (a requeued event) has no digests and stays alone."""
    chained = sorted((span for shard in shards for span in shard.ranges), key=lambda span: (span.log_id, span.partition, span.offset_first))
    joined: list[Range] = []
    for span in chained:
        last = joined[-1] if joined else None
        if last and _continues(last, span):
            joined[-1] = Range(last.log_id, last.partition, last.offset_first, span.offset_next, last.digest_first, span.digest_next)
        else:
            joined.append(span)
    return joined


def _continues(last: Range, span: Range) -> bool:
    same = (last.log_id, last.partition, last.offset_next) == (span.log_id, span.partition, span.offset_first)
    return same and last.digest_next is not None and last.digest_next == span.digest_first


def spans_of(content: SegmentContent) -> list[Range]:
    """From the first to the last offset of each partition in a segment, without digests: what a reader prunes by."""
    offsets: dict[tuple[str, int], list[int]] = defaultdict(list)
    for record in content.records:
        offsets[record.log_id, record.partition].append(record.offset)
    return [Range(log_id, partition, min(held), max(held) + 1) for (log_id, partition), held in sorted(offsets.items())]


def coverage_to_json(item: Coverage) -> dict[str, Any]:
    """A coverage as it stands in the ledger."""
    span = item.span
    return {
        "log_id": span.log_id,
        "partition": span.partition,
        "offset_first": span.offset_first,
        "offset_next": span.offset_next,
        "digest_first": span.digest_first.hex() if span.digest_first is not None else None,
        "digest_next": span.digest_next.hex() if span.digest_next is not None else None,
        "runs": [list(run) for run in item.runs],
        "skipped": [list(record) for record in item.skipped],
    }


def coverage_from_json(item: dict[str, Any]) -> Coverage:
    """A coverage out of the ledger."""
    first, after = item["digest_first"], item["digest_next"]
    span = Range(
        item["log_id"],
        item["partition"],
        item["offset_first"],
        item["offset_next"],
        bytes.fromhex(first) if first is not None else None,
        bytes.fromhex(after) if after is not None else None,
    )
    runs = tuple((start, count, where) for start, count, where in item["runs"])
    return Coverage(span, runs, tuple((offset, sha256) for offset, sha256 in item["skipped"]))
