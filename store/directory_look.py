"""What one viewer is shown of one state of the list of sessions: the condition, its rows, and what is known beyond them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from store.catalog import Segment, Shard
from store.reader import blob
from store.sql import Completeness
from store.views import literal

Span = tuple[bytes, bytes]
"""The first and the last id of sessions that may be there."""
Page = tuple[str, int, int]
Answer = tuple[list[dict[str, Any]], int]
Answers = dict[Page, Answer]
"""Pages by their condition, limit and offset: rows and total."""


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks: `tenant` None sees all, another one's own tenant, of it nothing private of others, and what is public.

    `names` are the opaque ids under which the viewer is recorded as an actor or user.
    """

    tenant: str | None = None
    names: tuple[str, ...] = ()

    def condition(self, visibility: str = "visibility", by: str = "shown_by", known: str = "true") -> str:
        """The one condition on a session that may be seen.

        `visibility` and who said it are expressions, and so is whether it is `known` who opened it and for whom.
        """
        if self.tenant is None:
            return "true"
        mine = ", ".join(map(literal, self.names)) or "NULL"
        own = f'({by} IN ({mine}) OR ({known} AND (owner IN ({mine}) OR "user" IN ({mine}))))'
        return f"({visibility} = 'public' OR (tenant = {literal(self.tenant)} AND ({visibility} <> 'private' OR coalesce({own}, false))))"


@dataclass(frozen=True, slots=True)
class Said:
    """What the last event of its kind said of who may see a session: its offset, what it said, and whose word that is."""

    place: int
    visibility: str
    by: str | None


@dataclass(frozen=True, slots=True)
class Look:
    """One state of the tables, for one viewer; without tables where nothing was ever catalogued."""

    cursor: duckdb.DuckDBPyConnection
    made: bool
    may: str
    news: Mapping[bytes, Said]
    completeness: Completeness
    answers: Answers
    partly: Sequence[Span]

    def page(self, condition: str, limit: int, offset: int) -> Answer:
        """Some rows, newest first, and how many meet the condition."""
        order = f"ORDER BY last_at DESC, session_id LIMIT {int(limit)} OFFSET {int(offset)}"
        rows = self.rows(f"SELECT * FROM session WHERE {condition} {order}")
        if rows and len(rows) < limit:
            return rows, len(rows) + offset
        return rows, int(self.rows(f"SELECT count(*) AS n FROM session WHERE {condition}")[0]["n"])

    def rows(self, statement: str) -> list[dict[str, Any]]:
        """The answer as plain values."""
        rows: list[dict[str, Any]] = self.cursor.execute(statement).to_arrow_table().to_pylist()
        return rows

    def told(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of `session` for a caller. While something is unread no verdict is told, for any of it may be a later replay."""
        row, place = {name: value for name, value in row.items() if name != "shown_at"}, row["shown_at"]
        news = self.news.get(row["session_id"])
        newer = {} if news is None or news.place < (place or 0) else {"visibility": news.visibility, "shown_by": news.by}
        later = {"verdict": None, "replayed": None} if self.partly else {}
        final = not any(first <= row["session_id"] <= last for first, last in self.partly)
        return _told({**row, **newer, **later, "final": final})


def spans_of(sources: Iterable[Shard | Segment]) -> list[Span]:
    """Which sessions some shards and segments may hold, as few spans of their ids."""
    spans: list[Span] = []
    for first, last in sorted((source.session_min, source.session_max) for source in sources):
        if spans and first <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(last, spans[-1][1])
        else:
            spans.append((first, last))
    return spans


def may_see(viewer: Viewer, news: Mapping[bytes, Said], told: Iterable[tuple[bytes, str, str]], partly: Iterable[Span]) -> str:
    """The condition on rows of `session` that this viewer may see, by what they say and by what is known beyond them.

    Whose a session is stands in its opening: where that may be unread, nobody is taken for its owner.
    """
    known = " AND ".join(f"session_id NOT BETWEEN {blob(first)} AND {blob(last)}" for first, last in partly) or "true"
    newer = [
        (
            f"session_id = {blob(session)} AND coalesce(shown_at, 0) <= {said.place}",
            literal(said.visibility),
            literal(said.by) if said.by else "NULL",
        )
        for session, said in news.items()
    ]
    cases = [" ".join(f"WHEN {one[0]} THEN {one[column]}" for one in newer) for column in (1, 2)]
    columns = [f"CASE {cases[0]} ELSE visibility END", f"CASE {cases[1]} ELSE shown_by END"] if newer else []
    each = [f"(session_id <> {blob(session)} OR {viewer.condition(literal(said), literal(by), known)})" for session, said, by in told]
    shown, by = columns or ("visibility", "shown_by")
    return " AND ".join([viewer.condition(shown, by, known), *each])


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what was said first as text; an escape that was cut in two is left out."""
    said = row["first_message"]
    if said is not None:
        with contextlib.suppress(ValueError):  # a body that is no JSON is shown as it is
            said = json.loads(f'"{said}"', strict=False).encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
    return {**row, "first_message": said}
