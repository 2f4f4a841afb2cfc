"""Tables of a shard: `events` with the columns of the current schema, and what an indexer must remember beside it."""

from __future__ import annotations

from functools import cache
from typing import Any

import duckdb

from schemas.errors import NewerSchema
from schemas.registry import CURRENT, Schema
from store.columns import LOG_COLUMNS, current_columns
from store.views import literal

STATE_TABLES = (
    "CREATE TABLE meta (name VARCHAR, level VARCHAR, day VARCHAR, log_id VARCHAR)",
    "CREATE TABLE position (partition INTEGER, offset_first BIGINT, digest_first BLOB, offset_next BIGINT, digest BLOB, day VARCHAR,"
    " appended_at BIGINT, duplicates BIGINT, quarantined BIGINT, rows BIGINT, dropped BIGINT)",
    "CREATE TABLE mark (partition INTEGER, producer_id BLOB, seq BIGINT)",
    "CREATE TABLE claim_seq (partition INTEGER, producer_id BLOB, seq BIGINT, appended_at BIGINT)",
    "CREATE TABLE gap (partition INTEGER, producer_id BLOB, seq_first BIGINT, seq_last BIGINT, at_offset BIGINT, appended_at BIGINT)",
    "CREATE TABLE duplicate (partition INTEGER, at_offset BIGINT, sha256 BLOB)",
    "CREATE TABLE quarantine (partition INTEGER, at_offset BIGINT, appended_at BIGINT, error VARCHAR, sha256 BLOB, raw BLOB)",
)
"""What one transaction writes together with the rows. `position` counts records since the partition began in
`duplicates` and `quarantined`, and those of this shard in `rows` and `dropped`, so that an opened tail can be checked."""


def create_events(connection: duckdb.DuckDBPyConnection, database: str = "") -> None:
    """Make the table `events`, in an attached database if one is named."""
    definition = ", ".join(f'"{name}" {kind}' for name, kind in current_columns().items())
    connection.execute(f"CREATE TABLE {database + '.' if database else ''}events ({definition})")


NARROW = ("token_chunk",)
"""Kinds that may have a table of their own in a shard: most events are of these, and the thirty payload columns of the
wide table, of which a row uses one, cost seven times as much to write."""

NARROW_ROWS_MIN = 500
"""Fewer records of such a kind than this go into the wide table: each table makes every query's plan longer."""

_WIDE = "events_wide"


def table_of(kind: str | None) -> str:
    """Name of the table, while a shard is being written, for rows of a narrow kind; None is the wide one for all others."""
    return _WIDE if kind is None else f"events_{kind}"


def table_columns(kind: str | None) -> dict[str, str]:
    """Columns of such a table: those of `events`, without other kinds in a narrow one."""
    return {name: type for name, type in current_columns().items() if kind in (None, name) or name not in CURRENT.kinds}


def create_table(connection: duckdb.DuckDBPyConnection, kind: str | None) -> None:
    """Make such a table unless it is there."""
    definition = ", ".join(f'"{name}" {type}' for name, type in table_columns(kind).items())
    connection.execute(f"CREATE TABLE IF NOT EXISTS {table_of(kind)} ({definition})")


def finish(connection: duckdb.DuckDBPyConnection) -> None:
    """Make `events` out of what was written: the wide table itself, or a view over it and the narrow ones."""
    here = "SELECT table_name FROM information_schema.tables WHERE table_catalog = current_database()"
    names = {name for (name,) in connection.execute(here).fetchall()}
    if "events" in names:
        return
    create_table(connection, None)
    narrow = [kind for kind in NARROW if table_of(kind) in names]
    if not narrow:
        connection.execute(f"ALTER TABLE {_WIDE} RENAME TO events")
        return
    parts = [f"SELECT * FROM {_WIDE}", *(f"SELECT {_chosen(kind)} FROM {table_of(kind)}" for kind in narrow)]
    connection.execute(f"CREATE VIEW events AS {' UNION ALL '.join(parts)}")


def _chosen(kind: str) -> str:
    """All columns of `events` out of a narrow table, null for the payloads that it lacks."""
    own = table_columns(kind)
    return ", ".join(f'"{name}"' if name in own else f'CAST(NULL AS {type}) AS "{name}"' for name, type in current_columns().items())


def select_container(schema: Schema, log_id: str, mark: bytes, *, kind: str | None = None) -> str:
    """SELECT that gives rows of `events`, or of a narrow kind's table, from container files, whose list is its one parameter.

    Only whole records come out, those with the end mark in its place. What an older schema lacks is null, inside
    records as well, where a cast goes by name.
    """
    known = set(schema.fields) if kind is None else {*(name for name in schema.fields if name not in schema.kinds), kind}
    own = [
        f'CAST("{name}" AS {type}) AS "{name}"' if name in known else f'CAST(NULL AS {type}) AS "{name}"'
        for name, type in table_columns(kind).items()
        if name not in LOG_COLUMNS
    ]
    cases = " ".join(f"WHEN {name} IS NOT NULL THEN '{name}'" for name in schema.kinds if name in CURRENT.kinds)
    named = f"CASE {cases} END" if kind is None else f"'{kind}'"
    return (
        f'SELECT {named} AS kind, \'{log_id}\' AS log_id, _partition::INTEGER AS "partition", _offset AS "offset",'
        f" _appended_at AS appended_at, {blob(schema.fingerprint)} AS schema, {', '.join(own)}"
        f" FROM read_avro(?) WHERE _mark = {blob(mark)} AND _frame = {blob(schema.header)}"
    )


def blob(value: bytes) -> str:
    """A BLOB literal."""
    return "'" + "".join(f"\\x{byte:02x}" for byte in value) + "'::BLOB"


def value(item: int | str | bytes) -> str:
    """A literal. DuckDB's client looks twice for an installed pandas at each value that is handed over beside a statement: of 500
    rows with three values, ten times the cost of the statement."""
    if isinstance(item, int):
        return str(item)
    return blob(item) if isinstance(item, bytes) else literal(item)


def check_columns(schema: Schema) -> None:
    """Refuse a schema that our tables cannot hold whole.

    Raises:
        NewerSchema: it has a field, inside a record perhaps, that these tables lack.
    """
    lacking = sorted(_paths(schema) - _paths(CURRENT))
    if lacking:
        named = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise NewerSchema(
            f"schema {schema.fingerprint.hex()} has fields that these tables lack: {named}",
            operation="index",
            hint="upgrade this indexer; the partition waits and nothing is dropped",
        )


@cache
def _paths(schema: Schema) -> frozenset[str]:
    """Every field of a schema as `record.field: type`, so that a retyped one counts as another."""
    found: set[str] = set()
    for field in schema.definition["fields"]:
        if field["name"] in schema.kinds:
            _walk(schema.kinds[field["name"]], field["name"], {}, found)
        else:
            found.add(f"{field['name']}: {_plain(field['type'])}")
    return frozenset(found)


def _walk(kind: Any, path: str, named: dict[str, Any], found: set[str]) -> None:
    """Add the paths below a type; names stand for records defined before within the same payload."""
    if isinstance(kind, str) and kind in named:
        kind = named[kind]
    if isinstance(kind, list):
        kind = next(item for item in kind if item != "null")
        _walk(kind, path, named, found)
    elif isinstance(kind, dict) and kind["type"] == "record":
        named[kind["name"]] = kind
        for field in kind["fields"]:
            _walk(field["type"], f"{path}.{field['name']}", named, found)
    elif isinstance(kind, dict) and kind["type"] == "array":
        _walk(kind["items"], path + "[]", named, found)
    elif isinstance(kind, dict) and kind["type"] == "fixed":
        named[kind["name"]] = kind
        found.add(f"{path}: fixed")
    else:
        found.add(f"{path}: {_plain(kind)}")


def _plain(kind: Any) -> str:
    """A scalar type's name; nullable or not makes no difference to a column, nor do an enum's symbols."""
    if isinstance(kind, list):
        return _plain(next(item for item in kind if item != "null"))
    name = kind["type"] if isinstance(kind, dict) else str(kind)
    return "fixed" if name.startswith("Bytes") else name
