"""Breakpoints and the requests that stopped at them, as the gateway serves them too; this works without a way to any gateway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field
from starlette.responses import Response

from ingest.debug.breakpoints import Breakpoint
from ingest.gateway import bodies as b
from ingest.gateway.keys import Role
from schemas.errors import UnknownName
from tokentape.api.routing import Call, Reply, Route, Taken

DEBUGGERS: frozenset[Role] = frozenset({"debugger"})

_LISTED = Breakpoint.model_json_schema(mode="serialization")


class NewBreakpoint(Taken):
    """Where to stop: all that is given must hold, or everything."""

    breakpoint_id: str | None = Field(default=None, max_length=64)
    tag: str | None = None
    model: str | None = None
    key: str | None = None
    where: str | None = Field(default=None, max_length=4000)
    deadline_s: float | None = Field(default=None, gt=0)
    default_action: str | None = None
    reason: str | None = Field(default=None, max_length=2000)


class Settled(Taken):
    """Which stopped requests."""

    settled: bool = Field(default=False, description="Also what was decided lately.")


class Why(Taken):
    """A decision's reason; it is recorded."""

    reason: str | None = Field(default=None, max_length=2000)


class Edited(Why):
    """A change of a stopped request: an RFC 6902 patch, of the version that its author saw."""

    patch: list[dict[str, Any]] = Field(max_length=1000)
    version: int | None = None


def list_breakpoints(call: Call) -> Reply:
    """All of them, the oldest first."""
    return Reply({"breakpoints": [known.document() for known in call.desks.debug(call.principal).breakpoints()]})


def add_breakpoint(call: Call) -> Reply:
    """Set one."""
    return Reply(call.desks.debug(call.principal).add(call.body.model_dump()).document(), 201)


def show_breakpoint(call: Call) -> Reply:
    """One of them."""
    for known in call.desks.debug(call.principal).breakpoints():
        if known.breakpoint_id == call.ids["name"]:
            return Reply(known.document())
    raise UnknownName(
        f"no breakpoint is called {call.ids['name'][:64]!r}", operation="find breakpoint", hint="GET …/breakpoints lists them"
    )


def remove_breakpoint(call: Call) -> Response:
    """Take one away."""
    call.desks.debug(call.principal).remove(call.ids["name"])
    return Response(status_code=204)


def list_stopped(call: Call) -> Reply:
    """What waits, the oldest first."""
    return Reply({"stopped": call.desks.debug(call.principal).stopped(settled=call.query.settled)})


def _command(verb: str, status: int = 200) -> Callable[[Call], Reply]:
    def act(call: Call) -> Reply:
        arguments = call.body.model_dump(exclude_none=True) if call.body is not None else {}
        call.rows = 1
        return Reply(call.desks.debug(call.principal).ask(call.ids["id"], verb, **arguments), status)

    return act


def _stopped(method: str, path: str, name: str, summary: str, verb: str, answer: b.Schema, **rest: Any) -> Route:
    status = rest.get("status", 200)
    return Route(method, f"/stopped/{{id}}{path}", name, summary, DEBUGGERS, _command(verb, status), answer=answer, content=True, **rest)


_LIST = b.record("breakpoints", breakpoints=b.array(_LISTED))
_STOPPED = b.record("stopped", stopped=b.array(b.STOPPED))

ROUTES = (
    Route("GET", "/breakpoints", "list_breakpoints", "Where requests stop.", DEBUGGERS, list_breakpoints, answer=_LIST),
    Route(
        "POST",
        "/breakpoints",
        "add_breakpoint",
        "Set a breakpoint.",
        DEBUGGERS,
        add_breakpoint,
        body=NewBreakpoint,
        answer=_LISTED,
        status=201,
    ),
    Route("GET", "/breakpoints/{name}", "show_breakpoint", "One breakpoint.", DEBUGGERS, show_breakpoint, answer=_LISTED),
    Route("DELETE", "/breakpoints/{name}", "remove_breakpoint", "Take a breakpoint away.", DEBUGGERS, remove_breakpoint, status=204),
    Route("GET", "/stopped", "list_stopped", "What waits at a breakpoint.", DEBUGGERS, list_stopped, query=Settled, answer=_STOPPED),
    _stopped("GET", "", "show_stopped", "One stopped request and its edits.", "show", b.SHOWN),
    _stopped("POST", "/edits", "edit_stopped", "Change a stopped request.", "edit", b.EDITED, body=Edited, status=201),
    _stopped("POST", "/undo", "undo_edit", "Take the last edit back.", "undo", b.EDITED, body=Why, status=201),
    _stopped("POST", "/release", "release_stopped", "Let a request go.", "release", b.DECIDED, body=Why),
    _stopped("POST", "/refuse", "refuse_stopped", "Answer with an error instead.", "refuse", b.DECIDED, body=Why),
)
