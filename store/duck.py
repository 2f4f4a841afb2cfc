"""DuckDB connections with the pinned extensions loaded from their wheels: no network, no home directory."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import duckdb

from schemas.errors import CorruptStore, StorageFull, TokentapeError


@cache
def extension_path(name: str) -> str:
    """File of the extension `avro` or `httpfs` for this DuckDB.

    Raises:
        CorruptStore: the wheel is not installed or holds another version.
    """
    spec = importlib.util.find_spec(f"duckdb_extension_{name}")
    root = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    found = sorted(root.glob(f"extensions/v{duckdb.__version__}/{name}.duckdb_extension")) if spec else []
    if not found:
        raise CorruptStore(
            f"DuckDB extension {name} for version {duckdb.__version__} is not installed",
            operation="load extension",
            hint=f"pip install duckdb-extension-{name}=={duckdb.__version__}",
        )
    return str(found[0])


def connect(
    path: Path | None = None, *, read_only: bool = False, extensions: tuple[str, ...] = (), **config: Any
) -> duckdb.DuckDBPyConnection:
    """A connection to a file, or in memory; progress bars off, extensions loaded, nothing is ever installed.

    Raises:
        CorruptStore: the file is damaged or written by another version.
        StorageFull: no room.
    """
    settings = {"autoinstall_known_extensions": False, "autoload_known_extensions": False, **config}
    try:
        connection = duckdb.connect(str(path) if path else ":memory:", read_only=read_only, config=settings)
        for name in extensions:
            connection.execute(f"LOAD '{extension_path(name)}'")
        connection.execute("SET TimeZone='UTC'")
        if connection.execute("SELECT current_setting('enable_progress_bar')").fetchall()[0][0]:  # else a notebook may refuse to set it
            connection.execute("SET enable_progress_bar = false")  # it would print into answers
    except duckdb.Error as error:
        raise mapped(error, operation="open", place=str(path or "memory")) from error
    return connection


def mapped(error: duckdb.Error, *, operation: str, place: str) -> TokentapeError:
    """The tokentape error that stands for one of DuckDB's."""
    text = str(error).splitlines()[0]
    if "No space left" in text or "could not write" in text.lower():
        return StorageFull(text, operation=operation, place=place, hint="free some disk space and try again")
    if "Out of Memory" in text:
        return StorageFull(text, operation=operation, place=place, hint="raise sql.memory_mb, or let less run beside it")
    return CorruptStore(text, operation=operation, place=place, hint="run `tokentape rebuild` to make the index again")
