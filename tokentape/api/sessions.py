"""Sessions: listed and searched, looked at at any moment, followed, taken out and in, labelled, replayed."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field
from starlette.responses import Response

from ingest.gateway import bodies as b
from ingest.gateway.keys import Role
from ingest.importing import Owner, import_session
from replay.sections import session_document, token_columns
from replay.timeline import timeline
from replay.words import iso
from replay.words import uuid as uuid_text
from schemas.errors import UnknownName, UsageError
from schemas.events import AnnotationContent, SessionAnnotated
from store.directory import Wanted
from tokentape.api.access import CONTENT
from tokentape.api.desk import Tape
from tokentape.api.live import EVENT_STREAM, follow
from tokentape.api.replays import Replayed, replay
from tokentape.api.routing import Call, Nothing, Reply, Route, Taken
from tokentape.exports import whole_session
from tokentape.lines import event_document, session_line

WRITERS: frozenset[Role] = frozenset({"analyst", "debugger"})
"""Who adds to what others see."""
NDJSON = "application/x-ndjson"

Tag = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^,\x00-\x1f]*[^,\s\x00-\x1f][^,\x00-\x1f]*$")]
Visibility = Literal["private", "team", "public"]
Kind = Literal["conversation", "replay", "engine", "kv"]


class Listed(Taken):
    """Which sessions, and which page of them."""

    q: str = Field(default="", max_length=400, description="Words that must all stand in messages, answers, tags, ids or names.")
    limit: int = Field(default=50, ge=1, le=500)
    offset: int = Field(default=0, ge=0, le=10_000_000)
    since: dt.datetime | None = Field(default=None, description="Sessions with their last event at or after this.")
    until: dt.datetime | None = Field(default=None, description="Sessions with their last event before this.")
    model: str | None = Field(default=None, max_length=200)
    verdict: str | None = Field(default=None, max_length=40, description="That of the last compare replay.")
    tenant: str | None = Field(default=None, max_length=100)
    tag: tuple[Tag, ...] = Field(default=(), description="A tag that the session has; several: all of them.")
    failed: bool = Field(default=False, description="Only sessions with a failure.")
    under_way: bool = Field(default=False, description="Only sessions with a request that has not ended.")
    replays: bool = Field(default=False, description="Those too in which replays of others are recorded.")
    kind: tuple[Kind, ...] = Field(
        default=("conversation",), description="What wrote them: clients, replays, engines (a run's requests and tokens), KV connectors."
    )


class At(Taken):
    """A moment of the session."""

    at: str | None = Field(default=None, max_length=64, description="An event's id, #POSITION, @OFFSET or a UTC time.")


class Rows(Taken):
    """How much of a timeline."""

    full: bool = Field(default=False, description="Every row; else quiet stretches are folded.")


class Span(Taken):
    """Which events."""

    limit: int = Field(default=200, ge=1, le=5000)
    offset: int = Field(default=0, ge=0)
    follow: bool = Field(default=False, description="As server-sent events: what is there, then what comes.")


class Which(At):
    """Which sequence."""

    generation: str = Field(max_length=36)
    index: int = Field(default=0, ge=0)


class Exported(Taken):
    """In which form."""

    format: Literal["json", "jsonl"] = "json"


class Imported(Taken):
    """A session to take in: `session_data` is an export, or a request with its response."""

    session_data: dict[str, Any]
    tags: tuple[Tag, ...] = ()
    visibility: Visibility = "team"


class Labels(Taken):
    """What to say of a session."""

    tags_added: tuple[Tag, ...] = ()
    tags_removed: tuple[Tag, ...] = ()
    visibility: Visibility | None = None
    note: str | None = Field(default=None, min_length=1, max_length=10_000)


def list_sessions(call: Call) -> Reply:
    """A page of what the caller may see, newest first."""
    asked: Listed = call.query
    call.desks.freshen()
    wanted = Wanted(
        text=asked.q,
        since=at_us(asked.since),
        until=at_us(asked.until),
        model=asked.model,
        verdict=asked.verdict,
        tenant=asked.tenant,
        tags=tuple(asked.tag),
        failed=asked.failed,
        under_way=asked.under_way,
        replays=asked.replays,
        kinds=asked.kind,
    )
    found = call.desks.directory.sessions(call.principal.viewer, wanted, limit=asked.limit, offset=asked.offset)
    call.rows = len(found.rows)
    page = {"total": found.total, "limit": asked.limit, "offset": asked.offset}
    return Reply({"sessions": [session_line(row) for row in found.rows], **page, "completeness": found.completeness.document()})


def import_one(call: Call) -> Reply:
    """Take a session in."""
    asked: Imported = call.body
    installation, principal = call.desks.installation, call.principal
    owner = Owner(principal.tenant or installation.settings.tenant, principal.name, tuple(asked.tags), asked.visibility)
    with call.desks.log() as log:
        made, call.rows = import_session(asked.session_data, owner, log=log, registry=installation.registry, settings=installation.settings)
    call.desks.directory.tell(made, asked.visibility, principal.name)
    call.desks.written()
    where = f"/api/v1/debug-sessions/{uuid_text(made)}"
    answer = {"session_id": uuid_text(made), "events": call.rows, "tags": asked.tags, "visibility": asked.visibility}
    return Reply(answer, 201, {"location": where})


def show(call: Call) -> Reply:
    """The session as it stands, or as it stood."""
    tape, row = _tape(call)
    state = tape.at(call.query.at)
    last = {"at": iso(state.last.at), "event_id": uuid_text(state.last.event_id)} if state.last else {"at": None, "event_id": None}
    document = {"session": session_line(row), **last, "of": len(tape.events), **session_document(state)}
    return Reply({**document, "completeness": call.desks.completeness()})


def show_timeline(call: Call) -> Reply:
    """What happened, in rows."""
    tape, _ = _tape(call)
    return Reply((timeline(tape.events, rows_max=None) if call.query.full else timeline(tape.events)).document())


def tokens(call: Call) -> Reply:
    """One sequence's tokens, column by column."""
    tape, _ = _tape(call)
    try:
        wanted = uuid.UUID(call.query.generation).bytes
    except ValueError:
        raise UsageError(f"{call.query.generation!r} is no id", operation="tokens", hint="the generation_id of a generation") from None
    generation = tape.at(call.query.at).generations.get(wanted)
    sequences = generation.sequences if generation else []
    found = next((sequence for sequence in sequences if sequence.index == call.query.index), None)
    if found is None:
        there = f"sequences: {', '.join(str(s.index) for s in sequences)}" if sequences else "GET …/{id} lists the generations"
        raise UnknownName(f"no sequence {call.query.index} of generation {call.query.generation}", operation="tokens", hint=there)
    return Reply({"generation": call.query.generation, **token_columns(found)})


def events(call: Call) -> Reply | Response:
    """A page of the events, or the stream of them."""
    asked: Span = call.query
    if asked.follow or EVENT_STREAM in call.headers.get("accept", ""):
        session_id, _ = call.desks.gate.session(call.principal, call.ids["id"])
        return follow(call, session_id, asked.offset, event_document)
    tape, _ = _tape(call)
    page = tape.events[asked.offset : asked.offset + asked.limit]
    call.rows = len(page)
    lines = [event_document(stored, asked.offset + i + 1) for i, stored in enumerate(page)]
    return Reply({"events": lines, "total": len(tape.events), "limit": asked.limit, "offset": asked.offset})


def export(call: Call) -> Reply | Response:
    """The whole session, with each event's Avro bytes."""
    tape, _ = _tape(call)
    document = whole_session(tape.events)
    name = {"content-disposition": f'attachment; filename="session-{call.ids["id"]}.{call.query.format}"'}
    if call.query.format == "json":
        return Reply(document, 200, name)
    return Response(b"".join(orjson.dumps(line) + b"\n" for line in document["events"]), media_type=NDJSON, headers=name)


def annotate(call: Call) -> Reply:
    """Say something of a session: an event of it."""
    asked: Labels = call.body
    if asked == Labels():
        raise UsageError("nothing to annotate", operation="annotate", hint="give tags_added, tags_removed, visibility or note")
    if both := set(asked.tags_added) & set(asked.tags_removed):
        raise UsageError(f"{sorted(both)[0]!r} is to be added and removed", operation="annotate", hint="add a tag or remove it")
    session_id, _ = call.desks.gate.session(call.principal, call.ids["id"])
    labels = asked.model_dump(exclude={"note"})
    said = SessionAnnotated(**labels, content=AnnotationContent(note=asked.note) if asked.note else None)
    call.desks.installation.annotate(session_id.hex(), said, actor=call.principal.name)
    if asked.visibility is not None:
        call.desks.directory.tell(session_id, asked.visibility, call.principal.name)
    call.desks.written()
    return Reply({"session_id": call.ids["id"], **asked.model_dump()}, 201)


def _tape(call: Call) -> tuple[Tape, dict[str, Any]]:
    call.desks.freshen()
    session_id, row = call.desks.gate.session(call.principal, call.ids["id"])
    tape = call.desks.tape(session_id)
    call.rows = len(tape.events)
    return tape, row


def at_us(moment: dt.datetime | None) -> int | None:
    """A moment in µs since the epoch; UTC where it names no zone."""
    if moment is None:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
    return (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)


SESSION = b.record(
    "session_id started_at last_event_at tenant requests failures tokens tags visibility",
    **dict.fromkeys(("session_id", "started_at", "last_event_at", "tenant", "visibility"), b.TEXT),
    **dict.fromkeys(("requests", "failures", "tokens", "edits", "stops", "events", "under_way"), b.INTEGER),
    tags=b.array(b.TEXT),
    models=b.array(b.TEXT),
    final=b.BOOLEAN,
)
PAGE = {"total": b.INTEGER, "limit": b.INTEGER, "offset": b.INTEGER}
MADE = b.record("session_id events", session_id=b.TEXT, events=b.INTEGER)
ONE = "/debug-sessions/{id}"


def _shown(path: str, name: str, summary: str, handle: Callable[[Call], Any], query: type[Taken] = Nothing, **rest: Any) -> Route:
    return Route("GET", path, name, summary, CONTENT, handle, query=query, content=True, **rest)


ROUTES = (
    _shown(
        "/debug-sessions",
        "list_sessions",
        "Sessions that the caller may see, newest first; searched and filtered.",
        list_sessions,
        Listed,
        answer=b.record("sessions total", sessions=b.array(SESSION), **PAGE),
    ),
    Route(
        "POST",
        "/debug-sessions",
        "import_session",
        "Take a session in: an export, or a request and its response.",
        WRITERS,
        import_one,
        body=Imported,
        answer=MADE,
        status=201,
        content=True,
    ),
    _shown(ONE, "show_session", "A session as it stands, or at a moment.", show, At, answer=b.record("session generations of")),
    _shown(f"{ONE}/timeline", "show_timeline", "What happened in a session.", show_timeline, Rows, answer=b.record("rows")),
    _shown(f"{ONE}/tokens", "show_tokens", "The tokens of one sequence.", tokens, Which, answer=b.record("tokens")),
    _shown(
        f"{ONE}/events",
        "list_events",
        "The events of a session; `follow` streams them.",
        events,
        Span,
        answer=b.record("events total"),
        media=("application/json", EVENT_STREAM),
    ),
    _shown(
        f"{ONE}/export",
        "export_session",
        "A session to take away; `import_session` takes it back.",
        export,
        Exported,
        media=("application/json", NDJSON),
    ),
    Route(
        "POST",
        f"{ONE}/annotations",
        "annotate_session",
        "Tags, a note, who may see it.",
        WRITERS,
        annotate,
        body=Labels,
        answer=b.record("session_id"),
        status=201,
        content=True,
    ),
    Route(
        "POST",
        f"{ONE}/replay",
        "replay_session",
        "Play it back: a job; its result tells the state or the verdict.",
        WRITERS,
        replay,
        body=Replayed,
        answer=b.record("job state", job=b.TEXT, state=b.TEXT),
        status=202,
        content=True,
    ),
)
