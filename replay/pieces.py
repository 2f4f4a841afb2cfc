"""A state in pieces, so that of two versions only what differs is stored twice.

A piece is JSON; in it `{"=": NAME}` stands for another piece, and `{"+": [...]}` for the parts of one long text or list
put together. Pieces are named by their contents, so what two versions have in common has the same names in both.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import orjson
from pydantic import BaseModel

from replay.persistent import Map, Vector
from replay.snapshot import document_of, plain
from replay.state import SessionState
from store.versions import name_of, references

RECORD_BYTES_MAX = 512
"""A record or a run of a list that is larger becomes a piece of its own."""

RUN_MAX = 16
"""Records in one run of a long list: a state grows at the end of its lists, so only the last run differs."""

NUMBERS_MAX = 1_024
"""The same for lists of numbers, such as token ids, which come whole and stay as they are."""

TEXT_MIN, TEXT_MAX = 2_048, 16_384
"""Characters of one part of a long text; a text of fewer than `TEXT_MAX` stays whole."""

_BREAK = re.compile(r"[\s,.;}]")
_CONTEXT, _RARITY = 16, 256
"""A text is cut after a break whose last 16 characters hash to 0 modulo 256: where it is cut depends on the text around
the cut alone, so an insertion changes the part that it is in and no other."""

_REFERENCE_BYTES = len(orjson.dumps({"=": name_of(b"")}))


class Pieces:
    """Cuts states of one session. What a state shares with one cut before is not looked at again."""

    def __init__(self) -> None:
        self.made: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._known: dict[int, tuple[Any, Any]] = {}

    def cut(self, state: SessionState) -> tuple[str, int]:
        """The name of the piece that stands for a state, and about how long the state is as one JSON document."""
        root = self._piece(document_of(self._record(state)))
        return root, self._sizes[root]

    def _fragment(self, value: Any) -> Any:
        """A value as it stands in a piece."""
        if isinstance(value, str):
            return value if len(value) < TEXT_MAX else self._joined(_parts(value))
        if isinstance(value, Map):
            return self._list([[plain(key), self._fragment(item)] for key, item in value.items()])
        if isinstance(value, tuple | list | Vector):
            return self._list([self._fragment(item) for item in value])
        if not isinstance(value, BaseModel) and not is_dataclass(value):
            return plain(value)
        found = self._known.get(id(value))
        if found is None:  # the value is kept beside what became of it, or its id might come to mean another one
            found = self._known[id(value)] = value, self._own(self._record(value))
        return found[1]

    def _record(self, value: Any) -> dict[str, Any]:
        names = type(value).model_fields if isinstance(value, BaseModel) else [item.name for item in fields(value)]
        return {name: self._fragment(getattr(value, name)) for name in names}

    def _list(self, items: list[Any]) -> Any:
        width = RUN_MAX if items and isinstance(items[0], dict | list) else NUMBERS_MAX
        return items if len(items) <= width else self._joined(_runs(items, width))

    def _joined(self, parts: Iterable[Any]) -> dict[str, Any]:
        """Parts of a text or a list; of many parts, parts of those."""
        names = [{"=": self._piece(part)} for part in parts]
        while len(names) > RUN_MAX:
            names = [{"=": self._piece({"+": run})} for run in _runs(names, RUN_MAX)]
        return {"+": names}

    def _own(self, fragment: Any) -> Any:
        return {"=": self._piece(fragment)} if len(orjson.dumps(fragment)) > RECORD_BYTES_MAX else fragment

    def _piece(self, fragment: Any) -> str:
        data = orjson.dumps(fragment)
        name = name_of(data)
        if name not in self.made:
            self.made[name] = data
            self._sizes[name] = len(data) + sum(self._sizes[child] - _REFERENCE_BYTES for child in references(data))
        return name


def whole(root: str, get: Callable[[str], bytes]) -> Any:
    """The document whose root piece has a name; `get` gives pieces."""
    return _whole(orjson.loads(get(root)), get)


def _whole(fragment: Any, get: Callable[[str], bytes]) -> Any:
    if isinstance(fragment, list):
        return [_whole(item, get) for item in fragment]
    if not isinstance(fragment, dict):
        return fragment
    if "=" in fragment:
        return whole(fragment["="], get)
    if "+" in fragment:
        parts = [_whole(part, get) for part in fragment["+"]]
        return "".join(parts) if isinstance(parts[0], str) else [item for part in parts for item in part]
    return {name: _whole(item, get) for name, item in fragment.items()}


def _runs(items: Sequence[Any], width: int) -> list[Sequence[Any]]:
    return [items[at : at + width] for at in range(0, len(items), width)]


def _parts(text: str) -> list[str]:
    """A long text cut where its own characters say so (content-defined chunking)."""
    parts, start = [], 0
    for found in _BREAK.finditer(text):
        end = found.end()
        if end - start > TEXT_MAX:
            parts += [text[at : min(end, at + TEXT_MAX)] for at in range(start, end, TEXT_MAX)]
            start = end
        elif end - start >= TEXT_MIN and zlib.crc32(text[end - _CONTEXT : end].encode()) % _RARITY == 0:
            parts.append(text[start:end])
            start = end
    return parts + [text[at : at + TEXT_MAX] for at in range(start, len(text), TEXT_MAX)]
