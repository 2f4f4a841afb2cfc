"""Engines in a Ray cluster: vLLM in actors, one engine each, asked like any other engine from here.

Only calls of an engine travel, ids out and logprobs back. Reading the tape, judging and recording stay in this process, so a
run over actors is resumed, and each session done once, by the very code that runs over servers. Ray Data was rejected: its
operators would hold the sessions and their outcomes, and an actor that dies would have them done again without anybody's knowing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from replay.engines.base import Engine, Forced, Generated, Refused, Request, Scored
from replay.words import count, shorten
from schemas.errors import EngineUnavailable, TokentapeError, UsageError
from schemas.events import EnvironmentCaptured

LOCAL = "local"
CONNECT_TIMEOUT_S = 10.0
"""A head node that takes longer to connect is none."""
LOCAL_TRIES = 3
"""A cluster in a busy machine may not start within Ray's own 30 s; what it loaded then makes the next try faster."""
START_S = 1800.0
"""An actor that has not loaded its model by then never will: the cluster may have promised its place to others."""
REASON_CHARACTERS = 300
"""Of Ray's own words, what goes into a message."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_agent_register_timeout_ms": "120000"}
"""Variables of a cluster that starts here: it reports to nobody, leaves the devices of actors without GPUs alone, and has patience."""


class Host:
    """What runs in an actor: one engine. Errors are answers, since Ray would wrap them in its own with a stack of text."""

    def __init__(self) -> None:
        self._engine: Engine | None = None

    def load(self, model: str, options: dict[str, Any]) -> str | TokentapeError:
        """Load the model; the engine's name."""
        from replay.engines.vllm import VllmEngine

        try:
            self._engine = VllmEngine(model, options=options)
        except TokentapeError as error:
            return error
        return self._engine.name

    def call(self, method: str, *arguments: Any) -> Any:
        """What the engine's method gives, or the error that it raises."""
        try:
            return getattr(self._engine, method)(*arguments)
        except TokentapeError as error:
            return error


class Cluster:
    """A connection to a Ray cluster.

    Raises:
        UsageError: Ray is not installed here.
        EngineUnavailable: the cluster does not answer.
    """

    def __init__(self, address: str) -> None:
        """`address` as Ray takes it (`auto`, `ray://HOST:PORT`, `HOST:PORT`); `local` starts a cluster in this machine."""
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError as error:
            raise UsageError("Ray is not installed here", operation="read --ray", hint="pip install 'tokentape[ray]'") from error
        self._ray = ray
        _reach(address)
        own: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {"address": address}
        for tries_left in range(LOCAL_TRIES - 1 if address == LOCAL else 0, -1, -1):
            try:
                ray.init(**own, logging_level="ERROR", log_to_driver=False)
                return
            except Exception as error:  # Ray raises the bare class where a node does not start in time
                ray.shutdown()
                if not tries_left:
                    hint = "name a running cluster, or `local` for one in this machine"
                    raise EngineUnavailable(_said(error), operation="join Ray cluster", place=address, hint=hint) from error

    def engines(self, model: str, options: dict[str, Any], actors: int | None) -> list[Engine]:
        """So many engines, loaded at the same time; by default as many as the cluster's GPUs serve, without GPUs one.

        Raises:
            UsageError: the cluster is smaller than that, or vLLM takes no such model or option.
            EngineUnavailable: an actor does not start.
        """
        actors, gpus = room(self._ray.cluster_resources(), options, actors)
        host = self._ray.remote(num_cpus=1, num_gpus=gpus)(Host)
        hosts = [host.remote() for _ in range(actors)]
        names = [self._answer(one.load.remote(model, options), model, START_S) for one in hosts]
        return [
            ActorEngine(self, one, f"{name} in Ray actor {number}") for number, (one, name) in enumerate(zip(hosts, names, strict=True))
        ]

    def _answer(self, asked: Any, place: str, timeout_s: float | None = None) -> Any:
        """What an actor answers.

        Raises:
            EngineUnavailable: it died, or does not start in time.
            TokentapeError: what its engine raised.
        """
        try:
            answer = self._ray.get(asked, timeout=timeout_s)
        except self._ray.exceptions.RayError as error:
            hint = "its log on the node says more; what was compared before stands"
            raise EngineUnavailable(_said(error), operation="ask Ray actor", place=place, hint=hint) from error
        if isinstance(answer, TokentapeError):
            raise answer
        return answer

    def call(self, host: Any, place: str, method: str, *arguments: Any) -> Any:
        """Call a method of an actor's engine.

        Raises:
            EngineUnavailable: the actor died, or its engine fails.
        """
        return self._answer(host.call.remote(method, *arguments), place)

    def close(self) -> None:
        """Leave the cluster, which ends this process's actors; one that was started here ends with it."""
        self._ray.shutdown()


def room(has: dict[str, float], options: dict[str, Any], actors: int | None) -> tuple[int, int]:
    """How many actors, and how many GPUs each, by a cluster's resources.

    Raises:
        UsageError: it is smaller than that.
    """
    gpus = int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1)) if has.get("GPU") else 0
    actors = actors or (max(1, int(has["GPU"]) // gpus) if gpus else 1)
    for what, each in (("GPU", gpus), ("CPU", 1)):
        if actors * each > has.get(what, 0):
            fault = f"{count(actors, 'actor')} of {each} {what} need more than the cluster's {has.get(what, 0):g}"
            raise UsageError(fault, operation="replay-batch --ray", hint="give fewer --actors, or add nodes")
    return actors, gpus


class ActorEngine:
    """One actor's engine as seen from here."""

    def __init__(self, cluster: Cluster, host: Any, name: str) -> None:
        self._cluster, self._host, self._name = cluster, host, name

    @property
    def name(self) -> str:
        """The engine's name and its actor's number."""
        return self._name

    def fingerprint(self, recorded: EnvironmentCaptured | None = None) -> EnvironmentCaptured | None:
        """The environment on the actor's node."""
        found: EnvironmentCaptured | None = self._call("fingerprint", recorded)
        return found

    def generate(self, request: Request) -> Generated | Refused:
        """The answer to a request, generated freely."""
        return self.generate_all([request])[0]

    def force(self, request: Request, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> Scored | Refused:
        """Logprob, rank and top logprob of each token."""
        return self.force_all([Forced(request, prompt_token_ids, token_ids)])[0]

    def render(self, request: Request) -> tuple[int, ...] | Refused:
        """The prompt's ids by the model's own template."""
        found: tuple[int, ...] | Refused = self._call("render", request)
        return found

    def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
        """Answers to several requests, worked on in one batch."""
        found: list[Generated | Refused] = self._call("generate_all", list(requests))
        return found

    def force_all(self, several: Sequence[Forced]) -> list[Scored | Refused]:
        """As `force`, in one batch."""
        found: list[Scored | Refused] = self._call("force_all", list(several))
        return found

    def close(self) -> None:
        """The actor ends with its cluster's connection."""

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._cluster.call(self._host, self._name, method, *arguments)


def _reach(address: str) -> None:
    """Connect once where an address names a port: Ray itself tries a dead one for minutes.

    Raises:
        EngineUnavailable: nobody answers there.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise EngineUnavailable(
            _said(error), operation="join Ray cluster", place=address, hint="name a running cluster, or `local`"
        ) from error


def _said(error: BaseException) -> str:
    """Ray's own words, of which the first line tells what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shorten(lines[0] if lines else type(error).__name__, REASON_CHARACTERS)
