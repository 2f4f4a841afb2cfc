"""An event as a line of JSON: what case files and exports hand over."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from store.rows import Row


def event_line(row: Row, datum: Mapping[str, Any]) -> str:
    """Where an event stood in the log, and its datum without what is null: bytes in hexadecimal, times in µs since 1970."""
    place = {"log_id": row.log_id, "partition": row.partition, "offset": row.offset, "appended_at": row.appended_at}
    event = {name: plain(value) for name, value in datum.items() if value is not None}
    return json.dumps({**place, "event": event}, ensure_ascii=False)


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
