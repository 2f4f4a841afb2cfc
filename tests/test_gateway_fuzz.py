"""Hostile requests and hostile answers at every endpoint: no 500, no hang, and every generation on the tape with an end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.events import GenerationFailed, GenerationFinished, RequestSubmitted
from tests.gateway_rig import DEADLINE_S, HELLO, Peer, Rig, broken, running
from tests.test_gateway import payloads

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/responses")

_SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6) | st.just("\ud800")
_JSON = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8
)


def _object(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), _JSON, max_size=4)


_BLOCK = _object("type", "text", "input", "id", "name", "tool_use_id", "content", "source") | st.builds(
    lambda kind, rest: {**rest, "type": kind},
    st.sampled_from(["text", "image", "thinking", "tool_use", "tool_result", "image_url"]),
    _object("text", "source", "thinking", "signature", "id", "name", "input", "tool_use_id", "content", "is_error", "image_url"),
)
_MESSAGE = st.builds(
    lambda role, content, rest: {**rest, "role": role, "content": content},
    st.sampled_from(["user", "assistant", "system", "tool"]),
    st.text(max_size=4) | st.lists(_BLOCK, max_size=2) | _JSON,
    _object("name", "tool_calls", "tool_call_id", "reasoning"),
)
_FIELDS = _object(
    "model", "max_tokens", "n", "seed", "temperature", "tools", "tool_choice", "stop", "stop_sequences", "system", "thinking",
    "response_format", "logprobs", "echo", "stream_options", "metadata", "top_k", "prompt", "input", "messages", "x",
)  # fmt: skip
_REQUEST = st.builds(
    lambda fields, messages, stream: {"messages": messages, "prompt": "x", "input": ["x"], "stream": stream, **fields},
    _FIELDS,
    st.lists(_MESSAGE, max_size=3),
    st.booleans(),
)

_CHOICE = st.builds(
    lambda rest, delta: {**rest, "delta": delta, "message": delta},
    _object("index", "finish_reason", "stop_reason", "logprobs", "token_ids", "text", "prompt_token_ids"),
    _object("role", "content", "reasoning", "refusal", "tool_calls", "function_call"),
)
_EVENT = (
    _object("id", "model", "choices", "usage", "error", "system_fingerprint", "prompt_token_ids", "data")
    | st.builds(lambda rest, choices: {**rest, "choices": choices}, _object("usage", "id", "model"), st.lists(_CHOICE, max_size=2))
    | st.builds(
        lambda kind, rest: {**rest, "type": kind},
        st.sampled_from(["message_start", "content_block_start", "content_block_delta", "message_delta", "message_stop", "error"]),
        _object("message", "index", "content_block", "delta", "usage", "error"),
    )
    | _JSON
)


@dataclass
class Bench:
    """A gateway before an upstream that answers with `events`."""

    rig: Rig
    client: httpx.Client
    events: list[Any]
    sent: int = 0

    def post(self, path: str, content: bytes) -> httpx.Response:
        """One request; whatever comes, it comes in time and is no 500."""
        self.sent += 1
        answer = self.client.post(self.rig.url + path, content=content, headers={"content-type": "application/json"})

        assert answer.status_code != 500, answer.text
        return answer

    def check(self) -> None:
        """Each request is on the tape, with one end, and none of them is the gateway's own failure."""
        events = self.rig.events()
        submitted = [request.generation_id for request in payloads(events, RequestSubmitted)]
        failed = payloads(events, GenerationFailed)
        ended = [end.generation_id for end in (*payloads(events, GenerationFinished), *failed)]

        assert len(submitted) == self.sent
        assert sorted(submitted) == sorted(ended)
        assert not [failure for failure in failed if failure.error_type == "gateway_error"]


def _text(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # lone surrogates and huge integers, which only Python's own writer takes
        return json.dumps(value).encode()


@pytest.fixture(scope="module", params=["openai", "anthropic"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One gateway for all examples, and at the end a look at its tape."""
    events: list[Any] = []

    async def act(peer: Peer) -> None:
        if b'"stream":true' in peer.body:
            await peer.begin_chunked()
            for event in events:
                await peer.chunk(b"data: " + _text(event) + b"\n\n")
            await peer.chunk(b"event: message_stop\ndata: [DONE]\n\n")
            await peer.chunk(b"")
            peer.kept = True
        else:
            await peer.whole(b"200 OK", b"application/json", _text(events[0] if events else {}))

    data = tmp_path_factory.mktemp("fuzz")
    with broken(act) as upstream, running(data, upstream.url, upstream_kind=request.param) as rig:
        with httpx.Client(timeout=DEADLINE_S) as client:
            bench = Bench(rig, client, events)
            yield bench
        bench.check()


_FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.parametrize("path", PATHS)
@given(body=st.binary(max_size=40) | _JSON.map(_text) | _REQUEST.map(_text))
@_FEW
def test_requests(bench: Bench, path: str, body: bytes) -> None:
    """Bytes that are nothing, JSON that is no request, and requests whose fields have any type at all."""
    bench.events[:] = [{"choices": [{"index": 0, "delta": {"content": "x"}, "message": {"content": "x"}, "finish_reason": "stop"}]}]
    bench.post(path, body)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [True, False])
@given(events=st.lists(_EVENT, max_size=4))
@_FEW
def test_answers(bench: Bench, path: str, stream: bool, events: list[Any]) -> None:
    """Answers that are JSON and otherwise nothing that was promised."""
    bench.events[:] = events
    bench.post(path, _text({"model": "m", "messages": HELLO, "prompt": "x", "input": "x", "max_tokens": 3, "stream": stream}))
