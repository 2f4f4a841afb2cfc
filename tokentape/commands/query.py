"""Looking: `sql`, `sessions`, `show`, `timeline`, `tail`."""

from __future__ import annotations

import sys
import time
import uuid
from pathlib import Path
from typing import Any

import click
import orjson

from replay.fold import Until, fold
from replay.render import SessionPage
from replay.snapshot import dump
from replay.timeline import timeline as make_timeline
from replay.timeline_view import TimelineView
from replay.words import when
from schemas.codec import decode
from schemas.errors import DataError, UsageError
from schemas.events import AnnotationContent, SessionAnnotated
from store import views
from store.directory import SESSION_KINDS, VISIBILITIES, Viewer, Wanted
from store.directory_sql import SEVERITY
from store.sql import Completeness
from tokentape.commands.common import checked_tags, format_option, time_of, with_installation
from tokentape.installation import Installation
from tokentape.lines import session_line
from tokentape.output import err, out, write_json, write_rows, write_table

COLUMNS = ("started", "session_id", "kind", "who", "requests", "tokens", "failures", "tags")
"""Of the list of sessions."""
WHO_MAX = 16
"""Characters of a name in that list."""


@click.command()
@click.argument("query", required=False)
@click.option("--file", "source", type=click.Path(exists=True, path_type=Path), help="Read the statement from a file.")
@click.option("--tenant", help="Answer as this tenant may: its rows, the documented views, nothing else.")
@click.option("--views", "list_views", is_flag=True, help="List the views and their columns instead.")
@format_option
@with_installation
def sql(installation: Installation, query: str | None, source: Path | None, tenant: str | None, list_views: bool, fmt: str) -> None:
    """One SQL statement over all events, hot and cold, in a sandbox that can only read.

    --views lists what can be asked. In `events` ids are BLOBs: session_id = uuid_blob('…'); in all other views they are text.
    """
    if list_views:
        rows = [{"view": v.name, "holds": v.purpose, "columns": ", ".join(name for name, _ in v.columns)} for v in views.describe()]
        write_rows(rows, fmt, ["view", "holds", "columns"])
        return
    statement = source.read_text(encoding="utf-8") if source else query or ("" if sys.stdin.isatty() else sys.stdin.read())
    if not statement.strip():
        raise UsageError("no statement", operation="sql", hint="tokentape sql 'SELECT * FROM sessions'")
    _answer(installation, statement, fmt, tenant=tenant, operation="sql")


@click.command()
@click.argument("words", nargs=-1)
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 100_000), help="Newest sessions to list.")
@click.option("--offset", default=0, type=click.IntRange(0), help="Leave out so many that are newer.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Only sessions that have this tag; several: that have all of them.")
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(SESSION_KINDS), help="What wrote them; several: each.  [default: conversation]"
)
@click.option("--replays", is_flag=True, help="List the sessions too in which replays of others are recorded.")
@click.option("--since", metavar="TIME", help="Only sessions with their last event at or after this; UTC where no zone is named.")
@click.option("--until", metavar="TIME", help="Only sessions with their last event before this.")
@click.option("--model", help="Only sessions that asked for this model.")
@click.option("--verdict", type=click.Choice(SEVERITY), help="Only sessions of which the last compare replay said this.")
@click.option("--tenant", help="Only sessions of this tenant.")
@click.option("--failed", is_flag=True, help="Only sessions with a failure.")
@click.option("--under-way", is_flag=True, help="Only sessions with a request that has not ended.")
@format_option
@with_installation
def sessions(
    installation: Installation,
    words: tuple[str, ...],
    limit: int,
    offset: int,
    fmt: str,
    since: str | None,
    until: str | None,
    **asked: Any,
) -> None:
    """The newest sessions; with WORDS those in which all of them stand: in messages, answers, tags, ids or names."""
    asked["kinds"] = asked["kinds"] or Wanted().kinds
    first, end = time_of(since, operation="sessions"), time_of(until, operation="sessions")
    wanted = Wanted(text=" ".join(words), since=first, until=end, **asked)
    installation.freshen()
    with installation.accessing("sessions", " ".join(["sessions", *words])) as access:
        found = installation.directory.sessions(Viewer(), wanted, limit=limit, offset=offset)
        access["rows"] = len(found.rows)
        write_rows([_session_row(row) for row in found.rows], fmt, COLUMNS)
    err.print(f"[dim]{_said(found.completeness)}[/dim]")


def _session_row(row: dict[str, Any]) -> dict[str, Any]:
    """A session as a line of the list."""
    line = session_line(row)
    who = (line["user"] or line["owner"] or "")[:WHO_MAX]
    return {**line, "started": when(row["first_at"]).strftime("%m-%d %H:%M:%S"), "who": who or None}


@click.command()
@click.argument("session")
@click.option("--tag", "added", multiple=True, metavar="TAG", help="Add a tag.")
@click.option("--untag", "removed", multiple=True, metavar="TAG", help="Remove a tag.")
@click.option("--note", help="Leave a note on the session.")
@click.option("--visibility", type=click.Choice(VISIBILITIES), help="Who may see it.")
@with_installation
def annotate(
    installation: Installation, session: str, added: tuple[str, ...], removed: tuple[str, ...], note: str | None, visibility: str | None
) -> None:
    """Put tags or a note on a session, or take tags away: an event of the session, with who did it and when."""
    if not (added or removed or note or visibility):
        raise UsageError("nothing to annotate", operation="annotate", hint="give --tag, --untag, --note or --visibility")
    checked_tags((*added, *removed), operation="annotate")
    if both := set(added) & set(removed):
        raise UsageError(f"--tag and --untag both name {sorted(both)[0]!r}", operation="annotate", hint="add a tag or remove it")
    installation.freshen()
    installation.annotate(
        session,
        SessionAnnotated(
            tags_added=list(added),
            tags_removed=list(removed),
            visibility=visibility,
            content=AnnotationContent(note=note) if note else None,
        ),
    )
    done = [
        *(f"+{tag}" for tag in added),
        *(f"-{tag}" for tag in removed),
        *([visibility] if visibility else []),
        *(["note"] if note else []),
    ]
    click.echo(f"annotated {session}: {' '.join(done)}")


def _answer(installation: Installation, statement: str, fmt: str, *, tenant: str | None, operation: str) -> None:
    installation.freshen()
    with installation.accessing(operation, statement) as access:
        answer = installation.sql.query(statement, tenant=tenant)
        access["rows"] = answer.table.num_rows
        write_table(answer.table, fmt)
    err.print(f"[dim]{_said(answer.completeness)}[/dim]")


def _said(completeness: Completeness) -> str:
    """How complete an answer is, in one line."""
    fresh = completeness.fresh_to.strftime("fresh to %H:%M:%S.%f")[:-3] + " UTC" if completeness.fresh_to else "nothing indexed yet"
    missing = {
        "lost in gaps": completeness.lost,
        "quarantined": completeness.quarantined,
        "duplicates dropped": completeness.duplicates,
        "erased": completeness.erased or 0,
        "sampled out": completeness.sampled_out,
        "still being read": completeness.unread,
    }
    said = ", ".join(f"{count:,} {what}" for what, count in missing.items() if count)
    return f"{fresh}; missing: {said or 'nothing'}"


@click.command()
@click.argument("session")
@click.option("--at", "moment", metavar="EVENT|TIME", help="Time travel: an event's id, #POSITION, @OFFSET or a UTC time.")
@click.option("--full", is_flag=True, help="Show long texts whole.")
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print it.")
@with_installation
def show(installation: Installation, session: str, moment: str | None, full: bool, fmt: str) -> None:
    """A session as it stands, or as it stood at an event or a time."""
    installation.freshen()
    with installation.accessing("show", f"show {session} --at {moment}") as access:
        events = installation.session_events(session, attachments=full)
        access["rows"] = len(events)
        state = fold(events, until=Until.parse(moment) if moment else None)
        if fmt == "json":
            sys.stdout.buffer.write(dump(state) + b"\n")
        else:
            out.print(SessionPage(state, total=len(events), full=full))


@click.command()
@click.argument("session")
@click.option("--full", is_flag=True, help="Every row, however many there are.")
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print it.")
@with_installation
def timeline(installation: Installation, session: str, full: bool, fmt: str) -> None:
    """What happened in a session: who, what, when, silences between tokens, failures."""
    installation.freshen()
    with installation.accessing("timeline", f"timeline {session}") as access:
        events = installation.session_events(session)
        access["rows"] = len(events)
        made = make_timeline(events, rows_max=None) if full else make_timeline(events)
        if fmt == "json":
            write_json(made.document())
        else:
            out.print(TimelineView(made))


@click.command()
@click.option("--from-start", is_flag=True, help="Begin with the oldest event that the log holds, not with the next one.")
@click.option("--limit", type=click.IntRange(1), help="Stop after that many events.")
@with_installation
def tail(installation: Installation, from_start: bool, limit: int | None) -> None:
    """Follow the log live, one JSON object a line."""
    log = installation.log
    offsets = {p: log.bounds(p)[0 if from_start else 1] for p in range(log.partitions)}
    printed = 0
    while limit is None or printed < limit:
        for partition in log.wait(offsets, wait_s=0.5):
            batch = log.read(partition, offsets[partition], limit=1000)
            for i, value in enumerate(batch.values):
                if limit is not None and printed >= limit:
                    return
                click.echo(orjson.dumps(_line(installation, partition, batch.offset_first + i, value)))
                printed += 1
            offsets[partition] = batch.offset_next


def _line(installation: Installation, partition: int, offset: int, value: bytes) -> dict[str, Any]:
    place = {"partition": partition, "offset": offset}
    try:
        event = decode(value, installation.registry)
    except DataError as error:
        return {**place, "error": str(error), "bytes": len(value)}
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(event.recorded_at / 1e6)) + f".{event.recorded_at % 1_000_000:06d}Z"
    payload = event.payload.model_dump(mode="json", exclude_none=True)
    return {**place, "kind": event.kind, "session_id": str(uuid.UUID(bytes=event.session_id)), "recorded_at": when, "payload": payload}


@click.command()
@click.argument("blob_id", metavar="ID")
@click.option("--tenant", help="Whose blob it is.  [default: the tenant of the settings]")
@with_installation
def blob(installation: Installation, blob_id: str, tenant: str | None) -> None:
    """The bytes of a large body or attachment, to standard output; `messages` in SQL has blob_id and attachments."""
    owner = tenant or installation.settings.tenant
    with installation.accessing("blob", f"blob {blob_id} --tenant {owner}") as access:
        data = installation.blobs.find(owner, blob_id)
        access["rows"] = 1
        sys.stdout.buffer.write(data)


COMMANDS = [sql, sessions, annotate, show, timeline, tail, blob]
