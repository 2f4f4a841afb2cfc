"""`capacity`: what a year of a sample day will cost."""

from __future__ import annotations

import re

import click

from lifecycle.capacity import Figure, forecast, sample
from schemas.errors import UsageError
from tokentape.commands.common import format_option, with_installation
from tokentape.installation import Installation
from tokentape.output import err, write_rows

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@click.command()
@click.option("--day", metavar="YYYY-MM-DD", help="The day to forecast from.  [default: the latest that is over]")
@format_option
@with_installation
def capacity(installation: Installation, day: str | None, fmt: str) -> None:
    """Events, bytes, objects and requests of a year, if every day were like this one and nothing were removed.

    Hot bytes are what stands at any time, all else what a year adds up to. A deep verification reads all that stands by then, so
    its requests grow with the square of time: jobs.verify_s and ledger.checkpoint_s are what to turn.
    """
    if day is not None and not _DAY.fullmatch(day):
        raise UsageError(f"{day!r} is no day", operation="capacity", hint="YYYY-MM-DD, in UTC")
    installation.freshen()
    taken = sample(installation.catalog, installation.objects, day=day)
    if not taken.over:
        err.print(f"[dim]{taken.day} is not over: this is a forecast from what was recorded so far[/dim]")
    rows = [_row(figure, exact=fmt != "table") for figure in forecast(taken, installation.settings)]
    write_rows([row | {"day": taken.day} for row in rows], fmt, ["figure", "a_day", "a_year", "day"])


def _row(figure: Figure, *, exact: bool) -> dict[str, object]:
    """A figure for a program, or for a person: `2.4 G`."""
    if exact:
        return {"figure": figure.what, "a_day": figure.day, "a_year": figure.year}
    return {"figure": figure.what, "a_day": _short(figure.day), "a_year": _short(figure.year)}


def _short(value: float | None) -> str | None:
    """A number with three figures that matter; None where nothing of the kind was stored yet."""
    if value is None:
        return None
    for unit in ("", " k", " M", " G", " T"):
        if abs(value) < 1000 or unit == " T":
            return f"{value:,.3g}{unit}" if unit else f"{value:,.0f}"
        value /= 1000
    raise AssertionError("unreachable")


COMMANDS = [capacity]
