"""Gemini's `generateContent` and `streamGenerateContent`: passed through before Gemini, translated before other upstreams."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs

from ingest.gateway.endpoints.base import FOREIGN, Answer, Sending
from ingest.gateway.endpoints.gemini_answers import Array, GeminiAnswer
from ingest.gateway.endpoints.translated import Reader, TranslatedAnswer, event, gemini_path, reader_of, to_upstream
from ingest.gateway.errors import GEMINI, GEMINI_ARRAY
from ingest.gateway.exchange import Exchange
from ingest.gateway.veil import chat_additions
from schemas.requests import ChatRequest, ClientRequest, dump, load
from schemas.requests.client import GeminiRequest, read_gemini
from schemas.requests.gemini import from_gemini

PREFIXES = ("/v1beta/models/", "/v1/models/")
"""Where Google's clients find models and what can be done with them."""

_FINISH_REASONS = {"stop": "STOP", "tool_calls": "STOP", "function_call": "STOP", "length": "MAX_TOKENS", "content_filter": "SAFETY"}

_NOTHING = {"text": ""}
"""What Google sends where an event of a stream says nothing: its clients drop an answer from their history of which one has no part."""


class Generate:
    """`generateContent`, or one of the two forms of `streamGenerateContent`: server-sent events, or one JSON array."""

    def __init__(self, *, stream: bool = False, array: bool = False) -> None:
        self.path = f"/v1beta/models:{'streamGenerateContent' if stream else 'generateContent'}"
        self.shape = GEMINI_ARRAY if array else GEMINI
        self._stream, self._array = stream, array

    def read(self, exchange: Exchange, body: bytes) -> GeminiRequest:
        """The request of a body, for the model in the path; an edit may name another."""
        model, _ = method_of(exchange.scope["path"])
        return read_gemini(body, model, stream=self._stream)

    def additions(self, request: ClientRequest, kind: str) -> dict[str, Any]:
        """What a chat request gets; nothing where another provider answers."""
        if kind in FOREIGN or not isinstance(request, GeminiRequest):
            return {}
        asked = {"stream": request.stream, "temperature": request.temperature, "seed": request.seed}
        return chat_additions(ChatRequest(b"", {**asked, "logprobs": request.config.get("responseLogprobs")}, []), kind)

    def sending(self, exchange: Exchange, request: ClientRequest, extra: dict[str, Any], kind: str) -> Sending:
        """The client's own bytes, or what they mean to another upstream.

        Raises:
            UsageError: the upstream cannot do what it asks for.
        """
        if kind != "gemini":
            asked = from_gemini(request.fields).model_copy(update={"stream": request.stream})
            return to_upstream(asked, extra, kind)
        query: bytes = exchange.scope["query_string"]
        if self._array:  # an array is complete in the end only; events can be recorded as they come
            query = b"&".join([*(part for part in query.split(b"&") if part and not part.startswith(b"alt=")), b"alt=sse"])
        return Sending(gemini_path(request.model or "", stream=self._stream), _without_model(request.body), query)

    def answer(self, request: ClientRequest, extra: dict[str, Any], kind: str, fingerprint: str | None) -> Answer:
        """A reader of Gemini's events, or a writer of them."""
        if kind == "gemini":
            return GeminiAnswer(array=self._array)
        return GenerateAnswer(request, reader_of(kind), array=self._array)


WHOLE, EVENTS, ARRAY = Generate(), Generate(stream=True), Generate(stream=True, array=True)


def method_of(path: str) -> tuple[str, str]:
    """The model and the method that a path names; no method where it only names a model."""
    for prefix in PREFIXES:
        if path.startswith(prefix):
            model, _, method = path.removeprefix(prefix).rpartition(":")
            return model, method
    return "", ""


def endpoint_of(path: str, query: bytes) -> Generate | None:
    """The endpoint of a path, None if there is none."""
    model, method = method_of(path)
    if not model or method not in ("generateContent", "streamGenerateContent"):
        return None
    if method == "generateContent":
        return WHOLE
    return EVENTS if parse_qs(query.decode("latin-1")).get("alt") == ["sse"] else ARRAY


def _without_model(body: bytes) -> bytes:
    """The body as it came; the model of one that was edited goes into the path."""
    if b'"model"' not in body:
        return body
    document = load(body)
    return dump({name: value for name, value in document.items() if name != "model"}) if "model" in document else body


class GenerateAnswer(TranslatedAnswer):
    """Writes the chunks of a chat completion as Gemini's answers.

    A tool call is one part there, so its pieces are held back until the sequence ends; so is the end, until usage is known.
    """

    def __init__(self, request: ClientRequest, reader: Reader, *, array: bool) -> None:
        super().__init__(b"text/event-stream" if request.stream and not array else b"application/json", reader)
        config = request.config if isinstance(request, GeminiRequest) else {}
        thinking = config.get("thinkingConfig")
        self._thoughts = isinstance(thinking, dict) and thinking.get("includeThoughts") is True
        self._scored = config.get("responseLogprobs") is True
        self._array = Array() if array else None
        self._calls: dict[int, dict[int, dict[str, str]]] = {}  # sequence → tool → the call as it grows
        self._ends: list[dict[str, Any]] = []
        self._head: dict[str, Any] = {"modelVersion": request.model}
        self._usage: dict[str, Any] = {}

    def write_chunk(self, chunk: dict[str, Any]) -> bytes:
        """What a chunk says already."""
        self._told(chunk)
        candidates = [candidate for choice in chunk.get("choices") or () if (candidate := self._piece(choice))]
        return self._event({"candidates": candidates, **self._head}) if candidates else b""

    def end(self, raw: bytes) -> bytes:
        """The calls, why each sequence ended, and what they cost."""
        last = self._event({"candidates": self._ends, "usageMetadata": _usage(self._usage), **self._head})
        return last + (self._array.end() if self._array else b"")

    def write_completion(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        self._told(completion)
        candidates = []
        for choice in completion["choices"]:
            index, message = choice.get("index") or 0, choice["message"]
            parts = self._parts(message)
            self._grow(index, message)
            end = self._end(index, choice)
            end["content"]["parts"] = [*parts, *end["content"]["parts"]]
            candidates.append(end | self._logprobs(choice))
        return {"candidates": candidates, "usageMetadata": _usage(self._usage), **self._head}

    def _event(self, value: dict[str, Any]) -> bytes:
        return self._array.entry(value) if self._array else event(value)

    def _told(self, answer: dict[str, Any]) -> None:
        told = {"modelVersion": answer.get("model"), "responseId": answer.get("id")}
        self._head |= {name: value for name, value in told.items() if value}
        self._usage = answer.get("usage") or self._usage

    def _piece(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        index, delta = choice.get("index") or 0, choice.get("delta") or {}
        parts, scores = self._parts(delta), self._logprobs(choice)
        self._grow(index, delta)
        if choice.get("finish_reason") is not None:
            end = self._end(index, choice)
            end["content"]["parts"] = end["content"]["parts"] or [_NOTHING]
            self._ends.append(end)
        return {"index": index, "content": {"role": "model", "parts": parts or [_NOTHING]}, **scores} if parts or scores else None

    def _parts(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        thought = said.get("reasoning") or said.get("reasoning_content")
        text = said.get("content") or said.get("refusal")
        thoughts = [{"text": thought, "thought": True}] if thought and self._thoughts else []
        return [*thoughts, {"text": text}] if text else thoughts

    def _grow(self, index: int, said: dict[str, Any]) -> None:
        for at, piece in enumerate(said.get("tool_calls") or ()):
            number = piece.get("index")
            call = self._calls.setdefault(index, {}).setdefault(at if number is None else number, {"id": "", "name": "", "arguments": ""})
            function = piece.get("function") or {}
            call["id"] = piece.get("id") or call["id"]
            call["name"] = function.get("name") or call["name"]
            call["arguments"] += function.get("arguments") or ""

    def _end(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        """The end of a sequence; a call whose arguments are no JSON object is what Google calls malformed, and is told as text."""
        parts, faults = [], []
        for call in self._calls.pop(index, {}).values():
            arguments = _object(call["arguments"] or "{}")
            if arguments is None or not call["name"]:
                faults.append(f"{call['name']}({call['arguments']})")
            else:
                parts.append({"functionCall": {"id": call["id"], "name": call["name"], "args": arguments}})
        reason = _FINISH_REASONS.get(str(choice["finish_reason"]), "OTHER")
        end: dict[str, Any] = {"index": index, "content": {"role": "model", "parts": parts}, "finishReason": reason}
        if faults:
            end |= {"finishReason": "MALFORMED_FUNCTION_CALL" if reason == "STOP" else reason, "finishMessage": "; ".join(faults)}
        return end

    def _logprobs(self, choice: dict[str, Any]) -> dict[str, Any]:
        scores = (choice.get("logprobs") or {}).get("content") if self._scored else None
        if not scores:
            return {}
        ids = choice.get("token_ids") or ()
        known: list[int | None] = list(ids) if len(ids) == len(scores) else [None] * len(scores)
        chosen = [_scored(score, token_id) for score, token_id in zip(scores, known, strict=True)]
        tops = [{"candidates": [_scored(top, None) for top in score.get("top_logprobs") or ()]} for score in scores]
        return {"logprobsResult": {"chosenCandidates": chosen, "topCandidates": tops}}


def _scored(score: dict[str, Any], token_id: int | None) -> dict[str, Any]:
    named = {} if token_id is None else {"tokenId": token_id}
    return {"token": score.get("token"), "logProbability": score.get("logprob"), **named}


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = load(text.encode("utf-8", "surrogatepass"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    counts = {"promptTokenCount": prompt, "candidatesTokenCount": completion - thought, "totalTokenCount": prompt + completion}
    return counts | ({"cachedContentTokenCount": cached} if cached else {}) | ({"thoughtsTokenCount": thought} if thought else {})
