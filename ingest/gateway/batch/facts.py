"""Batches as facts of the control log, each kind with one writer, so that nobody overwrites what another one said."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from schemas import clock
from schemas.batches import ENDED, Batch, BatchFile, Cancelled, Counts, Ended, Status
from schemas.errors import UnknownName
from store.control import ControlLog, ControlView, Value

BATCH, CANCELLED, ENDING, FILE = "batch", "batch.cancelled", "batch.ended", "batch.file"
MODEL = "batch.model"
"""Models that have a log; the key is the model."""
COMMITTED = "batch.committed"
"""`{log_id, offset}` by `<partition>/<model>`: every record before that offset has its result."""
COUNTS = "batch.counts"
"""What one worker has brought to an end, by `<batch>/<worker>`."""
BEGUN = "batch.begun"
"""`{log_id, attempts}` by `<partition>/<model>`: by offset how often what may be under way was begun."""
SUBMITTER = "batch.submitter"
"""Who still appends the records of a batch, the first time or anew, and until when that holds unless it is said again."""
CLAIM = "batch.claim"
"""Who would append the records of a batch anew, by `<batch>/<worker>`, each written once: of several the first in the log does it."""
ABANDONED = "batch.abandoned"
"""That somebody is about to end a batch whose submitter is gone."""
LEASE = "batch.lease"
"""Which worker has requests of a partition under way, by `<partition>/<model>`."""
WORKER = "batch.worker"
"""Workers that live, and the patterns of the models that they can ask."""

READ_BACK_S = 10.0
"""How long a writer waits for its own copy to say what it wrote."""


class Facts:
    """The facts as this process knows them; a write is read back before it returns. May be used by several threads."""

    def __init__(self, control: ControlLog, shared: ControlView) -> None:
        self._control = control
        self._shared = shared

    def write(self, kind: str, key: str, value: BaseModel | Value | None) -> None:
        """Write a fact, durable when this returns.

        Raises:
            LogUnavailable: the control log does not answer.
        """
        position = self.note(kind, key, value.model_dump(mode="json") if isinstance(value, BaseModel) else value)
        deadline = time.monotonic() + READ_BACK_S
        while self._shared.position < position and time.monotonic() < deadline:
            time.sleep(0.005)

    def note(self, kind: str, key: str, value: Value | None) -> int:
        """Write a fact that only others ask for; its position. As `write`, but nothing is read back."""
        return self._control.append(kind, key, value)

    def latest(self, kind: str) -> dict[str, Value]:
        """What holds now, by key."""
        return self._shared.latest(kind)

    def get(self, kind: str, key: str) -> Value | None:
        """One fact."""
        return self._shared.get(kind, key)

    @property
    def away(self) -> bool:
        """Whether the control log did not answer when it was last asked."""
        return self._shared.away

    # Batches

    def find(self, batch_id: str) -> Batch | None:
        """A batch of whomever."""
        value = self.get(BATCH, batch_id)
        return Batch.model_validate(value) if value else None

    def batch(self, batch_id: str, tenant: str | None) -> Batch:
        """A batch of a tenant; of any where that is None.

        Raises:
            UnknownName: the tenant has none of that id.
        """
        found = self.find(batch_id)
        if found is None or tenant not in (None, found.owner.tenant):
            raise UnknownName(f"no batch is called {batch_id[:80]!r}", operation="find batch", hint="`tokentape batch list` shows all")
        return found

    def batches(self, tenant: str | None = None) -> list[Batch]:
        """The batches of a tenant, or all, newest first."""
        found = [Batch.model_validate(value) for value in self.latest(BATCH).values()]
        own = [batch for batch in found if tenant in (None, batch.owner.tenant)]
        return sorted(own, key=lambda batch: (batch.created_at, batch.batch_id), reverse=True)

    def ended(self, batch_id: str) -> Ended | None:
        """How a batch ended; None as long as it has not."""
        value = self.get(ENDING, batch_id)
        return Ended.model_validate(value) if value else None

    def cancelled(self, batch_id: str) -> Cancelled | None:
        """Who cancelled a batch."""
        value = self.get(CANCELLED, batch_id)
        return Cancelled.model_validate(value) if value else None

    def status(self, batch: Batch) -> Status:
        """Where a batch stands, in OpenAI's words."""
        if ended := self.ended(batch.batch_id):
            return ended.status
        if self.get(CANCELLED, batch.batch_id):
            return "cancelling"
        if batch.ends is None:
            return "validating"
        return "finalizing" if self.worked_off(batch) else "in_progress"

    def wanted(self, batch: Batch) -> bool:
        """Whether what has not begun of a batch shall begin."""
        return self.status(batch) not in ENDED | {"cancelling"} and clock.now_s() < batch.expires_at

    def counts(self, batch_id: str) -> Counts:
        """How many requests ended so far; exact once the batch has ended."""
        if ended := self.ended(batch_id):
            return ended.counts
        own = (Counts.model_validate(value) for key, value in self.latest(COUNTS).items() if key.startswith(f"{batch_id}/"))
        return sum(own, Counts())

    def worked_off(self, batch: Batch) -> bool:
        """Whether every record of a batch lies before what workers have committed in the logs that hold them."""
        ends = ((model, partition, end) for model, own in (batch.ends or {}).items() for partition, end in enumerate(own))
        return batch.ends is not None and all(not end or self._reached(batch, model, partition, end) for model, partition, end in ends)

    def _reached(self, batch: Batch, model: str, partition: int, end: int) -> bool:
        log_id, offset = self.committed(model, partition)
        return offset >= end and batch.logs.get(model, log_id) == log_id

    def committed(self, model: str, partition: int) -> tuple[str, int]:
        """The log and offset up to which a partition is worked off."""
        value = self.get(COMMITTED, f"{partition}/{model}") or {}
        return str(value.get("log_id", "")), int(value.get("offset", 0))

    # Files

    def file(self, file_id: str, tenant: str | None) -> BatchFile:
        """A file of a tenant.

        Raises:
            UnknownName: the tenant has none of that id.
        """
        value = self.get(FILE, file_id)
        found = BatchFile.model_validate(value) if value else None
        if found is None or tenant not in (None, found.owner.tenant):
            raise UnknownName(f"no file is called {file_id[:80]!r}", operation="find file", hint="upload it first, with purpose batch")
        return found

    def files(self, tenant: str | None = None) -> Iterator[BatchFile]:
        """The files of a tenant, or all, newest first."""
        found = [BatchFile.model_validate(value) for value in self.latest(FILE).values()]
        own = [file for file in found if tenant in (None, file.owner.tenant)]
        yield from sorted(own, key=lambda file: (file.created_at, file.file_id), reverse=True)


def document(facts: Facts, batch: Batch) -> dict[str, Any]:
    """A batch as OpenAI's API shows it."""
    ended, cancelled, status = facts.ended(batch.batch_id), facts.cancelled(batch.batch_id), facts.status(batch)
    counts = facts.counts(batch.batch_id)
    at = {f"{name}_at": int(ended.at) if ended and ended.status == name else None for name in sorted(ENDED)}
    errors = [{"code": "batch_failed", "message": ended.error, "line": None, "param": None}] if ended and ended.error else None
    return {
        "id": batch.batch_id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.window,
        "status": status,
        "output_file_id": ended.output_file_id if ended else None,
        "error_file_id": ended.error_file_id if ended else None,
        "created_at": int(batch.created_at),
        "in_progress_at": int(batch.in_progress_at) if batch.in_progress_at else None,
        "expires_at": int(batch.expires_at),
        "finalizing_at": None,
        **at,
        "cancelling_at": int(cancelled.at) if cancelled else None,
        "request_counts": {"total": batch.total, "completed": counts.completed, "failed": counts.failed},
        "metadata": batch.metadata,
    }
