"""The environment of an OpenAI-compatible server, asked for over HTTP with aiohttp."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import aiohttp

from schemas.errors import EngineUnavailable
from schemas.events import EnvironmentCaptured
from schemas.probe import INSTANCE, VERSION, Ask, instance_of, kind_of, questions

ENVIRONMENT_AGE_MAX_S = 3600.0
"""After this the environment is asked for again: adapters come and go while a server runs."""
_OPERATION = "capture environment"


async def detect_kind(client: aiohttp.ClientSession, url: str, *, timeout_s: float = 10.0) -> str | None:
    """`vllm` or `openai` for the server at `url` (without /v1); None while it answers with an error of its own (5xx).

    Raises:
        EngineUnavailable: nothing listens there, or it does not answer in time.
    """
    try:
        async with asyncio.timeout(timeout_s), client.get(url + VERSION.path, allow_redirects=False) as answer:
            body = await answer.read()
            return None if answer.status >= 500 else kind_of(body if answer.status == 200 else None)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EngineUnavailable(str(error) or "no answer in time", operation=_OPERATION, place=url) from error


async def capture_http(
    client: aiohttp.ClientSession,
    url: str,
    *,
    kind: str | None = None,
    headers: Mapping[str, str] | None = None,
    previous: EnvironmentCaptured | None = None,
    timeout_s: float = 10.0,
) -> EnvironmentCaptured:
    """The environment of the server at `url` (without /v1); `previous` is an earlier capture of the same server.

    `headers` carry the credential, if one is needed; it reaches no item. `timeout_s` holds for each question.

    Raises:
        EngineUnavailable: nothing listens there.
    """
    return await capture_by(lambda ask: _ask(client, url, ask, headers or {}, timeout_s), kind, previous=previous)


async def capture_by(
    ask: Callable[[Ask], Awaitable[bytes | None]], kind: str | None, *, previous: EnvironmentCaptured | None
) -> EnvironmentCaptured:
    """The environment of a server of which `ask` gets the body of a 200 answer, None for any other. Raises what that raises."""
    asking = questions(kind, previous=previous)
    try:
        question = next(asking)
        while True:
            question = asking.send(await ask(question))
    except StopIteration as end:
        event: EnvironmentCaptured = end.value
        return event


async def instance_http(client: aiohttp.ClientSession, url: str, *, timeout_s: float = 10.0) -> bytes | None:
    """Which start of the vLLM at `url` (without /v1) answers there now; None where it does not tell.

    Raises:
        EngineUnavailable: nothing listens there.
    """
    return instance_of(await _ask(client, url, INSTANCE, {}, timeout_s))


async def _ask(client: aiohttp.ClientSession, url: str, ask: Ask, headers: Mapping[str, str], timeout_s: float) -> bytes | None:
    """The body of a 200 answer, None for any other and for none in time."""
    method = "GET" if ask.body is None else "POST"
    sent = headers if ask.body is None else {**headers, "content-type": "application/json"}
    try:
        async with asyncio.timeout(timeout_s):
            async with client.request(method, url + ask.path, data=ask.body, headers=sent, allow_redirects=False) as answer:
                content = await answer.read()
                return content if answer.status == 200 else None
    except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError) as error:
        raise EngineUnavailable(str(error), operation=_OPERATION, place=url) from error
    except (aiohttp.ClientError, TimeoutError):
        return None
