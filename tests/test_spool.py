"""The spool on disk: order, acknowledgement, torn and damaged files, adoption, bounds and full disks."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest import spool as spools
from ingest.spool import Spool, adopt, create
from schemas.errors import StorageFull
from store.log.base import Entry

BYTES_MAX = 4 << 20


def make(root: Path, *, producer: bytes = b"producer", bytes_max: int = BYTES_MAX) -> Spool:
    """A new spool of log `log` with four partitions."""
    return create(root, producer, log_id="log", partitions=4, bytes_max=bytes_max)


def adopted(root: Path, *, log_id: str = "log", partitions: int = 4) -> list[Spool]:
    """What a recorder of that log finds."""
    return list(adopt(root, log_id=log_id, partitions=partitions, bytes_max=BYTES_MAX))


def entries(first: int, count: int, size: int = 20) -> list[Entry]:
    """Entries that tell themselves apart."""
    return [Entry(i % 4, i.to_bytes(16, "big"), i.to_bytes(8, "big") * (size // 8)) for i in range(first, first + count)]


def drain(spool: Spool) -> list[Entry]:
    """Everything that waits, acknowledged batch by batch."""
    found = []
    while batch := spool.peek():
        found += batch
        spool.acknowledge()
    return found


def die(spool: Spool) -> None:
    """End the owner as a kill does: files stay, the lock goes."""
    spool.forget()


def segments(spool: Spool) -> list[Path]:
    """Segment files in order."""
    return sorted(spool.folder.glob("*.seg"))


def test_entries_come_back_in_order_and_the_folder_goes_when_all_are_acknowledged(tmp_path: Path) -> None:
    """A healthy spool is a FIFO that leaves nothing behind."""
    spool = make(tmp_path)
    spool.append(entries(0, 10))
    spool.append(entries(10, 5))
    found = drain(spool)
    spool.close()

    assert found == entries(0, 15)
    assert list(tmp_path.iterdir()) == []


def test_an_orphaned_spool_is_adopted_from_the_acknowledged_entry_on(tmp_path: Path) -> None:
    """The next recorder sends the same bytes, without those that the log had already."""
    spool = make(tmp_path)
    spool.append(entries(0, 10))
    spool.peek()
    spool.acknowledge()
    spool.append(entries(10, 10))
    die(spool)
    orphans = adopted(tmp_path)

    assert [drain(orphan) for orphan in orphans] == [entries(10, 10)]
    assert all(orphan.empty for orphan in orphans)


def test_the_spool_of_a_living_owner_is_left_alone(tmp_path: Path) -> None:
    """Two recorders never send one spool."""
    spool = make(tmp_path)
    spool.append(entries(0, 1))
    found = adopted(tmp_path)
    spool.close()

    assert found == []


def test_an_orphan_is_adopted_once(tmp_path: Path) -> None:
    """Of two recorders that look, one gets it."""
    spool = make(tmp_path)
    spool.append(entries(0, 1))
    die(spool)
    first, second = adopted(tmp_path), adopted(tmp_path)

    assert (len(first), len(second)) == (1, 0)


@pytest.mark.parametrize(("log_id", "partitions"), [("another", 4), ("log", 8)])
def test_the_spool_of_another_log_stays(tmp_path: Path, log_id: str, partitions: int) -> None:
    """Its sequence numbers would make the indexer drop events; it waits for its own log."""
    spool = make(tmp_path)
    spool.append(entries(0, 3))
    die(spool)

    assert adopted(tmp_path, log_id=log_id, partitions=partitions) == []
    assert [drain(orphan) for orphan in adopted(tmp_path)] == [entries(0, 3)]


@pytest.mark.parametrize("torn", [b"\x01", b"\xff" * 9, bytes(64)])
def test_a_torn_tail_is_cut(tmp_path: Path, torn: bytes) -> None:
    """A record that a kill or a power cut broke off ends the spool, what stands before it is sent."""
    spool = make(tmp_path)
    spool.append(entries(0, 5))
    with open(segments(spool)[0], "ab") as file:
        file.write(torn)
    die(spool)
    (orphan,) = adopted(tmp_path)

    assert drain(orphan) == entries(0, 5)
    assert orphan.empty


def test_every_way_to_tear_the_last_record_leaves_the_ones_before(tmp_path: Path) -> None:
    """Whatever the length of the file, whole records are sent and nothing else."""
    found = []
    spool = make(tmp_path / "whole")
    spool.append(entries(0, 3))
    data = segments(spool)[0].read_bytes()
    spool.close()
    for length in range(len(data)):
        torn = make(tmp_path / str(length))
        torn.append(entries(0, 3))
        os.truncate(segments(torn)[0], length)
        die(torn)
        found.append(len(drain(adopted(tmp_path / str(length))[0])))

    assert found == [length * 3 // len(data) for length in range(len(data))]


def test_damage_in_the_middle_is_kept_aside_and_later_segments_are_sent(tmp_path: Path) -> None:
    """A flipped bit costs the rest of its segment only, and that stays for whoever wants to look."""
    spool = make(tmp_path)
    for i in range(3):
        spool.append(entries(i * 1000, 1000, 1200))
    first, *rest = segments(spool)
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    die(spool)
    (orphan,) = adopted(tmp_path)
    found = drain(orphan)

    assert rest
    assert found[-1] == entries(2999, 1, 1200)[0]
    assert len(list((tmp_path / ".damaged").iterdir())) == 1


def test_a_mark_that_a_power_cut_broke_sends_again_rather_than_never(tmp_path: Path) -> None:
    """The indexer knows what it had by the sequence numbers."""
    spool = make(tmp_path)
    spool.append(entries(0, 4))
    spool.peek()
    spool.acknowledge()
    spool.append(entries(4, 2))
    (spool.folder / "acknowledged").write_bytes(b"\x07" * 20)
    die(spool)
    (orphan,) = adopted(tmp_path)

    assert drain(orphan) == entries(0, 6)


def test_the_bound_refuses_until_something_is_acknowledged(tmp_path: Path) -> None:
    """A full spool takes nothing, keeps what it has, and goes on after it was drained."""
    spool = make(tmp_path, bytes_max=1 << 20)
    batches = 0
    while spool.append(entries(batches * 100, 100, 1024)):
        batches += 1
    found = drain(spool)
    again = spool.append(entries(batches * 100, 100, 1024))
    spool.close()

    assert found == entries(0, batches * 100, 1024)
    assert again


def test_an_event_larger_than_the_bound_passes_through_an_empty_spool(tmp_path: Path) -> None:
    """Otherwise it would wait for ever."""
    spool = make(tmp_path, bytes_max=1 << 20)
    large = entries(0, 1, 2 << 20)

    assert spool.append(large)
    assert drain(spool) == large
    spool.close()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size`: the kernel refuses in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_takes_nothing_and_leaves_whole_records(tmp_path: Path) -> None:
    """A write that ends in the middle is taken back, and writing goes on when there is room."""
    spool = make(tmp_path)
    spool.append(entries(0, 10, 1024))
    size = segments(spool)[0].stat().st_size
    with file_size_limit(size + 1500), pytest.raises(StorageFull):
        spool.append(entries(10, 10, 1024))
    left = segments(spool)[0].stat().st_size
    spool.append(entries(20, 10, 1024))
    found = drain(spool)
    spool.close()

    assert left == size
    assert found == entries(0, 10, 1024) + entries(20, 10, 1024)


def test_entries_in_memory_only_are_sent_in_their_place_and_never_called_durable(tmp_path: Path) -> None:
    """What a full disk did not take may go straight to the log, but a sync does not cover it."""
    spool = make(tmp_path)
    spool.append_volatile(entries(0, 2))
    spool.append(entries(2, 2))
    covered = spool.sync()
    found = drain(spool)
    covered_after = spool.sync()
    spool.close()

    assert found == entries(0, 4)
    assert (covered, covered_after) == (False, True)


STEPS = st.lists(st.one_of(st.integers(1, 60), st.sampled_from(["send", "retry", "die"])), max_size=40)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.sampled_from([1 << 20, 200, 0]))
def test_any_interleaving_is_a_fifo(steps: list[int | str], window: int) -> None:
    """Whether entries come from memory or disk, and however often the owner dies: each is sent, in order, none twice."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(spools, "_WINDOW_BYTES", window)
        patch.setattr(spools, "SEND_ENTRIES_MAX", 50)
        root, producers = Path(folder), 0
        queue, written, sent = [make(root)], 0, []
        for step in [*steps, "end"]:
            if isinstance(step, int):
                queue[-1].append(entries(written, step, 400))
                written += step
            elif step == "die":
                for spool in queue:
                    die(spool)
                producers += 1
                queue = [*adopted(root), make(root, producer=producers.to_bytes(8, "big"))]
            elif step == "retry":
                queue[0].peek()
            else:
                for spool in queue:
                    while batch := spool.peek():
                        sent += batch
                        spool.acknowledge()
                        if step == "send":
                            break
                    if step == "send" and not spool.empty:
                        break
        for spool in queue:
            spool.close()

        assert sent == entries(0, written, 400)
