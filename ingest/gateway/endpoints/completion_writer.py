"""Other providers' answers, written as chat completions for OpenAI's clients."""

from __future__ import annotations

import uuid
from typing import Any

from ingest.gateway.endpoints.base import DONE
from ingest.gateway.endpoints.translated import Reader, TranslatedAnswer, event
from schemas import clock
from schemas.requests import ClientRequest


class CompletionWriter(TranslatedAnswer):
    """Completes the chunks that a reader makes by what OpenAI's have besides; usage comes last, and only if it was asked for."""

    def __init__(self, request: ClientRequest, reader: Reader) -> None:
        super().__init__(b"text/event-stream" if request.stream else b"application/json", reader)
        self._usage_asked = request.usage_asked
        self._usage: dict[str, Any] = {}
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(clock.now_s()), "model": request.model}
        self._begun: set[int] = set()

    def write_chunk(self, chunk: dict[str, Any]) -> bytes:
        """The chunk with its head."""
        self._told(chunk)
        choices = [self._choice(choice) for choice in chunk.get("choices") or ()]
        return event({**self._kind("chat.completion.chunk"), "choices": choices}) if choices else b""

    def end(self, raw: bytes) -> bytes:
        """Usage and `[DONE]`."""
        asked = {**self._kind("chat.completion.chunk"), "choices": [], "usage": _total(self._usage)}
        return (event(asked) if self._usage_asked else b"") + b"data: " + DONE + b"\n\n"

    def write_completion(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The whole completion."""
        self._told(completion)
        choices = []
        for choice in completion["choices"]:
            message = {name: value for name, value in choice["message"].items() if value}
            if calls := message.get("tool_calls"):
                message["tool_calls"] = [{"type": "function", **{name: call[name] for name in ("id", "function")}} for call in calls]
            said = {"role": "assistant", "content": None, "refusal": None, **message}
            choices.append(
                {"index": choice["index"], "message": said, "logprobs": choice.get("logprobs"), "finish_reason": choice["finish_reason"]}
            )
        return {**self._kind("chat.completion"), "choices": choices, "usage": _total(self._usage)}

    def _told(self, answer: dict[str, Any]) -> None:
        self._head["model"] = answer.get("model") or self._head["model"]
        self._head["id"] = answer.get("id") or self._head["id"]
        self._usage = answer.get("usage") or self._usage

    def _kind(self, name: str) -> dict[str, Any]:
        return {**self._head, "object": name}

    def _choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        index = choice.get("index") or 0
        delta = dict(choice.get("delta") or {})
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", **{name: value for name, value in delta.items() if name != "role"}}
        if calls := delta.get("tool_calls"):
            delta["tool_calls"] = [{**call, "type": "function"} if call.get("id") else call for call in calls]
        return {"index": index, "delta": delta, "logprobs": choice.get("logprobs"), "finish_reason": choice.get("finish_reason")}


def _total(usage: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    return {**usage, "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
