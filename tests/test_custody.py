"""The simulated year of `make custody`, in some days: on a bucket with object lock."""

from __future__ import annotations

import contextlib
from pathlib import Path

from schemas.settings import Settings
from scripts.custody import Year, settings_of

DAYS = 9
"""Enough for every rule, the hold and the erasure to come due."""


def test_some_days_of_custody(settings_distributed: Settings, tmp_path: Path) -> None:
    """What is due goes, what is held stays, who asked is forgotten, what is lost comes back, and both verifiers find it in order."""
    said: list[str] = []
    with contextlib.closing(Year(settings_of(tmp_path / "data", settings_distributed.cold, DAYS), DAYS, said.append)) as year:
        holds = year.run()

    assert [what for what, so in holds.items() if not so] == [], "\n".join(said)
    assert len(holds) == 8
