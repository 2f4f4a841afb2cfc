"""`kv`: how well a KV connector served, request by request, and why it found nothing."""

from __future__ import annotations

import dataclasses

import click

from replay.kv import Report
from replay.words import printable, uuid
from tokentape.commands.common import id_of, with_installation
from tokentape.engineruns import kv_report
from tokentape.installation import Installation
from tokentape.output import out, write_json, write_rows

COLUMNS = ("request", "tokens", "local", "matched", "rate", "lookup ms", "why")


@click.command()
@click.argument("session")
@click.option("--format", "fmt", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print it.")
@with_installation
def kv(installation: Installation, session: str, fmt: str) -> None:
    """What a recorded KV connector found for each request, how long it took, and why it found nothing where it did not.

    SESSION is an engine run (see `engine-runs`) or a client's session, of which only the requests are listed then. Flagged are lookups
    over 10 ms at p99, memory that grows, calls that failed and calls that did not come back.
    """
    name = uuid(id_of(session, "SESSION", operation="kv"))
    installation.freshen()
    with installation.accessing("kv", f"kv {name}") as access:
        found = kv_report(installation, name)
        access["rows"] = len(found.requests)
    if fmt == "json":
        write_json(dataclasses.asdict(found))
        return
    _print(found)


def _print(found: Report) -> None:
    rows = [
        dict(
            zip(
                COLUMNS,
                (printable(one.request), one.tokens, one.local, one.matched, _share(one.rate), round(one.duration_ms, 3), one.why),
                strict=True,
            )
        )
        for one in found.requests
    ]
    write_rows(rows, "table", COLUMNS)
    took = f"lookup p50 {_ms(found.lookup_p50_ms)}, p99 {_ms(found.lookup_p99_ms)}"
    out.print(f"{printable(found.connector)}: hit rate {_share(found.rate)}; {took}")
    saved, loaded = _bytes(found.saved_bytes, found.save_rate), _bytes(found.loaded_bytes, found.load_rate)
    out.print(f"offered to save {saved}; to load {loaded}")
    for flag in found.flags:
        out.print(f"[bold red]![/bold red] {printable(flag)}", markup=True)


def _share(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:.0%}"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ms"


def _bytes(size: int, rate: float | None) -> str:
    return f"{size / 1e6:,.3g} MB" + (f" at {rate / 1e6:,.3g} MB/s" if rate else "")


COMMANDS = [kv]
