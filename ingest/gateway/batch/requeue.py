"""Batches whose records are gone: what has no result yet is appended anew, from the input file in the object store.

The log of a model is not in the backup of a topic, and somebody may remove it. A batch says which log its records went to, so that it is
seen when the model has another one, or one that ends before them. Nothing is asked again that has its result. A request that was under
way meanwhile may be asked twice; its result is created once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import structlog

from ingest.gateway.batch import facts as f
from ingest.gateway.batch.desk import BatchDesk
from ingest.gateway.batch.facts import Facts
from ingest.gateway.batch.finish import results_of, take_apart
from ingest.gateway.batch.lines import Line, lines
from ingest.gateway.batch.submission import Submission
from schemas.batches import Batch
from schemas.errors import TokentapeError, Unavailable
from store.work import WorkLog

log = structlog.get_logger(__name__)

Works = Mapping[str, WorkLog]
"""Logs by model."""


def bereft(desk: BatchDesk, batches: Collection[Batch]) -> dict[str, Works]:
    """Which of these batches wait for records that are in no log any more: by id the logs that the models of those have now."""
    waiting = [batch for batch in batches if desk.facts.ended(batch.batch_id) is None and not desk.facts.worked_off(batch)]
    standing = _standing(desk, {model for batch in waiting for model in batch.ends or {}})
    found: dict[str, Works] = {}
    for batch in waiting:
        own = {model: standing[model] for model in batch.ends or {} if model in standing}
        if lost := {model: work for model, (work, ends) in own.items() if _lost(desk.facts, batch, model, work.log_id, ends)}:
            found[batch.batch_id] = lost
    return found


def _standing(desk: BatchDesk, models: Collection[str]) -> dict[str, tuple[WorkLog, list[int]]]:
    """The logs of models and where their partitions end, without those that cannot be read now."""
    found = {}
    for model in sorted(models):
        try:
            work = desk.works.standing(model)
            found[model] = work, work.ends()
        except TokentapeError as error:
            log.warning("batch work cannot be read", model=model, error=str(error))
    return found


def _lost(facts: Facts, batch: Batch, model: str, log_id: str, ends: list[int]) -> bool:
    """Whether a model's log, of this id and these ends, is another one than a batch's records went to, or has lost its end.

    A batch of an earlier version does not say which that was: it is the one in which workers last committed.
    """
    own = (batch.ends or {})[model]
    committed = {facts.committed(model, partition)[0] for partition in range(len(own))} - {""}
    noted = {batch.logs[model]} if model in batch.logs else committed
    return bool(noted - {log_id}) or len(own) != len(ends) or any(wanted > end for wanted, end in zip(own, ends, strict=True))


def requeue(desk: BatchDesk, batch: Batch) -> None:
    """Append what a batch waits for anew, unless somebody who lives is at it. Where this is killed, whoever comes next does it.

    Raises:
        UnknownName: the input file is gone. UsageError: a line of it is no request by the settings of now.
        ConflictError: the batch has ended, or another process appends it, meanwhile.
        Unavailable, LogChanged: a log, the control log or the object store does not answer; try again.
    """
    submission = Submission(desk.facts, batch.batch_id, desk.settings)
    try:
        if not submission.claim():
            return
        now = desk.facts.find(batch.batch_id)  # somebody else may have done it until the lease was taken
        if now is not None and (gone := bereft(desk, [now])):
            _requeue(desk, now, gone[now.batch_id], submission)
    finally:
        with contextlib.suppress(Unavailable):  # it lapses
            submission.close()


def _requeue(desk: BatchDesk, batch: Batch, works: Works, submission: Submission) -> None:
    """Append, then say where the records end; where nothing is wanted of these logs, at their beginnings."""
    appended = 0

    def counted(source: Iterator[Line]) -> Iterator[Line]:
        nonlocal appended
        for line in source:
            appended += 1
            yield line

    with desk.scratch() as folder:
        path = folder / "input"
        desk.fetch_input(batch, path, submission.renew)
        if desk.facts.wanted(batch) and next(_waiting(desk, batch, works, path, submission), None):
            submission.renew(at_once=True)  # reads back that nobody had ended the batch when its results were looked for
            take_apart(desk, batch, path, submission.renew)
            desk.append(batch.batch_id, counted(_waiting(desk, batch, works, path, submission)), works, submission)
    ends = {model: work.ends() if appended else [0] * work.partitions for model, work in works.items()}
    logs = {model: work.log_id for model, work in works.items()}
    submission.renew(at_once=True)
    changed = batch.model_copy(update={"ends": {**(batch.ends or {}), **ends}, "logs": {**batch.logs, **logs}})
    desk.facts.write(f.BATCH, batch.batch_id, changed)
    log.warning("batch requests were appended anew", batch=batch.batch_id, requests=appended, models=sorted(works))


def _waiting(desk: BatchDesk, batch: Batch, works: Works, path: Path, submission: Submission) -> Iterator[Line]:
    """The lines that ask for one of these models and have no result. Both lists are in order, so that neither is kept in memory."""
    numbers = results_of(desk, batch)
    done = next(numbers, None)
    for line in lines(path, desk.settings, desk.urls):
        while done is not None and done < line.number:
            done = next(numbers, None)
        submission.renew()
        if line.model in works and line.number != done:
            yield line
