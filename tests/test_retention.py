"""What is due goes, with every old version; what a minimum or a hold keeps stays; and all proofs stand."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lifecycle.compaction import Compaction
from lifecycle.holds import Holds
from lifecycle.policies import Policies
from lifecycle.register import Register
from lifecycle.retention import Retention
from lifecycle.rewriting import CRASH_POINTS
from lifecycle.selectors import Selector
from schemas.errors import ConflictError, CorruptStore, SettingsError, UnknownName, UsageError
from schemas.events import HoldPlaced, HoldReleased, RetentionApplied
from schemas.settings import RetentionPolicy, RetentionSettings, Settings
from store.control import open_control
from store.crashpoints import VARIABLE
from store.ledger.entry import decode_entry
from store.log.base import Entry
from store.reader import EventReader
from store.sql import query
from tests.eventgen import Producer, conversation
from tests.indexed import offsets
from tests.tiered import Tiered, tiered
from tokentape import config

ROOT = Path(__file__).parents[1]
OLD, NEW = "2026-01-10", "2026-11-01"
NOW = dt.datetime(2026, 11, 20, tzinfo=dt.UTC)


@pytest.fixture
def rig(deployment: Settings) -> Iterator[Tiered]:
    """Both deployments in turn."""
    with tiered(deployment) as made:
        yield made


@pytest.fixture
def local(settings_embedded: Settings) -> Iterator[Tiered]:
    """The embedded deployment, for what does not depend on it."""
    with tiered(settings_embedded) as made:
        yield made


def policies(rig: Tiered, *given: dict[str, Any]) -> Settings:
    """The rig's settings with some policies, named by their order."""
    items = [RetentionPolicy(name=f"p{number}", **values) for number, values in enumerate(given)]
    rig.settings = rig.settings.model_copy(update={"retention": RetentionSettings(policies=items)})
    return rig.settings


def retention(rig: Tiered) -> Retention:
    """A retention run of the rig, on 20 November 2026."""
    return Retention(rig.tiering(), now=lambda: NOW)


def holds(rig: Tiered) -> Holds:
    """The rig's holds."""
    return Holds(rig.tiering(), open_control(rig.settings))


def talk(rig: Tiered, day: str, *, tenants: Sequence[str] = ("acme", "zeta"), retention_class: str = "standard") -> list[str]:
    """One tiered conversation of each tenant, filed under a day; the sessions in hex."""
    entries: list[Entry] = []
    for tenant in tenants:
        context = dataclasses.replace(rig.producer.session(tenant=tenant), retention_class=retention_class)
        entries += conversation(rig.producer, chunks=4, session=context)
    rig.ingest(entries)
    rig.set_day(day)
    rig.tier()
    return list(dict.fromkeys(entry.key.hex() for entry in entries))


def sessions(rig: Tiered) -> set[str]:
    """Sessions that have a row."""
    return {value.hex() for value in rig.table().column("session_id").to_pylist()}


def check(rig: Tiered, kinds: set[str]) -> None:
    """Everything verifies, findings are only of these harmless kinds, and what is listed is exactly what is live."""
    report = rig.verification().report()
    live = {segment.key for segment in rig.catalog.snapshot().segments}

    assert report.exit_code == 0, report.findings
    assert {finding.kind for finding in report.findings} == kinds
    assert dict(rig.objects.remains("events/")) == dict.fromkeys(live, 1)


class TestRetention:
    def test_what_is_due_goes_and_the_rest_stays(self, rig: Tiered) -> None:
        """Preview says it and changes nothing; apply does just that; old versions are gone; a second run does nothing."""
        old, new = talk(rig, OLD), talk(rig, NEW)
        policies(rig, {"tenant": "acme", "min_days": 30, "max_days": 90})
        before = {key: rig.objects.get(key) for key, _ in rig.objects.remains("")}
        (due,) = retention(rig).preview()

        assert (due.events, due.held, due.kept, due.segment.tenant, due.segment.day) == (11, 0, 0, "acme", OLD)
        assert {key: rig.objects.get(key) for key, _ in rig.objects.remains("")} == before
        done = retention(rig).apply()
        again = retention(rig).apply()

        assert (done["events"], done["segments"], done["bytes"]) == (11, 1, due.segment.bytes)
        assert (again["events"], again["entry"]) == (0, None)
        assert sessions(rig) == {old[1], *new}
        assert rig.records() == {place: value for place, value in offsets(rig.log).items() if value[26:42].hex() != old[0]}
        (told,) = [payload for payload in rig.sink.payloads if isinstance(payload, RetentionApplied)]
        assert (told.events, told.segments, told.ledger_entry) == (11, 1, done["entry"])
        check(rig, {"erased-with-proof"})
