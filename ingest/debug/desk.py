"""The desk at which people set breakpoints and decide about stopped requests, from wherever the control log can be reached.

It works without a connection to any gateway: a command goes through the control log to the worker that holds the request.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from ingest.debug import breakpoints, commands, workers
from ingest.debug.breakpoints import Breakpoint, read_breakpoint
from schemas import clock
from schemas.errors import AlreadyExists, TokentapeError, UnknownName
from store.control import ControlLog, Value

Facts = Mapping[str, Value]


class Desk:
    """Breakpoints and stopped requests as one person sees them; `actor` is who that is."""

    def __init__(self, control: ControlLog, actor: str, *, answer_timeout_s: float) -> None:
        self._control = control
        self._actor = actor
        self._answer_timeout_s = answer_timeout_s

    # Breakpoints

    def breakpoints(self) -> list[Breakpoint]:
        """All of them, the oldest first."""
        return listed(self._control.latest(breakpoints.KIND))

    def add(self, document: Mapping[str, Any]) -> Breakpoint:
        """Set a breakpoint; it holds in every worker once they have read it, which takes milliseconds.

        Raises:
            UsageError: a field is not valid.
            AlreadyExists: one has that name.
        """
        made = new_breakpoint(document, self._actor, self._control.latest(breakpoints.KIND))
        self._control.append(breakpoints.KIND, made.breakpoint_id, made.document())
        return made

    def remove(self, name: str) -> None:
        """Take a breakpoint away; what it stopped stays stopped.

        Raises:
            UnknownName: there is none of that name.
        """
        check_known(name, self._control.latest(breakpoints.KIND))
        self._control.append(breakpoints.KIND, name, None)

    # Stopped requests

    def stopped(self, *, settled: bool = False) -> list[dict[str, Any]]:
        """What waits, the oldest first; with `settled` also what was decided in the last minutes."""
        return waiting(self._control.latest(commands.STOPPED), self._control.latest(workers.KIND), settled=settled)

    def ask(self, name: str, verb: str, **arguments: Any) -> dict[str, Any]:
        """Have a command carried out on a stopped request.

        Raises:
            UnknownName: no stopped request is called that.
            ConflictError: it was decided already; says by whom.
            UsageError: the command or its edit is not valid.
            Unavailable: no worker answers.
        """
        generation, fact = commands.find(self._control.latest(commands.STOPPED), name)
        commands.check_open(generation, fact)
        question = uuid.uuid4().hex
        command = {"generation": generation, "verb": verb, "actor": self._actor, "at": clock.now_s(), **arguments}
        position = self._control.append(commands.COMMAND, question, command)
        answer = self._answer(question, position)
        if answer is None:
            self._control.append(commands.COMMAND, question, None)
            raise commands.nobody_answered(generation, self._answer_timeout_s)
        self._control.append(commands.ANSWER, question, None)
        return commands.result_of(answer)

    def _answer(self, question: str, position: int) -> Value | None:
        deadline = time.monotonic() + self._answer_timeout_s
        while (left := deadline - time.monotonic()) > 0:
            for record in self._control.follow(position, wait_s=left):
                position = record.position
                if record.kind == commands.ANSWER and record.key == question and record.value is not None:
                    return record.value
        return None


def listed(facts: Facts) -> list[Breakpoint]:
    """The breakpoints of the control log's facts, the oldest first; what does not read is another version's."""
    found = []
    for value in facts.values():
        try:
            found.append(read_breakpoint(value))
        except TokentapeError:
            continue
    return sorted(found, key=lambda known: (known.created_at, known.breakpoint_id))


def new_breakpoint(document: Any, actor: str, facts: Facts) -> Breakpoint:
    """A breakpoint to be set.

    Raises:
        UsageError: a field is not valid.
        AlreadyExists: one has that name.
    """
    named = {"created_by": actor, "created_at": clock.now_s()}
    given = {name: value for name, value in document.items() if value is not None} if isinstance(document, Mapping) else document
    made = read_breakpoint({**given, **named} if isinstance(given, Mapping) else given)
    if made.breakpoint_id in facts:
        hint = "remove it first, or give this one another name"
        raise AlreadyExists(f"there is a breakpoint {made.breakpoint_id!r} already", operation="add breakpoint", hint=hint)
    return made


def check_known(name: str, facts: Facts) -> None:
    """Raise unless there is a breakpoint of this name.

    Raises:
        UnknownName: there is none.
    """
    if name not in facts:
        there = f"there are: {', '.join(sorted(facts))}" if facts else "there are none"
        raise UnknownName(f"no breakpoint is called {name!r}", operation="find breakpoint", hint=there)


def waiting(stopped: Facts, known: Facts, *, settled: bool = False) -> list[dict[str, Any]]:
    """Stopped requests as rows, the oldest first; `known` are the workers' facts."""
    rows = [_row(generation, fact, known) for generation, fact in stopped.items() if settled or not fact.get("outcome")]
    return sorted(rows, key=lambda row: (row["stopped_at"], row["generation"]))


def _row(generation: str, fact: Mapping[str, Any], known: Facts) -> dict[str, Any]:
    outcome = fact.get("outcome")
    worker = known.get(str(fact.get("worker")))
    gone = worker is None or workers.runs_here(worker) is False
    state = str(outcome["action"]) if outcome else "worker gone" if gone else "stopped"
    return {"generation": generation, "state": state, **fact, "decided_by": outcome.get("actor") if outcome else None}
