"""Anthropic's messages, from and to the one request schema."""

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
from schemas.requests.jsontext import dump, load

PROVIDER = "anthropic"

MAX_TOKENS = 4096
"""Anthropic wants a limit; other providers' requests may have none."""

_MODES = {"auto": "auto", "any": "required", "none": "none"}


def from_anthropic(document: dict[str, Any]) -> InferenceRequest:
    """The request of a message's document; what it does not know stays in `provider_extensions`."""
    fields = Fields(document)
    system = _system(fields)
    messages = fields.objects("messages")
    read = [_turn(message) for message in messages or ()]
    if messages is not None and None in read:
        fields.rest["messages"], read = messages, []
    tools = fields.objects("tools")
    offered = [_tool(tool) for tool in tools or ()]
    if tools is not None and None in offered:
        fields.rest["tools"], offered, tools = tools, [], None
    return InferenceRequest(
        model=fields.take("model", str),
        messages=[turn for turn in (system, *read) if turn],
        tools=[tool for tool in offered if tool] if tools is not None else None,
        tool_choice=_tool_choice(fields),
        stream=fields.take("stream", bool),
        generation=GenerationParameters(
            max_tokens=fields.take("max_tokens", int),
            stop=fields.texts("stop_sequences"),
            sampling=Sampling(temperature=fields.number("temperature"), top_p=fields.number("top_p"), top_k=fields.take("top_k", int)),
            thinking=_thinking(fields),
        ),
        provider_extensions=fields.extensions(PROVIDER),
    )


def to_anthropic(request: InferenceRequest) -> dict[str, Any]:
    """The document for Anthropic.

    Raises:
        UsageError: it cannot do what the request asks for; `place` names it.
    """
    target = Target(PROVIDER, "an Anthropic upstream")
    extensions = target.own(request)
    generation, sampling = request.generation, request.generation.sampling
    target.without(
        n=generation.n if generation.n != 1 else None, logprobs=generation.logprobs or None, top_logprobs=generation.top_logprobs
    )
    plain = generation.structured_output is None or generation.structured_output.form == "text"
    target.without(structured_output=None if plain else generation.structured_output, beam_search=generation.beam_search)
    target.own(generation)
    target.without(**sampling.model_dump(include={"min_p", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty"}))
    document = present(
        model=request.model,
        **_written_turns(target, identified(instructed(request.instructions, request.messages)), extensions),
        stream=request.stream,
    )
    foreign = PROVIDER not in request.provider_extensions and generation.max_tokens is None and "max_tokens" not in extensions
    document |= present(
        max_tokens=MAX_TOKENS if foreign and request.messages else generation.max_tokens,
        stop_sequences=generation.stop,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        thinking=_written_thinking(target, generation.thinking),
        tool_choice=_written_choice(target, request.tool_choice),
    )
    if request.tools is not None:
        document["tools"] = [_written_tool(target, tool) for tool in request.tools]
    if request.user is not None:
        document["metadata"] = {"user_id": request.user}
    return document | extensions


def _system(fields: Fields) -> Turn | None:
    text = fields.take("system", str)
    if text is not None:
        return Turn(role="system", parts=[Text(text=text)], plain=True)
    blocks = fields.rest.get("system")
    if not blocks or not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        return None
    del fields.rest["system"]
    return Turn(role="system", parts=[_part(block) for block in blocks])


def _turn(message: dict[str, Any]) -> Turn | None:
    fields = Fields(message)
    role = fields.take("role", str)
    content = fields.rest.pop("content", None)
    if role not in ("user", "assistant"):
        return None
    if isinstance(content, str):
        parts: list[Part] = [Text(text=content)]
    elif isinstance(content, list) and all(isinstance(block, dict) for block in content):
        parts = [_part(block) for block in content]
    else:
        return None
    turn = {"role": role, "parts": parts, "plain": isinstance(content, str)}
    return Turn.model_validate({**turn, "provider_extensions": fields.extensions(PROVIDER)})


def _part(block: dict[str, Any]) -> Part:
    """A block of content; opaque where it is not understood."""
    fields = Fields(block)
    kind = fields.take("type", str)
    read = {"text": _text, "image": _image, "thinking": _thought, "tool_use": _call, "tool_result": _result}.get(kind or "")
    part = read(fields) if read else None
    return part or Opaque(provider=PROVIDER, value=block)


def _text(fields: Fields) -> Text | None:
    text = fields.take("text", str)
    return None if text is None else Text(text=text, provider_extensions=fields.extensions(PROVIDER))


def _image(fields: Fields) -> Image | None:
    source = fields.take("source", dict) or {}
    if source.keys() == {"type", "url"} and source["type"] == "url" and isinstance(source["url"], str):
        return Image(url=source["url"], provider_extensions=fields.extensions(PROVIDER))
    data, media_type = source.get("data"), source.get("media_type")
    encoded = source.keys() == {"type", "media_type", "data"} and source["type"] == "base64"
    if encoded and isinstance(data, str) and isinstance(media_type, str):
        return Image(data=data, media_type=media_type, provider_extensions=fields.extensions(PROVIDER))
    return None


def _thought(fields: Fields) -> Reasoning | None:
    text = fields.take("thinking", str)
    return None if text is None else Reasoning(text=text, provider_extensions=fields.extensions(PROVIDER))


def _call(fields: Fields) -> ToolCall | None:
    call_id, name, arguments = fields.take("id", str), fields.take("name", str), fields.take("input", dict)
    if call_id is None or name is None or arguments is None:
        return None
    return ToolCall(call_id=call_id, name=name, arguments=dump(arguments).decode(), provider_extensions=fields.extensions(PROVIDER))


def _result(fields: Fields) -> ToolResult | None:
    call_id, failed, content = fields.take("tool_use_id", str), fields.take("is_error", bool), fields.rest.get("content")
    if call_id is None:
        return None
    if content is not None:  # a null that was sent stays what it is
        del fields.rest["content"]
    if isinstance(content, str):
        parts: list[Part] = [Text(text=content)]
    elif isinstance(content, list) and content and all(isinstance(block, dict) for block in content):
        parts = [_part(block) for block in content]
    elif content is None:
        parts = []
    else:
        return None
    return ToolResult(
        call_id=call_id, parts=parts, plain=isinstance(content, str), failed=failed, provider_extensions=fields.extensions(PROVIDER)
    )


def _thinking(fields: Fields) -> Thinking | None:
    value = fields.rest.get("thinking")
    if value in ({"type": "disabled"}, {"type": "adaptive"}):
        del fields.rest["thinking"]
        return Thinking(enabled=value["type"] == "adaptive")
    if isinstance(value, dict) and value.keys() == {"type", "budget_tokens"} and value["type"] == "enabled":
        budget = value["budget_tokens"]
        if isinstance(budget, int) and not isinstance(budget, bool):
            del fields.rest["thinking"]
            return Thinking(enabled=True, budget_tokens=budget)
    return None


def _written_thinking(target: Target, thinking: Thinking | None) -> dict[str, Any] | None:
    if thinking is None:
        return None
    target.own(thinking, "thinking.")
    target.without(reasoning_effort=thinking.effort)
    if thinking.budget_tokens is not None:
        return {"type": "enabled", "budget_tokens": thinking.budget_tokens}
    return {"type": "adaptive" if thinking.enabled else "disabled"}


def _tool(document: dict[str, Any]) -> Tool | None:
    fields = Fields(document)
    name, parameters = fields.take("name", str), fields.take("input_schema", dict)
    if name is None or parameters is None or "type" in fields.rest:  # the provider's own tools have a type
        return None
    description, strict = fields.take("description", str), fields.take("strict", bool)
    extensions = fields.extensions(PROVIDER)
    return Tool(name=name, description=description, parameters=parameters, strict=strict, provider_extensions=extensions)


def _written_tool(target: Target, tool: Tool) -> dict[str, Any]:
    own = target.own(tool, f"tools.{tool.name}.")
    schema = tool.parameters if tool.parameters is not None else {"type": "object", "properties": {}}
    return present(name=tool.name, description=tool.description, input_schema=schema, strict=tool.strict) | own


def _tool_choice(fields: Fields) -> ToolChoice:
    value = fields.rest.get("tool_choice")
    if not isinstance(value, dict):
        return ToolChoice()
    inner = Fields(value)
    kind, name, single = inner.take("type", str), inner.take("name", str), inner.take("disable_parallel_tool_use", bool)
    parallel = None if single is None else not single
    if inner.rest or (kind == "tool") != (name is not None) or kind not in (*_MODES, "tool"):
        return ToolChoice()
    del fields.rest["tool_choice"]
    names = [] if name is None else [name]
    return ToolChoice.model_validate({"mode": _MODES.get(kind, "required"), "names": names, "parallel": parallel})


def _written_choice(target: Target, choice: ToolChoice) -> dict[str, Any] | None:
    target.own(choice, "tool_choice.")
    if len(choice.names) > 1:
        raise target.refusal("a choice between several named tools")
    single = present(disable_parallel_tool_use=None if choice.parallel is None else not choice.parallel)
    if choice.names:
        return {"type": "tool", "name": choice.names[0], **single}
    if choice.mode is None:
        return {"type": "auto", **single} if single else None
    return {"type": {"required": "any"}.get(choice.mode, choice.mode), **single}


def _written_turns(target: Target, turns: list[Turn], extensions: dict[str, Any]) -> dict[str, Any]:
    """`system` and `messages`; instructions after the first message have no place there."""
    leading = 0
    while leading < len(turns) and turns[leading].role in ("system", "developer"):
        leading += 1
    written = {} if "messages" in extensions else {"messages": [_written(target, turn, at) for at, turn in enumerate(turns[leading:])]}
    if not leading:
        return written
    system = [_block(target, part, "system.") for turn in turns[:leading] for part in turn.parts]
    for turn in turns[:leading]:
        target.own(turn, "system.")
    plain = leading == 1 and turns[0].plain
    return {"system": system[0]["text"] if plain else system, **written}


def _written(target: Target, turn: Turn, at: int) -> dict[str, Any]:
    place = f"messages[{at}]."
    if turn.role in ("system", "developer"):
        raise target.refusal(f"{place}role {turn.role}")
    role = "assistant" if turn.role == "assistant" else "user"
    own = target.own(turn, place)
    if turn.plain and len(turn.parts) == 1 and isinstance(turn.parts[0], Text):
        return {"role": role, "content": turn.parts[0].text, **own}
    return {"role": role, "content": [_block(target, part, place) for part in turn.parts], **own}


def _block(target: Target, part: Part, place: str) -> Any:
    if isinstance(part, Opaque):
        return target.opaque(part, place + "content")
    own = target.own(part, place)
    if isinstance(part, Text):
        return {"type": "text", "text": part.text, **own}
    if isinstance(part, Image):
        return {"type": "image", "source": _source(part), **own}
    if isinstance(part, Reasoning):
        return {"type": "thinking", "thinking": part.text, **own}
    if isinstance(part, ToolCall):
        return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": _arguments(target, part, place), **own}
    block = {"type": "tool_result", "tool_use_id": part.call_id, **present(is_error=part.failed), **own}
    if part.value is not None:
        block["content"] = dump(part.value).decode()
    elif part.plain and isinstance(part.parts[0], Text):
        block["content"] = part.parts[0].text
    elif part.parts:
        block["content"] = [_block(target, inner, f"{place}tool_result.") for inner in part.parts]
    return block


def _arguments(target: Target, call: ToolCall, place: str) -> dict[str, Any]:
    try:
        arguments = load(call.arguments.encode())
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise target.refusal(f"{place}tool_calls.{call.name} with arguments that are no JSON object")
    return arguments


def _source(image: Image) -> dict[str, Any]:
    if image.data is not None:
        return {"type": "base64", "media_type": image.media_type, "data": image.data}
    url = image.url or ""
    head, _, data = url.partition(";base64,")
    if url.startswith("data:") and data:
        return {"type": "base64", "media_type": head.removeprefix("data:"), "data": data}
    return {"type": "url", "url": url}
