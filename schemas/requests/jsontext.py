"""JSON as clients and engines really send it: read leniently, written compactly, and single values taken out by type."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson

from schemas.events import clean_text


def load(data: bytes) -> Any:
    """A JSON value; what only Python's reader takes (NaN, lone surrogates, huge integers) is taken too.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return orjson.loads(data)
    except ValueError:
        try:
            return json.loads(data.decode())
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def dump(value: Any, *, sort_keys: bool = False) -> bytes:
    """The compact JSON text of a value, in UTF-8; lone surrogates become U+FFFD."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS if sort_keys else None)
    except TypeError:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys)
        return clean_text(text).encode()


def text_of(value: Any) -> str | None:
    """The value if it is a text."""
    return value if isinstance(value, str) else None


def long_of(value: Any) -> int | None:
    """The value if it is an integer of 64 bits."""
    return value if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63 else None


def double_of(value: Any) -> float | None:
    """The value if it is a number other than NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number + 0.0  # as an event has it: no -0.0
