"""A topic that tokentape wrote is read by others: Kafka's own console consumer gets the bytes, Java Avro gets the fields."""

from __future__ import annotations

import io
import json
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastavro
import pytest

from schemas.codec import decode_datum, encode
from schemas.events import PAYLOADS, Event
from schemas.registry import CURRENT, SchemaRegistry
from schemas.settings import Settings
from scripts.native import tools
from store.log import open_log
from store.log.base import Entry, partition_of
from tests.conftest import KafkaService
from tests.strategies import sample
from tests.tape import incident

SOURCE = Path(__file__).parents[1] / "scripts" / "java" / "ReadEvents.java"
SCHEMA = Path(__file__).parents[1] / "schemas" / "event.avsc"
MARK = "--4711-end-of-record--"
"""Between records on the console; values are bytes and may hold a line's end."""


class Java:
    """Java with Kafka's jars, Avro, and the reader compiled."""

    def __init__(self, classes: Path) -> None:
        self._program = tools.java(print)
        jars = [*tools.reader_jars(print).glob("*.jar"), *tools.kafka_jars(print).glob("*.jar")]
        self._path = ":".join(map(str, [classes, *jars]))
        compiler = "org.eclipse.jdt.internal.compiler.batch.Main"
        self.run(compiler, "--release", "17", "-cp", self._path, "-d", str(classes), str(SOURCE))

    def run(self, main: str, *arguments: str, stdin: bytes = b"") -> bytes:
        """What a Java program writes to standard output; it must end well."""
        quick = ["-XX:TieredStopAtLevel=1", "-Xshare:auto"]
        ran = subprocess.run([self._program, *quick, "-cp", self._path, main, *arguments], input=stdin, capture_output=True, check=False)
        assert ran.returncode == 0, ran.stderr.decode()[-2000:]
        return ran.stdout

    def read_events(self, framed: Sequence[bytes]) -> list[tuple[bytes, Any]]:
        """Each event as Java's own bytes and as Avro's JSON."""
        stdin = b"".join(struct.pack(">i", len(value)) + value for value in framed)
        lines = self.run("ReadEvents", str(SCHEMA), stdin=stdin).decode().split("\n")[:-1]  # Java leaves U+0085 as it is
        return [(bytes.fromhex(line.partition("\t")[0]), json.loads(line.partition("\t")[2])) for line in lines]


@pytest.fixture(scope="module")
def java(tmp_path_factory: pytest.TempPathFactory) -> Java:
    """Java, ready to read."""
    return Java(tmp_path_factory.mktemp("classes"))


def every_kind() -> list[Event]:
    """Events of every kind: with all fields set to values that somebody gets wrong, with none, and those of an incident."""
    made = [sample(kind, full=full, turn=turn) for kind in sorted(PAYLOADS) for full, turn in ((True, 0), (True, 5), (False, 0))]
    return made + [stored.event for stored in incident().events]


def test_console_consumer_and_java_avro_read_the_topic(settings_distributed: Settings, kafka: KafkaService, java: Java) -> None:
    """Every byte that was appended comes out of Kafka's console consumer, and Java finds in it what our decoder finds."""
    events = every_kind()
    framed = [encode(event) for event in events]
    log = open_log(settings_distributed.log, settings_distributed.data)
    log.append([Entry(partition_of(e.session_id, log.partitions), e.session_id, value) for e, value in zip(events, framed, strict=True)])
    log.close()

    consumed = java.run(
        *("org.apache.kafka.tools.consumer.ConsoleConsumer", "--bootstrap-server", kafka.bootstrap_servers),
        *("--topic", settings_distributed.log.topic, "--from-beginning", "--max-messages", str(len(framed)), "--timeout-ms", "60000"),
        *("--formatter-property", f"line.separator={MARK}"),
    )
    values = consumed.split(MARK.encode())[:-1]

    assert sorted(values) == sorted(framed)

    read = java.read_events(values)
    kinds = {kind for _, event in read for kind in PAYLOADS if event[kind] is not None}

    assert [made for made, _ in read] == values
    assert [_plain(event) for _, event in read] == [_plain(_ours(value)) for value in values]
    assert kinds == set(PAYLOADS)


def _ours(value: bytes) -> Any:
    """What our decoder finds, in Avro's JSON."""
    text = io.StringIO()
    fastavro.json_writer(text, CURRENT.parsed, [decode_datum(value, SchemaRegistry())[0]])
    return json.loads(text.getvalue())


def _plain(value: Any) -> Any:
    """JSON with its numbers written one way: Java gives 32-bit floats in fewer digits, and infinity as a text.

    The bytes, compared as well, show that no digit is lost.
    """
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return f"{value:.6g}"
    return {"Infinity": "inf", "-Infinity": "-inf"}.get(value, value) if isinstance(value, str) else value
