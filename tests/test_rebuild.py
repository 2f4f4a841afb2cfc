"""Killed at every step that changes durable state, merged, rebuilt: nothing lost, nothing twice, the same digests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas import events
from schemas.errors import ConflictError, Fenced, Unavailable
from schemas.settings import Settings
from store.catalog import Catalog, Range, open_catalog
from store.crashpoints import VARIABLE, watched
from store.fences import FileLock, fence_path, tier_lock_path
from store.indexer import Indexer
from store.log import open_log
from store.log.base import Log
from store.merge import merge
from store.objects import open_store
from store.rebuild import Cold, rebuild
from tests.eventgen import Producer, conversation, many
from tests.indexed import compare_digests, offsets, rows
from tests.positions import put_position

_INDEXER_STEPS = (
    *("tail.created", "indexer.before_insert", "indexer.before_commit", "indexer.after_commit", "indexer.before_seal"),
    *("seal.before_checkpoint", "seal.before_rename", "seal.before_register", "seal.registered"),
)
_MERGE_STEPS = ("merge.before_rename", "merge.before_swap", "merge.swapped", "merge.deleted")
_REBUILD_STEPS = ("rebuild.indexed", "rebuild.before_replace", "rebuild.replaced")

# Works in a process of its own that is killed at a step: argv is the data directory and what to do.
_WORKER = """
import resource, signal, sys
from pathlib import Path
from schemas.errors import Unavailable
from schemas.settings import IndexSettings, Settings
from store.catalog import open_catalog
from store.indexer import Indexer
from store.log import open_log
from store.merge import merge
from store.objects import open_store
from store.rebuild import rebuild

settings = Settings(data=Path(sys.argv[1]), index=IndexSettings(batch_events_max=60))
log = open_log(settings.log, settings.data)
if len(sys.argv) > 3:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    indexer = Indexer(settings, log)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
    try:
        indexer.run_once()
    except Unavailable as problem:
        sys.exit(problem.exit_code)
    sys.exit(0)
if sys.argv[2] == "index":
    Indexer(settings, log).run_once()
elif sys.argv[2] == "merge":
    merge(settings, open_catalog(settings.data), grace_s=0)
    merge(settings, open_catalog(settings.data), grace_s=0)
else:
    rebuild(settings, log, open_store(settings.cold, settings.data), open_catalog(settings.data))
"""


@pytest.fixture
def log(settings_embedded: Settings) -> Iterator[Log]:
    """The embedded log."""
    log = open_log(settings_embedded.log, settings_embedded.data)
    yield log
    log.close()


def _killed(data: Path, work: str, step: str, *more: str) -> int:
    """Exit status of a process that works and is killed at a step, or may write no file larger than `more` says."""
    environment = {**os.environ, VARIABLE: step, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", _WORKER, str(data), work, *more]
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=120).returncode


def _indexed(settings: Settings, log: Log, parts: int) -> list[bytes]:
    """Index in so many runs, each its own shard; the records."""
    producer = Producer(seed=parts)
    records = []
    for _ in range(parts):
        entries = list(conversation(producer, chunks=3))
        log.append(entries)
        records += [entry.value for entry in entries]
        Indexer(settings, log).run_once()
    return records


def _rebuilt(settings: Settings, log: Log, cold: Cold | None = None) -> dict[str, object]:
    catalog = open_catalog(settings.data)
    return rebuild(settings, log, open_store(settings.cold, settings.data), catalog, cold=cold or Cold())


class TestKilled:
    @pytest.mark.parametrize("step", [*_INDEXER_STEPS, "indexer.after_commit:2", "indexer.before_commit:3"])
    def test_an_indexer_killed_at_any_step_loses_and_doubles_nothing(self, settings_embedded: Settings, log: Log, step: str) -> None:
        """The next run finishes what was half done: every acknowledged event is one row with its own bytes."""
        entries = list(many(Producer(seed=1), 200))
        log.append(entries)
        status = _killed(settings_embedded.data, "index", step)
        Indexer(settings_embedded, log).run_once()
        catalog = open_catalog(settings_embedded.data)

        assert status == -signal.SIGKILL
        assert rows(catalog) == offsets(log)
        compare_digests(catalog, log)
        assert list((settings_embedded.data / "hot" / "tail").iterdir()) == []

    @pytest.mark.parametrize("step", _MERGE_STEPS)
    def test_a_merge_killed_at_any_step_loses_and_doubles_nothing(self, settings_embedded: Settings, log: Log, step: str) -> None:
        """After a kill readers see the parts or the whole, and the next merge cleans up."""
        records = _indexed(settings_embedded, log, 8)
        catalog = open_catalog(settings_embedded.data)
        status = _killed(settings_embedded.data, "merge", step)
        between = rows(catalog)
        merge(settings_embedded, catalog, grace_s=0)
        merge(settings_embedded, catalog, grace_s=0)
        files = {path.stem for path in catalog.shards_folder.iterdir()}

        assert status == -signal.SIGKILL
        assert sorted(between.values()) == sorted(rows(catalog).values()) == sorted(records)
        assert files == {shard.name for shard in catalog.snapshot().shards}
        assert len(files) == 1

    @pytest.mark.parametrize("step", _REBUILD_STEPS)
    def test_a_rebuild_killed_at_any_step_leaves_the_old_index_or_the_new(self, settings_embedded: Settings, log: Log, step: str) -> None:
        """Readers see every event once after the kill, and after the next run."""
        records = _indexed(settings_embedded, log, 2)
        catalog = open_catalog(settings_embedded.data)
        status = _killed(settings_embedded.data, "rebuild", step)
        between = rows(catalog)
        log.append(more := list(conversation(Producer(seed=77))))
        Indexer(settings_embedded, log).run_once()

        assert status == -signal.SIGKILL
        assert sorted(between.values()) == sorted(records)
        assert sorted(rows(catalog).values()) == sorted(records + [entry.value for entry in more])
        compare_digests(catalog, log)


class TestDamage:
    def test_a_tail_that_disagrees_with_itself_is_put_aside(self, settings_embedded: Settings, log: Log) -> None:
        """Rows missing from a dead owner's tail: the file is set aside and its records are indexed again."""
        import duckdb

        log.append(list(many(Producer(seed=2), 100)))
        _killed(settings_embedded.data, "index", "indexer.before_seal")
        (tail,) = (settings_embedded.data / "hot" / "tail").glob("*.duckdb")
        with duckdb.connect(str(tail)) as connection:
            connection.execute('DELETE FROM events_wide WHERE "offset" = 7')
        Indexer(settings_embedded, log).run_once()

        assert rows(open_catalog(settings_embedded.data)) == offsets(log)
        assert [path.name for path in (settings_embedded.data / "hot" / "aside").glob("*.duckdb")] == [tail.name]

    def test_a_tail_of_garbage_is_put_aside(self, settings_embedded: Settings, log: Log) -> None:
        """A tail that cannot be opened costs nothing but the work."""
        log.append(list(many(Producer(seed=3), 100)))
        _killed(settings_embedded.data, "index", "indexer.before_seal")
        (tail,) = (settings_embedded.data / "hot" / "tail").glob("*.duckdb")
        tail.write_bytes(os.urandom(20_000))
        Indexer(settings_embedded, log).run_once()

        assert rows(open_catalog(settings_embedded.data)) == offsets(log)


class TestFullDisk:
    @pytest.mark.parametrize("size", [20_000, 400_000, 1_100_000])
    def test_a_full_disk_is_one_error_and_costs_nothing(self, settings_embedded: Settings, log: Log, size: int) -> None:
        """Wherever writing stops it is `Unavailable`, and with room again every event is there once."""
        log.append(list(many(Producer(seed=4), 1500)))
        status = _killed(settings_embedded.data, "index", "", str(size))
        Indexer(settings_embedded, log).run_once()

        assert status == Unavailable.exit_code
        assert rows(open_catalog(settings_embedded.data)) == offsets(log)


class TestMerge:
    def test_merged_rows_are_sorted_and_the_same(self, settings_embedded: Settings, log: Log) -> None:
        """Eight shards become one with the same rows, its ranges joined with their digests."""
        records = _indexed(settings_embedded, log, 8)
        catalog = open_catalog(settings_embedded.data)
        plan = merge(settings_embedded, catalog, dry_run=True)
        untouched = len(catalog.snapshot().shards)
        done = merge(settings_embedded, catalog)
        (shard,) = catalog.snapshot().shards
        kept = [path for path in catalog.shards_folder.iterdir() if path.stem != shard.name]

        assert (plan["merges"], plan["shards"], len(plan["would_merge"]), untouched) == (1, 8, 1, 8)
        assert (done["merges"], done["events"], done["deleted"]) == (1, len(records), 0)
        assert (shard.level, shard.rows, len(kept)) == ("hour", len(records), 8)
        assert sorted(rows(catalog).values()) == sorted(records)
        assert [(span.offset_first, span.offset_next) for span in shard.ranges] == [
            (0, at.offset_next) for at in catalog.positions() if at.offset_next
        ]
        assert [span.digest_next for span in shard.ranges] == [at.digest for at in catalog.positions() if at.offset_next]

    def test_retired_files_go_after_their_grace(self, settings_embedded: Settings, log: Log) -> None:
        """Readers that took their snapshot before find their files until then."""
        _indexed(settings_embedded, log, 8)
        catalog = open_catalog(settings_embedded.data)
        before = catalog.snapshot().shards
        merge(settings_embedded, catalog)
        there = [shard.path.exists() for shard in before]
        merge(settings_embedded, catalog, grace_s=0)

        assert there == [True] * 8
        assert [shard.path.exists() for shard in before] == [False] * 8

    def test_claimed_shards_are_not_merged(self, settings_embedded: Settings, log: Log) -> None:
        """What tiering works on stays as it is."""
        _indexed(settings_embedded, log, 8)
        catalog = open_catalog(settings_embedded.data)
        catalog.claim([catalog.snapshot().shards[0].name], "tier", 60)

        assert merge(settings_embedded, catalog)["merges"] == 0


class TestRebuild:
    def test_rebuilt_from_the_log_the_digests_are_equal(self, deployment: Settings) -> None:
        """Shards gone from the disk: the log makes them again, and says that nothing differs."""
        log = open_log(deployment.log, deployment.data)
        producer = Producer(seed=20)
        entries = list(many(producer, 300))
        log.append(entries[:200] + entries[:20])
        Indexer(deployment, log).run_once()
        log.append(entries[200:])
        catalog = open_catalog(deployment.data)
        shutil.rmtree(catalog.shards_folder)
        done = rebuild(deployment, log, open_store(deployment.cold, deployment.data), catalog)

        assert (done["events"], done["duplicates"], done["differ"]) == (300, 20, [])
        assert sorted(rows(catalog).values()) == sorted(entry.value for entry in entries)
        compare_digests(catalog, log)
        log.close()

    def test_a_log_that_was_changed_is_found_out(self, settings_embedded: Settings, log: Log) -> None:
        """A position whose digest is not that of the log's records is named."""
        _indexed(settings_embedded, log, 1)
        catalog = open_catalog(settings_embedded.data)
        at = next(at for at in catalog.positions() if at.offset_next)
        put_position(catalog, type(at)(at.log_id, at.partition, at.offset_next, bytes(32), at.day, at.appended_at))
        done = _rebuilt(settings_embedded, log)

        assert done["differ"] == [
            f"partition {at.partition} up to offset {at.offset_next}: the records are not those that were indexed before"
        ]

    def test_what_cold_covers_is_not_indexed_again(self, settings_embedded: Settings, log: Log) -> None:
        """Hot begins behind the covered offsets with the digest that stands there, and digests stay equal."""
        records = _indexed(settings_embedded, log, 3)
        catalog = open_catalog(settings_embedded.data)
        first = min(catalog.snapshot().shards, key=lambda shard: shard.time_min)
        rest = [place for place in rows(catalog) if not any(_within(span, place) for span in first.ranges)]
        done = _rebuilt(settings_embedded, log, Cold(first.ranges))

        assert 0 < len(rest) < len(records)
        assert sorted(rows(catalog)) == sorted(rest)
        assert done["differ"] == []

    def test_a_running_indexer_keeps_its_index(self, settings_embedded: Settings, log: Log) -> None:
        """Rebuilding beside an indexer is refused in one line."""
        lock = FileLock.take(fence_path(settings_embedded.data / "hot", 0), "indexer")

        with pytest.raises(Fenced, match="an indexer holds partition 0"):
            _rebuilt(settings_embedded, log)
        assert lock is not None
        lock.release()

    def test_what_is_cold_stays_so_meanwhile(self, settings_embedded: Settings, log: Log) -> None:
        """Beside tiering, which would give rows twice, it is refused; and it is given up when its lock was taken away."""
        records = _indexed(settings_embedded, log, 1)
        path = tier_lock_path(settings_embedded.data / "hot")
        lock = FileLock.take(path, "tier")
        with pytest.raises(ConflictError, match="tiering or retention is at work"):
            _rebuilt(settings_embedded, log)
        assert lock is not None
        lock.release()

        with watched(lambda label: path.unlink() if label == "rebuild.before_replace" else None), pytest.raises(Fenced):
            _rebuilt(settings_embedded, log)
        assert len(rows(open_catalog(settings_embedded.data))) == len(records)

    def test_quarantine_and_gaps_come_out_the_same(self, settings_embedded: Settings, log: Log) -> None:
        """What was missing before is missing after, and counted once."""
        producer = Producer(seed=21)
        session = producer.session()
        entries = [producer.entry(session, events.SessionClosed(reason=str(i))) for i in range(10)]
        spoilt = type(entries[4])(entries[4].partition, entries[4].key, entries[4].value[:-1])
        log.append([*entries[:2], *entries[4:5], spoilt, *entries[5:]])
        Indexer(settings_embedded, log).run_once()
        catalog = open_catalog(settings_embedded.data)
        before = (catalog.gaps(), catalog.quarantine())
        _rebuilt(settings_embedded, log)

        assert (catalog.gaps(), catalog.quarantine()) == before


def _within(span: Range, place: tuple[int, int]) -> bool:
    return span.partition == place[0] and span.offset_first <= place[1] < span.offset_next


def test_every_crash_point_of_the_index_is_tried() -> None:
    """A step that is added without a test of its kill fails here."""
    import re

    store = Path(__file__).parent.parent / "store"
    found = {label for path in store.glob("*.py") for label in re.findall(r'crash_point\("([a-z_.]+)"\)', path.read_text())}
    ours = {label for label in found if label.split(".")[0] in ("tail", "indexer", "seal", "merge", "rebuild")}

    assert ours == {*_INDEXER_STEPS, *_MERGE_STEPS, *_REBUILD_STEPS}


def test_catalogs_are_shared(tmp_path: Path) -> None:
    """Two handles on one file see one another's changes."""
    one, other = Catalog(tmp_path / "c.sqlite"), Catalog(tmp_path / "c.sqlite")
    one.remember("log_id", "a")

    assert other.remember("log_id", "b") == "a"
