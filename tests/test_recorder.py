"""The recorder: modes, order, coalescing, heartbeats, forks, and logs that stall, go away and come back."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.coalesce import Chunk, Coalescer, delta_of
from ingest.encoding import Stamp, encode, encode_chunk
from ingest.recorder import Recorder
from schemas.codec import ID_SLICE, decode, encode_payload
from schemas.errors import LogUnavailable
from schemas.events import (
    ChunkContent,
    Event,
    GenerationStarted,
    ProducerHeartbeat,
    RecordsLost,
    SequenceFinished,
    SessionClosed,
    SessionOpened,
    TokenChunk,
)
from schemas.registry import SchemaRegistry
from schemas.settings import LogSettings, Settings
from schemas.sink import SessionContext, new_id
from store.log import open_log
from store.log.base import Log, partition_of
from store.log.embedded import EmbeddedLog
from tests.conftest import KafkaService

REGISTRY = SchemaRegistry()
# How long the broker is away; the suite keeps it short, a longer outage is asked for through the environment.
OUTAGE_S = float(os.environ.get("OUTAGE_S", "12"))
# Every wait ends here with a failure.
DEADLINE_S = 120.0


def context(**fields: Any) -> SessionContext:
    """A session of its own."""
    return SessionContext(new_id(), "tenant", "gateway", **fields)


def numbered(i: int) -> SessionClosed:
    """An event that tells itself apart."""
    return SessionClosed(reason=str(i))


def spool_of(settings: Settings) -> Path | None:
    """Where the recorder of a deployment spools."""
    return None if settings.log.kind == "embedded" else settings.data / "spool"


@contextmanager
def opened(settings: Settings, **changes: Any) -> Iterator[tuple[Recorder, Log]]:
    """A recorder on the log of a deployment; both are closed, what it recorded can then be read from the log's file or topic."""
    log = open_log(settings.log, settings.data)
    recorder = Recorder(log, settings.recorder.model_copy(update=changes), spool=spool_of(settings), source="gateway", host="host")
    try:
        yield recorder, log
    finally:
        recorder.close()
        log.close()


def events_of(log: Log) -> list[Event]:
    """Everything in a log, partition after partition."""
    found = []
    for partition in range(log.partitions):
        first, end = log.bounds(partition)
        while first < end:
            batch = log.read(partition, first, limit=10_000, wait_s=5.0)
            found += [decode(value, REGISTRY) for value in batch.values]
            first = batch.offset_next
    return found


def events_in(settings: Settings) -> list[Event]:
    """Everything in the log of a deployment, read by another client."""
    log = open_log(settings.log, settings.data, create=False)
    try:
        return events_of(log)
    finally:
        log.close()


def once(events: list[Event]) -> list[Event]:
    """Without duplicates, as the indexer drops them: sequence numbers at or below the highest seen of a producer and partition."""
    seen: dict[tuple[bytes, int], int] = {}
    kept = []
    for event in events:
        key = (event.producer_id, partition_of(event.session_id, 4))
        if event.producer_seq > seen.get(key, -1):
            seen[key] = event.producer_seq
            kept.append(event)
    return kept


def reasons(events: list[Event], session: SessionContext | None = None) -> list[str]:
    """The numbers of `numbered` events, of one session or all."""
    mine = [e for e in events if session is None or e.session_id == session.session_id]
    return [e.payload.reason for e in mine if isinstance(e.payload, SessionClosed)]


def seqs(events: list[Event]) -> dict[tuple[bytes, int], list[int]]:
    """Sequence numbers by producer and partition, in the order of the log."""
    found: dict[tuple[bytes, int], list[int]] = defaultdict(list)
    for event in events:
        found[event.producer_id, partition_of(event.session_id, 4)].append(event.producer_seq)
    return found


def whole(events: list[Event]) -> bool:
    """Whether each producer's numbers are 0, 1, 2 … in each partition."""
    return all(found == list(range(len(found))) for found in seqs(events).values())


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the wait is over"
        time.sleep(0.01)


@contextmanager
def process(code: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """A Python process that runs `code`, with its pipes."""
    command = [sys.executable, "-c", code, *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with child.stdin, child.stdout:
            yield child, child.stdin, child.stdout
    finally:
        child.kill()
        child.wait()


# Encoding

LONG = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
FLOAT = st.floats(allow_nan=False, width=64) | st.sampled_from([-0.0, -1e-60, 1e300, -1e300, float("-inf")])


@st.composite
def chunks(draw: st.DrawFn) -> TokenChunk:
    """Any token chunk that the model takes."""
    content = st.builds(ChunkContent, token_ids=st.lists(LONG), text=TEXT, lengths=st.lists(LONG), logprobs=st.lists(FLOAT))
    return TokenChunk(
        generation_id=draw(st.binary(min_size=16, max_size=16)),
        index=draw(LONG),
        position=draw(LONG),
        channel=draw(TEXT),
        offsets_us=draw(st.lists(LONG)),
        content=draw(st.none() | content),
    )


@given(chunks())
def test_the_fast_encoder_gives_the_bytes_of_the_generic_one(chunk: TokenChunk) -> None:
    """Whatever the values, a token chunk has one encoding."""
    expected = encode_payload(chunk.KIND, chunk.model_dump())

    assert encode(chunk) == expected


@given(chunks(), st.lists(FLOAT))
def test_encoding_without_a_model_gives_the_same_bytes(chunk: TokenChunk, logprobs: list[float]) -> None:
    """Raw logprobs become the 32-bit floats that the model would hold."""
    content = ChunkContent(token_ids=chunk.offsets_us, text=chunk.channel, lengths=[1], logprobs=logprobs)
    expected = encode(chunk.model_copy(update={"content": content}))
    head = (chunk.generation_id, chunk.index, chunk.position, chunk.channel, chunk.offsets_us)

    assert encode_chunk(*head, chunk.offsets_us, chunk.channel, [1], logprobs) == expected


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 10_000))
def test_event_ids_of_a_producer_rise_also_when_the_clock_does_not(steps: list[int], burst: int) -> None:
    """A clock that stands, jumps back, or is outrun by more events than a millisecond has ids."""
    stamp, session = Stamp(4), context()
    times = [10_000_000 - step * 1000 for step in steps] + [10_000_000] * burst
    ids = [stamp.entry(session, b"", at).value[ID_SLICE] for at in times]

    assert all(a < b for a, b in itertools.pairwise(ids))


def test_producers_differ() -> None:
    """Neither ids nor event ids of two recorders meet."""
    session = context()
    first, second = Stamp(4), Stamp(4)
    same = first.entry(session, b"", 1).value[ID_SLICE] == second.entry(session, b"", 1).value[ID_SLICE]

    assert (first.producer_id == second.producer_id, same) == (False, False)


# Coalescing

GENERATIONS = [new_id(), new_id()]
SESSIONS = [context(), context()]
DELTAS = st.tuples(
    st.integers(0, 1),  # session
    st.integers(0, 1),  # generation
    st.integers(0, 2),  # sequence
    st.integers(0, 40_000),  # µs since the delta before
    st.sampled_from(["content", "content", "content", "reasoning"]),
    st.lists(st.integers(0, 200_000), max_size=5),
    st.sampled_from(["", "a", "héllo", "\ud83d", "x\ud83d\ude00y"]),
    st.booleans(),  # logprobs
)
EVENT = st.tuples(st.integers(0, 1), st.none())

Told = tuple[int, str, int | None, int, str, float | None]
"""What must come out for one entry: position, channel, id, offset, text, logprob."""


def told(chunk: Chunk) -> list[Told]:
    """Entries of a chunk."""
    found, at = [], 0
    for i, (offset, length) in enumerate(zip(chunk.offsets_us, chunk.lengths, strict=True)):
        token = chunk.token_ids[i] if chunk.token_ids else None
        logprob = chunk.logprobs[i] if chunk.logprobs else None
        found.append((chunk.position + i, chunk.channel, token, offset, chunk.text[at : at + length], logprob))
        at += length
    assert at == len(chunk.text)
    return found


@given(st.lists(st.one_of(DELTAS, DELTAS, EVENT), max_size=80), st.sampled_from([0.0, 0.01, 0.05]), st.sampled_from([1, 4, 64]))
def test_coalescing_loses_nothing_and_keeps_the_order(steps: list[Any], span_s: float, tokens_max: int) -> None:
    """Any interleaving gives each sequence its tokens, texts, times and logprobs, and each session its order around other events."""
    coalescer = Coalescer(span_s=span_s, tokens_max=tokens_max)
    expected: dict[Any, list[Told | str]] = defaultdict(list)
    found: dict[Any, list[Told | str]] = defaultdict(list)
    positions: Counter[Any] = Counter()
    now_us = 0

    def emit(done: list[Chunk]) -> None:
        for chunk in done:
            found[chunk.session.session_id, chunk.generation_id, chunk.index] += told(chunk)

    for step in steps:
        session = SESSIONS[step[0]]
        if step[1] is None:
            emit(coalescer.end(session.session_id))
            for kept in (expected, found):
                for key in [key for key in kept if key[0] == session.session_id]:
                    kept[key].append("event")
            continue
        _, generation, index, later, channel, ids, text, scored = step
        now_us += later
        key = (session.session_id, GENERATIONS[generation], index)
        logprobs = tuple(-float(i) for i in range(len(ids) or 1)) if scored else ()
        delta = delta_of(key[1], index, positions[key], now_us, channel, tuple(ids), text, logprobs)
        clean = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        for i in range(len(ids) or 1):
            last = i == (len(ids) or 1) - 1
            entry = (positions[key], channel, ids[i] if ids else None, now_us, clean if last else "", logprobs[i] if scored else None)
            expected[key].append(entry)
            positions[key] += 1
        emit(coalescer.due(now_us / 1e6))
        emit(coalescer.add(session, delta, 0, now_us / 1e6))
    emit(coalescer.end_all())

    assert found == expected


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
from tests.test_recorder import context, numbered, spool_of
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


def fill(recorder: Recorder, session: SessionContext) -> int:
    """Record large events until the recorder takes no more without shedding; how many it was given."""
    given = 0
    while not recorder.stats.shed:
        assert given < 20_000
        recorder.record(session, SessionClosed(reason=f"{given}".ljust(20_000)))
        given += 1
    return given


def test_shed_never_waits_and_tells_what_it_lost(settings_embedded: Settings) -> None:
    """With the log stalled, calls return; afterwards what is there and what is told as lost make up what was given."""
    session, other = context(), context()
    with stalled(settings_embedded, mode="shed") as (recorder, _, release):
        recorder.record(session, numbered(0))
        until(lambda: not recorder.stats.log_available)
        given = fill(recorder, session) + 1
        for i in range(50):
            recorder.record(session, numbered(given + i))
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
    assert sum(payload.count for payload in closed) + len(reasons(events, session)) == given + 51
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


# A broker that goes away

PRODUCER = """
import sys
from ingest.recorder import Recorder
from schemas.settings import Settings
from store.log import open_log
from tests.test_recorder import SessionContext, numbered, spool_of
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
from tests.test_recorder import context, numbered, spool_of
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
        with opened(deployment_private, mode="shed", spool_bytes_max=1 << 20, queue_max=100) as (recorder, _):
            recorder.record(session, numbered(0))
            recorder.flush(DEADLINE_S)
            kafka_private.stop()
            given = fill(recorder, session) + 1
            held = recorder.stats.spool_bytes
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
