"""Events and sessions as JSON: what case files, exports and the REST API hand over."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from replay.words import iso
from replay.words import uuid as uuid_text
from store.directory import KINDS
from store.rows import Row, StoredEvent


def event_line(row: Row, datum: Mapping[str, Any]) -> str:
    """Where an event stood in the log, and its datum without what is null: bytes in hexadecimal, times in µs since 1970."""
    place = {"log_id": row.log_id, "partition": row.partition, "offset": row.offset, "appended_at": row.appended_at}
    event = {name: plain(value) for name, value in datum.items() if value is not None}
    return json.dumps({**place, "event": event}, ensure_ascii=False)


def event_document(stored: StoredEvent, position: int) -> dict[str, Any]:
    """An event as people read it, and which of its session it is, from 1; bytes are base64."""
    event = stored.event
    place = {"partition": stored.partition, "offset": stored.offset, "event_id": uuid_text(event.event_id)}
    who = {"kind": event.kind, "recorded_at": iso(event.recorded_at), "actor": event.actor, "source": event.source}
    return {"position": position, **who, **place, "payload": event.payload.model_dump(mode="json", exclude_none=True)}


def session_line(row: Mapping[str, Any]) -> dict[str, Any]:
    """A session as lists of them tell it: a row of `store.directory`, its id as text, its kind, and its times in UTC."""
    named = {name: value for name, value in row.items() if name not in ("session_id", "first_at", "last_at", "shown_by")}
    kind = KINDS.get(row["purpose"], "conversation")
    return {
        "session_id": uuid_text(row["session_id"]),
        "kind": kind,
        "started_at": iso(row["first_at"]),
        "last_event_at": iso(row["last_at"]),
        **named,
    }


def plain(value: Any) -> Any:
    """A datum as JSON types: bytes in hexadecimal, numbers that are not finite as text."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return round(value.timestamp() * 1e6)
    return value
