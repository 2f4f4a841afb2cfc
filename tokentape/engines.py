"""The engine that a command names: a URL, `vllm:MODEL` for one in this process, or `recorded` for the tape itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from ingest.gateway.upstream import without_credentials
from replay.calibration import Calibrations
from replay.engines.apart import Apart
from replay.engines.base import Engine
from replay.engines.cluster import Cluster
from replay.engines.loading import parsed_options
from replay.engines.openai import OpenAIEngine
from replay.engines.recorded import RecordedEngine
from replay.engines.vllm import VllmEngine
from replay.state import SessionState
from schemas.errors import UsageError
from tokentape.commands.weights import fetched
from tokentape.installation import Installation
from tokentape.supervisor import running

IN_PROCESS = "vllm:"


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options by which a command is told its engine."""
    options = (
        click.option(
            "--engine",
            metavar="URL|vllm:MODEL",
            help="A running vLLM, or one of this process (a folder or s3://…); `recorded` is the tape.  [default: the gateway's upstream]",
        ),
        click.option(
            "--engine-option", "options", multiple=True, metavar="NAME=VALUE", help="vllm: an engine argument, e.g. dtype=float32."
        ),
        click.option("--model", help="URL: the name under which that engine serves the model, if it is another than recorded."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def open_engine(
    installation: Installation,
    engine: str | None,
    model: str | None,
    options: Iterable[str],
    state: SessionState | None = None,
    *,
    batch: bool = False,
) -> Engine:
    """The engine, closed with the installation. `state` is what `recorded` answers from; in a `batch` others go first,
    and vLLM gets a process of its own.

    Raises:
        UsageError: it cannot be, or vLLM does not start.
    """
    made = made_engine(installation, engine, model, tuple(options), state, batch=batch)
    installation.closing(made.close)
    return made


def _folder(installation: Installation, model: str) -> str:
    """A model that lies in a store is fetched before the engine starts."""
    return str(fetched(installation.settings, model)) if model.startswith("s3://") else model


def calibrations(installation: Installation) -> Calibrations:
    """What was measured of engines."""
    return Calibrations(installation.settings.data / "calibrations")


def made_engine(
    installation: Installation,
    engine: str | None,
    model: str | None,
    options: tuple[str, ...],
    state: SessionState | None,
    *,
    batch: bool = False,
) -> Engine:
    """The same, for one who closes it.

    Raises:
        UsageError: as `open_engine`.
    """
    if engine and engine.startswith(IN_PROCESS):
        if model:
            raise UsageError(
                "--model is for engines behind a URL, vllm: names its own", operation="read --engine", hint="leave --model out"
            )
        digests = installation.settings.data / "digests.json"
        folder = _folder(installation, engine.removeprefix(IN_PROCESS))
        return (Apart if batch else VllmEngine)(folder, options=parsed_options(options), digests=digests)
    if options:
        raise UsageError(
            "--engine-option is for vllm:MODEL only", operation="read --engine", hint="a running server has its options already"
        )
    if engine == "recorded":
        if state is None:
            raise UsageError("the tape is no engine to calibrate", operation="read --engine", hint="name a URL or vllm:MODEL")
        return RecordedEngine(state)
    gateway = installation.settings.gateway
    url = engine or _upstream(installation)
    secret = next((entry.key for entry in gateway.every_upstream if entry.url == url), gateway.upstream_key)
    made = OpenAIEngine(url, model=model, api_key=secret.get_secret_value() if secret else None, background=batch)
    made.check_model()
    return made


def _upstream(installation: Installation) -> str:
    """What the gateway that runs here forwards to, for it may have been started with other settings; else what the settings say."""
    own = installation.settings.gateway.every_upstream[0].url
    told = next((part["upstream"].split(", ")[0] for part in running(installation.settings.data) if part.get("upstream")), None)
    return own if told is None or told == without_credentials(own) else str(told)


def open_cluster(
    installation: Installation, address: str, actors: int | None, engines: tuple[str, ...], options: Iterable[str]
) -> list[Engine]:
    """Engines in actors of a Ray cluster, ended with the installation.

    Raises:
        UsageError: Ray is not installed, the cluster has no room, or vLLM does not start there.
        EngineUnavailable: the cluster does not answer.
    """
    if len(engines) != 1 or not engines[0].startswith(IN_PROCESS):
        fault = "--ray needs one --engine vllm:MODEL, which each actor loads"
        raise UsageError(fault, operation="read --ray", hint="servers behind URLs need no Ray: repeat --engine URL")
    cluster = Cluster(address)
    installation.closing(cluster.close)
    return cluster.engines(engines[0].removeprefix(IN_PROCESS), parsed_options(options), actors)
