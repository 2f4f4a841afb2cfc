"""Batch work: a file of requests, each a record in the log of its model, and what becomes of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
"""In OpenAI's words."""

ENDED: frozenset[Status] = frozenset(("failed", "completed", "expired", "cancelled"))


class _Fact(BaseModel):
    """A fact of the control log; fields of a later version are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Owner(_Fact):
    """Whose work it is. `key_id` names the virtual key that submitted it; no credential is kept."""

    tenant: str
    name: str
    key_id: str | None = None


class BatchFile(_Fact):
    """A file of requests or of results; its bytes are in the object store."""

    file_id: str
    owner: Owner
    filename: str
    purpose: Literal["batch", "batch_output"]
    bytes: int
    created_at: float


class Counts(_Fact):
    """How many requests ended, well or not."""

    completed: int = 0
    failed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(completed=self.completed + other.completed, failed=self.failed + other.failed)


class Batch(_Fact):
    """What was submitted. Written by its submitter, then by whoever appends its records anew; times are seconds since the epoch.

    `ends` is where its records end, by model and partition: offsets in the log whose id `logs` has by model (batches of earlier versions
    have none). While `ends` is None the records are still being appended.
    """

    batch_id: str
    owner: Owner
    endpoint: str
    input_file_id: str
    window: str
    metadata: dict[str, str] = {}
    total: int
    created_at: float
    expires_at: float
    ends: dict[str, list[int]] | None = None
    logs: dict[str, str] = {}
    in_progress_at: float | None = None


class Cancelled(_Fact):
    """That somebody wants no more of a batch."""

    by: str
    at: float


class Ended(_Fact):
    """How a batch ended. Written once all of its requests have a result, or never will have one."""

    status: Status
    at: float
    counts: Counts
    output_file_id: str | None = None
    error_file_id: str | None = None
    error: str | None = None


class WorkItem(BaseModel):
    """One request in the log of its model: `number` is its line in the file, `session` the session that it is recorded in."""

    model_config = ConfigDict(frozen=True)

    batch_id: str
    number: int
    custom_id: str
    session: str
    url: str
    body: dict[str, Any]
