"""What tests ask an index: its rows as the log's bytes, and the log's own records beside them."""

from __future__ import annotations

from schemas.registry import SchemaRegistry
from store import digest, duck
from store.catalog import Catalog
from store.hot import attach
from store.log.base import Log
from store.rows import framed, rows_to_datums

__all__ = ["compare_digests", "offsets", "rows"]


def rows(catalog: Catalog, registry: SchemaRegistry | None = None) -> dict[tuple[int, int], bytes]:
    """Every hot row re-encoded, by partition and offset; a row that is there twice is an error."""
    shards = [shard for shard in catalog.snapshot().shards if shard.rows]
    with duck.connect() as connection:
        relation = attach(connection, shards)
        table = connection.execute(f"SELECT * FROM {relation}").to_arrow_table()
    registry = registry or SchemaRegistry()
    found: dict[tuple[int, int], bytes] = {}
    for row in rows_to_datums(table):
        place = (row.partition, row.offset)
        assert place not in found, f"partition {row.partition}, offset {row.offset} is there twice"
        found[place] = framed(row.datum, row.fingerprint, registry)
    return found


def offsets(log: Log) -> dict[tuple[int, int], bytes]:
    """Every record of a log by partition and offset."""
    found: dict[tuple[int, int], bytes] = {}
    for partition in range(log.partitions):
        offset, end = log.bounds(partition)
        while offset < end:
            batch = log.read(partition, offset, limit=10_000, wait_s=5)
            found |= {(partition, batch.offset_first + i): value for i, value in enumerate(batch.values)}
            offset = batch.offset_next
    return found


def compare_digests(catalog: Catalog, log: Log) -> None:
    """The catalog's running digests are those of the log's records, and its ranges join without a hole."""
    held = offsets(log)
    for at in catalog.positions():
        records = [held[at.partition, offset] for offset in range(at.offset_next)]

        assert at.digest == digest.advance(digest.DIGEST_START, digest.record_hashes(records))
        assert at.offset_next == log.bounds(at.partition)[1]
