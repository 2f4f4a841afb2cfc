"""Debug mode over HTTP, under `/api/v1`: breakpoints, and the requests that stopped at them; errors are RFC 9457 problems.

Where keys are required, one with the role of a debugger opens it, and so does `debug.token`. Without either only this
machine may ask, and no web page may ask for it: a request that a browser made for another site, or that a proxy passed on,
is refused.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from ingest.debug import breakpoints, commands, workers
from ingest.debug.desk import check_known, listed, new_breakpoint, waiting
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Exchange
from ingest.gateway.local import from_here
from ingest.gateway.parts import Parts
from ingest.gateway.problems import PROBLEM_JSON, Problem, problem_document, status_of
from schemas.errors import TokentapeError, Unavailable, UsageError
from schemas.requests import dump, load

log = structlog.get_logger(__name__)

PREFIX = "/api/v1/"
ACTOR_CHARACTERS_MAX = 200

_PROBLEM = (b"content-type", PROBLEM_JSON.encode())
_JSON = (b"content-type", b"application/json")


async def debug_api(parts: Parts, exchange: Exchange) -> None:
    """Serve one request under `PREFIX`."""
    try:
        exchange.scope["actor"] = await _admit(parts, exchange)
        status, answer = await _route(parts, exchange)
        await exchange.respond(status, dump(answer) if answer is not None else b"", [_JSON] if answer is not None else [])
    except Problem as problem:
        await _refuse(exchange, problem.status, problem.detail, problem.hint, problem.allow)
    except Failure as failure:
        await _refuse(exchange, failure.status, failure.message, "")
    except TokentapeError as error:
        await _refuse(exchange, status_of(error), str(error), error.hint)
    except Exception as error:
        log.exception("debug API failed")
        await _refuse(exchange, 500, f"unexpected {type(error).__name__}", "the gateway's log says where")


async def _refuse(exchange: Exchange, status: int, detail: str, hint: str, allow: str = "") -> None:
    problem = problem_document(status, detail, hint, exchange.scope["path"])
    headers = [_PROBLEM, *([(b"www-authenticate", b"Bearer")] if status == 401 else []), *([(b"allow", allow.encode())] if allow else [])]
    await exchange.respond(status, dump(problem), headers)


# Who may ask


async def _admit(parts: Parts, exchange: Exchange) -> str:
    """Who asks.

    Raises:
        Problem: somebody who may not decide about other people's requests.
        Failure: keys are required, and this one is not valid or lacks the role of a debugger.
    """
    token, named = parts.settings.debug.token, exchange.header("x-tokentape-user") or "somebody"
    if token is not None:
        given = (exchange.header("authorization") or "").removeprefix("Bearer ")
        if hmac.compare_digest(given.encode(), token.get_secret_value().encode()):
            return f"api:{named[:ACTOR_CHARACTERS_MAX]}"
    if parts.settings.gateway.auth == "required":
        return f"key:{(await parts.keyring.require(exchange, 'debugger')).owner}"
    if token is not None:
        raise Problem(401, "the debug API needs its token", "send Authorization: Bearer with the value of debug.token")
    if not from_here(exchange.header, exchange.client):
        raise Problem(403, "without a token only this machine may use the debug API", "set debug.token")
    return f"api:{named[:ACTOR_CHARACTERS_MAX]}"


def _actor(exchange: Exchange) -> str:
    """Who decides: the key's owner, or whoever the caller says."""
    return str(exchange.scope["actor"])


# What may be asked

Answer = tuple[int, Any]
Act = Callable[[Parts, Exchange, str], Awaitable[Answer]]


async def _route(parts: Parts, exchange: Exchange) -> Answer:
    """The answer of `/api/v1/<collection>[/<name>[/<verb>]]`."""
    words = exchange.scope["path"].removeprefix(PREFIX).strip("/").split("/")
    shape = (words[0], len(words) > 1, words[2] if len(words) > 2 else "")
    acts = _ROUTES.get(shape) if len(words) <= 3 else None
    if acts is None:
        raise Problem(404, f"nothing is served at {exchange.scope['path'][:200]}", "there are /api/v1/breakpoints and /api/v1/stopped")
    act = acts.get(exchange.scope["method"])
    if act is None:
        raise Problem(405, f"this takes {' or '.join(acts)}, not {exchange.scope['method']}", allow=", ".join(acts))
    return await act(parts, exchange, words[1] if len(words) > 1 else "")


async def _document(exchange: Exchange) -> dict[str, Any]:
    """The JSON object in the body; nothing is an empty one."""
    body = await exchange.body()
    if not body:
        return {}
    kind = (exchange.header("content-type") or "").partition(";")[0].strip()
    if kind not in ("application/json", "application/json-patch+json"):
        raise Problem(415, f"a body of type {kind or 'unknown'}", "send content-type: application/json")
    try:
        document = load(body)
    except ValueError as error:
        raise UsageError(f"the body is not valid JSON: {error}", operation="read request", hint="send one JSON object") from error
    if kind == "application/json-patch+json":
        return {"patch": document}
    if not isinstance(document, dict):
        raise UsageError("the body is not a JSON object", operation="read request", hint="send one JSON object")
    return document


async def _list_breakpoints(parts: Parts, exchange: Exchange, name: str) -> Answer:
    found = listed(parts.shared.latest(breakpoints.KIND))
    return 200, {"breakpoints": [known.document() for known in found]}


async def _add_breakpoint(parts: Parts, exchange: Exchange, name: str) -> Answer:
    document = await _document(exchange)
    made = new_breakpoint(document, _actor(exchange), parts.shared.latest(breakpoints.KIND))
    await _write(parts, made.breakpoint_id, made.document())
    return 201, made.document()


async def _show_breakpoint(parts: Parts, exchange: Exchange, name: str) -> Answer:
    check_known(name, parts.shared.latest(breakpoints.KIND))
    return 200, parts.shared.get(breakpoints.KIND, name)


async def _remove_breakpoint(parts: Parts, exchange: Exchange, name: str) -> Answer:
    check_known(name, parts.shared.latest(breakpoints.KIND))
    await _write(parts, name, None)
    return 204, None


async def _write(parts: Parts, name: str, value: dict[str, Any] | None) -> None:
    """Returns when this worker has read it back, as the others do."""
    if not await parts.stops.switchboard.write(breakpoints.KIND, name, value):
        raise Unavailable("the control log does not answer", operation="write breakpoint", hint="try again when it is back")
    await parts.stops.switchboard.caught_up(breakpoints.KIND, name, value)


async def _list_stopped(parts: Parts, exchange: Exchange, name: str) -> Answer:
    settled = b"settled" in exchange.scope["query_string"]
    return 200, {"stopped": waiting(parts.stops.known(), parts.shared.latest(workers.KIND), settled=settled)}


def _command(verb: str, status: int = 200) -> Act:
    """A command to the worker that holds the request, which may be this one."""

    async def act(parts: Parts, exchange: Exchange, name: str) -> Answer:
        document = await _document(exchange)
        taken = {"patch", "reason", "version"} if verb == "edit" else {"reason"}
        if strangers := sorted(document.keys() - taken):
            raise UsageError(f"unknown field {strangers[0]!r}", operation=verb, hint=f"valid: {', '.join(sorted(taken))}")
        generation, fact = commands.find(parts.stops.known(), name)
        commands.check_open(generation, fact)
        arguments = {**document, "actor": _actor(exchange)}
        if parts.stops.holds(generation):
            return status, await parts.stops.act(generation, {"verb": verb, **arguments})
        return status, await parts.stops.switchboard.ask(generation, verb, arguments)

    return act


_ROUTES: dict[tuple[str, bool, str], dict[str, Act]] = {
    ("breakpoints", False, ""): {"GET": _list_breakpoints, "POST": _add_breakpoint},
    ("breakpoints", True, ""): {"GET": _show_breakpoint, "DELETE": _remove_breakpoint},
    ("stopped", False, ""): {"GET": _list_stopped},
    ("stopped", True, ""): {"GET": _command("show")},
    ("stopped", True, "edits"): {"POST": _command("edit", 201)},
    ("stopped", True, "undo"): {"POST": _command("undo", 201)},
    ("stopped", True, "release"): {"POST": _command("release")},
    ("stopped", True, "refuse"): {"POST": _command("refuse")},
}
"""By collection, whether a name follows, and the verb after it."""
