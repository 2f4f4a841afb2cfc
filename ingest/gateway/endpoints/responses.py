"""OpenAI's `/v1/responses`: translated to chat completions or to what other upstreams speak."""

from __future__ import annotations

import uuid
from typing import Any

from ingest.gateway.endpoints.base import FOREIGN, Sending
from ingest.gateway.endpoints.translated import Reader, TranslatedAnswer, event, reader_of, to_upstream
from ingest.gateway.errors import RESPONSES
from ingest.gateway.exchange import Exchange
from ingest.gateway.veil import chat_additions
from schemas import clock
from schemas.requests import ChatRequest, ClientRequest
from schemas.requests.client import ResponsesRequest, read_responses
from schemas.requests.responses import conversation, from_responses

_ECHOED = (
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "reasoning",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
)
"""The fields of a request that its response repeats."""


class Responses:
    """`/v1/responses`."""

    path = "/v1/responses"
    shape = RESPONSES

    def read(self, exchange: Exchange, body: bytes) -> ResponsesRequest:
        """The request of a body."""
        return read_responses(body)

    def additions(self, request: ClientRequest, kind: str) -> dict[str, Any]:
        """What a chat request gets."""
        asked = {"stream": request.stream, "temperature": request.temperature, "top_logprobs": request.fields.get("top_logprobs")}
        return {} if kind in FOREIGN else chat_additions(ChatRequest(b"", asked, []), kind)

    def sending(self, exchange: Exchange, request: ClientRequest, extra: dict[str, Any], kind: str) -> Sending:
        """The chat request that it means.

        Raises:
            UsageError: the upstream cannot do what it asks for.
        """
        return to_upstream(conversation(from_responses(request.fields)), extra, kind)

    def answer(self, request: ClientRequest, extra: dict[str, Any], kind: str, fingerprint: str | None) -> TranslatedAnswer:
        """A writer of responses."""
        return ResponseAnswer(request, reader_of(kind))


class ResponseAnswer(TranslatedAnswer):
    """Writes the chunks of a chat completion as a response's events: one output item after the other."""

    def __init__(self, request: ClientRequest, reader: Reader) -> None:
        super().__init__(b"text/event-stream" if request.stream else b"application/json", reader)
        self._response = _response(request)
        self._keep = request.keep if isinstance(request, ResponsesRequest) else None
        self._output: list[dict[str, Any]] = self._response["output"]
        self._open: tuple[str, int] | None = None  # the type of the open item, and which tool call it is
        self._text = ""
        self._sequence = 0
        self._usage: dict[str, Any] = {}
        self._finish = ""

    def write_chunk(self, chunk: dict[str, Any]) -> bytes:
        """The events of one chunk."""
        out = [] if self._sequence else self._begin(chunk)
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            out += self._delta(choice.get("delta") or {})
            self._finish = choice.get("finish_reason") or self._finish
        return b"".join(out)

    def end(self, raw: bytes) -> bytes:
        """The last item's end and the whole response."""
        out = [] if self._sequence else self._begin({})
        out += self._close()
        self._response |= _outcome(self._finish, self._usage)
        self._kept(self._response)
        return b"".join([*out, self._event(f"response.{self._response['status']}", response=self._response)])

    def write_completion(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The whole response."""
        choice = completion["choices"][0]
        message = choice["message"]
        texts = (("reasoning", message.get("reasoning") or message.get("reasoning_content")), ("message", message.get("content")))
        self._output += [_done(kind, {}, text) for kind, text in texts if text]
        if refusal := message.get("refusal"):
            self._output.append(_done("message", {}, refusal))
        for call in message.get("tool_calls") or ():
            self._output.append(_done("function_call", _call(call), call["function"]["arguments"]))
        outcome = _outcome(choice.get("finish_reason") or "", completion.get("usage") or {})
        response = self._response | {"model": completion.get("model")} | outcome
        self._kept(response)
        return response

    def _kept(self, response: dict[str, Any]) -> None:
        if self._keep is not None:
            self._keep(response)

    def _begin(self, chunk: dict[str, Any]) -> list[bytes]:
        self._response["model"] = chunk.get("model") or self._response["model"]
        return [self._event(f"response.{name}", response=self._response) for name in ("created", "in_progress")]

    def _delta(self, delta: dict[str, Any]) -> list[bytes]:
        out: list[bytes] = []
        if thought := delta.get("reasoning") or delta.get("reasoning_content"):
            out += self._piece(("reasoning", 0), {}, thought)
        if text := delta.get("content") or delta.get("refusal"):
            out += self._piece(("message", 0), {}, text)
        for call in delta.get("tool_calls") or ():
            out += self._piece(("function_call", call.get("index") or 0), call, (call.get("function") or {}).get("arguments") or "")
        return out

    def _piece(self, kind: tuple[str, int], call: dict[str, Any], text: str) -> list[bytes]:
        """A piece of an item, which is begun first where another one is open."""
        out: list[bytes] = []
        if self._open != kind:
            out += self._close()
            self._output.append({**_begun(kind[0]), **(_call(call) if kind[0] == "function_call" else {})})
            self._open, self._text = kind, ""
            out.append(self._item_event("response.output_item.added", item=self._output[-1]))
            if kind[0] == "message":
                out.append(self._item_event("response.content_part.added", content_index=0, item_id=self._id, part=_text_part("")))
        if text:
            self._text += text
            out.append(self._item_event(_DELTA[kind[0]], item_id=self._id, delta=text, **_PLACE[kind[0]]))
        return out

    def _close(self) -> list[bytes]:
        """The ends of the open item, which say once more all that it holds."""
        if self._open is None:
            return []
        kind, self._open = self._open[0], None
        out = [self._item_event(_DONE[kind], item_id=self._id, **{_FIELD[kind]: self._text}, **_PLACE[kind], **_named(self._output[-1]))]
        item = self._output[-1] = _done(kind, self._output[-1], self._text)
        if kind == "message":
            out.append(self._item_event("response.content_part.done", content_index=0, item_id=self._id, part=item["content"][0]))
        return [*out, self._item_event("response.output_item.done", item=item)]

    @property
    def _id(self) -> Any:
        return self._output[-1]["id"]

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, output_index=len(self._output) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sequence += 1
        return event({"type": kind, "sequence_number": self._sequence - 1, **fields}, kind)


_DELTA = {
    "message": "response.output_text.delta",
    "reasoning": "response.reasoning_text.delta",
    "function_call": "response.function_call_arguments.delta",
}
_DONE = {name: kind.removesuffix("delta") + "done" for name, kind in _DELTA.items()}
_FIELD = {"message": "text", "reasoning": "text", "function_call": "arguments"}
_PLACE: dict[str, dict[str, Any]] = {
    "message": {"content_index": 0, "logprobs": []},
    "reasoning": {"content_index": 0},
    "function_call": {},
}
_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


def _response(request: ClientRequest) -> dict[str, Any]:
    echoed = {name: request.fields.get(name) for name in _ECHOED}
    defaults = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "metadata": {}, "text": {"format": {"type": "text"}}}
    known = {name: value for name, value in echoed.items() if value is not None}
    head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(clock.now_s()), "status": "in_progress"}
    rest: dict[str, Any] = {"error": None, "incomplete_details": None, "model": request.model, "output": [], "usage": None}
    if isinstance(request, ResponsesRequest):
        rest |= {"previous_response_id": request.previous, "store": request.fields.get("store") is not False}
    return {**head, **rest, **dict.fromkeys(_ECHOED), **defaults, **known}


def _outcome(finish: str, usage: dict[str, Any]) -> dict[str, Any]:
    """Status, what kept the response from being complete, and usage."""
    reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(finish)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    counted = {
        "input_tokens": usage.get("prompt_tokens") or 0,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": usage.get("completion_tokens") or 0,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": (usage.get("prompt_tokens") or 0) + (usage.get("completion_tokens") or 0),
    }
    status = "incomplete" if reason else "completed"
    return {"status": status, "incomplete_details": {"reason": reason} if reason else None, "usage": counted if usage else None}


def _begun(kind: str) -> dict[str, Any]:
    item: dict[str, Any] = {"id": f"{_PREFIX[kind]}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress"}
    if kind == "message":
        return {**item, "role": "assistant", "content": []}
    return {**item, "summary": []} if kind == "reasoning" else {**item, "arguments": ""}


def _done(kind: str, begun: dict[str, Any], text: str) -> dict[str, Any]:
    item = {**_begun(kind), **begun, "status": "completed"}
    if kind == "function_call":
        return {**item, "arguments": text}
    return {**item, "content": [_text_part(text) if kind == "message" else {"type": "reasoning_text", "text": text}]}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    name = (call.get("function") or {}).get("name")
    if not isinstance(name, str):
        raise ValueError("a tool call without a name")
    return {"call_id": call.get("id"), "name": name}


def _named(item: dict[str, Any]) -> dict[str, Any]:
    return {"name": item["name"]} if "name" in item else {}
