"""The prompt that a recorded sequence is forced behind: as recorded, or as today's template makes it of the recorded messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from replay.drift import Judgement
from replay.engines.base import Refused
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


def needs_rendering(generation: Generation, differences: Iterable[Difference]) -> bool:
    """Whether the engine has to render the prompt: the recording lacks it, or the template changed."""
    return not _recorded(generation) or any(difference.key in TEMPLATE_ITEMS for difference in differences)


def prompt_of(generation: Generation, rendered: tuple[int, ...] | Refused | None) -> Prompt:
    """The prompt of a generation. `rendered` is what the engine makes of its request, None where it was not asked."""
    recorded = _recorded(generation)
    if rendered is None or isinstance(rendered, Refused):
        return Prompt(recorded)
    if not recorded:
        return Prompt(rendered, note="the recording has no prompt token ids, so today's template rendered it")
    return Prompt(recorded, differs=_first_other(recorded, rendered))


def _recorded(generation: Generation) -> tuple[int, ...]:
    return generation.recording.prompt_token_ids if generation.recording else ()


def _first_other(recorded: tuple[int, ...], rendered: tuple[int, ...]) -> int | None:
    """Where two prompts part; None where they are the same, or no more than a date apart."""
    if recorded == rendered:
        return None
    places = [i for i, (a, b) in enumerate(zip(recorded, rendered, strict=False)) if a != b]
    if len(recorded) == len(rendered) and places[-1] - places[0] < DATE_TOKENS:
        return None
    return places[0] if places else min(len(recorded), len(rendered))
