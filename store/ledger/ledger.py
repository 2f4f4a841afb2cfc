"""The ledger: a chain of signed entries in an object store, each created once, under signed Merkle checkpoints.

Creating entry N is possible for one writer only, so the store itself decides the order and fences out a writer that
fell behind. Nothing else is shared between writers. A writer keeps in memory how many entries there are, the last
one, and the right edge of the tree; what others appended is read, and held against the key, before it is built upon.
"""

from __future__ import annotations

import base64
import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from hashlib import sha256
from typing import Any, Protocol

from schemas import clock
from schemas.errors import AlreadyExists, ConflictError, ProofError, StoreUnavailable
from store.crashpoints import crash_point
from store.ledger.chain import LOST, ROTATED, KeyChain
from store.ledger.entry import (
    CHECKPOINTS,
    Checkpoint,
    Entry,
    canonical,
    check_extensions,
    checkpoint_size,
    decode_entry,
    entry_key,
    is_checkpoint,
    make_checkpoint,
    make_entry,
)
from store.ledger.merkle import HASH_BYTES, CompactRange, Tree, leaf_hash
from store.ledger.note import Signer, TreeHead, UnsignedNote, Verifier
from store.objects.base import NO_LOCK, Lock, ObjectStore

ATTEMPTS_MAX = 10_000  # lost races for a number before giving up; each means that somebody else appended
READERS = 8  # entries fetched at the same time
BATCH = 256  # entries fetched ahead of the caller at most
_LOOK_BACK_US = (300_000_000, 3_600_000_000, 86_400_000_000)  # how far back the newest checkpoint is sought: 5 min, 1 h, 1 day


class LedgerKeys(Protocol):
    """What a ledger is opened with: a `Signer`, a `Verifier` to read only, or the key files of an installation (`KeyFolder`)."""

    @property
    def trusted(self) -> tuple[Verifier, ...]:
        """Public keys that were handed over by another way, the first one first."""

    def private(self, verifier: Verifier) -> Signer:
        """The private half of the key that is in force. Raises UsageError where it is not at hand."""


class Ledger:
    """A ledger in `store`, under the keys that its entries hand over to from the first one on (`store.ledger.chain`).

    `lock_days` locks entries and checkpoints in COMPLIANCE mode for so long: they hold no content, and nobody shall be
    able to remove them. 0 sends no lock. Methods may be called from several threads.

    Every method raises `StoreUnavailable` when the store does not answer, and `ProofError` when what it reads is
    not what the key signed.
    """

    def __init__(self, store: ObjectStore, key: LedgerKeys, origin: str, *, lock_days: int = 0) -> None:
        self.store = store
        self.origin = origin
        self._chain = KeyChain.of(key.trusted)
        self._keys = key
        self._lock_days = lock_days
        self._mutex = threading.RLock()
        self._size = 0  # entries known to exist
        self._tip: Entry | None = None  # entry `_size - 1`, once it was needed
        self._edge: CompactRange | None = None  # right edge of the tree, at most `_size` leaves
        self._tree = Tree()  # for proofs: filled on demand
        self._newest: Checkpoint | None = None
        self._unsure: Entry | None = None  # sent, and no answer came: it may or may not stand

    def append(self, type: str, body: Mapping[str, Any], *, expected: int | None = None, fresh: Signer | None = None) -> Entry:
        """Sign and append an entry; when this returns it is durable and has its number for ever.

        With `expected` it gets that number or none: nothing was entered since the caller looked. `fresh` signs in place of
        the key in force: only for the entry that begins again after a loss.

        After `StoreUnavailable` the entry may stand all the same: calling again with the same arguments on the same
        instance finds out and never enters it twice.

        Raises:
            UsageError: no private key, or not the one in force, or the body is no canonical JSON.
            StorageFull: no room.
            ConflictError: somebody else entered something under the number `expected`.
        """
        with self._mutex:
            settled = self._settle(type, body)
            if settled is not None:
                return settled
            for _ in range(ATTEMPTS_MAX):
                previous = self._previous()
                if expected is not None and self._size != expected:
                    raise ConflictError(f"entry {expected} is taken", operation="append", place="ledger", hint="read on and try again")
                signer = fresh or self._keys.private(self._chain.at(self._size))
                entry = make_entry(signer, self.origin, sequence=self._size, previous=previous, type=type, body=body)
                if self._create(entry):
                    return entry
                self._refresh()
            raise ConflictError(f"lost {ATTEMPTS_MAX} races for a number", operation="append", place="ledger")

    def head(self) -> int:
        """Number of entries that stand now."""
        with self._mutex:
            self._refresh()
            return self._size

    def entry(self, sequence: int) -> Entry:
        """One entry, its signature checked. Raises `KeyError` when there is none."""
        return self._checked(decode_entry(sequence, self.store.get(entry_key(sequence))))

    def entries(self, start: int = 0, *, after: str | None = None) -> Iterator[Entry]:
        """Entries from number `start` on, in order, signatures and chain checked; those that stand when this is called.

        `after` is the SHA-256 of the entry before them, where the caller has read it.
        """
        return self._read(start, self.head(), after)

    def checkpoint(self, extensions: Sequence[str] = ()) -> Checkpoint:
        """Write a signed checkpoint over all entries; `extensions` are further lines, such as `digest_line(…)` gives.

        Raises:
            UsageError: no private key, or a line that cannot be.
            ProofError: the entries do not continue what the last checkpoint covered.
        """
        lines = check_extensions(extensions)
        with self._mutex:
            last = self.latest_checkpoint()
            self._refresh()
            edge = self._advance_edge(last)
            at_us = max(clock.now_us(), last.at_us + 1 if last and last.size == edge.size else 0)
            own = [f"at {at_us}"]
            if edge.size:
                own.append("frontier " + base64.b64encode(b"".join(edge.hashes)).decode())
            if last:
                own.append(f"previous {base64.b64encode(sha256(last.data).digest()).decode()} {last.key.removeprefix(CHECKPOINTS)}")
            signer = self._keys.private(self._chain.at(edge.size))
            made = make_checkpoint(signer, TreeHead(self.origin, edge.size, edge.root(), (*lines, *own)), at_us=at_us)
            self.store.create(made.key, made.data, lock=self._lock())
            self._newest = made
            crash_point("ledger.checkpointed")
            return made

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint (largest size, then time), or None while there is none."""
        with self._mutex:
            if self._newest is None:
                self._refresh()
            key = self._newest_key(self._newest.key if self._newest else None)
            if key is not None and (self._newest is None or key > self._newest.key):
                self._newest = self.read_checkpoint(key, self.store.get(key))
            return self._newest

    def read_checkpoint(self, key: str | None, data: bytes) -> Checkpoint:
        """A checkpoint of this ledger, or a copy of one that was kept elsewhere (`key` is None).

        Raises:
            ProofError: it is not, or not signed by the key that was in force.
        """
        with self._mutex:
            self._learn(checkpoint_size(data))
            return self._chain.read_checkpoint(key, data, self.origin)

    def chain(self) -> KeyChain:
        """The keys up to the newest entry.

        Raises:
            ProofError: the newest entry is not signed by a key that follows from the first one.
        """
        with self._mutex:
            self._refresh()
            self._learn(self._size)
            return self._chain

    def inclusion_proof(self, sequence: int, size: int) -> list[bytes]:
        """Proof that entry `sequence` is in the tree of `size` entries. Raises `ValueError` for numbers that cannot be."""
        return self._grown_tree(size).inclusion_proof(sequence, size)

    def consistency_proof(self, size1: int, size2: int) -> list[bytes]:
        """Proof that the tree of `size2` entries begins with that of `size1`. Raises `ValueError` for numbers that cannot be."""
        return self._grown_tree(size2).consistency_proof(size1, size2)

    def root(self, size: int) -> bytes:
        """Root of the first `size` entries."""
        return self._grown_tree(size).root(size)

    # How it is done.

    @property
    def verifier(self) -> Verifier:
        """The first public key."""
        return self._chain.trusted[0]

    def _checked(self, entry: Entry) -> Entry:
        """An entry, signed by the key that was in force when it was written."""
        with self._mutex:
            try:
                self._chain = self._chain.check(entry, self.origin)
            except UnsignedNote:
                self._learn(entry.sequence)
                self._chain = self._chain.check(entry, self.origin)
        return entry

    def _learn(self, end: int) -> None:
        """Meet the entries before `end` that hand over to another key; what one key signed stands together, so halving finds them."""
        while (turn := self._turn(self._chain.last.number + 1, end)) is not None:
            before, self._chain = self._chain, self._chain.check(turn, self.origin)
            if self._chain is before:
                return

    def _turn(self, start: int, end: int) -> Entry | None:
        """The first entry from `start` to before `end` that hands over to another key, if all entries up to it are by the last one."""

        def read(number: int) -> Entry:
            return decode_entry(number, self.store.get(entry_key(number)))

        def handed(number: int) -> bool:
            return (found := read(number)).key_id != self._chain.last.key.key_id or found.type == ROTATED

        try:
            if start >= end or not handed(end - 1):
                return None
            first = bisect_left(range(start, end), True, key=handed) + start
            found = read(first)
        except KeyError:
            return None  # an entry that is missing: who reads it will say so
        return found if found.type in (ROTATED, LOST) else None

    def _lock(self) -> Lock:
        return Lock("compliance", clock.now() + timedelta(days=self._lock_days)) if self._lock_days else NO_LOCK

    def _settle(self, type: str, body: Mapping[str, Any]) -> Entry | None:
        """Finish an append whose answer was lost, when this is the same one again: sending equal bytes is safe."""
        entry = self._unsure
        if entry is None or entry.type != type or canonical(entry.body) != canonical(body):
            return None
        return entry if self._create(entry) else None

    def _create(self, entry: Entry) -> bool:
        """Create an entry's object; False when the number is taken."""
        self._unsure = entry
        try:
            self.store.create(entry.key, entry.data, lock=self._lock())
        except AlreadyExists:
            self._unsure = None
            return False
        except StoreUnavailable:
            raise
        except BaseException:
            self._unsure = None
            raise
        self._unsure = None
        self._accept(entry)
        crash_point("ledger.appended")
        return True

    def _accept(self, entry: Entry) -> None:
        if entry.sequence < self._size:
            return
        self._size, self._tip = entry.sequence + 1, entry
        self._chain = self._chain.check(entry, self.origin)
        if self._edge is not None and self._edge.size == entry.sequence:
            self._edge.append(leaf_hash(entry.data))

    def _previous(self) -> str | None:
        """SHA-256 of the last entry, read and checked when this instance did not write it."""
        if self._size == 0:
            self._refresh()
        if self._size and (self._tip is None or self._tip.sequence != self._size - 1):
            self._tip = self._checked(self._decoded(self._size - 1))
        return self._tip.sha256 if self._size and self._tip else None

    def _refresh(self) -> None:
        """Find how many entries there are: one HEAD when nobody appended, else about two for each doubling."""
        if not self._exists(self._size):
            return
        low, step = self._size, 1
        while self._exists(low + step):
            low, step = low + step, step * 2
        high = low + step  # does not exist; `low` does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._exists(middle) else (low, middle)
        self._size = high

    def _exists(self, sequence: int) -> bool:
        return self.store.head(entry_key(sequence)) is not None

    def _read(self, start: int, end: int, before: str | None = None) -> Iterator[Entry]:
        with ThreadPoolExecutor(READERS) as pool:
            for first in range(start, end, BATCH):
                for found in pool.map(self._decoded, range(first, min(first + BATCH, end))):
                    entry = self._checked(found)
                    follows = entry.previous == before if before else (entry.previous is None) == (entry.sequence == 0)
                    if not follows:
                        raise _broken(f"entry {entry.sequence} does not follow the one before it")
                    yield entry
                    before = entry.sha256

    def _decoded(self, sequence: int) -> Entry:
        """An entry whose signature is not checked yet."""
        try:
            return decode_entry(sequence, self.store.get(entry_key(sequence)))
        except KeyError:
            raise _broken(f"entry {sequence} is missing") from None

    def _advance_edge(self, last: Checkpoint | None) -> CompactRange:
        """The tree's right edge over all entries, which must continue the last checkpoint."""
        if last and last.size > self._size:
            raise _broken(f"the last checkpoint covers {last.size} entries and only {self._size} stand")
        if self._edge is None:
            self._edge = _edge_of(last) if last else CompactRange()
        for entry in self._read(self._edge.size, self._size):
            self._match(last)
            self._edge.append(leaf_hash(entry.data))
        self._match(last)
        return self._edge

    def _match(self, last: Checkpoint | None) -> None:
        if last and self._edge and self._edge.size == last.size and self._edge.root() != last.head.root:
            raise _broken(f"the entries are not those that the checkpoint over {last.size} covered")

    def _grown_tree(self, size: int) -> Tree:
        with self._mutex:
            if size > self._size:
                self._refresh()
            for entry in self._read(len(self._tree), min(size, self._size)):
                self._tree.append(leaf_hash(entry.data))
            return self._tree

    def _newest_key(self, known: str | None) -> str | None:
        """Key of the newest checkpoint after `known`. Looks back in growing steps, since a listing only runs forwards."""
        for start in [known] if known else self._look_back():
            newest = None
            for info in self.store.list(CHECKPOINTS, start_after=start):
                newest = info.key if is_checkpoint(info.key) else newest
            if newest is not None:
                return newest
        return None

    def _look_back(self) -> Iterator[str]:
        now = clock.now_us()
        for window in _LOOK_BACK_US:
            yield f"{CHECKPOINTS}{self._size:012d}-{now - window:016d}"
        step = 0
        while step < self._size:
            yield f"{CHECKPOINTS}{self._size - step:012d}"
            step = step * 2 or 1
        yield ""


def _edge_of(checkpoint: Checkpoint) -> CompactRange:
    """The right edge that a checkpoint carries, held against its root."""
    try:
        packed = base64.b64decode(checkpoint.line("frontier") or "", validate=True)
        edge = CompactRange(checkpoint.size, [packed[i : i + HASH_BYTES] for i in range(0, len(packed), HASH_BYTES)])
    except ValueError as error:
        raise _broken(f"the checkpoint {checkpoint.key} carries no usable frontier") from error
    if edge.root() != checkpoint.head.root:
        raise _broken(f"frontier and root of the checkpoint {checkpoint.key} differ")
    return edge


def _broken(fault: str) -> ProofError:
    return ProofError(fault, operation="read ledger", place="ledger", hint="run `tokentape verify` to see what was changed")
