"""OpenAI's chat completions, and vLLM's superset of them, from and to the one request schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from schemas.requests.fields import Fields, Target, present
from schemas.requests.inference import (
    BeamSearch,
    GenerationParameters,
    Image,
    InferenceRequest,
    Opaque,
    Part,
    Reasoning,
    Sampling,
    StructuredOutput,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    Turn,
    identified,
    instructed,
)
from schemas.requests.jsontext import dump

PROVIDER = "openai"

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FORMS = {"regex": "regex", "grammar": "grammar", "choice": "choice"}
_VLLM_SAMPLING = ("top_k", "min_p", "repetition_penalty")


def from_chat(document: dict[str, Any]) -> InferenceRequest:
    """The request of a chat completion's document; what it does not know stays in `provider_extensions`."""
    fields = Fields(document)
    messages = fields.objects("messages")
    read = [_turn(message) for message in messages or ()]
    if messages is not None and None in read:
        fields.rest["messages"] = messages
    tools = fields.objects("tools")
    offered = [_tool(tool) for tool in tools or ()]
    if tools is not None and None in offered:
        fields.rest["tools"], offered, tools = tools, [], None
    return InferenceRequest(
        model=fields.take("model", str),
        messages=[turn for turn in read if turn] if "messages" not in fields.rest else [],
        tools=[tool for tool in offered if tool] if tools is not None else None,
        tool_choice=_tool_choice(fields),
        stream=fields.take("stream", bool),
        user=fields.take("user", str),
        generation=_generation(fields),
        provider_extensions=fields.extensions(PROVIDER),
    )


def to_chat(request: InferenceRequest, *, vllm: bool) -> dict[str, Any]:
    """The document for an OpenAI-compatible server; vLLM can do more than others.

    Raises:
        UsageError: it cannot do what the request asks for; `place` names it.
    """
    target = Target(PROVIDER, "a vLLM upstream" if vllm else "an OpenAI upstream")
    extensions = target.own(request)
    document = present(
        model=request.model,
        messages=_Conversation(target, vllm).write(identified(instructed(request.instructions, request.messages)))
        if "messages" not in extensions
        else None,
        stream=request.stream,
        user=request.user,
    )
    document |= _written_generation(target, request.generation, vllm)
    if request.tools is not None:
        document["tools"] = [_written_tool(target, tool) for tool in request.tools]
    return document | _written_choice(target, request.tool_choice) | extensions


def _generation(fields: Fields) -> GenerationParameters:
    renamed = None if "max_tokens" in fields.rest else fields.take("max_completion_tokens", int)
    limit = fields.take("max_tokens", int) if renamed is None else renamed
    sampling = Sampling(
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        top_k=fields.take("top_k", int),
        min_p=fields.number("min_p"),
        seed=fields.take("seed", int),
        frequency_penalty=fields.number("frequency_penalty"),
        presence_penalty=fields.number("presence_penalty"),
        repetition_penalty=fields.number("repetition_penalty"),
    )
    effort = fields.take("reasoning_effort", str)
    budget = fields.take("thinking_token_budget", int)
    beams = fields.rest.get("use_beam_search") is True and fields.rest.pop("use_beam_search")
    return GenerationParameters(
        max_tokens=limit,
        n=fields.take("n", int),
        stop=fields.texts("stop"),
        logprobs=fields.take("logprobs", bool),
        top_logprobs=fields.take("top_logprobs", int),
        sampling=sampling,
        beam_search=BeamSearch(length_penalty=fields.number("length_penalty")) if beams else None,
        structured_output=_structured_output(fields),
        thinking=Thinking(effort=effort, budget_tokens=budget) if effort is not None or budget is not None else None,
        provider_extensions={} if renamed is None else {PROVIDER: {"max_completion_tokens": renamed}},
    )


def _structured_output(fields: Fields) -> StructuredOutput | None:
    form = fields.rest.get("response_format")
    if isinstance(form, dict) and form in ({"type": "text"}, {"type": "json_object"}):
        del fields.rest["response_format"]
        return StructuredOutput(form=form["type"])
    if (
        isinstance(form, dict)
        and form.keys() == {"type", "json_schema"}
        and form["type"] == "json_schema"
        and _is_schema(form["json_schema"])
    ):
        del fields.rest["response_format"]
        inner = Fields(form["json_schema"])
        name, strict, definition = inner.take("name", str), inner.take("strict", bool), inner.take("schema", dict)
        return StructuredOutput(
            form="json_schema", name=name, strict=strict, definition=definition, provider_extensions=inner.extensions(PROVIDER)
        )
    outputs = fields.rest.get("structured_outputs")
    if form is None and isinstance(outputs, dict) and len(outputs) == 1:
        (name, definition) = next(iter(outputs.items()))
        if name in _FORMS and definition is not None:
            del fields.rest["structured_outputs"]
            return StructuredOutput.model_validate({"form": name, "definition": definition})
    return None


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("schema"), dict)


def _written_generation(target: Target, parameters: GenerationParameters, vllm: bool) -> dict[str, Any]:
    sampling = parameters.sampling.model_dump(exclude={"provider_extensions"}, exclude_none=True)
    if not vllm:
        target.without(**{name: sampling.get(name) for name in _VLLM_SAMPLING})
        target.without(beam_search=parameters.beam_search)
    target.own(parameters.sampling)
    renamed = target.own(parameters)  # the limit under its new name comes back under it
    document = renamed | present(
        max_tokens=None if renamed else parameters.max_tokens,
        n=parameters.n,
        stop=parameters.stop,
        logprobs=parameters.logprobs,
        top_logprobs=parameters.top_logprobs,
        **sampling,
    )
    if parameters.beam_search is not None:
        document |= {"use_beam_search": True, **present(length_penalty=parameters.beam_search.length_penalty)}
    if parameters.structured_output is not None:
        document |= _written_output(target, parameters.structured_output, vllm)
    return document | _written_thinking(target, parameters.thinking, vllm)


def _written_output(target: Target, output: StructuredOutput, vllm: bool) -> dict[str, Any]:
    if output.form in _FORMS:
        if not vllm:
            raise target.refusal(f"structured output by {output.form}")
        return {"structured_outputs": {output.form: output.definition}}
    if output.form != "json_schema":
        return {"response_format": {"type": output.form}}
    own = target.own(output, "response_format.json_schema.")
    named = output.name if output.name is not None or PROVIDER in output.provider_extensions else "answer"
    schema = present(name=named, strict=output.strict, schema=output.definition) | own
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _written_thinking(target: Target, thinking: Thinking | None, vllm: bool) -> dict[str, Any]:
    if thinking is None:
        return {}
    target.own(thinking, "thinking.")
    if not vllm:
        target.without(**{"thinking budget": thinking.budget_tokens})
    document = present(reasoning_effort=thinking.effort, thinking_token_budget=thinking.budget_tokens)
    if thinking.enabled is None:
        return document
    if vllm:
        return document | {"chat_template_kwargs": {"enable_thinking": thinking.enabled}}
    return document if thinking.enabled else document | {"reasoning_effort": "none"}


def _tool(document: dict[str, Any]) -> Tool | None:
    fields = Fields(document)
    function = fields.take("function", dict)
    if function is None or fields.rest.pop("type", None) != "function" or fields.rest or not isinstance(function.get("name"), str):
        return None
    inner = Fields(function)
    return Tool(
        name=inner.take("name", str) or "",
        description=inner.take("description", str),
        parameters=inner.take("parameters", dict),
        strict=inner.take("strict", bool),
        provider_extensions=inner.extensions(PROVIDER),
    )


def _written_tool(target: Target, tool: Tool) -> dict[str, Any]:
    own = target.own(tool, f"tools.{tool.name}.")
    function = present(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    return {"type": "function", "function": function | own}


def _tool_choice(fields: Fields) -> ToolChoice:
    parallel = fields.take("parallel_tool_calls", bool)
    choice = fields.rest.get("tool_choice")
    if choice in ("auto", "none", "required"):
        return ToolChoice(mode=fields.rest.pop("tool_choice"), parallel=parallel)
    if isinstance(choice, dict) and choice.keys() == {"type", "function"} and choice["type"] == "function":
        function = choice["function"]
        if isinstance(function, dict) and function.keys() == {"name"} and isinstance(function["name"], str):
            del fields.rest["tool_choice"]
            return ToolChoice(mode="required", names=[function["name"]], parallel=parallel)
    return ToolChoice(parallel=parallel)


def _written_choice(target: Target, choice: ToolChoice) -> dict[str, Any]:
    target.own(choice, "tool_choice.")
    document = present(tool_choice=choice.mode, parallel_tool_calls=choice.parallel)
    if len(choice.names) > 1:
        raise target.refusal("a choice between several named tools")
    if choice.names:
        document["tool_choice"] = {"type": "function", "function": {"name": choice.names[0]}}
    return document


def _turn(message: dict[str, Any]) -> Turn | None:
    """The turn of a message; None for one that is not understood."""
    fields = Fields(message)
    role = fields.take("role", str)
    content = fields.rest.get("content")
    plain = isinstance(content, str)
    if role not in _ROLES or not (content is None or plain or _is_objects(content)) or (role == "tool" and not (content or plain)):
        return None
    if content or plain:
        del fields.rest["content"]
    parts: list[Part] = [Text(text=content)] if isinstance(content, str) else [_part(part) for part in content or ()]
    if role == "tool":
        call_id = fields.take("tool_call_id", str)
        result = ToolResult(call_id=call_id, parts=parts, plain=plain)
        return Turn(role="tool", parts=[result], provider_extensions=fields.extensions(PROVIDER))
    reasoning = fields.take("reasoning", str) if role == "assistant" else None
    calls = [_call(call) for call in (fields.objects("tool_calls") or ())] if role == "assistant" else []
    if None in calls:
        return None
    parts = [*([Reasoning(text=reasoning)] if reasoning is not None else ()), *parts, *(call for call in calls if call)]
    return Turn.model_validate({"role": role, "parts": parts, "plain": plain, "provider_extensions": fields.extensions(PROVIDER)})


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _call(document: dict[str, Any]) -> ToolCall | None:
    function = document.get("function")
    if document.keys() != {"id", "type", "function"} or document["type"] != "function" or not isinstance(document["id"], str):
        return None
    if not isinstance(function, dict) or function.keys() != {"name", "arguments"} or not all(isinstance(v, str) for v in function.values()):
        return None
    return ToolCall(call_id=document["id"], name=function["name"], arguments=function["arguments"])


def _part(document: dict[str, Any]) -> Part:
    fields = Fields(document)
    kind = fields.take("type", str)
    if kind == "text" and (text := fields.take("text", str)) is not None:
        return Text(text=text, provider_extensions=fields.extensions(PROVIDER))
    if kind == "image_url" and isinstance(inner := fields.take("image_url", dict), dict) and isinstance(inner.get("url"), str):
        rest = {**fields.rest, **({"image_url": {k: v for k, v in inner.items() if k != "url"}} if len(inner) > 1 else {})}
        return Image(url=inner["url"], provider_extensions={PROVIDER: rest} if rest else {})
    return Opaque(provider=PROVIDER, value=document)


class _Conversation:
    """Writes turns as messages."""

    def __init__(self, target: Target, vllm: bool) -> None:
        self._target = target
        self._vllm = vllm

    def write(self, turns: list[Turn]) -> list[dict[str, Any]]:
        """The messages."""
        return [message for at, turn in enumerate(turns) for message in self._messages(turn, f"messages[{at}].")]

    def _messages(self, turn: Turn, place: str) -> list[dict[str, Any]]:
        """Results stand in messages of their own, before what else the turn says."""
        results = [part for part in turn.parts if isinstance(part, ToolResult)]
        others = [part for part in turn.parts if not isinstance(part, ToolResult)]
        if results and not others:
            own = self._target.own(turn, place)
            return [self._result(result, place) | own for result in results]
        return [*(self._result(result, place) for result in results), self._message(turn, others, place)]

    def _message(self, turn: Turn, parts: Sequence[Part], place: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": turn.role}
        said = [part for part in parts if not isinstance(part, ToolCall | Reasoning)]
        if said:
            message["content"] = self._content(said, turn.plain, place)
        thoughts = [part for part in parts if isinstance(part, Reasoning)]
        for thought in thoughts:
            self._target.own(thought, f"{place}thinking.")
        if thoughts:
            if not self._vllm:
                raise self._target.refusal(f"{place}thinking")
            message["reasoning"] = "".join(part.text for part in thoughts)
        if calls := [self._call(part, place) for part in parts if isinstance(part, ToolCall)]:
            message["tool_calls"] = calls
        return message | self._target.own(turn, place)

    def _content(self, parts: Sequence[Part], plain: bool, place: str) -> Any:
        if plain and len(parts) == 1 and isinstance(parts[0], Text):
            return parts[0].text
        return [self._part(part, f"{place}content") for part in parts]

    def _part(self, part: Part, place: str) -> Any:
        if isinstance(part, Opaque):
            return self._target.opaque(part, place)
        own = self._target.own(part, f"{place}.")
        if isinstance(part, Text):
            return {"type": "text", "text": part.text, **own}
        assert isinstance(part, Image)
        url = part.url if part.url is not None else f"data:{part.media_type};base64,{part.data}"
        return {"type": "image_url", **own, "image_url": {"url": url, **own.get("image_url", {})}}

    def _call(self, call: ToolCall, place: str) -> dict[str, Any]:
        self._target.own(call, f"{place}tool_calls.")
        return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def _result(self, result: ToolResult, place: str) -> dict[str, Any]:
        self._target.own(result, f"{place}tool_result.")
        message: dict[str, Any] = {"role": "tool"}
        if result.call_id is not None:
            message["tool_call_id"] = result.call_id
        message["content"] = self._result_content(result, place)
        return message

    def _result_content(self, result: ToolResult, place: str) -> Any:
        """The result's content; that a tool failed is said by its text, for which there is no field."""
        if result.value is not None:
            return dump(result.value).decode()
        if not result.parts:
            return "The tool failed." if result.failed else ""
        return self._content(result.parts, result.plain, place)
