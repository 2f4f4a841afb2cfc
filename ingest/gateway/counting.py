"""Anthropic's `/v1/messages/count_tokens`: nothing is generated, so nothing is recorded."""

from __future__ import annotations

import asyncio

import aiohttp

from ingest.gateway import errors
from ingest.gateway.errors import ANTHROPIC, Failure
from ingest.gateway.exchange import Exchange
from ingest.gateway.headers import upstream_headers
from ingest.gateway.parts import Parts
from ingest.gateway.passage import Passage
from ingest.gateway.upstream import Upstream, failure_of
from schemas.errors import UsageError
from schemas.requests import ClientRequest, dump, load
from schemas.requests.anthropic import from_anthropic
from schemas.requests.chat import to_chat
from schemas.requests.client import read_messages

PATH = "/v1/messages/count_tokens"

_TOKENIZED = ("model", "messages", "tools", "chat_template_kwargs")
"""The fields that bear on how many tokens a prompt has."""


async def count_tokens(parts: Parts, exchange: Exchange) -> None:
    """Tell how many tokens a request's prompt has, as vLLM's own tokenizer or Anthropic says."""
    exchange.shape = ANTHROPIC
    try:
        status, body = await _count(parts, exchange)
    except UsageError as error:
        return await exchange.fail(Failure(errors.INVALID_REQUEST, str(error.fault), param=error.place or None), [])
    except TimeoutError:
        return await exchange.fail(Failure(errors.TIMEOUT, "The upstream was silent."), [])
    except (aiohttp.ClientError, OSError) as error:
        return await exchange.fail(failure_of(error), [])
    except Failure as failure:
        return await exchange.fail(failure, [])
    return await exchange.respond(status, body, [errors.JSON])


async def _count(parts: Parts, exchange: Exchange) -> tuple[int, bytes]:
    caller = await parts.keyring.caller(exchange)
    if caller.refusal:
        raise caller.refusal
    request = read_messages(await exchange.body())
    passage = Passage(parts, exchange, caller)
    try:
        return await _asked(parts, exchange, passage, request)
    finally:
        passage.close(0)


async def _asked(parts: Parts, exchange: Exchange, passage: Passage, request: ClientRequest) -> tuple[int, bytes]:
    kind = await passage.ready(request.model)
    headers = upstream_headers(exchange, passage.authorization_upstream, kind)
    if kind == "anthropic":
        return await _ask(parts, passage.upstream, PATH, request.body, headers)
    if kind != "vllm":
        raise Failure(errors.INVALID_REQUEST, "count_tokens is not possible with an OpenAI upstream, which has no tokenizer to ask.")
    chat = to_chat(from_anthropic(request.fields), vllm=True)
    asked = {name: value for name, value in chat.items() if name in _TOKENIZED}
    status, body = await _ask(parts, passage.upstream, "/tokenize", dump(asked), headers)
    answer = load(body)
    if status != 200:
        error = answer.get("error", answer) if isinstance(answer, dict) else {}
        message = error.get("message") if isinstance(error, dict) else None
        raise Failure(errors.UPSTREAM_ERROR, str(message or "The upstream reported an error."), status=status)
    return 200, dump({"input_tokens": answer["count"]})


async def _ask(parts: Parts, upstream: Upstream, path: str, body: bytes, headers: list[tuple[str, str]]) -> tuple[int, bytes]:
    settings = parts.settings.gateway
    async with asyncio.timeout(settings.between_tokens_timeout_s):
        url = upstream.url_of(path, b"")
        async with upstream.client.post(url, data=body, headers=headers, allow_redirects=False) as answer:
            return answer.status, await answer.read()
