"""The indexer: what the log holds comes out of the shards once, whole and in order, on both deployments."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas import events
from schemas.codec import encode_datum
from schemas.errors import Fenced, LogChanged
from schemas.registry import CURRENT, Schema, SchemaRegistry
from schemas.settings import IndexSettings, Settings
from store import digest
from store.catalog import Catalog, open_catalog
from store.fences import FileLock, fence_path
from store.indexer import Indexer, ensure_fresh
from store.log import open_log
from store.log.base import Entry, Log, partition_of
from store.requeue import requeue
from tests.eventgen import Producer, conversation, datum, many
from tests.indexed import compare_digests, offsets, rows
from tests.program import until

_POISON = b"\xc3\x01" + CURRENT.fingerprint + bytes(40)


@pytest.fixture
def log(deployment: Settings) -> Iterator[Log]:
    """The log of a deployment, four partitions."""
    log = open_log(deployment.log, deployment.data)
    yield log
    log.close()


@pytest.fixture
def embedded(settings_embedded: Settings) -> Iterator[Log]:
    """An embedded log, for what does not depend on the log."""
    log = open_log(settings_embedded.log, settings_embedded.data)
    yield log
    log.close()


def _catalog(settings: Settings) -> Catalog:
    return open_catalog(settings.data)


def _limited(settings: Settings, **index: Any) -> Settings:
    return settings.model_copy(update={"index": IndexSettings(**index)})


def _spoilt(entry: Entry, value: bytes) -> Entry:
    return Entry(entry.partition, entry.key, value)


class TestRows:
    def test_every_event_comes_out_once_with_its_own_bytes(self, deployment: Settings, log: Log) -> None:
        """Rows re-encode to the log's bytes at their offsets, and the running digest is that of the log."""
        producer = Producer(seed=1)
        entries = [entry for _ in range(5) for entry in conversation(producer)]
        log.append(entries)
        done = Indexer(deployment, log).run_once()

        assert done.rows == len(entries)
        assert rows(_catalog(deployment)) == offsets(log)
        compare_digests(_catalog(deployment), log)

    def test_batches_of_any_size_give_the_same_digests(self, settings_embedded: Settings, embedded: Log) -> None:
        """The running digest does not depend on how records were batched."""
        embedded.append(list(many(Producer(seed=2), 60)))
        Indexer(_limited(settings_embedded, batch_events_max=7), embedded).run_once()

        compare_digests(_catalog(settings_embedded), embedded)

    def test_appends_between_runs_continue(self, settings_embedded: Settings, embedded: Log) -> None:
        """A second run adds what came since, and an idle one adds nothing."""
        producer = Producer(seed=3)
        counts = []
        for _ in range(3):
            embedded.append(list(conversation(producer)))
            counts.append(Indexer(settings_embedded, embedded).run_once().rows)
        counts.append(Indexer(settings_embedded, embedded).run_once().rows)

        assert counts == [27, 27, 27, 0]
        assert rows(_catalog(settings_embedded)) == offsets(embedded)

    def test_an_event_of_the_largest_size_is_indexed(self, settings_embedded: Settings, embedded: Log) -> None:
        """30 MB of text in one event is a row like any other."""
        producer = Producer()
        session = producer.session()
        content = events.AnnotationContent(note="x" * 30_000_000)
        embedded.append([producer.entry(session, events.SessionAnnotated(content=content))])

        assert Indexer(settings_embedded, embedded).run_once().rows == 1


class TestBadRecords:
    def test_only_the_guilty_go_to_quarantine(self, deployment: Settings, log: Log) -> None:
        """Cut, lengthened, unframed, unknown, empty and contradictory records stand in quarantine; all others are rows."""
        producer = Producer(seed=4)
        entries = list(many(producer, 900))
        two = datum(entries[0]) | {"session_closed": {"reason": "x"}, "session_opened": None}
        spoils: list[Callable[[Entry], bytes]] = [
            lambda entry: entry.value[:-7],
            lambda entry: entry.value + b"\x00",
            lambda entry: entry.value + entry.value[10:],
            lambda entry: b"no frame at all",
            lambda entry: b"",
            lambda entry: b"\xc3\x01\x01\x02\x03\x04\x05\x06\x07\x08" + entry.value[10:],
            lambda entry: _POISON,
            lambda entry: entry.value[:60] + b"\xff" * 9 + entry.value[69:],
            lambda entry: _two_payloads(two),
        ]
        places = random.Random(5).sample(range(10, 890), len(spoils))
        for place, spoil in zip(places, spoils, strict=True):
            entries[place] = _spoilt(entries[place], spoil(entries[place]))
        log.append(entries)
        done = Indexer(deployment, log).run_once()
        catalog = _catalog(deployment)
        bad = {
            (item.partition, item.offset): catalog.quarantined_bytes(item.log_id, item.partition, item.offset)
            for item in catalog.quarantine()
        }

        assert (done.rows, done.quarantined) == (900 - len(spoils), len(spoils))
        assert sorted(bad.values()) == sorted(entries[place].value for place in places)
        assert rows(catalog) | bad == offsets(log)
        compare_digests(catalog, log)

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_trailing_bytes_anywhere_are_seen(self, settings_embedded: Settings, embedded: Log, place: int) -> None:
        """Trailing bytes on the first, a middle or the last record of a batch: that record and no other is refused."""
        producer = Producer(seed=6)
        session = producer.session()
        entries = [producer.entry(session, events.SessionClosed(reason=str(i))) for i in range(3)]
        entries[place] = _spoilt(entries[place], entries[place].value + b"\x00")
        embedded.append(entries)
        Indexer(settings_embedded, embedded).run_once()
        found = _catalog(settings_embedded).quarantine()

        assert [(item.offset, "trailing" in item.error) for item in found] == [(place, True)]

    def test_a_batch_of_nothing_but_poison(self, settings_embedded: Settings, embedded: Log) -> None:
        """Six hundred broken records are all kept, and what follows is indexed."""
        producer = Producer(seed=7)
        good = list(conversation(producer))
        partition = good[0].partition
        embedded.append([Entry(partition, good[0].key, _POISON + bytes([i % 251])) for i in range(600)] + good)
        done = Indexer(settings_embedded, embedded).run_once()

        assert (done.rows, done.quarantined) == (len(good), 600)

    def test_an_event_above_the_limit_is_quarantined(self, settings_embedded: Settings, embedded: Log) -> None:
        """Too large for the index is no reason to stop."""
        producer = Producer()
        session = producer.session()
        content = events.AnnotationContent(note="x" * 5000)
        embedded.append([producer.entry(session, events.SessionAnnotated(content=content)), *conversation(producer)])
        done = Indexer(_limited(settings_embedded, event_bytes_max=4096), embedded).run_once()

        assert (done.rows, done.quarantined) == (27, 1)

    def test_an_unknown_schema_waits_in_quarantine_until_it_is_known(self, settings_embedded: Settings, embedded: Log) -> None:
        """Requeue brings the events back at their offsets and closes the gaps that they left."""
        older = _older_schema()
        producer = Producer(seed=8)
        entries = list(conversation(producer))
        entries[3] = _spoilt(entries[3], encode_datum(datum(entries[3]), older))
        embedded.append(entries)
        Indexer(settings_embedded, embedded).run_once()
        catalog = _catalog(settings_embedded)
        before = [gap.count for gap in catalog.gaps()], len(catalog.quarantine())
        refused = requeue(settings_embedded, catalog, SchemaRegistry())
        registry = SchemaRegistry()
        registry.add(older.definition)
        done = requeue(settings_embedded, catalog, registry)

        assert before == ([1], 1)
        assert (refused["requeued"], len(refused["still"])) == (0, 1)
        assert done == {"requeued": 1, "still": []}
        assert (catalog.gaps(), catalog.quarantine(), len(catalog.quarantine(requeued=True))) == ([], [], 1)
        assert rows(catalog, registry) == offsets(embedded)


class TestSchemas:
    def test_old_schemas_read_null_for_what_they_lack(self, deployment: Settings, log: Log) -> None:
        """Events of an older schema, without a kind and without a field inside a record, stand beside new ones."""
        older, producer = _older_schema(), Producer(seed=9)
        entries = list(conversation(producer))
        mixed = [_spoilt(entry, encode_datum(datum(entry), older)) if i % 2 else entry for i, entry in enumerate(entries)]
        log.append(mixed)
        seen: list[bytes] = []
        registry = SchemaRegistry(lambda fingerprint: older.definition if fingerprint == older.fingerprint else None)
        indexer = Indexer(deployment, log, registry, on_schema=lambda schema: seen.append(schema.fingerprint))
        done = indexer.run_once()

        assert (done.rows, done.quarantined) == (len(entries), 0)
        assert sorted(set(seen)) == sorted({older.fingerprint, CURRENT.fingerprint})
        assert rows(_catalog(deployment), registry) == offsets(log)

    def test_a_newer_schema_stops_its_partition_and_drops_nothing(self, settings_embedded: Settings, embedded: Log) -> None:
        """A field that the tables lack stops the partition before that record; the others go on."""
        newer, producer = _newer_schema(), Producer(seed=10)
        registry = SchemaRegistry()
        registry.add(newer.definition)
        sessions = _session_per_partition(producer)
        ahead = [producer.entry(session, events.SessionClosed(reason="a")) for session in sessions]
        new = producer.entry(sessions[2], events.SessionClosed(reason="b"))
        embedded.append(
            [*ahead, _spoilt(new, encode_datum(datum(new), newer)), producer.entry(sessions[3], events.SessionClosed(reason="c"))]
        )
        done = Indexer(settings_embedded, embedded, registry).run_once()
        fresh = ensure_fresh(settings_embedded, embedded, registry=registry)

        assert (done.rows, done.quarantined, list(done.stopped)) == (5, 0, [2])
        assert "session_closed.mood" in str(done.stopped[2])
        assert (fresh.complete, list(fresh.stopped)) == (False, [2])
        assert list(_catalog(settings_embedded).alarms()) == [2]


class TestNumbers:
    def test_the_same_batch_twice_is_there_once(self, deployment: Settings, log: Log) -> None:
        """What a producer sends again, in the same and in a later batch, is dropped and counted."""
        producer = Producer(seed=11)
        entries = list(many(producer, 300))
        log.append(entries + entries[:50])
        log.append(entries[100:])
        done = Indexer(deployment, log).run_once()
        later = Indexer(deployment, log)
        log.append(entries)
        again = later.run_once()
        catalog = _catalog(deployment)

        assert (done.rows, done.duplicates, again.rows, again.duplicates) == (300, 250, 0, 300)
        assert sorted(rows(catalog).values()) == sorted(entry.value for entry in entries)
        assert sum(at.duplicates for at in catalog.positions()) == 550
        compare_digests(catalog, log)

    def test_the_same_event_id_twice_is_two_rows(self, settings_embedded: Settings, embedded: Log) -> None:
        """An id that occurs twice under different numbers does not fan out and is not dropped."""
        producer = Producer(seed=12)
        session = producer.session()
        first, second = (producer.entry(session, events.SessionClosed(reason="x")) for _ in range(2))
        twin = _spoilt(second, second.value[:10] + first.value[10:26] + second.value[26:])
        embedded.append([first, twin])

        assert Indexer(settings_embedded, embedded).run_once().rows == 2

    def test_what_was_skipped_is_reported(self, settings_embedded: Settings, embedded: Log) -> None:
        """Numbers that never came are a gap with first and last, also at the beginning and between batches."""
        producer = Producer(seed=13)
        session = producer.session()
        entries = [producer.entry(session, events.SessionClosed(reason=str(i))) for i in range(20)]
        indexer = Indexer(settings_embedded, embedded)
        embedded.append(entries[2:5] + entries[9:12])
        indexer.run_once()
        embedded.append(entries[15:])
        Indexer(settings_embedded, embedded).run_once()
        gaps = _catalog(settings_embedded).gaps()

        assert [(gap.seq_first, gap.seq_last, gap.kind) for gap in gaps] == [(0, 1, "jump"), (5, 8, "jump"), (12, 14, "jump")]
        assert {gap.producer_id for gap in gaps} == {producer.producer_id}

    def test_a_heartbeat_reveals_a_lost_tail(self, settings_embedded: Settings, embedded: Log) -> None:
        """What a heartbeat claims and nobody sent is a gap until it still comes."""
        producer = Producer(seed=14)
        sessions = _session_per_partition(producer)
        sent = [producer.entry(session, events.SessionClosed(reason="x")) for session in sessions]
        lost = producer.entry(sessions[1], events.SessionClosed(reason="lost"))
        embedded.append([*sent, producer.heartbeat(sessions[0])])
        Indexer(settings_embedded, embedded).run_once()
        catalog = _catalog(settings_embedded)
        tail = [(gap.partition, gap.seq_first, gap.seq_last, gap.kind) for gap in catalog.gaps()]
        embedded.append([lost])
        Indexer(settings_embedded, embedded).run_once()

        assert tail == [(1, 1, 1, "tail")]
        assert catalog.gaps() == []


class TestDays:
    def test_a_shard_holds_one_day_and_days_never_run_backwards(self, settings_embedded: Settings, embedded: Log) -> None:
        """A log clock that steps over midnight and back files every record under the later day."""
        producer = Producer(seed=15)
        session = producer.session()
        entries = [producer.entry(session, events.SessionClosed(reason=str(i))) for i in range(6)]
        embedded.append(entries)
        day = 86_400_000_000
        times = [5 * day - 2, 5 * day - 1, 5 * day, 5 * day - 1, 5 * day + 1, 7 * day]
        Indexer(settings_embedded, _Clocked(embedded, times)).run_once()
        shards = [(shard.day, shard.rows) for shard in _catalog(settings_embedded).snapshot().shards]

        assert shards == [("1970-01-05", 2), ("1970-01-06", 3), ("1970-01-08", 1)]


class TestFences:
    def test_a_lost_fence_stops_the_commit(self, settings_embedded: Settings, embedded: Log) -> None:
        """Whoever finds its lock file replaced commits nothing more."""
        path = fence_path(settings_embedded.data / "hot", 0)
        lock = FileLock.take(path, "old")
        assert lock is not None
        path.unlink()
        successor = FileLock.take(path, "new")

        assert successor is not None
        with pytest.raises(Fenced, match="removed or replaced"):
            lock.check()
        successor.check()

    def test_a_held_partition_is_left_alone(self, settings_embedded: Settings, embedded: Log) -> None:
        """Only partitions whose fence is free are indexed."""
        producer = Producer(seed=16)
        embedded.append([producer.entry(session, events.SessionClosed(reason="x")) for session in _session_per_partition(producer)])
        lock = FileLock.take(fence_path(settings_embedded.data / "hot", 1), "other")
        assert lock is not None
        partial = Indexer(settings_embedded, embedded).run_once()
        lock.release()
        rest = Indexer(settings_embedded, embedded).run_once()

        assert (partial.partitions, partial.rows) == ((0, 2, 3), 3)
        assert rest.rows == 1

    def test_two_indexers_at_once_do_the_work_once(self, deployment: Settings) -> None:
        """Two that follow, one of which ends in the middle: every event is there once, and the other takes over."""
        stops = [threading.Event(), threading.Event()]
        logs = [open_log(deployment.log, deployment.data) for _ in range(3)]
        threads = [threading.Thread(target=Indexer(deployment, logs[i]).run, args=(stops[i],)) for i in range(2)]
        for thread in threads:
            thread.start()
        producer = Producer(seed=17)
        first, second = list(many(producer, 400)), list(many(producer, 400))
        logs[2].append(first)
        ensure_fresh(deployment, logs[2], timeout_s=60)
        stops[0].set()
        threads[0].join()
        logs[2].append(second)
        fresh = ensure_fresh(deployment, logs[2], timeout_s=60)
        stops[1].set()
        threads[1].join()
        found = rows(_catalog(deployment))

        assert fresh.complete
        assert sorted(found.values()) == sorted(entry.value for entry in first + second)
        compare_digests(_catalog(deployment), logs[2])
        for log in logs:
            log.close()


class TestFreshness:
    def test_an_indexer_that_is_far_behind_is_not_waited_for(self, settings_embedded: Settings, embedded: Log) -> None:
        """Who says so gets what is there, at once; with an hour's patience this test would not end otherwise."""
        Indexer(settings_embedded, embedded).run_once()
        fences = [FileLock.take(fence_path(settings_embedded.data / "hot", partition), "slow") for partition in range(embedded.partitions)]
        embedded.append(list(conversation(Producer(seed=19))))
        fresh = ensure_fresh(settings_embedded, embedded, timeout_s=3600, behind_max=10)
        for fence in fences:
            assert fence is not None
            fence.release()
        waited = ensure_fresh(settings_embedded, embedded, timeout_s=3600, behind_max=10)

        assert (fresh.complete, waited.complete) == (False, True)

    def test_a_running_indexer_seals_when_asked(self, settings_embedded: Settings, embedded: Log) -> None:
        """With a seal only once an hour, whoever asks for fresh still gets it."""
        settings = _limited(settings_embedded, seal_s=3600.0)
        stop = threading.Event()
        own = open_log(settings.log, settings.data)
        thread = threading.Thread(target=Indexer(settings, own).run, args=(stop,))
        thread.start()
        producer = Producer(seed=18)
        answers = []
        for _ in range(3):
            before = time.time()
            embedded.append(list(conversation(producer)))
            fresh = ensure_fresh(settings, embedded, timeout_s=60)
            answers.append(
                (fresh.complete, len(rows(_catalog(settings))), fresh.fresh_to is not None and fresh.fresh_to.timestamp() >= before)
            )
        stop.set()
        thread.join()
        own.close()

        assert answers == [(True, 27, True), (True, 54, True), (True, 81, True)]

    def test_an_idle_index_stays_fresh(self, settings_embedded: Settings, embedded: Log) -> None:
        """While nothing comes, `fresh_to` moves on by itself."""
        stop = threading.Event()
        thread = threading.Thread(target=Indexer(settings_embedded, embedded).run, args=(stop,))
        thread.start()
        began = time.time_ns() // 1000

        def moved() -> bool:
            positions = _catalog(settings_embedded).positions()
            return len(positions) == embedded.partitions and min(at.fresh_to for at in positions) > began

        until(moved)
        stop.set()
        thread.join()

        assert rows(_catalog(settings_embedded)) == {}

    def test_nothing_new_needs_no_work(self, settings_embedded: Settings, embedded: Log) -> None:
        """Asking for fresh twice makes no second shard."""
        embedded.append(list(conversation(Producer())))
        ensure_fresh(settings_embedded, embedded)
        ensure_fresh(settings_embedded, embedded)

        assert len(_catalog(settings_embedded).snapshot().shards) == 1


class TestOtherLogs:
    def test_another_log_is_refused(self, settings_embedded: Settings, embedded: Log, tmp_path: Path) -> None:
        """An index of one log never takes records of another."""
        Indexer(settings_embedded, embedded).run_once()
        other = open_log(settings_embedded.log, tmp_path / "other")

        with pytest.raises(LogChanged, match="belongs to log"):
            Indexer(settings_embedded, other)
        other.close()

    def test_expired_offsets_stop_with_a_clear_line(self, settings_embedded: Settings, embedded: Log) -> None:
        """Records that left the log before they were indexed are not skipped in silence."""
        producer = Producer(seed=19)
        session = producer.session()
        entries = [producer.entry(session, events.SessionClosed(reason=str(i))) for i in range(10)]
        embedded.append(entries[:2])
        Indexer(settings_embedded, embedded).run_once()
        embedded.append(entries[2:])
        embedded.trim(entries[0].partition, 6)

        with pytest.raises(LogChanged, match="holds offsets"):
            Indexer(settings_embedded, embedded).run_once()


class _Clocked:
    """A log whose append times are given: what a broker's clock may do."""

    def __init__(self, log: Log, times: list[int]) -> None:
        self._log, self._times = log, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def read(self, partition: int, offset: int, **options: Any) -> Any:
        batch = self._log.read(partition, offset, **options)
        return type(batch)(partition, offset, self._times[offset : batch.offset_next], batch.values)


def _session_per_partition(producer: Producer) -> list[Any]:
    """One session for each partition, in order."""
    found: dict[int, Any] = {}
    while len(found) < producer.partitions:
        session = producer.session()
        found.setdefault(partition_of(session.session_id, producer.partitions), session)
    return [found[partition] for partition in range(producer.partitions)]


def _two_payloads(value: dict[str, Any]) -> bytes:
    """A record with two payloads, which decodes and is none the less no event."""
    import io

    import fastavro

    out = io.BytesIO()
    opened = datum(next(iter(conversation(Producer()))))["session_opened"]
    fastavro.schemaless_writer(out, CURRENT.parsed, value | {"session_opened": opened})
    return CURRENT.header + out.getvalue()


def _older_schema() -> Schema:
    """The current schema without its last kind and without a field inside a record."""
    definition = copy.deepcopy(CURRENT.definition)
    definition["fields"].pop()
    submitted = next(field for field in definition["fields"] if field["name"] == "request_submitted")
    record = submitted["type"][1]
    record["fields"] = [field for field in record["fields"] if field["name"] not in ("client_address", "upstream")]
    return Schema(definition)


def _newer_schema() -> Schema:
    """The current schema with one more field inside a record."""
    definition = copy.deepcopy(CURRENT.definition)
    closed = next(field for field in definition["fields"] if field["name"] == "session_closed")
    closed["type"][1]["fields"].append({"name": "mood", "type": ["null", "string"], "default": None})
    return Schema(definition)


def test_the_digest_of_nothing_is_the_start() -> None:
    """No records leave the running digest where it was."""
    assert digest.advance(digest.DIGEST_START, []) == digest.DIGEST_START
