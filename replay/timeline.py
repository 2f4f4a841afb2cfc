"""What happened in a session, in rows for an incident responder: who, what, when, for how long, and what went wrong.

Rows are plain data; `replay.timeline_view` draws them. Tokens are folded into runs, and a session with more rows than a
person reads is folded further: quiet generations into one row, what is notable stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from replay.fold import NOT_FOLDED, apply
from replay.rows_of_events import Context, open_row, rows_of_event, rows_of_tokens, silence_row
from replay.state import EMPTY, Anomaly, SessionState
from replay.words import count, duration, iso, uuid
from store.rows import StoredEvent

Level = Literal["plain", "good", "dim", "warn", "bad"]

ROWS_MAX = 200
"""Rows above which quiet generations are folded together."""
FOLD_MIN = 3
"""Consecutive quiet generations that make one row; two are as short as themselves."""
REPEATED = frozenset({"kv", "event", "access"})
"""Rows of which several may have been folded into one."""
QUIET_US_MIN = 5_000_000
"""Silence is shown from this length on."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `at` wall clock in µs, `until` the end of what lasts, `since_us` from the session's first event.

    `lane` is the generation's number and, with several sequences, the sequence's index ("3", "3.1"). `quote` is shortened content,
    raw: it goes through `words.printable` before a terminal sees it. `events` counts what is folded into the row.
    """

    at: int
    who: str
    what: str
    text: str
    level: Level = "plain"
    lane: str = ""
    quote: str | None = None
    until: int | None = None
    since_us: int = 0
    generation: bytes | None = None
    index: int | None = None
    event_id: bytes | None = None
    events: int = 1
    pace: tuple[int, ...] = ()

    def document(self) -> dict[str, Any]:
        """The row as JSON types."""
        ids = {"generation": self.generation and uuid(self.generation), "event_id": self.event_id and uuid(self.event_id)}
        times = {"at": iso(self.at), "until": None if self.until is None else iso(self.until)}
        return {**asdict(self), **ids, **times, "pace": list(self.pace)}


@dataclass(frozen=True, slots=True)
class Timeline:
    """A session's rows and what sums it up; `ttft_us` are the times to first token of all generations that had one."""

    state: SessionState
    rows: tuple[Row, ...]
    stalls: int
    failures: int
    ttft_us: tuple[int, ...]

    def document(self) -> dict[str, Any]:
        """The timeline as JSON types."""
        state = self.state
        return {
            "session": state.session_id and uuid(state.session_id),
            "tenant": state.tenant,
            "first_at": None if state.first_at is None else iso(state.first_at),
            "last_at": None if state.last_at is None else iso(state.last_at),
            "events": state.events,
            "generations": len(state.generations),
            "tokens": state.tokens,
            "stalls": self.stalls,
            "failures": self.failures,
            "anomalies": len(state.anomalies),
            "ttft_us": list(self.ttft_us),
            "rows": [row.document() for row in self.rows],
        }


def timeline(events: Iterable[StoredEvent], *, rows_max: int | None = ROWS_MAX) -> Timeline:
    """The timeline of one session's events in log order; `rows_max` None folds nothing but tokens."""
    state, folded = _fold(events)
    context = Context(state)
    rows = [Row(**found) for event in folded for found in rows_of_event(context, event)]
    tokens = [Row(**found) for generation in state.generations.values() for found in rows_of_tokens(context, generation)]
    stalls = sum(row.what == "stall" for row in tokens)
    rows = _in_order([*rows, *tokens, *_anomaly_rows(state)])
    rows = _fold_repeats(rows)
    if rows_max is not None and len(rows) > rows_max:
        rows = _fold_quiet(rows)
        rows = _fold_middle(rows, rows_max)
    rows = _in_order([*rows, *_open_rows(context), *_silent_rows(context, rows)])
    start = state.first_at or 0
    rows = [replace(row, since_us=row.at - start) for row in rows]
    recordings = [g.recording for g in state.generations.values() if g.recording]
    ttft = tuple(r.first_token_us for r in recordings if r.first_token_us is not None)
    return Timeline(state, tuple(rows), stalls, sum(bool(len(r.failures)) for r in recordings), ttft)


def _fold(events: Iterable[StoredEvent]) -> tuple[SessionState, list[StoredEvent]]:
    """The state at the end and the events that went into it: not repetitions, nor what the fold had to leave aside."""
    state, folded = EMPTY, []
    for stored in events:
        seen = len(state.anomalies)
        state = apply(state, stored)
        if len(state.anomalies) == seen or state.anomalies[-1].what not in NOT_FOLDED:
            folded.append(stored)
    return state, folded


def _in_order(rows: list[Row]) -> list[Row]:
    """By time; rows of one moment stay as they were."""
    return sorted(rows, key=lambda row: row.at)


def _anomaly_rows(state: SessionState) -> list[Row]:
    """Unexpected events one by one; a swarm of one kind is one row where it began."""
    rows: list[Row] = []
    for what, group in itertools.groupby(state.anomalies, key=lambda found: found.what):
        swarm = list(group)
        if len(swarm) >= FOLD_MIN:
            first = _anomaly_row(state, swarm[0])
            text = f"{len(swarm):,}× {what}, first: {swarm[0].kind} {swarm[0].text}"
            rows.append(replace(first, text=text, events=len(swarm)))
        else:
            rows += [_anomaly_row(state, found) for found in swarm]
    return rows


def _anomaly_row(state: SessionState, found: Anomaly) -> Row:
    at = found.place.at if found.place else state.last_at or 0
    return Row(at, "recorder", "anomaly", f"{found.kind} {found.what}: {found.text}", "warn")


def _fold_repeats(rows: list[Row]) -> list[Row]:
    """Neighbours that say the same kind of thing without a generation of their own become one row with a count."""
    folded: list[Row] = []
    for row in rows:
        last = folded[-1] if folded else None
        if last and row.what == last.what and row.who == last.who and row.what in _REPEATABLE:
            text = row.text if row.text == last.text else last.text.removesuffix(" and others") + " and others"
            folded[-1] = replace(last, events=last.events + row.events, until=row.until or row.at, text=text)
        else:
            folded.append(row)
    return folded


_REPEATABLE = frozenset({"kv", "event", "access"})
"""Rows that come in swarms and of which one with a count says enough."""


def _fold_quiet(rows: list[Row]) -> list[Row]:
    """Consecutive generations of which nothing stands out become one row."""
    by_generation: dict[bytes, list[Row]] = {}
    for row in rows:
        if row.generation is not None:
            by_generation.setdefault(row.generation, []).append(row)
    kinds = {generation: _fold_kind(found) for generation, found in by_generation.items()}
    kept: list[Row] = []
    stretch: list[bytes] = []
    seen: set[bytes] = set()
    for row in rows:
        if row.generation is not None and row.generation in seen:
            continue
        kind = kinds[row.generation] if row.generation is not None else None
        if stretch and (kind is None or kind != kinds[stretch[0]]):
            kept += _folded([by_generation[g] for g in stretch])
            stretch = []
        if row.generation is None:
            kept.append(row)
            continue
        seen.add(row.generation)
        if kind is None:
            kept += by_generation[row.generation]
        else:
            stretch.append(row.generation)
    kept += _folded([by_generation[g] for g in stretch])
    return _in_order(kept)


def _fold_kind(rows: list[Row]) -> str | None:
    """What a generation may be folded with: others that went well, or that failed in the same way; None for neither."""
    if any(row.what in _NOTABLE or row.level == "warn" for row in rows):
        return None
    failed = [row for row in rows if row.level == "bad"]
    return f"failed: {failed[0].text.split(' · ')[0]}" if failed else "went well"


_NOTABLE = frozenset({"edited", "stopped", "released", "stall", "tool call"})
"""Rows that a responder looks for one by one."""


def _folded(groups: list[list[Row]]) -> list[Row]:
    if len(groups) < FOLD_MIN:
        return [row for rows in groups for row in rows]
    rows = [row for group in groups for row in group]
    first, last = groups[0][0], max(rows, key=lambda row: row.until or row.at)
    outcome = _fold_kind(groups[0]) or ""
    bad = outcome != "went well"
    tokens = sum(row.events for row in rows if row.what == "tokens")
    text = f"{outcome} · {count(tokens, 'token')}" if tokens else outcome
    text += f" in {duration((last.until or last.at) - first.at)}"
    lane = f"{first.lane.split('.')[0]}–{groups[-1][0].lane.split('.')[0]}"
    return [
        Row(
            first.at,
            "",
            count(len(groups), "generation"),
            text,
            "bad" if bad else "dim",
            lane,
            None,
            last.until or last.at,
            events=len(rows),
        )
    ]


def _fold_middle(rows: list[Row], rows_max: int) -> list[Row]:
    """What still is too long loses its middle, in one piece: the start and, more so, the end of an incident are what is read."""
    surplus = len(rows) - rows_max
    if surplus <= 0:
        return rows
    head = rows_max * 2 // 5
    middle = rows[head : head + surplus + 1]
    bad = sum(row.level == "bad" for row in middle)
    text = f"{count(len(middle), 'row')} not shown" + (f", {bad:,} of them failures" if bad else "")
    until = max(row.until or row.at for row in middle)
    left_out = Row(middle[0].at, "", "left out", text, "bad" if bad else "dim", until=until, events=len(middle))
    return [*rows[:head], left_out, *rows[head + surplus + 1 :]]


def _open_rows(context: Context) -> list[Row]:
    open_ones = [g for g in context.state.generations.values() if g.status not in ("finished", "failed")]
    return [Row(**open_row(context, generation)) for generation in open_ones]


def _silent_rows(context: Context, rows: list[Row]) -> list[Row]:
    """Silence between rows in which no token run or other thing that lasts was under way."""
    silent: list[Row] = []
    busy_until: int | None = None
    for row in rows:
        if busy_until is not None and row.at - busy_until >= QUIET_US_MIN:
            silent.append(Row(**silence_row(context, busy_until, row.at)))
        busy_until = max(busy_until or row.at, row.until or row.at)
    return silent


def ttft_summary(ttft_us: tuple[int, ...]) -> str:
    """Times to first token in a few words."""
    if not ttft_us:
        return "no first token"
    if len(ttft_us) < 3:
        return "first token after " + ", ".join(duration(us) for us in ttft_us)
    median, high = np.percentile(ttft_us, (50, 100))
    return f"first token after {duration(int(median))} median, {duration(int(high))} at most"
