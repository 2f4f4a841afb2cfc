"""The list of sessions behind which the index goes on: what may be late is late and says so, what may not be late never is."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import TokentapeError
from schemas.events import Payload, ReplayStarted, SessionAnnotated, SessionOpened
from schemas.settings import Settings
from store.catalog import Segment, Shard
from store.directory import SessionDirectory, Viewer, Wanted
from store.merge import merge
from tests.api_rig import put
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


class Rig:
    """An installation that indexes when it is told to, and a directory over it that refreshes when it is told to."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.tapes: dict[str, Tape] = {}
        self.say("one", SessionOpened())
        self.directory = Gated(installation.settings, installation)
        self.directory.refresh()
        self.directory.follow()
        self.begun: list[threading.Thread] = []

    def say(self, name: str, *payloads: Payload) -> None:
        """More events of a session, in the catalog when this returns."""
        tape = self.tapes.setdefault(name, Tape(name))
        put(self.installation.settings, [tape.add(payload, actor="key:ann").event for payload in payloads])
        assert self.installation.freshen()

    def show(self, name: str, visibility: str) -> None:
        """Somebody of another process says who may see a session."""
        self.say(name, SessionAnnotated(visibility=visibility))

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

    def seen(self, viewer: Viewer, **wanted: Any) -> set[str]:
        """The names of the sessions that somebody is shown."""
        listed = {row["session_id"] for row in self.directory.sessions(viewer, Wanted(**wanted)).rows}
        shown = {name for name, tape in self.tapes.items() if tape.session_id in listed}

        assert len(shown) == len(listed)
        return shown


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Session `one` is listed; the directory's own thread comes once and not again."""
    monkeypatch.setattr("store.directory._FOLLOW_S", 3600)
    with Installation(Settings(data=tmp_path)) as installation:
        rig = Rig(installation)
        yield rig
        rig.end_refresh()
        rig.directory.close()


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
