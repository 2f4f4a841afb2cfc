"""The child of a fork: what a live engine said after the forced tokens, as a session of its own that names its parent."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from replay.engines.base import Engine, Generated, Refused, Spoken
from replay.fork import Fork
from replay.words import count, shorten, uuid
from schemas import events as e
from schemas.errors import ConflictError
from schemas.requests.recorded import COMPLETIONS
from schemas.sink import EventSink, SessionContext, new_id

TAIL_CHARACTERS = 80
"""Of the text before the fork, what the child's title quotes."""


@dataclass(frozen=True, slots=True)
class Child:
    """The recorded child of a fork."""

    session_id: bytes
    generation_id: bytes
    fork: Fork
    engine: str
    said: Generated
    duration_us: int

    def document(self) -> dict[str, Any]:
        """The child as JSON types."""
        place = self.fork.place
        return {
            "session": uuid(self.session_id),
            "generation": uuid(self.generation_id),
            "parent_session": uuid(self.fork.parent.session_id or b""),
            "parent_generation": uuid(place.generation_id),
            "sequence": place.index,
            "position": place.position,
            "prompt_tokens": len(self.fork.prompt_token_ids),
            "prompt_rendered_anew": self.fork.rendered,
            "engine": self.engine,
            "seed": self.fork.request.document["seed"],
            "sequences": [
                {"index": s.index, "text": s.text, "token_ids": list(s.token_ids), "finish_reason": s.finish_reason}
                for s in self.said.sequences
            ],
            "duration_us": self.duration_us,
        }


def run_fork(fork: Fork, engine: Engine, sink: EventSink, *, actor: str = "") -> Child:
    """Have the engine go on, and record the child. Nothing is recorded unless it did.

    Raises:
        EngineUnavailable: the engine does not answer.
        ConflictError: it cannot do this; the message names what.
    """
    environment = engine.fingerprint()
    begun = time.monotonic_ns()
    said = engine.generate(fork.request)
    if isinstance(said, Refused):
        raise ConflictError(f"the engine refuses: {said.reason}", operation="fork", place=engine.name, hint="change it with --edit")
    took = (time.monotonic_ns() - begun) // 1000
    context = SessionContext(new_id(), fork.parent.tenant, "replay", actor, fork.parent.retention_class or "standard")
    generation_id = new_id()
    for payload in _events(fork, environment, said, context, generation_id, took):
        sink.record(context, payload)
    return Child(context.session_id, generation_id, fork, engine.name, said, took)


def _events(
    fork: Fork, environment: e.EnvironmentCaptured | None, said: Generated, context: SessionContext, generation_id: bytes, took: int
) -> Iterator[e.Payload]:
    """The child, event by event; all tokens came when the answer did."""
    place, document, asked = fork.place, fork.request.document, fork.request
    after = f"after {count(place.position, 'token')} of generation {uuid(place.generation_id)}"
    tail = f": …{shorten(fork.prefix_text[-TAIL_CHARACTERS:], TAIL_CHARACTERS)}" if fork.prefix_text else ""
    title = e.SessionContent(title=f"fork {after}{tail}")
    tags = ["fork", f"fork:{place.index}:{place.position}"]
    yield e.SessionOpened(
        workflow="fork",
        purpose="fork",
        tags=tags,
        parent_session=fork.parent.session_id,
        parent_event=place.event_id or None,
        content=title,
    )
    if fork.edit:
        yield e.SessionAnnotated(
            content=e.AnnotationContent(note=f"edited for the fork: {json.dumps(list(fork.edit), ensure_ascii=False)}")
        )
    if environment is not None:
        yield environment
    yield _request(fork, environment, context, generation_id)
    ids = document["prompt"]
    content = e.GenerationContent(prompt_token_ids=ids)
    yield e.GenerationStarted(
        generation_id=generation_id, authoritative="replay", model=asked.model, prompt_tokens=len(ids), offset_us=took, content=content
    )
    for spoken in said.sequences:
        yield e.SequenceStarted(generation_id=generation_id, index=spoken.index, offset_us=took)
        yield _chunk(generation_id, spoken, took)
        yield e.SequenceFinished(
            generation_id=generation_id,
            index=spoken.index,
            tokens=len(spoken.token_ids),
            finish_reason=spoken.finish_reason,
            offset_us=took,
        )
    tokens = sum(len(spoken.token_ids) for spoken in said.sequences)
    yield e.GenerationFinished(
        generation_id=generation_id,
        sequences=len(said.sequences),
        tokens_recorded=tokens,
        prompt_tokens=len(ids),
        completion_tokens=tokens,
        first_token_us=took,
        offset_us=took,
    )
    yield e.SessionClosed(reason="fork finished")


def _request(fork: Fork, environment: e.EnvironmentCaptured | None, context: SessionContext, generation_id: bytes) -> e.RequestSubmitted:
    document, model = fork.request.document, fork.request.model
    body = json.dumps(document["prompt"])
    message = e.Message(message_id=hmac.digest(context.salt or b"", body.encode(), "sha256")[:16], role="", body=body)
    parameters = {"model": model, **{name: value for name, value in document.items() if name != "prompt"}}
    return e.RequestSubmitted(
        generation_id=generation_id,
        parent_generation=fork.place.generation_id,
        endpoint=COMPLETIONS,
        model=model,
        n=document["n"],
        seed=document["seed"],
        temperature=document.get("temperature"),
        max_tokens=document["max_tokens"],
        message_ids=[message.message_id],
        environment_id=environment.environment_id if environment else None,
        content=e.RequestContent(messages=[message], parameters=json.dumps(parameters)),
    )


def _chunk(generation_id: bytes, spoken: Spoken, took: int) -> e.TokenChunk:
    tokens = len(spoken.token_ids)
    lengths = [len(piece) for piece in spoken.pieces] or [0] * (tokens - 1) + [len(spoken.text)]
    logprobs = list(spoken.logprobs) if len(spoken.logprobs) == tokens else []
    content = e.ChunkContent(token_ids=list(spoken.token_ids), text=spoken.text, lengths=lengths, logprobs=logprobs)
    return e.TokenChunk(generation_id=generation_id, index=spoken.index, position=0, offsets_us=[took] * tokens, content=content)
