"""Answering from 10 M events: a session's timeline hot and cold, and a count with a group beside plain `read_parquet`.

`BENCH_EVENTS` scales it; rows are made by DuckDB itself, shaped like sessions of ten generations.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from schemas import events
from schemas.codec import encode_payload, join
from schemas.events import Payload
from schemas.settings import ColdSettings, Settings, SqlSettings
from schemas.sink import SessionContext
from store.catalog import Catalog, Range, Segment, Shard, open_catalog
from store.duck import connect
from store.merge import lay_out, use_new
from store.objects import open_store
from store.reader import EventReader
from store.sql import SqlService
from tests.stored import insert

EVENTS = int(os.environ.get("BENCH_EVENTS", "10000000"))
SESSION_EVENTS = 200  # one opening and ten generations of about twenty events each
FILES = 8  # shards, and segments
DAY = "2026-11-23"
ROUNDS = 40
LOOKED_AT = 30  # sessions of the cold timeline, each looked at for the first time
GROUP = "SELECT kind, count(*) AS n, sum(octet_length(session_id)) AS b FROM {events} GROUP BY kind"

START_US = 1_795_442_717_000_000
BASE_SESSIONS = 50  # sessions made by hand; the others are copies with ids and times of their own
_TEXT = "the model answers slow ly when a cache misses and every token waits for its turn in one long queue of work"
_WORDS = _TEXT.split(" ")

# Copies of the hand-made sessions: ids sort by time, as UUIDv7 do, and offsets go on.
_COPIES = """
SELECT base.* REPLACE (
    "offset" + r * {events} AS "offset",
    appended_at + to_microseconds(r * {span_us}) AS appended_at,
    recorded_at + to_microseconds(r * {span_us}) AS recorded_at,
    unhex(lpad(printf('%x', 1795442717000 + r * {sessions} + "offset" // {session}), 12, '0') || '7000' || substr(hex(session_id), 17))
        AS session_id,
    unhex(lpad(printf('%x', 1795442717000 + r * {events} + "offset"), 12, '0') || '7000' || substr(hex(event_id), 17)) AS event_id)
FROM base.events AS base, range({first}, {last}) t(r) ORDER BY r, base."offset"
"""


def run() -> list[dict[str, Any]]:
    """Rows: timelines hot and cold, GETs, count and group."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = made_files(folder, EVENTS)
        return [*_hot(folder, files), *_group(folder, files), *_cold(folder, files)]


def _conversation(rng: random.Random) -> Iterator[Payload]:
    """The payloads of one session: an opening, and generations of twenty events until it is full."""
    yield events.SessionOpened(client="bench", tags=["a"])
    for number in range(1, SESSION_EVENTS):
        place = number % 20
        if place in (0, 1):
            generation = rng.randbytes(16)
        if place == 1:
            message = events.Message(message_id=rng.randbytes(16), role="user", body=" ".join(rng.choices(_WORDS, k=60)))
            content = events.RequestContent(messages=[message], parameters='{"temperature": 0.7}')
            yield events.RequestSubmitted(
                generation_id=generation, endpoint="/v1/chat/completions", model="tiny", stream=True, content=content
            )
        elif place == 2:
            yield events.GenerationStarted(generation_id=generation, authoritative="gateway", status=200, prompt_tokens=60)
        elif place == 19:
            yield events.SequenceFinished(generation_id=generation, index=0, tokens=128, finish_reason="stop")
        elif place == 0:
            yield events.GenerationFinished(generation_id=generation, sequences=1, tokens_recorded=128)
        else:
            yield _chunk(rng, generation, (place - 3) * 8)


def _chunk(rng: random.Random, generation: bytes, position: int) -> events.TokenChunk:
    words = [f"{word} " for word in rng.choices(_WORDS, k=8)]
    content = events.ChunkContent(
        token_ids=[rng.randrange(32_000) for _ in words],
        text="".join(words),
        lengths=[len(word) for word in words],
        logprobs=[-rng.expovariate(1) for _ in words],
    )
    offsets = [(position + i) * 11_000 + rng.randrange(7000) for i in range(8)]
    return events.TokenChunk(generation_id=generation, index=0, position=position, offsets_us=offsets, content=content)


def _base(folder: Path) -> Path:
    """The hand-made sessions, encoded and read as the indexer does it, in a DuckDB file."""
    rng = random.Random(7)
    values: list[bytes] = []
    for _ in range(BASE_SESSIONS):
        session = SessionContext(rng.randbytes(16), "acme", "gateway", actor="key-7", salt=rng.randbytes(16))
        for payload in _conversation(rng):
            seq = len(values)
            body = encode_payload(payload.KIND, payload.model_dump())
            values.append(join(rng.randbytes(16), session.encoded, b"producer", seq, START_US + seq * 900, body))
    path = folder / "base.duckdb"
    with connect(path, extensions=("avro",)) as duck:
        insert(duck, folder, values, appended_at=START_US, log_id="bench")
    return path


def _make(folder: Path, base: Path, number: int, all_events: int = EVENTS) -> Path:
    """One segment: Parquet as tiering writes it."""
    made = BASE_SESSIONS * SESSION_EVENTS
    first, last = (all_events // made * part // FILES for part in (number, number + 1))
    path = folder / f"{number}.parquet"
    select = _COPIES.format(events=made, sessions=BASE_SESSIONS, session=SESSION_EVENTS, span_us=made * 900, first=first, last=last)
    options = "FORMAT parquet, COMPRESSION zstd, PARQUET_VERSION v2, WRITE_BLOOM_FILTER false, ROW_GROUP_SIZE 20000"
    with connect() as duck:
        duck.execute("SET enable_progress_bar = false")
        duck.execute(f"ATTACH '{base}' AS base (READ_ONLY)")
        duck.execute(f"COPY ({select}) TO '{path}' ({options})")
    return path


def _covered(path: Path) -> dict[str, Any]:
    with connect() as duck:
        row = duck.execute(
            "SELECT min(session_id), max(session_id), epoch_us(min(recorded_at)), epoch_us(max(recorded_at)), count(*), "
            f'min("offset"), max("offset") + 1 FROM read_parquet(\'{path}\')'
        ).fetchone()
    assert row is not None
    names = ("session_min", "session_max", "time_min", "time_max", "rows")
    return {**dict(zip(names, row, strict=False)), "day": DAY, "ranges": (Range("bench", 0, row[5], row[6]),)}


def _sessions(files: list[Path], count: int) -> list[bytes]:
    with connect() as duck:
        text = ", ".join(f"'{path}'" for path in files)
        rows = duck.execute(f"SELECT DISTINCT session_id FROM read_parquet([{text}]) WHERE kind = 'session_opened'").fetchall()
    return [bytes(row[0]) for row in random.Random(7).sample(rows, min(count, len(rows)))]


def made_files(folder: Path, all_events: int) -> list[Path]:
    """The segments of so many events."""
    base = _base(folder)
    return [_make(folder, base, number, all_events) for number in range(FILES)]


def fill_hot(settings: Settings, files: list[Path]) -> Catalog:
    """Day shards of what is in these files."""
    catalog = open_catalog(settings.data)
    catalog.shards_folder.mkdir(parents=True)
    for number, file in enumerate(files):
        path = catalog.shards_folder / f"day-{number}.duckdb"
        with connect(threads=2) as duck:
            use_new(duck, path)
            covered = _covered(file)
            lay_out(duck, f"read_parquet('{file}', hive_partitioning = false)", covered["rows"])
        catalog.swap(shards=[Shard(name=path.stem, path=path, level="day", bytes=path.stat().st_size, **covered)])
    return catalog


def _hot(folder: Path, files: list[Path]) -> list[dict[str, Any]]:
    settings = Settings(data=folder / "hot-only")
    catalog = fill_hot(settings, files)
    reader = EventReader(settings, catalog)
    for session in _sessions(files, ROUNDS):  # attaches every shard
        reader.table(session)
    tables = [_timed(lambda session=session: reader.table(session).num_rows) for session in _sessions(files, ROUNDS)]  # type: ignore[misc]
    events = [_timed(lambda session=session: len(list(reader.session(session)))) for session in _sessions(files, ROUNDS)]  # type: ignore[misc]
    reader.close()
    shutil.rmtree(settings.data)
    return [
        _row(f"session timeline hot, {SESSION_EVENTS} of {EVENTS:,} events, p50", statistics.median(tables) * 1e3, "ms", "≤ 20 ms"),
        _row("the same as decoded events, p50", statistics.median(events) * 1e3, "ms", None),
    ]


def _put(catalog: Catalog, settings: Settings, files: list[Path]) -> None:
    objects = open_store(settings.cold, settings.data)
    for number, file in enumerate(files):
        key = f"events/tenant=acme/day={DAY}/standard-{number}-{number:08x}.parquet"
        objects.create_from_file(key, file)
        fields: dict[str, Any] = {"sha256": "", "tenant": "acme", "retention_class": "standard", "ledger_entry": number, "root": bytes(32)}
        catalog.swap(segments=[Segment(key=key, bytes=file.stat().st_size, **fields, **_covered(file))])


def _group(folder: Path, files: list[Path]) -> list[dict[str, Any]]:
    """The sandbox over local segments beside a connection that reads the same files without any."""
    settings = Settings(data=folder / "cold-only", sql=SqlSettings(threads=2))
    catalog = open_catalog(settings.data)
    _put(catalog, settings, files)
    text = ", ".join(f"'{path}'" for path in files)
    service = SqlService(settings, catalog=catalog, keep_warm=True)
    sandboxed, plain = [], []
    with connect(threads=2) as duck:
        for _ in range(7):
            time.sleep(1.0)  # the next warm process is up by then, as it is between the questions of a person
            sandboxed.append(_timed(lambda: service.query(GROUP.format(events="events")).table.num_rows))
            plain.append(_timed(lambda: len(duck.execute(GROUP.format(events=f"read_parquet([{text}])")).fetchall())))
    service.close()
    shutil.rmtree(settings.data)
    ours, theirs = statistics.median(sandboxed) * 1e3, statistics.median(plain) * 1e3
    row = _row(f"count and group over {EVENTS:,} events, sandboxed, median of 7", ours, "ms", "≤ 1.3 ×")
    return [{**row, "beside": "plain read_parquet of the same files", "beside_value": theirs, "ratio": ours / theirs}]


def _cold(folder: Path, files: list[Path]) -> list[dict[str, Any]]:
    """Timelines out of segments in MinIO, through a relay that counts requests."""
    with minio(folder) as cold, relay(cold.endpoint) as (endpoint, counted):
        settings = Settings(data=folder / "minio-only", cold=cold.model_copy(update={"endpoint": endpoint}))
        catalog = open_catalog(settings.data)
        _put(catalog, settings, files)
        reader = EventReader(settings, catalog)
        sessions = _sessions(files, LOOKED_AT)
        first_before = counted()
        first = _timed(lambda: reader.table(sessions[0]).num_rows)
        gets_first = counted() - first_before
        times, gets = [], []
        for session in sessions[1:]:
            before = counted()
            times.append(_timed(lambda session=session: reader.table(session).num_rows))  # type: ignore[misc]
            gets.append(counted() - before)
        reader.close()
    return [
        _row("session timeline cold from MinIO, first of a process", first * 1e3, "ms", "≤ 300 ms"),
        _row("its requests", gets_first, "GET", "≤ 10"),
        _row("session timeline cold from MinIO, p50 of others", statistics.median(times) * 1e3, "ms", "≤ 300 ms"),
        _row("its requests, most", max(gets), "GET", "≤ 10"),
    ]


@contextmanager
def minio(folder: Path) -> Iterator[ColdSettings]:
    """A MinIO: that of `TOKENTAPE_SERVICES`, or one started for this run."""
    from scripts.services import Services, load

    state = os.environ.get("TOKENTAPE_SERVICES")
    lent = load(Path(state)).get("minio") if state else None
    services = None if lent else Services(folder / "services", tied=True)
    address = lent or services.up(["minio"])["minio"]  # type: ignore[union-attr]
    try:
        yield ColdSettings(
            kind="minio",
            endpoint=address["endpoint"],
            bucket=f"bench-{uuid.uuid4().hex[:12]}",
            access_key=address["access_key"],
            secret_key=SecretStr(address["secret_key"]),
            lock="none",
        )
    finally:
        if services is not None:
            services.down()


@contextmanager
def relay(endpoint: str) -> Iterator[tuple[str, Callable[[], int]]]:
    """A TCP relay before an endpoint; the function counts the GET requests so far."""
    host, _, port = endpoint.rpartition(":")
    counts: list[int] = []
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket, count: bool) -> None:
        try:
            while data := source.recv(1 << 18):
                if count:
                    counts.append(data.count(b"GET /"))
                target.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, target):
                end.close()

    def accept() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            upstream = socket.create_connection((host, int(port)))
            for arguments in ((client, upstream, True), (upstream, client, False)):
                threading.Thread(target=pump, args=arguments, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}", lambda: sum(counts)
    finally:
        server.close()


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    found = call()
    assert found, "an answer without rows"
    return time.perf_counter() - began


def _row(what: str, value: float, unit: str, reach: str | None) -> dict[str, Any]:
    return {"what": what, "value": value, "unit": unit, "reach": reach}
