"""What a gateway worker does now, for Prometheus: counted beside the recorder, written out when somebody asks.

A token costs one call and a few integer additions; the client library's own histograms, which lock and look labels up,
would cost ten times that. Each worker answers for itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ingest.attachments import Attachments, Deferred
from ingest.gateway.routes import Routes
from ingest.gateway.tape import Recording
from ingest.recorder import Recorder
from schemas.events import (
    Alternative,
    GenerationFailed,
    GenerationFinished,
    Payload,
    RequestSubmitted,
    SequenceFinished,
)
from schemas.histogram import Histogram
from schemas.sink import SessionContext

if TYPE_CHECKING:
    from ingest.gateway.tracing import Tracing

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
WHOLE_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Meter:
    """A recorder before a recorder: lets everything pass and counts it."""

    def __init__(self, recorder: Recording) -> None:
        self.durable = recorder.durable
        self.first_token, self.between_tokens, self.whole = Histogram(FIRST_TOKEN_S), Histogram(BETWEEN_TOKENS_S), Histogram(WHOLE_S)
        self.tokens_out = self.tokens_in = 0
        self.open: set[bytes] = set()
        self.requests: Counter[str] = Counter()
        self.finished = 0
        self.failures: Counter[tuple[str, str]] = Counter()
        self.redactions: Counter[str] = Counter()
        self._recorder = recorder
        self._pass_on = recorder.tokens
        self._pass_on_run = recorder.run
        self._last: dict[tuple[bytes, int], int] = {}

    def record(self, session: SessionContext, payload: Payload | Deferred) -> None:
        """Record one event."""
        self._count(payload)
        self._recorder.record(session, payload)

    def tokens(
        self,
        session: SessionContext,
        generation_id: bytes,
        index: int,
        position: int,
        offset_us: int,
        *,
        channel: str = "content",
        token_ids: Sequence[int] = (),
        text: str = "",
        logprobs: Sequence[float] = (),
        alternatives: Sequence[Sequence[Alternative]] = (),
    ) -> int:
        """Record one delta; the position of the next."""
        key = (generation_id, index)
        last = self._last.get(key)
        if last is not None:
            between = self.between_tokens  # `observe`, without the call
            between.counts[bisect_left(between.bounds_us, offset_us - last)] += 1
            between.sum_us += offset_us - last
        self._last[key] = offset_us
        after = self._pass_on(
            session,
            generation_id,
            index,
            position,
            offset_us,
            channel=channel,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            alternatives=alternatives,
        )
        self.tokens_out += after - position
        return after

    def run(
        self,
        session: SessionContext,
        generation_id: bytes,
        index: int,
        position: int,
        offset_us: int,
        token_ids: Sequence[int],
        texts: Sequence[str],
        logprobs: Sequence[float],
    ) -> int:
        """Record tokens that came at once: no time passed between them. The position of the next."""
        last = self._last.get((generation_id, index))
        if last is not None:
            self.between_tokens.observe(offset_us - last)
        self.between_tokens.counts[0] += len(token_ids) - 1
        self._last[generation_id, index] = offset_us
        self.tokens_out += len(token_ids)
        return self._pass_on_run(session, generation_id, index, position, offset_us, token_ids, texts, logprobs)

    def _count(self, payload: Payload | Deferred) -> None:
        if isinstance(payload, RequestSubmitted):
            self.requests[payload.endpoint] += 1
            self.open.add(payload.generation_id)
            self.redactions.update({pair.key: pair.count for pair in payload.redactions})
        elif isinstance(payload, SequenceFinished):
            self._last.pop((payload.generation_id, payload.index), None)
        elif isinstance(payload, GenerationFinished):
            self.finished += 1
            self.tokens_in += payload.prompt_tokens or 0
            self.whole.observe(payload.offset_us)
            if payload.first_token_us is not None:
                self.first_token.observe(payload.first_token_us)
            self._end(payload.generation_id)
        elif isinstance(payload, GenerationFailed):
            self.failures[payload.error_type, payload.origin] += 1
            self._end(payload.generation_id)

    def _end(self, generation_id: bytes) -> None:
        self.open.discard(generation_id)
        for key in [key for key in self._last if key[0] == generation_id]:
            del self._last[key]


class Metrics:
    """All that is told at `/metrics`."""

    def __init__(self, meter: Meter, recorder: Recording, routes: Routes, attachments: Attachments, tracing: Tracing | None = None) -> None:
        self._meter = meter
        self._recorder = recorder
        self._routes = routes
        self._attachments = attachments
        self._more: list[Callable[[], Iterator[Metric]]] = []
        self._tracing = tracing
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def add(self, families: Callable[[], Iterator[Metric]]) -> None:
        """Tell also what another part has to tell."""
        self._more.append(families)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every metric as of now."""
        meter = self._meter
        yield _gauge("generations_open", "Generations under way, stopped and queued ones among them.", len(meter.open))
        yield _counter("requests", "Requests by endpoint.", meter.requests, "endpoint")
        yield _counter("generations_finished", "Generations that ended well.", meter.finished)
        failed = CounterMetricFamily("tokentape_generations_failed", "Generations that failed.", labels=["error_type", "origin"])
        for labels, count in meter.failures.items():
            failed.add_metric(labels, count)
        yield failed
        yield histogram_family("first_token_seconds", "From forwarding a request to its first token.", meter.first_token)
        yield histogram_family("between_tokens_seconds", "Between two deltas of one sequence.", meter.between_tokens)
        yield histogram_family("generation_seconds", "From forwarding a request to the end of its answer.", meter.whole)
        yield _counter("tokens_generated", "Tokens that came from upstreams; deltas where they give no ids.", meter.tokens_out)
        yield _counter("tokens_prompt", "Prompt tokens of generations that ended well, as upstreams count them.", meter.tokens_in)
        yield _counter("redactions", "What redaction took out of requests.", meter.redactions, "rule")
        yield from self._of_routes()
        yield from self._of_recorder()
        for families in self._more:
            yield from families()
        yield _counter("blobs_stored", "Large bodies and attachments sent to the blob store.", self._attachments.stored)
        yield _counter(
            "blobs_inline", "Requests whose large parts stayed in their event, as the store did not answer.", self._attachments.kept
        )
        if self._tracing:
            yield _counter("spans_exported", "Spans that the collector took.", self._tracing.outlet.exported)
            yield _counter(
                "spans_dropped", "Spans let go: the collector did not take them, or too many waited.", self._tracing.outlet.dropped
            )

    def _of_routes(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("tokentape_upstream_queue", "Requests that wait for their turn.", labels=["upstream"])
        for lane in self._routes.lanes:
            waiting.add_metric([lane.entry.name], lane.turnstile.queued)
        yield waiting

    def _of_recorder(self) -> Iterator[Metric]:
        if not isinstance(self._recorder, Recorder):
            return
        stats = self._recorder.stats
        yield _gauge("recorder_queue", "Calls that wait for the recorder's thread.", stats.queue_depth)
        yield _gauge("recorder_spool_bytes", "Bytes of events on disk that the log does not have yet.", stats.spool_bytes)
        yield _gauge("recorder_log_available", "1 while the log takes events.", int(stats.log_available))
        yield _counter("recorder_recorded", "Events and deltas taken in.", stats.recorded)
        yield _counter("recorder_acknowledged", "Events that the log has durably.", stats.acknowledged)
        yield _counter("recorder_dropped", "Events and deltas let go, for whatever reason but sampling.", stats.shed)
        yield _counter("recorder_sampled_out", "Events and deltas left out by sampling.", stats.sampled_out)
        yield histogram_family("recorder_encode_seconds", "Encoding one event.", self._recorder.encoding)


def histogram_family(name: str, text: str, times: Histogram) -> HistogramMetricFamily:
    """Times as Prometheus wants them."""
    total, buckets = 0, []
    for bound, count in zip([*(str(us / 1e6) for us in times.bounds_us), "+Inf"], times.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return HistogramMetricFamily(f"tokentape_{name}", text, buckets=buckets, sum_value=times.sum_us / 1e6)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tokentape_{name}", text, value=value)


def _counter(name: str, text: str, value: float | Counter[str], label: str = "") -> CounterMetricFamily:
    if not isinstance(value, Counter):
        return CounterMetricFamily(f"tokentape_{name}", text, value=value)
    family = CounterMetricFamily(f"tokentape_{name}", text, labels=[label])
    for key, count in sorted(value.items()):
        family.add_metric([key], count)
    return family
