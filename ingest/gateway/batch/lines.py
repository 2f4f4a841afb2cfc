"""A batch file line by line: read as a stream, and every fault of it named with its line before anything is accepted."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schemas.errors import UsageError
from schemas.requests import load
from schemas.settings import Settings

FAULTS_SHOWN_MAX = 10
"""So many faulty lines are named; the others are counted."""

CUSTOM_ID_CHARACTERS_MAX = 512

_FIELDS = frozenset(("custom_id", "method", "url", "body"))


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a file."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]

    @property
    def model(self) -> str:
        """The model that is asked."""
        return str(self.body["model"])


@dataclass
class Survey:
    """What a file holds, once all of it was found good."""

    total: int = 0
    urls: set[str] = field(default_factory=set)
    models: dict[str, int] = field(default_factory=dict)
    """By model the first line that asks for it."""


def survey(path: Path, settings: Settings, urls: Collection[str]) -> Survey:
    """Look at every line of a file; memory grows by eight bytes of digest for each.

    Raises:
        UsageError: a line is no request, or the file is empty or too long. Nothing of it is accepted then.
    """
    found, faults, seen = Survey(), Faults(), set[int]()
    for number, data in _numbered(path, settings.gateway.body_bytes_max):
        if number > settings.batch.lines_max:
            raise UsageError(f"more than {settings.batch.lines_max} lines", operation="read batch", hint="split it, or set batch.lines_max")
        try:
            line = _line(number, data, settings, urls)
            digest = int.from_bytes(hashlib.blake2b(line.custom_id.encode("utf-8", "surrogatepass"), digest_size=8).digest())
            if digest in seen:
                raise ValueError(f"custom_id {line.custom_id[:80]!r} stands on an earlier line too")
        except ValueError as error:
            faults.add(number, str(error))
            continue
        seen.add(digest)
        found.total += 1
        found.urls.add(line.url)
        found.models.setdefault(line.model, number)
    if not found.total and not faults.count:
        raise UsageError("the file holds no request", operation="read batch", hint="one JSON object a line: custom_id, method, url, body")
    faults.check()
    return found


@dataclass
class Faults:
    """Faulty lines, as far as they are named."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, number: int, fault: str) -> None:
        """One more."""
        self.count += 1
        if len(self.shown) < FAULTS_SHOWN_MAX:
            self.shown.append(f"line {number}: {fault}")

    def check(self) -> None:
        """Raise if there are any."""
        if self.count:
            more = f"; and {self.count - len(self.shown)} more lines" if self.count > len(self.shown) else ""
            hint = "nothing was submitted; correct the file and submit it again"
            raise UsageError("; ".join(self.shown) + more, operation="read batch", hint=hint)


def lines(path: Path, settings: Settings, urls: Collection[str]) -> Iterator[Line]:
    """The requests of a file that was surveyed.

    Raises:
        UsageError: by settings that changed since then a line is none any more.
    """
    for number, data in _numbered(path, settings.gateway.body_bytes_max):
        try:
            line = _line(number, data, settings, urls)
        except ValueError as error:
            fault = f"line {number} of the input file is no request by the settings of now: {error}"
            raise UsageError(fault, operation="read batch") from error
        yield line


def _numbered(path: Path, bytes_max: int) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, counted from 1; of one over the limit just enough to see that it is."""
    with path.open("rb") as file:
        number = 0
        while data := file.readline(bytes_max + 2):
            number += 1
            whole = data.endswith(b"\n")
            if data.strip():
                yield number, data
            while not whole and (rest := file.readline(1 << 20)):
                whole = rest.endswith(b"\n")


def _line(number: int, data: bytes, settings: Settings, urls: Collection[str]) -> Line:
    """The request of a line. Raises `ValueError` with what is wrong, and what would be right."""
    if len(data) > settings.gateway.body_bytes_max:
        raise ValueError(f"over {settings.gateway.body_bytes_max} bytes, the limit of gateway.body_bytes_max")
    try:
        value = load(data)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if strangers := sorted(value.keys() - _FIELDS):
        raise ValueError(f"unknown field {strangers[0][:40]!r}; valid: {', '.join(sorted(_FIELDS))}")
    custom_id, method, url, body = (value.get(name) for name in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= CUSTOM_ID_CHARACTERS_MAX:
        raise ValueError(f"custom_id must be a text of 1 to {CUSTOM_ID_CHARACTERS_MAX} characters")
    if method != "POST":
        raise ValueError(f"method must be 'POST', not {str(method)[:20]!r}")
    if not isinstance(url, str) or url not in urls:
        raise ValueError(f"url {str(url)[:80]!r} is not served in batches; valid: {', '.join(sorted(urls))}")
    if not isinstance(body, dict):
        raise ValueError("body must be a JSON object, the request itself")
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise ValueError("body.model must name a model")
    if body.get("stream"):
        raise ValueError("body.stream cannot be true: a batch answers in whole")
    return Line(number, custom_id, url, body)
