"""SQLite under the embedded logs: how a connection is opened, what its errors mean, and what was acknowledged.

SQLite reads its write-ahead log up to the first page that does not match its checksum and takes that for the end: damage there
would take away what was acknowledged without a word. So how much that was stands in a file beside it (`-end`) too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import crc32c

from schemas.errors import CorruptStore, LogUnavailable, StorageFull, TokentapeError

# Batches are large: bigger pages mean fewer links to follow when one is read.
_PAGE_BYTES = 16_384
# The write-ahead log is cut back to this after a burst.
_WAL_BYTES_MAX = 64 << 20
# Below this much free space an I/O error is taken for a full disk: SQLite does not pass errno on.
_FREE_BYTES_MIN = 1 << 20

# Which log, how many events or facts it has acknowledged, and a checksum of both.
_END = struct.Struct("<16sQI")

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


class EndNote:
    """How much a log has acknowledged, noted beside its file (`-end`). `what` names it: events or facts."""

    def __init__(self, path: Path, what: str) -> None:
        self._log_path, self._what = path, what
        self._path = path.with_name(f"{path.name}-end")
        self._file = -1

    def read(self) -> tuple[bytes, int] | None:
        """The id of the log that stands or stood here, and how much it has acknowledged; None where nothing legible says so."""
        try:
            data = self._path.read_bytes()
        except OSError:
            return None
        if len(data) != _END.size:
            return None
        log_id, count, _ = _END.unpack(data)
        return (log_id, count) if data == _sealed(log_id, count) else None

    def write(self, log_id: bytes, count: int) -> None:
        """Note what is acknowledged; not synced, for a note that is behind only says less."""
        with contextlib.suppress(OSError):
            if self._file < 0:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.pwrite(self._file, _sealed(log_id, count), 0)

    def cut(self, lost: int) -> CorruptStore:
        """The error that says so many are gone, and how to go on."""
        hint = f"restore it with its -wal from a copy, or remove {self._path.name} to go on without these {self._what}"
        fault = f"the last {lost:,} {self._what} that it acknowledged are gone: the file or its write-ahead log is damaged or was removed"
        return CorruptStore(fault, operation="open log", place=str(self._log_path), hint=hint)

    def close(self) -> None:
        """Release the file; safe to call twice."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def _sealed(log_id: bytes, count: int) -> bytes:
    """What stands in the file beside the log."""
    body = _END.pack(log_id, count, 0)[:-4]
    return body + struct.pack("<I", crc32c.crc32c(body))


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
