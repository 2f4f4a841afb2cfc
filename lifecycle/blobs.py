"""Takes blobs away that no event refers to: its recorder died before the event, the event was shed, or retention removed it.

A blob is stored before its event, so one without an event may be about to get one. It is left until it was neither
written nor wanted again for the days of grace, and the index knows everything that was appended until then. `BlobStore`
marks a use and then looks whether the blob is there; here a blob is deleted and then marks are looked for, and it is put
back where there is one. So whichever comes first, a blob that is used now stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog

from schemas import clock
from schemas.errors import ConflictError
from schemas.settings import Settings
from store.blobs import BLOBS, USES, use_prefix
from store.catalog import Catalog
from store.objects.base import ObjectInfo, ObjectStore
from store.reader import EventReader

log = structlog.get_logger()


@dataclass
class UnreferencedBlobs:
    """Collects them. Idempotent; may be killed at any moment but between a deletion and the look for marks."""

    settings: Settings
    catalog: Catalog
    objects: ObjectStore
    now: Callable[[], datetime] = clock.now

    def run(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Collect what can be; a summary of it. `waits_for` says why nothing was, where something stands in the way."""
        since = self.now() - timedelta(days=self.settings.jobs.blobs_after_days)
        marks = list(self.objects.list(USES))
        used = {mark.key.rpartition("/")[0] for mark in marks if mark.modified_at >= since}
        old, count, size = list[ObjectInfo](), 0, 0
        for blob in self.objects.list(BLOBS):
            count, size = count + 1, size + blob.size
            if blob.modified_at < since and use_prefix(blob.key)[:-1] not in used:
                old.append(blob)
        waits_for = self._in_the_way(since) if old else ""
        found = self._unreferenced(old) if old and not waits_for else []
        summary = {"old": len(old), "unreferenced": len(found), "bytes": sum(blob.size for blob in found), "waits_for": waits_for}
        summary |= {"blobs": count, "blob_bytes": size}
        if dry_run:
            return summary
        collected = sum(self._collect(blob, since) for blob in found)
        for mark in marks:
            if mark.modified_at < since:
                self.objects.delete(mark.key)
        return {**summary, "collected": collected}

    def _in_the_way(self, since: datetime) -> str:
        """Why events may refer to blobs that the index does not know of; empty where it knows all."""
        positions = self.catalog.positions()
        moment = since.timestamp() * 1_000_000
        if not positions or any(max(position.caught_up_at, position.appended_at) < moment for position in positions):
            return "the index, which is behind"
        if self.catalog.quarantine():
            return "records in quarantine, which may name blobs"
        known = {segment.key for segment in self.catalog.snapshot().segments}
        if any(info.key not in known for info in self.objects.list("events/") if info.key.endswith(".parquet")):
            return "segments that the catalog does not know"
        return ""

    def _unreferenced(self, blobs: list[ObjectInfo]) -> list[ObjectInfo]:
        reader = EventReader(self.settings, self.catalog, self.objects)
        try:
            names = reader.blob_names()
        finally:
            reader.close()
        return [blob for blob in blobs if blob.key.rpartition("/")[2].removesuffix(".zst") not in names]

    def _collect(self, blob: ObjectInfo, since: datetime) -> bool:
        """Delete one; False where it is locked, gone, or was put back because it is wanted again."""
        try:
            data = self.objects.get(blob.key)
            self.objects.delete(blob.key)
        except (ConflictError, KeyError) as error:
            log.info("blob.stays", key=blob.key, why=str(error))
            return False
        if any(mark.modified_at >= since for mark in self.objects.list(use_prefix(blob.key))):
            self.objects.create(blob.key, data)
            return False
        return True
