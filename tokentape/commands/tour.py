"""`tour`: how an engine works, explained from the tape of a run that is recorded for it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import click
from rich.markup import escape

from replay.words import uuid
from schemas.errors import UsageError
from tokentape.commands.common import id_of, with_installation
from tokentape.installation import Installation
from tokentape.output import err, out
from tokentape.tours.pages import PAIRS, SINGLE, Page
from tokentape.tours.tape import read, record, tiny_model

NAMES = (*SINGLE, *PAIRS)


@click.command()
@click.argument("name", required=False, type=click.Choice(NAMES))
@click.option("--model", type=click.Path(path_type=Path), help="A small model's folder.  [default: a tiny one, made in DATA/tour]")
@click.option("--engine-run", help="Explain this recorded run instead of recording one; tours of two runs take two, with a comma.")
@click.option("--step", is_flag=True, help="Wait for Enter after each page.")
@with_installation
def tour(installation: Installation, name: str | None, model: Path | None, engine_run: str | None, step: bool) -> None:
    """How an engine works: a small vLLM is started with capture on, and what it did is explained from the tape.

    \b
    initialisation       what is decided before the first step
    generation           one request, token by token
    paged-attention      blocks of sequences over steps, and blocks that are shared
    continuous-batching  who was in which step
    profiling            where the time went
    tensor-parallelism   one rank beside two, on this machine's CPU or GPUs
    kv-quantisation      the cache in eight bits, and the drift that it costs
    """
    if name is None:
        click.echo(click.get_current_context().get_help())
        return
    for page in _pages(installation, name, model, engine_run):
        _show(page)
        if step:
            err.print("[dim]Enter goes on[/dim]")
            sys.stdin.readline()


def _pages(installation: Installation, name: str, model: Path | None, engine_run: str | None) -> Iterable[Page]:
    """The pages of a tour.

    Raises:
        UsageError: it takes another number of runs.
    """
    runs = [id_of(text.strip(), "--engine-run", operation="tour") for text in engine_run.split(",")] if engine_run else []
    wanted = 1 if name in SINGLE else 2
    if runs and len(runs) != wanted:
        fault = f"{name} explains {wanted} run{'s' if wanted > 1 else ''}, not {len(runs)}"
        raise UsageError(fault, operation="tour", place="--engine-run", hint="tokentape engine-runs lists them")
    if runs:
        tapes = [read(installation, run) for run in runs]
    else:
        folder = model or tiny_model(installation.settings.data / "tour" / "model")
        if not (folder / "config.json").exists():
            raise UsageError(f"no model lies at {folder}", operation="tour", place="--model", hint="name the folder that holds config.json")
        err.print(f"[dim]starting vLLM on {folder}, with capture on; on a CPU it takes a minute or two[/dim]")
        kind = "shared" if name in SINGLE else "alone"
        changes = [{}] if name in SINGLE else [{}, PAIRS[name][1]]
        tapes = [record(installation, folder, kind, **change) for change in changes]
        err.print(f"[dim]recorded: engine run {', '.join(uuid(tape.run.engine_run) for tape in tapes)}[/dim]")
    return SINGLE[name](tapes[0]) if name in SINGLE else PAIRS[name][0](tapes[0], tapes[1])


def _show(page: Page) -> None:
    out.print(f"\n[bold]{escape(page.title)}[/bold]")
    out.print(f"[dim]{escape(page.text)}[/dim]")
    for line in page.lines:
        out.print(f"  {line}", markup=False, no_wrap=True, crop=False, overflow="ignore")


COMMANDS = [tour]
