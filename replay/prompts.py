"""The prompt that a recorded sequence is forced behind: as recorded, or as today's template makes it of the recorded messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from replay.drift import Judgement
from replay.engines.base import Engine, Refused, Request
from replay.state import Generation
from schemas.events import Difference

TEMPLATE_ITEMS = frozenset({"chat_template.sha256", "tokenizer.sha256", "tokenizer_info.sha256", "probe.chat_template", "probe.tokenizer"})
"""Items of an environment that say how messages become ids."""
DATE_TOKENS = 12
"""A template may tell today's date: one run of so many tokens that differ is not another template."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids to force a sequence behind; `note` says that they are today's, `differs` from which token on today's are others."""

    token_ids: tuple[int, ...]
    note: str | None = None
    differs: int | None = None

    def judged(self, judgement: Judgement) -> Judgement:
        """The judgement with what the prompt adds to it."""
        if self.differs is not None and judgement.verdict in ("identical", "numeric_drift"):
            reason = f"today's template or tokenizer makes another prompt of the messages, from its token {self.differs} on"
            return replace(judgement, verdict="model_differs", reason=f"{reason}; behind the recorded prompt: {judgement.reason}")
        return replace(judgement, reason=f"{judgement.reason}; {self.note}") if self.note else judgement


def prompt_of(generation: Generation, request: Request, engine: Engine, differences: Iterable[Difference]) -> Prompt:
    """The prompt of a generation. The engine is asked to render it where the recording lacks it, or the template changed.

    Raises:
        EngineUnavailable: the engine does not answer.
    """
    recorded = generation.recording.prompt_token_ids if generation.recording else ()
    changed = any(difference.key in TEMPLATE_ITEMS for difference in differences)
    if recorded and not changed:
        return Prompt(recorded)
    rendered = engine.render(request)
    if isinstance(rendered, Refused):
        return Prompt(recorded)
    if not recorded:
        return Prompt(rendered, note="the recording has no prompt token ids, so today's template rendered it")
    return Prompt(recorded, differs=_first_other(recorded, rendered))


def _first_other(recorded: tuple[int, ...], rendered: tuple[int, ...]) -> int | None:
    """Where two prompts part; None where they are the same, or no more than a date apart."""
    if recorded == rendered:
        return None
    places = [i for i, (a, b) in enumerate(zip(recorded, rendered, strict=False)) if a != b]
    if len(recorded) == len(rendered) and places[-1] - places[0] < DATE_TOKENS:
        return None
    return places[0] if places else min(len(recorded), len(rendered))
