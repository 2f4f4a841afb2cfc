"""What the ledger signs: notes and tree heads against published vectors, keys, and entries."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import SettingsError, UsageError
from store.ledger.entry import canonical, decode_entry, make_entry
from store.ledger.keys import load_or_make, load_public
from store.ledger.note import ModifiedNote, Signer, TreeHead, UnsignedNote, Verifier, open_note, sign_note
from tests.signing import ORIGIN, SIGNER, flip


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
