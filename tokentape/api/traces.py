"""OpenTelemetry's exporters as clients: OTLP over HTTP, in protobuf and in JSON."""

from __future__ import annotations

from typing import Any

import orjson
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from starlette.responses import Response

from ingest.gateway import bodies as b
from ingest.importing import Owner
from ingest.traces.reading import Span, from_document, from_protobuf
from schemas.errors import UsageError
from tokentape.api.routing import Call, Reply, Route
from tokentape.api.sessions import WRITERS

PROTOBUF = "application/x-protobuf"
_JSON = "application/json"


def _of_json(body: bytes) -> tuple[str, list[Span]]:
    try:
        return _JSON, from_document(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise UsageError(f"the body is not valid JSON: {error}", operation="read spans", hint="one ExportTraceServiceRequest") from error


def _of_protobuf(body: bytes) -> tuple[str, list[Span]]:
    return PROTOBUF, from_protobuf(body)


def take_traces(call: Call) -> Reply | Response:
    """Take the spans in; what is no call to a model is left aside, which the answer says in the way of the protocol."""
    media, spans = call.body
    installation, principal = call.desks.installation, call.principal
    owner = Owner(principal.tenant or installation.settings.tenant, principal.name)
    with call.desks.log() as log:
        taken = call.desks.traces.take(spans, owner, log)
    told = f"{taken.aside} spans are no calls to a model and were left aside" if taken.aside else ""
    if media == PROTOBUF:
        answer = ExportTraceServiceResponse()
        answer.partial_success.error_message = told
        return Response(answer.SerializeToString() if told else b"", media_type=PROTOBUF)
    document: dict[str, Any] = {"partialSuccess": {"errorMessage": told}} if told else {}
    return Reply(document)


ROUTES = (
    Route(
        "POST",
        "/traces",
        "take_traces",
        "Spans of calls to models, as OpenTelemetry's exporters send them (OTLP over HTTP): each becomes a generation, once.",
        WRITERS,
        take_traces,
        reads={PROTOBUF: _of_protobuf, _JSON: _of_json},
        answer=b.OBJECT,
        media=(_JSON, PROTOBUF),
    ),
)
