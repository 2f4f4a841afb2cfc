"""The two control logs: one contract, and what is particular to each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from kafka import KafkaAdminClient

from schemas.errors import CorruptStore, LogUnavailable, SettingsError
from schemas.settings import LogSettings, Settings
from scripts.native.processes import free_port
from store.control import ControlLog, ControlView, open_control
from tests.conftest import KafkaService
from tests.control_case import ControlCase, Opener
from tests.program import until
from tests.signing import lose_end


class TestEmbeddedControl(ControlCase):
    """The control log in one SQLite table."""

    @pytest.fixture
    def settings(self, settings_embedded: Settings) -> Settings:
        return settings_embedded

    def test_replaced_bytes_leave_the_file(self, log: ControlLog, settings: Settings) -> None:
        """What was taken away can be found neither in the file nor, once closed, beside it."""
        log.append("thing", "a", {"secret": "marzipan-4711"})
        log.append("thing", "a", None)
        log.close()
        files = list((settings.data / "control").iterdir())

        assert files
        assert not any(b"marzipan-4711" in file.read_bytes() for file in files)

    def test_killed_writer(self, settings: Settings, reopen: Opener) -> None:
        """After `kill -9` every fact whose position was told is there."""
        child = subprocess.Popen([sys.executable, "-c", _WRITER, str(settings.data)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        told = [int(child.stdout.readline()) for _ in range(20)]
        os.kill(child.pid, signal.SIGKILL)
        told += [int(line) for line in child.communicate()[0].split(b"\n") if line]

        assert set(told) <= {record.position for record in reopen().follow(0)}

    def test_foreign_file(self, settings: Settings) -> None:
        """A file that is no database is named as damaged."""
        path = settings.data / "control" / "control.sqlite"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"not a database" * 1000)
        with pytest.raises(CorruptStore):
            open_control(settings)

    @pytest.mark.parametrize("harm", ["flip", "header", "remove", "cut", "all"])
    def test_a_lost_end(self, log: ControlLog, settings: Settings, tmp_path: Path, harm: str) -> None:
        """A hold or a breakpoint that was acknowledged and is gone with the write-ahead log is told, once and for all."""
        for number in range(5):
            log.append("thing", f"key {number}", {"n": number})
        left = settings.model_copy(update={"data": tmp_path / "left"})
        shutil.copytree(settings.data / "control", left.data / "control", ignore=shutil.ignore_patterns("*-shm"))  # of one that was killed
        lose_end(_path(left), harm)

        for _ in range(2):
            with pytest.raises(CorruptStore, match="facts that it acknowledged are gone") as caught:
                open_control(left)
        assert "remove control.sqlite-end to go on" in caught.value.hint
        (left.data / "control" / "control.sqlite-end").unlink()
        with contextlib.closing(open_control(left)) as again:
            assert list(again.latest("thing").values()) in [[{"n": n} for n in range(count)] for count in range(5)]
            again.append("thing", "on", {})

    def test_view_survives_replacement(self, log: ControlLog, settings: Settings) -> None:
        """A worker whose log was emptied under it drops what is no more."""
        log.append("thing", "a", {"n": 1})
        heard: list[tuple[str, object]] = []
        view = ControlView(log)
        view.listen(lambda record: heard.append((record.key, record.value)))
        try:
            with sqlite3.connect(_path(settings)) as other:
                other.execute("DELETE FROM fact")
                other.execute("DELETE FROM sqlite_sequence")
            other.close()
            until(lambda: not view.latest("thing"))
            log.append("thing", "b", {"n": 2})
            until(lambda: view.latest("thing") == {"b": {"n": 2}})
        finally:
            view.close()

        assert [("a", {"n": 1}), ("a", None), ("b", {"n": 2})] == heard


class TestKafkaControl(ControlCase):
    """The control log in a compacted topic."""

    @pytest.fixture
    def settings(self, settings_distributed: Settings) -> Settings:
        return settings_distributed

    def test_topic_is_compacted(self, log: ControlLog, settings: Settings, kafka: KafkaService) -> None:
        """A topic that somebody made without compaction is refused, with its name and the cure."""
        topic = f"{settings.log.topic}2.control"
        admin = KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
        admin.create_topics({topic: {"num_partitions": 1, "replication_factor": 1}})
        admin.close()
        other = settings.model_copy(update={"log": settings.log.model_copy(update={"topic": f"{settings.log.topic}2"})})
        with pytest.raises(SettingsError, match=r"cleanup\.policy=delete"):
            open_control(other)

    def test_no_broker(self, tmp_path: Path) -> None:
        """Where nobody listens the log is unavailable within the time-out."""
        nowhere = LogSettings(kind="kafka", bootstrap_servers=f"127.0.0.1:{free_port()}", timeout_s=0.5)
        with pytest.raises(LogUnavailable):
            open_control(Settings(data=tmp_path, log=nowhere))


_WRITER = """
import sys
from schemas.settings import Settings
from store.control import open_control

log = open_control(Settings(data=sys.argv[1]))
for number in range(100_000):
    print(log.append("thing", f"{number % 1000}x{number}", {"n": number}), flush=True)
"""


def _path(settings: Settings) -> Path:
    return settings.data / "control" / "control.sqlite"
