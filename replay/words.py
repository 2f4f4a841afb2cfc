"""Words and figures as a person reads them: durations, ids, shortened text that cannot play tricks on a terminal."""

from __future__ import annotations

import json
import unicodedata
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TRICKS = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories that move the cursor, change direction or show nothing: a recorded text may not do that to its reader."""


def when(at: int) -> datetime:
    """Microseconds since the epoch as a UTC time; what no calendar holds becomes its nearest end."""
    try:
        return _EPOCH + timedelta(microseconds=at)
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC) if at > 0 else datetime.min.replace(tzinfo=UTC)


def clock(at: int) -> str:
    """Time of day to the millisecond."""
    return when(at).strftime("%H:%M:%S.%f")[:-3]


def date(at: int) -> str:
    """The day."""
    return when(at).strftime("%Y-%m-%d")


def iso(at: int) -> str:
    """Full UTC time to the microsecond."""
    return when(at).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def duration(us: int) -> str:
    """A duration with three figures that matter."""
    if us < 0:
        return f"-{duration(-us)}"
    if us < 1_000:
        return f"{us} µs"
    if us < 1_000_000:
        return f"{us / 1_000:.{1 if us < 9_950 else 0}f} ms"
    seconds = us / 1_000_000
    if seconds < 60:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def relative(us: int) -> str:
    """Milliseconds since the start, for a column of figures."""
    ms = us / 1_000
    return f"{ms:+,.1f}" if abs(ms) < 10_000 else f"{ms:+,.0f}"


def count(n: int, noun: str, plural: str | None = None) -> str:
    """`1 token`, `2 tokens`, `1,000 tokens`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def short_id(value: bytes) -> str:
    """The last eight hex digits: the first ones of a UUIDv7 are time, and alike within a session."""
    return value.hex()[-8:]


def uuid(value: bytes) -> str:
    """An id as people write it; other lengths as hex."""
    return str(UUID(bytes=value)) if len(value) == 16 else value.hex()


def printable(text: str) -> str:
    """Text on one line: line ends as ⏎, whatever else could move a cursor as its code point."""
    text = text.replace("\r\n", "\n")
    return "".join("⏎" if c == "\n" else "→" if c == "\t" else _visible(c) for c in text)


def paragraph(text: str) -> str:
    """Text with its lines kept and everything else that could move a cursor as its code point."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(c if c == "\n" else _visible(c) for c in text)


def _visible(c: str) -> str:
    # A joiner or a variation selector is part of the letter or emoji before it.
    if (c.isascii() and c.isprintable()) or c in "\u200c\u200d":
        return c
    return f"‹{ord(c):04X}›" if unicodedata.category(c) in _TRICKS else c


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters on one line; what is left out is counted at the end."""
    if len(text) <= limit:
        return printable(text)
    return f"{printable(text[:limit]).rstrip()}… (+{len(text) - limit:,})"


def content_text(content: Any) -> str:
    """What a message says: its text, its text parts, and a word for each part that is no text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(_part(part) for part in content)
    return json.dumps(content, ensure_ascii=False)


def _part(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    return f"[{kind}]"
