"""A snapshot of one request in sections that a person or a program can read: request, edits, response, context, metadata.

They are a reading of the state, not what is stored; where content is in a blob they name it.
"""

from __future__ import annotations

import json
from typing import Any

from replay.state import Edit, Generation, Sequence, SessionState
from replay.words import iso, uuid

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
    return {
        "index": sequence.index,
        **{channel: text for channel in ("content", "reasoning", "refusal") if (text := sequence.text(channel))},
        "tool_calls": [call.content.model_dump() if call.content else None for call in sequence.calls],
        "finish_reason": sequence.finished.finish_reason if sequence.finished else None,
        "tokens": [entry._asdict() for entry in sequence.entries()],
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
