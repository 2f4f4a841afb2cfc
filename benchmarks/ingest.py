"""From log to committed rows, beside what the parts could do alone."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.codec import decode_datum, zigzag
from schemas.registry import CURRENT, HEADER_BYTES, SchemaRegistry
from schemas.settings import LogSettings, Settings
from store import duck, tables
from store.columns import LOG_COLUMNS
from store.indexer import Indexer
from store.log import open_log
from store.log.base import Entry, Log
from tests.eventgen import Producer, many

# Enough for several commits of the largest size.
_EVENTS = 600_000
# Decoding in Python is so slow that a part of them says it.
_DECODED = 20_000
# The best of so many runs of each side, taken in turn: the machine is shared.
_ROUNDS = 2


def run() -> list[dict[str, Any]]:
    """Rows of the table: what, value, unit, beside, ratio."""
    entries = list(many(Producer(seed=1), _EVENTS))
    with tempfile.TemporaryDirectory() as folder:
        return [*_embedded(entries, Path(folder)), *_kafka(entries, Path(folder))]


def main() -> None:
    """Print the rows."""
    for row in run():
        print(
            f"{row['what']:40} {row['value']:>10,.0f} {row['unit']:9} {row['ratio']:>7.2f} x {row['beside']} ({row['beside_value']:,.0f})"
        )


def _embedded(entries: Sequence[Entry], folder: Path) -> list[dict[str, Any]]:
    values = [entry.value for entry in entries]
    settings = Settings(data=folder / "embedded")
    log = open_log(settings.log, settings.data)
    for start in range(0, len(entries), 10_000):
        log.append(entries[start : start + 10_000])
    alone, indexed = [], []
    for _ in range(_ROUNDS):
        alone.append(_rate(len(values), lambda: _read_avro(values, folder)))
        indexed.append(_rate(len(values), lambda: _index(settings, log)))
    decoded = _rate(_DECODED, lambda: _decode(values[:_DECODED], folder))
    log.close()
    what, rate = "embedded log → committed rows", max(indexed)
    return [
        _row(what, rate, "DuckDB read_avro into the same table, alone", max(alone), "≥ 0.5"),
        _row(what, rate, "fastavro decode + Arrow insert", decoded, "≥ 5"),
    ]


def _kafka(entries: Sequence[Entry], folder: Path) -> Iterator[dict[str, Any]]:
    with _broker(folder) as servers:
        topic = f"bench.{uuid.uuid4().hex[:12]}"
        kinds: tuple[Any, ...] = ("confluent", "kafka")
        for kind in kinds:
            settings = Settings(data=folder / kind, log=LogSettings(kind=kind, bootstrap_servers=servers, topic=topic, group=topic))
            log = open_log(settings.log, settings.data)
            if kind == kinds[0]:
                for start in range(0, len(entries), 20_000):
                    log.append(entries[start : start + 20_000])
            consumed, indexed, worked = [], [], []
            for _ in range(_ROUNDS):
                log.close()
                log = open_log(settings.log, settings.data)
                consumed.append(_rate(len(entries), partial(_consume, log)))
                log.close()
                log = open_log(settings.log, settings.data)
                began = time.process_time()
                indexed.append(_rate(len(entries), partial(_index, settings, log)))
                worked.append(time.process_time() - began)
            log.close()
            name = "kafka-python" if kind == "kafka" else "confluent-kafka"
            yield _row(f"Kafka → committed rows, {name}", max(indexed), "the same client, consume and discard", max(consumed), "≥ 0.7")
            ceiling = len(entries) / min(worked) * (os.cpu_count() or 1)
            yield _row(f"the same, {name}", max(indexed), "all cores doing nothing else: its processor time says", ceiling, "")


def _row(what: str, value: float, beside: str, beside_value: float, reach: str) -> dict[str, Any]:
    shown = {"what": what, "value": value, "unit": "events/s", "beside": beside, "beside_value": beside_value}
    return {**shown, "ratio": value / beside_value, "reach": reach}


def _rate(count: int, work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def _index(settings: Settings, log: Log) -> None:
    """Index the whole log into a fresh folder; everything is committed, sealed and listed at the end."""
    shutil.rmtree(settings.data / "hot", ignore_errors=True)
    done = Indexer(settings, log).run_once()
    assert done.rows == _EVENTS, done


def _consume(log: Log) -> None:
    """Read the whole log and drop it; partitions in turn, as the indexer does."""
    offsets = dict.fromkeys(range(log.partitions), 0)
    ends = {partition: log.bounds(partition)[1] for partition in offsets}
    while offsets:
        for partition in log.wait(offsets, wait_s=1.0):
            offsets[partition] = log.read(partition, offsets[partition], limit=12_500).offset_next
        offsets = {partition: offset for partition, offset in offsets.items() if offset < ends[partition]}


def _read_avro(values: Sequence[bytes], folder: Path) -> None:
    """DuckDB alone: the bodies are a container already, and nothing is checked."""
    path = folder / "plain.avro"
    if not path.exists():
        _write_plain(path, values)
    with _fresh(folder / "alone.duckdb") as connection:
        began = connection.execute("SELECT 1").fetchone()
        assert began == (1,)
        connection.execute("INSERT INTO events BY NAME SELECT * FROM read_avro(?)", [str(path)])


def _write_plain(path: Path, values: Sequence[bytes]) -> None:
    meta = {"avro.schema": json.dumps(CURRENT.definition).encode(), "avro.codec": b"null"}
    items = b"".join(zigzag(len(key)) + key.encode() + zigzag(len(value)) + value for key, value in meta.items())
    sync = os.urandom(16)
    with path.open("wb") as file:
        file.write(b"Obj\x01" + zigzag(len(meta)) + items + b"\x00" + sync)
        bodies = (value[HEADER_BYTES:] for value in values)
        while part := list(itertools.islice(bodies, 50_000)):
            data = b"".join(part)
            file.write(zigzag(len(part)) + zigzag(len(data)) + data + sync)


def _decode(values: Sequence[bytes], folder: Path) -> None:
    """What an indexer that decodes would do at least: decode, make an Arrow table, insert it."""
    registry = SchemaRegistry()
    with _fresh(folder / "decoded.duckdb") as connection:
        reader = connection.execute("SELECT * FROM events").to_arrow_table()
        schema = pa.schema([field for field in reader.schema if field.name not in LOG_COLUMNS])
        arrived = pa.Table.from_pylist([decode_datum(value, registry)[0] for value in values], schema=schema)
        connection.register("arrived", arrived)
        connection.execute("INSERT INTO events BY NAME SELECT * FROM arrived")


@contextmanager
def _fresh(path: Path) -> Iterator[Any]:
    """A new database file with the table `events`."""
    path.unlink(missing_ok=True)
    with duck.connect(path, extensions=("avro",), threads=2) as connection:
        tables.create_events(connection)
        yield connection


@contextmanager
def _broker(folder: Path) -> Iterator[str]:
    """A Kafka: that of `TOKENTAPE_SERVICES`, or one started for this run."""
    from scripts.services import Services, load

    state = os.environ.get("TOKENTAPE_SERVICES")
    lent = load(Path(state)).get("kafka") if state else None
    if lent:
        yield lent["bootstrap_servers"]
        return
    services = Services(folder / "services", tied=True)
    try:
        yield services.up(["kafka"])["kafka"]["bootstrap_servers"]
    finally:
        services.down()


if __name__ == "__main__":
    main()
