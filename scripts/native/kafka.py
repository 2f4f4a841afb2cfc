"""Apache Kafka in KRaft mode: one node, on 127.0.0.1 only."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from scripts.native import tools
from scripts.native.component import Address, Launch
from scripts.native.tools import Say

PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{client},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{client}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
num.network.threads=2
num.io.threads=4
num.recovery.threads.per.data.dir=1
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
"""
"""One node: every factor is 1; the internal topics have one partition because a broker opens each at every start."""

API_VERSIONS = struct.pack(">hhih", 18, 0, 1, -1)
"""An ApiVersions request, version 0, correlation id 1, null client id: the one request that every broker answers."""


class Kafka:
    """The broker and its controller in one Java process of 512 MB heap."""

    name = "kafka"
    patience_s = 120.0
    grace_s = 20.0
    ports: tuple[str, ...] = ("client", "controller")

    def configure(self, home: Path, ports: Mapping[str, int], say: Say) -> Address:
        """Write server.properties and format the data folder when it is new."""
        libs = tools.kafka_jars(say)
        properties = home / "server.properties"
        data = home / "data"
        properties.write_text(PROPERTIES.format(client=ports["client"], controller=ports["controller"], data=data), encoding="utf-8")
        if not (data / "meta.properties").exists():
            storage = [tools.java(say), "-Xmx128m", "-cp", f"{libs}/*", "kafka.tools.StorageTool"]
            cluster = tools.run([*storage, "random-uuid"], cwd=home).split()[-1]
            tools.run([*storage, "format", "-t", cluster, "-c", str(properties)], cwd=home)
        return {"bootstrap_servers": f"127.0.0.1:{ports['client']}", "libs": str(libs)}

    def launch(self, home: Path, address: Address, say: Say) -> Launch:
        """One JVM; a small heap, and the first compiler tier only, which halves the time to start."""
        options = ["-Xmx512m", "-XX:+UseG1GC", "-XX:TieredStopAtLevel=1", "-Djava.awt.headless=true"]
        argv = [tools.java(say), *options, "-cp", f"{address['libs']}/*", "kafka.Kafka", str(home / "server.properties")]
        return Launch(argv=argv, env=dict(os.environ))

    def ready(self, address: Address) -> bool:
        """Whether the broker answers an ApiVersions request without an error."""
        host, port = address["bootstrap_servers"].split(":")
        try:
            with socket.create_connection((host, int(port)), timeout=2) as connection:
                connection.sendall(struct.pack(">i", len(API_VERSIONS)) + API_VERSIONS)
                answer = _receive(connection, 10)
        except OSError:
            return False
        return len(answer) == 10 and struct.unpack(">iih", answer)[1:] == (1, 0)

    def warm(self, address: Address) -> None:
        """Nothing: the first request is as fast as any."""


def _receive(connection: socket.socket, size: int) -> bytes:
    """Read exactly ``size`` bytes, fewer when the peer closes."""
    received = b""
    while len(received) < size and (piece := connection.recv(size - len(received))):
        received += piece
    return received
