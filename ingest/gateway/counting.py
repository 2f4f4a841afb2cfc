"""Anthropic's `count_tokens` and Gemini's `countTokens`: nothing is generated, so nothing is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ingest.gateway import errors
from ingest.gateway.endpoints.gemini import method_of
from ingest.gateway.errors import ANTHROPIC, GEMINI, Failure, Shape
from ingest.gateway.exchange import Exchange, Headers
from ingest.gateway.headers import upstream_headers
from ingest.gateway.parts import Parts
from ingest.gateway.passage import Passage
from ingest.gateway.upstream import Upstream, respond_with
from schemas.errors import UsageError
from schemas.requests import ClientRequest, dump, load
from schemas.requests.anthropic import from_anthropic, to_anthropic
from schemas.requests.chat import to_chat
from schemas.requests.client import GeminiRequest, read_gemini, read_messages, read_object
from schemas.requests.gemini import from_gemini, to_gemini
from schemas.requests.inference import InferenceRequest
from schemas.requests.openapi import in_camel_case

PATH = "/v1/messages/count_tokens"

_TOKENIZED = {
    "vllm": ("model", "messages", "tools", "chat_template_kwargs"),
    "anthropic": ("model", "messages", "system", "tools", "tool_choice", "thinking"),
}
"""The fields that bear on how many tokens a prompt has."""


async def count_tokens(parts: Parts, exchange: Exchange) -> None:
    """Anthropic's: `input_tokens`."""
    await _told(parts, exchange, _MESSAGES)


async def count_contents(parts: Parts, exchange: Exchange) -> None:
    """Gemini's `countTokens`: `totalTokens`."""
    await _told(parts, exchange, _CONTENTS)


@dataclass(frozen=True)
class _Counting:
    """What differs between the two: the provider, how its requests are read, and the name of the number."""

    provider: str
    shape: Shape
    read: Callable[[Exchange, bytes], ClientRequest]
    translate: Callable[[dict[str, Any]], InferenceRequest]
    total: str


def _contents(exchange: Exchange, body: bytes) -> GeminiRequest:
    """A whole request may stand inside, else it is only contents."""
    model, _ = method_of(exchange.scope["path"])
    inner = in_camel_case(read_object(body)).get("generateContentRequest")
    request = read_gemini(dump(inner) if isinstance(inner, dict) else body, model, stream=False)
    return GeminiRequest(body, {**request.fields, "model": model}, request.messages)


_MESSAGES = _Counting("anthropic", ANTHROPIC, lambda _, body: read_messages(body), from_anthropic, "input_tokens")
_CONTENTS = _Counting("gemini", GEMINI, _contents, from_gemini, "totalTokens")


async def _told(parts: Parts, exchange: Exchange, counting: _Counting) -> None:
    """Tell how many tokens a request's prompt has, as the upstream itself says."""
    exchange.shape = counting.shape
    try:
        await respond_with(exchange, _count(parts, exchange, counting))
    except UsageError as error:
        await exchange.fail(Failure(errors.INVALID_REQUEST, str(error.fault), param=error.place or None), [])


async def _count(parts: Parts, exchange: Exchange, counting: _Counting) -> tuple[int, bytes, Headers]:
    caller = await parts.keyring.caller(exchange)
    if caller.refusal:
        raise caller.refusal
    request = counting.read(exchange, await exchange.body())
    passage = Passage(parts, exchange, caller)
    try:
        status, body = await _asked(parts, exchange, passage, request, counting)
        return status, body, [errors.JSON]
    finally:
        passage.close(0)


async def _asked(parts: Parts, exchange: Exchange, passage: Passage, request: ClientRequest, counting: _Counting) -> tuple[int, bytes]:
    kind = await passage.ready(request.model)
    if kind not in _COUNTERS:
        raise Failure(errors.INVALID_REQUEST, "Counting tokens is not possible with an OpenAI upstream, which has no tokenizer to ask.")
    path, field = _COUNTERS[kind]
    path = path.format(model=quote(request.model or ""))
    headers = upstream_headers(exchange, passage.authorization_upstream, kind)
    if kind == counting.provider:
        return await _ask(parts, passage.upstream, path, request.body, headers)
    asked = _question(counting.translate(request.fields), kind)
    status, body = await _ask(parts, passage.upstream, path, dump(asked), headers)
    answer = load(body)
    if status != 200:
        error = answer.get("error", answer) if isinstance(answer, dict) else {}
        message = error.get("message") if isinstance(error, dict) else None
        raise Failure(errors.UPSTREAM_ERROR, str(message or "The upstream reported an error."), status=status)
    return 200, dump({counting.total: answer[field]})


def _question(request: InferenceRequest, kind: str) -> dict[str, Any]:
    """What an upstream of this kind is asked, without what does not bear on the prompt."""
    if kind == "gemini":
        return {"generateContentRequest": {**to_gemini(request), "model": f"models/{request.model}"}}
    document = to_chat(request, vllm=True) if kind == "vllm" else to_anthropic(request)
    return {name: value for name, value in document.items() if name in _TOKENIZED[kind]}


_COUNTERS = {
    "vllm": ("/tokenize", "count"),
    "anthropic": (PATH, "input_tokens"),
    "gemini": ("/v1beta/models/{model}:countTokens", "totalTokens"),
}
"""Where each kind of upstream counts, and the field that says how many."""


async def _ask(parts: Parts, upstream: Upstream, path: str, body: bytes, headers: list[tuple[str, str]]) -> tuple[int, bytes]:
    settings = parts.settings.gateway
    async with asyncio.timeout(settings.between_tokens_timeout_s):
        url = upstream.url_of(path, b"")
        async with upstream.client.post(url, data=body, headers=headers, allow_redirects=False) as answer:
            return answer.status, await answer.read()
