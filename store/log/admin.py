"""The Kafka topic behind a log: made once with the right settings, recognised by its id, asked for its bounds.

Both Kafka clients use this page (through kafka-python), so that a topic means the same to either.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kafka import KafkaAdminClient, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType, OffsetSpec
from kafka.net.compat import KafkaNetClient

from schemas.errors import LogChanged, LogUnavailable, SettingsError, TokentapeError
from schemas.settings import LogSettings
from store.log.base import ENTRY_BYTES_MAX, Taken
from store.log.quiet import quiet

# What a record batch adds to the value of its only record, generously.
_OVERHEAD_BYTES = 1024
# The broker answers an idle reader after this long; a change of the partitions that are read waits for it.
FETCH_WAIT_MS = 100
# A reconnect is tried at least this often, so that a restarted broker is found at once.
RECONNECT_MS_MAX = 1000
# A topic that the broker does not know for this long is gone; right after a start metadata may lag.
_GONE_S = 3.0

# Between two tries.
_RETRY_S = 0.1
# Shutting a producer down waits no longer than this for its network thread.
CLOSE_S = 5.0

_Answer = TypeVar("_Answer")
_Client = TypeVar("_Client")

quiet(logging.getLogger("kafka"))


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as it was when the log was opened."""

    name: str
    cluster_id: str
    topic_id: str
    partitions: int
    entry_bytes_max: int
    retention_s: float | None

    @property
    def log_id(self) -> str:
        """Changes when the topic is deleted and made again, and on another cluster."""
        return f"{self.cluster_id}/{self.topic_id}"


class TopicAdmin:
    """Administration of one topic. Methods may be called from several threads; each tries again until the time-out."""

    def __init__(self, settings: LogSettings) -> None:
        """Connect to the cluster.

        Raises:
            LogUnavailable: no broker answers within `settings.timeout_s`.
        """
        self._settings = settings
        self._lock = threading.Lock()
        self._place = place(settings)
        with mapped("connect", self._place):
            self._client = started(KafkaAdminClient, settings)

    def ensure(self, *, create: bool) -> Topic:
        """The topic of the settings, made first when it is missing and `create` is set.

        Raises:
            LogUnavailable: the topic is missing (without `create`), or no broker answers.
            LogChanged: the topic has another number of partitions than the settings.
            SettingsError: the topic cannot be a log, or cannot be made as the settings say.
        """
        name = self._settings.topic
        found = self._describe()
        if found["error_code"] == kafka_errors.UnknownTopicOrPartitionError.errno and create:
            self._create()
            found = self._describe()
        if found["error_code"] != 0:
            error = kafka_errors.for_code(found["error_code"])
            raise _from_kafka(error(f"topic {name!r}"), "open log", self._place)
        cluster_id = self._ask("describe cluster", self._client.describe_cluster)["cluster_id"]
        topic = Topic(name, cluster_id, str(found["topic_id"]), len(found["partitions"]), *self._limits())
        if topic.partitions != self._settings.partitions:
            raise LogChanged(
                f"topic {name!r} has {topic.partitions} partitions, the settings say {self._settings.partitions}",
                operation="open log",
                place=self._place,
                hint=f"set log.partitions = {topic.partitions}, or name another topic: the number is fixed for a log",
            )
        return topic

    def verify(self, topic: Topic) -> None:
        """Check that the topic is still the one that was opened.

        Raises:
            LogChanged: it was deleted, made again, or has more partitions.
            LogUnavailable: no broker answers.
        """
        found = self._describe()
        deadline = time.monotonic() + _GONE_S
        while found["error_code"] != 0 and time.monotonic() < deadline:
            time.sleep(_RETRY_S)
            found = self._describe()
        if found["error_code"] != 0:
            raise self._changed(f"topic {topic.name!r} is gone")
        if str(found["topic_id"]) != topic.topic_id:
            raise self._changed(f"topic {topic.name!r} was deleted and made again")
        if len(found["partitions"]) != topic.partitions:
            raise self._changed(f"topic {topic.name!r} has {len(found['partitions'])} partitions, it had {topic.partitions}")

    def firsts(self, partitions: Iterable[int]) -> dict[int, int]:
        """First retained offset of each partition."""
        return self._offsets(partitions, OffsetSpec.EARLIEST)

    def ends(self, partitions: Iterable[int]) -> dict[int, int]:
        """Offset after the last durable record of each partition."""
        return self._offsets(partitions, OffsetSpec.LATEST)

    def commit(self, offsets: dict[int, int]) -> None:
        """Write the group's committed offsets, which lag monitors read."""
        wanted = {TopicPartition(self._settings.topic, p): OffsetAndMetadata(offset, "", -1) for p, offset in offsets.items()}
        self._ask("acknowledge", self._commit, wanted)

    def delete(self, partition: int, before_offset: int) -> None:
        """Delete the records of a partition below an offset."""
        wanted = {TopicPartition(self._settings.topic, partition): before_offset}
        self._ask("trim", self._client.delete_records, wanted)

    def taken(self) -> Taken:
        """Bytes of every copy of the topic, and the taken share of the fullest disk that holds one; brokers before 3.3 do not tell it."""
        answers = self._ask("describe log directories", self._client.describe_log_dirs, [self._settings.topic])
        folders = [folder for answer in answers for folder in answer["log_dirs"] if folder["topics"]]
        size = sum(part["partition_size"] for folder in folders for topic in folder["topics"] for part in topic["partitions"])
        shares = [1 - folder["usable_bytes"] / total for folder in folders if (total := folder.get("total_bytes") or 0) > 0]
        return Taken(size, max(shares, default=None))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _commit(self, wanted: dict[TopicPartition, OffsetAndMetadata]) -> None:
        answers = self._client.alter_group_offsets(self._settings.group, wanted)
        for partition, error in answers.items():
            if error is not kafka_errors.NoError:
                raise error(f"partition {partition.partition} of group {self._settings.group!r}")

    def _describe(self) -> dict[str, Any]:
        answer: list[dict[str, Any]] = self._ask("describe topic", self._client.describe_topics, [self._settings.topic])
        return answer[0]

    def _offsets(self, partitions: Iterable[int], spec: OffsetSpec) -> dict[int, int]:
        wanted = {TopicPartition(self._settings.topic, partition): spec for partition in partitions}
        answers = self._ask("list offsets", self._client.list_partition_offsets, wanted)
        return {partition.partition: found.offset for partition, found in answers.items()}

    def _create(self) -> None:
        settings = self._settings
        configs = {
            "cleanup.policy": "delete",
            "retention.ms": str(int(settings.retention_days * 86_400_000)),
            "message.timestamp.type": "LogAppendTime",
            "max.message.bytes": str(ENTRY_BYTES_MAX + _OVERHEAD_BYTES),
            # An acknowledged event is then on two brokers at least, wherever there are three.
            "min.insync.replicas": str(max(1, settings.replication - 1)),
            "unclean.leader.election.enable": "false",
        }
        if settings.retention_h:
            configs["retention.ms"] = str(int(settings.retention_h * 3_600_000))
        wanted = {"num_partitions": settings.partitions, "replication_factor": settings.replication, "configs": configs}
        try:
            self._ask("create topic", self._client.create_topics, {settings.topic: wanted})
        except LogUnavailable as problem:
            # Another process was quicker, or the answer to our own request got lost.
            if not isinstance(problem.__cause__, kafka_errors.TopicAlreadyExistsError):
                raise
        with mapped("create topic", self._place):
            self._client.wait_for_topics([settings.topic], timeout_ms=_ms(settings))

    def _limits(self) -> tuple[int, float | None]:
        """The largest entry that the topic takes, and how long it keeps one (None: for ever).

        Raises:
            SettingsError: somebody else made the topic, and it is unfit for a log.
        """
        resource = ConfigResource(ConfigResourceType.TOPIC, self._settings.topic)
        answer = self._ask("describe topic", lambda: self._client.describe_configs([resource], config_filter="all"))
        configs = {name: config["value"] for name, config in answer["topic"][self._settings.topic].items()}
        wanted = {"message.timestamp.type": "LogAppendTime", "cleanup.policy": "delete"}
        for name, value in wanted.items():
            if configs[name] != value:
                fault = f"topic {self._settings.topic!r} has {name}={configs[name]}, a log needs {value}"
                raise SettingsError(fault, operation="open log", place=self._place, hint="name a new topic and let tokentape create it")
        retention_ms = int(configs["retention.ms"])
        return min(ENTRY_BYTES_MAX, int(configs["max.message.bytes"]) - _OVERHEAD_BYTES), None if retention_ms < 0 else retention_ms / 1000

    def _ask(self, operation: str, call: Callable[..., _Answer], *args: object) -> _Answer:
        """Call until it succeeds, fails for good, or the time is up."""
        asked_at = time.monotonic()
        while True:
            try:
                with self._lock, mapped(operation, self._place):
                    return call(*args)
            except LogUnavailable as problem:
                if isinstance(problem.__cause__, kafka_errors.UnknownTopicOrPartitionError) and time.monotonic() > asked_at + _GONE_S:
                    raise self._changed(f"topic {self._settings.topic!r} is gone") from problem
                if not passes(problem.__cause__) or time.monotonic() > asked_at + self._settings.timeout_s:
                    raise
            time.sleep(_RETRY_S)

    def _changed(self, fault: str) -> LogChanged:
        hint = "name the right topic, or `tokentape rebuild` to index the new one"
        return LogChanged(fault, operation="use log", place=self._place, hint=hint)


def remove_topics(settings: LogSettings, names: Sequence[str]) -> None:
    """Remove topics that were made to be thrown away, if they are there.

    Raises:
        LogUnavailable: no broker answers, or this client may not.
    """
    with mapped("remove topics", settings.bootstrap_servers):
        client = started(KafkaAdminClient, settings)
        try:
            for name in names:
                with contextlib.suppress(kafka_errors.UnknownTopicOrPartitionError):
                    client.delete_topics([name], timeout_ms=_ms(settings))
        finally:
            client.close()


def abandon(producer: KafkaProducer) -> None:
    """Stop a producer that failed from sending later what it still holds."""
    # `close(timeout=0)` raises before it stops the sender, because there is something to flush.
    producer._sender.force_close()
    producer._sender.join(CLOSE_S)
    producer.close(timeout=CLOSE_S)


def started(client: Callable[..., _Client], settings: LogSettings, **options: Any) -> _Client:
    """A client of kafka-python. Raises its errors, after closing what it leaves open when no broker answers."""
    networks: list[KafkaNetClient] = []

    def network(**configs: Any) -> KafkaNetClient:
        networks.append(KafkaNetClient(**configs))
        return networks[-1]

    try:
        return client(**_connection(settings), kafka_client=network, **options)
    except BaseException:
        # Its thread would go on connecting for ever: a broker that is away for long would cost a thread per try.
        for left in networks:
            left.close()
        raise


def _connection(settings: LogSettings) -> dict[str, Any]:
    return {
        "bootstrap_servers": [server.strip() for server in settings.bootstrap_servers.split(",")],
        "request_timeout_ms": _ms(settings),
        "bootstrap_timeout_ms": _ms(settings),
        "reconnect_backoff_max_ms": RECONNECT_MS_MAX,
    }


def place(settings: LogSettings) -> str:
    """Where a topic is, for error messages."""
    return f"{settings.bootstrap_servers}/{settings.topic}"


@contextlib.contextmanager
def mapped(operation: str, where: str) -> Iterator[None]:
    """Turn errors of kafka-python into those of tokentape."""
    try:
        yield
    except kafka_errors.KafkaError as problem:
        raise _from_kafka(problem, operation, where) from problem
    except (OSError, ValueError, AssertionError) as problem:
        hint = "log.bootstrap_servers is host:port[,host:port]"
        raise LogUnavailable(str(problem), operation=operation, place=where, hint=hint) from problem


def passes(problem: BaseException | None) -> bool:
    """Whether an error of kafka-python may go away by itself; of those that a restart brings the client calls some final."""
    passing = (kafka_errors.UnknownBrokerIdError, kafka_errors.BrokerNotAvailableError)
    return isinstance(problem, passing) or getattr(problem, "retriable", False)


_SETTINGS_FAULTS = (
    kafka_errors.InvalidReplicationFactorError,
    kafka_errors.InvalidPartitionsError,
    kafka_errors.InvalidTopicError,
    kafka_errors.PolicyViolationError,
    kafka_errors.InvalidConfigurationError,
    kafka_errors.KafkaConfigurationError,
)


def _from_kafka(problem: kafka_errors.KafkaError, operation: str, where: str) -> TokentapeError:
    fault = str(problem) or type(problem).__name__
    if isinstance(problem, _SETTINGS_FAULTS):
        return SettingsError(fault, operation=operation, place=where, hint="see log.topic, log.partitions and log.replication")
    if isinstance(problem, kafka_errors.AuthorizationError):
        return LogUnavailable(fault, operation=operation, place=where, hint="this client lacks a right on the topic, group or cluster")
    if isinstance(problem, kafka_errors.UnknownTopicOrPartitionError):
        return LogUnavailable(fault, operation=operation, place=where, hint="record something first: that makes the topic")
    return LogUnavailable(fault, operation=operation, place=where, hint="is the broker up? see log.bootstrap_servers")


def _ms(settings: LogSettings) -> int:
    return max(1, int(settings.timeout_s * 1000))
