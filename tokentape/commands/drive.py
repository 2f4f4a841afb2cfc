"""`drive`: recorded traffic against an endpoint again, at its pace or faster."""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from replay.drive.arrivals import Arrival, arrival_of, arrivals_of_trace, in_order
from replay.drive.client import Target
from replay.drive.driver import Driving, drive
from replay.drive.report import Report, report_of
from replay.drive.traces import read_trace
from replay.engines.base import Refused, Request
from replay.engines.openai import OpenAIEngine
from replay.words import count
from schemas.errors import EngineUnavailable, UsageError
from schemas.requests.recorded import COMPLETIONS
from tokentape.commands.common import with_installation
from tokentape.installation import Installation
from tokentape.output import err, out, warn, write_json
from tokentape.selection import generations_where

POOL_TEXT = (
    "The engine schedules every sequence of a batch, reads the cache of keys and values, and samples one token at a time. 0123456789"
)
"""What made-up prompts take their token ids from: whatever a tokenizer makes of it is in its vocabulary."""
INTERRUPTED = 130


def target_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options by which a command is told where to send requests."""
    options = (
        click.option("--to", required=True, metavar="URL", help="The endpoint: an engine, or a gateway."),
        click.option("--model", help="The name under which it serves the model, if it is another than recorded."),
        click.option("--key-env", metavar="NAME", help="Environment variable that holds its API key."),
        click.option(
            "--in-flight", type=click.IntRange(1), default=64, show_default=True, help="Flat out: requests under way at the same time."
        ),
        click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="The report."),
    )
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), function)


@click.command("drive")
@click.option("--where", metavar="SQL", help="Which requests: a condition over the columns of the view `generations`.")
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False), help="A public trace instead: CSV of BurstGPT or Azure.")
@click.option("--speed", default="1", show_default=True, metavar="N|max", help="Times the recorded pace; max: flat out.")
@click.option("--limit", type=click.IntRange(1), help="The first so many requests only.")
@click.option(
    "--lengths",
    type=click.Choice(["recorded", "free"]),
    default="recorded",
    show_default=True,
    help="Answers as long as recorded (vLLM), or as asked.",
)
@target_options
@with_installation
def drive_(
    installation: Installation,
    where: str | None,
    trace: Path | None,
    speed: str,
    limit: int | None,
    lengths: str,
    to: str,
    model: str | None,
    key_env: str | None,
    in_flight: int,
    fmt: str,
) -> None:
    """Send recorded requests again, each when it is due, and report beside the record.

    No request waits for the answer to another (an open loop), so a slow endpoint falls behind in sight. Several turns of one
    conversation go as they were sent then. Ctrl-C ends it with the report so far, exit code 130. Other APIs' requests are sent
    as the chat completion that says the same. Traces tell lengths only: prompts are made up, of exact length where the endpoint is vLLM.
    """
    if (where is None) == (trace is None):
        raise UsageError("--where and --trace exclude each other, and one is needed", operation="drive", hint="give one of them")
    pace, target = _pace(speed), target_of(to, model, key_env)
    if trace:
        arrivals = _of_trace(trace, target, limit)
    else:
        installation.freshen()
        with installation.accessing("drive", where or "") as access:
            arrivals = _of_tape(installation, where or "", limit, held=lengths == "recorded")
            access["rows"] = len(arrivals)
    report = driven(arrivals, target, speed=pace, in_flight=in_flight, fmt=fmt)
    if report.stopped:
        click.get_current_context().exit(INTERRUPTED)
    if report.errors and report.driven.failed == report.driven.requests:
        raise EngineUnavailable(
            f"every request failed: {', '.join(report.errors)}", operation="drive", place=to, hint="is it the right URL?"
        )


def target_of(url: str, model: str | None, key_env: str | None) -> Target:
    """The endpoint that a command was told.

    Raises:
        UsageError: no address, or no such variable.
    """
    if key_env and not os.environ.get(key_env):
        raise UsageError(f"the variable {key_env} is not set", operation="read --key-env", hint="it holds the key, the option its name")
    return Target(OpenAIEngine(url).place, key=os.environ.get(key_env) if key_env else None, model=model)


def driven(arrivals: Sequence[Arrival], target: Target, *, speed: float | None, in_flight: int, fmt: str) -> Report:
    """Drive these, with a bar on a terminal, and print the report."""
    with Progress(BarColumn(), MofNCompleteColumn(), console=err, disable=not err.is_terminal, transient=True) as progress:
        task = progress.add_task("drive", total=len(arrivals))

        def told(driving: Driving) -> None:
            progress.update(task, advance=1)

        report = report_of(drive(arrivals, target, speed=speed, in_flight=in_flight, told=told))
    if fmt == "json":
        write_json(report.document())
    else:
        out.print(report)
    sys.stdout.flush()
    return report


def _of_tape(installation: Installation, where: str, limit: int | None, *, held: bool) -> list[Arrival]:
    found: list[Arrival] = []
    left_out: Counter[str] = Counter()
    for state, generation in generations_where(installation, where, limit=limit):
        arrival = arrival_of(state, generation, held=held)
        if isinstance(arrival, str):
            left_out[arrival] += 1
        else:
            found.append(arrival)
    for reason, requests in left_out.most_common():
        warn(f"{count(requests, 'request')} left out: {reason}")
    if not found:
        raise UsageError("there is no request to send", operation="drive", hint="`tokentape sql` shows what the condition chooses")
    return in_order(found)


def _of_trace(path: Path, target: Target, limit: int | None) -> list[Arrival]:
    rows, empty = read_trace(path, limit=limit)
    if empty:
        warn(f"{count(empty, 'request')} left out: without tokens")
    engine = OpenAIEngine(target.url, model=target.model)
    try:
        served = engine.models()
        model = target.model or (served[0] if served else "")
        if served and model not in served:
            raise UsageError(f"it does not serve {model!r}", operation="drive", place=target.url, hint=f"--model {', '.join(served)}")
        pool = engine.render(Request(model, {"prompt": POOL_TEXT}, endpoint=COMPLETIONS))
    finally:
        engine.close()
    if not model:
        raise UsageError("the endpoint does not tell what it serves", operation="drive", place=target.url, hint="give --model")
    if isinstance(pool, Refused):
        warn(f"prompts are words, a token each where the tokenizer has them: {pool.reason}")
        pool = ()
    return in_order(arrivals_of_trace(rows, model, pool))


def _pace(text: str) -> float | None:
    """Times the recorded pace; None for flat out."""
    if text == "max":
        return None
    try:
        pace = float(text)
    except ValueError:
        pace = 0.0
    if not 0 < pace < float("inf"):
        raise UsageError(f"{text!r} is no speed", operation="read --speed", hint="1, another positive number, or max")
    return pace


COMMANDS = [drive_]
