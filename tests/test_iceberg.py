"""The cold tier as an Iceberg table: what it names is what is live, and engines that know nothing of us count the same rows."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from lifecycle.compaction import Compaction
from lifecycle.iceberg import CATALOG, Iceberg
from lifecycle.register import Register
from lifecycle.rewriting import Change, Done, rewriting
from schemas.errors import CorruptStore, SettingsError, StoreUnavailable
from schemas.settings import IcebergSettings
from scripts.native import tools
from store.sql import query
from tests.eventgen import conversation
from tests.tiered import Tiered
from tokentape.cli import main

OPENED = [f"java.{name}" for name in ("lang", "lang.invoke", "lang.reflect", "io", "net", "nio", "util", "util.concurrent")]
OPENED += ["java.util.concurrent.atomic", "sun.nio.ch", "sun.nio.cs", "sun.security.action", "sun.util.calendar"]
"""Packages of Java that Spark looks into."""


def iceberg(rig: Tiered, **changes: str) -> Iceberg:
    """The rig's table, in a catalog of its own."""
    settings = rig.settings.model_copy(update={"iceberg": IcebergSettings(publish="on", **changes)})
    return Iceberg(settings, rig.catalog)


def talk(rig: Tiered, day: str) -> None:
    """One tiered conversation, filed under a day."""
    rig.ingest(list(conversation(rig.producer, chunks=4)))
    rig.set_day(day)
    rig.tier()


def read(table: Iceberg) -> pa.Table:
    """All rows as pyiceberg reads them, by partition and offset."""
    found: pa.Table = table._table().scan().to_arrow()
    return found.sort_by([("partition", "ascending"), ("offset", "ascending")])


def same(table: Iceberg, rig: Tiered) -> bool:
    """Whether it has the rows that SQL sees, by what tells them apart."""
    columns = ["event_id", "kind", "tenant", "partition", "offset", "recorded_at", "token_chunk"]
    found, wanted = (rows.select(columns).to_pylist() for rows in (read(table), rig.table()))
    return bool(found) and found == wanted


def test_the_table_is_what_is_live(rig: Tiered) -> None:
    """Segments appear when they are sealed, merged ones take the place of theirs, and no snapshot names what is gone."""
    table = iceberg(rig)
    talk(rig, "2026-01-10")
    first = table.publish()
    talk(rig, "2026-01-10")
    wanted = table.preview()
    second, again = table.publish(), table.publish()
    Compaction(rig.tiering()).run()
    merged = table.publish()
    live = [segment.key for segment in rig.catalog.snapshot().segments]

    assert (first.added, first.files) == (1, 1)
    assert [len(wanted[key]) for key in ("would_add", "would_drop")] == [1, 0]
    assert (second.added, second.dropped, second.files, second.rows) == (1, 0, 2, 2 * first.rows)
    assert (again.added, again.dropped, again.metadata) == (0, 0, second.metadata)
    assert (merged.added, merged.dropped, merged.files, merged.rows) == (1, 2, 1, second.rows)
    assert [path.endswith(live[0]) for path in table._table().inspect.files()["file_path"].to_pylist()] == [True]
    assert len(table._table().snapshots()) == 1
    assert same(table, rig)


def test_readers_stop_before_objects_go(local: Tiered) -> None:
    """When a rewrite withdraws its old segments they are still there, and the table names them no more."""
    table = iceberg(local)
    talk(local, "2026-01-10")
    talk(local, "2026-01-11")
    table.publish()
    segments = local.catalog.snapshot().segments
    seen: list[Any] = []

    def withdraw() -> None:
        table.publish()
        seen.append((local.objects.head(segments[0].key) is not None, read(table).num_rows))

    tiering = local.tiering(withdraw=withdraw)
    register = Register.of(local.ledger)
    with tiering.alone(), rewriting(tiering, register) as run:
        run.apply(lambda: Change("retention", (segments[0],), whole=True), Done())

    assert seen == [(True, segments[1].rows)]
    assert local.objects.head(segments[0].key) is None
    assert same(table, local)


def test_segments_of_an_older_schema(local: Tiered) -> None:
    """A segment without the newest columns reads as null there, whichever was published first."""
    table = iceberg(local)
    talk(local, "2026-01-10")
    path = local.settings.data / "cold" / local.catalog.snapshot().segments[0].key
    old = pq.read_table(path).drop_columns(["access_logged"])
    path.chmod(0o600)
    pq.write_table(old, path)
    table.publish()
    talk(local, "2026-01-11")
    published = table.publish()
    found = read(table)

    assert published.rows == found.num_rows == 2 * old.num_rows
    assert found.column("access_logged").null_count == found.num_rows
    assert found.column("event_id").to_pylist() == local.table().column("event_id").to_pylist()


def test_publishers_at_once(local: Tiered) -> None:
    """Of many that publish at the same time each file is added once."""
    for day in range(10, 14):
        talk(local, f"2026-01-{day}")
    iceberg(local)._table()
    go, failed = threading.Barrier(4), []

    def publish() -> None:
        go.wait()
        try:
            iceberg(local).publish()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=publish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert not failed
    assert same(iceberg(local), local)


def test_what_cannot_be_published_is_one_line(local: Tiered, tmp_path: Path) -> None:
    """A missing segment, an address that is none, a catalog that is not there: said by name, without a password, and nothing changed."""
    talk(local, "2026-01-10")
    table = iceberg(local)
    before = table.publish()
    talk(local, "2026-01-11")
    segment = local.catalog.snapshot().segments[1]
    path = local.settings.data / "cold" / segment.key
    held = path.read_bytes()
    path.unlink()
    with pytest.raises(CorruptStore, match="a segment is not there"):
        table.publish()
    unchanged = table._table().metadata_location
    path.write_bytes(b"PAR1 but no segment")
    with pytest.raises(CorruptStore, match="does not fit the table"):
        table.publish()
    path.write_bytes(held)
    with pytest.raises(SettingsError, match=r"iceberg\.catalog cannot be used") as wrong:
        iceberg(local, catalog="nonsense://me:secret@host/db").publish()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable):
        iceberg(local, catalog=f"sqlite:///{tmp_path}/file/catalog.sqlite").publish()

    assert unchanged == before.metadata
    assert "secret" not in str(wrong.value)
    assert table.publish().files == 2


def test_spark_agrees_to_the_row(local: Tiered, tmp_path: Path) -> None:
    """Apache Spark, through Java's own JDBC catalog, counts and sums what `tokentape sql` does."""
    for day in range(10, 13):
        talk(local, f"2026-01-{day}")
    data = local.settings.data
    published = CliRunner().invoke(main, ["--data", str(data), "iceberg"])
    looked = CliRunner().invoke(main, ["--data", str(data), "iceberg", "--dry-run"])
    facts = "count(*), count(DISTINCT session_id), sum({size}(token_chunk.content.token_ids)), sum(length(token_chunk.content.text))"
    last = "max(producer_seq), sum(CASE WHEN tenant = 'acme' THEN 1 ELSE 0 END)"
    ours = query(local.settings, f"SELECT {facts.format(size='len')}, {last} FROM events").table
    theirs = spark(f"SELECT {facts.format(size='size')}, {last} FROM {CATALOG}.{iceberg(local).name}", iceberg(local), tmp_path)

    assert published.exit_code == 0, published.output
    assert "would_add: none" in looked.output
    assert theirs == [str(column[0].as_py()) for column in ours.columns]


def spark(statement: str, table: Iceberg, folder: Path) -> list[str]:
    """The one row of Spark's answer."""
    opened = [f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in OPENED]
    catalog = f"spark.sql.catalog.{CATALOG}"
    settings = {
        "spark.ui.enabled": "false",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.sql.catalogImplementation": "in-memory",
        catalog: "org.apache.iceberg.spark.SparkCatalog",
        f"{catalog}.type": "jdbc",
        f"{catalog}.uri": f"jdbc:{table.uri.replace('sqlite:///', 'sqlite:')}",
        f"{catalog}.warehouse": table.warehouse,
    }
    chosen = [part for key, value in settings.items() for part in ("--conf", f"{key}={value}")]
    program = ["org.apache.spark.deploy.SparkSubmit", "--master", "local[1]", *chosen, "--class"]
    shell = ["org.apache.spark.sql.hive.thriftserver.SparkSQLCLIDriver", "spark-internal", "-e", statement]
    java = [tools.java(print), "-XX:TieredStopAtLevel=1", *opened, "-cp", f"{tools.spark_jars(print)}/*"]
    ran = subprocess.run([*java, *program, *shell], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.splitlines()[-1].split("\t")
