"""One stopped request: what was asked, each edit of it, and the one decision. Nothing here waits or writes."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ingest.debug.breakpoints import Breakpoint
from ingest.debug.commands import said, too_late
from ingest.debug.facts import Readable
from schemas import clock
from schemas.errors import ConflictError, UsageError
from schemas.patch import Operation, apply_patch, diff, read_patch
from schemas.requests import dump
from schemas.sink import new_id

Action = Literal["as_is", "edited", "refused", "expired", "abandoned", "lost"]
Read = Callable[[bytes], Readable]

REASON_CHARACTERS_MAX = 2000
EDITS_MAX = 1000
"""Edits of one request, undone ones included."""


@dataclass(frozen=True)
class Edit:
    """One accepted edit; an undo is one too, and names the edit that it takes back."""

    edit_id: bytes
    actor: str
    at: float
    reason: str | None
    patch: list[Operation]
    before: Readable
    after: Readable
    undo_of: bytes | None = None

    def document(self) -> dict[str, Any]:
        """The edit as JSON types, without the requests."""
        return {
            "edit_id": str(uuid.UUID(bytes=self.edit_id)),
            "actor": self.actor,
            "at": self.at,
            "reason": self.reason,
            "patch": self.patch,
            "undo_of": str(uuid.UUID(bytes=self.undo_of)) if self.undo_of else None,
        }


@dataclass(frozen=True)
class Decision:
    """How a stop ended. `goes_on`: whether the request is forwarded; `time` is for people."""

    action: Action
    actor: str
    goes_on: bool
    reason: str | None = None
    at: float = 0.0

    def document(self) -> dict[str, Any]:
        """The outcome as others are told."""
        return {"action": self.action, "actor": self.actor, "at": self.at, "time": said(self.at), "forwarded": self.goes_on}


@dataclass(frozen=True)
class Limits:
    """What a stop may last, in seconds of the stops' clock, and how large a request may become."""

    begun: float
    deadline_s: float
    keepalive_s: float
    body_bytes_max: int


class Held:
    """A request that waits at a breakpoint. Use from the gateway's event loop."""

    def __init__(self, generation: str, rule: Breakpoint, request: Readable, read: Read, limits: Limits) -> None:
        """`read` is the endpoint's reader of bodies, which judges edits."""
        self.generation = generation
        self.rule = rule
        self.submitted = self.request = request
        self.edits: list[Edit] = []
        self.decision: Decision | None = None
        self._standing: list[Edit] = []
        self._read = read
        self._limits = limits
        self._quiet_until = limits.begun + limits.keepalive_s
        self._wake = asyncio.Event()

    # Waiting

    async def wait(self) -> None:
        """Return at a decision, or when the client is to hear that it is not forgotten."""
        await self._wake.wait()
        self._wake.clear()

    def tick(self, now: float) -> bool:
        """The time is `now`: whether the deadline has come. A client that has waited long is woken for."""
        if now >= self._quiet_until:
            self._quiet_until = now + self._limits.keepalive_s
            self._wake.set()
        return now >= self._limits.begun + self._limits.deadline_s

    # Editing

    def edit(self, patch: Any, actor: str, reason: str | None, version: int | None = None) -> Edit:
        """Change the request; it stays as it was where the edit is refused. `version` is how many edits its author had seen.

        Raises:
            UsageError: the patch is malformed, does not apply, or makes the request invalid; says which.
            ConflictError: decided already, or edited by somebody else meanwhile.
        """
        self._check_open()
        if version is not None and version != len(self.edits):
            newer = version < len(self.edits)
            fault = f"edited meanwhile by {self.edits[-1].actor}" if newer else f"it was edited {len(self.edits)} times, not {version}"
            raise ConflictError(fault, operation="edit", hint="look at it again, then edit")
        if len(self.edits) >= EDITS_MAX:
            raise UsageError(f"edited {EDITS_MAX} times already", operation="edit", hint="release or refuse it")
        try:
            operations = read_patch(patch)
            document = apply_patch(self.request.fields, operations)
        except ValueError as error:
            raise UsageError(str(error), operation="edit", hint="the request stays stopped as it was") from error
        after = self._valid(document)
        return self._made(Edit(new_id(), actor, clock.now_s(), _short(reason), operations, self.request, after), standing=True)

    def undo(self, actor: str, reason: str | None) -> Edit:
        """Take back the last edit that stands.

        Raises:
            UsageError: none stands.
            ConflictError: decided already.
        """
        self._check_open()
        if not self._standing:
            raise UsageError("there is no edit to undo", operation="undo", hint="the request is as it was submitted")
        last = self._standing.pop()
        patch = diff(self.request.fields, last.before.fields)
        made = Edit(new_id(), actor, clock.now_s(), _short(reason), patch, self.request, last.before, last.edit_id)
        return self._made(made, standing=False)

    def _made(self, edit: Edit, *, standing: bool) -> Edit:
        self.edits.append(edit)
        self.request = edit.after
        if standing:
            self._standing.append(edit)
        return edit

    def _valid(self, document: Any) -> Readable:
        """The request of an edited document, read as the client's own was."""
        hint = "the request stays stopped as it was"
        if not diff(self.request.fields, document):
            raise UsageError("the edit changes nothing", operation="edit", hint=hint)
        body = dump(document)
        if len(body) > self._limits.body_bytes_max:
            fault = f"the edited request has {len(body)} bytes, over the limit of {self._limits.body_bytes_max}"
            raise UsageError(fault, operation="edit", hint=hint)
        try:
            after = self._read(body)
        except UsageError as error:
            raise UsageError(
                f"the edit makes the request invalid: {error.fault}", operation="edit", place=error.place, hint=hint
            ) from error
        if after.stream != self.request.stream:
            fault = "an edit cannot change stream: the client waits for the kind of answer that it asked for"
            raise UsageError(fault, operation="edit", place="stream", hint=hint)
        if self.request.model is not None and after.model is None:
            raise UsageError("the edit makes the request invalid: model must be a text", operation="edit", place="model", hint=hint)
        return after

    # Deciding

    def decide(self, action: Action, actor: str, reason: str | None, *, goes_on: bool) -> Decision:
        """End the stop.

        Raises:
            ConflictError: somebody else was first; says who.
        """
        self._check_open()
        self.decision = Decision(action, actor, goes_on, _short(reason), clock.now_s())
        self._wake.set()
        return self.decision

    def release(self, actor: str, reason: str | None) -> Decision:
        """Let it go as it stands, which is as it was submitted if no edit stands."""
        return self.decide("edited" if self._standing else "as_is", actor, reason, goes_on=True)

    def _check_open(self) -> None:
        if self.decision is not None:
            raise too_late(self.generation, self.decision.document())

    # Showing

    def document(self, clean: Callable[[str | None], str | None]) -> dict[str, Any]:
        """All of it for one who looks, `clean` taking secrets out of texts."""
        return {
            "generation": self.generation,
            "breakpoint": self.rule.document(),
            "submitted": _clean(self.submitted, clean),
            "request": _clean(self.request, clean),
            "edits": [edit.document() for edit in self.edits],
            "version": len(self.edits),
            "digest": hashlib.sha256(self.request.body).hexdigest(),
        }


def _clean(request: Readable, clean: Callable[[str | None], str | None]) -> str:
    """The request's JSON text without secrets; text, because not every document that is taken in can be written as JSON again."""
    return clean(dump(request.fields).decode()) or "{}"


def _short(reason: str | None) -> str | None:
    return reason.strip()[:REASON_CHARACTERS_MAX] or None if reason else None
