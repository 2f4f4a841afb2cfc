"""`case`: sessions with everything that proves them, in one archive for somebody who has no tokentape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from replay.words import count
from schemas.errors import UsageError
from tokentape.casefile.archive import CaseWriter
from tokentape.commands.common import with_installation
from tokentape.installation import Installation
from tokentape.output import err, out, warn
from tokentape.selection import chosen_sessions


@click.command("case")
@click.argument("sessions", nargs=-1, metavar="[SESSION]...")
@click.option("--where", metavar="SQL", help="Which sessions: a condition over the columns of the view `sessions`.")
@click.option(
    "-o", "--out", "target", type=click.Path(path_type=Path, dir_okay=False), default="case.zip", show_default=True, help="The archive."
)
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@with_installation
def case(installation: Installation, sessions: tuple[str, ...], where: str | None, target: Path, force: bool) -> None:
    """A case file: timelines, raw events, blobs, environments, proofs, and a verifier that needs nothing of tokentape.

    \b
        python verify.py case.zip --key ledger.pub

    says whether anything in it was modified, is missing, or was erased with proof. What the ledger does not hold yet is in it and
    told as that; `tokentape tier --now` enters it. The ledger's private key signs the archive.
    """
    if target.exists() and not force:
        raise UsageError(f"{target} is there already", operation="case", hint="evidence is not written over: another --out, or --force")
    installation.freshen()
    with installation.accessing("case", f"case {' '.join(sessions)} {f'--where {where}' if where else ''}".strip()) as access:
        chosen = chosen_sessions(installation, sessions, where, operation="case")
        made = CaseWriter(installation).write(_told(chosen), target)
        access["rows"] = made.events
    out.print(f"{target}: {count(made.sessions, 'session')}, {count(made.events, 'event')}", markup=False, soft_wrap=True)
    if made.unproven:
        warn(f"{count(made.unproven, 'event')} not in the ledger yet: `tokentape tier --now` enters them")
    if made.absent:
        warn(f"{count(made.absent, 'blob')} not there any more; manifest.json lists them")


def _told(sessions: list[bytes]) -> Iterator[bytes]:
    """The sessions; on a terminal each hundredth is told."""
    for number, session in enumerate(sessions):
        if number and number % 100 == 0 and err.is_terminal:
            err.print(f"[dim]{number:,} of {len(sessions):,} sessions[/dim]")
        yield session


COMMANDS = [case]
