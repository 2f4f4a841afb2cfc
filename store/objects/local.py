"""An object store in a local folder: one read-only file per object, created at once and only once.

A file appears under its key by `link(2)` from a finished, flushed temporary file: the link fails when the key
exists, so of any number of writers one wins, and a reader sees the whole object or none. Locks are kept beside the
objects and hold back this program's own `delete`; whoever may write the folder can still remove files, and `probe`
says so.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from schemas import clock
from schemas.errors import AlreadyExists, ConflictError, CorruptStore, StorageFull, StoreUnavailable
from store.crashpoints import crash_point
from store.objects.base import NO_LOCK, Lock, ObjectInfo, StoreProbe
from store.objects.checks import check_key, check_lock, check_prefix, check_range, check_until, open_source, taken

TEMPORARY = ".tmp"  # unfinished files; on the same file system as the objects, so that link(2) works
LOCKS = ".locks"  # retention of each locked object, at the same relative path
STALE_S = 86_400.0  # an unfinished file this old belongs to a process that died
CHUNK = 1 << 20  # bytes copied at a time
_FULL = {errno.ENOSPC, errno.EDQUOT}


class LocalStore:
    """Objects as files under `root`, which is made when it is missing."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        with self._mapped("open", ""):
            for folder in (self.root, self.root / TEMPORARY, self.root / LOCKS):
                folder.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def create(self, key: str, data: bytes, *, lock: Lock = NO_LOCK) -> None:
        """See `ObjectStore.create`."""
        check_lock(lock)
        target = self._path(key, "create")
        with self._mapped("create", key):
            if self._write_new(target, lambda file: file.write(data)) or target.read_bytes() == data:
                return self._settle(key, target, lock)
        raise taken(key)

    def create_from_file(self, key: str, path: Path, *, lock: Lock = NO_LOCK) -> None:
        """See `ObjectStore.create_from_file`."""
        check_lock(lock)
        target = self._path(key, "create")
        with open_source(path) as source, self._mapped("create", key):
            written = self._write_new(target, lambda file: shutil.copyfileobj(source, file, CHUNK))
            if written or filecmp.cmp(path, target, shallow=False):
                return self._settle(key, target, lock)
        raise taken(key)

    def get(self, key: str) -> bytes:
        """See `ObjectStore.get`."""
        with self._mapped("get", key):
            return self._path(key, "get").read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `ObjectStore.get_range`."""
        check_range(key, start, length)
        with self._mapped("get", key), self._path(key, "get").open("rb") as file:
            file.seek(start)
            return file.read(length)

    def head(self, key: str) -> ObjectInfo | None:
        """See `ObjectStore.head`."""
        path = self._path(key, "head")
        try:
            with self._mapped("head", key):
                status = path.stat()
        except KeyError:
            return None
        return _info(key, status) if stat.S_ISREG(status.st_mode) else None

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        check_prefix(prefix, operation="list")
        folder = prefix.rpartition("/")[0]
        with self._mapped("list", prefix):
            self.root.stat()
            if os.path.realpath(self.root / folder) != os.path.join(os.path.realpath(self.root), folder).rstrip("/"):
                return  # reached through a symbolic link: not this store's
        yield from self._walk(folder + "/" if folder else "", prefix, start_after)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        path = self._path(key, "delete")
        until = self._locked_until(key)
        if until is not None and until > clock.now() and path.exists():
            raise ConflictError("the object is locked", operation="delete", place=key, hint=f"not before {until.isoformat()}")
        with contextlib.suppress(KeyError), self._mapped("delete", key):
            path.unlink()
            _sync_folder(path.parent)
        with self._mapped("delete", key):
            (self.root / LOCKS / key).unlink(missing_ok=True)

    def purge(self, key: str) -> int:
        """See `ObjectStore.purge`. A file has one version."""
        path = self._path(key, "purge")
        note = self._note(key)
        if path.exists() and note.get("held"):
            raise ConflictError("the object is under legal hold", operation="purge", place=key, hint="`tokentape hold list` shows why")
        until = self._locked_until(key)
        if path.exists() and until is not None and until > clock.now() and note.get("mode") != "governance":
            raise ConflictError("the object is locked (compliance)", operation="purge", place=key, hint=f"not before {until.isoformat()}")
        there = path.exists()
        with self._mapped("delete", key):
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _sync_folder(path.parent)
            (self.root / LOCKS / key).unlink(missing_ok=True)
        return int(there)

    def remains(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See `ObjectStore.remains`."""
        return ((info.key, 1) for info in self.list(prefix))

    def lock_of(self, key: str) -> Lock:
        """See `ObjectStore.lock_of`."""
        if self.head(key) is None:
            raise KeyError(key)
        note = self._note(key)
        if "until" in note:
            return Lock(note.get("mode", "compliance"), datetime.fromisoformat(note["until"]))
        until = None if note.get("held") else self._locked_until(key)
        return NO_LOCK if until is None else Lock("compliance", until)

    def set_hold(self, key: str, held: bool) -> None:
        """See `ObjectStore.set_hold`. Kept beside the lock, and as advisory as that."""
        if self.head(key) is None:
            raise KeyError(key)
        with self._mapped("lock", key):
            self._write_note(key, {**{k: v for k, v in self._note(key).items() if k != "held"}, **({"held": True} if held else {})})

    def read_url(self, key: str, *, expires_s: int) -> str:
        """The file's path; `expires_s` means nothing here. Mode 0444 stops other users than root from writing through it."""
        return str(self._path(key, "read_url"))

    def probe(self) -> StoreProbe:
        """See `ObjectStore.probe`. Locks are advisory in a folder, so `locks_enforced` is always false."""
        key = f"probe/{uuid.uuid4()}"
        self.create(key, b"first")
        try:
            self.create(key, b"second")
            once = False
        except AlreadyExists:
            once = self.get(key) == b"first"
        self.delete(key)
        detail = "create-once holds" if once else "CREATE-ONCE DOES NOT HOLD"
        return StoreProbe(once, False, f"local folder: {detail}; locks are advisory (whoever may write the folder can delete)")

    # How it is done.

    def _path(self, key: str, operation: str) -> Path:
        """The file of a key; symbolic links that lead out of the store are refused."""
        path = self.root / check_key(key, operation=operation)
        if path.is_symlink() or (self._linked(key) and not Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(self.root))):
            raise CorruptStore("a symbolic link stands in the object's place", operation=operation, place=key, hint="remove the link")
        return path

    def _linked(self, key: str) -> bool:
        """Whether a folder of a key is a link: only then does it matter where it leads, which takes ten times as long to find out."""
        parts = key.split("/")
        return any(os.path.islink(os.path.join(self.root, *parts[:depth])) for depth in range(1, len(parts)))

    def _write_new(self, target: Path, write: Callable[[BinaryIO], object]) -> bool:
        """Write, flush and link a file; False when the name is taken. The entry is durable only after `_settle`."""
        if target.exists():
            return False
        temporary = self.root / TEMPORARY / uuid.uuid4().hex
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fchmod(file.fileno(), 0o444)
                os.fsync(file.fileno())
            self._make_folders(target.parent)
            os.link(temporary, target, follow_symlinks=False)
            crash_point("objects.linked")
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _settle(self, key: str, target: Path, lock: Lock) -> None:
        """Make the directory entry durable and note the lock, also when an earlier, killed call wrote the object."""
        _sync_folder(target.parent)
        if lock.mode == "none":
            return
        until = check_until(lock)
        before = self._locked_until(key)
        if before is None or before < until:
            self._note_lock(key, lock.mode, until)

    def _note_lock(self, key: str, mode: str, until: datetime) -> None:
        self._write_note(key, {**self._note(key), "mode": mode, "until": until.isoformat()})

    def _note(self, key: str) -> dict[str, Any]:
        """What is noted about an object; nothing where the note cannot be read, which then counts as the strongest lock."""
        try:
            note = json.loads((self.root / LOCKS / key).read_bytes())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def _write_note(self, key: str, note: dict[str, Any]) -> None:
        path = self.root / LOCKS / key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.root / TEMPORARY / uuid.uuid4().hex
        with temporary.open("xb") as file:
            file.write(json.dumps(note).encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
        crash_point("objects.noted")

    def _locked_until(self, key: str) -> datetime | None:
        """When the lock of an object ends; a note that cannot be read counts as a lock without end."""
        path = self.root / LOCKS / key
        try:
            note = json.loads(path.read_bytes())
            if note.get("held"):
                return datetime.max.replace(tzinfo=UTC)
            return datetime.fromisoformat(note["until"]) if note else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return datetime.max.replace(tzinfo=UTC)

    def _make_folders(self, folder: Path) -> None:
        """Make the folders between root and `folder` durably. The root itself is never made again: it may be an unmounted disk."""
        if folder.is_dir():
            return
        if folder == self.root:
            raise FileNotFoundError(errno.ENOENT, "folder is gone", str(folder))
        self._make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        """Files below `folder` ("" or "a/b/") in key order; a folder sorts as its name and a slash."""
        for name in self._names(folder):
            key = folder + name
            if key.endswith("/"):
                if (key.startswith(prefix) or prefix.startswith(key)) and not (start_after > key and not start_after.startswith(key)):
                    yield from self._walk(key, prefix, start_after)
            elif key.startswith(prefix) and key > start_after:
                with contextlib.suppress(FileNotFoundError):  # deleted while listing
                    yield _info(key, (self.root / key).stat())

    def _names(self, folder: str) -> Sequence[str]:
        with self._mapped("list", folder):
            try:
                with os.scandir(self.root / folder) as found:
                    names = [e.name + "/" if e.is_dir(follow_symlinks=False) else e.name for e in found if not e.name.startswith(".")]
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted(names)  # code points sort as their UTF-8 bytes do

    def _sweep(self) -> None:
        """Remove what dead writers left behind."""
        for path in (self.root / TEMPORARY).iterdir():
            with contextlib.suppress(OSError):
                # Of the file system's own time, not of `schemas.clock`.
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink()

    @contextlib.contextmanager
    def _mapped(self, operation: str, key: str) -> Iterator[None]:
        """Turn the operating system's errors into those of the contract."""
        place = str(self.root / key)
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            if self.root.is_dir() and key and operation in ("get", "head", "delete"):
                raise KeyError(key) from error
            if self.root.is_dir() and operation == "create":
                hint = "no object's key may be the folder of another's"
                raise ConflictError("another object stands in the way", operation=operation, place=place, hint=hint) from error
            raise StoreUnavailable("the folder is gone", operation=operation, place=place, hint="is the disk mounted?") from error
        except OSError as error:
            if error.errno in _FULL:
                raise StorageFull("no space left", operation=operation, place=place, hint="free some disk space and try again") from error
            hint = "check the folder's permissions and its disk"
            raise StoreUnavailable(error.strerror or str(error), operation=operation, place=place, hint=hint) from error


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
