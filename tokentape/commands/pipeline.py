"""The pipeline by hand: `index`, `merge`, `tier`, `rebuild`, `jobs`, `quarantine`, `status`, `doctor`."""

from __future__ import annotations

from typing import Any

import click

from lifecycle.runs import RunLedger
from lifecycle.scheduler import find, run_job
from store.indexer import Indexer
from store.rebuild import rebuild as rebuild_hot
from tokentape import doctor as checks
from tokentape.commands.common import format_option, with_installation
from tokentape.installation import Installation
from tokentape.jobs import all_jobs, tier_now
from tokentape.output import out, write_rows
from tokentape.status import collect, render


@click.command()
@with_installation
def index(installation: Installation) -> None:
    """Index what the log holds now, then seal it for readers."""
    installation.publish_schemas()
    Indexer(installation.settings, installation.log, installation.registry).run_once()
    out.print("indexed to the end of the log")


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
    ledger = RunLedger(installation.settings.data / "jobs.sqlite")
    _print_summary("tier", run_job(tier_now(installation), ledger, trigger="hand", dry_run=dry_run), dry_run)


def _run(installation: Installation, name: str, dry_run: bool) -> None:
    ledger = RunLedger(installation.settings.data / "jobs.sqlite")
    summary = run_job(find(all_jobs(installation), name), ledger, trigger="hand", dry_run=dry_run)
    _print_summary(name, summary, dry_run)


def _print_summary(name: str, summary: dict[str, Any], dry_run: bool) -> None:
    out.print(f"[bold]{name}[/bold]{' (dry run, nothing changed)' if dry_run else ''}")
    for key, value in summary.items():
        if isinstance(value, list):
            out.print(f"  {key}:")
            for item in value:
                out.print(f"    {item}", markup=False)
        else:
            out.print(f"  {key}: {value:,}" if isinstance(value, int) else f"  {key}: {value}", markup=False)


@click.command()
@with_installation
def rebuild(installation: Installation) -> None:
    """Make the hot index anew from log and cold tier, and compare its digests with those of the old one."""
    _print_summary("rebuild", rebuild_hot(installation.settings, installation.log, installation.objects, installation.catalog), False)


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
    history = RunLedger(installation.settings.data / "jobs.sqlite").history(job, limit=limit)
    write_rows([_history_row(run) for run in history], fmt, ["job", "started", "seconds", "trigger", "outcome", "summary"])


def _history_row(run: Any) -> dict[str, Any]:
    import datetime as dt

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
    """What runs, how fresh the index is, what is missing, storage by tier, locks, last checkpoint."""
    render(collect(installation), fmt)


@click.group()
def doctor() -> None:
    """What is wrong with this installation and its cure."""


@doctor.command("storage")
@format_option
@with_installation
def doctor_storage(installation: Installation, fmt: str) -> None:
    """Try log, index, object store and ledger key for real: create-once, locks, room, readability."""
    findings = checks.storage(installation)
    write_rows([finding._asdict() for finding in findings], fmt, ["check", "state", "detail", "cure"])
    if any(finding.state == "bad" for finding in findings):
        raise SystemExit(8)


COMMANDS = [index, merge, tier, rebuild, jobs, status, doctor]
