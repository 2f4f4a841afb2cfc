"""The ledger of job runs: what ran, when, why and how it ended. It survives restarts and lets one scheduler of several win."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas import clock
from schemas.errors import ConflictError, CorruptStore, StorageFull, StoreUnavailable, TokentapeError

LEASE_S = 120.0
"""How long a run counts as alive without a sign of life; its owner renews it at a third of this."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
  run_id TEXT PRIMARY KEY, job TEXT NOT NULL, slot INTEGER, owner TEXT NOT NULL, trigger TEXT NOT NULL,
  started_at REAL NOT NULL, lease_until REAL NOT NULL, finished_at REAL, outcome TEXT, summary TEXT);
CREATE UNIQUE INDEX IF NOT EXISTS runs_slot ON runs (job, slot) WHERE slot IS NOT NULL;
CREATE INDEX IF NOT EXISTS runs_started ON runs (started_at);
CREATE INDEX IF NOT EXISTS runs_ended ON runs (job, finished_at);
"""

_RECENT_S = 30 * 86_400.0  # a job that has not run for so long says nothing about today


@dataclass(frozen=True, slots=True)
class Run:
    """One run. Times are seconds since the epoch; `outcome` is running, ok, failed or abandoned."""

    run_id: str
    job: str
    owner: str
    trigger: str
    started_at: float
    finished_at: float | None
    outcome: str
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Standing:
    """How one job's last ended run ended: when (seconds since the epoch), and the error of a failed one."""

    job: str
    outcome: str
    ended_at: float
    error: str


class RunLedger:
    """`jobs.sqlite`: append-only but for the end of each run."""

    def __init__(self, path: Path) -> None:
        """Raises StoreUnavailable, StorageFull, CorruptStore: the file cannot be opened, or is something else."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        with self.connection() as connection:
            connection.executescript(_SCHEMA)

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """One short connection per operation: nothing to share between threads or to carry over a fork."""
        try:
            connection = sqlite3.connect(self._path, timeout=30.0, isolation_level=None)
        except sqlite3.Error as error:
            raise _mapped(error, self._path) from error
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            yield connection
        except sqlite3.Error as error:
            raise _mapped(error, self._path) from error
        finally:
            connection.close()

    def begin(self, job: str, *, slot: int | None, trigger: str) -> str:
        """Enter a run and return its id.

        `slot` numbers the tick of a schedule: of several schedulers that see one tick, one enters it. A job that is
        running is not entered again; a run whose lease is over is marked abandoned first.

        Raises:
            ConflictError: somebody else has this tick, or the job is running.
        """
        now, run_id = clock.now_us() / 1e6, uuid.uuid4().hex
        with self.connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "UPDATE runs SET outcome='abandoned', finished_at=? WHERE job=? AND finished_at IS NULL AND lease_until < ?",
                (now, job, now),
            )
            busy = connection.execute("SELECT owner FROM runs WHERE job=? AND finished_at IS NULL", (job,)).fetchone()
            taken = connection.execute("SELECT owner FROM runs WHERE job=? AND slot=?", (job, slot)).fetchone()
            if busy or taken:
                connection.execute("COMMIT")
                why = "is running" if busy else "has run for this tick"
                raise ConflictError(f"job {job} {why}", operation="run job", place=(busy or taken)[0])
            connection.execute(
                "INSERT INTO runs VALUES (?,?,?,?,?,?,?,NULL,NULL,NULL)", (run_id, job, slot, self._owner, trigger, now, now + LEASE_S)
            )
            connection.execute("COMMIT")
        return run_id

    def renew(self, run_id: str) -> None:
        """Say that a run is alive."""
        with self.connection() as connection:
            connection.execute("UPDATE runs SET lease_until=? WHERE run_id=?", (clock.now_us() / 1e6 + LEASE_S, run_id))

    def finish(self, run_id: str, outcome: str, summary: dict[str, Any]) -> None:
        """Enter how a run ended."""
        with self.connection() as connection:
            connection.execute(
                "UPDATE runs SET finished_at=?, outcome=?, summary=? WHERE run_id=?",
                (clock.now_us() / 1e6, outcome, json.dumps(summary, default=str), run_id),
            )

    def history(self, job: str | None = None, *, limit: int = 50) -> list[Run]:
        """The latest runs, newest first."""
        query = (
            "SELECT run_id, job, owner, trigger, started_at, finished_at, outcome, summary FROM runs "
            "WHERE job = coalesce(?, job) ORDER BY started_at DESC LIMIT ?"
        )
        with self.connection() as connection:
            rows = connection.execute(query, (job, limit)).fetchall()
        return [
            Run(run_id, name, owner, trigger, started_at, finished_at, outcome or "running", json.loads(summary or "{}"))
            for run_id, name, owner, trigger, started_at, finished_at, outcome, summary in rows
        ]

    def standings(self) -> list[Standing]:
        """How each job's last run ended."""
        query = (
            "SELECT job, outcome, finished_at, summary FROM runs WHERE rowid IN "
            "(SELECT max(rowid) FROM runs WHERE finished_at IS NOT NULL AND started_at > ? GROUP BY job) ORDER BY job"
        )
        with self.connection() as connection:
            rows = connection.execute(query, (clock.now_s() - _RECENT_S,)).fetchall()
        return [Standing(job, outcome, at, str(json.loads(summary or "{}").get("error", ""))) for job, outcome, at, summary in rows]

    def succeeded(self, job: str) -> tuple[float | None, float | None]:
        """When a job last ended well, and when anything ran first; seconds since the epoch."""
        with self.connection() as connection:
            (last,) = connection.execute("SELECT max(finished_at) FROM runs WHERE job = ? AND outcome = 'ok'", (job,)).fetchone()
            (first,) = connection.execute("SELECT min(started_at) FROM runs").fetchone()
        return last, first

    def summaries(self, job: str, *, since: float, naming: str) -> list[dict[str, Any]]:
        """Summaries of a job's runs that began after a moment and name something, the oldest first."""
        query = "SELECT summary FROM runs WHERE job = ? AND started_at > ? AND instr(summary, ?) > 0 ORDER BY started_at"
        with self.connection() as connection:
            return [json.loads(row[0]) for row in connection.execute(query, (job, since, f'"{naming}"'))]


def _mapped(error: sqlite3.Error, path: Path) -> TokentapeError:
    """The tokentape error that stands for one of SQLite's."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return StorageFull("the disk is full", operation="job runs", place=str(path), hint="free space and try again")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return StoreUnavailable(str(error), operation="job runs", place=str(path), hint="check the disk and the rights on the folder")
    return CorruptStore(str(error), operation="job runs", place=str(path), hint="move the file away: it only tells what ran")
