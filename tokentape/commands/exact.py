"""`engine-runs`, and what `replay-batch --exact` does: runs of engines on the tape, and any of them again."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import click
from rich.progress import Progress

from replay.exact.replay import REPRODUCED, ExactReplay, Outcome
from replay.exact.run import describe, load
from replay.words import count, uuid
from schemas.enginerun.sessions import steps_session
from schemas.errors import TokentapeError, UsageError
from schemas.sink import SessionContext, new_id
from tokentape.commands.common import format_option, id_of, with_installation
from tokentape.engineruns import RUNS
from tokentape.installation import Installation
from tokentape.output import err, out, write_json, write_table

MISSING_MAX = 10
"""Sequences that did not come whole, of which a text tells at most."""


@click.command("engine-runs")
@format_option
@with_installation
def engine_runs(installation: Installation, fmt: str) -> None:
    """The engine runs on the tape, newest first: what `replay-batch --exact` can play again.

    `state` is recording, ended or, where the engine died over its work, cut off.
    """
    installation.freshen()
    with installation.accessing("engine-runs", "engine-runs") as access:
        answer = installation.sql.query(RUNS)
        access["rows"] = answer.table.num_rows
        write_table(answer.table, fmt)


@dataclass(frozen=True, slots=True)
class ExactOptions:
    """What `replay-batch --exact` was asked for."""

    run_id: str
    until: str | None
    model: str | None
    forced: bool
    changed: tuple[str, ...]
    debug: bool


def play_again(installation: Installation, asked: ExactOptions, fmt: str) -> None:
    """Play a whole engine run again, in this process: the same traffic between the same calls of the engine.

    Needs vLLM and the recorded model here. Refused before it starts, with the difference named: another model, version,
    number of threads or schedule.

    Raises:
        TokentapeError: it diverged; the first step that did is named.
    """
    if asked.changed and not asked.forced:
        raise UsageError("--engine-arg changes the schedule", operation="replay-batch", hint="add --forced")
    engine_run = id_of(asked.run_id, "--engine-run", operation="replay-batch")
    generation = id_of(asked.until, "--until", operation="replay-batch") if asked.until else None
    installation.freshen()
    with installation.accessing("replay-batch", f"replay-batch --exact --engine-run {asked.run_id}") as access:
        run = load(engine_run, installation.reader.session(engine_run), installation.reader.session(steps_session(engine_run)))
        access["rows"] = len(run.requests)
        err.print(f"[dim]{describe(run)}[/dim]")
        settings = installation.settings
        context = SessionContext(new_id(), settings.tenant, "replay", installation.person(), settings.retention_class, sample_rate=1.0)
        replay = ExactReplay(
            *(run, installation.recorder, context, generation, asked.forced, asked.model, dict(map(_argument, asked.changed))),
            before=breakpoint if asked.debug else None,
        )
        with Progress(transient=True, console=err, disable=not sys.stderr.isatty() or asked.debug) as progress:
            task = progress.add_task("steps", total=len(run.steps))
            replay.on_step = lambda step, _last: progress.update(task, completed=step)
            outcome = replay.execute()
    _print(outcome, fmt)
    if outcome.verdict != REPRODUCED:
        before = outcome.divergence is not None and not asked.forced
        hint = "the steps before it came bit for bit as recorded" if before else "--format json names each that did not come"
        raise _Diverged(outcome.reason, operation="exact replay", hint=hint)


class _Diverged(TokentapeError):
    """The replay did not give the recorded run."""

    exit_code = 6


def _print(outcome: Outcome, fmt: str) -> None:
    if fmt == "json":
        write_json(outcome.document())
        return
    style = "bold green" if outcome.verdict == REPRODUCED else "bold red"
    out.print(f"[{style}]{outcome.verdict}[/{style}]  {outcome.reason}")
    missing = outcome.missing
    for one in missing[:MISSING_MAX]:
        came = f"{count(one.missing, 'token')} of {len(one.recorded.token_ids):,} did not come"
        out.print(f"  generation {uuid(one.place[0])}, sequence {one.place[1]}: {came}, from step {one.missing_from:,} on")
    if len(missing) > MISSING_MAX:
        out.print(f"  … and {len(missing) - MISSING_MAX:,} more")
    for key, before, after in outcome.differences:
        out.print(f"  [dim]{key.removeprefix('config.')}: recorded {before}, now {after}[/dim]")
    out.print(f"[dim]replay {uuid(outcome.replay_id)}, recorded in session {uuid(outcome.session_id)}[/dim]")


def _argument(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign:
        raise UsageError(f"--engine-arg takes KEY=VALUE, got {text!r}", operation="replay-batch", hint="for example max_num_seqs=16")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


COMMANDS = [engine_runs]
