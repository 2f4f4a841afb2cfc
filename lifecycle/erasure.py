"""Erasure: a person asks to be forgotten. Content and salt go everywhere, commitments stay, and every proof with them.

Two custodians are needed: one requests, another approves. Hot rows go to the cold tier first; there the segments that
hold the sessions, and only those, are rewritten without their content (`lifecycle.rewriting`), and the old objects go with
all their versions. Derived snapshots are forgotten, and records in quarantine that
hold a session's id lose their bytes. What cannot be rewritten is pending until it is over: records in the log until its retention has
passed them, spooled ones until they are sent, blobs until they are collected. A job follows up and enters when all is
done. The signed entry is the certificate.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from lifecycle.log_retention import trim
from lifecycle.register import ERASURE_APPLIED, ERASURE_APPROVED, ERASURE_FINISHED, ERASURE_REQUESTED, Erasure, Register
from lifecycle.rewriting import Change, Done, Rewriting, rewriting
from lifecycle.selectors import Selector, id_text
from lifecycle.tiering import WAIT_S, Tiering
from schemas.errors import ConflictError, UnknownName, UsageError
from schemas.events import ErasureApplied, ErasureContent
from schemas.registry import CURRENT
from schemas.sink import SessionContext, new_id
from store.blobs import MARK, key_of
from store.catalog import Segment
from store.control import ControlLog
from store.ledger import Entry
from store.log.base import Log
from store.merge import delete_retired
from store.views import literal

log = structlog.get_logger("tokentape.erasure")

KIND = "erasure"
"""Of facts in the control log: by id what is to be erased and why. It goes when the erasure is finished."""

WHY = "erasure"


@dataclass(frozen=True)
class Erasures:
    """The erasures of an installation.

    `collect` removes blobs that nothing refers to any more; `forget` removes what is derived from a session (16 bytes).
    """

    tiering: Tiering
    log: Log
    control: ControlLog
    collect: Callable[[], object] | None = None
    forget: Callable[[bytes], None] | None = None

    def request(self, sessions: tuple[str, ...], actor: str | None, *, by: str, reason: str) -> str:
        """Ask for the erasure of sessions (hex), or of every session with an event of an actor; its id.

        Raises:
            UsageError: no reason, or no such event. ConflictError: a hold keeps part of it.
        """
        if not reason.strip():
            raise UsageError("an erasure needs a reason", operation="erase", hint="--reason 'asked to be forgotten'")
        subject: dict[str, Any] = {"sessions": list(sessions), "actor": actor}
        register = Register.of(self.tiering.ledger)
        with rewriting(self.tiering, register) as run:
            subject = self._resolved(run, subject)
            self._check_holds(run, _selector(subject))
        erasure_id = new_id().hex()
        self.control.append(KIND, erasure_id, {**subject, "reason": reason, "by": by})
        digest = hashlib.sha256(f"{erasure_id}{sorted(sessions)}{actor}".encode()).hexdigest()
        self.tiering.ledger.append(ERASURE_REQUESTED, {"erasure_id": erasure_id, "by": by, "subject_sha256": digest})
        return id_text(erasure_id)

    def preview(self, sessions: tuple[str, ...], actor: str | None) -> dict[str, Any]:
        """What an erasure of sessions (hex), or of an actor's, would take now, and which holds keep how much of it; changes nothing.

        Raises:
            UsageError: no such event.
        """
        with rewriting(self.tiering, Register.of(self.tiering.ledger)) as run:
            subject = self._resolved(run, {"sessions": list(sessions), "actor": actor})
            condition = _selector(subject).condition(run.matching)
            with run.everything() as events:
                count, contents, first, last = _totals(run, events, condition)
                held = self._held(run, events, condition)
        return {
            "sessions": list(map(id_text, subject["sessions"])),
            "events": count,
            "contents": contents,
            "first_at": first,
            "last_at": last,
            "held": held,
        }

    def approve(self, text: str, *, by: str) -> dict[str, Any]:
        """Approve an erasure and carry it out; what was done where.

        Raises:
            UnknownName: there is none of that id. UsageError: it was requested by the same custodian, or is approved already.
            ConflictError: a hold keeps part of it, or a lock forbids it until a date.
        """
        register = Register.of(self.tiering.ledger)
        erasure = find(register, text)
        if erasure.state != "requested":
            raise UsageError(
                f"it is {erasure.state} already", operation="erase", place=id_text(erasure.erasure_id), hint="`tokentape erase list`"
            )
        if erasure.by("requested") == by:
            hint = "two custodians are needed for an erasure"
            raise UsageError(f"{by} requested it and cannot approve it", operation="erase", place=id_text(erasure.erasure_id), hint=hint)
        with rewriting(self.tiering, register) as run:
            subject = self._resolved(run, self._subject(erasure))
            self._check_holds(run, _selector(subject))
        self.control.append(KIND, erasure.erasure_id, subject)
        self.tiering.ledger.append(ERASURE_APPROVED, {"erasure_id": erasure.erasure_id, "by": by})
        return self._apply(erasure.erasure_id)

    def follow_up(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Carry on what is approved and not finished: what a lock kept, what was interrupted, what was pending."""
        open_ = [e.erasure_id for e in Register.of(self.tiering.ledger).erasures.values() if e.state in ("approved", "applied")]
        summary: dict[str, Any] = {"open": len(open_), "finished": 0, "waiting": []}
        for erasure_id in [] if dry_run else open_:
            try:
                done = self._apply(erasure_id)
                summary["finished"] += not done["pending"]
                summary["waiting"] += [f"{id_text(erasure_id)}: {line}" for line in done["pending"]]
            except ConflictError as error:
                summary["waiting"].append(f"{id_text(erasure_id)}: {error.fault}, {error.hint}")
        return summary

    def everything(self) -> list[dict[str, Any]]:
        """Every erasure: state, who requested and approved it, what is pending; of what and why, until it is finished."""
        facts = self.control.latest(KIND)
        return [
            {
                "erasure": id_text(erasure.erasure_id),
                "state": erasure.state,
                "requested_by": erasure.by("requested"),
                "approved_by": erasure.by("approved"),
                "requested_at": erasure.entries["requested"].recorded_at,
                "pending": list(erasure.entries["applied"].body["pending"]) if erasure.state == "applied" else [],
                **_told(facts.get(erasure.erasure_id)),
            }
            for erasure in Register.of(self.tiering.ledger).erasures.values()
        ]

    def certificate(self, text: str) -> bytes:
        """What was erased where, signed: the bytes of the ledger entry that says so.

        Raises:
            UnknownName: there is none of that id. UsageError: it has not been carried out.
        """
        erasure = find(Register.of(self.tiering.ledger), text)
        if erasure.state not in ("applied", "finished"):
            raise UsageError(
                f"it is only {erasure.state}", operation="erase certificate", place=id_text(erasure.erasure_id), hint="approve it first"
            )
        return erasure.entries[erasure.state].data

    # One erasure

    def _apply(self, erasure_id: str) -> dict[str, Any]:
        """Erase what is there; doing it again erases what came since, and looks after what was pending."""
        with self.tiering.alone(wait_s=WAIT_S):
            self.tiering.run_alone(all_days=True)
            register = Register.of(self.tiering.ledger)
            erasure = register.erasures[erasure_id]
            subject = self._subject(erasure)
            with rewriting(self.tiering, register) as run:
                selector = _selector(subject)
                self._check_holds(run, selector)
                condition = selector.condition(run.matching)
                touched = self._touched(run, selector, condition)
                self._check_locks(run, [segment for segment, contents in touched if contents])
                blobs = sorted({*subject.get("blobs", ()), *self._blobs(run, selector, condition)})
                spool = subject.get("spool")
                places = {tuple(place) for place in (*subject.get("places", ()), *self._log_places(run, condition))}
                subject |= {"blobs": blobs, "spool": self._spooled() if spool is None else spool, "places": sorted(places)}
                self.control.append(KIND, erasure_id, subject)
                done, facts = Done(), {"erasure_id": erasure_id}
                for segment, contents in touched:
                    if contents:
                        run.apply(partial(self._change, run, selector, segment, facts), done)
                run.sweep(orphan_s=0)
                delete_retired(self.tiering.catalog)
            sessions = [bytes.fromhex(session) for session in subject["sessions"]]
            subject["quarantined"] = subject.get("quarantined", 0) + self.tiering.catalog.erase_quarantined(sessions)
            if self.forget is not None and done.stripped:
                for session in sessions:
                    self.forget(session)
            pending = self._pending(subject)
        return self._enter(erasure, subject, done, pending)

    def _change(self, run: Rewriting, selector: Selector, segment: Segment, facts: dict[str, Any]) -> Change:
        self._check_holds(run, selector)
        return Change(WHY, (segment,), strip=selector.condition(run.matching), facts=facts)

    def _touched(self, run: Rewriting, selector: Selector, condition: str) -> list[tuple[Segment, int]]:
        """Segments with events of the subject, and how many of those still have content or salt."""
        found = []
        for segment in self.tiering.catalog.snapshot().segments:
            if selector.may_touch(segment):
                events, contents = run.counts([segment], [condition, f"{condition} AND salt IS NOT NULL"])
                found += [(segment, contents)] if events else []
        return found

    def _check_holds(self, run: Rewriting, selector: Selector) -> None:
        condition = selector.condition(run.matching)
        with run.everything() as events:
            for held in self._held(run, events, condition):
                hint = "`tokentape hold list` shows why; it can be erased once the hold is released"
                raise ConflictError(f"hold {held['hold']} keeps {held['events']:,} of its events", operation="erase", hint=hint)

    def _held(self, run: Rewriting, events: str, condition: str) -> list[dict[str, Any]]:
        """The holds that keep events of a condition, each with how many."""
        counts = {
            hold.hold_id: _count(run, events, f"{condition} AND {hold.selector.condition(run.matching)}")
            for hold in run.register.holds.values()
        }
        return [{"hold": id_text(hold), "events": count} for hold, count in counts.items() if count]

    def _check_locks(self, run: Rewriting, segments: list[Segment]) -> None:
        until = max((end for segment in segments if (end := run.locked_until(segment)) is not None), default=None)
        if until is not None:
            hint = f"not before {until.isoformat()}; the job carries it out then"
            raise ConflictError("a compliance lock forbids it", operation="erase", hint=hint)

    def _resolved(self, run: Rewriting, subject: dict[str, Any]) -> dict[str, Any]:
        """The subject with the sessions of its actor as they are by now.

        Raises:
            UsageError: there is no such event.
        """
        sessions, actor = set(subject["sessions"]), subject["actor"]
        with run.everything() as events:
            if actor is not None:
                sql = f"SELECT DISTINCT session_id FROM ({events}) WHERE actor = {literal(actor)}"
                sessions |= {row[0].hex() for row in run.connection.execute(sql).fetchall()}
            found = _selector({"sessions": sessions})
            if not sessions or not _count(run, events, found.condition(run.matching)):
                hint = "`tokentape sessions` lists sessions, the view `sessions` their actors"
                raise UsageError("no such event, so there is nothing to erase", operation="erase", hint=hint)
        return {**subject, "sessions": sorted(sessions)}

    def _subject(self, erasure: Erasure) -> dict[str, Any]:
        fact = self.control.latest(KIND).get(erasure.erasure_id)
        if fact is None:
            hint = "the control log was lost or replaced; request the erasure again"
            raise UsageError(
                "it is not known any more what is to be erased", operation="erase", place=id_text(erasure.erasure_id), hint=hint
            )
        return dict(fact)

    # What is pending

    def _blobs(self, run: Rewriting, selector: Selector, condition: str) -> list[str]:
        """Keys of blobs that the subject's content names."""
        urls = [run.url(segment) for segment in self.tiering.catalog.snapshot().segments if selector.may_touch(segment)]
        if not urls:
            return []
        events = run.events(urls)
        rows = run.connection.execute(_blobs_sql(events, condition)).fetchall()
        names = {(tenant, bytes.fromhex(name)) for tenant, name in rows if name}
        keys = [key_of(tenant, name, encoding) for tenant, name in names for encoding in ("zstd", "none")]
        return [key for key in keys if self.tiering.objects.head(key) is not None]

    def _spooled(self) -> list[str]:
        """Files that hold events which are not in the log yet; what of them is the subject's nobody knows before they are."""
        spool = self.tiering.settings.data / "spool"
        return sorted(str(path) for path in spool.rglob("*") if path.is_file() and path.stat().st_size) if spool.is_dir() else []

    def _log_places(self, run: Rewriting, condition: str) -> list[tuple[str, int, int, int]]:
        """Log, partition, last offset and last append time (µs) of the subject's records."""
        events = run.events([run.url(item) for item in self.tiering.catalog.snapshot().segments])
        sql = f'SELECT log_id, "partition", max("offset"), epoch_us(max(appended_at)) FROM ({events}) WHERE {condition} GROUP BY ALL'
        return run.connection.execute(sql).fetchall()

    def _pending(self, subject: dict[str, Any]) -> list[str]:
        trim(self.tiering.settings, self.log, self.tiering.catalog)
        if self.collect is not None:
            self.collect()
        pending = []
        for log_id, partition, offset, appended_at in subject["places"]:
            if log_id == self.log.log_id and self.log.bounds(partition)[0] <= offset:
                until = dt.datetime.fromtimestamp(appended_at / 1e6, dt.UTC) + dt.timedelta(days=self.tiering.settings.log.retention_days)
                pending.append(f"log, partition {partition}: until {until.strftime('%Y-%m-%d %H:%M')} UTC, when its retention ends")
        left = [path for path in subject["spool"] if Path(path).exists() and Path(path).stat().st_size]
        pending += [f"spool: until what is in {len(left)} file(s) is sent"] if left else []
        blobs = [key for key in subject["blobs"] if self.tiering.objects.head(key) is not None]
        return pending + ([f"blobs: {len(blobs)}, until nothing refers to them and they are collected"] if blobs else [])

    def _enter(self, erasure: Erasure, subject: dict[str, Any], done: Done, pending: list[str]) -> dict[str, Any]:
        """Enter what was erased where, unless the same stands already."""
        before = erasure.entries.get("applied")
        none = {"events": 0, "contents": 0, "segments": 0, "versions": 0, "pending": None}
        earlier: Any = none | dict(before.body if before is not None else {})
        body = {
            "erasure_id": erasure.erasure_id,
            "by": erasure.by("approved"),
            "requested_by": erasure.by("requested"),
            "subject_sha256": erasure.entries["requested"].body["subject_sha256"],
            "events": earlier["events"] + done.stripped,
            "contents": earlier["contents"] + done.filled,
            "segments": earlier["segments"] + done.segments,
            "versions": earlier["versions"] + done.versions_gone,
            "rewritten": done.entries,
            "hot": "no row: all were moved to the cold tier, and the files they came from are removed",
            "cold": "content and salt are gone, commitments stand in their place; no old version is listed",
            "derived": "snapshots are forgotten, and made anew of what is left",
            "quarantined": subject["quarantined"],
            "not_searched": self._not_searched(),
            "pending": pending,
        }
        if before is not None and not done.entries and pending and earlier["pending"] == pending:
            return {**earlier, "erasure_id": id_text(erasure.erasure_id), "ledger_entry": before.sequence}
        entry = self.tiering.ledger.append(ERASURE_APPLIED if pending else ERASURE_FINISHED, body)
        self._record(erasure, entry, subject)
        if not pending:
            self.control.append(KIND, erasure.erasure_id, None)
        log.info(
            "erasure.applied", erasure=id_text(erasure.erasure_id), events=done.stripped, pending=len(pending), ledger_entry=entry.sequence
        )
        named = {"erasure_id": id_text(erasure.erasure_id), "ledger_entry": entry.sequence}
        return {**body, **named, "bytes_read": done.bytes_read, "bytes_written": done.bytes_written}

    def _not_searched(self) -> list[str]:
        """Folders with files that could not be read when something was repaired, where there are any; nobody but people can look there."""
        data = self.tiering.settings.data
        return [str(path) for path in (data / "hot" / "aside", data / "spool" / ".damaged") if path.is_dir() and any(path.iterdir())]

    def _record(self, erasure: Erasure, entry: Entry, subject: dict[str, Any]) -> None:
        if self.tiering.sink is None:
            return
        settings, body = self.tiering.settings, entry.body
        event = ErasureApplied(
            erasure_id=bytes.fromhex(erasure.erasure_id),
            subject_digest=bytes.fromhex(str(body["subject_sha256"])),
            approvers=[erasure.by("requested"), erasure.by("approved")],
            events=int(body["events"]),
            pending=list(body["pending"]),
            ledger_entry=entry.sequence,
            content=ErasureContent(reason=subject.get("reason")),
        )
        self.tiering.sink.record(SessionContext(new_id(), settings.tenant, "lifecycle", "job:erasure", settings.retention_class), event)


def find(register: Register, text: str) -> Erasure:
    """The erasure that an id or a unique beginning of one names.

    Raises:
        UnknownName: none, or several.
    """
    found = [erasure for key, erasure in register.erasures.items() if text and key.startswith(text.lower().replace("-", ""))]
    if len(found) == 1:
        return found[0]
    fault = "names several erasures" if found else "is no erasure"
    raise UnknownName(f"{text[:40]!r} {fault}", operation="erase", hint="`tokentape erase list` shows all")


def _blobs_sql(events: str, condition: str) -> str:
    """Tenant and name (hex) of each blob that requests refer to, once for each time."""
    marks = f"list_transform(request_submitted.content.messages, m -> regexp_extract_all(m.body, {literal(MARK.pattern)}, 1))"
    return f"""SELECT tenant, unnest(list_concat(
        list_transform(request_submitted.content.messages, m -> lower(hex(m.blob.blob_id))),
        [lower(hex(request_submitted.content.parameters_blob.blob_id))], flatten({marks}))) AS name
        FROM ({events}) WHERE kind = 'request_submitted' AND {condition}"""


def _selector(subject: dict[str, Any]) -> Selector:
    return Selector(sessions=tuple(sorted(subject["sessions"])))


def _told(fact: dict[str, Any] | None) -> dict[str, Any]:
    """What an erasure is of, and why, as far as it is still known."""
    if fact is None:
        return {"what": None, "reason": None}
    what = _selector(fact).text()
    return {"what": f"{what} of {fact['actor']}" if fact["actor"] is not None else what, "reason": fact["reason"]}


def _totals(run: Rewriting, events: str, condition: str) -> tuple[int, int, str, str]:
    """Events of a condition, those of them that have content, and when the first and the last were recorded, in UTC."""
    content = " OR ".join(f"{kind}.content IS NOT NULL" for kind in CURRENT.contents)
    sql = f"SELECT count(*), count(*) FILTER ({content}), min(recorded_at), max(recorded_at) FROM ({events}) WHERE {condition}"
    count, contents, first, last = run.connection.execute(sql).fetchall()[0]
    return count, contents, f"{first.isoformat()}Z", f"{last.isoformat()}Z"


def _count(run: Rewriting, events: str, condition: str) -> int:
    return int(run.connection.execute(f"SELECT count(*) FROM ({events}) WHERE {condition}").fetchall()[0][0])
