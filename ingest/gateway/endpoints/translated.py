"""Requests and answers between a client and an upstream that speak different languages."""

from __future__ import annotations

from typing import Any, Protocol
from urllib.parse import quote

from ingest.gateway.endpoints.anthropic import AnthropicAnswer
from ingest.gateway.endpoints.base import DONE, Sending
from ingest.gateway.endpoints.gemini_answers import GeminiAnswer
from ingest.gateway.sse import Block
from schemas.requests import dump
from schemas.requests.anthropic import to_anthropic
from schemas.requests.chat import to_chat
from schemas.requests.gemini import to_gemini
from schemas.requests.inference import InferenceRequest


class Reader(Protocol):
    """What of an answer depends on the upstream alone."""

    def read(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """An event as a chunk of a chat completion."""

    def ends(self, block: Block) -> bool:
        """Whether nothing comes after this event."""

    def read_whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """An answer as a chat completion."""


class ChatReader:
    """Reads what is a chat completion already."""

    def read(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """The chunk as it is."""
        return event

    def ends(self, block: Block) -> bool:
        """Whether it is `[DONE]`."""
        return block.data == DONE

    def read_whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The completion as it is."""
        return answer


class TranslatedAnswer:
    """Reads any upstream's answer as a chat completion; subclasses write it in their clients' words."""

    def __init__(self, content_type: bytes, reader: Reader) -> None:
        self.content_type: bytes | None = content_type
        self.read = reader.read
        self.ends = reader.ends
        self.read_whole = reader.read_whole

    def write_chunk(self, chunk: dict[str, Any]) -> bytes:
        """The bytes of one chunk."""
        raise NotImplementedError

    def write_completion(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        raise NotImplementedError

    def end(self, raw: bytes) -> bytes:
        """The last bytes of a stream."""
        raise NotImplementedError

    def write(self, event: dict[str, Any], chunk: dict[str, Any] | None, raw: bytes) -> bytes:
        """The chunk in the client's words."""
        return b"" if chunk is None else self.write_chunk(chunk)

    def write_whole(self, answer: dict[str, Any], completion: dict[str, Any], raw: bytes) -> bytes:
        """The completion in the client's words."""
        return dump(self.write_completion(completion))


def reader_of(kind: str) -> Reader:
    """A reader of one answer of an upstream of this kind."""
    if kind == "anthropic":
        return AnthropicAnswer()
    return GeminiAnswer() if kind == "gemini" else ChatReader()


def to_upstream(request: InferenceRequest, extra: dict[str, Any], kind: str) -> Sending:
    """A request in the words of an upstream of this kind.

    Raises:
        UsageError: the upstream cannot do what it asks for.
    """
    if kind == "anthropic":
        return Sending("/v1/messages", dump(to_anthropic(request)), translated=True)
    if kind == "gemini":
        document = to_gemini(request)
        path = gemini_path(document.pop("model", None) or "", stream=bool(request.stream))
        return Sending(path, dump(document), b"alt=sse" if request.stream else b"", translated=True)
    return Sending("/v1/chat/completions", dump(to_chat(request, vllm=kind == "vllm") | extra), translated=True)


def gemini_path(model: str, *, stream: bool) -> str:
    """Where Gemini is asked for an answer of a model."""
    return f"/v1beta/models/{quote(model)}:{'streamGenerateContent' if stream else 'generateContent'}"


def event(value: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + dump(value) + b"\n\n"
