"""The one request schema: what may be asked of a language model, in no provider's words.

Each provider has a module that reads its documents into an `InferenceRequest` and writes them again; the two together are
the identity. What only one provider can say stands in `provider_extensions` under its name: it comes back where that
provider is the target and is refused by name where another one is, so nothing is ever dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Extensions = dict[str, dict[str, Any]]
"""Provider → the fields, by name, that only it has."""


class Model(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    provider_extensions: Extensions = {}


class Text(Model):
    """A piece of text."""

    kind: Literal["text"] = "text"
    text: str


class Image(Model):
    """A picture: at `url`, or as base64 `data` of a media type."""

    kind: Literal["image"] = "image"
    url: str | None = None
    data: str | None = None
    media_type: str | None = None


class Reasoning(Model):
    """What a model thought before it answered."""

    kind: Literal["reasoning"] = "reasoning"
    text: str


class ToolCall(Model):
    """A call that a model made. `arguments` is JSON text, valid or not; providers without ids leave `call_id` out."""

    kind: Literal["tool_call"] = "tool_call"
    call_id: str | None = None
    name: str
    arguments: str


class ToolResult(Model):
    """What a tool answered: `plain` where it is one bare text; `value` where it is a JSON object (Gemini)."""

    kind: Literal["tool_result"] = "tool_result"
    call_id: str | None = None
    name: str | None = None
    parts: list[Part] = []
    plain: bool = False
    value: dict[str, Any] | None = None
    failed: bool | None = None


class Opaque(Model):
    """A part that only its provider understands, as it was sent: audio, documents, server tools."""

    kind: Literal["opaque"] = "opaque"
    provider: str
    value: Any


Part = Annotated[Text | Image | Reasoning | ToolCall | ToolResult | Opaque, Field(discriminator="kind")]


class Turn(Model):
    """One message. `plain` where its text is a bare text and not a list of parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    parts: list[Part] = []
    plain: bool = False


def instructed(instructions: str | None, messages: list[Turn]) -> list[Turn]:
    """The messages, with the instructions as the first of them."""
    return messages if instructions is None else [Turn(role="system", parts=[Text(text=instructions)], plain=True), *messages]


def identified(messages: list[Turn]) -> list[Turn]:
    """The messages with an id for each call that has none, which the first result of the same name without one gets too."""
    waiting: list[ToolCall] = []
    given = 0

    def named(part: Part) -> Part:
        nonlocal given
        if isinstance(part, ToolCall) and part.call_id is None:
            given += 1
            part = part.model_copy(update={"call_id": f"call_{given}"})
            waiting.append(part)
        elif isinstance(part, ToolResult) and part.call_id is None:
            call = next((call for call in waiting if call.name == part.name), None)
            if call is not None:
                waiting.remove(call)
                part = part.model_copy(update={"call_id": call.call_id})
        return part

    return [turn.model_copy(update={"parts": [named(part) for part in turn.parts]}) for turn in messages]


class Sampling(Model):
    """How tokens are drawn."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None


class BeamSearch(Model):
    """Search instead of drawing: as many beams as sequences are asked for."""

    length_penalty: float | None = None


class StructuredOutput(Model):
    """What form the answer must have. `definition` is the JSON schema, regex, grammar or list of choices."""

    form: Literal["text", "json_object", "json_schema", "regex", "grammar", "choice"]
    name: str | None = None
    strict: bool | None = None
    definition: Any = None


class Thinking(Model):
    """Whether and how long to think before the answer: an effort in words or a budget of tokens."""

    enabled: bool | None = None
    effort: str | None = None
    budget_tokens: int | None = None


class GenerationParameters(Model):
    """Everything that bears on how the answer is made."""

    max_tokens: int | None = None
    n: int | None = None
    stop: list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    sampling: Sampling = Sampling()
    beam_search: BeamSearch | None = None
    structured_output: StructuredOutput | None = None
    thinking: Thinking | None = None


class Tool(Model):
    """A function that may be called. `parameters` is its JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Model):
    """Which tools may or must be called; `names` where they are limited to some."""

    mode: Literal["auto", "none", "required"] | None = None
    names: list[str] = []
    parallel: bool | None = None


class InferenceRequest(Model):
    """A request. `model` is the routing key."""

    model: str | None = None
    instructions: str | None = None  # what stands before all messages where a provider has a field for it
    messages: list[Turn] = []
    generation: GenerationParameters = GenerationParameters()
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = ToolChoice()
    stream: bool | None = None
    user: str | None = None
