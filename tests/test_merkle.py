"""Merkle trees against the published vectors: roots, proofs, and every forgery that is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.ledger.merkle import (
    EMPTY_ROOT,
    CompactRange,
    Tree,
    leaf_hash,
    node_hash,
    root_of,
    verify_consistency,
    verify_inclusion,
)
from tests.signing import flip

# The reference tree of the Certificate Transparency tests: data of eight leaves, roots of its first 0 … 8, proofs.
LEAVES = [bytes.fromhex(h) for h in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSION = {
    (0, 1): [],
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
CONSISTENCY = {
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


def tree_of(count: int) -> Tree:
    """A tree over the numbers below `count`."""
    return Tree(b"".join(leaf_hash(b"%d" % n) for n in range(count)))


class TestMerkle:
    """RFC 9162 trees."""

    def test_reference_roots(self) -> None:
        """Every way to compute a root gives the published ones, for each size from 0 to 8."""
        hashes = [leaf_hash(leaf) for leaf in LEAVES]
        tree, edge, grown = Tree(b"".join(hashes)), CompactRange(), Tree()
        edges, growns = [edge.root()], [grown.root()]
        for leaf in hashes:
            edge.append(leaf)
            grown.append(leaf)
            edges.append(edge.root())
            growns.append(grown.root())

        assert [root_of(hashes[:n]).hex() for n in range(9)] == ROOTS
        assert [tree.root(n).hex() for n in range(9)] == ROOTS
        assert [root.hex() for root in edges] == ROOTS
        assert [root.hex() for root in growns] == ROOTS

    def test_reference_proofs(self) -> None:
        """Inclusion and consistency proofs are the published ones, and verify."""
        hashes = [leaf_hash(leaf) for leaf in LEAVES]
        tree = Tree(b"".join(hashes))

        assert {k: [h.hex() for h in tree.inclusion_proof(*k)] for k in INCLUSION} == INCLUSION
        assert {k: [h.hex() for h in tree.consistency_proof(*k)] for k in CONSISTENCY} == CONSISTENCY
        assert all(verify_inclusion(hashes[i], i, n, tree.inclusion_proof(i, n), tree.root(n)) for i, n in INCLUSION)
        assert all(verify_consistency(m, n, tree.root(m), tree.root(n), tree.consistency_proof(m, n)) for m, n in CONSISTENCY)

    def test_all_small_trees(self) -> None:
        """Each leaf of each tree up to 40, and each pair of sizes, has a proof that verifies and one length that is right."""
        tree = tree_of(40)
        for size in range(1, 41):
            for index in range(size):
                proof = tree.inclusion_proof(index, size)
                assert verify_inclusion(leaf_hash(b"%d" % index), index, size, proof, tree.root(size))
                assert not verify_inclusion(leaf_hash(b"%d" % index), index, size, proof[:-1], tree.root(size)) or not proof
            for old in range(size + 1):
                proof = tree.consistency_proof(old, size)
                assert verify_consistency(old, size, tree.root(old), tree.root(size), proof)
                assert not verify_consistency(old, size, tree.root(old), tree.root(size), [*proof, bytes(32)])

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_forged_inclusion_is_refused(self, data: st.DataObject) -> None:
        """No change of leaf, position, size, proof or root of a good proof verifies."""
        size = data.draw(st.integers(1, 200))
        index = data.draw(st.integers(0, size - 1))
        tree, leaf = tree_of(size), leaf_hash(b"%d" % index)
        proof, root = tree.inclusion_proof(index, size), tree.root(size)
        how = data.draw(st.sampled_from(["leaf", "index", "proof", "drop", "add", "swap", "root", "node"]))
        if how == "leaf":
            leaf = flip(leaf, data.draw(st.integers(0, 255)))
        elif how == "index":
            other = data.draw(st.integers(-3, size + 3))
            if other == index:
                return
            index = other
        elif how == "node":  # an inner node offered as a leaf: the second-preimage attack that prefixes prevent
            leaf = node_hash(leaf, proof.pop(0)) if proof else flip(leaf, 0)
            index //= 2
            size = (size + 1) // 2
            leaf = leaf_hash(leaf)
        elif how == "root":
            root = flip(root, data.draw(st.integers(0, 255)))
        else:
            proof = forged(proof, how, data)
            if proof == tree.inclusion_proof(index, size):
                return

        assert not verify_inclusion(leaf, index, size, proof, root)

    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_forged_consistency_is_refused(self, data: st.DataObject) -> None:
        """No change of proof or roots of a good consistency proof verifies, nor does a rewritten history."""
        size = data.draw(st.integers(2, 200))
        old = data.draw(st.integers(1, size))
        tree = tree_of(size)
        proof, before, after = tree.consistency_proof(old, size), tree.root(old), tree.root(size)
        how = data.draw(st.sampled_from(["proof", "drop", "add", "swap", "before", "after", "history"]))
        if how == "history":
            rewritten = data.draw(st.integers(0, old - 1))
            other = Tree(b"".join(leaf_hash(b"x" if n == rewritten else b"%d" % n) for n in range(size)))
            proof, after = other.consistency_proof(old, size), other.root(size)
        elif how == "before":
            before = flip(before, data.draw(st.integers(0, 255)))
        elif how == "after":
            after = flip(after, data.draw(st.integers(0, 255)))
        else:
            proof = forged(proof, how, data)
            if proof == tree.consistency_proof(old, size):
                return

        assert not verify_consistency(old, size, before, after, proof)

    def test_wrong_numbers(self) -> None:
        """Proofs for leaves and sizes that do not exist are refused when asked for and when verified."""
        tree = tree_of(5)
        with pytest.raises(ValueError, match="leaf 5 is not in"):
            tree.inclusion_proof(5, 5)
        with pytest.raises(ValueError, match="no tree of 6"):
            tree.inclusion_proof(0, 6)
        with pytest.raises(ValueError, match="does not come before"):
            tree.consistency_proof(4, 3)

        assert not verify_inclusion(bytes(32), 5, 5, [], bytes(32))
        assert not verify_consistency(3, 2, bytes(32), bytes(32), [])
        assert not verify_consistency(2, 5, bytes(32), bytes(32), [b"short"])
        assert verify_consistency(0, 5, EMPTY_ROOT, tree.root(5), [])

    def test_compact_range_goes_on_from_its_hashes(self) -> None:
        """A range made again from size and hashes continues the tree; one with the wrong number of hashes is refused."""
        edge = CompactRange()
        for n in range(70):
            edge = CompactRange(edge.size, edge.hashes)
            edge.append(leaf_hash(b"%d" % n))

        assert edge.root() == tree_of(70).root()
        with pytest.raises(ValueError, match="complete subtrees"):
            CompactRange(3, [bytes(32)])


def forged(proof: list[bytes], how: str, data: st.DataObject) -> list[bytes]:
    """A proof with one change; the same proof where it is too short for that."""
    changed = list(proof)
    where = data.draw(st.integers(0, max(0, len(proof) - 1)))
    if how == "add":
        changed.insert(where, data.draw(st.sampled_from([*proof, bytes(32)])))
    elif proof and how == "drop":
        del changed[where]
    elif proof and how == "proof":
        changed[where] = flip(changed[where], data.draw(st.integers(0, 255)))
    elif len(proof) > 1:
        changed[where], changed[where - 1] = changed[where - 1], changed[where]
    return changed
