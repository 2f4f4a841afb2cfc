"""What a client asks of an engine, read just far enough to be recorded: the engine is the judge of the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from schemas.errors import UsageError
from schemas.requests.jsontext import double_of, dump, load, long_of, text_of
from schemas.requests.openapi import in_camel_case

_OPERATION = "read request"


@dataclass(frozen=True)
class ClientRequest:
    """A request: `body` as received, `fields` as parsed, `messages` out of them.

    Fields of a wrong type read as if absent; they reach the engine as they are and it answers for them.
    """

    FIELD: ClassVar[str] = "messages"
    """The field that holds what is recorded as messages."""

    body: bytes
    fields: dict[str, Any]
    messages: list[Any]

    @property
    def stream(self) -> bool:
        """Whether the client wants the answer piece by piece."""
        return self.fields.get("stream") is True

    @property
    def model(self) -> str | None:
        """The model asked for."""
        return text_of(self.fields.get("model"))

    @property
    def n(self) -> int:
        """How many sequences are asked for."""
        return long_of(self.fields.get("n")) or 1

    @property
    def seed(self) -> int | None:
        """The seed that the client gave."""
        return long_of(self.fields.get("seed"))

    @property
    def temperature(self) -> float | None:
        """The temperature that the client gave."""
        return double_of(self.fields.get("temperature"))

    @property
    def max_tokens(self) -> int | None:
        """The longest answer that the client wants."""
        return long_of(self.fields.get("max_tokens"))

    @property
    def tools(self) -> int:
        """How many tools are offered."""
        tools = self.fields.get("tools")
        return len(tools) if isinstance(tools, list) else 0

    @property
    def usage_asked(self) -> bool:
        """Whether the client wants the usage chunk of a stream."""
        options = self.fields.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    @cached_property
    def parameters(self) -> str:
        """The JSON text of the request without its messages."""
        return dump({name: value for name, value in self.fields.items() if name != self.FIELD}).decode()


class ChatRequest(ClientRequest):
    """A request to OpenAI's chat completions."""

    @property
    def max_tokens(self) -> int | None:
        """The limit under its new name, else under its old one."""
        limit = long_of(self.fields.get("max_completion_tokens"))
        return super().max_tokens if limit is None else limit


class MessagesRequest(ClientRequest):
    """A request to Anthropic's messages."""


@dataclass(frozen=True)
class ResponsesRequest(ClientRequest):
    """A request to OpenAI's responses; each input item is a message. What went before `previous` is among them."""

    FIELD = "input"

    previous: str | None = None
    """The response that it goes on from."""
    keep: Callable[[dict[str, Any]], None] | None = None
    """Remembers its response for later requests."""

    @property
    def max_tokens(self) -> int | None:
        """The longest answer that the client wants."""
        return long_of(self.fields.get("max_output_tokens"))


class GeminiRequest(ClientRequest):
    """A request to Gemini's `generateContent`; its model stands in the path, and here in `fields` too."""

    FIELD = "contents"

    @property
    def config(self) -> dict[str, Any]:
        """How the answer is to be made."""
        config = self.fields.get("generationConfig")
        return config if isinstance(config, dict) else {}

    @property
    def n(self) -> int:
        """How many candidates are asked for."""
        return long_of(self.config.get("candidateCount")) or 1

    @property
    def seed(self) -> int | None:
        """The seed that the client gave."""
        return long_of(self.config.get("seed"))

    @property
    def temperature(self) -> float | None:
        """The temperature that the client gave."""
        return double_of(self.config.get("temperature"))

    @property
    def max_tokens(self) -> int | None:
        """The longest answer that the client wants."""
        return long_of(self.config.get("maxOutputTokens"))

    @property
    def tools(self) -> int:
        """How many functions are offered."""
        groups = self.fields.get("tools")
        declared = [group.get("functionDeclarations") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
        return sum(len(functions) for functions in declared if isinstance(functions, list))


class GeminiStreamRequest(GeminiRequest):
    """A request to Gemini's `streamGenerateContent`."""

    @property
    def stream(self) -> bool:
        """The path says so."""
        return True


class CompletionRequest(ClientRequest):
    """A request to OpenAI's completions; each prompt is a message."""

    FIELD = "prompt"

    @property
    def n(self) -> int:
        """Every prompt is answered n times."""
        return (super().n) * max(1, len(self.messages))


class EmbeddingRequest(ClientRequest):
    """A request to OpenAI's embeddings; each input is a message."""

    FIELD = "input"

    @property
    def n(self) -> int:
        """One vector for each input."""
        return max(1, len(self.messages))


R = TypeVar("R", bound=ClientRequest)


def read_chat(body: bytes) -> ChatRequest:
    """The chat request of a body.

    Raises:
        UsageError: not JSON, not an object, or without a list of messages; `place` names the field.
    """
    fields = read_object(body)
    return ChatRequest(body, fields, list_of(fields, "messages"))


def read_messages(body: bytes) -> MessagesRequest:
    """The request for a message of a body.

    Raises:
        UsageError: not JSON, not an object, or without a list of messages.
    """
    fields = read_object(body)
    return MessagesRequest(body, fields, list_of(fields, "messages"))


def read_gemini(body: bytes, model: str, *, stream: bool) -> GeminiRequest:
    """The request of a body for a model; both of Google's spellings are read as camel case.

    Raises:
        UsageError: not JSON, not an object, or without a list of contents.
    """
    fields = {"model": model, **in_camel_case(read_object(body))}
    if isinstance(fields["model"], str):
        fields["model"] = fields["model"].removeprefix("models/")
    return (GeminiStreamRequest if stream else GeminiRequest)(body, fields, list_of(fields, "contents"))


def read_responses(body: bytes) -> ResponsesRequest:
    """The request for a response of a body.

    Raises:
        UsageError: not JSON, not an object, or without an input.
    """
    return _read_inputs(body, ResponsesRequest)


def read_completion(body: bytes) -> CompletionRequest:
    """The completion request of a body.

    Raises:
        UsageError: not JSON, not an object, or without a prompt.
    """
    return _read_inputs(body, CompletionRequest)


def read_embedding(body: bytes) -> EmbeddingRequest:
    """The embedding request of a body.

    Raises:
        UsageError: not JSON, not an object, or without an input.
    """
    return _read_inputs(body, EmbeddingRequest)


def _read_inputs(body: bytes, make: type[R]) -> R:
    fields = read_object(body)
    name = make.FIELD
    value = fields.get(name)
    if not isinstance(value, str | list):
        raise UsageError(f"{name} must be a text or an array", operation=_OPERATION, place=name, hint=f"send {name}: text")
    several = isinstance(value, list) and not (value and isinstance(value[0], int))  # a list of ids is one prompt
    return make(body, fields, value if isinstance(value, list) and several else [value])


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises:
        UsageError: it is none.
    """
    try:
        fields = load(body)
    except ValueError as error:
        raise UsageError(f"the body is not valid JSON: {error}", operation=_OPERATION, hint="send one JSON object") from error
    if not isinstance(fields, dict):
        raise UsageError("the body is not a JSON object", operation=_OPERATION, hint="send one JSON object")
    return fields


def list_of(fields: dict[str, Any], name: str) -> list[Any]:
    """A field that has to be a list.

    Raises:
        UsageError: it is none.
    """
    value = fields.get(name)
    if not isinstance(value, list):
        raise UsageError(f"{name} must be an array", operation=_OPERATION, place=name, hint=f"send a list of {name}")
    return value


def join(endpoint: str, parameters: dict[str, Any], messages: list[Any]) -> dict[str, Any]:
    """A request's document out of its two recorded halves; a single text or prompt of token ids stands alone."""
    name = _FIELDS.get(endpoint, ClientRequest.FIELD)
    single = len(messages) == 1 and not isinstance(messages[0], dict)
    return {**parameters, name: messages[0] if single else messages}


def splice(request: ClientRequest, extra: dict[str, Any]) -> bytes:
    """The request's body with `extra` fields: the client's own bytes stay as they are unless one of them has to change."""
    if not extra:
        return request.body
    if any(name in request.fields for name in extra) or not request.fields:
        return dump({**request.fields, **extra})
    head = request.body.rstrip(b" \t\r\n")[:-1]
    return head + b"," + dump(extra)[1:]


_FIELDS = {
    "/v1/completions": CompletionRequest.FIELD,
    "/v1/responses": ResponsesRequest.FIELD,
    "/v1/embeddings": EmbeddingRequest.FIELD,
    "/v1beta/models:generateContent": GeminiRequest.FIELD,
    "/v1beta/models:streamGenerateContent": GeminiRequest.FIELD,
}
