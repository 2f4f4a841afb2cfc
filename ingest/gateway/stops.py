"""The stopped requests of one gateway worker: held here, decided by anyone, told on the tape.

A stop is in the control log before it is on the tape, and its release is on the tape before it leaves the control log: so
whatever dies in between, another worker finds what was stopped and records what became of it (`ingest.gateway.orphans`).
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import structlog

from ingest.debug import commands
from ingest.debug.breakpoints import Breakpoint, Breakpoints
from ingest.debug.facts import Readable, RequestFacts, messages_of
from ingest.gateway import errors
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Exchange, Headers
from ingest.gateway.headers import tags_of
from ingest.gateway.held import Decision, Edit, Held, Limits, Read
from ingest.gateway.switchboard import Switchboard
from ingest.gateway.tape import Recording, Tape
from schemas import clock
from schemas.errors import TokentapeError, UsageError
from schemas.events import BreakpointHit, BreakpointReleased, EditContent, ReleaseContent, RequestEdited
from schemas.requests import dump
from schemas.settings import Settings
from store.control import ControlLog, ControlView

log = structlog.get_logger(__name__)

TICK_S = 0.2
"""How often deadlines and keep-alives are looked at."""
WRITE_WAIT_S = 2.0
"""How long a stop or a release waits for control log and recorder; after that it goes on, and they follow."""
REMEMBERED_MAX = 1000
"""Decided requests that this worker remembers, to tell a second person who was first."""
_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

R = TypeVar("R", bound=Readable)


def now() -> float:
    """The clock of deadlines and keep-alives, in seconds."""
    return time.monotonic()


@dataclass(eq=False)
class _Stop:
    """A held request with what belongs to it: its exchange, its tape, and its fact in the control log."""

    held: Held
    tape: Tape
    exchange: Exchange
    fact: dict[str, Any]
    told: asyncio.Event = field(default_factory=asyncio.Event)  # the hit is on the tape: commands may be carried out
    registered: bool = False


class Stops:
    """Stops requests at breakpoints and lets them go. Use from one event loop, between `start` and `close`."""

    def __init__(self, settings: Settings, recorder: Recording, control: ControlLog, shared: ControlView) -> None:
        self.settings = settings.debug
        self.switchboard = Switchboard(control, shared, recorder, settings.debug.answer_timeout_s)
        self._body_bytes_max = settings.gateway.body_bytes_max
        self._recorder = recorder
        self._rules = Breakpoints()
        self._stops: dict[str, _Stop] = {}
        self._decided: OrderedDict[str, Decision] = OrderedDict()
        self._ending = False
        shared.listen(self._rules.listen)

    async def start(self) -> None:
        """Begin to answer commands and to keep deadlines."""
        await self.switchboard.start(self.act, self.holds)
        self._ticking = asyncio.create_task(self._tick_for_ever())

    def end(self) -> None:
        """The gateway is to stop: nobody can decide any more, so what is stopped fails as the rest does."""
        self._ending = True
        for stop in list(self._stops.values()):
            stop.exchange.abort(_stopping())

    async def close(self) -> None:
        """Let go; after the last exchange has ended."""
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)
        await self.switchboard.close()

    # Stopping

    async def pass_by(self, exchange: Exchange, tape: Tape, request: R, read: Read, headers: Headers, key: str | None) -> R:
        """The request as it goes upstream: at once where no breakpoint means it, else once it was decided.

        A client that streams gets `headers` and comments meanwhile. `read` is the endpoint's reader, which judges edits;
        `key` names the API key.

        Raises:
            Failure: it was refused.
        """
        if not self._rules:
            return request
        user = exchange.header("x-tokentape-user") or request.fields.get("user")
        tags = tags_of(exchange, lambda text: text)
        facts = RequestFacts(request, endpoint=exchange.scope["path"], tags=tags, key=key, user=user)
        rule = self._rules.first(facts)
        if rule is None:
            return request
        stop = self._stop(rule, exchange, tape, request, read, facts)
        return cast("R", await self._hold(stop, request.stream and exchange.shape.waiting != b"", headers))

    def _stop(self, rule: Breakpoint, exchange: Exchange, tape: Tape, request: Readable, read: Read, facts: RequestFacts) -> _Stop:
        deadline_s = rule.deadline_s or self.settings.deadline_s
        action = rule.default_action or self.settings.default_action
        rule = rule.model_copy(update={"deadline_s": deadline_s, "default_action": action})
        limits = Limits(now(), deadline_s, self.settings.keepalive_s, self._body_bytes_max)
        held = Held(tape.name, rule, request, read, limits)
        return _Stop(held, tape, exchange, self._fact(held, tape, facts))

    def _fact(self, held: Held, tape: Tape, facts: RequestFacts) -> dict[str, Any]:
        """What everybody may know about a stopped request: nothing of its content."""
        context, at = tape.session.context, clock.now_s()
        return {
            "worker": self.switchboard.worker.worker_id,
            "session": str(uuid.UUID(bytes=context.session_id)),
            "tenant": context.tenant,
            "retention_class": context.retention_class,
            "content": context.content,
            "actor": context.actor,
            "breakpoint": held.rule.breakpoint_id,
            "stopped_at": at,
            "deadline_at": at + (held.rule.deadline_s or 0),
            "default_action": held.rule.default_action,
            "endpoint": facts["endpoint"],
            "model": tape.clean(facts["model"]),
            "stream": facts["stream"],
            "messages": len(messages_of(held.request.fields)),
            "tags": [tape.clean(tag) for tag in facts["tags"]],
            "key": facts["key"],
            "edits": 0,
            "outcome": None,
        }

    async def _hold(self, stop: _Stop, stream: bool, headers: Headers) -> Readable:
        """Hold a request until it is decided, and record all of it."""
        held = stop.held
        full = len(self._stops) >= self.settings.stopped_max
        self._stops[held.generation] = stop
        try:
            if full:
                self._expire(stop, f"{self.settings.stopped_max} requests were stopped already")
            else:
                await self._register(stop)
            self._tell_hit(stop)
            await self._durable()
            stop.told.set()
            if self._ending:
                stop.exchange.abort(_stopping())
            if stream:
                stop.exchange.answer(200, [*_EVENT_STREAM, *headers])
            await self._until_decided(held, stop.exchange if stream else None)
        except BaseException:
            self._cut_short(stop)
            raise
        finally:
            self._remember(stop)
        return await self._let_go(stop)

    async def _until_decided(self, held: Held, stream: Exchange | None) -> None:
        while held.decision is None:
            if stream is not None:
                with suppress(TimeoutError):  # a client that does not read keeps nobody from deciding
                    async with asyncio.timeout(WRITE_WAIT_S):
                        await stream.write(stream.shape.waiting)
            await held.wait()

    async def _let_go(self, stop: _Stop) -> Readable:
        """The release is durable, then known to all; then the request goes on, or fails."""
        decision = self._tell_release(stop)
        try:
            await self._durable()
        finally:
            settled = self._settle(stop, decision)
        await asyncio.wait([settled], timeout=WRITE_WAIT_S)
        if decision.goes_on:
            return stop.held.request
        why = f": {decision.reason}" if decision.reason else "."
        raise Failure(errors.REFUSED, f"The request was refused at a breakpoint{why}")

    def _cut_short(self, stop: _Stop) -> None:
        """The exchange was ended while the request was stopped: by its client, or with the gateway."""
        held, aborted = stop.held, stop.exchange.aborted
        if held.decision is None and aborted is not None and aborted.fault is errors.CLIENT_DISCONNECTED:
            held.decide("abandoned", "client", "the client hung up", goes_on=False)
        elif held.decision is None:
            held.decide("lost", "gateway", "the gateway stopped while the request was stopped", goes_on=False)
        assert held.decision is not None
        self._settle(stop, self._tell_release(stop) if stop.told.is_set() else held.decision)

    def _remember(self, stop: _Stop) -> None:
        """It is held no more; who comes now is told how it was decided."""
        del self._stops[stop.held.generation]
        if stop.held.decision is not None:
            self._decided[stop.held.generation] = stop.held.decision
        if len(self._decided) > REMEMBERED_MAX:
            self._decided.popitem(last=False)

    # Telling

    def _tell_hit(self, stop: _Stop) -> None:
        rule = stop.held.rule
        hit = BreakpointHit(
            breakpoint_id=rule.breakpoint_id,
            generation_id=stop.tape.generation_id,
            deadline_us=round((rule.deadline_s or 0) * 1_000_000),
            default_action=rule.default_action,
        )
        stop.tape.note(hit, "gateway")

    def _tell_edit(self, stop: _Stop, edit: Edit) -> None:
        tape = stop.tape
        content = EditContent(patch=tape.clean(dump(edit.patch).decode()) or "[]", reason=tape.clean(edit.reason))
        event = RequestEdited(
            generation_id=tape.generation_id,
            edit_id=edit.edit_id,
            undo_of=edit.undo_of,
            digest_before=tape.session.digest(edit.before.body),
            digest_after=tape.session.digest(edit.after.body),
            content=content,
        )
        tape.note(event, edit.actor)

    def _tell_release(self, stop: _Stop) -> Decision:
        held, decision = stop.held, stop.held.decision
        assert decision is not None
        content = ReleaseContent(reason=stop.tape.clean(decision.reason)) if decision.reason else None
        released = BreakpointReleased(
            breakpoint_id=held.rule.breakpoint_id, generation_id=stop.tape.generation_id, action=decision.action, content=content
        )
        stop.tape.note(released, decision.actor)
        return decision

    async def _durable(self) -> None:
        """Wait a moment for the recorder; a log that is away keeps nobody stopped."""
        try:
            async with asyncio.timeout(WRITE_WAIT_S):
                await self._recorder.durable()
        except (TimeoutError, TokentapeError) as error:
            log.warning("a stop is not durable yet", error=str(error))

    async def _register(self, stop: _Stop) -> None:
        written = self.switchboard.write(commands.STOPPED, stop.held.generation, stop.fact)
        await asyncio.wait([written], timeout=WRITE_WAIT_S)
        stop.registered = True

    def _settle(self, stop: _Stop, decision: Decision) -> asyncio.Future[bool]:
        """Say to all how it was decided."""
        if not stop.registered:
            nothing: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            nothing.set_result(True)
            return nothing
        return self.switchboard.write(commands.STOPPED, stop.held.generation, {**stop.fact, "outcome": decision.document()})

    # Deadlines

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        """Look at every deadline and keep-alive once."""
        at = now()
        for stop in list(self._stops.values()):
            if stop.held.decision is None and stop.held.tick(at):
                self._expire(stop, f"nobody decided within {stop.held.rule.deadline_s:g} s")

    def _expire(self, stop: _Stop, why: str) -> None:
        goes_on = stop.held.rule.default_action == "release"
        stop.held.decide("expired", "gateway", f"{why}: {'released' if goes_on else 'refused'} by default", goes_on=goes_on)

    # Commands

    def known(self) -> dict[str, dict[str, Any]]:
        """The facts of all stopped requests, by generation: those of this worker as they are, whether or not all know them."""
        own = {generation: stop.fact for generation, stop in self._stops.items()}
        return {**self.switchboard.stopped(), **own}

    def holds(self, generation: str) -> bool:
        """Whether this worker is the one to ask about a request."""
        return generation in self._stops or generation in self._decided

    async def act(self, generation: str, command: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a command on a request that this worker holds: a verb of `commands.VERBS`, `actor` and what it takes.

        Raises:
            ConflictError: decided already; says by whom.
            UsageError: the command, or the edit that it makes, is not valid.
        """
        stop = self._stops.get(generation)
        if stop is None:
            raise commands.too_late(generation, self._decided[generation].document())
        await stop.told.wait()
        verb, actor, reason = command.get("verb"), str(command.get("actor") or "somebody"), command.get("reason")
        if reason is not None and not isinstance(reason, str):
            raise UsageError("a reason is a text", operation="decide")
        if verb == "show":
            return {**stop.fact, **stop.held.document(stop.tape.clean)}
        if verb == "edit":
            return await self._edited(stop, stop.held.edit(command.get("patch"), actor, reason, _version(command)))
        if verb == "undo":
            return await self._edited(stop, stop.held.undo(actor, reason))
        if verb == "release":
            return stop.held.release(actor, reason).document()
        if verb == "refuse":
            return stop.held.decide("refused", actor, reason, goes_on=False).document()
        raise UsageError(f"unknown command {verb!r}", operation="decide", hint=f"valid: {', '.join(commands.VERBS)}")

    async def _edited(self, stop: _Stop, edit: Edit) -> dict[str, Any]:
        """An edit is on the tape before its author is told that it was accepted."""
        self._tell_edit(stop, edit)
        stop.fact["edits"] = len(stop.held.edits)
        if stop.registered:
            self.switchboard.write(commands.STOPPED, stop.held.generation, dict(stop.fact))
        await self._durable()
        return {**edit.document(), "version": len(stop.held.edits)}


def _version(command: Mapping[str, Any]) -> int | None:
    version = command.get("version")
    if version is not None and (not isinstance(version, int) or isinstance(version, bool)):
        raise UsageError("version is a number: how many edits you have seen", operation="edit")
    return version


def _stopping() -> Failure:
    return Failure(errors.SHUTDOWN, "The gateway is stopping.")
