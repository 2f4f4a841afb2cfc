"""What replays of one engine, beside and after one another, need to ask it only once."""

from __future__ import annotations

import threading
import time

from replay.engines.base import Engine
from replay.floors import Floor, measured
from schemas import events as e

ASK_AGAIN_S = 60.0
"""How long an engine is taken to be what it said it is."""


class Memory:
    """What an engine told and was measured to be. Many threads may use it; one asks while the others wait.

    `ask_again_s` is how long that holds: a server may be another one by then.
    """

    def __init__(self, ask_again_s: float = ASK_AGAIN_S) -> None:
        self._ask_again_s = ask_again_s
        self._environments: dict[bytes | None, e.EnvironmentCaptured | None] = {}
        self._floors: dict[tuple[str | None, Floor], Floor] = {}
        self._lock = threading.Lock()
        self._asked_at = time.monotonic()

    def environment(self, engine: Engine, recorded: e.EnvironmentCaptured | None) -> e.EnvironmentCaptured | None:
        """The engine's environment, asked once for each that was recorded, and again after `ask_again_s`.

        Raises:
            EngineUnavailable: it does not answer.
        """
        key = recorded.environment_id if recorded else None
        with self._lock:
            if time.monotonic() - self._asked_at > self._ask_again_s:
                self._environments, self._floors, self._asked_at = {}, {}, time.monotonic()
            if key not in self._environments:
                self._environments[key] = engine.fingerprint(recorded)
            return self._environments[key]

    def floor(self, engine: Engine, model: str | None, default: Floor) -> Floor:
        """The floor as measured, once for a model and default."""
        with self._lock:
            if (model, default) not in self._floors:
                self._floors[model, default] = measured(engine, model, default)
            return self._floors[model, default]
