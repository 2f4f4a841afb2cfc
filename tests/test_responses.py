"""OpenAI's responses through the gateway: the official client before it, vLLM or an upstream on cue behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import orjson
import pytest

from ingest.gateway.errors import Failure
from ingest.gateway.kept import Kept
from schemas.events import GenerationFinished, RequestSubmitted, TokenChunk, ToolCall
from tests.conftest import VllmService
from tests.gateway_rig import DONE, Peer, broken, chunk, running
from tests.test_gateway import ids_of, payloads, text_of

WEATHER: Any = {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


class TestWithVllm:
    def test_streamed(self, tmp_path: Path, vllm: VllmService) -> None:
        """The client puts its response together from the events; the tape has vLLM's own token ids."""
        with running(tmp_path, vllm.url) as rig:
            asked = {"model": vllm.model, "input": "The sea?", "instructions": "Be brief.", "max_output_tokens": 20}
            with rig.client().responses.stream(**asked) as stream:
                told = list(stream)
            events = rig.wait_for("generation_finished")
        submitted, finished = payloads(events, RequestSubmitted)[0], payloads(events, GenerationFinished)[0]

        text = "".join(part.delta for part in told if part.type == "response.output_text.delta")
        response: Any = told[-1].response

        assert (response.output_text, [item.type for item in response.output]) == (text, ["message"])
        assert [part.sequence_number for part in told] == list(range(len(told)))
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert text_of(events, 0) == text
        assert finished.tokens_recorded == len(ids_of(events, 0)) == response.usage.output_tokens == 20
        assert (submitted.endpoint, submitted.max_tokens) == ("/v1/responses", 20)
        assert [message.body for message in submitted.content.messages] == ['"The sea?"']

    def test_whole(self, tmp_path: Path, vllm: VllmService) -> None:
        """A whole response; the alternatives that it asked for are on the tape."""
        with running(tmp_path, vllm.url) as rig:
            asked: Any = {"input": "The sea?", "max_output_tokens": 20, "temperature": 0, "top_logprobs": 2}
            response = rig.client().responses.create(model=vllm.model, **asked)
            events = rig.wait_for("generation_finished")

        assert (response.output_text, response.status) == (text_of(events, 0), "incomplete")
        assert {len(one.content.alternatives.counts) for one in payloads(events, TokenChunk)} == {20}
        assert response.usage.input_tokens == payloads(events, GenerationFinished)[0].prompt_tokens

    def test_refused(self, tmp_path: Path, vllm: VllmService) -> None:
        """What is not known cannot be continued, and the client is told so by name."""
        with running(tmp_path, vllm.url) as rig:
            with pytest.raises(openai.NotFoundError, match="Previous response with id 'resp_1' not found"):
                rig.client().responses.create(model=vllm.model, input="x", previous_response_id="resp_1")
            with pytest.raises(openai.BadRequestError, match="background is not possible with a vLLM upstream"):
                rig.client().responses.create(model=vllm.model, input="x", background=True)
            with pytest.raises(openai.NotFoundError):
                rig.client().responses.create(model="nobody", input="x")
            kinds = [event.kind for event in rig.events()]

        assert kinds.count("request_submitted") == kinds.count("generation_failed") == 3

    def test_continued(self, tmp_path: Path, vllm: VllmService) -> None:
        """A response goes on from another one: all that was said before stands in front, in the same session; others may not."""
        with running(tmp_path, vllm.url) as rig:
            client, stranger = rig.client(), rig.client(api_key="sk-another-0123456789")
            asked: Any = {"model": vllm.model, "max_output_tokens": 5}
            first = client.responses.create(**asked, input="The sea?")
            with client.responses.stream(**asked, input="And then?", previous_response_id=first.id) as stream:
                second: Any = list(stream)[-1].response
            third = client.responses.create(**asked, input="Go on.", previous_response_id=second.id)
            forgotten = client.responses.create(**asked, input="x", store=False)
            for name, who in ((first.id, stranger), (forgotten.id, client)):
                with pytest.raises(openai.NotFoundError):
                    who.responses.create(**asked, input="x", previous_response_id=name)
            assert client.responses.retrieve(third.id).output_text == third.output_text
            client.responses.delete(third.id)
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(third.id)
            events = sorted(rig.events(), key=lambda event: event.recorded_at)
        submitted = [event for event in events if event.kind == "request_submitted"][:3]
        finished = payloads(events, GenerationFinished)

        assert len({event.session_id for event in submitted}) == 1
        assert [second.previous_response_id, third.previous_response_id] == [first.id, second.id]
        assert finished[0].prompt_tokens < finished[1].prompt_tokens < finished[2].prompt_tokens


class TestOnCue:
    def test_reasoning_text_and_tools(self, tmp_path: Path) -> None:
        """Each is an item of its own, streamed and whole, and all of them go back into the conversation."""
        call = {"index": 0, "id": "t0", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'}}

        async def act(peer: Peer) -> None:
            if b'"stream":true' in peer.body:
                await peer.begin_stream()
                for delta in ({"reasoning": "Hm."}, {"content": "Let me"}, {"content": " see."}, {"tool_calls": [call]}):
                    await peer.send(chunk(delta=delta))
                await peer.send(chunk(finish="tool_calls") + DONE)
                return
            message = {"role": "assistant", "reasoning": "Hm.", "content": "Let me see.", "tool_calls": [call]}
            choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
            await peer.whole(b"200 OK", b"application/json", orjson.dumps({"id": "c", "model": "m", "choices": [choice]}))

        with broken(act, version=b'{"version":"1"}') as upstream, running(tmp_path, upstream.url) as rig:
            client = rig.client()
            with client.responses.stream(model="m", input="x", tools=[WEATHER]) as stream:
                streamed = stream.get_final_response()
            said = [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in streamed.output]
            result = {"type": "function_call_output", "call_id": "t0", "output": "Rain."}
            whole = client.responses.create(model="m", input=[{"role": "user", "content": "x"}, *_plain(said), result], tools=[WEATHER])
            calls = payloads(rig.events(), ToolCall)

        assert [item.type for item in streamed.output] == [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
        assert (streamed.output_text, streamed.output[2].arguments, streamed.status) == ("Let me see.", '{"city":"Oslo"}', "completed")
        assert [message["role"] for message in upstream.bodies[1]["messages"]] == ["user", "assistant", "tool"]
        assert len(calls) == 2

    def test_failure_in_mid_stream(self, tmp_path: Path) -> None:
        """An upstream that breaks off becomes an error event, on which the client raises."""

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            await peer.send(chunk("Once"))

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            with pytest.raises(openai.APIError, match="in the middle"):
                list(rig.client().responses.create(model="m", input="x", stream=True))
            failure = rig.failure()

        assert (failure.error_type, failure.position) == ("upstream_disconnected", 1)


def _plain(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for item in items:
        for part in item.get("content", []):
            part.pop("parsed", None)
            part.pop("logprobs", None)
    return items


class TestKept:
    def test_bound(self) -> None:
        """The oldest responses are forgotten first, by number and by bytes; what is forgotten is not found."""
        session: Any = None
        for kept in (Kept(count_max=2), Kept(bytes_max=2 * len(b'[]{"id":"a"}'))):
            for name in "abc":
                kept.keep("me", session, [], {"id": name})
            with pytest.raises(Failure, match="not found"):
                kept.find("a", "me")
            with pytest.raises(Failure):
                kept.find("c", "somebody else")
            assert kept.find("c", "me").document == b'{"id":"c"}'
