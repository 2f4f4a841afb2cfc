"""Hot shards as one relation: attached read-only, older ones with null where they lack a column."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from schemas.errors import StoreUnavailable
from store import duck
from store.columns import current_columns
from store.shards import Shard


def attach(connection: duckdb.DuckDBPyConnection, shards: Sequence[Shard], *, day: bool = False) -> str:
    """Attach shards and return a parenthesised SELECT over all their rows, to stand in a FROM clause.

    Its columns are those of `events` in order, with `day` one more: the day that the shard was filed under.

    Raises:
        CorruptStore: a shard is damaged.
        StoreUnavailable: a shard is gone (merged and past its grace); take a new snapshot.
    """
    names = [_attach(connection, shard, number) for number, shard in enumerate(shards)]
    columns = {**current_columns(), **({"day": "VARCHAR"} if day else {})}
    head = ", ".join(f'CAST(NULL AS {kind}) AS "{name}"' for name, kind in columns.items())
    extra = [f", '{shard.day}' AS day" if day else "" for shard in shards]
    parts = [f"SELECT *{more} FROM {name}.events" for name, more in zip(names, extra, strict=True)]
    return "(" + " UNION ALL BY NAME ".join([f"SELECT {head} WHERE false", *parts]) + ")"


def detach(connection: duckdb.DuckDBPyConnection, shards: Sequence[Shard]) -> None:
    """Let go of what `attach` attached."""
    for number, _ in enumerate(shards):
        connection.execute(f"DETACH hot_{number}")


def _attach(connection: duckdb.DuckDBPyConnection, shard: Shard, number: int) -> str:
    path = str(shard.path.absolute()).replace("'", "''")
    try:
        connection.execute(f"ATTACH '{path}' AS hot_{number} (READ_ONLY)")
    except duckdb.Error as problem:
        if not shard.path.exists():
            raise StoreUnavailable("the shard is gone", operation="attach", place=str(shard.path), hint="take a new snapshot") from problem
        raise duck.mapped(problem, operation="attach", place=str(shard.path)) from problem
    return f"hot_{number}"
