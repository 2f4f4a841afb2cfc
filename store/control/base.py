"""The contract of the control log: what gateway workers share, as facts that each of them follows.

A fact is a JSON object under a kind and a key. The last one written wins and None takes it away, so that the log can be
compacted: it stays as small as what holds now, whatever happened before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from schemas.errors import CorruptStore, UsageError

Value = dict[str, Any]

VALUE_BYTES_MAX = 64 << 20
"""The largest fact as JSON: above any request that the gateway takes, below what a broker takes."""

TOMBSTONE_S = 24 * 3600.0
"""How long a follower may be away and still learn of each deletion; one that was away for longer begins again at 0."""


@dataclass(frozen=True, slots=True)
class ControlRecord:
    """One fact as it was written: `position` grows with each, `value` is None where the key was taken away.

    `written_at` is the writer's wall clock (distributed: the broker's) in seconds since the epoch.
    """

    position: int
    kind: str
    key: str
    value: Value | None
    written_at: float


class ControlLog(Protocol):
    """A control log. Every method raises `LogUnavailable` when it does not answer.

    Methods may be called from several threads; one that waits in `follow` keeps no writer waiting.
    """

    def append(self, kind: str, key: str, value: Value | None) -> int:
        """Write a fact; its position. MUST NOT return before it is durable.

        After an exception the fact may have been written: facts MUST be such that writing one twice does no harm.

        Raises:
            UsageError: `kind` is empty or holds a slash, `key` is empty, or the value is too large.
        """
        ...

    def follow(self, position: int, *, wait_s: float = 0.0) -> Sequence[ControlRecord]:
        """Every fact after `position` (0: from the beginning) that no later one replaced, in order; nothing is left out.

        Waits up to `wait_s` for the first. The next call takes the position of the last record returned.

        Raises:
            LogChanged: the log is not the one that `position` came from; begin again at 0.
        """
        ...

    def latest(self, kind: str) -> dict[str, Value]:
        """What holds now: by key the last value of each that was not taken away."""
        ...

    def close(self) -> None:
        """Release everything; safe to call twice."""
        ...


def fold(records: Iterable[ControlRecord], kind: str) -> dict[str, Value]:
    """The facts of one kind that hold after these records."""
    found: dict[str, Value] = {}
    for record in records:
        if record.kind != kind:
            continue
        if record.value is None:
            found.pop(record.key, None)
        else:
            found[record.key] = record.value
    return found


def standing(records: Iterable[ControlRecord]) -> dict[tuple[str, str], Value]:
    """All facts that hold after these records, by kind and key, in the order in which they were written."""
    found: dict[tuple[str, str], Value] = {}
    for record in records:
        found.pop((record.kind, record.key), None)
        if record.value is not None:
            found[record.kind, record.key] = record.value
    return found


def encode(kind: str, key: str, value: Value | None, *, place: str) -> bytes | None:
    """A fact's JSON bytes, None for a deletion.

    Raises:
        UsageError: no log takes it.
    """
    if not kind or "/" in kind or not key:
        fault = f"kind {kind!r} and key {key!r}"
        raise UsageError(fault, operation="append", place=place, hint="a kind is a word without a slash, a key is not empty")
    if value is None:
        return None
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "surrogatepass")
    if len(data) > VALUE_BYTES_MAX:
        hint = "make the request smaller"
        raise UsageError(f"{len(data)} bytes; the control log takes {VALUE_BYTES_MAX}", operation="append", place=place, hint=hint)
    return data


def decode(data: bytes | None, *, place: str) -> Value | None:
    """The value of a fact.

    Raises:
        CorruptStore: the bytes are no JSON object.
    """
    if data is None:
        return None
    try:
        value = json.loads(data.decode("utf-8", "surrogatepass"))
    except ValueError as problem:
        value = problem
    if not isinstance(value, dict):
        hint = "something else wrote there; name another data directory or topic"
        raise CorruptStore("a record is no JSON object", operation="read control log", place=place, hint=hint)
    return value
