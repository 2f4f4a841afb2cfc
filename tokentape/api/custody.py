"""Custody: holds, what retention will do next, erasures by two custodians, proof, and what the ledger covers."""

from __future__ import annotations

import datetime as dt
import uuid
from dataclasses import asdict
from typing import Any

from pydantic import Field
from starlette.responses import Response

from ingest.gateway import bodies as b
from ingest.gateway.keys import Role
from ingest.gateway.problems import Problem
from lifecycle.coverage import coverage_rows
from lifecycle.holds import Holds
from lifecycle.selectors import Selector
from lifecycle.verification import outcome
from schemas.errors import UnknownEvent
from store import views
from store.ledger.rotation import key_rows
from tokentape.api.desk import custodian
from tokentape.api.routing import Call, Reply, Route, Taken
from tokentape.api.sessions import Tag, at_us
from tokentape.api.work import Work
from tokentape.jobs import erasures_of, prover, retention_of, sign, tiering_of, verification

CUSTODIANS: frozenset[Role] = frozenset({"custodian"})
LOOKERS: frozenset[Role] = frozenset({"custodian", "reader", "analyst", "debugger"})
"""Who sees how the tape is kept: no content is in it."""


class Reason(Taken):
    """Why; it is recorded."""

    reason: str = Field(min_length=1, max_length=10_000)


class NewHold(Reason):
    """What to hold: all that is given must be satisfied."""

    sessions: list[str] = Field(default=[], max_length=10_000)
    tenant: str | None = Field(default=None, max_length=100)
    tag: Tag | None = None
    since: dt.datetime | None = None
    until: dt.datetime | None = None


class Subject(Taken):
    """What to forget: sessions, or every session with an event of an actor."""

    sessions: list[str] = Field(default=[], max_length=10_000)
    actor: str | None = Field(default=None, min_length=1, max_length=400)


class NewErasure(Subject, Reason):
    """What to forget, and why."""


class Deep(Taken):
    """How much to verify."""

    shallow: bool = Field(default=False, description="Ledger, signatures and objects only; not every row.")


class Day(Taken):
    """Which part of the log."""

    day: dt.date | None = None


def list_holds(call: Call) -> Reply:
    """The holds that stand. The reason may name people, so only custodians read it."""
    found = Holds(tiering_of(call.desks.installation), call.desks.control).standing()
    if not call.principal.may(CUSTODIANS):
        found = [{**hold, "reason": None} for hold in found]
    return Reply({"holds": found})


def place_hold(call: Call) -> Reply:
    """Hold events: when this is answered the hold stands in the signed ledger."""
    asked: NewHold = call.body
    by = custodian(call.principal)
    call.desks.freshen(whole=True)
    selector = Selector(
        sessions=_ids(call, asked.sessions),
        tenant=call.principal.bound(asked.tenant),
        tag=asked.tag,
        since=at_us(asked.since),
        until=at_us(asked.until),
    )
    with call.desks.custody:
        done = Holds(tiering_of(call.desks.installation), call.desks.control).place(selector, by=by, reason=asked.reason)
        sign(call.desks.installation)
    call.rows = done["events"]
    return Reply(done, 201)


def release_hold(call: Call) -> Reply:
    """End a hold."""
    by = custodian(call.principal)
    _unbound(call, "release holds")
    with call.desks.custody:
        done = Holds(tiering_of(call.desks.installation), call.desks.control).release(call.ids["hold"], by=by, reason=call.body.reason)
        sign(call.desks.installation)
    return Reply(done)


def retention(call: Call) -> Reply:
    """The policies, and what is due by them."""
    installation = call.desks.installation
    policies = [policy.model_dump(exclude_none=True) for policy in installation.settings.retention.policies]
    due = [item.to_row() for item in retention_of(installation).preview()]
    return Reply({"policies": policies, "due": [row for row in due if call.principal.tenant in (None, row["tenant"])]})


def list_erasures(call: Call) -> Reply:
    """All erasures, with what waits for the second custodian. Of what and why is told to those who may approve it."""
    found = erasures_of(call.desks.installation, call.desks.control).everything()
    if not (call.principal.may(CUSTODIANS) and _is_unbound(call)):
        found = [{**erasure, "what": None, "reason": None} for erasure in found]
    return Reply({"erasures": found})


def preview_erasure(call: Call) -> Reply:
    """What an erasure would take now, and which holds keep how much of it; nothing is changed."""
    ids, actor = _subject(call, call.body)
    found = erasures_of(call.desks.installation, call.desks.control).preview(ids, actor)
    call.rows = found["events"]
    return Reply(found)


def request_erasure(call: Call) -> Reply:
    """Ask for an erasure; nothing is erased before another custodian approves."""
    asked: NewErasure = call.body
    by = custodian(call.principal)
    ids, actor = _subject(call, asked)
    with call.desks.custody:
        made = erasures_of(call.desks.installation, call.desks.control).request(ids, actor, by=by, reason=asked.reason)
        sign(call.desks.installation)
    return Reply({"erasure": made, "state": "requested", "requested_by": by}, 201)


def approve_erasure(call: Call) -> Reply:
    """Approve another custodian's request and carry it out."""
    by = custodian(call.principal)
    _unbound(call, "approve erasures")
    call.desks.freshen(whole=True)
    with call.desks.custody:
        done = erasures_of(call.desks.installation, call.desks.control).approve(call.ids["erasure"], by=by)
        sign(call.desks.installation)
    return Reply(done)


def certificate(call: Call) -> Response:
    """What was erased where: the signed ledger entry."""
    found = erasures_of(call.desks.installation, call.desks.control).certificate(call.ids["erasure"])
    return Response(found, media_type="application/json")


def verify(call: Call) -> Reply:
    """Begin to verify ledger, objects and rows."""
    installation, shallow = call.desks.installation, call.body.shallow if call.body else False

    def act(work: Work) -> Any:
        found = verification(installation).report(deep=not shallow, progress=lambda _: work.step())
        return {"outcome": outcome(found), **found.to_dict()}

    work = call.desks.works.begin("verify", "ledger", call.principal, act)
    return Reply(work.document(), 202, {"location": f"/api/v1/jobs/{work.work_id}"})


def prove(call: Call) -> Reply:
    """The proof of one event, which the ledger's public key checks."""
    try:
        event_id = uuid.UUID(call.ids["event"]).bytes
    except ValueError:
        raise UnknownEvent(f"no event {call.ids['event'][:40]!r}", operation="prove", hint="event_id of the view events") from None
    call.desks.freshen()
    session = call.desks.installation.reader.session_of(event_id)
    if session is None:
        raise UnknownEvent(f"no event {call.ids['event']}", operation="prove", hint="event_id of the view events")
    call.desks.gate.session(call.principal, session.hex())
    call.rows = 1
    return Reply(prover(call.desks.installation).event(event_id).to_json())


def ledger(call: Call) -> Reply:
    """The newest entries, the newest checkpoint, the first public key, which checks both, and every key that signed since."""
    book = call.desks.installation.ledger
    newest = book.latest_checkpoint()
    entries = [
        {"number": entry.sequence, "recorded_at": entry.recorded_at, "type": entry.type, "sha256": entry.sha256}
        for entry in book.entries(max(0, book.head() - 50))
    ]
    keys = [{**row, "public_key": str(span.key)} for row, span in zip(key_rows(book), book.chain().spans, strict=True)]
    checkpoint = newest.data.decode() if newest else None
    return Reply({"entries": entries[::-1], "checkpoint": checkpoint, "public_key": str(book.verifier), "keys": keys})


def coverage(call: Call) -> Reply:
    """Where every offset of the log is, by partition and day."""
    day = call.query.day.isoformat() if call.query.day else None
    return Reply({"coverage": coverage_rows(call.desks.installation.ledger, day=day)})


def tiers(call: Call) -> Reply:
    """What is kept where, by tenant and day."""
    snapshot = call.desks.installation.catalog.snapshot()
    segments = [segment for segment in snapshot.segments if call.principal.tenant in (None, segment.tenant)]
    cold = [{name: asdict(segment)[name] for name in ("key", "tenant", "day", "rows", "bytes")} for segment in segments]
    hot = [
        {"name": shard.name, "level": shard.level, "day": shard.day, "rows": shard.rows, "bytes": shard.bytes} for shard in snapshot.shards
    ]
    return Reply({"hot": hot, "cold": cold})


def _subject(call: Call, asked: Subject) -> tuple[tuple[str, ...], str | None]:
    """The sessions (hex) or the actor that an erasure is of; of an actor it is the sessions of the custodian's own tenant."""
    if bool(asked.sessions) == bool(asked.actor):
        raise Problem(400, "an erasure is of sessions or of an actor", "give one of them")
    call.desks.freshen(whole=True)
    if asked.actor is not None and call.principal.tenant is not None:
        return _sessions_of(call, asked.actor), None
    return _ids(call, asked.sessions), asked.actor


def _ids(call: Call, sessions: list[str]) -> tuple[str, ...]:
    """Sessions of this custodian's tenant; each act is about what is there."""
    return tuple(dict.fromkeys(call.desks.gate.held(call.principal, text).hex() for text in sessions))


def _sessions_of(call: Call, actor: str) -> tuple[str, ...]:
    statement = f"SELECT DISTINCT lower(hex(session_id)) FROM events WHERE actor = {views.literal(actor)}"
    answer = call.desks.installation.sql.query(statement, tenant=call.principal.tenant)
    found = tuple(answer.table.column(0).to_pylist())
    if not found:
        raise UnknownEvent(f"no event of {actor[:40]!r}", operation="erase", hint="the actor as events name it")
    return found


def _unbound(call: Call, what: str) -> None:
    """Holds and erasures reach over tenants once they stand, so ending or approving one is for who may act for all of this house."""
    if not _is_unbound(call):
        tenant = call.desks.installation.settings.tenant
        raise Problem(403, f"a key of tenant {call.principal.tenant} may not {what}", f"use one of tenant {tenant}, or of an admin")


def _is_unbound(call: Call) -> bool:
    return call.principal.tenant in (None, call.desks.installation.settings.tenant)


_JOB = b.record("job state", job=b.TEXT, state=b.TEXT)

ROUTES = (
    Route("GET", "/custody/holds", "list_holds", "The holds that stand.", LOOKERS, list_holds, answer=b.record("holds")),
    Route(
        "POST",
        "/custody/holds",
        "place_hold",
        "Hold events.",
        CUSTODIANS,
        place_hold,
        body=NewHold,
        answer=b.record("hold"),
        status=201,
        content=True,
    ),
    Route(
        "POST",
        "/custody/holds/{hold}/release",
        "release_hold",
        "End a hold.",
        CUSTODIANS,
        release_hold,
        body=Reason,
        answer=b.record("hold"),
        content=True,
    ),
    Route("GET", "/custody/retention", "retention_preview", "What goes next.", LOOKERS, retention, answer=b.record("policies due")),
    Route("GET", "/custody/erasures", "list_erasures", "All erasures.", LOOKERS, list_erasures, answer=b.record("erasures")),
    Route(
        "POST",
        "/custody/erasures",
        "request_erasure",
        "Ask for an erasure.",
        CUSTODIANS,
        request_erasure,
        body=NewErasure,
        answer=b.record("erasure"),
        status=201,
        content=True,
    ),
    Route(
        "POST",
        "/custody/erasures/preview",
        "preview_erasure",
        "What an erasure would take.",
        CUSTODIANS,
        preview_erasure,
        body=Subject,
        answer=b.record("sessions events contents held"),
        content=True,
    ),
    Route(
        "POST",
        "/custody/erasures/{erasure}/approve",
        "approve_erasure",
        "Approve another one's.",
        CUSTODIANS,
        approve_erasure,
        answer=b.OBJECT,
        content=True,
    ),
    Route("GET", "/custody/erasures/{erasure}/certificate", "erasure_certificate", "What was erased where.", LOOKERS, certificate),
    Route("POST", "/custody/verify", "verify", "Verify everything: a job.", CUSTODIANS, verify, body=Deep, answer=_JOB, status=202),
    Route(
        "GET",
        "/custody/proofs/{event}",
        "prove_event",
        "The proof of one event.",
        LOOKERS,
        prove,
        answer=b.record("checkpoint"),
        content=True,
    ),
    Route(
        "GET",
        "/custody/ledger",
        "ledger",
        "Newest entries and checkpoint.",
        LOOKERS,
        ledger,
        answer=b.record("entries checkpoint public_key keys"),
    ),
    Route("GET", "/custody/coverage", "coverage", "Where every offset is.", LOOKERS, coverage, query=Day, answer=b.record("coverage")),
    Route("GET", "/custody/tiers", "tiers", "What is kept where.", LOOKERS, tiers, answer=b.record("hot cold")),
)
