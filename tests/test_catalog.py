"""The catalog: one moment for every reader, claims, positions, and what sorts out two who believe to be right."""

from __future__ import annotations

import multiprocessing
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from schemas.errors import ConflictError, CorruptStore, Fenced, UsageError
from store.catalog import Catalog, Mark, Position, Range, Sealed, Segment, Shard
from store.shards import Quarantined


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """An empty catalog."""
    return Catalog(tmp_path / "hot" / "catalog.sqlite")


def _shard(catalog: Catalog, name: str, first: int, after: int, *, partition: int = 0, day: str = "2026-02-02") -> Shard:
    span = Range("log", partition, first, after, bytes([first]) * 32, bytes([after]) * 32)
    ids = (bytes([first]) * 16, bytes([after]) * 16)
    path = catalog.shards_folder / f"{name}.duckdb"
    return Shard(name, path, "sealed", day, (span,), *ids, first * 10, after * 10, after - first, 1000)


def _sealed(shard: Shard, **more: object) -> Sealed:
    span = shard.ranges[0]
    position = Position(span.log_id, span.partition, span.offset_next, span.digest_next or b"", shard.day, shard.time_max)
    return replace(Sealed(shard, (position,)), **more)  # type: ignore[arg-type]  # fields of Sealed by name


def _segment(key: str, shard: Shard) -> Segment:
    facts = (shard.session_min, shard.session_max, shard.time_min, shard.time_max, shard.ranges)
    return Segment(key, "00", 10, shard.rows, "acme", shard.day, "standard", *facts, 7, b"root")


def test_a_snapshot_leaves_out_what_cannot_match(catalog: Catalog) -> None:
    """By session, by time and by partition."""
    catalog.remember("partitions", "2")
    shards = [_shard(catalog, "a", 0, 5), _shard(catalog, "b", 5, 9), _shard(catalog, "c", 0, 9, partition=1)]
    for shard in shards:
        catalog.register(_sealed(shard))
    names = [shard.name for shard in catalog.snapshot().shards]
    by_time = [shard.name for shard in catalog.snapshot(time=(51, 60)).shards]
    by_session = {shard.ranges[0].partition for shard in catalog.snapshot(session=bytes([3]) * 16).shards}

    assert names == ["a", "b", "c"]
    assert by_time == ["b", "c"]
    assert len(by_session) == 1
    assert catalog.snapshot().shards == tuple(shards)


def test_a_swap_is_one_moment(catalog: Catalog) -> None:
    """Segments take the place of shards, which stay listed as retired until they are forgotten."""
    shard = _shard(catalog, "a", 0, 5)
    catalog.register(_sealed(shard))
    segment = _segment("events/x", shard)
    catalog.swap(retire=["a"], segments=[segment])
    after = catalog.snapshot()
    retired = [(item.name, at > 0) for item, at in catalog.shards(retired=True)]
    catalog.forget(["a"])

    assert (after.shards, after.segments) == ((), (segment,))
    assert retired == [("a", True)]
    assert catalog.shards(retired=True) == []


def test_changes_count_what_an_answer_may_not_be_without(catalog: Catalog, tmp_path: Path) -> None:
    """Who may see what, and rows that are others than before; not what a merge or tiering only moves."""
    shard, told = _shard(catalog, "a", 0, 5), []

    def tell() -> None:
        changes = catalog.changes()
        told.append((changes.shown, changes.rewritten))

    catalog.register(_sealed(shard))
    catalog.register(_sealed(_shard(catalog, "b", 5, 9), shown=2))
    tell()
    catalog.swap(retire=["a"], shards=[replace(shard, name="merged")])
    catalog.swap(retire=["merged"], segments=[_segment("events/x", shard)])
    tell()
    catalog.swap(retire_segments=["events/x"], segments=[_segment("events/y", shard)])
    tell()
    catalog.swap(retire=["b"])
    tell()
    anew = Catalog(tmp_path / "anew" / "catalog.sqlite")
    anew.remember("log_id", "log")
    anew.register(_sealed(_shard(anew, "whole", 0, 9), shown=2))
    catalog.replace(anew.path)
    tell()

    assert told == [(2, 0), (2, 0), (2, 1), (2, 2), (2, 3)]


def test_a_swap_of_what_is_gone_changes_nothing(catalog: Catalog) -> None:
    """Retiring twice is refused, and nothing of the second swap is done."""
    shard = _shard(catalog, "a", 0, 5)
    catalog.register(_sealed(shard))
    catalog.swap(retire=["a"], shards=[replace(shard, name="b")])

    with pytest.raises(ConflictError, match="no longer there"):
        catalog.swap(retire=["b", "a"], shards=[replace(shard, name="c")])
    assert [item.name for item in catalog.snapshot().shards] == ["b"]


def test_claims_keep_others_out(catalog: Catalog) -> None:
    """All or none, by owner, until released or run out."""
    for name, first in (("a", 0), ("b", 5)):
        catalog.register(_sealed(_shard(catalog, name, first, first + 5)))
    answers = [
        catalog.claim(["a"], "merge", 60),
        catalog.claim(["b", "a"], "tier", 60),
        catalog.claim(["a", "b"], "merge", 60),
        catalog.claim(["gone"], "merge", 60),
    ]

    assert answers == [True, False, True, False]
    with pytest.raises(ConflictError, match="claimed by merge"):
        catalog.swap(retire=["a"], owner="tier")
    catalog.release(["a"], "merge")
    assert catalog.claim(["a"], "tier", 0)
    assert catalog.claim(["a"], "merge", 60)


def test_a_shard_must_continue_its_partition(catalog: Catalog) -> None:
    """Of two shards that begin at the same offset the second is refused; the same one twice is no harm."""
    first = _sealed(_shard(catalog, "a", 0, 5))
    catalog.register(first)
    catalog.register(first)

    with pytest.raises(Fenced, match="stands at offset 5"):
        catalog.register(_sealed(_shard(catalog, "b", 0, 7)))
    assert [at.offset_next for at in catalog.positions()] == [5]


def test_a_partition_begins_once(catalog: Catalog) -> None:
    """Who takes a partition for new after another one has indexed it hears where it stands, and sets nothing back."""
    begun = catalog.begin(Position("log", 0, 0))
    catalog.register(_sealed(_shard(catalog, "a", 0, 5)))
    late = catalog.begin(Position("log", 0, 0))

    assert (begun.offset_next, late.offset_next) == (0, 5)
    assert [at.offset_next for at in catalog.positions()] == [5]


def test_fresh_to_never_runs_backwards(catalog: Catalog) -> None:
    """Having caught up counts only where the catalog stands, and stays over the next shard."""
    catalog.register(_sealed(_shard(catalog, "a", 0, 5)))
    catalog.caught_up("log", {0: (9, 1000)})
    ahead = [at.fresh_to for at in catalog.positions()]
    catalog.caught_up("log", {0: (5, 1000)})
    catalog.register(_sealed(_shard(catalog, "b", 5, 6)))

    assert ahead == [50]
    assert [at.fresh_to for at in catalog.positions()] == [1000]


def test_a_claimed_tail_is_missing_once_its_partition_is_past_it(catalog: Catalog) -> None:
    """Before that it may still be on its way."""
    sealed = _sealed(_shard(catalog, "a", 0, 5), marks=(Mark("log", 0, b"producer", 4),), claims=(Mark("log", 0, b"producer", 6, 900),))
    catalog.register(sealed)
    before = catalog.gaps()
    catalog.caught_up("log", {0: (5, 901)})

    assert before == []
    assert [(gap.seq_first, gap.seq_last, gap.count, gap.kind) for gap in catalog.gaps()] == [(5, 6, 2, "tail")]
    assert catalog.gaps(time=(901, 2000)) == []


def test_quarantined_bytes_are_kept_until_requeued(catalog: Catalog) -> None:
    """They are listed without their bytes, shown with them, and gone from both once a shard holds the event."""
    item = Quarantined("log", 0, 3, 30, "broken", 2, b"hash")
    catalog.register(_sealed(_shard(catalog, "a", 0, 5), quarantined=(item,), raw=(b"xy",)))
    raw = catalog.quarantined_bytes("log", 0, 3)
    again = replace(_shard(catalog, "again", 3, 4), ranges=(Range("log", 0, 3, 4),))
    catalog.register_requeued(again, [])

    assert raw == b"xy"
    assert (catalog.quarantine(), catalog.quarantine(requeued=True)) == ([], [replace(item, requeued=True)])
    with pytest.raises(ConflictError, match="not in quarantine"):
        catalog.register_requeued(replace(again, name="more"), [])
    with pytest.raises(UsageError, match="not in quarantine"):
        catalog.quarantined_bytes("log", 0, 3)


def test_requests_to_seal_are_heard_in_order(catalog: Catalog) -> None:
    """Each has a number above those before it."""
    numbers = [catalog.request_seal({0: 5, 1: 7}), catalog.request_seal({0: 9})]

    assert catalog.seal_requests(0) == [(numbers[0], {0: 5, 1: 7}), (numbers[1], {0: 9})]
    assert catalog.seal_requests(numbers[0]) == [(numbers[1], {0: 9})]


def test_many_processes_write_at_once(catalog: Catalog, tmp_path: Path) -> None:
    """Forked processes with the parent's handle lose nothing."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_register_many, args=(catalog, partition)) for partition in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0] * 4
    assert [at.offset_next for at in catalog.positions()] == [20] * 4
    assert len(catalog.snapshot().shards) == 80


def _register_many(catalog: Catalog, partition: int) -> None:
    for first in range(20):
        catalog.register(_sealed(_shard(catalog, f"p{partition}-{first:02d}", first, first + 1, partition=partition)))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    """Garbage and another layout are refused in one line with the cure."""
    garbage, other = tmp_path / "garbage.sqlite", tmp_path / "other.sqlite"
    garbage.write_bytes(b"no database" * 1000)
    Catalog(other).close()
    with sqlite3.connect(other) as connection:
        connection.execute("UPDATE fact SET value = '99' WHERE key = 'layout'")
    connection.close()

    with pytest.raises(CorruptStore) as error:
        Catalog(garbage)
    assert "rebuild" in error.value.hint
    with pytest.raises(CorruptStore, match="layout 99"):
        Catalog(other)
