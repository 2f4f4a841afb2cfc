"""The files of one backup run: what is new is copied, what did not change stays where an earlier run put it.

Objects of a bucket are files like those of a folder, with a note of their lock beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sqlite3
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from lifecycle.manifest import Item, Manifest, check_room, copy
from lifecycle.servers import PROBES
from schemas import clock
from store.catalog import Catalog, Position, Shard
from store.log.sqlite import connect, mapped
from store.objects.base import ObjectInfo, ObjectStore
from store.objects.local import LOCKS, TEMPORARY

PARTS = "parts"
"""Where a backup keeps its files: a folder for each run that brought any."""

CATALOG = "hot/catalog.sqlite"

_READERS = 8
"""Objects of a bucket fetched at the same time."""
_PIECE = 8 << 20
"""Bytes of an object fetched at a time."""
_BUSY_S = 30.0
"""How long a copy waits for a writer of the same SQLite file; each of them takes milliseconds."""


@dataclass
class Parts:
    """Copies what the backup in `folder` does not have yet of the data directory, and of a bucket, into a folder of its own."""

    data: Path
    folder: Path
    before: Manifest | None
    bucket: ObjectStore | None = None
    """Where the objects are; None where that is the folder `cold`."""
    with_bucket: bool = True
    own: str = field(default_factory=lambda: f"{PARTS}/{clock.now():%Y%m%dT%H%M%S}-{secrets.token_hex(4)}")
    positions: Sequence[Position] = ()
    """How far the index had each partition, once the catalog was copied."""
    shards: Sequence[Shard] = ()
    """The shards that it named then."""

    def __post_init__(self) -> None:
        self._known = {item.path: item for item in self.before.items} if self.before else {}
        self._listed: dict[str, ObjectInfo] = {}

    def cold(self) -> list[str]:
        """Every object and the notes of locks on them, as paths in the data directory; objects of a bucket stand without notes."""
        found: list[str] = []
        if self.bucket is not None:
            infos = self.bucket.list("") if self.with_bucket else iter(())
            self._listed = {f"cold/{info.key}": info for info in infos if not info.key.startswith(PROBES)}
            return sorted(self._listed)
        for folder, names, files in os.walk(self.data / "cold"):
            if folder == str(self.data / "cold"):
                names[:] = [name for name in names if name != TEMPORARY]
            found += (Path(folder, file).relative_to(self.data).as_posix() for file in files)
        return sorted(found)

    def found(self, pattern: str) -> list[str]:
        """Files of the data directory that match."""
        return [path.relative_to(self.data).as_posix() for path in self.data.glob(pattern) if path.is_file()]

    def check_room(self, bulk: list[str]) -> None:
        """Refuse before anything is copied; `bulk` is what changes rarely.

        Raises:
            StorageFull: the disk has less room than the copies take.
        """
        databases = ["jobs.sqlite", "control/control.sqlite", *self.found("**/log.sqlite"), *self.found("hot/catalog.sqlite")]
        sizes = [(self.data / path).stat().st_size for path in databases if (self.data / path).exists()]
        for path in bulk:
            with contextlib.suppress(FileNotFoundError):
                size, modified_ns = self._state(path)
                sizes += [] if self._unchanged(path, size, modified_ns) else [size]
        check_room(self.folder, sum(sizes), "backup")

    def keep_all(self, paths: list[str]) -> list[Item]:
        """Copy those of the files and objects that the backup does not have; what went meanwhile is left out."""
        if self.bucket is None:
            return [item for path in paths for item in self._kept(path)]
        with ThreadPoolExecutor(_READERS) as pool:
            return [item for items in pool.map(self._kept, paths) for item in items]

    def _kept(self, path: str) -> list[Item]:
        if self.bucket is not None and path.startswith("cold/"):
            return self._object(self.bucket, path)
        with contextlib.suppress(FileNotFoundError):
            size, modified_ns = self._state(path)
            return [self._unchanged(path, size, modified_ns) or self._copied(path, self.data / path)]
        return []

    def _state(self, path: str) -> tuple[int, int]:
        """Size and time of the last write (ns)."""
        if path in self._listed:
            info = self._listed[path]
            return info.size, int(info.modified_at.timestamp() * 1e6) * 1000
        status = (self.data / path).lstat()
        return status.st_size, status.st_mtime_ns

    def _unchanged(self, path: str, size: int, modified_ns: int) -> Item | None:
        """What the backup has of a file that is still the same."""
        item = self._known.get(path)
        if item is None or (item.size, item.modified_ns) != (size, modified_ns):
            return None
        return item if self._has(item) else None

    def _object(self, bucket: ObjectStore, path: str) -> list[Item]:
        """An object, and the note of its lock as it was when it came into the backup."""
        if not self.with_bucket or f"/{LOCKS}/" in path:
            return []
        if path not in self._listed:  # it came after the listing
            if (info := bucket.head(key_in(path))) is None:
                return []
            self._listed[path] = info
        note = f"cold/{LOCKS}/{key_in(path)}"
        if item := self._unchanged(path, *self._state(path)):
            return [item, *([self._known[note]] if note in self._known and self._has(self._known[note]) else [])]
        size, modified_ns = self._state(path)
        try:
            digest = self._fetch(bucket, path, size)
            lock = bucket.lock_of(key_in(path))
        except KeyError:
            return []
        items = [Item(path, f"{self.own}/{path}", size, digest, 0o444, modified_ns)]
        if lock.mode != "none" and lock.until is not None:
            at = self.folder / self.own / note
            at.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            said = orjson.dumps({"mode": lock.mode, "until": lock.until.isoformat()})
            at.write_bytes(said)
            items.append(Item(note, f"{self.own}/{note}", len(said), hashlib.sha256(said).hexdigest(), 0o600, modified_ns))
        self._known |= {item.path: item for item in items}
        return items

    def _fetch(self, bucket: ObjectStore, path: str, size: int) -> str:
        """Copy an object's bytes; their SHA-256 (hex).

        Raises:
            KeyError: it is gone, or shorter than it was listed.
        """
        target = self.folder / self.own / path
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        digest, done = hashlib.sha256(), 0
        with target.open("wb") as file:
            while done < size:
                if not (piece := bucket.get_range(key_in(path), done, min(_PIECE, size - done))):
                    raise KeyError(path)
                file.write(piece)
                digest.update(piece)
                done += len(piece)
        return digest.hexdigest()

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
        if path == CATALOG:
            with contextlib.closing(Catalog(target)) as catalog:
                self.positions = catalog.positions()
                self.shards = catalog.snapshot().shards
        return target

    def closed(self, path: Path) -> Path:
        """A SQLite file that was written here, as one file without a write-ahead log."""
        with contextlib.closing(sqlite3.connect(path)) as made:
            made.execute("PRAGMA journal_mode=DELETE")
        return path

    def enter(self, path: str, copied: Path) -> Item:
        """A file that stands in the run's folder already; where the backup has the same bytes, those, and not the copy."""
        status, known = copied.stat(), self._known.get(path)
        with copied.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if known is not None and (known.size, known.sha256) == (status.st_size, digest) and self._has(known):
            copied.unlink()
            return known
        return Item(path, f"{self.own}/{path}", status.st_size, digest, stat.S_IMODE(status.st_mode), status.st_mtime_ns)


def key_in(path: str) -> str:
    """The object that a path in the data directory holds, or whose lock it notes."""
    return path.removeprefix("cold/").removeprefix(f"{LOCKS}/")
