"""Restore of a backup into an empty directory: whole, its digests checked, its index made anew and its proofs held, or not there.

Everything happens in `DIR.partial`, which takes the directory's name in the end: one that was interrupted leaves nothing half,
and the next one begins again. What was recorded after the backup is gone, and a witness's newer checkpoints will say so.

Servers may have outlived the machine. A bucket whose ledger continues that of the backup is taken as it is; into an empty one the
objects are put, the ledger's entries last, and where that was interrupted the next restore goes on; any other is refused. A topic that
is still the same goes on behind the shards; beside a new one they stay as those of an earlier log.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lifecycle.backup import LOCK
from lifecycle.manifest import CONTROL, Item, Manifest, check_apart, check_room, copy_item, read
from lifecycle.register import Register
from lifecycle.rewriting import rewriting
from lifecycle.servers import fill, stands, tell
from lifecycle.tiering import Tiering
from lifecycle.verification import Verification, Verified, outcome
from schemas.errors import ConflictError, DataError, ProofError, SettingsError, UsageError
from schemas.registry import SchemaRegistry
from schemas.settings import Settings
from store.catalog import Catalog, open_catalog
from store.control import open_control
from store.crashpoints import crash_point
from store.fences import FileLock
from store.format import check_format
from store.ledger import keys, open_ledger
from store.log import open_log
from store.log.base import Log
from store.objects import open_store
from store.objects.base import ObjectStore
from store.rebuild import Cold, read_cold, rebuild
from store.stored_schemas import fetch_schema
from store.tail import sync_file

PARTIAL = ".partial"
"""What the directory is called with until it is whole."""

_MARK = ".restoring"
"""Says that a partial directory is that of a restore, and is its lock: no other folder is ever emptied."""


@dataclass(frozen=True)
class Restored:
    """What was restored: `rebuilt` is the summary of `rebuild`, `seconds` from the first file to the verified whole.

    `put` counts the objects that were put into a bucket, `facts` those written into a control topic. `kept` says which servers were
    found as they were left.
    """

    manifest: Manifest
    rebuilt: dict[str, Any]
    verified: Verified
    ledger_size: int
    ledger_root: str
    seconds: float
    put: int = 0
    facts: int = 0
    kept: tuple[str, ...] = ()

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
    """Restore the backup in `source` as the data directory, and into bucket and topics, of the settings.

    Raises:
        UsageError: the directory is not empty, there is no whole backup, or the bucket holds something else.
        SettingsError: the settings are those of another log or ledger.
        CorruptStore: a file of the backup is damaged. NewerFormat: a newer program made it.
        StorageFull: no room. ConflictError: another restore into the directory is at work.
        LogUnavailable, StoreUnavailable: Kafka or the bucket does not answer; the same command goes on later.
    """
    began, target = time.monotonic(), Path(os.path.abspath(settings.data))
    check_apart(target, source, "restore")
    _check_empty(target)
    folder = target.with_name(target.name + PARTIAL)
    with _unchanging(source) as manifest, _partial(folder):
        _check_fits(settings, manifest, source)
        there = settings.model_copy(update={"data": folder})
        run = _Run(there, manifest, source)
        files = run.files()
        check_room(folder, sum(item.size for item in files), "restore")
        _copy(files, source, folder, version)
        crash_point("restore.copied")
        with contextlib.closing(open_catalog(folder)) as catalog:
            restored = run.revive(catalog, began)
        os.sync()  # one for all files instead of one for each
        crash_point("restore.before_rename")
        (folder / _MARK).unlink()
        folder.rename(target)
    sync_file(target.parent)
    return restored


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
    if manifest.has_log and settings.log.kind != "embedded":
        fault = f"the backup holds an embedded log, the settings say log.kind = {settings.log.kind}"
        hint = "set log.kind = embedded: its offsets mean nothing in a topic"
        raise SettingsError(fault, operation="restore", place=str(source), hint=hint)
    if manifest.elsewhere and settings.cold.kind == "local":
        fault = f"the objects are not in the backup but in the bucket {manifest.elsewhere}, the settings say cold.kind = local"
        raise SettingsError(
            fault, operation="restore", place=str(source), hint="set cold.kind = minio, and cold.bucket to it or its replica"
        )
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


def _copy(items: Sequence[Item], source: Path, folder: Path, version: str) -> None:
    """Copy every file and check it, the note of the data's format first."""
    for item in sorted(items, key=lambda item: item.path != "format.json"):
        _copy_one(item, source, folder)
        if item.path == "format.json":
            check_format(folder, version)


def _copy_one(item: Item, source: Path, folder: Path) -> None:
    copy_item(item, source, folder / item.path)
    os.utime(folder / item.path, ns=(item.modified_ns, item.modified_ns))


@dataclass
class _Run:
    """One restore; `settings` name the partial directory."""

    settings: Settings
    manifest: Manifest
    source: Path

    def __post_init__(self) -> None:
        self.bucket = None if self.settings.cold.kind == "local" else open_store(self.settings.cold, self.settings.data)

    def files(self) -> list[Item]:
        """What goes into the directory: objects only where they live there, and no control log beside a topic."""
        kept = [item for item in self.manifest.items if self.bucket is None or not item.path.startswith("cold/")]
        return [item for item in kept if self.settings.log.kind == "embedded" or item.path != CONTROL]

    def revive(self, catalog: Catalog, began: float) -> Restored:
        """Bring servers to what was backed up, make the index anew, and hold everything against the public key."""
        objects: ObjectStore = self.bucket or open_store(self.settings.cold, self.settings.data)
        ledger, kept, put, facts = open_ledger(self.settings, objects), list[str](), 0, 0
        if self.bucket is not None and stands(ledger, self.manifest):
            kept.append(f"bucket {self.settings.cold.bucket}")
        elif self.bucket is not None:
            put = fill(self.bucket, self.manifest, self.source, self.settings.cold)
            ledger = open_ledger(self.settings, objects)
        crash_point("restore.filled")
        registry = SchemaRegistry(partial(fetch_schema, objects))
        tiering = Tiering(self.settings, catalog, objects, ledger, registry)
        tiering.reconcile()
        if put:
            _hold(tiering)
        with contextlib.closing(open_log(self.settings.log, self.settings.data, create=not self.manifest.has_log)) as log:
            same = not self.manifest.has_log and log.log_id == self.manifest.log_id
            cold = read_cold(self.settings, objects)
            if same and not self._overtaken(cold):
                rebuilt = self._go_on(log)
            else:
                rebuilt = self._rebuild(log, objects, catalog, registry)
            kept += [f"topic {self.settings.log.topic}"] if same else []
        if self.settings.log.kind != "embedded":
            with contextlib.closing(open_control(self.settings)) as control:
                told = tell(control, self.manifest, self.source, self.settings.data)
            facts = told or 0
            kept += [f"topic {self.settings.log.topic}.control"] if told is None else []
        verifier = keys.load_public(self.settings.data / "keys" / keys.PUBLIC)
        size = min(ledger.head(), self.manifest.ledger_size)
        verified = Verification(objects, verifier, registry).report()
        took = time.monotonic() - began
        return Restored(self.manifest, rebuilt, verified, size, ledger.root(size).hex(), took, put, facts, tuple(kept))

    def _overtaken(self, cold: Cold) -> bool:
        """Whether the cold tier has meanwhile come to hold what the index of the backup does not know."""
        at = {each.partition: each.offset_next for each in self.manifest.indexed}
        return any(span.log_id == self.manifest.log_id and span.offset_next > at.get(span.partition, 0) for span in cold.ranges)

    def _rebuild(self, log: Log, objects: ObjectStore, catalog: Catalog, registry: SchemaRegistry) -> dict[str, Any]:
        try:
            return rebuild(self.settings, log, objects, catalog, registry=registry)
        except DataError as error:  # damaged before it was backed up: what there is comes back, and that is said
            return {"events": 0, "digests_equal": 0, "differ": [str(error)]}

    def _go_on(self, log: Log) -> dict[str, Any]:
        """The same topic: the index stands where it stood, if the topic still has what comes next."""
        firsts = {at.partition: log.bounds(at.partition)[0] for at in self.manifest.indexed}
        differ = [
            f"partition {at.partition}: offsets {at.offset_next} to {firsts[at.partition]} have left the topic since the backup"
            for at in self.manifest.indexed
            if firsts[at.partition] > at.offset_next
        ]
        return {"events": 0, "digests_equal": len(firsts) - len(differ), "differ": differ}


def _hold(tiering: Tiering) -> None:
    """Put objects under the store's own legal hold again, which no backup shows; the ledger's holds stand without it."""
    register = Register.of(tiering.ledger)
    if register.holds:
        with contextlib.suppress(UsageError), rewriting(tiering, register) as run:
            run.hold_objects(tiering.catalog.snapshot().segments)
