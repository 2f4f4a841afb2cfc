"""OpenTelemetry's semantic conventions for generative AI, as attributes of what the tape's events say.

Spans of live traffic (`ingest.gateway.tracing`) and those exported from the tape later are made here, so that they say the same.
No content is among them.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from schemas.events import GenerationFailed, GenerationFinished, GenerationStarted, RequestSubmitted

OPERATIONS = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings", "/v1/chat/completions": "chat", "/v1/messages": "chat"}
"""`gen_ai.operation.name` by endpoint; all others generate from a conversation."""


def operation(endpoint: str) -> str:
    """`gen_ai.operation.name` of an endpoint."""
    return OPERATIONS.get(endpoint, "chat")


def known(**facts: Any) -> dict[str, Any]:
    """Attributes under the conventions' names, dots for double underscores; what is not known is left out."""
    return {name.replace("__", "."): value for name, value in facts.items() if value is not None}


def of_request(session_id: bytes, payload: RequestSubmitted) -> dict[str, Any]:
    """What the request asks for, and where the tape has it."""
    session = str(uuid.UUID(bytes=session_id))
    return known(
        tokentape__session__id=session,
        tokentape__generation__id=str(uuid.UUID(bytes=payload.generation_id)),
        gen_ai__conversation__id=session,
        gen_ai__request__model=payload.model,
        gen_ai__request__max_tokens=payload.max_tokens,
        gen_ai__request__temperature=payload.temperature,
        gen_ai__request__seed=None if "seed" in payload.injected else payload.seed,
        gen_ai__request__choice__count=payload.n if payload.n != 1 else None,
    )


def of_answer(payload: GenerationStarted) -> dict[str, Any]:
    """Who answered."""
    return known(
        gen_ai__response__model=payload.model, gen_ai__response__id=payload.upstream_id, http__response__status_code=payload.status
    )


def of_end(payload: GenerationFinished | GenerationFailed) -> dict[str, Any]:
    """How it ended."""
    if isinstance(payload, GenerationFailed):
        facts = {"tokentape__failure__origin": payload.origin, "tokentape__failure__position": payload.position}
        return known(http__response__status_code=payload.status, **facts)
    return known(
        gen_ai__usage__input_tokens=payload.prompt_tokens,
        gen_ai__usage__output_tokens=payload.completion_tokens,
        gen_ai__usage__cache_read__input_tokens=payload.cached_tokens,
        # As vLLM's own span has it, so that the two can be compared.
        gen_ai__latency__time_to_first_token=None if payload.first_token_us is None else payload.first_token_us / 1e6,
    )


def of_reasons(reasons: Mapping[int, str]) -> dict[str, Any]:
    """Why each sequence ended."""
    return {"gen_ai.response.finish_reasons": [reasons[index] for index in sorted(reasons)]} if reasons else {}
