"""The recorder: modes, order, coalescing, heartbeats, forks and a log that stalls."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ingest.inbox import Inbox
from ingest.recorder import Recorder
from schemas import clock
from schemas.errors import LogUnavailable
from schemas.events import (
    ChunkContent,
    GenerationStarted,
    ProducerHeartbeat,
    RecordsLost,
    SequenceFinished,
    SessionClosed,
    SessionOpened,
    TokenChunk,
)
from schemas.settings import Settings
from schemas.sink import SessionContext, new_id
from store.log.base import Log, partition_of
from store.log.embedded import EmbeddedLog
from tests.program import until
from tests.recording import (
    DEADLINE_S,
    context,
    events_in,
    events_of,
    fill,
    numbered,
    opened,
    process,
    reasons,
    seqs,
    whole,
)


def test_tokens_coalesce_and_keep_their_place_among_other_events(deployment: Settings) -> None:
    """Through the real log: one chunk for tokens that come together, ended by what follows in the session."""
    session, other, generation = context(), context(), new_id()
    with opened(deployment, coalesce_ms=10_000) as (recorder, log):
        recorder.record(session, GenerationStarted(generation_id=generation, authoritative="gateway"))
        position = 0
        for i in range(5):
            position = recorder.tokens(
                session, generation, 0, position, i * 10, token_ids=(i, i), text="né", logprobs=(-1.0, float("-inf"))
            )
        recorder.record(other, numbered(0))
        position = recorder.tokens(session, generation, 0, position, 60, channel="reasoning", text="\ud800")
        recorder.record(session, SequenceFinished(generation_id=generation, index=0, tokens=position))
        recorder.flush(DEADLINE_S)
        events = [event for event in events_of(log) if event.session_id == session.session_id]

    assert [event.kind for event in events] == ["generation_started", "token_chunk", "token_chunk", "sequence_finished"]
    assert position == 11
    assert events[1].payload == TokenChunk(
        generation_id=generation,
        index=0,
        position=0,
        offsets_us=[i * 10 for i in range(5) for _ in range(2)],
        content=ChunkContent(
            token_ids=[i for i in range(5) for _ in range(2)], text="né" * 5, lengths=[0, 2] * 5, logprobs=[-1.0, float("-inf")] * 5
        ),
    )
    assert events[2].payload == TokenChunk(
        generation_id=generation,
        index=0,
        position=10,
        channel="reasoning",
        offsets_us=[60],
        content=ChunkContent(text="\ufffd", lengths=[1]),
    )


def test_tokens_wait_no_longer_than_told(settings_embedded: Settings) -> None:
    """A chunk that nobody ends leaves by itself."""
    with opened(settings_embedded, coalesce_ms=20) as (recorder, log):
        recorder.tokens(context(), new_id(), 0, 0, 0, text="alone")
        until(lambda: any(event.kind == "token_chunk" for event in events_of(log)))


@pytest.mark.parametrize("waits", ["for a mark behind more than are taken at once", "for the end"])
def test_company_is_not_waited_for_while_somebody_waits(waits: str) -> None:
    """Who wants to know that all is durable, or closes, does not wait until others may have brought something too."""
    inbox = Inbox(items_max=1000, enough=256, shed=False, source="sdk", start=lambda: None)
    for number in range(300):
        inbox.put(context(), numbered(number), "session_annotated")
    if waits == "for the end":
        inbox.close()
    else:
        inbox.put_mark(object())
    inbox.take(256)
    resting = threading.Thread(target=inbox.rest, args=(None,), kwargs={"gather_s": 3600.0}, daemon=True)
    resting.start()

    until(lambda: not resting.is_alive())


# Order, numbers, life


def test_each_session_keeps_its_order_and_numbers_have_no_gap(deployment: Settings) -> None:
    """Many threads, many sessions, one producer."""
    sessions = [context() for _ in range(8)]

    def work(session: SessionContext, recorder: Recorder) -> None:
        for i in range(500):
            recorder.record(session, numbered(i))

    with opened(deployment) as (recorder, _):
        threads = [threading.Thread(target=work, args=(session, recorder)) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    events = events_in(deployment)

    assert [reasons(events, session) for session in sessions] == [[str(i) for i in range(500)]] * 8
    assert whole(events)
    assert len({event.event_id for event in events}) == len(events)


def test_each_partition_has_its_own_heartbeats_and_a_last_one(deployment: Settings) -> None:
    """A heartbeat stands behind the events it vouches for; the closed one is the last event of its producer there."""
    sessions = [context() for _ in range(40)]
    with opened(deployment, heartbeat_s=0.05) as (recorder, log):
        for session in sessions:
            recorder.record(session, numbered(0))
        until(lambda: sum(event.kind == "producer_heartbeat" for event in events_of(log)) >= 4)
        recorder.record(sessions[0], numbered(1))
    events = events_in(deployment)
    last = {key: [e for e in events if partition_of(e.session_id, 4) == key[1]][-1] for key in seqs(events)}
    beats = [(partition_of(e.session_id, 4), e, e.payload) for e in events if isinstance(e.payload, ProducerHeartbeat)]

    assert whole(events)
    assert len(last) == 4
    assert all(isinstance(event.payload, ProducerHeartbeat) and event.payload.closed for event in last.values())
    assert all({p.partition: p.seq for p in beat.positions}[partition] < event.producer_seq for partition, event, beat in beats)
    assert {(e.tenant, e.source, beat.host, beat.pid) for _, e, beat in beats} == {("_platform", "gateway", "host", os.getpid())}


def test_a_silent_recorder_writes_no_heartbeat(settings_embedded: Settings) -> None:
    """Neither when nothing was ever recorded, nor again and again after the last event."""
    with opened(settings_embedded, heartbeat_s=0.01) as (recorder, log):
        recorder.record(context(), numbered(0))
        until(lambda: sum(event.kind == "producer_heartbeat" for event in events_of(log)) == 1)
        before = recorder.stats.acknowledged
        recorder.flush(DEADLINE_S)
        time.sleep(0.1)  # ten heartbeats would fit
        after = recorder.stats.acknowledged
    with opened(settings_embedded):
        pass

    assert (before, after) == (2, 2)
    assert len(events_in(settings_embedded)) == 3


def test_a_program_that_forgets_to_close_loses_nothing(deployment: Settings) -> None:
    """The interpreter's end closes the recorder."""
    code = """
import sys
from ingest.recorder import Recorder
from schemas.settings import Settings
from store.log import open_log
from tests.recording import context, numbered, spool_of
settings = Settings.model_validate_json(sys.argv[1])
recorder = Recorder(open_log(settings.log, settings.data), settings.recorder, spool=spool_of(settings))
for i in range(1000):
    recorder.record(context(), numbered(i))
"""
    with process(code, deployment.model_dump_json()) as (child, _, _):
        child.wait(DEADLINE_S)
    events = events_in(deployment)

    assert sorted(map(int, reasons(events))) == list(range(1000))
    assert sum(isinstance(event.payload, ProducerHeartbeat) and event.payload.closed for event in events) == 4


def test_a_forked_child_is_another_producer(deployment: Settings) -> None:
    """Parent and child record at once: nothing is lost, nothing sent twice, no number used by both."""
    session = context()
    with opened(deployment) as (recorder, _):
        for i in range(100):
            recorder.record(session, numbered(i))
        child = os.fork()
        if child == 0:
            try:
                for i in range(1000, 1100):
                    recorder.record(session, numbered(i))
                recorder.close()
            finally:
                os._exit(0)
        for i in range(100, 200):
            recorder.record(session, numbered(i))
        os.waitpid(child, 0)
    events = events_in(deployment)
    numbers = list(map(int, reasons(events)))

    assert [n for n in numbers if n < 1000] == list(range(200))
    assert [n for n in numbers if n >= 1000] == list(range(1000, 1100))
    assert len({event.producer_id for event in events}) == 2
    assert whole(events)


def test_what_comes_after_close_is_counted(settings_embedded: Settings) -> None:
    """Closing twice is fine; a late event is no error for the caller, and shows in the counts."""
    with opened(settings_embedded) as (recorder, _):
        recorder.record(context(), numbered(0))
        recorder.close()
        recorder.close()
        recorder.record(context(), numbered(1))
        waited = recorder.flush(DEADLINE_S)
        with pytest.raises(LogUnavailable):
            asyncio.run(recorder.durable())

    assert reasons(events_in(settings_embedded)) == ["0"]
    assert (recorder.stats.shed, waited) == (1, False)


def test_a_token_that_comes_while_the_recorder_closes_is_recorded(settings_embedded: Settings) -> None:
    """A caller found room, was stalled, and put its token after the last chunk was ended: it is neither lost nor uncounted."""
    late, generation = context(), new_id()
    with opened(settings_embedded) as (recorder, _):
        recorder.record(context(), numbered(0))
        pipeline = recorder._pipeline
        delta = (generation, 0, 0, 0, "content", (7,), "x", (), ())
        brought = iter([(late, delta, clock.now_us())])
        end_all = pipeline._coalescer.end_all

        def ended() -> Any:
            done = end_all()
            pipeline.inbox.queue.extend(brought if pipeline._closing else ())
            return done

        pipeline._coalescer.end_all = ended  # type: ignore[method-assign]
        recorder.close()
    events = events_in(settings_embedded)

    assert [event.payload.generation_id for event in events if isinstance(event.payload, TokenChunk)] == [generation]
    assert recorder.stats.shed == 0
    assert whole(events)


def test_an_event_that_cannot_be_encoded_is_told(settings_embedded: Settings) -> None:
    """Content without a salt, a number out of range: the session says that something is missing, the rest goes on."""
    salted, bare = context(), context(salt=None)
    with opened(settings_embedded) as (recorder, _):
        recorder.tokens(bare, new_id(), 0, 0, 0, text="never to be erased")
        recorder.tokens(salted, new_id(), 0, 0, 0, token_ids=(1 << 70,), text="x")
        recorder.tokens(salted, b"short", 0, 0, 0, text="x")
        recorder.tokens(salted, new_id(), 0, 0, 0, text=None)  # type: ignore[arg-type]
        recorder.tokens(salted, new_id(), 0, 0, None, text="x")  # type: ignore[arg-type]
        recorder.record(salted, SessionOpened.model_construct(tags=[7]))  # a caller's mistake
        recorder.record(salted, numbered(0))
    events = events_in(settings_embedded)
    lost = {
        e.session_id: (e.payload.reason, {k.key: k.count for k in e.payload.kinds}) for e in events if isinstance(e.payload, RecordsLost)
    }

    assert reasons(events) == ["0"]
    assert lost[bare.session_id] == ("invalid_event", {"token_chunk": 1})
    assert recorder.stats.shed == 6
    assert whole(events)


def test_sampling_is_decided_by_the_session(settings_embedded: Settings) -> None:
    """All events of a session are kept or none, as every process decides alike."""
    sessions = [context() for _ in range(200)]
    with opened(settings_embedded, sample_rate=0.5) as (recorder, _):
        for session in sessions:
            recorder.record(session, numbered(0))
            recorder.record(session, numbered(1))
        kept = [session for session in sessions if recorder.sampled(session.session_id)]
    found = Counter(event.session_id for event in events_in(settings_embedded) if event.tenant == "tenant")

    assert found == {session.session_id: 2 for session in kept}
    assert 0 < len(kept) < 200


# A log that stalls

HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
print("released", flush=True)
"""


@contextmanager
def stalled(settings: Settings, **changes: Any) -> Iterator[tuple[Recorder, Log, Callable[[], None]]]:
    """A recorder whose embedded log is locked by another process's transaction, and what lets it go."""
    path = settings.data / "log" / "log.sqlite"
    log = EmbeddedLog(path, partitions=4, timeout_s=0.2)
    recorder = Recorder(log, settings.recorder.model_copy(update={"queue_max": 100, **changes}))
    with process(HOLD, str(path)) as (_, stdin, stdout):
        assert stdout.readline() == "held\n"

        def release() -> None:
            stdin.write("\n")
            stdin.flush()
            assert stdout.readline() == "released\n"

        yield recorder, log, release
    recorder.close()
    log.close()


def test_shed_never_waits_and_tells_what_it_lost(settings_embedded: Settings) -> None:
    """With the log stalled, calls return; afterwards what is there and what is told as lost make up what was given."""
    session, other = context(), context()
    with stalled(settings_embedded, mode="shed") as (recorder, _, release):
        recorder.record(session, numbered(0))
        until(lambda: not recorder.stats.log_available)
        given = fill(recorder, session) + 1
        lost_before = recorder.stats.shed
        while lost_before == recorder.stats.shed:  # room may come once more, while entries still go to the outbox
            recorder.record(session, numbered(given))
            given, lost_before = given + 1, recorder.stats.shed
            recorder.tokens(other, new_id(), 0, 0, 0, text="x")
        away = recorder.stats
        release()
        until(lambda: recorder.stats.queue_depth == 0)
        recorder.record(session, numbered(-1))
    events = events_in(settings_embedded)
    lost = [(event.session_id, event.payload) for event in events if isinstance(event.payload, RecordsLost)]
    closed = [payload for session_id, payload in lost if session_id == session.session_id]

    assert away.log_available is False
    assert {payload.reason for _, payload in lost} == {"queue_full"}
    assert sum(payload.count for payload in closed) + len(reasons(events, session)) == given + 1
    assert reasons(events, session)[-1] == "-1"
    assert [payload.kinds[0].key for session_id, payload in lost if session_id == other.session_id] == ["token_chunk"]
    assert whole(events)


@pytest.mark.parametrize("mode", ["block", "strict"])
def test_block_waits_and_loses_nothing(settings_embedded: Settings, mode: str) -> None:
    """With the log stalled, the caller waits when the queue is full; when it is back, everything arrives in order."""
    session, count = context(), 3000
    progress = [0]

    def work(recorder: Recorder) -> None:
        for i in range(count):
            recorder.record(session, SessionClosed(reason=f"{i}".ljust(20_000)))
            progress[0] = i + 1

    with stalled(settings_embedded, mode=mode) as (recorder, _, release):
        thread = threading.Thread(target=work, args=(recorder,))
        thread.start()
        until(lambda: recorder.stats.queue_depth >= 100 and not recorder.stats.log_available)
        held_at = progress[0]
        release()
        thread.join(DEADLINE_S)
    events = events_in(settings_embedded)

    assert held_at < count
    assert [reason.strip() for reason in reasons(events)] == [str(i) for i in range(count)]
    assert recorder.stats.shed == 0
    assert whole(events)


def test_durable_returns_when_the_log_has_it(deployment: Settings) -> None:
    """What was recorded before stands in the log when the await is over."""
    session = context()

    async def main(recorder: Recorder, log: Log) -> list[str]:
        recorder.record(session, numbered(0))
        recorder.tokens(session, new_id(), 0, 0, 0, text="x")
        await recorder.durable()
        return [event.kind for event in events_of(log)]

    with opened(deployment, mode="strict", coalesce_ms=60_000) as (recorder, log):
        kinds = asyncio.run(main(recorder, log))

    assert kinds == ["session_closed", "token_chunk"]


def test_durable_waits_for_a_stalled_log(settings_embedded: Settings) -> None:
    """Without a spool only the log can make an event durable."""

    async def main(recorder: Recorder, release: Callable[[], None]) -> bool:
        recorder.record(context(), numbered(0))
        waiting = asyncio.ensure_future(recorder.durable())
        await asyncio.to_thread(until, lambda: not recorder.stats.log_available)
        early = waiting.done()
        release()
        await asyncio.wait_for(waiting, DEADLINE_S)
        return early

    with stalled(settings_embedded, mode="strict") as (recorder, _, release):
        early = asyncio.run(main(recorder, release))

    assert early is False


def test_a_log_that_never_answers_does_not_keep_close_for_ever(settings_embedded: Settings) -> None:
    """Without a spool the events are lost then, and the process says how many."""
    with stalled(settings_embedded) as (recorder, log, _):
        recorder.record(context(), numbered(0))
        recorder.close(timeout_s=0.5)
        found = events_of(log)

    assert found == []
