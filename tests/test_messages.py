"""Anthropic's messages through the gateway: the official client before it, vLLM or an upstream on cue behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import orjson
import pytest

from schemas.events import GenerationFailed, GenerationFinished, GenerationStarted, RequestSubmitted, ToolCall
from scripts.native.processes import free_port
from tests.conftest import VllmService
from tests.gateway_rig import DEADLINE_S, DONE, HELLO, Peer, Rig, broken, chunk, running
from tests.test_gateway import ids_of, payloads, text_of

WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]},
}
GREEDY = {"temperature": 0}
"""What newer clients have no argument for any more."""


@pytest.fixture
def rig(tmp_path: Path, vllm: VllmService) -> Iterator[Rig]:
    """A gateway before vLLM."""
    with running(tmp_path, vllm.url) as it:
        yield it


def claude(rig: Rig, **options: Any) -> Any:
    """The official client; it retries nothing."""
    return anthropic.Anthropic(base_url=rig.url, api_key="sk-ant-0123456789", max_retries=0, timeout=DEADLINE_S, **options)


class TestWithVllm:
    def test_streamed(self, rig: Rig, vllm: VllmService) -> None:
        """The client puts its message together from the events; the tape has vLLM's own token ids."""
        with claude(rig) as client, client.messages.stream(model=vllm.model, messages=HELLO, max_tokens=8, system="Be brief.") as stream:
            text = "".join(stream.text_stream)
            message = stream.get_final_message()
        events = rig.wait_for("generation_finished")
        submitted, finished = payloads(events, RequestSubmitted)[0], payloads(events, GenerationFinished)[0]

        assert (message.content[0].text, message.stop_reason) == (text, "max_tokens")
        assert text_of(events, 0) == text
        assert finished.tokens_recorded == finished.completion_tokens == len(ids_of(events, 0)) == message.usage.output_tokens == 8
        assert finished.prompt_tokens == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
        assert len(payloads(events, GenerationStarted)[0].content.prompt_token_ids) == finished.prompt_tokens
        assert (submitted.endpoint, submitted.max_tokens, submitted.stream) == ("/v1/messages", 8, True)
        assert submitted.injected == ["logprobs", "return_token_ids", "seed", "stream_options"]
        assert orjson.loads(submitted.content.parameters)["system"] == "Be brief."

    def test_whole(self, rig: Rig, vllm: VllmService) -> None:
        """A whole message, with the stop sequence that ended it."""
        with claude(rig) as client:
            message = client.messages.create(
                model=vllm.model, messages=HELLO, max_tokens=40, extra_body=GREEDY, stop_sequences=[" ", "e", "a", "t"]
            )
        events = rig.wait_for("generation_finished")

        assert (message.type, message.role, message.stop_reason) == ("message", "assistant", "stop_sequence")
        assert message.stop_sequence in (" ", "e", "a", "t")
        assert payloads(events, GenerationFinished)[0].completion_tokens == message.usage.output_tokens

    def test_tool(self, rig: Rig, vllm: VllmService) -> None:
        """A tool that has to be called is called; the tiny model's arguments need not be JSON, but each piece arrives."""
        choice: Any = {"type": "tool", "name": "get_weather"}
        asked: Any = {"model": vllm.model, "messages": HELLO, "max_tokens": 20, "tools": [WEATHER], "tool_choice": choice}
        with claude(rig) as client:  # at temperature 0, as some of what it may draw leaves vLLM's parser without a word
            events = list(client.messages.create(**asked, stream=True, extra_body={"temperature": 0}))
        recorded = rig.wait_for("generation_finished")
        call = payloads(recorded, ToolCall)[0].content
        arguments = "".join(event.delta.partial_json for event in events if event.type == "content_block_delta")
        block = next(event.content_block for event in events if event.type == "content_block_start")
        shape = [event.type for event in events if event.type != "content_block_delta"]

        assert shape == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
        assert (block.type, block.name, block.id, arguments) == ("tool_use", call.name, call.call_id, call.arguments)
        assert len(ids_of(recorded, 0)) == 20

    def test_count_tokens(self, rig: Rig, vllm: VllmService) -> None:
        """What is counted is what the engine will then be given."""
        with claude(rig) as client:
            counted = client.messages.count_tokens(model=vllm.model, messages=HELLO, system="Be brief.")
            client.messages.create(model=vllm.model, messages=HELLO, system="Be brief.", max_tokens=1)
            with pytest.raises(anthropic.NotFoundError):
                client.messages.count_tokens(model="nobody", messages=HELLO)
        events = rig.wait_for("generation_finished")

        assert payloads(events, GenerationFinished)[0].prompt_tokens == counted.input_tokens

    def test_refused(self, rig: Rig, vllm: VllmService) -> None:
        """What cannot be read, cannot be done, or is unknown to vLLM, is an exception of the client and on the tape."""
        with claude(rig) as client:
            with pytest.raises(anthropic.BadRequestError, match="messages must be an array"):
                client.post("/v1/messages", body={"model": "m"}, cast_to=object)
            with pytest.raises(anthropic.BadRequestError, match="container is not possible with a vLLM upstream"):
                client.messages.create(model=vllm.model, messages=HELLO, max_tokens=1, extra_body={"container": "c"})
            with pytest.raises(anthropic.NotFoundError) as raised:
                client.messages.create(model="nobody", messages=HELLO, max_tokens=1)
        failures = payloads(rig.events(), GenerationFailed)

        body: Any = raised.value.body

        assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
        assert sorted(failure.error_type for failure in failures) == ["invalid_request", "invalid_request", "upstream_error"]

    def test_the_key_is_nowhere(self, rig: Rig, vllm: VllmService) -> None:
        """The key of Anthropic's clients reaches the tape no more than any other."""
        with claude(rig) as client:
            client.messages.create(model=vllm.model, messages=[{"role": "user", "content": "sk-ant-0123456789"}], max_tokens=1)
        rig.wait_for("generation_finished")

        assert not [value for value in rig.framed() if b"sk-ant-0123456789" in value]


class TestOnCue:
    def test_thinking_comes_before_the_answer(self, tmp_path: Path) -> None:
        """Reasoning is a block of thinking of its own."""

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            for delta in ({"role": "assistant"}, {"reasoning": "Hm."}, {"reasoning": " Yes."}, {"content": "42"}):
                await peer.send(chunk(delta=delta))
            await peer.send(chunk(finish="stop") + DONE)

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig, claude(rig) as client:
            with client.messages.stream(model="m", messages=HELLO, max_tokens=9) as stream:
                message = stream.get_final_message()
            events = rig.wait_for("generation_finished")

        assert [(block.type, getattr(block, "thinking", None) or block.text) for block in message.content] == [
            ("thinking", "Hm. Yes."),
            ("text", "42"),
        ]
        assert (message.stop_reason, text_of(events, 0, "reasoning")) == ("end_turn", "Hm. Yes.")

    def test_tools(self, tmp_path: Path) -> None:
        """Calls of two tools, streamed and whole, and a result that goes back into the conversation."""
        calls = [
            {"index": at, "id": f"t{at}", "type": "function", "function": {"name": "get_weather", "arguments": f'{{"city":"{city}"}}'}}
            for at, city in enumerate(["Oslo", "Rome"])
        ]

        async def act(peer: Peer) -> None:
            if b'"stream":true' in peer.body:
                await peer.begin_stream()
                for call in calls:
                    await peer.send(chunk(delta={"tool_calls": [call]}))
                await peer.send(chunk(finish="tool_calls") + DONE)
                return
            message = {"role": "assistant", "content": "Let me see.", "tool_calls": calls}
            choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
            await peer.whole(b"200 OK", b"application/json", orjson.dumps({"id": "c", "model": "m", "choices": [choice]}))

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig, claude(rig) as client:
            with client.messages.stream(model="m", messages=HELLO, max_tokens=9, tools=[WEATHER]) as stream:
                streamed = stream.get_final_message()
            blocks = [{"type": "tool_use", "id": call.id, "name": call.name, "input": call.input} for call in streamed.content]
            results = [{"type": "tool_result", "tool_use_id": call.id, "content": "Rain."} for call in streamed.content]
            turns = [*HELLO, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
            whole = client.messages.create(model="m", messages=turns, max_tokens=9, tools=[WEATHER])

        assert [(block.id, block.input) for block in streamed.content] == [("t0", {"city": "Oslo"}), ("t1", {"city": "Rome"})]
        assert ([block.type for block in whole.content], whole.stop_reason) == (["text", "tool_use", "tool_use"], "tool_use")
        assert [message["role"] for message in upstream.bodies[1]["messages"]] == ["user", "assistant", "tool", "tool"]

    def test_failure_in_mid_stream(self, tmp_path: Path) -> None:
        """An upstream that breaks off becomes an error event, on which the client raises."""

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            await peer.send(chunk("Once"))

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig, claude(rig) as client:
            with (
                pytest.raises(anthropic.APIStatusError) as raised,
                client.messages.stream(model="m", messages=HELLO, max_tokens=9) as stream,
            ):
                stream.get_final_message()
            failure = rig.failure()

        assert (raised.value.body["error"]["type"], failure.error_type, failure.position) == ("api_error", "upstream_disconnected", 1)  # type: ignore[index]

    def test_an_error_of_the_upstream_in_mid_stream(self, tmp_path: Path) -> None:
        """An error chunk of the upstream is told in Anthropic's words."""

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            await peer.send(chunk("Once") + b'data: {"error":{"message":"out of memory","code":500}}\n\n' + DONE)

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig, claude(rig) as client:
            with pytest.raises(anthropic.APIStatusError, match="out of memory"):
                list(client.messages.create(model="m", messages=HELLO, max_tokens=9, stream=True))
            failure = rig.failure()

        assert failure.error_type == "upstream_error"

    def test_nobody_there(self, tmp_path: Path) -> None:
        """Without an upstream the client gets an error status in its provider's shape."""
        nowhere = f"http://127.0.0.1:{free_port()}"
        with running(tmp_path, nowhere) as rig, claude(rig) as client, pytest.raises(anthropic.InternalServerError) as raised:
            client.messages.create(model="m", messages=HELLO, max_tokens=9)

        assert raised.value.status_code == 502
        assert raised.value.body == {"type": "error", "error": {"type": "api_error", "message": "The upstream does not answer."}}

    def test_a_stream_that_is_none(self, tmp_path: Path) -> None:
        """A whole answer where a stream was asked for is no answer."""

        async def act(peer: Peer) -> None:
            await peer.whole(b"200 OK", b"application/json", b'{"choices":[]}')

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            answer = rig.post({"model": "m", "messages": HELLO, "max_tokens": 1, "stream": True}, "/v1/messages")

        assert (answer.status_code, answer.json()["type"]) == (502, "error")


def _events(*events: dict[str, Any]) -> bytes:
    return b"".join(b"event: " + event["type"].encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n" for event in events)


STREAM = _events(
    {
        "type": "message_start",
        "message": {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude",
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": 7, "output_tokens": 1},
        },
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm."}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "s"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "ping"},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "Let me see."}},
    {"type": "content_block_stop", "index": 1},
    {"type": "content_block_start", "index": 2, "content_block": {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {}}},
    {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"city":'}},
    {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": '"Oslo"}'}},
    {"type": "content_block_stop", "index": 2},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": {"output_tokens": 20}},
    {"type": "message_stop"},
)


class TestBeforeAnthropic:
    def test_streamed(self, tmp_path: Path) -> None:
        """Bytes pass unchanged in both directions, with the key where Anthropic wants it, and the tape has what they say."""

        async def act(peer: Peer) -> None:
            await peer.begin_chunked()
            await peer.chunk(STREAM)
            await peer.chunk(b"")

        body = b'{"model": "claude", "messages": [{"role":"user","content":"x"}], "max_tokens": 50, "stream": true, "new": 1.50}'
        with broken(act) as upstream, running(tmp_path, upstream.url, upstream_kind="anthropic", upstream_key="sk-real-0123") as rig:
            answer = rig.post(body, "/v1/messages", x_api_key="sk-ant-0123456789")
            events = rig.wait_for("generation_finished")
            heads = b"".join(upstream.heads).lower()
        finished, call = payloads(events, GenerationFinished)[0], payloads(events, ToolCall)[0]

        assert (answer.content, upstream.bodies) == (STREAM, [orjson.loads(body)])
        assert b"x-api-key: sk-real-0123" in heads
        assert b"sk-ant" not in heads
        assert (text_of(events, 0, "reasoning"), text_of(events, 0)) == ("Hm.", "Let me see.")
        assert (call.content.name, call.content.arguments) == ("get_weather", '{"city":"Oslo"}')
        assert (finished.prompt_tokens, finished.completion_tokens) == (7, 20)

    def test_whole(self, tmp_path: Path) -> None:
        """A whole message passes and is read just the same."""
        usage = {"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 2}
        content = [{"type": "text", "text": "Yes."}, {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": content, "stop_reason": "end_turn"}

        async def act(peer: Peer) -> None:
            await peer.whole(b"200 OK", b"application/json", orjson.dumps({**message, "usage": usage}))

        with broken(act) as upstream, running(tmp_path, upstream.url, upstream_kind="anthropic") as rig, claude(rig) as client:
            answer = client.messages.create(model="claude", messages=HELLO, max_tokens=9)
            events = rig.wait_for("generation_finished")
        finished = payloads(events, GenerationFinished)[0]

        assert (answer.content[0].text, text_of(events, 0)) == ("Yes.", "Yes.")
        assert (finished.prompt_tokens, finished.cached_tokens, finished.completion_tokens) == (7, 4, 2)
        assert [entry.content.arguments for entry in payloads(events, ToolCall)] == ['{"a":1}']

    def test_errors_pass(self, tmp_path: Path) -> None:
        """Anthropic's own error is the client's own exception."""

        async def act(peer: Peer) -> None:
            await peer.whole(
                b"529 Overloaded", b"application/json", b'{"type":"error","error":{"type":"overloaded_error","message":"Later."}}'
            )

        with broken(act) as upstream, running(tmp_path, upstream.url, upstream_kind="anthropic") as rig, claude(rig) as client:
            with pytest.raises(anthropic.InternalServerError, match="Later"):
                client.messages.create(model="claude", messages=HELLO, max_tokens=9)
            failure = rig.failure()

        assert (failure.error_type, failure.status) == ("upstream_error", 529)

    def test_an_error_in_mid_stream_passes(self, tmp_path: Path) -> None:
        """The same after the first byte."""
        error = _events({"type": "error", "error": {"type": "overloaded_error", "message": "Later."}})

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            await peer.send(STREAM[: STREAM.index(b"event: ping")] + error)

        with broken(act) as upstream, running(tmp_path, upstream.url, upstream_kind="anthropic") as rig, claude(rig) as client:
            with pytest.raises(anthropic.APIStatusError, match="Later"):
                list(client.messages.create(model="claude", messages=HELLO, max_tokens=9, stream=True))
            failure = rig.failure()

        assert (failure.error_type, failure.position) == ("upstream_error", 1)

    def test_the_client_hangs_up(self, tmp_path: Path) -> None:
        """Whoever hangs up is recorded with the position reached, and the upstream is let go."""

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            await peer.send(STREAM[: STREAM.index(b"event: ping")])
            await peer.gone()

        with broken(act) as upstream, running(tmp_path, upstream.url, upstream_kind="anthropic") as rig:
            body = {"model": "claude", "messages": HELLO, "max_tokens": 9, "stream": True}
            with httpx.stream("POST", f"{rig.url}/v1/messages", json=body, timeout=DEADLINE_S) as answer:
                next(answer.iter_bytes())
            failure = rig.failure()
            assert upstream.left.wait(DEADLINE_S)

        assert (failure.error_type, failure.position) == ("client_disconnected", 1)
