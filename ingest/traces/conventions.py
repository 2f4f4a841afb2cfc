"""What a span says of a call to a model by OpenTelemetry's conventions for generative AI, and by those before them.

Messages are read where each generation of the conventions puts them: in attributes of the span as JSON or as values
(`gen_ai.input.messages`, since 1.37), in the event with the details of the operation, in an event for each message (1.28 to 1.36), in
one for the prompt and one for the completion (before), or flattened into numbered attributes, as OpenLLMetry does.
What is not understood stays in the request, under `metadata`, which changes nothing of what a model answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ingest.retelling import Answered, Asked, json_text
from ingest.traces.reading import Span
from schemas.events import ToolCallContent
from schemas.requests.jsontext import double_of, long_of, text_of
from schemas.requests.recorded import CHAT

GENERATING = frozenset({"chat", "generate_content", "text_completion", "embeddings"})
"""Values of `gen_ai.operation.name` that are calls to a model. Agents, tools and retrievals around them are not."""
AROUND = frozenset({"create_agent", "invoke_agent", "invoke_workflow", "execute_tool", "retrieval", "plan"})
DETAILS = "gen_ai.client.inference.operation.details"
"""The event that has what stands in the span's attributes elsewhere."""
PARAMETERS = {
    **{name: name for name in ("model", "temperature", "top_p", "top_k", "max_tokens", "seed", "frequency_penalty", "presence_penalty")},
    "stop_sequences": "stop",
    "choice.count": "n",
    "stream": "stream",
}
"""`gen_ai.request.…` in the words of a chat completion."""
CONVERSATION = ("gen_ai.conversation.id", "session.id")
USER = ("user.id", "enduser.id")
FIRST_TOKEN_S = ("gen_ai.response.time_to_first_chunk", "gen_ai.latency.time_to_first_token")
_MESSAGE_EVENT = re.compile(r"gen_ai\.(system|user|assistant|tool)\.message")
_NUMBERED = re.compile(r"gen_ai\.(prompt|completion)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Call:
    """One call to a model as its span tells it."""

    asked: Asked
    answers: tuple[Answered, ...]
    response_id: str | None
    response_model: str | None
    status: int | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    first_token_us: int | None
    error_type: str | None
    error: str


def is_call(span: Span) -> bool:
    """Whether a span is a call to a model."""
    operation = span.attributes.get("gen_ai.operation.name")
    return operation in GENERATING or (operation not in AROUND and "gen_ai.request.model" in span.attributes)


def first_of(span: Span, names: tuple[str, ...]) -> str | None:
    """The first of some attributes that the span has, as text."""
    return next((str(value) for name in names if (value := span.attributes.get(name)) not in (None, "")), None)


def call_of(span: Span) -> Call:
    """What the span says."""
    told = _Told(span)
    messages = [message for each in told.system() + told.messages("input") for message in _in_chat(each)]
    parameters = {ours: value for theirs, ours in PARAMETERS.items() if (value := told.take(f"gen_ai.request.{theirs}")) is not None}
    if isinstance(tools := _parsed(told.take("gen_ai.tool.definitions")), list):
        parameters["tools"] = [_tool(tool) for tool in tools]
    reasons = _parsed(told.take("gen_ai.response.finish_reasons"))
    reasons = [str(reason) for reason in reasons] if isinstance(reasons, list) else []
    answers = tuple(_answer(index, each, reasons[index : index + 1]) for index, each in enumerate(told.messages("output")))
    if not answers and not span.failed:  # what was said is not told, that something was is
        answers = tuple(Answered(index, finish_reason=reason) for index, reason in enumerate(reasons)) or (Answered(),)
    first_s = [s for name in FIRST_TOKEN_S if (s := double_of(told.take(name))) is not None]
    error_type, error = told.error()
    return Call(
        answers=answers,
        response_id=text_of(told.take("gen_ai.response.id")),
        response_model=text_of(told.take("gen_ai.response.model")),
        status=long_of(told.take("http.response.status_code")),
        prompt_tokens=told.count("input_tokens", "prompt_tokens"),
        completion_tokens=told.count("output_tokens", "completion_tokens"),
        cached_tokens=told.count("cache_read.input_tokens"),
        first_token_us=round(1e6 * first_s[0]) if first_s else None,
        error_type=error_type,
        error=error,
        asked=Asked(messages, {**parameters, "metadata": {"otel": told.rest()}}, _endpoint(span)),  # the last, for it has what is left
    )


def _endpoint(span: Span) -> str:
    return "/v1/embeddings" if span.attributes.get("gen_ai.operation.name") == "embeddings" else CHAT


class _Told:
    """A span's attributes and events while they are read: what was not taken is left."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._left = dict(span.attributes)
        self._events = [(name, dict(attributes)) for name, attributes in span.events]

    def take(self, name: str) -> Any:
        """An attribute of the span, or of its details."""
        found = self._left.pop(name, None)
        for event, attributes in self._events:
            if event == DETAILS:
                found = attributes.pop(name, None) if found is None else found
        return found

    def count(self, *names: str) -> int | None:
        """The first number of tokens of these names, all of which are taken."""
        found = [long_of(self.take(f"gen_ai.usage.{name}")) for name in names]
        return next((number for number in found if number is not None), None)

    def system(self) -> list[Any]:
        """The instructions, as a message."""
        parts = _parsed(self.take("gen_ai.system_instructions"))
        return [{"role": "system", "parts": parts}] if isinstance(parts, list) else [{"role": "system", "content": parts}] if parts else []

    def messages(self, side: str) -> list[Any]:
        """What was said on one side, wherever it stands."""
        found = _parsed(self.take(f"gen_ai.{side}.messages"))
        if isinstance(found, list) and found:
            return found
        older = "prompt" if side == "input" else "completion"
        return self._of_events(side) or self._in_one(older) or self._numbered(older)

    def _of_events(self, side: str) -> list[Any]:
        found = []
        for event in list(self._events):
            name, attributes = event
            about = _MESSAGE_EVENT.fullmatch(name) if side == "input" else name == "gen_ai.choice"
            if not about:
                continue
            self._events.remove(event)
            given = {key: value for key, value in attributes.items() if not key.startswith("gen_ai.")}
            body = {key: value if key == "content" else _parsed(value) for key, value in given.items()}
            message = body.pop("message", None)
            role = "assistant" if isinstance(about, bool) else about[1]
            found.append({"role": role, **(message if isinstance(message, dict) else {"content": message} if message else {}), **body})
        return found

    def _in_one(self, name: str) -> list[Any]:
        for event in list(self._events):
            if event[0] == f"gen_ai.content.{name}" and f"gen_ai.{name}" in event[1]:
                self._events.remove(event)
                found = _parsed(event[1][f"gen_ai.{name}"])
                several = found if isinstance(found, list) else [found]
                return [
                    each if isinstance(each, dict) else {"role": "user" if name == "prompt" else "assistant", "content": each}
                    for each in several
                ]
        return []

    def _numbered(self, name: str) -> list[Any]:
        """`gen_ai.prompt.0.content` and the like; a message's own numbered parts (`tool_calls.0.name`) become lists."""
        found: dict[int, dict[str, Any]] = {}
        for key in [key for key in self._left if key.startswith(f"gen_ai.{name}.")]:
            if match := _NUMBERED.fullmatch(key):
                found.setdefault(int(match[2]), {})[match[3]] = self._left.pop(key)
        return [_unflattened(found[number], name) for number in sorted(found)]

    def error(self) -> tuple[str | None, str]:
        """How it failed, and what was said about it."""
        kind = self.take("error.type")
        if not self._span.failed and kind is None:
            return None, ""
        raised = next((attributes for name, attributes in self._events if name == "exception"), {})
        words = self._span.message or str(raised.get("exception.message") or "")
        named = str(kind or raised.get("exception.type") or "")
        return named or "_OTHER", ": ".join(filter(None, (named, words)))

    def rest(self) -> dict[str, Any]:
        """Everything else: where the span stands, who sent it, and what nothing here understands."""
        span = self._span
        events = [{"name": name, "attributes": attributes} for name, attributes in self._events if attributes]
        place = {"name": span.name, "span_id": span.span_id, "parent_span_id": span.parent_id, "kind": span.kind}
        found = {**place, "attributes": self._left, "events": events, "resource": span.service, "scope": span.scope}
        return {name: value for name, value in found.items() if value not in ("", [], {})}


def _parsed(value: Any) -> Any:
    """A value that may be JSON text."""
    if isinstance(value, str) and value[:1] in ("[", "{", '"'):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _unflattened(fields: Mapping[str, Any], side: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "user" if side == "prompt" else "assistant"}
    calls: dict[int, dict[str, Any]] = {}
    for key, value in fields.items():
        if match := re.fullmatch(r"tool_calls\.(\d+)\.(?:function\.)?(\w+)", key):
            calls.setdefault(int(match[1]), {})[match[2]] = value
        else:
            message[key] = value
    if calls:
        message["tool_calls"] = [{"id": call.pop("id", None), "type": "function", "function": call} for _, call in sorted(calls.items())]
    return message


# Messages


def _in_chat(message: Any) -> Iterator[dict[str, Any]]:
    """A message in the words of a chat completion; answers of tools are messages of their own there."""
    if not isinstance(message, Mapping):
        yield {"role": "user", "content": message if isinstance(message, str) else json_text(message)}
        return
    parts = message.get("parts")
    if not isinstance(parts, list):
        yield {"role": "user", **message}
        return
    known = [part if isinstance(part, Mapping) else {"type": "text", "content": part} for part in parts]
    answers = [part for part in known if part.get("type") == "tool_call_response"]
    for part in answers:
        said = part.get("response", part.get("result"))
        yield {"role": "tool", "tool_call_id": part.get("id"), "content": said if isinstance(said, str) else json_text(said)}
    rest = [part for part in known if part.get("type") not in ("tool_call_response", "tool_call", "reasoning")]
    calls, thoughts = _calls(known), _texts(known, "reasoning")
    if rest or calls or thoughts or not answers:
        said_with = {name: value for name, value in message.items() if name not in ("parts", "role", "finish_reason")}
        made: dict[str, Any] = {"role": str(message.get("role", "user")), "content": _content(rest), **said_with}
        if thoughts:
            made["reasoning"] = thoughts
        if calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
            made["tool_calls"] = [{"id": call.call_id, "type": "function", "function": f} for call, f in zip(calls, functions, strict=True)]
        yield made


def _content(parts: list[Mapping[str, Any]]) -> Any:
    """One text as it is; several parts, or another kind of part, as a list of them."""
    if not parts:
        return None
    if len(parts) == 1 and parts[0].get("type") == "text":
        return parts[0].get("content")
    return [_part(part) for part in parts]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind, media = part.get("type"), part.get("mime_type")
    if kind == "text":
        return {"type": "text", "text": part.get("content")}
    if part.get("modality") == "image" and (kind == "uri" or part.get("uri")):
        return {"type": "image_url", "image_url": {"url": part.get("uri")}}
    if part.get("modality") == "image" and kind == "blob":
        return {"type": "image_url", "image_url": {"url": f"data:{media or 'image/png'};base64,{part.get('content')}"}}
    return dict(part)


def _texts(parts: list[Mapping[str, Any]], kind: str) -> str | None:
    found = [str(part.get("content") or "") for part in parts if part.get("type") == kind]
    return "".join(found) if found else None


def _calls(parts: list[Mapping[str, Any]]) -> list[ToolCallContent]:
    calls = [part for part in parts if part.get("type") == "tool_call"]
    return [_call(part.get("id"), part.get("name"), part.get("arguments")) for part in calls]


def _call(call_id: Any, name: Any, arguments: Any) -> ToolCallContent:
    text = arguments if isinstance(arguments, str) else json_text({} if arguments is None else arguments)
    return ToolCallContent(call_id=text_of(call_id), name=text_of(name), arguments=text)


def _tool(tool: Any) -> Any:
    """A tool's definition, which the conventions have flat."""
    if isinstance(tool, Mapping) and tool.get("type") == "function" and "function" not in tool:
        return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
    return tool


def _answer(index: int, message: Any, reasons: list[str]) -> Answered:
    """A message that came back; what is in it beside texts and calls is said as JSON, as no token can be."""
    if not isinstance(message, Mapping):
        return Answered(index, {"content": None if message is None else str(message)}, finish_reason=reasons[0] if reasons else None)
    reason = text_of(message.get("finish_reason")) or (reasons[0] if reasons else None)
    made = list(_in_chat({**message, "role": "assistant"}))[-1]
    content, told = made.get("content"), []
    for call in made.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, Mapping) else None
        function = function if isinstance(function, Mapping) else {}
        told.append(_call(call.get("id") if isinstance(call, Mapping) else None, function.get("name"), function.get("arguments")))
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") if part.get("type") == "text" else json_text(part) for part in content)
    said = {"content": content, "reasoning": made.get("reasoning"), "refusal": made.get("refusal")}
    texts = {channel: text if isinstance(text, str) else json_text(text) for channel, text in said.items() if text is not None}
    return Answered(index, texts, told, reason)
