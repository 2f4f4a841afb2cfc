"""`snapshots`: the versions of a session that stopped at breakpoints."""

from __future__ import annotations

import click

from replay.render import SessionPage
from replay.sections import sections
from replay.snapshot import document_of, plain
from replay.versioning import Versioning
from replay.words import iso, printable, uuid
from schemas.errors import UsageError
from store.versions import Version
from tokentape.commands.common import format_option, with_installation
from tokentape.installation import Installation
from tokentape.jobs import versioning
from tokentape.output import err, out, write_json, write_rows

COLUMNS = ["number", "at", "event", "position", "why", "by", "bytes_stored", "bytes_whole", "let_go"]


@click.command()
@click.argument("session")
@click.option("--show", "number", type=int, metavar="NUMBER", help="One version: the session as it stood then. Formats: table, json.")
@click.option("--full", is_flag=True, help="With --show: long texts whole.")
@format_option
@with_installation
def snapshots(installation: Installation, session: str, number: int | None, full: bool, fmt: str) -> None:
    """The versions of a session: one at each stop at a breakpoint, each edit and each release.

    They are derived from the tape, and what two versions share is stored once. Beyond snapshots.session_bytes_max the oldest
    are let go; their events stay.
    """
    if number is not None and fmt not in ("table", "json"):
        raise UsageError(f"--show prints no {fmt}", operation="snapshots", hint="valid with --show: --format table, --format json")
    installation.freshen()
    session_id = installation.session_id(session)
    kept = versioning(installation)
    kept.derive(session_id)
    with installation.accessing("snapshots", f"snapshots {session} --show {number}") as access:
        if number is None:
            versions = kept.versions.versions(session_id)
            access["rows"] = len(versions)
            write_rows([_row(version) for version in versions], fmt, COLUMNS)
            _total(kept, versions, session_id)
        else:
            access["rows"] = 1
            _show(kept, kept.version(session_id, number), fmt, full=full)


def _row(version: Version) -> dict[str, object]:
    return {
        "number": version.number,
        "at": iso(version.at),
        "event": uuid(version.event_id),
        "position": version.position,
        "why": version.why,
        "by": version.actor,
        "bytes_stored": version.bytes_stored,
        "bytes_whole": version.bytes_whole,
        "let_go": version.let_go,
    }


def _total(kept: Versioning, versions: list[Version], session_id: bytes) -> None:
    gone = sum(version.let_go for version in versions)
    said = f"{kept.versions.bytes_of(session_id):,} bytes stored of {kept.bytes_max:,}; {gone:,} of {len(versions):,} let go"
    err.print(f"[dim]{said}[/dim]" if versions else "[dim]the session never stopped at a breakpoint[/dim]")


def _show(kept: Versioning, version: Version, fmt: str, *, full: bool) -> None:
    state = kept.state(version)
    if fmt == "table":
        out.print(printable(f"version {version.number}: {version.why}"), markup=False, style="yellow")
        out.print(SessionPage(state, full=full))
        return
    document = {"snapshot": _row(version), **sections(state, version.generation_id), "state": document_of(plain(state))}
    write_json(document)


COMMANDS = [snapshots]
