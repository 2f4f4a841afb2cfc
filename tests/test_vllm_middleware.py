"""The middleware before a real vLLM: the same events as the gateway's, and answers without what recording added."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from ingest.environment import capture_http
from ingest.recorder import Recorder
from ingest.vllm import middleware
from ingest.vllm.middleware import RecordingMiddleware
from schemas.events import EnvironmentCaptured, Event, GenerationFailed, GenerationFinished, GenerationStarted, RequestSubmitted
from schemas.settings import Settings
from store.log import open_log
from tests.conftest import VllmService
from tests.engine_log import events_of

CHAT = "/v1/chat/completions"


class _Server:
    """The ASGI application of a server: everything it is asked goes to the real one; `heads` are the headers that chats came with."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.heads: list[dict[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == CHAT:
            self.heads.append(dict(scope["headers"]))
        body = (await receive()).get("body", b"")
        headers = {"content-type": "application/json", "x-request-id": dict(scope["headers"]).get(b"x-request-id", b"none").decode()}
        where = httpx.URL(self.url + scope["path"], query=scope["query_string"])
        async with (
            httpx.AsyncClient(timeout=60) as client,
            client.stream(scope["method"], where, content=body, headers=headers) as answer,
        ):
            kept = [(name, value) for name, value in answer.headers.raw if name.lower() in (b"content-type", b"content-length")]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
            async for piece in answer.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Rig:
    def __init__(self, data: Path, url: str) -> None:
        settings = Settings(data=data)
        self.data, self.server = data, _Server(url)
        self.log = open_log(settings.log, data)
        self.recorder = Recorder(self.log, settings.recorder, source="gateway")
        self.app = RecordingMiddleware(self.server, self.recorder, settings)

    def ask(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        """The answer to one request."""

        async def one() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://server", timeout=60) as client:
                return await client.post(path, json=body, headers=headers)

        return asyncio.run(one())

    def events(self) -> list[Event]:
        """What was recorded."""
        assert self.recorder.flush(30)
        return events_of(self.data)


@pytest.fixture
def rig(tmp_path: Path, vllm: VllmService) -> Iterator[_Rig]:
    """A server with the middleware."""
    made = _Rig(tmp_path, vllm.url)
    yield made
    made.recorder.close()
    made.log.close()


def payloads(events: list[Event], kind: type) -> list[Any]:
    """The payloads of a kind."""
    return [event.payload for event in events if isinstance(event.payload, kind)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_recorded(rig: _Rig, vllm: VllmService, stream: bool) -> None:
    """Token ids and logprobs are on the tape and not in the answer; the engine is asked under the generation's name."""
    body = {"model": vllm.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "stream": stream}
    answer = rig.ask(CHAT, body)
    events = rig.events()
    started, finished = payloads(events, GenerationStarted)[0], payloads(events, GenerationFinished)[0]

    assert 200 == answer.status_code
    assert '"token_ids":[' not in answer.text.replace(" ", "")
    assert 6 == finished.tokens_recorded == finished.completion_tokens
    assert started.content.prompt_token_ids
    assert f"tokentape-{started.generation_id.hex()}".encode() == rig.server.heads[0][b"x-request-id"]
    assert answer.headers["x-tokentape-generation"].replace("-", "") == started.generation_id.hex()


def test_a_refused_request_is_a_failure(rig: _Rig) -> None:
    """The server's own words go to the client, and the generation has failed with its status."""
    answer = rig.ask(CHAT, {"model": "none", "messages": [{"role": "user", "content": "hello"}]})
    failed = payloads(rig.events(), GenerationFailed)[0]

    assert (404, "invalid_request") == (answer.status_code, failed.error_type)
    assert "none" in json.dumps(answer.json())


def test_what_a_gateway_sent_passes_untouched(rig: _Rig, vllm: VllmService) -> None:
    """A request that is recorded already is not recorded again; nor is one that cannot be read."""
    body = {"model": vllm.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    headers = {"x-tokentape-generation": "01a21488-db01-7917-a222-87b16205e4cb"}

    assert 200 == rig.ask(CHAT, body, **headers).status_code
    assert 400 <= rig.ask(CHAT, {"messages": 5}).status_code < 500
    assert [] == payloads(rig.events(), RequestSubmitted)


def test_the_environment_is_what_a_gateway_records(rig: _Rig, vllm: VllmService, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server tells its middleware what it tells a gateway, so that one calibration is of both; a session has it once."""
    monkeypatch.setattr(middleware, "FIRST_CAPTURE_WAIT_S", 60.0)

    async def over_http() -> EnvironmentCaptured:
        async with aiohttp.ClientSession() as client:
            return await capture_http(client, vllm.url)

    body = {"model": vllm.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    session = {"x-tokentape-session": str(uuid.uuid4())}
    answers = [rig.ask(CHAT, body, **session) for _ in range(2)]
    events = rig.events()
    captured = payloads(events, EnvironmentCaptured)

    assert [200, 200] == [answer.status_code for answer in answers]
    assert [asyncio.run(over_http())] == captured
    assert [captured[0].environment_id] * 2 == [asked.environment_id for asked in payloads(events, RequestSubmitted)]


def test_a_request_does_not_wait_for_the_environment(rig: _Rig, vllm: VllmService, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is not known the request goes on and names none."""
    monkeypatch.setattr(middleware, "FIRST_CAPTURE_WAIT_S", 0.0)
    answer = rig.ask(CHAT, {"model": vllm.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2})
    events = rig.events()

    assert 200 == answer.status_code
    assert [None] == [asked.environment_id for asked in payloads(events, RequestSubmitted)]
