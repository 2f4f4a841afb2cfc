"""Processes killed, servers restarted, disks full, logs that are not what they were: nothing is lost, one line says it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from schemas.settings import ApiSettings, GatewaySettings, JobsSettings, RecorderSettings, Settings
from scripts.native.processes import free_port
from store.log import open_log
from tests.conftest import KafkaService, MinioService, distributed
from tests.eventgen import Producer, conversation
from tests.faults import Crowd, differences, talkative, watched
from tests.program import Program, until


def recording(settings: Settings, upstream: str) -> Settings:
    """Settings under which nothing acknowledged may be lost: strict, a gateway on a port that stays, jobs that come often."""
    gateway = GatewaySettings(port=free_port(), upstream=upstream)
    return settings.model_copy(
        update={
            "gateway": gateway,
            "api": ApiSettings(port=0),
            "recorder": RecorderSettings(mode="strict"),
            "jobs": JobsSettings(merge_s=1.0, tier_s=0, verify_s=0),
        }
    )


def test_kill_each_part_while_clients_stream(deployment: Settings, tmp_path: Path) -> None:
    """kill -9 of each part, of two at once, of `up` itself: what clients saw the end of is on the tape, whole and once.

    Parts whose supervisor was killed stop by themselves, so that the next `up` can begin.
    """
    with talkative() as upstream:
        settings = recording(deployment, upstream.url)
        program, crowd = Program(tmp_path, settings), Crowd(f"http://127.0.0.1:{settings.gateway.port}")
        with program.up() as first, contextlib.ExitStack() as stack:
            first.ready()

            def kill_supervisor() -> None:
                os.kill(first.process.pid, signal.SIGKILL)
                first.process.wait()
                until(lambda: not program.processes())
                stack.enter_context(program.up()).ready()

            kills = [("indexer", "scheduler"), ("gateway",), ("gateway", "indexer")]
            watched(crowd, *(lambda parts=parts: first.kill(*parts) for parts in kills), kill_supervisor)

    assert program.processes() == []
    assert len(crowd.ended) > 6 * len(kills)
    assert differences(crowd, program) == {}


def test_broker_and_store_restart_in_the_middle(kafka_private: KafkaService, minio_private: MinioService, tmp_path: Path) -> None:
    """Kafka and MinIO go away and come back while clients stream: they go on, and nothing is lost."""
    with talkative() as upstream:
        settings = recording(distributed(tmp_path / "data", kafka_private, minio_private), upstream.url)
        settings = settings.model_copy(update={"log": settings.log.model_copy(update={"timeout_s": 3.0})})
        program, crowd = Program(tmp_path, settings), Crowd(f"http://127.0.0.1:{settings.gateway.port}")
        with program.up() as up:
            up.ready()
            watched(crowd, kafka_private.stop, minio_private.stop, kafka_private.start, minio_private.start)
            code = up.stop()

    assert code == 0
    assert differences(crowd, program) == {}

    spoken = "SELECT text FROM tokens ORDER BY ALL"
    before = program.sql(spoken)
    program.run("tier", "--now")
    minio_private.stop()
    refused = program.batch(["sql", spoken], ["tier", "--now"], ["verify"], code=8)
    status = program.status
    minio_private.start()

    assert [ran.stderr for ran in refused if minio_private.endpoint not in ran.complaint] == []
    assert minio_private.endpoint in status["object_store"]["error"]
    assert program.sql(spoken) == before

    kafka_private.stop()
    line = program.fails("index", code=8)
    with program.up() as up:
        code = up.process.wait(60)
    kafka_private.start()

    assert kafka_private.bootstrap_servers in line
    assert code == 8
    assert kafka_private.bootstrap_servers in up.said


def fill(settings: Settings, seed: int = 1) -> None:
    """A conversation in the log, for commands to find."""
    log = open_log(settings.log, settings.data)
    producer = Producer(seed=seed, partitions=log.partitions)
    log.append([entry for _ in range(8) for entry in conversation(producer, chunks=3)])
    log.close()


def expire(settings: Settings) -> None:
    """Kafka forgets everything that the index has not read."""
    from kafka import KafkaAdminClient, TopicPartition

    fill(settings, seed=2)
    admin = KafkaAdminClient(bootstrap_servers=settings.log.bootstrap_servers)
    admin.delete_records({TopicPartition(settings.log.topic, partition): -1 for partition in range(4)})
    admin.close()
    fill(settings, seed=3)


def recreate(settings: Settings) -> None:
    """Somebody deletes the topic and makes it again."""
    from kafka import KafkaAdminClient

    admin = KafkaAdminClient(bootstrap_servers=settings.log.bootstrap_servers)
    admin.delete_topics([settings.log.topic])
    until(lambda: settings.log.topic not in admin.list_topics())
    admin.close()
    fill(settings, seed=2)


def repartition(settings: Settings) -> None:
    """Somebody adds partitions to the topic."""
    from kafka import KafkaAdminClient
    from kafka.admin import NewPartitions

    admin = KafkaAdminClient(bootstrap_servers=settings.log.bootstrap_servers)
    admin.create_partitions({settings.log.topic: NewPartitions(total_count=6)})
    admin.close()
    until(lambda: len(_partitions(settings)) == 6)


def _partitions(settings: Settings) -> set[int]:
    from kafka import KafkaConsumer

    consumer = KafkaConsumer(bootstrap_servers=settings.log.bootstrap_servers)
    found: set[int] = consumer.partitions_for_topic(settings.log.topic) or set()
    consumer.close()
    return found


@pytest.mark.parametrize("change", [expire, recreate, repartition])
def test_log_that_is_not_what_it_was(change: Callable[[Settings], None], settings_distributed: Settings, tmp_path: Path) -> None:
    """Expired offsets, a topic made again, another number of partitions: one line and exit code 9, from commands and from `up`."""
    program = Program(tmp_path, settings_distributed)
    fill(settings_distributed)
    program.run("index")
    change(settings_distributed)
    lines = [ran.complaint for ran in program.batch(["index"], ["sql", "SELECT 1"], code=9)]
    with program.up("--only", "indexer") as up:
        code = up.process.wait(60)

    assert [line for line in lines if settings_distributed.log.topic not in line and "catalog" not in line] == []
    assert code == 9
    assert up.said.count("tokentape: ") == 1


def test_other_number_of_partitions_in_the_settings(deployment: Settings, tmp_path: Path) -> None:
    """The number of partitions is fixed when a log is made; the hint says what it is."""
    program = Program(tmp_path, deployment)
    program.run("index")
    refused = program.run("--set", "log.partitions=7", "index", code=9)

    assert "4 partitions" in refused.complaint
    assert "log.partitions = 4" in refused.stderr


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB that belongs to this test; mounting it needs root, which containers of tests have."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def stuff(disk: Path) -> Path:
    """Fill a disk to its last byte; returns the file that does it."""
    path = disk / "stuffing"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            continue
    return path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk; the log's own tests cover a full disk without")
def test_disk_full(disk: Path, tmp_path: Path) -> None:
    """With the data directory's disk full each command says so in one line; once there is room all is there again."""
    settings = Settings(data=disk / "data")
    program = Program(tmp_path, settings)
    fill(settings)
    before = program.sql("SELECT count(*) AS n FROM tokens")
    fill(settings, seed=2)
    stuffing = stuff(disk)
    lines = [ran.complaint for ran in program.batch(["index"], ["tier", "--now"], ["merge"], ["rebuild"], code=8)]
    stuffing.unlink()

    assert [line for line in lines if not any(word in line for word in ("full", "space", "room"))] == []
    assert [row["n"] * 2 for row in before] == [row["n"] for row in program.sql("SELECT count(*) AS n FROM tokens")]
    program.batch(["tier", "--now"], ["verify"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk; the recorder's own tests cover a full disk without")
def test_gateway_on_a_full_disk(disk: Path, tmp_path: Path) -> None:
    """Requests wait while the disk is full, and everything is on the tape once there is room."""
    with talkative() as upstream:
        settings = recording(Settings(data=disk / "data"), upstream.url)
        program, crowd = Program(tmp_path, settings), Crowd(f"http://127.0.0.1:{settings.gateway.port}", clients=2)
        with program.up() as up:
            up.ready()

            def full_for_a_while() -> None:
                stuffing = stuff(disk)
                until(lambda: "full" in up.said or "space" in up.said)
                stuffing.unlink()

            watched(crowd, full_for_a_while)
            code = up.stop()

    assert code == 0
    assert differences(crowd, program) == {}


def test_what_is_taken_is_said_in_one_line(settings_embedded: Settings, tmp_path: Path) -> None:
    """A data directory that another instance owns, a port in use, a fence that is held."""
    settings = recording(settings_embedded, "http://127.0.0.1:9")
    program = Program(tmp_path, settings)
    other = Program(tmp_path / "other", settings.model_copy(update={"data": tmp_path / "other" / "data"}))
    with program.up() as up:
        up.ready()
        owned = program.fails("up", code=7)
        port = other.fails("up", "--only", "gateway", code=7)
        rebuild = program.fails("rebuild", code=7)
        with other.up() as second:
            both = second.process.wait(60)
        said = [line for line in second.said.splitlines() if not line.startswith("{")]

    assert f"process {up.process.pid} runs on this data directory" in owned
    assert f"the port is in use (127.0.0.1:{settings.gateway.port})" in port
    assert "indexer" in rebuild
    assert both == 7
    lines = {line for line in said if line.startswith("tokentape: ") and "port is in use" in line}
    ports = {f"tokentape: listen: the port is in use (127.0.0.1:{settings.gateway.port + part})" for part in (0, 1)}
    assert set() < lines <= ports  # the gateway's and the API's; whichever ends first may end the other before it speaks


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"data = [", "not TOML"),
        (b"\xff\xfe", "not TOML"),
        (b"[log]\nknid = 1", "unknown setting 'knid'"),
        (b"[log]\nkind = 'pulsar'", "log.kind"),
        (b"[index]\nseal_s = -1", "index.seal_s"),
    ],
)
def test_settings_that_do_not_read(content: bytes | None, says: str, settings_embedded: Settings, tmp_path: Path) -> None:
    """A settings file that is missing, broken or wrong is one line with what is valid, exit code 2, for commands and `up`."""
    program = Program(tmp_path, settings_embedded)
    if content is None:
        program.file.unlink()
    else:
        program.file.write_bytes(content)
    command = "sessions" if content else "up"

    assert says in program.fails(command, code=2)


def test_data_directory_that_cannot_be_used(tmp_path: Path) -> None:
    """A file where the data directory should be."""
    (tmp_path / "data").write_text("not a folder")
    program = Program(tmp_path, Settings(data=tmp_path / "data"))
    commands = ("index", "sessions", "merge", "status", "rebuild")
    lines = [*program.batch(*([command] for command in commands), code=None), program.run("up", code=None)]

    assert [ran.stderr for ran in lines if ran.code not in (2, 8)] == []
    assert [ran.stderr for ran in lines if str(tmp_path / "data") not in ran.complaint] == []


def test_damaged_files(settings_embedded: Settings, tmp_path: Path) -> None:
    """A log, a catalog and a shard full of noise are one line each; a damaged index can be made anew."""
    program = Program(tmp_path, settings_embedded)
    fill(settings_embedded)
    good = program.sql("SELECT count(*) AS n FROM tokens")
    shard = min((settings_embedded.data / "hot" / "shards").glob("*.duckdb"))
    shard.chmod(0o600)
    shard.write_bytes(os.urandom(shard.stat().st_size))
    shards = program.fails("sql", "SELECT count(*) FROM tokens", code=5)
    program.run("rebuild")
    again = program.sql("SELECT count(*) AS n FROM tokens")
    for path in (settings_embedded.data / "log").iterdir():
        path.write_bytes(os.urandom(8192))
    log = program.fails("index", code=5)

    assert shard.name in shards
    assert again == good
    assert "log.sqlite" in log
