"""What all tests share: the real services, and settings of both deployments.

Services are started when the first test asks for one and stopped at the end of the run. A run that finds
``TOKENTAPE_SERVICES`` (the path of a state.json of scripts/services.py) uses those and leaves them running.
"""

from __future__ import annotations

import os
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import SecretStr

from schemas.settings import ColdSettings, LogSettings, Settings
from scripts.native.component import Address
from scripts.native.processes import ServiceError
from scripts.services import Services, load

for _name in [name for name in os.environ if name.startswith("TOKENTAPE_") and name not in ("TOKENTAPE_SERVICES", "TOKENTAPE_CACHE")]:
    del os.environ[_name]  # settings of the person who runs the tests are not settings of the tests
_shared_state = os.environ.pop("TOKENTAPE_SERVICES", None)
_background = pytest.StashKey["_Background"]()


@dataclass(frozen=True)
class _Service:
    """A service as tests see it; only a private one may be stopped and started, at the same address and with its data."""

    name: str
    address: Address
    services: Services | None = field(default=None, repr=False)

    def stop(self) -> None:
        """End the process; data, port and credentials stay."""
        self._own().stop(self.name)

    def start(self) -> None:
        """Start it again at the same address; returns when it answers."""
        self._own().start(self.name)

    def _own(self) -> Services:
        if self.services is None:
            raise RuntimeError(f"this {self.name} is shared; a test that stops it takes {self.name}_private")
        return self.services


class KafkaService(_Service):
    """Apache Kafka, one node."""

    @property
    def bootstrap_servers(self) -> str:
        """Address for clients."""
        return self.address["bootstrap_servers"]


class MinioService(_Service):
    """MinIO, plain HTTP."""

    @property
    def endpoint(self) -> str:
        """``host:port``."""
        return self.address["endpoint"]

    @property
    def access_key(self) -> str:
        """User of the root account of this instance."""
        return self.address["access_key"]

    @property
    def secret_key(self) -> str:
        """Password of the root account of this instance."""
        return self.address["secret_key"]


class VllmService(_Service):
    """vLLM on the CPU with the tiny model."""

    @property
    def url(self) -> str:
        """Base URL without /v1."""
        return self.address["url"]

    @property
    def model(self) -> str:
        """Name of the served model."""
        return self.address["model"]

    @property
    def model_dir(self) -> Path:
        """Folder of the served model."""
        return Path(self.address["model_dir"])


class _Background(threading.Thread):
    """Starts vLLM, which takes two minutes, while the tests that do not need it run.

    The thread lives as long as the service: the kernel ties a process to the thread that started it.
    """

    def __init__(self, state: Path) -> None:
        super().__init__(name="vllm-start", daemon=True)
        self.services = Services(state, say=self._say_while_wanted, tied=True)
        self.failure: BaseException | None = None
        self._settled = threading.Event()
        self._over = threading.Event()

    def run(self) -> None:
        try:
            self.services.up(["vllm"])
            self._settled.set()
            self._over.wait()
        except BaseException as error:
            self.failure = error
        finally:
            self._settled.set()
            self.services.down()

    def address(self) -> Address:
        """Wait until the service answers; raises what kept it from it."""
        self._settled.wait()
        if self.failure is not None:
            raise self.failure
        return self.services.address("vllm")

    def finish(self) -> None:
        """Stop the service, also one that is still starting, and wait until it is gone."""
        self._over.set()
        self.join()

    def _say_while_wanted(self, line: str) -> None:
        """Pass progress on; an interrupted run leaves a start that takes minutes at its next progress line."""
        if self._over.is_set():
            raise ServiceError("no longer wanted")
        _say(line)


def _say(line: str) -> None:
    """Progress of the services goes past pytest's capture, since a silent wait looks like a hang."""
    print(f"[services] {line}", file=sys.__stderr__, flush=True)


def _shared(name: str) -> Address | None:
    """Address of a service that runs already, when the caller named a state file that has it."""
    return load(Path(_shared_state)).get(name) if _shared_state else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need vLLM come last, so that its start overlaps with the others."""
    items.sort(key=_needs_vllm)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to start vLLM when a selected test needs it and nobody lent one."""
    if session.config.option.collectonly or _shared("vllm") or not any(map(_needs_vllm, session.items)):
        return
    factory: pytest.TempPathFactory = session.config._tmp_path_factory  # type: ignore[attr-defined]  # fixtures do not exist yet
    background = _Background(factory.mktemp("vllm"))
    session.config.stash[_background] = background
    background.start()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave nothing running, also when the run was interrupted."""
    background = session.config.stash.get(_background, None)
    if background is not None:
        background.finish()


def _needs_vllm(item: pytest.Item) -> bool:
    return "vllm" in getattr(item, "fixturenames", ())


def _started(name: str, factory: pytest.TempPathFactory) -> Iterator[tuple[Address, Services]]:
    services = Services(factory.mktemp(name), say=_say, tied=True)
    try:
        yield services.up([name])[name], services
    finally:
        services.down()


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaService]:
    """One Kafka for the whole run; tests keep apart by the names of their topics."""
    lent = _shared("kafka")
    if lent:
        yield KafkaService("kafka", lent)
        return
    for address, _ in _started("kafka", tmp_path_factory):
        yield KafkaService("kafka", address)


@pytest.fixture(scope="session")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioService]:
    """One MinIO for the whole run; tests keep apart by the names of their buckets."""
    lent = _shared("minio")
    if lent:
        yield MinioService("minio", lent)
        return
    for address, _ in _started("minio", tmp_path_factory):
        yield MinioService("minio", address)


@pytest.fixture(scope="session")
def vllm(request: pytest.FixtureRequest) -> VllmService:
    """One vLLM for the whole run, stopped with the session."""
    lent = _shared("vllm")
    if lent:
        return VllmService("vllm", lent)
    return VllmService("vllm", request.config.stash[_background].address())


@pytest.fixture(scope="module")
def kafka_private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaService]:
    """A Kafka of this module's own, which its tests may stop and start."""
    for address, services in _started("kafka", tmp_path_factory):
        yield KafkaService("kafka", address, services)


@pytest.fixture(scope="module")
def minio_private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioService]:
    """A MinIO of this module's own, which its tests may stop and start."""
    for address, services in _started("minio", tmp_path_factory):
        yield MinioService("minio", address, services)


def distributed(data: Path, kafka: KafkaService, minio: MinioService) -> Settings:
    """Settings of the distributed deployment with a topic, a group and a bucket that nobody else has."""
    mark = uuid.uuid4().hex[:12]
    return Settings(
        data=data,
        log=LogSettings(kind="kafka", bootstrap_servers=kafka.bootstrap_servers, topic=f"events.{mark}", group=f"indexer.{mark}"),
        cold=ColdSettings(
            kind="minio",
            endpoint=minio.endpoint,
            bucket=f"tokentape-{mark}",
            access_key=minio.access_key,
            secret_key=SecretStr(minio.secret_key),
        ),
    )


@pytest.fixture
def settings_embedded(tmp_path: Path) -> Settings:
    """Settings of the embedded deployment in a fresh data directory."""
    return Settings(data=tmp_path / "data")


@pytest.fixture
def settings_distributed(tmp_path: Path, kafka: KafkaService, minio: MinioService) -> Settings:
    """Settings of the distributed deployment; topic and bucket are made by the backends that open them."""
    return distributed(tmp_path / "data", kafka, minio)


@pytest.fixture(params=["embedded", "distributed"])
def deployment(request: pytest.FixtureRequest) -> Settings:
    """Settings of each deployment in turn: a test of the pipeline that takes this runs against both."""
    settings: Settings = request.getfixturevalue(f"settings_{request.param}")
    return settings
