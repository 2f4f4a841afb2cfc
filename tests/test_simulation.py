"""The simulation finds nothing in the code as it is, and finds each fault that is put into it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ingest.sender import Sender
from lifecycle.policies import Policies
from lifecycle.register import HOLD_PLACED, Standing
from lifecycle.rewriting import Rewriting
from store.sequence import Judgement, judge
from tests.simulation.world import simulate


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_nothing_is_violated(first: int) -> None:
    """What is acknowledged is there once, what is held or not due is there, what is due is gone, and all proofs hold.

    Fifty seeds at a time in a process whose hash seed is that of `make simulate`, which then does the same: what it says names the seed.
    """
    command = [sys.executable, "-m", "tests.simulation", "--first", str(first), "--seeds", "50", "--workers", "1"]
    ran = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=False)

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("50 seeds ")


def test_a_seed_is_a_run() -> None:
    """The same seed does the same again, line by line, so that what was found can be looked at."""
    assert simulate(7) == simulate(7)


def _acknowledge_early(patch: pytest.MonkeyPatch) -> None:
    append: Callable[..., None] = Sender._append

    def early(sender: Sender, entries: Any) -> None:
        sender._next().acknowledge()
        append(sender, entries)

    patch.setattr(Sender, "_append", early)


def _keep_duplicates(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("store.tail.judge", lambda *given: Judgement(marks=judge(*given).marks))


def _forget_holds(patch: pytest.MonkeyPatch) -> None:
    take = Standing._take
    patch.setattr(Standing, "_take", lambda standing, entry: None if entry.type == HOLD_PLACED else take(standing, entry))


def _forget_minimum(patch: pytest.MonkeyPatch) -> None:
    verdict = Policies.verdict
    patch.setattr(Policies, "verdict", lambda *given: (found := verdict(*given)) and replace(found, kept=""))


def _delete_before_the_entry(patch: pytest.MonkeyPatch) -> None:
    commit = Rewriting._commit

    def early(run: Rewriting, change: Any, made: Any) -> Any:
        for segment in change.segments:
            run.tiering.objects.purge(segment.key)
        return commit(run, change, made)

    patch.setattr(Rewriting, "_commit", early)


def _leave_the_old_objects(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rewriting, "_purge", lambda run, key: 0)


@pytest.mark.parametrize(
    ("mutate", "odds", "first", "says"),
    [
        (_acknowledge_early, {"log: refused": 0.5}, 2, "is not in the log"),
        (_keep_duplicates, {"log: reply lost": 0.5}, 2, "is there 2 times"),
        (_forget_holds, {}, 9, "a hold keeps it"),
        (_forget_minimum, {}, 7, "it is not due"),
        (_delete_before_the_entry, {}, 4, "is not there at the moment"),
        (_leave_the_old_objects, {}, 4, "objects that no live segment is"),
    ],
)
def test_a_fault_that_is_put_in_is_found(
    mutate: Callable[[pytest.MonkeyPatch], None], odds: dict[str, float], first: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each within a dozen seeds, under the name of what it breaks; `first` is one that found it."""
    mutate(monkeypatch)
    found = (violation for seed in range(first, first + 12) for violation in simulate(seed, odds=odds).violations if says in violation)

    assert says in next(found)
