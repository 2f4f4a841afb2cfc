"""The recorder when the broker goes away, the process is killed, or the disk is full."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from schemas.events import (
    ProducerHeartbeat,
    RecordsLost,
)
from schemas.settings import LogSettings, Settings
from tests.conftest import KafkaService
from tests.program import until
from tests.recording import (
    DEADLINE_S,
    context,
    events_in,
    fill,
    numbered,
    once,
    opened,
    process,
    reasons,
    whole,
)

# How long the broker is away; the suite keeps it short, a longer outage is asked for through the environment.
OUTAGE_S = float(os.environ.get("OUTAGE_S", "12"))


PRODUCER = """
import sys
from ingest.recorder import Recorder
from schemas.settings import Settings
from store.log import open_log
from schemas.sink import SessionContext
from tests.recording import numbered, spool_of
settings = Settings.model_validate_json(sys.argv[1])
recorder = Recorder(open_log(settings.log, settings.data), settings.recorder, spool=spool_of(settings))
session = SessionContext(bytes.fromhex(sys.argv[2]), "tenant", "gateway")
i = 0
while True:
    recorder.record(session, numbered(i))
    i += 1
    if i % 100 == 0:
        recorder.wait_durable()
        print(i, flush=True)
"""


def private(kafka: KafkaService, data: Path) -> Settings:
    """Settings of a topic of its own on a broker that may be stopped."""
    log = LogSettings(kind="kafka", bootstrap_servers=kafka.bootstrap_servers, topic=f"events.{data.parent.name}", timeout_s=5.0)
    return Settings(data=data, log=log)


# kafka-python leaves a socket whose connection was refused to the garbage collector.
refused_sockets = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture
def deployment_private(tmp_path: Path, kafka_private: KafkaService) -> Iterator[Settings]:
    """A deployment on a private broker; what a test left is collected before its filter of warnings ends."""
    yield private(kafka_private, tmp_path / "data")
    gc.collect()


def read_numbers(stdout: IO[str], count: int) -> int:
    """The last of the next `count` numbers that a producer printed."""
    return [int(stdout.readline()) for _ in range(count)][-1]


@refused_sockets
def test_a_broker_that_goes_away_and_comes_back_costs_nothing(kafka_private: KafkaService, deployment_private: Settings) -> None:
    """Recording goes on into the spool, what is awaited is durable there, and everything arrives in order afterwards."""
    sessions = [context() for _ in range(4)]
    given = 0
    with opened(deployment_private) as (recorder, _):
        recorder.record(sessions[0], numbered(given))
        recorder.flush(DEADLINE_S)
        kafka_private.stop()
        over = time.monotonic() + OUTAGE_S
        while time.monotonic() < over:
            for _ in range(100):
                given += 1
                recorder.record(sessions[given % 4], numbered(given))
            assert recorder.wait_durable(DEADLINE_S)
            time.sleep(0.05)  # a load, not a wait
        away = recorder.stats
        kafka_private.start()
        arrived = recorder.flush(DEADLINE_S)
        back = recorder.stats
    events = once(events_in(deployment_private))

    assert (away.log_available, away.spool_bytes > 0, away.shed) == (False, True, 0)
    assert (arrived, back.log_available) == (True, True)
    assert [list(map(int, reasons(events, s))) for s in sessions] == [list(range(k, given + 1, 4)) for k in range(4)]
    assert whole(events)
    assert list((deployment_private.data / "spool").iterdir()) == []


@refused_sockets
def test_a_killed_producer_leaves_its_spool_to_the_next(kafka_private: KafkaService, deployment_private: Settings) -> None:
    """`kill -9` while the broker is away: what was awaited arrives, once, under the dead producer's id, before what is newer."""
    session = context()
    with process(PRODUCER, deployment_private.model_dump_json(), session.session_id.hex()) as (child, _, stdout):
        read_numbers(stdout, 5)
        kafka_private.stop()
        durable = read_numbers(stdout, 20)
        child.send_signal(signal.SIGKILL)
        child.wait()
    kafka_private.start()
    with opened(deployment_private) as (recorder, _):
        recorder.record(session, numbered(-1))
        recorder.flush(DEADLINE_S)
        adopted = recorder.stats.adopted
    events = once(events_in(deployment_private))
    numbers = list(map(int, reasons(events, session)))

    assert adopted > 0
    assert numbers == [*range(len(numbers) - 1), -1]
    assert len(numbers) > durable
    assert len({event.producer_id for event in events}) == 2
    assert whole(events)


@refused_sockets
def test_closing_while_the_broker_is_away_leaves_the_rest_in_the_spool(kafka_private: KafkaService, deployment_private: Settings) -> None:
    """A clean end without a log is a clean end: the next recorder sends all of it, the last heartbeat too."""
    session = context()
    try:
        with opened(deployment_private) as (recorder, _):
            recorder.record(session, numbered(0))
            recorder.flush(DEADLINE_S)
            kafka_private.stop()
            for i in range(1, 1000):
                recorder.record(session, numbered(i))
    finally:
        kafka_private.start()
    with opened(deployment_private):
        pass
    with opened(deployment_private) as (recorder, _):
        recorder.record(session, numbered(1000))
    events = once(events_in(deployment_private))

    assert list(map(int, reasons(events, session))) == list(range(1001))
    assert sum(isinstance(event.payload, ProducerHeartbeat) and event.payload.closed for event in events) == 2
    assert whole(events)


@pytest.mark.parametrize("times", range(3))
def test_a_kill_at_any_moment_loses_nothing_that_was_awaited(settings_distributed: Settings, times: int) -> None:
    """`kill -9` in mid-record with the broker there: the same, wherever the send happened to be."""
    session = context()
    with process(PRODUCER, settings_distributed.model_dump_json(), session.session_id.hex()) as (child, _, stdout):
        durable = read_numbers(stdout, 3 + times)
        child.send_signal(signal.SIGKILL)
        child.wait()
    with opened(settings_distributed) as (recorder, _):
        recorder.record(session, numbered(-1))
    events = once(events_in(settings_distributed))
    numbers = list(map(int, reasons(events, session)))

    assert numbers == [*range(len(numbers) - 1), -1]
    assert len(numbers) > durable
    assert whole(events)


def test_a_full_disk_does_not_stop_a_log_that_answers(settings_distributed: Settings) -> None:
    """The spool cannot be written, so events go straight to the broker; nothing is lost."""
    code = """
import resource, sys
from ingest.recorder import Recorder
from schemas.settings import Settings
from store.log import open_log
from tests.recording import context, numbered, spool_of
settings = Settings.model_validate_json(sys.argv[1])
recorder = Recorder(open_log(settings.log, settings.data), settings.recorder, spool=spool_of(settings))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
session = context()
for i in range(2000):
    recorder.record(session, numbered(i))
print(recorder.flush(60), flush=True)
"""
    with process(code, settings_distributed.model_dump_json()) as (child, _, stdout):
        lines = stdout.read().splitlines()
        child.wait(DEADLINE_S)
    events = events_in(settings_distributed)

    assert list(map(int, reasons(events))) == list(range(2000))
    assert "True" in lines
    assert sum("recorder_spool_unavailable" in line for line in lines) == 1
    assert whole(events)


@refused_sockets
def test_a_full_spool_acts_as_the_mode_says(kafka_private: KafkaService, deployment_private: Settings) -> None:
    """With the broker away and the spool at its bound, `shed` sheds and tells; what was taken arrives."""
    session = context()
    given = 0
    try:
        with opened(deployment_private, mode="shed", spool_bytes_max=1 << 20, queue_max=40) as (
            recorder,
            _,
        ):  # an empty spool takes all that waits
            recorder.record(session, numbered(0))
            recorder.flush(DEADLINE_S)
            kafka_private.stop()
            given = fill(recorder, session) + 1
            held = until(lambda: recorder.stats.spool_bytes or None)
            kafka_private.start()
            recorder.flush(DEADLINE_S)
    finally:
        kafka_private.start()
    events = once(events_in(deployment_private))
    lost = sum(event.payload.count for event in events if isinstance(event.payload, RecordsLost))

    assert 0 < held <= 1 << 20
    assert lost > 0
    assert len(reasons(events, session)) + lost == given
    assert whole(events)
