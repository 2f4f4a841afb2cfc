"""What the gateway adds to a request, and how it takes out of the answer what the client did not ask for.

The client gets what the upstream would have sent without the additions: byte for byte where nothing was added to a
chunk, the same keys in the same order where something was. Known about vLLM (0.24 to 0.32): `token_ids`, `logprobs` and
`prompt_token_ids` are null when not asked for; a chunk that carries only ids (`delta` is {}) would not have been sent;
without `include_usage` the fingerprint stands on the chunk that finishes a sequence instead of on the usage chunk.
"""

from __future__ import annotations

from typing import Any

import orjson

from schemas.requests import ClientRequest, dump
from schemas.sink import random16

SEED_BITS = 31
"""Every engine takes a positive 32-bit integer."""


def chat_additions(request: ClientRequest, kind: str) -> dict[str, Any]:
    """The fields to add to a chat request, by kind of upstream; what the upstream would refuse they do not make acceptable."""
    asked = any(request.fields.get(name) for name in ("logprobs", "top_logprobs", "logprob_token_ids"))
    return _additions(request, kind, {} if asked else {"logprobs": True})


def completion_additions(request: ClientRequest, kind: str) -> dict[str, Any]:
    """The fields to add to a completion request: 0 logprobs are the drawn token's own.

    Where the prompt is to be echoed, logprobs would score it and token ids would leave it out (vLLM 0.32), so neither is.
    """
    echo = bool(request.fields.get("echo"))
    asked = request.fields.get("logprobs") is not None or echo
    extra = _additions(request, kind, {} if asked else {"logprobs": 0})
    return {name: value for name, value in extra.items() if not (echo and name == "return_token_ids")}


def _additions(request: ClientRequest, kind: str, logprobs: dict[str, Any]) -> dict[str, Any]:
    fields = request.fields
    extra: dict[str, Any] = {}
    if kind == "vllm":
        if not fields.get("return_token_ids"):
            extra["return_token_ids"] = True
        if not fields.get("use_beam_search"):
            extra |= logprobs
            if fields.get("seed") is None and request.temperature != 0.0:
                extra["seed"] = int.from_bytes(random16()[:4], "big") >> 32 - SEED_BITS  # at temperature 0 nothing is drawn
    options = fields.get("stream_options")
    if request.stream and not request.usage_asked and (options is None or isinstance(options, dict)):
        extra["stream_options"] = {**(options or {}), "include_usage": True}
    return extra


class Veil:
    """Takes the additions out of one answer. A chunk MUST be read for the tape before it comes here: it is changed."""

    def __init__(self, extra: dict[str, Any], kind: str, n: int, fingerprint: str | None) -> None:
        self.ids = "return_token_ids" in extra
        self.logprobs = "logprobs" in extra
        self._usage = "stream_options" in extra
        self._fingerprints = self._usage and kind == "vllm"
        self._fingerprint = fingerprint  # as known before; the usage chunk says it anew
        self._open = n
        self._held: dict[str, Any] | None = None
        self.idle = not (self.ids or self.logprobs or self._usage)

    def chunk(self, chunk: dict[str, Any], raw: bytes) -> bytes:
        """The bytes to send for a chunk of a stream, empty for none; `raw` is the whole event as it came."""
        if self.idle:
            return raw
        if self._held is not None and chunk.get("choices", 0) != []:
            return self.rest() + self.chunk(chunk, raw)
        choices = chunk.get("choices")
        if self._usage and "usage" in chunk and (hidden := self._without_usage(chunk, choices)) is not None:
            return hidden
        changed = self._usage and chunk.get("usage", 0) is None and chunk.pop("usage", 0) is None
        if self.ids and chunk.get("prompt_token_ids") is not None:
            chunk["prompt_token_ids"] = None
            changed = True
        for choice in choices or ():
            if self._strip(choice):
                changed = True
                if self.ids and self.logprobs and choice.get("delta") == {} and choice.get("finish_reason") is None:
                    return b""
            if self._fingerprints and choice.get("finish_reason") is not None:
                self._open -= 1
                if not self._open:
                    self._held = chunk
                    return b""
                if self._fingerprint:
                    chunk["system_fingerprint"] = self._fingerprint
                    changed = True
        return _event(chunk) if changed else raw

    def whole(self, answer: dict[str, Any], raw: bytes) -> bytes:
        """The bytes to send for an answer that is not a stream."""
        changed = False
        if self.ids and answer.get("prompt_token_ids") is not None:
            answer["prompt_token_ids"] = None
            changed = True
        for choice in answer.get("choices") or ():
            changed = self._strip(choice) or changed
        return dump(answer) if changed else raw

    def rest(self) -> bytes:
        """The chunk that waited for the fingerprint, if the stream ended without one."""
        held, self._held = self._held, None
        return _event(held) if held is not None else b""

    def _strip(self, choice: dict[str, Any]) -> bool:
        changed = False
        if self.ids and choice.get("token_ids") is not None:
            choice["token_ids"] = None
            changed = True
        if self.ids and choice.get("prompt_token_ids") is not None:  # where completions have it
            choice["prompt_token_ids"] = None
            changed = True
        if self.logprobs and choice.get("logprobs") is not None:
            choice["logprobs"] = None
            changed = True
        return changed

    def _without_usage(self, chunk: dict[str, Any], choices: Any) -> bytes | None:
        """For the usage chunk: what waited for it; None for any other chunk.

        A server that is set to give usage with every chunk gives it without being asked: then nothing is hidden.
        """
        if choices:
            if chunk["usage"] is not None:
                self._usage = self._fingerprints = False
            return None
        if chunk["usage"] is None:
            return None
        if self._held is not None and chunk.get("system_fingerprint"):
            self._held["system_fingerprint"] = chunk["system_fingerprint"]
        return self.rest()


def _event(chunk: dict[str, Any]) -> bytes:
    try:
        return b"data: " + orjson.dumps(chunk) + b"\n\n"
    except TypeError:
        return b"data: " + dump(chunk) + b"\n\n"
