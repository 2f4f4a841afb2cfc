"""The ledger as evidence: `prove` one event, `ledger` for its entries, coverage, checkpoints and growth."""

from __future__ import annotations

import re
import sys
import uuid
from pathlib import Path
from typing import Any

import click
import orjson

from lifecycle.coverage import coverage_rows
from schemas.errors import UsageError
from store.ledger.proof import Proof
from tokentape.commands.common import format_option, with_installation
from tokentape.installation import Installation
from tokentape.jobs import prover
from tokentape.output import err, write_rows, write_whole

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

out_option = click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write it to this file.  [default: stdout]")


@click.command()
@click.argument("event")
@out_option
@with_installation
def prove(installation: Installation, event: str, out: Path | None) -> None:
    """The proof that an event is in the ledger, as one JSON document that anybody can check.

    EVENT is the event_id of the view `events`. `tokentape verify --proof FILE` checks it with the public key alone.
    """
    try:
        event_id = uuid.UUID(event.strip()).bytes
    except ValueError:
        raise UsageError(f"{event!r} is no event id", operation="prove", hint="a UUID, the event_id of the view events") from None
    installation.freshen()
    with installation.accessing("prove", f"prove {event}") as access:
        proof = prover(installation).event(event_id)
        access["rows"] = 1
    _write(proof, out)


@click.group()
def ledger() -> None:
    """The signed ledger: its entries, what they cover, checkpoints to keep elsewhere, and proof of growth."""


@ledger.command("log")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="Newest entries to list.")
@format_option
@with_installation
def ledger_log(installation: Installation, limit: int, fmt: str) -> None:
    """The newest entries."""
    start = max(0, installation.ledger.head() - limit)
    rows = [
        {"number": entry.sequence, "recorded_at": entry.recorded_at, "type": entry.type, "says": _says(entry.body), "sha256": entry.sha256}
        for entry in installation.ledger.entries(start)
    ]
    write_rows(rows[::-1], fmt, ["number", "recorded_at", "type", "says", "sha256"])


def _says(body: Any) -> str:
    """An entry's body in a few words: its plain values, and how many items its lists hold."""
    plain = [f"{name}={value}" for name, value in body.items() if isinstance(value, str | int | bool)]
    counted = [f"{len(value)} {name}" for name, value in body.items() if isinstance(value, list)]
    return ", ".join([*plain, *counted])


@ledger.command("coverage")
@click.option("--day", metavar="YYYY-MM-DD", help="Only this day.")
@click.option("--partition", type=click.IntRange(0), help="Only this partition.")
@format_option
@with_installation
def ledger_coverage(installation: Installation, day: str | None, partition: int | None, fmt: str) -> None:
    """Where every offset of the log is: by partition and day, and what lies in no entry."""
    if day is not None and not _DAY.fullmatch(day):
        raise UsageError(f"{day!r} is no day", operation="coverage", hint="YYYY-MM-DD, in UTC")
    rows = coverage_rows(installation.ledger, day=day, partition=partition)
    columns = ["partition", "day", "offset_first", "offset_next", "rows", "duplicates", "quarantined", "entry", "covered_by", "log_id"]
    write_rows(rows, fmt, columns)


@ledger.command("checkpoint")
@out_option
@with_installation
def ledger_checkpoint(installation: Installation, out: Path | None) -> None:
    """The newest signed checkpoint: keep a copy elsewhere, and no history that leaves it out can pass for this one."""
    newest = installation.ledger.latest_checkpoint()
    if newest is None:
        raise UsageError("there is no checkpoint yet", operation="checkpoint", hint="`tokentape jobs run checkpoint` signs one")
    _put(newest.data, out)


@ledger.command("consistency")
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@out_option
@with_installation
def ledger_consistency(installation: Installation, old: Path, new: Path | None, out: Path | None) -> None:
    """The proof that the ledger under checkpoint NEW (default: the newest) begins with all that stood under OLD."""
    _write(prover(installation).consistency(old.read_bytes(), new.read_bytes() if new else None), out)


def _write(proof: Proof, out: Path | None) -> None:
    _put(orjson.dumps(proof.to_json(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE), out)


def _put(data: bytes, out: Path | None) -> None:
    """To standard output, or to a file that is whole or absent."""
    if out is None:
        sys.stdout.buffer.write(data)
        return
    write_whole(out, data)
    err.print(f"[dim]wrote {out}[/dim]")


COMMANDS = [prove, ledger]
