"""Legal holds: what a hold selects is kept, whatever a policy, an erasure or a merge would do.

A hold stands once its ledger entry does, and every deletion that is entered later respects it. Who, what and since when
are in the ledger; the reason, which may name people, is in the control log and in the event, and goes when they do.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import dataclass
from typing import Any

import structlog

from lifecycle.register import HOLD_PLACED, HOLD_RELEASED, Hold, Register
from lifecycle.rewriting import Rewriting, rewriting
from lifecycle.selectors import Selector, id_text
from lifecycle.tiering import REWRITTEN, Tiering
from schemas.errors import TokentapeError, UnknownName, UsageError
from schemas.events import HoldContent, HoldPlaced, HoldReleased
from schemas.sink import SessionContext, new_id
from store.control import ControlLog

log = structlog.get_logger("tokentape.holds")

KIND = "hold"
"""Of facts in the control log: reasons, by hold id."""

SESSIONS_MAX = 10_000
"""Sessions that one hold may name; a larger matter is held by tenant, time or tag."""


@dataclass(frozen=True)
class Holds:
    """The holds of an installation. `by` is the custodian who acts, `tenant` the one whose retention holds events get."""

    tiering: Tiering
    control: ControlLog

    def place(self, selector: Selector, *, by: str, reason: str) -> dict[str, Any]:
        """Hold everything that is selected; when this returns the hold stands. What it keeps as a flat dict.

        Raises:
            UsageError: no reason, nothing selected, or no event that satisfies it.
        """
        _check(selector, reason)
        hold_id = new_id().hex()
        register = Register.of(self.tiering.ledger)
        with rewriting(self.tiering, register) as run:
            events = self._count(run, selector)
            if not events:
                hint = "see `tokentape sessions`; a hold has to name what is there"
                raise UsageError(f"{selector.text()}: no such event, so nothing is held", operation="hold", hint=hint)
            self.control.append(KIND, hold_id, {"reason": reason, "by": by})
            digest = hashlib.sha256(hold_id.encode() + reason.encode()).hexdigest()
            body = {"hold_id": hold_id, "selector": selector.to_json(), "by": by, "reason_sha256": digest}
            entry = self.tiering.ledger.append(HOLD_PLACED, body)
            late = self._late(register, selector, entry.sequence)
            objects, warning = self._hold_objects(run, selector)
        self._record(
            HoldPlaced(
                hold_id=bytes.fromhex(hold_id),
                selector=selector.model_dump_json(exclude_defaults=True),
                ledger_entry=entry.sequence,
                content=HoldContent(reason=reason),
            ),
            by,
        )
        log.info("hold.placed", hold=id_text(hold_id), events=events, ledger_entry=entry.sequence)
        return {
            "hold": id_text(hold_id),
            "events": events,
            "ledger_entry": entry.sequence,
            "objects": objects,
            "gone_before": late,
            "warning": warning,
        }

    def release(self, text: str, *, by: str, reason: str) -> dict[str, Any]:
        """End a hold.

        Raises:
            UsageError: no reason. UnknownName: no hold of that id stands.
        """
        if not reason.strip():
            raise UsageError("a release needs a reason", operation="hold release", hint="--reason 'what allows it'")
        register = Register.of(self.tiering.ledger)
        hold = find(register, text)
        digest = hashlib.sha256(hold.hold_id.encode() + reason.encode()).hexdigest()
        entry = self.tiering.ledger.append(HOLD_RELEASED, {"hold_id": hold.hold_id, "by": by, "reason_sha256": digest})
        with rewriting(self.tiering, register) as run:
            objects, warning = self._hold_objects(run, hold.selector)
        self._record(HoldReleased(hold_id=bytes.fromhex(hold.hold_id), ledger_entry=entry.sequence, content=HoldContent(reason=reason)), by)
        self.control.append(KIND, hold.hold_id, None)
        return {"hold": id_text(hold.hold_id), "ledger_entry": entry.sequence, "objects": objects, "warning": warning}

    def standing(self) -> list[dict[str, Any]]:
        """Every hold that stands: what, who, why, since."""
        register = Register.of(self.tiering.ledger)
        reasons = self.control.latest(KIND)
        return [
            {
                "hold": id_text(hold.hold_id),
                "what": hold.selector.text(),
                "by": hold.by,
                "since": dt.datetime.fromtimestamp(hold.at_us / 1e6, dt.UTC),
                "reason": reasons.get(hold.hold_id, {}).get("reason"),
                "ledger_entry": hold.entry,
            }
            for hold in register.holds.values()
        ]

    def _count(self, run: Rewriting, selector: Selector) -> int:
        condition = selector.condition(run.matching)
        with run.everything() as events:
            return int(run.connection.execute(f"SELECT count(*) FROM ({events}) WHERE {condition}").fetchall()[0][0])

    def _late(self, register: Register, selector: Selector, number: int) -> list[str]:
        """What was entered for deletion between the last look and the hold itself: it may be going, and cannot be held."""
        news = [entry for entry in register.refresh() if entry.sequence < number and entry.type == REWRITTEN]
        return [key for entry in news for key in entry.body["erased"] if entry.body["why"] != "merge"]

    def _hold_objects(self, run: Rewriting, selector: Selector) -> tuple[int, str]:
        """The store's own legal holds of the segments that a selector may touch. The hold stands without them, too."""
        run.register.refresh()
        segments = [segment for segment in self.tiering.catalog.snapshot().segments if selector.may_touch(segment)]
        try:
            return run.hold_objects(segments), ""
        except (TokentapeError, KeyError) as error:
            return 0, f"the object store's own legal hold is not set: {error}"

    def _record(self, payload: HoldPlaced | HoldReleased, by: str) -> None:
        if self.tiering.sink is not None:
            settings = self.tiering.settings
            self.tiering.sink.record(SessionContext(new_id(), settings.tenant, "lifecycle", by, settings.retention_class), payload)


def find(register: Register, text: str) -> Hold:
    """The hold that an id or a unique beginning of one names.

    Raises:
        UnknownName: none that stands, or several.
    """
    found = [hold for hold_id, hold in register.holds.items() if hold_id.startswith(text.lower().replace("-", "")) and text]
    if len(found) == 1:
        return found[0]
    fault = "was released before" if text in register.released else "is no hold" if not found else "is the beginning of several holds"
    raise UnknownName(f"{text[:40]!r} {fault}", operation="hold release", hint="`tokentape hold list` shows what stands")


def _check(selector: Selector, reason: str) -> None:
    if not reason.strip():
        raise UsageError("a hold needs a reason", operation="hold", hint="--reason 'matter 4711'")
    if not selector.to_json():
        raise UsageError("nothing is selected", operation="hold", hint="--session, --tenant, --from, --to, --tag or --where")
    if len(selector.sessions) > SESSIONS_MAX:
        fault = f"{len(selector.sessions):,} sessions; one hold names {SESSIONS_MAX:,}"
        raise UsageError(fault, operation="hold", hint="hold by --tenant, --from and --to, or --tag")
    if selector.since is not None and selector.until is not None and selector.since >= selector.until:
        raise UsageError("the time range is empty", operation="hold", hint="--from lies before --to")
