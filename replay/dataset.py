"""Recorded answers as training examples: a conversation that ends with what the model said, and where it comes from.

An example is kept whole or refused: whatever a format has no words for (an image in ShareGPT, a text completion in any of
them) is a reason, never left out in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from replay.state import Generation, Sequence, SessionState
from replay.words import iso, uuid
from schemas.errors import UsageError
from schemas.requests.recorded import as_chat


@dataclass(frozen=True, slots=True)
class Example:
    """One recorded sequence: messages in the words of chat completions, the last one is the answer; the tools that were offered.

    Ids and logprobs are empty where the tape has none for every token.
    """

    messages: list[dict[str, Any]]
    tools: list[Any]
    provenance: dict[str, Any]
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    def digest(self) -> bytes:
        """What two examples share that would teach the same."""
        return hashlib.sha256(json.dumps([self.messages, self.tools], sort_keys=True).encode()).digest()


@dataclass(frozen=True, slots=True)
class Left:
    """A generation that makes no example, and why; `refused` where it was an answer like others, which no format can express."""

    generation_id: bytes
    reason: str
    refused: bool = False


def examples_of(state: SessionState, generation: Generation) -> Iterator[Example | Left]:
    """The examples of a generation, one for each sequence that it ended well."""
    asked = _asked(state, generation)
    if isinstance(asked, Left):
        yield asked
        return
    for sequence in generation.sequences:
        if sequence.erased:
            yield Left(generation.generation_id, "the answer was erased or never recorded")
            continue
        answer = _answer(sequence)
        if len(answer) == 1:
            yield Left(generation.generation_id, "the answer is empty")
            continue
        entries = sequence.entries()
        ids = tuple(entry.token_id for entry in entries if entry.token_id is not None)
        logprobs = tuple(entry.logprob for entry in entries if entry.logprob is not None)
        yield Example(
            [*asked["messages"], answer],
            asked.get("tools") or [],
            _provenance(state, generation, sequence),
            generation.recording.prompt_token_ids if generation.recording else (),
            ids if len(ids) == len(entries) else (),
            logprobs if len(logprobs) == len(entries) else (),
        )


def _asked(state: SessionState, generation: Generation) -> dict[str, Any] | Left:
    """The request as it was answered, as a chat completion."""
    document, request = state.edited(generation), generation.request
    if generation.status != "finished":
        return Left(generation.generation_id, "it did not end well")
    if document is None or request is None or any(message.body is None for message in state.messages_of(generation)):
        return Left(generation.generation_id, "the request was erased or never recorded")
    try:
        asked = as_chat(request.endpoint, document)
    except UsageError as error:
        return Left(generation.generation_id, str(error.fault).partition(";")[0], refused=True)
    if not isinstance(asked.get("messages"), list):
        return Left(generation.generation_id, "it has no messages")
    return asked


def _answer(sequence: Sequence) -> dict[str, Any]:
    said = {"content": sequence.text(), "reasoning_content": sequence.text("reasoning"), "refusal": sequence.text("refusal")}
    message: dict[str, Any] = {"role": "assistant", **{name: text for name, text in said.items() if text}}
    calls = [call.content for call in sequence.calls if call.content]
    if calls:
        message["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
        ]
    return message


def _provenance(state: SessionState, generation: Generation, sequence: Sequence) -> dict[str, Any]:
    request, recording, environment = generation.request, generation.recording, state.environment_of(generation)
    model = recording.started.model if recording and recording.started else None
    return {
        "session": uuid(state.session_id or b""),
        "generation": uuid(generation.generation_id),
        "sequence": sequence.index,
        "model": model or (request.model if request else None),
        "recorded_at": iso(generation.submitted_at) if generation.submitted_at is not None else None,
        "edited": bool(len(generation.edits)),
        "tags": list(state.tags),
        "finish_reason": sequence.finished.finish_reason if sequence.finished else None,
        "environment": environment.event.environment_id.hex() if environment else None,
        "tenant": state.tenant,
    }
