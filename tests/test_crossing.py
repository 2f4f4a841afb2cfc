"""Clients of each provider before an upstream of another: real clients, and the providers' documented answers over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import orjson
import pytest
from google.genai import errors

from schemas.events import GenerationFailed
from tests.conftest import VllmService
from tests.gateway_rig import HELLO, BrokenUpstream, Peer, Rig, broken, running
from tests.test_gateway import payloads, text_of
from tests.test_gemini import as_gemini, google
from tests.test_messages import STREAM, claude

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": CITY}}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude",
    "content": [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Oslo"}},
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {"input_tokens": 7, "output_tokens": 20},
}


async def as_anthropic(peer: Peer) -> None:
    """What Anthropic answers, streamed and whole, as it documents it; a model that it does not have."""
    if b'"nobody"' in peer.body:
        error = {"type": "error", "error": {"type": "not_found_error", "message": "model: nobody"}}
        await peer.whole(b"404 Not Found", b"application/json", orjson.dumps(error))
    elif b'"stream":true' in peer.body:
        await peer.begin_chunked()
        if b'"cut"' in peer.body:
            cut = STREAM[: STREAM.index(b"event: ping")]
            error = {"type": "error", "error": {"type": "overloaded_error", "message": "Later."}}
            await peer.chunk(cut + b"event: error\ndata: " + orjson.dumps(error) + b"\n\n")
        else:
            await peer.chunk(STREAM)
        await peer.chunk(b"")
    else:
        await peer.whole(b"200 OK", b"application/json", orjson.dumps(MESSAGE))


@pytest.fixture(scope="module")
def before_anthropic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, BrokenUpstream]]:
    """A gateway before what speaks as Anthropic does."""
    data = tmp_path_factory.mktemp("anthropic")
    with broken(as_anthropic) as upstream, running(data, upstream.url, upstream_kind="anthropic", upstream_key="real") as rig:
        yield rig, upstream


@pytest.fixture(scope="module")
def before_gemini(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, BrokenUpstream]]:
    """A gateway before what speaks as Gemini does."""
    data = tmp_path_factory.mktemp("gemini")
    with broken(as_gemini) as upstream, running(data, upstream.url, upstream_kind="gemini", upstream_key="real") as rig:
        yield rig, upstream


class TestOpenAiBeforeAnthropic:
    def test_chat_streamed(self, before_anthropic: tuple[Rig, BrokenUpstream]) -> None:
        """Text, thoughts, calls and usage, put together by the client."""
        rig, upstream = before_anthropic
        asked: Any = {"model": "claude", "messages": [{"role": "system", "content": "Brief."}, *HELLO], "tools": [CHAT_TOOL]}
        with rig.client().chat.completions.stream(**asked, user="u1", stream_options={"include_usage": True}) as stream:
            completion = stream.get_final_completion()
        choice = completion.choices[0]
        sent = upstream.bodies[-1]

        assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
        assert [(call.id, call.function.arguments) for call in choice.message.tool_calls] == [("t1", '{"city":"Oslo"}')]
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (7, 20)
        assert (sent["system"], sent["max_tokens"], sent["metadata"]) == ("Brief.", 4096, {"user_id": "u1"})
        assert sent["tools"] == [{"name": "get_weather", "description": "Weather.", "input_schema": CITY}]
        assert b"x-api-key: real" in upstream.heads[-1].lower()
        assert text_of(rig.wait_for("generation_finished"), 0, "reasoning").startswith("Hm.")

    def test_chat_whole(self, before_anthropic: tuple[Rig, BrokenUpstream]) -> None:
        """A whole answer, and the next turn with the tool's result."""
        rig, upstream = before_anthropic
        first = rig.client().chat.completions.create(model="claude", messages=HELLO, tools=[CHAT_TOOL])
        message = first.choices[0].message
        turns = [*HELLO, message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"})]
        turns.append({"role": "tool", "tool_call_id": "t1", "content": "Rain."})
        rig.client().chat.completions.create(model="claude", messages=turns, max_tokens=9)
        sent = upstream.bodies[-1]["messages"]

        assert (message.content, message.reasoning, first.usage.total_tokens) == ("Let me see.", "Hm.", 27)
        assert sent[1]["content"][1] == {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Oslo"}}
        assert sent[2]["content"] == [{"type": "tool_result", "tool_use_id": "t1", "content": "Rain."}]

    def test_responses(self, before_anthropic: tuple[Rig, BrokenUpstream]) -> None:
        """A response of the same answer, streamed and whole."""
        rig, _ = before_anthropic
        with rig.client().responses.stream(model="claude", input="The sea?") as stream:
            streamed = stream.get_final_response()
        whole = rig.client().responses.create(model="claude", input="The sea?")

        for response in (streamed, whole):
            assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
            assert (response.output_text, response.usage.total_tokens) == ("Let me see.", 27)

    @pytest.mark.parametrize(
        "field",
        [
            {"n": 2},
            {"seed": 1},
            {"logprobs": True},
            {"response_format": {"type": "json_object"}},
            {"frequency_penalty": 0.5},
            {"service_tier": "flex"},
            {"modalities": ["audio"]},
            {"return_token_ids": True},
        ],
        ids=lambda field: next(iter(field)),
    )
    def test_refused(self, before_anthropic: tuple[Rig, BrokenUpstream], field: dict[str, Any]) -> None:
        """What Anthropic cannot do is refused by name, never left out."""
        rig, _ = before_anthropic
        with pytest.raises(openai.BadRequestError, match="is not possible with an Anthropic upstream"):
            rig.client().post("/chat/completions", body={"model": "claude", "messages": HELLO, **field}, cast_to=object)

    def test_errors(self, before_anthropic: tuple[Rig, BrokenUpstream]) -> None:
        """Errors before and after the first byte are the client's own exceptions; completions have no counterpart."""
        rig, _ = before_anthropic
        client = rig.client()
        with pytest.raises(openai.NotFoundError, match="model: nobody"):
            client.chat.completions.create(model="nobody", messages=HELLO)
        with pytest.raises(openai.APIError, match="Later"):
            list(client.chat.completions.create(model="cut", messages=HELLO, stream=True))
        with pytest.raises(openai.BadRequestError, match="/v1/completions is not possible with an Anthropic upstream"):
            client.completions.create(model="claude", prompt="x")

        assert {failure.error_type for failure in payloads(rig.events(), GenerationFailed)} >= {"upstream_error", "invalid_request"}


class TestBeforeGemini:
    def test_chat(self, before_gemini: tuple[Rig, BrokenUpstream]) -> None:
        """OpenAI's client: everything that Gemini can do under its own names."""
        rig, upstream = before_gemini
        asked: Any = {
            "model": "gemini-x",
            "messages": [{"role": "system", "content": "Brief."}, *HELLO],
            "tools": [CHAT_TOOL],
            "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
            "seed": 3,
            "n": 1,
            "max_completion_tokens": 50,
            "reasoning_effort": "low",
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": CITY}},
        }
        whole = rig.client().chat.completions.create(**asked)
        streamed = list(rig.client().chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        sent = upstream.bodies[-1]

        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("Let me see.", "tool_calls")
        assert whole.choices[0].message.tool_calls[0].function.name == "weather"
        assert "".join(c.delta.content or "" for part in streamed for c in part.choices) == "Let me see."
        assert (whole.usage.total_tokens, streamed[-1].usage.completion_tokens_details.reasoning_tokens) == (14, 2)
        assert upstream.paths[-1] == "/v1beta/models/gemini-x:streamGenerateContent?alt=sse"
        assert sent["systemInstruction"] == {"parts": [{"text": "Brief."}]}
        assert sent["generationConfig"] == {
            "maxOutputTokens": 50,
            "candidateCount": 1,
            "seed": 3,
            "thinkingConfig": {"includeThoughts": True, "thinkingLevel": "LOW"},
            "responseMimeType": "application/json",
            "responseJsonSchema": CITY,
        }
        assert sent["toolConfig"] == {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["get_weather"]}}

    def test_responses(self, before_gemini: tuple[Rig, BrokenUpstream]) -> None:
        """OpenAI's responses."""
        rig, _ = before_gemini
        response = rig.client().responses.create(model="gemini-x", input="The sea?")

        assert (response.output_text, [item.type for item in response.output][-1]) == ("Let me see.", "function_call")

    def test_messages(self, before_gemini: tuple[Rig, BrokenUpstream]) -> None:
        """Anthropic's client, with a tool's result that Gemini knows by the tool's name."""
        rig, upstream = before_gemini
        turns: Any = [
            *HELLO,
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "get_weather", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "Rain.", "is_error": True}]},
        ]
        with claude(rig) as client:
            with client.messages.stream(model="gemini-x", messages=turns, max_tokens=50) as stream:
                message = stream.get_final_message()
            whole = client.messages.create(model="gemini-x", messages=HELLO, max_tokens=50)
        result = upstream.bodies[-2]["contents"][2]["parts"][0]["functionResponse"]

        for one in (message, whole):
            assert [block.type for block in one.content] == ["thinking", "text", "tool_use"]
            assert (one.stop_reason, one.usage.output_tokens) == ("tool_use", 9)
        assert result == {"id": "t1", "name": "get_weather", "response": {"error": "Rain."}}

    def test_refused(self, before_gemini: tuple[Rig, BrokenUpstream]) -> None:
        """What Gemini cannot do is refused by name in the client's own shape."""
        rig, _ = before_gemini
        with pytest.raises(openai.BadRequestError, match="logit_bias is not possible with a Gemini upstream"):
            rig.client().chat.completions.create(model="g", messages=HELLO, logit_bias={"1": 1})
        with claude(rig) as client, pytest.raises(anthropic.BadRequestError, match="container is not possible with a Gemini upstream"):
            client.messages.create(model="g", messages=HELLO, max_tokens=1, extra_body={"container": "c"})


class TestGeminiBeforeAnthropic:
    def test_streamed_and_whole(self, before_anthropic: tuple[Rig, BrokenUpstream]) -> None:
        """Google's client gets Anthropic's answer as candidates."""
        rig, _ = before_anthropic
        chunks = list(google(rig).models.generate_content_stream(model="claude", contents="x"))
        whole = google(rig).models.generate_content(model="claude", contents="x")
        call: Any = next(call for chunk in chunks for call in chunk.function_calls or ())
        usage: Any = chunks[-1].usage_metadata

        assert (call.id, call.args) == ("t1", {"city": "Oslo"})
        assert (usage.prompt_token_count, usage.candidates_token_count) == (7, 20)
        assert whole.function_calls == [call]
        assert [part.text for part in whole.candidates[0].content.parts if part.text] == ["Let me see."]

    def test_errors(self, before_anthropic: tuple[Rig, BrokenUpstream]) -> None:
        """Errors of Anthropic's are exceptions of Google's client, before and after the first byte."""
        rig, _ = before_anthropic
        with pytest.raises(errors.ClientError) as raised:
            google(rig).models.generate_content(model="nobody", contents="x")
        with pytest.raises(errors.ServerError, match="Later"):
            list(google(rig).models.generate_content_stream(model="cut", contents="x"))
        assert (raised.value.code, raised.value.status) == (404, "NOT_FOUND")


class TestModels:
    def test_each_in_its_own_shape(self, tmp_path: Path, vllm: VllmService) -> None:
        """A list, one of it, and one that is not there, for OpenAI's and Anthropic's clients before vLLM."""
        with running(tmp_path, vllm.url) as rig, claude(rig) as client:
            client_of_openai = rig.client()
            assert client_of_openai.models.retrieve(vllm.model).id == vllm.model
            assert vllm.model in [model.id for model in client_of_openai.models.list()]
            assert client.models.retrieve(vllm.model).display_name == vllm.model
            assert next(model.type for model in client.models.list()) == "model"
            with pytest.raises(openai.NotFoundError, match="There is no model 'nobody'"):
                client_of_openai.models.retrieve("nobody")
            with pytest.raises(anthropic.NotFoundError):
                client.models.retrieve("nobody")
