"""The coverage manifest: every offset of a partition is in a segment, was a duplicate, or is in quarantine.

Folding the digests of a partition's records in offset order, the dropped ones included, must give the running digest
that the indexer took at ingest: then the cold rows are, byte for byte, what was in the log. Which offset is where stands
in a Parquet object of its own, a row per run of offsets; the ledger entry names it and holds the spans and their digests.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import CorruptStore
from store import digest
from store.catalog import Catalog, Range, Shard
from store.cold import Held, SegmentContent
from store.merge import joined

DUPLICATE, QUARANTINED = "duplicate", "quarantined"
"""Where a record without a row is: it was sent twice, or it could not be read."""

_SCHEMA = pa.schema(
    [
        pa.field("log_id", pa.string(), nullable=False),
        pa.field("partition", pa.int32(), nullable=False),
        pa.field("offset_first", pa.int64(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("place", pa.string(), nullable=False),
        pa.field("sha256", pa.binary()),
    ]
)
"""`place` is the key of a segment, "duplicate" or "quarantined"; `sha256` is of a record without a row, whose count is 1."""

_Where = tuple[str, int]
"""A partition: log id and number."""


@dataclass(frozen=True, slots=True)
class Run:
    """Offsets [offset_first, offset_first + count) and where all of them are; `sha256` of the one record that has no row."""

    offset_first: int
    count: int
    place: str
    sha256: bytes | None = None


@dataclass(frozen=True, slots=True)
class Coverage:
    """Offsets [offset_first, offset_next) of one partition and where each is; without `runs` as far as only the span matters."""

    span: Range
    runs: tuple[Run, ...] = field(default=(), repr=False)

    def contains(self, other: Range) -> bool:
        """Whether all offsets of a range are covered."""
        mine = self.span
        same = (mine.log_id, mine.partition) == (other.log_id, other.partition)
        return same and mine.offset_first <= other.offset_first and other.offset_next <= mine.offset_next

    def holds(self, other: Range) -> bool:
        """Whether each offset of a range has a row in a segment."""
        inside = [run for run in self.runs if run.offset_first < other.offset_next and other.offset_first < run.offset_first + run.count]
        return self.contains(other) and all(run.sha256 is None for run in inside)


@dataclass(frozen=True, slots=True)
class Placed:
    """Every record of one partition that some segments hold, in offset order; `places` are indexes into a list of segments."""

    offsets: np.ndarray[Any, np.dtype[np.int64]]
    hashes: np.ndarray[Any, np.dtype[np.uint8]]
    places: np.ndarray[Any, np.dtype[np.int64]]

    def between(self, span: Range) -> Placed:
        """Those in a range."""
        low, high = np.searchsorted(self.offsets, [span.offset_first, span.offset_next])
        return Placed(self.offsets[low:high], self.hashes[low:high], self.places[low:high])


NONE_PLACED = Placed(np.empty(0, np.int64), np.empty((0, 32), np.uint8), np.empty(0, np.int64))


def place(contents: Sequence[SegmentContent]) -> dict[_Where, Placed]:
    """The records of segments by partition.

    Raises:
        CorruptStore: an offset has two rows.
    """
    parts: dict[_Where, list[tuple[int, Held]]] = defaultdict(list)
    for index, content in enumerate(contents):
        for held in content.held:
            parts[held.log_id, held.partition].append((index, held))
    return {where: _placed(where, items) for where, items in parts.items()}


def _placed(where: _Where, items: Sequence[tuple[int, Held]]) -> Placed:
    offsets = np.concatenate([held.offsets for _, held in items])
    order = np.argsort(offsets, kind="stable")
    offsets = offsets[order]
    twice = offsets[1:][offsets[1:] == offsets[:-1]]
    if len(twice):
        raise CorruptStore(f"offset {twice[0]} of partition {where[1]} is there twice", operation="cover", place=where[0])
    places = np.concatenate([np.full(len(held.offsets), index, np.int64) for index, held in items])
    return Placed(offsets, np.concatenate([held.hashes for _, held in items])[order], places[order])


def cover(catalog: Catalog, shards: Sequence[Shard], keys: Sequence[str], contents: Sequence[SegmentContent]) -> list[Coverage]:
    """Assign every offset of the shards' ranges to one of the segments `keys`, or to what is known to have no row.

    Raises:
        CorruptStore: an offset that is nowhere or in two places, or rows that are not the bytes that were indexed.
    """
    placed = place(contents)
    spans = _spans(shards)
    covered = [_cover(span, placed.get((span.log_id, span.partition), NONE_PLACED), _skipped(catalog, span), keys) for span in spans]
    total = sum(sum(run.count for run in item.runs if run.sha256 is None) for item in covered)
    if total != sum(content.rows for content in contents):
        raise CorruptStore("the segments hold rows that no shard's range covers", operation="cover", place=", ".join(keys[:1]))
    return covered


def _spans(shards: Sequence[Shard]) -> list[Range]:
    """The shards' ranges, neighbours joined; a requeued record inside a range that is tiered with it is no range of its own."""
    spans = joined(shards)
    chained = [Coverage(span) for span in spans if span.digest_next is not None]
    return [span for span in spans if span.digest_next is not None or not any(item.contains(span) for item in chained)]


def _cover(span: Range, placed: Placed, skipped: Mapping[int, tuple[str, bytes]], keys: Sequence[str]) -> Coverage:
    mine = placed.between(span)
    rows = set(mine.offsets.tolist()) if skipped else set()
    lost = {offset: item for offset, item in skipped.items() if offset not in rows}
    _check_complete(span, mine.offsets, lost)
    running = fold(span, mine, {offset: sha256 for offset, (_, sha256) in lost.items()})
    if span.digest_next is not None and running != span.digest_next:
        raise CorruptStore(
            f"partition {span.partition}, offsets {span.offset_first} to {span.offset_next}: the rows are not the bytes that were indexed",
            operation="cover",
            place=span.log_id,
            hint="run `tokentape rebuild`, then tier again; nothing was dropped",
        )
    runs = [*_runs(mine, keys), *(Run(offset, 1, why, sha256) for offset, (why, sha256) in lost.items())]
    return Coverage(span, tuple(sorted(runs, key=lambda run: run.offset_first)))


def _check_complete(span: Range, offsets: np.ndarray[Any, Any], lost: Mapping[int, Any]) -> None:
    if len(offsets) + len(lost) == span.offset_next - span.offset_first:
        return
    known = np.union1d(offsets, np.fromiter(lost, np.int64, len(lost)))
    missing = np.setdiff1d(np.arange(span.offset_first, span.offset_next), known)
    raise CorruptStore(
        f"offset {missing[0]} of partition {span.partition} is in no segment ({len(missing)} are missing)",
        operation="cover",
        place=span.log_id,
        hint="run `tokentape rebuild`, then tier again; nothing was dropped",
    )


def _runs(placed: Placed, keys: Sequence[str]) -> Iterable[Run]:
    """Neighbouring offsets in one segment as one run."""
    if not len(placed.offsets):
        return
    cuts = np.flatnonzero((np.diff(placed.offsets) != 1) | (np.diff(placed.places) != 0)) + 1
    starts = np.concatenate(([0], cuts)).tolist()
    stops = [*cuts.tolist(), len(placed.offsets)]
    for start, stop in zip(starts, stops, strict=True):
        yield Run(int(placed.offsets[start]), stop - start, keys[placed.places[start]])


def _skipped(catalog: Catalog, span: Range) -> dict[int, tuple[str, bytes]]:
    """Records of a range without a row: by offset, why and the SHA-256 of their bytes."""
    found = {
        item.offset: (DUPLICATE, item.sha256)
        for item in catalog.duplicates(span.log_id, span.partition, span.offset_first, span.offset_next)
    }
    for record in catalog.quarantine(requeued=True):
        same = (record.log_id, record.partition) == (span.log_id, span.partition)
        if same and span.offset_first <= record.offset < span.offset_next:
            found[record.offset] = (QUARANTINED, record.sha256)
    return found


def fold(span: Range, placed: Placed, lost: Mapping[int, bytes], at: dict[int, bytes] | None = None) -> bytes | None:
    """The running digest after a span's records, rows and records without one; None where it has no beginning.

    `at` names offsets of interest inside the span; the running digest before each is put into it.
    """
    if span.digest_first is None:
        return None
    offsets = np.concatenate([placed.offsets, np.fromiter(lost, np.int64, len(lost))])
    packed = placed.hashes.tobytes() + b"".join(lost.values())
    order = np.argsort(offsets, kind="stable").tolist()
    hashes = [packed[32 * place : 32 * place + 32] for place in order]
    running, done = span.digest_first, 0
    for offset in sorted(at or ()):
        stop = offset - span.offset_first
        running, done = digest.advance(running, hashes[done:stop]), stop
        if at is not None:
            at[offset] = running
    return digest.advance(running, hashes[done:])


def spans_of(content: SegmentContent) -> list[Range]:
    """From the first to the last offset of each partition in a segment, without digests: what a reader prunes by."""
    return [Range(held.log_id, held.partition, int(held.offsets.min()), int(held.offsets.max()) + 1) for held in content.held]


# As objects and entries


def to_parquet(coverage: Sequence[Coverage]) -> bytes:
    """The runs of all spans as the coverage object."""
    rows = [
        (item.span.log_id, item.span.partition, run.offset_first, run.count, run.place, run.sha256)
        for item in coverage
        for run in item.runs
    ]
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(_SCHEMA)
    table = pa.table([pa.array(values, kind.type) for values, kind in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", store_schema=False)
    return out.getvalue()


def from_parquet(data: bytes, spans: Sequence[Coverage], *, place: str) -> list[Coverage]:
    """The spans of a ledger entry with the runs of its coverage object.

    Raises:
        CorruptStore: not a coverage object, or its runs do not make up the spans without overlap or gap.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(columns=_SCHEMA.names, use_threads=False)
        columns = [table.column(name).to_pylist() for name in _SCHEMA.names]
    except (OSError, ValueError, KeyError) as error:  # Arrow's errors derive from these
        raise CorruptStore(f"not a coverage manifest: {error}", operation="read coverage", place=place) from error
    runs: dict[_Where, list[Run]] = defaultdict(list)
    for log_id, partition, first, count, where, sha256 in zip(*columns, strict=True):
        runs[log_id, partition].append(Run(first, count, where, sha256))
    return [_with_runs(item.span, runs.get((item.span.log_id, item.span.partition), []), place) for item in spans]


def _with_runs(span: Range, runs: Sequence[Run], place: str) -> Coverage:
    mine = sorted((run for run in runs if span.offset_first <= run.offset_first < span.offset_next), key=lambda run: run.offset_first)
    expected = span.offset_first
    for run in mine:
        if run.offset_first != expected or run.count < 1:
            break
        expected += run.count
    if expected != span.offset_next:
        raise CorruptStore(f"partition {span.partition}, offset {expected} is in no run or in two", operation="read coverage", place=place)
    return Coverage(span, tuple(mine))


def coverage_to_json(item: Coverage) -> dict[str, Any]:
    """A span as it stands in the ledger."""
    span = item.span
    counts = {where: sum(run.count for run in item.runs if run.place == where) for where in (DUPLICATE, QUARANTINED)}
    return {
        "log_id": span.log_id,
        "partition": span.partition,
        "offset_first": span.offset_first,
        "offset_next": span.offset_next,
        "digest_first": span.digest_first.hex() if span.digest_first is not None else None,
        "digest_next": span.digest_next.hex() if span.digest_next is not None else None,
        "rows": span.offset_next - span.offset_first - sum(counts.values()),
        "duplicates": counts[DUPLICATE],
        "quarantined": counts[QUARANTINED],
    }


def coverage_from_json(item: Mapping[str, Any]) -> Coverage:
    """A span out of the ledger, without its runs."""
    first, after = item["digest_first"], item["digest_next"]
    return Coverage(
        Range(
            item["log_id"],
            item["partition"],
            item["offset_first"],
            item["offset_next"],
            bytes.fromhex(first) if first is not None else None,
            bytes.fromhex(after) if after is not None else None,
        )
    )
