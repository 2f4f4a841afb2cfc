"""Breakpoints: which requests stop, for how long, and what becomes of one that nobody decides about."""

from __future__ import annotations

import fnmatch
import secrets
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ingest.debug.expressions import TEXT_MAX, Expression, read_expression
from schemas.errors import TokentapeError, UsageError
from store.control import ControlRecord

log = structlog.get_logger(__name__)

KIND = "breakpoint"
"""Kind of the control log's facts that are breakpoints; the key is the breakpoint's id."""

DEADLINE_S_MAX = 7 * 24 * 3600.0
"""The longest that a breakpoint may let a request wait: beyond a week no client is there any more."""

Action = Literal["release", "refuse"]
_Short = Annotated[str, Field(min_length=1, max_length=512)]


class Breakpoint(BaseModel):
    """A rule; a request stops where all of its conditions hold, and one without conditions stops everything.

    `model` may hold * and ?. `deadline_s` and `default_action` None are those of the settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    breakpoint_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = Field(default_factory=lambda: f"bp-{secrets.token_hex(4)}")
    tag: _Short | None = None
    model: _Short | None = None
    key: _Short | None = None
    where: Annotated[str, Field(min_length=1, max_length=TEXT_MAX)] | None = None
    deadline_s: Annotated[float, Field(gt=0, le=DEADLINE_S_MAX)] | None = None
    default_action: Action | None = None
    reason: Annotated[str, Field(max_length=2000)] | None = None
    created_by: str = ""
    created_at: float = Field(default_factory=time.time)

    @cached_property
    def expression(self) -> Expression | None:
        """The condition in `where`."""
        return read_expression(self.where) if self.where is not None else None

    def stops(self, facts: Mapping[str, Any]) -> bool:
        """Whether a request of these facts is meant."""
        return (
            (self.tag is None or self.tag in facts["tags"])
            and (self.model is None or fnmatch.fnmatchcase(facts["model"] or "", self.model))
            and (self.key is None or self.key == facts["key"])
            and (self.expression is None or self.expression.holds(facts))
        )

    @property
    def condition(self) -> str:
        """What it stops, in words."""
        named = [("tag", self.tag), ("model", self.model), ("key", self.key), ("where", self.where)]
        return " and ".join(f"{name} {value}" for name, value in named if value is not None) or "everything"

    def document(self) -> dict[str, Any]:
        """The breakpoint as JSON types."""
        return self.model_dump(mode="json")


def read_breakpoint(document: Any) -> Breakpoint:
    """The breakpoint of a document from outside.

    Raises:
        UsageError: a field that is unknown or not valid; says which, and what is valid.
    """
    if not isinstance(document, dict):
        raise UsageError("a breakpoint is a JSON object", operation="read breakpoint", hint='{} stops everything, {"tag": "x"} one tag')
    try:
        found = Breakpoint.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            hint = f"valid: {', '.join(Breakpoint.model_fields)}"
            raise UsageError(f"unknown field {name!r}", operation="read breakpoint", hint=hint) from error
        raise UsageError(f"{name}: {first['msg']}", operation="read breakpoint", hint=_HINTS.get(name, "")) from error
    if found.where is not None:
        read_expression(found.where)
    return found


_HINTS = {
    "breakpoint_id": "a name of letters, digits, _ . and -, 64 at most",
    "default_action": "release or refuse",
    "deadline_s": f"seconds, more than 0 and at most {DEADLINE_S_MAX:.0f}",
}


class Breakpoints:
    """The breakpoints that hold now, as a listener of the control log; the oldest comes first."""

    def __init__(self) -> None:
        self._all: tuple[Breakpoint, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._all)

    def listen(self, record: ControlRecord) -> None:
        """One fact of the control log. A breakpoint that does not read is left out: it was written by another version."""
        if record.kind != KIND:
            return
        others = [known for known in self._all if known.breakpoint_id != record.key]
        if record.value is not None:
            try:
                others.append(read_breakpoint(record.value))
            except TokentapeError as error:
                log.warning("breakpoint left out", breakpoint=record.key, error=str(error))
        self._all = tuple(sorted(others, key=lambda known: (known.created_at, known.breakpoint_id)))

    def first(self, facts: Mapping[str, Any]) -> Breakpoint | None:
        """The oldest breakpoint that stops this request."""
        return next((known for known in self._all if known.stops(facts)), None)
