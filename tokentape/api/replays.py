"""A replay as a job: step and fast tell the state at a moment, compare has an engine of today score what was said."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import Field

from ingest.gateway.problems import Problem
from replay.compare import run_compare
from replay.engines.base import Engine
from replay.fold import Until
from replay.player import Player, at_breakpoint, at_trouble
from replay.sections import session_document
from schemas.errors import ConflictError, EngineUnavailable, UsageError
from store.rows import StoredEvent
from tokentape.api.routing import Call, Reply, Taken
from tokentape.api.work import Work
from tokentape.engines import IN_PROCESS, calibrations, made_engine
from tokentape.installation import Installation


class Surroundings(Taken):
    """How the engine is set up: the name under which it serves the model, and options of an engine of this process."""

    model: str | None = Field(default=None, max_length=200)
    options: dict[str, str] = Field(default={})


class Replayed(Taken):
    """How to replay. `compare_with` is an upstream of the gateway by its URL or name, `recorded` (the tape itself), or `vllm:MODEL`."""

    mode: Literal["step", "fast", "compare"] = "compare"
    environment: Surroundings = Surroundings()
    compare_with: str | None = Field(default=None, max_length=400)
    strict: bool = False
    to: str | None = Field(default=None, max_length=64, description="step, fast: an event's id, #POSITION, a time, breakpoint or failure.")


def replay(call: Call) -> Reply:
    """Begin a replay; what comes of it is the job's result."""
    asked: Replayed = call.body
    installation = call.desks.installation
    call.desks.freshen()
    session_id, _ = call.desks.gate.session(call.principal, call.ids["id"])
    events = call.desks.tape(session_id).events
    call.rows = len(events)
    if asked.mode == "compare":
        engine = _engine_name(call, asked, installation)

        def act(work: Work) -> Any:
            return _compare(work, installation, events, engine, asked)
    else:

        def act(work: Work) -> Any:
            return _play(work, events, asked)

    work = call.desks.works.begin(f"replay {asked.mode}", call.ids["id"], call.principal, act)
    return Reply(work.document(), 202, {"location": f"/api/v1/jobs/{work.work_id}"})


def _engine_name(call: Call, asked: Replayed, installation: Installation) -> str | None:
    """The engine's URL. Only an admin makes this machine call another address or load a model.

    Raises:
        Problem: another engine than those that are set up, asked for by somebody else.
    """
    upstreams = {name: known.url for known in installation.settings.gateway.every_upstream for name in (known.name, known.url)}
    wanted = asked.compare_with
    if wanted in (None, "recorded"):
        return wanted
    if wanted in upstreams:
        return upstreams[wanted]
    if "admin" not in call.principal.roles:
        hint = f"valid for you: recorded, {', '.join(sorted(upstreams))}"
        raise Problem(403, "only an admin may name another engine than those that are set up", hint)
    if not wanted.startswith((IN_PROCESS, "http://", "https://")):
        raise UsageError(f"{wanted!r} is no engine", operation="replay", hint="a URL, vllm:MODEL, recorded, or the name of an upstream")
    return wanted


def _compare(work: Work, installation: Installation, events: list[StoredEvent], name: str | None, asked: Replayed) -> Any:
    player = Player(events)
    state = player.step(len(player))
    work.total = sum(1 for generation in state.generations.values() for sequence in generation.sequences if sequence.tokens)
    options = tuple(f"{key}={value}" for key, value in asked.environment.options.items())
    engine = made_engine(installation, name, asked.environment.model, options, state if name == "recorded" else None)
    try:
        outcome = run_compare(
            events,
            cast(Engine, _Cancellable(engine, work)),
            installation.recorder,
            strict=asked.strict,
            actor=work.principal.name,
            calibrations=calibrations(installation),
            on_sequence=lambda *_: work.step(),
        )
    finally:
        engine.close()
    if outcome.refused:
        raise ConflictError("the environment differs from the recorded one", operation="replay strict", hint="without strict it goes on")
    return outcome.document()


def _play(work: Work, events: list[StoredEvent], asked: Replayed) -> Any:
    """Where the session stands when the replay stops; step tells each event on the way too."""
    player = Player(events)
    work.total = len(player)
    stops = {"breakpoint": at_breakpoint, "failure": at_trouble}
    until = Until.parse(asked.to) if asked.to and asked.to not in stops else None
    if asked.mode == "fast":
        stop = player.fast(stops.get(asked.to or ""), until=until)
        if asked.to in stops and stop.reason != "condition":
            raise UsageError(f"the session has no {asked.to}", operation="replay fast", hint="its timeline shows what it has")
        work.step(player.position)
        return {"position": player.position, "of": len(player), "stopped": stop.reason, **session_document(player.state)}
    goal = Player(events)
    goal.fast(stops.get(asked.to or ""), until=until)
    steps = []
    while player.position < goal.position and not work.cancelled.is_set():
        state = player.step()
        played = player.event
        assert played is not None
        steps.append(
            {"position": player.position, "kind": played.event.kind, "tokens": state.tokens, "generations": len(state.generations)}
        )
        work.step()
    return {"position": player.position, "of": len(player), "steps": steps, **session_document(player.state)}


class _Cancellable:
    """An engine that is gone once its job is cancelled: what was judged before is recorded, the rest is inconclusive."""

    def __init__(self, engine: Engine, work: Work) -> None:
        self._engine = engine
        self._work = work

    def __getattr__(self, name: str) -> Any:
        if self._work.cancelled.is_set() and name != "name":
            raise EngineUnavailable("the replay was cancelled", operation="replay", hint="begin it again")
        return getattr(self._engine, name)
