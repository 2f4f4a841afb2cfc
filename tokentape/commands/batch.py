"""Batch work: `batch submit | list | show | results | cancel | work`."""

from __future__ import annotations

import datetime as dt
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import structlog

from ingest.gateway.app import ENDPOINTS
from ingest.gateway.batch.alone import work as work_alone
from ingest.gateway.batch.desk import BatchDesk
from ingest.gateway.batch.facts import Facts, document
from ingest.gateway.batch.models import asked, check_models
from ingest.gateway.batch.submission import end_abandoned
from ingest.gateway.keys import KIND as KEY
from ingest.gateway.keys import VirtualKey
from schemas import clock
from schemas.batches import ENDED, Batch, Owner
from schemas.errors import UsageError
from schemas.settings import Settings
from store.control import ControlView, open_control
from store.work import WorkLogs
from tokentape import logs
from tokentape.commands.common import format_option, with_installation
from tokentape.installation import Installation
from tokentape.output import err, write_rows
from tokentape.supervisor import announced, stop_event

log = structlog.get_logger()

COLUMNS = ("batch_id", "status", "completed", "failed", "total", "owner", "tenant", "endpoint", "created_at", "expires_at")

_LOOK_S = 0.2


@click.group()
def batch() -> None:
    """Batch work: files of requests that wait in a log per model and go after interactive requests.

    Running gateways work on them (batch.concurrency), and so does `batch work`. Each batch is a tag:
    `sessions --tag BATCH` finds what was recorded of it.
    """


@batch.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--key", "key_id", metavar="KEY", help="Id of the key in whose name it is done; needed where gateway.auth = required.")
@click.option("--window", metavar="SPAN", help="What has not begun after this has expired: 6h, 2d.  [default: batch.window_h]")
@click.option("--tag", "tags", multiple=True, help="A tag of its sessions, beside the batch's id; repeat for several.")
@click.option("--wait", is_flag=True, help="Return when the batch has ended.")
@with_installation
def submit(installation: Installation, file: Path, key_id: str | None, window: str | None, tags: tuple[str, ...], wait: bool) -> None:
    """Submit FILE, in OpenAI's batch format, one request a line: custom_id, method, url, body.

    Prints the batch's id when every request is durable. A file with any faulty line is refused, with its faulty lines named.
    """
    if strange := [tag for tag in tags if "," in tag or not tag.strip()]:
        raise UsageError(f"--tag: {strange[0]!r} is no tag", operation="batch submit", hint="repeat --tag for several")
    with _desk(installation) as desk:
        owner, allowed = _owner(desk, installation, key_id)
        kept = desk.add_file(file, file.name, owner)
        check = partial(check_models, asked(installation.settings.gateway), allowed)
        try:
            made = desk.submit(kept, owner, check, window=window, metadata={"tags": ",".join(tags)} if tags else None)
        except BaseException:
            desk.delete_file(kept)
            raise
        with installation.accessing("batch submit", made.batch_id) as answer:
            answer["rows"] = made.total
        click.echo(made.batch_id)
        if wait:
            _until_ended(desk, made, installation)


@batch.command("list")
@format_option
@with_installation
def list_(installation: Installation, fmt: str) -> None:
    """All batches, newest first."""
    with _desk(installation) as desk:
        write_rows([_row(desk.facts, found) for found in desk.facts.batches()], fmt, COLUMNS)


@batch.command()
@click.argument("batch_id")
@format_option
@with_installation
def show(installation: Installation, batch_id: str, fmt: str) -> None:
    """One batch."""
    with _desk(installation) as desk:
        write_rows([_row(desk.facts, desk.facts.batch(batch_id, None))], fmt, COLUMNS)


@batch.command()
@click.argument("batch_id")
@click.option("--wait", is_flag=True, help="Wait until the batch has ended.")
@with_installation
def results(installation: Installation, batch_id: str, wait: bool) -> None:
    """The results of a batch that has ended, one JSON object a line: first those that went well, then errors."""
    with _desk(installation) as desk:
        found = desk.facts.batch(batch_id, None)
        if wait:
            _until_ended(desk, found, installation)
        with installation.accessing("batch results", batch_id):
            for piece in desk.results(found):
                sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


@batch.command()
@click.argument("batch_id")
@with_installation
def cancel(installation: Installation, batch_id: str) -> None:
    """Cancel a batch: what has not begun never will; what is under way ends and counts."""
    with _desk(installation) as desk:
        found = desk.facts.batch(batch_id, None)
        if not desk.cancel(found, installation.person()):
            return click.echo(f"{batch_id} is {desk.facts.status(found)}")
        with installation.accessing("batch cancel", batch_id):
            return click.echo(f"{batch_id} is {desk.facts.status(found)}")


@batch.command()
@click.option("--concurrency", type=click.IntRange(1), help="Requests of one model at work at once.  [default: batch.concurrency]")
@click.pass_context
def work(ctx: click.Context, concurrency: int | None) -> None:
    """Work on batches until SIGTERM or Ctrl-C, beside gateways or without any; several share the work."""
    settings: Settings = ctx.obj
    wanted = concurrency or settings.batch.concurrency
    if not wanted:
        raise UsageError("batch.concurrency is 0: nothing would be done", operation="batch work", hint="give --concurrency")
    settings = settings.model_copy(update={"batch": settings.batch.model_copy(update={"concurrency": wanted})})
    logs.configure(settings.logging, part="batch")
    stop = stop_event()
    with Installation(settings, source="gateway") as installation, announced(settings.data, "batch"):
        work_alone(settings, installation.recorder, stop, ready=lambda: log.info("batch.ready", concurrency=wanted))


@contextmanager
def _desk(installation: Installation) -> Iterator[BatchDesk]:
    control = open_control(installation.settings)
    view = ControlView(control)
    works = WorkLogs(installation.settings)
    try:
        facts = Facts(control, view)
        end_abandoned(facts, lambda: installation.recorder, installation.settings)
        yield BatchDesk(installation.settings, facts, works, [endpoint.path for endpoint in ENDPOINTS])
    finally:
        works.close()
        view.close()
        control.close()


def _owner(desk: BatchDesk, installation: Installation, key_id: str | None) -> tuple[Owner, Any]:
    """In whose name work is submitted, and which models they may ask for."""
    settings = installation.settings
    if key_id is None:
        if settings.gateway.auth == "required":
            raise UsageError("keys are required here", operation="batch submit", hint="--key KEY; `tokentape keys list` shows all")
        return Owner(tenant=settings.tenant, name=installation.person()), lambda _: True
    value = desk.facts.get(KEY, key_id)
    key = VirtualKey.model_validate(value) if value else None
    if key is None or key.state(clock.now_s()) != "active":
        fault = f"the key {key_id[:20]!r} is {key.state(clock.now_s()) if key else 'not known'}"
        raise UsageError(fault, operation="batch submit", hint="`tokentape keys list` shows all")
    return Owner(tenant=key.tenant, name=key.owner, key_id=key.key_id), key.allows


def _until_ended(desk: BatchDesk, found: Batch, installation: Installation) -> None:
    while (status := desk.facts.status(desk.facts.batch(found.batch_id, None))) not in ENDED:
        end_abandoned(desk.facts, lambda: installation.recorder, installation.settings)
        time.sleep(_LOOK_S)
    counts = desk.facts.counts(found.batch_id)
    err.print(f"{found.batch_id} is {status}: {counts.completed} completed, {counts.failed} failed of {found.total}", markup=False)


def _row(facts: Facts, found: Batch) -> dict[str, Any]:
    shown = document(facts, found)
    return {
        "batch_id": found.batch_id,
        "status": shown["status"],
        **shown["request_counts"],
        "owner": found.owner.name,
        "tenant": found.owner.tenant,
        "endpoint": found.endpoint,
        **{name: dt.datetime.fromtimestamp(getattr(found, name), dt.UTC) for name in ("created_at", "expires_at")},
    }


COMMANDS = [batch]
