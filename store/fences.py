"""Locks that die with their process: one per partition, one per indexer, one around recovery.

A lock is `flock` on an open file, so the kernel gives it back whatever way a process ends. A holder checks before each
commit that the file it locked is still the one at that path and still carries its token: whoever lost its fence to a
removed file must not write beside its successor.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import Fenced, StoreUnavailable

# How often a waiting process tries again; recovery takes milliseconds.
_POLL_S = 0.01


class FileLock:
    """An exclusive lock on a file, held by an object of this class until `release` or the end of the process."""

    def __init__(self, path: Path, token: str, descriptor: int) -> None:
        self.path = path
        self.token = token
        self._descriptor = descriptor

    @classmethod
    def take(cls, path: Path, token: str) -> FileLock | None:
        """The lock, or None when somebody else holds it.

        Raises:
            StoreUnavailable: the file cannot be made or locked.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as problem:
            raise StoreUnavailable(problem.strerror or str(problem), operation="lock", place=str(path)) from problem
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        lock = cls(path, token, descriptor)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, token.encode(), 0)
        if not lock.holds():
            # The file was removed between opening and locking it: this lock keeps nobody out.
            lock.release()
            return None
        return lock

    def holds(self) -> bool:
        """Whether the locked file is still the one at the path and still carries the token."""
        try:
            there, own = os.stat(self.path), os.fstat(self._descriptor)
            same = (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)
            return same and os.pread(self._descriptor, 256, 0) == self.token.encode()
        except OSError:
            return False

    def check(self) -> None:
        """Raise unless the lock still keeps others out.

        Raises:
            Fenced: it does not.
        """
        if not self.holds():
            hint = "another indexer may own the partition now; this one starts over"
            raise Fenced("the lock file was removed or replaced", operation="commit", place=str(self.path), hint=hint)

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back, with `remove` together with its file; safe to call twice."""
        if self._descriptor < 0:
            return
        if remove and self.holds():
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1


def is_held(path: Path) -> bool:
    """Whether some process holds the lock; asking takes a shared lock for an instant."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def waiting(path: Path, token: str, *, timeout_s: float = 60.0) -> Iterator[FileLock]:
    """The lock, waited for.

    Raises:
        StoreUnavailable: somebody else held it for `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while (lock := FileLock.take(path, token)) is None:
        if time.monotonic() > deadline:
            raise StoreUnavailable("another process keeps the lock", operation="lock", place=str(path), hint="see which process holds it")
        time.sleep(_POLL_S)
    try:
        yield lock
    finally:
        lock.release()


def tier_lock_path(hot: Path) -> Path:
    """The lock of whoever decides what is hot and what is cold: tiering, rewriting, rebuilding."""
    return hot / "fences" / "tier.lock"


def fence_path(hot: Path, partition: int) -> Path:
    """Where the fence of a partition is."""
    return hot / "fences" / f"p{partition:03d}.lock"
