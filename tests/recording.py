"""Recorders on the logs of both deployments, and what stands in a log afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ingest.recorder import Recorder
from schemas.codec import decode
from schemas.events import (
    Event,
    SessionClosed,
)
from schemas.registry import SchemaRegistry
from schemas.settings import Settings
from schemas.sink import SessionContext, new_id
from store.log import open_log
from store.log.base import Log, partition_of

REGISTRY = SchemaRegistry()
# Every wait ends here with a failure.
DEADLINE_S = 120.0


def context(**fields: Any) -> SessionContext:
    """A session of its own."""
    return SessionContext(new_id(), "tenant", "gateway", **fields)


def numbered(i: int) -> SessionClosed:
    """An event that tells itself apart."""
    return SessionClosed(reason=str(i))


def spool_of(settings: Settings) -> Path | None:
    """Where the recorder of a deployment spools."""
    return None if settings.log.kind == "embedded" else settings.data / "spool"


@contextmanager
def opened(settings: Settings, **changes: Any) -> Iterator[tuple[Recorder, Log]]:
    """A recorder on the log of a deployment; both are closed, what it recorded can then be read from the log's file or topic."""
    log = open_log(settings.log, settings.data)
    recorder = Recorder(log, settings.recorder.model_copy(update=changes), spool=spool_of(settings), source="gateway", host="host")
    try:
        yield recorder, log
    finally:
        recorder.close()
        log.close()


def events_of(log: Log) -> list[Event]:
    """Everything in a log, partition after partition."""
    found = []
    for partition in range(log.partitions):
        first, end = log.bounds(partition)
        while first < end:
            batch = log.read(partition, first, limit=10_000, wait_s=5.0)
            found += [decode(value, REGISTRY) for value in batch.values]
            first = batch.offset_next
    return found


def events_in(settings: Settings) -> list[Event]:
    """Everything in the log of a deployment, read by another client."""
    log = open_log(settings.log, settings.data, create=False)
    try:
        return events_of(log)
    finally:
        log.close()


def once(events: list[Event]) -> list[Event]:
    """Without duplicates, as the indexer drops them: sequence numbers at or below the highest seen of a producer and partition."""
    seen: dict[tuple[bytes, int], int] = {}
    kept = []
    for event in events:
        key = (event.producer_id, partition_of(event.session_id, 4))
        if event.producer_seq > seen.get(key, -1):
            seen[key] = event.producer_seq
            kept.append(event)
    return kept


def reasons(events: list[Event], session: SessionContext | None = None) -> list[str]:
    """The numbers of `numbered` events, of one session or all."""
    mine = [e for e in events if session is None or e.session_id == session.session_id]
    return [e.payload.reason for e in mine if isinstance(e.payload, SessionClosed)]


def seqs(events: list[Event]) -> dict[tuple[bytes, int], list[int]]:
    """Sequence numbers by producer and partition, in the order of the log."""
    found: dict[tuple[bytes, int], list[int]] = defaultdict(list)
    for event in events:
        found[event.producer_id, partition_of(event.session_id, 4)].append(event.producer_seq)
    return found


def whole(events: list[Event]) -> bool:
    """Whether each producer's numbers are 0, 1, 2 … in each partition."""
    return all(found == list(range(len(found))) for found in seqs(events).values())


@contextmanager
def process(code: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """A Python process that runs `code`, with its pipes."""
    command = [sys.executable, "-c", code, *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with child.stdin, child.stdout:
            yield child, child.stdin, child.stdout
    finally:
        child.kill()
        child.wait()


def fill(recorder: Recorder, session: SessionContext) -> int:
    """Record large events until the recorder takes no more without shedding; how many it was given."""
    given = 0
    while not recorder.stats.shed:
        assert given < 20_000
        recorder.record(session, SessionClosed(reason=f"{given}".ljust(20_000)))
        given += 1
    return given
