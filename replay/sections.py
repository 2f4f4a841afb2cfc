"""A snapshot of one request in sections that a person or a program can read: request, edits, response, context, metadata.

They are a reading of the state, not what is stored; where content is in a blob they name it. `session_document` reads a whole
session so, and `token_columns` the tokens of one sequence, which are many.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as Several
from typing import Any

from replay.differences import sentence
from replay.state import Edit, Entry, Environment, Generation, Pause, Recording, Replay, Sequence, SessionState
from replay.words import iso, uuid
from schemas.patch import apply_patch

_MESSAGES = ("messages", "input", "contents", "prompt")
"""Under which name an endpoint's request has what was said."""


def sections(state: SessionState, generation_id: bytes) -> dict[str, Any]:
    """The sections of a generation and its session; without a request and a response where it is not known."""
    generation = state.generations.get(generation_id)
    return {
        "request": _request(state, generation) if generation else None,
        "edits": [_edit(edit) for edit in generation.edits] if generation else [],
        "response": [_sequence(sequence) for sequence in generation.sequences] if generation else [],
        "context": _context(state, generation),
        "metadata": _metadata(state),
    }


def session_document(state: SessionState) -> dict[str, Any]:
    """A session at one moment: what it is, each generation in sections but for its tokens, and all that was odd. Times are UTC."""
    notes = [(note, note.event.content.note if note.event.content else None) for note in state.annotations]
    return {
        "context": _context(state, None),
        "metadata": _metadata(state),
        "first_at": None if state.first_at is None else iso(state.first_at),
        "position": state.events,
        "tokens": state.tokens,
        "lost": state.lost,
        "erased": state.erased,
        "closed": state.closed.reason if state.closed else None,
        "environments": [_environment(environment) for environment in state.environments],
        "generations": [_generation(state, generation) for generation in state.generations.values()],
        "replays": [_replay(replay_id, replay) for replay_id, replay in state.replays.items()],
        "notes": [{"at": iso(note.at), "actor": note.actor, "text": text} for note, text in notes if text],
        "anomalies": [
            {"what": odd.what, "kind": odd.kind, "text": odd.text, "event_id": uuid(odd.place.event_id) if odd.place else None}
            for odd in state.anomalies
        ],
    }


def token_columns(sequence: Sequence) -> dict[str, Any]:
    """The tokens of a sequence column by column, by position; a column of which nothing is known is None."""
    entries = sequence.entries()
    columns: dict[str, list[Any]] = {name: [getattr(entry, name) for entry in entries] for name in _ENTRY}
    known = {name: values if any(value is not None for value in values) else None for name, values in columns.items()}
    return {"index": sequence.index, "tokens": len(entries), **known, "alternatives": alternatives_column(entries)}


def alternatives_column(entries: Several[Entry]) -> list[list[dict[str, Any]]] | None:
    """What else each token might have been; None where no client asked for that."""
    return [_alternatives(entry) for entry in entries] if any(entry.alternatives for entry in entries) else None


_ENTRY = ("position", "channel", "offset_us", "token_id", "logprob", "text")


def _entry(entry: Entry) -> dict[str, Any]:
    told = {"alternatives": _alternatives(entry)} if entry.alternatives else {}
    return {**{name: getattr(entry, name) for name in _ENTRY}, **told}


def _alternatives(entry: Entry) -> list[dict[str, Any]]:
    return [one._asdict() for one in entry.alternatives]


def _generation(state: SessionState, generation: Generation) -> dict[str, Any]:
    recording, environment = generation.recording, state.environment_of(generation)
    responses = [{**_said(sequence), "tokens": sequence.tokens, "erased": sequence.erased} for sequence in generation.sequences]
    return {
        "request": _request(state, generation),
        "submitted_at": None if generation.submitted_at is None else iso(generation.submitted_at),
        "actor": generation.actor,
        "key": generation.request.api_key_id if generation.request else None,
        "edits": _edits(state, generation),
        "pauses": [_pause(pause) for pause in generation.pauses],
        "response": responses,
        "environment_id": environment.event.environment_id.hex() if environment else None,
        **(_recording(recording) if recording else {"source": None, "zero_at": None, "failures": []}),
    }


def _recording(recording: Recording) -> dict[str, Any]:
    finished = recording.finished
    return {
        "source": recording.source,
        "attempt": recording.attempt,
        "zero_at": None if recording.zero_at is None else iso(recording.zero_at),
        "first_token_us": recording.first_token_us,
        "duration_us": finished.offset_us if finished else None,
        "prompt_tokens": finished.prompt_tokens if finished else None,
        "completion_tokens": finished.completion_tokens if finished else None,
        "failures": [
            {
                "at": iso(failure.at),
                "type": failure.event.error_type,
                "origin": failure.event.origin,
                "position": failure.event.position,
                "retryable": failure.event.retryable,
                "message": failure.message,
            }
            for failure in recording.failures
        ],
    }


def _edits(state: SessionState, generation: Generation) -> list[dict[str, Any]]:
    """Each edit with the whole document before and after it; None where that cannot be told."""
    document: Any = state.submitted(generation)
    found = []
    for edit in generation.edits:
        before = document
        try:
            document = None if before is None or edit.patch is None else apply_patch(before, json.loads(edit.patch))
        except ValueError:
            document = None
        found.append({**_edit(edit), "before": before, "after": document})
    return found


def _pause(pause: Pause) -> dict[str, Any]:
    released = pause.released
    return {
        "breakpoint": pause.hit.breakpoint_id,
        "at": iso(pause.hit_at),
        "deadline_us": pause.hit.deadline_us,
        "default": pause.hit.default_action,
        "released_at": None if pause.released_at is None else iso(pause.released_at),
        "by": pause.released_by,
        "action": released.action if released else None,
        "reason": released.content.reason if released and released.content else None,
    }


def _environment(environment: Environment) -> dict[str, Any]:
    event = environment.event
    digests = {name: digest.hex() if (digest := getattr(event, name)) else None for name in ("semantic", "numeric", "scheduling")}
    return {
        "environment_id": event.environment_id.hex(),
        "at": iso(environment.at),
        "origin": event.origin,
        **digests,
        "items": {item.key: item.value for item in event.items},
        "unknown": list(event.unknown),
    }


def _replay(replay_id: bytes, replay: Replay) -> dict[str, Any]:
    started, finished = replay.started, replay.finished
    return {
        "replay": uuid(replay_id),
        "at": iso(replay.started_at),
        "of": uuid(started.subject_session) if started else None,
        "engine": started.engine if started else None,
        "differences": [sentence(difference) for difference in started.differences] if started else [],
        "verdict": finished.verdict if finished else None,
        "reason": finished.reason if finished else None,
        "sequences": [
            {
                "generation_id": uuid(compared.generation_id),
                "index": compared.index,
                "verdict": compared.verdict,
                "reason": compared.reason,
                "drift_max": compared.drift_max,
                "noise_floor": compared.noise_floor,
            }
            for compared in replay.compared
        ],
    }


def _request(state: SessionState, generation: Generation) -> dict[str, Any]:
    """The request as it stood, edits included; `document` says which of both could be told."""
    edited = state.edited(generation)
    rest = dict(edited or state.submitted(generation) or {})
    said = next((rest.pop(name) for name in _MESSAGES if name in rest), None)
    return {
        "generation_id": uuid(generation.generation_id),
        "status": generation.status,
        "endpoint": generation.request.endpoint if generation.request else None,
        "document": "as edited" if edited is not None and len(generation.edits) else "as submitted" if rest else state.gone,
        "model": rest.pop("model", None),
        "messages": said,
        "tools": rest.pop("tools", []),
        "parameters": rest,
    }


def _edit(edit: Edit) -> dict[str, Any]:
    content = edit.event.content
    return {
        "edit_id": uuid(edit.event.edit_id),
        "at": iso(edit.at),
        "actor": edit.actor,
        "reason": content.reason if content else None,
        "undo_of": uuid(edit.event.undo_of) if edit.event.undo_of else None,
        "patch": json.loads(edit.patch) if edit.patch else None,
    }


def _sequence(sequence: Sequence) -> dict[str, Any]:
    return {**_said(sequence), "tokens": [_entry(entry) for entry in sequence.entries()]}


def _said(sequence: Sequence) -> dict[str, Any]:
    return {
        "index": sequence.index,
        **{channel: text for channel in ("content", "reasoning", "refusal") if (text := sequence.text(channel))},
        "tool_calls": [call.content.model_dump() if call.content else None for call in sequence.calls],
        "finish_reason": sequence.finished.finish_reason if sequence.finished else None,
    }


def _context(state: SessionState, generation: Generation | None) -> dict[str, Any]:
    opened = state.opened
    environment = state.environment_of(generation) if generation else None
    return {
        "at": iso(state.last.at) if state.last else None,
        "session_id": uuid(state.session_id) if state.session_id else None,
        "tenant": state.tenant,
        "user": opened.user if opened else None,
        "workflow": opened.workflow if opened else None,
        "client": opened.client if opened else None,
        "asked_by": generation.actor if generation else None,
        "environment_id": environment.event.environment_id.hex() if environment else None,
    }


def _metadata(state: SessionState) -> dict[str, Any]:
    opened = state.opened
    return {
        "purpose": opened.purpose if opened else None,
        "title": opened.content.title if opened and opened.content else None,
        "tags": list(state.tags),
        "visibility": state.visibility,
        "notes": [note.event.content.note for note in state.annotations if note.event.content and note.event.content.note],
        "retention_class": state.retention_class,
        "events": state.events,
    }
