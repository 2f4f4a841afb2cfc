"""What replays that follow one another need to ask an engine only once."""

from __future__ import annotations

from dataclasses import dataclass, field

from replay.engines.base import Engine
from replay.floors import Floor, measured
from schemas import events as e


@dataclass(frozen=True, slots=True)
class Memory:
    """What an engine told and was measured to be, for replays that follow one another."""

    environments: dict[bytes | None, e.EnvironmentCaptured | None] = field(default_factory=dict)
    floors: dict[tuple[str | None, Floor], Floor] = field(default_factory=dict)

    def environment(self, engine: Engine, recorded: e.EnvironmentCaptured | None) -> e.EnvironmentCaptured | None:
        """The engine's environment, asked once for each that was recorded."""
        key = recorded.environment_id if recorded else None
        if key not in self.environments:
            self.environments[key] = engine.fingerprint(recorded)
        return self.environments[key]

    def floor(self, engine: Engine, model: str | None, default: Floor) -> Floor:
        """The floor as measured, once for a model and default."""
        if (model, default) not in self.floors:
            self.floors[model, default] = measured(engine, model, default)
        return self.floors[model, default]
