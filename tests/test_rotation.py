"""The ledger's key handed over, lost, stolen and forged: what verification says of each, here and in Go."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from lifecycle.checkpoints import Checkpoints
from lifecycle.proving import Prover
from lifecycle.verification import StoreCopy, Verification, Verified
from schemas.errors import ProofError, SettingsError, UsageError
from schemas.registry import SchemaRegistry
from schemas.settings import ColdSettings, Settings, WitnessSettings
from store.ledger import Ledger, open_ledger
from store.ledger.chain import LOST, ROTATED, KeyChain
from store.ledger.entry import make_entry
from store.ledger.keys import NEXT, PRIVATE, PUBLIC, KeyFolder, load, load_public
from store.ledger.note import Signer
from store.ledger.proof import read_proof
from store.ledger.rotation import begin_again, key_rows, rotate
from store.ledger.witness import Witness, anchors, open_witness
from store.reader import EventReader
from store.stored_schemas import fetch_schema
from tests.eventgen import conversation
from tests.program import Program
from tests.test_proof import checked_by_go, go  # noqa: F401 - the fixture that builds the verifier in Go
from tests.tiered import Tiered, tiered

DAYS = ("2026-11-01", "2026-11-02", "2026-11-03")


def _day(rig: Tiered, day: str) -> bytes:
    """One more day, tiered and signed by the key in force; the checkpoint."""
    rig.ingest(list(conversation(rig.producer, chunks=2)))
    rig.set_day(day)
    ledger = open_ledger(rig.settings, rig.objects)
    rig.tier(ledger=ledger)
    Checkpoints(rig.catalog, ledger).run()
    newest = ledger.latest_checkpoint()
    assert newest is not None
    return newest.data


def _verified(rig: Tiered, chain: KeyChain, kept: tuple[bytes, ...] = ()) -> Verified:
    return Verification(rig.objects, chain, SchemaRegistry(partial(fetch_schema, rig.objects)), kept).report()


def _prover(rig: Tiered) -> Prover:
    ledger = open_ledger(rig.settings, rig.objects)
    return Prover(EventReader(rig.settings, rig.catalog, rig.objects), rig.objects, ledger, rig.registry)


@dataclass(frozen=True)
class Rotated:
    """Three days under three keys, made once; nothing in here changes it."""

    tiered: Tiered
    checkpoints: list[bytes]
    first: KeyChain

    def copy(self, folder: Path) -> Path:
        """Its object store, to be damaged."""
        shutil.copytree(self.tiered.settings.data / "cold", folder, ignore=shutil.ignore_patterns(".*"))
        return folder

    def verify(self, root: Path) -> Verified:
        """With nothing but a copy and the first public key."""
        objects = StoreCopy(root)
        return Verification(objects, self.first, SchemaRegistry(partial(fetch_schema, objects))).report()


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rotated]:
    """Made once."""
    settings = Settings(data=tmp_path_factory.mktemp("rotated") / "data", cold=ColdSettings(lock="none"))
    with tiered(settings) as rig:
        first = load_public(settings.data / "keys" / PUBLIC)
        checkpoints = [_day(rig, DAYS[0])]
        for day in DAYS[1:]:
            rotate(settings, rig.objects)
            checkpoints.append(_day(rig, day))
        yield Rotated(rig, checkpoints, first)


def test_the_first_key_alone_follows_the_chain(deployment: Settings) -> None:
    """Two rotations in either deployment: everything verifies, the witness goes on, and no old private key is left."""
    with tiered(deployment) as rig:
        first, old = load_public(deployment.data / "keys" / PUBLIC), load(deployment.data / "keys")
        kept = [_day(rig, DAYS[0])]
        for day in DAYS[1:]:
            rotate(deployment, rig.objects)
            kept.append(_day(rig, day))
        found = _verified(rig, first, tuple(kept))

        assert (found.findings, found.segments, found.ledger.entries, found.ledger.covered) == ((), 3, 5, 5)
        assert [span.number for span in found.ledger.chain.spans] == [-1, 1, 3]
        assert load_public(deployment.data / "keys" / PUBLIC).trusted == (old.verifier,)
        assert load(deployment.data / "keys").verifier == found.ledger.chain.last.key != old.verifier
        assert [row["how"] for row in key_rows(open_ledger(deployment, rig.objects))] == ["first", "rotated", "rotated"]


def test_the_witness_goes_on(rotated: Rotated, tmp_path: Path) -> None:
    """Copies of checkpoints of different keys continue one another and anchor the verification."""
    store = open_witness(WitnessSettings(kind="folder", folder=tmp_path / "witness"))
    assert store is not None
    store.create(rotated.tiered.ledger.read_checkpoint(None, rotated.checkpoints[0]).key, rotated.checkpoints[0])
    copied = Witness(open_ledger(rotated.tiered.settings, rotated.tiered.objects), store).run()

    assert copied == {"copied": 1, "witnessed": 5}
    assert _verified(rotated.tiered, rotated.first, tuple(anchors(store))).exit_code == 0


def test_a_ledger_that_was_open_follows(rotated: Rotated, tmp_path: Path) -> None:
    """Who had the old key in memory signs with the new one after the next look at the folder; who has only the old one is refused."""
    settings = Settings(data=tmp_path / "data")
    with tiered(settings) as rig:
        stale, first = rig.ledger, load(settings.data / "keys")
        stale.append("news", {"n": 0})
        rotate(settings, rig.objects)
        entry = stale.append("news", {"n": 1})
        size = stale.checkpoint().size
        alone = Ledger(rig.objects, first, settings.ledger.origin)

        assert (entry.sequence, size) == (2, 3)
        assert entry.key_id == load(settings.data / "keys").verifier.key_id
        with pytest.raises(SettingsError, match=r"is signed by .* now"):
            alone.append("news", {"n": 2})
        with pytest.raises(SettingsError, match=r"is signed by .* now"):
            alone.checkpoint()


@pytest.mark.usefixtures("go")
def test_proofs_carry_the_rotations(rotated: Rotated, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """An event of each key's time, and growth across all keys, hold with the first key, here and in Go; without a rotation they do not."""
    program: Path = request.getfixturevalue("go")
    prover, key = _prover(rotated.tiered), rotated.first.trusted[0]
    events = rotated.tiered.table()["event_id"].to_pylist()[::6]
    documents = [prover.event(event).to_json() for event in events] + [prover.consistency(rotated.checkpoints[0]).to_json()]
    for document in documents:
        steps = read_proof(json.dumps(document).encode()).check(rotated.first)
        assert len(document["rotations"]) == 2
        assert any("handed over to in entry 3" in step for step in steps)
        assert checked_by_go(program, key, document, tmp_path)
        one, two = document["rotations"]
        bent = {**two, "path": [two["path"][0][::-1], *two["path"][1:]]}
        for wrong in ([], [one], [two], [two, one], [one, {**two, "number": 4}], [one, bent]):
            forged = {**document, "rotations": wrong}
            assert not checked_by_go(program, key, forged, tmp_path)
            with pytest.raises((ProofError, UsageError)):
                read_proof(json.dumps(forged).encode()).check(rotated.first)


def test_forged_rotations_are_called_that(rotated: Rotated, tmp_path: Path) -> None:
    """A thief's rotation is unsigned and named, what the thief signs next is counted; one in the old key's name does not fit."""
    root, thief = rotated.copy(tmp_path / "cold"), Signer.make(rotated.first.name)
    last = open_ledger(rotated.tiered.settings, rotated.tiered.objects).entry(4)
    body = {"key": str(thief.verifier)}
    forged = make_entry(thief, last.origin, sequence=5, previous=last.sha256, type=ROTATED, body=body)
    after = make_entry(thief, last.origin, sequence=6, previous=forged.sha256, type="segments", body={"segments": []})
    (root / forged.key).write_bytes(forged.data)
    (root / after.key).write_bytes(after.data)
    found = rotated.verify(root)

    assert [(item.kind, item.key) for item in found.findings] == [("unsigned", forged.key)]
    assert "a forged rotation: signed by" in found.findings[0].detail
    assert found.findings[0].detail.endswith("and so are 1 more entries and checkpoints")
    assert found.exit_code == 12

    (root / after.key).unlink()
    claimed = f'"key_id":"{last.key_id}"'.encode()
    (root / forged.key).write_bytes(forged.data.replace(f'"key_id":"{thief.verifier.key_id}"'.encode(), claimed))
    assert [(item.kind, item.key) for item in rotated.verify(root).findings] == [("modified", forged.key)]


@pytest.mark.parametrize("number", [1, 3])
def test_a_rotation_that_is_gone_or_bent(rotated: Rotated, tmp_path: Path, number: int) -> None:
    """It is named, and all that comes after it is told in one line, since nobody can tell who signed it."""
    root = rotated.copy(tmp_path / "cold")
    victim = root / "ledger" / "entries" / f"{number:012d}.json"
    data = victim.read_bytes()
    victim.unlink()
    gone = rotated.verify(root)
    victim.write_bytes(data.replace(b'"type":"key_rotated"', b'"type":"key_rotatee"'))
    bent = rotated.verify(root)

    assert (gone.exit_code, bent.exit_code) == (11, 10)
    assert [item.key for item in gone.findings if item.kind == "missing"] == [victim.relative_to(root).as_posix()]
    assert [item.key for item in bent.findings if item.kind == "modified"] == [victim.relative_to(root).as_posix()]
    assert [item.kind for item in gone.findings].count("unsigned") <= 2


def test_an_old_key_that_was_stolen_signs_nothing_more(rotated: Rotated, tmp_path: Path) -> None:
    """The first key, found in a backup after its rotation: entries and checkpoints by it are unsigned."""
    settings = Settings(data=tmp_path / "data")
    with tiered(settings) as rig:
        stolen, first = load(settings.data / "keys"), load_public(settings.data / "keys" / PUBLIC)
        rig.ledger.append("news", {"n": 0})
        entry = rotate(settings, rig.objects)
        forged = make_entry(stolen, rig.ledger.origin, sequence=2, previous=entry.sha256, type="news", body={"n": 1})
        rig.objects.create(forged.key, forged.data)
        found = _verified(rig, first)

    assert [(item.kind, item.key) for item in found.findings] == [("unsigned", forged.key)]


class TestLost:
    """The private key is gone."""

    @pytest.fixture
    def rig(self, settings_embedded: Settings) -> Iterator[Tiered]:
        """One day, and no private key any more."""
        with tiered(settings_embedded) as made:
            _day(made, DAYS[0])
            (settings_embedded.data / "keys" / PRIVATE).unlink()
            yield made

    def test_it_is_said_for_ever(self, rig: Tiered) -> None:
        """Nothing is made silently; after the fresh start the first key alone says unsigned, both keys say when the old one was lost."""
        folder = rig.settings.data / "keys"
        first = load_public(folder / PUBLIC)
        with pytest.raises(SettingsError, match="no usable key") as error:
            open_ledger(rig.settings, rig.objects).append("news", {})
        assert "rotate --lost" in error.value.hint
        with pytest.raises(SettingsError):
            rotate(rig.settings, rig.objects)
        entry = begin_again(rig.settings, rig.objects, reason="disk burnt")
        _day(rig, DAYS[1])
        alone, both = _verified(rig, first), _verified(rig, load_public(folder / PUBLIC))

        assert (entry.type, entry.body["lost"], entry.body["reason"]) == (LOST, first.last.key.key_id, "disk burnt")
        assert alone.exit_code == 12
        assert [item.key for item in alone.findings if item.kind == "unsigned"] == [entry.key]
        assert "have it handed to you by another way" in alone.findings[0].detail
        assert [(item.kind, item.key) for item in both.findings] == [("key-lost", entry.key)]
        assert (both.exit_code, both.segments) == (0, 2)
        event = rig.table()["event_id"][0].as_py()
        assert "begun again in entry 1" in _prover(rig).event(event).check(load_public(folder / PUBLIC))[0]

    def test_only_when_it_is_lost(self, settings_embedded: Settings) -> None:
        """A key that is there is rotated, not lost."""
        with tiered(settings_embedded) as rig, pytest.raises(UsageError, match="is not lost"):
            begin_again(settings_embedded, rig.objects, reason="none")


def test_interrupted_before_and_after_the_entry(settings_embedded: Settings) -> None:
    """A drafted key without an entry is used by the next rotation; one whose entry stands takes over at the next signature."""
    folder = settings_embedded.data / "keys"
    with tiered(settings_embedded) as rig:
        keys = KeyFolder(folder, settings_embedded.ledger.origin)
        drafted = keys.draft()
        rotate(settings_embedded, rig.objects)
        assert load(folder).verifier == drafted.verifier
        following = KeyFolder(folder, settings_embedded.ledger.origin).draft()
        open_ledger(settings_embedded, rig.objects).append(ROTATED, {"key": str(following.verifier)})
        assert load(folder).verifier == drafted.verifier
        entry = open_ledger(settings_embedded, rig.objects).append("news", {})

        assert entry.key_id == load(folder).verifier.key_id == following.verifier.key_id
        assert not (folder / NEXT).exists()


def test_the_commands(tmp_path: Path) -> None:
    """Rotate, list, verify; lose it, be told, begin again; misuse is one line."""
    settings = Settings(data=tmp_path / "data", cold=ColdSettings(lock="none"))
    with tiered(settings) as rig:
        _day(rig, DAYS[0])
    program = Program(tmp_path, settings)
    auditor = tmp_path / "auditor.pub"
    shutil.copy(settings.data / "keys" / PUBLIC, auditor)
    rotated, listed, good = program.batch(
        ("keys", "ledger", "rotate"), ("keys", "ledger", "list", "--format", "json"), ("verify", "--public-key", str(auditor))
    )
    assert rotated.text.startswith("entry 1: tokentape.local/ledger+")
    assert [row["how"] for row in listed.rows] == ["first", "rotated"]
    assert "handed over in entry 1" in good.text

    os.unlink(settings.data / "keys" / PRIVATE)
    wrong = program.batch(
        ("keys", "ledger", "rotate"),
        ("keys", "ledger", "rotate", "--lost"),
        ("keys", "ledger", "rotate", "--reason", "none"),
        code=2,
    )
    assert "no usable key" in wrong[0].complaint
    assert "--lost needs a --reason" in wrong[1].complaint
    begun, alone, both = program.batch(
        ("keys", "ledger", "rotate", "--lost", "--reason", "disk burnt"),
        ("verify", "--public-key", str(auditor)),
        ("verify",),
        code=None,
    )

    assert (begun.code, alone.code, both.code) == (0, 12, 0)
    assert both.text.startswith("key-lost")
