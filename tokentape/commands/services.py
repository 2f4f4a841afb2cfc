"""`up`: the long-lived parts."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import click
import structlog

from ingest.gateway import serve
from ingest.gateway.upstream import without_credentials
from lifecycle.scheduler import Scheduler
from schemas.errors import UsageError
from schemas.settings import Settings
from store.format import check_format
from store.indexer import Indexer
from tokentape import __version__, logs
from tokentape.installation import Installation
from tokentape.jobs import all_jobs
from tokentape.supervisor import PARTS, announced, instance_lock, stop_event, supervise

log = structlog.get_logger()


@click.command()
@click.option("--only", metavar="PARTS", help=f"Run only these, comma-separated: {', '.join(PARTS)}.")
@click.pass_context
def up(ctx: click.Context, only: str | None) -> None:
    """Run gateway, API and page, indexer and scheduler until SIGTERM or Ctrl-C; nothing acknowledged is lost by stopping."""
    settings: Settings = ctx.obj
    parts = [part.strip() for part in only.split(",")] if only else list(PARTS)
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"no part is called {part!r}", operation="up", hint=f"valid: {', '.join(PARTS)}")
    check_format(settings.data, __version__)
    stop = stop_event()
    if len(parts) == 1:
        logs.configure(settings.logging, part=parts[0])
        _RUN[parts[0]](settings, stop)
        return
    logs.configure(settings.logging, part="up")
    with instance_lock(settings.data):
        supervise(parts, _options(ctx), stop)


def _options(ctx: click.Context) -> list[str]:
    """The program's options as they were given, for the children."""
    params: dict[str, Any] = ctx.parent.params if ctx.parent else {}
    options = [f"--set={text}" for text in params.get("overrides", ())]
    for flag, value in (("--data", params.get("data")), ("--config", params.get("file"))):
        if isinstance(value, Path):
            options += [flag, str(value)]
    return options


def _gateway(settings: Settings, stop: threading.Event) -> None:
    with Installation(settings, source="gateway") as installation:
        upstream = ", ".join(without_credentials(entry.url) for entry in settings.gateway.every_upstream)

        def ready(url: str) -> Any:
            log.info("gateway.ready", url=url, upstream=upstream, mode=settings.recorder.mode)
            return announced(settings.data, "gateway", told=lambda: _told(installation), url=url, upstream=upstream)

        serve(settings, installation.recorder, stop, ready=ready)


def _told(installation: Installation) -> dict[str, Any]:
    """What a part that records tells of its recorder."""
    return {"encoding": installation.recorder.encoding.to_json()}


def _api(settings: Settings, stop: threading.Event) -> None:
    from tokentape.api.server import serve as serve_api  # the other parts need none of it

    with Installation(settings, source="api") as installation:

        def ready(url: str) -> Any:
            log.info("api.ready", url=url, page=f"{url}/")
            return announced(settings.data, "api", told=lambda: _told(installation), url=url)

        serve_api(installation, stop, ready=ready)


def _indexer(settings: Settings, stop: threading.Event) -> None:
    with Installation(settings) as installation, announced(settings.data, "indexer"):
        installation.publish_schemas()
        log.info("indexer.ready", log=settings.log.kind)
        Indexer(settings, installation.log, installation.registry).run(stop)


def _scheduler(settings: Settings, stop: threading.Event) -> None:
    with Installation(settings, source="lifecycle") as installation, announced(settings.data, "scheduler"):
        scheduler = Scheduler(all_jobs(installation), installation.runs)
        scheduler.start()
        log.info("scheduler.ready")
        stop.wait()
        scheduler.close()


_RUN = {"gateway": _gateway, "api": _api, "indexer": _indexer, "scheduler": _scheduler}

COMMANDS = [up]
