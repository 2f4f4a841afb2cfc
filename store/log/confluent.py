"""The log over confluent-kafka (librdkafka), the faster client; an extra behind the same interface."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

from schemas.errors import LogUnavailable, SettingsError
from store.log.admin import FETCH_WAIT_MS, RECONNECT_MS_MAX, place
from store.log.base import ENTRY_BYTES_MAX, Entry
from store.log.forks import forget
from store.log.quiet import quiet
from store.log.topic import POLL_RECORDS_MAX, OutOfRange, Run, TopicLog

try:
    from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
except ImportError as problem:
    raise SettingsError(
        "log.kind = confluent needs confluent-kafka",
        operation="open log",
        hint="pip install tokentape[confluent], or set log.kind = kafka",
    ) from problem

# The client's own limit for a record, in which it counts key and framing.
_REQUEST_BYTES_MAX = ENTRY_BYTES_MAX + (1 << 20)
# An answer is at least one batch, however large, and otherwise no larger than this.
_FETCH_BYTES_MAX = 50 << 20
# Memory for records fetched ahead, in KiB.
_AHEAD_KIB = 64 << 10
# A producer's queue holds this many events; a longer append goes through it in pieces.
_QUEUE_EVENTS = 100_000
# How long a full queue is waited for in one step.
_STEP_S = 0.1
# Shutting down waits no longer than this.
_CLOSE_S = 5.0

_OUT_OF_RANGE = (KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._AUTO_OFFSET_RESET)

_logger = logging.getLogger(__name__)
_client_logger = quiet(logging.getLogger(f"{__name__}.client"))


class ConfluentLog(TopicLog):
    """A log over a Kafka topic, through confluent-kafka."""

    _producer: Producer | None = None
    _consumer: Consumer | None = None
    _refused: list[KafkaError]

    def _produce(self, entries: Sequence[Entry]) -> None:
        deadline = time.monotonic() + self._settings.timeout_s
        try:
            producer = self._open_producer()
            for entry in entries:
                self._enqueue(producer, entry, deadline)
            left = producer.flush(max(0.0, deadline - time.monotonic()))
            if self._refused:
                raise self._unavailable("append", self._refused[0].str())
            if left:
                raise self._unavailable("append", f"{left} events were not acknowledged in time")
        except KafkaException as problem:
            self._abandon_producer()
            raise self._unavailable("append", str(problem)) from problem
        except BaseException:
            self._abandon_producer()
            raise

    def _enqueue(self, producer: Producer, entry: Entry, deadline: float) -> None:
        while True:
            try:
                producer.produce(self._topic.name, entry.value, entry.key, entry.partition)
                return
            except BufferError as problem:
                if time.monotonic() > deadline:
                    raise self._unavailable("append", "the broker does not take events in time") from problem
            producer.poll(_STEP_S)

    def _open_producer(self) -> Producer:
        if self._producer is None:
            self._refused = []
            self._producer = Producer(
                self._connection()
                | {
                    "acks": "all",
                    "enable.idempotence": True,
                    # A batch that fails stops all later ones, so that what was written is a prefix.
                    "enable.gapless.guarantee": True,
                    # No batch fails for its age on its own: `append` keeps the time itself.
                    "message.timeout.ms": 0,
                    "compression.type": "zstd",
                    "linger.ms": 5,
                    "message.max.bytes": _REQUEST_BYTES_MAX,
                    "queue.buffering.max.messages": _QUEUE_EVENTS,
                    "delivery.report.only.error": True,
                    "on_delivery": self._on_delivery,
                    "allow.auto.create.topics": False,
                }
            )
        return self._producer

    def _on_delivery(self, error: KafkaError | None, _: Message) -> None:
        if error is not None:
            self._refused.append(error)

    def _abandon_producer(self) -> None:
        """Stop a producer that failed from sending what it still holds: the caller sends it again through another."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.purge()
            producer.flush(_CLOSE_S)

    def _open_consumer(self) -> Consumer:
        if self._consumer is None:
            self._consumer = Consumer(
                self._connection()
                | {
                    # Required by the client; nothing is subscribed or committed under it.
                    "group.id": self._settings.group,
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "auto.offset.reset": "error",
                    "fetch.wait.max.ms": FETCH_WAIT_MS,
                    "fetch.max.bytes": _FETCH_BYTES_MAX,
                    "receive.message.max.bytes": 2 * _REQUEST_BYTES_MAX,
                    "queued.max.messages.kbytes": _AHEAD_KIB,
                    # With the defaults a full queue, or a broker that restarted, costs a whole second or half of one.
                    "fetch.queue.backoff.ms": 10,
                    "fetch.error.backoff.ms": 100,
                    "allow.auto.create.topics": False,
                }
            )
        return self._consumer

    def _assign(self, positions: dict[int, int]) -> None:
        self._open_consumer().assign([TopicPartition(self._topic.name, p, offset) for p, offset in positions.items()])

    def _pause(self, partitions: set[int]) -> None:
        consumer = self._open_consumer()
        consumer.resume([TopicPartition(self._topic.name, p) for p in self._positions])
        consumer.pause([TopicPartition(self._topic.name, p) for p in partitions])

    def _poll(self, wait_s: float) -> list[Run]:
        consumer = self._open_consumer()
        try:
            # Asked for many, `consume` waits for all of them until the time is up; so wait for one, then take what is there.
            messages = consumer.consume(1, wait_s)
            if messages:
                messages += consumer.consume(POLL_RECORDS_MAX, 0)
        except KafkaException as problem:
            raise self._unavailable("read", str(problem)) from problem
        if any(map(Message.error, messages)):
            messages = self._without_errors(messages)
        by_partition = itertools.groupby(messages, Message.partition)
        return [self._run(partition, list(found)) for partition, found in by_partition]

    def _run(self, partition: int, messages: list[Message]) -> Run:
        times = [milliseconds * 1000 for _, milliseconds in map(Message.timestamp, messages)]
        return Run(partition, messages[0].offset(), messages[-1].offset(), times, [value or b"" for value in map(Message.value, messages)])

    def _without_errors(self, messages: list[Message]) -> list[Message]:
        """The records among `messages`; an error that does not pass by itself is raised."""
        for message in messages:
            error, partition = message.error(), message.partition()
            if error is None:
                continue
            if error.code() in _OUT_OF_RANGE:
                raise OutOfRange(partition)
            if error.fatal():
                raise LogUnavailable(error.str(), operation="read", place=place(self._settings), hint="restart")
            _logger.warning("%s: %s", place(self._settings), error.str())
        return [message for message in messages if message.error() is None]

    def _connection(self) -> dict[str, Any]:
        return {
            "bootstrap.servers": self._settings.bootstrap_servers,
            "reconnect.backoff.max.ms": RECONNECT_MS_MAX,
            "logger": _client_logger,
        }

    def _forget_clients(self) -> None:
        forget(self._producer, self._consumer)
        self._producer = self._consumer = None

    def _close_clients(self) -> None:
        if self._producer is not None:
            self._producer.flush(_CLOSE_S)
        if self._consumer is not None:
            self._consumer.close()
        self._producer = self._consumer = None
