"""From hot to cold: the same rows before, during and after, whatever is killed, lost or away in between."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from lifecycle.tiering import CRASH_POINTS
from schemas.codec import decode_datum, encode, encode_datum, leaf_hash
from schemas.errors import ConflictError, CorruptStore, StorageFull, StoreUnavailable
from schemas.events import PAYLOADS, SegmentSealed
from schemas.registry import CURRENT, Schema, SchemaRegistry
from schemas.settings import Settings
from store.catalog import open_catalog
from store.crashpoints import VARIABLE, watched
from store.duck import connect, mapped
from store.fences import FileLock, tier_lock_path
from store.ledger.merkle import root_of
from store.log.base import Entry
from store.objects import open_store
from store.reader import EventReader
from store.recode import recode
from store.requeue import requeue
from store.sql import query
from tests.conftest import KafkaService, MinioService, distributed
from tests.eventgen import Producer, conversation
from tests.flaky_proxy import Proxy
from tests.indexed import offsets
from tests.stored import insert
from tests.strategies import LONGS, sample
from tests.tiered import Tiered, alter, tiered

ROOT = Path(__file__).parents[1]


def mixed(producer: Producer, count: int = 3) -> list[Entry]:
    """Conversations of two tenants and two classes, side by side in the log."""
    found: list[list[Entry]] = []
    for number in range(count):
        context = producer.session(tenant=("acme", "zeta")[number % 2])
        context = dataclasses.replace(context, retention_class=("standard", "long")[number // 2 % 2])
        found.append(list(conversation(producer, chunks=6, session=context)))
    return _renumbered(producer, [entry for group in zip(*found, strict=True) for entry in group])


def _renumbered(producer: Producer, entries: list[Entry]) -> list[Entry]:
    """The entries in another order, numbered anew as their producer would have numbered them."""
    registry, found = SchemaRegistry(), []
    seqs: dict[int, list[int]] = {}
    for entry in entries:
        seqs.setdefault(entry.partition, []).append(decode_datum(entry.value, registry)[0]["producer_seq"])
    numbers = {partition: iter(sorted(values)) for partition, values in seqs.items()}
    for entry in entries:
        datum, schema = decode_datum(entry.value, registry)
        value = encode_datum({**datum, "producer_seq": next(numbers[entry.partition])}, schema)
        found.append(Entry(entry.partition, entry.key, value))
    return found


class TestRows:
    def test_the_same_rows_before_during_and_after(self, rig: Tiered) -> None:
        """SQL and reader give the same rows, row by row, while a run moves them, and everything verifies."""
        rig.ingest(mixed(rig.producer, 4))
        rig.ingest(mixed(rig.producer, 2))
        before, session = rig.table(), rig.catalog.snapshot().shards[0].session_min
        reader = EventReader(rig.settings, rig.catalog, rig.objects)
        read = list(reader.session(session))
        asked = query(rig.settings, "SELECT kind, count(*) AS n FROM events GROUP BY ALL ORDER BY ALL").table
        seen: list[bool] = []
        done = threading.Event()

        def look() -> None:
            while not done.is_set():
                seen.append(list(reader.session(session)) == read)

        watcher = threading.Thread(target=look)
        watcher.start()
        summary = rig.tier()
        done.set()
        watcher.join()

        assert rig.table() == before
        assert list(reader.session(session)) == read
        assert query(rig.settings, "SELECT kind, count(*) AS n FROM events GROUP BY ALL ORDER BY ALL").table == asked
        assert all(seen)
        assert rig.records() == offsets(rig.log)
        assert rig.catalog.snapshot().shards == ()
        assert summary["events"] == before.num_rows
        assert [payload.segment for payload in rig.sink.payloads if isinstance(payload, SegmentSealed)] == summary["keys"]
        assert rig.verification().report().to_dict()["findings"] == []
        assert list((rig.settings.data / "tmp").glob("tier-*")) == []

    def test_tiering_again_does_nothing(self, rig: Tiered) -> None:
        """What is cold stays as it is; new events become a new entry."""
        rig.ingest(mixed(rig.producer))
        first = rig.tier()
        again = rig.tier()
        rig.ingest(mixed(rig.producer))
        third = rig.tier()

        assert (first["segments"], again["segments"], again["finished_earlier"]) == (3, 0, 0)
        assert third["segments"] == 3
        assert rig.ledger.head() == 2
        assert rig.records() == offsets(rig.log)
        assert rig.verification().report().exit_code == 0

    def test_more_shards_than_are_attached_at_once(self, local: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are put together in a file of their own first."""
        for module in ("lifecycle.tiering", "store.cold"):
            monkeypatch.setattr(f"{module}.ATTACHED_MAX", 1)
        for _ in range(3):
            local.ingest(mixed(local.producer, 1))
        local.tier()

        assert local.records() == offsets(local.log)
        assert local.catalog.snapshot().shards == ()

    def test_a_dry_run_changes_nothing(self, local: Tiered) -> None:
        """It says what would be done, by day."""
        local.ingest(mixed(local.producer))
        local.set_day("2026-11-01")
        would = local.tiering().run(dry_run=True)

        assert would["would_tier"] == [f"2026-11-01: {would['events']:,} events in 1 shard(s)"]
        assert local.ledger.head() == 0
        assert len(local.catalog.snapshot().shards) == 1
        assert list(local.objects.list("")) == []

    def test_only_closed_days_are_taken(self, local: Tiered) -> None:
        """Today's events stay hot; older days go, each as an entry of its own."""
        for day in ("2026-11-01", "2026-11-02"):
            local.ingest(mixed(local.producer))
            with contextlib.closing(sqlite3.connect(local.catalog.path)) as connection, connection:
                connection.execute("UPDATE shard SET day = ? WHERE day > '2026-11-20'", (day,))
        local.ingest(today := mixed(local.producer))
        summary = local.tiering().run()
        days = [entry.body["day"] for entry in local.ledger.entries()]

        assert days == ["2026-11-01", "2026-11-02"]
        assert summary["segments"] == 6
        assert sum(shard.rows for shard in local.catalog.snapshot().shards) == len(today)
        assert local.records() == offsets(local.log)
        assert local.verification().report().exit_code == 0

    def test_a_lost_catalog_gets_its_segments_back(self, local: Tiered) -> None:
        """The ledger alone says what is cold."""
        local.ingest(mixed(local.producer))
        local.tier()
        before = local.table()
        local.catalog.close()
        shutil.rmtree(local.settings.data / "hot")
        local.catalog = open_catalog(local.settings.data)

        assert local.tiering().reconcile() == 1
        assert local.table() == before

    def test_no_tiering_beside_another(self, local: Tiered) -> None:
        """One run at a time, and none of shards that are being merged; each says so in one line."""
        local.ingest(mixed(local.producer))
        lock = FileLock.take(local.settings.data / "hot" / "fences" / "tier.lock", "other")
        assert lock is not None
        with pytest.raises(ConflictError, match="another tiering run"):
            local.tier()
        lock.release()
        local.catalog.claim([shard.name for shard in local.catalog.snapshot().shards], "merge-1", 60)
        with pytest.raises(ConflictError, match="merged"):
            local.tier()

        assert local.ledger.head() == 0

    @pytest.mark.parametrize(("lost", "says"), [(True, "lock file was removed"), (False, "another tiering run is at work")])
    def test_of_two_runs_whose_lock_failed_them_one_enters_the_day(self, local: Tiered, lost: bool, says: str) -> None:
        """Another run does the same while this one stands still before its entry: the day is entered once, with objects that are there."""
        local.ingest(mixed(local.producer))
        waited: list[str] = []

        def zombie(label: str) -> None:
            if label == "tier.before_commit" and not waited:
                waited.append(label)
                if lost:
                    tier_lock_path(local.settings.data / "hot").unlink()
                local.tiering().run_alone(all_days=True)

        with watched(zombie), pytest.raises(ConflictError, match=says):
            local.tier()

        assert [entry.type for entry in local.ledger.entries()] == ["segments"]
        assert local.records() == offsets(local.log)
        assert local.verification().report().exit_code == 0


class TestSegments:
    @pytest.mark.parametrize("limit", [{"segment_bytes_max": 40_000}, {"segment_rows_max": 30}])
    def test_segments_roll_between_sessions(self, local: Tiered, limit: dict[str, int]) -> None:
        """A segment holds one tenant, day and class, ends where it gets too large, and no session is cut."""
        local.ingest([entry for _ in range(3) for entry in mixed(local.producer, 4)])
        summary = local.tier(**limit)
        held: dict[bytes, set[str]] = {}
        for segment in local.catalog.snapshot().segments:
            table = pq.read_table(pa.BufferReader(local.objects.get(segment.key)), columns=["session_id", "tenant", "retention_class"])
            for session in table.column("session_id").unique().to_pylist():
                held.setdefault(session, set()).add(segment.key)

            assert set(table.column("tenant").to_pylist()) == {segment.tenant}
            assert set(table.column("retention_class").to_pylist()) == {segment.retention_class}

        assert summary["segments"] > 4
        assert all(len(keys) == 1 for keys in held.values())
        assert len({key.rpartition("-")[0] for key in summary["keys"]}) == summary["segments"]
        assert local.records() == offsets(local.log)
        assert local.verification().report().exit_code == 0

    def test_rows_are_sorted_a_slice_at_a_time(self, local: Tiered, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sessions of several slices, one longer than a slice, stand in one segment, each once and in the order of the log."""
        monkeypatch.setattr("store.cold.ROW_GROUP_ROWS", 50)
        longer = conversation(local.producer, chunks=80)
        local.ingest([*longer, *(entry for _ in range(6) for entry in conversation(local.producer))])
        local.tier()
        (segment,) = local.catalog.snapshot().segments
        places = pq.read_table(pa.BufferReader(local.objects.get(segment.key)), columns=["session_id", "partition", "offset"]).to_pylist()

        assert segment.rows == len(places) == 87 + 6 * 27
        assert places == sorted(places, key=lambda row: (row["session_id"], row["partition"], row["offset"]))
        assert local.records() == offsets(local.log)
        assert local.verification().report().exit_code == 0

    def test_too_little_memory_is_named(self, tmp_path: Path) -> None:
        """Where DuckDB may not have the memory that it needs, nothing is called damaged, and the setting is named."""
        with connect(memory_limit="20MB", threads=1, max_temp_directory_size="0MB") as connection:
            with pytest.raises(duckdb.OutOfMemoryException) as caught:
                connection.execute("SELECT list(range ORDER BY range DESC) FROM range(10_000_000)")
            error = mapped(caught.value, operation="write segment", place="here")

        assert isinstance(error, StorageFull)
        assert "sql.memory_mb" in error.hint

    def test_no_name_of_a_tenant_blocks_the_tier(self, local: Tiered) -> None:
        """Whatever producers sent as tenant becomes a safe key."""
        tenants = ["", ".", "..", "a/b", "ünï code", "x" * 300, "x" * 301, "a\0b", "tenant=x"]
        entries: list[Entry] = []
        for tenant in tenants:
            context = dataclasses.replace(local.producer.session(tenant=tenant), retention_class=tenant)
            entries += conversation(local.producer, chunks=1, session=context)
        local.ingest(entries)
        local.tier()

        assert local.records() == offsets(local.log)
        assert sorted(segment.tenant for segment in local.catalog.snapshot().segments) == sorted(tenants)

    def test_plain_readers_read_a_segment(self, rig: Tiered, tmp_path: Path) -> None:
        """Plain pyarrow and plain DuckDB give the rows, and looking up by any id gives what a full scan gives."""
        rig.ingest(mixed(rig.producer, 4))
        rig.tier()
        paths = []
        for number, segment in enumerate(rig.catalog.snapshot().segments):
            paths.append(tmp_path / f"{number}.parquet")
            paths[-1].write_bytes(rig.objects.get(segment.key))
        files = [str(path) for path in paths]
        whole = ds.dataset(files).to_table()
        plain = duckdb.connect()
        for name in ("event_id", "session_id"):
            for value in whole.column(name).unique().to_pylist()[::3]:
                expected = whole.filter(pc.equal(whole.column(name), pa.scalar(value))).num_rows
                found = plain.execute(f"SELECT count(*) FROM read_parquet(?) WHERE {name} = ?", [files, value]).fetchone()

                assert found == (expected,)
                assert ds.dataset(files).to_table(filter=ds.field(name) == pa.scalar(value)).num_rows == expected
        assert whole.num_rows == len(offsets(rig.log))
        assert plain.execute("SELECT count(*), count(DISTINCT event_id) FROM read_parquet(?)", [files]).fetchone() == (whole.num_rows,) * 2

    def test_the_entry_explains_itself(self, rig: Tiered) -> None:
        """Segments, coverage and schemas stand in the entry with their SHA-256, and nothing else is in the store."""
        rig.ingest(mixed(rig.producer, 4))
        rig.tier()
        (entry,) = rig.ledger.entries()
        listed = {item["key"]: item for item in entry.body["objects"]}
        stored = {info.key for prefix in ("events/", "coverage/", "schemas/") for info in rig.objects.list(prefix)}

        assert listed.keys() == stored
        assert all(hashlib.sha256(rig.objects.get(key)).hexdigest() == item["sha256"] for key, item in listed.items())
        assert {item["key"] for item in entry.body["segments"]} < stored
        assert {key for item in entry.body["segments"] for key in item["schemas"]} == {f"schemas/{CURRENT.fingerprint.hex()}.avsc"}
        assert Schema(json.loads(rig.objects.get(f"schemas/{CURRENT.fingerprint.hex()}.avsc"))).sha256 == CURRENT.sha256

    def test_the_root_is_that_of_the_leaves(self, local: Tiered) -> None:
        """Made anew with the slow codec: RFC 9162 over the leaves in row order."""
        local.ingest(mixed(local.producer, 1))
        local.tier()
        (segment,) = local.catalog.snapshot().segments
        table = pq.read_table(pa.BufferReader(local.objects.get(segment.key)))
        log = offsets(local.log)
        places = zip(table.column("partition").to_pylist(), table.column("offset").to_pylist(), strict=True)
        leaves = [leaf_hash(*decode_datum(log[place], local.registry)) for place in places]

        assert segment.root == root_of(leaves)
        assert table.column("session_id").to_pylist() == sorted(table.column("session_id").to_pylist())

    def test_the_lock_really_stands(self, settings_distributed: Settings) -> None:
        """Deleting the version of a segment, a schema, a coverage manifest or a ledger entry is refused by the server."""
        with tiered(settings_distributed) as rig:
            rig.ingest(mixed(rig.producer, 1))
            rig.tier()
            keys = [info.key for info in rig.objects.list("")]

            assert {key.partition("/")[0] for key in keys} == {"events", "coverage", "schemas", "ledger"}
            for key in keys:
                with pytest.raises(ConflictError, match="locked"):
                    rig.objects.delete(key)


class TestCoverage:
    def test_duplicates_and_quarantined_records_are_covered(self, rig: Tiered) -> None:
        """Every offset is in a segment, a duplicate or in quarantine; digests hold with the records that have no row."""
        entries = mixed(rig.producer, 2)
        broken = Entry(entries[0].partition, entries[0].key, entries[0].value + b"\0")
        rig.ingest([*entries, *entries[3:6], broken, Entry(entries[0].partition, b"k" * 16, b"garbage")])
        rig.checkpoint()
        rig.tier()
        spans = next(iter(rig.ledger.entries())).body["coverage"]
        counts = [sum(span[name] for span in spans) for name in ("rows", "duplicates", "quarantined")]
        report = rig.verification().report()

        assert counts == [len(entries), 3, 2]
        assert len(rig.records()) == len(entries)
        assert report.to_dict()["findings"] == []
        assert (report.events, report.covered_offsets) == (len(entries), len(entries) + 5)
        assert report.digests == len({entry.partition for entry in entries})

    def test_a_shard_without_rows_is_covered(self, local: Tiered) -> None:
        """Only duplicates: an entry without segments, and the shard goes."""
        entries = mixed(local.producer, 1)
        local.ingest(entries)
        local.ingest(entries)
        local.tier()
        local.ingest(entries)
        summary = local.tier()

        assert (summary["shards"], summary["segments"]) == (1, 0)
        assert local.catalog.snapshot().shards == ()
        assert local.records() == {place: value for place, value in offsets(local.log).items() if place[1] < len(entries)}
        assert local.verification().report().exit_code == 0

    @pytest.mark.parametrize("tiered_before", [False, True])
    def test_a_requeued_record_is_tiered(self, local: Tiered, tiered_before: bool) -> None:
        """A record whose schema became known later has its row in a segment, and its bytes are those of the quarantine."""
        schema = without_last_kind()
        entries = mixed(local.producer, 1)
        datum, _ = decode_datum(entries[4].value, local.registry)
        local.ingest([*entries[:4], Entry(entries[4].partition, entries[4].key, encode_datum(datum, schema)), *entries[5:]])
        if tiered_before:
            local.tier()
        local.registry.add(schema.definition)
        requeued = requeue(local.settings, local.catalog, local.registry)
        local.tier()
        report = local.verification().report()

        assert requeued["requeued"] == 1
        assert local.records() == offsets(local.log)
        assert local.catalog.snapshot().shards == ()
        assert report.to_dict()["findings"] == []
        assert report.events == len(entries)
        assert f"schemas/{schema.fingerprint.hex()}.avsc" in {info.key for info in local.objects.list("schemas/")}

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ("UPDATE events SET actor = 'somebody' WHERE \"offset\" = 3", "not the bytes that were indexed"),
            ('DELETE FROM events WHERE "offset" = 3', "rows in shards that say"),
            ('UPDATE events SET "offset" = 4 WHERE "offset" = 3', "is there twice"),
            ('UPDATE events SET "offset" = 4000 WHERE "offset" = 3', "is in no segment"),
            ("UPDATE events SET session_opened = NULL WHERE kind = 'session_opened'", "no payload"),
            ("UPDATE events SET salt = NULL WHERE kind = 'token_chunk'", "content without a salt"),
            ('UPDATE events SET actor = NULL WHERE "offset" = 3', "a value is missing"),
        ],
    )
    def test_altered_rows_are_refused(self, local: Tiered, change: str, words: str) -> None:
        """A shard that is no longer what was indexed is not tiered: one clear error, and nothing is dropped."""
        local.ingest(mixed(local.producer, 1))
        (shard,) = local.catalog.snapshot().shards
        alter(shard, change)

        with pytest.raises(CorruptStore, match=words):
            local.tier()
        assert local.ledger.head() == 0
        assert [item.name for item in local.catalog.snapshot().shards] == [shard.name]
        assert shard.path.exists()
        assert local.catalog.claimed() == {}


def without_last_kind() -> Schema:
    """A schema of an earlier version: it lacks the last kind."""
    return Schema({**CURRENT.definition, "fields": CURRENT.definition["fields"][:-1]})


class TestOlderSchemas:
    def test_rows_of_an_older_version_keep_their_bytes(self, local: Tiered) -> None:
        """A shard of both versions is tiered, each row under the schema that wrote it."""
        schema = without_last_kind()
        local.registry.add(schema.definition)
        entries = mixed(local.producer, 2)
        older = [Entry(e.partition, e.key, encode_datum(decode_datum(e.value, local.registry)[0], schema)) for e in entries[::2]]
        local.ingest([pair for pairs in zip(older, entries[1::2], strict=True) for pair in pairs])
        local.tier()

        assert local.records() == offsets(local.log)
        assert local.verification().report().exit_code == 0
        assert len(list(local.objects.list("schemas/"))) == 2

    def test_a_table_that_lacks_columns_is_tiered(self, local: Tiered) -> None:
        """A shard that an older version made shows NULL in columns that came later."""
        local.ingest(mixed(local.producer, 2))
        (shard,) = local.catalog.snapshot().shards
        alter(shard, "ALTER TABLE events DROP COLUMN access_logged", "ALTER TABLE events DROP COLUMN engine_step")
        local.tier()

        assert local.records() == offsets(local.log)
        assert pq.read_schema(pa.BufferReader(local.objects.get(local.catalog.snapshot().segments[0].key))).names[-1] == "access_logged"


class TestRecode:
    @pytest.mark.parametrize("kind", sorted(PAYLOADS))
    def test_whole_columns_give_the_codecs_bytes(self, kind: str, tmp_path: Path) -> None:
        """Hash and leaf of every kind with nothing, everything and the nasty values, erased ones too, equal those of the codec."""
        registry = SchemaRegistry()
        events = [sample(kind, full=full, turn=turn) for full in (False, True) for turn in range(len(LONGS))]
        values = [encode(event) for event in events]
        with connect(extensions=("avro",)) as connection:
            insert(connection, tmp_path, values, offset=7)
            connection.execute(f"COPY events TO '{tmp_path}/x.parquet' (FORMAT parquet, PARQUET_VERSION V2)")
        found: dict[int, tuple[bytes, bytes]] = {}
        for batch in pq.ParquetFile(tmp_path / "x.parquet").iter_batches(batch_size=5):
            for piece in recode(batch, registry):
                for place, offset in enumerate(piece.offsets.tolist()):
                    span = slice(32 * place, 32 * place + 32)
                    found[offset] = (piece.hashes[span], piece.leaves[span])
        expected = [(hashlib.sha256(value).digest(), leaf_hash(*decode_datum(value, registry))) for value in values]

        assert [found[7 + number] for number in range(len(values))] == expected

    def test_a_second_payload_is_refused(self) -> None:
        """What stands in the column of another kind would be in no proof."""
        opened = pa.array([{"client": "x"}, None], pa.struct([("client", pa.string())]))
        closed = pa.array([{"reason": "x"}, {"reason": "y"}], pa.struct([("reason", pa.string())]))
        kinds = pa.array(["session_opened", "session_closed"])
        batch = pa.record_batch({"kind": kinds, "schema": pa.array([b"x" * 8] * 2), "session_opened": opened, "session_closed": closed})

        with pytest.raises(CorruptStore, match="two"):
            list(recode(batch, SchemaRegistry()))


_WORKER = """
import pickle, sys
from pathlib import Path
from tests.tiered import tiered

settings = pickle.loads(Path(sys.argv[1]).read_bytes())
with tiered(settings) as rig:
    rig.tier()
"""


class TestFaults:
    def test_killed_at_every_step(self, rig: Tiered, tmp_path: Path) -> None:
        """A run killed at any step that changes durable state loses nothing and doubles nothing, and the next one finishes it."""
        (tmp_path / "settings").write_bytes(pickle.dumps(rig.settings))
        steps = CRASH_POINTS if rig.settings.cold.kind == "local" else ("put_one", "coverage_put", "committed", "swapped")
        for step in steps:
            rig.ingest(mixed(rig.producer, 2))
            status = _killed(tmp_path / "settings", f"tier.{step}")

            assert status == -signal.SIGKILL, step
            assert rig.records() == offsets(rig.log), step
        committed = len(steps) - steps.index("committed")

        assert rig.ledger.head() == committed
        summary = rig.tier()
        report = rig.verification().report()

        assert rig.records() == offsets(rig.log)
        assert rig.catalog.snapshot().shards == ()
        assert rig.catalog.claimed() == {}
        assert summary["finished_earlier"] == (steps[-1] == "committed")
        assert report.exit_code == 0
        assert report.events == len(offsets(rig.log))
        assert {finding.kind for finding in report.findings} <= {"orphan"}
        assert list((rig.settings.data / "tmp").glob("tier-*")) == []

    @pytest.mark.parametrize("step", ["tier.written", "tier.put_one"])
    def test_a_run_that_was_taken_for_dead(self, settings_embedded: Settings, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        """Another run cleared its folder, or its objects, while it stood still: it says so in one line, and the next run does the day."""
        with tiered(settings_embedded) as rig:
            rig.ingest(mixed(rig.producer, 1))

            def overtaken(label: str) -> None:
                if label == step:
                    rig.tiering().clear()
                    for stored in list(rig.objects.list("events/")):
                        rig.objects.purge(stored.key)

            monkeypatch.setattr("lifecycle.tiering.crash_point", overtaken)
            with pytest.raises(ConflictError, match="another run took this one for dead"):
                rig.tier()
            monkeypatch.undo()
            rig.tier()

            assert rig.records() == offsets(rig.log)
            assert rig.catalog.snapshot().shards == ()

    def test_a_store_that_goes_away_in_the_middle(
        self, settings_embedded: Settings, kafka: KafkaService, minio_private: MinioService
    ) -> None:
        """One clear error at whatever object the store goes away; the next run completes."""
        cold = distributed(settings_embedded.data, kafka, minio_private).cold.model_copy(update={"timeout_s": 2.0})
        settings = settings_embedded.model_copy(update={"cold": cold})
        with tiered(settings) as rig:
            for after in (0, 1, 2):
                rig.ingest(mixed(rig.producer, 2))
                with pytest.raises(StoreUnavailable, match="no answer"):
                    rig.tier(objects=_GoingAway(rig.objects, minio_private, after))
                minio_private.start()

                assert len(rig.catalog.snapshot().shards) == after + 1
            rig.tier()

            assert rig.records() == offsets(rig.log)
            assert rig.catalog.snapshot().shards == ()
            assert rig.verification().report().exit_code == 0

    @pytest.mark.parametrize("to", ["events/", "coverage/", "schemas/", "ledger/entries/"])
    def test_a_lost_reply_after_a_put(self, settings_embedded: Settings, kafka: KafkaService, minio: MinioService, to: str) -> None:
        """The server wrote the object and its answer was lost: it is there once, and the run goes on."""
        cold = distributed(settings_embedded.data, kafka, minio).cold
        open_store(cold, settings_embedded.data)
        with Proxy(minio.endpoint) as proxy:
            settings = settings_embedded.model_copy(update={"cold": cold.model_copy(update={"endpoint": proxy.endpoint})})
            with tiered(settings) as rig:
                rig.ingest(mixed(rig.producer, 1))
                proxy.drop_next_reply_to = f"PUT /{cold.bucket}/{to}".encode()
                rig.tier()

                assert proxy.dropped == 1
                assert rig.ledger.head() == 1
                assert len(list(rig.objects.list("events/"))) == 1
                assert rig.records() == offsets(rig.log)
                assert rig.verification().report().to_dict()["findings"] == []


class _GoingAway:
    """A store whose server stops before a number of objects were created."""

    def __init__(self, store: Any, server: MinioService, after: int) -> None:
        self._store = store
        self._server = server
        self._left = after

    def __getattr__(self, name: str) -> Any:
        if name in ("create", "create_from_file"):
            if self._left == 0:
                self._server.stop()
            self._left -= 1
        return getattr(self._store, name)


def _killed(settings: Path, step: str) -> int:
    """Run tiering in a child that dies at a step; its exit status."""
    environment = {**os.environ, VARIABLE: step, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _WORKER, str(settings)], env=environment, check=False, capture_output=True, timeout=120)
    return done.returncode
