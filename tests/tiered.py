"""An installation whose events go from log to hot to cold, and what tests ask of it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from lifecycle.checkpoints import Checkpoints
from lifecycle.tiering import Tiering
from lifecycle.verification import Verification
from schemas.events import Payload
from schemas.registry import SchemaRegistry
from schemas.settings import Settings
from schemas.sink import SessionContext
from store import duck
from store.catalog import Catalog, Shard, open_catalog
from store.indexer import Indexer
from store.ledger import Ledger, open_ledger
from store.log import open_log
from store.log.base import Entry, Log
from store.objects import open_store
from store.objects.base import ObjectStore
from store.rows import framed, rows_to_datums
from store.stored_schemas import fetch_schema
from store.views import events_sql
from tests.eventgen import Producer


@dataclass
class Sink:
    """Keeps what is recorded."""

    payloads: list[Payload] = field(default_factory=list)

    def record(self, session: SessionContext, payload: Payload) -> None:
        """See `schemas.sink.EventSink`."""
        self.payloads.append(payload)


@dataclass
class Tiered:
    """The parts of one installation."""

    settings: Settings
    log: Log
    catalog: Catalog
    objects: ObjectStore
    ledger: Ledger
    registry: SchemaRegistry
    producer: Producer
    sink: Sink = field(default_factory=Sink)

    def ingest(self, entries: Sequence[Entry]) -> None:
        """Append and index, as one shard."""
        self.log.append(list(entries))
        Indexer(self.settings, self.log, self.registry).run_once()

    def tier(self, **changes: Any) -> dict[str, Any]:
        """Tier all days."""
        return self.tiering(**changes).run(all_days=True)

    def tiering(self, **changes: Any) -> Tiering:
        """A tiering run with some parts exchanged."""
        parts = {name: getattr(self, name) for name in ("settings", "catalog", "objects", "ledger", "registry", "sink")}
        return Tiering(**(parts | changes))

    def checkpoint(self) -> dict[str, Any]:
        """Sign digests and ledger."""
        return Checkpoints(self.catalog, self.ledger).run()

    def verification(self) -> Verification:
        """Verification with nothing but the store and the public key."""
        return Verification(self.objects, self.ledger.verifier, SchemaRegistry(partial(fetch_schema, self.objects)))

    def table(self, where: str = "") -> pa.Table:
        """What SQL sees now: all rows of hot and cold by partition and offset."""
        snapshot = self.catalog.snapshot()
        remote = self.settings.cold.kind != "local"
        with duck.connect(extensions=("httpfs",) if remote else (), threads=2) as connection:
            names = []
            for number, shard in enumerate(snapshot.shards):
                connection.execute(f"ATTACH '{shard.path}' AS s{number} (READ_ONLY)")
                names.append(f"s{number}")
            urls = [self.objects.read_url(segment.key, expires_s=600) for segment in snapshot.segments]
            order = 'ORDER BY "partition", "offset"'
            return connection.execute(f"SELECT * FROM ({events_sql(names, urls, where=where)}) {order}").to_arrow_table()

    def records(self) -> dict[tuple[int, int], bytes]:
        """Every row of hot and cold as the log's bytes; one that is there twice is an error."""
        found: dict[tuple[int, int], bytes] = {}
        for row in rows_to_datums(self.table()):
            assert (row.partition, row.offset) not in found, f"{row.partition}, {row.offset} is there twice"
            found[row.partition, row.offset] = framed(row.datum, row.fingerprint, self.registry)
        return found

    def set_day(self, day: str) -> None:
        """File all hot shards under another day."""
        with contextlib.closing(sqlite3.connect(self.catalog.path)) as connection, connection:
            connection.execute("UPDATE shard SET day = ? WHERE state = 'live'", (day,))


def alter(shard: Shard, *statements: str) -> None:
    """Change the rows of a shard behind everyone's back; `events` is a table then, as in a merged shard."""
    with duck.connect(shard.path) as connection:
        if connection.execute("SELECT 1 FROM duckdb_views() WHERE view_name = 'events'").fetchone():
            connection.execute("CREATE TABLE everything AS SELECT * FROM events")
            connection.execute("DROP VIEW events")
            connection.execute("ALTER TABLE everything RENAME TO events")
        for statement in statements:
            connection.execute(statement)


@contextlib.contextmanager
def tiered(settings: Settings, seed: int = 1) -> Iterator[Tiered]:
    """An installation, made and closed."""
    log = open_log(settings.log, settings.data)
    registry = SchemaRegistry()
    Indexer(settings, log, registry)
    objects = open_store(settings.cold, settings.data)
    ledger = open_ledger(settings, objects)
    producer = Producer(seed=seed, partitions=log.partitions)
    try:
        yield Tiered(settings, log, open_catalog(settings.data), objects, ledger, registry, producer)
    finally:
        log.close()
