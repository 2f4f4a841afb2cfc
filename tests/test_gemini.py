"""Gemini's endpoints through the gateway: Google's own client before it, vLLM or an upstream on cue behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from google import genai
from google.genai import errors, types
from pydantic import SecretStr

from schemas.events import GenerationFailed, GenerationFinished, RequestSubmitted, TokenChunk
from schemas.settings import UpstreamSettings
from scripts.native.processes import free_port
from tests.conftest import VllmService
from tests.gateway_rig import DEADLINE_S, DONE, Peer, Rig, broken, chunk, running
from tests.test_gateway import ids_of, payloads, text_of
from tests.test_keys import guarded

KEY = "AIza-0123456789-abcdefghijklmnop"
HELLO = {"contents": [{"role": "user", "parts": [{"text": "Say something about the sea."}]}]}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> Iterator[Rig]:
    """One gateway before vLLM for all."""
    with running(tmp_path_factory.mktemp("gemini"), vllm.url) as it:
        yield it


def google(rig: Rig) -> Any:
    """Google's own client; it retries nothing."""
    options = types.HttpOptions(base_url=rig.url, timeout=int(DEADLINE_S * 1000), retry_options=types.HttpRetryOptions(attempts=1))
    return rig.keep(genai.Client(api_key=KEY, vertexai=False, http_options=options))


def latest(rig: Rig) -> list[Any]:
    """The events of the generation that ended last."""
    events = rig.events()
    ended = [event for event in events if event.kind == "generation_finished"]
    last = getattr(max(ended, key=lambda event: event.recorded_at).payload, "generation_id", None)
    return [event for event in events if getattr(event.payload, "generation_id", None) == last]


class TestWithVllm:
    def test_streamed(self, shared: Rig, vllm: VllmService) -> None:
        """The client's chunks are what vLLM said, and the tape has its token ids."""
        config = types.GenerateContentConfig(max_output_tokens=8, system_instruction="Be brief.", top_k=20, stop_sequences=["\x00"])
        chunks = list(google(shared).models.generate_content_stream(model=vllm.model, contents="The sea?", config=config))
        events = latest(shared)
        submitted, finished = payloads(events, RequestSubmitted)[0], payloads(events, GenerationFinished)[0]
        last: Any = chunks[-1]

        assert "".join(chunk.text or "" for chunk in chunks) == text_of(events, 0)
        assert last.candidates[0].finish_reason == types.FinishReason.MAX_TOKENS
        assert last.usage_metadata.candidates_token_count == finished.tokens_recorded == len(ids_of(events, 0)) == 8
        assert last.usage_metadata.prompt_token_count == finished.prompt_tokens
        assert (submitted.endpoint, submitted.model, submitted.stream) == ("/v1beta/models:streamGenerateContent", vllm.model, True)
        assert submitted.injected == ["logprobs", "return_token_ids", "seed", "stream_options"]

    def test_whole(self, shared: Rig, vllm: VllmService) -> None:
        """Several candidates with logprobs; a seed repeats them."""
        config = types.GenerateContentConfig(max_output_tokens=5, candidate_count=3, seed=7, response_logprobs=True, logprobs=2)
        asked: Any = {"model": vllm.model, "contents": "The sea?", "config": config}
        first, again = (google(shared).models.generate_content(**asked) for _ in range(2))
        candidates = first.candidates or []
        scores: Any = candidates[0].logprobs_result
        parts = [part for part in payloads(latest(shared), TokenChunk) if part.index == 0]
        others = [each for part in parts for each in part.content.alternatives.by_entry(len(part.offsets_us))]

        assert len(candidates) == 3
        assert [c.content for c in candidates] == [c.content for c in again.candidates or []]
        assert len(scores.chosen_candidates) == len(scores.top_candidates) == 5
        assert scores.chosen_candidates[0].token_id is not None
        assert [[one.text for one in each] for each in others] == [[one.token for one in top.candidates] for top in scores.top_candidates]
        assert all(len(top.candidates) >= 2 for top in scores.top_candidates)

    def test_structured(self, shared: Rig, vllm: VllmService) -> None:
        """Google's schema is JSON schema for vLLM, its enumeration a choice, and the client parses the answer."""
        schema = types.Schema(
            type=types.Type.OBJECT, properties={"a": types.Schema(type=types.Type.STRING, enum=["x", "y"])}, required=["a"]
        )
        chosen = types.Schema(type=types.Type.STRING, enum=["x", "y"])
        texts = []
        for form, wanted in (("application/json", schema), ("text/x.enum", chosen)):
            config = types.GenerateContentConfig(max_output_tokens=60, response_mime_type=form, response_schema=wanted)
            answer = google(shared).models.generate_content(model=vllm.model, contents="Choose.", config=config)
            assert form == "text/x.enum" or answer.parsed is None or answer.parsed["a"] in ("x", "y")  # None: only spaces until the limit
            texts.append(answer.text.strip())

        assert texts[0][:1] in ("", "{")
        assert texts[1] in ("x", "y")

    def test_tool(self, shared: Rig, vllm: VllmService) -> None:
        """A function that has to be called is called; where the tiny model's arguments are no JSON, Google's own reason says so."""
        function = types.FunctionDeclaration(name="pick", parameters_json_schema={"type": "object", "properties": {"a": {"enum": ["x"]}}})
        choice = types.FunctionCallingConfig(mode=types.FunctionCallingConfigMode.ANY, allowed_function_names=["pick"])
        config = types.GenerateContentConfig(
            max_output_tokens=40,
            seed=1,
            tools=[types.Tool(function_declarations=[function])],
            tool_config=types.ToolConfig(function_calling_config=choice),
            automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
        )
        for chunks in (
            list(google(shared).models.generate_content_stream(model=vllm.model, contents="Pick.", config=config)),
            [google(shared).models.generate_content(model=vllm.model, contents="Pick.", config=config)],
        ):
            ends: Any = [c for chunk in chunks for c in chunk.candidates or () if c.finish_reason]
            called = [call.name for chunk in chunks for call in chunk.function_calls or ()]

            assert len(ends) == 1
            cut = (types.FinishReason.MAX_TOKENS, types.FinishReason.MALFORMED_FUNCTION_CALL)  # what a tiny model may do as well
            assert called == ["pick"] or ends[0].finish_reason in cut

    def test_count_tokens_and_models(self, shared: Rig, vllm: VllmService) -> None:
        """What is counted is what the engine will then be given; models have Google's shape."""
        client = google(shared)
        counted = client.models.count_tokens(model=vllm.model, contents="The sea?")
        client.models.generate_content(model=vllm.model, contents="The sea?", config=types.GenerateContentConfig(max_output_tokens=1))

        assert payloads(latest(shared), GenerationFinished)[0].prompt_tokens == counted.total_tokens
        assert f"models/{vllm.model}" in [model.name for model in client.models.list()]
        assert client.models.get(model=vllm.model).name == f"models/{vllm.model}"
        with pytest.raises(errors.ClientError) as raised:
            client.models.get(model="nobody")
        assert (raised.value.code, raised.value.status) == (404, "NOT_FOUND")

    def test_refused(self, shared: Rig, vllm: VllmService) -> None:
        """What cannot be read, cannot be done or is not known is an exception of Google's client, by name."""
        client = google(shared)
        safety = types.SafetySetting(category=types.HarmCategory.HARM_CATEGORY_HARASSMENT, threshold=types.HarmBlockThreshold.BLOCK_NONE)
        with pytest.raises(errors.ClientError, match="safetySettings is not possible with a vLLM upstream") as raised:
            client.models.generate_content(model=vllm.model, contents="x", config=types.GenerateContentConfig(safety_settings=[safety]))
        with pytest.raises(errors.ClientError) as unknown:
            client.models.generate_content(model="nobody", contents="x")
        broken_body = shared.post({"contents": 1}, f"/v1beta/models/{vllm.model}:generateContent")

        assert (raised.value.code, raised.value.status) == (400, "INVALID_ARGUMENT")
        assert (unknown.value.code, unknown.value.status) == (404, "NOT_FOUND")
        assert broken_body.json()["error"]["status"] == "INVALID_ARGUMENT"
        assert "contents must be an array" in broken_body.json()["error"]["message"]
        assert shared.post({}, f"/v1beta/models/{vllm.model}:embedContent").status_code == 404

    def test_snake_case_and_array(self, shared: Rig, vllm: VllmService) -> None:
        """Google's other spelling and its other form of a stream, as curl asks for them."""
        body = {
            "system_instruction": {"parts": [{"text": "Be brief."}]},
            **HELLO,
            "generation_config": {"max_output_tokens": 4},
        }
        answer = shared.post(body, f"/v1beta/models/{vllm.model}:streamGenerateContent?key={KEY}")
        events = latest(shared)
        entries = answer.json()

        assert answer.headers["content-type"] == "application/json"
        assert "".join(part["text"] for entry in entries for part in entry["candidates"][0]["content"]["parts"]) == text_of(events, 0)
        assert payloads(events, RequestSubmitted)[0].max_tokens == 4

    def test_the_key_is_nowhere(self, shared: Rig, vllm: VllmService) -> None:
        """Neither the key of a header nor that of a query is on the tape."""
        body = {"contents": [{"parts": [{"text": KEY}]}], "generationConfig": {"maxOutputTokens": 1}}
        assert shared.post(body, f"/v1beta/models/{vllm.model}:generateContent?key={KEY}").status_code == 200
        assert shared.post(body, f"/v1/models/{vllm.model}:generateContent", x_goog_api_key=KEY).status_code == 200

        assert not [value for value in shared.framed() if KEY.encode() in value]


class TestOnCue:
    def test_thoughts(self, tmp_path: Path) -> None:
        """Thoughts are shown to whoever asked for them, and are on the tape in any case."""

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            for delta in ({"role": "assistant"}, {"reasoning": "Hm."}, {"content": "42"}):
                await peer.send(chunk(delta=delta))
            await peer.send(chunk(finish="stop") + DONE)

        def parts(shown: bool) -> list[tuple[str | None, bool]]:
            config = types.GenerateContentConfig(thinking_config=types.ThinkingConfig(include_thoughts=shown))
            chunks = google(rig).models.generate_content_stream(model="m", contents="x", config=config)
            found: Any = [part for one in chunks for c in one.candidates or () for part in (c.content.parts or ())]
            return [(part.text, bool(part.thought)) for part in found]

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            assert parts(shown=True) == [("Hm.", True), ("42", False), ("", False)]
            assert parts(shown=False) == [("42", False), ("", False)]
            assert text_of(rig.wait_for("generation_finished"), 0, "reasoning").startswith("Hm.")

    def test_tools_in_pieces(self, tmp_path: Path) -> None:
        """A call that comes in pieces is one part, and its result goes back by the same id."""
        pieces = [
            {"index": 0, "id": "t0", "type": "function", "function": {"name": "weather", "arguments": '{"city":'}},
            {"index": 0, "function": {"arguments": '"Oslo"}'}},
        ]

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            for piece in pieces:
                await peer.send(chunk(delta={"tool_calls": [piece]}))
            await peer.send(chunk(finish="tool_calls") + DONE)

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            chunks = list(google(rig).models.generate_content_stream(model="m", contents="x"))
            call: Any = next(call for chunk in chunks for call in chunk.function_calls or ())
            result = types.FunctionResponse(name="weather", response={"output": "Rain."})
            turns: Any = [
                types.Content(role="user", parts=[types.Part(text="x")]),
                types.Content(role="model", parts=[types.Part(function_call=types.FunctionCall(name=call.name, args=call.args))]),
                types.Content(role="user", parts=[types.Part(function_response=result)]),
            ]
            list(google(rig).models.generate_content_stream(model="m", contents=turns))
        sent = upstream.bodies[1]["messages"]

        assert (call.id, call.name, call.args) == ("t0", "weather", {"city": "Oslo"})
        assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
        assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"]

    @pytest.mark.parametrize("array", [False, True])
    def test_failure_in_mid_stream(self, tmp_path: Path, array: bool) -> None:
        """An upstream that breaks off is an exception of Google's client, and the end of an array that is still JSON."""

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            await peer.send(chunk("Once"))

        with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
            if array:
                entries = rig.post(HELLO, "/v1beta/models/m:streamGenerateContent").json()
                assert [next(iter(entry)) for entry in entries] == ["candidates", "error"]
            else:
                with pytest.raises(errors.ServerError) as raised:
                    list(google(rig).models.generate_content_stream(model="m", contents="x"))
                assert (raised.value.code, raised.value.status) == (502, "UNAVAILABLE")
            assert rig.failure().error_type == "upstream_disconnected"

    def test_nobody_there(self, tmp_path: Path) -> None:
        """Without an upstream the client gets an error status in Google's shape."""
        with running(tmp_path, f"http://127.0.0.1:{free_port()}") as rig, pytest.raises(errors.ServerError) as raised:
            google(rig).models.generate_content(model="m", contents="x")

        assert (raised.value.code, raised.value.status) == (502, "UNAVAILABLE")


def _entry(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    candidate = {"content": {"role": "model", "parts": list(parts)}, "index": 0, **fields}
    usage = {"promptTokenCount": 5, "candidatesTokenCount": 7, "thoughtsTokenCount": 2, "totalTokenCount": 14}
    return {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "gemini-x", "responseId": "r1"}


ENTRIES = [
    _entry({"text": "Hm.", "thought": True}),
    _entry({"text": "Let me see."}),
    _entry({"functionCall": {"name": "weather", "args": {"city": "Oslo"}}, "thoughtSignature": "c2ln"}, finishReason="STOP"),
]
STREAM = b"".join(b"data: " + orjson.dumps(entry) + b"\r\n\r\n" for entry in ENTRIES)


async def as_gemini(peer: Peer) -> None:
    """What Gemini answers, streamed and whole, as it documents it."""
    if ":streamGenerateContent" in peer.path:
        await peer.begin_chunked()
        await peer.chunk(STREAM)
        await peer.chunk(b"")
        return
    whole = _entry(*(part for entry in ENTRIES for part in entry["candidates"][0]["content"]["parts"]), finishReason="STOP")
    await peer.whole(b"200 OK", b"application/json", orjson.dumps(whole))


class TestBeforeGemini:
    def test_streamed(self, tmp_path: Path) -> None:
        """Bytes pass unchanged in both directions, the gateway's key where Google wants it, the query without the client's."""
        body = b'{"contents": [{"parts":[{"text":"x"}]}], "generationConfig": {"temperature": 1.50}, "new": 1.50}'
        with broken(as_gemini) as upstream, running(tmp_path, upstream.url, upstream_kind="gemini", upstream_key="real-0123") as rig:
            answer = rig.post(body, f"/v1beta/models/gemini-x:streamGenerateContent?alt=sse&key={KEY}")
            array = rig.post(body, "/v1beta/models/gemini-x:streamGenerateContent")
            events = rig.wait_for("generation_finished")
        finished = payloads(events, GenerationFinished)[0]

        assert answer.content == STREAM
        assert array.json() == ENTRIES
        assert upstream.heads[0].startswith(b"POST /v1beta/models/gemini-x:streamGenerateContent?alt=sse HTTP")
        assert b"x-goog-api-key: real-0123" in upstream.heads[0].lower()
        assert not [head for head in upstream.heads if KEY.encode() in head]
        assert upstream.bodies[0] == orjson.loads(body)
        assert (finished.prompt_tokens, finished.completion_tokens) == (5, 9)
        assert text_of(events, 0, "reasoning").startswith("Hm.")

    def test_virtual_keys(self, tmp_path: Path) -> None:
        """A key of the gateway's own opens it in a header and in a query, and stays here; a wrong one is Google's exception."""

        def entry(url: str) -> UpstreamSettings:
            return UpstreamSettings(name="up", url=url, kind="gemini", key=SecretStr("real-0123"))

        with broken(as_gemini) as upstream, guarded(tmp_path, upstream.url, upstreams=[entry(upstream.url)]) as (rig, made):
            token, _ = made.add(models=["gemini-*"])
            path = "/v1beta/models/gemini-x:generateContent"
            answers = [rig.post(HELLO, f"{path}?key={token}"), rig.post(HELLO, path, x_goog_api_key=token)]
            other = rig.post(HELLO, path.replace("gemini-x", "other"), x_goog_api_key=token)
            with pytest.raises(errors.ClientError) as raised:
                google(rig).models.generate_content(model="gemini-x", contents="x")
            framed = rig.framed()

        assert [answer.status_code for answer in answers] == [200, 200]
        assert (other.status_code, other.json()["error"]["status"]) == (403, "PERMISSION_DENIED")
        assert (raised.value.code, raised.value.status) == (401, "UNAUTHENTICATED")
        assert not [text for text in [*framed, *upstream.heads] if token.encode() in text]

    def test_errors_pass(self, tmp_path: Path) -> None:
        """An error of Google's, before and after the first byte, is the client's exception and on the tape."""
        error = {"error": {"code": 503, "message": "Later.", "status": "UNAVAILABLE"}}

        async def act(peer: Peer) -> None:
            if ":streamGenerateContent" not in peer.path:
                return await peer.whole(b"503 Service Unavailable", b"application/json", orjson.dumps(error))
            await peer.begin_stream()
            return await peer.send(b"data: " + orjson.dumps(ENTRIES[1]) + b"\n\ndata: " + orjson.dumps(error) + b"\n\n")

        with broken(act) as upstream, running(tmp_path, upstream.url, upstream_kind="gemini") as rig:
            with pytest.raises(errors.ServerError, match="Later"):
                google(rig).models.generate_content(model="gemini-x", contents="x")
            with pytest.raises(errors.ServerError, match="Later"):
                list(google(rig).models.generate_content_stream(model="gemini-x", contents="x"))
            failures = payloads(rig.events(), GenerationFailed)

        assert sorted((failure.error_type, failure.position) for failure in failures) == [("upstream_error", 0), ("upstream_error", 1)]
        assert b"x-goog-api-key: " + KEY.lower().encode() in upstream.heads[0].lower()

    def test_the_client_hangs_up(self, tmp_path: Path) -> None:
        """Whoever hangs up is recorded with the position reached, and the upstream is let go."""

        async def act(peer: Peer) -> None:
            await peer.begin_stream()
            await peer.send(b"data: " + orjson.dumps(ENTRIES[1]) + b"\n\n")
            await peer.gone()

        with broken(act) as upstream, running(tmp_path, upstream.url, upstream_kind="gemini") as rig:
            url = f"{rig.url}/v1beta/models/gemini-x:streamGenerateContent?alt=sse"
            with httpx.stream("POST", url, json=HELLO, timeout=DEADLINE_S) as answer:
                next(answer.iter_bytes())
            failure = rig.failure()
            assert upstream.left.wait(DEADLINE_S)

        assert (failure.error_type, failure.position) == ("client_disconnected", 1)
