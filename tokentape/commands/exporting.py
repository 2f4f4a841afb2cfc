"""`export`: sessions for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from replay.words import count
from tokentape.commands.common import chosen_sessions, with_installation
from tokentape.exports import FORMATS
from tokentape.exports import export as write
from tokentape.installation import Installation
from tokentape.output import out


@click.command()
@click.argument("sessions", nargs=-1, metavar="[SESSION]...")
@click.option("--where", metavar="SQL", help="Which sessions: a condition over the columns of the view `sessions`.")
@click.option("--format", "fmt", type=click.Choice(list(FORMATS)), default="jsonl", show_default=True, help="What to write.")
@click.option("-o", "--out", "target", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file.")
@with_installation
def export(installation: Installation, sessions: tuple[str, ...], where: str | None, fmt: str, target: Path) -> None:
    """Sessions as a file: jsonl has one event a line, parquet the columns of the view `events`, otlp the generations as spans.

    OTLP is its JSON form, one request to a collector a line, with the conventions for generative AI and without content.
    """
    installation.freshen()
    with installation.accessing("export", f"export {' '.join(sessions)} {f'--where {where}' if where else ''} --format {fmt}") as access:
        chosen = chosen_sessions(installation, sessions, where, operation="export")
        written = write(installation, chosen, fmt, target)
        access["rows"] = written
    out.print(f"{target}: {count(written, 'span' if fmt == 'otlp' else 'event')} of {count(len(chosen), 'session')}", markup=False)


COMMANDS = [export]
