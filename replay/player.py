"""A session played step by step, forwards and backwards, or fast to a breakpoint, a moment or the end.

Going back folds again from the nearest kept state; states share their parts, so keeping one every so often costs little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from replay.fold import Until, apply, comes_after
from replay.state import EMPTY, SessionState
from schemas.errors import UsageError
from store.rows import StoredEvent

KEEP_EVERY = 256
"""Events between two kept states: a step back folds at most this many, about 5 ms."""

Condition = Callable[[StoredEvent, SessionState], bool]
"""Says whether a fast run stops after an event, given the state it led to."""


class Stop(NamedTuple):
    """Where a fast run stopped: `reason` is condition, reached or end."""

    reason: str
    event: StoredEvent | None
    state: SessionState


def at_kind(*kinds: str) -> Condition:
    """Stops after an event of one of these kinds."""
    return lambda stored, state: stored.event.kind in kinds


at_breakpoint = at_kind("breakpoint_hit")
"""Stops where a request was stopped."""

at_trouble = at_kind("generation_failed", "records_lost")
"""Stops where something went wrong."""


class Player:
    """One session's events in log order and a position in them: 0 before the first, len(self) after the last."""

    def __init__(self, events: Iterable[StoredEvent], *, keep_every: int = KEEP_EVERY) -> None:
        self._events = list(events)
        self._every = keep_every
        self._kept = [EMPTY]
        self._position, self._state = 0, EMPTY

    def __len__(self) -> int:
        return len(self._events)

    @property
    def position(self) -> int:
        """Events played so far."""
        return self._position

    @property
    def state(self) -> SessionState:
        """The session after the events played so far."""
        return self._state

    @property
    def event(self) -> StoredEvent | None:
        """The event played last."""
        return self._events[self._position - 1] if self._position else None

    def played(self) -> list[StoredEvent]:
        """The events played so far."""
        return self._events[: self._position]

    @property
    def at_end(self) -> bool:
        """Whether all events are played."""
        return self._position == len(self._events)

    def step(self, count: int = 1) -> SessionState:
        """`count` events further, or to the end."""
        for _ in range(min(count, len(self._events) - self._position)):
            self._state = apply(self._state, self._events[self._position])
            self._position += 1
            if self._position == len(self._kept) * self._every:
                self._kept.append(self._state)
        return self._state

    def back(self, count: int = 1) -> SessionState:
        """`count` events back, or to the start."""
        return self.seek(max(0, self._position - count))

    def seek(self, position: int) -> SessionState:
        """To a position, from the nearest state known before it.

        Raises:
            UsageError: no such position.
        """
        if not 0 <= position <= len(self._events):
            fault = f"position {position}, valid is 0 to {len(self._events)}"
            raise UsageError(fault, operation="seek")
        kept = min(position // self._every, len(self._kept) - 1)
        if position < self._position or kept * self._every > self._position:
            self._position, self._state = kept * self._every, self._kept[kept]
        return self.step(position - self._position)

    def to(self, until: Until) -> SessionState:
        """To a moment, forwards or backwards.

        Raises:
            UsageError: no such event in the session.
        """
        return self.seek(self._position_of(until))

    def _position_of(self, until: Until) -> int:
        if until.by == "position" and isinstance(until.value, int):
            return min(until.value, len(self._events))
        for i, stored in enumerate(self._events):
            if until.by == "event" and stored.event.event_id == until.value:
                return i + 1
            if until.by != "event" and comes_after(until, EMPTY, stored):
                return i
        if until.by == "event":
            raise UsageError(f"no event {until} in this session", operation="step to event")
        return len(self._events)

    def fast(self, stop: Condition | None = None, *, until: Until | None = None) -> Stop:
        """On without pause until a condition holds after an event, a moment is reached, or the end."""
        goal = len(self._events) if until is None else self._position_of(until)
        while self._position < goal:
            self.step()
            if stop and self.event and stop(self.event, self._state):
                return Stop("condition", self.event, self._state)
        return Stop("reached" if until and not self.at_end else "end", self.event, self._state)
