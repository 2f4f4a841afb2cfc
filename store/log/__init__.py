"""Durable, ordered, partitioned append: one interface, three backends."""

from __future__ import annotations

from pathlib import Path

from schemas.settings import LogSettings
from store.log.base import Log


def open_log(settings: LogSettings, data: Path, *, create: bool = True) -> Log:
    """Open the log that the settings name; `data` is the data directory (embedded: `data/log/log.sqlite`).

    With `create`, a log that does not exist yet is made with `settings.partitions` partitions.

    Raises:
        LogUnavailable: the log does not answer or, without `create`, does not exist.
        LogChanged: the log has another number of partitions than its own record says.
    """
    if settings.kind == "embedded":
        from store.log.embedded import EmbeddedLog

        return EmbeddedLog(data / "log" / "log.sqlite", partitions=settings.partitions, create=create)
    if settings.kind == "kafka":
        from store.log.kafka import KafkaLog

        return KafkaLog(settings, create=create)
    from store.log.confluent import ConfluentLog

    return ConfluentLog(settings, create=create)
