"""An engine over HTTP: any OpenAI-compatible server says requests again; vLLM also scores recorded tokens.

Tokens are forced by sending them as the end of a prompt to `/v1/completions` with `prompt_logprobs`: the engine then reports
what it thinks of each token of the prompt, without sampling any. That takes one prefill and disables the prefix cache for
it. The logprobs are those before penalties, masks and temperature.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, urlsplit

from replay.engines.answers import completed, generated, scored
from replay.engines.base import Forced, Generated, Refused, Request, Scored, SomeFailed
from replay.words import printable, shorten
from schemas.errors import EngineUnavailable, RequestFailed, UsageError
from schemas.events import EnvironmentCaptured
from schemas.probe import questions
from schemas.requests.recorded import CHAT, COMPLETIONS, SHAPING, as_chat, as_generation

CONNECT_TIMEOUT_S = 10.0
"""An address that takes longer to connect is no engine that could be replayed against."""
ANSWER_BYTES_MAX = 1 << 30
"""A longer answer is not read: scores of a million tokens take about 150 MB."""
REASON_CHARACTERS = 300
"""Of a server's own words, what goes into a reason."""
ALTERNATIVES_MAX = 20
"""A server reports no more of the likeliest tokens than its --max-logprobs, 20 unless it was started with another."""
BEHIND = 1
"""vLLM's priority of work that nobody waits for; what names none has 0 and goes first."""
PARALLEL = 32
"""Requests that are sent at once where the engine may work on several."""
BUSY = (429, 503)
"""Statuses with which a server may say when to come again (Retry-After)."""
AGAIN_S_MIN, PATIENCE_S = 0.1, 65.0
"""What is waited at least, and in all, for a server that says so: limits of gateways are by the minute."""
CUTTING = ("truncate_prompt_tokens",)
"""Fields that shape a chat's prompt and that vLLM's /tokenize does not take."""
SEEDED_CRASH = "vLLM on a CPU ends when a seeded request's prompt is split by chunked prefill: start it with --no-enable-chunked-prefill"

T = TypeVar("T")
R = TypeVar("R")


class Answer(NamedTuple):
    """A server's answer: status and JSON value, None where the body is not JSON."""

    status: int
    value: Any


class OpenAIEngine:
    """A server at `url` (with or without /v1). `model` stands in for the recorded model's name where it is served under another."""

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float = 300.0, background: bool = False
    ) -> None:
        """With `background` requests go behind interactive ones, at a gateway and at a vLLM that schedules by priority."""
        self._url = _base(url)
        self._model, self._key, self._timeout_s, self._background = model, api_key, timeout_s, background
        self._ranked = background  # until the server says that it knows no such field
        self._connection: http.client.HTTPConnection | None = None

    @property
    def name(self) -> str:
        """`openai` and the address, without credentials."""
        return f"openai {self.place}" + (f" model {self._model}" if self._model else "")

    @property
    def place(self) -> str:
        """The address without credentials."""
        port = f":{self._url.port}" if self._url.port else ""
        return f"{self._url.scheme}://{self._url.hostname}{port}{self._url.path}"

    def fingerprint(self, recorded: EnvironmentCaptured | None = None) -> EnvironmentCaptured:
        """The environment as it answers the same questions that the gateway asks of its upstream.

        Raises:
            EngineUnavailable: the server does not answer.
        """
        asking = questions(previous=recorded)
        try:
            ask = next(asking)
            while True:
                method = "GET" if ask.body is None else "POST"
                status, content = self._exchange(method, ask.path, ask.body)
                ask = asking.send(content if status == 200 else None)
        except StopIteration as end:
            event: EnvironmentCaptured = end.value
            return event

    def generate(self, request: Request) -> Generated | Refused:
        """The answer to a request, not streamed, with ids and logprobs where the server tells them.

        What went to another endpoint is asked as the chat completion that says the same, if there is one; a completion of
        token ids is asked as it is.

        Raises:
            EngineUnavailable: the server does not answer.
        """
        prompt = request.document.get("prompt")
        if request.endpoint == COMPLETIONS and isinstance(prompt, list) and all(isinstance(token, int) for token in prompt):
            answer = self._say(COMPLETIONS, request, {**request.document, "logprobs": 1})
            return completed(answer.value, prompt) if answer.status == 200 else self._refused(answer, request)
        try:
            asked = as_chat(request.endpoint, request.document)
        except UsageError as error:
            return Refused(str(error.fault))
        answer = self._say(CHAT, request, {**asked, "logprobs": True})
        if answer.status != 200:
            return self._refused(answer, request)
        return generated(answer.value) or Refused("its answer is no chat completion")

    def _say(self, path: str, request: Request, document: dict[str, Any]) -> Answer:
        """Ask for an answer, not streamed, with its token ids."""
        document = {**document, "model": self._model or request.model, "stream": False, "return_token_ids": True}
        document.pop("stream_options", None)
        try:
            return self._post(path, document)
        except EngineUnavailable as error:
            if document.get("seed") is not None:
                error.hint = f"{error.hint}; {SEEDED_CRASH}"
            raise

    def force(self, request: Request, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> Scored | Refused:
        """Logprob, rank and top logprob of each token, by prefill.

        A sequence that fills the context to its end is scored without its last token, as one must be left to sample.

        Raises:
            EngineUnavailable: the server does not answer.
        """
        found = self._score(request, prompt_token_ids, token_ids)
        if isinstance(found, Refused) and request.alternatives > 1 and "logprobs" in found.reason:
            return self.force(replace(request, alternatives=0), prompt_token_ids, token_ids)
        if isinstance(found, Refused) and _no_room(found) and len(token_ids) > 1:
            shorter = self._score(request, prompt_token_ids, token_ids[:-1])
            return shorter.with_last_unknown() if isinstance(shorter, Scored) else found
        return found

    def _score(self, request: Request, prompt_token_ids: tuple[int, ...], token_ids: tuple[int, ...]) -> Scored | Refused:
        ids = [*prompt_token_ids, *token_ids]
        model = self._model or request.model
        likeliest = max(1, min(request.alternatives, ALTERNATIVES_MAX))
        body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": likeliest}
        answer = self._post(COMPLETIONS, body)
        if answer.status != 200:
            return self._refused(answer, request)
        return scored(answer.value, ids, len(prompt_token_ids), alternatives=request.alternatives > 1)

    def render(self, request: Request) -> tuple[int, ...] | Refused:
        """The ids of the prompt, from vLLM's /tokenize.

        Raises:
            EngineUnavailable: the server does not answer.
        """
        try:
            asked = as_generation(request.endpoint, request.document)
        except UsageError as error:
            return Refused(str(error.fault))
        if cut := [name for name in CUTTING if asked.get(name) is not None]:
            return Refused(f"/tokenize cuts no prompt, as {cut[0]} asks for")
        document = {name: value for name, value in asked.items() if name in ("prompt", *SHAPING)}
        answer = self._post("/tokenize", {"model": self._model or request.model, **_for_tokenize(document)})
        tokens = answer.value.get("tokens") if isinstance(answer.value, dict) else None
        if answer.status == 200 and isinstance(tokens, list):
            return tuple(tokens)
        return self._refused(answer, request) if answer.status != 404 else Refused("it has no /tokenize: prompts are rendered by vLLM only")

    def models(self) -> list[str]:
        """What it serves; none where it does not tell.

        Raises:
            EngineUnavailable: the server does not answer.
        """
        status, content = self._exchange("GET", "/v1/models", None)
        try:
            return [str(entry["id"]) for entry in json.loads(content)["data"]] if status == 200 else []
        except (ValueError, KeyError, TypeError):
            return []

    def check_model(self) -> None:
        """Whether the server takes the name that stands in for the recorded ones; one that does not answer or tell is not asked.

        Raises:
            UsageError: it serves others.
        """
        with suppress(EngineUnavailable):
            served = self.models() if self._model else []
            if not served or self._model in served:
                return
            # Some take names that they do not list.
            answer = self._post(COMPLETIONS, {"model": self._model, "prompt": "a", "max_tokens": 1})
            if answer.status == 404 and "model" in _words(answer.value).lower():
                hint = f"it serves {', '.join(served)}; --model names one of them"
                raise UsageError(f"{self.place} serves no model {self._model!r}", operation="read --model", hint=hint)

    def generate_all(self, requests: Sequence[Request]) -> list[Generated | Refused]:
        """Up to `PARALLEL` at once, each over a connection of its own."""
        return self._all(lambda engine, request: engine.generate(request), requests)

    def force_all(self, several: Sequence[Forced]) -> list[Scored | Refused]:
        """Up to `PARALLEL` at once, each over a connection of its own."""
        return self._all(lambda engine, each: engine.force(each.request, each.prompt_token_ids, each.token_ids), several)

    def _all(self, ask: Callable[[OpenAIEngine, T], R], several: Sequence[T]) -> list[R]:
        def one(each: T) -> R | RequestFailed:
            engine = OpenAIEngine(self.place, model=self._model, api_key=self._key, timeout_s=self._timeout_s, background=self._background)
            try:
                return ask(engine, each)
            except RequestFailed as error:
                return error
            finally:
                engine.close()

        with ThreadPoolExecutor(PARALLEL, "engine") as pool:
            answers = list(pool.map(one, several))
        found = [answer for answer in answers if not isinstance(answer, RequestFailed)]
        if len(found) < len(answers):
            raise SomeFailed(answers)
        return found

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _refused(self, answer: Answer, request: Request) -> Refused:
        """Why the server will not, in its own words.

        Raises:
            RequestFailed: it may do so later, or with another key.
        """
        words = _words(answer.value)
        if answer.status in (401, 403):
            hint = "give the server's API key; recorded requests hold none"
            raise RequestFailed(f"status {answer.status}: {words}", operation="ask engine", place=self.place, hint=hint)
        if answer.status in (408, 429) or answer.status >= 500:
            hint = "wait until the server has settled and replay again"
            raise RequestFailed(f"status {answer.status}: {words}", operation="ask engine", place=self.place, hint=hint)
        if answer.status in (404, 405, 501) and "model" not in words.lower():
            return Refused("it has no /v1/completions: recorded tokens are scored by vLLM only")
        cure = "" if self._model or answer.status != 404 else "; name the model to use instead"
        return Refused(f"it refused model {request.model!r} (status {answer.status}): {words}{cure}")

    def _post(self, path: str, document: dict[str, Any]) -> Answer:
        if self._ranked and path in (CHAT, COMPLETIONS):
            answer = self._posted(path, {**document, "priority": BEHIND})
            if answer.status != 400 or "priority" not in _words(answer.value).lower():
                return answer
            self._ranked = False
        return self._posted(path, document)

    def _posted(self, path: str, document: dict[str, Any]) -> Answer:
        status, content = self._exchange("POST", path, json.dumps(document).encode())
        try:
            return Answer(status, json.loads(content))
        except ValueError:
            return Answer(status, None)

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        """A server's answer; one that says when it will have room is asked again then, if that is soon."""
        patience_s = PATIENCE_S
        while True:
            status, content, again_s = self._asked(method, path, body)
            patience_s -= max(again_s, AGAIN_S_MIN)
            if status not in BUSY or patience_s < 0:
                return status, content
            time.sleep(max(again_s, AGAIN_S_MIN))

    def _asked(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes, float]:
        while True:
            kept = self._connection is not None
            try:
                return self._once(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # A kept connection may have been closed meanwhile; a fresh one tells the truth.
                if not (kept and isinstance(error, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError)):
                    raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> RequestFailed:
        if isinstance(error, TimeoutError):
            hint = f"it had {self._timeout_s:g} s; a long sequence on a busy engine may need more"
            return RequestFailed("no answer in time", operation="ask engine", place=self.place, hint=hint)
        what = printable(str(error)) or type(error).__name__
        hint = "start the engine, or name another with --engine"
        return RequestFailed(f"does not answer: {what}", operation="ask engine", place=self.place, hint=hint)

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes, float]:
        """Status, body, and after how many seconds to ask again: infinite where it does not say."""
        connection = self._connection or self._connect()
        connection.request(method, self._url.path + path, body, self._headers())
        answer = connection.getresponse()
        again = (answer.getheader("retry-after") or "").strip()
        return answer.status, answer.read(ANSWER_BYTES_MAX), float(again) if again.isdecimal() else math.inf

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._url.hostname or "", self._url.port
        if self._url.scheme == "https":
            secure = ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(host, port, timeout=CONNECT_TIMEOUT_S, context=secure)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=CONNECT_TIMEOUT_S)
        connection.connect()
        connection.sock.settimeout(self._timeout_s)
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        return connection

    def _headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json", "accept": "application/json"}
        if self._background:
            headers["x-tokentape-priority"] = "batch"
        return {**headers, "authorization": f"Bearer {self._key}"} if self._key else headers


def _base(url: str) -> SplitResult:
    """The address without /v1, query and credentials.

    Raises:
        UsageError: not an HTTP address.
    """
    hint = "give an address such as http://127.0.0.1:8000"
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError as error:
        raise UsageError(f"{url!r} is no address: {error}", operation="read --engine", hint=hint) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is no HTTP address", operation="read --engine", hint=hint)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/").removesuffix("/v1")
    return SplitResult(parts.scheme, host if port is None else f"{host}:{port}", path, "", "")


def _for_tokenize(document: dict[str, Any]) -> dict[str, Any]:
    """What shapes a chat's prompt in the words of /tokenize, which takes as arguments of the template what a chat names itself."""
    own: dict[str, Any] = {name: document.pop(name) for name in ("documents", "reasoning_effort") if document.get(name) is not None}
    given = document.get("chat_template_kwargs") or {}
    if "reasoning_effort" in own and "enable_thinking" not in given:
        own["enable_thinking"] = own["reasoning_effort"] != "none"
    return {**document, "chat_template_kwargs": {**given, **own}} if own else document


def _words(value: Any) -> str:
    """A server's own explanation on one line."""
    if isinstance(value, dict):
        error = value.get("error", value)
        message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        if message:
            return shorten(str(message), REASON_CHARACTERS)
    return "no explanation"


def _no_room(refused: Refused) -> bool:
    return any(words in refused.reason for words in ("max_tokens", "context length", "max_model_len", "maximum model length"))
