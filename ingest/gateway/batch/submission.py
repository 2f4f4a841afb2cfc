"""A submission under way: its lease says that somebody still appends. When that lapses whoever sees it ends the batch as failed.

Such a batch is never completed by others, even where all of its records are there: nobody was told its id, and who submits
again would have the work done twice. Whoever appends the records of an accepted batch anew (`requeue.py`) has the same lease; when that
lapses another one does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import structlog

from ingest.debug import workers
from ingest.gateway.batch import facts as f
from ingest.gateway.batch.facts import Facts
from schemas import clock
from schemas.batches import Batch, Counts, Ended
from schemas.errors import ConflictError
from schemas.events import AccessContent, AccessLogged
from schemas.settings import Settings
from schemas.sink import EventSink, SessionContext, new_id

log = structlog.get_logger(__name__)

INTERRUPTED = "its submitter stopped before every request was durable; nothing of it is worked on: submit it again"


class Submission:
    """A submitter's lease of its batch, written before the batch and renewed between appends."""

    def __init__(self, facts: Facts, batch_id: str, settings: Settings) -> None:
        self._facts, self._batch_id = facts, batch_id
        self._submitter = workers.Worker()
        self._lease_s = 2 * settings.log.timeout_s  # one append may take half of it
        self._renewed_at: float | None = None
        self._claim = f"{batch_id}/{self._submitter.worker_id}"
        self._claimed = False

    def claim(self) -> bool:
        """Take the lease of a batch that others may want to append too; False where one of them has it, or was first.

        Either way, and after an error, `close` is needed.
        """
        if self._facts.get(f.SUBMITTER, self._batch_id) is not None:
            return False
        self._facts.write(f.CLAIM, self._claim, self._document())
        self._claimed = True
        if next(_claims(self._facts, self._batch_id), None) != self._claim:
            return False
        self.renew()
        return True

    def _document(self) -> dict[str, Any]:
        return {**self._submitter.document(), "worker": self._submitter.worker_id, "until": clock.now_s() + self._lease_s}

    def renew(self, *, at_once: bool = False) -> None:
        """Say that it goes on, where that was last said long ago, or `at_once`.

        Raises:
            ConflictError: somebody took it for dead, or has taken the lease.
        """
        if self._renewed_at is not None and time.monotonic() - self._renewed_at < workers.HEARTBEAT_S and not at_once:
            return
        self.check()
        if self._renewed_at is not None and not self.held:
            raise ConflictError(f"another process appends {self._batch_id}", operation="submit", hint="wait for it")
        self._facts.write(f.SUBMITTER, self._batch_id, self._document())
        self._renewed_at = time.monotonic()

    @property
    def held(self) -> bool:
        """Whether the lease is this one, and was not taken away as lapsed."""
        return (self._facts.get(f.SUBMITTER, self._batch_id) or {}).get("worker") == self._submitter.worker_id

    def check(self) -> None:
        """Whether the batch is still the submitter's. After its ends were written nobody takes it any more.

        Raises:
            ConflictError: somebody took it for dead.
        """
        if self._facts.get(f.ABANDONED, self._batch_id) or self._facts.ended(self._batch_id):
            fault = f"{self._batch_id} was taken for abandoned: nothing was appended for {self._lease_s:g} s"
            raise ConflictError(fault, operation="submit", hint="submit it again")

    def close(self) -> None:
        """Give the lease back, then the claim to it."""
        if self.held:
            self._facts.write(f.SUBMITTER, self._batch_id, None)
        if self._claimed:
            self._facts.write(f.CLAIM, self._claim, None)


def end_abandoned(facts: Facts, recorder: Callable[[], EventSink], settings: Settings) -> None:
    """End the batches whose submitter is gone, and say so on the tape; take lapsed leases away. Two that do it at once do no harm."""
    for batch_id in _lapsed(facts):
        batch = facts.find(batch_id)
        if batch is not None and batch.ends is None and facts.ended(batch_id) is None and _claimed(facts, batch_id):
            facts.write(f.ENDING, batch_id, Ended(status="failed", at=clock.now_s(), counts=Counts(), error=INTERRUPTED))
            _record(recorder(), batch, settings)
            log.warning("batch abandoned by its submitter", batch=batch_id)
        for kind in (f.SUBMITTER, f.ABANDONED):
            facts.write(kind, batch_id, None)
    for key, claim in facts.latest(f.CLAIM).items():
        leased = facts.get(f.SUBMITTER, key.partition("/")[0]) or {}
        if leased.get("worker") != claim.get("worker") and _over(claim):  # the lease is renewed, its claim is not
            facts.write(f.CLAIM, key, None)


def _claims(facts: Facts, batch_id: str) -> Iterator[str]:
    """The claims to a batch in the order in which they were written, which is the same for all."""
    return (key for key in facts.latest(f.CLAIM) if key.startswith(f"{batch_id}/"))


def _lapsed(facts: Facts) -> Iterator[str]:
    """Batches whose submitter's process is gone, or has been silent for too long."""
    for batch_id, lease in facts.latest(f.SUBMITTER).items():
        if _over(lease):
            yield batch_id


def _over(lease: dict[str, Any]) -> bool:
    return workers.runs_here(lease) is False or clock.now_s() > _until(lease)


def _until(lease: dict[str, Any]) -> float:
    until = lease.get("until")
    return float(until) if isinstance(until, int | float) else 0.0


def _claimed(facts: Facts, batch_id: str) -> bool:
    """Whether the batch is this process's to end: the claim stands in the log before the submitter said where its records end.

    The submitter looks for a claim after it said so, thus at least one of the two sees the other.
    """
    facts.write(f.ABANDONED, batch_id, {"at": clock.now_s()})
    batch = facts.find(batch_id)
    return facts.get(f.ABANDONED, batch_id) is not None and batch is not None and batch.ends is None


def _record(recorder: EventSink, batch: Batch, settings: Settings) -> None:
    session = SessionContext(new_id(), batch.owner.tenant, "gateway", batch.owner.name, settings.retention_class)
    content = AccessContent(statement=batch.batch_id)
    recorder.record(session, AccessLogged(operation="batch submit", outcome="abandoned", rows=batch.total, duration_us=0, content=content))
