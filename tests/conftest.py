"""What all tests share: the real services, and settings of both deployments.

Services are started when the first test asks for one and stopped at the end of the run. A run that finds
``TOKENTAPE_SERVICES`` (the path of a state.json of scripts/services.py) uses those and leaves them running.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from schemas.settings import ColdSettings, LogSettings, Settings
from scripts.native.component import Address
from scripts.services import Services, load
from tests.lender import Lender, borrow, lend, say, want
from tests.tiered import Tiered, tiered

# A failed assertion of a shared case says what it compared, as in a test's own file.
_helpers = {f"tests.{path.stem}" for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("test_")}
pytest.register_assert_rewrite(*sorted(_helpers - sys.modules.keys()))

for _name in [name for name in os.environ if name.startswith("TOKENTAPE_") and name not in ("TOKENTAPE_SERVICES", "TOKENTAPE_CACHE")]:
    del os.environ[_name]  # settings of the person who runs the tests are not settings of the tests
_shared_state = os.environ.pop("TOKENTAPE_SERVICES", None)

# Engines of several tests share few cores with the tests: threads that wait for one another by spinning would take most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
_loans = pytest.StashKey[Path]()
_lender = pytest.StashKey[Lender]()


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


def _leads(config: pytest.Config) -> bool:
    """Is this the process that leads the run, and not a worker of pytest-xdist?"""
    return not hasattr(config, "workerinput")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Have somebody who starts services; workers are told where to ask."""
    config = session.config
    if not _leads(config):
        config.stash[_loans] = Path(config.workerinput["loans"])  # type: ignore[attr-defined]  # xdist's
        return
    factory: pytest.TempPathFactory = config._tmp_path_factory  # type: ignore[attr-defined]  # fixtures do not exist yet
    config.stash[_loans] = factory.mktemp("services")
    if _shared_state:
        for name, address in load(Path(_shared_state)).items():
            lend(config.stash[_loans], name, address)
    config.stash[_lender] = Lender(config.stash[_loans])
    config.stash[_lender].start()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist where services are asked for."""
    node.workerinput["loans"] = str(node.config.stash[_loans])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that need vLLM come last, so that its start overlaps with the others."""
    late = {item.path for item in items if _needs_vllm(item)}
    items.sort(key=lambda item: (item.path in late, _needs_vllm(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to start vLLM, which takes two minutes, when a selected test needs it."""
    if not session.config.option.collectonly and any(map(_needs_vllm, session.items)):
        want(session.config.stash[_loans], "vllm")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave nothing running, also when the run was interrupted."""
    lender = session.config.stash.get(_lender, None)
    if lender is not None:
        lender.finish()


def _needs_vllm(item: pytest.Item) -> bool:
    return "vllm" in getattr(item, "fixturenames", ())


def _borrowed(request: pytest.FixtureRequest, name: str) -> Address:
    return borrow(request.config.stash[_loans], name)


def _started(name: str, factory: pytest.TempPathFactory) -> Iterator[tuple[Address, Services]]:
    services = Services(factory.mktemp(name), say=say, tied=True)
    try:
        yield services.up([name])[name], services
    finally:
        services.down()


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest) -> KafkaService:
    """One Kafka for the whole run; tests keep apart by the names of their topics."""
    return KafkaService("kafka", _borrowed(request, "kafka"))


@pytest.fixture(scope="session")
def minio(request: pytest.FixtureRequest) -> MinioService:
    """One MinIO for the whole run; tests keep apart by the names of their buckets."""
    return MinioService("minio", _borrowed(request, "minio"))


@pytest.fixture(scope="session")
def vllm(request: pytest.FixtureRequest) -> VllmService:
    """One vLLM for the whole run."""
    return VllmService("vllm", _borrowed(request, "vllm"))


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


@pytest.fixture
def rig(deployment: Settings) -> Iterator[Tiered]:
    """An installation from log to cold, of both deployments in turn; files about other parts have a `rig` of their own."""
    with tiered(deployment) as made:
        yield made


@pytest.fixture
def local(settings_embedded: Settings) -> Iterator[Tiered]:
    """That of the embedded deployment, for what does not depend on it."""
    with tiered(settings_embedded) as made:
        yield made
