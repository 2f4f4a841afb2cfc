"""What custody has decided, read from the ledger: holds, versions of the policies, erasures.

The ledger is the one place where holds and deletions meet: a deletion is entered under the number that it expected or
not at all, so whatever hold has a smaller number was seen by it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from lifecycle.selectors import Selector
from lifecycle.tiering import REWRITTEN
from store.ledger import Entry, Ledger

HOLD_PLACED, HOLD_RELEASED, POLICIES = "hold_placed", "hold_released", "policies"
ERASURE_REQUESTED, ERASURE_APPROVED, ERASURE_APPLIED, ERASURE_FINISHED = (
    f"erasure_{word}" for word in ("requested", "approved", "applied", "finished")
)
"""Types of ledger entries."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A legal hold that stands. `at_us` is when it was entered; the reason is kept apart, in the control log."""

    hold_id: str
    selector: Selector
    by: str
    at_us: int
    entry: int


@dataclass
class Erasure:
    """One erasure by the entries that tell of it: `requested`, `approved`, `applied` (the latest), `finished`."""

    erasure_id: str
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """The last thing that happened to it."""
        return next(name for name in ("finished", "applied", "approved", "requested") if name in self.entries)

    def by(self, step: str) -> str:
        """Who took a step."""
        return str(self.entries[step].body["by"]) if step in self.entries else ""


@dataclass(frozen=True, slots=True)
class Settled:
    """A segment in which nothing is left of what some acts of a version of the policies want gone."""

    version: int
    acts: frozenset[str]


@dataclass
class Standing:
    """What stands after the first `size` entries."""

    size: int = 0
    holds: dict[str, Hold] = field(default_factory=dict)
    released: set[str] = field(default_factory=set)
    erasures: dict[str, Erasure] = field(default_factory=dict)
    policies: tuple[int, str] = (0, "")
    """Number and SHA-256 of the version of the policies that was entered last."""
    gone: set[str] = field(default_factory=set)
    """Keys of objects that entries say were removed."""
    settled: dict[str, Settled] = field(default_factory=dict)
    """By segment: those that a retention run made, and in which no hold and no minimum kept anything of what was due."""
    tip: str | None = None
    """SHA-256 of the last entry."""

    def read_on(self, ledger: Ledger) -> list[Entry]:
        """Take what was entered since; the new entries. Raises as `Register.refresh`."""
        entries = list(ledger.entries(self.size, after=self.tip))
        for entry in entries:
            self._take(entry)
            self.size, self.tip = entry.sequence + 1, entry.sha256  # one by one: what is shared must not be half of it
        return entries

    def _take(self, entry: Entry) -> None:
        body: Any = entry.body
        if entry.type == HOLD_PLACED:
            at_us = int(entry.recorded_at.timestamp() * 1e6)
            hold = Hold(body["hold_id"], Selector.model_validate(body["selector"]), body["by"], at_us, entry.sequence)
            self.holds[hold.hold_id] = hold
        elif entry.type == HOLD_RELEASED:
            self.holds.pop(body["hold_id"], None)
            self.released.add(body["hold_id"])
        elif entry.type == POLICIES:
            self.policies = (body["version"], body["sha256"])
        elif entry.type.startswith("erasure_"):
            erasure = self.erasures.setdefault(body["erasure_id"], Erasure(body["erasure_id"]))
            erasure.entries[entry.type.removeprefix("erasure_")] = entry
        elif entry.type == REWRITTEN:
            self._settle(entry)
        self.gone.update(body.get("erased", ()))

    def _settle(self, entry: Entry) -> None:
        """What retention made is settled, and what another rewriting makes of nothing but settled segments."""
        body: Any = entry.body
        before = [self.settled.pop(key, None) for key in body["erased"]]
        known = [each for each in before if each is not None]
        if "acts" in body:
            settled = Settled(body["policies"], frozenset(body["acts"])) if not body["left"] else None
        elif len(known) == len(before) and len({each.version for each in known}) == 1:
            settled = Settled(known[0].version, frozenset.intersection(*(each.acts for each in known)))
        else:
            settled = None
        if settled is not None:
            self.settled |= {segment["key"]: settled for segment in body["segments"]}


@dataclass
class Register(Standing):
    """What stands for one run: it changes only when this run reads on."""

    ledger: Ledger = field(kw_only=True)

    @classmethod
    def of(cls, ledger: Ledger) -> Register:
        """What stands now. A `Ledger`'s entries are read once a process, and only what came since the last time later on.

        Verification does not come this way: it reads every entry from the store each time.

        Raises:
            ProofError: the ledger is not intact. StoreUnavailable: the store does not answer.
        """
        with _READING:
            known = _KNOWN.setdefault(ledger, Standing())
            known.read_on(ledger)
            erasures = {key: Erasure(key, dict(erasure.entries)) for key, erasure in known.erasures.items()}
            holds, released, gone = dict(known.holds), set(known.released), set(known.gone)
            return cls(known.size, holds, released, erasures, known.policies, gone, dict(known.settled), known.tip, ledger=ledger)

    def refresh(self) -> list[Entry]:
        """Read on; the new entries.

        Raises:
            ProofError: the ledger is not intact. StoreUnavailable: the store does not answer.
        """
        return self.read_on(self.ledger)


_KNOWN: WeakKeyDictionary[Ledger, Standing] = WeakKeyDictionary()
_READING = threading.Lock()
