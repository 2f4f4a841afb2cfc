"""Proofs that travel: made by us, checked by us and by a verifier in Go that shares nothing with us."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lifecycle.coverage import coverage_rows
from lifecycle.proving import Prover
from lifecycle.verification import Scope, Verification
from schemas.codec import encode_content, encode_metadata, erase, leaf_hash
from schemas.errors import ProofError, SettingsError, TokentapeError, UnknownEvent, UsageError
from schemas.registry import CURRENT
from schemas.settings import ColdSettings, Settings, WitnessSettings
from scripts.native import tools
from store.ledger import Ledger
from store.ledger.entry import canonical
from store.ledger.keys import load
from store.ledger.note import Signer, Verifier
from store.ledger.proof import ConsistencyProof, EventProof, Leaf, read_proof
from store.ledger.witness import Witness, anchors, open_witness
from store.objects.local import LocalStore
from store.reader import EventReader
from tests.conftest import MinioService
from tests.eventgen import conversation
from tests.program import Program
from tests.strategies import sample
from tests.tiered import Tiered, tiered

DAYS = ("2026-11-01", "2026-11-02", "2026-11-03")


@dataclass(frozen=True)
class Rig:
    """Three tiered days, the checkpoints after each, and one event that is hot still."""

    tiered: Tiered
    checkpoints: list[bytes]
    events: list[bytes]
    hot: bytes

    @property
    def prover(self) -> Prover:
        reader = EventReader(self.tiered.settings, self.tiered.catalog, self.tiered.objects)
        return Prover(reader, self.tiered.objects, self.tiered.ledger, self.tiered.registry)

    @property
    def key(self) -> Verifier:
        return self.tiered.ledger.verifier


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Made once: nothing in here changes it."""
    with tiered(Settings(data=tmp_path_factory.mktemp("proof") / "data", cold=ColdSettings(lock="none"))) as made:
        checkpoints = []
        for day in DAYS:
            made.ingest(list(conversation(made.producer, chunks=5)))
            made.set_day(day)
            made.tier()
            made.checkpoint()
            newest = made.ledger.latest_checkpoint()
            assert newest is not None
            checkpoints.append(newest.data)
        events = made.table().column("event_id").to_pylist()
        made.ingest(list(conversation(made.producer, chunks=1)))
        hot = next(event for event in made.table().column("event_id").to_pylist() if event not in events)
        yield Rig(made, checkpoints, events, hot)


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The verifier in Go, built."""
    return tools.go_verifier(tmp_path_factory.mktemp("go"), print)


def checked_by_go(program: Path, key: Verifier, document: dict[str, Any], folder: Path) -> bool:
    """What Go says of a proof."""
    (folder / "key.pub").write_text(f"{key}\n")
    (folder / "proof.json").write_text(json.dumps(document))
    said = subprocess.run([program, folder / "key.pub", folder / "proof.json"], capture_output=True, text=True, check=False)
    assert said.returncode in (0, 1), said.stderr
    return said.returncode == 0


def test_every_event_is_proven(rig: Rig, go: Path, tmp_path: Path) -> None:
    """Each cold event has a proof that holds here, and in Go, and after a round trip through JSON."""
    proofs = [rig.prover.event(event) for event in rig.events]
    for proof in proofs:
        assert len(proof.check(rig.key)) == 4
        assert read_proof(json.dumps(proof.to_json()).encode()) == proof
    for proof in proofs[::5]:
        assert checked_by_go(go, rig.key, proof.to_json(), tmp_path)

    assert len(proofs) == len(rig.events) > 30


def test_growth_is_proven_between_any_two_checkpoints(rig: Rig, go: Path, tmp_path: Path) -> None:
    """Forwards it holds, here and in Go; backwards it cannot be asked for."""
    for at, old in enumerate(rig.checkpoints):
        for new in rig.checkpoints[at:]:
            proof = rig.prover.consistency(old, new)
            proof.check(rig.key)
            assert checked_by_go(go, rig.key, proof.to_json(), tmp_path)

    with pytest.raises(UsageError, match="does not come before"):
        rig.prover.consistency(rig.checkpoints[2], rig.checkpoints[0])


def test_nothing_altered_passes(rig: Rig, go: Path, tmp_path: Path) -> None:
    """Thousands of proofs with one value changed: none holds, and Go agrees on a sample of them."""
    chance = random.Random(7)
    whole = [rig.prover.event(event).to_json() for event in rig.events[:6]] + [
        rig.prover.consistency(rig.checkpoints[0], rig.checkpoints[2]).to_json()
    ]
    passed = []
    for turn in range(2_000):
        document = altered(chance.choice(whole), chance)
        try:
            read_proof(json.dumps(document).encode()).check(rig.key)
            passed.append(document)
        except (ProofError, UsageError):
            pass
        if turn % 100 == 0:
            assert not checked_by_go(go, rig.key, document, tmp_path)

    assert passed == []


def altered(document: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A proof with one value changed that a verifier must look at."""
    made = copy.deepcopy(document)
    places = [(holder, name) for holder, name in leaves(made) if name not in ("format", "public_key") and holder[name] is not None]
    holder, name = chance.choice(places)
    value = holder[name]
    if isinstance(value, int):
        holder[name] = value + chance.choice((-1, 1, 2, 1000))
    elif name == "id":
        holder[name] = flipped(bytes.fromhex(value), chance).hex()
    elif name in ("json", "checkpoint", "old", "new", "schema", "key"):
        at = chance.randrange(len(value))
        holder[name] = value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1 :]
    else:
        holder[name] = base64.b64encode(flipped(base64.b64decode(value), chance)).decode()
    return made


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a document that holds a plain value."""
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list):
            yield from leaves(item)
        else:
            yield value, name


def flipped(data: bytes, chance: random.Random) -> bytes:
    """One bit changed."""
    at = chance.randrange(len(data) * 8)
    return data[: at // 8] + bytes([data[at // 8] ^ 1 << at % 8]) + data[at // 8 + 1 :]


def test_steps_may_not_be_left_out_or_borrowed(rig: Rig) -> None:
    """A path without a step, two that are exchanged, another event's leaf, an older checkpoint, another key."""
    documents = [rig.prover.event(event).to_json() for event in rig.events[:12]]
    document, other = [each for each in documents if each["event"]["content"] and len(each["segment"]["path"]) > 1][:2]
    stranger = Signer.make(rig.key.name).verifier
    wrong = [
        {**document, "segment": {**document["segment"], "path": document["segment"]["path"][1:]}},
        {**document, "segment": {**document["segment"], "path": document["segment"]["path"][::-1]}},
        {**document, "event": other["event"]},
        {**document, "event": {**document["event"], "content": None, "salt": None}},
        {**document, "checkpoint": rig.checkpoints[0].decode()},
    ]

    for forged in wrong:
        with pytest.raises(ProofError):
            read_proof(json.dumps(forged).encode()).check(rig.key)
    with pytest.raises(ProofError, match="no signature by"):
        read_proof(json.dumps(document).encode()).check(stranger)


def test_an_erased_event_is_proven_by_the_same_leaf() -> None:
    """With content and salt gone the commitment gives the leaf that stood before."""
    datum = sample("token_chunk", full=True, turn=0).to_datum()
    gone = erase(datum, CURRENT)
    before = Leaf(encode_metadata(datum, CURRENT), encode_content(datum, CURRENT), datum["salt"], None)
    after = Leaf(encode_metadata(gone, CURRENT), encode_content(gone, CURRENT), gone["salt"], gone["commitment"])

    assert after.content is None
    assert before.hash() == after.hash() == leaf_hash(datum, CURRENT)


def test_what_has_no_proof(rig: Rig) -> None:
    """An unknown event, and one that is not in the cold tier yet: one line each, with what to do."""
    with pytest.raises(UnknownEvent, match="no event"):
        rig.prover.event(bytes(16))
    with pytest.raises(UsageError, match="not in the ledger yet") as hot:
        rig.prover.event(rig.hot)

    assert "tokentape tier --now" in hot.value.hint


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"format": "other/1"}', b'{"format": "tokentape-event-proof/1"}', b"\xff", b"[" * 100_000]
)
def test_no_proof_at_all(data: bytes) -> None:
    """Whatever else is in the file: it is said to be no proof, and what is."""
    with pytest.raises(UsageError, match="not a proof") as error:
        read_proof(data)

    assert "tokentape-event-proof/1" in error.value.hint


def test_coverage_says_where_offsets_are(rig: Rig) -> None:
    """Each partition's spans follow one another, day by day; what an entry lacks shows as a gap."""
    rows = coverage_rows(rig.tiered.ledger)
    spans = [(row["offset_first"], row["offset_next"]) for row in rows if row["partition"] == rows[0]["partition"]]

    assert {row["day"] for row in rows} == set(DAYS)
    assert all(one[1] == two[0] for one, two in itertools.pairwise(spans))
    assert all(row["covered_by"] == 3 for row in rows)
    assert coverage_rows(rig.tiered.ledger, day=DAYS[1]) == [row for row in rows if row["day"] == DAYS[1]]


def test_a_scope_reads_no_more(rig: Rig, tmp_path: Path) -> None:
    """Damage of one day is found in its scope and not looked for in another; the chain of entries is always held."""
    root = tmp_path / "cold"
    shutil.copytree(rig.tiered.settings.data / "cold", root, ignore=shutil.ignore_patterns(".*"))
    victim = next((root / "events").rglob(f"day={DAYS[1]}/*.parquet"))
    victim.chmod(0o644)
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")

    def outcome(scope: Scope) -> int:
        return Verification(LocalStore(root), rig.key, rig.tiered.registry, scope=scope).report().exit_code

    assert outcome(Scope()) == 10
    assert outcome(Scope(first=DAYS[1], last=DAYS[1])) == 10
    assert outcome(Scope(first=DAYS[2])) == 0
    assert outcome(Scope(session=bytes(16))) == 0
    (root / "ledger" / "entries" / "000000000001.json").unlink()
    assert outcome(Scope(first=DAYS[2])) == 11


class TestWitness:
    """Copies of checkpoints that somebody else keeps."""

    def test_only_what_continues_is_copied(self, rig: Rig, tmp_path: Path) -> None:
        """The newest is copied once; a ledger that was written anew with the same key is refused, and found by its copies."""
        store = open_witness(WitnessSettings(kind="folder", folder=tmp_path / "witness"))
        assert store is not None
        assert Witness(rig.tiered.ledger, store).run(dry_run=True) == {"would_copy": 1, "witnessed": 3}
        assert Witness(rig.tiered.ledger, store).run() == {"copied": 1, "witnessed": 3}
        assert Witness(rig.tiered.ledger, store).run() == {"copied": 0, "witnessed": 3}

        signer = load(rig.tiered.settings.data / "keys")
        other = Ledger(LocalStore(tmp_path / "other"), signer, rig.key.name)
        for number in range(5):
            other.append("segments", {"number": number})
        other.checkpoint()
        with pytest.raises(ProofError, match="does not continue the 3 entries"):
            Witness(other, store).run()
        found = Verification(other.store, rig.key, rig.tiered.registry, tuple(anchors(store))).report(deep=False)

        assert anchors(store) == [rig.checkpoints[2]]
        assert found.exit_code == 10

    def test_a_bucket_of_its_own(self, rig: Rig, minio: MinioService) -> None:
        """Copies go to another bucket, locked where that is asked for."""
        settings = WitnessSettings(
            kind="minio",
            endpoint=minio.endpoint,
            bucket=f"witness-{os.urandom(6).hex()}",
            access_key=minio.access_key,
            secret_key=minio.secret_key,  # type: ignore[arg-type]  # pydantic makes a secret of it
        )
        store = open_witness(settings)
        assert store is not None
        Witness(rig.tiered.ledger, store, lock_days=1).run()
        (info,) = store.list("ledger/")

        assert store.get(info.key) == rig.checkpoints[2]
        with pytest.raises(TokentapeError, match="locked"):
            store.delete(info.key)

    def test_nobody_and_nowhere(self) -> None:
        """Off is nobody; a folder that is not named is one clear line."""
        assert open_witness(WitnessSettings()) is None
        with pytest.raises(SettingsError, match=r"witness\.folder is not set"):
            open_witness(WitnessSettings(kind="folder"))


class TestCommands:
    """`prove`, `ledger` and `verify --proof` as a person uses them."""

    def test_from_event_to_verdict(self, rig: Rig, tmp_path: Path) -> None:
        """A proof is written, checked where there is nothing but the key, and refused once it was touched."""
        made, event = Program(tmp_path / "here", rig.tiered.settings), rig.events[3].hex()
        made.run("prove", event, "--out", "proof.json")
        elsewhere = Program(tmp_path / "elsewhere", Settings(data=tmp_path / "nothing"))
        (tmp_path / "elsewhere" / "key.pub").write_text(f"{rig.key}\n")
        text = (tmp_path / "here" / "proof.json").read_text()
        for name, proof in (("good.json", text), ("bad.json", text.replace('"row": ', '"row": 1'))):
            (tmp_path / "elsewhere" / name).write_text(proof)
        good = elsewhere.run("verify", "--public-key", "key.pub", "--proof", "good.json")
        said = elsewhere.fails("verify", "--public-key", "key.pub", "--proof", "bad.json", code=6)

        assert "every step holds" in good.text
        assert "is not row" in said

    def test_the_ledger_is_looked_at(self, rig: Rig, tmp_path: Path) -> None:
        """Entries, coverage, a checkpoint kept, and growth since."""
        program = Program(tmp_path, rig.tiered.settings)
        (tmp_path / "kept.txt").write_bytes(rig.checkpoints[0])
        log, coverage, newest, growth = program.batch(
            ("ledger", "log", "--format", "json"),
            ("ledger", "coverage", "--day", DAYS[0], "--format", "json"),
            ("ledger", "checkpoint"),
            ("ledger", "consistency", "kept.txt"),
        )

        assert [row["number"] for row in log.rows] == [2, 1, 0]
        assert {row["day"] for row in coverage.rows} == {DAYS[0]}
        assert newest.stdout == rig.checkpoints[2]
        assert json.loads(growth.stdout)["format"] == "tokentape-consistency-proof/1"

    def test_mistakes(self, rig: Rig, tmp_path: Path) -> None:
        """One line that says what is wrong."""
        mistakes = {
            ("prove", "4711"): "'4711' is no event id",
            ("prove", "00000000-0000-0000-0000-000000000000"): "no event 0000",
            ("ledger", "coverage", "--day", "yesterday"): "'yesterday' is no day",
            ("verify", "--from", "2026-11-03", "--to", "2026-11-01"): "--from 2026-11-03 is after --to 2026-11-01",
            ("verify", "--session", "4711"): "'4711' is no session id",
        }
        answers = Program(tmp_path, rig.tiered.settings).batch(*mistakes, code=None)

        assert [answer.code for answer in answers] == [2, 3, 2, 2, 2]
        assert all(said in answer.complaint for answer, said in zip(answers, mistakes.values(), strict=True))


def test_verification_holds_the_witness(tmp_path: Path) -> None:
    """`tokentape verify` finds a cut end by itself once a witness is named."""
    settings = Settings(
        data=tmp_path / "data",
        cold=ColdSettings(lock="none"),
        witness=WitnessSettings(kind="folder", folder=tmp_path / "witness"),
    )
    with tiered(settings) as rig:
        rig.ingest(list(conversation(rig.producer, chunks=2)))
        rig.tier()
        rig.checkpoint()
    program = Program(tmp_path, settings)
    program.batch(("jobs", "run", "witness"), ("verify", "--shallow"))
    for path in (tmp_path / "data" / "cold" / "ledger" / "checkpoints").iterdir():
        path.unlink()
    cut = program.run("verify", "--shallow", code=11)

    assert "the anchor is a copy of it" in cut.text


def test_canonical_json_of_the_standard() -> None:
    """RFC 8785, section 3.2.2 and 3.2.3: numbers, escapes, and the order of keys."""
    source = json.loads(
        r"""{"numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
             "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/", "literals": [null, true, false]}"""
    )
    keys = json.loads(
        r"""{"\u20ac": "Euro Sign", "\r": "Carriage Return", "\ufb33": "Hebrew Letter Dalet With Dagesh", "1": "One",
             "\ud83d\ude00": "Emoji: Grinning Face", "\u0080": "Control", "\u00f6": "Latin Small Letter O With Diaeresis"}"""
    )
    expected = r"""{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],"string":"€$\u000f\nA'B\"\\\\\"/"}"""

    assert canonical(source).decode() == expected
    assert [value.split()[0] for value in json.loads(canonical(keys)).values()] == [
        "Carriage", "One", "Control", "Latin", "Euro", "Emoji:", "Hebrew",
    ]  # fmt: skip


def test_proof_kinds_are_told_apart(rig: Rig) -> None:
    """Each document is read as what it says it is."""
    assert isinstance(read_proof(json.dumps(rig.prover.event(rig.events[0]).to_json()).encode()), EventProof)
    assert isinstance(read_proof(json.dumps(rig.prover.consistency(rig.checkpoints[0]).to_json()).encode()), ConsistencyProof)
