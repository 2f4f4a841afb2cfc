"""What each event of a generation does to the state of its session: requests, edits, sequences, tokens, ends.

Each rule takes the state, the stored event and its payload, and returns the new state. An event that comes before what it
belongs to makes that part on the spot, so that no token is lost to a wrong order, and is noted as an anomaly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from replay.state import Anomaly, Chunk, Edit, Failure, Generation, Pause, Place, Recording, Sequence, SessionState, evolve
from schemas import events as e
from store.rows import StoredEvent


def anomaly(state: SessionState, stored: Any, what: str, text: str) -> SessionState:
    """The state with one more unexpected event on it; works for anything that was handed in as an event."""
    event = getattr(stored, "event", None)
    place = None
    if isinstance(event, e.Event):
        place = Place(event.event_id, int(stored.partition), int(stored.offset), event.recorded_at)
    kind = event.kind if isinstance(event, e.Event) else type(stored).__name__
    return evolve(state, anomalies=state.anomalies.append(Anomaly(what, kind, e.clean_text(text), place)))


def _find(state: SessionState, stored: StoredEvent, generation_id: bytes) -> tuple[SessionState, Generation]:
    """The generation that an event belongs to, made if it is new."""
    known = state.generations.get(generation_id)
    if known is None:
        state = anomaly(state, stored, "early", "its request is not known yet")
    return state, known or Generation(generation_id)


def _keep(state: SessionState, generation: Generation) -> SessionState:
    return evolve(state, generations=state.generations.set(generation.generation_id, generation))


def _recording(generation: Generation, stored: StoredEvent, offset_us: int | None) -> Recording:
    """What the event's source records of the last attempt; its zero is told by the first event that carries an offset."""
    source, at = stored.event.source, stored.event.recorded_at
    known = next((r for r in reversed(generation.recordings) if r.source == source), Recording(source))
    if known.zero_at is None and offset_us is not None:
        return evolve(known, zero_at=at - offset_us)
    return known


def _with(generation: Generation, recording: Recording) -> Generation:
    """The generation with one recording put in its place, or added."""
    key = (recording.source, recording.attempt)
    known = [(r.source, r.attempt) for r in generation.recordings]
    if key not in known:
        return evolve(generation, recordings=(*generation.recordings, recording))
    recordings = tuple(recording if at == key else r for at, r in zip(known, generation.recordings, strict=True))
    return evolve(generation, recordings=recordings)


# requests


def _request_submitted(state: SessionState, stored: StoredEvent, payload: e.RequestSubmitted) -> SessionState:
    generation = state.generations.get(payload.generation_id) or Generation(payload.generation_id)
    state, payload = _with_history(state, stored, payload)
    state = _hold_messages(state, stored, payload)
    if generation.request is not None:
        # A second source tells of the same request; from one source it would be a repetition.
        return state if stored.event.source != generation.source else anomaly(state, stored, "again", "the request was known already")
    content = payload.content
    request = payload.model_copy(update={"content": None})
    event = stored.event
    parameters = content.parameters if content and (content.parameters or content.parameters_blob is None) else None
    known = evolve(generation, submitted_at=event.recorded_at, actor=event.actor, source=event.source)
    return _keep(state, evolve(known, request=request, parameters=parameters))


def _with_history(state: SessionState, stored: StoredEvent, payload: e.RequestSubmitted) -> tuple[SessionState, e.RequestSubmitted]:
    """The request with all its messages listed, also those that it shares with the request that it continues."""
    if payload.history_generation is None:
        return state, payload
    before = state.generations.get(payload.history_generation)
    if before is None or before.request is None:
        return anomaly(state, stored, "unheld", "the request that this one continues was never recorded"), payload
    ids = [*before.request.message_ids[: payload.history_messages], *payload.message_ids]
    return state, payload.model_copy(update={"message_ids": ids})


def _hold_messages(state: SessionState, stored: StoredEvent, payload: e.RequestSubmitted) -> SessionState:
    messages = state.messages
    for message in payload.content.messages if payload.content else []:
        messages = messages.set(message.message_id, message)
    unheld = [message_id for message_id in payload.message_ids if message_id not in messages]
    state = evolve(state, messages=messages)
    recorded = payload.content is not None  # content that was never there, or is erased, is no surprise
    if unheld and recorded:
        return anomaly(state, stored, "unheld", f"{len(unheld)} of {len(payload.message_ids)} message bodies were never recorded")
    return state


def _request_edited(state: SessionState, stored: StoredEvent, payload: e.RequestEdited) -> SessionState:
    state, generation = _find(state, stored, payload.generation_id)
    edit = Edit(stored.event.recorded_at, stored.event.actor, payload)
    last = generation.edits[-1].event if len(generation.edits) else None
    if last and last.digest_after != payload.digest_before:
        state = anomaly(state, stored, "mismatched", "the request before this edit is not the one after the last")
    state = _keep(state, evolve(generation, edits=generation.edits.append(edit)))
    known = state.generations.get(payload.generation_id)
    applies = known is None or edit.patch is None or state.submitted(known) is None or state.edited(known) is not None
    return state if applies else anomaly(state, stored, "mismatched", "the patch does not apply to the request")


def _breakpoint_hit(state: SessionState, stored: StoredEvent, payload: e.BreakpointHit) -> SessionState:
    state, generation = _find(state, stored, payload.generation_id)
    pause = Pause(stored.event.recorded_at, payload)
    return _keep(state, evolve(generation, pauses=generation.pauses.append(pause)))


def _breakpoint_released(state: SessionState, stored: StoredEvent, payload: e.BreakpointReleased) -> SessionState:
    state, generation = _find(state, stored, payload.generation_id)
    pauses = list(generation.pauses)
    for i, pause in enumerate(pauses):
        if pause.released is None and pause.hit.breakpoint_id == payload.breakpoint_id:
            pauses[i] = evolve(pause, released_at=stored.event.recorded_at, released_by=stored.event.actor, released=payload)
            return _keep(state, evolve(generation, pauses=type(generation.pauses)(pauses)))
    return _keep(anomaly(state, stored, "early", "no stop at this breakpoint is open"), generation)


# answers


def _generation_started(state: SessionState, stored: StoredEvent, payload: e.GenerationStarted) -> SessionState:
    state, generation = _find(state, stored, payload.generation_id)
    recording = _recording(generation, stored, payload.offset_us)
    if recording.started is not None and payload.attempt > recording.attempt:
        recording = Recording(recording.source, payload.attempt, stored.event.recorded_at - payload.offset_us)
    elif recording.started is not None:
        state = _keep(state, _with(generation, evolve(recording, starts=recording.starts + 1)))
        return anomaly(state, stored, "again", f"attempt {recording.attempt} had started already")
    ids = tuple(payload.content.prompt_token_ids) if payload.content else ()
    started = payload.model_copy(update={"content": None})
    zero_at = stored.event.recorded_at - payload.offset_us
    recording = evolve(recording, started=started, zero_at=zero_at, prompt_token_ids=ids)
    if not recording.sequences and payload.attempt > recording.attempt:
        recording = evolve(recording, attempt=payload.attempt)
    return _keep(state, _with(evolve(generation, authoritative=payload.authoritative), recording))


def _at_sequence(
    state: SessionState, stored: StoredEvent, generation_id: bytes, index: int, offset_us: int | None
) -> tuple[SessionState, Generation, Recording, Sequence]:
    """Where an event of a sequence belongs; what is not there yet is made, and noted."""
    state, generation = _find(state, stored, generation_id)
    recording = _recording(generation, stored, offset_us)
    return state, generation, recording, recording.sequences.get(index) or Sequence(index)


def _keep_sequence(state: SessionState, generation: Generation, recording: Recording, sequence: Sequence) -> SessionState:
    recording = evolve(recording, sequences=recording.sequences.set(sequence.index, sequence))
    return _keep(state, _with(generation, recording))


def _sequence_started(state: SessionState, stored: StoredEvent, payload: e.SequenceStarted) -> SessionState:
    state, generation, recording, sequence = _at_sequence(state, stored, payload.generation_id, payload.index, payload.offset_us)
    if sequence.started_us is not None:
        return anomaly(state, stored, "again", f"sequence {payload.index} had started already")
    return _keep_sequence(state, generation, recording, evolve(sequence, role=payload.role, started_us=payload.offset_us))


def _token_chunk(state: SessionState, stored: StoredEvent, payload: e.TokenChunk) -> SessionState:
    last_us = payload.offsets_us[-1] if payload.offsets_us else None
    state, generation, recording, sequence = _at_sequence(state, stored, payload.generation_id, payload.index, last_us)
    chunk = chunk_of(payload)
    end = chunk.position + len(chunk.offsets_us)
    expected = sequence.next_position
    if chunk.position != expected:
        what = "gap" if chunk.position > expected else "overlap"
        state = anomaly(state, stored, what, f"sequence {payload.index}: tokens from {chunk.position}, expected {expected}")
    if sequence.finished is not None or recording.finished is not None or len(recording.failures):
        state = anomaly(state, stored, "late", f"tokens of sequence {payload.index} after its end")
    in_order = sequence.in_order and chunk.position == expected
    grown = evolve(sequence, chunks=sequence.chunks.append(chunk), in_order=in_order, next_position=max(end, expected))
    return _keep_sequence(state, generation, recording, grown)


def chunk_of(payload: e.TokenChunk) -> Chunk:
    """A token chunk as the state keeps it."""
    content, offsets = payload.content, tuple(payload.offsets_us)
    if content is None:
        return Chunk(payload.position, payload.channel, offsets)
    ids, lengths, logprobs = tuple(content.token_ids), tuple(content.lengths), tuple(content.logprobs)
    return Chunk(payload.position, payload.channel, offsets, ids, content.text, lengths, logprobs, content.alternatives)


def _tool_call(state: SessionState, stored: StoredEvent, payload: e.ToolCall) -> SessionState:
    state, generation, recording, sequence = _at_sequence(state, stored, payload.generation_id, payload.index, payload.offset_us)
    return _keep_sequence(state, generation, recording, evolve(sequence, calls=sequence.calls.append(payload)))


def _sequence_finished(state: SessionState, stored: StoredEvent, payload: e.SequenceFinished) -> SessionState:
    state, generation, recording, sequence = _at_sequence(state, stored, payload.generation_id, payload.index, payload.offset_us)
    if sequence.finished is not None:
        return anomaly(state, stored, "again", f"sequence {payload.index} had finished already")
    if payload.tokens != sequence.tokens:
        text = f"sequence {payload.index} ended with {payload.tokens} tokens, {sequence.tokens} were recorded"
        state = anomaly(state, stored, "miscount", text)
    return _keep_sequence(state, generation, recording, evolve(sequence, finished=payload))


def _generation_finished(state: SessionState, stored: StoredEvent, payload: e.GenerationFinished) -> SessionState:
    state, generation = _find(state, stored, payload.generation_id)
    recording = _recording(generation, stored, payload.offset_us)
    if recording.finished is not None or len(recording.failures):
        state = anomaly(state, stored, "late", "the generation had ended already")
    if recording.tokens != payload.tokens_recorded:
        text = f"the generation ended with {payload.tokens_recorded} tokens, {recording.tokens} were recorded"
        state = anomaly(state, stored, "miscount", text)
    if recording.finished is None:
        recording = evolve(recording, finished=payload, finished_at=stored.event.recorded_at)
    return _keep(state, _with(generation, recording))


def _generation_failed(state: SessionState, stored: StoredEvent, payload: e.GenerationFailed) -> SessionState:
    state, generation = _find(state, stored, payload.generation_id)
    recording = _recording(generation, stored, payload.offset_us)
    if recording.finished is not None or len(recording.failures):
        state = anomaly(state, stored, "late", "the generation had ended already")
    failure = Failure(stored.event.recorded_at, payload)
    return _keep(state, _with(generation, evolve(recording, failures=recording.failures.append(failure))))


GENERATION_RULES: dict[str, Callable[[SessionState, StoredEvent, Any], SessionState]] = {
    "request_submitted": _request_submitted,
    "request_edited": _request_edited,
    "breakpoint_hit": _breakpoint_hit,
    "breakpoint_released": _breakpoint_released,
    "generation_started": _generation_started,
    "sequence_started": _sequence_started,
    "token_chunk": _token_chunk,
    "tool_call": _tool_call,
    "sequence_finished": _sequence_finished,
    "generation_finished": _generation_finished,
    "generation_failed": _generation_failed,
}
"""The rules of this module by kind."""
