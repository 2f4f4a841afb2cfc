"""Runs lifecycle jobs on their schedule, each run entered in the ledger of runs.

APScheduler keeps the time with a memory store: what has run is the ledger's business, so nothing is lost with the
process and several schedulers may run at once. `misfire_grace_time=None` and `coalesce` make a late run one run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.memory import MemoryJobStore
from apscheduler.schedulers.background import BackgroundScheduler

from lifecycle.runs import LEASE_S, RunLedger
from schemas import clock
from schemas.errors import ConflictError, TokentapeError, UsageError

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Job:
    """One lifecycle job: `work(dry_run)` does it, or says what it would do, and returns what it did as a flat dict.

    `every_s` 0 means only by hand. Work MUST be idempotent: a killed run is simply run again.
    """

    name: str
    description: str
    every_s: float
    work: Callable[[bool], dict[str, Any]]


def run_job(job: Job, ledger: RunLedger, *, trigger: str, slot: int | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Run a job now and enter the run; a dry run changes nothing and is not entered.

    Raises:
        ConflictError: the job is running, or its tick has been done by another scheduler.
        TokentapeError: what the work raised; the run is entered as failed.
    """
    if dry_run:
        return job.work(True)
    run_id = ledger.begin(job.name, slot=slot, trigger=trigger)
    done = threading.Event()
    keeper = threading.Thread(target=_renew, args=(ledger, run_id, done), daemon=True)
    keeper.start()
    try:
        summary = job.work(False)
    except BaseException as error:
        ledger.finish(run_id, "failed", {"error": str(error)})
        raise
    finally:
        done.set()
        keeper.join()
    ledger.finish(run_id, "ok", summary)
    return summary


def _renew(ledger: RunLedger, run_id: str, done: threading.Event) -> None:
    while not done.wait(LEASE_S / 3):
        ledger.renew(run_id)


class Scheduler:
    """All jobs of one process on their schedule, until closed."""

    def __init__(self, jobs: Sequence[Job], ledger: RunLedger) -> None:
        self._jobs = {job.name: job for job in jobs}
        self._ledger = ledger
        self._scheduler = BackgroundScheduler(
            jobstores={"default": MemoryJobStore()},
            executors={"default": ThreadPoolExecutor(max(1, len(jobs)))},
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
            timezone="UTC",
        )
        for job in jobs:
            if job.every_s > 0:
                self._scheduler.add_job(self._tick, "interval", seconds=job.every_s, args=[job], id=job.name)

    def start(self) -> None:
        """Start the clock."""
        self._scheduler.start()

    def close(self) -> None:
        """Stop the clock and wait for what is running."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=True)

    def _tick(self, job: Job) -> None:
        slot = int(clock.now_us() / 1e6 // job.every_s)
        try:
            summary = run_job(job, self._ledger, trigger="schedule", slot=slot)
            log.info("job.done", job=job.name, **summary)
        except ConflictError as error:
            log.debug("job.skipped", job=job.name, why=str(error))
        except TokentapeError as error:
            log.error("job.failed", job=job.name, error=str(error), hint=error.hint)
        except Exception as error:
            log.exception("job.crashed", job=job.name, error=repr(error))


def find(jobs: Sequence[Job], name: str) -> Job:
    """The job of a name.

    Raises:
        UsageError: there is none.
    """
    for job in jobs:
        if job.name == name:
            return job
    raise UsageError(f"no job is called {name!r}", hint=f"valid: {', '.join(job.name for job in jobs)}")
