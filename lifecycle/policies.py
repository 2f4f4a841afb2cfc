"""Retention policies as they hold together: what may go, what must stay, and from which day on.

Retention beats deletion and the longest retention wins; among what may be deleted the shortest deletion wins. An age is
counted from the end of the day that an event is filed under, which never runs backwards, so that no clock that jumps
deletes anything early. A hold (`lifecycle.holds`) beats everything.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from schemas import clock
from schemas.events import PLATFORM_TENANT
from schemas.settings import RetentionPolicy, Settings
from store.ledger.entry import canonical
from store.objects.base import Lock
from store.views import literal

Tagged = Callable[[str], str]
"""From a tag to the SQL condition that a row's session carries it."""

ALL = "true"
"""The condition that every row satisfies."""

_STRENGTH = ("none", "governance", "compliance")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the policies say of the rows of one segment: SQL conditions on its rows, empty where nothing is to be done.

    `drop` and `strip` (content only) are due; `kept` says for which of them a minimum stands against it. `names` are the
    policies that want something gone, `acts` what each of them wants.
    """

    drop: str
    strip: str
    kept: str
    names: tuple[str, ...]
    acts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Policies:
    """All policies of an installation."""

    items: tuple[RetentionPolicy, ...]

    @classmethod
    def of(cls, settings: Settings) -> Policies:
        """Those of the settings."""
        return cls(tuple(settings.retention.policies))

    def to_json(self) -> list[dict[str, Any]]:
        """For the ledger: numbers as text, which have one spelling in canonical JSON."""
        return [
            {name: f"{value:g}" if isinstance(value, float | int) else value for name, value in policy.model_dump().items()}
            for policy in self.items
        ]

    @property
    def sha256(self) -> str:
        """What tells two versions apart."""
        return hashlib.sha256(canonical({"policies": self.to_json()})).hexdigest()

    @property
    def tags(self) -> list[str]:
        """The tags that policies select by."""
        return sorted({policy.tag for policy in self.items if policy.tag})

    def matching(self, tenant: str, retention_class: str) -> list[RetentionPolicy]:
        """Those for a segment. The platform's own events are only selected by their tenant's name."""
        return [
            policy
            for policy in self.items
            if (policy.tenant == tenant if tenant == PLATFORM_TENANT else fnmatchcase(tenant, policy.tenant or "*"))
            and fnmatchcase(retention_class, policy.retention_class or "*")
        ]

    def hot_days(self, default: float) -> float:
        """How long a day stays hot. A day goes as a whole, so the policy that keeps it longest decides."""
        return max([default, *(policy.hot_days for policy in self.items if policy.hot_days is not None)])

    def lock(self, tenant: str, retention_class: str, day: str) -> Lock | None:
        """The strongest lock that is asked for, to the end of the longest minimum; None where no policy says."""
        found = self.matching(tenant, retention_class)
        modes = [policy.lock for policy in found if policy.lock is not None]
        if not modes:
            return None
        mode = max(modes, key=_STRENGTH.index)
        until = end_of(day) + dt.timedelta(days=max(policy.min_days for policy in found))
        return Lock(mode, until) if mode != "none" and until > clock.now() else Lock("none")

    def verdict(self, tenant: str, retention_class: str, age_days: float, tagged: Tagged) -> Verdict | None:
        """What is due in a segment of this age; None for nothing."""
        found = self.matching(tenant, retention_class)
        dropping = [policy for policy in found if policy.max_days is not None and policy.max_days <= age_days]
        stripping = [policy for policy in found if policy.content_days is not None and policy.content_days <= age_days]
        keeping = [policy for policy in found if policy.min_days > age_days]
        names = tuple(policy.name for policy in (*dropping, *stripping))
        if not names:
            return None
        acts = (*(f"events by {policy.name}" for policy in dropping), *(f"content by {policy.name}" for policy in stripping))
        return Verdict(_any(dropping, tagged), _any(stripping, tagged), _any(keeping, tagged), names, acts)


def _any(policies: Sequence[RetentionPolicy], tagged: Tagged) -> str:
    """Condition that one of some policies selects a row."""
    conditions = [_condition(policy, tagged) for policy in policies]
    return ALL if ALL in conditions else " OR ".join(f"({condition})" for condition in conditions)


def _condition(policy: RetentionPolicy, tagged: Tagged) -> str:
    parts = [f"kind = {literal(policy.kind)}" if policy.kind else "", tagged(policy.tag) if policy.tag else ""]
    return " AND ".join(filter(None, parts)) or ALL


def end_of(day: str) -> dt.datetime:
    """When a day ends, UTC."""
    return dt.datetime.fromisoformat(day).replace(tzinfo=dt.UTC) + dt.timedelta(days=1)


def age_of(day: str, now: dt.datetime) -> float:
    """Days since a day ended."""
    return (now - end_of(day)) / dt.timedelta(days=1)
