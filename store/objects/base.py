"""The contract of an object store: a few methods over immutable objects named by slash-separated keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

LockMode = Literal["none", "governance", "compliance"]


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object: key relative to the store's root, size in bytes, time of its last write (UTC)."""

    key: str
    size: int
    modified_at: datetime


@dataclass(frozen=True, slots=True)
class Lock:
    """Retention sent with a PUT. `mode` "none" sends none; `until` is UTC."""

    mode: LockMode
    until: datetime | None = None


NO_LOCK = Lock("none")


@dataclass(frozen=True, slots=True)
class StoreProbe:
    """What the store really does, found by trying: `detail` is one line for the status page."""

    conditional_create: bool
    locks_enforced: bool
    detail: str


class ObjectStore(Protocol):
    """An object store. Every method raises `StoreUnavailable` when the store does not answer."""

    def create(self, key: str, data: bytes, *, lock: Lock = NO_LOCK) -> None:
        """Write an object that does not exist yet; readers see all of it or nothing.

        A lost reply after a successful write is resolved by reading back: equal bytes count as success.

        Raises:
            AlreadyExists: the key holds other bytes.
            StorageFull: no room.
        """
        ...

    def create_from_file(self, key: str, path: Path, *, lock: Lock = NO_LOCK) -> None:
        """`create` for a large local file."""
        ...

    def get(self, key: str) -> bytes:
        """The whole object. Raises `KeyError` when there is none."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes [start, start+length) of an object, fewer where it ends before. Raises `KeyError` when there is none."""
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or None."""
        ...

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix` and sorts after `start_after`, in order of the keys' UTF-8 bytes."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object, all its versions included; a missing one is no error.

        Raises:
            ConflictError: the object is locked.
        """
        ...

    def purge(self, key: str) -> int:
        """Remove every version and delete marker of an object, past a governance lock; how many there were.

        Only custody calls this, after the signed entry that says why. Doing it again removes nothing.

        Raises:
            ConflictError: a compliance lock that has not ended, or a legal hold.
        """
        ...

    def remains(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys that start with `prefix` and how many versions and delete markers of each still stand, in order."""
        ...

    def lock_of(self, key: str) -> Lock:
        """The lock of an object, `NO_LOCK` for none. Raises `KeyError` when there is no such object."""
        ...

    def set_hold(self, key: str, held: bool) -> None:
        """Put an object under legal hold, or end that: while held it cannot be removed, whatever its lock says.

        Raises:
            KeyError: there is no such object.
        """
        ...

    def read_url(self, key: str, *, expires_s: int) -> str:
        """What DuckDB's `read_parquet` can open to read, and nobody can write through: presigned GET URL or path."""
        ...

    def probe(self) -> StoreProbe:
        """Try conditional create and locks on a canary object and say what holds."""
        ...
