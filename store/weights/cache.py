"""The models of a machine: one folder each, named by digest. What is there is whole.

    CACHE/models/<digest>/…        a model, read-only from when it is there
    CACHE/partial/<digest>/…       one on its way: files of full length, and beside each the list of pieces that have come
    CACHE/locks/<digest>.lock      held by the process that fetches it; others wait
    CACHE/locks/room.lock          held while room for one is made and taken

A process that dies leaves its lock to the next, which goes on from the pieces that are there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import DataError, StorageFull, StoreUnavailable
from schemas.settings import WeightsSettings
from store.fences import is_held, waiting
from store.weights.manifest import MANIFEST, Manifest, digest_of
from store.weights.remote import Object, Remote

PIECE = 16 << 20
"""Bytes that are fetched by one request, and again if the process dies meanwhile."""
USED = ".used"
"""A file of each model whose time says when it was asked for last."""
EVICTED = ".evicted-"
"""Between a model's digest and the process that deletes it."""
SPARE_BYTES = 64 << 20
"""Room left on the disk, for everybody else."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int, int], None]
"""Told (bytes that are there, bytes of the model)."""


class WeightCache:
    """Models under `settings.cache`."""

    def __init__(self, settings: WeightsSettings) -> None:
        self._settings = settings
        self.root = settings.cache.expanduser()

    def fetch(self, remote: Remote, *, digest: str | None = None, progress: Progress = lambda done, size: None) -> Path:
        """The folder of a model, fetched if it is not there.

        Raises:
            DataError: it is not what its manifest says, or its manifest is not the one of `digest`.
            StorageFull: there is no room, even without the models that may go.
            StoreUnavailable: the store is away; what came is kept for the next attempt.
        """
        manifest = remote.manifest()
        if digest is not None and digest != manifest.digest:
            hint = "publish it anew, or leave --digest out if another version is meant"
            raise DataError(
                f"the model's digest is {manifest.digest}, not {digest}", operation="fetch weights", place=remote.address, hint=hint
            )
        folder = self.root / "models" / manifest.digest
        with self._room(), waiting(self._lock(manifest.digest), f"pid {os.getpid()}", timeout_s=self._settings.wait_s):
            if not folder.is_dir():
                self._fetch(remote, manifest, folder, progress)
            (folder / USED).touch()
        return folder

    def models(self) -> list[tuple[str, int, float]]:
        """Digest, bytes and time of last use of each model, the one that goes first before the others."""
        root = self.root / "models"
        found = [(path.name, _size(path), _used(path)) for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
        return sorted(found, key=lambda model: model[2])

    def evict(self, room: int, *, arriving: Path | None = None, here: int = 0) -> list[str]:
        """Let what nobody fetches any more, then models, go until so many further bytes fit; names of what went.

        They are for the model that is `arriving`, of which `here` bytes have come. What others fetch stays, and counts as a whole.
        An engine that has a model's files open keeps them.

        Raises:
            StorageFull: they would not fit into a cache of that alone.
        """
        bytes_max = self._settings.bytes_max
        abandoned, fetched = self._on_the_way()
        others = sum(_size(path) for path in fetched if path != arriving)
        if others + here + room > bytes_max:
            fault = f"{here + room:,} bytes do not fit into a cache of {bytes_max:,}"
            fault += f" beside {others:,} that others fetch" if others else ""
            raise StorageFull(fault, operation="fetch weights", place=str(self.root), hint="raise weights.bytes_max")
        kept = [(path, _size(path)) for path in abandoned]
        kept += [(self.root / "models" / name, size) for name, size, _ in self.models()]
        held, gone = others + here + sum(size for _, size in kept), []
        taken = _taken(arriving) if arriving else here  # its holes are taken already where it is gone on with
        wanted = SPARE_BYTES + max(0, room + here - taken)
        while kept and (held + room > bytes_max or self._free() < wanted):
            path, size = kept.pop(0)
            away = self.root / "partial" / f"{path.name}{EVICTED}{os.getpid()}"
            with contextlib.suppress(OSError):  # another process may be quicker
                os.rename(path, away)  # nobody finds half of it
                shutil.rmtree(away)
            held -= size
            gone.append(path.name)
        if (free := self._free()) < wanted:
            fault = f"{wanted:,} bytes are needed and {free:,} are free"
            raise StorageFull(
                fault, operation="fetch weights", place=str(self.root), hint="free some space, or set weights.cache elsewhere"
            )
        return gone

    def _on_the_way(self) -> tuple[list[Path], list[Path]]:
        """What lies half way to or from the cache: what nobody works on, and what some process fetches."""
        root = self.root / "partial"
        found: tuple[list[Path], list[Path]] = ([], [])
        for path in root.iterdir() if root.is_dir() else ():
            found[EVICTED not in path.name and is_held(self._lock(path.name))].append(path)
        return found

    def _fetch(self, remote: Remote, manifest: Manifest, folder: Path, progress: Progress) -> None:
        partial = self.root / "partial" / manifest.digest
        partial.mkdir(parents=True, exist_ok=True)
        (self.root / "models").mkdir(exist_ok=True)
        with ThreadPoolExecutor(self._settings.connections, "tokentape-weights") as pool:
            objects = list(pool.map(remote.head, manifest.files))
            files = [_Arriving(partial, found) for found in objects]
            try:
                self._make_room(partial, files)
                _Fetching(remote, files, progress).run(pool)
                self._check(remote, manifest, files, pool)
            finally:
                for file in files:
                    file.close()
        for file in files:
            file.settle()
        (partial / MANIFEST).write_bytes(manifest.data)
        _sync(partial)
        os.rename(partial, folder)
        _sync(folder.parent)

    def _make_room(self, partial: Path, files: list[_Arriving]) -> None:
        """Take the room for all that is missing, one process at a time: two would both find the same bytes free."""
        missing = sum(file.missing for file in files)
        with waiting(self._lock("room"), f"pid {os.getpid()}", timeout_s=self._settings.wait_s):
            self.evict(missing, arriving=partial, here=sum(file.object.size for file in files) - missing)
            for file in files:
                file.reserve()

    def _check(self, remote: Remote, manifest: Manifest, files: list[_Arriving], pool: ThreadPoolExecutor) -> None:
        """Every file by its digest. One that differs is forgotten, so that the next attempt asks for it anew."""
        wrong = []
        for file, digest in zip(files, pool.map(lambda file: digest_of(file.path), files), strict=True):
            if digest != manifest.files[file.object.name]:
                file.forget()
                wrong.append(f"{file.object.name} (wanted {manifest.files[file.object.name][:12]}…, came {digest[:12]}…)")
        if wrong:
            fault = f"altered on the way or in the store: {', '.join(wrong)}"
            raise DataError(fault, operation="fetch weights", place=remote.address, hint="try again; if it stays, publish the model anew")

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / f"{name}.lock"

    def _free(self) -> int:
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free

    @contextmanager
    def _room(self) -> Iterator[None]:
        """A disk that runs full meanwhile is told as that; what came stays."""
        try:
            yield
        except OSError as error:
            hint = "free some space, or set weights.cache elsewhere; what came is kept"
            kind = StorageFull if error.errno in _FULL else StoreUnavailable
            raise kind(error.strerror or str(error), operation="fetch weights", place=str(self.root), hint=hint) from error


class _Arriving:
    """A file on its way: bytes in place, and the numbers of the pieces that have come in a file beside it."""

    def __init__(self, folder: Path, found: Object) -> None:
        self.object = found
        self.path = folder / found.name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._list = self.path.with_name(f"{self.path.name}.pieces")
        self.pieces = max(1, -(-found.size // PIECE))
        self.here = self._read()
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self._log = os.open(self._list, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if not self.here:
            os.ftruncate(self._log, 0)
            os.write(self._log, f"{found.etag} {found.size}\n".encode())

    def _read(self) -> set[int]:
        """Pieces of this very version; none when the object is another one now."""
        try:
            first, *lines = self._list.read_text().splitlines()
        except (OSError, ValueError):
            return set()
        if first != f"{self.object.etag} {self.object.size}" or not self.path.exists():
            return set()
        return {int(line) for line in lines if line.isdecimal() and int(line) < self.pieces}

    @property
    def missing(self) -> int:
        """Bytes that have not come."""
        return sum(self.length(piece) for piece in range(self.pieces) if piece not in self.here)

    def length(self, piece: int) -> int:
        """Bytes of a piece."""
        return min(PIECE, self.object.size - piece * PIECE)

    def reserve(self) -> None:
        """Take the room on the disk now, rather than find it gone near the end."""
        if self.object.size:
            os.posix_fallocate(self._descriptor, 0, self.object.size)
        os.ftruncate(self._descriptor, self.object.size)

    def take(self, remote: Remote, piece: int) -> int:
        """Fetch a piece, and only then say that it is here; its bytes."""
        length = self.length(piece)
        if length:
            remote.fetch(self.object, piece * PIECE, length, self._descriptor)
            os.fdatasync(self._descriptor)
        os.write(self._log, f"{piece}\n".encode())
        return length

    def forget(self) -> None:
        """Nothing of it has come."""
        os.ftruncate(self._log, 0)

    def settle(self) -> None:
        """It is whole."""
        self._list.unlink()

    def close(self) -> None:
        """Close its files."""
        os.close(self._descriptor)
        os.close(self._log)


class _Fetching:
    """All missing pieces of all files, a few at once, in the order of the files."""

    def __init__(self, remote: Remote, files: list[_Arriving], progress: Progress) -> None:
        self._remote, self._files, self._progress = remote, files, progress
        self._size = sum(file.object.size for file in files)

    def run(self, pool: ThreadPoolExecutor) -> None:
        """Fetch; the first failure ends it once the pieces under way have ended."""
        done = self._size - sum(file.missing for file in self._files)
        self._progress(done, self._size)
        futures = [
            pool.submit(file.take, self._remote, piece) for file in self._files for piece in range(file.pieces) if piece not in file.here
        ]
        try:
            for future in futures:
                done += future.result()
                self._progress(done, self._size)
        finally:
            for future in futures:
                future.cancel()


def _size(folder: Path) -> int:
    """Bytes of its files, of those that are fetched now as they will be."""
    return sum(stat.st_size for stat in _stats(folder))


def _taken(folder: Path) -> int:
    """Bytes of the disk that its files have, whether anything stands there or not."""
    return sum(stat.st_blocks * 512 for stat in _stats(folder))


def _stats(folder: Path) -> Iterator[os.stat_result]:
    for inside, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # it was on its way, and has just come
                yield os.stat(os.path.join(inside, name))


def _used(folder: Path) -> float:
    try:
        return (folder / USED).stat().st_mtime
    except OSError:
        return time.time()  # it has only just come


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
