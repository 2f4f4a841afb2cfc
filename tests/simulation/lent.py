"""DuckDB for a run: connections to instances that are used again, because to start one takes longer than what a run asks of it.

What a connection attached is detached when it closes, as if its instance had ended; what it was told about threads and memory is not
heeded, for a run has a few rows and one thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb

_CONNECT = duckdb.connect

# Blocks of 16 KiB are sooner filled by a few rows, and extensions' signatures are not checked each time.
_CONFIG: dict[str, Any] = {
    "threads": 1,
    "default_block_size": 16_384,
    "allow_unsigned_extensions": True,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
_HEEDED_NOT = {*_CONFIG, "memory_limit", "temp_directory"}

_idle: list[duckdb.DuckDBPyConnection] = []


def connect(database: str, *, read_only: bool, config: dict[str, Any]) -> Any:
    """What `duckdb.connect` gives, but of an instance of its own only while it is open."""
    if not config.keys() <= _HEEDED_NOT:
        return _CONNECT(database, read_only, config)
    return Lent(database, read_only)


class Lent:
    """A connection; all but its end is DuckDB's."""

    def __init__(self, database: str, read_only: bool) -> None:
        self._instance = _idle.pop() if _idle else _CONNECT(config=_CONFIG)
        self._own = self._instance.cursor()
        self._open = True
        self._use = ""
        if database != ":memory:":
            name, path = Path(database).stem, database.replace("'", "''")
            self._use = f'USE "{name}"'
            self._own.execute(f"ATTACH '{path}' AS \"{name}\"{' (READ_ONLY)' if read_only else ''}; {self._use}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __enter__(self) -> Lent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """Another one to the same file."""
        found = self._own.cursor()
        if self._use:
            found.execute(self._use)
        return found

    def close(self) -> None:
        """Let go of every file; safe to call twice."""
        if not self._open:
            return
        self._open = False
        self._own.close()
        attached = "SELECT database_name FROM duckdb_databases() WHERE NOT internal AND database_name <> 'memory'"
        for (name,) in self._instance.execute(attached).fetchall():
            self._instance.execute(f'DETACH "{name}"')
        _idle.append(self._instance)
