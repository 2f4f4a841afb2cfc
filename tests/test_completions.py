"""OpenAI's completions and embeddings through the gateway: the official client before it, vLLM behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from schemas.events import GenerationFinished, GenerationStarted, RequestSubmitted, SequenceFinished, TokenChunk
from schemas.requests import join, read_completion, read_embedding
from tests.conftest import VllmService
from tests.gateway_rig import Peer, Rig, broken, running
from tests.program import until
from tests.test_gateway import ids_of, payloads, text_of

_ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "two sequences": {"n": 2, "temperature": 1.0},
    "two prompts": {"prompt": ["The sea", "A tape"]},
    "ids": {"return_token_ids": True},
    "logprobs": {"logprobs": 2},
    "no logprobs": {"logprobs": 0},
    "echo": {"echo": True},
    "usage": {"stream_options": {"include_usage": True}},
    "prompt as ids": {"prompt": [260, 78, 368]},
}
_BASE = {"prompt": "The sea is", "max_tokens": 5, "seed": 11}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> Iterator[Rig]:
    """One gateway before vLLM for tests that read nothing of what it recorded."""
    with running(tmp_path_factory.mktemp("completions"), vllm.url) as it:
        yield it


class TestRecorded:
    def test_streamed(self, tmp_path: Path, vllm: VllmService) -> None:
        """A streamed completion is recorded with prompt ids, token ids, logprobs and the seed that was drawn for it."""
        with running(tmp_path, vllm.url) as rig:
            stream = rig.client().completions.create(model=vllm.model, prompt="The sea is", stream=True, max_tokens=7)
            text = "".join(part.choices[0].text for part in stream if part.choices)
            events = rig.wait_for("generation_finished")
        submitted, finished = payloads(events, RequestSubmitted)[0], payloads(events, GenerationFinished)[0]

        assert text_of(events, 0) == text
        assert finished.tokens_recorded == finished.completion_tokens == len(ids_of(events, 0)) == 7
        assert sum(len(part.content.logprobs) for part in payloads(events, TokenChunk)) == 7
        assert (submitted.endpoint, submitted.injected, submitted.seed is None) == (
            "/v1/completions",
            ["logprobs", "return_token_ids", "seed", "stream_options"],
            False,
        )
        assert len(payloads(events, GenerationStarted)[0].content.prompt_token_ids) == finished.prompt_tokens

    @pytest.mark.parametrize("stream", [True, False])
    def test_alternatives(self, tmp_path: Path, vllm: VllmService, stream: bool) -> None:
        """What else each token might have been is on the tape where the client asked for it, and only there."""
        with running(tmp_path, vllm.url) as rig:
            answer = rig.client().completions.create(model=vllm.model, prompt="The sea", logprobs=2, max_tokens=6, stream=stream)
            told = [top for part in (answer if stream else [answer]) for choice in part.choices for top in choice.logprobs.top_logprobs]
            events = rig.wait_for("generation_finished")
            rig.client().completions.create(model=vllm.model, prompt="The sea", max_tokens=6)
            unasked = until(lambda: found if len(payloads(found := rig.events(), GenerationFinished)) == 2 else None)
        others = [each for part in payloads(events, TokenChunk) for each in part.content.alternatives.by_entry(len(part.offsets_us))]

        assert [[one.text for one in each] for each in others] == [list(top) if len(top) > 1 else [] for top in told]
        assert any(others)
        assert sum(part.content.alternatives is None for part in payloads(unasked, TokenChunk)) > 0

    def test_whole(self, tmp_path: Path, vllm: VllmService) -> None:
        """Each prompt of a request is answered by sequences of its own."""
        with running(tmp_path, vllm.url) as rig:
            answer = rig.client().completions.create(model=vllm.model, prompt=["The sea", "A tape"], n=2, max_tokens=4, temperature=1)
            events = rig.wait_for("generation_finished")
        submitted = payloads(events, RequestSubmitted)[0]

        assert [text_of(events, index) for index in range(4)] == [choice.text for choice in answer.choices]
        assert [end.tokens for end in payloads(events, SequenceFinished)] == [4, 4, 4, 4]
        assert (submitted.n, [message.body for message in submitted.content.messages]) == (4, ['"The sea"', '"A tape"'])

    def test_client_is_told_in_its_own_words(self, tmp_path: Path, vllm: VllmService) -> None:
        """A request without a prompt, and a model that nobody has, are exceptions of the official client and on the tape."""
        with running(tmp_path, vllm.url) as rig:
            with pytest.raises(openai.BadRequestError, match="prompt must be a text or an array"):
                rig.client().post("/completions", body={"model": vllm.model}, cast_to=object)
            with pytest.raises(openai.NotFoundError):
                rig.client().completions.create(model="nobody", prompt="x")
            kinds = [event.kind for event in rig.events()]

        assert kinds.count("request_submitted") == kinds.count("generation_failed") == 2


class TestSameAsDirect:
    @pytest.mark.parametrize("asked", _ASKED)
    def test_stream(self, rig: Rig, vllm: VllmService, asked: str) -> None:
        """A stream has the keys, key order and values that vLLM sends a client directly, chunk sizes aside."""
        body = {**_BASE, **_ASKED[asked], "model": vllm.model, "stream": True}
        rig.post(body, "/v1/completions")  # the first answer teaches the fingerprint
        direct, through = (_chunks(httpx.post(f"{url}/v1/completions", json=body, timeout=60)) for url in (vllm.url, rig.url))

        assert through == direct

    @pytest.mark.parametrize("asked", [name for name in _ASKED if name != "usage"])
    def test_whole(self, rig: Rig, vllm: VllmService, asked: str) -> None:
        """A whole answer is byte for byte that of vLLM but for ids and the time."""
        body = {**_BASE, **_ASKED[asked], "model": vllm.model}
        direct, through = (_plain(httpx.post(f"{url}/v1/completions", json=body, timeout=60).content) for url in (vllm.url, rig.url))

        assert through == direct


def _plain(body: bytes) -> bytes:
    return re.sub(rb'cmpl-[\w-]+|(?<="created":)\d+', b"0", body)


def _chunks(answer: httpx.Response) -> dict[Any, Any]:
    """A stream, put together per sequence: texts joined, the rest as it came last; and the keys of all."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    found: dict[Any, Any] = {}
    for block in answer.content.split(b"\n\n"):
        if not block.strip() or block == b"data: [DONE]":
            continue
        event = orjson.loads(_plain(block.removeprefix(b"data: ")))
        for choice in event.pop("choices"):
            kept = found.setdefault(choice["index"], {"text": "", "ids": [], "keys": set()})
            kept["text"] += choice["text"]
            kept["ids"] += choice["token_ids"] or []
            kept["keys"].add(tuple(choice))
            kept["end"] = (choice["finish_reason"], choice["stop_reason"], event if choice["finish_reason"] else None)
            kept["logprobs"] = choice["logprobs"] is None
        found["last"] = event
    assert answer.content.endswith(b"data: [DONE]\n\n")
    return found


async def _vectors(peer: Peer) -> None:
    inputs = orjson.loads(peer.body)["input"]
    data = [{"object": "embedding", "index": at, "embedding": "AACAPwAAAEA="} for at in range(len(inputs))]
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    await peer.whole(b"200 OK", b"application/json", orjson.dumps({"object": "list", "data": data, "model": "e", "usage": usage}))


class TestEmbeddings:
    def test_vectors_are_counted(self, tmp_path: Path) -> None:
        """The client gets its vectors; the tape holds the inputs, how many vectors came and what they cost, and no token."""
        with broken(_vectors) as upstream, running(tmp_path, upstream.url) as rig:
            answer = rig.client().embeddings.create(model="e", input=["one", "two"])
            events = rig.wait_for("generation_finished")
        finished, submitted = payloads(events, GenerationFinished)[0], payloads(events, RequestSubmitted)[0]

        assert [entry.embedding for entry in answer.data] == [[1.0, 2.0], [1.0, 2.0]]
        assert (finished.sequences, finished.tokens_recorded, finished.prompt_tokens) == (2, 0, 5)
        assert [message.body for message in submitted.content.messages] == ['"one"', '"two"']
        assert not payloads(events, TokenChunk)

    def test_refused_by_an_upstream_without(self, rig: Rig, vllm: VllmService) -> None:
        """An upstream that has no embeddings says so itself."""
        with pytest.raises(openai.NotFoundError):
            rig.client().embeddings.create(model=vllm.model, input="x")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"prompt":"a","model":"m"}', {"prompt": "a", "model": "m"}),
        (b'{"prompt":["a","b"]}', {"prompt": ["a", "b"]}),
        (b'{"prompt":[1,2]}', {"prompt": [1, 2]}),
        (b'{"prompt":[[1],[2]]}', {"prompt": [[1], [2]]}),
    ],
)
def test_a_recorded_prompt_joins_again(body: bytes, expected: Any) -> None:
    """The two recorded halves of a request make its document again."""
    request = read_completion(body)

    assert expected == join("/v1/completions", orjson.loads(request.parameters), request.messages)


def test_a_recorded_input_joins_again() -> None:
    """The same holds for embeddings."""
    request = read_embedding(b'{"input":"a","dimensions":3}')

    assert {"dimensions": 3, "input": "a"} == join("/v1/embeddings", orjson.loads(request.parameters), request.messages)
