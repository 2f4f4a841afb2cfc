"""What differs from endpoint to endpoint: how a request is read and sent on, and how its answer is read and shown.

The tape has one language, the chunks of OpenAI's chat completions: `Answer.read` puts what an upstream sends into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ingest.gateway.errors import OPENAI, Shape
from ingest.gateway.exchange import Exchange
from ingest.gateway.sse import Block
from schemas.errors import UsageError
from schemas.requests import ClientRequest, splice

FOREIGN = {"anthropic": "an Anthropic upstream", "gemini": "a Gemini upstream"}
"""Kinds of upstream that do not speak OpenAI's language, with the words for them."""

DONE = b"[DONE]"
"""The data of the event that ends a stream of OpenAI's completions."""


class Answer(Protocol):
    """One answer on its way from the upstream to the client and to the tape. For one attempt.

    What `read` and `read_whole` raise for an answer that is none: TypeError, AttributeError, LookupError, ValueError.
    """

    content_type: bytes | None
    """The client's content type where the answer is translated; None where the upstream's own bytes pass."""

    def read(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """An event of the stream as a chunk of a chat completion; None where it says nothing for the tape."""

    def write(self, event: dict[str, Any], chunk: dict[str, Any] | None, raw: bytes) -> bytes:
        """The bytes for the client; `chunk` is what `read` made of the event, `raw` the event as it came. May change both."""

    def ends(self, block: Block) -> bool:
        """Whether this is the event after which nothing comes."""

    def end(self, raw: bytes) -> bytes:
        """The last bytes for the client; `raw` is the upstream's last event, empty where it sent none."""

    def read_whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """An answer that is not a stream, as a chat completion."""

    def write_whole(self, answer: dict[str, Any], completion: dict[str, Any], raw: bytes) -> bytes:
        """The bytes for the client; arguments as for `write`."""


@dataclass(frozen=True)
class Sending:
    """What goes upstream."""

    path: str
    body: bytes
    query: bytes = b""
    translated: bool = False
    """Whether it is another request than the client's: then it goes without the headers that only say how to read that one."""


class Endpoint(Protocol):
    """One endpoint of the gateway. Stateless: one object serves all its requests."""

    path: str
    """As it is recorded."""
    shape: Shape
    """How its clients are told of failures."""

    def read(self, exchange: Exchange, body: bytes) -> ClientRequest:
        """The request of a body.

        Raises:
            UsageError: it cannot be read; `place` names the field.
        """

    def additions(self, request: ClientRequest, kind: str) -> dict[str, Any]:
        """The fields that the gateway adds for the tape, by kind of upstream."""

    def sending(self, exchange: Exchange, request: ClientRequest, extra: dict[str, Any], kind: str) -> Sending:
        """What goes upstream.

        Raises:
            UsageError: this kind of upstream cannot do what the request asks for; `place` names it.
        """

    def answer(self, request: ClientRequest, extra: dict[str, Any], kind: str, fingerprint: str | None) -> Answer:
        """A fresh reader and writer of one answer."""


class OpenAiEndpoint:
    """An endpoint that an OpenAI-compatible upstream has too: bytes pass but for what recording adds and takes away."""

    path = ""
    shape = OPENAI

    def sending(self, exchange: Exchange, request: ClientRequest, extra: dict[str, Any], kind: str) -> Sending:
        """The client's own bytes and the additions.

        Raises:
            UsageError: the upstream speaks another provider's language.
        """
        if kind in FOREIGN:
            hint = "set gateway.upstream to an OpenAI-compatible server, or send the request to /v1/chat/completions"
            raise UsageError(f"{self.path} is not possible with {FOREIGN[kind]}; {hint}", operation="forward", hint=hint)
        return Sending(self.path, splice(request, extra), exchange.scope["query_string"])
