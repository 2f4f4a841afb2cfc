"""Tables of a shard: `events` with the columns of the current schema, and what an indexer must remember beside it."""

from __future__ import annotations

from functools import cache
from typing import Any

import duckdb

from schemas.errors import NewerSchema
from schemas.registry import CURRENT, Schema
from store.columns import LOG_COLUMNS, current_columns

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


# A tail has a table for each kind: thirty columns of which one is there cost five times as much to insert as they need to.


def kind_table(kind: str) -> str:
    """Name of the table that holds the rows of one kind in a tail."""
    return f"events_{kind}"


def kind_columns(kind: str) -> dict[str, str]:
    """Columns of a kind's table: those of `events` without the other kinds."""
    return {name: type for name, type in current_columns().items() if name == kind or name not in CURRENT.kinds}


def create_kind(connection: duckdb.DuckDBPyConnection, kind: str) -> None:
    """Make a kind's table unless it is there."""
    definition = ", ".join(f'"{name}" {type}' for name, type in kind_columns(kind).items())
    connection.execute(f"CREATE TABLE IF NOT EXISTS {kind_table(kind)} ({definition})")


def create_view(connection: duckdb.DuckDBPyConnection) -> None:
    """Make `events`, the rows of all kinds with null for the payloads that they are not."""
    connection.execute(f"CREATE OR REPLACE VIEW events AS {_union(present_kinds(connection))}")


def present_kinds(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Kinds that have a table here."""
    rows = connection.execute("SELECT table_name FROM duckdb_tables() WHERE NOT internal").fetchall()
    names = {name for (name,) in rows}
    return [kind for kind in CURRENT.kinds if kind_table(kind) in names]


def _union(kinds: list[str]) -> str:
    everything = current_columns().items()
    empty = "SELECT " + ", ".join(f'CAST(NULL AS {type}) AS "{name}"' for name, type in everything) + " WHERE false"
    parts = []
    for kind in kinds:
        own = kind_columns(kind)
        chosen = [f'"{name}"' if name in own else f'CAST(NULL AS {type}) AS "{name}"' for name, type in everything]
        parts.append(f"SELECT {', '.join(chosen)} FROM {kind_table(kind)}")
    return " UNION ALL ".join(parts or [empty])


def select_container(schema: Schema, log_id: str, mark: bytes, *, kind: str | None = None) -> str:
    """SELECT that gives rows of `events`, or of a kind's table, from container files, whose list is its one parameter.

    Only whole records come out, those with the end mark in its place. What an older schema lacks is null, inside
    records as well, where a cast goes by name.
    """
    known = set(schema.fields) if kind is None else {*(name for name in schema.fields if name not in schema.kinds), kind}
    own = [
        f'CAST("{name}" AS {type}) AS "{name}"' if name in known else f'CAST(NULL AS {type}) AS "{name}"'
        for name, type in (current_columns() if kind is None else kind_columns(kind)).items()
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
