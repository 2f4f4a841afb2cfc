"""Sessions for other programs, and for another tokentape: one after another, so that none has to be large for many to go.

Events as JSON Lines or Parquet and generations as OpenTelemetry spans are for others; `session` is what an import reads again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from ingest.gateway import conventions
from ingest.importing import export_document
from schemas.errors import UsageError
from schemas.events import GenerationFailed, GenerationFinished, GenerationStarted, RequestSubmitted, SequenceFinished
from store import duck
from store.rows import StoredEvent, rows_to_datums, stored_events
from store.tables import create_events
from tokentape.installation import Installation
from tokentape.lines import event_document, event_line
from tokentape.output import whole

SERVER, CLIENT, ERROR = 2, 3, 2
"""Numbers of OTLP: kinds of spans, and the status of one that failed."""

Write = Callable[[Installation, Iterable[bytes], BinaryIO], int]


def export(installation: Installation, sessions: Iterable[bytes], fmt: str, out: Path) -> int:
    """Write sessions to a file that is whole or absent; how many events (of OTLP: spans) went into it.

    Raises:
        CorruptStore, StoreUnavailable: as reading a session does.
    """
    with whole(out) as new, new.open("wb") as file:
        return FORMATS[fmt](installation, sessions, file)


def _jsonl(installation: Installation, sessions: Iterable[bytes], file: BinaryIO) -> int:
    """One event a line, in the order of the log within its session."""
    count = 0
    for session_id in sessions:
        for row in rows_to_datums(installation.reader.table(session_id)):
            file.write(f"{event_line(row, row.datum)}\n".encode())
            count += 1
    return count


def _parquet(installation: Installation, sessions: Iterable[bytes], file: BinaryIO) -> int:
    """The columns of the view `events`, a row group a session."""
    with duck.connect(threads=1) as connection:
        create_events(connection)
        schema = connection.execute("SELECT * FROM events").to_arrow_table().schema
    count = 0
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for session_id in sessions:
            table = installation.reader.table(session_id)
            missing = {field.name: pa.nulls(table.num_rows, field.type) for field in schema if field.name not in table.column_names}
            columns = [missing.get(field.name) for field in schema]
            filled = [table.column(f.name).cast(f.type) if found is None else found for f, found in zip(schema, columns, strict=True)]
            writer.write_table(pa.table(filled, schema=schema))
            count += table.num_rows
    return count


def _otlp(installation: Installation, sessions: Iterable[bytes], file: BinaryIO) -> int:
    """OTLP in JSON, a line (one ExportTraceServiceRequest) for each session: what a collector's file receiver reads."""
    service = installation.settings.telemetry.service_name
    count = 0
    for session_id in sessions:
        spans = list(spans_of(stored_events(installation.reader.table(session_id))))
        scope = {"scope": {"name": "tokentape"}, "spans": spans}
        resource = {"attributes": _attributes({"service.name": service})}
        if spans:
            file.write(orjson.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}, option=orjson.OPT_APPEND_NEWLINE))
        count += len(spans)
    return count


def _session(installation: Installation, sessions: Iterable[bytes], file: BinaryIO) -> int:
    """A document for each session, a line."""
    count = 0
    for session_id in sessions:
        events = installation.session_events(session_id.hex())
        file.write(orjson.dumps(whole_session(events), option=orjson.OPT_APPEND_NEWLINE))
        count += len(events)
    return count


def whole_session(events: Sequence[StoredEvent]) -> dict[str, Any]:
    """The document of a session that `import` takes back: its events as people read them, each with its Avro."""
    return export_document(events, [event_document(stored, i + 1) for i, stored in enumerate(events)])


def documents(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON documents of a file and the lines at which they begin: one a line, or a single one over all lines.

    Raises:
        UsageError: a line is no JSON.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = orjson.loads(line)
            except orjson.JSONDecodeError:
                yield number, _rest(line, file, path, number)
                return
            yield number, found


def _rest(line: bytes, file: BinaryIO, path: Path, number: int) -> Any:
    """The document that begins with a line which is none by itself."""
    try:
        return orjson.loads(line + file.read())
    except orjson.JSONDecodeError as error:
        hint = "one JSON document a line, as `tokentape export --format session` writes them"
        raise UsageError(f"no JSON from here: {error}", operation="import", place=f"{path}, line {number}", hint=hint) from error


FORMATS: Mapping[str, Write] = {"session": _session, "jsonl": _jsonl, "parquet": _parquet, "otlp": _otlp}


class _Generation:
    """What spans say of one generation; times are wall clock in µs."""

    def __init__(self, stored: StoredEvent, request: RequestSubmitted) -> None:
        self.began = self.ended = stored.event.recorded_at
        self.asked_upstream: int | None = None
        self.request = request
        self.operation = conventions.operation(request.endpoint)
        self.facts = {"gen_ai.operation.name": self.operation, **conventions.of_request(stored.event.session_id, request)}
        self.reasons: dict[int, str] = {}
        self.error: str | None = "unfinished"

    def learn(self, stored: StoredEvent) -> None:
        """One more event of it."""
        payload = stored.event.payload
        self.ended = max(self.ended, stored.event.recorded_at)
        if isinstance(payload, GenerationStarted):
            self.asked_upstream = stored.event.recorded_at - (payload.offset_us or 0)
            self.facts |= conventions.of_answer(payload)
        elif isinstance(payload, SequenceFinished):
            self.reasons[payload.index] = payload.finish_reason or "unknown"
        elif isinstance(payload, GenerationFinished | GenerationFailed):
            self.facts |= conventions.of_end(payload)
            self.error = payload.error_type if isinstance(payload, GenerationFailed) else None

    def spans(self) -> Iterator[dict[str, Any]]:
        """The span of the request and, where an upstream answered, that of the call."""
        facts = self.facts | conventions.of_reasons(self.reasons) | ({"error.type": self.error} if self.error else {})
        name = f"{self.operation} {self.request.model or ''}".rstrip()
        root = self._span("request", f"POST {self.request.endpoint}", SERVER, self.began, facts)
        yield root
        if self.asked_upstream is not None:
            call = self._span("call", name, CLIENT, max(self.asked_upstream, self.began), facts)
            yield {**call, "parentSpanId": root["spanId"]}

    def _span(self, part: str, name: str, kind: int, start: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        """One span: its ids follow from the generation, so that exporting twice gives the same ones."""
        generation = self.request.generation_id
        return {
            "traceId": self.request.trace_id or generation.hex(),
            "spanId": hashlib.sha256(generation + part.encode()).hexdigest()[:16],
            "name": name,
            "kind": kind,
            "startTimeUnixNano": str(start * 1000),
            "endTimeUnixNano": str(self.ended * 1000),
            "attributes": _attributes(facts),
            "status": {"code": ERROR} if self.error else {},
        }


def spans_of(events: Iterable[StoredEvent]) -> Iterator[dict[str, Any]]:
    """The spans of a session's generations, in the order in which they began; those without an end are marked `unfinished`."""
    found: dict[bytes, _Generation] = {}
    for stored in events:
        payload = stored.event.payload
        if isinstance(payload, RequestSubmitted):
            found.setdefault(payload.generation_id, _Generation(stored, payload))
        elif (generation := found.get(getattr(payload, "generation_id", b""))) is not None:
            generation.learn(stored)
    for generation in found.values():
        yield from generation.spans()


def _attributes(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": name, "value": _value(value)} for name, value in sorted(facts.items())]


def _value(value: Any) -> dict[str, Any]:
    """A value as OTLP's JSON has it: 64-bit integers are text."""
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, list):
        return {"arrayValue": {"values": [_value(item) for item in value]}}
    return {"stringValue": str(value)}
