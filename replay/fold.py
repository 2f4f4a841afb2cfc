"""Events to a session's state: `apply` is pure and total, `fold` is time travel.

Total means that no stream of events is refused: one that is unknown, repeated, out of order or another session's is kept
on the state as an anomaly, and the rest goes on. Whatever order events come in, nothing that they carry is dropped but a
repetition: an event whose producer's sequence number was folded already, the same rule by which the index tells duplicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from replay.generation_rules import GENERATION_RULES, anomaly
from replay.state import EMPTY, Annotation, Environment, Place, Replay, SessionState, evolve
from schemas import events as e
from schemas.errors import UsageError
from store.rows import StoredEvent

Rule = Callable[[SessionState, StoredEvent, Any], SessionState]


NOT_FOLDED = frozenset({"foreign", "repeated", "unreadable"})
"""Anomalies whose event left no other trace on the state."""


def apply(state: SessionState, stored: StoredEvent) -> SessionState:
    """The state after one more event; the state given stays valid. Never raises: what cannot be folded is an anomaly."""
    try:
        return _apply(state, stored)
    except Exception as error:  # total by contract: an event that nobody foresaw must not hide the rest of the session
        counted = evolve(state, events=state.events + 1)
        return anomaly(counted, stored, "unreadable", f"{type(error).__name__}: {error}"[:500])


def _apply(state: SessionState, stored: StoredEvent) -> SessionState:
    event = stored.event
    if state.session_id is not None and event.session_id != state.session_id:
        state = evolve(state, events=state.events + 1)
        return anomaly(state, stored, "foreign", f"belongs to session {UUID(bytes=event.session_id)}")
    producer = (event.producer_id, stored.partition)
    seen = state.producers.get(producer)
    if seen is not None and event.producer_seq <= seen:
        state = evolve(state, events=state.events + 1)
        return anomaly(state, stored, "repeated", f"producer's number {event.producer_seq} came at or before {seen}")
    state = _envelope(state, stored, producer)
    rule = RULES.get(event.kind)
    if rule is None:
        return anomaly(state, stored, "unknown", f"no rule for {event.kind}")
    return rule(state, stored, event.payload)


def _envelope(state: SessionState, stored: StoredEvent, producer: tuple[bytes, int]) -> SessionState:
    event, at = stored.event, stored.event.recorded_at
    first = state.session_id is None
    return evolve(
        state,
        session_id=event.session_id,
        tenant=event.tenant if first else state.tenant,
        retention_class=event.retention_class if first else state.retention_class,
        erased=state.erased + (event.commitment is not None),
        counts=state.counts.set(event.kind, (state.counts.get(event.kind) or 0) + 1),
        producers=state.producers.set(producer, event.producer_seq),
        events=state.events + 1,
        first_at=at if state.first_at is None else min(at, state.first_at),
        last_at=at if state.last_at is None else max(at, state.last_at),
        last=Place(event.event_id, stored.partition, stored.offset, at),
    )


# session


def _session_opened(state: SessionState, stored: StoredEvent, payload: e.SessionOpened) -> SessionState:
    if state.opened is not None:
        return anomaly(state, stored, "again", "the session was opened already")
    tags = tuple(dict.fromkeys((*payload.tags, *state.tags)))
    state = evolve(state, opened=payload, opened_by=stored.event.actor, tags=tags)
    return state if state.events == 1 else anomaly(state, stored, "late", "not the first event of its session")


def _session_annotated(state: SessionState, stored: StoredEvent, payload: e.SessionAnnotated) -> SessionState:
    tags = [tag for tag in dict.fromkeys((*state.tags, *payload.tags_added)) if tag not in payload.tags_removed]
    annotation = Annotation(stored.event.recorded_at, stored.event.actor, payload)
    visibility = payload.visibility or state.visibility
    return evolve(state, tags=tuple(tags), visibility=visibility, annotations=state.annotations.append(annotation))


def _session_closed(state: SessionState, stored: StoredEvent, payload: e.SessionClosed) -> SessionState:
    if state.closed is not None:
        return anomaly(state, stored, "again", "the session was closed already")
    return evolve(state, closed=payload, closed_at=stored.event.recorded_at)


def _environment_captured(state: SessionState, stored: StoredEvent, payload: e.EnvironmentCaptured) -> SessionState:
    seen = Environment(stored.event.recorded_at, stored.event.source, payload)
    return evolve(state, environments=state.environments.append(seen))


def _kv_operation(state: SessionState, stored: StoredEvent, payload: e.KvOperation) -> SessionState:
    return evolve(state, operations=state.operations.append(payload))


def _records_lost(state: SessionState, stored: StoredEvent, payload: e.RecordsLost) -> SessionState:
    return evolve(state, lost=state.lost + payload.count)


def _counted(state: SessionState, stored: StoredEvent, payload: e.Payload) -> SessionState:
    """Events that say nothing about the session's own course: their count is what stays."""
    return state


# replay


def _replay(state: SessionState, stored: StoredEvent, replay_id: bytes) -> tuple[SessionState, Replay]:
    known = state.replays.get(replay_id)
    if known is None:
        state = anomaly(state, stored, "early", "its replay had not started")
    return state, known or Replay(stored.event.recorded_at)


def _replay_started(state: SessionState, stored: StoredEvent, payload: e.ReplayStarted) -> SessionState:
    known = state.replays.get(payload.replay_id)
    if known and known.started:
        return anomaly(state, stored, "again", "the replay had started already")
    begun = evolve(known or Replay(stored.event.recorded_at), started=payload)
    return evolve(state, replays=state.replays.set(payload.replay_id, begun))


def _sequence_compared(state: SessionState, stored: StoredEvent, payload: e.SequenceCompared) -> SessionState:
    state, run = _replay(state, stored, payload.replay_id)
    run = evolve(run, compared=run.compared.append(payload))
    return evolve(state, replays=state.replays.set(payload.replay_id, run))


def _replay_finished(state: SessionState, stored: StoredEvent, payload: e.ReplayFinished) -> SessionState:
    state, run = _replay(state, stored, payload.replay_id)
    if run.finished:
        return anomaly(state, stored, "again", "the replay had finished already")
    return evolve(state, replays=state.replays.set(payload.replay_id, evolve(run, finished=payload)))


RULES: dict[str, Rule] = {
    **dict.fromkeys(e.PAYLOADS, _counted),
    **GENERATION_RULES,
    "session_opened": _session_opened,
    "session_annotated": _session_annotated,
    "session_closed": _session_closed,
    "environment_captured": _environment_captured,
    "kv_operation": _kv_operation,
    "records_lost": _records_lost,
    "replay_started": _replay_started,
    "sequence_compared": _sequence_compared,
    "replay_finished": _replay_finished,
}
"""What each kind does to the state. A kind without a rule of its own is counted."""


# time travel


@dataclass(frozen=True, slots=True)
class Until:
    """A moment in a session, inclusive: an event's id, a log offset, a time in µs, or a number of events from the start.

    A time means the longest prefix of the log's order in which every event was recorded at or before it.
    """

    by: Literal["event", "offset", "time", "position"]
    value: bytes | int

    @classmethod
    def parse(cls, text: str) -> Until:
        """`#12` a position, `@340` a log offset, a UUID an event, else an ISO 8601 time (UTC unless it says otherwise).

        Raises:
            UsageError: none of these.
        """
        try:
            if text[:1] in ("#", "@"):
                return cls("position" if text[0] == "#" else "offset", int(text[1:]))
            return cls("event", UUID(text).bytes) if _is_uuid(text) else cls("time", _time_us(text))
        except ValueError as error:
            hint = "give an event id, #POSITION, @OFFSET or a time such as 2026-11-23T14:05:00.250Z"
            raise UsageError(f"{text!r} names no moment", operation="read --at", hint=hint) from error

    def __str__(self) -> str:
        if self.by == "event":
            return str(UUID(bytes=bytes(self.value))) if isinstance(self.value, bytes) else str(self.value)
        return f"{self.by} {self.value!r}"


def _is_uuid(text: str) -> bool:
    bare = text.replace("-", "").lower()
    return len(bare) == 32 and all(c in "0123456789abcdef" for c in bare)


def _time_us(text: str) -> int:
    when = datetime.fromisoformat(text)
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    delta = when - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def fold(events: Iterable[StoredEvent], *, start: SessionState = EMPTY, until: Until | None = None) -> SessionState:
    """The state after the events up to `until`, or after all of them if that moment is not among them.

    Folding in one go, in pieces (`start` is where the last piece ended) or from a snapshot gives the same state.
    """
    state = start
    for state in states(events, start=start, until=until):  # noqa: B007  the last one is the answer
        pass
    return state


def states(events: Iterable[StoredEvent], *, start: SessionState = EMPTY, until: Until | None = None) -> Iterator[SessionState]:
    """The state after each event up to `until`."""
    state = start
    for stored in events:
        if until and comes_after(until, state, stored):
            return
        state = apply(state, stored)
        yield state
        if until and until.by == "event" and stored.event.event_id == until.value:
            return


def comes_after(until: Until, state: SessionState, stored: StoredEvent) -> bool:
    """Whether an event, next after `state`, lies beyond a moment; an event's own id is reached, not passed."""
    if isinstance(until.value, bytes):
        return False
    if until.by == "position":
        return state.events >= until.value
    return (stored.offset if until.by == "offset" else stored.event.recorded_at) > until.value


def state_at(events: Iterable[StoredEvent], until: Until | None = None) -> SessionState:
    """The state at a moment, for one who names it.

    Raises:
        UsageError: no such event in the session, or nothing had happened yet.
    """
    state = fold(events, until=until)
    if until is None:
        return state
    if until.by == "event" and (state.last is None or state.last.event_id != until.value):
        hint = "list the session's events with: tokentape timeline SESSION"
        raise UsageError(f"no event {until} in this session", operation="time travel", hint=hint)
    if state.events == 0:
        raise UsageError(f"nothing of this session had happened yet at {until}", operation="time travel")
    return state
