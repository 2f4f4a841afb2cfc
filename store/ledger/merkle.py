"""Merkle trees of RFC 9162 (section 2.1): roots, inclusion and consistency proofs, and their verifiers.

Hashes are 32-byte SHA-256. Leaves are hashed under the prefix 0x00 and nodes under 0x01, so that neither can pass for
the other. Verifiers return a bool and never raise on a forged proof.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()  # the root of a tree without leaves


def leaf_hash(data: bytes) -> bytes:
    """Hash of one leaf's data."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash of two neighbouring subtrees."""
    return sha256(b"\x01" + left + right).digest()


def root_of(leaf_hashes: Iterable[bytes]) -> bytes:
    """Root over leaf hashes in order."""
    return root_of_packed(b"".join(leaf_hashes))


def root_of_packed(leaf_hashes: bytes) -> bytes:
    """Root over leaf hashes that stand one after another, 32 bytes each: about a second for a million.

    Level by level: hashing neighbours and carrying an odd last one up unchanged is the tree of the RFC.

    Raises:
        ValueError: the length is not a multiple of 32.
    """
    if len(leaf_hashes) % HASH_BYTES:
        raise ValueError(f"{len(leaf_hashes)} bytes are not a whole number of 32-byte hashes")
    level = leaf_hashes
    while len(level) > HASH_BYTES:
        odd = level[-HASH_BYTES:] if len(level) % (2 * HASH_BYTES) else b""
        level = _level_above(level) + odd
    return level or EMPTY_ROOT


class CompactRange:
    """The right edge of a growing tree: at most log2(n) hashes give its root and take the next leaf.

    `hashes` are the roots of the complete subtrees, largest first, one for each 1 bit of `size`.
    """

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        if size.bit_count() != len(hashes) or any(len(h) != HASH_BYTES for h in hashes):
            raise ValueError(f"a tree of {size} leaves has {size.bit_count()} complete subtrees, not {len(hashes)}")
        self.size = size
        self.hashes = list(hashes)

    def append(self, leaf: bytes) -> None:
        """Add one leaf hash."""
        self.hashes.append(leaf)
        size = self.size
        while size & 1:
            right, left = self.hashes.pop(), self.hashes.pop()
            self.hashes.append(node_hash(left, right))
            size >>= 1
        self.size += 1

    def root(self) -> bytes:
        """Root of the tree so far."""
        if not self.hashes:
            return EMPTY_ROOT
        root = self.hashes[-1]
        for left in reversed(self.hashes[:-1]):
            root = node_hash(left, root)
        return root


class Tree:
    """A tree in memory (64 bytes a leaf) that gives roots and proofs for every size it ever had."""

    def __init__(self, leaf_hashes: bytes = b"") -> None:
        """From leaf hashes that stand one after another, 32 bytes each."""
        if len(leaf_hashes) % HASH_BYTES:
            raise ValueError(f"{len(leaf_hashes)} bytes are not a whole number of 32-byte hashes")
        self._levels = [bytearray(leaf_hashes)]  # level k: hashes of the complete subtrees of 2**k leaves
        while len(self._levels[-1]) >= 2 * HASH_BYTES:
            self._levels.append(bytearray(_level_above(self._levels[-1])))

    def __len__(self) -> int:
        return len(self._levels[0]) // HASH_BYTES

    def append(self, leaf: bytes) -> None:
        """Add one leaf hash."""
        if len(leaf) != HASH_BYTES:
            raise ValueError("a leaf hash has 32 bytes")
        self._levels[0] += leaf
        level = 0
        while len(self._levels[level]) % (2 * HASH_BYTES) == 0:
            if level + 1 == len(self._levels):
                self._levels.append(bytearray())
            self._levels[level + 1] += sha256(b"\x01" + self._levels[level][-2 * HASH_BYTES :]).digest()
            level += 1

    def root(self, size: int | None = None) -> bytes:
        """Root of the first `size` leaves (all of them by default)."""
        size = self._checked(len(self) if size is None else size)
        return self._subtree(0, size) if size else EMPTY_ROOT

    def inclusion_proof(self, index: int, size: int | None = None) -> list[bytes]:
        """Audit path of leaf `index` in the tree of `size` leaves (RFC 9162, 2.1.3.1).

        Raises:
            ValueError: no such leaf or size.
        """
        size = self._checked(len(self) if size is None else size)
        if not 0 <= index < size:
            raise ValueError(f"leaf {index} is not in a tree of {size}")
        return self._path(index, 0, size)

    def consistency_proof(self, size_old: int, size: int | None = None) -> list[bytes]:
        """Proof that the tree of `size` leaves begins with that of `size_old` (RFC 9162, 2.1.4.1).

        Raises:
            ValueError: no such sizes.
        """
        size = self._checked(len(self) if size is None else size)
        if not 0 <= size_old <= size:
            raise ValueError(f"a tree of {size_old} leaves does not come before one of {size}")
        return self._subproof(size_old, 0, size, whole=True) if 0 < size_old < size else []

    def _checked(self, size: int) -> int:
        if not 0 <= size <= len(self):
            raise ValueError(f"no tree of {size} leaves: there are {len(self)}")
        return size

    def _subtree(self, low: int, high: int) -> bytes:
        """Root over leaves [low, high), where `low` is a multiple of the largest power of two that fits."""
        count = high - low
        if count & (count - 1) == 0:
            level = count.bit_length() - 1
            start = (low >> level) * HASH_BYTES
            return bytes(self._levels[level][start : start + HASH_BYTES])
        middle = low + _split(count)
        return node_hash(self._subtree(low, middle), self._subtree(middle, high))

    def _path(self, index: int, low: int, high: int) -> list[bytes]:
        if high - low == 1:
            return []
        middle = low + _split(high - low)
        if index < middle:
            return [*self._path(index, low, middle), self._subtree(middle, high)]
        return [*self._path(index, middle, high), self._subtree(low, middle)]

    def _subproof(self, size_old: int, low: int, high: int, *, whole: bool) -> list[bytes]:
        """Proof for the old tree's end `size_old` within leaves [low, high); `whole`: that subtree is the old tree itself."""
        if size_old == high:
            return [] if whole else [self._subtree(low, high)]
        middle = low + _split(high - low)
        if size_old <= middle:
            return [*self._subproof(size_old, low, middle, whole=whole), self._subtree(middle, high)]
        return [*self._subproof(size_old, middle, high, whole=False), self._subtree(low, middle)]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether `proof` shows the leaf hash at `index` of the tree with `size` leaves and `root` (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size or any(len(h) != HASH_BYTES for h in (leaf, root, *proof)):
        return False
    fn, sn, computed = index, size - 1, leaf
    for sibling in proof:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            computed = node_hash(sibling, computed)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            computed = node_hash(computed, sibling)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and computed == root


def verify_consistency(size_old: int, size: int, root_old: bytes, root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether `proof` shows that the tree of `size` leaves begins with that of `size_old` (RFC 9162, 2.1.4.2)."""
    if not 0 <= size_old <= size or any(len(h) != HASH_BYTES for h in (root_old, root, *proof)):
        return False
    if size_old == 0:
        return not proof and root_old == EMPTY_ROOT and (size > 0 or root == EMPTY_ROOT)
    if size_old == size:
        return not proof and root_old == root
    path = [root_old, *proof] if size_old & (size_old - 1) == 0 else list(proof)
    if not path:
        return False
    fn, sn = size_old - 1, size - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    computed_old = computed = path[0]
    for sibling in path[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            computed_old, computed = node_hash(sibling, computed_old), node_hash(sibling, computed)
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            computed = node_hash(computed, sibling)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and computed_old == root_old and computed == root


def _level_above(level: bytes | bytearray) -> bytes:
    """Hashes of the complete pairs of one level."""
    pair = 2 * HASH_BYTES
    return b"".join([sha256(b"\x01" + level[i : i + pair]).digest() for i in range(0, len(level) - pair + 1, pair)])


def _split(count: int) -> int:
    """The largest power of two below `count` (at least 2)."""
    return 1 << ((count - 1).bit_length() - 1)
