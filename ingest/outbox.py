"""Encoded events between the thread that encodes and the thread that sends: the contract, and the one in memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from store.log.base import Entry

# One append to the log: large enough that its cost vanishes, small enough that a failed one is soon sent again.
SEND_ENTRIES_MAX = 4096
SEND_BYTES_MAX = 4 << 20
# What may wait in memory between the two threads, so that one works while the other waits for the disk.
_MEMORY_BYTES_MAX = 8 << 20


class Outbox(Protocol):
    """A FIFO of log entries with one thread that appends and one that sends."""

    @property
    def disk_bytes(self) -> int:
        """Bytes held on disk."""
        ...

    @property
    def empty(self) -> bool:
        """Whether everything appended is acknowledged."""
        ...

    def append(self, entries: Sequence[Entry]) -> bool:
        """Take all of the entries, or none and return False when there is no room for them now.

        Raises:
            StorageFull, Unavailable: the disk does not take them; none was taken.
        """
        ...

    def peek(self) -> list[Entry]:
        """The oldest entries that are not acknowledged, as many as one append should hold; none when empty."""
        ...

    def acknowledge(self) -> None:
        """Forget the entries that the last `peek` gave: the log has them durably."""
        ...

    def sync(self) -> bool:
        """Bring everything appended to disk; False when some of it is in memory only.

        Raises:
            Unavailable: the disk refused.
        """
        ...

    def close(self) -> None:
        """Release files; what is not acknowledged stays on disk. Later calls do nothing."""
        ...


class MemoryOutbox:
    """For a log that is its own spool: a few batches wait for the commit before them, and go when the process is killed."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self._size = 0
        self._peeked = 0
        self._lock = threading.Lock()

    @property
    def disk_bytes(self) -> int:
        """None on disk."""
        return 0

    @property
    def empty(self) -> bool:
        """Whether everything appended is acknowledged."""
        return not self._entries

    def append(self, entries: Sequence[Entry]) -> bool:
        """Take the entries unless 8 MiB wait already."""
        with self._lock:
            if self._size >= _MEMORY_BYTES_MAX:
                return False
            self._entries.extend(entries)
            self._size += sum(len(entry.value) for entry in entries)
            return True

    def peek(self) -> list[Entry]:
        """The oldest entries."""
        with self._lock:
            found = head(self._entries)
        self._peeked = len(found)
        return found

    def acknowledge(self) -> None:
        """Forget what `peek` gave."""
        with self._lock:
            for _ in range(self._peeked):
                self._size -= len(self._entries.popleft().value)
        self._peeked = 0

    def sync(self) -> bool:
        """Nothing here outlives the process."""
        return self.empty

    def close(self) -> None:
        """Nothing to release."""


def head(entries: deque[Entry]) -> list[Entry]:
    """The first entries within the limits of one append, at least one if there is one."""
    found: list[Entry] = []
    size = 0
    for entry in entries:
        size += len(entry.value)
        if found and (size > SEND_BYTES_MAX or len(found) >= SEND_ENTRIES_MAX):
            break
        found.append(entry)
    return found
