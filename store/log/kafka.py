"""The log over kafka-python, the default client of the distributed deployment."""

from __future__ import annotations

import atexit
import time
from collections.abc import Sequence

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka import errors as kafka_errors

from schemas.errors import LogUnavailable
from store.log.admin import CLOSE_S, FETCH_WAIT_MS, abandon, mapped, passes, place, started
from store.log.base import ENTRY_BYTES_MAX, Entry
from store.log.forks import forget
from store.log.topic import POLL_RECORDS_MAX, OutOfRange, Run, TopicLog

# The client's own limit for a record, in which it counts key and framing.
_REQUEST_BYTES_MAX = ENTRY_BYTES_MAX + (1 << 20)
# Batches of this size amortise the cost of a request; the default of 16 KiB halves the rate.
_BATCH_BYTES = 1 << 20
# No batch may fail on its own while others go on, or an append would not be a prefix: `append` keeps the time itself.
_DELIVERY_MS = 7 * 24 * 3600 * 1000
# Between two polls that failed.
_RETRY_S = 0.1


class KafkaLog(TopicLog):
    """A log over a Kafka topic, through kafka-python."""

    _producer: KafkaProducer | None = None
    _consumer: KafkaConsumer | None = None

    def _produce(self, entries: Sequence[Entry]) -> None:
        topic = self._topic.name
        try:
            with mapped("append", place(self._settings)):
                producer = self._open_producer()
                futures = [producer.send(topic, entry.value, entry.key, partition=entry.partition) for entry in entries]
                producer.flush(self._settings.timeout_s)
                for future in futures:
                    if future.failed():
                        raise future.exception
        except BaseException:
            self._abandon_producer()
            raise

    def _open_producer(self) -> KafkaProducer:
        if self._producer is None:
            self._producer = started(
                KafkaProducer,
                self._settings,
                metrics_enabled=False,
                acks="all",
                enable_idempotence=True,
                compression_type="zstd",
                batch_size=_BATCH_BYTES,
                # `flush` sends at once; until then the batches may fill.
                linger_ms=100,
                max_request_size=_REQUEST_BYTES_MAX,
                delivery_timeout_ms=_DELIVERY_MS,
                max_block_ms=int(self._settings.timeout_s * 1000),
                allow_auto_create_topics=False,
            )
            # At exit it would close itself before the recorder, which was registered earlier, has sent the last events.
            atexit.unregister(self._producer._cleanup)
        return self._producer

    def _abandon_producer(self) -> None:
        """Stop a producer that failed from sending what it still holds: the caller sends it again through another."""
        producer, self._producer = self._producer, None
        if producer is not None:
            abandon(producer)

    def _open_consumer(self) -> KafkaConsumer:
        if self._consumer is None:
            with mapped("read", place(self._settings)):
                self._consumer = started(
                    KafkaConsumer,
                    self._settings,
                    metrics_enabled=False,
                    enable_auto_commit=False,
                    auto_offset_reset="none",
                    fetch_max_wait_ms=FETCH_WAIT_MS,
                    allow_auto_create_topics=False,
                )
        return self._consumer

    def _assign(self, positions: dict[int, int]) -> None:
        consumer = self._open_consumer()
        topics = {self._partition(partition): offset for partition, offset in positions.items()}
        consumer.resume(*consumer.paused())
        consumer.assign(list(topics))
        for partition, offset in topics.items():
            consumer.seek(partition, offset)

    def _pause(self, partitions: set[int]) -> None:
        consumer = self._open_consumer()
        consumer.resume(*consumer.paused())
        consumer.pause(*map(self._partition, partitions))

    def _poll(self, wait_s: float) -> list[Run]:
        try:
            with mapped("read", place(self._settings)):
                records = self._open_consumer().poll(timeout_ms=int(wait_s * 1000), max_records=POLL_RECORDS_MAX)
        except LogUnavailable as problem:
            cause = problem.__cause__
            if isinstance(cause, kafka_errors.OffsetOutOfRangeError):
                raise OutOfRange(next(iter(cause.args[0])).partition) from cause
            if isinstance(cause, kafka_errors.LogTruncationError):
                raise OutOfRange(next(iter(cause.divergent_offsets)).partition) from cause
            if not passes(cause):
                raise
            # The caller asks the broker where its log ends, and so learns whether it is away.
            time.sleep(min(wait_s, _RETRY_S))
            return []
        return [
            Run(
                partition.partition,
                found[0].offset,
                found[-1].offset,
                [record.timestamp * 1000 for record in found],
                [record.value or b"" for record in found],
            )
            for partition, found in records.items()
        ]

    def _partition(self, partition: int) -> TopicPartition:
        return TopicPartition(self._topic.name, partition)

    def _forget_clients(self) -> None:
        forget(self._producer, self._consumer)
        self._producer = self._consumer = None

    def _close_clients(self) -> None:
        if self._producer is not None:
            self._producer.close(timeout=CLOSE_S)
        if self._consumer is not None:
            self._consumer.close(autocommit=False)
        self._producer = self._consumer = None
