"""SQLite under the embedded log: how a connection is opened, and what its errors mean."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import CorruptStore, LogUnavailable, StorageFull, TokentapeError

# Batches are large: bigger pages mean fewer links to follow when one is read.
_PAGE_BYTES = 16_384
# The write-ahead log is cut back to this after a burst.
_WAL_BYTES_MAX = 64 << 20
# Below this much free space an I/O error is taken for a full disk: SQLite does not pass errno on.
_FREE_BYTES_MIN = 1 << 20

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def connect(path: Path, *, timeout_s: float) -> sqlite3.Connection:
    """A connection in autocommit mode whose commits are on disk when they return (WAL, `synchronous=FULL`).

    The caller maps errors with `mapped`, and uses the connection in one thread at a time.
    """
    connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None, check_same_thread=False, cached_statements=32)
    try:
        connection.execute(f"PRAGMA page_size={_PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(f"PRAGMA journal_size_limit={_WAL_BYTES_MAX}")
        # Trimmed events may be personal data: their bytes are overwritten, not only unlinked.
        connection.execute("PRAGMA secure_delete=ON")
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def mapped(operation: str, path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into those of tokentape."""
    try:
        yield
    except sqlite3.Error as problem:
        raise _from_sqlite(problem, operation, path) from problem
    except OSError as problem:
        raise _from_os(problem, operation, path) from problem


def _from_sqlite(problem: sqlite3.Error, operation: str, path: Path) -> TokentapeError:
    code = getattr(problem, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL or (code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and _free_bytes(path) < _FREE_BYTES_MIN):
        return _full(operation, path)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return LogUnavailable(
            "another process keeps the log locked", operation=operation, place=str(path), hint="see which process holds it"
        )
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        hint = "check the disk and the rights on the folder"
        return LogUnavailable(str(problem), operation=operation, place=str(path), hint=hint)
    hint = "restore the file from a copy; events already indexed are safe"
    return CorruptStore(str(problem), operation=operation, place=str(path), hint=hint)


def _from_os(problem: OSError, operation: str, path: Path) -> TokentapeError:
    if problem.errno in _NO_ROOM:
        return _full(operation, path)
    fault = problem.strerror or str(problem)
    return LogUnavailable(fault, operation=operation, place=str(path), hint="check the disk and the rights on the folder")


def _full(operation: str, path: Path) -> StorageFull:
    return StorageFull("the disk is full; nothing was written", operation=operation, place=str(path), hint="free space and try again")


def _free_bytes(path: Path) -> int:
    try:
        found = os.statvfs(path.parent)
    except OSError:
        return _FREE_BYTES_MIN
    return found.f_bavail * found.f_frsize
