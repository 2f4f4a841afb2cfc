"""Gemini's `generateContent`, from and to the one request schema; the model, which its clients put into the path, is a field here."""

from __future__ import annotations

import mimetypes
from typing import Any

from schemas.requests import openapi
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
    instructed,
)
from schemas.requests.jsontext import dump, load

PROVIDER = "gemini"

_MODES = {"AUTO": "auto", "ANY": "required", "NONE": "none"}
_LEVELS = ("minimal", "low", "medium", "high")
_ENUM = "text/x.enum"


def from_gemini(document: dict[str, Any]) -> InferenceRequest:
    """The request of a document in camel case; what it does not know stays in `provider_extensions`."""
    fields = Fields(document)
    system = _system(fields)
    contents = fields.objects("contents")
    read = [_turn(content) for content in contents or ()]
    if contents is not None and None in read:
        fields.rest["contents"], read = contents, []
    config = fields.take("generationConfig", dict)
    return InferenceRequest(
        model=fields.take("model", str),
        messages=[turn for turn in (system, *read) if turn],
        tools=_tools(fields),
        tool_choice=_tool_choice(fields),
        generation=GenerationParameters() if config is None else _generation(Fields(config)),
        provider_extensions=fields.extensions(PROVIDER),
    )


def to_gemini(request: InferenceRequest) -> dict[str, Any]:
    """The document for Gemini. Whether it streams is said by the path, which is the caller's.

    Raises:
        UsageError: it cannot do what the request asks for; `place` names it.
    """
    target = Target(PROVIDER, "a Gemini upstream")
    extensions = target.own(request)
    document = present(model=request.model, **_written_turns(target, instructed(request.instructions, request.messages), extensions))
    if config := _written_generation(target, request.generation):
        document["generationConfig"] = config
    elif PROVIDER in request.generation.provider_extensions:
        document["generationConfig"] = {}
    if request.tools is not None:
        document["tools"] = _written_tools(target, request.tools)
    return document | _written_choice(target, request.tool_choice) | extensions


def _generation(config: Fields) -> GenerationParameters:
    top_k = config.rest.get("topK")
    sampling = Sampling(
        temperature=config.number("temperature"),
        top_p=config.number("topP"),
        top_k=int(config.number("topK") or 0) if isinstance(top_k, float) and top_k.is_integer() else config.take("topK", int),
        seed=config.take("seed", int),
        frequency_penalty=config.number("frequencyPenalty"),
        presence_penalty=config.number("presencePenalty"),
    )
    return GenerationParameters(
        max_tokens=config.take("maxOutputTokens", int),
        n=config.take("candidateCount", int),
        stop=config.texts("stopSequences"),
        logprobs=config.take("responseLogprobs", bool),
        top_logprobs=config.take("logprobs", int),
        sampling=sampling,
        structured_output=_structured_output(config),
        thinking=_thinking(config),
        provider_extensions={PROVIDER: config.rest},
    )


def _written_generation(target: Target, parameters: GenerationParameters) -> dict[str, Any]:
    sampling = parameters.sampling
    target.own(sampling)
    target.without(beam_search=parameters.beam_search, min_p=sampling.min_p, repetition_penalty=sampling.repetition_penalty)
    config = present(
        maxOutputTokens=parameters.max_tokens,
        candidateCount=parameters.n,
        stopSequences=parameters.stop,
        responseLogprobs=parameters.logprobs,
        logprobs=parameters.top_logprobs,
        temperature=sampling.temperature,
        topP=sampling.top_p,
        topK=sampling.top_k,
        seed=sampling.seed,
        frequencyPenalty=sampling.frequency_penalty,
        presencePenalty=sampling.presence_penalty,
        thinkingConfig=_written_thinking(target, parameters.thinking),
    )
    return config | _written_output(target, parameters.structured_output) | target.own(parameters)


def _structured_output(config: Fields) -> StructuredOutput | None:
    """The form of the answer; a schema in Google's words is kept beside the JSON schema that it means."""
    form = config.rest.get("responseMimeType")
    google, schema = config.rest.get("responseSchema"), config.rest.get("responseJsonSchema")
    if form == _ENUM and schema is None and isinstance(google, dict) and google.keys() == {"type", "enum"} and google["type"] == "STRING":
        del config.rest["responseMimeType"], config.rest["responseSchema"]
        return StructuredOutput(form="choice", definition=google["enum"])
    if form == "text/plain" and google is None and schema is None:
        del config.rest["responseMimeType"]
        return StructuredOutput(form="text")
    if form != "application/json" or (google is not None and schema is not None):
        return None
    if google is None and schema is None:
        del config.rest["responseMimeType"]
        return StructuredOutput(form="json_object")
    definition = openapi.to_json_schema(google) if isinstance(google, dict) else schema
    if not isinstance(definition, dict):
        return None
    del config.rest["responseMimeType"]
    config.rest.pop("responseSchema" if google is not None else "responseJsonSchema")
    extensions = {PROVIDER: {"openapi": google}} if google is not None else {}
    return StructuredOutput(form="json_schema", definition=definition, provider_extensions=extensions)


def _written_output(target: Target, output: StructuredOutput | None) -> dict[str, Any]:
    if output is None:
        return {}
    own = target.own(output, "response_format.")
    if output.form == "choice":
        return {"responseMimeType": _ENUM, "responseSchema": {"type": "STRING", "enum": output.definition}}
    if output.form in ("regex", "grammar"):
        raise target.refusal(f"structured output by {output.form}")
    if output.form == "text":
        return {"responseMimeType": "text/plain"}
    if output.form == "json_object":
        return {"responseMimeType": "application/json"}
    schema = {"responseSchema": own["openapi"]} if "openapi" in own else {"responseJsonSchema": output.definition}
    return {"responseMimeType": "application/json", **schema}


def _thinking(config: Fields) -> Thinking | None:
    value = config.take("thinkingConfig", dict)
    if value is None:
        return None
    inner = Fields(value)
    level = inner.rest.get("thinkingLevel")
    effort = inner.rest.pop("thinkingLevel").lower() if isinstance(level, str) and level.lower() in _LEVELS and level.isupper() else None
    budget = inner.take("thinkingBudget", int)
    enabled = {0: False, -1: True}.get(1 if budget is None else budget)
    return Thinking(
        enabled=enabled, effort=effort, budget_tokens=budget if enabled is None else None, provider_extensions={PROVIDER: inner.rest}
    )


def _written_thinking(target: Target, thinking: Thinking | None) -> dict[str, Any] | None:
    """Clients of other providers get to see thoughts wherever there are any."""
    if thinking is None:
        return None
    own = target.own(thinking, "thinking.")
    foreign = PROVIDER not in thinking.provider_extensions
    if thinking.effort == "none" and foreign:
        return {"thinkingBudget": 0}
    if thinking.effort is not None and thinking.effort not in _LEVELS:
        raise target.refusal(f"reasoning_effort {thinking.effort}")
    budget = thinking.budget_tokens
    if budget is None and thinking.enabled is not None:
        budget = -1 if thinking.enabled else 0
    shown = True if foreign and budget != 0 else None
    return present(includeThoughts=shown, thinkingBudget=budget, thinkingLevel=thinking.effort.upper() if thinking.effort else None) | own


def _tools(fields: Fields) -> list[Tool] | None:
    """The functions of all groups; None, and left over, where there is another kind of tool or nothing to call."""
    groups = fields.rest.get("tools")
    if not isinstance(groups, list) or not all(isinstance(group, dict) and group.keys() == {"functionDeclarations"} for group in groups):
        return None
    tools: list[Tool | None] = []
    for at, group in enumerate(groups):
        declared = group["functionDeclarations"]
        if not isinstance(declared, list) or not declared:
            return None
        tools += [_tool(tool, at) if isinstance(tool, dict) else None for tool in declared]
    if None in tools:
        return None
    del fields.rest["tools"]
    return [tool for tool in tools if tool]


def _tool(document: dict[str, Any], group: int) -> Tool | None:
    fields = Fields(document)
    name, google = fields.take("name", str), fields.rest.get("parameters")
    if name is None or (google is not None and "parametersJsonSchema" in fields.rest):
        return None
    marks: dict[str, Any] = {"group": group} if group else {}
    parameters = fields.take("parametersJsonSchema", dict)
    if isinstance(google, dict):
        marks["openapi"] = fields.rest.pop("parameters")
        parameters = openapi.to_json_schema(google)
    description = fields.take("description", str)
    own = {**fields.rest, **marks}
    return Tool(name=name, description=description, parameters=parameters, provider_extensions={PROVIDER: own} if own else {})


def _written_tools(target: Target, tools: list[Tool]) -> list[dict[str, Any]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for tool in tools:
        own = target.own(tool, f"tools.{tool.name}.")
        if tool.strict:
            raise target.refusal(f"tools.{tool.name}.strict")
        google, group = own.pop("openapi", None), own.pop("group", 0)
        schema = {"parameters": google} if google is not None else present(parametersJsonSchema=tool.parameters)
        groups.setdefault(group, []).append(present(name=tool.name, description=tool.description) | schema | own)
    return [{"functionDeclarations": declared} for declared in groups.values()]


def _tool_choice(fields: Fields) -> ToolChoice:
    value = fields.rest.get("toolConfig")
    config = value.get("functionCallingConfig") if isinstance(value, dict) and value.keys() == {"functionCallingConfig"} else None
    if not isinstance(config, dict) or config.get("mode") not in _MODES or config.keys() - {"mode", "allowedFunctionNames"}:
        return ToolChoice()
    names = config.get("allowedFunctionNames", [])
    named = isinstance(names, list) and all(isinstance(name, str) for name in names) and (not names or config["mode"] == "ANY")
    if not named or ("allowedFunctionNames" in config and not names):
        return ToolChoice()
    del fields.rest["toolConfig"]
    return ToolChoice.model_validate({"mode": _MODES[config["mode"]], "names": names})


def _written_choice(target: Target, choice: ToolChoice) -> dict[str, Any]:
    target.own(choice, "tool_choice.")
    if choice.parallel is False:
        raise target.refusal("parallel_tool_calls false")
    if choice.mode is None:
        return {}
    mode = next(name for name, mode in _MODES.items() if mode == choice.mode)
    return {"toolConfig": {"functionCallingConfig": {"mode": mode, **({"allowedFunctionNames": choice.names} if choice.names else {})}}}


def _system(fields: Fields) -> Turn | None:
    value = fields.rest.get("systemInstruction")
    if not isinstance(value, dict) or not value.get("parts") or not isinstance(value["parts"], list):
        return None
    if not all(isinstance(part, dict) for part in value["parts"]):
        return None
    del fields.rest["systemInstruction"]
    inner = Fields(value)
    parts = [_part(part) for part in inner.rest.pop("parts")]
    return Turn(role="system", parts=parts, provider_extensions={PROVIDER: {f"system.{name}": value for name, value in inner.rest.items()}})


def _turn(content: dict[str, Any]) -> Turn | None:
    fields = Fields(content)
    parts = fields.objects("parts")
    role = fields.rest.pop("role", "user")
    if role not in ("user", "model") or parts is None:
        return None
    own = fields.rest if "role" in content else {**fields.rest, "bare": True}
    read = [_part(part) for part in parts]
    return Turn(role="assistant" if role == "model" else "user", parts=read, provider_extensions={PROVIDER: own} if own else {})


def _part(document: dict[str, Any]) -> Part:
    """A part of a content; opaque where it is not understood."""
    fields = Fields(document)
    readers = {"text": _text, "inlineData": _inline, "fileData": _file, "functionCall": _call, "functionResponse": _result}
    kinds = [name for name in readers if name in document]
    part = readers[kinds[0]](fields) if len(kinds) == 1 else None
    return part or Opaque(provider=PROVIDER, value=document)


def _text(fields: Fields) -> Text | Reasoning | None:
    text = fields.take("text", str)
    if text is None:
        return None
    if fields.rest.get("thought") is True:
        del fields.rest["thought"]
        return Reasoning(text=text, provider_extensions=fields.extensions(PROVIDER))
    return Text(text=text, provider_extensions=fields.extensions(PROVIDER))


def _inline(fields: Fields) -> Image | None:
    data = fields.take("inlineData", dict) or {}
    kind, encoded = data.get("mimeType"), data.get("data")
    if data.keys() != {"mimeType", "data"} or not isinstance(kind, str) or not isinstance(encoded, str) or not kind.startswith("image/"):
        return None
    return Image(data=encoded, media_type=kind, provider_extensions=fields.extensions(PROVIDER))


def _file(fields: Fields) -> Image | None:
    data = fields.take("fileData", dict) or {}
    kind, uri = data.get("mimeType"), data.get("fileUri")
    if data.keys() != {"mimeType", "fileUri"} or not isinstance(kind, str) or not isinstance(uri, str):
        return None
    if not kind.startswith("image/") or uri.startswith("data:"):
        return None
    return Image(url=uri, media_type=kind, provider_extensions=fields.extensions(PROVIDER))


def _call(fields: Fields) -> ToolCall | None:
    call = Fields(fields.take("functionCall", dict) or {})
    call_id, name, arguments = call.take("id", str), call.take("name", str), call.take("args", dict)
    if name is None or arguments is None or call.rest:
        return None
    return ToolCall(call_id=call_id, name=name, arguments=dump(arguments).decode(), provider_extensions=fields.extensions(PROVIDER))


def _result(fields: Fields) -> ToolResult | None:
    result = Fields(fields.take("functionResponse", dict) or {})
    call_id, name, value = result.take("id", str), result.take("name", str), result.take("response", dict)
    if name is None or value is None or result.rest:
        return None
    return ToolResult(call_id=call_id, name=name, value=value, provider_extensions=fields.extensions(PROVIDER))


def _written_turns(target: Target, turns: list[Turn], extensions: dict[str, Any]) -> dict[str, Any]:
    """`systemInstruction` and `contents`; instructions after the first message have no place there."""
    leading = 0
    while leading < len(turns) and turns[leading].role in ("system", "developer"):
        leading += 1
    written: dict[str, Any] = {}
    if leading:
        writer = _Contents(target)
        parts = [writer.part(part, "system.") for turn in turns[:leading] for part in turn.parts]
        own = {name.removeprefix("system."): value for turn in turns[:leading] for name, value in target.own(turn, "system.").items()}
        written["systemInstruction"] = {"parts": parts, **own}
    if "contents" not in extensions:
        written["contents"] = _Contents(target).write(turns[leading:])
    return written


class _Contents:
    """Writes turns as contents; a tool's result, which other providers know by its call's id, gets the name of the call."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._names: dict[str | None, str] = {}

    def write(self, turns: list[Turn]) -> list[dict[str, Any]]:
        """The contents; the results of several calls, each a message elsewhere, are one."""
        contents: list[dict[str, Any]] = []
        before = ""
        for at, turn in enumerate(turns):
            content = self._content(turn, f"messages[{at}].")
            if before == turn.role == "tool":
                contents[-1]["parts"] += content["parts"]
            else:
                contents.append(content)
            before = turn.role
        return contents

    def _content(self, turn: Turn, place: str) -> dict[str, Any]:
        if turn.role in ("system", "developer"):
            raise self._target.refusal(f"{place}role {turn.role}")
        own = self._target.own(turn, place)
        role = {} if own.pop("bare", False) else {"role": "model" if turn.role == "assistant" else "user"}
        return {**role, "parts": [self.part(part, place) for part in turn.parts], **own}

    def part(self, part: Part, place: str) -> Any:
        """One part."""
        if isinstance(part, Opaque):
            return self._target.opaque(part, f"{place}content")
        own = self._target.own(part, place)
        if isinstance(part, Text):
            return {"text": part.text, **own}
        if isinstance(part, Reasoning):
            return {"text": part.text, "thought": True, **own}
        if isinstance(part, Image):
            return {**self._image(part, place), **own}
        if isinstance(part, ToolCall):
            self._names[part.call_id] = part.name
            call = present(id=part.call_id, name=part.name, args=self._arguments(part, place))
            return {"functionCall": call, **own}
        return {"functionResponse": self._result(part, place), **own}

    def _image(self, image: Image, place: str) -> dict[str, Any]:
        if image.data is not None:
            return {"inlineData": {"mimeType": image.media_type, "data": image.data}}
        url = image.url or ""
        head, _, data = url.partition(";base64,")
        if url.startswith("data:") and data:
            return {"inlineData": {"mimeType": head.removeprefix("data:"), "data": data}}
        kind = image.media_type or mimetypes.guess_type(url.partition("?")[0])[0]
        if kind is None:
            raise self._target.refusal(f"{place}an image at an address that does not tell its type")
        return {"fileData": {"mimeType": kind, "fileUri": url}}

    def _arguments(self, call: ToolCall, place: str) -> dict[str, Any]:
        try:
            arguments = load(call.arguments.encode())
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise self._target.refusal(f"{place}tool_calls.{call.name} with arguments that are no JSON object")
        return arguments

    def _result(self, result: ToolResult, place: str) -> dict[str, Any]:
        name = self._names.get(result.call_id) if result.name is None else result.name
        if name is None:
            raise self._target.refusal(f"{place}a tool's result without a call before it")
        value = result.value
        if value is None:
            if any(not isinstance(part, Text) for part in result.parts):
                raise self._target.refusal(f"{place}a tool's result that is not text")
            text = "".join(part.text for part in result.parts if isinstance(part, Text))
            value = {"error" if result.failed else "output": text}
        return present(id=result.call_id, name=name, response=value)
