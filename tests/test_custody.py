"""The simulated year of `make custody`, in some days: on a bucket with object lock."""

from __future__ import annotations

from pathlib import Path

from schemas.settings import Settings
from scripts.custody import Year, settings_of
from tokentape.installation import Installation

DAYS = 9
"""Enough for every rule, the hold and the erasure to come due."""


def test_some_days_of_custody(settings_distributed: Settings, tmp_path: Path) -> None:
    """What is due goes, what is held stays, who asked is forgotten, and both verifiers find all of it in order."""
    said: list[str] = []
    with Installation(settings_of(tmp_path / "data", settings_distributed.cold, DAYS), source="lifecycle") as installation:
        holds = Year(installation, DAYS, said.append).run()

    assert [what for what, so in holds.items() if not so] == [], "\n".join(said)
    assert len(holds) == 7
