"""A generation as somebody else tells of it, whole and afterwards, as the events that record one.

What is told so has no token ids, no logprobs and no times between tokens: an answer is one entry of its sequence for each channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from schemas import events as e
from schemas.errors import UsageError
from schemas.requests.jsontext import double_of, dump, long_of, text_of
from schemas.requests.recorded import CHAT
from schemas.sink import new_id

CHANNELS = ("reasoning", "content", "refusal")
"""In the order in which a model says them."""


@dataclass(frozen=True)
class Asked:
    """A request in the words of a chat completion; `parameters` is all of it but its messages."""

    messages: Sequence[Mapping[str, Any]]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    endpoint: str = CHAT


@dataclass(frozen=True)
class Answered:
    """One answer to it: texts by channel, None where nothing is known, and the tools that it calls."""

    index: int = 0
    said: Mapping[str, str | None] = field(default_factory=dict)
    calls: Sequence[e.ToolCallContent] = ()
    finish_reason: str | None = None


class Bodies:
    """The messages that a session has: each is told with its body once, and by its id afterwards."""

    def __init__(self, told: Iterable[e.Payload] = ()) -> None:
        """`told` is what the session has recorded already."""
        contents = [payload.content for payload in told if isinstance(payload, e.RequestSubmitted) and payload.content]
        self._ids = {message.body: message.message_id for content in contents for message in content.messages if message.body}

    def tell(self, messages: Iterable[Mapping[str, Any]]) -> tuple[list[bytes], list[e.Message]]:
        """The ids of all of these messages, and those of them that were not told before.

        Raises:
            UsageError: one of them is no JSON.
        """
        ids, fresh = [], []
        for message in messages:
            body = json_text(message)
            if body not in self._ids:
                self._ids[body] = new_id()
                fresh.append(e.Message(message_id=self._ids[body], role=str(message.get("role", "?")), body=body))
            ids.append(self._ids[body])
        return ids, fresh


def request_of(generation: bytes, asked: Asked, bodies: Bodies, **facts: Any) -> e.RequestSubmitted:
    """The event of a request; `facts` are further fields of it.

    Raises:
        UsageError: a part of it is no JSON.
    """
    ids, fresh = bodies.tell(asked.messages)
    given = asked.parameters
    return e.RequestSubmitted(
        generation_id=generation,
        endpoint=asked.endpoint,
        model=text_of(given.get("model")),
        stream=given.get("stream") is True,
        n=long_of(given.get("n")) or 1,
        seed=long_of(given.get("seed")),
        temperature=double_of(given.get("temperature")),
        max_tokens=long_of(given.get("max_tokens")),
        tools=len(given["tools"]) if isinstance(given.get("tools"), list) else 0,
        message_ids=ids,
        content=e.RequestContent(messages=fresh, parameters=json_text(given)),
        **facts,
    )


def answers_of(generation: bytes, answers: Sequence[Answered], offset_us: int = 0) -> Iterator[e.Payload]:
    """The events of its answers, all of which came `offset_us` after the request, and of their ends."""
    for answer in answers:
        said = [(channel, text) for channel in CHANNELS if (text := answer.said.get(channel)) is not None]
        for position, (channel, text) in enumerate(said):
            content = e.ChunkContent(text=text, lengths=[len(e.clean_text(text))])
            yield e.TokenChunk(
                generation_id=generation,
                index=answer.index,
                position=position,
                channel=channel,
                offsets_us=[offset_us],
                content=content,
            )
        for number, call in enumerate(answer.calls):
            yield e.ToolCall(generation_id=generation, index=answer.index, call_index=number, offset_us=offset_us, content=call)
        yield e.SequenceFinished(
            generation_id=generation, index=answer.index, tokens=len(said), finish_reason=answer.finish_reason, offset_us=offset_us
        )


def entries(answers: Sequence[Answered]) -> int:
    """How many entries are recorded of these answers."""
    return sum(1 for answer in answers for channel in CHANNELS if answer.said.get(channel) is not None)


def json_text(value: Any) -> str:
    """A part of a request as JSON text.

    Raises:
        UsageError: it is none.
    """
    try:
        return dump(value).decode()
    except (TypeError, ValueError, orjson.JSONEncodeError) as error:
        raise UsageError(f"a part of the request is no JSON: {error}", operation="import", hint="texts, numbers, lists, objects") from error
