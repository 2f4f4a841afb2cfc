"""Restore of a backup into an empty directory: whole, its digests checked, its index made anew and its proofs held, or not there.

Everything happens in `DIR.partial`, which takes the directory's name in the end: one that was interrupted leaves nothing half,
and the next one begins again. What was recorded after the backup is gone, and a witness's newer checkpoints will say so.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lifecycle.backup import LOCK
from lifecycle.manifest import Item, Manifest, check_apart, check_embedded, check_room, copy, read
from lifecycle.tiering import Tiering
from lifecycle.verification import Verification, Verified, outcome
from schemas.errors import ConflictError, CorruptStore, DataError, ProofError, SettingsError, UsageError
from schemas.registry import SchemaRegistry
from schemas.settings import Settings
from store.catalog import open_catalog
from store.crashpoints import crash_point
from store.fences import FileLock
from store.format import check_format
from store.ledger import keys, open_ledger
from store.log import open_log
from store.objects.local import LocalStore
from store.rebuild import rebuild
from store.stored_schemas import fetch_schema
from store.tail import sync_file

PARTIAL = ".partial"
"""What the directory is called with until it is whole."""

_MARK = ".restoring"
"""Says that a partial directory is that of a restore, and is its lock: no other folder is ever emptied."""


@dataclass(frozen=True)
class Restored:
    """What was restored: `rebuilt` is the summary of `rebuild`, `seconds` from the first file to the verified whole."""

    manifest: Manifest
    rebuilt: dict[str, Any]
    verified: Verified
    ledger_size: int
    ledger_root: str
    seconds: float

    def faults(self) -> list[str]:
        """What is not as it was: nothing, unless the installation was damaged before it was backed up."""
        found = [f"{each.kind} {each.key}: {each.detail}" for each in self.verified.findings]
        same = (self.ledger_size, self.ledger_root) == (self.manifest.ledger_size, self.manifest.ledger_root)
        root = [] if same else ["the ledger's root is not that of the backup"]
        bad = found if self.verified.exit_code else []
        return [*root, *bad, *self.rebuilt["differ"]]

    def check(self) -> None:
        """Raise unless the restore is what was signed.

        Raises:
            ProofError: it is not.
        """
        if faults := self.faults():
            fault = f"restored as it was backed up, which is {outcome(self.verified)}: {faults[0]}"
            raise ProofError(fault, operation="restore", hint="`tokentape verify` names each object; an older backup may be good")


def restore(settings: Settings, source: Path, version: str) -> Restored:
    """Restore the backup in `source` as the data directory of the settings.

    Raises:
        UsageError: the directory is not empty, there is no whole backup, or the installation is not embedded.
        SettingsError: the settings are those of another log or ledger.
        CorruptStore: a file of the backup is damaged. NewerFormat: a newer program made it.
        StorageFull: no room. ConflictError: another restore into the directory is at work.
    """
    began, target = time.monotonic(), Path(os.path.abspath(settings.data))
    check_embedded(settings, "restore")
    check_apart(target, source, "restore")
    _check_empty(target)
    folder = target.with_name(target.name + PARTIAL)
    with _unchanging(source) as manifest, _partial(folder):
        _check_fits(settings, manifest, source)
        check_room(folder, manifest.size, "restore")
        _copy(manifest, source, folder, version)
        crash_point("restore.copied")
        rebuilt, verified, size, root = _revive(settings.model_copy(update={"data": folder}))
        os.sync()  # one for all files instead of one for each
        crash_point("restore.before_rename")
        (folder / _MARK).unlink()
        folder.rename(target)
    sync_file(target.parent)
    return Restored(manifest, rebuilt, verified, size, root, time.monotonic() - began)


def _check_empty(target: Path) -> None:
    try:
        found = next(target.iterdir(), None)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        found = target
    if os.path.ismount(target):
        hint = "name a directory in it: the restore takes its name when it is whole, which nothing can do with a mount point"
        raise UsageError("the directory is a mount point", operation="restore", place=str(target), hint=hint)
    if found is not None:
        hint = "name a directory that is empty or not there yet; nothing is ever restored over data"
        raise UsageError(f"the directory is not empty: {found.name}", operation="restore", place=str(target), hint=hint)


@contextlib.contextmanager
def _unchanging(source: Path) -> Iterator[Manifest]:
    """A backup that no run brings further, or prunes, meanwhile; also where it cannot be written to.

    Raises:
        ConflictError: a run is at work.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # somebody copied all but the lock
            lock = stack.enter_context((source / LOCK).open("rb"))
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                fault = "a backup into this folder is at work"
                raise ConflictError(fault, operation="restore", place=str(source), hint="wait until it ends") from None
        yield read(source)


def _check_fits(settings: Settings, manifest: Manifest, source: Path) -> None:
    partitions = len(manifest.offsets)
    if settings.log.partitions != partitions:
        fault = f"the backup's log has {partitions} partitions, the settings say {settings.log.partitions}"
        raise SettingsError(fault, operation="restore", place=str(source), hint=f"set log.partitions = {partitions}")
    if settings.ledger.origin != manifest.origin:
        fault = f"the backup's ledger is {manifest.origin}, the settings say {settings.ledger.origin}"
        raise SettingsError(fault, operation="restore", place=str(source), hint=f"set ledger.origin = {manifest.origin}")


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[None]:
    """An empty folder to restore into, which is gone afterwards unless it got another name.

    Raises:
        UsageError: a folder of that name is somebody's. ConflictError: another restore works in it.
    """
    if folder.exists() and not (folder / _MARK).exists() and any(folder.iterdir()):
        hint = "move it away: a restore works under this name until it is whole"
        raise UsageError("there is a folder that no restore made", operation="restore", place=str(folder), hint=hint)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock.take(folder / _MARK, secrets.token_hex(8))
    if lock is None:
        raise ConflictError("another restore is at work", operation="restore", place=str(folder), hint="wait until it ends")
    try:
        for left in folder.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != _MARK:
                left.unlink()
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.release()


def _copy(manifest: Manifest, source: Path, folder: Path, version: str) -> None:
    """Copy every file and check it, the note of the data's format first."""
    for item in sorted(manifest.items, key=lambda item: item.path != "format.json"):
        _copy_one(item, source, folder)
        if item.path == "format.json":
            check_format(folder, version)


def _copy_one(item: Item, source: Path, folder: Path) -> None:
    at = source / item.at
    hint = "take this file from another copy of the backup; nothing was restored"
    if not at.is_file() or at.is_symlink():
        raise CorruptStore("a file of the backup is missing", operation="restore", place=str(at), hint=hint)
    size, sha256 = copy(at, folder / item.path, mode=item.mode)
    if (size, sha256) != (item.size, item.sha256):
        fault = f"a file of the backup is damaged: {item.path} has not the SHA-256 that was noted"
        raise CorruptStore(fault, operation="restore", place=str(at), hint=hint)
    os.utime(folder / item.path, ns=(item.modified_ns, item.modified_ns))


def _revive(settings: Settings) -> tuple[dict[str, Any], Verified, int, str]:
    """Make the index anew and hold everything against the public key: summary, report, and the ledger's size and root."""
    objects = LocalStore(settings.data / "cold")
    registry = SchemaRegistry(partial(fetch_schema, objects))
    ledger = open_ledger(settings, objects)
    with contextlib.closing(open_catalog(settings.data)) as catalog:
        Tiering(settings, catalog, objects, ledger, registry).reconcile()
        with contextlib.closing(open_log(settings.log, settings.data, create=False)) as log:
            try:
                rebuilt = rebuild(settings, log, objects, catalog, registry=registry)
            except DataError as error:  # damaged before it was backed up: what there is comes back, and that is said
                rebuilt = {"events": 0, "digests_equal": 0, "differ": [str(error)]}
    verifier = keys.load_public(settings.data / "keys" / keys.PUBLIC)
    size = ledger.head()
    return rebuilt, Verification(objects, verifier, registry).report(), size, ledger.root(size).hex()
