"""The end of a batch: its results put together in the order of its lines, and the time after which all of it is forgotten."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal

import structlog

from ingest.gateway.batch import facts as f
from ingest.gateway.batch.desk import BatchDesk, object_of, result_of
from ingest.gateway.batch.lines import Line, lines
from schemas import clock
from schemas.batches import ENDED, Batch, BatchFile, Counts, Ended
from schemas.errors import AlreadyExists
from schemas.requests import dump, load

log = structlog.get_logger(__name__)

Name = Literal["output", "error"]

READERS = 8
"""Results are read by so many threads at a time."""

_PIECE = 1000
_NAMES: tuple[Name, ...] = ("output", "error")
_DAY_S = 86_400.0

Outcome = Literal["completed", "cancelled", "expired", "failed"]

Found = Iterator[tuple[bytes | None, dict[str, object] | None]]
"""Results in the order of their lines; where there is none, what is said instead."""

_MISSING: dict[Outcome, dict[str, str]] = {
    "completed": {"code": "batch_lost", "message": "The request has no result; its record was deleted by somebody else."},
    "cancelled": {"code": "batch_cancelled", "message": "The batch was cancelled before this request had a result."},
    "expired": {"code": "batch_expired", "message": "The batch expired before this request had a result."},
}


def finish(desk: BatchDesk, batch: Batch) -> None:
    """Put the results of a batch together and say that it has ended. Two that do it at once do no harm."""
    outcome = _outcome(desk, batch)
    with desk.scratch() as folder:
        path = folder / "input"
        desk.fetch_input(batch, path)
        found = ((result, _missing(batch, line, outcome)) for line, result in _results(desk, batch, path))
        _end(desk, batch, folder, found, outcome)


def give_up(desk: BatchDesk, batch: Batch, fault: str) -> None:
    """Say that a batch has failed whose input file is gone or cannot be read, with the results there are. Two at once do no harm."""
    error = f"{fault}: its requests without a result cannot be asked any more; submit them again"
    with desk.scratch() as folder:
        results = [result_of(batch, number) for number in results_of(desk, batch)]
        _end(desk, batch, folder, ((desk.objects.get(result), None) for result in results), "failed", error)


def _end(desk: BatchDesk, batch: Batch, folder: Path, found: Found, outcome: Outcome, error: str | None = None) -> None:
    good, bad = folder / "good", folder / "bad"
    counts = _write(found, good, bad, outcome)
    ended = Ended(
        status=outcome,
        at=clock.now_s(),
        counts=counts,
        output_file_id=_keep(desk, batch, good, "output"),
        error_file_id=_keep(desk, batch, bad, "error"),
        error=error,
    )
    desk.facts.write(f.ENDING, batch.batch_id, ended)
    _clear(desk, batch)
    log.info("batch ended", batch=batch.batch_id, status=outcome, completed=counts.completed, failed=counts.failed, error=error)


def _outcome(desk: BatchDesk, batch: Batch) -> Outcome:
    """How a batch ends that is worked off: by what stopped it, if anything was left to stop."""
    if desk.facts.cancelled(batch.batch_id):
        return "cancelled"
    done = desk.facts.counts(batch.batch_id)
    return "expired" if clock.now_s() >= batch.expires_at and done.completed + done.failed < batch.total else "completed"


def _write(found: Found, good: Path, bad: Path, outcome: Outcome) -> Counts:
    """Write both files; how many requests stand in each."""
    completed = failed = 0
    with good.open("wb") as output, bad.open("wb") as error:
        for result, missing in found:
            if result is not None and load(result)["response"]["status_code"] < 400:
                output.write(result + b"\n")
                completed += 1
            else:
                error.write((result or dump(missing)) + b"\n")
                failed += result is not None or outcome == "completed"
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


def _keep(desk: BatchDesk, batch: Batch, path: Path, name: Name) -> str | None:
    """Keep a file of results, or the one that another finisher kept before; None for an empty one."""
    if not path.stat().st_size:
        return None
    return desk.add_file(path, f"{batch.batch_id}_{name}.jsonl", batch.owner, file_id=_file_id(batch, name), purpose="batch_output").file_id


def _file_id(batch: Batch, name: Name) -> str:
    """The same for each who finishes a batch."""
    return f"file-{batch.batch_id.removeprefix('batch_')}-{name}"


def results_of(desk: BatchDesk, batch: Batch) -> Iterator[int]:
    """The lines of a batch that have a result of their own, in order."""
    folder = result_of(batch, 0).rpartition("/")[0] + "/"
    return (int(found.key.removeprefix(folder)) for found in desk.objects.list(folder))


def take_apart(desk: BatchDesk, batch: Batch, path: Path, each: Callable[[], None]) -> None:
    """Make single results again of the files of an end that no fact tells of, for a backup has the facts as they were before it.

    `path` is the input file; `each` is called between. Nobody may be ending the batch meanwhile.
    """
    for name in _NAMES:
        file_id = _file_id(batch, name)
        file = BatchFile(file_id=file_id, owner=batch.owner, filename="", purpose="batch_output", bytes=0, created_at=0.0)
        if found := desk.objects.head(object_of(file)):
            _take_apart(desk, batch, path, file.model_copy(update={"bytes": found.size}), each)
            desk.objects.delete(object_of(file))


def _take_apart(desk: BatchDesk, batch: Batch, path: Path, file: BatchFile, each: Callable[[], None]) -> None:

    def put(result: tuple[int, bytes]) -> None:
        with contextlib.suppress(AlreadyExists):
            desk.objects.create(result_of(batch, result[0]), result[1])

    with desk.scratch() as folder, ThreadPoolExecutor(READERS, thread_name_prefix="batch-results") as pool:
        desk.fetch(file, folder / "kept", each)
        results = _numbered(lines(path, desk.settings, desk.urls), folder / "kept")
        while piece := list(islice(results, _PIECE)):
            list(pool.map(put, piece))
            each()


def _numbered(source: Iterator[Line], kept: Path) -> Iterator[tuple[int, bytes]]:
    """The results in a file, in which they have the order of their lines, with the numbers of these."""
    with kept.open("rb") as file:
        for result in file:
            entry = load(result)
            line = next((line for line in source if line.custom_id == entry["custom_id"]), None)
            if line is not None and entry["response"] is not None:
                yield line.number, result.rstrip(b"\n")


def _clear(desk: BatchDesk, batch: Batch) -> None:
    """Delete what the files of results replace."""
    results = [result_of(batch, number) for number in results_of(desk, batch)]
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
    desk.works.forget(before)
