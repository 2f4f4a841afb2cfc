"""The distributed control log: a compacted topic of one partition, followed from its beginning."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType

from schemas.errors import LogChanged, LogUnavailable, SettingsError, TokentapeError
from schemas.settings import LogSettings
from store.control.base import TOMBSTONE_S, VALUE_BYTES_MAX, ControlRecord, Value, decode, encode, fold
from store.log.admin import mapped, passes, started

# What a record batch adds to its only record, generously.
_OVERHEAD_BYTES = 1 << 16
# A waiting follower asks this often at the least, so that a time-out is kept.
_POLL_MS = 100
# Between two tries at a broker that will be back.
_RETRY_S = 0.1
# Shutting down waits no longer than this for the network thread.
_CLOSE_S = 5.0
# What was replaced or taken away is gone from the broker within about this time: edits are content.
_COMPACTED_MS = 600_000


class KafkaControl:
    """A control log in the topic `<log.topic>.control`."""

    def __init__(self, settings: LogSettings) -> None:
        """Open the log, made first where there is none.

        Raises:
            LogUnavailable: no broker answers within `settings.timeout_s`.
            SettingsError: the topic is not compacted or has several partitions.
        """
        self._settings = settings
        self._topic = f"{settings.topic}.control"
        self._place = f"{settings.bootstrap_servers}/{self._topic}"
        self._partition = TopicPartition(self._topic, 0)
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        self._producer: KafkaProducer | None = None
        self._consumer: KafkaConsumer | None = None
        self._closed = False
        _ensure(settings, self._topic, self._place)

    def append(self, kind: str, key: str, value: Value | None) -> int:
        """Write a fact, on every in-sync replica when this returns; its position."""
        data = encode(kind, key, value, place=self._place)
        with self._write_lock:
            try:
                with mapped("append", self._place):
                    sent = self._open_producer().send(self._topic, data, f"{kind}/{key}".encode("utf-8", "surrogatepass"), partition=0)
                    return int(sent.get(self._settings.timeout_s).offset) + 1
            except TokentapeError:
                self._abandon_producer()
                raise

    def follow(self, position: int, *, wait_s: float = 0.0) -> Sequence[ControlRecord]:
        """Every fact after `position` that no later one replaced, waiting up to `wait_s` for the first."""
        deadline = time.monotonic() + wait_s
        while True:
            with self._read_lock:
                found = self._read_to_end(position)
                left = deadline - time.monotonic()
                if found or left <= 0:
                    return found
                found = self._poll(min(int(left * 1000), _POLL_MS))
                if found:
                    return found

    def latest(self, kind: str) -> dict[str, Value]:
        """What holds now, by key."""
        return fold(self.follow(0), kind)

    def _read_to_end(self, position: int) -> list[ControlRecord]:
        """The facts after a position that were durable at the call: fetched until the client stands at the end."""
        found: list[ControlRecord] = []
        started_at = time.monotonic()
        end = self._end()
        if position > end:
            raise self._changed(f"it ends at {end}, not at {position}")
        self._seek(position)
        while self._at() < end:
            found += self._poll(_POLL_MS)
            if time.monotonic() - started_at > self._settings.timeout_s:
                raise LogUnavailable("records are there but do not come", operation="read", place=self._place, hint="is the broker up?")
        return found

    def _poll(self, wait_ms: int) -> list[ControlRecord]:
        try:
            with mapped("read", self._place):
                records = self._open_consumer().poll(timeout_ms=wait_ms).get(self._partition, [])
        except LogUnavailable as problem:
            if isinstance(problem.__cause__, kafka_errors.OffsetOutOfRangeError):
                raise self._changed("the topic was made again") from problem
            if not passes(problem.__cause__):
                raise
            time.sleep(_RETRY_S)
            return []
        return [self._record(record) for record in records]

    def _record(self, record: Any) -> ControlRecord:
        kind, _, key = (record.key or b"").decode("utf-8", "surrogatepass").partition("/")
        return ControlRecord(record.offset + 1, kind, key, decode(record.value, place=self._place), record.timestamp / 1000)

    def _end(self) -> int:
        with mapped("read", self._place):
            return int(self._open_consumer().end_offsets([self._partition])[self._partition])

    def _at(self) -> int:
        with mapped("read", self._place):
            return int(self._open_consumer().position(self._partition))

    def _seek(self, position: int) -> None:
        with mapped("read", self._place):
            if self._at() != position:
                self._open_consumer().seek(self._partition, position)

    def _open_producer(self) -> KafkaProducer:
        self._check_open()
        if self._producer is None:
            self._producer = started(
                KafkaProducer,
                self._settings,
                metrics_enabled=False,
                acks="all",
                enable_idempotence=True,
                compression_type="zstd",
                max_request_size=VALUE_BYTES_MAX + _OVERHEAD_BYTES,
                max_block_ms=int(self._settings.timeout_s * 1000),
                allow_auto_create_topics=False,
            )
            atexit.unregister(self._producer._cleanup)
        return self._producer

    def _open_consumer(self) -> KafkaConsumer:
        self._check_open()
        if self._consumer is None:
            self._consumer = started(
                KafkaConsumer,
                self._settings,
                metrics_enabled=False,
                enable_auto_commit=False,
                auto_offset_reset="none",
                fetch_max_wait_ms=_POLL_MS,
                allow_auto_create_topics=False,
            )
            self._consumer.assign([self._partition])
            self._consumer.seek(self._partition, 0)
        return self._consumer

    def _abandon_producer(self) -> None:
        """Stop a producer that failed from sending later what it still holds, perhaps after a newer fact."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer._sender.force_close()
            producer._sender.join(_CLOSE_S)
            producer.close(timeout=_CLOSE_S)

    def _check_open(self) -> None:
        if self._closed:
            raise LogUnavailable("the control log is closed", operation="use control log", place=self._place)

    def _changed(self, fault: str) -> LogChanged:
        return LogChanged(fault, operation="follow", place=self._place, hint="it was replaced: begin again at 0")

    def close(self) -> None:
        """Release everything; safe to call twice. Waits for a follower's last poll."""
        self._closed = True
        with self._write_lock, self._read_lock:
            producer, self._producer = self._producer, None
            consumer, self._consumer = self._consumer, None
            if producer is not None:
                producer.close(timeout=_CLOSE_S)
            if consumer is not None:
                consumer.close(autocommit=False)


def _ensure(settings: LogSettings, topic: str, place: str) -> None:
    """Make the topic where it is missing, and see that it is fit."""
    with mapped("open control log", place):
        admin = started(KafkaAdminClient, settings)
        try:
            wanted = {"num_partitions": 1, "replication_factor": settings.replication, "configs": _configs(settings)}
            # It was made before, or by another worker just now.
            with contextlib.suppress(kafka_errors.TopicAlreadyExistsError):
                admin.create_topics({topic: wanted})
            admin.wait_for_topics([topic], timeout_ms=max(1, int(settings.timeout_s * 1000)))
            found = admin.describe_topics([topic])[0]
            resource = ConfigResource(ConfigResourceType.TOPIC, topic)
            policy = admin.describe_configs([resource], config_filter="all")["topic"][topic]["cleanup.policy"]["value"]
        finally:
            admin.close()
    if policy != "compact" or len(found["partitions"]) != 1:
        fault = f"topic {topic!r} has cleanup.policy={policy} and {len(found['partitions'])} partitions, a control log needs compact and 1"
        raise SettingsError(fault, operation="open control log", place=place, hint="name another log.topic and let tokentape create it")


def _configs(settings: LogSettings) -> dict[str, str]:
    return {
        "cleanup.policy": "compact",
        "message.timestamp.type": "LogAppendTime",
        "max.message.bytes": str(VALUE_BYTES_MAX + _OVERHEAD_BYTES),
        "min.insync.replicas": str(max(1, settings.replication - 1)),
        "unclean.leader.election.enable": "false",
        "delete.retention.ms": str(int(TOMBSTONE_S * 1000)),
        "segment.ms": str(_COMPACTED_MS),
        "max.compaction.lag.ms": str(_COMPACTED_MS),
    }
