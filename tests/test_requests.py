"""The one request schema: every provider's documents go through it unchanged, and what another cannot do is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.errors import UsageError
from schemas.requests.anthropic import from_anthropic, to_anthropic
from schemas.requests.chat import from_chat, to_chat
from schemas.requests.gemini import from_gemini, to_gemini
from schemas.requests.inference import InferenceRequest
from schemas.requests.openapi import in_camel_case, to_json_schema
from schemas.requests.recorded import as_chat
from schemas.requests.responses import conversation, from_responses, to_responses

_SCALARS = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
_JSON = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2), max_leaves=4
)
_OBJECT = st.dictionaries(st.text(max_size=5), _JSON, max_size=2)
_WORD = st.text(max_size=8)


def record(required: dict[str, st.SearchStrategy[Any]], **optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """An object with these fields, the optional ones perhaps, perhaps with another type, and perhaps with a field nobody knows."""
    odd = {name: kind | _SCALARS for name, kind in optional.items()}
    return st.fixed_dictionaries(required, optional={**odd, "x_unknown": _JSON})


def typed(name: str, required: dict[str, st.SearchStrategy[Any]], **optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The same with a `type`."""
    return record({"type": st.just(name), **required}, **optional)


_URL = st.just("https://example.test/a.png") | st.just("data:image/png;base64,AAAA")
_CHAT_PART = (
    typed("text", {"text": _WORD})
    | typed("image_url", {"image_url": record({"url": _URL}, detail=st.just("low"))})
    | typed("input_audio", {"input_audio": _OBJECT})
)
_CHAT_CONTENT = _WORD | st.lists(_CHAT_PART, min_size=1, max_size=3)
_FUNCTION = st.fixed_dictionaries({"name": _WORD, "arguments": _WORD})
_CHAT_CALL = st.fixed_dictionaries({"id": _WORD, "type": st.just("function"), "function": _FUNCTION})
_CHAT_MESSAGE = (
    record({"role": st.sampled_from(["system", "developer", "user"]), "content": _CHAT_CONTENT}, name=_WORD)
    | record(
        {"role": st.just("assistant")}, content=_CHAT_CONTENT, tool_calls=st.lists(_CHAT_CALL, min_size=1, max_size=2), reasoning=_WORD
    )
    | record({"role": st.just("tool"), "content": _CHAT_CONTENT, "tool_call_id": _WORD})
    | _OBJECT
)
_CHAT_TOOL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": record({"name": _WORD}, description=_WORD, parameters=_OBJECT, strict=st.booleans())}
)
_NUMBERS = {
    name: st.floats(0, 2) for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
}
_FORM = st.sampled_from([{"type": "text"}, {"type": "json_object"}]) | st.fixed_dictionaries(
    {"type": st.just("json_schema"), "json_schema": record({}, schema=_OBJECT, name=_WORD, strict=st.booleans())}
)
CHAT = record(
    {"messages": st.lists(_CHAT_MESSAGE, max_size=3)},
    model=_WORD,
    max_tokens=st.integers(1, 9),
    max_completion_tokens=st.integers(1, 9),
    n=st.integers(1, 3),
    seed=st.integers(),
    top_k=st.integers(1, 9),
    stop=_WORD | st.lists(_WORD, max_size=2),
    stream=st.booleans(),
    stream_options=_OBJECT,
    tools=st.lists(_CHAT_TOOL, max_size=2),
    tool_choice=st.sampled_from(["auto", "none", "required", {"type": "function", "function": {"name": "f"}}]),
    parallel_tool_calls=st.booleans(),
    response_format=_FORM,
    structured_outputs=st.sampled_from([{"regex": "a+"}, {"choice": ["a"]}, {"grammar": "g", "x": 1}]),
    use_beam_search=st.booleans(),
    length_penalty=st.floats(0, 2),
    reasoning_effort=st.just("low"),
    thinking_token_budget=st.integers(1, 9),
    logprobs=st.booleans(),
    top_logprobs=st.integers(0, 3),
    user=_WORD,
    **_NUMBERS,
)

_TEXT_BLOCK = typed("text", {"text": _WORD}, cache_control=st.just({"type": "ephemeral"}))
_SOURCE = st.fixed_dictionaries({"type": st.just("base64"), "media_type": st.just("image/png"), "data": st.just("AAAA")})
_BLOCK = (
    _TEXT_BLOCK
    | typed("image", {"source": _SOURCE | st.just({"type": "url", "url": "https://example.test/a.png"}) | _OBJECT})
    | typed("thinking", {"thinking": _WORD, "signature": _WORD})
    | typed("tool_use", {"id": _WORD, "name": _WORD, "input": _OBJECT})
    | typed("tool_result", {"tool_use_id": _WORD}, content=_WORD | st.lists(_TEXT_BLOCK, max_size=2), is_error=st.booleans())
    | typed("document", {"source": _OBJECT})
)
_MESSAGE = record({"role": st.sampled_from(["user", "assistant"]), "content": _WORD | st.lists(_BLOCK, max_size=3)}) | _OBJECT
ANTHROPIC = record(
    {"messages": st.lists(_MESSAGE, max_size=3), "max_tokens": st.integers(1, 9)},
    model=_WORD,
    system=_WORD | st.lists(_TEXT_BLOCK, max_size=2),
    temperature=st.floats(0, 1),
    top_p=st.floats(0, 1),
    top_k=st.integers(1, 9),
    stop_sequences=st.lists(_WORD, max_size=2),
    stream=st.booleans(),
    metadata=_OBJECT,
    thinking=st.sampled_from([{"type": "disabled"}, {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1024}, {"type": "x"}]),
    tools=st.lists(record({"name": _WORD, "input_schema": _OBJECT}, description=_WORD, strict=st.booleans(), type=_WORD), max_size=2),
    tool_choice=st.sampled_from([{"type": "auto"}, {"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "f"}]),
)

_ITEM_PART = typed("input_text", {"text": _WORD}) | typed("output_text", {"text": _WORD}, annotations=st.just([]))
_ITEM_PARTS = st.lists(_ITEM_PART | typed("input_image", {"image_url": _URL}, detail=_WORD), min_size=1, max_size=2)
_ITEM = (
    record({"role": st.sampled_from(["user", "assistant", "system"]), "content": _WORD | _ITEM_PARTS}, type=st.just("message"), id=_WORD)
    | typed("function_call", {"call_id": _WORD, "name": _WORD, "arguments": _WORD}, id=_WORD, status=_WORD)
    | typed("function_call_output", {"call_id": _WORD, "output": _WORD}, id=_WORD)
    | typed("reasoning", {"content": st.lists(st.fixed_dictionaries({"type": st.just("reasoning_text"), "text": _WORD}), max_size=2)})
    | _OBJECT
)
_FORMAT = st.sampled_from([{"type": "text"}, {"type": "json_object"}]) | typed(
    "json_schema", {"name": _WORD, "schema": _OBJECT}, strict=_WORD
)
RESPONSES = record(
    {"input": _WORD | st.lists(_ITEM, max_size=3)},
    model=_WORD,
    instructions=_WORD,
    max_output_tokens=st.integers(1, 9),
    temperature=st.floats(0, 1),
    top_p=st.floats(0, 1),
    top_logprobs=st.integers(0, 3),
    stream=st.booleans(),
    text=st.fixed_dictionaries({"format": _FORMAT}, optional={"verbosity": _WORD}),
    reasoning=record({}, effort=_WORD, summary=_WORD),
    tools=st.lists(typed("function", {"name": _WORD}, parameters=_OBJECT, strict=st.booleans(), description=_WORD), max_size=2),
    tool_choice=st.sampled_from(["auto", "required", {"type": "function", "name": "f"}, {"type": "file_search"}]),
    parallel_tool_calls=st.booleans(),
    previous_response_id=_WORD,
    user=_WORD,
)


_SCHEMA = st.sampled_from([{"type": "OBJECT", "properties": {"a": {"type": "STRING", "nullable": True}}}, {"type": "ARRAY"}, {}])
_GEMINI_PART = (
    record({"text": _WORD}, thought=st.booleans(), thoughtSignature=_WORD)
    | record({"inlineData": record({"mimeType": st.sampled_from(["image/png", "audio/wav"]), "data": st.just("AAAA")})})
    | record({"fileData": record({"mimeType": st.just("image/png"), "fileUri": _URL})})
    | record({"functionCall": record({"name": _WORD, "args": _OBJECT}, id=_WORD)}, thoughtSignature=_WORD)
    | record({"functionResponse": record({"name": _WORD, "response": _OBJECT}, id=_WORD)})
    | _OBJECT
)
_CONTENT = record({"parts": st.lists(_GEMINI_PART, max_size=3)}, role=st.sampled_from(["user", "model", "function"])) | _OBJECT
_DECLARATION = record({"name": _WORD}, description=_WORD, parameters=_SCHEMA, parametersJsonSchema=_OBJECT)
_GENERATION_CONFIG = record(
    {},
    temperature=st.floats(0, 2),
    topP=st.floats(0, 1),
    topK=st.integers(1, 9) | st.just(40.0) | st.just(2.5),
    candidateCount=st.integers(1, 3),
    maxOutputTokens=st.integers(1, 9),
    stopSequences=st.lists(_WORD, max_size=2),
    seed=st.integers(),
    responseLogprobs=st.booleans(),
    logprobs=st.integers(0, 3),
    presencePenalty=st.floats(0, 1),
    responseMimeType=st.sampled_from(["application/json", "text/plain", "text/x.enum", "x"]),
    responseSchema=_SCHEMA | st.just({"type": "STRING", "enum": ["a", "b"]}),
    responseJsonSchema=_OBJECT,
    thinkingConfig=record(
        {}, includeThoughts=st.booleans(), thinkingBudget=st.integers(-2, 9), thinkingLevel=st.sampled_from(["LOW", "HIGH", "low", "X"])
    ),
)
GEMINI = record(
    {"contents": st.lists(_CONTENT, max_size=3)},
    model=_WORD,
    systemInstruction=record({"parts": st.lists(_GEMINI_PART, max_size=2)}, role=_WORD),
    generationConfig=_GENERATION_CONFIG,
    tools=st.lists(record({"functionDeclarations": st.lists(_DECLARATION, max_size=2)}, googleSearch=st.just({})), max_size=2),
    toolConfig=record(
        {},
        functionCallingConfig=record(
            {}, mode=st.sampled_from(["AUTO", "ANY", "NONE", "VALIDATED"]), allowedFunctionNames=st.lists(_WORD, max_size=2)
        ),
    ),
    safetySettings=st.lists(_OBJECT, max_size=1),
)


class TestRoundTrips:
    @given(GEMINI)
    def test_gemini(self, document: dict[str, Any]) -> None:
        """Gemini's contents."""
        assert to_gemini(from_gemini(document)) == document

    @given(RESPONSES)
    def test_responses(self, document: dict[str, Any]) -> None:
        """OpenAI's responses."""
        assert to_responses(from_responses(document)) == document

    @given(CHAT)
    def test_chat(self, document: dict[str, Any]) -> None:
        """Chat completions, with everything that vLLM adds to them."""
        assert to_chat(from_chat(document), vllm=True) == document

    @example({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": None}]}], "max_tokens": 1})
    @given(ANTHROPIC)
    def test_anthropic(self, document: dict[str, Any]) -> None:
        """Anthropic's messages."""
        assert to_anthropic(from_anthropic(document)) == document


_WRITERS: tuple[Callable[[InferenceRequest], dict[str, Any]], ...] = (
    to_gemini,
    to_anthropic,
    to_responses,
    lambda request: to_chat(request, vllm=True),
    lambda request: to_chat(request, vllm=False),
)


@given(
    GEMINI.map(from_gemini) | CHAT.map(from_chat) | ANTHROPIC.map(from_anthropic) | RESPONSES.map(from_responses),
    st.sampled_from(_WRITERS),
)
def test_written_or_refused(request: InferenceRequest, write: Callable[[InferenceRequest], dict[str, Any]]) -> None:
    """Whatever is asked of whomever: it is written or refused, and nothing else happens."""
    with suppress(UsageError):
        assert isinstance(write(request), dict)


def _refused(document: dict[str, Any], **options: Any) -> str:
    with pytest.raises(UsageError) as raised:
        to_chat(from_anthropic(document), vllm=options.get("vllm", True))
    return raised.value.place or ""


class TestTranslated:
    def test_anthropic_to_chat(self) -> None:
        """A conversation with tools and thinking, as vLLM's chat completions want it."""
        document = {
            "model": "m",
            "max_tokens": 5,
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "s"},
                        {"type": "text", "text": "Let me see."},
                        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "rain"}, {"type": "text", "text": "So?"}],
                },
            ],
            "tools": [{"name": "weather", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "stop_sequences": ["END"],
            "top_k": 3,
        }

        assert to_chat(from_anthropic(document), vllm=True) == {
            "model": "m",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "Let me see."}],
                    "reasoning": "hm",
                    "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}],
                },
                {"role": "tool", "tool_call_id": "t1", "content": "rain"},
                {"role": "user", "content": [{"type": "text", "text": "So?"}]},
            ],
            "max_tokens": 5,
            "stop": ["END"],
            "top_k": 3,
            "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        }

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"container": "c"}, "container"),
            ({"temperature": "hot"}, "temperature"),
            ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "messages[0].content of type document"),
            ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
        ],
    )
    def test_what_chat_cannot_do_is_refused_by_name(self, fields: dict[str, Any], named: str) -> None:
        """Nothing of Anthropic's own is dropped on the way to another provider."""
        document = {"model": "m", "max_tokens": 1, "messages": [], **fields}

        assert _refused(document) == named

    def test_responses_to_chat(self) -> None:
        """Items of one turn become one message."""
        document = {
            "model": "m",
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
                {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "function_call", "id": "f", "call_id": "c1", "name": "weather", "arguments": "{}", "status": "completed"},
                {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            ],
        }

        assert to_chat(conversation(from_responses(document)), vllm=True)["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {
                "role": "assistant",
                "reasoning": "hm",
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ]

    def test_openai_can_do_less_than_vllm(self) -> None:
        """What is vLLM's own is refused where the upstream is another server."""
        assert _refused({"messages": [], "max_tokens": 1, "top_k": 4}, vllm=False) == "top_k"

    @pytest.mark.parametrize("field", ["seed", "logit_bias", "n", "response_format", "use_beam_search"])
    def test_what_anthropic_cannot_do(self, field: str) -> None:
        """The same the other way round."""
        values: dict[str, Any] = {
            "seed": 1,
            "logit_bias": {"1": 1},
            "n": 2,
            "response_format": {"type": "json_object"},
            "use_beam_search": True,
        }
        with pytest.raises(UsageError, match="not possible with an Anthropic upstream"):
            to_anthropic(from_chat({"model": "m", "messages": [], field: values[field]}))


class TestGemini:
    def test_to_chat(self) -> None:
        """Everything that Gemini's words have a counterpart for; calls without ids get one, which their results share."""
        document = {
            "model": "m",
            "systemInstruction": {"parts": [{"text": "Be brief."}]},
            "contents": [
                {"role": "user", "parts": [{"text": "x"}, {"inlineData": {"mimeType": "image/png", "data": "AAAA"}}]},
                {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"a": 1}}, "thoughtSignature": "s"}]},
                {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"b": 2}}}]},
            ],
            "tools": [
                {"functionDeclarations": [{"name": "f", "parameters": {"type": "OBJECT", "properties": {"a": {"type": "INTEGER"}}}}]}
            ],
            "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}},
            "generationConfig": {
                "candidateCount": 2,
                "maxOutputTokens": 9,
                "topK": 40.0,
                "seed": 1,
                "responseLogprobs": True,
                "logprobs": 3,
                "thinkingConfig": {"thinkingBudget": 0, "includeThoughts": True},
            },
        }

        assert to_chat(from_gemini(document), vllm=True) == {
            "model": "m",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
                },
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": '{"b":2}'},
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
                }
            ],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "n": 2,
            "max_tokens": 9,
            "top_k": 40,
            "seed": 1,
            "logprobs": True,
            "top_logprobs": 3,
            "chat_template_kwargs": {"enable_thinking": False},
        }

    @pytest.mark.parametrize(
        ("document", "place"),
        [
            ({"cachedContent": "c"}, "cachedContent"),
            ({"tools": [{"googleSearch": {}}]}, "tools"),
            ({"generationConfig": {"responseModalities": ["AUDIO"]}}, "responseModalities"),
            ({"contents": [{"parts": [{"inlineData": {"mimeType": "audio/wav", "data": ""}}]}]}, "messages[0].content of type inlineData"),
        ],
    )
    def test_what_others_cannot_do(self, document: dict[str, Any], place: str) -> None:
        """It is refused by name before vLLM and before Anthropic."""
        for write in (lambda request: to_chat(request, vllm=True), to_anthropic):
            with pytest.raises(UsageError) as raised:
                write(from_gemini({"contents": [], **document}))

            assert (raised.value.place or "").endswith(place)

    def test_schemas(self) -> None:
        """Google's dialect of schemas means this as JSON schema."""
        google = {
            "type": "OBJECT",
            "properties": {"b": {"type": "STRING", "nullable": True}, "a": {"type": "ARRAY", "items": {"type": "NUMBER"}, "minItems": "1"}},
            "propertyOrdering": ["a", "b"],
        }
        schema = to_json_schema(google)

        assert list(schema["properties"]) == ["a", "b"]
        assert schema["properties"] == {
            "a": {"type": "array", "items": {"type": "number"}, "minItems": 1},
            "b": {"type": ["string", "null"]},
        }

    def test_spellings(self) -> None:
        """Google's other spelling is read too, but for what is the client's own."""
        snake = {"system_instruction": {"parts": [{"function_call": {"name": "f", "args": {"a_b": 1}}}]}}

        assert in_camel_case(snake) == {"systemInstruction": {"parts": [{"functionCall": {"name": "f", "args": {"a_b": 1}}}]}}


class TestHints:
    """What another provider need not know is a short list; what says something is not on it."""

    @pytest.mark.parametrize("field", [{"store": True}, {"metadata": {"a": "b"}}, {"prompt_cache_key": "k"}, {"service_tier": "auto"}])
    def test_left_out(self, field: dict[str, Any]) -> None:
        """Caching, filing, and what is so by default."""
        written = to_anthropic(from_chat({"model": "m", "messages": [], "max_tokens": 1, **field}))

        assert not written.keys() & field.keys()

    @pytest.mark.parametrize(
        "field", [{"service_tier": "flex"}, {"return_token_ids": True}, {"stream_options": {"include_obfuscation": True}}]
    )
    def test_refused(self, field: dict[str, Any]) -> None:
        """What would change the answer or its price."""
        with pytest.raises(UsageError):
            to_anthropic(from_chat({"model": "m", "messages": [], "max_tokens": 1, **field}))

    def test_a_summary_is_no_hint(self) -> None:
        """An item's summary that says something is refused; an empty one is not."""
        item = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}
        to_chat(from_responses({"input": [{**item, "summary": []}]}), vllm=True)
        with pytest.raises(UsageError, match="summary"):
            to_chat(from_responses({"input": [{**item, "summary": [{"type": "summary_text", "text": "s"}]}]}), vllm=True)


class TestRecorded:
    @pytest.mark.parametrize(
        ("endpoint", "document"),
        [
            ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}]}),
            ("/v1/messages", {"model": "m", "messages": [{"role": "user", "content": "x"}]}),
            ("/v1/responses", {"model": "m", "input": [{"role": "user", "content": "x"}]}),
        ],
    )
    def test_asked_again(self, endpoint: str, document: dict[str, Any]) -> None:
        """Every conversation can be asked again as a chat completion."""
        assert as_chat(endpoint, document) == {"model": "m", "messages": [{"role": "user", "content": "x"}]}

    def test_no_conversation(self) -> None:
        """What is none says so."""
        with pytest.raises(UsageError, match="a request to /v1/embeddings is no conversation"):
            as_chat("/v1/embeddings", {"input": "x"})
