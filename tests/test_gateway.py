"""The gateway between the official client and the real vLLM, and before upstreams that misbehave."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
from pydantic import SecretStr

from ingest.gateway.answers import Piece, spread
from ingest.redaction import REPLACEMENT, Redactor
from schemas.codec import decode
from schemas.errors import ConflictError, SettingsError
from schemas.events import (
    Alternative,
    Event,
    GenerationFinished,
    GenerationStarted,
    RequestSubmitted,
    SequenceFinished,
    SessionOpened,
    TokenChunk,
    ToolCall,
)
from schemas.registry import SchemaRegistry
from schemas.requests import dump, read_chat, splice
from schemas.settings import ColdSettings, GatewaySettings, LogSettings, Settings
from scripts.native.processes import free_port
from store.log import open_log
from tests.conftest import VllmService
from tests.gateway_rig import DEADLINE_S, DONE, HELLO, Act, Peer, Rig, broken, chunk, running
from tests.program import until

GET_WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}


def payloads(events: list[Event], kind: type[Any]) -> list[Any]:
    """The payloads of one kind in the order of the log."""
    return [event.payload for event in events if isinstance(event.payload, kind)]


def text_of(events: list[Event], index: int, channel: str = "content") -> str:
    """What one sequence wrote in a channel."""
    chunks = [part for part in payloads(events, TokenChunk) if part.index == index and part.channel == channel]
    return "".join(part.content.text for part in chunks if part.content)


def ids_of(events: list[Event], index: int) -> list[int]:
    """The token ids of one sequence."""
    chunks = [part for part in payloads(events, TokenChunk) if part.index == index]
    return [token for part in chunks if part.content for token in part.content.token_ids]


@pytest.fixture
def rig(tmp_path: Path, vllm: VllmService) -> Iterator[Rig]:
    """A gateway before vLLM."""
    with running(tmp_path, vllm.url) as it:
        yield it


class TestWithVllm:
    def test_streamed(self, rig: Rig, vllm: VllmService) -> None:
        """A streamed answer reaches the client and the log with ids, logprobs, times and both counts."""
        stream = rig.client().chat.completions.create(model=vllm.model, messages=HELLO, stream=True, max_tokens=9, seed=3)
        text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
        events = rig.wait_for("generation_finished")
        finished = payloads(events, GenerationFinished)[0]
        submitted = payloads(events, RequestSubmitted)[0]
        chunks = payloads(events, TokenChunk)

        assert text_of(events, 0) == text
        assert [len(part.content.token_ids) for part in chunks] == [len(part.offsets_us) for part in chunks]
        assert [len(part.content.logprobs) for part in chunks] == [len(part.offsets_us) for part in chunks]
        assert [part.position for part in chunks] == [sum(len(p.offsets_us) for p in chunks[:i]) for i in range(len(chunks))]
        assert finished.tokens_recorded == finished.completion_tokens == len(ids_of(events, 0)) == 9
        assert submitted.injected == ["logprobs", "return_token_ids", "stream_options"]
        assert payloads(events, GenerationStarted)[0].prompt_tokens == finished.prompt_tokens
        assert submitted.environment_id == next(e.payload.environment_id for e in events if e.kind == "environment_captured")  # type: ignore[attr-defined]
        assert {event.source for event in events} == {"gateway"}

    @pytest.mark.parametrize("stream", [True, False])
    def test_alternatives(self, rig: Rig, vllm: VllmService, stream: bool) -> None:
        """What else each token might have been is on the tape as the client was told it, ids where it asked for ids."""
        asked: Any = {"messages": HELLO, "max_tokens": 9, "logprobs": True, "top_logprobs": 3, "seed": 3, "stream": stream}
        texts = rig.client().chat.completions.create(model=vllm.model, **asked)
        told = [
            score
            for part in (texts if stream else [texts])
            for choice in part.choices
            if choice.logprobs
            for score in choice.logprobs.content
        ]
        events = rig.wait_for("generation_finished")
        others = [each for part in payloads(events, TokenChunk) for each in part.content.alternatives.by_entry(len(part.offsets_us))]
        as_ids = rig.post({**asked, "stream": False, "model": vllm.model, "return_tokens_as_token_ids": True}).json()
        until(lambda: len(payloads(rig.events(), GenerationFinished)) == 2 or None)
        chunks = [part.content.alternatives for part in payloads(rig.events(), TokenChunk)]
        last = [told for told in chunks if told.token_ids][-1]

        assert [[one.text for one in each] for each in others] == [[top.token for top in score.top_logprobs] for score in told]
        assert [[one.logprob for one in each] for each in others] == [
            pytest.approx([top.logprob for top in score.top_logprobs], rel=1e-6) for score in told
        ]
        assert {len(each) for each in others} == {3}
        assert [f"token_id:{number}" for number in last.token_ids[-3:]] == [
            top["token"] for top in as_ids["choices"][0]["logprobs"]["content"][-1]["top_logprobs"]
        ]

    def test_several_sequences(self, rig: Rig, vllm: VllmService) -> None:
        """Each of n sequences has its own start, tokens and end."""
        answer = rig.client().chat.completions.create(model=vllm.model, messages=HELLO, n=2, max_tokens=6, temperature=1)
        events = rig.wait_for("generation_finished")

        assert [text_of(events, index) for index in (0, 1)] == [choice.message.content for choice in answer.choices]
        assert [(end.index, end.tokens, end.finish_reason) for end in payloads(events, SequenceFinished)] == [
            (0, 6, "length"),
            (1, 6, "length"),
        ]
        assert payloads(events, RequestSubmitted)[0].seed is not None

    def test_tool_call(self, rig: Rig, vllm: VllmService) -> None:
        """A tool call is recorded whole, its tokens in a channel of their own."""
        choice: Any = {"type": "function", "function": {"name": "get_weather"}}
        stream = rig.client().chat.completions.create(
            model=vllm.model, messages=HELLO, tools=[GET_WEATHER], tool_choice=choice, stream=True, max_tokens=24, seed=1
        )
        arguments = "".join(
            call.function.arguments or ""
            for part in stream
            for entry in part.choices
            for call in entry.delta.tool_calls or []
            if call.function
        )
        events = rig.wait_for("generation_finished")
        calls = payloads(events, ToolCall)

        assert [(call.content.name, call.content.arguments) for call in calls] == [("get_weather", arguments)]
        assert text_of(events, 0, "tool") == arguments
        assert len(ids_of(events, 0)) == 24

    def test_messages_are_stored_once(self, rig: Rig, vllm: VllmService) -> None:
        """A second turn of a session lists and brings only the messages since the first, which it names."""
        client = rig.client(default_headers={"x-tokentape-session": str(uuid.uuid4())})
        turns = [*HELLO, {"role": "assistant", "content": "Salt."}, {"role": "user", "content": "More."}]
        for messages in (HELLO, turns):
            client.chat.completions.create(model=vllm.model, messages=messages, max_tokens=1)
        events = until(lambda: found if len(payloads(found := rig.events(), GenerationFinished)) == 2 else None)
        first, second = payloads(events, RequestSubmitted)

        assert [event.kind for event in events].count("session_opened") == 1
        assert [event.kind for event in events].count("environment_captured") == 1
        assert len({event.session_id for event in events}) == 1
        assert (second.history_generation, second.history_messages) == (first.generation_id, 1)
        assert len(second.message_ids) == 2
        assert [orjson.loads(message.body) for message in second.content.messages] == turns[1:]

    def test_unknown_model(self, rig: Rig) -> None:
        """The upstream's own refusal passes through and is recorded with its words."""
        with pytest.raises(openai.NotFoundError) as raised:
            rig.client().chat.completions.create(model="no-such-model", messages=HELLO)
        failure = rig.failure()

        assert (failure.error_type, failure.status, failure.retryable) == ("upstream_error", 404, False)
        assert failure.content is not None
        assert failure.content.message == raised.value.body["message"]  # type: ignore[index]

    def test_client_hangs_up(self, rig: Rig, vllm: VllmService) -> None:
        """Where a client hangs up, vLLM stops working and the event says how far it was."""
        ended = 0
        while not any(event.kind == "generation_failed" for event in rig.events()):  # an engine may say all at once, before one hangs up
            stream = rig.client().chat.completions.create(
                model=vllm.model, messages=HELLO, stream=True, max_tokens=1900, extra_body={"ignore_eos": True}
            )
            seen = [next(stream) for _ in range(4)]
            stream.close()
            ended += 1
            until(partial(_ended, rig, ended))
        failure = rig.failure()
        until(lambda: _running(vllm) == 0)

        assert len(seen) == 4
        assert (failure.error_type, failure.origin) == ("client_disconnected", "client")
        told = [event for event in payloads(rig.events(), TokenChunk) if event.generation_id == failure.generation_id]
        assert failure.position == sum(len(event.offsets_us) for event in told) > 0

    def test_models(self, rig: Rig, vllm: VllmService) -> None:
        """The list of models is the upstream's."""
        assert [model.id for model in rig.client().models.list()] == [vllm.model]

    def test_every_recorded_byte_is_free_of_secrets(self, tmp_path: Path, vllm: VllmService) -> None:
        """Neither the client's credential nor a configured secret is in any recorded byte, wherever it was sent."""
        key, secret = "sk-live-4f9a7c31d8e25b60", 'pa"ss\\word-90210'
        settings = Settings(
            data=tmp_path, gateway=GatewaySettings(port=0, upstream=vllm.url), cold=ColdSettings(secret_key=SecretStr(secret))
        )
        rig = Rig(settings)
        try:
            messages = [{"role": "user", "content": f"my key is {key}, my password {secret}"}]
            rig.client(api_key=key, default_headers={"x-tokentape-workflow": f"w {secret}", "x-request-id": key}).chat.completions.create(
                model=vllm.model, messages=messages, max_tokens=2, user=key
            )
            rig.post(b'{"broken": "' + key.encode(), authorization=f"Bearer {key}")
            with pytest.raises(openai.NotFoundError):
                rig.client(api_key=key).chat.completions.create(model=key, messages=messages)
            events = until(lambda: found if len(payloads(found := rig.events(), RequestSubmitted)) == 3 else None)
            recorded = b"".join(rig.framed())
        finally:
            rig.close()
        files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

        for form in (key, secret, dump(secret).decode()[1:-1]):
            assert form.encode() not in recorded
            assert form.encode() not in files
        assert REPLACEMENT.encode() in recorded
        assert max(part.redactions[0].count for part in payloads(events, RequestSubmitted)) == 3
        assert payloads(events, GenerationStarted)[0].content is None


def _ended(rig: Rig, count: int) -> bool:
    """Whether so many generations have ended, one way or the other."""
    return sum(event.kind in ("generation_failed", "generation_finished") for event in rig.events()) == count


def _running(vllm: VllmService) -> float:
    metrics = httpx.get(f"{vllm.url}/metrics").text
    return sum(float(value) for value in re.findall(r"^vllm:num_requests_running\{.*\} (\S+)", metrics, re.MULTILINE))


_BASE: dict[str, Any] = {"messages": HELLO, "seed": 11, "max_tokens": 8, "temperature": 0}
_ASKED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "usage": {"stream_options": {"include_usage": True}},
    "usage throughout": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "no usage": {"stream_options": {"include_usage": False}},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "no logprobs": {"logprobs": False, "return_token_ids": False},
    "ids": {"return_token_ids": True},
    "two": {"n": 2, "temperature": 0.8},
    "tool": {"tools": [GET_WEATHER], "tool_choice": "required"},
}


@pytest.fixture(scope="class")
def shared_rig(tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> Iterator[Rig]:
    """One gateway before vLLM for tests that read nothing of what it recorded."""
    with running(tmp_path_factory.mktemp("gateway"), vllm.url) as it:
        yield it


class TestSameAsDirect:
    @pytest.mark.parametrize("asked", _ASKED)
    def test_stream(self, shared_rig: Rig, vllm: VllmService, asked: str) -> None:
        """The chunks through the gateway have the keys, key order and values that vLLM sends a client directly."""
        body = {**_BASE, **_ASKED[asked], "model": vllm.model, "stream": True}
        shared_rig.post(body)  # the first answer teaches the fingerprint, which sequences that finish early carry
        direct, through = (_chunks(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)) for url in (vllm.url, shared_rig.url))

        assert through == direct

    @pytest.mark.parametrize("asked", [name for name in _ASKED if "usage" not in name])
    def test_whole(self, shared_rig: Rig, vllm: VllmService, asked: str) -> None:
        """A whole answer through the gateway is byte for byte that of vLLM but for ids and the time."""
        body = {**_BASE, **_ASKED[asked], "model": vllm.model}
        direct, through = (
            _plain(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).content) for url in (vllm.url, shared_rig.url)
        )

        assert through == direct

    def test_refusal(self, shared_rig: Rig, vllm: VllmService) -> None:
        """What vLLM refuses is not made acceptable by what the gateway adds."""
        body = {**_BASE, "model": vllm.model, "top_logprobs": 2}
        direct, through = (httpx.post(f"{url}/v1/chat/completions", json=body) for url in (vllm.url, shared_rig.url))

        assert (through.status_code, through.content) == (direct.status_code, direct.content)


def _plain(body: bytes) -> bytes:
    return re.sub(rb'chatcmpl-[\w-]+|(?<="created":)\d+', b"0", body)


def _chunks(answer: httpx.Response) -> dict[str, Any]:
    """A stream, put together per sequence: vLLM packs one token or several into a chunk, as it comes."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [event.removeprefix(b"data: ") for event in _plain(answer.content).split(b"\n\n") if event]
    assert events.pop() == b"[DONE]"
    texts: dict[int, list[Any]] = {}
    shapes, totals = set(), []
    logprobs: list[Any] = []
    for event in map(orjson.loads, events):
        for choice in event["choices"]:
            delta = choice["delta"]
            pieces = [call["function"].get("arguments") or "" for call in delta.get("tool_calls") or []]
            texts.setdefault(choice["index"], []).append((delta.get("content") or "") + "".join(pieces))
            logprobs += (choice["logprobs"] or {}).get("content") or []
            shape = (
                *event,
                "|",
                *choice,
                "|",
                *delta,
                "|",
                choice["finish_reason"],
                choice.get("token_ids") is None,
                event.get("system_fingerprint"),
            )
            shapes.add(shape)
        if not event["choices"]:
            totals.append(event)
    logprobs.sort(key=lambda entry: (entry["token"], entry["logprob"]))
    return {"texts": {index: "".join(text) for index, text in texts.items()}, "shapes": shapes, "totals": totals, "logprobs": logprobs}


async def _silent(peer: Peer) -> None:
    await peer.gone()


async def _silent_after_two(peer: Peer) -> None:
    await peer.begin_stream()
    await peer.send(chunk("one") + chunk("two"))
    await peer.gone()


async def _only_comments(peer: Peer) -> None:
    await peer.begin_stream()
    for _ in range(200):
        await peer.send(b": still here\n\n")
        await asyncio.sleep(0.02)


async def _cut_after_two(peer: Peer) -> None:
    await peer.begin_chunked()
    await peer.chunk(chunk("one") + chunk("two"))


async def _ended_after_two(peer: Peer) -> None:
    await peer.begin_stream()
    await peer.send(chunk("one") + chunk("two"))


async def _invalid_utf8(peer: Peer) -> None:
    await peer.begin_stream()
    await peer.send(chunk("one") + b'data: {"choices": [{"index": 0, "delta": {"content": "\xff\xfe"}}]}\n\n')
    await peer.gone()


async def _half_a_line(peer: Peer) -> None:
    await peer.begin_stream()
    await peer.send(chunk("one") + b'data: {"choices": [{"ind')


async def _not_a_chunk(peer: Peer) -> None:
    await peer.begin_stream()
    await peer.send(chunk("one") + b'data: {"choices": 17}\n\n')
    await peer.gone()


async def _html_stream(peer: Peer) -> None:
    await peer.begin_stream()
    await peer.send(b"<html><body>Welcome</body></html>\n\n")


async def _html(peer: Peer) -> None:
    await peer.whole(b"200 OK", b"text/html", b"<html><body>Welcome</body></html>")


async def _html_error(peer: Peer) -> None:
    await peer.whole(b"503 Service Unavailable", b"text/html", b"<html><body>nginx</body></html>")


async def _half_a_body(peer: Peer) -> None:
    await peer.send(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n{"id": "x", "choices": [')


async def _not_http(peer: Peer) -> None:
    await peer.send(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")


async def _closed(peer: Peer) -> None:
    return


async def _error_chunk(peer: Peer) -> None:
    await peer.begin_stream()
    await peer.send(chunk("one") + b'data: {"error": {"message": "the engine died", "code": 500}}\n\n' + DONE)


class TestBrokenUpstream:
    @pytest.mark.parametrize(
        ("act", "stream", "error_type", "status", "position"),
        [
            (_silent, True, "upstream_timeout", 504, 0),
            (_silent, False, "upstream_timeout", 504, 0),
            (_only_comments, True, "upstream_timeout", 504, 0),
            (_silent_after_two, True, "upstream_timeout", 504, 2),
            (_cut_after_two, True, "upstream_disconnected", 502, 2),
            (_ended_after_two, True, "upstream_disconnected", 502, 2),
            (_closed, True, "upstream_disconnected", 502, 0),
            (_half_a_body, False, "upstream_disconnected", 502, 0),
            (_invalid_utf8, True, "upstream_malformed", 502, 1),
            (_half_a_line, True, "upstream_malformed", 502, 1),
            (_not_a_chunk, True, "upstream_malformed", 502, 1),
            (_html, False, "upstream_malformed", 502, 0),
            (_html, True, "upstream_malformed", 502, 0),
            (_html_error, False, "upstream_malformed", 503, 0),
            (_not_http, False, "upstream_malformed", 502, 0),
            (_error_chunk, True, "upstream_error", 500, 1),
        ],
    )
    def test_failure(self, tmp_path: Path, act: Act, stream: bool, error_type: str, status: int, position: int) -> None:
        """Each way of failing is one event with the position reached, and an error of the official client's own."""
        with broken(act) as upstream, running(tmp_path, upstream.url, first_token_timeout_s=0.5, between_tokens_timeout_s=0.5) as rig:
            texts: list[str | None] = []

            def ask() -> None:
                answer: Any = rig.client().chat.completions.create(model="m", messages=HELLO, stream=stream)
                texts.extend(part.choices[0].delta.content for part in answer)

            with pytest.raises(openai.APIError) as raised:
                ask()
            failure = rig.failure()
            kinds = [event.kind for event in rig.events()]

        assert (failure.error_type, failure.status, failure.position) == (error_type, status, position)
        assert texts == ["one", "two"][:position]
        assert position or getattr(raised.value, "status_code", None) == status or act is _only_comments
        assert kinds[0] == "session_opened"
        assert "request_submitted" in kinds
        assert "generation_finished" not in kinds

    def test_down(self, tmp_path: Path) -> None:
        """An upstream that is not there is a 502, recorded with the request; once it is there, requests pass."""
        port = free_port()
        with running(tmp_path, f"http://127.0.0.1:{port}") as rig:
            with pytest.raises(openai.InternalServerError) as raised:
                rig.client().chat.completions.create(model="m", messages=HELLO)
            failure = rig.failure()
            submitted = payloads(rig.events(), RequestSubmitted)

        assert raised.value.status_code == 502
        assert (failure.error_type, failure.retryable) == ("upstream_unreachable", True)
        assert [message.role for message in submitted[0].content.messages] == ["user"]

    def test_html_in_a_stream(self, tmp_path: Path) -> None:
        """A stream that is no stream of events ends as an error before anything was passed on as an answer."""
        with broken(_html_stream) as upstream, running(tmp_path, upstream.url) as rig:
            answer = rig.post({"model": "m", "messages": HELLO, "stream": True})
            failure = rig.failure()

        assert b'"error"' in answer.content
        assert failure.error_type in ("upstream_disconnected", "upstream_malformed")

    def test_plain_upstream_gets_only_usage(self, tmp_path: Path) -> None:
        """An upstream that is not vLLM is asked for its usage and nothing else, and the client does not see it."""

        async def act(peer: Peer) -> None:
            usage = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
            null = orjson.loads(chunk("two", finish="stop")[6:]) | {"usage": None}
            await peer.begin_stream()
            await peer.send(b": hello\n\n" + chunk("one") + b"data: " + orjson.dumps(null) + b"\n\n" + usage + DONE)

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            answer = rig.post({"model": "m", "messages": HELLO, "stream": True})
            finished = payloads(rig.wait_for("generation_finished"), GenerationFinished)[0]

        assert set(upstream.bodies[0]) == {"model", "messages", "stream", "stream_options"}
        assert answer.content == b": hello\n\n" + chunk("one") + chunk("two", finish="stop") + DONE
        assert (finished.prompt_tokens, finished.completion_tokens, finished.tokens_recorded) == (5, 2, 2)

    def test_addition_refused(self, tmp_path: Path) -> None:
        """An upstream that does not take the addition is asked again without it, and from then on."""

        async def act(peer: Peer) -> None:
            if b"stream_options" in peer.body:
                await peer.whole(b"400 Bad Request", b"application/json", b'{"error": {"message": "unknown field stream_options"}}')
            else:
                await peer.begin_stream()
                await peer.send(chunk("one", finish="stop") + DONE)

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            answers = [rig.post({"model": "m", "messages": HELLO, "stream": True}) for _ in range(2)]
            until(lambda: len(payloads(rig.events(), GenerationFinished)) == 2)
            attempts = [started.attempt for started in payloads(rig.events(), GenerationStarted)]

        assert [answer.content for answer in answers] == [chunk("one", finish="stop") + DONE] * 2
        assert len(upstream.bodies) == 3
        assert sorted(attempts) == [1, 2]

    def test_asked_again_before_the_first_byte(self, tmp_path: Path) -> None:
        """An upstream that closes before it answers is asked once more, and the tape says that it was the second attempt."""
        asked = 0

        async def act(peer: Peer) -> None:
            nonlocal asked
            asked += 1
            if asked == 2:
                await peer.begin_stream()
                await peer.send(chunk("one", finish="stop") + DONE)

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            answer = rig.post({"model": "m", "messages": HELLO, "stream": True})
            started = payloads(rig.wait_for("generation_finished"), GenerationStarted)

        assert answer.content == chunk("one", finish="stop") + DONE
        assert [entry.attempt for entry in started] == [2]

    def test_not_asked_again_after_the_first_byte(self, tmp_path: Path) -> None:
        """What a client has seen the beginning of is never sent again."""

        async def act(peer: Peer) -> None:
            await peer.begin_chunked()
            await peer.chunk(chunk("one"))

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            rig.post({"model": "m", "messages": HELLO, "stream": True})
            failure = rig.failure()

        assert len(upstream.bodies) == 1
        assert (failure.error_type, failure.position) == ("upstream_disconnected", 1)

    def test_an_answer_may_not_go_on_for_ever(self, tmp_path: Path) -> None:
        """The time for a whole answer is limited, however regularly its tokens come."""

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            while True:
                await peer.send(chunk("on "))
                await asyncio.sleep(0.01)

        with broken(act) as upstream, running(tmp_path, upstream.url, total_timeout_s=0.3) as rig:
            answer = rig.post({"model": "m", "messages": HELLO, "stream": True})
            failure = rig.failure()

        assert b"not complete after 0.3 s" in answer.content
        assert (failure.error_type, failure.position > 0) == ("upstream_timeout", True)

    def test_counts_that_do_not_reconcile(self, tmp_path: Path) -> None:
        """Tokens on the tape and tokens that the upstream counted stand side by side where they differ."""

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            await peer.send(chunk("one", finish="stop", token_ids=[7]))
            await peer.send(b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}\n\n' + DONE)

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            rig.post({"model": "m", "messages": HELLO, "stream": True})
            finished = payloads(rig.wait_for("generation_finished"), GenerationFinished)[0]

        assert (finished.tokens_recorded, finished.completion_tokens) == (1, 3)

    def test_odd_but_whole_streams_pass(self, tmp_path: Path) -> None:
        """Carriage returns, a byte order mark, cuts inside a character and a missing [DONE] harm nothing and change nothing."""
        stream = b"\xef\xbb\xbf" + (chunk("grö") + chunk("ße", finish="stop")).replace(b"\n", b"\r\n")

        async def act(peer: Peer) -> None:
            await peer.begin_chunked()
            for at in range(len(stream)):
                await peer.chunk(stream[at : at + 1])
            await peer.send(b"0\r\n\r\n")

        with broken(act) as upstream, running(tmp_path, upstream.url, upstream_kind="openai") as rig:
            answer = rig.post({"model": "m", "messages": HELLO, "stream": True, "stream_options": {"include_usage": True}})
            events = rig.wait_for("generation_finished")

        assert answer.content == stream
        assert text_of(events, 0) == "größe"

    def test_reasoning_and_tools_of_a_whole_answer(self, tmp_path: Path) -> None:
        """A whole answer gives the same events as a stream: channels, tool calls, ends."""
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        message = {"role": "assistant", "content": "so", "reasoning": "why", "tool_calls": [call]}
        body = orjson.dumps({"id": "x", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})

        async def act(peer: Peer) -> None:
            await peer.whole(b"200 OK", b"application/json", body)

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            answer = rig.post({"model": "m", "messages": HELLO})
            events = rig.wait_for("generation_finished")

        assert answer.content == body
        assert [text_of(events, 0, channel) for channel in ("reasoning", "content", "tool")] == ["why", "so", "{}"]
        assert [(part.content.call_id, part.content.name) for part in payloads(events, ToolCall)] == [("c1", "f")]
        assert [end.finish_reason for end in payloads(events, SequenceFinished)] == ["tool_calls"]


class TestRequests:
    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b'{"model": "m", "messages": [', "not valid JSON"),
            (b"[1, 2]", "not a JSON object"),
            (b'{"model": "m"}', "messages must be an array"),
            (b'{"model": "m", "messages": "hi"}', "messages must be an array"),
            (b"\xff\xfe", "not valid JSON"),
            (b"", "not valid JSON"),
            (b'{"a":' * 100_000, "not valid JSON"),
        ],
    )
    def test_unreadable_body(self, tmp_path: Path, body: bytes, words: str) -> None:
        """A body that is no request is a 400 in OpenAI's words, recorded with its beginning in a session."""
        with running(tmp_path, f"http://127.0.0.1:{free_port()}") as rig:
            answer = rig.post(body)
            failure = rig.failure()
            submitted = payloads(rig.events(), RequestSubmitted)[0]

        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
        assert words in answer.json()["error"]["message"]
        assert (failure.error_type, failure.origin) == ("invalid_request", "client")
        assert submitted.body_bytes == len(body)
        assert submitted.content.parameters == body.decode(errors="replace")[: 32 << 10]

    def test_too_large(self, tmp_path: Path) -> None:
        """A body over the limit is a 413 that the client really receives."""
        with running(tmp_path, f"http://127.0.0.1:{free_port()}", body_bytes_max=100_000) as rig:
            with pytest.raises(openai.APIStatusError) as raised:
                rig.client().chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 400_000}])
            failure = rig.failure()

        assert raised.value.status_code == 413
        assert (failure.error_type, failure.status) == ("invalid_request", 413)

    def test_session_must_be_a_uuid(self, tmp_path: Path) -> None:
        """A session header that is no UUID is refused, and the refusal is recorded in a session of its own."""
        with running(tmp_path, f"http://127.0.0.1:{free_port()}") as rig:
            answer = rig.post({"model": "m", "messages": HELLO}, x_tokentape_session="mine")
            failure = rig.failure()

        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-tokentape-session")
        assert failure.error_type == "invalid_request"

    def test_unknown_path(self, tmp_path: Path) -> None:
        """Another path is a 404 that says what is served; another method is a 405."""
        with running(tmp_path, f"http://127.0.0.1:{free_port()}") as rig:
            with pytest.raises(openai.NotFoundError) as raised:
                rig.client().images.generate(model="m", prompt="x")
            refused = httpx.get(f"{rig.url}/v1/chat/completions")
            health = httpx.get(f"{rig.url}/health").json()

        assert "POST /v1/chat/completions" in str(raised.value)
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert health["status"] == "ok"

    def test_what_ties_a_request_to_the_world(self, tmp_path: Path) -> None:
        """Trace, request id, user, workflow, purpose, tags, key and address are recorded; the key's name says nothing."""
        headers = {
            "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "x-request-id": "r-1",
            "x-tokentape-user": "ann",
            "x-tokentape-workflow": "triage",
            "x-tokentape-purpose": "support",
            "x-tokentape-tags": "a, b,,c",
        }
        with running(tmp_path, f"http://127.0.0.1:{free_port()}") as rig:
            for _ in range(2):
                with pytest.raises(openai.InternalServerError):
                    rig.client(default_headers=headers).chat.completions.create(model="m", messages=HELLO)
            events = until(lambda: found if len(payloads(found := rig.events(), RequestSubmitted)) == 2 else None)
        opened = payloads(events, SessionOpened)[0]
        first, second = payloads(events, RequestSubmitted)

        assert (opened.user, opened.workflow, opened.purpose, opened.tags) == ("ann", "triage", "support", ["a", "b", "c"])
        assert (first.trace_id, first.client_request_id, first.client_address) == ("4bf92f3577b34da6a3ce929d0e0e4736", "r-1", "127.0.0.1")
        assert first.api_key_id == second.api_key_id != None  # noqa: E711  # one comparison says both
        assert {event.actor for event in events} == {"ann"}

    def test_client_hangs_up_in_its_request(self, tmp_path: Path) -> None:
        """A client that goes away in the middle of its body is recorded as that."""
        with running(tmp_path, f"http://127.0.0.1:{free_port()}") as rig:
            host, port = rig.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 900\r\n\r\n{"model": ')
                until(lambda: httpx.get(f"{rig.url}/health").json()["active"] == 1)
            failure = rig.failure()

        assert failure.error_type == "client_disconnected"

    def test_client_hangs_up_before_the_first_token(self, tmp_path: Path) -> None:
        """A client that goes away while the upstream is silent cancels the upstream's request."""
        with broken(_silent) as upstream, running(tmp_path, upstream.url) as rig:
            with pytest.raises(openai.APITimeoutError):
                rig.client(timeout=0.5).chat.completions.create(model="m", messages=HELLO)
            failure = rig.failure()
            left = upstream.left.wait(DEADLINE_S)

        assert failure.error_type == "client_disconnected"
        assert left

    def test_key_of_the_installation_goes_upstream(self, tmp_path: Path) -> None:
        """A configured key replaces the client's, and headers of ours stay with us."""

        async def act(peer: Peer) -> None:
            await peer.whole(b"200 OK", b"application/json", b'{"choices": []}')

        with broken(act) as upstream, running(tmp_path, upstream.url, upstream_key=SecretStr("sk-upstream-000111222")) as rig:
            rig.post({"model": "m", "messages": HELLO}, authorization="Bearer of-the-client-12345", x_tokentape_user="ann", x_other="y")
        head = upstream.heads[0].lower()

        assert b"authorization: bearer sk-upstream-000111222" in head
        assert b"of-the-client" not in head
        assert b"x-tokentape" not in head
        assert b"x-other: y" in head


class TestStrict:
    def test_nothing_is_served_unrecorded(self, tmp_path: Path) -> None:
        """In strict mode a request that cannot be made durable is not forwarded."""
        with broken(_closed) as upstream, running(tmp_path, upstream.url, mode="strict") as rig:
            rig.recorder.close()
            with pytest.raises(openai.InternalServerError) as raised:
                rig.client().chat.completions.create(model="m", messages=HELLO)

        assert raised.value.status_code == 503
        assert upstream.bodies == []

    def test_durable_before_the_client_sees_the_end(self, tmp_path: Path) -> None:
        """In strict mode the log holds the request when the upstream gets it, and the end when the client sees it."""
        held: list[list[str]] = []
        registry = SchemaRegistry()
        log = open_log(LogSettings(partitions=2), tmp_path)

        def kinds() -> list[str]:
            values = [value for partition in (0, 1) for value in log.read(partition, 0, limit=1000).values]
            return [decode(value, registry).kind for value in values]

        async def act(peer: Peer) -> None:
            held.append(await asyncio.to_thread(kinds))
            await peer.begin_stream()
            await peer.send(chunk("one", finish="stop") + DONE)

        with broken(act) as upstream, running(tmp_path, upstream.url, mode="strict") as rig:
            rig.post({"model": "m", "messages": HELLO, "stream": True})
            held.append(kinds())
        log.close()

        assert "request_submitted" in held[0]
        assert "generation_finished" in held[1]


class TestShutdown:
    def test_open_streams_end_with_a_record(self, tmp_path: Path) -> None:
        """A gateway that stops ends what does not end by itself: recorded, and told to the client."""
        with broken(_silent_after_two) as upstream, running(tmp_path, upstream.url, grace_s=0.3) as rig:
            stream: Any = rig.client().chat.completions.create(model="m", messages=HELLO, stream=True)
            texts = [next(stream).choices[0].delta.content for _ in range(2)]
            stopping = threading.Thread(target=rig.stop)
            stopping.start()
            with pytest.raises(openai.APIError, match="stopping"):
                next(stream)
            stopping.join()
            failure = rig.failure()

        assert texts == ["one", "two"]
        assert (failure.error_type, failure.origin, failure.position) == ("shutdown", "gateway", 2)

    def test_streams_may_end_within_the_grace(self, tmp_path: Path) -> None:
        """A stream that ends in time ends well."""
        going_on = threading.Event()

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            await peer.send(chunk("one"))
            await asyncio.to_thread(going_on.wait)
            await peer.send(chunk("two", finish="stop") + DONE)

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            stream: Any = rig.client().chat.completions.create(model="m", messages=HELLO, stream=True)
            texts = [next(stream).choices[0].delta.content]
            stopping = threading.Thread(target=rig.stop)
            stopping.start()
            until(lambda: _refuses(rig.url))
            going_on.set()
            texts += [part.choices[0].delta.content for part in stream]
            stopping.join()
            finished = payloads(rig.events(), GenerationFinished)

        assert texts == ["one", "two"]
        assert [end.tokens_recorded for end in finished] == [2]

    def test_port_in_use(self, tmp_path: Path) -> None:
        """A taken port and an address of another machine are errors of one line."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            taken = Rig(Settings(data=tmp_path / "a", gateway=GatewaySettings(port=listener.getsockname()[1])))
            taken.close()
        elsewhere = Rig(Settings(data=tmp_path / "b", gateway=GatewaySettings(host="192.0.2.1", port=0)))
        elsewhere.close()

        assert isinstance(taken.error, ConflictError)
        assert isinstance(elsewhere.error, SettingsError)

    def test_killed(self, tmp_path: Path) -> None:
        """After `kill -9` in strict mode the log holds the request that the upstream had received."""
        with broken(_silent_after_two) as upstream:
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.gateway_child", str(tmp_path), upstream.url], stdout=subprocess.PIPE, env=os.environ
            )
            assert child.stdout is not None
            url = child.stdout.readline().decode().strip()
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            stream: Any = client.chat.completions.create(model="m", messages=HELLO, stream=True)
            next(stream)
            child.send_signal(signal.SIGKILL)
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                list(stream)
            client.close()
            child.wait()
            child.stdout.close()
        log = open_log(LogSettings(), tmp_path, create=False)
        registry = SchemaRegistry()
        kinds = {decode(value, registry).kind for p in range(log.partitions) for value in log.read(p, 0, limit=100).values}
        log.close()

        assert {"session_opened", "request_submitted"} <= kinds


def _refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=1)
    except httpx.HTTPError:
        return True
    time.sleep(0.01)
    return False


class TestPieces:
    @pytest.mark.parametrize(
        ("segments", "pieces", "expected"),
        [
            ([("content", "ab")], ["a", "b"], [("content", [0], "a"), ("content", [1], "b")]),
            (
                [("reasoning", "a"), ("content", "bc")],
                ["a", "b", "c"],
                [("reasoning", [0], "a"), ("content", [1], "b"), ("content", [2], "c")],
            ),
            ([("reasoning", "a"), ("content", "b")], ["<t>", "a", "</t>", "b"], [("reasoning", [0, 1, 2], "a"), ("content", [3], "b")]),
            ([("content", "ü")], ["\ufffd", "\ufffd"], [("content", [0, 1], "ü")]),
            ([("reasoning", "a"), ("content", "b")], ["xy"], [("reasoning", [0], "a"), ("content", [], "b")]),
        ],
    )
    def test_tokens_find_their_text(
        self, segments: list[tuple[str, str]], pieces: list[str], expected: list[tuple[str, list[int], str]]
    ) -> None:
        """Each token goes to one entry, with its own text where the pieces spell the segments."""
        ids = list(range(len(pieces)))
        others = [[Alternative(f"not {piece}", None, -2.0)] for piece in pieces]
        found = list(spread(segments, ids, [Piece(p, -1.0, other) for p, other in zip(pieces, others, strict=True)]))

        assert [(channel, list(own), text) for channel, own, text, _, _ in found] == expected
        assert [list(told) for *_, told in found if told] == [[others[i] for i in own] for _, own, _ in expected if own]

    @pytest.mark.parametrize(
        ("body", "extra", "expected"),
        [
            (b'{"messages": [], "x": 1.50}\n', {"seed": 1}, b'{"messages": [], "x": 1.50,"seed":1}'),
            (b'{"messages":[],"seed":null}', {"seed": 1}, b'{"messages":[],"seed":1}'),
            (b'{"messages":[]}', {}, b'{"messages":[]}'),
        ],
    )
    def test_additions_keep_the_clients_bytes(self, body: bytes, extra: dict[str, Any], expected: bytes) -> None:
        """Additions go behind what the client wrote, which stays as it is unless a field must change."""
        assert splice(read_chat(body), extra) == expected

    def test_redactor_takes_longer_secrets_first(self) -> None:
        """A secret inside another leaves no half behind."""
        assert Redactor(["secret", "secret-and-more"])("a secret-and-more, a secret") == (f"a {REPLACEMENT}, a {REPLACEMENT}", 2)
