"""Backup, restore and drill: whole or not there, whenever they are killed, and the restore is the installation."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lifecycle import manifest
from lifecycle.backup import Backup, Made
from lifecycle.drill import drill
from lifecycle.restore import Restored, restore
from schemas.errors import ConflictError, ProofError
from schemas.settings import Settings
from store.blobs import BlobStore
from store.catalog import open_catalog
from store.control import open_control
from store.crashpoints import VARIABLE, watched
from store.fences import FileLock
from store.ledger import keys
from store.ledger.keys import PRIVATE
from store.log import open_log
from store.log.base import Entry
from store.objects import open_store
from store.rebuild import rebuild
from tests.eventgen import Producer, conversation
from tests.program import ROOT
from tests.tiered import alter, tiered
from tokentape.cli import main

VERSION = "0.1.0"
POISON = b"\xc3\x01" + bytes(8) + b"what is this?"
"""A record of a schema that nobody knows: in quarantine, and nowhere else once the log has let go of it."""


@dataclass(frozen=True)
class Original:
    """An installation with events in cold, hot and log, a blob, a quarantined record that left the log, and a control log."""

    data: Path
    records: dict[tuple[int, int], bytes]
    blob: bytes


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """Made once; tests that change anything take a copy."""
    data = tmp_path_factory.mktemp("original") / "data"
    with tiered(Settings(data=data)) as rig:
        rig.ingest([*conversation(rig.producer, chunks=4), Entry(2, bytes(16), POISON)])
        rig.ingest(list(conversation(rig.producer, chunks=4)))
        rig.tier()
        rig.checkpoint()
        for at in rig.catalog.positions():
            rig.log.trim(at.partition, at.offset_next)
        ref = BlobStore(rig.objects, data).put("acme", b"large " * 9000, "application/json")
        rig.ingest(list(conversation(rig.producer, chunks=4)))
        with contextlib.closing(open_control(rig.settings)) as control:
            control.append("breakpoint", "refunds", {"tag": "refund"})
        return Original(data, rig.records(), ref.blob_id)


@pytest.fixture
def settings(original: Original, tmp_path: Path) -> Settings:
    """A copy of it."""
    shutil.copytree(original.data, tmp_path / "data")
    return Settings(data=tmp_path / "data")


def back_up(settings: Settings, **how: Any) -> Made:
    """A backup beside the data directory."""
    return Backup(settings, folder_of(settings), VERSION, **how).run()


def folder_of(settings: Settings) -> Path:
    """Where the tests' backups lie."""
    return settings.data.parent / "backup"


def elsewhere(settings: Settings) -> Settings:
    """Settings of the directory to restore into."""
    return settings.model_copy(update={"data": settings.data.parent / "restored"})


def restored(settings: Settings) -> Restored:
    """The backup, restored elsewhere."""
    return restore(elsewhere(settings), folder_of(settings), VERSION)


def run(*words: object) -> Result:
    """One command in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def killed(step: str, *words: object) -> int:
    """Exit status of a command that is killed at a step."""
    command = [sys.executable, "-m", "tokentape.cli", *map(str, words)]
    environment = {**os.environ, VARIABLE: step, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode


def append(settings: Settings, seed: int, **how: Any) -> int:
    """One more conversation in the log; how many events it has."""
    with contextlib.closing(open_log(settings.log, settings.data)) as log:
        entries = list(conversation(Producer(seed=seed, partitions=log.partitions), **how))
        log.append(entries)
    return len(entries)


class TestRestore:
    def test_a_restore_is_the_installation(self, original: Original, settings: Settings) -> None:
        """Every row, proof, blob, setting of the control log and quarantined record; what is derived was made anew."""
        made = back_up(settings)
        back = restored(settings)
        with tiered(elsewhere(settings)) as rig:
            records = rig.records()
            blob = BlobStore(rig.objects, rig.settings.data).get("acme", original.blob)
            quarantined = [rig.catalog.quarantined_bytes(item.log_id, item.partition, item.offset) for item in rig.catalog.quarantine()]
            with contextlib.closing(open_control(rig.settings)) as control:
                breakpoints = control.latest("breakpoint")
        locks = "cold/.locks/ledger/entries"

        assert records == original.records
        assert blob == b"large " * 9000
        assert quarantined == [POISON]
        assert breakpoints == {"refunds": {"tag": "refund"}}
        assert (back.faults(), back.rebuilt["digests_equal"]) == ([], 4)
        assert (back.ledger_size, back.ledger_root) == (made.manifest.ledger_size, made.manifest.ledger_root)
        assert sorted(p.name for p in (rig.settings.data / locks).iterdir()) == sorted(p.name for p in (settings.data / locks).iterdir())
        assert sorted(path.name for path in settings.data.parent.iterdir()) == ["backup", "data", "restored"]

    def test_a_restore_with_keys_goes_on(self, settings: Settings) -> None:
        """It takes more events, seals and signs them, and all of it verifies."""
        back_up(settings, with_keys=True)
        restored(settings)
        with tiered(elsewhere(settings), seed=7) as rig:
            rig.ingest(list(conversation(rig.producer, chunks=2)))
            rig.tier()
            rig.checkpoint()
            report = rig.verification().report()

        assert (report.exit_code, report.ledger.entries) == (0, 2)
        assert (rig.settings.data / "keys" / PRIVATE).stat().st_mode & 0o777 == 0o600

    def test_without_keys_nothing_secret_is_in_the_backup(self, settings: Settings) -> None:
        """The public key alone; the restore reads, and a signature asks for the private one."""
        back_up(settings)
        names = {path.name for path in folder_of(settings).rglob("*") if "keys" in path.parts and path.is_file()}
        secret = (settings.data / "keys" / PRIVATE).read_bytes().strip()
        restored(settings)
        tried = run("--data", elsewhere(settings).data, "tier", "--now")

        assert names == {keys.PUBLIC}
        assert not any(secret in path.read_bytes() for path in folder_of(settings).rglob("*") if path.is_file())
        assert tried.exit_code == 2
        assert "no usable key" in tried.stderr

    def test_what_was_never_indexed(self, tmp_path: Path) -> None:
        """A log and nothing else: the restore has its events, and an index."""
        settings = Settings(data=tmp_path / "data")
        count = append(settings, 2)
        back_up(settings)
        back = restored(settings)

        assert (back.faults(), back.rebuilt["events"]) == ([], count)

    def test_what_was_damaged_before_comes_back_and_is_said(self, settings: Settings) -> None:
        """A restore in an emergency gives what there is, and ends with exit code 6 and the first fault."""
        segment = next((settings.data / "cold" / "events").rglob("*.parquet"))
        segment.chmod(0o644)
        segment.write_bytes(segment.read_bytes()[:-9] + bytes(9))
        back_up(settings)
        ran = run("restore", folder_of(settings), "--data", elsewhere(settings).data)

        assert ran.exit_code == 6
        assert "restored as it was backed up, which is modified" in ran.stderr
        assert (elsewhere(settings).data / "log" / "log.sqlite").exists()

    def test_shards_of_an_earlier_log_are_kept(self, settings: Settings) -> None:
        """No log can give their rows again, so the backup has the shards themselves."""
        with contextlib.closing(open_log(settings.log, settings.data)) as log:
            before = log.log_id
        for path in (settings.data / "log").iterdir():
            path.unlink()
        append(settings, 9)
        with contextlib.closing(open_log(settings.log, settings.data)) as log, contextlib.closing(open_catalog(settings.data)) as catalog:
            rebuild(settings, log, open_store(settings.cold, settings.data), catalog)
        with tiered(settings) as rig:
            rows = rig.table().num_rows
        back_up(settings)
        restored(settings)
        with tiered(elsewhere(settings)) as rig:
            table = rig.table()

        assert table.num_rows == rows
        assert set(table.column("log_id").to_pylist()) > {before}


class TestBackup:
    def test_only_what_is_new_is_copied(self, settings: Settings) -> None:
        """The second run copies new objects and SQLite files that changed; what it keeps lies where the first one put it."""
        first = back_up(settings)
        open_store(settings.cold, settings.data).create("blobs/tenant=acme/00/new", b"new")
        second = back_up(settings)
        kept = {item.path: item.at for item in first.manifest.items}
        new = [item.path for item in second.manifest.items if kept.get(item.path) != item.at]
        files = {path.relative_to(folder_of(settings)).as_posix() for path in folder_of(settings).rglob("*") if path.is_file()}

        assert new == ["cold/blobs/tenant=acme/00/new"]
        assert (second.copied, second.copied_bytes) == (1, 3)
        assert files == {"lock", manifest.NAME, *(item.at for item in second.manifest.items)}

    def test_what_was_erased_leaves_the_backup(self, settings: Settings) -> None:
        """Segments that an entry says were replaced go, and so do blobs."""
        with tiered(settings) as rig:
            old = [segment.key for segment in rig.catalog.snapshot().segments]
        back_up(settings)
        with tiered(settings, seed=4) as rig:
            blob = next(rig.objects.list("blobs/")).key
            rig.objects.delete(blob)
            body = {"segments": [], "coverage": [], "erased": old, "replaced": [], "events": 0}
            rig.ledger.append("rewritten", body)
            for key in old:
                rig.objects.purge(key)
        made = back_up(settings)
        left = "\n".join(path.as_posix() for path in folder_of(settings).rglob("*"))

        assert len(old) == 1
        assert made.removed >= 2
        assert [key for key in (*old, blob) if key in left] == []

    @pytest.mark.parametrize("gone", ["ledger/entries/000000000000.json", "events/", "schemas/", "coverage/"])
    def test_an_emptied_store_does_not_empty_its_backup(self, gone: str, settings: Settings) -> None:
        """What the ledger vouches for and nobody removed by an entry: the run says so, and the older backup stays whole."""
        back_up(settings)
        for path in sorted((settings.data / "cold").rglob("*")):
            if path.is_file() and path.relative_to(settings.data / "cold").as_posix().startswith(gone):
                path.unlink()
        with pytest.raises(ProofError) as refused:
            back_up(settings)

        assert "was left as it is" in refused.value.hint
        assert restored(settings).faults() == []

    def test_what_comes_between_the_copies_waits_for_the_next(self, settings: Settings) -> None:
        """A hold enters the ledger and is signed for, and events come, while the log is copied: each is whole or not there."""
        steps: list[str] = []

        def meanwhile(step: str) -> None:
            if step.startswith("backup.") and step not in steps:
                steps.append(step)
                with tiered(settings, seed=12) as rig:
                    rig.ledger.append("hold", {"number": len(steps)})
                    rig.ingest(list(conversation(rig.producer, chunks=2)))
                    rig.checkpoint()

        with watched(meanwhile):
            first = back_up(settings, with_keys=True)
        at_first = settings.model_copy(update={"data": settings.data.parent / "restored-first"})
        restore(at_first, folder_of(settings), VERSION).check()
        with tiered(at_first, seed=13) as rig:  # offsets that no checkpoint has signed for get other records than the original's
            rig.ingest(list(conversation(rig.producer, chunks=9)))
            rig.tier()
            report = rig.verification().report()
        second = back_up(settings)
        back = restored(settings)

        assert report.findings == ()
        assert (steps, first.manifest.ledger_size) == (["backup.log_copied", "backup.copied", "backup.written"], 1)
        assert (back.faults(), second.manifest.ledger_size) == ([], 4)
        assert _total(second.manifest) > _total(first.manifest)

    def test_while_it_works(self, settings: Settings) -> None:
        """Somebody records, tiers and signs all the while: each backup has what was acknowledged before it, and verifies."""
        stop, acknowledged = threading.Event(), [0]
        worker = threading.Thread(target=_work, args=(settings, stop, acknowledged))
        worker.start()
        promised, backs = [], []
        try:
            for number in range(2):
                promised.append(acknowledged[0])
                back_up(settings)
                target = settings.model_copy(update={"data": settings.data.parent / f"restored-{number}"})
                backs.append(restore(target, folder_of(settings), VERSION))
        finally:
            stop.set()
            worker.join(60)

        assert not worker.is_alive()
        assert [back.faults() for back in backs] == [[], []]
        assert [_total(back.manifest) >= promise for back, promise in zip(backs, promised, strict=True)] == [True, True]


def _work(settings: Settings, stop: threading.Event, acknowledged: list[int]) -> None:
    """Record, tier and sign; `acknowledged` counts what the log has, what it had before included."""
    with tiered(settings, seed=11) as rig:
        acknowledged[0] = sum(rig.log.bounds(partition)[1] for partition in range(rig.log.partitions))
        while not stop.is_set():
            entries = list(conversation(rig.producer, chunks=2))
            rig.ingest(entries)
            acknowledged[0] += len(entries)
            with contextlib.suppress(ConflictError):  # a backup is at work: the next round tiers
                rig.tier()
                rig.checkpoint()


class TestKilled:
    @pytest.mark.parametrize("step", ["backup.log_copied", "backup.written"])
    def test_a_backup_killed_at_any_step_leaves_the_older_one_or_its_own(self, step: str, settings: Settings) -> None:
        """The folder restores to what the manifest says, and the next run clears what the killed one left."""
        first = back_up(settings)
        more = append(settings, 5)
        status = killed(step, "--data", settings.data, "backup", folder_of(settings))
        back = restored(settings)
        back_up(settings)
        files = [path for path in (folder_of(settings) / "parts").rglob("*") if path.is_file()]

        assert status == -signal.SIGKILL
        assert back.faults() == []
        assert _total(back.manifest) - _total(first.manifest) == (more if step == "backup.written" else 0)
        assert len(files) == len(manifest.read(folder_of(settings)).items)

    def test_a_first_backup_that_was_killed_is_none(self, settings: Settings) -> None:
        """Without a manifest nothing is restored; the same command makes it whole."""
        status = killed("backup.copied", "--data", settings.data, "backup", folder_of(settings))
        refused = run("restore", folder_of(settings), "--data", elsewhere(settings).data)
        back_up(settings)

        assert status == -signal.SIGKILL
        assert refused.exit_code == 2
        assert "there is no whole backup in this folder" in refused.stderr
        assert restored(settings).faults() == []

    @pytest.mark.parametrize("step", ["rebuild.replaced", "restore.before_rename"])
    def test_a_restore_killed_at_any_step_leaves_nothing_half(self, step: str, settings: Settings) -> None:
        """There is no directory, and the same command makes it whole."""
        back_up(settings)
        status = killed(step, "restore", folder_of(settings), "--data", elsewhere(settings).data)
        there = elsewhere(settings).data.exists()
        back = restored(settings)

        assert (status, there) == (-signal.SIGKILL, False)
        assert back.faults() == []
        assert sorted(path.name for path in settings.data.parent.iterdir()) == ["backup", "data", "restored"]


def _total(of: manifest.Manifest) -> int:
    return sum(after for _, after in of.offsets)


class TestDrill:
    def test_the_restore_is_the_original(self, settings: Settings) -> None:
        """A table of what is the same, what it took, and nothing left behind."""
        room = settings.data.parent / "room"
        room.mkdir()
        ran = run("--data", settings.data, "drill", "--in", room, "--format", "json")
        rows = [json.loads(line) for line in ran.stdout.splitlines()]

        assert ran.exit_code == 0, ran.output
        assert {row["same"] for row in rows if row["original"] is not None} == {True}
        assert [row["what"] for row in rows if row["what"].isupper()] == ["RPO", "RTO"]
        assert [row["what"] for row in rows[:2]] == ["ledger entries", "ledger root"]
        assert len([row for row in rows if row["what"].startswith("digest of partition")]) == 4
        assert list(room.iterdir()) == []

    def test_what_came_after_the_backup_is_counted(self, settings: Settings) -> None:
        """The RPO is the age of the oldest event that the backup lacks."""
        more: list[int] = []

        def meanwhile(step: str) -> None:
            if step == "backup.written":
                more.append(append(settings, 6))

        with watched(meanwhile):
            found = drill(settings, settings.data.parent / "drill", VERSION)

        assert (found.lacking, found.rpo_s > 0) == (more[0], True)
        assert [line.what for line in found.lines if not line.same] == []

    def test_a_difference_is_exit_code_6(self, settings: Settings) -> None:
        """Rows that went from the original's index are in the restore, which is made from log and ledger."""
        with contextlib.closing(open_catalog(settings.data)) as catalog:
            (shard,) = catalog.snapshot().shards
        alter(shard, "DELETE FROM events WHERE rowid = 0")
        ran = run("--data", settings.data, "drill")

        assert ran.exit_code == 6
        assert "the restore is not the original: rows of partition" in ran.stderr


class TestRefused:
    """One line that says what is wrong, and nothing is written."""

    def test_a_directory_that_is_not_empty(self, settings: Settings) -> None:
        """Nothing is ever restored over data."""
        back_up(settings)
        before = sorted(settings.data.rglob("*"))
        ran = run("restore", folder_of(settings), "--data", settings.data)

        assert (ran.exit_code, sorted(settings.data.rglob("*"))) == (2, before)
        assert "restore: the directory is not empty" in ran.stderr

    def test_a_place_that_can_be_no_directory(self, settings: Settings) -> None:
        """A mount point, which nothing can take the name of, or a file: said before anything is copied."""
        back_up(settings)
        file = settings.data.parent / "file"
        file.write_text("mine")
        mounted = run("restore", folder_of(settings), "--data", "/proc")
        taken = run("restore", folder_of(settings), "--data", file)

        assert (mounted.exit_code, taken.exit_code, file.read_text()) == (2, 2, "mine")
        assert "restore: the directory is a mount point" in mounted.stderr
        assert "restore: the directory is not empty: file" in taken.stderr

    def test_a_partial_folder_of_somebody_else(self, settings: Settings) -> None:
        """Only a folder that a restore made is emptied."""
        back_up(settings)
        thesis = settings.data.parent / "restored.partial" / "thesis.txt"
        thesis.parent.mkdir()
        thesis.write_text("years of work")
        ran = run("restore", folder_of(settings), "--data", elsewhere(settings).data)

        assert (ran.exit_code, thesis.read_text()) == (2, "years of work")
        assert "there is a folder that no restore made" in ran.stderr

    @pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
    @pytest.mark.parametrize("pattern", ["log.sqlite", "*.parquet", "000000000000.json"])
    def test_a_damaged_file_of_the_backup(self, harm: str, pattern: str, settings: Settings) -> None:
        """It is named, and there is neither directory nor rest of one."""
        back_up(settings)
        path = max(
            (path for path in folder_of(settings).rglob(pattern) if ".locks" not in path.parts), key=lambda path: path.stat().st_size
        )
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()
        if harm != "remove":
            path.write_bytes(data if harm == "flip" else data[:-1])
        ran = run("restore", folder_of(settings), "--data", elsewhere(settings).data)

        assert ran.exit_code == 5
        assert str(path) in ran.stderr
        assert sorted(path.name for path in settings.data.parent.iterdir()) == ["backup", "data"]

    @pytest.mark.parametrize(
        ("old", "new", "fault", "code"),
        [
            (b'"format":1', b'"format":2', "the backup has format 2, written by tokentape 0.1.0; this one reads up to format 1", 5),
            (b'"with_keys":false', b'"with_keys":true', "the manifest is damaged: its SHA-256 is another", 5),
            (b'"path":"log/log.sqlite"', b'"path":"../../passwd"', "the manifest is damaged: '../../passwd' leads out of the folder", 5),
            (b"{", b"", "the manifest is damaged", 5),
        ],
    )
    def test_a_manifest_that_is_newer_or_damaged(self, old: bytes, new: bytes, fault: str, code: int, settings: Settings) -> None:
        """Nothing is restored by it."""
        back_up(settings)
        path = folder_of(settings) / manifest.NAME
        path.write_bytes(path.read_bytes().replace(old, new, 1))
        ran = run("restore", folder_of(settings), "--data", elsewhere(settings).data)

        assert (ran.exit_code, elsewhere(settings).data.exists()) == (code, False)
        assert fault in ran.stderr

    def test_data_of_a_newer_version(self, settings: Settings) -> None:
        """A backup made by a newer program whose data this one would misread."""
        (settings.data / "format.json").write_text('{"format": 2, "written_by": "9.9.0"}')
        back_up(settings)
        ran = run("restore", folder_of(settings), "--data", elsewhere(settings).data)

        assert (ran.exit_code, elsewhere(settings).data.exists()) == (5, False)
        assert "written by tokentape 9.9.0" in ran.stderr

    def test_no_room(self, settings: Settings) -> None:
        """Refused before anything is copied: an object of 8 TiB, of which the file system keeps only the length."""
        back_up(settings)
        with (settings.data / "cold" / "blobs" / "huge").open("wb") as huge:
            huge.truncate(8 << 40)
        first = manifest.read(folder_of(settings))
        ran = run("--data", settings.data, "backup", folder_of(settings))

        assert ran.exit_code == 8
        assert "bytes are to be copied, the disk has" in ran.stderr
        assert manifest.read(folder_of(settings)) == first

    @pytest.mark.parametrize("where", [".", "data", "data/inner", ".."])
    def test_a_folder_that_holds_the_data_or_lies_in_it(self, where: str, settings: Settings) -> None:
        """It would back itself up, or be lost with the data."""
        ran = run("--data", settings.data, "backup", settings.data.parent / where)

        assert ran.exit_code == 2
        assert "lie in one another" in ran.stderr

    def test_a_folder_with_something_else_in_it(self, settings: Settings) -> None:
        """Which would not be a backup's, and might be pruned."""
        (settings.data.parent / "photos").mkdir()
        (settings.data.parent / "photos" / "cat.jpg").write_bytes(b"meow")
        ran = run("--data", settings.data, "backup", settings.data.parent / "photos")

        assert ran.exit_code == 2
        assert "there is something else in the folder: cat.jpg" in ran.stderr

    def test_the_backup_of_another_installation(self, settings: Settings, tmp_path: Path) -> None:
        """The older one stays as it is."""
        back_up(settings)
        other = Settings(data=tmp_path / "other")
        append(other, 1)
        ran = run("--data", other.data, "backup", folder_of(settings))

        assert ran.exit_code == 2
        assert "the folder holds the backup of another log" in ran.stderr
        assert restored(settings).faults() == []

    def test_a_ledger_that_was_rolled_back(self, settings: Settings) -> None:
        """It does not begin with what was backed up, so the backup is not brought to it."""
        with tiered(settings) as rig:
            rig.tier()
        back_up(settings)
        for path in (settings.data / "cold" / "ledger").rglob("000000000001*"):
            path.unlink()
        ran = run("--data", settings.data, "backup", folder_of(settings))

        assert ran.exit_code == 6
        assert "does not begin with the 2 entries that were backed up before" in ran.stderr

    def test_nothing_to_back_up(self, tmp_path: Path) -> None:
        """No installation is made by asking for its backup."""
        ran = run("--data", tmp_path / "none", "backup", tmp_path / "backup")

        assert (ran.exit_code, list(tmp_path.iterdir())) == (2, [])
        assert "there is nothing to back up" in ran.stderr

    @pytest.mark.parametrize(
        ("setting", "fault"),
        [
            ("log.kind=kafka", "the backup holds an embedded log, the settings say log.kind = kafka"),
            ("log.partitions=7", "the backup's log has 4 partitions, the settings say 7"),
            ("ledger.origin=example.org/other", "the settings say example.org/other"),
        ],
    )
    def test_settings_that_do_not_fit(self, setting: str, fault: str, settings: Settings) -> None:
        """What lies in servers is theirs to back up; the rest must be what was backed up."""
        back_up(settings)
        ran = run("--set", setting, "restore", folder_of(settings), "--data", elsewhere(settings).data)

        assert (ran.exit_code, elsewhere(settings).data.exists()) == (2, False)
        assert fault in ran.stderr

    @pytest.mark.parametrize("setting", ["log.kind=kafka", "cold.kind=minio"])
    def test_a_server_that_does_not_answer(self, setting: str, settings: Settings) -> None:
        """The older backup stays as it is."""
        before = back_up(settings).manifest
        away = ("log.bootstrap_servers=127.0.0.1:1", "log.timeout_s=1", "cold.endpoint=127.0.0.1:1", "cold.timeout_s=1", setting)
        options = [word for each in away for word in ("--set", each)]
        ran = run("--data", settings.data, *options, "backup", folder_of(settings))

        assert (ran.exit_code, manifest.read(folder_of(settings))) == (8, before)

    def test_no_bucket_to_leave_out(self, settings: Settings) -> None:
        """Nobody else has the folder."""
        ran = run("--data", settings.data, "backup", folder_of(settings), "--without-bucket")

        assert ran.exit_code == 2
        assert "the cold tier is no bucket" in ran.stderr

    def test_two_at_once(self, settings: Settings) -> None:
        """A second backup into a folder, a restore from it, and a second restore into a directory, are told of the first."""
        back_up(settings)
        with held(folder_of(settings) / "lock"):
            second = run("--data", settings.data, "backup", folder_of(settings))
            from_it = run("restore", folder_of(settings), "--data", elsewhere(settings).data)
        with held(settings.data.parent / "restored.partial" / ".restoring"):
            third = run("restore", folder_of(settings), "--data", elsewhere(settings).data)

        assert (second.exit_code, from_it.exit_code, third.exit_code) == (7, 7, 7)
        assert "another backup or restore uses this folder" in second.stderr
        assert "a backup into this folder is at work" in from_it.stderr
        assert "another restore is at work" in third.stderr


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Somebody else holds a lock."""
    lock = FileLock.take(path, "somebody else")
    assert lock is not None
    try:
        yield
    finally:
        lock.release()
