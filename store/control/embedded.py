"""The embedded control log: one SQLite table that several processes write and follow.

How far facts were acknowledged stands in a file beside it (`-end`) too, and a log that ends before is refused (`store.log.sqlite`).
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from schemas import clock
from schemas.errors import LogChanged, LogUnavailable
from store.control.base import TOMBSTONE_S, ControlRecord, Value, decode, encode, fold
from store.crashpoints import crash_point
from store.log.sqlite import EndNote, connect, mapped

# How often a waiting follower looks: a released request goes on within this time.
_POLL_S = 0.02

# One row per kind and key, as in a compacted topic. `AUTOINCREMENT` never gives a position out twice.
_TABLE = """CREATE TABLE IF NOT EXISTS fact (
    position INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB, written_at REAL NOT NULL,
    UNIQUE (kind, key))"""

_LAST = "SELECT seq FROM sqlite_sequence WHERE name = 'fact'"

# In the note of what was acknowledged, where an event log has its id; this one has none.
_NO_ID = bytes(16)

_SELECT = "SELECT position, kind, key, value, written_at FROM fact WHERE position > ?"


class EmbeddedControl:
    """A control log in one SQLite file. What is replaced or taken away is overwritten in it."""

    def __init__(self, path: Path, *, timeout_s: float = 30.0) -> None:
        """Open the log, made first where there is none.

        Raises:
            LogUnavailable: the file stays locked for `timeout_s`, or its folder cannot be written.
            CorruptStore: the file is no SQLite database, or acknowledged facts are gone from it.
        """
        self._path = path
        self._end = EndNote(path, "facts")
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        with mapped("open control log", path):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            noted = self._end.read()  # before the log itself, which others may append to
            self._connection = connect(path, timeout_s=timeout_s)
            self._connection.execute(_TABLE)
            self._check_end(noted)

    def _check_end(self, noted: tuple[bytes, int] | None) -> None:
        """Refuse a log that ends before the last fact that it acknowledged."""
        if noted is not None and (lost := noted[1] - _last(self._open())) > 0:
            self.close()
            raise self._end.cut(lost)

    def append(self, kind: str, key: str, value: Value | None) -> int:
        """Write a fact, on disk when this returns; its position."""
        data, at = encode(kind, key, value, place=str(self._path)), clock.now_s()
        with self._lock, mapped("append", self._path):
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.execute("DELETE FROM fact WHERE kind = ? AND key = ?", (kind, key))
                connection.execute("DELETE FROM fact WHERE value IS NULL AND written_at < ?", (at - TOMBSTONE_S,))
                row = "INSERT INTO fact (kind, key, value, written_at) VALUES (?, ?, ?, ?)"
                position = connection.execute(row, (kind, key, data, at)).lastrowid
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            assert position is not None
            self._end.write(_NO_ID, position)
        crash_point("control.written")
        return position

    def follow(self, position: int, *, wait_s: float = 0.0) -> Sequence[ControlRecord]:
        """Every fact after `position` that no later one replaced, waiting up to `wait_s` for the first."""
        deadline = time.monotonic() + wait_s
        while True:
            found = self._after(position)
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            time.sleep(min(_POLL_S, left))

    def latest(self, kind: str) -> dict[str, Value]:
        """What holds now, by key."""
        return fold(self._after(0), kind)

    def _after(self, position: int) -> list[ControlRecord]:
        with self._lock, mapped("read", self._path):
            connection = self._open()
            rows = connection.execute(f"{_SELECT} ORDER BY position", (position,)).fetchall()
            if not rows and position > _last(connection):
                fault = f"no position {position} in this control log"
                raise LogChanged(fault, operation="follow", place=str(self._path), hint="it was replaced: begin again at 0")
        return [ControlRecord(at, kind, key, decode(value, place=str(self._path)), when) for at, kind, key, value, when in rows]

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise LogUnavailable("the control log is closed", operation="use control log", place=str(self._path))
        return self._connection

    def close(self) -> None:
        """Release the file; safe to call twice."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()
            self._end.close()


def _last(connection: sqlite3.Connection) -> int:
    """The position of the last fact that was ever written."""
    row = connection.execute(_LAST).fetchone()
    return int(row[0]) if row else 0
