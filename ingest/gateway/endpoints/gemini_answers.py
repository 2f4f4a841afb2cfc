"""Gemini's answers, read as chat completions for the tape and passed through to its own clients."""

from __future__ import annotations

import uuid
from collections import defaultdict
from typing import Any

from ingest.gateway.sse import Block
from schemas.requests import dump

_FINISH_REASONS = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    **dict.fromkeys(("SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY"), "content_filter"),
}


class GeminiAnswer:
    """Events pass as they came, in one JSON array where the client wants that; each is read as the chunk that it would be."""

    def __init__(self, *, array: bool = False) -> None:
        self.content_type: bytes | None = b"application/json" if array else None
        self._array = Array() if array else None
        self._called: defaultdict[int, int] = defaultdict(int)  # candidate → calls so far

    def read(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """The event as a chunk."""
        return self._answer(event, "delta")

    def write(self, event: dict[str, Any], chunk: dict[str, Any] | None, raw: bytes) -> bytes:
        """The event as it came, or as an entry of the array."""
        return self._array.entry(event) if self._array else raw

    def ends(self, block: Block) -> bool:
        """Never: the stream ends with the connection."""
        return False

    def end(self, raw: bytes) -> bytes:
        """The array's end."""
        return self._array.end() if self._array else raw

    def read_whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer as a chat completion."""
        return self._answer(answer, "message")

    def write_whole(self, answer: dict[str, Any], completion: dict[str, Any], raw: bytes) -> bytes:
        """The answer as it came."""
        return raw

    def _answer(self, event: dict[str, Any], part: str) -> dict[str, Any]:
        choices = [self._choice(candidate, part) for candidate in event.get("candidates") or ()]
        if not choices and (event.get("promptFeedback") or {}).get("blockReason"):
            choices = [{"index": 0, part: {}, "finish_reason": "content_filter"}]
        chunk = {"id": event.get("responseId"), "model": event.get("modelVersion"), "choices": choices}
        return {**chunk, "usage": _usage(event["usageMetadata"])} if event.get("usageMetadata") else chunk

    def _choice(self, candidate: dict[str, Any], part: str) -> dict[str, Any]:
        index = candidate.get("index") or 0
        parts = (candidate.get("content") or {}).get("parts") or ()
        said: dict[str, Any] = {"role": "assistant"} if part == "message" else {}
        for channel, thought in (("reasoning", True), ("content", False)):
            if text := "".join(entry["text"] for entry in parts if "text" in entry and bool(entry.get("thought")) is thought):
                said[channel] = text
        if calls := [self._call(index, entry["functionCall"]) for entry in parts if "functionCall" in entry]:
            said["tool_calls"] = calls
        reason = candidate.get("finishReason")
        finish = _FINISH_REASONS.get(reason, str(reason).lower()) if reason else None
        choice = {"index": index, part: said, "finish_reason": "tool_calls" if finish == "stop" and self._called[index] else finish}
        if chosen := (candidate.get("logprobsResult") or {}).get("chosenCandidates"):
            choice["logprobs"] = {"content": _scores(candidate["logprobsResult"], chosen)}
        return choice

    def _call(self, index: int, call: dict[str, Any]) -> dict[str, Any]:
        self._called[index] += 1
        function = {"name": call["name"], "arguments": dump(call.get("args") or {}).decode()}
        return {
            "index": self._called[index] - 1,
            "id": call.get("id") or f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": function,
        }


class Array:
    """A stream as Google writes it where nobody asked for events: one JSON array, an entry at a time."""

    def __init__(self) -> None:
        self._begun = False

    def entry(self, value: dict[str, Any]) -> bytes:
        """The next entry."""
        begun, self._begun = self._begun, True
        return (b",\n" if begun else b"[") + dump(value)

    def end(self) -> bytes:
        """The array's end."""
        return b"]" if self._begun else b"[]"


def _scores(result: dict[str, Any], chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tops = [top.get("candidates") or () for top in result.get("topCandidates") or ()]
    tops += [()] * (len(chosen) - len(tops))
    return [{**_score(one), "top_logprobs": [_score(other) for other in top]} for one, top in zip(chosen, tops, strict=False)]


def _score(candidate: dict[str, Any]) -> dict[str, Any]:
    token = candidate.get("token") or ""
    return {"token": token, "logprob": candidate.get("logProbability"), "bytes": list(token.encode())}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Usage as OpenAI counts it: thoughts are part of the completion."""
    thought = usage.get("thoughtsTokenCount") or 0
    prompt = (usage.get("promptTokenCount") or 0) + (usage.get("toolUsePromptTokenCount") or 0)
    completion = (usage.get("candidatesTokenCount") or 0) + thought
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": usage.get("cachedContentTokenCount") or 0},
        "completion_tokens_details": {"reasoning_tokens": thought},
    }
