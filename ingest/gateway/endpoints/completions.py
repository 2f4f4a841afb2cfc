"""OpenAI's `/v1/completions`: passed through, read as chat completions whose deltas are texts."""

from __future__ import annotations

from typing import Any

from ingest.gateway.endpoints.base import OpenAiEndpoint
from ingest.gateway.endpoints.chat import ChatAnswer
from ingest.gateway.exchange import Exchange
from ingest.gateway.veil import Veil, completion_additions
from schemas.requests import ClientRequest, CompletionRequest, read_completion


class CompletionAnswer(ChatAnswer):
    """An answer of a completion. Only the prompt of a request with one prompt is the generation's prompt."""

    def __init__(self, veil: Veil, prompts: int) -> None:
        super().__init__(veil)
        self._one_prompt = prompts == 1

    def read(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """The chunk with a delta in place of the text."""
        return self._as_chat(event, "delta")

    def read_whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The completion with a message in place of the text."""
        return self._as_chat(answer, "message")

    def _as_chat(self, answer: dict[str, Any], part: str) -> dict[str, Any]:
        choices = answer.get("choices") or ()
        chat = {**answer, "choices": [_choice(choice, part) for choice in choices]}
        if self._one_prompt and choices and choices[0].get("prompt_token_ids"):
            chat["prompt_token_ids"] = choices[0]["prompt_token_ids"]
        return chat


def _choice(choice: dict[str, Any], part: str) -> dict[str, Any]:
    logprobs = choice.get("logprobs")
    return {**choice, part: {"content": choice.get("text")}, "logprobs": {"content": _scores(logprobs)} if logprobs else None}


def _scores(logprobs: dict[str, Any]) -> list[dict[str, Any]]:
    values, tops = logprobs.get("token_logprobs") or (), logprobs.get("top_logprobs") or ()
    scores = [{"token": token, "logprob": value} for token, value in zip(logprobs.get("tokens") or (), values, strict=True)]
    for score, top in zip(scores, tops, strict=False):
        if top and (len(top) > 1 or score["token"] not in top):  # with 0 logprobs, as the gateway asks, it is the token itself
            score["top_logprobs"] = [{"token": token, "logprob": value} for token, value in top.items()]
    return scores


class Completions(OpenAiEndpoint):
    """`/v1/completions`."""

    path = "/v1/completions"

    def read(self, exchange: Exchange, body: bytes) -> CompletionRequest:
        """The completion request of a body."""
        return read_completion(body)

    def additions(self, request: ClientRequest, kind: str) -> dict[str, Any]:
        """Token ids, logprobs, a seed and usage."""
        return completion_additions(request, kind)

    def answer(self, request: ClientRequest, extra: dict[str, Any], kind: str, fingerprint: str | None) -> CompletionAnswer:
        """A reader of texts."""
        return CompletionAnswer(Veil(extra, kind, request.n, fingerprint), len(request.messages))
