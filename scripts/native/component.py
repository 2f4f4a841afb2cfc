"""What every service is to the one who runs it: an address book entry, a command, and a question that tells readiness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scripts.native.tools import Say

Address = dict[str, str]
"""What clients need to know, as it stands in state.json (never the whole of it in a log: it holds credentials)."""


@dataclass(frozen=True)
class Launch:
    """How to start a service: program and arguments, and its whole environment."""

    argv: list[str]
    env: Mapping[str, str]


class Component(Protocol):
    """One service. ``home`` is its own folder below the state directory, kept between stop and start."""

    name: str
    patience_s: float
    """How long it may take to be ready on a busy machine of two cores."""
    grace_s: float
    """How long it may take to end after SIGTERM."""
    ports: tuple[str, ...]
    """Names of the ports it listens on, the one of its clients first."""

    def configure(self, home: Path, ports: Mapping[str, int], say: Say) -> Address:
        """Write what it needs into ``home`` and return its address; installs its programs when they are missing."""

    def launch(self, home: Path, address: Address, say: Say) -> Launch:
        """The command that serves ``address`` from ``home``."""

    def ready(self, address: Address) -> bool:
        """Whether it answers a real question of its protocol; False while it cannot be reached."""

    def warm(self, address: Address) -> None:
        """Make the first, slow request. Raises ServiceError when it fails."""
