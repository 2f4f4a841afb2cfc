"""`/metrics` of the API: what the installation's status says, for Prometheus. Each gateway tells of its requests at its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from lifecycle.alerts import alerts_of
from tokentape.installation import Installation


class Metrics:
    """The installation's numbers of now."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every metric; a part that does not answer has none but its alert."""
        measured = self._installation.watch.measure()
        for name, part in measured.items():
            if "error" not in part:
                yield from _FAMILIES[name](part)
        alerts = {alert.name: 1.0 for alert in alerts_of(measured, self._installation.settings)}
        yield _gauge("alert", "1 for each thing that is not well.", alerts, "alert")


def _storage(tiers: Mapping[str, Any]) -> Iterator[Metric]:
    for name, text in (
        ("events", "Events in a tier."),
        ("bytes", "Bytes of a tier."),
        ("allowed_bytes", "Bytes that a tier may take."),
        ("share", "Share of the bytes that a tier may take."),
        ("disk_share", "Share of the disk under a tier that is taken, by whomever."),
    ):
        yield _gauge(f"tier_{name}", text, {tier: held.get(name) for tier, held in tiers.items()}, "tier")


def _log(part: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("unsealed_events", "Events that no query sees yet.", part["unsealed_events"])
    yield _gauge("unsealed_seconds", "Age of the oldest event that no query sees yet.", part["unsealed_s"])
    yield _gauge("tiering_lag_seconds", "Age of the oldest event that is not cold.", part["tiering_lag_s"])
    yield _gauge("log_retention_seconds", "How long the log keeps an event.", part["retention_s"])


def _jobs(part: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("job_failed", "1 while a job's last run failed.", {job: float(job in part["failed"]) for job in part["ran"]}, "job")


def _verify(part: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("verified_timestamp_seconds", "When the last good verification ended.", part["good_at"])
    yield _gauge("verified_age_seconds", "Since the last good verification; without one, since the first run of a job.", part["since_s"])


def _latency(part: Mapping[str, Any]) -> Iterator[Metric]:
    text = "Bound of the time to encode an event, or to save a session's snapshots."
    family = GaugeMetricFamily("tokentape_serialisation_seconds", text, labels=["of", "quantile"])
    for of, times in part.items():
        for quantile, value in (("0.95", times["p95_s"]), ("0.99", times["p99_s"])):
            if value is not None:
                family.add_metric([of, quantile], value)
    yield family


def _replays(part: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("replays_ended", "Replays that began of late and are over (watch.replay_h).", part["ended"])
    yield _gauge("replays_failed", "Those of them that came to no verdict.", part["failed"])
    yield _gauge("replay_success", "Share of them that came to a verdict.", part["success"])


def _format(part: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("format", "Format of the data, and of this program.", {"data": part["data"], "program": part["program"]}, "of")
    waits = dict.fromkeys(part["waits"], 1.0)
    yield _gauge("partition_waits", "1 for a partition that waits for a newer version of this program.", waits, "partition")


_FAMILIES = {
    "storage": _storage,
    "log": _log,
    "jobs": _jobs,
    "verify": _verify,
    "latency": _latency,
    "replays": _replays,
    "format": _format,
}


def _gauge(name: str, text: str, value: float | Mapping[str, float | None] | None, label: str = "") -> GaugeMetricFamily:
    """A gauge, by label where there are several; what is not known is left out."""
    family = GaugeMetricFamily(f"tokentape_{name}", text, labels=[label] if label else [])
    for key, one in value.items() if isinstance(value, Mapping) else (("", value),):
        if one is not None:
            family.add_metric([key] if label else [], one)
    return family
