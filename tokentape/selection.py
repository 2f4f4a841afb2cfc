"""Which sessions and generations a command line chooses, by name or by a condition in SQL."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from replay.fold import fold
from replay.state import Generation, SessionState
from schemas.errors import UnknownSession, UsageError
from tokentape.installation import Installation

SESSIONS = "SELECT session_id FROM sessions WHERE ({where}) ORDER BY started_at, session_id"
REPLAYABLE = "coalesce(purpose, '') <> 'replay' AND requests > 0 AND ({where})"
GENERATIONS = (
    "SELECT session_id, generation_id FROM ("
    "SELECT * FROM (SELECT * FROM generations WHERE ({where})) WHERE session_id IN (SELECT session_id FROM sessions)"
    " ORDER BY submitted_at, generation_id{limit}"
    ") ORDER BY min(submitted_at) OVER (PARTITION BY session_id), session_id, submitted_at, generation_id"
)
"""Session by session, so that each is folded once."""


class Chosen(NamedTuple):
    """A generation and the session that it belongs to."""

    state: SessionState
    generation: Generation


def chosen_sessions(installation: Installation, sessions: Sequence[str], where: str | None, *, operation: str) -> list[bytes]:
    """The sessions that a command line names, or those of a condition over the view `sessions`, oldest first.

    Raises:
        UsageError: neither or both are given, or no session meets the condition.
        UnknownSession: there is no such session.
        QueryError: the condition is no SQL, refused or over a limit.
    """
    if bool(sessions) == (where is not None):
        fault = "sessions and --where exclude each other" if sessions else "nothing says which sessions"
        raise UsageError(fault, operation=operation, hint=f"tokentape {operation} SESSION…, or --where \"started_at > '2026-11-01'\"")
    if where is None:
        return list(dict.fromkeys(installation.session_id(session) for session in sessions))
    found = [uuid.UUID(session).bytes for session in column(installation, SESSIONS.format(where=where))]
    if not found:
        raise UsageError(f"no session meets {where!r}", operation=operation, hint="`tokentape sessions` lists them")
    return found


def replayable_sessions(installation: Installation, where: str) -> list[str]:
    """Sessions with requests of which a condition over the columns of the view `sessions` holds, replays left out.

    Raises:
        QueryError: it is no condition.
    """
    return column(installation, SESSIONS.format(where=REPLAYABLE.format(where=where)))


def column(installation: Installation, statement: str) -> list[str]:
    """The first column of a query's answer, as text."""
    return [str(row) for row in installation.sql.query(statement).table.column(0).to_pylist()]


def generations_where(installation: Installation, where: str, *, limit: int | None = None) -> Iterator[Chosen]:
    """Generations of which a condition over the columns of the view `generations` holds, the first `limit` of them in time.

    They come session by session, in the order in which these began. What was erased since it was listed is left out.

    Raises:
        QueryError: it is no condition.
    """
    rows = installation.sql.query(GENERATIONS.format(where=where, limit="" if limit is None else f" LIMIT {limit}")).table.to_pylist()
    for session, several in groupby(rows, key=lambda row: str(row["session_id"])):
        try:
            state = fold(installation.session_events(session, attachments=True))
        except UnknownSession:
            continue
        ids = {generation_id.hex(): generation for generation_id, generation in state.generations.items()}
        for row in several:
            if generation := ids.get(str(row["generation_id"]).replace("-", "")):
                yield Chosen(state, generation)
