"""Answers of an OpenAI-compatible upstream in the words of another provider's clients."""

from __future__ import annotations

from typing import Any

from ingest.gateway.endpoints.base import Sending
from ingest.gateway.endpoints.chat import DONE, Chat
from ingest.gateway.sse import Block
from schemas.requests import dump
from schemas.requests.chat import to_chat
from schemas.requests.inference import InferenceRequest


class TranslatedAnswer:
    """Reads a chat completion; subclasses write it in another provider's words."""

    def __init__(self, content_type: bytes) -> None:
        self.content_type: bytes | None = content_type

    def write_chunk(self, chunk: dict[str, Any]) -> bytes:
        """The bytes of one chunk."""
        raise NotImplementedError

    def write_completion(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        raise NotImplementedError

    def end(self, raw: bytes) -> bytes:
        """The last bytes of a stream."""
        raise NotImplementedError

    def read(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """The chunk as it is."""
        return event

    def write(self, event: dict[str, Any], chunk: dict[str, Any] | None, raw: bytes) -> bytes:
        """The chunk in the client's words."""
        return self.write_chunk(event)

    def ends(self, block: Block) -> bool:
        """Whether it is `[DONE]`."""
        return block.data == DONE

    def read_whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The completion as it is."""
        return answer

    def write_whole(self, answer: dict[str, Any], completion: dict[str, Any], raw: bytes) -> bytes:
        """The completion in the client's words."""
        return dump(self.write_completion(answer))


def to_chat_upstream(request: InferenceRequest, extra: dict[str, Any], kind: str) -> Sending:
    """A request as the chat completion that it means.

    Raises:
        UsageError: the upstream cannot do what it asks for.
    """
    return Sending(Chat.path, dump(to_chat(request, vllm=kind == "vllm") | extra), translated=True)


def event(value: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + dump(value) + b"\n\n"
