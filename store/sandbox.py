"""The process in which callers' SQL runs: `python -m store.sandbox`, one query, then it ends.

The parent writes one `Request` as a JSON line to standard input. The process attaches the shards READ_ONLY, creates the views,
locks DuckDB's settings, confines itself (`store.confinement`) and only then looks at the statement. It answers on
standard output: a JSON line `{"rows": true}`, an Arrow IPC stream, and a JSON line that says how it ended; or
one JSON line with the error. No credential is in the process: cold objects come as presigned GET URLs.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa

from schemas.errors import CorruptStore, QueryError, TokentapeError
from store import views
from store.allowlist import check_statement
from store.confinement import confine
from store.duck import extension_path

_BATCH_ROWS = 10_000  # rows of an answer sent at once
_HEADROOM_BYTES = 1 << 30  # address space beside DuckDB's own limit: code, stacks, the answer's batches
_READING = {"SELECT", "EXPLAIN"}  # for a clear message only; what holds is confinement and READ_ONLY


@dataclass(frozen=True)
class Request:
    """One query. `segments` maps each readable path or URL to the key that messages may show; limits as in `SqlSettings`.

    `any_statement` lets statements through that the message gate refuses, so that tests reach the gates that matter.
    """

    statement: str
    shards: tuple[str, ...] = ()
    segments: dict[str, str] = field(default_factory=dict)
    tenant: str | None = None
    memory_mb: int = 2048
    threads: int = 2
    rows_max: int = 1_000_000
    timeout_s: float = 60.0
    any_statement: bool = False

    @property
    def network(self) -> bool:
        """Whether a segment lies behind a URL."""
        return any("://" in url for url in self.segments)

    def to_json(self) -> bytes:
        """One line for the process."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_json(cls, line: bytes) -> Request:
        """The request of a line."""
        fields = json.loads(line)
        return cls(**{**fields, "shards": tuple(fields["shards"])})


def main() -> None:
    """Serve one request and end."""
    connection = duckdb.connect(":memory:", config=_CONFIG)
    connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false; SET parquet_metadata_cache = true")
    views.create(connection)
    line = sys.stdin.buffer.readline()
    if not line:
        return
    output = sys.stdout.buffer
    request = Request.from_json(line)
    try:
        prepare(connection, request)
        confine(network=request.network, memory_bytes=(request.memory_mb << 20) + _HEADROOM_BYTES, cpu_s=_cpu_s(request))
        answer(connection, request, output)
    except TokentapeError as error:
        _say(output, {"error": _first_line(error.fault, request), "hint": error.hint, "damaged": isinstance(error, CorruptStore)})
    except duckdb.Error as error:
        fault = explained(error, request)
        _say(output, {"error": fault.fault, "hint": fault.hint})
    except (MemoryError, pa.ArrowMemoryError, OSError) as error:
        _say(output, {"error": _first_line(str(error) or "out of memory", request), "hint": _MEMORY_HINT})
    output.flush()
    # DuckDB's threads may still hold work that was interrupted: nothing here is worth an orderly end.
    os._exit(0)


_CONFIG: dict[str, Any] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "python_enable_replacements": False,
    "temp_directory": "",
}
# These would let a caller's condition see rows before the tenant's filter did, and tell of them in an error or a plan.
_MIXING = "filter_pullup,filter_pushdown,cte_filter_pusher,reorder_filter,join_filter_pushdown,statistics_propagation"
_MEMORY_HINT = "ask for less at once, or raise sql.memory_mb"
_SIGNED = re.compile(r"\?[^\s'\"]*X-Amz-[^\s'\"]*")  # the part of a presigned URL that opens the object
RETRY = "take a new snapshot"
"""The hint of an error that says: a shard was merged away between the snapshot and the attach."""


def prepare(connection: duckdb.DuckDBPyConnection, request: Request) -> None:
    """Attach, create views, then close every door that DuckDB's settings close; the lock comes last.

    Raises:
        QueryError: a shard is not there any more, or cannot be opened.
    """
    if request.network:
        connection.execute(f"LOAD '{extension_path('httpfs')}'")
        connection.execute("SET http_keep_alive = true; SET enable_http_metadata_cache = true; SET http_retries = 2")
    names = [f"shard_{i}" for i in range(len(request.shards))]
    for name, path in zip(names, request.shards, strict=True):
        _attach(connection, name, path)
    if request.segments:
        allowed = ", ".join(views.literal(url) for url in request.segments)
        connection.execute(f"SET allowed_paths = [{allowed}]")
    # The view opens the segments when it is created, so the limits come after it, and the lock at the very end.
    views.fill(connection, shards=names, segments=list(request.segments), tenant=request.tenant)
    if request.tenant is not None:
        connection.execute(f"SET disabled_optimizers = '{_MIXING}'")
    for setting, value in (
        ("threads", str(request.threads)),
        ("memory_limit", f"'{request.memory_mb}MB'"),
        ("max_temp_directory_size", "'0B'"),
        ("allow_unredacted_secrets", "false"),
        ("enable_external_access", "false"),
        ("lock_configuration", "true"),
    ):
        connection.execute(f"SET {setting} = {value}")


def _attach(connection: duckdb.DuckDBPyConnection, name: str, path: str) -> None:
    try:
        connection.execute(f"ATTACH {views.literal(path)} AS {name} (READ_ONLY)")
    except duckdb.Error as error:
        fault = str(error).splitlines()[0]
        if os.path.exists(path):
            hint = "run `tokentape rebuild` to make the index again"
            raise CorruptStore(fault, operation="attach", place=path, hint=hint) from error
        raise QueryError(fault, operation="attach", place=path, hint=RETRY) from error


def answer(connection: duckdb.DuckDBPyConnection, request: Request, output: BinaryIO) -> None:
    """Run the statement and write the answer; a watchdog interrupts it at its time limit.

    Raises:
        QueryError: refused, or over a limit before the first row.
    """
    check_statement(connection, request.statement, tenant=request.tenant, reading=None if request.any_statement else _READING)
    watchdog = threading.Timer(request.timeout_s, connection.interrupt)
    watchdog.daemon = True
    watchdog.start()
    cursor = connection.execute(request.statement)
    reader = cursor.to_arrow_reader(_BATCH_ROWS)
    _say(output, {"rows": True})
    ending: dict[str, Any] = {"end": True}
    with pa.ipc.new_stream(output, reader.schema) as stream:
        try:
            _copy(reader, stream, request)
        except QueryError as error:
            ending = {"error": error.fault, "hint": error.hint}
        except (duckdb.Error, OSError, MemoryError) as error:  # Arrow's reader wraps DuckDB's errors in OSError
            fault = explained(error, request)
            ending = {"error": fault.fault, "hint": fault.hint}
    watchdog.cancel()
    _say(output, ending)


def _copy(reader: Any, stream: Any, request: Request) -> None:
    rows = size = 0
    for batch in reader:
        rows += batch.num_rows
        size += batch.nbytes
        if rows > request.rows_max:
            raise QueryError(f"more than {request.rows_max:,} rows", hint="add a LIMIT, aggregate, or raise sql.rows_max")
        if size > request.memory_mb << 20:
            raise QueryError(f"an answer of more than {request.memory_mb:,} MB", hint=_MEMORY_HINT)
        stream.write_batch(batch)


def explained(error: BaseException, request: Request) -> QueryError:
    """DuckDB's error as one line and a hint; URLs are replaced by the keys of their objects."""
    line = _first_line(str(error), request)
    if "Interrupted" in line:
        return QueryError(f"stopped after {request.timeout_s:g} s", hint="ask for less, or raise sql.timeout_s")
    if "Out of Memory" in line or "bad allocation" in line or "Arrow Appender" in line or isinstance(error, MemoryError):
        return QueryError(line or "out of memory", hint=_MEMORY_HINT)
    if any(word in line for word in ("Permission Error", "disabled by configuration", "Read-only", "read-only", "has been locked")):
        return QueryError(line, hint="SQL here reads the views and nothing else")
    rest = [text.strip() for text in str(error).splitlines()[1:] if "Candidate" in text or "Did you mean" in text]
    return QueryError(line, hint=rest[0] if rest else f"views: {', '.join(sorted(views.NAMES))}")


def _first_line(text: str, request: Request) -> str:
    for url, key in request.segments.items():
        text = text.replace(url, key)
    text = _SIGNED.sub("", text)
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _cpu_s(request: Request) -> float:
    # The watchdog measures wall clock; this only stops a process that no longer listens.
    return request.timeout_s * max(request.threads, 1) + 10


def _say(output: BinaryIO, message: dict[str, Any]) -> None:
    output.write(json.dumps(message).encode() + b"\n")
    output.flush()


if __name__ == "__main__":
    main()
