"""Anthropic's `/v1/messages`: passed through before Anthropic, translated before other upstreams."""

from __future__ import annotations

from typing import Any

from ingest.gateway.endpoints.anthropic import AnthropicAnswer
from ingest.gateway.endpoints.base import FOREIGN, Answer, Sending
from ingest.gateway.endpoints.translated import Reader, TranslatedAnswer, event, reader_of, to_upstream
from ingest.gateway.errors import ANTHROPIC
from ingest.gateway.exchange import Exchange
from ingest.gateway.veil import chat_additions
from schemas.requests import ChatRequest, ClientRequest, load
from schemas.requests.anthropic import from_anthropic
from schemas.requests.client import MessagesRequest, read_messages

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}


class Messages:
    """`/v1/messages`."""

    path = "/v1/messages"
    shape = ANTHROPIC

    def read(self, exchange: Exchange, body: bytes) -> MessagesRequest:
        """The request of a body."""
        return read_messages(body)

    def additions(self, request: ClientRequest, kind: str) -> dict[str, Any]:
        """What a chat request gets; nothing where another provider answers, which tells neither ids nor logprobs."""
        if kind in FOREIGN:
            return {}
        chat = ChatRequest(b"", {"stream": request.stream, "temperature": request.temperature}, [])
        return chat_additions(chat, kind)

    def sending(self, exchange: Exchange, request: ClientRequest, extra: dict[str, Any], kind: str) -> Sending:
        """The client's own bytes, or what they mean to another upstream."""
        if kind == "anthropic":
            return Sending(self.path, request.body, exchange.scope["query_string"])
        return to_upstream(from_anthropic(request.fields), extra, kind)

    def answer(self, request: ClientRequest, extra: dict[str, Any], kind: str, fingerprint: str | None) -> Answer:
        """A reader of Anthropic's events, or a writer of them."""
        return AnthropicAnswer() if kind == "anthropic" else MessageAnswer(request.stream, reader_of(kind))


class MessageAnswer(TranslatedAnswer):
    """Writes the chunks of a chat completion as Anthropic's events: one block of content after the other."""

    def __init__(self, stream: bool, reader: Reader) -> None:
        super().__init__(b"text/event-stream" if stream else b"application/json", reader)
        self._begun = False
        self._blocks = 0
        self._open: tuple[str, int] | None = None  # the kind of the open block, and which tool call it is
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._usage: dict[str, Any] = {}
        self._called = False

    def write_chunk(self, chunk: dict[str, Any]) -> bytes:
        """The events of one chunk."""
        out = [] if self._begun else [self._begin(chunk)]
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            out += self._delta(choice.get("delta") or {})
            if choice.get("finish_reason") is not None:
                self._stop = _stop(choice, self._called)
        return b"".join(out)

    def end(self, raw: bytes) -> bytes:
        """The last block's end, why it ended and what it cost, the message's end."""
        begun = b"" if self._begun else self._begin({})
        delta = {"type": "message_delta", "delta": self._stop, "usage": _usage(self._usage)}
        return begun + b"".join(self._close()) + _event(delta) + _event({"type": "message_stop"})

    def write_completion(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The whole message."""
        choice = completion["choices"][0]
        content = _content(choice["message"])
        called = any(block["type"] == "tool_use" for block in content)
        return _message(completion) | {"content": content, **_stop(choice, called), "usage": _usage(completion.get("usage") or {})}

    def _begin(self, chunk: dict[str, Any]) -> bytes:
        self._begun = True
        usage = {"input_tokens": len(chunk.get("prompt_token_ids") or ()), "output_tokens": 0}
        message = _message(chunk) | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return _event({"type": "message_start", "message": message})

    def _delta(self, delta: dict[str, Any]) -> list[bytes]:
        out: list[bytes] = []
        if thought := delta.get("reasoning") or delta.get("reasoning_content"):
            out += self._piece(("thinking", 0), {"thinking": "", "signature": ""}, {"type": "thinking_delta", "thinking": thought})
        if text := delta.get("content") or delta.get("refusal"):
            out += self._piece(("text", 0), {"text": ""}, {"type": "text_delta", "text": text})
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            begin = {"id": call.get("id"), "name": function.get("name"), "input": {}}
            piece = {"type": "input_json_delta", "partial_json": function.get("arguments") or ""}
            out += self._piece(("tool_use", call.get("index") or 0), begin, piece)
            self._called = True
        return out

    def _piece(self, kind: tuple[str, int], begin: dict[str, Any], piece: dict[str, Any]) -> list[bytes]:
        """A piece of a block, which is begun first where another one is open."""
        out: list[bytes] = []
        if self._open != kind:
            if kind[0] == "tool_use" and not isinstance(begin["name"], str):
                raise ValueError("a tool call without a name")
            out += self._close()
            block = {"type": kind[0], **begin}
            out.append(_event({"type": "content_block_start", "index": self._blocks, "content_block": block}))
            self._open = kind
        out.append(_event({"type": "content_block_delta", "index": self._blocks, "delta": piece}))
        return out

    def _close(self) -> list[bytes]:
        if self._open is None:
            return []
        self._open = None
        self._blocks += 1
        return [_event({"type": "content_block_stop", "index": self._blocks - 1})]


def _event(value: dict[str, Any]) -> bytes:
    return event(value, value["type"])


def _message(answer: dict[str, Any]) -> dict[str, Any]:
    name = str(answer.get("id") or "").removeprefix("chatcmpl-")
    return {"id": f"msg_{name}", "type": "message", "role": "assistant", "model": answer.get("model")}


def _stop(choice: dict[str, Any], called: bool) -> dict[str, Any]:
    """Why a message ended; vLLM tells the stop sequence that it met."""
    reason, met = choice.get("finish_reason"), choice.get("stop_reason")
    if reason == "stop" and isinstance(met, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": met}
    if reason == "stop" and called:  # vLLM says so of a tool that the client named
        return {"stop_reason": "tool_use", "stop_sequence": None}
    return {"stop_reason": _STOP_REASONS.get(str(reason), "end_turn"), "stop_sequence": None}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    prompt = usage.get("prompt_tokens") or 0
    counts = {"input_tokens": prompt - cached, "output_tokens": usage.get("completion_tokens") or 0}
    return counts | ({"cache_read_input_tokens": cached} if cached else {})


def _content(message: dict[str, Any]) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    if thought := message.get("reasoning") or message.get("reasoning_content"):
        content.append({"type": "thinking", "thinking": thought, "signature": ""})
    if text := message.get("content") or message.get("refusal"):
        content.append({"type": "text", "text": text})
    for call in message.get("tool_calls") or ():
        arguments = load(call["function"]["arguments"].encode())
        if not isinstance(arguments, dict):
            raise ValueError("the model called a tool with arguments that are no JSON object")
        content.append({"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments})
    return content
