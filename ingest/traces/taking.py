"""Spans on their way to the tape: each call to a model is a generation, in the session of its conversation or else of its trace.

Ids follow from tenant, trace and span, so that a trace that is sent again is on the tape once: what a session has already is left out,
and a request that is repeated to the byte is left out by the index even where nobody could look.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ingest.importing import Owner, Recorded, Strand, entries_of
from ingest.retelling import Bodies, answers_of, entries, request_of
from ingest.traces.conventions import CONVERSATION, USER, call_of, first_of, is_call
from ingest.traces.reading import CLIENT, Span
from schemas import events as e
from schemas.settings import Settings
from store.log.base import Entry, Log
from store.rows import StoredEvent

SESSIONS_KEPT = 2000
"""Sessions of which is kept in memory what they hold, so that the next span of one does not have it read again."""
ERROR_TYPES = {"timeout": "upstream_timeout", "cancelled": "client_disconnected", "invalid_request_error": "invalid_request"}
"""Names of errors that the tape has a name of its own for."""

Look = Callable[[Sequence[bytes]], Mapping[bytes, Sequence[StoredEvent]]]
"""Gives the events that each of some sessions has on the tape; those that are not known are left out."""


@dataclass
class Known:
    """What a session holds."""

    salt: bytes
    bodies: Bodies
    generations: set[bytes]
    opened: bool


@dataclass
class Taken:
    """What came of a request: generations and events by session; how many were there already; spans that are no calls to a model."""

    sessions: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    repeated: int = 0
    aside: int = 0


class Traces:
    """Takes spans in. Safe for threads."""

    def __init__(self, settings: Settings, look: Look) -> None:
        self._settings = settings
        self._look = look
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, Known] = OrderedDict()

    def take(self, spans: Sequence[Span], owner: Owner, log: Log) -> Taken:
        """Write what is new, all of it at once; it is durable when this returns.

        Raises:
            UsageError: a part of a call is no JSON; nothing is written.
            LogUnavailable: the log does not take it; what it took none the less is left out the next time.
        """
        taken = Taken(aside=len(spans) - sum(map(is_call, spans)))
        by_session: dict[bytes, list[tuple[bytes, Span]]] = {}
        for key, span in sorted(_calls(spans).items(), key=lambda item: item[1].start):
            session = _id(owner.tenant, "session", first_of(span, CONVERSATION) or span.trace_id)
            by_session.setdefault(session, []).append((_id(owner.tenant, "generation", *key), span))
        with self._lock:
            self._learn(list(by_session))
            try:
                entries = [entry for session, told in by_session.items() for entry in self._entries(session, told, owner, log, taken)]
                log.append(entries)
            except BaseException:
                for session in by_session:
                    del self._known[session]  # they are said to hold now what the tape may not have
                raise
            while len(self._known) > SESSIONS_KEPT:
                self._known.popitem(last=False)
        return taken

    def _learn(self, sessions: Sequence[bytes]) -> None:
        """Know what these sessions hold, by one look at those that were not met lately."""
        strange = [session for session in sessions if session not in self._known]
        found = self._look(strange) if strange else {}
        for session in sessions:
            if session not in self._known:
                self._known[session] = _known([stored.event for stored in found.get(session, ())])
            self._known.move_to_end(session)

    def _entries(self, session: bytes, told: Sequence[tuple[bytes, Span]], owner: Owner, log: Log, taken: Taken) -> list[Entry]:
        known = self._known[session]
        fresh = [(generation, span) for generation, span in told if generation not in known.generations]
        taken.repeated += len(told) - len(fresh)
        if not fresh:
            return []
        found: list[Recorded] = [] if known.opened else list(_opening(fresh[0][1], owner))
        for generation, span in fresh:
            found += _generation(generation, span, known.bodies)
        names = b"".join(sorted(generation for generation, _ in fresh))
        strand = Strand(session, known.salt, hashlib.sha256(session + names).digest()[:8])
        known.generations |= {generation for generation, _ in fresh}
        known.opened = True
        taken.sessions[session] = len(fresh), len(found)
        return entries_of(found, strand, owner, log=log, settings=self._settings)


def _known(events: Sequence[e.Event]) -> Known:
    payloads = [event.payload for event in events]
    salt = next((event.salt for event in events if event.salt), None) or os.urandom(16)
    generations = {payload.generation_id for payload in payloads if isinstance(payload, e.RequestSubmitted)}
    return Known(salt, Bodies(payloads), generations, bool(events))


def _calls(spans: Iterable[Span]) -> dict[tuple[str, str], Span]:
    """The calls to models by what makes them one; of a generation that tokentape exported as two spans the one of the upstream's call."""
    found: dict[tuple[str, str], Span] = {}
    for span in filter(is_call, spans):
        key = span.trace_id, str(span.attributes.get("tokentape.generation.id") or span.span_id)
        if key not in found or span.kind == CLIENT:
            found[key] = span
    return found


def _id(*names: str) -> bytes:
    """An id that these names always give, as a UUID of version 8."""
    made = bytearray(hashlib.sha256("\0".join(("otlp", *names)).encode()).digest()[:16])
    made[6], made[8] = made[6] & 0x0F | 0x80, made[8] & 0x3F | 0x80
    return bytes(made)


def _opening(span: Span, owner: Owner) -> Iterator[Recorded]:
    service = " ".join(str(span.service[name]) for name in ("service.name", "service.version") if name in span.service)
    workflow = first_of(span, ("gen_ai.workflow.name", "gen_ai.agent.name"))
    yield (
        e.SessionOpened(client=service or None, user=first_of(span, USER), workflow=workflow, tags=list(owner.tags)),
        span.start,
    )
    if owner.visibility is not None:
        yield e.SessionAnnotated(visibility=owner.visibility), span.start


def _generation(generation: bytes, span: Span, bodies: Bodies) -> Iterator[Recorded]:
    """The events of one call, at the times at which they were."""
    call, lasted = call_of(span), span.end - span.start
    first_us = call.first_token_us if call.first_token_us is not None and call.first_token_us <= lasted else None
    yield request_of(generation, call.asked, bodies, trace_id=span.trace_id, client_request_id=span.span_id), span.start
    if call.error_type is None or call.answers:
        started = e.GenerationStarted(
            generation_id=generation,
            authoritative="import",
            upstream_id=call.response_id,
            model=call.response_model,
            status=call.status,
            prompt_tokens=call.prompt_tokens,
        )
        yield started, span.start + (first_us if first_us is not None else lasted)
    for payload in answers_of(generation, call.answers, lasted):
        yield payload, span.end
    recorded = entries(call.answers)
    if call.error_type is not None:
        origin = "client" if call.error_type in ("cancelled", "client_disconnected") else "upstream"
        failed = e.GenerationFailed(
            generation_id=generation,
            error_type=ERROR_TYPES.get(call.error_type, call.error_type if call.error_type in _OURS else "upstream_error"),
            origin=origin,
            status=call.status,
            position=recorded,
            offset_us=lasted,
            content=e.FailureContent(message=call.error),
        )
        yield failed, span.end
        return
    finished = e.GenerationFinished(
        generation_id=generation,
        sequences=len(call.answers),
        tokens_recorded=recorded,
        prompt_tokens=call.prompt_tokens,
        completion_tokens=call.completion_tokens,
        cached_tokens=call.cached_tokens,
        first_token_us=first_us,
        offset_us=lasted,
    )
    yield finished, span.end


_OURS = frozenset(
    (
        *("client_disconnected", "invalid_request", "upstream_unreachable", "upstream_timeout", "upstream_disconnected"),
        *("upstream_error", "upstream_malformed", "shutdown", "overloaded", "model_not_found", "rate_limit_exceeded"),
    )
)
"""Error types that spans of tokentape itself have."""
