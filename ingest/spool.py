"""The spool of one producer on disk: what is recorded stands here before it is sent, and outlives the process.

A spool is a folder `<producer id in hex>` with a lock file that its owner holds (`flock`), `meta.json`, numbered
segment files and the mark `acknowledged`. A record is `length | CRC-32C | partition | key length | key | value`.
Records are written through to the operating system, so that a killed process loses none of them; a power cut may
take those that were not synced, which is why `sync` is called when the log is away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import crc32c
import structlog

from ingest.outbox import SEND_BYTES_MAX, SEND_ENTRIES_MAX
from schemas.errors import ConflictError, CorruptStore, Fenced, StorageFull, Unavailable
from store.log.base import Entry

log = structlog.get_logger("tokentape.spool")

# Length and checksum of what follows, little-endian.
_FRAME = struct.Struct("<II")
# Partition and length of the key.
_HEAD = struct.Struct("<IH")
# Segment, offset in it, checksum of both.
_MARK = struct.Struct("<QQI")
# A segment is closed at this size: deleting whole files is how the spool gives space back.
_SEGMENT_BYTES = 32 << 20
# A segment that is acknowledged to its end is replaced from this size on, so that a healthy spool stays small.
_IDLE_BYTES = 1 << 20
# Entries kept in memory so that a healthy log is fed without reading the disk.
_WINDOW_BYTES = 16 << 20
_SUFFIX = ".seg"
_LOCK, _META, _ACKNOWLEDGED = "lock", "meta.json", "acknowledged"

Position = tuple[int, int]
"""Segment number and byte offset."""


class Spool:
    """An `Outbox` on disk. One thread appends, one peeks and acknowledges, any may sync.

    After a failed write the file is cut back to its last whole record.
    """

    def __init__(self, folder: Path, lock: int, *, bytes_max: int) -> None:
        """A locked folder; use `create` or `adopt`."""
        self.folder = folder
        self._lock_file = lock
        self._bytes_max = bytes_max
        self._segment_bytes = min(_SEGMENT_BYTES, bytes_max // 4)
        self._mutex = threading.RLock()
        self._sizes = _segments(folder)
        self._segment = max(self._sizes, default=0)
        self._file = -1
        self._unsynced: list[int] = []
        self._mark = os.open(folder / _ACKNOWLEDGED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # A power cut may have taken entries that were acknowledged, or the mark itself.
        self._read = min(max(self._acknowledged(), (min(self._sizes, default=0), 0)), self._end)
        self._window: deque[tuple[Position, Position, list[Entry]]] = deque()
        self._window_bytes = 0
        # How many entries wait in memory only, because the disk was full while the log was there.
        self.volatile = 0
        self._peeked: tuple[Position, int] = (self._read, 0)
        self._closed = False

    @property
    def disk_bytes(self) -> int:
        """Bytes of all segment files."""
        return sum(list(self._sizes.values()))

    @property
    def empty(self) -> bool:
        """Whether everything appended is acknowledged."""
        with self._mutex:
            return not self._window and self._next(self._read) == self._end

    # Appending

    def append(self, entries: Sequence[Entry]) -> bool:
        """Write the entries through to the operating system; False when the spool would exceed its bound.

        Raises:
            StorageFull: the disk is full; nothing was taken.
            Unavailable: the disk refused for another reason.
        """
        data = b"".join(map(_pack, entries))
        with self._mutex:
            if self._closed:
                return False
            idle = self.empty
            if not idle and self.disk_bytes + len(data) > self._bytes_max:
                return False
            with _mapped("spool", self.folder):
                if self._file < 0 or self._end[1] >= (_IDLE_BYTES if idle else self._segment_bytes):
                    self._roll(idle)
                start = self._end
                self._write(data)
            self._remember(start, entries, len(data))
            return True

    def append_volatile(self, entries: Sequence[Entry]) -> None:
        """Take the entries in memory only: for a full disk while the log is there and nothing else waits."""
        with self._mutex:
            self._window.append((self._end, self._end, list(entries)))
            self.volatile += len(entries)

    def sync(self) -> bool:
        """Bring everything appended to disk; False when some entries are in memory only.

        Raises:
            Unavailable: the disk refused.
        """
        with self._mutex, _mapped("sync spool", self.folder):
            files, self._unsynced = self._unsynced, []
            volatile = self.volatile
            try:
                for number in files:
                    if number in self._sizes:
                        _fsync(self._path(number))
                _fsync(self.folder)
            except OSError:
                self._unsynced = files + self._unsynced
                raise
        return volatile == 0

    @property
    def _end(self) -> Position:
        return self._segment, self._sizes.get(self._segment, 0)

    def _roll(self, idle: bool) -> None:
        """Begin a new segment; an `idle` spool needs none of the old ones any more."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        number = self._segment + 1 if self._sizes else self._segment
        self._file = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._segment = number
        self._sizes[number] = 0
        if idle:
            self._read = (number, 0)
            self._drop_before(number)

    def _write(self, data: bytes) -> None:
        number, size = self._end
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise
        self._sizes[number] = size + len(data)
        if number not in self._unsynced:
            self._unsynced.append(number)

    def _remember(self, start: Position, entries: Sequence[Entry], size: int) -> None:
        """Keep the entries for the sender, unless so many wait that they are better read from disk later."""
        if self._window_bytes + size <= _WINDOW_BYTES:
            self._window.append((start, self._end, list(entries)))
            self._window_bytes += size

    # Sending

    def peek(self) -> list[Entry]:
        """The oldest entries that are not acknowledged, from memory or from disk."""
        with self._mutex:
            at = self._next(self._read)
            stop = self._window[0][0] if self._window else self._end
            if self._closed or (at == stop and not self._window):
                return []
            if at >= stop:
                return self._peek_window()
        return self._peek_disk(at, stop)

    def _peek_window(self) -> list[Entry]:
        found: list[Entry] = []
        end, batches, size = self._read, 0, 0
        for start, after, entries in self._window:
            size += sum(len(entry.value) for entry in entries)
            if found and (start != self._next(end) or size > SEND_BYTES_MAX or len(found) + len(entries) > SEND_ENTRIES_MAX):
                break
            found += entries
            end, batches = after, batches + 1
        self._peeked = (end, batches)
        return found

    def _peek_disk(self, at: Position, stop: Position) -> list[Entry]:
        """Records from one segment; its damaged rest is cut, and the next segment is tried then."""
        number, start = at
        end = stop[1] if stop[0] == number else self._sizes[number]
        found: list[Entry] = []
        with _mapped("read spool", self.folder), open(self._path(number), "rb") as file:
            file.seek(start)
            for entry, after in _records(file, end):
                found.append(entry)
                start = after
                if after - at[1] >= SEND_BYTES_MAX or len(found) >= SEND_ENTRIES_MAX:
                    break
            else:
                if start < end:
                    self._cut(number, start)
        self._peeked = ((number, start), 0)
        return found or self.peek()

    def acknowledge(self) -> None:
        """Forget the entries that the last `peek` gave and delete segments that are done with."""
        with self._mutex:
            if self._closed:
                return
            self._read, batches = self._peeked
            for _ in range(batches):
                start, end, entries = self._window.popleft()
                if start == end:
                    self.volatile -= len(entries)
                else:
                    self._window_bytes -= sum(map(_size, entries))
            self._peeked = (self._read, 0)
            self._drop_before(self._next(self._read)[0])
            mark = _MARK.pack(*self._read, 0)[:16]
            # A lost mark only means that entries are sent twice, which the indexer sees by their sequence numbers.
            with contextlib.suppress(OSError):
                os.pwrite(self._mark, mark + struct.pack("<I", crc32c.crc32c(mark)), 0)

    def _acknowledged(self) -> Position:
        data = os.pread(self._mark, _MARK.size, 0)
        if len(data) < _MARK.size or crc32c.crc32c(data[:16]) != _MARK.unpack(data)[2]:
            return 0, 0
        segment, offset, _ = _MARK.unpack(data)
        return segment, offset

    def _next(self, position: Position) -> Position:
        """The same place, named by the segment that holds the byte after it."""
        number, offset = position
        while number < self._segment and offset >= self._sizes.get(number, 0):
            number, offset = number + 1, 0
        return number, offset

    def _cut(self, number: int, size: int) -> None:
        """Drop the end of a segment that is no record: torn by a kill or a power cut, or damaged later, and then kept aside."""
        with self._mutex:
            dropped = self._sizes[number] - size
            last = number == self._segment
            if not last:
                _keep_aside(self._path(number), size)
            os.truncate(self._path(number), size)
            self._sizes[number] = size
        log.warning("spool_cut", folder=str(self.folder), segment=number, offset=size, bytes=dropped, torn=last)

    def _drop_before(self, number: int) -> None:
        for old in [found for found in self._sizes if found < number]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(old))
            del self._sizes[old]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:012d}{_SUFFIX}"

    # Life

    def close(self) -> None:
        """Release the files and the lock; the folder goes when nothing in it waits."""
        with self._mutex:
            if self._closed:
                return
            empty = self.empty
            self._closed = True
            if empty:
                shutil.rmtree(self.folder, ignore_errors=True)
            self._close_files()

    def forget(self) -> None:
        """Close the files of a spool that came over a fork; it stays the parent's, lock and all."""
        self._closed = True
        self._close_files()

    def _close_files(self) -> None:
        for file in (self._file, self._mark, self._lock_file):
            if file >= 0:
                os.close(file)
        self._file = self._mark = self._lock_file = -1


def create(root: Path, producer_id: bytes, *, log_id: str, partitions: int, bytes_max: int) -> Spool:
    """A new spool, locked before anybody can see it.

    Raises:
        Unavailable: the folder cannot be made.
    """
    folder = root / producer_id.hex()
    hidden = root / f".new-{producer_id.hex()}"
    with _mapped("make spool", folder):
        hidden.mkdir(parents=True, mode=0o700)
        lock = os.open(hidden / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        meta = {"producer": producer_id.hex(), "log_id": log_id, "partitions": partitions, "pid": os.getpid()}
        (hidden / _META).write_text(json.dumps(meta), encoding="utf-8")
        hidden.rename(folder)
    return Spool(folder, lock, bytes_max=bytes_max)


def adopt(root: Path, *, log_id: str, partitions: int, bytes_max: int) -> Iterator[Spool]:
    """Spools whose owner is dead, by age, locked for the caller.

    A spool of another log stays as it is: its sequence numbers mean nothing there.
    """
    for folder in sorted(_folders(root), key=_made_at):
        try:
            lock = _lock(folder)
        except (ConflictError, OSError):
            continue
        try:
            meta = _meta(folder)
            if (meta["log_id"], meta["partitions"]) != (log_id, partitions):
                raise Fenced(f"it belongs to log {meta['log_id']} with {meta['partitions']} partitions", place=str(folder))
            spool = Spool(folder, lock, bytes_max=bytes_max)
        except (ConflictError, CorruptStore, OSError) as problem:
            os.close(lock)
            log.error("spool_left", folder=str(folder), problem=str(problem), hint="send it with the settings of its own log")
            continue
        log.info("spool_adopted", folder=str(folder), bytes=spool.disk_bytes)
        yield spool


def _lock(folder: Path) -> int:
    """Lock a folder whose owner is dead.

    Raises:
        Fenced: the owner lives, or somebody else drained the folder meanwhile.
    """
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:
            return lock
    except BlockingIOError:
        pass
    os.close(lock)
    raise Fenced("another process owns the spool", operation="adopt", place=str(folder))


def _meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        return {"log_id": meta["log_id"], "partitions": meta["partitions"]}
    except (ValueError, KeyError, TypeError, OSError) as problem:
        raise CorruptStore(f"{_META} cannot be read: {problem}", operation="adopt", place=str(folder)) from problem


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if not path.name.startswith(".") and (path / _LOCK).exists()]


def _made_at(folder: Path) -> float:
    try:
        return (folder / _META).stat().st_mtime
    except OSError:
        return 0.0


def _segments(folder: Path) -> dict[int, int]:
    """Size by number of the segments there."""
    found = ((path.name.removesuffix(_SUFFIX), path) for path in folder.iterdir() if path.name.endswith(_SUFFIX))
    return {int(name): path.stat().st_size for name, path in sorted(found) if name.isdigit()}


def _pack(entry: Entry) -> bytes:
    body = _HEAD.pack(entry.partition, len(entry.key)) + entry.key + entry.value
    return _FRAME.pack(len(body), crc32c.crc32c(body)) + body


def _size(entry: Entry) -> int:
    return _FRAME.size + _HEAD.size + len(entry.key) + len(entry.value)


def _records(file: Any, end: int) -> Iterator[tuple[Entry, int]]:
    """Whole records up to `end`, each with the offset after it; ends early at the first that is none."""
    at = file.tell()
    while at + _FRAME.size <= end:
        length, checksum = _FRAME.unpack(file.read(_FRAME.size))
        at += _FRAME.size + length
        if at > end or length < _HEAD.size:
            return
        body = file.read(length)
        if crc32c.crc32c(body) != checksum:
            return
        partition, key_bytes = _HEAD.unpack_from(body)
        yield Entry(partition, body[_HEAD.size : _HEAD.size + key_bytes], body[_HEAD.size + key_bytes :]), at


def _keep_aside(path: Path, offset: int) -> None:
    """Copy the damaged end of a segment beside the spools, for whoever wants to look at it."""
    aside = path.parent.parent / ".damaged"
    aside.mkdir(exist_ok=True)
    with open(path, "rb") as source, open(aside / f"{path.parent.name}-{path.stem}-{offset}", "wb") as target:
        source.seek(offset)
        shutil.copyfileobj(source, target)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _mapped(operation: str, folder: Path) -> Iterator[None]:
    """Turn errors of the file system into those of tokentape."""
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "free space; recording goes on then"
            raise StorageFull("the disk of the spool is full", operation=operation, place=str(folder), hint=hint) from problem
        fault = problem.strerror or str(problem)
        raise Unavailable(fault, operation=operation, place=str(folder), hint="check the disk and the rights on the folder") from problem
