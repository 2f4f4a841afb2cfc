"""Which sessions and generations a command's SQL condition chooses."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from replay.fold import fold
from replay.state import Generation, SessionState
from schemas.errors import UnknownSession
from tokentape.installation import Installation

SESSIONS = (
    "SELECT session_id FROM sessions WHERE coalesce(purpose, '') <> 'replay' AND requests > 0 AND ({where}) ORDER BY started_at, session_id"
)
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


def sessions_where(installation: Installation, where: str) -> list[str]:
    """Sessions of which a condition over the columns of the view `sessions` holds, replays left out.

    Raises:
        QueryError: it is no condition.
    """
    return column(installation, SESSIONS.format(where=where))


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
