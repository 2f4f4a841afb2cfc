"""What every store asks of its callers: one rule for keys, so that a key valid in a folder is valid in S3."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from schemas.errors import AlreadyExists, UsageError
from store.objects.base import Lock

KEY_BYTES_MAX = 1024  # S3's limit
SEGMENT_BYTES_MAX = 255  # the longest file name of common file systems, which MinIO inherits
_REFUSED = re.compile(r"[\x00-\x1f\x7f\\]")


def check_key(key: str, *, operation: str) -> str:
    """The key itself when it is safe: relative, no empty or dotted segment, no control character or backslash.

    Segments that start with a dot are refused: `..` leaves the store, and the others are a store's own files.

    Raises:
        UsageError: the key is not one that every store can hold.
    """
    fault = _fault(key)
    if fault:
        hint = "keys look like events/tenant=a/day=2026-01-31/x.parquet"
        raise UsageError(f"object key {key[:200]!r} {fault}", operation=operation, hint=hint)
    return key


def check_prefix(prefix: str, *, operation: str) -> str:
    """The prefix itself when some valid key could start with it; empty means everything."""
    folder, _, _ = prefix.rpartition("/")
    if prefix:
        check_key((folder + "/" if folder or prefix.startswith("/") else "") + "x", operation=operation)
        check_key(prefix.rstrip("/") or prefix, operation=operation)
    return prefix


def check_range(key: str, start: int, length: int) -> None:
    """Refuse a range that counts from the end or backwards, which stores read differently."""
    if start < 0 or length < 0:
        raise UsageError(f"range {start}+{length} is negative", operation="get", place=key)


def check_lock(lock: Lock) -> None:
    """Refuse a lock without an end before anything is written."""
    if lock.mode != "none":
        check_until(lock)


def check_until(lock: Lock) -> datetime:
    """End (UTC) of a lock that is not "none".

    Raises:
        UsageError: the end is missing or has no time zone.
    """
    if lock.until is None or lock.until.tzinfo is None:
        hint = "Lock(mode, until=<UTC datetime>)"
        raise UsageError(f"a {lock.mode} lock needs an end with a time zone", operation="create", hint=hint)
    return lock.until.astimezone(UTC)


def open_source(path: Path) -> BinaryIO:
    """The caller's file, opened to be stored.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read the file: {error.strerror}", operation="create", place=str(path)) from error


def taken(key: str) -> AlreadyExists:
    """The answer to a second object under one key."""
    return AlreadyExists("the object exists with other content", operation="create", place=key, hint="objects are never overwritten")


def _fault(key: str) -> str:
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        return "holds a lone surrogate"
    if not 0 < len(encoded) <= KEY_BYTES_MAX:
        return f"must have 1 to {KEY_BYTES_MAX} bytes"
    if _REFUSED.search(key):
        return "holds a backslash or a control character"
    for segment in key.split("/"):
        if not segment:
            return "has an empty segment"
        if segment.startswith("."):
            return "has a segment that starts with a dot"
        if len(segment.encode()) > SEGMENT_BYTES_MAX:
            return f"has a segment of more than {SEGMENT_BYTES_MAX} bytes"
    return ""
