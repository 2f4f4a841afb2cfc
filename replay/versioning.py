"""Snapshots of sessions in debug mode, derived from the tape after the fact: a version at each stop, edit and release.

Nothing of it is on a request's path. A version is the fold up to its event in pieces, so it equals what the events give.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replay.fold import apply
from replay.pieces import Pieces, whole
from replay.snapshot import FORMAT, VERSION, state_of
from replay.state import EMPTY, SessionState
from schemas.errors import UsageError
from schemas.events import BreakpointHit, BreakpointReleased, Event, RequestEdited
from schemas.histogram import SAVE_S, Histogram
from store.catalog import Catalog
from store.reader import EventReader
from store.rows import StoredEvent
from store.versions import Version, VersionStore

LAYOUT = f"1 {FORMAT} {VERSION}"
"""What stored versions look like; raised with the tables or the way in which states are cut. Others are made anew."""

STOPPED_KINDS = (BreakpointHit.KIND, RequestEdited.KIND, BreakpointReleased.KIND)
"""Events at which a version is made."""

CUSTODY_KINDS = ("retention_applied", "erasure_applied")
"""Events after which versions may hold what the tape does not hold any more."""


def open_versions(data: Path) -> VersionStore:
    """The versions of a data directory."""
    return VersionStore(data / "snapshots", LAYOUT)


@dataclass(frozen=True)
class Versioning:
    """Keeps the versions of an installation as its tape has them; `bytes_max` is what one session's may take."""

    reader: EventReader
    catalog: Catalog
    versions: VersionStore
    bytes_max: int

    def run(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Derive what the events since the last run ask for."""
        at = {(position.log_id, position.partition): position.offset_next for position in self.catalog.positions()}
        marks = self.versions.marks()
        if at == marks:
            return {"sessions": 0, "versions": 0}
        found = self.reader.sessions_with((*STOPPED_KINDS, *CUSTODY_KINDS), marks)
        sessions = {session_id for session_id, kind in found if kind in STOPPED_KINDS}
        if any(kind in CUSTODY_KINDS for _, kind in found):
            sessions.update(self.versions.sessions())
        if dry_run:
            return {"would_look_at": len(sessions)}
        made, saving = 0, Histogram(SAVE_S)
        for session_id in sorted(sessions):
            began = time.perf_counter_ns()
            if added := self.derive(session_id):
                saving.observe((time.perf_counter_ns() - began) // 1000)
                made += added
        self.versions.set_marks(at)
        return {"sessions": len(sessions), "versions": made} | ({"save_us": saving.to_json()} if made else {})

    def derive(self, session_id: bytes) -> int:
        """Make the versions of a session that are not there yet; all of them again if its events are not what they were."""
        events = list(self.reader.session(session_id))
        known = self.versions.versions(session_id)
        if known and not _stands_on(known[-1], events):
            self.versions.forget(session_id)
            known = []
        return self._add(events, known)

    def _add(self, events: Sequence[StoredEvent], known: Sequence[Version]) -> int:
        """Fold all events and cut the state wherever a version is missing."""
        done = known[-1].position if known else 0
        if not any(stored.event.kind in STOPPED_KINDS for stored in events[done:]):
            return 0
        state, pieces, basis, made = EMPTY, Pieces(), hashlib.sha256(), list[Version]()
        for position, stored in enumerate(events, 1):
            state = apply(state, stored)
            basis.update(_standing(stored.event))
            if position > done and stored.event.kind in STOPPED_KINDS:
                root, size = pieces.cut(state)
                made.append(_version(len(known) + len(made) + 1, stored.event, position, basis.digest(), root, size))
        added = self.versions.add(made, pieces.made, bytes_max=self.bytes_max)
        return len(made) if added else 0  # else another run was faster

    def version(self, session_id: bytes, number: int) -> Version:
        """A version by its number.

        Raises:
            UsageError: there is none.
        """
        known = self.versions.versions(session_id)
        if not 1 <= number <= len(known):
            valid = f"valid: 1 to {len(known)}" if known else "the session never stopped at a breakpoint"
            raise UsageError(f"no version {number} of this session", operation="read snapshot", hint=valid)
        return known[number - 1]

    def state(self, version: Version) -> SessionState:
        """The state that a version holds.

        Raises:
            UsageError: it was let go.
            CorruptStore: a piece of it is missing or damaged.
        """
        if version.let_go:
            hint = f"its events are still there: tokentape show SESSION --at '#{version.position}'"
            raise UsageError(f"version {version.number} was let go to make room", operation="read snapshot", hint=hint)
        with self.versions.pieces(version.session_id) as piece:
            return state_of(whole(version.root, piece))


def _version(number: int, event: Event, position: int, basis: bytes, root: str, size: int) -> Version:
    generation_id = getattr(event.payload, "generation_id", b"")
    place = (event.session_id, number, event.event_id, position, basis)
    return Version(*place, generation_id, _why(event), event.actor, event.recorded_at, root, size)


def _why(event: Event) -> str:
    """What a version was made for, in a few words."""
    payload = event.payload
    if isinstance(payload, BreakpointHit):
        return f"stopped at {payload.breakpoint_id}"
    if isinstance(payload, RequestEdited):
        return "edit undone" if payload.undo_of else "edited"
    assert isinstance(payload, BreakpointReleased)
    return f"released: {payload.action.replace('_', ' ')}"


def _stands_on(version: Version, events: Sequence[StoredEvent]) -> bool:
    """Whether the events that a version was derived from are still the session's first ones, none of them erased since."""
    basis = hashlib.sha256()
    for stored in events[: version.position]:
        basis.update(_standing(stored.event))
    return version.position <= len(events) and basis.digest() == version.basis


def _standing(event: Event) -> bytes:
    """What changes where an event is another one, or its content was erased."""
    return event.event_id + (b"" if event.commitment is None else b"erased")
