"""What a year will cost, forecast from one day: events, bytes, objects and requests to the object store.

A day is taken to be like every other, and nothing to go: policies that remove events make it less. Requests are counted as the code
makes them; a test counts them at a real store. What grows over the year is summed: a verification reads all that stands by then.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from schemas import clock
from schemas.errors import UsageError
from schemas.settings import Settings
from store.blobs import BLOBS
from store.catalog import Catalog
from store.ledger.verify import CHUNK
from store.objects.base import ObjectStore

DAYS = 365
_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Sample:
    """One day as it stands in the tiers; bytes per event come from this day where it is in that tier, else from all that is.

    A day that is hot still counts as one segment: how many tenants and classes it will be cut into is not known before.
    """

    day: str
    events: int
    segments: int
    hot_bytes_per_event: float | None
    cold_bytes_per_event: float | None
    segment_bytes: float
    blobs: int
    blob_bytes: int
    schemas: int = 1
    over: bool = True


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a forecast: what, on the sample day, in a year; None where nothing of the kind was stored yet."""

    what: str
    day: float | None
    year: float | None


def sample(catalog: Catalog, objects: ObjectStore, *, day: str | None = None, today: str | None = None) -> Sample:
    """A day to forecast from: the one asked for, else the latest that is over, else today so far.

    Raises:
        UsageError: there are no events of that day, or none at all.
        StoreUnavailable: the store does not answer.
    """
    snapshot, now = catalog.snapshot(), today or f"{clock.now():%Y-%m-%d}"
    rows: Counter[str] = Counter()
    for shard in snapshot.shards:
        rows[shard.day] += shard.rows
    for segment in snapshot.segments:
        rows[segment.day] += segment.rows
    known = sorted(found for found, count in rows.items() if count)
    chosen = day or next((found for found in reversed(known) if found < now), known[-1] if known else None)
    if chosen not in known:
        hint = f"days with events: {', '.join(known[-5:])}" if known else "record something first"
        raise UsageError(f"no events of {chosen or 'any day'}", operation="capacity", hint=hint)
    shards = [shard for shard in snapshot.shards if shard.day == chosen] or list(snapshot.shards)
    cold = [segment for segment in snapshot.segments if segment.day == chosen]
    blobs = [info.size for info in objects.list(BLOBS) if f"{info.modified_at:%Y-%m-%d}" == chosen]
    measured = cold or list(snapshot.segments)
    return Sample(
        day=chosen,
        events=rows[chosen],
        segments=len(cold) or 1,
        hot_bytes_per_event=_per_event([(shard.bytes, shard.rows) for shard in shards]),
        cold_bytes_per_event=_per_event([(segment.bytes, segment.rows) for segment in measured]),
        segment_bytes=sum(segment.bytes for segment in measured) / len(measured) if measured else 0.0,
        blobs=len(blobs),
        blob_bytes=sum(blobs),
        over=chosen < now,
    )


def _per_event(sizes: list[tuple[int, int]]) -> float | None:
    rows = sum(count for _, count in sizes)
    return sum(size for size, _ in sizes) / rows if rows else None


def forecast(day: Sample, settings: Settings) -> list[Figure]:
    """A year of such days under the schedule of the settings."""
    cold = None if day.cold_bytes_per_event is None else day.events * day.cold_bytes_per_event
    hot = None if day.hot_bytes_per_event is None else day.events * day.hot_bytes_per_event
    kept = settings.jobs.tier_after_days + 1  # a day is filled, then waits
    checkpoints = min(_DAY_S / settings.ledger.checkpoint_s, day.events) + 1  # none is written while no event comes
    stored = {"segments": day.segments, "coverage and entries": 2, "checkpoints": checkpoints, "blobs": day.blobs}
    objects = float(sum(stored.values()))
    figures: list[Figure] = [
        Figure("events", day.events, day.events * DAYS),
        Figure("hot bytes", hot, None if hot is None else hot * kept),
        Figure("cold bytes", cold, None if cold is None else cold * DAYS),
        Figure("blob bytes", day.blob_bytes, day.blob_bytes * DAYS),
        *(Figure(f"objects: {name}", count, count * DAYS) for name, count in stored.items()),
        Figure("objects", objects, objects * DAYS),
    ]
    written = tiering_requests(day) + checkpoints + day.blobs
    runs = 0.0 if settings.jobs.verify_s == 0 else _DAY_S / settings.jobs.verify_s
    first, all_days = verify_requests(day, checkpoints, days=1), DAYS * (DAYS + 1) / 2
    requests: Mapping[str, tuple[float, float]] = {
        "PUT requests": (written, written * DAYS),
        "GET requests: tiering": (day.segments, day.segments * DAYS),
        "GET requests: verify": (first * runs, first * runs * all_days),
    }
    return [*figures, *(Figure(name, *counts) for name, counts in requests.items())]


def tiering_requests(day: Sample) -> int:
    """PUTs of one day's tiering: segments, schemas (refused where they stand already), coverage and entry."""
    return day.segments + day.schemas + 2


def verify_requests(day: Sample, checkpoints: float, *, days: int) -> float:
    """GETs of one deep verification once so many days stand: entries and checkpoints are read twice, once for the rows' digests;
    segments are hashed in chunks and then read, coverage and schemas hashed and read."""
    chunks = max(1, math.ceil(day.segment_bytes / CHUNK))
    per_day = 2 + 2 * checkpoints + day.segments * (chunks + 1 + day.schemas) + 2 + day.schemas
    return per_day * days
