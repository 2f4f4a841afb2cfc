"""Recorded engine runs: steps over time, who shared a step with whom, and what the KV connector found and why not.

They are asked for in SQL, and by the same rule: a caller that is bound to a tenant sees its rows, and steps are nobody's alone.
"""

from __future__ import annotations

import dataclasses
import uuid
from typing import Any

from pydantic import Field

from ingest.gateway import bodies as b
from replay.words import iso
from schemas.errors import UnknownName, UnknownSession
from tokentape.api.query import ANALYSTS
from tokentape.api.routing import Call, Reply, Route, Taken
from tokentape.engineruns import RUNS, kv_report, overview, window


class Steps(Taken):
    """Which steps; without `first` the whole run in stretches."""

    first: int | None = Field(default=None, ge=0, le=2**53)
    limit: int = Field(default=120, ge=1, le=500)


def list_runs(call: Call) -> Reply:
    """The engine runs on the tape, newest first."""
    call.desks.freshen()
    rows = call.desks.installation.sql.query(RUNS, tenant=call.principal.tenant).table.to_pylist()
    call.rows = len(rows)
    return Reply({"runs": rows})


def show_run(call: Call) -> Reply:
    """Steps of one run."""
    asked: Steps = call.query
    run, tenant, installation = _run(call), call.principal.tenant, call.desks.installation
    call.desks.freshen()
    if asked.first is None:
        found = overview(installation, run, tenant)
        call.rows = len(found["step"])
        return Reply({**found, "at": [iso(at) for at in found["at"]]})
    found = window(installation, run, asked.first, asked.limit, tenant)
    call.rows = len(found["steps"])
    steps = [{**row, "at": iso(row["at"])} for row in found["steps"]]
    return Reply({**found, "steps": steps, "sessions": _seen(call, found["sessions"])})


def show_kv(call: Call) -> Reply:
    """How well the KV connector served, request by request."""
    run = _run(call)
    call.desks.freshen()
    found = kv_report(call.desks.installation, str(uuid.UUID(bytes=run)), call.principal.tenant)
    call.rows = len(found.requests)
    return Reply(dataclasses.asdict(found))


def _run(call: Call) -> bytes:
    try:
        return uuid.UUID(call.ids["run"]).bytes
    except ValueError:
        raise UnknownName(f"no engine run {call.ids['run'][:40]!r}", operation="engine run", hint="GET /api/v1/engine-runs") from None


def _seen(call: Call, sessions: dict[str, str]) -> dict[str, str]:
    """Of the sessions of generations those that this caller may look at."""

    def may(session: str) -> bool:
        try:
            call.desks.gate.session(call.principal, session)
        except UnknownSession:
            return False
        return True

    allowed = {session: may(session) for session in set(sessions.values())}
    return {generation: session for generation, session in sessions.items() if allowed[session]}


def _shown(path: str, name: str, summary: str, handle: Any, answer: str, **rest: Any) -> Route:
    return Route("GET", path, name, summary, ANALYSTS, handle, content=True, answer=b.record(answer), **rest)


ROUTES = (
    _shown("/engine-runs", "list_engine_runs", "Recorded runs of engines.", list_runs, "runs"),
    _shown(
        "/engine-runs/{run}",
        "show_engine_run",
        "Steps of one: all in stretches, or some with who was in each.",
        show_run,
        "engine_run",
        query=Steps,
    ),
    _shown("/engine-runs/{run}/kv", "show_kv", "What its KV connector found, and why not.", show_kv, "connector requests"),
)
