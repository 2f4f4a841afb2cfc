"""Looking: `sql`, `sessions`, `show`, `timeline`, `tail`."""

from __future__ import annotations

import sys
import time
import uuid
from pathlib import Path
from typing import Any

import click
import orjson

from replay.fold import fold
from replay.render import render_state
from replay.timeline import render_timeline, timeline_rows
from schemas.codec import decode
from schemas.errors import DataError, UsageError
from store import sql as store_sql
from store import views
from tokentape.commands.common import format_option, with_installation
from tokentape.installation import Installation
from tokentape.output import err, out, write_table

SESSIONS = "SELECT * FROM sessions ORDER BY started_at DESC LIMIT {limit}"


@click.command(epilog="\b\n" + views.describe())
@click.argument("query", required=False)
@click.option("--file", "source", type=click.Path(exists=True, path_type=Path), help="Read the statement from a file.")
@click.option("--tenant", help="Answer as this tenant may: its rows, the documented views, nothing else.")
@format_option
@with_installation
def sql(installation: Installation, query: str | None, source: Path | None, tenant: str | None, fmt: str) -> None:
    """One SQL statement over all events, hot and cold, in a sandbox that can only read."""
    statement = source.read_text(encoding="utf-8") if source else query or ("" if sys.stdin.isatty() else sys.stdin.read())
    if not statement.strip():
        raise UsageError("no statement", operation="sql", hint="tokentape sql 'SELECT * FROM sessions'")
    _answer(installation, statement, fmt, tenant=tenant, operation="sql")


@click.command()
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 100_000), help="Newest sessions to list.")
@format_option
@with_installation
def sessions(installation: Installation, limit: int, fmt: str) -> None:
    """The newest sessions."""
    _answer(installation, SESSIONS.format(limit=limit), fmt, tenant=None, operation="sessions")


def _answer(installation: Installation, statement: str, fmt: str, *, tenant: str | None, operation: str) -> None:
    installation.freshen()
    with installation.accessing(operation, statement) as access:
        answer = store_sql.query(installation.settings, statement, tenant=tenant)
        access["rows"] = answer.table.num_rows
        write_table(answer.table, fmt)
    err.print(f"[dim]{answer.completeness}[/dim]")


@click.command()
@click.argument("session")
@click.option("--at", "moment", metavar="EVENT|TIME", help="Time travel: an event's id, or a UTC time such as 2026-11-23T14:03:05.5.")
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print it.")
@with_installation
def show(installation: Installation, session: str, moment: str | None, fmt: str) -> None:
    """A session as it stands, or as it stood at an event or a time."""
    installation.freshen()
    with installation.accessing("show", f"show {session} --at {moment}") as access:
        events = list(installation.reader.session(installation.session_id(session)))
        access["rows"] = len(events)
        state = fold(events, until=moment)
        if fmt == "json":
            sys.stdout.buffer.write(orjson.dumps(state.to_dict(), option=orjson.OPT_APPEND_NEWLINE))
        else:
            render_state(state, out)


@click.command()
@click.argument("session")
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print it.")
@with_installation
def timeline(installation: Installation, session: str, fmt: str) -> None:
    """What happened in a session: who, what, when, silences between tokens, failures."""
    installation.freshen()
    with installation.accessing("timeline", f"timeline {session}") as access:
        events = list(installation.reader.session(installation.session_id(session)))
        access["rows"] = len(events)
        if fmt == "json":
            for row in timeline_rows(events):
                sys.stdout.buffer.write(orjson.dumps(row, default=str, option=orjson.OPT_APPEND_NEWLINE))
        else:
            render_timeline(events, out)


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


COMMANDS = [sql, sessions, show, timeline, tail]
