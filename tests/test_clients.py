"""LangChain, LiteLLM, curl and the official Python clients before the gateway and real vLLM: what they saw is what the tape has."""

from __future__ import annotations

import asyncio
import json
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

from schemas.events import GenerationFailed
from schemas.settings import Settings
from tests.api_rig import serving
from tests.conftest import VllmService
from tests.gateway_rig import DEADLINE_S, DONE, HELLO, Peer, Rig, broken, chunk, running
from tests.program import until
from tests.test_api import configured
from tests.test_gateway import payloads
from tests.told import last_told

ASKED = "Say something about the sea."
KEY = "sk-clients-0123456789"
OSLO: Any = {"type": "object", "properties": {"city": {"enum": ["Oslo"]}}, "required": ["city"], "additionalProperties": False}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": OSLO}}
_FUNCTION: Any = {"name": "get_weather", "description": "The weather of a city.", "strict": True}  # vLLM holds a model to strict ones only
TOOL: Any = {**_FUNCTION, "parameters": OSLO}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> Iterator[Rig]:
    """A gateway before vLLM."""
    with running(tmp_path_factory.mktemp("clients"), vllm.url) as it:
        yield it


@pytest.fixture(scope="module")
def litellm() -> Iterator[Any]:
    """The library, told to fetch nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own modules' deprecations
            import litellm
        yield litellm


class TestLangChain:
    @pytest.fixture(params=["openai", "anthropic"])
    def chain(self, request: pytest.FixtureRequest, rig: Rig, vllm: VllmService) -> Any:
        """LangChain's chat model of a provider."""
        common: dict[str, Any] = {"api_key": KEY, "max_tokens": 60, "max_retries": 0, "timeout": DEADLINE_S}
        if request.param == "openai":
            return ChatOpenAI(model=vllm.model, base_url=f"{rig.url}/v1", temperature=0, stream_usage=True, **common)
        return ChatAnthropic(model_name=vllm.model, base_url=rig.url, **common)

    def test_invoke_and_stream(self, rig: Rig, chain: Any) -> None:
        """A whole message, and one put together from chunks."""
        whole = chain.invoke(ASKED)
        _same(rig, whole)
        pieces = list(chain.stream(ASKED))
        _same(rig, sum(pieces[1:], pieces[0]))

        assert len(pieces) > 5

    def test_tools(self, rig: Rig, chain: Any) -> None:
        """A bound tool that has to be called is called, with the arguments that are on the tape."""
        function = {**_FUNCTION, "input_schema": OSLO} if isinstance(chain, ChatAnthropic) else {"type": "function", "function": TOOL}
        asked = chain.bind_tools([function], tool_choice="get_weather").invoke(ASKED)
        (recorded,) = last_told(rig.events()).choices[0].calls
        (call,) = asked.tool_calls

        assert (call["name"], call["args"], call["id"]) == ("get_weather", {"city": "Oslo"}, recorded.call_id)
        assert json.loads(recorded.arguments) == call["args"]

    def test_errors(self, rig: Rig, chain: Any) -> None:
        """The exception is that of the provider's client below."""
        kind = openai.NotFoundError if isinstance(chain, ChatOpenAI) else anthropic.NotFoundError
        with pytest.raises(kind):
            chain.model_copy(update={"model_name" if isinstance(chain, ChatOpenAI) else "model": "nobody"}).invoke(ASKED)


def _same(rig: Rig, message: AIMessage) -> None:
    """A message is what the tape has of the last generation."""
    told = last_told(rig.events())
    usage = message.usage_metadata
    assert usage is not None
    assert message.text == told.choices[0].text
    assert (usage["input_tokens"], usage["output_tokens"]) == (told.prompt_tokens, told.completion_tokens)


def test_langchain_structured_output(rig: Rig, vllm: VllmService) -> None:
    """Structured output is an object of the schema, which is the text on the tape."""
    chain = ChatOpenAI(model=vllm.model, base_url=f"{rig.url}/v1", api_key=KEY, max_completion_tokens=60, temperature=0)  # type: ignore[arg-type]  # a plain key is taken too
    place = chain.with_structured_output({"title": "place", "description": "Where.", **OSLO}, method="json_schema").invoke(ASKED)

    assert place == {"city": "Oslo"} == json.loads(last_told(rig.events()).choices[0].text)


@pytest.mark.filterwarnings("ignore")  # its own code is full of what pydantic deprecates
class TestLiteLlm:
    @pytest.fixture(autouse=True)
    def loop(self) -> Iterator[None]:
        """The library asks for this thread's event loop; one made for it is never closed, which a later test would be blamed for."""
        with asyncio.Runner() as runner:
            asyncio.set_event_loop(runner.get_loop())
            yield
            asyncio.set_event_loop(None)

    @pytest.mark.parametrize("provider", ["openai", "anthropic"])
    @pytest.mark.parametrize("stream", [True, False])
    def test_completion(self, rig: Rig, vllm: VllmService, litellm: Any, provider: str, stream: bool) -> None:
        """The same call for both providers, streamed and whole."""
        base = f"{rig.url}/v1" if provider == "openai" else rig.url
        asked = {
            "model": f"{provider}/{vllm.model}",
            "api_base": base,
            "api_key": KEY,
            "messages": HELLO,
            "max_tokens": 8,
            "num_retries": 0,
        }
        answer = litellm.completion(**asked, stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}))
        whole = litellm.stream_chunk_builder(list(answer)) if stream else answer
        told = last_told(rig.events())

        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (told.choices[0].text, "length")
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (told.prompt_tokens, told.completion_tokens)

    def test_errors(self, rig: Rig, litellm: Any) -> None:
        """An unknown model is its own exception."""
        with pytest.raises(litellm.NotFoundError):
            litellm.completion(model="openai/nobody", api_base=f"{rig.url}/v1", api_key=KEY, messages=HELLO, num_retries=0)

    def test_its_own_telemetry(self, tmp_path: Path, vllm: VllmService, litellm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """With its OpenTelemetry callback, straight to the engine and without a gateway: the API's tape has what it was told."""
        from litellm.integrations.opentelemetry import OpenTelemetry, OpenTelemetryConfig

        engine: dict[str, Any] = {"model": f"openai/{vllm.model}", "base_url": f"{vllm.url}/v1", "api_key": KEY}
        with serving(configured(Settings(data=tmp_path / "data"))) as api:
            own = api.by("debugger", "analyst", owner="lite", tenant="lite")
            exporter = OTLPSpanExporter(endpoint=f"{own.url}/api/v1/traces", headers=own.headers)
            monkeypatch.setattr(litellm, "callbacks", [OpenTelemetry(config=OpenTelemetryConfig(exporter=exporter, skip_set_global=True))])
            told: Any = litellm.completion(**engine, max_tokens=8, messages=HELLO)
            asked = {"query": "SELECT session_id, model, outcome, prompt_tokens, completion_tokens FROM generations"}
            rows = until(lambda: own("POST", "sql", asked)["rows"] or None, DEADLINE_S)
            shown = own("GET", f"debug-sessions/{rows[0][0]}")["generations"][0]

        assert rows[0][1:] == [vllm.model, "finished", told.usage.prompt_tokens, 8]
        assert shown["response"][0]["content"] == told.choices[0].message.content
        assert shown["request"]["messages"] == HELLO
        assert "litellm.call_id" in shown["request"]["parameters"]["metadata"]["otel"]["attributes"]


class TestCurl:
    @staticmethod
    def ask(rig: Rig, path: str, body: Any, *options: str) -> tuple[str, str]:
        """What curl prints of an answer, and its status."""
        command = ["curl", "-sN", "-w", "\n%{http_code}", f"{rig.url}{path}", "-H", "content-type: application/json", *options]
        ran = subprocess.run(
            [*command, "--data-binary", "@-"], input=json.dumps(body), capture_output=True, text=True, timeout=60, check=True
        )
        answer, _, status = ran.stdout.rpartition("\n")
        return answer, status

    def test_stream(self, rig: Rig, vllm: VllmService) -> None:
        """Server-sent events to the last."""
        body = {"model": vllm.model, "messages": HELLO, "stream": True, "max_tokens": 8}
        answer, status = self.ask(rig, "/v1/chat/completions", body)
        events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
        text = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])

        assert (status, events[-1]) == ("200", "[DONE]")
        assert text == last_told(rig.events()).choices[0].text

    def test_errors(self, rig: Rig, vllm: VllmService) -> None:
        """Each kind of wrong request is a status and a body in the words of its provider."""
        openai_error, status = self.ask(rig, "/v1/chat/completions", {"model": "nobody", "messages": HELLO})
        anthropic_error, unread = self.ask(rig, "/v1/messages", {"model": vllm.model})
        failed = subprocess.run(["curl", "-sf", f"{rig.url}/v1/chat/completions", "-d", "{"], check=False, timeout=60).returncode

        assert (status, json.loads(openai_error)["error"]["code"]) == ("404", 404)
        assert (unread, json.loads(anthropic_error)["error"]["type"]) == ("400", "invalid_request_error")
        assert failed == 22
        assert self.ask(rig, "/nowhere", {})[1] == "404"
        assert self.ask(rig, "/v1/chat/completions", {}, "-X", "PUT")[1] == "405"


class TestPython:
    @pytest.mark.parametrize("stream", [True, False])
    def test_three_sequences(self, rig: Rig, vllm: VllmService, stream: bool) -> None:
        """n = 3: each sequence's text and end, and the tokens of all."""
        asked: dict[str, Any] = {"model": vllm.model, "messages": HELLO, "n": 3, "max_tokens": 8, "stream": stream}
        answer = rig.client().chat.completions.create(**asked, **({"stream_options": {"include_usage": True}} if stream else {}))
        chunks = list(answer) if stream else [answer]
        texts = ["", "", ""]
        for part in chunks:
            for choice in part.choices:
                texts[choice.index] += (choice.delta if stream else choice.message).content or ""
        told = last_told(rig.events())

        assert [choice.text for choice in told.choices] == texts
        assert [choice.finish for choice in told.choices] == ["length"] * 3
        assert (chunks[-1].usage.completion_tokens, told.ids) == (told.completion_tokens, 24)

    def test_structured_output_and_a_tool(self, rig: Rig, vllm: VllmService) -> None:
        """What a schema demands is on the tape as the client reads it."""
        asked: dict[str, Any] = {"model": vllm.model, "messages": HELLO, "max_tokens": 60, "temperature": 0}
        formed = rig.client().chat.completions.create(**asked, response_format=FORM).choices[0].message.content
        told = last_told(rig.events())
        tools = [{"type": "function", "function": TOOL}]
        choice = {"type": "function", "function": {"name": "get_weather"}}
        (call,) = rig.client().chat.completions.create(**asked, tools=tools, tool_choice=choice).choices[0].message.tool_calls
        (recorded,) = last_told(rig.events()).choices[0].calls

        assert (json.loads(formed), formed) == ({"city": "Oslo"}, told.choices[0].text)
        assert (call.id, call.function.name, call.function.arguments) == (recorded.call_id, recorded.name, recorded.arguments)

    def test_failures_of_all_clients_are_on_the_tape(self, rig: Rig) -> None:
        """One for each request that was refused; no client's key is anywhere."""
        with pytest.raises(openai.NotFoundError):
            rig.client(api_key=KEY).chat.completions.create(model="nobody", messages=HELLO)

        assert payloads(rig.events(), GenerationFailed)
        assert not [value for value in rig.framed() if KEY.encode() in value]


def test_reasoning(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Thoughts reach OpenAI's client as vLLM sends them, Anthropic's and LangChain's as blocks of thinking, and the tape apart."""

    async def act(peer: Peer) -> None:
        await peer.begin_stream()
        for delta in ({"role": "assistant"}, {"reasoning": "Hm."}, {"content": "42"}):
            await peer.send(chunk(delta=delta))
        await peer.send(chunk(finish="stop") + DONE)

    with broken(act) as upstream, running(tmp_path_factory.mktemp("reasoning"), upstream.url) as rig:
        chunks = list(rig.client().chat.completions.create(model="m", messages=HELLO, stream=True))
        told = last_told(rig.events())
        asked: dict[str, Any] = {"model_name": "m", "base_url": rig.url, "api_key": KEY, "max_retries": 0, "timeout": DEADLINE_S}
        chain = ChatAnthropic(**asked)
        pieces = list(chain.stream(ASKED))
        again = last_told(rig.events())
    blocks = [block for piece in pieces for block in piece.content_blocks]

    assert "".join(getattr(part.choices[0].delta, "reasoning", None) or "" for part in chunks) == told.choices[0].reasoning == "Hm."
    assert [(block["type"], block["reasoning"]) for block in blocks if block["type"] == "reasoning"] == [("reasoning", "Hm.")]
    assert (told.choices[0].text, again.choices[0].text, again.choices[0].reasoning) == ("42", "42", "Hm.")
