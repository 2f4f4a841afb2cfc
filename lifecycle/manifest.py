"""What a backup holds: `manifest.json`, written last, so that an interrupted backup is never taken for a whole one.

It names every file by its path in the data directory, where its bytes lie below the backup's folder, and their SHA-256. Files
are never overwritten: what is new lies under a folder of its own run, what did not change stays where an earlier run put it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from schemas.errors import CorruptStore, NewerFormat, StorageFull, UsageError

FORMAT = 1
"""Grows when an older program would restore wrongly what a newer one backs up."""

NAME = "manifest.json"

CONTROL = "control/control.sqlite"
"""The control log among the files, also where its facts come from a topic."""

LOG = "log/log.sqlite"
"""The embedded log among the files; a backup of a Kafka topic has none."""

_HINT = "take this file from another copy of the backup; nothing was restored"

_CHUNK = 1 << 20  # bytes copied at a time


@dataclass(frozen=True, slots=True)
class Item:
    """One file: `path` in the data directory, `at` in the backup; `modified_ns` is the time of its last write."""

    path: str
    at: str
    size: int
    sha256: str
    mode: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Indexed:
    """How far the index had a partition: everything below `offset_next`, whose running digest is `digest` (hex)."""

    partition: int
    offset_next: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole backup.

    `offsets` has first and next offset of each partition of the log; `ledger_root` is the Merkle root (hex) of the first
    `ledger_size` entries; `taken_at_us` is the moment of the log's copy, in microseconds since the epoch.
    """

    written_by: str
    taken_at_us: int
    log_id: str
    origin: str
    offsets: tuple[tuple[int, int], ...]
    indexed: tuple[Indexed, ...]
    ledger_size: int
    ledger_root: str
    with_keys: bool
    items: tuple[Item, ...]
    elsewhere: str = ""
    """The bucket whose objects are not in it, being replicated by other means; empty where all of them are."""

    @property
    def has_log(self) -> bool:
        """Whether the log itself is in it; else the shards stand for it."""
        return any(item.path == LOG for item in self.items)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(item.size for item in self.items)


def encode(manifest: Manifest) -> bytes:
    """The file's bytes: JSON with the SHA-256 of what it says."""
    said = orjson.dumps(asdict(manifest))
    head = {"format": FORMAT, "written_by": manifest.written_by, "sha256": hashlib.sha256(said).hexdigest()}
    return orjson.dumps({**head, "backup": orjson.Fragment(said)})


def read(folder: Path) -> Manifest:
    """The manifest of a backup's folder.

    Raises:
        UsageError: there is no whole backup.
        NewerFormat: a newer program made it.
        CorruptStore: the file is not what was written.
    """
    path = folder / NAME
    try:
        document = orjson.loads(path.read_bytes())
        if document["format"] > FORMAT:
            writer = document["written_by"]
            fault = f"the backup has format {document['format']}, written by tokentape {writer}; this one reads up to format {FORMAT}"
            raise NewerFormat(fault, operation="read backup", place=str(path), hint=f"restore it with tokentape {writer} or later")
        manifest = _manifest(document["backup"])
        if hashlib.sha256(orjson.dumps(document["backup"])).hexdigest() != document["sha256"]:
            raise ValueError("its SHA-256 is another")
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = f"name a folder with a {NAME}; `tokentape backup` writes it last, so run one that was interrupted again"
        raise UsageError("there is no whole backup in this folder", operation="read backup", place=str(folder), hint=hint) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "take it from another copy of the backup"
        raise CorruptStore(f"the manifest is damaged: {error}", operation="read backup", place=str(path), hint=hint) from error
    return manifest


def _manifest(said: dict[str, Any]) -> Manifest:
    offsets = tuple((int(first), int(after)) for first, after in said["offsets"])
    items = tuple(Item(**item) for item in said["items"])
    if outside := [name for item in items for name in (item.path, item.at) if not _inside(name)]:
        raise ValueError(f"{outside[0]!r} leads out of the folder")
    return Manifest(**{**said, "offsets": offsets, "indexed": tuple(Indexed(**at) for at in said["indexed"]), "items": items})


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def copy(source: Path, target: Path, *, mode: int) -> tuple[int, str]:
    """Copy a file with its times; size and SHA-256 of what was read. The copy is durable once the caller has synced.

    Raises:
        OSError: as reading and writing do.
    """
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader:
        target.unlink(missing_ok=True)
        with target.open("xb") as writer:
            while chunk := reader.read(_CHUNK):
                writer.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            os.fchmod(writer.fileno(), mode)
        found = os.fstat(reader.fileno())
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
    return size, digest.hexdigest()


def whole(item: Item, source: Path) -> Path:
    """A file of the backup in `source`, which must be there as a file.

    Raises:
        CorruptStore: it is not.
    """
    at = source / item.at
    if not at.is_file() or at.is_symlink():
        raise CorruptStore("a file of the backup is missing", operation="restore", place=str(at), hint=_HINT)
    return at


def check_whole(item: Item, source: Path) -> None:
    """Read a file of the backup and hold it against its SHA-256.

    Raises:
        CorruptStore: it is missing or damaged.
    """
    with whole(item, source).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        _check(item, source, os.fstat(file.fileno()).st_size, digest)


def copy_item(item: Item, source: Path, target: Path) -> None:
    """Copy a file of the backup.

    Raises:
        CorruptStore: it is missing or damaged.
    """
    _check(item, source, *copy(whole(item, source), target, mode=item.mode))


def _check(item: Item, source: Path, size: int, sha256: str) -> None:
    if (size, sha256) != (item.size, item.sha256):
        fault = f"a file of the backup is damaged: {item.path} has not the SHA-256 that was noted"
        raise CorruptStore(fault, operation="restore", place=str(source / item.at), hint=_HINT)


def check_apart(data: Path, folder: Path, operation: str) -> None:
    """Refuse a backup within the data directory, or the other way round.

    Raises:
        UsageError: one of them holds the other.
    """
    own, other = data.resolve(), folder.resolve()
    if own.is_relative_to(other) or other.is_relative_to(own):
        fault = f"the backup's folder and the data directory {data} lie in one another"
        raise UsageError(fault, operation=operation, place=str(folder), hint="name a folder beside it, best on another disk")


def check_room(folder: Path, needed: int, operation: str) -> None:
    """Refuse what the disk of `folder`, or of its nearest parent that is there, has no room for; bytes.

    Raises:
        StorageFull: it has less.
    """
    there = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        fault = f"{needed:,} bytes are to be copied, the disk has {free:,} free"
        raise StorageFull(fault, operation=operation, place=str(folder), hint="free some space, or name a folder on another disk")
