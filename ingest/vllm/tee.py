"""A tee around an engine in one's own process: what its caller gets is recorded, as it is got.

    from tokentape.vllm_plugin import record

    engine = record(AsyncLLM.from_engine_args(arguments))   # or record(LLM(model))

It sees what the caller sees: texts, stop strings, n sequences in one. Steps and schedules only the engine's own capture sees.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from ingest.recorder import Recorder
from ingest.vllm.tap import marshal_safe
from schemas import events as e
from schemas.settings import Settings
from schemas.sink import SessionContext, new_id

DELTA = "DELTA"
"""Name of vLLM's kind of output that holds only what is new."""


class Tee:
    """Records the requests of one engine."""

    def __init__(self, recorder: Recorder, settings: Settings, model: str | None) -> None:
        self._recorder, self._settings, self.model = recorder, settings, model
        policy = settings.redaction.of(settings.tenant)
        self._content = policy.content == "full" and not policy.builtin and not policy.rules
        self._heard: dict[str, _Heard] = {}

    def around(self, engine: Any) -> Any:
        """The engine, an `AsyncLLM` or an `LLM`, with its outputs recorded from now on."""
        if hasattr(engine, "llm_engine"):
            self._around_steps(engine.llm_engine)
        else:
            self._around_streams(engine)
        return engine

    def _around_streams(self, engine: Any) -> None:
        generate = engine.generate

        async def recorded(prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            heard = self._begin(request_id, sampling_params)
            try:
                async for output in generate(prompt, sampling_params, request_id, *args, **kwargs):
                    heard.output(output)
                    yield output
            except BaseException as error:
                heard.failed(error)
                raise
            finally:
                heard.left()
                self._heard.pop(request_id, None)

        engine.generate = recorded

    def _around_steps(self, engine: Any) -> None:
        add_request, step = engine.add_request, engine.step

        def add(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            added = add_request(request_id, prompt, params, *args, **kwargs)
            self._begin(request_id, params)
            return added

        def stepped() -> Any:
            outputs = step()
            for output in outputs:
                if heard := self._heard.get(output.request_id):
                    heard.output(output)
                    if output.finished:
                        del self._heard[output.request_id]
            return outputs

        engine.add_request, engine.step = add, stepped

    def _begin(self, request_id: str, parameters: Any) -> _Heard:
        session = SessionContext(new_id(), self._settings.tenant, "sdk", "", self._settings.retention_class, content=self._content)
        heard = self._heard[request_id] = _Heard(self._recorder, session, self.model, request_id, parameters)
        return heard


class _Heard:
    """One request and what came of it."""

    def __init__(self, recorder: Recorder, session: SessionContext, model: str | None, request_id: str, parameters: Any) -> None:
        self._recorder, self._session, self._model, self._request_id = recorder, session, model, request_id
        self._generation_id = new_id()
        self._begun_ns = time.monotonic_ns()
        self._deltas = getattr(getattr(parameters, "output_kind", None), "name", "") == DELTA
        self._places: dict[int, tuple[int, int]] = {}  # tokens and characters that are recorded of each sequence
        self._ended: set[int] = set()
        self._started = self._over = False
        self._n = getattr(parameters, "n", 1)
        self._first_token_us: int | None = None
        self._cached: int | None = None
        self._prompt_tokens: int | None = None
        self._record(e.SessionOpened(client="vllm in process"))
        fields: dict[str, Any] = {name: getattr(parameters, name, None) for name in ("seed", "temperature", "max_tokens")}
        said = json.dumps(marshal_safe(_fields(parameters)), sort_keys=True, default=str)
        content = e.RequestContent(parameters=said)
        self._record(
            e.RequestSubmitted(
                generation_id=self._generation_id,
                endpoint="engine.generate",
                model=model,
                n=self._n,
                client_request_id=request_id,
                content=content,
                **fields,
            )
        )

    def output(self, output: Any) -> None:
        """A `RequestOutput` came."""
        offset_us = self._now_us()
        if not self._started:
            self._start(output, offset_us)
        self._cached = getattr(output, "num_cached_tokens", None) or self._cached
        for part in output.outputs:
            self._part(part, offset_us)
        if output.finished:
            self._finish(offset_us)

    def failed(self, error: BaseException) -> None:
        """The engine raised, or its caller went away."""
        if self._over:
            return
        self._over = True
        gone = isinstance(error, GeneratorExit) or type(error).__name__ == "CancelledError"
        kind, origin = ("client_disconnected", "client") if gone else ("upstream_error", "engine")
        content = e.FailureContent(message="" if gone else str(error)[:4096])
        position = sum(tokens for tokens, _ in self._places.values())
        self._record(
            e.GenerationFailed(
                generation_id=self._generation_id,
                error_type=kind,
                origin=origin,
                position=position,
                offset_us=self._now_us(),
                content=content,
            )
        )

    def left(self) -> None:
        """The stream is over: if the engine said no end, its caller went away."""
        self.failed(GeneratorExit())

    def _start(self, output: Any, offset_us: int) -> None:
        self._started = True
        ids = list(output.prompt_token_ids or ())
        self._prompt_tokens = len(ids)
        self._record(
            e.GenerationStarted(
                generation_id=self._generation_id,
                authoritative="sdk",
                upstream_id=self._request_id,
                model=self._model,
                prompt_tokens=len(ids),
                offset_us=offset_us,
                content=e.GenerationContent(prompt_token_ids=ids),
            )
        )

    def _part(self, part: Any, offset_us: int) -> None:
        if part.index not in self._places:
            self._record(e.SequenceStarted(generation_id=self._generation_id, index=part.index, offset_us=offset_us))
        tokens, characters = self._places.get(part.index, (0, 0))
        ids, text, scores = list(part.token_ids), part.text or "", list(part.logprobs or ())
        if not self._deltas:
            ids, text, scores = ids[tokens:], text[characters:], scores[tokens:]
        self._places[part.index] = (tokens + len(ids), characters + len(text))
        if ids or text:
            self._first_token_us = offset_us if self._first_token_us is None else self._first_token_us
            logprobs = [step[token].logprob for token, step in zip(ids, scores, strict=False)]
            self._recorder.tokens(
                self._session, self._generation_id, part.index, tokens, offset_us, token_ids=ids, text=text, logprobs=logprobs
            )
        if part.finish_reason is not None and part.index not in self._ended:
            self._ended.add(part.index)
            stop = None if part.stop_reason is None else str(part.stop_reason)
            self._record(
                e.SequenceFinished(
                    generation_id=self._generation_id,
                    index=part.index,
                    tokens=self._places[part.index][0],
                    finish_reason=part.finish_reason,
                    stop_reason=stop,
                    offset_us=offset_us,
                )
            )

    def _finish(self, offset_us: int) -> None:
        self._over = True
        tokens = sum(count for count, _ in self._places.values())
        self._record(
            e.GenerationFinished(
                generation_id=self._generation_id,
                sequences=len(self._places),
                tokens_recorded=tokens,
                prompt_tokens=self._prompt_tokens,
                completion_tokens=tokens,
                cached_tokens=self._cached,
                first_token_us=self._first_token_us,
                offset_us=offset_us,
            )
        )

    def _now_us(self) -> int:
        return (time.monotonic_ns() - self._begun_ns) // 1000

    def _record(self, payload: e.Payload) -> None:
        self._recorder.record(self._session, payload)


def _fields(parameters: Any) -> dict[str, Any]:
    """The sampling parameters that were set, as plain values."""
    names = getattr(type(parameters), "__struct_fields__", ())
    return {name: value for name in names if (value := getattr(parameters, name)) is not None and not name.startswith("_")}
