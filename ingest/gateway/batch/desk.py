"""What people and programs do with batches: bring files, submit, look, cancel, fetch results. Everything here may wait."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from ingest.gateway.batch import facts as f
from ingest.gateway.batch.facts import Facts
from ingest.gateway.batch.lines import Line, Survey, lines, survey
from ingest.gateway.batch.submission import Submission
from schemas import clock
from schemas.batches import ENDED, Batch, BatchFile, Cancelled, Counts, Ended, Owner, WorkItem
from schemas.errors import AlreadyExists, ConflictError, Unavailable, UnknownName, UsageError
from schemas.requests import dump
from schemas.settings import Settings
from schemas.sink import new_id
from store.crashpoints import crash_point
from store.log.base import Entry
from store.objects import open_store
from store.objects.base import ObjectStore
from store.work import WorkLog, WorkLogs

PIECE_BYTES = 4 << 20
"""Files travel to and from the object store in pieces of this size."""

APPEND_LINES = 500
APPEND_BYTES = 8 << 20
"""So much of a file is in memory, and in one append, at a time."""

METADATA_MAX = 16
"""Pairs of metadata, as OpenAI has it."""

CheckModels = Callable[[Survey], None]
"""Raises `UsageError` where a model is not served."""

_WINDOW = re.compile(r"([1-9]\d{0,3})([hd])")


class BatchDesk:
    """The desk of one process. May be used by several threads."""

    def __init__(self, settings: Settings, facts: Facts, works: WorkLogs, urls: Collection[str]) -> None:
        """`urls` are the endpoints that batches may ask."""
        self.settings = settings
        self.facts = facts
        self.works = works
        self.urls = frozenset(urls)

    @cached_property
    def objects(self) -> ObjectStore:
        """Where files and results are."""
        return open_store(self.settings.cold, self.settings.data)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for a file on its way."""
        parent = self.settings.data / "work" / "scratch"
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with TemporaryDirectory(dir=parent) as folder:
            yield Path(folder)

    # Files

    def add_file(
        self, path: Path, filename: str, owner: Owner, *, file_id: str = "", purpose: Literal["batch", "batch_output"] = "batch"
    ) -> BatchFile:
        """Keep a file; durable when this returns. Of several that bring one of the same `file_id` the first one's bytes stay.

        Raises:
            UsageError: it is too large.
            StoreUnavailable: the object store does not answer.
        """
        size = path.stat().st_size
        if purpose == "batch" and size > self.settings.batch.file_bytes_max:
            fault = f"the file has {size} bytes, more than batch.file_bytes_max, {self.settings.batch.file_bytes_max}"
            raise UsageError(fault, operation="add file", hint="split it")
        given, file_id = bool(file_id), file_id or f"file-{uuid.uuid4().hex}"
        made = BatchFile(file_id=file_id, owner=owner, filename=filename[:255], purpose=purpose, bytes=size, created_at=clock.now_s())
        try:
            self.objects.create_from_file(object_of(made), path)
        except AlreadyExists:
            if not given or (found := self.objects.head(object_of(made))) is None:
                raise
            made = made.model_copy(update={"bytes": found.size})  # whoever was quicker may have died before it said so
        self.facts.write(f.FILE, made.file_id, made)
        return made

    def pieces(self, file: BatchFile) -> Iterator[bytes]:
        """The bytes of a file."""
        for start in range(0, file.bytes, PIECE_BYTES):
            yield self.objects.get_range(object_of(file), start, PIECE_BYTES)

    def fetch(self, file: BatchFile, path: Path, each: Callable[[], None] = lambda: None) -> None:
        """Write a file's bytes to a local path; `each` is called after every piece."""
        with path.open("wb") as target:
            for piece in self.pieces(file):
                target.write(piece)
                each()

    def fetch_input(self, batch: Batch, path: Path, each: Callable[[], None] = lambda: None) -> None:
        """`fetch` the file that a batch was submitted with.

        Raises:
            UnknownName: it is gone.
        """
        try:
            self.fetch(self.facts.file(batch.input_file_id, None), path, each)
        except (KeyError, UnknownName) as error:
            hint = "submit what has no result again"
            raise UnknownName(f"the input file {batch.input_file_id} is gone", operation="read batch", hint=hint) from error

    def delete_file(self, file: BatchFile) -> None:
        """Delete a file.

        Raises:
            ConflictError: a batch that has not ended reads it.
        """
        for batch in self.facts.batches(file.owner.tenant):
            if batch.input_file_id == file.file_id and self.facts.status(batch) not in ENDED:
                raise ConflictError(f"{batch.batch_id} still reads this file", operation="delete file", hint="cancel the batch, or wait")
        self.objects.delete(object_of(file))
        self.facts.write(f.FILE, file.file_id, None)

    # Batches

    def submit(
        self,
        file: BatchFile,
        owner: Owner,
        check: CheckModels,
        *,
        endpoint: str | None = None,
        window: str | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Batch:
        """Put every request of a file into the log of its model: all of them are durable when this returns, or none counts.

        Raises:
            UsageError: the file or a parameter is not valid; nothing was accepted.
            Unavailable: log, control log or object store do not answer; nothing that was appended is worked on.
        """
        span_s = self._span_s(window)
        metadata = _metadata(metadata)
        if endpoint is not None and endpoint not in self.urls:
            hint = f"valid: {', '.join(sorted(self.urls))}"
            raise UsageError(
                f"endpoint {endpoint[:80]!r} is not served in batches; {hint}", operation="submit", place="endpoint", hint=hint
            )
        with self.scratch() as folder:
            path = folder / "input"
            self.fetch(file, path)
            found = survey(path, self.settings, {endpoint} if endpoint else self.urls)
            check(found)
            now = clock.now_s()
            batch = Batch(
                batch_id=f"batch_{uuid.uuid4().hex}",
                owner=owner,
                endpoint=endpoint or (next(iter(found.urls)) if len(found.urls) == 1 else "mixed"),
                input_file_id=file.file_id,
                window=window or f"{self.settings.batch.window_h:g}h",
                metadata=metadata,
                total=found.total,
                created_at=now,
                expires_at=now + span_s,
            )
            return self._append(batch, found, path)

    def _append(self, batch: Batch, found: Survey, path: Path) -> Batch:
        """The records of a batch. Workers begin on none before the batch says where they end."""
        submission = Submission(self.facts, batch.batch_id, self.settings)
        submission.renew()
        try:
            self.facts.write(f.BATCH, batch.batch_id, batch)
            works = dict[str, WorkLog]()
            for model in found.models:
                submission.renew()
                works[model] = self.works.standing(model)
                if self.facts.get(f.MODEL, model) is None:
                    self.facts.write(f.MODEL, model, {"made_at": clock.now_s()})
            self.append(batch.batch_id, lines(path, self.settings, self.urls), works, submission)
            ends, logs = {model: work.ends() for model, work in works.items()}, {model: work.log_id for model, work in works.items()}
            batch = batch.model_copy(update={"ends": ends, "logs": logs, "in_progress_at": clock.now_s()})
            self.facts.write(f.BATCH, batch.batch_id, batch)
            submission.check()
        except BaseException as error:
            ended = Ended(status="failed", at=clock.now_s(), counts=Counts(), error=f"not submitted: {error}")
            with contextlib.suppress(Exception):  # where this cannot be written either, the lease lapses
                self.facts.write(f.ENDING, batch.batch_id, ended)
                submission.close()
            raise
        with contextlib.suppress(Unavailable):  # with its ends written the batch needs no lease
            submission.close()
        return batch

    def append(self, batch_id: str, source: Iterator[Line], works: Mapping[str, WorkLog], submission: Submission) -> None:
        """Append a record for each line to the log of its model, and to no other one that may take its place meanwhile.

        Raises:
            ConflictError: the submission is somebody else's now. Unavailable, LogChanged: a log does not answer, or was replaced.
        """
        for piece in _cut(source):
            _append_piece(batch_id, piece, works, submission)

    def cancel(self, batch: Batch, by: str) -> bool:
        """Stop what has not begun; False where there is nothing to stop any more."""
        if self.facts.status(batch) in ENDED | {"cancelling"}:
            return False
        self.facts.write(f.CANCELLED, batch.batch_id, Cancelled(by=by, at=clock.now_s()))
        return True

    def results(self, batch: Batch) -> Iterator[bytes]:
        """The bytes of all results, those that went well first.

        Raises:
            UsageError: the batch has not ended.
        """
        ended = self.facts.ended(batch.batch_id)
        if ended is None:
            done = self.facts.counts(batch.batch_id)
            fault = f"{batch.batch_id} is {self.facts.status(batch)}: {done.completed + done.failed} of {batch.total} requests have ended"
            raise UsageError(fault, operation="batch results", hint="wait for it, or cancel it to get what is there")
        for file_id in (ended.output_file_id, ended.error_file_id):
            if file_id:
                yield from self.pieces(self.facts.file(file_id, batch.owner.tenant))

    def _span_s(self, window: str | None) -> float:
        """Seconds of a completion window."""
        most_s = self.settings.batch.window_h * 3600
        if window is None:
            return most_s
        found = _WINDOW.fullmatch(window)
        span_s = int(found[1]) * (3600 if found[2] == "h" else 86_400) if found else 0
        if not 0 < span_s <= most_s:
            hint = f"hours or days such as 24h, at most {self.settings.batch.window_h:g}h (batch.window_h)"
            raise UsageError(f"{window[:20]!r} is no window; {hint}", operation="submit", place="completion_window", hint=hint)
        return span_s


def object_of(file: BatchFile) -> str:
    """Where the object store has a file."""
    return f"batch/{file.owner.tenant}/files/{file.file_id}"


def result_of(batch: Batch, number: int) -> str:
    """Where the object store has the result of a line, until all are put together."""
    return f"batch/{batch.owner.tenant}/results/{batch.batch_id}/{number:09d}"


def parse_item(value: bytes) -> WorkItem:
    """A record of a work log. Raises `ValueError` for what is none."""
    return WorkItem.model_validate_json(value)


def _cut(source: Iterator[Line]) -> Iterator[list[Line]]:
    """Lines in pieces that are bounded in number and, but for one line, in bytes."""
    while piece := list(islice(source, 1)):
        size = len(dump(piece[0].body))
        while len(piece) < APPEND_LINES and size < APPEND_BYTES and (line := next(source, None)):
            piece.append(line)
            size += len(dump(line.body))
        yield piece


def _append_piece(batch_id: str, piece: list[Line], works: Mapping[str, WorkLog], submission: Submission) -> None:
    entries: dict[str, list[Entry]] = {}
    for line in piece:
        session = new_id()
        item = {"batch_id": batch_id, "number": line.number, "custom_id": line.custom_id, "session": str(uuid.UUID(bytes=session))}
        value = dump({**item, "url": line.url, "body": line.body})
        entries.setdefault(line.model, []).append(Entry(line.number % works[line.model].partitions, session, value))
    for model, own in entries.items():
        submission.renew()
        works[model].append(own)
    crash_point("batch.appended")


def _metadata(metadata: dict[str, str] | None) -> dict[str, str]:
    found = metadata or {}
    texts = all(isinstance(text, str) and len(text) <= 512 for pair in found.items() for text in pair)
    if len(found) > METADATA_MAX or not texts:
        hint = f"at most {METADATA_MAX} pairs of texts of up to 512 characters"
        raise UsageError(f"metadata is not valid; {hint}", operation="submit", place="metadata", hint=hint)
    return found
