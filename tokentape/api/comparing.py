"""What replays found, of one session and of a whole run, and two generations beside one another, token by token."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ingest.gateway import bodies as b
from replay.comparison import generations_document, replay_document, subject_of
from replay.words import iso, uuid
from schemas.errors import UnknownName
from tokentape.api.access import CONTENT
from tokentape.api.routing import Call, Reply, Route, Taken
from tokentape.api.sessions import ONE, PAGE


class Compared(Taken):
    """What is compared: without any of these, the replay that the session records with what it replayed."""

    generation: str | None = Field(default=None, max_length=36, description="By default the last one with tokens.")
    with_session: str | None = Field(default=None, max_length=36, description="The other generation's session, by default the same.")
    with_generation: str | None = Field(default=None, max_length=36, description="By default the last one with tokens.")


class Page(Taken):
    """Which part of a run."""

    verdict: str | None = Field(default=None, max_length=40)
    limit: int = Field(default=100, ge=1, le=1000)
    offset: int = Field(default=0, ge=0, le=10_000_000)


def list_replays(call: Call) -> Reply:
    """The replays of a session, newest first; each is recorded in a session of its own."""
    call.desks.freshen()
    session_id, _ = call.desks.gate.session(call.principal, call.ids["id"])
    found = call.desks.directory.replays(call.principal.viewer, session_id)
    call.rows = len(found)
    return Reply({"replays": [_row(row) for row in found]})


def comparison(call: Call) -> Reply:
    """A replay beside what it replayed, or two generations."""
    asked: Compared = call.query
    call.desks.freshen()
    session_id, _ = call.desks.gate.session(call.principal, call.ids["id"])
    state = call.desks.tape(session_id).at(None)
    subject = subject_of(state)
    if asked == Compared() and subject is not None:
        call.desks.gate.session(call.principal, subject.hex())
        document = replay_document(state, call.desks.tape(subject).at(None))
    else:
        other, _ = call.desks.gate.session(call.principal, asked.with_session or call.ids["id"])
        document = generations_document(state, call.desks.tape(other).at(None), asked.generation, asked.with_generation)
    call.rows = sum(len(sequence["first"]["text"]) for sequence in document["sequences"])
    return Reply(document)


def list_runs(call: Call) -> Reply:
    """Runs of `replay-batch`, newest first, with their verdicts counted."""
    call.desks.freshen()
    found = call.desks.directory.runs(call.principal.viewer)
    call.rows = len(found)
    return Reply({"runs": [{**run, "begun_at": iso(run["begun_at"]), "ended_at": iso(run["ended_at"])} for run in found]})


def show_run(call: Call) -> Reply:
    """The sessions of a run, what differs most first."""
    asked: Page = call.query
    call.desks.freshen()
    found = call.desks.directory.run(call.principal.viewer, call.ids["run"])
    if not found:
        raise UnknownName(f"no run {call.ids['run'][:64]!r}", operation="show run", hint="GET /api/v1/replay-runs lists them")
    kept = [row for row in found if asked.verdict in (None, row["verdict"] or "unfinished")]
    page = kept[asked.offset : asked.offset + asked.limit]
    call.rows = len(page)
    rows = [_row(row) for row in page]
    return Reply({"run": call.ids["run"], "replays": rows, "total": len(kept), "limit": asked.limit, "offset": asked.offset})


def _row(row: dict[str, Any]) -> dict[str, Any]:
    ids = {"replay": uuid(row["replay"]), "recorded_in": uuid(row["session"]), "session_id": uuid(row["subject"])}
    named = ("run", "engine", "mode", "verdict", "reason", "drift_max", "noise_floor")
    return {**ids, "at": iso(row["begun_at"]), "tokens": row["scored"], **{name: row[name] for name in named}}


ROUTES = (
    Route(
        "GET",
        f"{ONE}/replays",
        "list_replays",
        "The replays of a session.",
        CONTENT,
        list_replays,
        content=True,
        answer=b.record("replays"),
    ),
    Route(
        "GET",
        f"{ONE}/comparison",
        "compare",
        "A replay beside what it replayed, or two generations, token by token.",
        CONTENT,
        comparison,
        query=Compared,
        content=True,
        answer=b.record("kind verdict sequences"),
    ),
    Route("GET", "/replay-runs", "list_runs", "Runs of many replays.", CONTENT, list_runs, content=True, answer=b.record("runs")),
    Route(
        "GET",
        "/replay-runs/{run}",
        "show_run",
        "The sessions of a run, what differs most first.",
        CONTENT,
        show_run,
        query=Page,
        content=True,
        answer=b.record("run replays total", **PAGE),
    ),
)
