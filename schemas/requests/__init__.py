"""What clients ask of engines: each provider's request as far as it is recorded, and one schema that maps to all of them."""

from schemas.requests.client import (
    ChatRequest,
    ClientRequest,
    CompletionRequest,
    EmbeddingRequest,
    join,
    read_chat,
    read_completion,
    read_embedding,
    splice,
)
from schemas.requests.jsontext import double_of, dump, load, long_of, text_of

__all__ = [
    "ChatRequest",
    "ClientRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "double_of",
    "dump",
    "join",
    "load",
    "long_of",
    "read_chat",
    "read_completion",
    "read_embedding",
    "splice",
    "text_of",
]
