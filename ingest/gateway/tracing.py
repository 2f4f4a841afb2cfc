"""OpenTelemetry spans of generations, with the semantic conventions for generative AI; off unless a collector is set.

Two spans for each: that of the request, whose parent is the client's span, and one for each attempt at an upstream, which is
the parent of the engine's own. They are made of the same events as the tape and name its session and generation. No content,
and nothing that redaction would take, is in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ingest.attachments import Deferred
from ingest.gateway import conventions
from ingest.gateway.exchange import Exchange
from ingest.gateway.tape import Recording
from ingest.spans import Outlet, span_provider
from schemas.events import (
    BreakpointHit,
    BreakpointReleased,
    GenerationFailed,
    GenerationFinished,
    GenerationStarted,
    Payload,
    RequestEdited,
    RequestSubmitted,
    SequenceFinished,
)
from schemas.settings import TelemetrySettings
from schemas.sink import SessionContext

_PROPAGATOR = TraceContextTextMapPropagator()
_CONTEXT_HEADERS = ("traceparent", "tracestate")
_HAPPENED = BreakpointHit | RequestEdited | BreakpointReleased
"""What may hold a request up, and is told in its span."""


class Generating:
    """The open spans of one generation, and what of it was learnt so far."""

    def __init__(self, request: Span, endpoint: str) -> None:
        self.request = request
        self.attempt: Span | None = None
        self.operation = conventions.operation(endpoint)
        self.facts: dict[str, Any] = {"gen_ai.operation.name": self.operation}
        self.reasons: dict[int, str] = {}

    def learn(self, **facts: Any) -> None:
        """Attributes as `conventions.known` names them."""
        self.facts |= conventions.known(**facts)

    def end(self, error: str | None = None) -> None:
        """The generation is over; the conventions want what was learnt on the span of the call."""
        self.facts |= conventions.of_reasons(self.reasons)
        for span in (self.attempt, self.request):
            if span is not None:
                _close(span, self.facts, error)


class Tracing:
    """A recorder before a recorder: lets everything pass and tells spans of it."""

    def __init__(self, settings: TelemetrySettings, recorder: Recording, instance: str) -> None:
        self.durable = recorder.durable
        self.tokens, self.run = recorder.tokens, recorder.run  # spans have no part in tokens, so these cost nothing
        self.outlet: Outlet
        self._provider: TracerProvider
        self._provider, self.outlet = span_provider(settings, instance)
        self._tracer = self._provider.get_tracer("tokentape")
        self._recorder = recorder
        self._open: dict[bytes, Generating] = {}

    def begin(self, generation_id: bytes, exchange: Exchange, endpoint: str) -> str:
        """A request came; the id of its trace: the client's where it sent one, else a new one."""
        sent = {name: value for name in _CONTEXT_HEADERS if (value := exchange.header(name))}
        attributes = {"http.request.method": "POST", "http.route": endpoint, "url.path": exchange.scope["path"]}
        parent = _PROPAGATOR.extract(sent, Context())
        span = self._tracer.start_span(f"POST {endpoint}", parent, SpanKind.SERVER, attributes, record_exception=False)
        self._open[generation_id] = Generating(span, endpoint)
        return trace.format_trace_id(span.get_span_context().trace_id)

    def outgoing(self, generation_id: bytes, headers: list[tuple[str, str]], url: str, kind: str) -> list[tuple[str, str]]:
        """An attempt at an upstream begins: the headers that go there, with its span in place of the client's."""
        generating = self._open.get(generation_id)
        if generating is None:
            return headers
        if generating.attempt is not None:
            _close(generating.attempt, generating.facts, "retried")
        address = urlsplit(url)
        port = address.port or {"https": 443}.get(address.scheme, 80)
        generating.learn(gen_ai__provider__name=kind, server__address=address.hostname, server__port=port)
        name = f"{generating.operation} {generating.facts.get('gen_ai.request.model', '')}".rstrip()
        within = trace.set_span_in_context(generating.request, Context())
        generating.attempt = self._tracer.start_span(name, within, SpanKind.CLIENT, record_exception=False)
        carried: dict[str, str] = {}
        _PROPAGATOR.inject(carried, trace.set_span_in_context(generating.attempt, Context()))
        return [(name, value) for name, value in headers if name.lower() not in _CONTEXT_HEADERS] + list(carried.items())

    def record(self, session: SessionContext, payload: Payload | Deferred) -> None:
        """Record one event, and tell it to the spans of its generation."""
        self._recorder.record(session, payload)
        generating = self._open.get(getattr(payload, "generation_id", b""))
        if generating is None:
            return
        if isinstance(payload, RequestSubmitted):
            generating.facts |= conventions.of_request(session.session_id, payload)
        elif isinstance(payload, GenerationStarted):
            generating.facts |= conventions.of_answer(payload)
        elif isinstance(payload, SequenceFinished):
            generating.reasons[payload.index] = payload.finish_reason or "unknown"
        elif isinstance(payload, _HAPPENED):
            generating.request.add_event(f"tokentape.{payload.KIND}")
        elif isinstance(payload, GenerationFinished | GenerationFailed):
            del self._open[payload.generation_id]
            generating.facts |= conventions.of_end(payload)
            generating.end(payload.error_type if isinstance(payload, GenerationFailed) else None)

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()


def _close(span: Span, facts: Mapping[str, Any], error: str | None) -> None:
    span.set_attributes(facts)
    if error is not None:
        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR))
    span.end()
