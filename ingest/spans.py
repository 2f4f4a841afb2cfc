"""Spans on their way to an OpenTelemetry collector: a bounded queue and one thread, which never hold up what is traced.

The SDK's own batch processor does the same, but tells nobody how many spans it let go.
"""

from __future__ import annotations

import logging
import queue
import threading
from contextlib import suppress

import structlog
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from schemas.settings import TelemetrySettings

log = structlog.get_logger(__name__)

PATH = "/v1/traces"
BATCH_MAX = 512
"""Spans in one request to the collector."""

BATCH_WAIT_S = 1.0
"""How long the first span of a batch waits for others."""

LAST_WORDS_S = 2.0
"""How long a gateway that stops waits for the collector to take what is left."""


class Outlet(SpanProcessor):
    """Takes in spans that ended and exports them; counts those that the collector took and those that were let go."""

    def __init__(self, exporter: SpanExporter, queue_max: int) -> None:
        self.exported = self.dropped = 0
        self._exporter = exporter
        self._waiting: queue.Queue[ReadableSpan | None] = queue.Queue(queue_max)
        self._stopping = threading.Event()
        self._failing = False
        self._counting = threading.Lock()  # the event loop counts what does not fit, the thread what did not arrive
        self._thread = threading.Thread(target=self._run, name="tokentape-spans", daemon=True)
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span, or let it go where the queue is full. Never waits."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        try:
            self._waiting.put_nowait(span)
        except queue.Full:
            self._let_go(1)

    def shutdown(self) -> None:
        """Export what is left, as far as the collector takes it at once."""
        self._stopping.set()
        with suppress(queue.Full):
            self._waiting.put_nowait(None)  # wakes the thread
        self._thread.join(LAST_WORDS_S)
        self._exporter.shutdown()

    def _run(self) -> None:
        while not (self._stopping.is_set() and self._waiting.empty()):
            if batch := self._batch():
                self._export(batch)

    def _batch(self) -> list[ReadableSpan]:
        """The next spans, once there are enough of them or the first has waited long enough."""
        batch = [self._waiting.get()]
        with suppress(queue.Empty):
            while len(batch) < BATCH_MAX and batch[-1] is not None:
                batch.append(self._waiting.get(timeout=0.0 if self._stopping.is_set() else BATCH_WAIT_S))
        return [span for span in batch if span is not None]

    def _export(self, batch: list[ReadableSpan]) -> None:
        try:
            taken = self._exporter.export(batch) is SpanExportResult.SUCCESS
        except Exception as error:  # a collector's answer must not end the thread
            log.warning("spans not exported", error=repr(error))
            taken = False
        if taken:
            self.exported += len(batch)
        else:
            self._let_go(len(batch))
        if taken == self._failing:  # said once, not with each batch
            self._failing = not taken
            log.warning("spans reach the collector again" if taken else "the collector takes no spans; they are let go and counted")

    def _let_go(self, spans: int) -> None:
        with self._counting:
            self.dropped += spans


def span_provider(settings: TelemetrySettings, instance: str) -> tuple[TracerProvider, Outlet]:
    """A provider of tracers whose spans go to the collector; `instance` tells this process from others of the service.

    Where a request comes with a trace, its sampling decision holds; else `sample_ratio` decides by the new trace's id.
    """
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # its stack traces on each failed attempt; `Outlet` says it once
    address = settings.otlp_endpoint.rstrip("/")
    endpoint = address if address.endswith(PATH) else address + PATH
    outlet = Outlet(OTLPSpanExporter(endpoint=endpoint, timeout=settings.timeout_s), settings.queue_max)
    resource = Resource.create({SERVICE_NAME: settings.service_name, SERVICE_INSTANCE_ID: instance})
    provider = TracerProvider(ParentBased(TraceIdRatioBased(settings.sample_ratio)), resource, shutdown_on_exit=False)
    provider.add_span_processor(outlet)
    return provider, outlet
