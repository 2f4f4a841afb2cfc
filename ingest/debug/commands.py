"""What travels through the control log about stopped requests: the request's own fact, commands to its worker, answers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from schemas.errors import AlreadyExists, ConflictError, TokentapeError, Unavailable, UnknownName, UsageError

STOPPED = "stopped"
"""Kind of facts that are stopped requests, by generation id; one that was decided has an `outcome` for a while."""

COMMAND, ANSWER = "command", "answer"
"""Kinds of facts that are a question to the worker that holds a request, and what it says; the key is one random id."""

SETTLED_S = 600.0
"""How long a decided request is still known, so that a second person is told who was first."""

LEFT_OVER_S = 120.0
"""Commands and answers of this age were left behind by somebody who died."""

VERBS = ("show", "edit", "undo", "release", "refuse")

NAME_DIGITS_MIN = 4
"""Digits by which a stopped request may be named, from either end of its id."""


def find(stopped: Mapping[str, Mapping[str, Any]], name: str) -> tuple[str, Mapping[str, Any]]:
    """The stopped request of an id, or of a beginning or an end of one that no other has.

    Raises:
        UnknownName: none, or several.
    """
    wanted = name.strip().lstrip("…").replace("-", "").lower()
    found = [key for key in stopped if key.replace("-", "") == wanted] or [
        key for key in stopped if len(wanted) >= NAME_DIGITS_MIN and _named(key.replace("-", ""), wanted)
    ]
    if len(found) == 1:
        return found[0], stopped[found[0]]
    fault = f"{len(found)} stopped requests are called {name!r}" if found else f"no stopped request is called {name!r}"
    hint = "give more of the id" if found else "list them with: tokentape stopped"
    raise UnknownName(fault, operation="find stopped request", hint=hint)


def _named(digits: str, wanted: str) -> bool:
    return digits.startswith(wanted) or digits.endswith(wanted)


def check_open(generation: str, fact: Mapping[str, Any]) -> None:
    """Raise if a request was decided already.

    Raises:
        ConflictError: says by whom, when and how.
    """
    if outcome := fact.get("outcome"):
        raise too_late(generation, outcome)


def too_late(generation: str, outcome: Mapping[str, Any]) -> ConflictError:
    """Somebody else was first."""
    how = {"as_is": "released as it was", "edited": "released as edited", "abandoned": "given up by its client"}
    action = str(outcome.get("action"))
    fault = f"request …{generation[-8:]} was {how.get(action, action)} by {outcome.get('actor') or 'somebody'} at {outcome.get('time')}"
    return ConflictError(fault, operation="decide", hint="its session shows what became of it: tokentape sessions")


def nobody_answered(generation: str, seconds: float) -> Unavailable:
    """The worker that holds a request is silent."""
    fault = f"no gateway worker answered for request …{generation[-8:]} within {seconds:g} s"
    hint = "is the gateway up? `tokentape stopped` says which worker holds it; after a restart the tape says what became of it"
    return Unavailable(fault, operation="ask", hint=hint)


def result_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker answered.

    Raises:
        TokentapeError: the command failed there.
    """
    if "error" in answer:
        raise error_from(answer["error"])
    return dict(answer["result"])


def said(at: float) -> str:
    """A moment as people read it."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def error_document(error: TokentapeError) -> dict[str, Any]:
    """An error as an answer carries it."""
    kind = next(name for name, known in _ERRORS.items() if isinstance(error, known))
    return {"kind": kind, "fault": error.fault, "operation": error.operation, "place": error.place, "hint": error.hint}


def error_from(document: Mapping[str, Any]) -> TokentapeError:
    """The error of an answer."""
    known = _ERRORS.get(str(document.get("kind")), TokentapeError)
    texts = {name: str(document.get(name) or "") for name in ("operation", "place", "hint")}
    return known(str(document.get("fault")), **texts)


_ERRORS: dict[str, type[TokentapeError]] = {
    "exists": AlreadyExists,
    "conflict": ConflictError,
    "unknown": UnknownName,
    "usage": UsageError,
    "unavailable": Unavailable,
    "error": TokentapeError,
}
"""Errors by what an answer calls them; the first that fits."""
