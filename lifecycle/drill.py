"""A drill: back up, restore elsewhere, and hold the restore against the original. What an emergency would cost, measured.

RPO is how far back the loss would reach: the age of the oldest event that the backup lacks. RTO is the time from the first
file of the restore until it is verified and has answered a query. Where there are servers, the restore goes into a bucket and topics
of its own, without locks, which are removed afterwards.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from lifecycle.backup import Backup, Made
from lifecycle.manifest import Manifest
from lifecycle.restore import Restored, restore
from schemas import clock
from schemas.errors import TokentapeError
from schemas.settings import ColdSettings, LogSettings, Settings
from store.catalog import open_catalog
from store.log import open_log
from store.objects import open_store
from store.rebuild import read_cold
from store.sql import query

logger = structlog.get_logger("tokentape.drill")

_BUCKET_CHARACTERS = 63
"""The longest name of a bucket."""


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that must be the same in both."""

    what: str
    original: str
    restored: str

    @property
    def same(self) -> bool:
        """Whether it is."""
        return self.original == self.restored


@dataclass(frozen=True, slots=True)
class Drilled:
    """What a drill found; `rpo_s` is 0 where the backup lacks nothing, `lacking` counts the events that it lacks."""

    lines: tuple[Line, ...]
    backup_s: float
    rpo_s: float
    rto_s: float
    lacking: int
    size: int


def drill(settings: Settings, folder: Path, version: str) -> Drilled:
    """Back up into `folder`, which is empty, restore beside it and compare; the caller removes the folder.

    Raises:
        UsageError, StorageFull, ProofError, CorruptStore: as backup and restore do.
    """
    began = time.monotonic()
    made = Backup(settings, folder / "backup", version).run()
    backup_s = time.monotonic() - began
    with _elsewhere(settings, folder / "restored") as elsewhere:
        began = time.monotonic()
        restored = restore(elsewhere, folder / "backup", version)
        counted = _rows(elsewhere, made.manifest)
        rto_s = time.monotonic() - began
        lines = [*_proofs(made, restored), *_digests(elsewhere, made.manifest, restored.rebuilt["differ"])]
    lines += [Line(f"rows of partition {p}", str(own), str(counted[p])) for p, own in enumerate(_rows(settings, made.manifest))]
    lines.append(Line("faults found by verify", "0", str(len(restored.faults()))))
    rpo_s, lacking = _lacking(settings, made.manifest)
    return Drilled(tuple(lines), backup_s, rpo_s, rto_s, lacking, made.manifest.size)


@contextlib.contextmanager
def _elsewhere(settings: Settings, data: Path) -> Iterator[Settings]:
    """Settings of an installation that nobody has, and whose bucket and topics are gone afterwards."""
    name = f"-drill-{secrets.token_hex(4)}"
    cold = settings.cold.model_copy(update={"bucket": settings.cold.bucket[: _BUCKET_CHARACTERS - len(name)] + name, "lock": "none"})
    log = settings.log.model_copy(update={"topic": settings.log.topic + name})
    try:
        yield settings.model_copy(update={"data": data, "cold": cold, "log": log})
    finally:
        try:
            _remove(cold, log)
        except TokentapeError as error:
            logger.warning("drill.left", bucket=cold.bucket, topic=log.topic, error=str(error), hint="remove them by hand")


def _remove(cold: ColdSettings, log: LogSettings) -> None:
    if cold.kind == "minio":
        from store.objects.minio import remove_bucket

        remove_bucket(cold)
    if log.kind != "embedded":
        from store.log.admin import remove_topics

        remove_topics(log, [log.topic, f"{log.topic}.control"])


def _proofs(made: Made, restored: Restored) -> list[Line]:
    manifest = made.manifest
    return [
        Line("ledger entries", str(manifest.ledger_size), str(restored.ledger_size)),
        Line("ledger root", manifest.ledger_root, restored.ledger_root),
    ]


def _digests(restored: Settings, manifest: Manifest, differ: Sequence[str]) -> list[Line]:
    """Running digests of the records by partition: rebuilding met them where the original's index stood, or says where not.

    Where the log is not in the backup, shards and the ledger's coverage end with them.
    """
    with contextlib.closing(open_catalog(restored.data)) as catalog:
        now = {at.partition: at for at in catalog.positions() if at.log_id == manifest.log_id}
        spans = [span for shard in catalog.snapshot().shards for span in shard.ranges]
    if not manifest.has_log:
        spans += read_cold(restored, open_store(restored.cold, restored.data)).ranges
    ends = {(span.partition, span.offset_next, (span.digest_next or b"").hex()) for span in spans if span.log_id == manifest.log_id}
    lines = []
    for at in manifest.indexed:
        if manifest.has_log:
            met = at.partition in now and now[at.partition].offset_next >= at.offset_next
            met = met and not any(fault.startswith(f"partition {at.partition} ") for fault in differ)
        else:
            met = at.offset_next == 0 or (at.partition, at.offset_next, at.digest) in ends
        what = f"digest of partition {at.partition} at {at.offset_next}"
        lines.append(Line(what, at.digest, at.digest if met else "another"))
    return lines


def _rows(settings: Settings, manifest: Manifest) -> list[int]:
    """Rows of each partition below what the original's index had when it was backed up."""
    ends = {at.partition: at.offset_next for at in manifest.indexed}
    below = " OR ".join(f'"partition" = {p} AND "offset" < {end}' for p, end in ends.items()) or "false"
    statement = f"SELECT \"partition\", count(*) FROM events WHERE log_id = '{manifest.log_id}' AND ({below}) GROUP BY ALL"
    found = dict(zip(*query(settings, statement).table.to_pydict().values(), strict=True))
    return [found.get(partition, 0) for partition in range(len(manifest.offsets))]


def _lacking(settings: Settings, manifest: Manifest) -> tuple[float, int]:
    """RPO in seconds, and how many events the log has that the backup lacks."""
    with contextlib.closing(open_log(settings.log, settings.data, create=False)) as log:
        ends = [log.bounds(partition)[1] for partition in range(log.partitions)]
        behind = [(p, after, end) for p, ((_, after), end) in enumerate(zip(manifest.offsets, ends, strict=True)) if end > after]
        oldest = min((log.read(p, after, limit=1).appended_at[0] for p, after, _ in behind), default=None)
    rpo_s = 0.0 if oldest is None else max(0.0, (clock.now_us() - oldest) / 1e6)
    return rpo_s, sum(end - after for _, after, end in behind)
