"""From tail to immutable shard: checkpoint, close, rename, list in the catalog; and what a killed process left half done.

Each step can be the last one of a process. A tail whose owner is dead is sealed by whoever takes over; a renamed file
that the catalog does not list is listed; and what the catalog refuses, because its records were indexed by somebody
else meanwhile, is put aside. The log has all of it still, so nothing is lost with a file that cannot be used.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import structlog

from schemas.errors import CorruptStore, Fenced, TokentapeError
from schemas.events import SAMPLED_OUT
from store import duck, tables
from store.catalog import Catalog
from store.crashpoints import crash_point
from store.fences import FileLock, waiting
from store.shards import Duplicate, Gap, Mark, Position, Quarantined, Range, Sealed, Shard
from store.tail import open_file, sync_file

log = structlog.get_logger("tokentape.indexer")

NO_SESSION = (b"\xff" * 16, b"")
"""`session_min` and `session_max` of a shard without rows: no session lies between them."""


def seal(connection: duckdb.DuckDBPyConnection, path: Path, catalog: Catalog) -> Sealed | None:
    """Close a tail, make it a shard and list it; None when nothing was ever committed to it, and then it is gone.

    Raises:
        Fenced: somebody else indexed its records meanwhile; the file was put aside.
        StorageFull, CorruptStore: the file cannot be finished; its last commit stands.
    """
    target = catalog.shards_folder / path.name
    with _mapped("seal", path):
        sealed = read_sealed(connection, target)
        crash_point("seal.before_checkpoint")
        connection.execute("CHECKPOINT")
        connection.close()
    if sealed is None:
        remove(path)
        return None
    if path.with_name(path.name + ".wal").exists():
        raise CorruptStore("a write-ahead log is left after the checkpoint", operation="seal", place=str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    sync_file(path)
    crash_point("seal.before_rename")
    path.rename(target)
    sync_file(target.parent)
    sync_file(path.parent)
    crash_point("seal.before_register")
    return _register(sealed, target, catalog)


def _register(sealed: Sealed, target: Path, catalog: Catalog) -> Sealed:
    sealed = replace(sealed, shard=replace(sealed.shard, bytes=target.stat().st_size))
    try:
        catalog.register(sealed)
    except Fenced:
        put_aside(target, catalog)
        raise
    crash_point("seal.registered")
    return sealed


def read_sealed(connection: duckdb.DuckDBPyConnection, target: Path) -> Sealed | None:
    """All that the catalog must know about a tail or sealed shard but its size, read from its own tables; None without a commit.

    Raises:
        CorruptStore: what it says about itself does not agree: rows against counts, counts against offsets.
    """
    meta = connection.execute("SELECT name, level, day, log_id FROM meta").fetchone()
    positions = connection.execute("SELECT * FROM position ORDER BY partition").fetchall()
    if meta is None or not positions:
        return None
    tables.finish(connection)
    _check(connection, positions, target)
    name, _, day, log_id = meta
    ranges = tuple(Range(log_id, row[0], row[1], row[3], row[2], row[4]) for row in positions)
    quarantine = connection.execute("SELECT * FROM quarantine ORDER BY partition, at_offset").fetchall()
    return Sealed(
        _shard(connection, name, target, day, ranges),
        tuple(Position(log_id, row[0], row[3], row[4], row[5], row[6], 0, row[7], row[8]) for row in positions),
        _marks(connection, "SELECT partition, producer_id, max(seq) FROM mark GROUP BY ALL", log_id),
        _marks(connection, "SELECT partition, producer_id, max(seq), max(appended_at) FROM claim_seq GROUP BY ALL", log_id),
        tuple(Gap(*(log_id, *row[:4], "jump", *row[4:])) for row in connection.execute("SELECT * FROM gap").fetchall()),
        tuple(Duplicate(log_id, *row) for row in connection.execute("SELECT * FROM duplicate").fetchall()),
        tuple(Quarantined(*(log_id, *row[:4], len(row[5]), row[4])) for row in quarantine),
        tuple(row[5] for row in quarantine),
        *_counted(connection),
    )


def _counted(connection: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """`sampled_out` and `shown` of `Sealed`."""
    row = connection.execute(
        f"SELECT sum(records_lost.count) FILTER (records_lost.reason = '{SAMPLED_OUT}'), count(session_annotated.visibility)"
        " FROM events WHERE kind IN ('records_lost', 'session_annotated')"
    ).fetchone()
    return (int(row[0] or 0), int(row[1])) if row else (0, 0)


def _shard(connection: duckdb.DuckDBPyConnection, name: str, target: Path, day: str, ranges: tuple[Range, ...]) -> Shard:
    low, high, time_min, time_max, rows = shard_facts(connection, "events")
    return Shard(name, target, "sealed", day, ranges, low, high, time_min, time_max, rows, 0)


def shard_facts(connection: duckdb.DuckDBPyConnection, table: str) -> tuple[bytes, bytes, int, int, int]:
    """Lowest and highest session, first and last `recorded_at` in µs, and number of rows."""
    row = connection.execute(
        f"SELECT min(session_id), max(session_id), epoch_us(min(recorded_at)), epoch_us(max(recorded_at)), count(*) FROM {table}"
    ).fetchone()
    assert row is not None
    if not row[4]:
        return (*NO_SESSION, 0, 0, 0)
    return row[0], row[1], row[2], row[3], row[4]


def _marks(connection: duckdb.DuckDBPyConnection, query: str, log_id: str) -> tuple[Mark, ...]:
    return tuple(Mark(log_id, *row) for row in connection.execute(query).fetchall())


def _check(connection: duckdb.DuckDBPyConnection, positions: list[tuple[Any, ...]], target: Path) -> None:
    found = dict(connection.execute('SELECT "partition", count(*) FROM events GROUP BY ALL').fetchall())
    for partition, first, _, after, *_, rows, dropped in positions:
        if found.pop(partition, 0) != rows or rows + dropped != after - first:
            fault = f"partition {partition}: rows, positions and counts disagree"
            raise CorruptStore(fault, operation="check shard", place=str(target), hint="its records are indexed again from the log")
    if found:
        raise CorruptStore("rows of partitions without a position", operation="check shard", place=str(target))


# What dead owners left


def recover(hot: Path, catalog: Catalog, token: str) -> list[str]:
    """Seal tails whose owner is dead and list shards that were renamed but not listed; the names of all that were."""
    with waiting(hot / "fences" / "recover.lock", token):
        names = [path.stem for path in _orphans(hot / "tail") if _adopt(path, catalog, token)]
        unknown = [path for path in sorted(catalog.shards_folder.glob("*.duckdb")) if not catalog.knows(path.stem)]
        names += [path.stem for path in unknown if _list(path, catalog)]
        _sweep(hot)
    if names:
        log.info("indexer.recovered", shards=names)
    return names


def _sweep(hot: Path) -> None:
    """Remove locks and scratch files of dead indexers that left no tail."""
    owned = {owner_lock(path) for path in _orphans(hot / "tail")}
    for path in set((hot / "tail").glob("*.lock")) - owned:
        lock = FileLock.take(path, path.stem)
        if lock is not None:
            shutil.rmtree(hot.parent / "tmp" / path.stem, ignore_errors=True)
            lock.release(remove=True)


def _orphans(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.duckdb"))


def owner_lock(tail: Path) -> Path:
    """The lock of the indexer that owns a tail: `<token>-<number>.duckdb` is owned by `<token>.lock`."""
    return tail.with_name(tail.stem.rpartition("-")[0] + ".lock")


def _adopt(path: Path, catalog: Catalog, token: str) -> bool:
    lock = FileLock.take(owner_lock(path), token)
    if lock is None:
        return False
    try:
        connection = open_file(path)
        try:
            return seal(connection, path, catalog) is not None
        finally:
            connection.close()
    except (CorruptStore, Fenced) as problem:
        log.warning("indexer.tail_unusable", path=str(path), error=str(problem))
        put_aside(path, catalog)
        return False
    finally:
        lock.release(remove=not any(owner_lock(other) == lock.path for other in _orphans(path.parent)))


def _list(path: Path, catalog: Catalog) -> bool:
    """List a renamed tail; what a merge wrote is left to the next merge."""
    try:
        with open_file(path, read_only=True) as connection, _mapped("recover", path):
            level = connection.execute("SELECT level FROM meta").fetchone()
            if level is None or level[0] != "sealed":
                return False
            sealed = read_sealed(connection, path)
        if sealed is not None:
            _register(sealed, path, catalog)
    except (CorruptStore, Fenced) as problem:
        log.warning("indexer.shard_unusable", path=str(path), error=str(problem))
        put_aside(path, catalog)
        return False
    return True


def put_aside(path: Path, catalog: Catalog) -> None:
    """Move a file that cannot be used out of the way, for whoever wants to look at it."""
    folder = catalog.path.parent / "aside"
    folder.mkdir(parents=True, exist_ok=True)
    for file in (path, path.with_name(path.name + ".wal")):
        with contextlib.suppress(FileNotFoundError):
            file.rename(folder / file.name)


def remove(path: Path) -> None:
    """Delete a DuckDB file and what belongs to it."""
    for file in (path, path.with_name(path.name + ".wal")):
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def _mapped(operation: str, path: Path) -> Any:
    try:
        yield
    except TokentapeError:
        raise
    except duckdb.Error as problem:
        raise duck.mapped(problem, operation=operation, place=str(path)) from problem
