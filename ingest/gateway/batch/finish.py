"""The end of a batch: its results put together in the order of its lines, and the time after which all of it is forgotten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal

import structlog

from ingest.gateway.batch import facts as f
from ingest.gateway.batch.desk import BatchDesk, result_of
from ingest.gateway.batch.lines import Line, lines
from schemas import clock
from schemas.batches import ENDED, Batch, Counts, Ended
from schemas.errors import AlreadyExists
from schemas.requests import dump, load

log = structlog.get_logger(__name__)

READERS = 8
"""Results are read by so many threads at a time."""

_PIECE = 1000
_DAY_S = 86_400.0

Outcome = Literal["completed", "cancelled", "expired"]

_MISSING: dict[Outcome, dict[str, str]] = {
    "completed": {"code": "batch_lost", "message": "The request has no result; its record was deleted by somebody else."},
    "cancelled": {"code": "batch_cancelled", "message": "The batch was cancelled before this request had a result."},
    "expired": {"code": "batch_expired", "message": "The batch expired before this request had a result."},
}


def finish(desk: BatchDesk, batch: Batch) -> None:
    """Put the results of a batch together and say that it has ended. Two that do it at once do no harm."""
    outcome = _outcome(desk, batch)
    with desk.scratch() as folder:
        good, bad = folder / "good", folder / "bad"
        counts = _write(desk, batch, folder / "input", good, bad, outcome)
        ended = Ended(
            status=outcome,
            at=clock.now_s(),
            counts=counts,
            output_file_id=_keep(desk, batch, good, "output"),
            error_file_id=_keep(desk, batch, bad, "error"),
        )
    desk.facts.write(f.ENDING, batch.batch_id, ended)
    _clear(desk, batch)
    log.info("batch ended", batch=batch.batch_id, status=outcome, completed=counts.completed, failed=counts.failed)


def _outcome(desk: BatchDesk, batch: Batch) -> Outcome:
    """How a batch ends that is worked off: by what stopped it, if anything was left to stop."""
    if desk.facts.cancelled(batch.batch_id):
        return "cancelled"
    done = desk.facts.counts(batch.batch_id)
    return "expired" if clock.now_s() >= batch.expires_at and done.completed + done.failed < batch.total else "completed"


def _write(desk: BatchDesk, batch: Batch, path: Path, good: Path, bad: Path, outcome: Outcome) -> Counts:
    """Write both files; how many requests stand in each."""
    desk.fetch(desk.facts.file(batch.input_file_id, None), path)
    completed = failed = 0
    with good.open("wb") as output, bad.open("wb") as error:
        for line, found in _results(desk, batch, path):
            if found is not None and load(found)["response"]["status_code"] < 400:
                output.write(found + b"\n")
                completed += 1
            else:
                error.write((found or dump(_missing(batch, line, outcome))) + b"\n")
                failed += found is not None or outcome == "completed"
    return Counts(completed=completed, failed=failed)


def _results(desk: BatchDesk, batch: Batch, path: Path) -> Iterator[tuple[Line, bytes | None]]:
    """The requests of a batch with their results, in the order of the file."""

    def read(line: Line) -> bytes | None:
        try:
            return desk.objects.get(result_of(batch, line.number))
        except KeyError:
            return None

    source = lines(path, desk.settings, desk.urls)
    with ThreadPoolExecutor(READERS, thread_name_prefix="batch-results") as pool:
        while piece := list(islice(source, _PIECE)):
            yield from zip(piece, pool.map(read, piece), strict=True)


def _missing(batch: Batch, line: Line, outcome: Outcome) -> dict[str, object]:
    number = f"batch_req_{batch.batch_id.removeprefix('batch_')}{line.number}"
    return {"id": number, "custom_id": line.custom_id, "response": None, "error": _MISSING[outcome]}


def _keep(desk: BatchDesk, batch: Batch, path: Path, name: Literal["output", "error"]) -> str | None:
    """Keep a file of results under an id that another finisher would give it too; None for an empty one."""
    if not path.stat().st_size:
        return None
    file_id = f"file-{batch.batch_id.removeprefix('batch_')}-{name}"
    with contextlib.suppress(AlreadyExists):  # another finisher was quicker
        desk.add_file(path, f"{batch.batch_id}_{name}.jsonl", batch.owner, file_id=file_id, purpose="batch_output")
    return file_id


def _clear(desk: BatchDesk, batch: Batch) -> None:
    """Delete what the files of results replace."""
    results = [found.key for found in desk.objects.list(result_of(batch, 0).rpartition("/")[0] + "/")]
    with ThreadPoolExecutor(READERS, thread_name_prefix="batch-results") as pool:
        for start in range(0, len(results), _PIECE):
            list(pool.map(desk.objects.delete, results[start : start + _PIECE]))
    for key in desk.facts.latest(f.COUNTS):
        if key.startswith(f"{batch.batch_id}/"):
            desk.facts.write(f.COUNTS, key, None)


def forget(desk: BatchDesk) -> None:
    """Delete batches that ended, and files that no batch reads, `batch.keep_days` after they came."""
    before = clock.now_s() - desk.settings.batch.keep_days * _DAY_S
    for batch in desk.facts.batches():
        ended = desk.facts.ended(batch.batch_id)
        if ended is not None and ended.at < before:
            _clear(desk, batch)
            for kind in (f.BATCH, f.CANCELLED, f.ENDING):
                desk.facts.write(kind, batch.batch_id, None)
    read = {batch.input_file_id for batch in desk.facts.batches() if desk.facts.status(batch) not in ENDED}
    for file in list(desk.facts.files()):
        if file.created_at < before and file.file_id not in read:
            desk.delete_file(file)
