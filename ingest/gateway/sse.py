"""An incremental parser of server-sent events that keeps the bytes as they came, so that they can be passed on untouched.

Follows the WHATWG HTML standard, section "Parsing an event stream", on bytes: any split of the input, LF, CR and CRLF,
comments, several data lines, a byte order mark. Text stays undecoded: what is in `data` is the reader's business.
"""

from __future__ import annotations

import re
from typing import NamedTuple

BOM = b"\xef\xbb\xbf"

EVENT_BYTES_MAX = 16 << 20
"""A longer event is taken for a stream that never ends its lines; 16 MiB holds the token ids of a prompt of two million."""

_LINE_END = re.compile(rb"\r\n|\n|\r")


class Block(NamedTuple):
    """One event with the bytes it came in: `data` is None where a block held only comments or blank lines."""

    raw: bytes
    data: bytes | None
    name: bytes = b""


class EventTooLong(ValueError):
    """An event exceeds `EVENT_BYTES_MAX`."""


class EventParser:
    """Turns pieces of a stream into blocks; the concatenation of all `raw` is the input."""

    def __init__(self) -> None:
        self._pending = b""  # bytes of the block that is not complete yet
        self._searched = 0  # bytes of it known to hold no end of a block
        self._line_start = 0  # where its last, unfinished line begins (only kept once a CR was seen)
        self._carriage = False  # a CR was seen: lines may end in three ways from now on
        self._after_cr = False  # the last block ended in a CR, so an LF that follows belongs to it
        self._first = True

    @property
    def between_events(self) -> bool:
        """Whether what comes next begins an event and lines have ended in LF only."""
        return not self._pending and not self._carriage

    def feed(self, piece: bytes) -> list[Block]:
        """The blocks that this piece completes.

        Raises:
            EventTooLong: no end of the event within the limit.
        """
        if not self._carriage and b"\r" in piece:
            self._carriage = True
            self._line_start = self._pending.rfind(b"\n") + 1
        self._pending = self._pending + piece if self._pending else piece
        blocks = self._by_any_line() if self._carriage else self._by_line_feed()
        if len(self._pending) > EVENT_BYTES_MAX:
            raise EventTooLong(f"an event of more than {EVENT_BYTES_MAX} bytes")
        return blocks

    def close(self) -> Block | None:
        """What was left without the blank line that ends a block, read as if it stood there; None if nothing was."""
        raw, self._pending = self._pending, b""
        return self._block(raw) if raw.strip(b"\r\n") else None

    def _by_line_feed(self) -> list[Block]:
        """The usual case, two searches in C per block: no CR was ever seen."""
        blocks, start, pending = [], 0, self._pending
        if pending.startswith(b"\n"):  # a blank line with nothing before it
            self._first = False
            start = len(pending) - len(pending.lstrip(b"\n"))
            blocks.append(Block(pending[:start], None))
        end = pending.find(b"\n\n", max(start, self._searched))
        while end >= 0:
            blocks.append(self._block(pending[start : end + 2]))
            start = end + 2
            end = pending.find(b"\n\n", start)
        if start:
            self._pending = pending[start:]
        self._searched = max(0, len(self._pending) - 1)
        return blocks

    def _by_any_line(self) -> list[Block]:
        blocks, start, line, pending = [], 0, self._line_start, self._pending
        if self._after_cr and pending.startswith(b"\n"):
            blocks.append(Block(b"\n", None))
            start = line = 1
        for end in _LINE_END.finditer(pending, line):
            if end.start() == line:
                blocks.append(self._block(pending[start : end.end()]))
                start = end.end()
            line = end.end()
        if start == len(pending):
            self._after_cr = pending.endswith(b"\r") or (self._after_cr and not pending)
        elif line == len(pending) and pending.endswith(b"\r"):
            line -= 1 + len(_last_line(pending[start : line - 1]))  # half a CRLF perhaps: look again with the next piece
        self._pending, self._line_start = pending[start:], line - start
        return blocks

    def _block(self, raw: bytes) -> Block:
        text = raw
        if self._first:
            self._first = False
            text = raw.removeprefix(BOM)
        if text.startswith(b"data: ") and text.endswith(b"\n\n") and text.find(b"\n") == len(text) - 2 and not self._carriage:
            return Block(raw, text[6:-2])
        return _read(raw, text)


def _last_line(text: bytes) -> bytes:
    return _LINE_END.split(text)[-1]


def _read(raw: bytes, text: bytes) -> Block:
    data: list[bytes] = []
    name = b""
    for line in _LINE_END.split(text):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    return Block(raw, b"\n".join(data) if data else None, name)
