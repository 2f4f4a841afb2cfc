"""The pipeline by hand: `index`, `merge`, `tier`, `rebuild`, `jobs`, `quarantine`, `status`."""

from __future__ import annotations

import datetime as dt
import sys
from typing import Any

import click

from lifecycle.scheduler import find, run_job
from schemas.errors import NewerSchema, UsageError
from store.indexer import Indexer
from store.rebuild import rebuild as rebuild_hot
from store.requeue import requeue
from tokentape.commands.common import format_option, with_installation
from tokentape.installation import Installation
from tokentape.jobs import all_jobs, iceberg_of, tier_now
from tokentape.output import out, write_rows
from tokentape.status import collect, render

SHOWN_BYTES = 4096
"""Bytes of a quarantined record on a page; more goes to a file."""


@click.command()
@with_installation
def index(installation: Installation) -> None:
    """Index what the log holds now, then seal it for readers."""
    installation.publish_schemas()
    done = Indexer(installation.settings, installation.log, installation.registry).run_once()
    out.print(f"indexed {done.rows:,} events: {done.duplicates:,} duplicates dropped, {done.quarantined:,} quarantined, {done.lost:,} lost")
    for partition, error in done.stopped.items():
        raise NewerSchema(f"partition {partition} waits: {error.fault}", operation="index", hint=error.hint)


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be done and change nothing.")
@with_installation
def merge(installation: Installation, dry_run: bool) -> None:
    """Merge sealed shards into hour and day shards."""
    _run(installation, "merge", dry_run)


@click.command()
@click.option("--now", "all_days", is_flag=True, help="Take today's events too, not only days older than jobs.tier_after_days.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and change nothing.")
@with_installation
def tier(installation: Installation, all_days: bool, dry_run: bool) -> None:
    """Move closed days from hot shards into cold segments, each entered in the signed ledger."""
    if not all_days:
        _run(installation, "tier", dry_run)
        return
    installation.freshen()
    ledger = installation.runs
    print_summary("tier", run_job(tier_now(installation), ledger, trigger="hand", dry_run=dry_run), dry_run)


def _run(installation: Installation, name: str, dry_run: bool) -> None:
    ledger = installation.runs
    summary = run_job(find(all_jobs(installation), name), ledger, trigger="hand", dry_run=dry_run)
    print_summary(name, summary, dry_run)


def print_summary(name: str, summary: dict[str, Any], dry_run: bool) -> None:
    """What a job did, or would do."""
    out.print(f"[bold]{name}[/bold]{' (dry run, nothing changed)' if dry_run else ''}")
    for key, value in summary.items():
        if value == []:
            out.print(f"  {key}: none")
        elif isinstance(value, list):
            out.print(f"  {key}:")
            for item in value:
                out.print(f"    {item}", markup=False)
        else:
            out.print(f"  {key}: {value:,}" if isinstance(value, int) else f"  {key}: {value}", markup=False)


@click.command()
@click.option("--dry-run", is_flag=True, help="Say which files would come and go and change nothing.")
@with_installation
def iceberg(installation: Installation, dry_run: bool) -> None:
    """Publish the cold tier as an Apache Iceberg table now, whatever iceberg.publish says, and print where readers find it."""
    table = iceberg_of(installation)
    found = table.preview() if dry_run else table.publish().to_json()
    print_summary("iceberg", found if dry_run else {"catalog": table.shown, "table": table.name, **found}, dry_run)


@click.command()
@with_installation
def rebuild(installation: Installation) -> None:
    """Make the hot index anew from log and cold tier, and compare its digests with those of the old one."""
    summary = rebuild_hot(
        installation.settings, installation.log, installation.objects, installation.catalog, registry=installation.registry
    )
    print_summary("rebuild", summary, False)


@click.group()
def jobs() -> None:
    """Lifecycle jobs: what there is, run one by hand, what has run."""


@jobs.command("list")
@format_option
@with_installation
def jobs_list(installation: Installation, fmt: str) -> None:
    """The jobs and their schedule."""
    rows = [
        {"job": job.name, "every": f"{job.every_s:g} s" if job.every_s else "by hand", "does": job.description}
        for job in all_jobs(installation)
    ]
    write_rows(rows, fmt, ["job", "every", "does"])


@jobs.command("run")
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Say what would be done and change nothing.")
@with_installation
def jobs_run(installation: Installation, name: str, dry_run: bool) -> None:
    """Run one job now."""
    _run(installation, name, dry_run)


@jobs.command("history")
@click.option("--job", help="Only this job.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Newest runs to list.")
@format_option
@with_installation
def jobs_history(installation: Installation, job: str | None, limit: int, fmt: str) -> None:
    """What has run, newest first."""
    history = installation.runs.history(job, limit=limit)
    write_rows([_history_row(run) for run in history], fmt, ["job", "started", "seconds", "trigger", "outcome", "summary"])


def _history_row(run: Any) -> dict[str, Any]:
    return {
        "job": run.job,
        "started": dt.datetime.fromtimestamp(run.started_at, dt.UTC),
        "seconds": round(run.finished_at - run.started_at, 3) if run.finished_at else None,
        "trigger": run.trigger,
        "outcome": run.outcome,
        "summary": ", ".join(f"{key}={value}" for key, value in run.summary.items()),
    }


@click.command()
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print it.")
@with_installation
def status(installation: Installation, fmt: str) -> None:
    """What runs, how fresh the index is, what is missing, storage by tier, locks, last checkpoint, what is watched, and alerts."""
    render(collect(installation), fmt)


@click.group()
def quarantine() -> None:
    """Records that could not be read: nothing is ever dropped."""


@quarantine.command("list")
@format_option
@with_installation
def quarantine_list(installation: Installation, fmt: str) -> None:
    """What is in quarantine and why."""
    installation.freshen()
    rows = [
        {
            "partition": item.partition,
            "offset": item.offset,
            "appended_at": dt.datetime.fromtimestamp(item.appended_at / 1e6, dt.UTC),
            "bytes": item.size,
            "error": item.error,
        }
        for item in installation.catalog.quarantine()
    ]
    write_rows(rows, fmt, ["partition", "offset", "appended_at", "bytes", "error"])


@quarantine.command("show")
@click.argument("partition", type=int)
@click.argument("offset", type=int)
@click.option("--raw", is_flag=True, help="The bytes themselves, for another program.")
@with_installation
def quarantine_show(installation: Installation, partition: int, offset: int, raw: bool) -> None:
    """The bytes of one record."""
    found = [item for item in installation.catalog.quarantine() if (item.partition, item.offset) == (partition, offset)]
    log_id = found[-1].log_id if found else installation.log.log_id
    data = installation.catalog.quarantined_bytes(log_id, partition, offset)
    if raw:
        sys.stdout.buffer.write(data)
        return
    for start in range(0, min(len(data), SHOWN_BYTES), 16):
        line = data[start : start + 16]
        out.print(f"{start:08x}  {line.hex(' '):47}  {''.join(chr(b) if 32 <= b < 127 else '.' for b in line)}", markup=False)
    if len(data) > SHOWN_BYTES:
        out.print(f"… {len(data):,} bytes in all; --raw gives them")


@quarantine.command("requeue")
@click.argument("places", nargs=-1, metavar="[PARTITION:OFFSET]…")
@with_installation
def quarantine_requeue(installation: Installation, places: tuple[str, ...]) -> None:
    """Try again, all or those named: once their schema stands in the store, or this version reads them."""
    only = [_place(text) for text in places] or None
    print_summary("requeue", requeue(installation.settings, installation.catalog, installation.registry, only=only), False)


def _place(text: str) -> tuple[int, int]:
    partition, sign, offset = text.partition(":")
    if not (sign and partition.isdecimal() and offset.isdecimal()):
        raise UsageError(f"{text!r} names no record", operation="requeue", hint="PARTITION:OFFSET as `quarantine list` shows them")
    return int(partition), int(offset)


COMMANDS = [index, merge, tier, iceberg, rebuild, jobs, quarantine, status]
