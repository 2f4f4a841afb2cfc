"""`replay-batch`: many sessions back, against one engine or several."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from replay.batch import Batch, Summary
from replay.compare import Outcome
from replay.engines.base import Engine
from replay.words import count, uuid
from schemas.errors import UsageError
from tokentape.commands.common import with_installation
from tokentape.commands.exact import ExactOptions, play_again
from tokentape.engines import calibrations, open_cluster, open_engine
from tokentape.installation import Installation
from tokentape.output import err, write_json
from tokentape.selection import replayable_sessions

DONE = (
    "SELECT parent_session_id, verdict FROM sessions JOIN replays USING (session_id) "
    "WHERE workflow = '{run}' AND purpose = 'replay' AND closed = 'replay finished'"
)
"""Sessions that a run has replayed, and what came of each."""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
REASONS = 3
"""Why sessions are inconclusive, as many as are printed."""
ON_SERVER, OF_ITS_OWN = 32, 768
"""Sessions beside one another: others use a server too; an engine of a run's own gets more than it takes in at once, and never waits."""


@click.command("replay-batch")
@click.option("--where", metavar="SQL", help="Which sessions: a condition over the columns of the view `sessions`.")
@click.option(
    "--engine", "engines", multiple=True, metavar="URL|vllm:MODEL", help="An engine; repeat a URL option for several at work at once."
)
@click.option("--engine-option", "options", multiple=True, metavar="NAME=VALUE", help="vllm: an engine argument, e.g. dtype=float32.")
@click.option(
    "--model", help="URL: the name under which the model is served, if it is another than recorded; --exact: where its folder is."
)
@click.option(
    "--at-once",
    type=click.IntRange(1, 1024),
    help=f"Sessions beside one another on each engine; by default {ON_SERVER} on a server, {OF_ITS_OWN} on an engine of its own.",
)
@click.option("--ray", metavar="ADDRESS|local", help="Load vllm:MODEL into actors of a Ray cluster, an engine each; local starts one here.")
@click.option("--actors", type=click.IntRange(1), help="--ray: how many.  [default: as many as the cluster's GPUs serve, without any 1]")
@click.option("--run", metavar="NAME", help="Name of the run; a run of that name goes on where it stopped.  [default: the time]")
@click.option("--exact", is_flag=True, help="Instead of --where: a recorded engine run again, every token and logprob bit for bit.")
@click.option("--engine-run", "run_id", metavar="RUN", help="With --exact: which run; see engine-runs.")
@click.option("--until", metavar="GENERATION", help="With --exact: end when this generation is complete; begin as late as it can be had.")
@click.option("--forced", is_flag=True, help="With --exact: impose the recorded decisions, for an engine that would decide otherwise.")
@click.option("--engine-arg", "changed", multiple=True, metavar="KEY=VALUE", help="With --forced: an argument of vLLM that is another now.")
@click.option("--debug", is_flag=True, help="With --exact: stop in a debugger (PYTHONBREAKPOINT) before the engine's first step.")
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print the summary.")
@with_installation
def replay_batch(
    installation: Installation,
    where: str | None,
    engines: tuple[str, ...],
    options: tuple[str, ...],
    model: str | None,
    at_once: int | None,
    ray: str | None,
    actors: int | None,
    run: str | None,
    exact: bool,
    run_id: str | None,
    until: str | None,
    forced: bool,
    changed: tuple[str, ...],
    debug: bool,
    fmt: str,
) -> None:
    """Compare every session of a condition with an engine of today; each verdict is recorded as events, in a session of its own.

    A run that was killed, or whose engines died, goes on when the same command is given again with its --run: what was
    finished is not done again. SQL finds the results: SELECT * FROM replays JOIN sessions USING (session_id) WHERE workflow = 'RUN'.

    Work goes behind interactive requests: it names itself batch work to gateways, and takes a lower priority where vLLM has them.

    With --exact a whole engine run is played again instead, in this process: the same traffic between the same calls of the
    engine. Needs vLLM and the recorded model here. Refused before it starts, with the difference named: another model,
    version, number of threads or schedule. Exit code 6 when it diverges; the first step that did is named, and each sequence
    that did not come whole.
    """
    if exact:
        if where or engines or options or at_once or run or ray or actors or not run_id:
            hint = "--exact goes with --engine-run, --until, --model, --forced, --engine-arg and --debug"
            fault = "--exact needs --engine-run" if not run_id else "--exact replays an engine run, not sessions"
            raise UsageError(fault, operation="replay-batch", hint=hint)
        play_again(installation, ExactOptions(run_id, until, model, forced, changed, debug), fmt)
        return
    if where is None or run_id or until or forced or changed or debug:
        fault = "nothing says which sessions" if where is None else "--engine-run, --until, --forced, --engine-arg and --debug need --exact"
        raise UsageError(fault, operation="replay-batch", hint="--where SQL for sessions, or --exact --engine-run RUN")
    if (ray and model) or (actors and not ray):
        fault = "--model is for engines behind a URL" if ray else "--actors is for --ray"
        raise UsageError(fault, operation="replay-batch", hint="leave it out")

    def opened() -> list[Engine]:
        if ray is not None:
            return open_cluster(installation, ray, actors, engines, options)
        return [open_engine(installation, engine, model, options, batch=True) for engine in engines or (None,)]

    _compare_all(installation, where, engines, opened, at_once, run, fmt)


def _compare_all(
    installation: Installation,
    where: str,
    engines: tuple[str, ...],
    opened: Callable[[], list[Engine]],
    at_once: int | None,
    run: str | None,
    fmt: str,
) -> None:
    """What stays to be done of a run over sessions."""
    name = run or time.strftime("replay-%Y%m%dT%H%M%SZ", time.gmtime())
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a run", operation="replay-batch", hint="letters, digits, `_`, `.` and `-`, at most 64")
    in_process = [engine for engine in engines if engine.startswith("vllm:")]
    if in_process and len(engines) > 1:
        raise UsageError(
            "vllm:MODEL fills this process, so it stands alone", operation="replay-batch", hint="name several URLs, or one model"
        )
    installation.freshen()
    with installation.accessing("replay-batch", f"{name}: {where}") as access:
        chosen = replayable_sessions(installation, where)
        finished = installation.sql.query(DONE.format(run=name)).table.to_pylist()
        done = {str(row["parent_session_id"]): str(row["verdict"]) for row in finished}
        left = [session for session in chosen if session not in done]
        earlier = Counter(done[session] for session in chosen if session in done)
        access["rows"] = len(left)
        err.print(f"run {name}: {count(len(chosen), 'session')}, {len(chosen) - len(left):,} done before", markup=False)
        with _progress(len(chosen), len(chosen) - len(left)) as told:
            batch = Batch(
                left,
                lambda sessions: installation.events_of_sessions(sessions, attachments=True),
                installation.recorder,
                run=name,
                actor=installation.person(),
                calibrations=calibrations(installation),
                told=told,
            )
            try:
                summary = batch.run(opened() if left else [], at_once=at_once or (OF_ITS_OWN if in_process else ON_SERVER))
            finally:
                if batch.summary.verdicts:
                    _print(name, batch.summary, earlier, fmt)
        if not summary.verdicts:
            _print(name, summary, earlier, fmt)


@contextmanager
def _progress(total: int, before: int) -> Iterator[Callable[[Outcome], None]]:
    """A bar on standard error, where that is a terminal; hears of each outcome."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[verdict]}"), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        task = progress.add_task("replay", total=total, completed=before, verdict="")

        def told(outcome: Outcome) -> None:
            progress.update(task, advance=1, verdict=outcome.verdict.replace("_", " "))

        yield told


def _print(run: str, summary: Summary, earlier: Counter[str], fmt: str) -> None:
    """What came of a run: of this process, and of those before it that `earlier` counts."""
    speed = summary.tokens / summary.seconds if summary.seconds else 0.0
    worst = [{**token._asdict(), "session": uuid(token.session), "generation": uuid(token.generation)} for token in summary.worst]
    if fmt == "json":
        verdicts = {"verdicts": dict(summary.verdicts), "verdicts_before": dict(earlier)}
        figures = {
            **verdicts,
            "inconclusive": dict(summary.unjudged.most_common(REASONS)),
            "tokens": summary.tokens,
            "tokens_per_s": speed,
            "unknown": summary.unknown,
        }
        write_json({"run": run, **figures, "worst": worst})
        return
    for verdict, sessions in (summary.verdicts + earlier).most_common():
        before = f", {earlier[verdict]:,} of them before" if earlier[verdict] else ""
        click.echo(f"{sessions:8,}  {verdict.replace('_', ' ')}{before}")
    for reason, sessions in summary.unjudged.most_common(REASONS):
        click.echo(f"  inconclusive, {count(sessions, 'session')}: {reason}")
    if summary.unknown:
        click.echo(f"{summary.unknown:8,}  gone since they were listed")
    click.echo(f"{count(summary.tokens, 'token')} in {summary.seconds:.1f} s, {speed:,.0f} tokens/s; recorded as run {run}")
    for token in worst:
        where = f"sequence {token['sequence']} of generation {token['generation']} in session {token['session']}"
        click.echo(f"  drift up to {token['drift_max']:.2g} nats: {where}")


COMMANDS = [replay_batch]
