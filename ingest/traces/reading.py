"""OTLP as it comes over HTTP or out of a file, as spans with plain values: protobuf and its JSON, which has ids in hexadecimal."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError  # type: ignore[import-untyped]  # it brings no types
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it brings no types
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Wire

from schemas.errors import UsageError

CLIENT, ERROR = Wire.SPAN_KIND_CLIENT, 2
"""The kind of a span that calls another service, and the status of one that failed."""
DEPTH_MAX = 50
"""Of values in values."""
_IDS = {"traceId": 16, "spanId": 8, "parentSpanId": 8, "trace_id": 16, "span_id": 8, "parent_span_id": 8}
_HINT = "an ExportTraceServiceRequest of OTLP, as an exporter sends it and `tokentape export --format otlp` writes it"


@dataclass(frozen=True)
class Span:
    """One span; times are µs since 1970. `rest` is what names where it comes from: service, scope, kind, status."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: int
    start: int
    end: int
    attributes: dict[str, Any]
    events: tuple[tuple[str, dict[str, Any]], ...]
    failed: bool
    message: str
    service: dict[str, Any]
    scope: dict[str, str]


def from_protobuf(data: bytes) -> list[Span]:
    """The spans of a request in protobuf.

    Raises:
        UsageError: it is none.
    """
    try:
        return list(_spans(ExportTraceServiceRequest.FromString(data)))
    except DecodeError as error:
        raise UsageError(f"this is no OTLP: {error}", operation="read spans", hint=_HINT) from error


def from_document(document: Any) -> list[Span]:
    """The spans of a request in JSON; fields of a later version are left aside.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(document, Mapping) or (not {"resourceSpans", "resource_spans"} & document.keys() and document):
        raise UsageError("this is no OTLP: there are no resourceSpans", operation="read spans", hint=_HINT)
    try:
        read = ParseDict(_in_base64(document), ExportTraceServiceRequest(), ignore_unknown_fields=True, max_recursion_depth=DEPTH_MAX)
    except (ParseError, ValueError, TypeError, RecursionError) as error:
        first = (str(error).splitlines() or ["nested too deeply"])[0]
        raise UsageError(f"this is no OTLP: {first}", operation="read spans", hint=_HINT) from error
    return list(_spans(read))


def _in_base64(value: Any, depth: int = 0) -> Any:
    """Protobuf's own JSON has bytes in base64; of OTLP's, ids alone are in hexadecimal."""
    if depth > DEPTH_MAX:
        raise ValueError("nested too deeply")
    if isinstance(value, list):
        return [_in_base64(item, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return {name: _id(name, item) if name in _IDS else _in_base64(item, depth + 1) for name, item in value.items()}
    return value


def _id(name: str, value: Any) -> Any:
    if value in (None, ""):
        return ""
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-fA-F]{{{2 * _IDS[name]}}}", value):
        raise ValueError(f"{name} is not {2 * _IDS[name]} hexadecimal digits")
    return base64.b64encode(bytes.fromhex(value)).decode()


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in request.resource_spans:
        service = _attributes(resource.resource.attributes)
        for scoped in resource.scope_spans:
            scope = {name: value for name in ("name", "version") if (value := str(getattr(scoped.scope, name)))}
            for span in scoped.spans:
                if len(span.trace_id) != 16 or len(span.span_id) != 8:
                    raise UsageError(f"the span {span.name!r} has no ids", operation="read spans", hint=_HINT)
                yield Span(
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    name=span.name,
                    kind=span.kind,
                    start=span.start_time_unix_nano // 1000,
                    end=max(span.end_time_unix_nano, span.start_time_unix_nano) // 1000,
                    attributes=_attributes(span.attributes),
                    events=tuple((event.name, _attributes(event.attributes)) for event in span.events),
                    failed=span.status.code == ERROR,
                    message=span.status.message,
                    service=service,
                    scope=scope,
                )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    found = getattr(value, kind)
    return base64.b64encode(found).decode() if isinstance(found, bytes) else found
