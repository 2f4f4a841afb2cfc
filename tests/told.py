"""What the tape tells of one generation, in the words in which a client saw it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from schemas.events import Event, GenerationFinished, RequestSubmitted, SequenceFinished, TokenChunk, ToolCall, ToolCallContent


@dataclass
class Choice:
    """One sequence."""

    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    calls: list[ToolCallContent] = field(default_factory=list)


@dataclass
class Told:
    """One generation; `ids` is how many token ids it has."""

    choices: list[Choice]
    ids: int
    prompt_tokens: int | None
    completion_tokens: int | None


def told_of(events: list[Event], generation: str) -> Told:
    """The generation of this id."""
    wanted = uuid.UUID(generation).bytes
    mine = [event.payload for event in events if getattr(event.payload, "generation_id", None) == wanted]
    finished = next(payload for payload in mine if isinstance(payload, GenerationFinished))
    choices = [Choice() for _ in range(finished.sequences)]
    ids = 0
    for payload in mine:
        if isinstance(payload, TokenChunk) and payload.content is not None:
            ids += len(payload.content.token_ids)
            if payload.channel == "content":
                choices[payload.index].text += payload.content.text
            elif payload.channel == "reasoning":
                choices[payload.index].reasoning += payload.content.text
        elif isinstance(payload, ToolCall) and payload.content is not None:
            choices[payload.index].calls.append(payload.content)
        elif isinstance(payload, SequenceFinished):
            choices[payload.index].finish = payload.finish_reason
    return Told(choices, ids, finished.prompt_tokens, finished.completion_tokens)


def last_told(events: list[Event]) -> Told:
    """The generation that was asked for last."""
    submitted = [event for event in events if isinstance(event.payload, RequestSubmitted)]
    last = max(submitted, key=lambda event: event.recorded_at)
    assert isinstance(last.payload, RequestSubmitted)
    return told_of(events, str(uuid.UUID(bytes=last.payload.generation_id)))
