"""A session that a program records of itself: events of its own, and what it asked a model that no gateway stands before.

Everything goes through the redaction rules of its tenant. Where those search texts, an answer is recorded once it is whole, since
what they look for may stand in two deltas.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ingest.importing import redacted
from ingest.recorder import Recorder
from ingest.redaction import Redactor
from ingest.retelling import Answered, Asked, Bodies, answers_of, entries, request_of
from schemas import events as e
from schemas.errors import ConflictError
from schemas.sink import SessionContext, new_id


class OwnSession:
    """A session of this process. Threads may share it; what each asks is a generation of its own."""

    def __init__(self, context: SessionContext, opened: e.SessionOpened, *, recorder: Recorder, redactor: Redactor) -> None:
        self.context = context
        self.recorder = recorder
        self.whole = redactor.searches
        self._redactor = redactor
        self._bodies = Bodies()
        self.record(opened)

    @property
    def id(self) -> str:
        """Its id, as `Connection.session` takes it once it is indexed."""
        return self.context.session_id.hex()

    def record(self, payload: e.Payload) -> None:
        """Record an event of any kind (`tokentape.events`), without what the rules take."""
        self.recorder.record(self.context, redacted(payload, self._redactor))

    def ask(self, messages: Sequence[dict[str, Any]], **parameters: Any) -> Telling:
        """Record that a model is asked, in the words of a chat completion; what it answers is told to what this returns.

        Raises:
            UsageError: a part of the request is no JSON.
        """
        return Telling(self, request_of(new_id(), Asked(messages, parameters), self._bodies))

    def close(self, reason: str = "done") -> None:
        """Record that nothing more is expected."""
        self.record(e.SessionClosed(reason=reason))


class Telling:
    """One generation, told while it happens: tokens as they come, then `finish` or `fail`."""

    def __init__(self, session: OwnSession, request: e.RequestSubmitted) -> None:
        self.generation_id = request.generation_id
        self._session = session
        self._began = time.monotonic_ns()
        self._tokens = 0
        self._first_us: int | None = None
        self._ended = False
        session.record(request)

    def token(self, text: str, *, channel: str = "content") -> None:
        """A piece of the one answer came, now."""
        if not text or self._session.whole:
            return
        offset_us = self._offset_us
        if self._first_us is None:
            self._first_us = offset_us
            self._start()
        session = self._session
        self._tokens = session.recorder.tokens(session.context, self.generation_id, 0, self._tokens, offset_us, channel=channel, text=text)

    def finish(
        self,
        *answers: Answered,
        model: str | None = None,
        response_id: str | None = None,
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
    ) -> None:
        """The answers are complete. Texts whose pieces were told already are not recorded again; tool calls and reasons are.

        Raises:
            ConflictError: it has ended already.
        """
        offset_us = self._end()
        if self._first_us is None:
            self._start(model=model, upstream_id=response_id)
            recorded = entries(answers)
            for payload in answers_of(self.generation_id, answers, offset_us):
                self._session.record(payload)
        else:
            recorded = self._tokens
            bare = [Answered(answer.index, {}, answer.calls, answer.finish_reason) for answer in answers[:1] or (Answered(),)]
            for payload in answers_of(self.generation_id, bare, offset_us):
                counted = isinstance(payload, e.SequenceFinished)
                self._session.record(payload.model_copy(update={"tokens": recorded}) if counted else payload)
        self._session.record(
            e.GenerationFinished(
                generation_id=self.generation_id,
                sequences=max(1, len(answers)),
                tokens_recorded=recorded,
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                first_token_us=self._first_us,
                offset_us=offset_us,
            )
        )

    def fail(self, message: str, *, error_type: str = "upstream_error", origin: str = "upstream") -> None:
        """There will be no answer, or no more of it.

        Raises:
            ConflictError: it has ended already.
        """
        self._session.record(
            e.GenerationFailed(
                generation_id=self.generation_id,
                error_type=error_type,
                origin=origin,
                position=self._tokens,
                offset_us=self._end(),
                content=e.FailureContent(message=message),
            )
        )

    @property
    def _offset_us(self) -> int:
        return (time.monotonic_ns() - self._began) // 1000

    def _start(self, **facts: Any) -> None:
        source = self._session.context.source
        self._session.record(e.GenerationStarted(generation_id=self.generation_id, authoritative=source, **facts))

    def _end(self) -> int:
        if self._ended:
            hint = "ask again for another one"
            raise ConflictError("this generation has ended already", operation="finish", hint=hint)
        self._ended = True
        return self._offset_us
