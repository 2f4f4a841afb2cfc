"""The three logs: one contract, and what is particular to each."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
from kafka import KafkaAdminClient, TopicPartition

from schemas.errors import CorruptStore, LogChanged, LogUnavailable, SettingsError, StorageFull, TokentapeError
from schemas.settings import LogSettings
from store.log import open_log
from store.log.base import Log, murmur2, partition_of
from store.log.embedded import EmbeddedLog
from tests.conftest import KafkaService
from tests.log_case import PATIENCE_S, LogCase, Opener, entries, numbered, read_all
from tests.signing import lose_end


class TestEmbeddedLog(LogCase):
    """The log in one SQLite file."""

    @pytest.fixture
    def settings(self) -> LogSettings:
        return LogSettings(kind="embedded")

    def replace(self, settings: LogSettings, folder: Path) -> None:
        shutil.rmtree(folder / "log")

    def expire(self, log: Log, settings: LogSettings, before_offset: int) -> None:
        assert isinstance(log, EmbeddedLog)
        log.trim(0, before_offset)

    def test_partitions_as_stored(self, log: Log, tmp_path: Path) -> None:
        """Who does not know the number takes the one in the file."""
        with contextlib.closing(EmbeddedLog(_file(tmp_path), partitions=None, create=False)) as again:
            assert again.partitions == 4

    def test_threads_share_commits(self, log: Log) -> None:
        """Many threads append at once: nothing is lost, and each one's order stands."""
        values = [numbered(100, f"thread {thread}") for thread in range(8)]

        def write(own: list[bytes]) -> None:
            for value in own:
                log.append(entries([value]))

        threads = [threading.Thread(target=write, args=(own,)) for own in values]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = read_all(log)

        assert values == [[value for value in found if value.startswith(f"thread {thread}".encode())] for thread in range(8)]
        assert len(found) == 800

    def test_writing_processes(self, log: Log) -> None:
        """Several processes append to one partition: nothing is lost, and each one's order stands."""
        children = [_fork_writer(log, numbered(100, f"process {number}")) for number in range(3)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        found = read_all(log)

        assert statuses == [0, 0, 0]
        assert len(found) == 300
        for number in range(3):
            assert numbered(100, f"process {number}") == [value for value in found if value.startswith(f"process {number}".encode())]

    def test_killed_writer(self, tmp_path: Path) -> None:
        """After `kill -9` at any moment every acknowledged event is there, once and in order."""
        chance = random.Random(1)
        with contextlib.closing(EmbeddedLog(_file(tmp_path), partitions=1)):
            pass
        written = 0
        for _ in range(20):
            acknowledged = _kill_writer(tmp_path, written, chance.uniform(0, 0.02))
            with contextlib.closing(EmbeddedLog(_file(tmp_path), partitions=1, create=False)) as log:
                found = read_all(log)
            written = len(found)

            assert found == [str(number).encode() for number in range(written)]
            assert acknowledged <= written
        assert written > 0

    def test_clock_that_steps_back(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        """Append times of a partition never decrease."""
        clock = iter([5_000_000, 3_000_000, 7_000_000])
        with monkeypatch.context() as patch:
            patch.setattr("store.log.embedded.time.time_ns", lambda: next(clock))
            for value in numbered(3):
                log.append(entries([value]))

        assert [5000, 5000, 7000] == log.read(0, 0, limit=3).appended_at

    def test_trimmed_bytes_leave_the_file(self, log: Log, tmp_path: Path) -> None:
        """What is trimmed cannot be found in the file or its write-ahead log, and the space can be used again."""
        assert isinstance(log, EmbeddedLog)
        secret, kept = b"forget-me" * 100, b"keep-me" * 100
        log.append(entries([secret] * 1000))
        log.append(entries([kept]))
        log.trim(0, 1000)
        content = b"".join(path.read_bytes() for path in (tmp_path / "log").iterdir())

        assert b"forget-me" not in content
        assert kept in content
        assert len(content) < 500_000
        assert [kept] == read_all(log)

    def test_flipped_bit(self, log: Log, tmp_path: Path) -> None:
        """Any bit flipped in the file is found, or changes nothing."""
        values = [os.urandom(200) for _ in range(400)]
        for start in range(0, 400, 40):
            log.append(entries(values[start : start + 40]))
        log.close()
        content = _file(tmp_path).read_bytes()
        chance = random.Random(2)
        outcomes = [_read_flipped(tmp_path / "flipped", content, chance.randrange(len(content) * 8), values) for _ in range(150)]

        assert "silent" not in outcomes
        assert outcomes.count("found") > 25

    @pytest.mark.parametrize("harm", ["flip", "header", "remove", "cut", "all"])
    def test_a_lost_end(self, log: Log, tmp_path: Path, harm: str) -> None:
        """SQLite takes damage in its write-ahead log for the log's end: what was acknowledged and is gone is told, once and for all."""
        for value in numbered(5):
            log.append(entries([value]))
        left = tmp_path / "left"
        shutil.copytree(tmp_path / "log", left, ignore=shutil.ignore_patterns("*-shm"))  # as a process leaves it that is killed
        path = left / "log.sqlite"
        lose_end(path, harm)

        for _ in range(2):
            with pytest.raises(CorruptStore, match="events that it acknowledged are gone") as caught:
                EmbeddedLog(path, partitions=4)
        assert "remove log.sqlite-end to go on" in caught.value.hint
        (left / "log.sqlite-end").unlink()
        with contextlib.closing(EmbeddedLog(path, partitions=4)) as again:
            assert read_all(again) in [list(numbered(count)) for count in range(5)]
            again.append(entries([b"on"]))

    @pytest.mark.parametrize("note", [b"", b"x" * 28, None])
    def test_a_note_that_says_nothing(self, log: Log, tmp_path: Path, note: bytes | None) -> None:
        """Where the note of what was acknowledged is damaged, missing or behind, the log is what it is."""
        log.append(entries(numbered(3)))
        path = tmp_path / "log" / "log.sqlite-end"
        behind = path.read_bytes()
        log.append(entries([b"later"]))
        path.write_bytes(behind if note is None else note)

        with contextlib.closing(EmbeddedLog(_file(tmp_path), partitions=4)) as again:
            assert [*numbered(3), b"later"] == read_all(again)

    def test_flipped_bit_in_a_value(self, log: Log, tmp_path: Path) -> None:
        """The error says where."""
        log.append(entries([b"needle in the haystack"]))
        log.close()
        content = _file(tmp_path).read_bytes()
        _file(tmp_path).write_bytes(content.replace(b"needle", b"noodle"))

        with (
            contextlib.closing(EmbeddedLog(_file(tmp_path), partitions=4)) as again,
            pytest.raises(CorruptStore, match=r"partition 0.*offset 0") as caught,
        ):
            again.read(0, 0, limit=1)
        assert str(_file(tmp_path)) in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "create", "error"),
        [(b"this is no database" * 100, True, CorruptStore), (b"", False, LogUnavailable)],
        ids=["garbage", "empty"],
    )
    def test_not_a_log(self, tmp_path: Path, content: bytes, create: bool, error: type[TokentapeError]) -> None:
        """A file that is something else is left as it is."""
        path = tmp_path / "log.sqlite"
        path.write_bytes(content)

        with pytest.raises(error):
            EmbeddedLog(path, partitions=4, create=create)
        assert content == path.read_bytes()

    def test_other_database(self, tmp_path: Path) -> None:
        """Somebody else's SQLite file is not taken over."""
        path = tmp_path / "log.sqlite"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE theirs (x)")

        with pytest.raises(CorruptStore):
            EmbeddedLog(path, partitions=4)

    def test_locked_file(self, log: Log, tmp_path: Path) -> None:
        """A file that another process keeps locked is reported when the time is up, and works when it is free again."""
        with contextlib.closing(EmbeddedLog(_file(tmp_path), partitions=4, timeout_s=0.05)) as impatient:
            with contextlib.closing(sqlite3.connect(_file(tmp_path), isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(LogUnavailable, match="locked"):
                    impatient.append(entries([b"x"]))
            impatient.append(entries([b"y"]))

            assert [b"y"] == read_all(impatient)

    def test_full_disk(self, tmp_path: Path) -> None:
        """A full disk is reported, leaves nothing half-written, and the log works again when there is room."""
        with _small_disk(tmp_path) as disk, contextlib.closing(EmbeddedLog(_file(disk.folder), partitions=1)) as log:
            disk.fill(log)
            batches = [[os.urandom(8_000) for _ in range(4)] for _ in range(200)]
            written: list[bytes] = []
            with pytest.raises(StorageFull, match="disk is full"):
                _append_each(log, batches, written)

            assert written == read_all(log)
            disk.free(log)
            log.append(entries([b"again"]))
            assert [*written, b"again"] == read_all(log)

    def test_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        """A path through a file is one clear error."""
        (tmp_path / "file").write_text("")

        with pytest.raises(LogUnavailable):
            EmbeddedLog(tmp_path / "file" / "log" / "log.sqlite", partitions=1)


# kafka-python leaves a socket whose connection was refused to the garbage collector.
refused_sockets = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture
def swept() -> Iterator[None]:
    """Collects what a test left before its filter of warnings ends."""
    yield
    gc.collect()


class _KafkaCase(LogCase):
    """What both clients do with a real broker."""

    kind: Literal["kafka", "confluent"]

    @pytest.fixture
    def settings(self, kafka: KafkaService) -> LogSettings:
        return _settings(self.kind, kafka)

    def replace(self, settings: LogSettings, folder: Path) -> None:
        with _admin(settings) as admin:
            admin.delete_topics([settings.topic])
            deadline = time.monotonic() + PATIENCE_S
            while admin.describe_topics([settings.topic])[0]["error_code"] == 0 and time.monotonic() < deadline:
                time.sleep(0.02)

    def expire(self, log: Log, settings: LogSettings, before_offset: int) -> None:
        with _admin(settings) as admin:
            admin.delete_records({TopicPartition(settings.topic, 0): before_offset})

    def test_more_partitions(self, log: Log, settings: LogSettings) -> None:
        """Partitions added to a topic in use stop reader and writer: sessions would change their partition."""
        log.append(entries([b"a"]))
        with _admin(settings) as admin:
            admin.create_partitions({settings.topic: 5})

        with pytest.raises(LogChanged, match="has 5 partitions, it had 4"):
            _until_raised(lambda: log.bounds(0))
        with pytest.raises(LogChanged):
            log.append(entries([b"b"]))

    def test_deleted_topic(self, log: Log, settings: LogSettings) -> None:
        """A topic that is gone is not made again silently."""
        log.append(entries([b"a"]))
        self.replace(settings, Path())

        with pytest.raises(LogChanged, match="gone"):
            _until_raised(lambda: log.bounds(0))

    def test_missing_records(self, log: Log, settings: LogSettings) -> None:
        """A hole in the offsets, here the end marker of a transaction, is named and not skipped."""
        from confluent_kafka import Producer

        log.append(entries([b"a"]))
        producer = Producer({"bootstrap.servers": settings.bootstrap_servers, "transactional.id": uuid.uuid4().hex})
        producer.init_transactions(PATIENCE_S)
        producer.begin_transaction()
        producer.produce(settings.topic, b"b", partition=0)
        producer.commit_transaction(PATIENCE_S)
        _until(lambda: log.bounds(0) == (0, 3))
        log.append(entries([b"c"]))

        with pytest.raises(LogChanged, match="records are missing"):
            _read_on(log)

    def test_unfit_topic(self, settings: LogSettings, reopen: Opener) -> None:
        """A topic whose append times are the producers' is refused."""
        with _admin(settings) as admin:
            admin.create_topics({settings.topic: {"num_partitions": 4, "replication_factor": 1}}, wait_for_metadata=True)

        with pytest.raises(SettingsError, match="LogAppendTime"):
            reopen()

    def test_impossible_topic(self, reopen: Opener) -> None:
        """More replicas than brokers, or a name that Kafka refuses, are faults of the settings."""
        with pytest.raises(SettingsError):
            reopen(replication=3)
        with pytest.raises(SettingsError):
            reopen(topic="no spaces allowed")

    @refused_sockets
    @pytest.mark.usefixtures("swept")
    def test_nobody_listens(self, settings: LogSettings, reopen: Opener) -> None:
        """A wrong address is reported when the time is up."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            with pytest.raises(LogUnavailable) as caught:
                reopen(bootstrap_servers=f"127.0.0.1:{taken.getsockname()[1]}", timeout_s=0.5)

        assert "log.bootstrap_servers" in caught.value.hint

    def test_acknowledged_offset_is_kafka_s(self, log: Log, settings: LogSettings) -> None:
        """Lag monitors see the offsets under the group of the settings."""
        log.append(entries(numbered(3)))
        log.acknowledge({0: 2})
        with _admin(settings) as admin:
            committed = admin.list_group_offsets(settings.group)

        assert committed[settings.group][TopicPartition(settings.topic, 0)].offset == 2

    def test_topic_is_as_a_log_needs_it(self, log: Log, settings: LogSettings) -> None:
        """Append times are the broker's, nothing is compacted, and large events fit."""
        from kafka.admin import ConfigResource, ConfigResourceType

        with _admin(settings) as admin:
            found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, settings.topic)], config_filter="all")
        configs = {name: config["value"] for name, config in found["topic"][settings.topic].items()}

        assert ("LogAppendTime", "delete", "false") == tuple(
            configs[name] for name in ("message.timestamp.type", "cleanup.policy", "unclean.leader.election.enable")
        )
        assert int(configs["max.message.bytes"]) > 64 << 20


class TestKafkaLog(_KafkaCase):
    """The log over kafka-python."""

    kind = "kafka"


class TestConfluentLog(_KafkaCase):
    """The log over confluent-kafka."""

    kind = "confluent"

    def test_missing_extra(self, tmp_path: Path) -> None:
        """Without the package the error says what to install."""
        code = (
            "import sys; sys.modules['confluent_kafka'] = None\n"
            "from pathlib import Path; from schemas.settings import LogSettings; from store.log import open_log\n"
            "try: open_log(LogSettings(kind='confluent'), Path())\n"
            "except Exception as problem: print(type(problem).__name__, problem.hint)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

        assert found.stdout.startswith("SettingsError pip install tokentape[confluent]")


def test_clients_read_each_other(kafka: KafkaService, tmp_path: Path) -> None:
    """What one client appends the other reads, and both name the log alike."""
    settings = _settings("kafka", kafka)
    one = open_log(settings, tmp_path)
    other = open_log(settings.model_copy(update={"kind": "confluent"}), tmp_path)
    with contextlib.closing(one), contextlib.closing(other):
        one.append(entries([b"from kafka-python"]))
        other.append(entries([b"from confluent"]))

        assert one.log_id == other.log_id
        assert [b"from kafka-python", b"from confluent"] == read_all(one) == read_all(other)


@refused_sockets
@pytest.mark.usefixtures("swept")
def test_broker_restart(kafka_private: KafkaService, tmp_path: Path) -> None:
    """Writers and readers of both clients go through a restart of the broker: nothing acknowledged is lost or out of order."""
    logs = [open_log(_settings(kind, kafka_private, timeout_s=PATIENCE_S), tmp_path) for kind in ("kafka", "confluent")]
    impatient = [open_log(_settings(kind, kafka_private, timeout_s=1.5), tmp_path) for kind in ("kafka", "confluent")]
    followers = [_Follower(log) for log in logs]
    for follower in followers:
        follower.start()
    _until(lambda: all(len(follower.found) > 20 for follower in followers))
    kafka_private.stop()
    with ThreadPoolExecutor() as pool:
        faults = list(pool.map(_faults, impatient))
    kafka_private.start()
    counts = [len(follower.found) for follower in followers]
    _until(lambda: all(len(f.found) > count + 20 or f.error for f, count in zip(followers, counts, strict=True)))
    for follower in followers:
        follower.finish()
    for log in impatient:
        _until(lambda: _faults(log) == ["none"] * 2)  # noqa: B023 - called at once
    for log in [*logs, *impatient]:
        log.close()

    assert [None, None] == [follower.error for follower in followers]
    assert [follower.sent for follower in followers] == [_without_repeats(follower.found) for follower in followers]
    assert faults == [["LogUnavailable"] * 2] * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_murmur2(text: bytes, expected: int) -> None:
    """The vectors of Kafka's Java client (org.apache.kafka.common.utils.UtilsTest)."""
    assert expected & 0xFFFFFFFF == murmur2(text)


def test_partition_of_a_session() -> None:
    """A producer that chooses by key, as Java's and kafka-python's do, chooses the same partition."""
    from kafka.partitioner import murmur2 as theirs

    chance = random.Random(3)
    keys = [chance.randbytes(16) for _ in range(200)]

    assert [(theirs(key) & 0x7FFFFFFF) % 7 for key in keys] == [partition_of(key, 7) for key in keys]


class _Follower(threading.Thread):
    """Appends numbers and reads them back through one log, in two threads, until told to finish."""

    def __init__(self, log: Log) -> None:
        super().__init__(daemon=True)
        self._log = log
        self._over = threading.Event()
        self._writer = threading.Thread(target=self._write, daemon=True)
        self.sent: list[bytes] = []
        self.found: list[bytes] = []
        self.error: Exception | None = None

    def run(self) -> None:
        self._writer.start()
        try:
            while self._writer.is_alive() or len(self.found) < self._log.bounds(0)[1]:
                self.found += self._log.read(0, len(self.found), limit=100, wait_s=0.1).values
        except Exception as problem:
            self.error = problem

    def _write(self) -> None:
        while not self._over.is_set():
            value = f"{len(self.sent):06}".encode()
            try:
                self._log.append(entries([value]))
            except LogUnavailable:
                continue
            self.sent.append(value)

    def finish(self) -> None:
        self._over.set()
        self._writer.join()
        self.join()


class _Disk:
    """A folder on a disk that gets full: a tmpfs of 2 MiB where mounting is allowed, SQLite's page limit elsewhere."""

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder = folder
        self.mounted = mounted

    def fill(self, log: EmbeddedLog) -> None:
        if self.mounted:
            (self.folder / "ballast").write_bytes(bytes(700_000))
        else:
            self._limit(log, 40)

    def free(self, log: EmbeddedLog) -> None:
        if self.mounted:
            (self.folder / "ballast").unlink()
        else:
            self._limit(log, 1 << 30)

    def _limit(self, log: EmbeddedLog, pages: int) -> None:
        log.append(entries([]))
        assert log._writer is not None
        log._writer.execute(f"PRAGMA max_page_count={pages}").fetchall()


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[_Disk]:
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield _Disk(disk, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


@contextlib.contextmanager
def _admin(settings: LogSettings) -> Iterator[KafkaAdminClient]:
    client = KafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    try:
        yield client
    finally:
        client.close()


def _settings(kind: Literal["kafka", "confluent"], kafka: KafkaService, timeout_s: float = PATIENCE_S) -> LogSettings:
    mark = uuid.uuid4().hex[:12]
    return LogSettings(
        kind=kind, bootstrap_servers=kafka.bootstrap_servers, topic=f"log.{mark}", group=f"group.{mark}", timeout_s=timeout_s
    )


def _file(folder: Path) -> Path:
    return folder / "log" / "log.sqlite"


def _fork_writer(log: Log, values: list[bytes]) -> int:
    """A child that appends the values one by one; returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for value in values:
                log.append(entries([value]))
            status = 0
        finally:
            os._exit(status)
    return child


def _append_each(log: Log, batches: list[list[bytes]], written: list[bytes]) -> None:
    """Append batch after batch, noting what was acknowledged."""
    for batch in batches:
        log.append(entries(batch))
        written += batch


def _kill_writer(folder: Path, start: int, after_s: float) -> int:
    """Kill a child that appends numbers from `start` on; returns how many of all numbers were acknowledged."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            log = EmbeddedLog(_file(folder), partitions=1, create=False)
            for first in range(start, start + 1_000_000, 3):
                log.append(entries([str(number).encode() for number in range(first, first + 3)]))
                os.write(sender, f"{first + 3}\n".encode())
        finally:
            os._exit(1)
    os.close(sender)
    with os.fdopen(receiver, "rb") as lines:
        first_line = lines.readline()
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        rest = [line for line in lines.read().splitlines(keepends=True) if line.endswith(b"\n")]
    return int((rest or [first_line])[-1])


def _read_flipped(folder: Path, content: bytes, bit: int, values: list[bytes]) -> str:
    """What a reader makes of the file with one bit flipped: "found", "same" or "silent"."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    (folder / "log.sqlite").write_bytes(flipped)
    try:
        with contextlib.closing(EmbeddedLog(folder / "log.sqlite", partitions=4, create=True, timeout_s=0.1)) as log:
            found = [read_all(log, partition) for partition in range(4)]
    except TokentapeError:
        return "found"
    return "same" if found == [values, [], [], []] else "silent"


def _read_on(log: Log) -> None:
    """Read partition 0 forwards until an error ends it, or the time is up."""
    offset = 0
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        offset = log.read(0, offset, limit=10, wait_s=0.1).offset_next


def _faults(log: Log) -> list[str]:
    """Names of the errors of append and read."""
    names = []
    for act in (lambda: log.append(entries([b"x"])), lambda: log.read(0, 0, limit=1)):
        try:
            act()
            names.append("none")
        except TokentapeError as problem:
            names.append(type(problem).__name__)
    return names


def _without_repeats(values: list[bytes]) -> list[bytes]:
    """The values without those that an interrupted append wrote once more."""
    return list(dict.fromkeys(values))


def _until_raised(act: object) -> None:
    """Call until it raises: metadata of a broker takes a moment to follow."""
    assert callable(act)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        act()
        time.sleep(0.02)


def _until(holds: object) -> None:
    assert callable(holds)
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)
