"""Engines in a Ray cluster: vLLM in actors, one engine each, asked like any other engine from here.

Only calls of an engine travel, ids out and logprobs back. Reading the tape, judging and recording stay in this process, so a
run over actors is resumed, and each session done once, by the very code that runs over servers. Ray Data was rejected: its
operators would hold the sessions and their outcomes, and an actor that dies would have them done again without anybody's knowing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from replay.engines.apart import Done, Elsewhere, Hosted
from replay.engines.base import Engine, Forced
from replay.words import count, shorten
from schemas.errors import EngineUnavailable, TokentapeError, UsageError

LOCAL = "local"
STEP_S = 0.1
"""How long an actor works until it is asked again: what is asked for meanwhile waits, and a question costs a millisecond."""
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
        host = self._ray.remote(num_cpus=1, num_gpus=gpus)(Hosted)
        with self._reached(model):
            hosts = [host.remote() for _ in range(actors)]
        names = [self.answer(asked, model, START_S) for asked in [self.ask(one, model, "load", model, options) for one in hosts]]
        return [
            ActorEngine(self, one, f"{name} in Ray actor {number}") for number, (one, name) in enumerate(zip(hosts, names, strict=True))
        ]

    def ask(self, host: Any, place: str, method: str, *arguments: Any) -> Any:
        """Have an actor's method called: what `answer` waits for.

        Raises:
            EngineUnavailable: the cluster cannot be reached any more, which a client of `ray://` hears here already.
        """
        with self._reached(place):
            return getattr(host, method).remote(*arguments)

    def answer(self, asked: Any, place: str, timeout_s: float | None = None) -> Any:
        """What an actor answers.

        Raises:
            EngineUnavailable: it died, or does not start in time.
            TokentapeError: what its engine raised.
        """
        with self._reached(place):
            answer = self._ray.get(asked, timeout=timeout_s)
        if isinstance(answer, TokentapeError):
            raise answer
        return answer

    @contextmanager
    def _reached(self, place: str) -> Iterator[None]:
        try:
            yield
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            hint = "its log on the node says more; what was compared before stands"
            raise EngineUnavailable(_said(error), operation="ask Ray actor", place=place, hint=hint) from error

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


class ActorEngine(Elsewhere):
    """One actor's engine as seen from here."""

    def __init__(self, cluster: Cluster, host: Any, name: str) -> None:
        super().__init__(name)
        self._cluster, self._host = cluster, host
        self._ahead: Any = None

    def step(self) -> Done:
        """See `Continuous.step`. The actor has the next one before it ends this one: it waits for nobody between them."""
        asked, self._ahead = self._ahead or self._ask("step", STEP_S), None
        ahead = self._ask("step", STEP_S)
        done: Done = self._cluster.answer(asked, self.name)
        self._ahead = ahead
        return done

    def close(self) -> None:
        """The actor ends with its cluster's connection."""

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._cluster.answer(self._ask("call", method, *arguments), self.name)

    def _begin(self, name: int, forced: Forced) -> None:
        self._ask("begin", name, forced)

    def _ask(self, method: str, *arguments: Any) -> Any:
        return self._cluster.ask(self._host, self.name, method, *arguments)


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
