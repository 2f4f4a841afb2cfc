"""The scheduler and its ledger of runs."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lifecycle import runs
from lifecycle.runs import RunLedger
from lifecycle.scheduler import Job, Scheduler, find, run_job
from schemas.errors import ConflictError, CorruptStore, StoreUnavailable, UsageError


def _nothing(dry_run: bool) -> dict[str, Any]:
    return {"dry_run": dry_run}


def test_a_run_is_entered_with_its_summary_and_survives_a_restart(tmp_path: Path) -> None:
    """What ran stands in the ledger after the process that ran it is gone."""
    run_job(Job("merge", "", 0, lambda _: {"shards": 3}), RunLedger(tmp_path / "jobs.sqlite"), trigger="hand")

    (run,) = RunLedger(tmp_path / "jobs.sqlite").history()

    assert ("merge", "ok", {"shards": 3}, "hand") == (run.job, run.outcome, run.summary, run.trigger)


def test_a_dry_run_is_not_entered(tmp_path: Path) -> None:
    """A dry run changes nothing, the ledger included."""
    ledger = RunLedger(tmp_path / "jobs.sqlite")

    summary = run_job(Job("merge", "", 0, _nothing), ledger, trigger="hand", dry_run=True)

    assert {"dry_run": True} == summary
    assert [] == ledger.history()


def test_a_failed_run_is_entered_as_failed(tmp_path: Path) -> None:
    """The error of a run is part of its entry, and the caller sees it."""
    ledger = RunLedger(tmp_path / "jobs.sqlite")

    def work(_: bool) -> dict[str, Any]:
        raise StoreUnavailable("the store does not answer")

    with pytest.raises(StoreUnavailable):
        run_job(Job("tier", "", 0, work), ledger, trigger="hand")

    assert ("failed", {"error": "the store does not answer"}) == (ledger.history()[0].outcome, ledger.history()[0].summary)


def test_a_running_job_is_not_started_again(tmp_path: Path) -> None:
    """While a job runs, a second start is refused by name."""
    ledger = RunLedger(tmp_path / "jobs.sqlite")
    ledger.begin("tier", slot=None, trigger="hand")

    with pytest.raises(ConflictError, match="job tier is running"):
        ledger.begin("tier", slot=None, trigger="hand")


def test_a_run_whose_owner_died_is_abandoned_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When nobody renews a lease, the next start says so and goes ahead."""
    ledger = RunLedger(tmp_path / "jobs.sqlite")
    monkeypatch.setattr(runs, "LEASE_S", -1.0)  # the lease of a process that died long ago
    ledger.begin("tier", slot=None, trigger="hand")

    ledger.begin("tier", slot=None, trigger="hand")

    assert ["abandoned"] == [run.outcome for run in ledger.history() if run.finished_at]


def _schedule(path: Path, work: Path, ready: Any, stop: Any) -> None:
    def count(_: bool) -> dict[str, Any]:
        with (work / "done").open("a") as file:
            file.write(f"{time.time()}\n")
        return {}

    scheduler = Scheduler([Job("tick", "", 0.5, count)], RunLedger(path))
    ready.wait()
    scheduler.start()
    stop.wait()
    scheduler.close()


def test_two_schedulers_do_the_work_once(tmp_path: Path) -> None:
    """Of two processes with the same schedule, one enters each tick."""
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Barrier(2), context.Event()
    both = [context.Process(target=_schedule, args=(tmp_path / "jobs.sqlite", tmp_path, ready, stop)) for _ in range(2)]
    for process in both:
        process.start()
    ledger, deadline = RunLedger(tmp_path / "jobs.sqlite"), time.monotonic() + 60
    while len(ledger.history()) < 6 and time.monotonic() < deadline:
        stop.wait(0.05)
    stop.set()
    for process in both:
        process.join()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        slots = [slot for (slot,) in connection.execute("SELECT slot FROM runs")]

    assert len(slots) >= 6
    assert len(set(slots)) == len(slots)
    assert len(slots) == len((tmp_path / "done").read_text().splitlines())


def test_a_crashing_job_does_not_stop_the_others(tmp_path: Path) -> None:
    """An unexpected exception is entered as a failed run and the clock goes on."""
    ran = threading.Semaphore(0)

    def crash(_: bool) -> dict[str, Any]:
        raise ZeroDivisionError

    def count(_: bool) -> dict[str, Any]:
        ran.release()
        return {}

    scheduler = Scheduler([Job("bad", "", 0.1, crash), Job("good", "", 0.1, count)], RunLedger(tmp_path / "jobs.sqlite"))
    scheduler.start()
    ran_three_times = all(ran.acquire(timeout=30) for _ in range(3))
    scheduler.close()

    assert ran_three_times
    assert {"failed"} == {run.outcome for run in RunLedger(tmp_path / "jobs.sqlite").history("bad")}


def test_an_unknown_job_names_the_known_ones() -> None:
    """A wrong name is answered with the valid ones."""
    with pytest.raises(UsageError, match="no job is called 'teir'") as caught:
        find([Job("tier", "", 0, _nothing)], "teir")

    assert "valid: tier" == caught.value.hint


def test_a_broken_ledger_of_runs_is_named(tmp_path: Path) -> None:
    """A file that is no database is one clear error."""
    (tmp_path / "jobs.sqlite").write_bytes(b"not a database" * 1000)

    with pytest.raises(CorruptStore, match="file is not a database"):
        RunLedger(tmp_path / "jobs.sqlite")
