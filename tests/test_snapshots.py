"""Snapshots: versions of sessions that stopped, in pieces, each equal to the fold of the events up to it."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from replay.fold import Until, fold
from replay.pieces import TEXT_MAX, Pieces, whole
from replay.sections import sections
from replay.snapshot import document_of, load, plain
from replay.versioning import Versioning
from schemas import events as e
from schemas.codec import encode
from schemas.errors import CorruptStore, UsageError
from schemas.settings import Settings, SnapshotSettings
from store.catalog import Catalog, Position, open_catalog
from store.indexer import Indexer
from store.log.base import Entry, partition_of
from store.versions import VersionStore, _unpacked, references
from tests.debug_rig import debugging, payloads
from tests.gateway_rig import DEADLINE_S
from tests.positions import put_position
from tests.program import Program, until
from tests.stored import put_hot
from tests.tape import Tape, ident, incident
from tokentape.installation import Installation
from tokentape.jobs import all_jobs, versioning

WORDS = ("request", "waits", "breakpoint", "until", "somebody", "lets", "deadline", "comes", "tape", "has", "all", "of", "it")
SESSION_A, SESSION_B = "01990000-0000-7000-8000-00000000a001", "01990000-0000-7000-8000-00000000a002"


def text(seed: int, words: int) -> str:
    """Words in an order that the seed gives."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + str(rng.randrange(1000)) for _ in range(words))


def stop(tape: Tape, generation: bytes, ms: float, value: Any = 0) -> None:
    """A stop at a breakpoint, one edit, and the release."""
    tape.add(e.BreakpointHit(breakpoint_id="all", generation_id=generation, deadline_us=1, default_action="release"), ms)
    patch = e.EditContent(patch=json.dumps([{"op": "add", "path": "/seed", "value": value}]), reason="again")
    digests = {"digest_before": bytes(32), "digest_after": bytes(32)}
    tape.add(e.RequestEdited(generation_id=generation, edit_id=ident(f"edit {ms}"), **digests, content=patch), ms + 1, actor="dev:bo")
    tape.add(e.BreakpointReleased(breakpoint_id="all", generation_id=generation, action="edited"), ms + 2, actor="dev:bo")


def chat(turns: int, *, words: int = 80) -> Tape:
    """A conversation that stops at each turn."""
    tape = Tape("chat")
    tape.add(e.SessionOpened(user="user:7", workflow="desk", purpose="repair", tags=["prod"]), 0)
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        messages.append({"role": "user", "content": text(turn, words)})
        generation = tape.request(f"turn {turn}", messages, turn * 100.0)
        stop(tape, generation, turn * 100.0 + 1, turn)
        tape.started(generation, turn * 100.0 + 10, 5)
        tape.tokens(generation, turn * 100.0, [6.0, 7.0], ["an", "swer"])
        messages.append({"role": "assistant", "content": "answer"})
    return tape


class Kept:
    """An index made by hand and the versions that are derived from it."""

    def __init__(self, folder: Path, bytes_max: int = 100 << 20) -> None:
        self.settings = Settings(data=folder, snapshots=SnapshotSettings(session_bytes_max=bytes_max))
        self.installation = Installation(self.settings)
        self.catalog: Catalog = open_catalog(folder)
        self._shards = 0

    @property
    def versioning(self) -> Versioning:
        """What derives, opened anew as the next run would."""
        return versioning(self.installation)

    @property
    def store(self) -> VersionStore:
        """The versions."""
        return self.versioning.versions

    def put(self, events: Sequence[Any], *, offset: int = 0) -> None:
        """Index events of a tape."""
        self._shards += 1
        put_hot(self.catalog, f"shard-{self._shards}", [stored.event for stored in events], offset=offset)

    def replace(self, events: Sequence[e.Event]) -> None:
        """Index other events in place of all."""
        self.catalog.swap(retire=[shard.name for shard in self.catalog.snapshot().shards])
        self._shards += 1
        if events:
            put_hot(self.catalog, f"shard-{self._shards}", events)

    def listed(self, session_id: bytes) -> list[tuple[Any, ...]]:
        """What a listing says."""
        return [(v.number, v.event_id, v.why, v.bytes_stored, v.bytes_whole, v.let_go) for v in self.store.versions(session_id)]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    """An empty installation."""
    made = Kept(tmp_path / "data")
    with made.installation:
        yield made


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[e.Event]:
    """Two sessions of debug mode as a gateway recorded them: edits, an undo, a refusal, a stream, a deadline."""
    with debugging(tmp_path_factory.mktemp("debugged")) as debugged:
        debugged.stop(breakpoint_id="short", deadline_s=0.2, tag="short")
        debugged.stop(breakpoint_id="look", tag="look")
        answers = []
        for session, stream in ((SESSION_A, False), (SESSION_A, True), (SESSION_B, True)):
            headers = {"x-tokentape-session": session, "x-tokentape-tags": "look"}
            answers.append(debugged.ask(stream=stream, headers=headers))
            (generation,) = debugged.waiting()
            debugged.desk.ask(generation, "edit", patch=[{"op": "replace", "path": "/messages/0/content", "value": text(1, 9_000)}])
            debugged.other.ask(generation, "edit", patch=[{"op": "add", "path": "/max_tokens", "value": 7}], reason="shorter")
            debugged.desk.ask(generation, "undo")
            debugged.desk.ask(generation, "release" if len(answers) < 3 else "refuse")
            answers[-1].exception(DEADLINE_S)
        debugged.ask(headers={"x-tokentape-session": SESSION_B, "x-tokentape-tags": "short"}).result(DEADLINE_S)
        return until(lambda: found if len(payloads(found := debugged.rig.events(), e.GenerationFinished)) == 3 else None)


def test_versions_equal_the_fold(recorded: list[e.Event], deployment: Settings) -> None:
    """Of what a gateway recorded: a version at each stop, edit, undo and release, and each is what the events give."""
    log = deployment.log.model_copy(update={"partitions": 2})  # as many as the gateway had, whose producers number by partition
    deployment = deployment.model_copy(update={"log": log})
    with Installation(deployment) as installation:
        entries = [
            Entry(partition_of(event.session_id, installation.log.partitions), event.session_id, encode(event)) for event in recorded
        ]
        installation.log.append(entries)
        Indexer(deployment, installation.log, installation.registry).run_once()
        job = next(job for job in all_jobs(installation) if job.name == "snapshots")
        made, again = job.work(False), job.work(False)
        keeper = versioning(installation)
        for session_id in {event.session_id for event in recorded}:
            events = list(installation.reader.session(session_id))
            for version in keeper.versions.versions(session_id):
                assert keeper.state(version) == fold(events, until=Until("event", version.event_id))

        reasons = [[v.why for v in keeper.versions.versions(installation.session_id(name))] for name in (SESSION_A, SESSION_B)]

    assert (made["sessions"], made["versions"], sum(made["save_us"].values())) == (2, 17, 2)
    assert again == {"sessions": 0, "versions": 0}
    assert reasons[0] == ["stopped at look", "edited", "edited", "edit undone", "released: edited"] * 2
    assert reasons[1][-3:] == ["released: refused", "stopped at short", "released: expired"]


@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 90), st.text(max_size=50), st.integers(0, 3 * TEXT_MAX), st.integers(1, 300))
def test_a_state_and_its_pieces(count: int, odd: str, length: int, chunks: int) -> None:
    """Whatever a state holds, its pieces put together are its document: long texts, long lists, text that looks like a reference."""
    tape = Tape()
    forged = '{"=":"0123456789abcdef0123456789abcdef"}{"+":[{"=":"0123456789abcdef0123456789abcdef"}]}'
    g = tape.request(
        "g", [{"role": "user", "content": odd + forged + text(length, 1 + length // 8)}, {"role": "user", "content": "=" * length}], 0
    )
    for i in range(chunks):
        tape.tokens(g, 0, [float(i)], ["="], position=i)
    pieces = Pieces()
    for events in (incident().events[:count], tape.events):
        state = fold(events)
        root, size = pieces.cut(state)

        assert whole(root, pieces.made.__getitem__) == json.loads(json.dumps(document_of(plain(state))))
        assert size == pytest.approx(
            len(json.dumps(document_of(plain(state)), separators=(",", ":"), ensure_ascii=False).encode()), rel=0.05
        )


def test_only_what_changed_is_stored(kept: Kept) -> None:
    """A message is in one piece however many versions have it, and all of them take little more than the last one."""
    tape = chat(60)
    kept.put(tape.events)
    kept.versioning.derive(tape.session_id)
    versions = kept.store.versions(tape.session_id)
    with kept.store.pieces(tape.session_id) as piece:
        held, waiting = {}, [version.root for version in versions]
        while waiting:
            name = waiting.pop()
            if name not in held:
                held[name] = piece(name)
                waiting += references(held[name])

    assert len(versions) == 180
    assert sum(text(7, 80).encode() in data for data in held.values()) == 1
    assert kept.store.bytes_of(tape.session_id) == sum(version.bytes_stored for version in versions)
    assert kept.store.bytes_of(tape.session_id) < 2 * versions[-1].bytes_whole
    assert kept.store.bytes_of(tape.session_id) < sum(version.bytes_whole for version in versions) / 30


def test_a_long_text_with_a_word_more(kept: Kept) -> None:
    """Of two long texts that differ in the middle, the second costs the part that differs."""
    tape, long = Tape(), text(0, 30_000)
    stop(tape, tape.request("a", [{"role": "user", "content": long}], 0), 1)
    kept.put(tape.events)
    kept.versioning.derive(tape.session_id)
    before = kept.store.bytes_of(tape.session_id)
    done = len(tape.events)
    stop(tape, tape.request("b", [{"role": "user", "content": long[:90_000] + "surprise " + long[90_000:]}], 10), 11)
    kept.put(tape.events[done:], offset=done)
    kept.versioning.derive(tape.session_id)

    assert len(kept.store.versions(tape.session_id)) == 6
    assert kept.store.bytes_of(tape.session_id) < 1.3 * before


def test_beyond_the_cap_the_oldest_go(tmp_path: Path) -> None:
    """They are listed as let go; the newest stay, the store holds what these need and no more, and the events give the rest."""
    tape = chat(20, words=300)
    kept = Kept(tmp_path, bytes_max=60_000)
    with kept.installation:
        kept.put(tape.events)
        kept.versioning.derive(tape.session_id)
        versions = kept.store.versions(tape.session_id)
        gone = [version.let_go for version in versions]
        listed = kept.listed(tape.session_id)

        assert gone == sorted(gone, reverse=True)
        assert 0 < sum(gone) < len(versions)
        assert not gone[-1]
        with pytest.raises(UsageError, match="let go to make room") as refused:
            kept.versioning.state(versions[0])
        assert f"--at '#{versions[0].position}'" in str(refused.value.hint)
        assert kept.versioning.state(versions[-1]) == fold(tape_of(kept, tape), until=Until("event", versions[-1].event_id))

        needed = Pieces()
        for version in versions:
            if not version.let_go:
                needed.cut(fold(tape_of(kept, tape), until=Until("position", version.position)))
        with kept.store._connection("read") as connection:
            names = {name for (name,) in connection.execute("SELECT name FROM piece")}
        shutil.rmtree(tmp_path / "snapshots")
        kept.versioning.derive(tape.session_id)

        assert names == needed.made.keys()
        assert kept.listed(tape.session_id) == listed

        tiny = Versioning(kept.installation.reader, kept.catalog, VersionStore(tmp_path / "tiny", "1"), 1)
        tiny.derive(tape.session_id)

        assert [version.number for version in tiny.versions.versions(tape.session_id) if not version.let_go] == [60]
        tiny.state(tiny.version(tape.session_id, 60))


def tape_of(kept: Kept, tape: Tape) -> list[Any]:
    """A tape's events as the index has them."""
    return list(kept.installation.reader.session(tape.session_id))


def test_what_was_erased_is_gone_here_too(kept: Kept) -> None:
    """Once the tape says that content was erased, the next run makes the versions anew; the old bytes are in no file."""
    tape = chat(3)
    kept.put(tape.events)
    moved(kept, len(tape.events))
    kept.versioning.run()
    secret = stored_piece(kept, text(1, 80))
    assert secret in files(kept)

    erased = [
        stored.event.model_copy(
            update={"commitment": bytes(32), "salt": None, "payload": stored.event.payload.model_copy(update={"content": None})}
        )
        if stored.event.kind in ("request_submitted", "request_edited")
        else stored.event
        for stored in tape.events
    ]
    platform = Tape("platform")
    applied = platform.add(e.ErasureApplied(erasure_id=ident("erasure"), subject_digest=bytes(32))).event
    kept.replace([*erased, applied])
    moved(kept, len(erased) + 1)
    summary = kept.versioning.run()
    versions = kept.store.versions(tape.session_id)

    assert (summary["sessions"], summary["versions"]) == (1, 9)
    assert kept.versioning.state(versions[-1]) == fold(tape_of(kept, tape), until=Until("event", versions[-1].event_id))
    assert secret not in files(kept)

    kept.replace([applied])
    kept.versioning.derive(tape.session_id)

    assert kept.store.versions(tape.session_id) == []
    assert kept.store.bytes_of(tape.session_id) == 0


def stored_piece(kept: Kept, said: str) -> bytes:
    """The bytes that stand in the store for a piece with a text in it."""
    with kept.store._connection("read") as connection:
        found = [bytes(data) for (data,) in connection.execute("SELECT data FROM piece")]
    (piece,) = [data for data in found if said.encode() in _unpacked(data)]
    return piece


def files(kept: Kept) -> bytes:
    """All bytes on disk."""
    return b"".join(path.read_bytes() for path in (kept.settings.data / "snapshots").iterdir())


def moved(kept: Kept, offset: int) -> None:
    """Let the catalog stand at an offset, as an indexer does."""
    put_position(kept.catalog, Position("log", 0, offset, bytes(32), "2026-11-23", 1, 1, 0, 0))


def test_a_run_looks_at_what_is_new(kept: Kept) -> None:
    """The first run sees all, the next one only shards with later events; a dry run changes nothing."""
    tape, other = chat(2), Tape("quiet")
    other.request("q", [{"role": "user", "content": "hello"}], 0)
    kept.put([*tape.events, *other.events])
    moved(kept, len(tape.events) + 1)

    assert kept.versioning.run(dry_run=True) == {"would_look_at": 1}
    assert kept.store.versions(tape.session_id) == []
    assert kept.versioning.run()["versions"] == 6
    assert kept.versioning.run() == {"sessions": 0, "versions": 0}

    late = Tape("late")
    stop(late, late.request("l", [{"role": "user", "content": "hello"}], 0), 1)
    at = len(tape.events) + 1
    kept.put(late.events, offset=at)
    moved(kept, at + len(late.events))

    assert kept.versioning.run()["versions"] == 3


def test_two_at_once(kept: Kept) -> None:
    """A job and a command that derive the same session at the same time make each version once."""
    tape = chat(10)
    kept.put(tape.events)
    made: list[int] = []
    threads = [threading.Thread(target=lambda: made.append(kept.versioning.derive(tape.session_id))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(kept.store.versions(tape.session_id)) == 30
    assert sum(made) == 30
    kept.versioning.state(kept.versioning.version(tape.session_id, 30))


def test_sections(kept: Kept) -> None:
    """A snapshot reads as request, edits, response, context and metadata, before and after an edit."""
    tape = incident()
    kept.put(tape.events)
    kept.versioning.derive(tape.session_id)
    stopped, edited, _ = (sections(kept.versioning.state(v), v.generation_id) for v in kept.store.versions(tape.session_id))

    assert (stopped["request"]["parameters"]["temperature"], edited["request"]["parameters"]["temperature"]) == (0.8, 0.0)
    assert (stopped["request"]["document"], edited["request"]["document"]) == ("as submitted", "as edited")
    assert stopped["request"]["messages"][-1]["content"] == "Which weather is it in Lisbon? Use the tool."
    assert stopped["request"]["tools"][0]["function"]["name"] == "get_weather"
    assert [edit["reason"] for edit in edited["edits"]] == ["make the tool call repeatable"]
    assert (edited["context"]["user"], edited["context"]["workflow"]) == ("user:42", "incident-desk")
    assert edited["metadata"]["title"] == "Morning slowness, ticket 4711"

    whole_tape = sections(fold(tape.events), ident("g2"))

    assert whole_tape["response"][0]["tool_calls"][0]["name"] == "get_weather"
    assert len(whole_tape["response"][0]["tokens"]) == 30


def test_on_the_command_line(tmp_path: Path) -> None:
    """Listed, shown and exact; each mistake is one line, and a damaged store says that it may be deleted."""
    program = Program(tmp_path, Settings(data=tmp_path / "data"))
    tape, quiet = chat(2), Tape("quiet")
    quiet.request("q", [{"role": "user", "content": "hello"}], 0)
    for made in (tape, quiet):
        partition = partition_of(made.session_id, program.settings.log.partitions)
        put_hot(open_catalog(tmp_path / "data"), made.session_id.hex(), [stored.event for stored in made.events], partition=partition)
    session, other = tape.session_id.hex(), quiet.session_id.hex()
    listed, page, shown, none, *wrong = program.batch(
        ["snapshots", session, "--format", "json"],
        ["snapshots", session, "--show", "2"],
        ["snapshots", session, "--show", "5", "--format", "json"],
        ["snapshots", other],
        ["snapshots", session, "--show", "7"],
        ["snapshots", session, "--show", "1", "--format", "csv"],
        ["snapshots", other, "--show", "1"],
        code=None,
    )
    document = json.loads(shown.stdout)
    events = [stored for stored in tape.events if stored.offset < 10_000]

    assert [row["why"] for row in listed.rows[:3]] == ["stopped at all", "edited", "released: edited"]
    assert "0 of 6 let go" in listed.stderr
    assert "version 2: edited" in page.text
    assert document["snapshot"] == listed.rows[4]
    assert document["request"]["parameters"]["seed"] == 1
    assert load(json.dumps(document["state"]).encode()).counts == fold(events, until=Until("position", listed.rows[4]["position"])).counts
    assert "never stopped" in none.stderr

    assert [ran.code for ran in (listed, page, shown, none, *wrong)] == [0, 0, 0, 0, 2, 2, 2]
    assert [ran.complaint for ran in wrong] == [
        "read snapshot: no version 7 of this session",
        "snapshots: --show prints no csv",
        "read snapshot: no version 1 of this session",
    ]
    (tmp_path / "data" / "snapshots" / "versions.sqlite").write_bytes(b"no database at all, but long enough to be looked at" * 100)

    assert "delete" in program.run("snapshots", session, code=5).stderr


def test_a_damaged_piece_is_named(kept: Kept) -> None:
    """A piece that is not what its name says is not passed off as a state."""
    tape = chat(1)
    kept.put(tape.events)
    kept.versioning.derive(tape.session_id)
    with kept.store._writing("damage") as connection:
        connection.execute("UPDATE piece SET data = x'7B7D'")

    with pytest.raises(CorruptStore, match="is damaged"):
        kept.versioning.state(kept.versioning.version(tape.session_id, 1))
