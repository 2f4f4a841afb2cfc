"""A hundred stopped requests over a day of simulated time: each is answered by somebody or expires by its rule."""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import httpx

from ingest.debug.desk import Desk
from ingest.gateway import stops
from schemas.errors import ConflictError
from schemas.events import BreakpointReleased
from tests.debug_rig import debugging, payloads
from tests.gateway_rig import HELLO
from tests.program import until

REQUESTS, HOURS = 100, (1, 5, 12, 23)


class _Clock:
    """The stops' clock, which a day passes on within seconds."""

    minutes = 0

    def __call__(self) -> float:
        return 60.0 * self.minutes


def run() -> list[dict[str, Any]]:
    """Rows: how many of the requests ended, and how."""
    clock, chance, began = _Clock(), random.Random(11), time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(stops, "now", clock),
        debugging(Path(folder), debug={"keepalive_s": 3600.0}) as made,
        ThreadPoolExecutor(REQUESTS) as clients,
    ):
        for hour in HOURS:
            for action in ("release", "refuse"):
                made.stop(breakpoint_id=f"{action}-{hour}", tag=f"{action}-{hour}", deadline_s=hour * 3600.0, default_action=action)
        names = [f"{chance.choice(['release', 'refuse'])}-{chance.choice(HOURS)}" for _ in range(REQUESTS)]
        answers = [clients.submit(_ask, made.rig.url, name) for name in names]
        ids = made.waiting(REQUESTS)
        for clock.minutes in range(0, 24 * 60 + 1, 30):
            if chance.random() < 0.6:
                _decide(made.desk, chance.choice(ids), chance.choice(["release", "refuse"]))
        codes = Counter(answer.result(300) for answer in answers)
        releases = until(lambda: found if len(found := payloads(made.rig.events(), BreakpointReleased)) == REQUESTS else None)
    actions = Counter(release.action for release in releases)
    decided = sum(count for action, count in actions.items() if action != "expired")
    ended = {"beside": "stopped", "beside_value": REQUESTS, "reach": "1"}
    return [
        {"what": "stopped requests that ended, 24 h simulated", "value": sum(codes.values()), "unit": "requests", **ended,
         "ratio": sum(codes.values()) / REQUESTS},
        {"what": "decided by somebody", "value": decided, "unit": "requests"},
        {"what": "expired by their rule", "value": actions["expired"], "unit": "requests"},
        {"what": "the day took", "value": time.monotonic() - began, "unit": "s"},
    ]  # fmt: skip


def _ask(url: str, tag: str) -> int:
    body = {"model": "m", "messages": HELLO}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers={"x-tokentape-tags": tag}, timeout=300).status_code


def _decide(desk: Desk, generation: str, verb: str) -> None:
    with suppress(ConflictError):  # it was decided or had expired by then
        desk.ask(generation, verb)
