"""`suite record | run | determinism | grid | stress`: recorded sessions as regression tests."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click

from replay.drive.arrivals import Arrival, arrival_of
from replay.fold import fold
from replay.junit import junit
from replay.state import SessionState
from replay.suite import Case, Result, Suite, case_of, dumps, events_of, name_of, read_suite, run_suite, suite_of
from replay.trials import axes_of, determinism, grid
from replay.words import count, uuid
from schemas.errors import TokentapeError, UsageError
from tokentape.commands.common import format_option, with_installation
from tokentape.commands.drive import driven, target_of, target_options
from tokentape.engines import calibrations, engine_options, open_engine
from tokentape.installation import Installation
from tokentape.output import err, warn, write_rows, write_whole
from tokentape.selection import generations_where

SUITE = click.Path(path_type=Path, dir_okay=False)
VERDICTS = ("case", "verdict", "reason", "tokens", "drift_max", "recorded_in")
REPEATED = ("case", "same", "reason")


class Regressed(TokentapeError):
    """Cases of a suite did not come as they should."""

    exit_code = 6


@click.group()
def suite() -> None:
    """Recorded sessions as regression tests: a file in git, run in CI against the engine of today."""


@suite.command()
@click.option("--where", required=True, metavar="SQL", help="Which answers: a condition over the columns of the view `generations`.")
@click.option("-o", "--out", type=SUITE, required=True, help="The file to write.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@with_installation
def record(installation: Installation, where: str, out: Path, force: bool) -> None:
    """Make a suite of recorded answers: requests, token ids, logprobs and environments; no names, keys or addresses.

    What has no token ids on the tape makes no case; it is counted. A file written again from the same answers is the same file.
    """
    if out.exists() and not force:
        raise UsageError("there is a file already", operation="suite record", place=str(out), hint="--force writes over it")
    installation.freshen()
    left_out: Counter[str] = Counter()
    with installation.accessing("suite record", where) as access:
        made = suite_of(where, _cases(installation, where, left_out))
        access["rows"] = len(made.cases)
    for reason, answers in left_out.most_common():
        warn(f"{count(answers, 'answer')} left out: {reason}")
    if not made.cases:
        raise UsageError("no answer makes a case", operation="suite record", hint="`tokentape sql` shows what the condition chooses")
    write_whole(out, dumps(made).encode())
    if under := sum(case.under_grammar for case in made.cases):
        warn(f"{count(under, 'case')} under a grammar: suite run cannot judge and fails them, determinism and grid ask them again")
    err.print(f"{count(len(made.cases), 'case')} in {out}", markup=False)


def _cases(installation: Installation, where: str, left_out: Counter[str]) -> Iterator[tuple[SessionState, Case]]:
    for state, generation in generations_where(installation, where):
        case = case_of(state, generation)
        if isinstance(case, str):
            left_out[case] += 1
        else:
            yield state, case


@suite.command()
@click.argument("file", type=SUITE)
@engine_options
@click.option("--junit", "report", type=SUITE, help="Write the results as JUnit's XML as well.")
@click.option("--strict/--loose", default=False, help="Fail where the environment differs, whatever is said.")
@click.option("--run", "name", metavar="NAME", help="Workflow under which the verdicts are recorded.  [default: the file and the time]")
@format_option
@with_installation
def run(
    installation: Installation,
    file: Path,
    engine: str | None,
    options: tuple[str, ...],
    model: str | None,
    report: Path | None,
    strict: bool,
    name: str | None,
    fmt: str,
) -> None:
    """Compare every case of FILE with an engine: exit code 6 unless each is identical or drifts no more than noise.

    A case that cannot be judged fails too. Each verdict is recorded as a replay.
    """
    read = read_suite(file)
    scorer = open_engine(installation, engine, model, options)
    run_name = name or f"suite-{file.stem}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    more: dict[str, Any] = {"strict": strict, "actor": installation.person(), "calibrations": calibrations(installation)}
    results = run_suite(read, scorer, installation.recorder, tenant=installation.settings.tenant, run=run_name, **more)
    if report:
        write_whole(report, junit(file.stem, results))
    write_rows([_verdict(result) for result in results], fmt, VERDICTS)
    if failed := [result for result in results if not result.passed]:
        first = failed[0]
        fault = f"{len(failed)} of {count(len(results), 'case')} failed; the first: {name_of(first.case)}: {first.outcome.reason}"
        raise Regressed(fault, operation="suite run", place=str(file), hint="if the change is wanted, record the suite again")


def _verdict(result: Result) -> dict[str, Any]:
    drifts = [s.judgement.drift_max for s in result.outcome.sequences if s.judgement.drift_max is not None]
    return {
        "case": name_of(result.case),
        "verdict": result.outcome.verdict.replace("_", " "),
        "reason": result.outcome.reason,
        "tokens": sum(s.judgement.scored for s in result.outcome.sequences),
        "drift_max": max(drifts, default=None),
        "recorded_in": uuid(result.outcome.session_id),
    }


@suite.command("determinism")
@click.argument("file", type=SUITE)
@engine_options
@click.option("--times", type=click.IntRange(2), default=2, show_default=True, help="How often each case is asked.")
@format_option
@with_installation
def determinism_(
    installation: Installation, file: Path, engine: str | None, options: tuple[str, ...], model: str | None, times: int, fmt: str
) -> None:
    """Ask every case of FILE again and again by the same seed, alone; exit code 6 unless all answers are the same, token by token.

    Cases that the engine refuses are named and say nothing; exit code 2 if it refuses all.
    """
    read = read_suite(file)
    speaker = open_engine(installation, engine, model, options)
    found = list(determinism(read, speaker, times=times))
    write_rows([{"case": name_of(one.case), "same": one.same, "reason": one.reason} for one in found], fmt, REPEATED)
    refused = [one for one in found if one.same is None]
    if refused:
        err.print(f"{len(refused)} of {count(len(found), 'case')} could not be asked: {refused[0].reason}", markup=False)
    if len(refused) == len(found):
        raise UsageError("no case of it can be asked", operation="suite determinism", place=str(file), hint="see the reasons")
    if other := [one for one in found if one.same is False]:
        fault = f"{len(other)} of {count(len(found), 'case')} came differently: {name_of(other[0].case)}: {other[0].reason}"
        raise Regressed(fault, operation="suite determinism", place=str(file), hint="other requests on the engine change its batches")


@suite.command("grid")
@click.argument("file", type=SUITE)
@engine_options
@click.option(
    "--vary", "axes", multiple=True, required=True, metavar="NAME=VALUE,VALUE", help="A parameter and its values; repeat for several."
)
@format_option
@with_installation
def grid_(
    installation: Installation, file: Path, engine: str | None, options: tuple[str, ...], model: str | None, axes: tuple[str, ...], fmt: str
) -> None:
    """Ask every case of FILE with every combination of parameters: lengths, logprobs, and how far each answer is the recorded one."""
    varied, read = axes_of(axes), read_suite(file)
    speaker = open_engine(installation, engine, model, options)
    points = [point._asdict() for point in grid(read, speaker, varied)]
    rows = [{**point.pop("parameters"), **point} for point in points]
    write_rows(rows, fmt, list(rows[0]))


@suite.command()
@click.argument("file", type=SUITE)
@target_options
@click.option("--requests", type=click.IntRange(1), default=64, show_default=True, help="Requests in all; cases are asked in turn.")
@with_installation
def stress(
    installation: Installation, file: Path, to: str, model: str | None, key_env: str | None, in_flight: int, fmt: str, requests: int
) -> None:
    """Ask the cases of FILE over and over, flat out: errors, and times at p50 and p99. Exit code 6 if a request failed.

    Answers are held to their recorded lengths.
    """
    read = read_suite(file)
    cases = [arrival for case in read.cases if not isinstance(arrival := _arrival(read, case, installation.settings.tenant), str)]
    if not cases:
        raise UsageError("no case of it can be sent", operation="suite stress", place=str(file), hint="embeddings and the like cannot")
    several = list(islice(cycle(cases), requests))
    report = driven(several, target_of(to, model, key_env), speed=None, in_flight=in_flight, fmt=fmt)
    if report.driven.failed:
        fault = f"{report.driven.failed:,} of {count(requests, 'request')} failed: {', '.join(report.errors)}"
        raise Regressed(fault, operation="suite stress", place=to, hint="fewer at once: --in-flight")


def _arrival(read: Suite, case: Case, tenant: str) -> Arrival | str:
    state = fold(events_of(read, case, tenant))
    found = arrival_of(state, next(iter(state.generations.values())), held=True)
    return found if isinstance(found, str) else replace(found, past=None)


COMMANDS = [suite]
