"""OpenAI's `/v1/embeddings`: passed through untouched; the tape says how many vectors came and what they cost."""

from __future__ import annotations

from typing import Any

from ingest.gateway.endpoints.base import OpenAiEndpoint
from ingest.gateway.endpoints.chat import ChatAnswer
from ingest.gateway.exchange import Exchange
from ingest.gateway.veil import Veil
from schemas.requests import ClientRequest, EmbeddingRequest, read_embedding


class EmbeddingAnswer(ChatAnswer):
    """An answer of vectors: no sequence of tokens, but as many results as inputs."""

    def read_whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Model and usage; the vectors only counted."""
        return {"model": answer.get("model"), "usage": answer.get("usage"), "choices": [], "results": len(answer["data"])}


class Embeddings(OpenAiEndpoint):
    """`/v1/embeddings`."""

    path = "/v1/embeddings"

    def read(self, exchange: Exchange, body: bytes) -> EmbeddingRequest:
        """The embedding request of a body."""
        return read_embedding(body)

    def additions(self, request: ClientRequest, kind: str) -> dict[str, Any]:
        """Nothing: there is nothing to draw and no token to number."""
        return {}

    def answer(self, request: ClientRequest, extra: dict[str, Any], kind: str, fingerprint: str | None) -> EmbeddingAnswer:
        """A counter of vectors."""
        return EmbeddingAnswer(Veil({}, kind, 0, None))
