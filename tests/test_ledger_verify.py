"""The ledger's verifier: whatever is changed, cut off or forged, nothing passes silently."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from store.ledger import Digest, Ledger, digest_line
from store.ledger.entry import ENTRIES, decode_entry, entry_key, make_entry
from store.ledger.note import Signer
from store.ledger.verify import Finding, Report, verify_ledger
from store.objects.local import LocalStore
from tests.signing import ORIGIN, SIGNER, flip, signed_ledger


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
    """Twelve entries, nine of them segments, with five checkpoints."""
    store = LocalStore(tmp_path_factory.mktemp("original"))
    return Copy(store.root, signed_ledger(store))


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
