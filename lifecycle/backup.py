"""Backup of an installation while it works: consistent, incremental, and whole or not there.

SQLite files are copied by SQLite's own backup, so each is one moment of its file. Everything that decides what is cold waits
meanwhile, but not while the bulk is copied, which happens before. Checkpoints are listed before the log is copied, so that none
of them signs for records that the copy lacks; blobs after it, so that none that the copy names is missing.

A backup looks like an embedded data directory whatever it was made from. Objects of a bucket lie where those of a folder do, with
notes of their locks; facts of a control topic stand in a SQLite file. Of a Kafka topic the shards are taken, since offsets
of another topic mean nothing: they hold every event that was sealed and is not cold. Nor are the topics of batch work taken: what waits in
them stands in the batches' input files, from which workers append it anew (`ingest/gateway/batch/requeue.py`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lifecycle.manifest import CONTROL, LOG, NAME, Indexed, Item, Manifest, check_apart, encode, read
from lifecycle.parts import CATALOG, PARTS, Parts, key_in
from schemas import clock
from schemas.errors import ConflictError, ProofError, UsageError
from schemas.settings import Settings
from store.catalog import open_catalog
from store.control import open_control, standing
from store.control.embedded import EmbeddedControl
from store.crashpoints import crash_point
from store.fences import FileLock, tier_lock_path, waiting
from store.ledger import Ledger, open_ledger
from store.ledger.entry import ENTRIES, entry_key
from store.log import open_log
from store.log.embedded import EmbeddedLog
from store.objects import open_store
from store.objects.base import ObjectStore
from store.objects.local import LOCKS, LocalStore
from store.tail import sync_file

LOCK = "lock"
"""Held while somebody writes into a backup."""

_WAIT_S = 600.0
"""How long a backup waits for tiering, retention or an erasure that is at work."""


@dataclass(frozen=True, slots=True)
class Made:
    """A backup that was made, and what of it this run had to copy."""

    manifest: Manifest
    copied: int
    copied_bytes: int
    removed: int


@dataclass
class Backup:
    """A backup of one installation into `folder`; `version` is that of this program.

    Without `with_bucket` the objects of a bucket are left out, for one that is replicated by its own means.
    """

    settings: Settings
    folder: Path
    version: str
    with_keys: bool = False
    with_bucket: bool = True

    def run(self) -> Made:
        """Bring the backup to what the installation is now.

        Files that went from the installation leave the backup as well, so that what was erased is not kept here.

        Raises:
            UsageError: another place is needed, or there is no bucket to leave out.
            ConflictError: another backup into the same folder is at work, or a shard is missing.
            LogUnavailable, StoreUnavailable: Kafka or the bucket does not answer; the older backup stays.
            ProofError: the ledger is not the one that was backed up before, or objects are missing; the older backup stays.
            StorageFull: no room; the older backup stays. StoreUnavailable: a job kept its lock too long.
        """
        self._check_place()
        with _alone(self.folder):
            before = read(self.folder) if (self.folder / NAME).exists() else None
            objects = open_store(self.settings.cold, self.settings.data)
            log_id, ledger = self._identify(before, objects)
            _prune(self.folder, before)
            bucket = None if isinstance(objects, LocalStore) else objects
            parts = Parts(self.settings.data, self.folder, before, bucket, self.with_bucket)
            bulk = [*parts.cold(), *([] if self._embedded else self._shards())]
            parts.check_room(bulk)
            parts.keep_all(bulk)
            with waiting(tier_lock_path(self.settings.data / "hot"), secrets.token_hex(8), timeout_s=_WAIT_S):
                manifest = self._snapshot(parts, log_id, ledger)
            _check_gone(before, manifest, ledger)
            os.sync()  # one for all files instead of one for each
            crash_point("backup.copied")
            self._write(manifest)
            removed = _prune(self.folder, manifest)
        new = [item for item in manifest.items if item.at.startswith(parts.own)]
        return Made(manifest, len(new), sum(item.size for item in new), removed)

    @property
    def _embedded(self) -> bool:
        """Whether the log is a file that can be copied."""
        return self.settings.log.kind == "embedded"

    def _check_place(self) -> None:
        if not self.with_bucket and self.settings.cold.kind == "local":
            hint = "leave --without-bucket out: nobody else has the folder of the cold tier"
            raise UsageError("the cold tier is no bucket (cold.kind = local)", operation="backup", hint=hint)
        check_apart(self.settings.data, self.folder, "backup")
        if not (self.settings.data / (LOG if self._embedded else CATALOG)).exists():
            hint = "record something first, or name another directory with --data"
            raise UsageError("there is nothing to back up", operation="backup", place=str(self.settings.data), hint=hint)
        try:
            strange = sorted({path.name for path in self.folder.iterdir()} - {NAME, PARTS, LOCK, f".{NAME}.new"})
        except FileNotFoundError:
            strange = []
        if strange:
            hint = "name an empty folder, one that is not there yet, or that of an earlier backup"
            raise UsageError(f"there is something else in the folder: {strange[0]}", operation="backup", place=str(self.folder), hint=hint)

    def _identify(self, before: Manifest | None, objects: ObjectStore) -> tuple[str, Ledger]:
        """Log id and ledger; what was backed up before must be their beginning."""
        if self._embedded:
            with contextlib.closing(EmbeddedLog(self.settings.data / LOG, partitions=None, create=False)) as log:
                log_id = log.log_id
        else:
            with contextlib.closing(open_log(self.settings.log, self.settings.data, create=False)) as topic:
                log_id = topic.log_id
        ledger = open_ledger(self.settings, objects)
        if before is not None and bool(before.elsewhere) == self.with_bucket:
            has, now = ("does not hold", "with") if before.elsewhere else ("holds", "without")
            fault = f"the backup in this folder {has} the bucket's objects, and is to go on {now} them"
            raise UsageError(fault, operation="backup", place=str(self.folder), hint="name another folder for this one")
        if before is not None and before.log_id != log_id:
            hint = "name another folder for this one"
            raise UsageError("the folder holds the backup of another log", operation="backup", place=str(self.folder), hint=hint)
        size = ledger.head()
        if before is not None and (size < before.ledger_size or ledger.root(before.ledger_size).hex() != before.ledger_root):
            fault = f"the ledger does not begin with the {before.ledger_size} entries that were backed up before"
            raise _suspect(fault, self.settings.data)
        return log_id, ledger

    def _shards(self) -> list[str]:
        """The shards that hold rows now."""
        with contextlib.closing(open_catalog(self.settings.data)) as catalog:
            return [f"hot/shards/{shard.path.name}" for shard in catalog.snapshot().shards]

    def _snapshot(self, parts: Parts, log_id: str, ledger: Ledger) -> Manifest:
        """Copy what changes, then what came since; nobody makes anything cold meanwhile, but holds may be entered in the ledger."""
        signed = [path for path in parts.cold() if key_in(path).startswith("ledger/") and not key_in(path).startswith(ENTRIES)]
        size = ledger.head()
        entries = [f"cold/{folder}{entry_key(number)}" for number in range(size) for folder in ("", f"{LOCKS}/")]
        items = parts.keep_all([*signed, *entries])
        for path in sorted({CATALOG, "jobs.sqlite", *([CONTROL] if self._embedded else []), *parts.found("work/*/log/log.sqlite")}):
            items += parts.keep_sqlite(path)
        taken_at = clock.now_us()
        if self._embedded:
            offsets, logged = self._log_file(parts)
        else:
            offsets, logged = self._topic(parts, log_id)
        items += logged
        indexed = [Indexed(at.partition, at.offset_next, at.digest.hex()) for at in parts.positions if at.log_id == log_id]
        items += parts.keep_all([path for path in parts.cold() if not key_in(path).startswith("ledger/")])
        items += parts.keep_all(["format.json", *parts.found("calibrations/*")])
        items += parts.keep_all(parts.found("keys/**/*") if self.with_keys else ["keys/ledger.pub"])
        return Manifest(
            written_by=self.version,
            taken_at_us=taken_at,
            log_id=log_id,
            origin=self.settings.ledger.origin,
            offsets=tuple(offsets),
            indexed=tuple(indexed),
            ledger_size=size,
            ledger_root=ledger.root(size).hex(),
            with_keys=self.with_keys,
            elsewhere="" if self.with_bucket else f"{self.settings.cold.endpoint}/{self.settings.cold.bucket}",
            items=tuple(sorted(items, key=lambda item: item.path)),
        )

    def _log_file(self, parts: Parts) -> tuple[list[tuple[int, int]], list[Item]]:
        """Bounds and copy of an embedded log, and the shards of earlier ones, which no log can give again."""
        copied = parts.copy_sqlite(LOG)
        crash_point("backup.log_copied")
        with contextlib.closing(EmbeddedLog(copied, partitions=None, create=False)) as log:
            bounds, log_id = [log.bounds(partition) for partition in range(log.partitions)], log.log_id
        old = [shard.path.name for shard in parts.shards if all(span.log_id != log_id for span in shard.ranges)]
        return bounds, [parts.enter(LOG, copied), *parts.keep_all([f"hot/shards/{name}" for name in old])]

    def _topic(self, parts: Parts, log_id: str) -> tuple[list[tuple[int, int]], list[Item]]:
        """What stands for a topic: all shards, up to which offset they and the cold tier have it, and the facts of its control topic.

        Raises:
            ConflictError: a shard is not there.
        """
        names = {f"hot/shards/{shard.path.name}" for shard in parts.shards}
        shards = parts.keep_all(sorted(names))
        if gone := sorted(names - {item.path for item in shards}):
            hint = "run it again, in case it was merged just now; else `tokentape rebuild` makes it from the log, if that still has it"
            raise ConflictError(f"a shard of the index is missing: {gone[0]}", operation="backup", place=str(self.settings.data), hint=hint)
        crash_point("backup.shards_copied")
        target = self.folder / parts.own / CONTROL
        with contextlib.closing(open_control(self.settings)) as control, contextlib.closing(EmbeddedControl(target)) as made:
            for (kind, key), value in standing(control.follow(0)).items():
                made.append(kind, key, value)
        indexed = {at.partition: at.offset_next for at in parts.positions if at.log_id == log_id}
        with contextlib.closing(open_log(self.settings.log, self.settings.data, create=False)) as log:
            firsts = [log.bounds(partition)[0] for partition in range(log.partitions)]
        bounds = [(min(first, indexed.get(partition, first)), indexed.get(partition, first)) for partition, first in enumerate(firsts)]
        return bounds, [*shards, parts.enter(CONTROL, parts.closed(target))]

    def _write(self, manifest: Manifest) -> None:
        """Put the manifest in the place of the one before, on disk when this returns."""
        new = self.folder / f".{NAME}.new"
        with new.open("wb") as file:
            file.write(encode(manifest))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / NAME)
        sync_file(self.folder)
        crash_point("backup.written")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One backup into a folder at a time; the folder is made where it is missing, and its owner's alone: it holds content."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock.take(folder / LOCK, secrets.token_hex(8))
    if lock is None:
        raise ConflictError("another backup or restore uses this folder", operation="backup", place=str(folder), hint="wait until it ends")
    try:
        yield
    finally:
        lock.release()


def _objects(items: Sequence[Item]) -> set[str]:
    """Keys of the objects among files."""
    return {item.path.removeprefix("cold/") for item in items if item.path.startswith("cold/") and LOCKS not in item.path}


def _check_gone(before: Manifest | None, now: Manifest, ledger: Ledger) -> None:
    """Refuse to let go of what no entry says was removed: an emptied store must not empty its backup.

    Blobs and files of batches go without an entry.

    Raises:
        ProofError: the store lacks an object that the backup has and the ledger vouches for.
    """
    gone = _objects(before.items) - _objects(now.items) if before else set()
    missing = {key for key in gone if key.startswith(("ledger/", "schemas/"))}
    if any(key.startswith(("events/", "coverage/")) for key in gone):
        sealed = [entry.body for entry in ledger.entries() if entry.type in ("segments", "rewritten")]
        named = {segment["key"] for body in sealed for segment in body["segments"]} | {body.get("coverage_key") for body in sealed}
        missing |= gone & named - {key for body in sealed for key in body.get("erased", ())}
    if missing:
        raise _suspect(f"{min(missing)} is missing and no entry says that it was removed", Path("cold"))


def _suspect(fault: str, place: Path) -> ProofError:
    hint = "`tokentape verify` says what happened; the older backup was left as it is. To go on anyway name an empty folder"
    return ProofError(fault, operation="backup", place=str(place), hint=hint)


def _prune(folder: Path, manifest: Manifest | None) -> int:
    """Remove files that the manifest does not name: of killed runs, and what went from the installation. How many."""
    wanted = {item.at for item in manifest.items} if manifest else set()
    removed = 0
    for parent, _, files in os.walk(folder / PARTS, topdown=False):
        for file in files:
            path = Path(parent, file)
            if path.relative_to(folder).as_posix() not in wanted:
                path.unlink()
                removed += 1
        with contextlib.suppress(OSError):  # not empty
            Path(parent).rmdir()
    return removed
