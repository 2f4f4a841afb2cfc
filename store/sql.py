"""SQL over everything recorded, in a process of its own that can read and do nothing else (`store.sandbox`)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from schemas.errors import CorruptStore, QueryError, TokentapeError
from schemas.events import SAMPLED_OUT
from schemas.settings import Settings
from store.catalog import Catalog, open_catalog
from store.objects import open_store
from store.objects.base import ObjectStore
from store.sandbox import RETRY, Request

_GRACE_S = 3.0  # after its own time limit the process has this long to say so before it is killed
_URL_SPARE_S = 60  # presigned URLs outlive the query by this
_ATTEMPTS = 3  # a shard can be merged away between snapshot and attach; each attempt takes a new snapshot


@dataclass(frozen=True, slots=True)
class Completeness:
    """What an answer may lack: everything acknowledged before `fresh_to` is in it, except what is counted here.

    `fresh_to` is None when nothing was indexed yet. `lost` counts events that producers numbered and the log never
    showed, in `gaps` spans; `quarantined` those that no known schema explains; `duplicates` those dropped as sent
    twice; `erased` those whose content was erased (None where that was not counted); `sampled_out` those that sampling
    left out. All are totals of the installation. `unread` are events that a list of sessions does not know yet, because the first
    reading of what is catalogued is still under way.
    """

    fresh_to: datetime | None
    gaps: int
    lost: int
    quarantined: int
    duplicates: int
    erased: int | None = None
    sampled_out: int = 0
    unread: int = 0

    def document(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {**asdict(self), "fresh_to": self.fresh_to.isoformat() if self.fresh_to else None}


@dataclass(frozen=True)
class Answer:
    """The rows as an Arrow table, and what they may lack."""

    table: pa.Table
    completeness: Completeness


class SqlService:
    """Answers queries; keeps one process warm for the next when `keep_warm`, which saves some 300 ms. Safe for threads."""

    def __init__(
        self, settings: Settings, *, catalog: Catalog | None = None, objects: ObjectStore | None = None, keep_warm: bool = False
    ) -> None:
        self._settings = settings
        self._catalog = catalog or open_catalog(settings.data)
        self._objects = objects
        self._keep_warm = keep_warm
        self._lock = threading.Lock()
        self._spare: subprocess.Popen[bytes] | None = None
        if keep_warm:
            self._spare = _start()

    def query(self, statement: str, *, tenant: str | None = None) -> Answer:
        """Run one statement. `tenant` binds the caller to rows of that tenant and to the views.

        Raises:
            QueryError: invalid, refused or over a limit, in one line.
            StoreUnavailable: the object store does not answer.
            CorruptStore: a hot shard is no database.
        """
        for attempt in range(_ATTEMPTS):
            completeness = self._completeness()
            request = self.request(statement, tenant=tenant)
            try:
                return Answer(self.ask(request), completeness)
            except TokentapeError as error:
                if attempt == _ATTEMPTS - 1 or not (RETRY in error.hint or self._superseded(request)):
                    raise
        raise AssertionError("unreachable")

    def _superseded(self, request: Request) -> bool:
        """Whether a segment of a request has been replaced meanwhile, so that its object may be gone."""
        return not set(request.segments.values()) <= {segment.key for segment in self._catalog.snapshot().segments}

    def request(self, statement: str, *, tenant: str | None) -> Request:
        """A request over what hot and cold hold now."""
        limits, snapshot = self._settings.sql, self._catalog.snapshot()
        segments = [segment for segment in snapshot.segments if tenant in (None, segment.tenant)]
        return Request(
            statement=statement,
            shards=tuple(str(shard.path.absolute()) for shard in snapshot.shards if shard.rows),
            segments={self._url(segment.key): segment.key for segment in segments},
            tenant=tenant,
            memory_mb=limits.memory_mb,
            threads=limits.threads,
            rows_max=limits.rows_max,
            timeout_s=limits.timeout_s,
        )

    def ask(self, request: Request) -> pa.Table:
        """Run a request in a process of its own; it is gone when this returns."""
        process = self._take()
        killer = threading.Timer(request.timeout_s + _GRACE_S, process.kill)
        killer.daemon = True
        killer.start()
        try:
            with self._next_one(), _translated(process, request):
                return _converse(process, request)
        finally:
            killer.cancel()
            _end(process)

    def close(self) -> None:
        """End the warm process; safe to call twice."""
        with self._lock:
            spare, self._spare = self._spare, None
            self._keep_warm = False
        if spare is not None:
            _end(spare)

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None and spare.poll() is None:
            return spare
        if spare is not None:
            _end(spare)
        return _start()

    @contextlib.contextmanager
    def _next_one(self) -> Iterator[None]:
        """Start the next spare after an answer, so that it does not take processor time from it."""
        try:
            yield
        finally:
            with self._lock:
                if self._keep_warm and self._spare is None:
                    self._spare = _start()

    def _url(self, key: str) -> str:
        return self._store().read_url(key, expires_s=int(self._settings.sql.timeout_s) + _URL_SPARE_S)

    def _store(self) -> ObjectStore:
        if self._objects is None:
            self._objects = open_store(self._settings.cold, self._settings.data)
        return self._objects

    def _completeness(self) -> Completeness:
        return completeness(self._catalog)


def query(settings: Settings, statement: str, *, tenant: str | None = None, fresh: bool = False) -> Answer:
    """Run one statement over hot and cold. With `fresh`, what the log holds by now is indexed first.

    Raises:
        QueryError: invalid, refused or over a limit, in one line.
        LogUnavailable, StoreUnavailable: a part does not answer.
    """
    if fresh:
        freshen(settings)
    service = SqlService(settings)
    try:
        return service.query(statement, tenant=tenant)
    finally:
        service.close()


def freshen(settings: Settings, *, timeout_s: float = 30.0) -> None:
    """Index what the log holds by now, here or by asking the running indexers.

    Raises:
        LogUnavailable: the log does not answer.
    """
    from store.indexer import ensure_fresh
    from store.log import open_log

    log = open_log(settings.log, settings.data)
    try:
        ensure_fresh(settings, log, timeout_s=timeout_s)
    finally:
        log.close()


def completeness(catalog: Catalog) -> Completeness:
    """What answers from this catalog may lack, as of now."""
    positions = catalog.positions()
    gaps = catalog.gaps()
    fresh_to = min((position.fresh_to for position in positions), default=None)
    return Completeness(
        fresh_to=None if fresh_to is None else datetime.fromtimestamp(fresh_to / 1e6, UTC),
        gaps=len(gaps),
        lost=sum(gap.count for gap in gaps),
        quarantined=sum(not record.requeued for record in catalog.quarantine()),
        duplicates=sum(position.duplicates for position in positions),
        sampled_out=int(catalog.fact(SAMPLED_OUT) or 0),
    )


def _start() -> subprocess.Popen[bytes]:
    """A process that waits for its request. It inherits no variable but those that Python needs, and no open file."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH", "TZDIR") if name in os.environ}
    # OMP and Arrow would start a thread per core for nothing; a missing home keeps DuckDB from looking for one.
    environment |= {"PYTHONPATH": root, "PYTHONSAFEPATH": "1", "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-s", "-m", "store.sandbox"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()


def _converse(process: subprocess.Popen[bytes], request: Request) -> pa.Table:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(request.to_json())
    process.stdin.flush()
    _read_message(process.stdout)
    with pa.ipc.open_stream(process.stdout) as stream:
        table = stream.read_all()
    _read_message(process.stdout)
    return _with_integers(table)


def _read_message(stdout: IO[bytes]) -> dict[str, Any]:
    line = stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the process ended")
    message: dict[str, Any] = json.loads(line)
    if "error" in message:
        kind = CorruptStore if message.get("damaged") else QueryError
        raise kind(message["error"], operation="query", hint=message["hint"])
    return message


@contextlib.contextmanager
def _translated(process: subprocess.Popen[bytes], request: Request) -> Iterator[None]:
    """A process that died says why by how it died."""
    try:
        yield
    except TokentapeError:
        raise
    except (OSError, EOFError, pa.ArrowInvalid, ValueError) as error:
        code = process.wait()
        why = f"the query's process ended with signal {-code}" if code < 0 else f"the query's process ended with status {code}"
        if code == -9:
            why = f"stopped after {request.timeout_s:g} s, or killed for memory"
        raise QueryError(why, operation="query", hint="ask for less at once, or raise the limits under [sql]") from error


def _with_integers(table: pa.Table) -> pa.Table:
    """Sums of integers come as DECIMAL(38, 0); where every value fits they become 64-bit integers."""
    for i, field in enumerate(table.schema):
        if field.type == pa.decimal128(38, 0):
            with contextlib.suppress(pa.ArrowInvalid):
                table = table.set_column(i, field.name, table.column(i).cast(pa.int64()))
    return table
