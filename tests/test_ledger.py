"""The ledger: Merkle trees and notes against published vectors, appending under faults, and a verifier that misses nothing."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from schemas.errors import AlreadyExists, ProofError, SettingsError, StoreUnavailable, UsageError
from schemas.settings import ColdSettings, Settings
from store.ledger import Digest, Ledger, digest_line, open_ledger
from store.ledger.chain import KeyChain
from store.ledger.entry import CHECKPOINTS, ENTRIES, canonical, decode_entry, entry_key, make_entry
from store.ledger.keys import load_or_make, load_public
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
from store.ledger.note import ModifiedNote, Signer, TreeHead, UnsignedNote, Verifier, open_note, sign_note
from store.ledger.verify import Finding, Report, verify_ledger
from store.objects import open_store
from store.objects.base import NO_LOCK, Lock, ObjectStore
from store.objects.local import LocalStore
from tests.flaky_proxy import Proxy

ORIGIN = "example.org/ledger"
SIGNER = Signer(ORIGIN, bytes(range(32)))

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


LINES = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=30)


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


def flip(data: bytes, bit: int) -> bytes:
    """The bytes with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


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


class TestNote:
    """C2SP signed notes and checkpoints."""

    # From the documentation of golang.org/x/mod/sumdb/note.
    PRIVATE = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
    PUBLIC = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
    SIGNATURE = "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"

    def test_reference_note(self) -> None:
        """The documented key signs the documented text to the documented note, and opens it."""
        signer, verifier = Signer.parse(self.PRIVATE), Verifier.parse(self.PUBLIC)
        note = sign_note(self.TEXT, signer)

        assert note.decode() == self.TEXT + "\n" + self.SIGNATURE
        assert open_note(note, verifier) == self.TEXT
        assert (signer.verifier, str(verifier), signer.secret) == (verifier, self.PUBLIC, self.PRIVATE)

    def test_other_signatures_are_passed_over(self) -> None:
        """A cosigned note opens with each of its keys and with no other."""
        other = Signer("EnochRoot", bytes(32))
        note = sign_note(self.TEXT, Signer.parse(self.PRIVATE)) + sign_note(self.TEXT, other).split(b"\n\n")[1]

        assert open_note(note, other.verifier) == self.TEXT
        assert open_note(note, Verifier.parse(self.PUBLIC)) == self.TEXT
        with pytest.raises(UnsignedNote):
            open_note(note, SIGNER.verifier)

    def test_every_flipped_bit_is_found(self) -> None:
        """A checkpoint with any one bit changed does not open."""
        verifier = SIGNER.verifier
        note = sign_note(TreeHead(ORIGIN, 3, bytes(32), ("digest log 0 7 x",)).to_text(), SIGNER)
        for bit in range(len(note) * 8):
            try:
                text = open_note(flip(note, bit), verifier)
            except (ModifiedNote, UnsignedNote):
                continue
            pytest.fail(f"bit {bit} passed: {text!r}")

    def test_malformed_notes(self) -> None:
        """What is not a note is refused as such, whatever it is."""
        good = sign_note("text\n", SIGNER)
        for bad in (
            b"",
            b"\n\n",
            good[:-1],
            good + b"\n",
            good.replace(b"\n\n", b"\n"),
            b"\xff" + good,
            b"\r" + good,
            good + b"junk\n",
            b"x" * 10_000,
        ):
            with pytest.raises((ModifiedNote, UnsignedNote)):
                open_note(bad, SIGNER.verifier)

    @settings(max_examples=100, deadline=None)
    @given(
        st.integers(0, 2**63 - 1),
        st.binary(min_size=32, max_size=32),
        st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1)),
    )
    def test_tree_heads_round_trip(self, size: int, root: bytes, lines: list[str]) -> None:
        """A tree head reads back from its text; what cannot be a line is refused on writing."""
        head = TreeHead(ORIGIN, size, root, tuple(lines))

        assert TreeHead.from_text(head.to_text()) == head

    def test_what_no_checkpoint_is(self) -> None:
        """Sizes with a leading zero or sign, short roots and empty lines are refused."""
        root = base64.b64encode(bytes(32)).decode()
        for text in (
            "",
            "o\n",
            f"o\n01\n{root}\n",
            f"o\n-1\n{root}\n",
            f"o\n1\n{root[:-4]}\n",
            f"o\n1\n{root}",
            f"o\n1\n{root}\n\nx\n",
            f"\n1\n{root}\n",
        ):
            with pytest.raises(ModifiedNote):
                TreeHead.from_text(text)
        for line in ("", "a\nb", "tab\t"):
            with pytest.raises(UsageError):
                TreeHead(ORIGIN, 0, bytes(32), (line,)).to_text()

    def test_bad_keys(self) -> None:
        """Keys with a wrong hash, form or type are refused, and the message never quotes a private key."""
        for text in (
            "",
            "a+b",
            self.PUBLIC[:-4],
            self.PUBLIC.replace("c74f", "c74e"),
            self.PUBLIC.replace("+ARp", "+BRp"),
            "bad name" + self.PUBLIC,
        ):
            with pytest.raises(UsageError):
                Verifier.parse(text)
        with pytest.raises(UsageError) as caught:
            Signer.parse(self.PRIVATE.replace("c74f", "c74e"))

        assert "AYEKFALV" not in str(caught.value)
        assert "AYEKFALV" not in repr(Signer.parse(self.PRIVATE))


class TestKeys:
    """The key files."""

    def test_made_once(self, tmp_path: Path) -> None:
        """The first call makes the key, later ones load it; the private file is its owner's alone."""
        first = load_or_make(tmp_path / "keys", ORIGIN)
        again = load_or_make(tmp_path / "keys", ORIGIN)

        assert again == first
        assert (tmp_path / "keys/ledger.key").stat().st_mode & 0o777 == 0o600
        assert load_public(tmp_path / "keys/ledger.pub").trusted == (first.verifier,)
        assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["ledger.key", "ledger.pub"]

    def test_many_at_once_get_one_key(self, tmp_path: Path) -> None:
        """Whoever starts at the same time ends with the same key."""
        barrier = threading.Barrier(8)

        def load(_: int) -> Signer:
            barrier.wait()
            return load_or_make(tmp_path / "keys", ORIGIN)

        with ThreadPoolExecutor(8) as pool:
            assert len({signer.secret for signer in pool.map(load, range(8))}) == 1

    def test_unusable_keys(self, tmp_path: Path) -> None:
        """A key that others may read, a damaged one and one of another name are refused with a hint and left as they are."""
        load_or_make(tmp_path, ORIGIN)
        path = tmp_path / "ledger.key"
        path.chmod(0o644)
        with pytest.raises(SettingsError, match="others may read"):
            load_or_make(tmp_path, ORIGIN)
        path.chmod(0o600)
        with pytest.raises(SettingsError, match="belongs to"):
            load_or_make(tmp_path, "example.org/other")
        path.write_text("")
        with pytest.raises(SettingsError, match="no usable key"):
            load_or_make(tmp_path, ORIGIN)

        assert path.read_text() == ""


class TestEntry:
    """The bytes of an entry."""

    def test_canonical_and_signed(self) -> None:
        """An entry is RFC 8785 JSON whose signature is over the same without the signature."""
        sly = ',"signature":"x","type":"y"'
        entry = make_entry(SIGNER, ORIGIN, sequence=0, previous=None, type=sly, body={"b": 1.0, "a": "ü", sly: sly})
        document = json.loads(entry.data)
        signature = base64.b64decode(document.pop("signature"))

        assert b'"a":"\xc3\xbc","b":1},"id":"' in entry.data
        assert entry.signed == canonical(document)
        assert SIGNER.verifier.verify(canonical(document), signature)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", document["recorded_at"])
        assert decode_entry(0, entry.data) == entry

    def test_every_flipped_bit_is_found(self) -> None:
        """An entry with any one bit changed is no entry of this ledger."""
        entry = make_entry(SIGNER, ORIGIN, sequence=0, previous=None, type="t", body={"n": 1})
        for bit in range(len(entry.data) * 8):
            with pytest.raises((ModifiedNote, UnsignedNote)):
                decode_entry(0, flip(entry.data, bit)).check(SIGNER.verifier, ORIGIN)

    @pytest.mark.parametrize("body", [{"n": 2**53}, {"x": float("nan")}, {"s": "\ud800"}, {"o": object()}])
    def test_no_canonical_json(self, body: Mapping[str, Any]) -> None:
        """What has no canonical JSON is refused before anything is signed."""
        with pytest.raises(UsageError, match="no canonical JSON"):
            make_entry(SIGNER, ORIGIN, sequence=0, previous=None, type="t", body=body)

    @pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b"{", b"\xff\xfe{\0}\0", b"[" * 100_000, b"1" * 10_000])
    def test_no_entry(self, data: bytes) -> None:
        """Bytes that are no entry are refused as such, whatever they are."""
        with pytest.raises(ModifiedNote):
            decode_entry(0, data)

    def test_other_ledgers_entries(self) -> None:
        """An entry of another key is unsigned, one of the same key under another origin is foreign."""
        foreign = make_entry(SIGNER, "example.org/other", sequence=0, previous=None, type="t", body={})
        stranger = make_entry(Signer(ORIGIN, bytes(32)), ORIGIN, sequence=0, previous=None, type="t", body={})
        with pytest.raises(ModifiedNote, match="belongs to"):
            foreign.check(SIGNER.verifier, ORIGIN)
        with pytest.raises(UnsignedNote):
            stranger.check(SIGNER.verifier, ORIGIN)


class LostReplies:
    """A store whose `create` succeeds and then raises, as often as `lose` says."""

    def __init__(self, store: ObjectStore, lose: int = 0) -> None:
        self._store = store
        self.lose = lose

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def create(self, key: str, data: bytes, *, lock: Lock = NO_LOCK) -> None:
        self._store.create(key, data, lock=lock)
        if self.lose:
            self.lose -= 1
            raise StoreUnavailable("the reply was lost", operation="create", place=key)


APPENDER = """
import sys
from pydantic import SecretStr
from pathlib import Path
from schemas.settings import ColdSettings
from store.ledger import Ledger
from store.ledger.note import Signer
from store.objects import open_store
cold, data, writer, count = ColdSettings.model_validate_json(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
cold = cold.model_copy(update={"secret_key": SecretStr(sys.argv[5])})
ledger = Ledger(open_store(cold, data), Signer("example.org/ledger", bytes(range(32))), "example.org/ledger")
for n in range(count):
    ledger.append("news", {"writer": writer, "n": n})
"""


class LedgerCase:
    """What the ledger does on every store."""

    @pytest.fixture
    def cold(self) -> ColdSettings:
        raise NotImplementedError

    @pytest.fixture
    def store(self, cold: ColdSettings, tmp_path: Path) -> ObjectStore:
        return open_store(cold, tmp_path)

    def test_append_and_read(self, store: ObjectStore) -> None:
        """Entries come back in order, chained, from any start, to a reader with the public key alone."""
        ledger = Ledger(store, SIGNER, ORIGIN)
        written = [ledger.append("news", {"n": n}) for n in range(7)]
        reader = Ledger(store, SIGNER.verifier, ORIGIN)

        assert list(reader.entries()) == written
        assert list(reader.entries(5)) == written[5:]
        assert list(reader.entries(9)) == []
        assert reader.head() == 7
        assert [e.previous for e in written] == [None, *(e.sha256 for e in written[:-1])]
        with pytest.raises(UsageError, match="public key"):
            reader.append("news", {})

    def test_checkpoints_and_proofs(self, store: ObjectStore) -> None:
        """Checkpoints cover all entries, carry the digests, follow one another, and proofs verify against them."""
        ledger = Ledger(store, SIGNER, ORIGIN)
        digest = Digest("log-1", 3, 17, sha256(b"x").digest())
        first = ledger.checkpoint()
        entries = [ledger.append("news", {"n": n}) for n in range(5)]
        second = ledger.checkpoint([digest_line(digest)])
        fresh = Ledger(store, SIGNER, ORIGIN)
        entries += [fresh.append("news", {"n": n}) for n in range(5, 8)]
        third = fresh.checkpoint()
        proof = fresh.consistency_proof(second.size, third.size)

        assert [c.size for c in (first, second, third)] == [0, 5, 8]
        assert second.digests == [digest]
        assert ledger.latest_checkpoint() == third == Ledger(store, SIGNER.verifier, ORIGIN).latest_checkpoint()
        assert third.head.root == root_of(leaf_hash(e.data) for e in entries)
        assert verify_consistency(second.size, third.size, second.head.root, third.head.root, proof)
        assert verify_inclusion(leaf_hash(entries[2].data), 2, 8, ledger.inclusion_proof(2, 8), third.head.root)
        size = sum(map(len, [*(e.data for e in entries), first.data, second.data, third.data]))
        assert verify_ledger(store, str(SIGNER.verifier)) == Report(8, 3, 0, size, 8, (), KeyChain.of(SIGNER.verifier))

    def test_a_lost_reply_enters_once(self, store: ObjectStore) -> None:
        """An append whose reply was lost says so, and the same append again finds its entry instead of a second one."""
        flaky = LostReplies(store)
        ledger = Ledger(flaky, SIGNER, ORIGIN)
        ledger.append("news", {"n": 0})
        flaky.lose = 2
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                ledger.append("news", {"n": 1})
        other = Ledger(store, SIGNER, ORIGIN).append("news", {"n": 2})
        again = ledger.append("news", {"n": 1.0})
        last = ledger.append("news", {"n": 1})

        assert [e.body["n"] for e in Ledger(store, SIGNER, ORIGIN).entries()] == [0, 1, 2, 1]
        assert (again.sequence, other.sequence, last.sequence) == (1, 2, 3)

    def test_processes_race(self, cold: ColdSettings, tmp_path: Path, store: ObjectStore) -> None:
        """Processes that append at once lose nothing, and no number is given twice."""
        writers, count = 3, 12
        secret = cold.secret_key.get_secret_value()
        argv = [sys.executable, "-c", APPENDER, cold.model_dump_json(), str(tmp_path)]
        started = [subprocess.Popen([*argv, str(w), str(count), secret], cwd=Path(__file__).parent.parent) for w in range(writers)]
        codes = [process.wait(120) for process in started]
        found = list(Ledger(store, SIGNER.verifier, ORIGIN).entries())

        assert codes == [0] * writers
        assert [entry.sequence for entry in found] == list(range(writers * count))
        for writer in range(writers):
            assert [entry.body["n"] for entry in found if entry.body["writer"] == writer] == list(range(count))
        assert verify_ledger(store, SIGNER.verifier).findings == ()

    def test_threads_share_a_ledger(self, store: ObjectStore) -> None:
        """Threads of one process may append through one instance."""
        ledger = Ledger(store, SIGNER, ORIGIN)
        with ThreadPoolExecutor(8) as pool:
            numbers = [entry.sequence for entry in pool.map(lambda n: ledger.append("news", {"n": n}), range(40))]

        assert sorted(numbers) == list(range(40))

    def test_a_changed_end_is_not_built_upon(self, store: ObjectStore) -> None:
        """A writer that opens a ledger whose last entry was forged, or whose checkpoint covers more, refuses to go on."""
        Ledger(store, SIGNER, ORIGIN).append("news", {"n": 0})
        stranger = make_entry(Signer(ORIGIN, bytes(32)), ORIGIN, sequence=1, previous=None, type="t", body={})
        store.create(stranger.key, stranger.data)
        with pytest.raises(ProofError):
            Ledger(store, SIGNER, ORIGIN).append("news", {"n": 1})
        with pytest.raises(ProofError):
            Ledger(store, SIGNER, ORIGIN).checkpoint()

    def test_a_cut_end_is_not_built_upon(self, store: ObjectStore) -> None:
        """Where a checkpoint covers more entries than stand, no new checkpoint is signed."""
        ledger = Ledger(store, SIGNER, ORIGIN)
        for n in range(3):
            ledger.append("news", {"n": n})
        ledger.checkpoint()
        store.delete(entry_key(2))
        with pytest.raises(ProofError, match="covers 3"):
            Ledger(store, SIGNER, ORIGIN).checkpoint()


class TestLocalLedger(LedgerCase):
    """In a folder."""

    @pytest.fixture
    def cold(self) -> ColdSettings:
        return ColdSettings()

    def test_open_ledger_locks(self, tmp_path: Path) -> None:
        """The installation's ledger has its key under the data directory and locks what it writes."""
        configuration = Settings(data=tmp_path)
        store = open_store(configuration.cold, tmp_path)
        entry = open_ledger(configuration, store).append("news", {})
        again = open_ledger(configuration, store)

        assert [e.key for e in again.entries()] == [entry.key]
        assert json.loads((tmp_path / "cold/.locks" / entry.key).read_bytes())["mode"] == "compliance"

    def test_the_newest_checkpoint_is_found(self, tmp_path: Path) -> None:
        """However old it is and however many entries came after it."""
        store = LocalStore(tmp_path)
        ledger = Ledger(store, SIGNER, ORIGIN)
        for n in range(3):
            ledger.append("news", {"n": n})
        made = ledger.checkpoint()
        for n in range(20):
            ledger.append("news", {"n": n})

        assert Ledger(store, SIGNER, ORIGIN).latest_checkpoint() == made

    def test_own_lines_are_reserved(self, tmp_path: Path) -> None:
        """Callers cannot pass lines that the ledger writes itself, nor a log id with white space."""
        ledger = Ledger(LocalStore(tmp_path), SIGNER, ORIGIN)
        with pytest.raises(UsageError, match="may not begin"):
            ledger.checkpoint(["frontier x"])
        with pytest.raises(UsageError, match="white space"):
            digest_line(Digest("a b", 0, 0, bytes(32)))


class TestMinioLedger(LedgerCase):
    """In a real S3 server."""

    @pytest.fixture
    def cold(self, minio: Any) -> ColdSettings:
        return ColdSettings(
            kind="minio",
            endpoint=minio.endpoint,
            bucket=f"t-{uuid.uuid4().hex[:12]}",
            access_key=minio.access_key,
            secret_key=SecretStr(minio.secret_key),
        )

    def test_a_reply_lost_on_the_wire_enters_once(self, cold: ColdSettings, tmp_path: Path) -> None:
        """The store resolves a lost reply by itself: the append succeeds and there is one entry, locked."""
        with Proxy(cold.endpoint) as proxy:
            store = open_store(cold.model_copy(update={"endpoint": proxy.endpoint}), tmp_path)
            ledger = Ledger(store, SIGNER, ORIGIN, lock_days=1)
            proxy.drop_next_reply_to = b"PUT "
            entry = ledger.append("news", {"n": 0})

            assert (proxy.dropped, entry.sequence, ledger.head()) == (1, 0, 1)
            with pytest.raises(Exception, match="locked"):
                store.delete(entry.key)


@dataclass
class Copy:
    """A ledger with segments on disk, its last checkpoint as the anchor, and a fresh copy for each mutation."""

    root: Path
    anchor: bytes

    def files(self, under: str) -> list[Path]:
        """Files below a folder of the store, in order."""
        return sorted(path for path in (self.root / under).rglob("*") if path.is_file())

    def verify(self, *, anchored: bool = True) -> Report:
        """Verify with the public key alone."""
        return verify_ledger(LocalStore(self.root), str(SIGNER.verifier), anchors=[self.anchor] if anchored else [])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Twelve entries, nine of them segments, with five checkpoints in between and one entry after the last but one."""
    store = LocalStore(tmp_path_factory.mktemp("original"))
    ledger = Ledger(store, SIGNER, ORIGIN)
    log = random.Random(4)
    for n in range(12):
        if n % 4 == 3:
            ledger.append("job", {"n": n})
        else:
            data = log.randbytes(200 + n)
            key = f"events/tenant=a/day=2026-01-0{n % 3 + 1}/standard-{n}-{sha256(data).hexdigest()[:8]}.parquet"
            store.create(key, data)
            ledger.append("segment", {"key": key, "bytes": len(data), "sha256": sha256(data).hexdigest(), "rows": 10})
        if n % 3 == 2:
            ledger.checkpoint([digest_line(Digest("log", 0, n, bytes([n]) * 32))])
    last = ledger.checkpoint([digest_line(Digest("log", 0, 99, bytes(32)))])
    return Copy(store.root, last.data)


@pytest.fixture
def copy(original: Copy, tmp_path: Path) -> Copy:
    """A copy to be damaged."""
    shutil.copytree(original.root, tmp_path / "copy")
    return Copy(tmp_path / "copy", original.anchor)


def rewrite(path: Path, data: bytes) -> None:
    """Put other bytes under a read-only file's name."""
    path.unlink()
    path.write_bytes(data)


def mutate(path: Path, others: list[Path], log: random.Random) -> str:
    """One random change to a file of a class; says which. Every one of them changes the content of some name."""
    data = path.read_bytes()
    how = log.choice(["flip", "byte", "cut", "cut-front", "grow", "space", "empty", "drop", "swap", "replace", "link", "insert"])
    at = log.randrange(len(data))
    other = log.choice([p for p in others if p != path])
    changes: dict[str, Callable[[], bytes]] = {
        "flip": lambda: flip(data, at * 8 + log.randrange(8)),
        "byte": lambda: data[:at] + bytes([data[at] ^ log.randrange(1, 256)]) + data[at + 1 :],
        "cut": lambda: data[:at],
        "cut-front": lambda: data[log.randrange(1, len(data)) :],
        "grow": lambda: data + log.randbytes(log.randrange(1, 9)),
        "space": lambda: data + log.choice([b" ", b"\n", b"\r\n", b"\0"]),
        "empty": lambda: b"",
        "insert": lambda: data[:at] + b"x" + data[at:],
        "replace": other.read_bytes,
    }
    if how == "drop":
        path.unlink()
    elif how == "swap":
        theirs = other.read_bytes()
        rewrite(path, theirs)
        rewrite(other, data)
    elif how == "link":
        path.unlink()
        path.symlink_to(other)
    else:
        rewrite(path, changes[how]())
    return how


class TestVerify:
    """The verifier on damaged copies."""

    def test_good(self, original: Copy) -> None:
        """An untouched ledger has no findings, with and without the anchor."""
        report = original.verify()

        assert (report.entries, report.checkpoints, report.objects, report.covered) == (12, 5, 9, 12)
        assert (report.findings, report.exit_code, original.verify(anchored=False).exit_code) == ((), 0, 0)

    @pytest.mark.parametrize("under", ["ledger/entries", "ledger/checkpoints", "events"])
    def test_nothing_passes_silently(self, copy: Copy, under: str) -> None:
        """Hundreds of random changes to each class of file: every single one is found, and the cure restores silence."""
        log = random.Random(under)
        files = copy.files(under)
        contents = {path: path.read_bytes() for path in files}
        for number in range(150):
            path = log.choice(files)
            how = mutate(path, files, log)
            report = copy.verify()
            expected = {11} if how == "drop" else {10, 12}

            assert report.exit_code in expected, f"change {number}: {how} of {path.name} gave {report}"
            for changed, data in contents.items():
                if changed.is_symlink() or not changed.exists() or changed.read_bytes() != data:
                    changed.unlink(missing_ok=True)
                    changed.write_bytes(data)

        assert copy.verify().exit_code == 0

    def test_a_changed_segment_names_its_object(self, copy: Copy) -> None:
        """A flipped byte in a segment is exactly one finding, at that object."""
        path = copy.files("events")[2]
        rewrite(path, flip(path.read_bytes(), 99))
        report = copy.verify()

        assert [(f.kind, f.key) for f in report.findings] == [("modified", str(path.relative_to(copy.root)))]
        assert report.exit_code == 10

    def test_a_changed_entry_accuses_only_itself(self, copy: Copy) -> None:
        """Neither its successors nor the checkpoints over it are accused; what it named is an orphan."""
        path = copy.root / entry_key(4)
        rewrite(path, path.read_bytes().replace(b'"rows":10', b'"rows":11'))
        kinds = {(f.kind, f.key.split("/")[0]) for f in copy.verify().findings}

        assert kinds == {("modified", "ledger"), ("orphan", "events")}
        assert [f.key for f in copy.verify().findings if f.kind == "modified"] == [entry_key(4)]

    def test_missing_entries_are_one_finding(self, copy: Copy) -> None:
        """A hole in the numbers is named from its first to its last."""
        for number in (5, 6, 7):
            (copy.root / entry_key(number)).unlink()
        found = [f for f in copy.verify().findings if f.kind == "missing"]

        assert [(f.key, f.detail) for f in found] == [(entry_key(5), "entries 5 to 7 are missing")]

    def test_forged_entries_are_unsigned(self, copy: Copy) -> None:
        """An entry added, or one put in another's place, by another key is unsigned; so is any other file in the ledger."""
        stranger = Signer(ORIGIN, bytes(32))
        last = decode_entry(11, (copy.root / entry_key(11)).read_bytes())
        added = make_entry(stranger, ORIGIN, sequence=12, previous=last.sha256, type="t", body={})
        (copy.root / added.key).write_bytes(added.data)
        (copy.root / "ledger/notes.txt").write_bytes(b"x")
        (copy.root / ENTRIES / "12.json").write_bytes(added.data)
        report = copy.verify()

        assert {(f.kind, f.key) for f in report.findings} == {
            ("unsigned", key) for key in (added.key, "ledger/notes.txt", ENTRIES + "12.json")
        }
        assert report.exit_code == 12

    def test_an_entry_far_away(self, copy: Copy) -> None:
        """An entry with an enormous number costs no time; the hole before it is one finding."""
        (copy.root / entry_key(999_999_999_999)).write_bytes((copy.root / entry_key(11)).read_bytes())
        kinds = [f.kind for f in copy.verify().findings]

        assert kinds == ["missing", "modified"]

    def test_a_whole_forged_ledger(self, copy: Copy, tmp_path: Path) -> None:
        """A ledger made anew under another key is unsigned throughout, even with the same name and good checkpoints."""
        store = LocalStore(tmp_path / "forged")
        forger = Ledger(store, Signer(ORIGIN, bytes(32)), ORIGIN)
        forger.append("t", {})
        forger.checkpoint()
        report = verify_ledger(store, SIGNER.verifier)

        assert {f.kind for f in report.findings} == {"unsigned"}
        assert [f.detail.partition("; ")[2] for f in report.findings] == ["and so are 1 more entries and checkpoints"]

    def test_a_rewritten_history_contradicts_the_anchor(self, copy: Copy, tmp_path: Path) -> None:
        """Even the holder of the key cannot rewrite what a checkpoint kept elsewhere covers."""
        store = LocalStore(tmp_path / "rewritten")
        rewriter = Ledger(store, SIGNER, ORIGIN)
        for n in range(20):
            rewriter.append("t", {"n": n})
        rewriter.checkpoint()

        assert verify_ledger(store, SIGNER.verifier).exit_code == 0
        assert verify_ledger(store, SIGNER.verifier, anchors=[copy.anchor]).exit_code == 10

    def test_a_cut_end_needs_the_anchor(self, copy: Copy) -> None:
        """Cutting off the last entries with every checkpoint over them shows against an anchor, and the documentation says only there."""
        for path in copy.files("ledger"):
            number = int(path.name[:12])
            if number > 9 or (number == 9 and "entries" in str(path)):
                path.unlink()
        alone, anchored = copy.verify(anchored=False), copy.verify()

        assert {f.kind for f in alone.findings} == {"orphan"}
        assert anchored.exit_code == 11

    def test_an_anchor_must_be_good(self, copy: Copy) -> None:
        """A damaged anchor is itself a finding."""
        report = verify_ledger(LocalStore(copy.root), SIGNER.verifier, anchors=[flip(copy.anchor, 200)])

        assert [f.key for f in report.findings] == ["anchor"]

    def test_orphans_are_no_failure(self, copy: Copy) -> None:
        """Objects that no entry names are listed and change no exit code; other prefixes are nobody's business."""
        for key in ("events/tenant=a/x.parquet", "schemas/ff.avsc", "probe/y"):
            (copy.root / key).parent.mkdir(parents=True, exist_ok=True)
            (copy.root / key).write_bytes(b"x")
        report = copy.verify()

        assert [(f.kind, f.key) for f in report.findings] == [("orphan", "events/tenant=a/x.parquet"), ("orphan", "schemas/ff.avsc")]
        assert report.exit_code == 0

    def test_erased_with_proof(self, original: Copy, copy: Copy) -> None:
        """An object that a later signed entry erased is listed as that; one erased by nobody is missing."""
        store = LocalStore(copy.root)
        erased, lost = [str(path.relative_to(copy.root)) for path in copy.files("events")[:2]]
        Ledger(store, SIGNER, ORIGIN).append("erasure", {"erased": [erased]})
        store.delete(erased)
        with_proof = copy.verify()
        store.delete(lost)
        worst = copy.verify()

        assert [(f.kind, f.key) for f in with_proof.findings] == [("erased-with-proof", erased)]
        assert (with_proof.exit_code, worst.exit_code) == (0, 11)

    def test_the_worst_decides(self, copy: Copy) -> None:
        """Modified weighs more than missing, and missing more than unsigned."""
        (copy.root / "ledger/x").write_bytes(b"x")
        unsigned = copy.verify().exit_code
        copy.files("events")[0].unlink()
        missing = copy.verify().exit_code
        rewrite(copy.files("events")[0], b"x")

        assert (unsigned, missing, copy.verify().exit_code) == (12, 11, 10)

    def test_segments_are_handed_on(self, original: Copy) -> None:
        """The callback sees each segment whose bytes are right, and what it finds is in the report."""
        seen: list[str] = []

        def check(entry: Any) -> list[Finding]:
            seen.append(entry.body["key"])
            return [Finding("modified", entry.body["key"], "rows")] if len(seen) == 1 else []

        report = verify_ledger(LocalStore(original.root), SIGNER.verifier, check_segment=check)

        assert len(seen) == 9
        assert [(f.key, f.detail) for f in report.findings] == [(seen[0], "rows")]

    def test_other_objects_are_held_too(self, copy: Copy) -> None:
        """Any entry may name objects, one in its body or several under `objects`: a schema that changed is found."""
        store = LocalStore(copy.root)
        schema = b'{"type":"null"}'
        store.create("schemas/aa.avsc", schema)
        named = {"key": "schemas/aa.avsc", "bytes": len(schema), "sha256": sha256(schema).hexdigest()}
        Ledger(store, SIGNER, ORIGIN).append("schemas", {"objects": [named]})
        good = copy.verify().findings
        rewrite(copy.root / "schemas/aa.avsc", b'{"type":"true"}')

        assert good == ()
        assert [(f.kind, f.key) for f in copy.verify().findings] == [("modified", "schemas/aa.avsc")]

    def test_contradicting_digests(self, copy: Copy) -> None:
        """Two checkpoints with different running digests at one offset of a partition cannot both be true."""
        ledger = Ledger(LocalStore(copy.root), SIGNER, ORIGIN)
        ledger.checkpoint([digest_line(Digest("log", 0, 99, bytes([1]) * 32))])
        report = copy.verify()

        assert [f.detail for f in report.findings] == ["two checkpoints give different digests of partition 0 up to 99"]

    def test_a_malformed_segment_entry(self, tmp_path: Path) -> None:
        """A signed segment entry that names no object is a finding, not a crash."""
        store = LocalStore(tmp_path)
        ledger = Ledger(store, SIGNER, ORIGIN)
        ledger.append("segment", {"key": "events/x"})
        ledger.append("t", {"objects": ["x", {"key": "../x", "bytes": 1, "sha256": ""}]})

        assert [f.kind for f in verify_ledger(store, SIGNER.verifier).findings] == ["modified"] * 3

    def test_report_as_json(self, copy: Copy) -> None:
        """The report has a form for machines."""
        os.unlink(copy.files("events")[0])
        report = json.loads(json.dumps(copy.verify().to_dict()))

        assert (report["exit_code"], report["findings"][0]["kind"]) == (11, "missing")


def test_a_taken_number_moves_on(tmp_path: Path) -> None:
    """A writer that fell far behind finds the end again and appends there."""
    store = LocalStore(tmp_path)
    slow, fast = Ledger(store, SIGNER, ORIGIN), Ledger(store, SIGNER, ORIGIN)
    slow.append("news", {"n": 0})
    for n in range(1, 30):
        fast.append("news", {"n": n})
    entry = slow.append("news", {"n": 30})

    assert entry.sequence == 30
    assert [e.body["n"] for e in slow.entries()] == list(range(31))
    with pytest.raises(AlreadyExists):
        store.create(entry.key, b"another")
    assert sorted(info.key for info in store.list(CHECKPOINTS)) == []
