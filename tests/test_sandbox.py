"""Callers' SQL: whatever it tries, it reads its views, nothing else, and leaves every file as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import duckdb
import pytest
from pydantic import SecretStr

from schemas.errors import QueryError
from schemas.events import ChunkContent, Event, SessionOpened, TokenChunk
from schemas.settings import ColdSettings, Settings, SqlSettings
from schemas.sink import new_id
from store import views
from store.allowlist import check_statement
from store.catalog import Catalog, open_catalog
from store.objects import open_store
from store.objects.base import ObjectStore
from store.sandbox import Request
from store.sql import SqlService
from tests.conftest import MinioService
from tests.stored import digests, put_cold, put_hot

SECRET = "hunter2"  # what stands in the events of the other tenant


@dataclass
class Rig:
    """An installation with events of two tenants, hot and cold, and a service to ask."""

    settings: Settings
    catalog: Catalog
    objects: ObjectStore
    service: SqlService
    names: dict[str, str]

    def request(self, statement: str) -> Request:
        """The request that the service makes of a statement, past the gate that only makes messages clear."""
        request = self.service.request(statement.format(**self.names), tenant=None)
        return replace(request, any_statement=True)


def _events(tenant: str, actor: str, text: str, count: int = 20) -> list[Event]:
    session = new_id()

    def event(i: int) -> Event:
        content = ChunkContent(token_ids=[i], text=text, lengths=[len(text)])
        chunk = TokenChunk(generation_id=session, index=0, position=i, offsets_us=[i * 1000], content=content)
        return Event(
            event_id=new_id(),
            session_id=session,
            salt=bytes(16),
            tenant=tenant,
            actor=actor,
            source="gateway",
            producer_id=b"producer",
            producer_seq=i,
            recorded_at=1_795_442_717_000_000 + i,
            payload=SessionOpened(client=text) if i == 0 else chunk,
        )

    return [event(i) for i in range(count)]


class _Pinned(SqlService):
    """Knows some URLs ahead: that of a request and that in a statement must be one, or a probe would fail for the wrong reason."""

    pinned: ClassVar[dict[str, str]] = {}

    def _url(self, key: str) -> str:
        return self.pinned.get(key) or super()._url(key)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """An installation whose cold tier is a folder. That the probes leave it as it was is what each of them shows."""
    folder = tmp_path_factory.mktemp("local")
    yield from _rig(folder, Settings(data=folder / "data"))


@pytest.fixture(scope="module")
def rig_minio(minio: MinioService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """An installation whose cold tier is a bucket."""
    folder = tmp_path_factory.mktemp("minio")
    cold = ColdSettings(
        kind="minio",
        endpoint=minio.endpoint,
        bucket=f"sandbox-{uuid.uuid4().hex[:12]}",
        access_key=minio.access_key,
        secret_key=SecretStr(minio.secret_key),
    )
    yield from _rig(folder, Settings(data=folder / "data", cold=cold))


def _rig(folder: Path, settings: Settings) -> Iterator[Rig]:
    settings = settings.model_copy(update={"sql": SqlSettings(memory_mb=512, rows_max=10_000, timeout_s=20)})
    catalog, objects = open_catalog(settings.data), open_store(settings.cold, settings.data)
    shard = put_hot(catalog, "hot", _events("acme", "42", "ours") + _events("rival", SECRET, SECRET))
    segment = put_cold(catalog, objects, folder, _events("acme", "43", "ours"), tenant="acme", offset=100)
    put_cold(catalog, objects, folder, _events("rival", SECRET, SECRET), tenant="rival", offset=200)
    objects.create("other/object.parquet", objects.get(segment.key))
    outside = folder / "outside.csv"
    outside.write_text(f"{SECRET}\n", encoding="utf-8")
    names = {
        "shard": str(shard.path),
        "segment": objects.read_url(segment.key, expires_s=600),
        "other": objects.read_url("other/object.parquet", expires_s=600).partition("?")[0],
        "folder": str(folder),
        "outside": str(outside),
        "bucket": settings.cold.bucket,
        "host": settings.cold.endpoint,
    }
    service = _Pinned(settings, catalog=catalog, objects=objects, keep_warm=True)
    service.pinned[segment.key] = names["segment"]
    yield Rig(settings, catalog, objects, service, names)
    service.close()
    catalog.close()


WRITES = [
    "COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)",
    "COPY (SELECT 1) TO '{shard}'",
    "COPY (SELECT 1) TO '{shard}.wal' (USE_TMP_FILE false)",
    "COPY (SELECT 1 AS i) TO '{segment}' (FORMAT parquet, USE_TMP_FILE false)",
    "COPY (SELECT 1 AS i) TO '{segment}' (FORMAT parquet)",
    "COPY (SELECT 1 AS i) TO '{other}' (FORMAT parquet, USE_TMP_FILE false)",
    "COPY (SELECT 1 AS i) TO 's3://{bucket}/new.parquet' (FORMAT parquet)",
    "COPY events TO '{folder}/new.parquet' (FORMAT parquet)",
    "COPY events TO '{folder}' (FORMAT parquet, PARTITION_BY (tenant), OVERWRITE_OR_IGNORE)",
    "COPY (SELECT 1) TO '/dev/stdout' (USE_TMP_FILE false)",
    "COPY (SELECT 1) TO '/proc/self/fd/1' (USE_TMP_FILE false)",
    "EXPORT DATABASE '{folder}/export'",
    "IMPORT DATABASE '{folder}'",
    "ATTACH '{folder}/new.duckdb' AS fresh",
    "ATTACH '{shard}' AS again",
    "DETACH shard_0; ATTACH '{shard}' AS again; DELETE FROM again.events",
    "DETACH shard_0; COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)",
    "INSERT INTO shard_0.events SELECT * FROM shard_0.events",
    "UPDATE shard_0.events SET tenant = 'me'",
    "DELETE FROM shard_0.events",
    "DELETE FROM events",
    "TRUNCATE shard_0.events",
    "DROP TABLE shard_0.events",
    "ALTER TABLE shard_0.events ADD COLUMN x INTEGER",
    "CREATE TABLE shard_0.mine AS SELECT 1",
    "CREATE INDEX i ON shard_0.events (tenant)",
    "EXPLAIN ANALYZE DELETE FROM shard_0.events",
    "WITH gone AS (DELETE FROM shard_0.events RETURNING *) SELECT * FROM gone",
    "PREPARE p AS DELETE FROM shard_0.events; EXECUTE p",
    "BEGIN; DELETE FROM shard_0.events; COMMIT",
    "MERGE INTO shard_0.events USING (SELECT 1) ON true WHEN MATCHED THEN DELETE",
]

READS = [
    "SELECT * FROM read_text('{outside}')",
    "SELECT * FROM read_blob('{outside}')",
    "SELECT * FROM read_csv('{outside}')",
    "SELECT * FROM '{outside}'",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/proc/self/environ')",
    "SELECT * FROM read_json('/etc/hostname')",
    "SELECT * FROM sniff_csv('{outside}')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM read_parquet('{other}')",
    "SELECT * FROM parquet_metadata('{other}')",
    "SELECT * FROM read_parquet('s3://{bucket}/other/object.parquet')",
    "SELECT * FROM read_parquet('http://{host}/{bucket}/other/object.parquet')",
    "SELECT * FROM read_text('http://169.254.169.254/latest/meta-data/')",
    "SELECT * FROM 'https://example.com/data.csv'",
    "COPY (SELECT 1) TO 'http://{host}/{bucket}/stolen.csv'",
    "CREATE TABLE t (x VARCHAR); COPY t FROM '{outside}'",
    "ATTACH 'http://{host}/x.duckdb' AS remote",
    "SELECT getenv('PATH')",
    "CREATE SECRET s (TYPE s3, KEY_ID 'a', SECRET 'b'); SELECT * FROM read_parquet('s3://{bucket}/other/object.parquet')",
    "CREATE PERSISTENT SECRET s (TYPE http, BEARER_TOKEN 'b')",
]

SETTINGS = [
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "RESET lock_configuration",
    "SET allowed_paths = ['/etc/passwd']",
    "SET allowed_directories = ['/']",
    "SET memory_limit = '100GB'",
    "PRAGMA memory_limit = '100GB'",
    "SET threads = 64",
    "SET temp_directory = '{folder}'",
    "SET autoinstall_known_extensions = true",
    "SET python_enable_replacements = true",
    "SET log_query_path = '{folder}/log'",
    "PRAGMA enable_profiling = 'json'; PRAGMA profiling_output = '{folder}/profile'",
    "CALL enable_logging(storage = 'file', storage_config = {{'path': '{folder}/log'}})",
    "INSTALL httpfs",
    "INSTALL spatial FROM 'http://{host}/'",
    "LOAD '{folder}/evil.duckdb_extension'",
    "LOAD spatial",
    "UPDATE EXTENSIONS",
]


BUCKET = [statement for statement in WRITES + READS + SETTINGS if any(name in statement for name in ("{segment}", "{other}", "{bucket}"))]


@pytest.mark.parametrize("statement", WRITES + READS + SETTINGS)
def test_no_statement_gets_out(rig: Rig, statement: str) -> None:
    """Each fails with one line and no secret in it, and every file is byte for byte what it was."""
    _probe(rig, statement)


@pytest.mark.parametrize("statement", BUCKET)
def test_no_statement_gets_at_the_bucket(rig_minio: Rig, statement: str) -> None:
    """The same for the objects of a bucket, of which the process holds one presigned URL each."""
    _probe(rig_minio, statement)


def _probe(rig: Rig, statement: str) -> None:
    before = digests(rig.settings, rig.objects)
    with pytest.raises(QueryError) as caught:
        rig.service.ask(rig.request(statement))

    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "X-Amz-Signature" not in f"{caught.value} {caught.value.hint}"
    assert digests(rig.settings, rig.objects) == before
    assert not list(Path(rig.names["folder"]).glob("*new*"))


@pytest.mark.parametrize(
    "statement", ["CHECKPOINT", "VACUUM", "CREATE TEMP TABLE t AS SELECT 1", "CREATE OR REPLACE VIEW events AS SELECT 1"]
)
def test_what_changes_only_the_process_changes_nothing(rig: Rig, statement: str) -> None:
    """Some statements run, in a process that then ends: nothing of them stays."""
    before = digests(rig.settings, rig.objects)
    rig.service.ask(rig.request(statement))

    assert digests(rig.settings, rig.objects) == before
    assert rig.service.query("SELECT count(*) AS n FROM events").table.to_pylist() == [{"n": 80}]


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("DELETE FROM events", "DELETE is not allowed"),
        ("SET threads = 64", "SET is not allowed"),
        ("ATTACH 'x' AS y", "ATTACH is not allowed"),
        ("COPY events TO 'x'", "COPY is not allowed"),
        ("SELECT 1; SELECT 2", "more than one statement"),
        ("", "no statement"),
        ("-- nothing", "no statement"),
        ("SELEC 1", "syntax error"),
        ("SELECT nope FROM sessions", 'column "nope" not found'),
        ("SELECT * FROM nope", "nope does not exist"),
        ("SELECT 1/0 + 'a'::INTEGER", "Could not convert"),
        ("SELECT * FROM range(20000)", "more than 10,000 rows"),
    ],
)
def test_errors_are_one_clear_line(rig: Rig, statement: str, words: str) -> None:
    """A person reads what is wrong and what is valid."""
    with pytest.raises(QueryError, match=words) as caught:
        rig.service.query(statement)

    assert "\n" not in f"{caught.value}{caught.value.hint}"
    assert caught.value.hint


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT length(repeat('x', 3000000000))",
        "SELECT list(i) FROM range(1000000000) t(i)",
        "SELECT count(*) FROM (SELECT DISTINCT i, hash(i), sha256(i::VARCHAR) FROM range(50000000) t(i))",
        "SELECT repeat('x', 400000000) FROM range(9)",
    ],
)
def test_memory_is_limited(rig: Rig, statement: str) -> None:
    """A query that eats memory is stopped; nothing spills to disk."""
    with pytest.raises(QueryError) as caught:
        rig.service.ask(replace(rig.request(statement), memory_mb=200))

    assert "memory" in f"{caught.value} {caught.value.hint}".lower()


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT sum(i) FROM range(1000000000000) t(i)",
        "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT count(*) FROM r WHERE i < 0",
        "SELECT count(*) FROM range(10000000) a(i), range(10000000) b(j) WHERE i + j = -1",
    ],
)
def test_time_is_limited(rig: Rig, statement: str) -> None:
    """A query that runs for ever is interrupted."""
    with pytest.raises(QueryError, match=r"stopped after 0\.5 s"):
        rig.service.ask(replace(rig.request(statement), timeout_s=0.5))


def test_process_that_does_not_listen_is_killed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the interrupt does not help, the parent ends the process."""
    monkeypatch.setattr("store.sql._GRACE_S", -1.5)
    with pytest.raises(QueryError, match="stopped after 2 s"):
        rig.service.ask(replace(rig.request("SELECT sum(i) FROM range(1000000000000) t(i)"), timeout_s=2))


def test_process_has_no_secret_and_no_open_file_of_ours(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment names no key, and closing the parent's pipe ends it."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("TOKENTAPE_COLD__SECRET_KEY", SECRET)
    service = SqlService(rig.settings, catalog=rig.catalog, objects=rig.objects, keep_warm=True)
    process = service._spare
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    assert process.stdin is not None
    process.stdin.close()

    assert SECRET.encode() not in environment
    assert process.wait(timeout=20) == 0
    service.close()


def test_kernel_refuses_what_reading_does_not_need(tmp_path: Path) -> None:
    """The filter itself, without DuckDB: files, programs, sockets and threads."""
    kept = tmp_path / "kept"
    kept.write_text("kept", encoding="utf-8")
    probe = tmp_path / "probe.py"
    probe.write_text(_KERNEL_PROBE, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, str(probe), str(kept)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )

    assert ran.stdout.split() == ["ok"], ran.stdout + ran.stderr
    assert kept.read_text(encoding="utf-8") == "kept"


_KERNEL_PROBE = """
import os, socket, subprocess, sys, threading
from store.confinement import confine
path = sys.argv[1]
confine(network=False, memory_bytes=1 << 30, cpu_s=60)
refused = [
    lambda: open(path, "wb"), lambda: open(path, "ab"), lambda: open(path, "r+b"), lambda: open(path + ".new", "xb"),
    lambda: os.open(path, os.O_RDONLY | os.O_TRUNC), lambda: os.open(path, os.O_RDONLY | os.O_CREAT), lambda: os.remove(path),
    lambda: os.rename(path, path + "2"), lambda: os.truncate(path, 0), lambda: os.link(path, path + "2"),
    lambda: os.symlink(path, path + "2"),
    lambda: os.chmod(path, 0o777), lambda: os.utime(path), lambda: os.mkdir(path + "d"), lambda: os.mkfifo(path + "f"),
    lambda: os.setxattr(path, "user.a", b"b"), lambda: socket.socket(), lambda: subprocess.run(["true"]), lambda: os.fork(),
    lambda: os.kill(os.getppid(), 0), lambda: os.execv("/bin/true", ["true"]),
]
for number, call in enumerate(refused):
    try:
        call()
    except OSError:
        continue
    print("not refused:", number)
assert open(path, "rb").read() == b"kept"
seen = []
thread = threading.Thread(target=seen.append, args=(1,))
thread.start()
thread.join()
assert seen == [1]
print("ok")
"""


# A caller who is bound to one tenant

ALLOWED = [
    "SELECT * FROM sessions",
    "FROM events SELECT kind, count(*) GROUP BY ALL ORDER BY 2 DESC LIMIT 5",
    "WITH a AS (SELECT * FROM tokens), b AS (SELECT * FROM a) SELECT * FROM b JOIN a USING (token_id)",
    "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r WHERE i < 5) SELECT * FROM r",
    "SELECT unnest([1, 2]), i FROM range(3) t(i), unnest([1]) u(x), generate_series(1, 2)",
    "SELECT sum(tokens) OVER (PARTITION BY model), list_transform([1], lambda x: x + 1) FROM generations",
    "SELECT * FROM (SELECT * FROM events UNION ALL SELECT * FROM events) WHERE kind IN (SELECT kind FROM events)",
    "PIVOT events ON kind IN ('token_chunk') USING count(*)",
    "DESCRIBE sessions",
    "SUMMARIZE SELECT tenant FROM events",
    "VALUES (1), (2)",
    "SELECT current_date, now(), pg_typeof(1), strftime(recorded_at, '%Y'), CAST('1' AS DECIMAL(3, 1)) FROM events",
    "SELECT COLUMNS('.*id'), * EXCLUDE (salt) FROM events WHERE session_id = uuid_blob('019ac8f0-0000-7000-8000-000000000000')",
    "SELECT CASE WHEN EXISTS (SELECT 1 FROM edits) THEN 1 END, (SELECT max(n) FROM generations) FROM events TABLESAMPLE 10%",
]

ESCAPES = [
    "SELECT * FROM shard_0.events",
    "SELECT * FROM shard_0.main.events",
    "SELECT * FROM memory.main.events",
    "SELECT * FROM main.events",
    "SELECT * FROM _authority",
    'SELECT * FROM "shard_0".events',
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM pg_catalog.pg_class",
    "SELECT * FROM sqlite_master",
    "SELECT * FROM duckdb_views",
    "SELECT * FROM duckdb_views()",
    "SELECT * FROM duckdb_databases()",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM pragma_table_info('events')",
    "SELECT * FROM pragma_storage_info('events')",
    "SELECT * FROM query('SELECT * FROM shard_0.events')",
    "SELECT * FROM query_table('shard_0.events')",
    "SELECT * FROM json_execute_serialized_sql('{}')",
    "SELECT json_serialize_plan('SELECT * FROM events')",
    "SELECT current_setting('allowed_paths')",
    "SELECT main.current_setting('allowed_paths')",
    "SELECT 'allowed_paths'.current_setting()",
    "SELECT getenv('HOME')",
    "SELECT getvariable('x')",
    "SELECT stats(tenant) FROM events",
    "SELECT pg_get_viewdef(1)",
    "SELECT current_database(), current_schemas(true)",
    "SELECT * FROM read_parquet('x')",
    "SELECT * FROM 'x.parquet'",
    "SELECT * FROM parquet_metadata('x')",
    "SELECT * FROM glob('*')",
    "SELECT * FROM duckdb_logs",
    "SELECT * FROM (SELECT * FROM (SELECT * FROM shard_0.events))",
    "SELECT 1 WHERE EXISTS (SELECT 1 FROM shard_0.events)",
    "SELECT (SELECT count(*) FROM shard_0.events)",
    "SELECT * FROM events ORDER BY (SELECT max(tenant) FROM shard_0.events)",
    "SELECT * FROM events LIMIT (SELECT count(*) FROM shard_0.events)",
    "SELECT count(*) FILTER (WHERE 1 IN (SELECT 1 FROM shard_0.events)) FROM events",
    "SELECT sum(1) OVER (ORDER BY (SELECT 1 FROM shard_0.events)) FROM events",
    "WITH a AS (SELECT * FROM shard_0.events) SELECT * FROM a",
    "WITH duckdb_views AS (SELECT 1) SELECT * FROM duckdb_views",
    "WITH a AS (SELECT * FROM b), b AS (SELECT 1) SELECT * FROM a",
    "SELECT * FROM (WITH hidden AS (SELECT 1) SELECT * FROM hidden), hidden",
    "WITH sqlite_master AS (SELECT * FROM sqlite_master) SELECT * FROM sqlite_master",
    "SELECT * FROM events JOIN shard_0.events x ON true",
    "SELECT * FROM events UNION SELECT * FROM shard_0.events",
    "SELECT * FROM events, LATERAL (SELECT * FROM shard_0.events)",
    "PIVOT shard_0.events ON kind IN ('a') USING count(*)",
    "PIVOT events ON kind USING count(*)",
    "UNPIVOT shard_0.events ON kind",
    "SHOW TABLES",
    "SHOW ALL TABLES",
    "SHOW DATABASES",
    "DESCRIBE shard_0.events",
    "SUMMARIZE shard_0.events",
    "EXPLAIN SELECT * FROM events",
    "SELECT list_transform([1], lambda x: (SELECT count(*) FROM shard_0.events))",
    "SELECT * FROM unnest((SELECT list(tenant) FROM shard_0.events))",
    "SELECT * FROM range((SELECT count(*) FROM shard_0.events))",
    "SELECT CASE WHEN (SELECT true FROM shard_0.events LIMIT 1) THEN 1 END",
    "SELECT [x FOR x IN (SELECT list(tenant) FROM shard_0.events)]",
    "SELECT CAST((SELECT tenant FROM shard_0.events LIMIT 1) AS INTEGER)",
    "FROM test_all_types()",
    "CALL pragma_version()",
    "SELECT nextval('s')",
    "SELECT txid_current()",
    "SELECT 1; SELECT * FROM shard_0.events",
    "SELECT * FROM events AT (VERSION => (SELECT 1 FROM shard_0.events))",
]


@pytest.fixture(scope="module")
def parser() -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the views, to parse with."""
    with duckdb.connect(":memory:") as connection:
        views.create(connection)
        yield connection


@pytest.mark.parametrize("statement", ALLOWED)
def test_tenant_may_use_the_views(parser: duckdb.DuckDBPyConnection, statement: str) -> None:
    """What people write to ask their questions passes, and runs."""
    check_statement(parser, statement, tenant="acme", reading={"SELECT", "EXPLAIN"})
    parser.execute(statement).fetchall()


@pytest.mark.parametrize("statement", ESCAPES)
def test_tenant_may_name_nothing_else(parser: duckdb.DuckDBPyConnection, statement: str) -> None:
    """The parse tree names something off the list, wherever it hides, and that is said."""
    with pytest.raises((QueryError, duckdb.ParserException)):
        check_statement(parser, statement, tenant="acme", reading=None)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT DISTINCT tenant FROM events",
        "SELECT DISTINCT tenant FROM sessions",
        "SELECT DISTINCT tenant FROM tokens",
        "SELECT DISTINCT tenant FROM generations",
        # A condition that fails on the other tenant's rows would tell of them, were it tried there.
        "SELECT DISTINCT tenant FROM events WHERE CAST(actor AS INTEGER) > 0",
        "SELECT DISTINCT tenant FROM events WHERE actor <> 'x' AND error(actor) IS NULL",
        "SELECT DISTINCT tenant FROM events WHERE CASE WHEN actor = 'hunter2' THEN error('seen') ELSE true END",
        "SELECT DISTINCT tenant FROM tokens WHERE CASE WHEN text = 'hunter2' THEN error('seen') ELSE true END",
        "WITH e AS MATERIALIZED (SELECT * FROM events) SELECT DISTINCT tenant FROM e WHERE CAST(actor AS INTEGER) > 0",
        "SELECT DISTINCT a.tenant FROM events a JOIN events b ON CAST(a.actor AS INTEGER) = CAST(b.actor AS INTEGER)",
        "SELECT DISTINCT tenant FROM (SELECT *, CAST(actor AS INTEGER) AS n FROM events) WHERE n > 0 LIMIT 100",
        "SELECT DISTINCT tenant FROM events WHERE actor IN (SELECT actor FROM events WHERE CAST(actor AS INTEGER) > 0)",
    ],
)
def test_tenant_sees_its_own_rows_and_learns_nothing_of_others(rig: Rig, statement: str) -> None:
    """Hot shards mix tenants; neither rows nor errors tell a bound caller of the others."""
    if "error(actor)" in statement:
        with pytest.raises(QueryError, match=r"4[23]"):
            rig.service.query(statement, tenant="acme")
        return

    assert rig.service.query(statement, tenant="acme").table.to_pylist() == [{"tenant": "acme"}]


def test_tenant_name_is_never_sql(rig: Rig) -> None:
    """A quote in a tenant's name ends nothing."""
    assert rig.service.query("SELECT count(*) AS n FROM events", tenant="x' OR '1'='1").table.to_pylist() == [{"n": 0}]


def test_merged_shard_is_asked_for_again(rig: Rig, tmp_path: Path) -> None:
    """A shard that goes between snapshot and attach costs another snapshot, not an error."""
    settings = Settings(data=tmp_path / "data")
    catalog = open_catalog(settings.data)
    gone = put_hot(catalog, "gone", _events("acme", "1", "x"))
    service = SqlService(settings, catalog=catalog)
    request = service.request("SELECT count(*) AS n FROM events", tenant=None)
    gone.path.rename(gone.path.with_suffix(".away"))
    with pytest.raises(QueryError, match=r"gone\.duckdb") as caught:
        service.ask(request)
    catalog.swap(retire=["gone"])
    put_hot(catalog, "merged", _events("acme", "1", "x"))

    assert "new snapshot" in caught.value.hint
    assert service.query("SELECT count(*) AS n FROM events").table.to_pylist() == [{"n": 20}]


def test_many_queries_at_once(rig: Rig) -> None:
    """Threads share a service: each query has a process of its own, and none is left."""
    results: list[int] = []
    before = _children()

    def ask() -> None:
        results.append(rig.service.query("SELECT count(*) AS n FROM events").table.to_pylist()[0]["n"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == [80] * 4
    assert _settled(before) == before


def _children() -> int:
    """Sandbox processes of this one."""
    found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
    return sum("store.sandbox" in line for line in found.splitlines())


def _settled(expected: int, deadline_s: float = 20.0) -> int:
    """Sandbox processes of this one, once those that end have ended."""
    until = time.monotonic() + deadline_s
    while (count := _children()) != expected and time.monotonic() < until:
        time.sleep(0.05)
    return count
