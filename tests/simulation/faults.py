"""What goes wrong in a simulation: a log, an object store and a disk that fail when the dice say so, and death."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from schemas import clock
from schemas.errors import LogUnavailable, StorageFull, StoreUnavailable
from store.ledger.entry import ENTRIES
from store.log.base import Batch, Entry, Log, Taken
from store.objects.base import NO_LOCK, Lock, ObjectInfo, ObjectStore, StoreProbe

T = TypeVar("T")

_FRESH_US = 600_000_000
"""A stale read misses what was written within so long."""


class Killed(BaseException):
    """The process dies here. No `except Exception` sees it, and what the unwinding still tries to write is refused."""


@dataclass
class Dice:
    """Chance by seed: how likely each fault is in this run, and how often each came."""

    rng: random.Random
    odds: dict[str, float] = field(default_factory=dict)
    thrown: Counter[str] = field(default_factory=Counter)
    calm: bool = False

    @classmethod
    def of(cls, seed: int, odds: Mapping[str, float] | None = None) -> Dice:
        """A run has some kinds of fault and not others, so that each is met alone and in company; `odds` instead are all there are."""
        rng = random.Random(seed)
        levels = {
            "log: refused": (0, 0, 0.1),
            "log: reply lost": (0, 0.1, 0.3),
            "log: short read": (0, 0.3),
            "store: refused": (0, 0, 0.02),
            "store: reply lost": (0, 0.01, 0.04),
            "store: slow": (0, 0.05),
            "store: torn read": (0, 0, 0.03),
            "store: stale read": (0, 0, 0.1),
            "disk full": (0, 0, 0.02),
            "clock jump": (0, 0.2),
            "kill": (0, 0.03, 0.08),
            "pause": (0, 0.03, 0.08),
            "fence lost": (0, 0.5),
        }
        drawn = {fault: rng.choice(chances) for fault, chances in levels.items()}
        return cls(rng, drawn if odds is None else dict.fromkeys(drawn, 0.0) | dict(odds))

    def falls(self, fault: str, share: float = 1.0) -> bool:
        """Whether a fault comes now; `share` makes it rarer where it could come often."""
        if self.calm or self.rng.random() >= self.odds[fault] * share:
            return False
        self.thrown[fault] += 1
        return True


@dataclass
class FaultyLog:
    """A log that refuses, loses replies after the write took effect, and gives less than was asked for."""

    real: Log
    dice: Dice
    breathe: Callable[[], None]
    appended: Callable[[Sequence[Batch]], None]
    """Told what really was written."""

    @property
    def log_id(self) -> str:
        """See `Log.log_id`."""
        return self.real.log_id

    @property
    def partitions(self) -> int:
        """See `Log.partitions`."""
        return self.real.partitions

    @property
    def retention_s(self) -> float | None:
        """See `Log.retention_s`."""
        return self.real.retention_s

    def append(self, entries: Sequence[Entry]) -> None:
        """See `Log.append`: after an exception any prefix per partition may have been written."""
        self.breathe()
        if self.dice.falls("disk full"):
            raise StorageFull("the disk is full", operation="append")
        if self.dice.falls("log: refused"):
            raise LogUnavailable("refused", operation="append")
        lost = self.dice.falls("log: reply lost")
        written = entries[: self.dice.rng.randint(1, len(entries))] if lost else entries
        before = {partition: self.real.bounds(partition)[1] for partition in {entry.partition for entry in written}}
        self.real.append(written)
        self.appended([self.real.read(partition, offset, limit=1 << 20) for partition, offset in sorted(before.items())])
        if lost:
            raise LogUnavailable("no reply", operation="append")

    def read(self, partition: int, offset: int, *, limit: int, wait_s: float = 0.0) -> Batch:
        """See `Log.read`."""
        self.breathe()
        if self.dice.falls("log: refused"):
            raise LogUnavailable("refused", operation="read")
        return self.real.read(partition, offset, limit=1 if self.dice.falls("log: short read") else limit)

    def wait(self, offsets: dict[int, int], *, wait_s: float) -> set[int]:
        """See `Log.wait`."""
        self.breathe()
        return self.real.wait(offsets, wait_s=0)

    def bounds(self, partition: int) -> tuple[int, int]:
        """See `Log.bounds`."""
        self.breathe()
        return self.real.bounds(partition)

    def acknowledge(self, offsets: dict[int, int]) -> None:
        """See `Log.acknowledge`."""

    def trim(self, partition: int, before_offset: int) -> None:
        """See `Log.trim`."""
        self.breathe()
        self.real.trim(partition, before_offset)

    def taken(self) -> Taken:
        """See `Log.taken`."""
        return self.real.taken()

    def close(self) -> None:
        """See `Log.close`."""
        self.real.close()


@dataclass
class FaultyStore:
    """An object store that refuses, is slow, loses replies, tears what it gives, and does not know what was just written.

    Ages of objects go by the virtual clock. Readers that go past it, by `read_url`, are DuckDB's own.
    """

    real: ObjectStore
    dice: Dice
    breathe: Callable[[], None]
    sleep: Callable[[float], None]
    created: Callable[[str, bytes], None]
    """Told of every object that really was created."""
    _times: dict[str, int] = field(default_factory=dict)
    _removed: dict[str, int] = field(default_factory=dict)

    def create(self, key: str, data: bytes, *, lock: Lock = NO_LOCK) -> None:
        """See `ObjectStore.create`."""
        self._create(key, data, lambda: self.real.create(key, data, lock=lock))

    def create_from_file(self, key: str, path: Path, *, lock: Lock = NO_LOCK) -> None:
        """See `ObjectStore.create_from_file`."""
        self._create(key, path.read_bytes(), lambda: self.real.create_from_file(key, path, lock=lock))

    def get(self, key: str) -> bytes:
        """See `ObjectStore.get`."""
        return self._torn(self._read(key, lambda: self.real.get(key)))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `ObjectStore.get_range`."""
        return self._torn(self._read(key, lambda: self.real.get_range(key, start, length)))

    def head(self, key: str) -> ObjectInfo | None:
        """See `ObjectStore.head`. What is stale is the ledger's end, which decides what a writer believes to be next."""
        found = self._read(key, lambda: self.real.head(key))
        if found is not None and key.startswith(ENTRIES) and self._is_new(key) and self.dice.falls("store: stale read"):
            return None
        return self._dated(found) if found else None

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        return map(self._dated, self._read(prefix, lambda: list(self.real.list(prefix, start_after=start_after))))

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        self._write(key, lambda: self.real.delete(key))

    def purge(self, key: str) -> int:
        """See `ObjectStore.purge`."""
        count = self._write(key, lambda: self.real.purge(key))
        self._removed[key] = clock.now_us()
        return count

    def remains(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See `ObjectStore.remains`. A stale one misses what is new and shows what is gone."""
        found = dict(self._read(prefix, lambda: list(self.real.remains(prefix))))
        new = [key for key in found if self._is_new(key)]
        gone = [key for key, at in self._removed.items() if key.startswith(prefix) and at + _FRESH_US > clock.now_us()]
        if (new or gone) and self.dice.falls("store: stale read"):
            found = {key: count for key, count in found.items() if key not in new} | dict.fromkeys(gone, 1)
        return iter(sorted(found.items()))

    def lock_of(self, key: str) -> Lock:
        """See `ObjectStore.lock_of`."""
        return self._read(key, lambda: self.real.lock_of(key))

    def set_hold(self, key: str, held: bool) -> None:
        """See `ObjectStore.set_hold`."""
        self._write(key, lambda: self.real.set_hold(key, held))

    def read_url(self, key: str, *, expires_s: int) -> str:
        """See `ObjectStore.read_url`."""
        self.breathe()
        return self.real.read_url(key, expires_s=expires_s)

    def probe(self) -> StoreProbe:
        """See `ObjectStore.probe`."""
        return self.real.probe()

    def _create(self, key: str, data: bytes, do: Callable[[], None]) -> None:
        def create() -> None:
            known = self.real.head(key) is not None
            try:
                do()
            finally:  # who is killed in the middle has written it all the same
                if not known and self.real.head(key) is not None:
                    self._times[key] = clock.now_us()
                    self.created(key, data)

        self._write(key, create)

    def _write(self, key: str, do: Callable[[], T]) -> T:
        self.breathe()
        if self.dice.falls("disk full"):
            raise StorageFull("no room", operation="write", place=key)
        if self.dice.falls("store: refused"):
            raise StoreUnavailable("503", operation="write", place=key)
        self._dawdle()
        result = do()
        if self.dice.falls("store: reply lost"):
            raise StoreUnavailable("no reply", operation="write", place=key)
        return result

    def _read(self, key: str, do: Callable[[], T]) -> T:
        self.breathe()
        if self.dice.falls("store: refused"):
            raise StoreUnavailable("503", operation="read", place=key)
        self._dawdle()
        return do()

    def _dawdle(self) -> None:
        if self.dice.falls("store: slow"):
            self.sleep(self.dice.rng.uniform(1, 60))

    def _torn(self, data: bytes) -> bytes:
        if not data or not self.dice.falls("store: torn read"):
            return data
        place = self.dice.rng.randrange(len(data))
        return data[:place] if self.dice.rng.random() < 0.5 else data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    def _is_new(self, key: str) -> bool:
        return self._times.get(key, 0) + _FRESH_US > clock.now_us()

    def _dated(self, info: ObjectInfo) -> ObjectInfo:
        at = self._times.get(info.key)
        return info if at is None else replace(info, modified_at=clock.at(at))


class Inline:
    """An executor whose work is done when it is asked for: the order of calls, and so the dice, is that of the code."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, do: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
        """One after the other."""
        return map(do, items)
