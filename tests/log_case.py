"""The contract of a log as tests: every backend inherits them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from schemas.errors import InvalidEvent, LogChanged, LogUnavailable
from schemas.settings import LogSettings
from store.log import open_log
from store.log.base import ENTRY_BYTES_MAX, Entry, Log

KEY = bytes(range(16))
# Longer than any append here takes on a busy machine; reached only by a test that fails.
PATIENCE_S = 30.0


class Opener(Protocol):
    def __call__(self, *, create: bool = True, **changes: object) -> Log: ...


def entries(values: Sequence[bytes], partition: int = 0) -> list[Entry]:
    """Entries of one partition."""
    return [Entry(partition, KEY, value) for value in values]


def numbered(count: int, mark: str = "event") -> list[bytes]:
    """`count` values that differ and show their order."""
    return [f"{mark} {number:06}".encode() for number in range(count)]


def read_all(log: Log, partition: int = 0, *, limit: int = 1000) -> list[bytes]:
    """Every value of a partition, as it stood at the call."""
    offset, end = log.bounds(partition)
    values: list[bytes] = []
    while offset < end:
        batch = log.read(partition, offset, limit=limit)
        values += batch.values
        offset = batch.offset_next
    return values


def in_child(act: Callable[[], None]) -> int:
    """Run `act` in a forked child; returns its exit status, 0 when `act` returned."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class LogCase:
    """What every log does."""

    @pytest.fixture
    def settings(self) -> LogSettings:
        """Settings of a log that does not exist yet."""
        raise NotImplementedError

    def replace(self, settings: LogSettings, folder: Path) -> None:
        """Delete the log and make another one of the same name."""
        raise NotImplementedError

    def expire(self, log: Log, settings: LogSettings, before_offset: int) -> None:
        """Remove the records of partition 0 below an offset."""
        raise NotImplementedError

    @pytest.fixture
    def reopen(self, settings: LogSettings, tmp_path: Path) -> Iterator[Opener]:
        """Opens the log of `settings`, as often as wanted."""
        logs: list[Log] = []

        def opener(*, create: bool = True, **changes: object) -> Log:
            logs.append(open_log(settings.model_copy(update=changes), tmp_path, create=create))
            return logs[-1]

        yield opener
        for log in logs:
            log.close()

    @pytest.fixture
    def log(self, reopen: Opener) -> Log:
        """A new log."""
        return reopen()

    def test_read_returns_what_was_appended(self, log: Log) -> None:
        """Values come back in order, from the first offset on."""
        values = numbered(500)
        log.append(entries(values[:200]))
        log.append(entries(values[200:]))

        assert log.bounds(0) == (0, 500)
        assert values == read_all(log)

    def test_it_tells_what_it_takes(self, log: Log) -> None:
        """Bytes where it is kept, which grow with what is appended, and how full the disk there is."""
        before = log.taken()
        log.append(entries([os.urandom(1 << 20)]))
        after = log.taken()

        assert after.bytes - before.bytes >= 1 << 20
        assert after.disk_share is not None
        assert 0 < after.disk_share < 1

    def test_read_keeps_to_the_limit(self, log: Log) -> None:
        """Pieces of any size are contiguous and say where they stand."""
        values = numbered(100)
        log.append(entries(values))
        found: list[bytes] = []
        for limit in (1, 2, 3, 30, 1000):
            batch = log.read(0, len(found), limit=limit)
            assert (batch.partition, batch.offset_first) == (0, len(found))
            assert 1 <= len(batch.values) == len(batch.appended_at) <= limit
            found += batch.values

        assert values == found

    def test_read_goes_back(self, log: Log) -> None:
        """Offsets may be read again, in any order."""
        values = numbered(50)
        log.append(entries(values))
        log.read(0, 0, limit=50)

        assert [values[offset] for offset in (40, 3, 49, 0)] == [log.read(0, offset, limit=1).values[0] for offset in (40, 3, 49, 0)]

    def test_partitions_are_apart(self, log: Log) -> None:
        """Each partition has offsets and order of its own, also when one append writes to all and reads take turns."""
        values = {partition: numbered(60, f"partition {partition}") for partition in range(log.partitions)}
        log.append([Entry(partition, KEY, values[partition][number]) for number in range(60) for partition in values])
        found: dict[int, list[bytes]] = {partition: [] for partition in values}
        while any(len(found[partition]) < 60 for partition in values):
            for partition, own in found.items():
                own += log.read(partition, len(own), limit=7).values

        assert values == found

    def test_append_time_is_the_log_s(self, log: Log) -> None:
        """`appended_at` is microseconds of about now, and does not decrease."""
        before = time.time_ns() // 1000
        for value in numbered(5):
            log.append(entries([value]))
        after = time.time_ns() // 1000
        times = log.read(0, 0, limit=1).appended_at + log.read(0, 1, limit=10).appended_at

        assert times == sorted(times)
        # Kafka's clock ticks in milliseconds.
        assert before - 1000 <= times[0] <= times[-1] <= after

    def test_nothing_to_append(self, log: Log) -> None:
        """An empty batch is no error, and an empty value is a value."""
        log.append([])
        log.append(entries([b"", b"x", b""]))

        assert [b"", b"x", b""] == read_all(log)

    def test_read_at_the_end_is_empty(self, log: Log) -> None:
        """Without a record the batch is empty and stands where it was asked for."""
        log.append(entries([b"one"]))
        batch = log.read(0, 1, limit=10)

        assert (1, [], [], 1) == (batch.offset_first, batch.values, batch.appended_at, batch.offset_next)

    def test_read_waits_for_a_record(self, log: Log, reopen: Opener) -> None:
        """A waiting reader gets what another writer appends meanwhile."""
        writer = reopen()
        timer = threading.Timer(0.05, lambda: writer.append(entries([b"late"])))
        timer.start()
        batch = log.read(0, 0, limit=10, wait_s=PATIENCE_S)
        timer.join()

        assert [b"late"] == batch.values

    def test_wait_names_the_partitions_that_are_ready(self, log: Log) -> None:
        """Those with a record at the offset, not those whose end it is."""
        log.append(entries([b"a", b"b"], 0) + entries([b"c"], 2))
        ready: set[int] = set()
        deadline = time.monotonic() + PATIENCE_S
        while ready != {0, 2} and time.monotonic() < deadline:
            ready |= log.wait({0: 1, 1: 0, 2: 0} if not ready else dict.fromkeys({0, 2} - ready, 0), wait_s=1.0)

        assert ready == {0, 2}
        assert log.wait({0: 2, 1: 0}, wait_s=0.05) == set()

    def test_wait_ends_when_a_record_comes(self, log: Log, reopen: Opener) -> None:
        """Waiting on several partitions returns the one that got a record."""
        writer = reopen()
        timer = threading.Timer(0.05, lambda: writer.append(entries([b"late"], 3)))
        timer.start()
        ready = log.wait(dict.fromkeys(range(4), 0), wait_s=PATIENCE_S)
        timer.join()

        assert ready == {3}

    def test_two_writers(self, reopen: Opener) -> None:
        """Nothing of either is lost, and each one's own order stands."""
        values = [numbered(200, f"writer {writer}") for writer in range(2)]

        def write(log: Log, own: list[bytes]) -> None:
            for start in range(0, 200, 10):
                log.append(entries(own[start : start + 10]))

        threads = [threading.Thread(target=write, args=(reopen(), own)) for own in values]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = read_all(reopen())

        assert sorted(values[0] + values[1]) == sorted(found)
        assert values == [[value for value in found if value.startswith(f"writer {writer}".encode())] for writer in range(2)]

    def test_append_beside_read(self, log: Log) -> None:
        """One thread appends while another reads through the same instance."""
        values = numbered(300)

        def write() -> None:
            for start in range(0, 300, 20):
                log.append(entries(values[start : start + 20]))

        thread = threading.Thread(target=write)
        thread.start()
        found: list[bytes] = []
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < 300 and time.monotonic() < deadline:
            found += log.read(0, len(found), limit=50, wait_s=1.0).values
        thread.join()

        assert values == found

    def test_reopen(self, log: Log, reopen: Opener) -> None:
        """Another instance is the same log: id, partitions, records; offsets go on."""
        log.append(entries([b"first"]))
        log.close()
        again = reopen(create=False)
        again.append(entries([b"second"]))

        assert (log.log_id, 4) == (again.log_id, again.partitions)
        assert [b"first", b"second"] == read_all(again)

    def test_after_a_fork(self, log: Log) -> None:
        """Parent and child go on with the same instance, each over connections of its own."""
        log.append(entries([b"before"]))
        assert [b"before"] == read_all(log)
        status = in_child(lambda: log.append(entries([b"child", str(len(read_all(log))).encode()])))
        log.append(entries([b"parent"]))

        assert status == 0
        assert [b"before", b"child", b"1", b"parent"] == read_all(log)

    @pytest.mark.parametrize("offset", [4, 1000])
    def test_offset_beyond_the_end(self, log: Log, offset: int) -> None:
        """An offset that the log never gave means that this is not the log that was read before."""
        log.append(entries([b"a", b"b", b"c"]))

        with pytest.raises(LogChanged, match=rf"offsets 0 to 3, not {offset}") as caught:
            log.read(0, offset, limit=1)
        assert caught.value.hint
        with pytest.raises(LogChanged):
            log.wait({0: offset}, wait_s=0.0)

    def test_expired_offset(self, log: Log, settings: LogSettings) -> None:
        """Records that were removed are missed, not skipped; those that stayed keep their offsets."""
        for value in numbered(10):
            log.append(entries([value]))
        self.expire(log, settings, 6)

        assert log.bounds(0) == (6, 10)
        assert numbered(10)[6:] == read_all(log)
        with pytest.raises(LogChanged, match="offsets 6 to 10, not 2"):
            log.read(0, 2, limit=1)

    def test_trim(self, log: Log) -> None:
        """What lies before an offset is deleted; the rest stays where it is."""
        log.append(entries(numbered(10)))
        log.trim(0, 6)

        assert (6, 10) == log.bounds(0)
        assert numbered(10)[6:] == log.read(0, 6, limit=10).values

    def test_a_partition_that_cannot_be_read_stops_no_other(self, log: Log, settings: LogSettings) -> None:
        """After an error in one partition the others go on."""
        log.append(entries([b"a", b"b"], 0) + entries([b"c"], 1))
        self.expire(log, settings, 1)
        with pytest.raises(LogChanged):
            log.read(0, 0, limit=1)

        assert [b"c"] == log.read(1, 0, limit=1).values
        assert [b"b"] == log.read(0, 1, limit=1).values

    def test_replaced_log(self, log: Log, settings: LogSettings, reopen: Opener, tmp_path: Path) -> None:
        """A reader and a writer that are open notice that another log stands in place of theirs."""
        log.append(entries(numbered(5)))
        log.read(0, 0, limit=1)
        self.replace(settings, tmp_path)
        other = reopen()
        other.append(entries(numbered(20, "other")))

        assert log.log_id != other.log_id
        with pytest.raises(LogChanged):
            log.read(0, 5, limit=1, wait_s=1.0)
        with pytest.raises(LogChanged):
            log.append(entries([b"lost"]))

    def test_other_number_of_partitions(self, log: Log, reopen: Opener) -> None:
        """The number is fixed; the error says what it is."""
        with pytest.raises(LogChanged, match="has 4 partitions, the settings say 5") as caught:
            reopen(partitions=5)

        assert "log.partitions = 4" in caught.value.hint

    @pytest.mark.parametrize("partition", [-1, 4])
    def test_unknown_partition(self, log: Log, partition: int) -> None:
        """A partition that the log does not have is refused by every method."""
        with pytest.raises(LogChanged, match="the log has 4"):
            log.append(entries([b"x"], partition))
        with pytest.raises(LogChanged, match="the log has 4"):
            log.read(partition, 0, limit=1)
        with pytest.raises(LogChanged, match="the log has 4"):
            log.bounds(partition)

    def test_missing_log(self, reopen: Opener) -> None:
        """Without `create` nothing is made."""
        with pytest.raises(LogUnavailable):
            reopen(create=False)
        with pytest.raises(LogUnavailable):
            reopen(create=False)

    def test_large_event(self, log: Log) -> None:
        """20 MB are taken whole."""
        value = os.urandom(20_000_000)
        log.append(entries([b"small", value, b"small"]))

        assert [b"small", value, b"small"] == read_all(log)

    def test_too_large_event(self, log: Log) -> None:
        """One byte above the limit is refused, and nothing of its batch is written."""
        with pytest.raises(InvalidEvent, match=f"{ENTRY_BYTES_MAX + 1} bytes"):
            log.append(entries([b"small", bytes(ENTRY_BYTES_MAX + 1)]))

        assert log.bounds(0) == (0, 0)

    def test_acknowledge_moves_nothing(self, log: Log, reopen: Opener) -> None:
        """It is telemetry: reading is not affected, here or in another instance."""
        log.append(entries(numbered(3)))
        log.acknowledge({0: 2, 1: 0})

        assert numbered(3) == read_all(log)
        assert numbered(3) == read_all(reopen())

    def test_close_twice(self, log: Log) -> None:
        """A closed log says so."""
        log.append(entries([b"x"]))
        log.read(0, 0, limit=1)
        log.close()
        log.close()

        with pytest.raises(LogUnavailable, match="closed"):
            log.append(entries([b"y"]))
        with pytest.raises(LogUnavailable, match="closed"):
            log.read(0, 0, limit=1)
