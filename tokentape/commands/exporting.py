"""`export` and `import`: sessions for other programs, and from another tokentape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from ingest.importing import Owner, import_session, read_session
from ingest.traces.reading import from_document
from ingest.traces.taking import Traces
from replay.words import count, uuid
from schemas.errors import UsageError
from store.directory import VISIBILITIES
from tokentape.commands.common import checked_tags, format_option, with_installation
from tokentape.exports import FORMATS, documents
from tokentape.exports import export as write
from tokentape.installation import Installation
from tokentape.output import err, out, write_rows
from tokentape.selection import chosen_sessions

T = TypeVar("T")


@click.command()
@click.argument("sessions", nargs=-1, metavar="[SESSION]...")
@click.option("--where", metavar="SQL", help="Which sessions: a condition over the columns of the view `sessions`.")
@click.option("--format", "fmt", type=click.Choice(list(FORMATS)), default="jsonl", show_default=True, help="What to write.")
@click.option("-o", "--out", "target", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file.")
@with_installation
def export(installation: Installation, sessions: tuple[str, ...], where: str | None, fmt: str, target: Path) -> None:
    """Sessions as a file: jsonl has one event a line, parquet the columns of the view `events`, otlp the generations as spans.

    session is what `tokentape import` and the REST API take back: a JSON document a line, its events in Avro beside their text. Long
    messages are in it; attachments stay in the blob store, and the document names them.

    OTLP is its JSON form, one request to a collector a line, with the conventions for generative AI and without content.
    """
    installation.freshen()
    with installation.accessing("export", f"export {' '.join(sessions)} {f'--where {where}' if where else ''} --format {fmt}") as access:
        chosen = chosen_sessions(installation, sessions, where, operation="export")
        written = write(installation, chosen, fmt, target)
        access["rows"] = written
    out.print(f"{target}: {count(written, 'span' if fmt == 'otlp' else 'event')} of {count(len(chosen), 'session')}", markup=False)


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Add a tag to each session.")
@click.option("--visibility", type=click.Choice(VISIBILITIES), default="team", show_default=True, help="Who may see them.")
@click.option("--otlp", is_flag=True, help="The file holds spans of calls to models: OTLP in JSON, a request a line.")
@format_option
@with_installation
def take_in(installation: Installation, file: Path, tags: tuple[str, ...], visibility: str, otlp: bool, fmt: str) -> None:
    """Take sessions in: those of `export --format session`, or a request and its response, as {"request": …, "response": …}.

    Each becomes a session of its own with new ids and the times that were recorded, also where the original is still here. The whole
    file is read before the first one is written.

    With --otlp each call to a model becomes a generation in the session of its conversation or trace, and one that is here already is
    left out. What OpenTelemetry's exporters send to the REST API (/v1/traces) is taken in the same way.
    """
    owner = Owner(installation.settings.tenant, installation.person(), checked_tags(tags, operation="import"), visibility)
    if otlp:
        _take_spans(installation, file, owner, fmt)
        return
    for _ in _each(file, lambda data: read_session(data, installation.registry)):
        pass
    rows = []
    with installation.accessing("import", f"import {file}") as access:
        for _, data in documents(file):
            made, events = import_session(data, owner, log=installation.log, registry=installation.registry, settings=installation.settings)
            rows.append({"session_id": uuid(made), "events": events})
        access["rows"] = sum(row["events"] for row in rows)
    write_rows(rows, fmt, ["session_id", "events"])


def _take_spans(installation: Installation, file: Path, owner: Owner, fmt: str) -> None:
    """Every call of the file, as one request."""
    spans = [span for several in _each(file, from_document) for span in several]
    installation.freshen()
    traces = Traces(installation.settings, installation.reader.sessions)
    with installation.accessing("import", f"import --otlp {file}") as access:
        taken = traces.take(spans, owner, installation.log)
        access["rows"] = sum(events for _, events in taken.sessions.values())
    if taken.repeated:
        err.print(f"{count(taken.repeated, 'generation')} here already", markup=False)
    if taken.aside:
        err.print(f"{count(taken.aside, 'span')} left aside: no calls to a model", markup=False)
    rows = [{"session_id": uuid(session), "generations": made, "events": events} for session, (made, events) in taken.sessions.items()]
    write_rows(rows, fmt, ["session_id", "generations", "events"])


def _each(file: Path, read: Callable[[Any], T]) -> Iterator[T]:
    """What each document of the file says.

    Raises:
        UsageError: one of them is not what it should be; the line is named.
    """
    for line, data in documents(file):
        try:
            yield read(data)
        except UsageError as error:
            raise UsageError(error.fault, operation="import", place=f"{file}, line {line}", hint=error.hint) from error


COMMANDS = [export, take_in]
