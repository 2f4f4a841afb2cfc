"""Rows whose content is gone: what stands in its place, and the SELECT that puts it there.

The leaf of an event is a hash over its metadata and a commitment to its content. With the commitment in a column of its
own, content and salt can go, and the leaf, and every root and proof above it, stays what it was.
"""

from __future__ import annotations

import hmac
from functools import cache

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.registry import CURRENT, SchemaRegistry
from store.columns import current_columns
from store.recode import encode_rows

BATCH_ROWS = 20_480
"""Rows whose commitments are made at a time."""


def commitments(batch: pa.RecordBatch, registry: SchemaRegistry) -> list[bytes | None]:
    """The commitment of each row that has content, in order; None for the others, which need none.

    Raises:
        CorruptStore: a row that no event explains. UnknownSchema: a writer schema that the registry does not know.
    """
    found: list[bytes | None] = [None] * batch.num_rows
    for fingerprint in pc.unique(batch.column("schema")).to_pylist():
        schema = registry.get(fingerprint)
        written = pc.equal(batch.column("schema"), pa.scalar(fingerprint, batch.column("schema").type))
        for kind in pc.unique(batch.column("kind").filter(written)).to_pylist():
            places = np.flatnonzero(pc.and_(written, pc.equal(batch.column("kind"), kind)).to_numpy(zero_copy_only=False))
            names = [name for name in schema.fields if name not in schema.kinds or name == kind]
            rows = batch.select([name for name in names if name in batch.schema.names]).take(pa.array(places))
            encoded = encode_rows(rows, schema, kind)
            pairs = zip(places.tolist(), encoded.salts.to_pylist(), encoded.contents.to_pylist(), strict=True)
            for place, salt, content in pairs:
                if salt is not None and content is not None:
                    found[place] = hmac.digest(salt, content, "sha256")
    return found


def commit_rows(connection: duckdb.DuckDBPyConnection, relation: str, where: str, registry: SchemaRegistry, table: str) -> tuple[int, int]:
    """Fill `table` with event id and commitment of the rows whose content and salt are to go; how many, and how many have content.

    Raises:
        CorruptStore, UnknownSchema: as `commitments`.
    """
    connection.execute(f"CREATE OR REPLACE TABLE {table} (event_id BLOB, commitment BLOB)")
    # A cursor, because the connection itself inserts while the rows are read.
    reader = connection.cursor().execute(f"SELECT * FROM {relation} WHERE {where}").to_arrow_reader(BATCH_ROWS)
    count = filled = 0
    for batch in reader:
        ids, made = batch.column("event_id"), commitments(batch, registry)
        given = pa.table({"event_id": ids, "commitment": pa.array(made, pa.binary())})
        connection.register("given_rows", given)
        connection.execute(f"INSERT INTO {table} SELECT * FROM given_rows")
        connection.unregister("given_rows")
        count += batch.num_rows
        filled += sum(one is not None for one in made)
    return count, filled


def erased_sql(relation: str, table: str) -> str:
    """`relation` with the content and salt of the rows in `table` gone and their commitments in place."""
    mine = "x.event_id IS NOT NULL"
    columns = [
        f"CASE WHEN {mine} THEN NULL ELSE e.salt END AS salt",
        f"CASE WHEN {mine} THEN coalesce(e.commitment, x.commitment) ELSE e.commitment END AS commitment",
        *(f'CASE WHEN {mine} AND e."{kind}" IS NOT NULL THEN {empty} ELSE e."{kind}" END AS "{kind}"' for kind, empty in _emptied()),
    ]
    return f"(SELECT e.* REPLACE ({', '.join(columns)}) FROM {relation} e LEFT JOIN {table} x ON x.event_id = e.event_id)"


@cache
def _emptied() -> tuple[tuple[str, str], ...]:
    """Each kind that can have content, and its payload without it."""
    found = []
    for kind, definition in CURRENT.kinds.items():
        names = [field["name"] for field in definition["fields"]]
        if "content" in names:
            values = {name: "NULL" if name == "content" else f'e."{kind}"."{name}"' for name in names}
            fields = ", ".join(f'"{name}": {value}' for name, value in values.items())
            found.append((kind, f"CAST({{{fields}}} AS {current_columns()[kind]})"))
    return tuple(found)
