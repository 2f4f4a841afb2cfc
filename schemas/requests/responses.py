"""OpenAI's responses, from and to the one request schema: each input item is a turn."""

from __future__ import annotations

from typing import Any

from schemas.requests.fields import Fields, Target, present
from schemas.requests.inference import (
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
)

PROVIDER = "responses"

_ROLES = ("system", "developer", "user", "assistant")


def from_responses(document: dict[str, Any]) -> InferenceRequest:
    """The request of a document; what it does not know stays in `provider_extensions`."""
    fields = Fields(document)
    turns = _turns(fields)
    tools = fields.objects("tools")
    offered = [_tool(tool) for tool in tools or ()]
    if tools is not None and None in offered:
        fields.rest["tools"], offered, tools = tools, [], None
    return InferenceRequest(
        model=fields.take("model", str),
        instructions=fields.take("instructions", str),
        messages=turns,
        tools=[tool for tool in offered if tool] if tools is not None else None,
        tool_choice=_tool_choice(fields),
        stream=fields.take("stream", bool),
        user=fields.take("user", str),
        generation=GenerationParameters(
            max_tokens=fields.take("max_output_tokens", int),
            top_logprobs=fields.take("top_logprobs", int),
            sampling=Sampling(temperature=fields.number("temperature"), top_p=fields.number("top_p")),
            structured_output=_structured_output(fields),
            thinking=_thinking(fields),
        ),
        provider_extensions=fields.extensions(PROVIDER),
    )


def to_responses(request: InferenceRequest) -> dict[str, Any]:
    """The document for OpenAI's responses.

    Raises:
        UsageError: they cannot do what the request asks for; `place` names it.
    """
    target = Target(PROVIDER, "OpenAI's responses")
    extensions = target.own(request)
    generation, sampling = request.generation, request.generation.sampling
    target.without(n=generation.n if generation.n != 1 else None, stop=generation.stop, logprobs=generation.logprobs or None)
    target.without(beam_search=generation.beam_search)
    target.own(generation)
    target.without(**sampling.model_dump(exclude={"temperature", "top_p", "provider_extensions"}))
    document = present(
        model=request.model,
        instructions=request.instructions,
        stream=request.stream,
        user=request.user,
        max_output_tokens=generation.max_tokens,
        top_logprobs=generation.top_logprobs,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        text=_written_output(target, generation.structured_output),
        reasoning=_written_thinking(target, generation.thinking),
        parallel_tool_calls=request.tool_choice.parallel,
        tool_choice=_written_choice(target, request.tool_choice),
    )
    if "input" not in extensions:
        document["input"] = _written_turns(target, identified(request.messages))
    if request.tools is not None:
        document["tools"] = [_written_tool(target, tool) for tool in request.tools]
    return document | extensions


def conversation(request: InferenceRequest) -> InferenceRequest:
    """The same request as other providers have it.

    What the assistant said and called between two others is one turn; who wants the likeliest tokens has logprobs switched on.
    """
    turns: list[Turn] = []
    for turn in request.messages:
        if turns and turn.role == turns[-1].role == "assistant":
            parts = [*turns[-1].parts, *turn.parts]
            turns[-1] = turns[-1].model_copy(update={"parts": parts, "plain": turns[-1].plain and turn.plain})
        else:
            turns.append(turn)
    scored = request.generation.model_copy(update={"logprobs": True}) if request.generation.top_logprobs else request.generation
    return request.model_copy(update={"messages": turns, "generation": scored})


def _turns(fields: Fields) -> list[Turn]:
    text = fields.rest.get("input")
    if isinstance(text, str):
        del fields.rest["input"]
        return [Turn(role="user", parts=[Text(text=text)], plain=True, provider_extensions={PROVIDER: {"bare": True}})]
    items = fields.objects("input")
    turns = [_turn(item) for item in items or ()]
    if items is not None and None in turns:
        fields.rest["input"] = items
        return []
    return [turn for turn in turns if turn]


def _turn(item: dict[str, Any]) -> Turn | None:
    fields = Fields(item)
    kind = fields.rest.get("type")
    if kind == "function_call":
        return _call(fields)
    if kind == "function_call_output":
        return _result(fields)
    if kind == "reasoning":
        return _reasoning(fields)
    role, content = fields.take("role", str), fields.rest.pop("content", None)
    if role not in _ROLES or kind not in (None, "message"):
        return None
    if isinstance(content, str):
        parts: list[Part] = [Text(text=content)]
    elif isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        parts = [_part(part, role) for part in content]
    else:
        return None
    turn = {"role": role, "parts": parts, "plain": isinstance(content, str)}
    return Turn.model_validate({**turn, "provider_extensions": fields.extensions(PROVIDER)})


def _call(fields: Fields) -> Turn | None:
    call_id, name, arguments = fields.take("call_id", str), fields.take("name", str), fields.take("arguments", str)
    if call_id is None or name is None or arguments is None:
        return None
    return Turn(
        role="assistant",
        parts=[ToolCall(call_id=call_id, name=name, arguments=arguments)],
        provider_extensions=fields.extensions(PROVIDER),
    )


def _result(fields: Fields) -> Turn | None:
    call_id, output = fields.take("call_id", str), fields.take("output", str)
    if call_id is None or output is None:
        return None
    result = ToolResult(call_id=call_id, parts=[Text(text=output)], plain=True)
    return Turn(role="tool", parts=[result], provider_extensions=fields.extensions(PROVIDER))


def _reasoning(fields: Fields) -> Turn | None:
    content = fields.objects("content")
    if not content or len(content) != 1 or content[0].keys() != {"type", "text"} or not isinstance(content[0]["text"], str):
        return None
    if content[0]["type"] != "reasoning_text":
        return None
    return Turn(role="assistant", parts=[Reasoning(text=content[0]["text"])], provider_extensions=fields.extensions(PROVIDER))


def _part(document: dict[str, Any], role: str) -> Part:
    fields = Fields(document)
    kind = fields.take("type", str)
    if kind == _text_type(role) and (text := fields.take("text", str)) is not None:
        return Text(text=text, provider_extensions=fields.extensions(PROVIDER))
    if kind == "input_image" and (url := fields.take("image_url", str)) is not None:
        return Image(url=url, provider_extensions=fields.extensions(PROVIDER))
    return Opaque(provider=PROVIDER, value=document)


def _text_type(role: str) -> str:
    return "output_text" if role == "assistant" else "input_text"


def _structured_output(fields: Fields) -> StructuredOutput | None:
    text = fields.rest.get("text")
    form = text.get("format") if isinstance(text, dict) and text.keys() == {"format"} else None
    if not isinstance(form, dict):
        return None
    if form in ({"type": "text"}, {"type": "json_object"}):
        del fields.rest["text"]
        return StructuredOutput(form=form["type"])
    inner = Fields(form)
    if inner.rest.pop("type", None) != "json_schema" or not isinstance(form.get("schema"), dict):
        return None
    del fields.rest["text"]
    name, strict, schema = inner.take("name", str), inner.take("strict", bool), inner.take("schema", dict)
    extensions = inner.extensions(PROVIDER)
    return StructuredOutput(form="json_schema", name=name, strict=strict, definition=schema, provider_extensions=extensions)


def _written_output(target: Target, output: StructuredOutput | None) -> dict[str, Any] | None:
    if output is None:
        return None
    if output.form not in ("text", "json_object", "json_schema"):
        raise target.refusal(f"structured output by {output.form}")
    own = target.own(output, "text.format.")
    return {"format": {"type": output.form, **present(name=output.name, strict=output.strict, schema=output.definition), **own}}


def _thinking(fields: Fields) -> Thinking | None:
    value = fields.rest.get("reasoning")
    if not isinstance(value, dict) or not isinstance(value.get("effort"), str):
        return None
    del fields.rest["reasoning"]
    inner = Fields(value)
    return Thinking(effort=inner.take("effort", str), provider_extensions=inner.extensions(PROVIDER))


def _written_thinking(target: Target, thinking: Thinking | None) -> dict[str, Any] | None:
    if thinking is None:
        return None
    target.without(**{"thinking budget": thinking.budget_tokens})
    effort = "none" if thinking.enabled is False else thinking.effort
    return present(effort=effort) | target.own(thinking, "reasoning.")


def _tool(document: dict[str, Any]) -> Tool | None:
    fields = Fields(document)
    name = fields.take("name", str)
    if name is None or fields.rest.pop("type", None) != "function":
        return None
    description, parameters, strict = fields.take("description", str), fields.take("parameters", dict), fields.take("strict", bool)
    extensions = fields.extensions(PROVIDER)
    return Tool(name=name, description=description, parameters=parameters, strict=strict, provider_extensions=extensions)


def _written_tool(target: Target, tool: Tool) -> dict[str, Any]:
    own = target.own(tool, f"tools.{tool.name}.")
    fields = present(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    return {"type": "function", **fields, **own}


def _tool_choice(fields: Fields) -> ToolChoice:
    parallel = fields.take("parallel_tool_calls", bool)
    choice = fields.rest.get("tool_choice")
    if choice in ("auto", "none", "required"):
        return ToolChoice(mode=fields.rest.pop("tool_choice"), parallel=parallel)
    named = isinstance(choice, dict) and choice.keys() == {"type", "name"} and choice["type"] == "function"
    if isinstance(choice, dict) and named and isinstance(choice["name"], str):
        del fields.rest["tool_choice"]
        return ToolChoice(mode="required", names=[choice["name"]], parallel=parallel)
    return ToolChoice(parallel=parallel)


def _written_choice(target: Target, choice: ToolChoice) -> Any:
    target.own(choice, "tool_choice.")
    if len(choice.names) > 1:
        raise target.refusal("a choice between several named tools")
    return {"type": "function", "name": choice.names[0]} if choice.names else choice.mode


def _written_turns(target: Target, turns: list[Turn]) -> Any:
    first = turns[0] if len(turns) == 1 else None
    if first and first.provider_extensions.get(PROVIDER, {}).get("bare") and isinstance(first.parts[0], Text):
        return first.parts[0].text
    return [item for at, turn in enumerate(turns) for item in _items(target, turn, f"input[{at}].")]


def _items(target: Target, turn: Turn, place: str) -> list[dict[str, Any]]:
    """The items of a turn: what it says is a message, each call, result and thought an item of its own."""
    own = target.own(turn, place)
    said = [part for part in turn.parts if isinstance(part, Text | Image | Opaque)]
    items = [_item(target, part, place) | own for part in turn.parts if isinstance(part, Reasoning)]
    if turn.plain and len(said) == 1 and isinstance(said[0], Text):
        items.append({"role": turn.role, "content": said[0].text, **own})
    elif said:
        items.append({"role": turn.role, "content": [_written_part(target, part, turn.role, place) for part in said], **own})
    return items + [_item(target, part, place) | own for part in turn.parts if isinstance(part, ToolCall | ToolResult)]


def _item(target: Target, part: Reasoning | ToolCall | ToolResult, place: str) -> dict[str, Any]:
    target.own(part, place)
    if isinstance(part, Reasoning):
        return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": part.text}]}
    if isinstance(part, ToolCall):
        return {"type": "function_call", "call_id": part.call_id, "name": part.name, "arguments": part.arguments}
    if any(not isinstance(inner, Text) for inner in part.parts):
        raise target.refusal(f"{place}a tool's result that is not text")
    output = "".join(inner.text for inner in part.parts if isinstance(inner, Text))
    return {"type": "function_call_output", "call_id": part.call_id, "output": output}


def _written_part(target: Target, part: Text | Image | Opaque, role: str, place: str) -> Any:
    if isinstance(part, Opaque):
        return target.opaque(part, f"{place}content")
    own = target.own(part, place)
    if isinstance(part, Text):
        return {"type": _text_type(role), "text": part.text, **own}
    url = part.url if part.url is not None else f"data:{part.media_type};base64,{part.data}"
    return {"type": "input_image", "image_url": url, **own}
