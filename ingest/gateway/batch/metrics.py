"""What batch work is doing, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from schemas import clock

if TYPE_CHECKING:
    from ingest.gateway.batch.worker import Worker


def families(worker: Worker) -> Iterator[Metric]:
    """What waits by model, as this worker last measured it, and what it brought to an end."""
    waiting = GaugeMetricFamily("tokentape_batch_backlog", "Batch requests without a result.", labels=["model"])
    oldest = GaugeMetricFamily("tokentape_batch_oldest_seconds", "How long the oldest of them has waited.", labels=["model"])
    for model, backlog in list(worker.backlog.items()):
        waiting.add_metric([model], backlog.requests)
        oldest.add_metric([model], max(0.0, clock.now_s() - backlog.oldest_at) if backlog.oldest_at else 0.0)
    ended = CounterMetricFamily("tokentape_batch_requests", "Batch requests that ended in this worker.", labels=["outcome"])
    for outcome, count in sorted(worker.ended.items()):
        ended.add_metric([outcome], count)
    yield from (waiting, oldest, ended)
