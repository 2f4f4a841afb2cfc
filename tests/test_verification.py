"""Verification finds whatever was changed, removed or never signed, on copies, with the public key alone."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lifecycle.verification import StoreCopy, Verification, Verified
from schemas.events import VerificationFinished
from schemas.registry import SchemaRegistry
from schemas.settings import ColdSettings, Settings
from store import digest
from store.catalog import Catalog
from store.ledger.entry import decode_entry, make_entry
from store.ledger.note import Signer, Verifier
from store.stored_schemas import fetch_schema
from tests.eventgen import conversation
from tests.indexed import offsets
from tests.program import Program
from tests.tiered import Sink, Tiered, alter, tiered

DAYS = ("2026-11-01", "2026-11-02", "2026-11-03")


@dataclass(frozen=True)
class Copy:
    """A copy of an object store with three tiered days, and the key."""

    root: Path
    verifier: Verifier

    def verify(self) -> Verified:
        """Verify everything in the copy."""
        objects = StoreCopy(self.root)
        return Verification(objects, self.verifier, SchemaRegistry(partial(fetch_schema, objects))).report()

    def first(self, under: str, number: int = 0) -> Path:
        """A file below a folder, by number in the order of names."""
        return sorted(path for path in (self.root / under).rglob("*") if path.is_file())[number]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    """Three days, tiered one after the other, checkpoints before and after each; duplicates and a broken record among them."""
    data = tmp_path_factory.mktemp("original") / "data"
    with tiered(Settings(data=data, cold=ColdSettings(lock="none"))) as rig:
        for day in DAYS:
            entries = list(conversation(rig.producer, chunks=6))
            broken = entries[0].__class__(entries[0].partition, entries[0].key, b"garbage")
            rig.ingest([*entries, *entries[2:4], broken])
            rig.set_day(day)
            rig.checkpoint()
            rig.tier()
            rig.checkpoint()
        yield Copy(data / "cold", rig.ledger.verifier)


@pytest.fixture
def copy(original: Copy, tmp_path: Path) -> Copy:
    """A copy to be damaged, without what a local store keeps for itself."""
    shutil.copytree(original.root, tmp_path / "copy", ignore=shutil.ignore_patterns(".*"))
    return Copy(tmp_path / "copy", original.verifier)


def test_a_good_copy_is_good(copy: Copy) -> None:
    """All rows and digests are met, nothing is written, and a write-protected copy will do."""
    before = sorted(copy.root.rglob("*"))
    for path in [copy.root, *before]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    found = copy.verify()
    for path in [copy.root, *before]:
        path.chmod(0o755)

    assert found.to_dict() | {"bytes": 0} == {
        "segments": 3,
        "events": 39,
        "covered_offsets": 48,
        "entries": 3,
        "checkpoints": 6,
        "objects": 9,
        "bytes": 0,
        "covered": 3,
        "exit_code": 0,
        "keys": [{"key_id": copy.verifier.key_id, "after_entry": -1, "how": "first"}],
        "findings": [],
        "digests": found.digests,
    }
    assert found.digests > 3
    assert sorted(copy.root.rglob("*")) == before


CLASSES = ("events", "coverage", "schemas", "ledger/entries", "ledger/checkpoints")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("under", CLASSES)
@pytest.mark.parametrize(("damage", "kind", "code"), [(_flip, "modified", 10), (Path.unlink, "missing", 11)])
def test_each_class_of_object(copy: Copy, under: str, damage: Callable[[Path], None], kind: str, code: int) -> None:
    """A flipped bit is modified, a removed object is missing; the finding names the object, and nothing else is accused."""
    victim = copy.first(under)
    damage(victim)
    found = copy.verify()

    assert {(item.kind, item.key) for item in found.findings if item.kind not in ("orphan",)} == {
        (kind, victim.relative_to(copy.root).as_posix())
    }
    assert found.exit_code == code


def test_what_nobody_signed(copy: Copy) -> None:
    """An entry under another key is unsigned, whatever it says."""
    last = decode_entry(2, copy.first("ledger/entries", 2).read_bytes())
    forged = make_entry(Signer(last.origin, bytes(32)), last.origin, sequence=3, previous=last.sha256, type="segments", body=last.body)
    (copy.root / forged.key).write_bytes(forged.data)
    found = copy.verify()

    assert [(item.kind, item.key) for item in found.findings] == [("unsigned", forged.key)]
    assert found.exit_code == 12


def test_a_ledger_that_is_gone_is_missing(copy: Copy) -> None:
    """Segments without any ledger are not good."""
    shutil.rmtree(copy.root / "ledger")

    assert copy.verify().exit_code == 11


@pytest.fixture
def rig(settings_embedded: Settings) -> Iterator[Tiered]:
    """An installation whose index somebody tampers with."""
    with tiered(settings_embedded) as made:
        yield made


def _forge_digest(catalog: Catalog, before: bytes, after: bytes) -> None:
    with contextlib.closing(sqlite3.connect(catalog.path)) as connection, connection:
        done = connection.execute("UPDATE range SET digest_next = ? WHERE digest_next = ?", (after, before))
    assert done.rowcount == 1


def test_rows_changed_before_tiering_contradict_the_checkpoint(rig: Tiered) -> None:
    """Whoever changes index and digests between ingest and tiering is convicted by the digest that was signed at ingest."""
    rig.ingest(list(conversation(rig.producer, chunks=2)))
    rig.checkpoint()
    (shard,) = rig.catalog.snapshot().shards
    (span,) = shard.ranges
    alter(shard, "UPDATE events SET actor = 'somebody else' WHERE kind = 'session_closed'")
    forged = digest.advance(digest.DIGEST_START, digest.record_hashes([value for _, value in sorted(rig.records().items())]))
    _forge_digest(rig.catalog, span.digest_next or b"", forged)
    rig.tier()
    found = rig.verification().report()

    assert [item.kind for item in found.findings] == ["modified"]
    assert found.findings[0].key.startswith("ledger/checkpoints/")
    assert "is not that of the rows" in found.findings[0].detail


def test_records_that_never_were_tiered_are_missing(rig: Tiered) -> None:
    """A shard that vanished from the index leaves offsets in no entry."""
    session = rig.producer.session()
    for _ in range(3):
        rig.ingest(list(conversation(rig.producer, chunks=2, session=session)))
    victim = sorted(rig.catalog.snapshot().shards, key=lambda shard: shard.ranges[0].offset_first)[1]
    with contextlib.closing(sqlite3.connect(rig.catalog.path)) as connection, connection:
        connection.execute("DELETE FROM shard WHERE name = ?", (victim.name,))
    rig.tier()
    found = rig.verification().report()

    assert [(item.kind, item.detail.partition(" of log")[0]) for item in found.findings] == [
        ("missing", f"offsets 9 to 17 of partition {victim.ranges[0].partition}")
    ]


def test_an_entry_that_lies_about_rows(rig: Tiered) -> None:
    """Signed by the right key and with the right objects, but root, coverage or digests are not those of the rows."""
    rig.ingest(list(conversation(rig.producer, chunks=2)))
    rig.tier()
    (entry,) = rig.ledger.entries()
    segment = {**entry.body["segments"][0], "root": "00" * 32}
    span = {**entry.body["coverage"][0], "digest_next": "11" * 32}
    rig.ledger.append("segments", {**entry.body, "segments": [segment]})
    rig.ledger.append("segments", {**entry.body, "coverage": [span]})
    rig.ledger.append("segments", {**entry.body, "coverage": [{**span, "offset_next": span["offset_next"] + 1}]})
    rig.ledger.append("segments", {"objects": []})
    details = [item.detail for item in rig.verification().report().findings]

    assert len(details) == 7
    for words in ("Merkle root", "digest that was taken", "in no run or in two", "does not say what", "in an earlier entry as well"):
        assert any(words in detail for detail in details), words


def test_the_run_is_recorded(rig: Tiered) -> None:
    """A run ends with an event that says what it read and found."""
    rig.ingest(list(conversation(rig.producer, chunks=2)))
    rig.tier()
    _flip(sorted((rig.settings.data / "cold" / "events").rglob("*.parquet"))[0])
    sink = Sink()
    summary = rig.verification().run(sink)
    (event,) = sink.payloads

    assert isinstance(event, VerificationFinished)
    assert (event.outcome, event.entries, event.segments, summary["outcome"]) == ("modified", 1, 0, "modified")
    assert [(pair.key, pair.value.partition(":")[0]) for pair in event.findings] == [("modified", summary["findings"][0].partition(":")[0])]


def test_distributed_verifies_from_the_store_alone(settings_distributed: Settings) -> None:
    """The same over MinIO: 13 events behind one entry."""
    with tiered(settings_distributed) as made:
        made.ingest(list(conversation(made.producer, chunks=6)))
        made.tier()
        made.checkpoint()
        found = made.verification().report()

        assert (found.findings, found.segments, found.events, found.exit_code) == ((), 1, len(offsets(made.log)), 0)


class TestCommand:
    @pytest.fixture
    def program(self, tmp_path: Path) -> Program:
        """A program whose installation has one tiered day."""
        settings = Settings(data=tmp_path / "data")
        with tiered(settings) as made:
            made.ingest(list(conversation(made.producer, chunks=2)))
            made.checkpoint()
            made.tier()
            made.checkpoint()
        return Program(tmp_path, settings)

    def test_verdicts_and_exit_codes(self, program: Program, copy: Copy) -> None:
        """One line per finding, totals, a verdict; the exit code says which, in text and JSON, here and on a copy."""
        good = program.run("verify")
        assert "9 events in 1 segment encoded again" in good.text
        assert "verdict     good: nothing was changed" in good.text

        key = program.folder / "auditor.pub"
        key.write_text(str(copy.verifier) + "\n")
        elsewhere = program.run("verify", "--store", str(copy.root), "--public-key", str(key), "--format", "json")
        assert json.loads(elsewhere.stdout)["outcome"] == "good"

        stranger = program.run("verify", "--public-key", str(key), code=12)
        assert "unsigned" in stranger.text

        segment = sorted((program.settings.data / "cold" / "events").rglob("*.parquet"))[0]
        _flip(segment)
        changed = program.run("verify", code=10)
        assert changed.text.splitlines()[0].startswith("modified           events/tenant=acme/")
        assert "verdict     modified: 1 modified" in changed.text
        assert program.run("verify", "--shallow", code=10).text.splitlines()[0] == changed.text.splitlines()[0]

        segment.unlink()
        assert "missing" in program.run("verify", code=11).text

    def test_what_cannot_be_verified(self, program: Program, tmp_path: Path) -> None:
        """No ledger, no key, no anchor: one line each."""
        (tmp_path / "empty").mkdir()

        assert "there is no ledger" in program.fails("verify", "--store", str(tmp_path / "empty"), code=2)
        assert "public key" in program.fails("verify", "--public-key", str(tmp_path / "none"), code=2)
        assert "anchor" in program.fails("verify", "--anchor", str(tmp_path / "none"), code=2)

    def test_only_the_public_key_is_read(self, program: Program) -> None:
        """An auditor's machine has no private key; none is made either."""
        private = program.settings.data / "keys" / "ledger.key"
        private.unlink()
        program.run("verify")

        assert not private.exists()


def test_a_segment_is_readable_in_the_copy(copy: Copy) -> None:
    """The copy explains itself: plain Parquet beside the schema that wrote its rows."""
    table = pq.read_table(copy.first("events"), partitioning=None)

    assert set(table.column("kind").to_pylist()) >= {"session_opened", "token_chunk"}
