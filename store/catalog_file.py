"""The catalog's SQLite file: connections that survive forks, transactions, and what SQLite's errors mean."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import CorruptStore, StorageFull, StoreUnavailable, TokentapeError
from store.catalog_tables import LAYOUT, TABLES
from store.crashpoints import crash_point

# How long a writer waits for another process's transaction; each of them takes milliseconds.
_BUSY_S = 30.0


class CatalogFile:
    """A SQLite file in `path` with the catalog's tables. Safe for many processes and threads; a child after a fork opens it anew."""

    def __init__(self, path: Path) -> None:
        """Open or make the catalog.

        Raises:
            CorruptStore: the file is not a catalog of this version.
            StoreUnavailable, StorageFull: it cannot be opened or written.
        """
        self._path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        with self._mapped("open catalog"):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._writing("open catalog") as connection:
            self._create(connection)

    @property
    def path(self) -> Path:
        """Where the catalog is."""
        return self._path

    @property
    def shards_folder(self) -> Path:
        """Where sealed and merged shards are."""
        return self._path.parent / "shards"

    def close(self) -> None:
        """Release the file; safe to call twice, and the next call opens it again."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def _create(self, connection: sqlite3.Connection) -> None:
        for table in TABLES:
            connection.execute(table)
        connection.execute("INSERT OR IGNORE INTO fact VALUES ('layout', ?)", (LAYOUT,))
        found = connection.execute("SELECT value FROM fact WHERE key = 'layout'").fetchone()[0]
        if found != LAYOUT:
            raise CorruptStore(
                f"the catalog has layout {found}; this version reads {LAYOUT}", operation="open catalog", place=str(self._path)
            )

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None or self._pid != os.getpid():
            connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            self._connection, self._pid = connection, os.getpid()
        return self._connection

    @contextlib.contextmanager
    def _reading(self, operation: str) -> Iterator[sqlite3.Connection]:
        """One consistent view."""
        with self._lock, self._mapped(operation):
            connection = self._connected()
            connection.execute("BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def _writing(self, operation: str, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing; on disk when it ends, if `durable`."""
        with self._lock, self._mapped(operation):
            connection = self._connected()
            connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                crash_point("catalog.before_commit")
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
        crash_point("catalog.committed")

    @contextlib.contextmanager
    def _mapped(self, operation: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as problem:
            raise _error(problem, operation, self._path) from problem
        except OSError as problem:
            raise StoreUnavailable(problem.strerror or str(problem), operation=operation, place=str(self._path)) from problem


def _error(problem: sqlite3.Error, operation: str, path: Path) -> TokentapeError:
    """The tokentape error that stands for one of SQLite's."""
    code = getattr(problem, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return StorageFull("the disk is full; nothing was written", operation=operation, place=str(path), hint="free space and try again")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreUnavailable(
            "another process keeps the catalog locked", operation=operation, place=str(path), hint="see which process holds it"
        )
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return StoreUnavailable(str(problem), operation=operation, place=str(path), hint="check the disk and the rights on the folder")
    return CorruptStore(str(problem), operation=operation, place=str(path), hint="run `tokentape rebuild` to make the index again")
