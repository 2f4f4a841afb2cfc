"""Backup of an embedded installation while it works: consistent, incremental, and whole or not there.

SQLite files are copied by SQLite's own backup, so each is one moment of its file. Everything that decides what is cold waits
meanwhile, but not while the bulk is copied, which happens before. Checkpoints are listed before the log is copied, so that none
of them signs for records that the copy lacks; blobs after it, so that none that the copy names is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lifecycle.manifest import NAME, Indexed, Item, Manifest, check_apart, check_embedded, check_room, copy, encode, read
from schemas import clock
from schemas.errors import ConflictError, ProofError, UsageError
from schemas.settings import Settings
from store.catalog import Catalog, Position, Shard
from store.crashpoints import crash_point
from store.fences import FileLock, tier_lock_path, waiting
from store.ledger import Ledger, open_ledger
from store.ledger.entry import ENTRIES, entry_key
from store.log.embedded import EmbeddedLog
from store.log.sqlite import connect, mapped
from store.objects.local import LOCKS, TEMPORARY, LocalStore
from store.tail import sync_file

PARTS = "parts"
"""Where a backup keeps its files: a folder for each run that brought any."""

LOCK = "lock"
"""Held while somebody writes into a backup."""

_LOG = "log/log.sqlite"
_CATALOG = "hot/catalog.sqlite"
_BUSY_S = 30.0
"""How long a copy waits for a writer of the same SQLite file; each of them takes milliseconds."""
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
    """A backup of one installation into `folder`; `version` is that of this program."""

    settings: Settings
    folder: Path
    version: str
    with_keys: bool = False

    def run(self) -> Made:
        """Bring the backup to what the installation is now.

        Files that went from the installation leave the backup as well, so that what was erased is not kept here.

        Raises:
            UsageError: another place is needed, or the installation is not embedded.
            ConflictError: another backup into the same folder is at work.
            ProofError: the ledger is not the one that was backed up before, or objects are missing; the older backup stays.
            StorageFull: no room; the older backup stays. StoreUnavailable: a job kept its lock too long.
        """
        self._check_place()
        with _alone(self.folder):
            before = read(self.folder) if (self.folder / NAME).exists() else None
            log_id, ledger = self._identify(before)
            _prune(self.folder, before)
            parts = _Parts(self.settings.data, self.folder, before)
            parts.check_room()
            parts.keep_all(parts.cold())
            with waiting(tier_lock_path(self.settings.data / "hot"), secrets.token_hex(8), timeout_s=_WAIT_S):
                manifest = self._snapshot(parts, log_id, ledger)
            _check_gone(before, manifest, ledger)
            os.sync()  # one for all files instead of one for each
            crash_point("backup.copied")
            self._write(manifest)
            removed = _prune(self.folder, manifest)
        new = [item for item in manifest.items if item.at.startswith(parts.own)]
        return Made(manifest, len(new), sum(item.size for item in new), removed)

    def _check_place(self) -> None:
        check_embedded(self.settings, "backup")
        check_apart(self.settings.data, self.folder, "backup")
        if not (self.settings.data / _LOG).exists():
            hint = "record something first, or name another directory with --data"
            raise UsageError("there is nothing to back up", operation="backup", place=str(self.settings.data), hint=hint)
        try:
            strange = sorted({path.name for path in self.folder.iterdir()} - {NAME, PARTS, LOCK, f".{NAME}.new"})
        except FileNotFoundError:
            strange = []
        if strange:
            hint = "name an empty folder, one that is not there yet, or that of an earlier backup"
            raise UsageError(f"there is something else in the folder: {strange[0]}", operation="backup", place=str(self.folder), hint=hint)

    def _identify(self, before: Manifest | None) -> tuple[str, Ledger]:
        """Log id and ledger; what was backed up before must be their beginning."""
        with contextlib.closing(EmbeddedLog(self.settings.data / _LOG, partitions=None, create=False)) as log:
            log_id = log.log_id
        ledger = open_ledger(self.settings, LocalStore(self.settings.data / "cold"))
        if before is not None and before.log_id != log_id:
            hint = "name another folder for this one"
            raise UsageError("the folder holds the backup of another log", operation="backup", place=str(self.folder), hint=hint)
        size = ledger.head()
        if before is not None and (size < before.ledger_size or ledger.root(before.ledger_size).hex() != before.ledger_root):
            fault = f"the ledger does not begin with the {before.ledger_size} entries that were backed up before"
            raise _suspect(fault, self.settings.data)
        return log_id, ledger

    def _snapshot(self, parts: _Parts, log_id: str, ledger: Ledger) -> Manifest:
        """Copy what changes, then what came since; nobody makes anything cold meanwhile, but holds may be entered in the ledger."""
        signed = [path for path in parts.cold() if _key(path).startswith("ledger/") and not _key(path).startswith(ENTRIES)]
        size = ledger.head()
        entries = [f"cold/{folder}{entry_key(number)}" for number in range(size) for folder in ("", f"{LOCKS}/")]
        items = parts.keep_all([*signed, *entries])
        for path in sorted({_CATALOG, "control/control.sqlite", "jobs.sqlite", *parts.found("work/*/log/log.sqlite")}):
            items += parts.keep_sqlite(path)
        taken_at = clock.now_us()
        copied = parts.copy_sqlite(_LOG)
        crash_point("backup.log_copied")
        with contextlib.closing(EmbeddedLog(copied, partitions=None, create=False)) as log:
            offsets = tuple(log.bounds(partition) for partition in range(log.partitions))
        items.append(parts.enter(_LOG, copied))
        indexed = [Indexed(at.partition, at.offset_next, at.digest.hex()) for at in parts.positions if at.log_id == log_id]
        items += parts.keep_all([f"hot/shards/{name}" for name in parts.shards_of_others(log_id)])
        items += parts.keep_all([path for path in parts.cold() if not _key(path).startswith("ledger/")])
        items += parts.keep_all(["format.json", *parts.found("calibrations/*")])
        items += parts.keep_all(parts.found("keys/**/*") if self.with_keys else ["keys/ledger.pub"])
        return Manifest(
            written_by=self.version,
            taken_at_us=taken_at,
            log_id=log_id,
            origin=self.settings.ledger.origin,
            offsets=offsets,
            indexed=tuple(indexed),
            ledger_size=size,
            ledger_root=ledger.root(size).hex(),
            with_keys=self.with_keys,
            items=tuple(sorted(items, key=lambda item: item.path)),
        )

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


@dataclass
class _Parts:
    """The files of one run: copies what the backup does not have yet, as files of the run's own folder."""

    data: Path
    folder: Path
    before: Manifest | None
    own: str = field(default_factory=lambda: f"{PARTS}/{clock.now():%Y%m%dT%H%M%S}-{secrets.token_hex(4)}")
    positions: Sequence[Position] = ()
    """How far the index had each partition, once the catalog was copied."""
    shards: Sequence[Shard] = ()
    """The shards that it named then."""

    def __post_init__(self) -> None:
        self._known = {item.path: item for item in self.before.items} if self.before else {}

    def cold(self) -> list[str]:
        """Every object and the notes of locks on them, as paths in the data directory."""
        found: list[str] = []
        for folder, names, files in os.walk(self.data / "cold"):
            if folder == str(self.data / "cold"):
                names[:] = [name for name in names if name != TEMPORARY]
            found += (Path(folder, file).relative_to(self.data).as_posix() for file in files)
        return sorted(found)

    def found(self, pattern: str) -> list[str]:
        """Files of the data directory that match."""
        return [path.relative_to(self.data).as_posix() for path in self.data.glob(pattern) if path.is_file()]

    def check_room(self) -> None:
        """Refuse before anything is copied.

        Raises:
            StorageFull: the disk has less room than the copies take.
        """
        databases = ["jobs.sqlite", "control/control.sqlite", *self.found("**/log.sqlite"), *self.found("hot/catalog.sqlite")]
        sizes = [(self.data / path).stat().st_size for path in databases if (self.data / path).exists()]
        for path in self.cold():
            with contextlib.suppress(FileNotFoundError):
                status = (self.data / path).stat()
                sizes += [] if self._unchanged(path, status) else [status.st_size]
        check_room(self.folder, sum(sizes), "backup")

    def keep_all(self, paths: list[str]) -> list[Item]:
        """Copy those of the files that the backup does not have; what went meanwhile is left out."""
        kept = []
        for path in paths:
            source = self.data / path
            with contextlib.suppress(FileNotFoundError):
                kept.append(self._unchanged(path, source.lstat()) or self._copied(path, source))
        return kept

    def _unchanged(self, path: str, status: os.stat_result) -> Item | None:
        """What the backup has of a file that is still the same."""
        item = self._known.get(path)
        if item is None or (item.size, item.modified_ns) != (status.st_size, status.st_mtime_ns):
            return None
        return item if self._has(item) else None

    def _has(self, item: Item) -> bool:
        """Whether a file of the older backup is still there, and as long as it was."""
        there = self.folder / item.at
        return there.is_file() and there.stat().st_size == item.size

    def _copied(self, path: str, source: Path) -> Item:
        status = source.lstat()
        at = f"{self.own}/{path}"
        mode = stat.S_IMODE(status.st_mode)
        size, sha256 = copy(source, self.folder / at, mode=mode)
        self._known[path] = item = Item(path, at, size, sha256, mode, status.st_mtime_ns)
        return item

    def keep_sqlite(self, path: str) -> list[Item]:
        """Copy a SQLite file, if it is there."""
        return [self.enter(path, self.copy_sqlite(path))] if (self.data / path).exists() else []

    def copy_sqlite(self, path: str) -> Path:
        """A copy of one moment of a SQLite file, by SQLite's own means."""
        source, target = self.data / path, self.folder / self.own / path
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (
            mapped("backup", source),
            contextlib.closing(connect(source, timeout_s=_BUSY_S)) as live,
            contextlib.closing(sqlite3.connect(target)) as made,
        ):
            live.backup(made)
        if path == _CATALOG:
            with contextlib.closing(Catalog(target)) as catalog:
                self.positions = catalog.positions()
                self.shards = catalog.snapshot().shards
        return target

    def shards_of_others(self, log_id: str) -> list[str]:
        """Shards that no log can give again: their log was another one."""
        return [shard.path.name for shard in self.shards if all(span.log_id != log_id for span in shard.ranges)]

    def enter(self, path: str, copied: Path) -> Item:
        """A file that stands in the run's folder already; where the backup has the same bytes, those, and not the copy."""
        status, known = copied.stat(), self._known.get(path)
        with copied.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if known is not None and (known.size, known.sha256) == (status.st_size, digest) and self._has(known):
            copied.unlink()
            return known
        return Item(path, f"{self.own}/{path}", status.st_size, digest, stat.S_IMODE(status.st_mode), status.st_mtime_ns)


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


def _key(path: str) -> str:
    """The object that a path in the data directory holds, or whose lock it notes."""
    return path.removeprefix("cold/").removeprefix(f"{LOCKS}/")


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
