"""Versions of sessions in pieces, each piece of a session once however many versions hold it: `snapshots/versions.sqlite`.

Derived from the tape and from nothing else: whoever deletes the folder loses nothing, the next run makes it again. Pieces
are JSON, named by what they say (`piece`), and counted by who refers to them. They never serve two sessions, so that a
session can be forgotten whole.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import zstandard

from schemas.errors import CorruptStore, StorageFull, StoreUnavailable, TokentapeError

NAME_BYTES = 16
"""Bytes of a piece's name, the beginning of its SHA-256: pieces of one session are too few to collide."""

_REFERENCE = re.compile(rb'"=":"([0-9a-f]{%d})"' % (2 * NAME_BYTES))
"""A reference in a piece. No text can look like one: in JSON a quotation mark within a text has a backslash before it."""

_ZSTD = zstandard.FRAME_HEADER
"""How compressed data begins; JSON never does."""

_TABLES = (
    "CREATE TABLE IF NOT EXISTS layout (name TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS version (session_id BLOB NOT NULL, number INTEGER NOT NULL, event_id BLOB NOT NULL,"
    " position INTEGER NOT NULL, basis BLOB NOT NULL, generation_id BLOB NOT NULL, why TEXT NOT NULL, actor TEXT NOT NULL,"
    " at INTEGER NOT NULL, root TEXT NOT NULL, bytes_whole INTEGER NOT NULL, bytes_stored INTEGER NOT NULL,"
    " let_go INTEGER NOT NULL, PRIMARY KEY (session_id, number)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS piece (session_id BLOB NOT NULL, name TEXT NOT NULL, data BLOB NOT NULL, refs INTEGER NOT NULL,"
    " PRIMARY KEY (session_id, name)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS mark (log_id TEXT NOT NULL, partition INTEGER NOT NULL, offset_next INTEGER NOT NULL,"
    " PRIMARY KEY (log_id, partition)) WITHOUT ROWID",
)
_TABLE_NAMES = ("version", "piece", "mark", "layout")


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a session: its state after the event of `event_id`, the `position`-th of the session.

    `basis` digests the events that it was derived from. `bytes_whole` is its size as one JSON document, `bytes_stored` what
    it added to the store. Once `let_go`, its pieces are gone and the events alone give it back.
    """

    session_id: bytes
    number: int
    event_id: bytes
    position: int
    basis: bytes
    generation_id: bytes
    why: str
    actor: str
    at: int
    root: str
    bytes_whole: int
    bytes_stored: int = 0
    let_go: bool = False


def name_of(piece: bytes) -> str:
    """The name of a piece."""
    return hashlib.sha256(piece).digest()[:NAME_BYTES].hex()


def references(piece: bytes) -> list[str]:
    """The names of the pieces that a piece refers to, as often as it does."""
    return [name.decode() for name in _REFERENCE.findall(piece)]


class VersionStore:
    """The versions of an installation. Safe for many processes and threads: each operation is one short connection."""

    def __init__(self, folder: Path, layout: str) -> None:
        """Open the store in `folder`; one of another `layout` is emptied, since it can be made again.

        Raises:
            StoreUnavailable, StorageFull, CorruptStore: it cannot be opened, written or read.
        """
        self.path = folder / "versions.sqlite"
        with _mapped("open snapshots", self.path):
            folder.mkdir(parents=True, exist_ok=True)
        with self._writing("open snapshots") as connection:
            _create(connection, layout)

    def versions(self, session_id: bytes) -> list[Version]:
        """The versions of a session, those let go included, the oldest first."""
        with self._connection("list snapshots") as connection:
            return _versions(connection, session_id)

    def sessions(self) -> list[bytes]:
        """The sessions of which there are versions."""
        with self._connection("list snapshots") as connection:
            return [row[0] for row in connection.execute("SELECT DISTINCT session_id FROM version")]

    def bytes_of(self, session_id: bytes) -> int:
        """What the pieces of a session take."""
        with self._connection("measure snapshots") as connection:
            return _bytes(connection, session_id)

    def add(self, versions: Sequence[Version], pieces: Mapping[str, bytes], *, bytes_max: int) -> bool:
        """Store the next versions of a session and those of their pieces that are not there, all or nothing.

        After each the oldest are let go until the session takes `bytes_max` at most; the newest always stays. False when
        somebody else has stored these numbers meanwhile.
        """
        session_id = versions[0].session_id
        with self._writing("store snapshots") as connection:
            known = _versions(connection, session_id)
            if versions[0].number != len(known) + 1:
                return False
            live = deque(version for version in known if not version.let_go)
            size = _bytes(connection, session_id)
            for version in versions:
                added = _hold(connection, session_id, version.root, pieces)
                row = (*astuple(version)[:-2], added, False)
                connection.execute(f"INSERT INTO version VALUES ({', '.join('?' * len(row))})", row)
                size += added
                while size > bytes_max and live:
                    size -= _let_go(connection, live.popleft())
                live.append(version)
        return True

    @contextmanager
    def pieces(self, session_id: bytes) -> Iterator[Callable[[str], bytes]]:
        """What gives the pieces of a session by their names.

        Raises:
            CorruptStore: one is missing or is not what its name says.
        """
        with self._connection("read snapshot") as connection:
            connection.execute("BEGIN")
            yield lambda name: self._piece(connection, session_id, name)

    def _piece(self, connection: sqlite3.Connection, session_id: bytes, name: str) -> bytes:
        row = connection.execute("SELECT data FROM piece WHERE session_id = ? AND name = ?", (session_id, name)).fetchone()
        data = _unpacked(row[0]) if row else b""
        if name_of(data) != name:
            fault = f"piece {name} is {'damaged' if row else 'missing'}"
            raise CorruptStore(fault, operation="read snapshot", place=str(self.path), hint=_hint(self.path))
        return data

    def forget(self, session_id: bytes) -> None:
        """Remove all of a session; its bytes are overwritten, in the write-ahead log too."""
        with self._connection("forget snapshots") as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("DELETE FROM version WHERE session_id = ?", (session_id,))
            connection.execute("DELETE FROM piece WHERE session_id = ?", (session_id,))
            connection.execute("COMMIT")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def marks(self) -> dict[tuple[str, int], int]:
        """By log and partition, the offset below which events were looked at."""
        with self._connection("read marks") as connection:
            return {(log_id, partition): offset for log_id, partition, offset in connection.execute("SELECT * FROM mark")}

    def set_marks(self, marks: Mapping[tuple[str, int], int]) -> None:
        """Note up to where events were looked at."""
        with self._writing("set marks") as connection:
            connection.executemany("INSERT OR REPLACE INTO mark VALUES (?, ?, ?)", [(*place, offset) for place, offset in marks.items()])

    @contextmanager
    def _writing(self, operation: str) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing."""
        with self._connection(operation) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    @contextmanager
    def _connection(self, operation: str) -> Iterator[sqlite3.Connection]:
        with _mapped(operation, self.path), closing(sqlite3.connect(self.path, timeout=30.0, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")  # a lost version is derived again
            connection.execute("PRAGMA secure_delete=ON")  # what is forgotten may be personal data
            yield connection


def _create(connection: sqlite3.Connection, layout: str) -> None:
    for table in _TABLES:
        connection.execute(table)
    found = connection.execute("SELECT name FROM layout").fetchall()
    if found != [(layout,)]:
        for table in _TABLE_NAMES:
            connection.execute(f"DELETE FROM {table}")
        connection.execute("INSERT INTO layout VALUES (?)", (layout,))


def _versions(connection: sqlite3.Connection, session_id: bytes) -> list[Version]:
    rows = connection.execute("SELECT * FROM version WHERE session_id = ? ORDER BY number", (session_id,))
    return [Version(*(*row[:-1], bool(row[-1]))) for row in rows]


def _bytes(connection: sqlite3.Connection, session_id: bytes) -> int:
    found = connection.execute("SELECT coalesce(sum(length(data)), 0) FROM piece WHERE session_id = ?", (session_id,)).fetchone()
    return int(found[0])


def _hold(connection: sqlite3.Connection, session_id: bytes, root: str, pieces: Mapping[str, bytes]) -> int:
    """Count one more reference to a piece; one that is new brings those that it refers to. Returns the bytes that came."""
    waiting, added = [root], 0
    while waiting:
        name = waiting.pop()
        known = connection.execute("UPDATE piece SET refs = refs + 1 WHERE session_id = ? AND name = ?", (session_id, name)).rowcount
        if not known:
            data = _packed(pieces[name])
            connection.execute("INSERT INTO piece VALUES (?, ?, ?, 1)", (session_id, name, data))
            waiting += references(pieces[name])
            added += len(data)
    return added


def _let_go(connection: sqlite3.Connection, version: Version) -> int:
    """Keep of a version only that there was one; returns the bytes that went."""
    place = (version.session_id, version.number)
    connection.execute("UPDATE version SET let_go = 1 WHERE session_id = ? AND number = ?", place)
    return _release(connection, version.session_id, version.root)


def _release(connection: sqlite3.Connection, session_id: bytes, root: str) -> int:
    """Count one reference less; a piece that nothing refers to any more goes, and its references with it. Returns the bytes that went."""
    waiting, freed = [root], 0
    while waiting:
        place = (session_id, waiting.pop())
        connection.execute("UPDATE piece SET refs = refs - 1 WHERE session_id = ? AND name = ?", place)
        gone = connection.execute("DELETE FROM piece WHERE session_id = ? AND name = ? AND refs < 1 RETURNING data", place).fetchall()
        for (data,) in gone:
            waiting += references(_unpacked(data))
            freed += len(data)
    return freed


def _packed(piece: bytes) -> bytes:
    """A piece as it is stored: under zstd where that is smaller."""
    packed = zstandard.ZstdCompressor(write_content_size=True).compress(piece)
    return packed if len(packed) < len(piece) else piece


def _unpacked(data: bytes) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompress(data) if data.startswith(_ZSTD) else data
    except zstandard.ZstdError:
        return b""  # which is not what any name says


def _hint(path: Path) -> str:
    return f"delete {path.parent}: it is derived, and made again from the tape"


@contextmanager
def _mapped(operation: str, path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as problem:
        raise _error(problem, operation, path) from problem
    except OSError as problem:
        hint = "check the disk and the rights on the folder"
        raise StoreUnavailable(problem.strerror or str(problem), operation=operation, place=str(path), hint=hint) from problem


def _error(problem: sqlite3.Error, operation: str, path: Path) -> TokentapeError:
    """The tokentape error that stands for one of SQLite's."""
    code = getattr(problem, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return StorageFull("the disk is full; nothing was written", operation=operation, place=str(path), hint="free space and try again")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return StoreUnavailable(str(problem), operation=operation, place=str(path), hint="check the disk and the rights on the folder")
    return CorruptStore(str(problem), operation=operation, place=str(path), hint=_hint(path))
