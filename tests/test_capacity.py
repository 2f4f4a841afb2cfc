"""The forecast of a year: its requests are those that a store really gets, its figures add up, and what is not known is not made up."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lifecycle.capacity import DAYS, Sample, forecast, sample, tiering_requests, verify_requests
from lifecycle.verification import Verification
from schemas.errors import UsageError
from schemas.settings import ColdSettings, JobsSettings, LedgerSettings, Settings
from store.ledger import open_ledger
from store.objects.base import ObjectStore
from tests.eventgen import conversation
from tests.program import invoke
from tests.tiered import tiered

SAMPLE = Sample("2026-11-01", 1_000_000, 4, 200.0, 50.0, 12_500_000.0, 10, 5_000_000)


class Counting:
    """A store that counts what is asked of it."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.asked[name] += 1
        return getattr(self.store, name)

    @property
    def puts(self) -> int:
        return self.asked["create"] + self.asked["create_from_file"]

    @property
    def gets(self) -> int:
        return self.asked["get"] + self.asked["get_range"]


def test_requests_are_those_of_the_code(deployment: Settings) -> None:
    """One day tiered and verified: PUTs and GETs as the forecast has them."""
    with tiered(deployment) as rig:
        rig.ingest(list(conversation(rig.producer, chunks=4)))
        tiering, verifying = Counting(rig.objects), Counting(rig.objects)
        ledger = open_ledger(deployment, tiering)
        rig.tier(objects=tiering, ledger=ledger)
        rig.checkpoint()
        taken = sample(rig.catalog, rig.objects)
        Verification(verifying, rig.ledger.verifier, rig.registry).report()

        assert (taken.events, taken.segments, taken.schemas) == (11, 1, 1)
        assert tiering.puts == tiering_requests(taken)
        assert verifying.gets == verify_requests(taken, 1, days=1)


def test_a_year_adds_up() -> None:
    """365 such days; verification reads what stands by then, so its requests are those of the first day times 1 + 2 + … + 365."""
    figures = {figure.what: figure for figure in forecast(SAMPLE, Settings(ledger=LedgerSettings(checkpoint_s=3600)))}

    assert figures["events"].year == 365_000_000
    assert figures["cold bytes"].year == 50_000_000 * DAYS
    assert figures["hot bytes"].year == 400_000_000
    assert figures["objects"].day == 4 + 2 + 25 + 10
    assert figures["PUT requests"].day == 7 + 25 + 10
    verify = figures["GET requests: verify"]
    assert verify.year == (verify.day or 0) * DAYS * (DAYS + 1) / 2


def test_a_day_without_events_has_no_checkpoints() -> None:
    """None is written while no event comes, whatever the settings say of those that do."""
    figures = {figure.what: figure for figure in forecast(replace(SAMPLE, events=2), Settings())}

    assert figures["objects: checkpoints"].day == 3


def test_what_is_switched_off_or_unknown() -> None:
    """No verification, no requests of it; nothing cold yet, no bytes made up."""
    settings = Settings(jobs=JobsSettings(verify_s=0))
    figures = {figure.what: figure for figure in forecast(replace(SAMPLE, cold_bytes_per_event=None), settings)}

    assert figures["GET requests: verify"].year == 0
    assert (figures["cold bytes"].day, figures["cold bytes"].year) == (None, None)


def test_which_day(settings_embedded: Settings) -> None:
    """The latest that is over, else today; a day without events names those with some."""
    with tiered(settings_embedded) as rig:
        with pytest.raises(UsageError, match="no events of any day"):
            sample(rig.catalog, rig.objects)
        rig.ingest(list(conversation(rig.producer, chunks=4)))
        rig.set_day("2026-11-01")
        rig.tier()
        rig.ingest(list(conversation(rig.producer, chunks=4)))
        rig.set_day("2026-11-02")

        assert sample(rig.catalog, rig.objects, today="2026-11-02").day == "2026-11-01"
        assert (sample(rig.catalog, rig.objects, day="2026-11-02").events, sample(rig.catalog, rig.objects).day) == (11, "2026-11-02")
        assert not sample(rig.catalog, rig.objects, day="2026-11-02", today="2026-11-02").over
        with pytest.raises(UsageError, match="no events of 2026-10-01") as error:
            sample(rig.catalog, rig.objects, day="2026-10-01")
        assert error.value.hint == "days with events: 2026-11-01, 2026-11-02"


def test_the_command(tmp_path: Path) -> None:
    """A table for people, exact numbers for programs, one line for what is no day."""
    settings = Settings(data=tmp_path / "data", cold=ColdSettings(lock="none"))
    with tiered(settings) as rig:
        rig.ingest(list(conversation(rig.producer, chunks=4)))
        rig.tier()
    ran = invoke(settings, "capacity", "--format", "json")
    wrong = invoke(settings, "capacity", "--day", "yesterday")
    rows = {row["figure"]: row for row in map(json.loads, ran.stdout.splitlines())}

    assert (ran.exit_code, wrong.exit_code) == (0, 2), ran.output
    assert (rows["events"]["a_day"], rows["events"]["a_year"]) == (11, 11 * DAYS)
    assert "'yesterday' is no day" in wrong.output
