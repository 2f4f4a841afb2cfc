"""OpenAI's `/v1/chat/completions`: passed through, or translated before upstreams that speak another language."""

from __future__ import annotations

from typing import Any

from ingest.gateway.endpoints.base import DONE, FOREIGN, Answer, OpenAiEndpoint, Sending
from ingest.gateway.endpoints.completion_writer import CompletionWriter
from ingest.gateway.endpoints.translated import reader_of, to_upstream
from ingest.gateway.exchange import Exchange
from ingest.gateway.runs import RunReader
from ingest.gateway.sse import Block
from ingest.gateway.veil import Veil, chat_additions
from schemas.requests import ChatRequest, ClientRequest, read_chat
from schemas.requests.chat import from_chat


class ChatAnswer:
    """An answer of a chat completion, shown without what the gateway added."""

    content_type: bytes | None = None

    def __init__(self, veil: Veil) -> None:
        self._veil = veil
        self.runs = RunReader(hide_ids=veil.ids, hide_logprobs=veil.logprobs)
        """Reads many chunks at once, where nothing is held back and sequence 0 is under way."""

    def read(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """The chunk as it is."""
        return event

    def write(self, event: dict[str, Any], chunk: dict[str, Any] | None, raw: bytes) -> bytes:
        """The event without the additions."""
        return self._veil.chunk(event, raw)

    def ends(self, block: Block) -> bool:
        """Whether it is `[DONE]`."""
        return block.data == DONE

    def end(self, raw: bytes) -> bytes:
        """What was held back, then the upstream's own end."""
        return self._veil.rest() + raw

    def read_whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The completion as it is."""
        return answer

    def write_whole(self, answer: dict[str, Any], completion: dict[str, Any], raw: bytes) -> bytes:
        """The answer without the additions."""
        return self._veil.whole(answer, raw)


class Chat(OpenAiEndpoint):
    """`/v1/chat/completions`."""

    path = "/v1/chat/completions"

    def read(self, exchange: Exchange, body: bytes) -> ChatRequest:
        """The chat request of a body."""
        return read_chat(body)

    def additions(self, request: ClientRequest, kind: str) -> dict[str, Any]:
        """Token ids, logprobs, a seed and usage; nothing where another provider answers."""
        return {} if kind in FOREIGN else chat_additions(request, kind)

    def sending(self, exchange: Exchange, request: ClientRequest, extra: dict[str, Any], kind: str) -> Sending:
        """The client's own bytes and the additions, or what they mean to another provider.

        Raises:
            UsageError: the upstream cannot do what it asks for.
        """
        if kind not in FOREIGN:
            return super().sending(exchange, request, extra, kind)
        return to_upstream(from_chat(_without_usage(request)), extra, kind)

    def answer(self, request: ClientRequest, extra: dict[str, Any], kind: str, fingerprint: str | None) -> Answer:
        """A reader of chunks as they are, or a writer of them."""
        if kind in FOREIGN:
            return CompletionWriter(request, reader_of(kind))
        return ChatAnswer(Veil(extra, kind, request.n, fingerprint))


def _without_usage(request: ClientRequest) -> dict[str, Any]:
    """The fields without the wish for usage, which the gateway sees to; whatever else a stream is to have stays."""
    options = request.fields.get("stream_options")
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        return request.fields
    return {name: value for name, value in request.fields.items() if name != "stream_options"}
