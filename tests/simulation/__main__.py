"""`make simulate`: many seeds and one table, or one seed with its trace."""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

import structlog

from tests.simulation.world import Outcome, simulate

_TOGETHER = 20
"""Seeds that a worker takes at a time."""


def main() -> int:
    """Say what came of it; 1 when something was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="one seed, with its trace")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    _quiet()
    if given.seed is not None:
        outcome = simulate(given.seed)
        print("\n".join(outcome.trace))
        print(*outcome.violations or ("no violation",), sep="\n")
        return int(bool(outcome.violations))
    began = time.monotonic()
    outcomes: list[Outcome] = []
    with contextlib.suppress(KeyboardInterrupt):  # then the table is of the seeds so far
        outcomes.extend(_shown(_all(range(given.first, given.first + given.seeds), given.workers), given.seeds))
    print(table(outcomes, time.monotonic() - began))
    return int(any(outcome.violations for outcome in outcomes))


def table(outcomes: list[Outcome], took_s: float) -> str:
    """Seeds, faults by class, kills by step, violations, time."""
    faults, kills, steps = (sum((getattr(item, name) for item in outcomes), Counter[str]()) for name in ("faults", "kills", "steps"))
    wrong = [item for item in outcomes if item.violations]
    lines = [f"{len(outcomes):,} seeds in {took_s:,.0f} s, {faults.total():,} faults, {len(wrong)} seeds with a violation", "", "fault"]
    lines += [f"  {fault:24}{count:10,}" for fault, count in sorted(faults.items())]
    lines += ["", "step                          reached    killed"]
    lines += [f"  {step:24}{count:11,}{kills[step]:10,}" for step, count in sorted(steps.items())]
    lines += ["", *(f"seed {item.seed}: {item.violations[0]}   (make simulate SEED={item.seed})" for item in wrong)]
    return "\n".join(lines).rstrip()


def _all(seeds: Iterable[int], workers: int) -> Iterator[Outcome]:
    pool = ProcessPoolExecutor(workers, initializer=_quiet)
    try:
        waiting = iter(seeds)
        while part := list(islice(waiting, _TOGETHER * workers)):
            yield from pool.map(_without_trace, part)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _without_trace(seed: int) -> Outcome:
    found = simulate(seed)
    return found if found.violations else Outcome(seed, (), found.faults, found.kills, found.steps, ())


def _shown(outcomes: Iterable[Outcome], count: int) -> Iterator[Outcome]:
    """Progress on stderr."""
    for number, outcome in enumerate(outcomes, 1):
        if outcome.violations:
            print(f"seed {outcome.seed}: {outcome.violations[0]}", file=sys.stderr)
        elif number % 100 == 0:
            print(f"{number:,} of {count:,}", file=sys.stderr)
        yield outcome


def _quiet() -> None:
    """What goes wrong in a simulation is meant to: the program need not say so."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that leads decides what an interrupt means


if __name__ == "__main__":
    sys.exit(main())
