"""Kafka and MinIO through a container engine, where one answers; the addresses come out as those of native processes."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.native.component import Address
from scripts.native.tools import ROOT, run

SERVICES = ("kafka", "minio")


def available() -> bool:
    """Whether a Docker engine answers and the compose plugin is there."""
    if not shutil.which("docker"):
        return False
    probes = (["docker", "info"], ["docker", "compose", "version"])
    return all(subprocess.run(probe, capture_output=True, check=False).returncode == 0 for probe in probes)


def project(state: Path) -> str:
    """Name of the compose project of a state directory."""
    return f"tokentape-{hashlib.sha256(str(state).encode()).hexdigest()[:10]}"


def address(name: str, ports: Mapping[str, int]) -> Address:
    """The address that ``name`` will have, with new credentials where it has some."""
    if name == "kafka":
        return {"bootstrap_servers": f"127.0.0.1:{ports['client']}"}
    return {"endpoint": f"127.0.0.1:{ports['client']}", "access_key": f"tt{secrets.token_hex(8)}", "secret_key": secrets.token_urlsafe(32)}


def variables(addresses: Mapping[str, Address]) -> dict[str, str]:
    """The variables of docker-compose.yml that give the services these addresses."""
    kafka = addresses.get("kafka", {}).get("bootstrap_servers", "127.0.0.1:9092")
    minio = addresses.get("minio", {"endpoint": "127.0.0.1:9000", "access_key": "unused", "secret_key": "unused-unused"})
    return {
        "KAFKA_PORT": kafka.rpartition(":")[2],
        "S3_PORT": minio["endpoint"].rpartition(":")[2],
        "S3_ACCESS_KEY": minio["access_key"],
        "S3_SECRET_KEY": minio["secret_key"],
    }


def call(state: Path, addresses: Mapping[str, Address], *arguments: str) -> None:
    """Run ``docker compose`` on the project of ``state``; raises ServiceError with the last line that it said."""
    command: Sequence[str] = ["docker", "compose", "-p", project(state), "-f", str(ROOT / "docker-compose.yml"), *arguments]
    run(command, cwd=ROOT, env={**os.environ, **variables(addresses)})
