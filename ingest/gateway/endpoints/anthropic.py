"""Anthropic's answers, read as chat completions for the tape and passed through to its own clients."""

from __future__ import annotations

from typing import Any

from ingest.gateway.sse import Block
from schemas.requests import dump

_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class AnthropicAnswer:
    """Events pass as they came; each is read as the chunk of a chat completion that it would be."""

    content_type: bytes | None = None

    def __init__(self) -> None:
        self._calls: dict[int, int] = {}  # block → tool call
        self._usage: dict[str, Any] = {}

    def read(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """The event as a chunk; None for pings and ends of blocks."""
        kind = event.get("type")
        if kind == "message_start":
            message = event["message"]
            self._usage = dict(message.get("usage") or {})
            chunk = {"id": message.get("id"), "model": message.get("model")}
            return chunk | {"choices": [{"index": 0, "delta": {"role": message.get("role")}}]}
        if kind == "content_block_start":
            return _chunk(self._begun(event["index"], event["content_block"]))
        if kind == "content_block_delta":
            return _chunk(self._delta(event["index"], event["delta"]))
        if kind == "message_delta":
            self._usage |= event.get("usage") or {}
            return {"usage": _usage(self._usage), "choices": [{"index": 0, **_finish(event["delta"])}]}
        return None

    def write(self, event: dict[str, Any], chunk: dict[str, Any] | None, raw: bytes) -> bytes:
        """The event as it came."""
        return raw

    def ends(self, block: Block) -> bool:
        """Whether it is the message's end."""
        return block.name == b"message_stop"

    def end(self, raw: bytes) -> bytes:
        """The upstream's own end."""
        return raw

    def read_whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The message as a chat completion."""
        blocks = answer["content"]
        calls = [_call(at, block) for at, block in enumerate(block for block in blocks if block["type"] == "tool_use")]
        message = {"role": answer.get("role"), "tool_calls": calls}
        for channel, kind, field in (("reasoning", "thinking", "thinking"), ("content", "text", "text")):
            message[channel] = "".join(block[field] for block in blocks if block["type"] == kind)
        choice = {"index": 0, "message": message, **_finish(answer)}
        return {"id": answer.get("id"), "model": answer.get("model"), "usage": _usage(answer.get("usage") or {}), "choices": [choice]}

    def write_whole(self, answer: dict[str, Any], completion: dict[str, Any], raw: bytes) -> bytes:
        """The message as it came."""
        return raw

    def _begun(self, index: int, block: dict[str, Any]) -> dict[str, Any] | None:
        if block.get("type") == "tool_use":
            self._calls[index] = len(self._calls)
            return {"tool_calls": [_call(self._calls[index], {**block, "input": None})]}
        text = block.get("text") or block.get("thinking")
        return {"reasoning" if block.get("type") == "thinking" else "content": text} if text else None

    def _delta(self, index: int, delta: dict[str, Any]) -> dict[str, Any] | None:
        kind = delta.get("type")
        if kind == "text_delta":
            return {"content": delta["text"]}
        if kind == "thinking_delta":
            return {"reasoning": delta["thinking"]}
        if kind == "input_json_delta" and index in self._calls:
            return {"tool_calls": [{"index": self._calls[index], "function": {"arguments": delta["partial_json"]}}]}
        return None


def _chunk(delta: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if delta is None else {"choices": [{"index": 0, "delta": delta}]}


def _call(index: int, block: dict[str, Any]) -> dict[str, Any]:
    arguments = None if block["input"] is None else dump(block["input"]).decode()
    return {"index": index, "id": block.get("id"), "function": {"name": block.get("name"), "arguments": arguments}}


def _finish(answer: dict[str, Any]) -> dict[str, Any]:
    reason = answer.get("stop_reason")
    return {"finish_reason": _FINISH_REASONS.get(reason, reason) if reason else None, "stop_reason": answer.get("stop_sequence")}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Usage as OpenAI counts it: what came from a cache is part of the prompt."""
    cached = usage.get("cache_read_input_tokens") or 0
    prompt = (usage.get("input_tokens") or 0) + cached + (usage.get("cache_creation_input_tokens") or 0)
    return {"prompt_tokens": prompt, "completion_tokens": usage.get("output_tokens"), "prompt_tokens_details": {"cached_tokens": cached}}
