"""A recorded request, of whichever endpoint, as the chat completion that says the same: what an engine is asked in a replay."""

from __future__ import annotations

from typing import Any

from schemas.errors import UsageError
from schemas.requests.anthropic import from_anthropic
from schemas.requests.chat import to_chat
from schemas.requests.gemini import from_gemini
from schemas.requests.responses import conversation, from_responses

CHAT = "/v1/chat/completions"

COMPLETIONS = "/v1/completions"
ENGINE = "engine"
"""Where a request went that was recorded inside the engine: its document is the engine core's, its prompt token ids."""

SHAPING = (
    "messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "add_special_tokens", "documents",
    "reasoning_effort", "chat_template", "mm_processor_kwargs", "media_io_kwargs", "truncate_prompt_tokens", "truncation_side",
)  # fmt: skip
"""Fields of a chat completion that vLLM makes a prompt of."""
TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking", "reasoning"})
"""Parts of a message that token ids carry; of an image or a sound they carry a placeholder."""

_READERS = {
    "/v1/messages": from_anthropic,
    "/v1/responses": lambda document: conversation(from_responses(document)),
    "/v1beta/models:generateContent": from_gemini,
    "/v1beta/models:streamGenerateContent": from_gemini,
}


def as_chat(endpoint: str, document: dict[str, Any]) -> dict[str, Any]:
    """The document for a chat completion.

    Raises:
        UsageError: there is none that says the same; the message names what stands against it.
    """
    if endpoint == CHAT:
        return document
    if endpoint not in _READERS:
        hint = f"only requests to {CHAT}, {', '.join(_READERS)} can be asked again"
        raise UsageError(f"a request to {endpoint} is no conversation; {hint}", operation="replay request", place=endpoint, hint=hint)
    return to_chat(_READERS[endpoint](document), vllm=True)


def as_generation(endpoint: str, document: dict[str, Any]) -> dict[str, Any]:
    """The document in the words of OpenAI's completions: with `messages`, or, where it went to `/v1/completions`, with its `prompt`.

    Raises:
        UsageError: as `as_chat` does.
    """
    return document if endpoint == COMPLETIONS else as_chat(endpoint, document)


def sampled_as(endpoint: str, document: dict[str, Any]) -> dict[str, Any]:
    """The document with the parameters by which tokens were chosen; of an engine's own request these alone, resolved as they were.

    Raises:
        UsageError: as `as_chat` does.
    """
    if endpoint != ENGINE:
        return as_generation(endpoint, document)
    parameters = document.get("sampling_params")
    return parameters if isinstance(parameters, dict) else {}


def media_of(document: dict[str, Any]) -> list[str]:
    """Types of message parts that are no text."""
    messages = document.get("messages")
    contents = [message.get("content") for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return sorted({str(part.get("type")) for part in parts} - TEXT_PARTS - {"None"})
