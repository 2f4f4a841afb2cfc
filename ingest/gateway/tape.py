"""What happens in one generation, as events: each method is one fact, and the first ending counts.

Reads every answer in the words of chat completions (`choices`, `delta`, `token_ids`). Nothing here waits.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

from ingest.attachments import Deferred
from ingest.gateway.answers import Choice, Segment, align, alternatives_of, segments_of_delta, segments_of_message, spread
from ingest.gateway.conversations import Said
from ingest.gateway.errors import Failure
from ingest.gateway.runs import Run
from ingest.gateway.sessions import Session
from ingest.redaction import SECRET, Redactor
from schemas.events import (
    Alternative,
    Count,
    EnvironmentCaptured,
    FailureContent,
    GenerationContent,
    GenerationFailed,
    GenerationFinished,
    GenerationStarted,
    Message,
    Payload,
    RequestContent,
    RequestSubmitted,
    SequenceFinished,
    SequenceStarted,
    SessionAnnotated,
    SessionOpened,
    ToolCall,
    ToolCallContent,
)
from schemas.requests import ClientRequest, dump, long_of, text_of
from schemas.sink import SessionContext, new_id

UNREADABLE_BYTES_MAX = 32 << 10
"""Of a body that is no request this much is recorded; the digest is over all of it."""

ERROR_CHARACTERS_MAX = 4096
"""Of an error message this much is recorded."""


class Recording(Protocol):
    """The recorder, as the gateway uses it."""

    def record(self, session: SessionContext, payload: Payload | Deferred) -> None:
        """Record one event."""

    def tokens(
        self,
        session: SessionContext,
        generation_id: bytes,
        index: int,
        position: int,
        offset_us: int,
        *,
        channel: str = "content",
        token_ids: Sequence[int] = (),
        text: str = "",
        logprobs: Sequence[float] = (),
        alternatives: Sequence[Sequence[Alternative]] = (),
    ) -> int:
        """Record one delta of a sequence and return the position of the next."""

    def run(
        self,
        session: SessionContext,
        generation_id: bytes,
        index: int,
        position: int,
        offset_us: int,
        token_ids: Sequence[int],
        texts: Sequence[str],
        logprobs: Sequence[float],
    ) -> int:
        """Record tokens of content that came at once, one text and one logprob each, and return the position of the next."""

    async def durable(self) -> None:
        """Return when all that was recorded is durable."""


class Tape:
    """One generation on its way to the recorder."""

    def __init__(self, recorder: Recording, session: Session, redactor: Redactor, endpoint: str) -> None:
        self.generation_id = new_id()
        self.session = session
        self.ended = False
        self.fingerprint: str | None = None
        self._recorder = recorder
        self._context = session.context
        self._redactor = redactor
        self._endpoint = endpoint
        self.started = False
        self.queued_us = 0
        self._prompt_tokens = 0
        self._named: tuple[str | None, bytes | None] = (None, None)  # the upstream and the environment that the request named
        self._upstream: str | None = None  # the one that answers
        self._environment: Callable[[], EnvironmentCaptured | None] | None = None
        self._attempt = 1
        self._status = 200
        self._begun_ns = time.monotonic_ns()
        self._keep_prompt = True
        self._choices: dict[int, Choice] = {}
        self._usage: dict[str, Any] = {}
        self._numbered = False  # token ids came
        self._results = 0  # of an answer that has no sequences
        self._first_token_us: int | None = None

    @cached_property
    def name(self) -> str:
        """The generation id as people write it."""
        return str(uuid.UUID(bytes=self.generation_id))

    def clean(self, text: str | None) -> str | None:
        """A text without secrets."""
        return self._redactor.clean(text)

    def now_us(self) -> int:
        """Microseconds since the request was forwarded, or since it came if it never was."""
        return (time.monotonic_ns() - self._begun_ns) // 1000

    def move(self, session: Session) -> None:
        """The generation belongs to this session; nothing of it MUST have been recorded yet."""
        self.session = session
        self._context = session.context

    def opened(self, facts: dict[str, Any]) -> None:
        """The session gets its first event, or, if it has one, the tags that are new; `facts` are fields of `session_opened`."""
        if self.session.opened:
            return self.tagged(facts["tags"])
        self.session.opened = True
        self.session.tags.update(facts["tags"])
        return self._record(SessionOpened(**facts))

    def tagged(self, tags: Sequence[str]) -> None:
        """A request of a session that has its first event names these tags: those that are new are recorded."""
        if new := [tag for tag in tags if tag not in self.session.tags]:
            self.session.tags.update(new)
            self._record(SessionAnnotated(tags_added=new))

    @property
    def answers(self) -> list[Said]:
        """What each sequence said so far, none that said nothing."""
        tools = [[choice.tools[at] for at in sorted(choice.tools)] for choice in self._choices.values()]
        calls = [tuple((call.name or "", "".join(call.arguments)) for call in called) for called in tools]
        said = [Said(choice.text, called) for choice, called in zip(self._choices.values(), calls, strict=True)]
        return [one for one in said if one.text or one.calls]

    def environment(self, event: EnvironmentCaptured | None) -> None:
        """The environment that will answer, once per session."""
        if event is not None and event.environment_id not in self.session.environments:
            self.session.environments.add(event.environment_id)
            self._record(event)

    def submitted(self, request: ClientRequest, facts: dict[str, Any], extra: dict[str, Any]) -> None:
        """A readable request came; `extra` is what the gateway adds to it, `facts` what else is known about it."""
        parameters, taken = self._redactor.document({name: value for name, value in request.fields.items() if name != request.FIELD})
        messages = []
        for at, message in enumerate(request.messages):
            read, redacted = self._message(message, request.FIELD, at)
            messages.append(read)
            taken.update(redacted)
        facts = self._cleaned(facts, taken)
        self._upstream = facts.get("upstream")
        self._named = self._upstream, facts.get("environment_id")
        new = [message for message in messages if self.session.first_seen(message.message_id)]
        ids = [message.message_id for message in messages]
        before = self.session.history.continued(self.generation_id, ids)
        self._keep_prompt = not taken  # the prompt's tokens would spell out what was taken from its text
        self._record(
            RequestSubmitted.known(
                generation_id=self.generation_id,
                endpoint=self._endpoint,
                model=self._redactor.clean(request.model),
                stream=request.stream,
                n=request.n,
                seed=long_of(extra.get("seed", request.seed)),
                temperature=request.temperature,
                max_tokens=request.max_tokens,
                message_ids=ids[before.messages :] if before else ids,
                tools=request.tools,
                injected=sorted(extra),
                redactions=_counts(taken),
                content=RequestContent.known(messages=new, parameters=parameters),
                history_generation=before.generation_id if before else None,
                history_messages=before.messages if before else None,
                **facts,
            )
        )

    def unreadable(self, body: bytes, facts: dict[str, Any]) -> None:
        """A body came that is no request; its beginning is kept as it is."""
        text, taken = self._redactor.text(body[:UNREADABLE_BYTES_MAX].decode(errors="replace"))
        facts = self._cleaned(facts, taken)
        redactions, content = _counts(taken), RequestContent(parameters=text)
        self._record(
            RequestSubmitted(generation_id=self.generation_id, endpoint=self._endpoint, redactions=redactions, content=content, **facts)
        )

    def _cleaned(self, facts: dict[str, Any], taken: Counter[str]) -> dict[str, Any]:
        """Facts about a request without what rules take out of them, all counted.

        The digest of a body from which personal data was taken is left out: all else of the body is on the tape, so that
        a phone number could be found by trying.
        """
        facts = dict(facts)
        address, found = self._redactor.text(facts.get("client_address") or "")
        taken += found
        if found:
            facts["client_address"] = address
        if any(name != SECRET for name in taken):
            facts["request_digest"] = None
        return facts

    def forwarded(self, attempt: int) -> None:
        """The request goes upstream now: offsets count from here."""
        self._attempt = attempt
        self._begun_ns = time.monotonic_ns()

    def moved(self, upstream: str) -> None:
        """The request goes to another upstream than `submitted` named."""
        self._upstream = upstream

    def answered(self, status: int, environment: Callable[[], EnvironmentCaptured | None]) -> None:
        """The upstream answered with this status; `environment` is asked whose answer it is when the first of it is recorded."""
        self._status, self._environment = status, environment

    def _answering(self) -> dict[str, Any]:
        """The upstream and the environment of an answer, where they are others than the request named."""
        environment = self._environment() if self._environment else None
        found = self._upstream, environment.environment_id if environment else None
        if found == self._named:
            return {}
        self.environment(environment)
        return dict(zip(("upstream", "environment_id"), found, strict=True))

    def chunk(self, chunk: dict[str, Any], offset_us: int) -> None:
        """A chunk of a stream.

        Raises:
            TypeError, AttributeError, LookupError, ValueError: it is not shaped like one.
        """
        if not self.started:
            self._start(chunk, offset_us)
        if usage := chunk.get("usage"):
            self._usage = dict(usage)
        if fingerprint := chunk.get("system_fingerprint"):
            self.fingerprint = str(fingerprint)
        for entry in chunk.get("choices") or ():
            delta = entry.get("delta") or {}
            choice = self._choice(entry, delta, offset_us)
            self._tokens(choice, segments_of_delta(choice, delta), entry, offset_us)
            if entry.get("finish_reason") is not None:
                self._finish(choice, entry, offset_us)

    @property
    def runs(self) -> bool:
        """Whether sequence 0 is under way, so that `run` can record its tokens."""
        choice = self._choices.get(0)
        return choice is not None and not choice.finished

    def run(self, run: Run, offset_us: int) -> None:
        """Many chunks of sequence 0 that came at once."""
        choice = self._choices[0]
        if self._first_token_us is None:
            self._first_token_us = offset_us
            self._numbered = True
        choice.channel = "content"
        choice.say("".join(run.texts))
        choice.position = self._recorder.run(
            self._context, self.generation_id, 0, choice.position, offset_us, run.token_ids, run.texts, run.logprobs
        )

    def whole(self, answer: dict[str, Any], offset_us: int) -> None:
        """A whole answer: the same events, all at the time of its arrival.

        Raises:
            TypeError, AttributeError, LookupError, ValueError: it is not shaped like one.
        """
        self._start(answer, offset_us)
        self._usage = dict(answer.get("usage") or {})
        self.fingerprint = text_of(answer.get("system_fingerprint"))
        self._results = answer.get("results", 0)
        for entry in answer["choices"]:
            message = entry.get("message") or {}
            choice = self._choice(entry, message, offset_us)
            self._tokens(choice, segments_of_message(choice, message), entry, offset_us)
            self._finish(choice, entry, offset_us)

    @property
    def complete(self) -> bool:
        """Whether every sequence that began has ended."""
        return bool(self._choices) and all(choice.finished for choice in self._choices.values())

    @property
    def unreconciled(self) -> dict[str, int]:
        """Tokens recorded and tokens that the upstream counted, where it told ids and the two differ; the event has both."""
        said = long_of(self._usage.get("completion_tokens"))
        if not self._numbered or said is None or said == self._position:
            return {}
        return {"recorded": self._position, "usage": said}

    def finished(self) -> None:
        """The generation ended well."""
        if self.ended:
            return
        offset_us = self.now_us()
        for choice in self._choices.values():
            self._finish(choice, {}, offset_us)
        self.ended = True
        details = self._usage.get("prompt_tokens_details")
        self._record(
            GenerationFinished.known(
                generation_id=self.generation_id,
                sequences=len(self._choices) or self._results,
                tokens_recorded=self._position,
                prompt_tokens=long_of(self._usage.get("prompt_tokens")),
                completion_tokens=long_of(self._usage.get("completion_tokens")),
                cached_tokens=long_of(details.get("cached_tokens")) if isinstance(details, dict) else None,
                first_token_us=self._first_token_us,
                offset_us=offset_us,
                system_fingerprint=self.fingerprint,
            )
        )

    def failed(self, failure: Failure) -> None:
        """The generation ended badly; tool calls that were under way are recorded as far as they had come."""
        if self.ended:
            return
        self.ended = True
        offset_us = self.now_us()
        for choice in self._choices.values():
            if not choice.finished:
                self._tool_calls(choice, offset_us)
        message = (failure.detail or failure.message)[:ERROR_CHARACTERS_MAX]
        fault = failure.fault
        self._record(
            GenerationFailed(
                generation_id=self.generation_id,
                error_type=fault.error_type,
                origin=fault.origin,
                status=failure.status,
                position=self._position,
                retryable=fault.retryable,
                offset_us=offset_us,
                content=FailureContent(message=self._redactor(message)[0]),
            )
        )

    @property
    def _position(self) -> int:
        return sum(choice.position for choice in self._choices.values())

    @property
    def tokens(self) -> int:
        """The tokens of prompt and answer: as the upstream's usage says, else as they were counted here."""
        said = [long_of(self._usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
        counted = (self._prompt_tokens, self._position)
        return sum(here if told is None else told for told, here in zip(said, counted, strict=True))

    def note(self, payload: Payload, actor: str) -> None:
        """Somebody other than the client did something to this generation."""
        self._recorder.record(replace(self._context, actor=actor), payload)

    def _record(self, payload: Payload) -> None:
        self._recorder.record(self._context, payload)

    def _message(self, message: Any, field: str, at: int) -> tuple[Message, Counter[str]]:
        """A message as it is stored."""
        body, taken = self._redactor.document(message, field, at)
        canonical = dump(message, sort_keys=True) if not taken else body.encode()
        role = text_of(message.get("role")) if isinstance(message, dict) else None
        return Message.known(message_id=self.session.message_id(canonical), role=role or "", body=body), taken

    def _start(self, answer: dict[str, Any], offset_us: int) -> None:
        self.started = True
        answering = self._answering()
        ids = answer.get("prompt_token_ids")
        self._prompt_tokens = len(ids) if ids else 0
        self._record(
            GenerationStarted.known(
                generation_id=self.generation_id,
                authoritative="gateway",
                attempt=self._attempt,
                upstream_id=self.clean(text_of(answer.get("id"))),  # vLLM makes it of the client's request id
                model=self.clean(text_of(answer.get("model"))),
                status=self._status,
                prompt_tokens=len(ids) if ids else None,
                offset_us=offset_us,
                content=GenerationContent(prompt_token_ids=list(ids)) if ids and self._keep_prompt else None,
                queued_us=self.queued_us or None,
                **answering,
            )
        )

    def _choice(self, entry: dict[str, Any], delta: dict[str, Any], offset_us: int) -> Choice:
        index = entry.get("index") or 0
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = Choice(index)
            role = text_of(delta.get("role"))
            self._record(SequenceStarted(generation_id=self.generation_id, index=index, role=role, offset_us=offset_us))
        return choice

    def _tokens(self, choice: Choice, segments: list[Segment], entry: dict[str, Any], offset_us: int) -> None:
        """Record the tokens and texts of one entry of `choices`."""
        ids = entry.get("token_ids") or ()
        logprobs = entry.get("logprobs")
        scores = (logprobs.get("content") or logprobs.get("refusal") or ()) if logprobs else ()
        if not segments:
            if not ids:
                return
            segments = [(choice.channel, "")]
        if self._first_token_us is None:
            self._first_token_us = offset_us
            self._numbered = bool(ids)
        if len(segments) == 1 and len(ids) == 1 and len(scores) < 2:  # by far the most frequent
            channel, text = segments[0]
            score = scores[0] if scores else {}
            logprob = score.get("logprob")
            others = alternatives_of(score) if score.get("top_logprobs") else ()
            self._delta(choice, offset_us, channel, ids, text, () if logprob is None else (logprob,), (others,) if others else ())
            return
        for delta in spread(segments, ids, align(ids, scores)):
            self._delta(choice, offset_us, *delta)

    def _delta(
        self,
        choice: Choice,
        offset_us: int,
        channel: str,
        ids: Sequence[int],
        text: str,
        logprobs: Sequence[float],
        alternatives: Sequence[Sequence[Alternative]],
    ) -> None:
        choice.channel = channel
        if channel == "content":
            choice.say(text)
        choice.position = self._recorder.tokens(
            self._context,
            self.generation_id,
            choice.index,
            choice.position,
            offset_us,
            channel=channel,
            token_ids=ids,
            text=text,
            logprobs=logprobs,
            alternatives=alternatives,
        )

    def _finish(self, choice: Choice, entry: dict[str, Any], offset_us: int) -> None:
        if choice.finished:
            return
        choice.finished = True
        self._tool_calls(choice, offset_us)
        stop = entry.get("stop_reason")
        self._record(
            SequenceFinished.known(
                generation_id=self.generation_id,
                index=choice.index,
                tokens=choice.position,
                finish_reason=text_of(entry.get("finish_reason")),
                stop_reason=None if stop is None else str(stop),
                offset_us=offset_us,
            )
        )

    def _tool_calls(self, choice: Choice, offset_us: int) -> None:
        for call_index, call in sorted(choice.tools.items()):
            arguments = self._redactor("".join(call.arguments))[0]
            content = ToolCallContent(call_id=call.call_id, name=call.name, arguments=arguments)
            self._record(
                ToolCall(generation_id=self.generation_id, index=choice.index, call_index=call_index, offset_us=offset_us, content=content)
            )


def _counts(taken: Counter[str]) -> list[Count]:
    """What redaction took, by rule."""
    return [Count(key=name, count=count) for name, count in sorted(taken.items())]
