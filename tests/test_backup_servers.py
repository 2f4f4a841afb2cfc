"""Backup, restore and drill where the log is Kafka and the cold tier a bucket: whatever is lost of machine, bucket and topic."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient
from minio import Minio

from ingest.gateway.batch.finish import results_of
from lifecycle import manifest
from lifecycle.backup import Backup, Made
from lifecycle.holds import Holds
from lifecycle.restore import restore
from lifecycle.selectors import Selector
from schemas.errors import ConflictError, CorruptStore
from schemas.settings import Settings
from store.blobs import BlobStore
from store.control import open_control
from store.crashpoints import VARIABLE
from store.indexer import Indexer
from store.log.base import Entry
from store.objects import open_store
from tests.batch_case import MODELS, Forks, Upstream, desk_at, request, results_at, submit_at, texts_of, written
from tests.conftest import KafkaService, MinioService, distributed
from tests.eventgen import conversation
from tests.gateway_rig import broken
from tests.program import ROOT, invoke, to_toml, until
from tests.tiered import Tiered, tiered
from tokentape import __version__

POISON = b"\xc3\x01" + bytes(8) + b"what is this?"
FACTS = {"refunds": {"tag": "refund"}, "slow": {"model": "big"}}


@dataclass(frozen=True)
class Original:
    """A distributed installation with events in cold, hot and topic, a blob, a quarantined record, a hold and facts; and its backup."""

    settings: Settings
    records: dict[tuple[int, int], bytes]
    blob: bytes
    folder: Path
    made: Made

    def elsewhere(self, data: Path, **changes: Any) -> Settings:
        """Settings with topic and bucket of their own; or the original's, where they are given."""
        return elsewhere(self.settings, data, **changes)


def elsewhere(settings: Settings, data: Path, **changes: Any) -> Settings:
    """Settings with topic and bucket of their own, where none are given."""
    mark = uuid.uuid4().hex[:12]
    log = settings.log.model_copy(update={"topic": f"events.{mark}", "group": f"indexer.{mark}"})
    cold = settings.cold.model_copy(update={"bucket": f"tokentape-{mark}"})
    return settings.model_copy(update={"data": data, "log": log, "cold": cold, **changes})


def fill(rig: Tiered) -> bytes:
    """Events in cold and hot, a quarantined record, a blob, a hold and facts; the blob's id."""
    rig.ingest([*conversation(rig.producer, chunks=4), Entry(2, bytes(16), POISON)])
    rig.tier()
    rig.checkpoint()
    with contextlib.closing(open_control(rig.settings)) as control:
        for name, fact in FACTS.items():
            control.append("breakpoint", name, fact)
        control.append("breakpoint", "gone", {"tag": "x"})
        control.append("breakpoint", "gone", None)
        Holds(rig.tiering(), control).place(Selector(tenant="acme"), by="ada", reason="matter 4711")
    rig.ingest(list(conversation(rig.producer, chunks=4)))
    ref = BlobStore(rig.objects, rig.settings.data).put("acme", b"large " * 9000, "application/json")
    return ref.blob_id


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, kafka: KafkaService, minio: MinioService) -> Original:
    """Made once; tests that change anything make their own."""
    folder = tmp_path_factory.mktemp("distributed")
    settings = distributed(folder / "data", kafka, minio)
    with tiered(settings) as rig:
        blob = fill(rig)
        made = Backup(settings, folder / "backup", __version__, with_keys=True).run()
        return Original(settings, rig.records(), blob, folder / "backup", made)


def lock_seconds(settings: Settings, prefix: str) -> dict[str, tuple[str, int]]:
    """Mode and end of each lock in a bucket."""
    store = open_store(settings.cold, settings.data)
    locks = {info.key: store.lock_of(info.key) for info in store.list(prefix)}
    return {key: (lock.mode, round(lock.until.timestamp()) if lock.until else 0) for key, lock in locks.items()}


def facts(settings: Settings) -> dict[str, Any]:
    """What the control topic says of breakpoints."""
    with contextlib.closing(open_control(settings)) as control:
        assert control.latest("restore") == {}
        return control.latest("breakpoint")


class TestEverythingLost:
    """A new machine, a new bucket, a new topic."""

    def test_a_restore_is_the_installation_and_goes_on(self, original: Original, tmp_path: Path) -> None:
        """Every row, proof, lock, blob, fact and quarantined record; the new topic's events are tiered beside the old ones."""
        there = original.elsewhere(tmp_path / "data")
        back = restore(there, original.folder, __version__)
        with tiered(there, seed=9) as rig:
            records = rig.records()
            blob = BlobStore(rig.objects, there.data).get("acme", original.blob)
            quarantined = [rig.catalog.quarantined_bytes(item.log_id, item.partition, item.offset) for item in rig.catalog.quarantine()]
            locks = lock_seconds(there, "ledger/") | lock_seconds(there, "events/")
            segment = next(rig.objects.list("events/")).key
            with pytest.raises(ConflictError):  # past a governance lock nothing but the legal hold refuses it
                rig.objects.purge(segment)
            before = rig.table().num_rows
            rig.ingest(list(conversation(rig.producer, chunks=2)))
            rig.tier()
            rig.checkpoint()
            report, after = rig.verification().report(), rig.table().num_rows

        assert (back.faults(), back.kept, records, blob) == ([], (), original.records, b"large " * 9000)
        assert (back.ledger_size, back.ledger_root) == (original.made.manifest.ledger_size, original.made.manifest.ledger_root)
        assert (quarantined, facts(there)) == ([POISON], FACTS)
        assert locks.items() >= (lock_seconds(original.settings, "ledger/") | lock_seconds(original.settings, "events/")).items()
        assert (report.exit_code, after - before, sorted(path.name for path in tmp_path.iterdir())) == (0, 9, ["data"])

    def test_into_an_embedded_installation(self, original: Original, tmp_path: Path) -> None:
        """A backup looks the same whatever it was made from: without servers its tape is a folder."""
        there = Settings(data=tmp_path / "data")
        back = restore(there, original.folder, __version__)
        with tiered(there) as rig:
            records, report = rig.records(), rig.verification().report()

        assert (back.faults(), records, report.exit_code, facts(there)) == ([], original.records, 0, FACTS)

    def test_an_embedded_log_beside_a_bucket(self, original: Original, tmp_path: Path) -> None:
        """Backed up from a folder, restored into a bucket, and once more from there: each part goes its own way."""
        first, second = Settings(data=tmp_path / "first"), original.elsewhere(tmp_path / "second", log=Settings().log)
        with tiered(first) as rig:
            rig.ingest(list(conversation(rig.producer, chunks=4)))
            rig.tier()
            rig.ingest(list(conversation(rig.producer, chunks=4)))
            records = rig.records()
        third = second.model_copy(update={"data": tmp_path / "third", "cold": original.elsewhere(tmp_path).cold})
        found = []
        for source, target in ((first, second), (second, third)):
            folder = tmp_path / f"backup-{target.data.name}"
            Backup(source, folder, __version__, with_keys=True).run()
            back = restore(target, folder, __version__)
            with tiered(target) as rig:
                found.append((back.faults(), back.put > 0, back.rebuilt["digests_equal"], rig.records()))

        assert found == [([], True, 4, records)] * 2

    @pytest.mark.parametrize("step", ["restore.put_one:3", "restore.told_one"])
    def test_a_restore_killed_at_any_step_goes_on(self, step: str, original: Original, tmp_path: Path) -> None:
        """There is no directory; the same command makes it whole, whatever stands in bucket and topic already."""
        there = original.elsewhere(tmp_path / "data")
        file = tmp_path / "tokentape.toml"
        file.write_text(to_toml(there))
        command = [sys.executable, "-m", "tokentape.cli", "--config", str(file), "restore", str(original.folder)]
        environment = {**os.environ, VARIABLE: step, "PYTHONPATH": str(ROOT)}
        killed = subprocess.run(command, env=environment, capture_output=True, timeout=120)
        exists = there.data.exists()
        again = invoke(there, "restore", str(original.folder))
        with tiered(there) as rig:
            records = rig.records()

        assert (killed.returncode, exists) == (-signal.SIGKILL, False), killed.stderr
        assert (again.exit_code, records, facts(there)) == (0, original.records, FACTS), again.output
        assert ("as it was found: bucket" in again.stdout) == (step != "restore.put_one:3")
        assert not (tmp_path / "data.partial").exists()


class TestBatchWork:
    """Work topics are in no backup: what a batch waits for is appended anew from its input file."""

    @pytest.fixture
    def upstream(self) -> Iterator[Upstream]:
        """Answers as many requests as it is let."""
        upstream = Upstream()
        with broken(upstream.act, models=MODELS) as server:
            upstream.server = server
            yield upstream

    def test_a_batch_comes_to_its_end_after_a_restore(
        self, upstream: Upstream, tmp_path: Path, kafka: KafkaService, minio: MinioService
    ) -> None:
        """Into new topics and a new bucket: requests with a result are not asked again, all others are, and each has one."""
        settings, names = distributed(tmp_path / "lost", kafka, minio), [f"r{i}" for i in range(16)]
        upstream.open.clear()
        upstream.passes = 5
        forks = Forks()
        with tiered(settings) as rig, desk_at(settings) as desk:
            rig.ingest(list(conversation(rig.producer, chunks=3)))
            batch = submit_at(desk, written(settings, *(request(name, name, MODELS[i % 2]) for i, name in enumerate(names))))
            with forks.worker(settings, upstream.url):
                until(lambda: len(list(results_of(desk, batch))) == 5)
                Backup(settings, tmp_path / "backup", __version__, with_keys=True).run()
        there = elsewhere(settings, tmp_path / "data")
        back = restore(there, tmp_path / "backup", __version__)
        upstream.open.set()
        upstream.asked.clear()
        with desk_at(there) as desk:
            waiting = desk.facts.status(batch)
            done = {names[number - 1] for number in results_of(desk, batch)}
            with forks.worker(there, upstream.url):
                until(lambda: desk.facts.ended(batch.batch_id), 60.0)
            status, lines = desk.facts.status(batch), results_at(desk, batch)
        forks.close()

        assert (back.faults(), waiting, status, len(done)) == ([], "in_progress", "completed", 5)
        assert list(texts_of(lines)) == names
        assert len(lines) == len(names)
        assert upstream.asked == Counter(set(names) - done)


class TestTheMachineLost:
    """Bucket and topic stand, and others may have gone on writing."""

    @pytest.mark.parametrize("tiered_since", [False, True])
    def test_what_came_after_the_backup_is_there(
        self, tiered_since: bool, tmp_path: Path, kafka: KafkaService, minio: MinioService
    ) -> None:
        """Each event once: from the shards, from the segments that came since, from the topic. Facts that are newer stay."""
        settings = distributed(tmp_path / "lost", kafka, minio)
        with tiered(settings) as rig:
            fill(rig)
            made = Backup(settings, tmp_path / "backup", __version__, with_keys=True, with_bucket=False).run()
            with contextlib.closing(open_control(settings)) as control:
                control.append("breakpoint", "slow", None)
            rig.ingest(list(conversation(rig.producer, chunks=3)))
            if tiered_since:
                rig.tier()
                rig.checkpoint()
            rig.ingest(list(conversation(rig.producer, chunks=2)))
            records = rig.records()
        there = settings.model_copy(update={"data": tmp_path / "data"})
        back = restore(there, tmp_path / "backup", __version__)
        with tiered(there) as rig:
            Indexer(there, rig.log, rig.registry).run_once()
            found, report = rig.records(), rig.verification().report()

        assert not any(item.path.startswith("cold/") for item in made.manifest.items)
        assert (back.faults(), back.put, back.facts) == ([], 0, 0)
        assert back.kept == (f"bucket {settings.cold.bucket}", f"topic {settings.log.topic}", f"topic {settings.log.topic}.control")
        assert (found, report.exit_code) == (records, 0)
        assert facts(there) == {"refunds": FACTS["refunds"]}

    def test_a_topic_that_let_go_of_what_the_backup_lacks(self, tmp_path: Path, kafka: KafkaService, minio: MinioService) -> None:
        """Restored, and said: exit code 6."""
        settings = distributed(tmp_path / "lost", kafka, minio)
        with tiered(settings) as rig:
            rig.ingest(list(conversation(rig.producer, chunks=3)))
            Backup(settings, tmp_path / "backup", __version__).run()
            session = list(conversation(rig.producer, chunks=3))
            rig.log.append(session)
            partition = session[0].partition
            rig.log.trim(partition, rig.log.bounds(partition)[1])
        ran = invoke(settings.model_copy(update={"data": tmp_path / "data"}), "restore", str(tmp_path / "backup"))

        assert ran.exit_code == 6
        assert f"partition {partition}: offsets" in ran.stderr
        assert "have left the topic since the backup" in ran.stderr


class TestBackup:
    def test_only_what_is_new_is_copied(self, original: Original, tmp_path: Path) -> None:
        """The second run copies a new object; the facts' copy is made anew."""
        first = Backup(original.settings, tmp_path / "backup", __version__).run()
        open_store(original.settings.cold, original.settings.data).create("blobs/tenant=other/00/new", b"new")
        second = Backup(original.settings, tmp_path / "backup", __version__).run()
        kept = {item.path: item.at for item in first.manifest.items}
        new = {item.path for item in second.manifest.items if kept.get(item.path) != item.at}
        open_store(original.settings.cold, original.settings.data).delete("blobs/tenant=other/00/new")

        assert "cold/blobs/tenant=other/00/new" in new
        assert new <= {"cold/blobs/tenant=other/00/new", "control/control.sqlite", "hot/catalog.sqlite", "jobs.sqlite"}
        assert first.manifest.items != ()

    def test_a_shard_that_is_missing(self, tmp_path: Path, kafka: KafkaService, minio: MinioService) -> None:
        """No log is in the backup that could give its rows again, so there is none without it."""
        settings = distributed(tmp_path / "data", kafka, minio)
        with tiered(settings) as rig:
            rig.ingest(list(conversation(rig.producer, chunks=3)))
            (shard,) = rig.catalog.snapshot().shards
        shard.path.unlink()
        with pytest.raises(ConflictError, match=f"a shard of the index is missing: hot/shards/{shard.path.name}"):
            Backup(settings, tmp_path / "backup", __version__).run()

        assert not (tmp_path / "backup" / manifest.NAME).exists()

    def test_with_and_without_the_bucket_are_two_backups(self, original: Original, tmp_path: Path) -> None:
        """Or the copy of the bucket would be pruned."""
        Backup(original.settings, tmp_path / "backup", __version__, with_bucket=False).run()
        ran = invoke(original.settings, "backup", str(tmp_path / "backup"))
        other = invoke(original.settings, "backup", str(original.folder), "--without-bucket")

        assert (ran.exit_code, other.exit_code) == (2, 2)
        assert "does not hold the bucket's objects, and is to go on with them" in ran.stderr
        assert "holds the bucket's objects, and is to go on without them" in other.stderr


class TestRefused:
    """One line, and nothing is written over what is there."""

    def test_a_bucket_with_something_else_in_it(self, original: Original, tmp_path: Path) -> None:
        """Somebody's objects, or the ledger of another installation."""
        there = original.elsewhere(tmp_path / "data")
        open_store(there.cold, there.data).create("thesis.pdf", b"years of work")
        other = original.elsewhere(tmp_path / "other")
        with tiered(other) as rig:
            rig.ingest(list(conversation(rig.producer, chunks=3)))
            rig.tier()
            before = {info.key for info in rig.objects.list("")}
        foreign = other.model_copy(update={"data": tmp_path / "data"})
        first, second = (invoke(settings, "restore", str(original.folder)) for settings in (there, foreign))

        assert (first.exit_code, second.exit_code, (tmp_path / "data").exists()) == (2, 2, False)
        assert "the bucket holds something else: thesis.pdf" in first.stderr
        assert "the bucket holds something else: " in second.stderr
        assert {info.key for info in open_store(other.cold, other.data).list("")} == before

    def test_objects_that_are_elsewhere(self, original: Original, tmp_path: Path) -> None:
        """A backup without them needs their bucket, or its replica."""
        Backup(original.settings, tmp_path / "backup", __version__, with_bucket=False).run()
        there = original.elsewhere(tmp_path / "data")
        empty = invoke(there, "restore", str(tmp_path / "backup"))
        local = invoke(Settings(data=tmp_path / "data"), "restore", str(tmp_path / "backup"))

        assert (empty.exit_code, local.exit_code, (tmp_path / "data").exists()) == (2, 2, False)
        assert "the bucket does not hold the ledger that was backed up, and the backup has no objects" in empty.stderr
        assert "the objects are not in the backup but in the bucket" in local.stderr

    @pytest.mark.parametrize("pattern", ["cold/events", "control/control.sqlite"])
    def test_a_damaged_file_of_the_backup(self, pattern: str, original: Original, tmp_path: Path) -> None:
        """It is named before anything is put into the bucket."""
        folder = tmp_path / "backup"
        made = Backup(original.settings, folder, __version__, with_keys=True).run()
        item = next(item for item in made.manifest.items if item.path.startswith(pattern))
        (folder / item.at).chmod(0o644)
        data = bytearray((folder / item.at).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / item.at).write_bytes(data)
        there = original.elsewhere(tmp_path / "data")
        with pytest.raises(CorruptStore, match="a file of the backup is damaged"):
            restore(there, folder, __version__)

        assert not (tmp_path / "data").exists()
        if pattern == "cold/events":
            assert list(open_store(there.cold, there.data).list("")) == []


def test_a_drill_leaves_nothing_behind(original: Original, tmp_path: Path, kafka: KafkaService) -> None:
    """All is the same, RPO and RTO are measured, and bucket and topics of the drill are gone."""
    ran = invoke(original.settings, "drill", "--in", str(tmp_path), "--format", "json")
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    cold = original.settings.cold
    client = Minio(cold.endpoint, cold.access_key, cold.secret_key.get_secret_value(), secure=False)
    admin = KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    topics = admin.list_topics()
    admin.close()

    assert ran.exit_code == 0, ran.output
    assert {row["same"] for row in rows if row["original"] is not None} == {True}
    assert [row["what"] for row in rows if row["what"].isupper()] == ["RPO", "RTO"]
    assert [row["what"] for row in rows[:2]] == ["ledger entries", "ledger root"]
    assert len([row for row in rows if row["what"].startswith("digest of partition")]) == 4
    assert list(tmp_path.iterdir()) == []
    assert [bucket.name for bucket in client.list_buckets() if bucket.name.startswith(f"{cold.bucket}-drill")] == []
    assert [topic for topic in topics if topic.startswith(f"{original.settings.log.topic}-drill")] == []
