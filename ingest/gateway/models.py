"""Which models there are, in the shape of each provider's clients. Nothing is generated, so nothing is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from ingest.gateway import errors
from ingest.gateway.errors import ANTHROPIC, GEMINI, OPENAI, Failure
from ingest.gateway.exchange import Exchange
from ingest.gateway.headers import answer_headers, upstream_headers
from ingest.gateway.keys import Caller
from ingest.gateway.parts import Parts
from ingest.gateway.routes import models_of
from ingest.gateway.upstream import Upstream, respond_with
from schemas.requests import dump

PATHS = ("/v1/models", "/v1beta/models")

Entry = dict[str, Any]
"""A model as OpenAI's list has it."""


def asked_for(path: str, method: str) -> bool:
    """Whether a path is that of the list or of one model, whose name may have a colon; a POST to one names a method of Google's."""
    one = path.startswith(tuple(f"{name}/" for name in PATHS)) and (method == "GET" or ":" not in path)
    return path in PATHS or one


async def models(parts: Parts, exchange: Exchange) -> None:
    """The models that a caller may ask for, or one of them; the words of an upstream of the client's own provider pass unchanged."""
    path = exchange.scope["path"]
    provider = _provider(exchange, path)
    exchange.shape = {"anthropic": ANTHROPIC, "gemini": GEMINI}.get(provider, OPENAI)
    caller = await parts.keyring.caller(exchange)
    name = path.partition("/models")[2].removeprefix("/")
    await respond_with(exchange, _answered(parts, exchange, caller, provider, name))


async def _answered(
    parts: Parts, exchange: Exchange, caller: Caller, provider: str, name: str
) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    if caller.refusal:
        raise caller.refusal
    allowed = caller.key.allows if caller.key else _all
    if parts.routes.several:
        return _written(await parts.routes.entries(allowed), provider, name)
    upstream = parts.routes.lanes[0].upstream
    kind = await upstream.ready(caller.authorization)
    limited = caller.key is not None and "*" not in caller.key.models
    passes = not limited and _PROVIDER_OF[kind] == provider and (kind != "vllm" or not name)  # vLLM has the list only
    status, body, headers = await _ask(parts, exchange, upstream, caller, kind, name if passes else "")
    if passes:
        return status, body, headers
    if status != 200:
        raise Failure(errors.UPSTREAM_ERROR, "The upstream does not tell its models.", status=status)
    listed = models_of(body) or {}
    return _written({model: entry for model, entry in listed.items() if allowed(model)}, provider, name)


async def _ask(
    parts: Parts, exchange: Exchange, upstream: Upstream, caller: Caller, kind: str, name: str
) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    path = "/v1beta/models" if kind == "gemini" else "/v1/models"
    url = upstream.url_of(f"{path}/{quote(name)}" if name else path, exchange.scope["query_string"])
    headers = upstream_headers(exchange, upstream.authorization(caller.authorization), kind)
    async with asyncio.timeout(parts.settings.gateway.between_tokens_timeout_s):
        async with upstream.client.get(url, headers=headers, allow_redirects=False) as answer:
            return answer.status, await answer.read(), answer_headers(answer.raw_headers)


def _all(model: str) -> bool:
    return True


def _provider(exchange: Exchange, path: str) -> str:
    """Whose client asks: Google's by its path or key, Anthropic's by its version."""
    if path.startswith("/v1beta") or exchange.header("x-goog-api-key") or exchange.header("x-goog-api-client"):
        return "gemini"
    return "anthropic" if exchange.header("anthropic-version") else "openai"


_PROVIDER_OF = {"vllm": "openai", "openai": "openai", "anthropic": "anthropic", "gemini": "gemini"}


def _written(entries: dict[str, Entry], provider: str, name: str) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    write_one, write_list = _WRITERS[provider]
    if not name:
        return 200, dump(write_list([write_one(model, entry) for model, entry in entries.items()])), [errors.JSON]
    if name not in entries:
        valid = f"Valid: {', '.join(sorted(entries)[:40])}." if entries else "No model is known to be served now."
        raise Failure(errors.NO_MODEL, f"There is no model {name[:200]!r}. {valid}", param="model")
    return 200, dump(write_one(name, entries[name])), [errors.JSON]


def _openai(name: str, entry: Entry) -> Entry:
    return {"created": 0, "owned_by": "upstream", **entry, "id": name, "object": "model"}


def _anthropic(name: str, entry: Entry) -> Entry:
    created = entry.get("created")
    since = datetime.fromtimestamp(created if isinstance(created, int) else 0, UTC)
    return {"type": "model", "id": name, "display_name": entry.get("display_name") or name, "created_at": since.isoformat()}


def _anthropic_list(entries: list[Entry]) -> Entry:
    first, last = (entries[0]["id"], entries[-1]["id"]) if entries else (None, None)
    return {"data": entries, "has_more": False, "first_id": first, "last_id": last}


def _gemini(name: str, entry: Entry) -> Entry:
    limit = entry.get("max_model_len")
    known = {"inputTokenLimit": limit} if isinstance(limit, int) else {}
    methods = ["generateContent", "countTokens"]
    return {"name": f"models/{name}", "displayName": name, "supportedGenerationMethods": methods, **known}


_WRITERS: dict[str, tuple[Callable[[str, Entry], Entry], Callable[[list[Entry]], Entry]]] = {
    "openai": (_openai, lambda entries: {"object": "list", "data": entries}),
    "anthropic": (_anthropic, _anthropic_list),
    "gemini": (_gemini, lambda entries: {"models": entries}),
}
