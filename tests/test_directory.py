"""The list of sessions behind which the index goes on: what may be late is late and says so, what may not be late never is."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import TokentapeError
from schemas.events import Payload, ReplayFinished, ReplayStarted, SessionAnnotated, SessionOpened
from schemas.settings import Settings
from store.catalog import Segment, Shard
from store.directory import SessionDirectory, Viewer, Wanted
from store.merge import merge
from tests.api_rig import put
from tests.program import until
from tests.tape import QUESTION, Tape
from tokentape.installation import Installation

OWNER, MATE, STRANGER = Viewer("acme", ("key:ann",)), Viewer("acme", ("key:amy",)), Viewer("blue", ("key:bob",))
DEADLINE_S = 60.0


class Gated(SessionDirectory):
    """A directory that reads no part while its gate is shut, and says when it is kept waiting."""

    def __init__(self, settings: Settings, installation: Installation) -> None:
        super().__init__(settings, installation.catalog)
        self.gate, self.waits = threading.Event(), threading.Event()
        self.gate.set()

    def _read(self, name: str, source: Shard | Segment) -> bool:
        if not self.gate.is_set():
            self.waits.set()
        assert self.gate.wait(DEADLINE_S)
        return super()._read(name, source)


class Begun(SessionDirectory):
    """A directory that follows and has listed nothing before; it reads as many parts as it is allowed to, the newest first."""

    def __init__(self, settings: Settings, installation: Installation, parts: int) -> None:
        super().__init__(settings, installation.catalog)
        self.order: list[str] = []
        self.stopped = threading.Event()
        self._permits = threading.Semaphore(0)
        self.allow(parts)
        self.follow()
        self.stops()

    def allow(self, parts: int) -> None:
        """Let it read some more."""
        self.stopped.clear()
        self._permits.release(parts)

    def stops(self) -> None:
        """Return when it waits for more."""
        assert self.stopped.wait(DEADLINE_S)

    def _read(self, name: str, source: Shard | Segment) -> bool:
        if not self._permits.acquire(blocking=False):
            self.stopped.set()
            assert self._permits.acquire(timeout=DEADLINE_S)
        self.order.append(name)
        return super()._read(name, source)


class Rig:
    """An installation that indexes when it is told to, and a directory over it that refreshes when it is told to."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.tapes: dict[str, Tape] = {}
        self.now_ms = 0
        self.say("one", SessionOpened())
        self.directory = Gated(installation.settings, installation)
        self.directory.refresh()
        self.directory.follow()
        self.begun: list[threading.Thread] = []

    def say(self, name: str, *payloads: Payload, actor: str = "key:ann") -> None:
        """More events of a session, a second later than all before, in the catalog when this returns."""
        tape = self.tapes.setdefault(name, Tape(name))
        self.now_ms += 1000
        put(self.installation.settings, [tape.add(payload, self.now_ms, actor=actor).event for payload in payloads])
        assert self.installation.freshen()

    def show(self, name: str, visibility: str, actor: str = "key:ann") -> None:
        """Somebody of another process says who may see a session."""
        self.say(name, SessionAnnotated(visibility=visibility), actor=actor)

    def begin_refresh(self) -> None:
        """Return when a refresh has begun and waits before it reads the first part."""
        self.directory.gate.clear()
        self.directory.waits.clear()
        self.begun.append(threading.Thread(target=self.directory.refresh))
        self.begun[-1].start()
        assert self.directory.waits.wait(DEADLINE_S)

    def end_refresh(self) -> None:
        """Let it go on; return when it is over."""
        self.directory.gate.set()
        while self.begun:
            self.begun.pop().join(DEADLINE_S)

    def seen(self, viewer: Viewer, directory: SessionDirectory | None = None, **wanted: Any) -> set[str]:
        """The names of the sessions that somebody is shown."""
        listed = {row["session_id"] for row in (directory or self.directory).sessions(viewer, Wanted(**wanted)).rows}
        shown = {name for name, tape in self.tapes.items() if tape.session_id in listed}

        assert len(shown) == len(listed)
        return shown

    def named(self, row: dict[str, Any]) -> str:
        """The name of the session of a row."""
        return next(name for name, tape in self.tapes.items() if tape.session_id == row["session_id"])

    def strict(self, viewer: Viewer) -> list[dict[str, Any]]:
        """What who reads all at once is shown."""
        with contextlib.closing(SessionDirectory(self.installation.settings, self.installation.catalog)) as directory:
            return directory.sessions(viewer, Wanted()).rows


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Session `one` is listed; the directory's own thread comes once and not again."""
    monkeypatch.setattr("store.directory._FOLLOW_S", 3600)
    with Installation(Settings(data=tmp_path)) as installation:
        rig = Rig(installation)
        yield rig
        rig.end_refresh()
        rig.directory.close()


@pytest.fixture
def begin(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Begun]]:
    """Start a directory anew that lists after each part; when this returns it has read so many."""
    monkeypatch.setattr("store.directory._AT_ONCE", 0)
    monkeypatch.setattr("store.directory._PASS", 1)
    begun: list[Begun] = []

    def begin(parts: int) -> Begun:
        begun.append(Begun(rig.installation.settings, rig.installation, parts))
        return begun[-1]

    yield begin
    for directory in begun:
        directory.allow(1000)
        directory.close()


def later(act: Callable[[], Any]) -> Callable[[], Any]:
    """Begin an act in a thread; what is returned waits for what comes of it."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()

    def ended() -> Any:
        thread.join(DEADLINE_S)
        return found[0]

    return ended


def test_the_newest_come_first(rig: Rig, begin: Callable[[int], Begun]) -> None:
    """The list begins with the newest shard, says how much is not read yet and which rows may grow, and fills itself up."""
    for name in ("two", "three", "one"):
        rig.say(name, SessionOpened())
    directory = begin(2)
    first = directory.sessions(MATE, Wanted())
    final = {rig.named(row): (row["final"], row["events"], row["replayed"]) for row in first.rows}
    directory.allow(2)
    until(lambda: not directory.sessions(MATE, Wanted()).completeness.unread)
    then = directory.sessions(MATE, Wanted())
    strict = rig.strict(MATE)

    assert directory.order == [shard.name for shard in sorted(rig.installation.catalog.snapshot().shards, key=lambda s: -s.time_max)]
    assert (first.total, first.completeness.unread) == (2, 2)
    assert final == {"one": (False, 1, None), "three": (True, 1, None)}
    assert (then.total, then.completeness.unread) == (3, 0)
    assert then.rows == strict
    assert all(row["final"] for row in then.rows)


def test_who_may_see_a_session_is_known_before_its_older_parts_are(rig: Rig, begin: Callable[[int], Begun]) -> None:
    """Nobody sees what is private by an unread word, nor is taken for the owner of what was opened in an unread part."""
    for name in ("mine", "secret", "shared"):
        rig.say(name, SessionOpened())
    rig.show("secret", "private", "key:root")
    rig.show("mine", "private")
    rig.show("shared", "private")
    rig.show("shared", "public")
    for name in ("mine", "secret", "shared"):
        rig.say(name, SessionAnnotated(tags_added=["late"]), actor="key:amy")
    directory = begin(3)
    first = [rig.seen(viewer, directory) for viewer in (OWNER, MATE, STRANGER)]
    directory.tell(rig.tapes["shared"].session_id, "private", "key:root")
    told = [rig.seen(viewer, directory) for viewer in (OWNER, MATE, STRANGER)]
    hidden = later(lambda: directory.session(MATE, rig.tapes["secret"].session_id))
    owned = later(lambda: directory.session(OWNER, rig.tapes["secret"].session_id))
    directory.allow(1000)

    assert first == [{"mine", "shared"}, {"shared"}, {"shared"}]
    assert told == [{"mine"}, set(), set()]
    assert hidden() is None
    assert owned()["owner"] == "key:ann"
    assert rig.seen(OWNER, directory) == {"one", "mine", "secret", "shared"}


def test_a_newer_word_is_not_undone_by_an_older_one(rig: Rig) -> None:
    """Shards with an older word on a session, merged beside one with a newer word: what is listed keeps to the newer one."""
    rig.show("one", "public")
    for number in range(7):
        rig.say(f"other {number}", SessionOpened())
    old = {shard.name for shard in rig.installation.catalog.snapshot().shards}
    rig.show("one", "private")
    rig.directory.refresh()
    catalog = rig.installation.catalog
    (newest,) = {shard.name for shard in catalog.snapshot().shards} - old
    assert catalog.claim([newest], "somebody", 60)
    merge(rig.installation.settings, catalog)
    rig.show("other 1", "private")

    assert len(catalog.snapshot().shards) == 3
    assert "one" not in rig.seen(STRANGER)
    assert [row["visibility"] for row in rig.directory.sessions(OWNER, Wanted()).rows if rig.named(row) == "one"] == ["private"]


def test_who_searches_waits_for_the_whole(rig: Rig, begin: Callable[[int], Begun]) -> None:
    """Words, verdicts, replays and sessions by their id are found in what is not listed yet."""
    tape = rig.tapes.setdefault("asked", Tape("asked"))
    tape.request("g", [QUESTION], 0, actor="key:ann")
    put(rig.installation.settings, [stored.event for stored in tape.events])
    started = ReplayStarted(replay_id=bytes(16), subject_session=tape.session_id, mode="compare", engine="vllm")
    rig.say("replay", SessionOpened(purpose="replay"), started)
    rig.say(
        "replay", ReplayFinished(replay_id=bytes(16), verdict="identical", reason="", generations=1, sequences=1, tokens=1, duration_us=1)
    )
    rig.say("two", SessionOpened())
    directory = begin(1)
    at_first = rig.seen(MATE, directory)
    asked = [
        later(lambda: rig.seen(MATE, directory, text=QUESTION["content"].split()[0])),
        later(lambda: rig.seen(MATE, directory, verdict="identical")),
        later(lambda: len(directory.replays(MATE, tape.session_id))),
        later(lambda: (directory.session(MATE, rig.tapes["one"].session_id) or {})["events"]),
    ]
    directory.allow(1000)

    assert at_first == {"two"}
    assert [ended() for ended in asked] == [{"asked"}, {"asked"}, 1, 1]


def test_what_was_listed_stays_when_it_is_merged(rig: Rig, begin: Callable[[int], Begun]) -> None:
    """Shards that were read already become part of one that was not: their sessions are still there in the next list."""
    for number in range(7):
        rig.say(f"other {number}", SessionOpened())
    rig.say("two", SessionOpened())
    directory = begin(3)
    before = rig.seen(MATE, directory)
    merge(rig.installation.settings, rig.installation.catalog)
    rig.say("three", SessionOpened())
    renewed = later(directory.renew)
    directory.allow(2)
    renewed()
    after = rig.seen(MATE, directory)

    assert before == {"two", "other 6", "other 5"}
    assert len(rig.installation.catalog.snapshot().shards) < 4
    assert after > before


def test_who_may_see_a_session_is_heeded_while_the_rest_is_late(rig: Rig) -> None:
    """A refresh is under way: who looks does not wait, misses the new session, is told so, and is shown nothing that became private."""
    before = rig.directory.sessions(MATE, Wanted()).completeness.fresh_to
    rig.say("two", SessionOpened())
    rig.begin_refresh()
    late = rig.seen(MATE), rig.seen(STRANGER)
    rig.show("one", "private")
    private = rig.seen(MATE), rig.seen(OWNER), rig.directory._session(MATE, rig.tapes["one"].session_id)
    (row,) = rig.directory.sessions(OWNER, Wanted()).rows
    rig.show("one", "public")
    public = rig.seen(STRANGER)
    told = rig.directory.sessions(MATE, Wanted()).completeness.fresh_to
    rig.end_refresh()
    rig.directory.refresh()
    listed = rig.directory.sessions(MATE, Wanted())

    assert late == ({"one"}, set())
    assert private == (set(), {"one"}, None)
    assert (row["visibility"], row["shown_by"]) == ("private", "key:ann")
    assert public == {"one"}
    assert told == before
    assert before is not None
    assert listed.completeness.fresh_to is not None
    assert listed.completeness.fresh_to > before
    assert {row["visibility"]: row["events"] for row in listed.rows} == {"public": 3, "team": 1}


def test_what_this_process_said_is_heeded_before_the_index_has_it(rig: Rig) -> None:
    """From `tell` on, through refreshes that do not have it yet, until one that has; then the tape has the word."""
    one = rig.tapes["one"].session_id
    rig.directory.tell(one, "private", "key:ann")
    told = rig.directory.told
    at_once = rig.seen(MATE), rig.seen(OWNER)
    rig.say("two", SessionOpened())
    rig.directory.refresh()
    not_yet = rig.seen(MATE), rig.directory.session(MATE, one)
    rig.show("one", "private")
    rig.directory.tell(one, "public", "key:ann")
    rig.directory.refresh(told)
    on_tape = rig.seen(MATE), rig.seen(OWNER)

    assert at_once == (set(), {"one"})
    assert not_yet == ({"two"}, None)
    assert on_tape == ({"two"}, {"one", "two"})


def test_replays_of_a_session_that_became_private(rig: Rig) -> None:
    """A replay is shown to nobody who may not see what was replayed, whether the list has that change or not."""
    one = rig.tapes["one"].session_id
    started = ReplayStarted(replay_id=bytes(16), subject_session=one, mode="compare", engine="vllm")
    rig.say("replay", SessionOpened(purpose="replay"), started)
    rig.directory.refresh()
    before = len(rig.directory.replays(MATE, one))
    rig.show("one", "private")

    assert before == 1
    assert (rig.directory.replays(MATE, one), len(rig.directory.replays(OWNER, one))) == ([], 1)


def test_what_was_deleted_is_waited_for(rig: Rig) -> None:
    """Nothing of a session is shown once its rows have left the catalog, though no refresh came of itself."""
    catalog = rig.installation.catalog
    there = rig.seen(MATE)
    catalog.swap(retire=[shard.name for shard in catalog.snapshot().shards])

    assert (there, rig.seen(MATE)) == ({"one"}, set())


def test_a_shard_that_cannot_be_read_is_told_and_nothing_counts_twice(rig: Rig) -> None:
    """Whoever asks for what is new is told; what was read beside it is not read again when the shard is back."""
    rig.say("two", SessionOpened())
    first = {shard.name for shard in rig.installation.catalog.snapshot().shards}
    rig.say("one", SessionAnnotated(tags_added=["seen"]))
    (shard,) = [shard for shard in rig.installation.catalog.snapshot().shards if shard.name not in first]
    whole = shard.path.read_bytes()
    shard.path.write_bytes(b"\0" * len(whole))
    for _ in range(2):
        with pytest.raises(TokentapeError, match=shard.name):
            rig.directory.refresh()
    as_before = rig.seen(MATE)
    shard.path.write_bytes(whole)
    rig.directory.refresh()
    rows = rig.directory.sessions(MATE, Wanted()).rows

    assert as_before == {"one"}
    assert sorted(row["events"] for row in rows) == [1, 2]


def test_words_are_found_when_shards_were_merged_and_deleted(rig: Rig) -> None:
    """A search over a list whose shards are gone lists anew, and finds what stands in the merged one."""
    tape = rig.tapes.setdefault("asked", Tape("asked"))
    tape.request("g", [QUESTION], 0, actor="key:ann")
    put(rig.installation.settings, [stored.event for stored in tape.events])
    for number in range(8):
        rig.say(f"other {number}", SessionOpened())
    rig.directory.refresh()
    merge(rig.installation.settings, rig.installation.catalog)
    merge(rig.installation.settings, rig.installation.catalog, grace_s=0)
    word = QUESTION["content"].split()[0]

    assert len(rig.installation.catalog.snapshot().shards) < 8
    assert rig.seen(MATE, text=word) == {"asked"}


@pytest.mark.parametrize("seed", range(2))
def test_no_order_of_changes_in_the_first_reading_shows_what_is_private(rig: Rig, begin: Callable[[int], Begun], seed: int) -> None:
    """While a directory reads part after part, and things are said and merged: it shows nothing that who reads all at once does not."""
    rng, names = random.Random(seed), ["one", "two", "three"]
    for name in names[1:]:
        rig.say(name, SessionOpened())
    for _ in range(6):
        rig.show(rng.choice(names), rng.choice(["private", "team", "public"]), rng.choice(["key:ann", "key:root"]))
        rig.say(rng.choice(names), SessionAnnotated(tags_added=["x"]), actor="key:amy")
    directory = begin(1)
    strict = SessionDirectory(rig.installation.settings, rig.installation.catalog)
    for _ in range(16):
        act = rng.choice(["show", "show", "read", "read", "merge"])
        if act == "show":
            rig.show(rng.choice(names), rng.choice(["private", "team", "public"]), rng.choice(["key:ann", "key:root"]))
        elif act == "read":
            directory.allow(1)
        elif act == "merge":
            merge(rig.installation.settings, rig.installation.catalog)
        for viewer in (OWNER, MATE, STRANGER):
            assert rig.seen(viewer, directory) <= rig.seen(viewer, strict)
    directory.allow(1000)
    directory.refresh()
    for viewer in (OWNER, MATE, STRANGER):
        assert directory.sessions(viewer, Wanted()).rows == strict.sessions(viewer, Wanted()).rows
    strict.close()


def test_no_order_of_changes_and_refreshes_shows_what_is_private(rig: Rig) -> None:
    """Whatever is said, merged and refreshed in whatever order, and whoever looks meanwhile: each looks as who reads all at once."""
    rng, names = random.Random(7), ["one", "two", "three"]
    shown = dict.fromkeys(names, "team")
    for name in names[1:]:
        rig.say(name, SessionOpened())
    strict = SessionDirectory(rig.installation.settings, rig.installation.catalog)
    rig.directory.refresh()
    for _ in range(24):
        act = rng.choice(["show", "show", "other", "refresh", "begin", "end", "merge"])
        if act == "show":
            name, shown[name] = (name := rng.choice(names)), rng.choice(["private", "team", "public"])
            rig.show(name, shown[name])
        elif act == "other":
            rig.say(rng.choice(names), SessionAnnotated(tags_added=["x"]))
            if not rig.begun and rng.random() < 0.5:
                rig.begin_refresh()
        elif act == "end":
            rig.end_refresh()
        elif act == "refresh" and not rig.begun:
            rig.directory.refresh()
        elif act == "merge":
            merge(rig.installation.settings, rig.installation.catalog)
        for viewer, may in ((OWNER, {"private", "team", "public"}), (MATE, {"team", "public"}), (STRANGER, {"public"})):
            listed = {row["session_id"] for row in strict.sessions(viewer, Wanted()).rows}

            assert rig.seen(viewer) == {name for name in names if shown[name] in may}
            assert listed == {rig.tapes[name].session_id for name in rig.seen(viewer)}
    strict.close()
