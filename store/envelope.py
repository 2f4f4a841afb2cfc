"""Which kind each framed record is, found by walking over the envelopes of a whole batch at once.

Nothing is decoded: a walk only steps over the fields before the payload, all records side by side in arrays. What it
finds is where the one byte stands that says which payload is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from schemas.registry import HEADER_BYTES, Schema

_Array = np.ndarray[Any, Any]
IRREGULAR = -1
"""Instead of a kind: not laid out as this schema's canonical bytes are."""

_VARINT_BYTES_MAX = 10


def kinds_of(values: Sequence[bytes], schema: Schema) -> _Array:
    """Number of the kind of each record in `schema.kinds`, or `IRREGULAR`."""
    walk = _Walk(values)
    for field in schema.definition["fields"]:
        if field["name"] in schema.kinds:
            break
        walk.step(field["type"], schema)
    return walk.kinds(len(schema.kinds))


class _Walk:
    """Positions in the bytes of all records, moved over one field after another."""

    def __init__(self, values: Sequence[bytes]) -> None:
        lengths = np.fromiter(map(len, values), np.int64, len(values))
        # A few zero bytes at the end let every step read where it stands; `fine` says whether it was right to.
        self._data = np.frombuffer(b"".join([*values, bytes(64)]), np.uint8)
        self._ends = np.cumsum(lengths)
        self._at = self._ends - lengths + HEADER_BYTES
        self._fine = self._at <= self._ends
        self._last = len(self._data) - 1

    def step(self, kind: Any, schema: Schema) -> None:
        """Move over one field."""
        self._move(kind, schema, self._fine)
        self._fine = self._fine & (self._at <= self._ends)

    def _move(self, kind: Any, schema: Schema, mask: _Array) -> None:
        if isinstance(kind, list):
            branch = self._byte()
            inner = next(item for item in kind if item != "null")
            present = 2 * kind.index(inner)
            self._fine = self._fine & (~mask | (branch == present) | (branch == 2 - present))
            self._at = np.where(mask, self._at + 1, self._at)
            self._move(inner, schema, mask & (branch == present))
            return
        name = kind["type"] if isinstance(kind, dict) else kind
        if name in ("string", "bytes"):
            length = self._varint(mask)
            self._fine = self._fine & (~mask | ((length >= 0) & (length <= self._ends - self._at)))
            self._at = np.where(mask & self._fine, self._at + length, self._at)
        elif name in ("long", "int", "enum"):
            self._varint(mask)
        else:
            self._at = np.where(mask, self._at + _fixed_size(kind, schema), self._at)

    def _byte(self) -> _Array:
        found: _Array = self._data[np.minimum(self._at, self._last)]
        return found

    def _varint(self, mask: _Array) -> _Array:
        """Read an Avro long where `mask` holds."""
        value = np.zeros(len(self._at), np.uint64)
        going = mask
        for place in range(_VARINT_BYTES_MAX):
            byte = self._byte()
            value = np.where(going, value | (byte.astype(np.uint64) & np.uint64(0x7F)) << np.uint64(7 * place), value)
            self._at = np.where(going, self._at + 1, self._at)
            going = going & (byte >= 0x80)
            if not going.any():
                break
        self._fine = self._fine & ~going
        return (value >> np.uint64(1)).astype(np.int64) ^ -(value & np.uint64(1)).astype(np.int64)

    def kinds(self, count: int) -> _Array:
        """The one payload of `count` that is there: null bytes before it, the second branch, null bytes at the very end."""
        window = self._data[np.minimum(self._at[:, None] + np.arange(count), self._last)]
        kinds = (window != 0).argmax(axis=1)
        begun = window[np.arange(len(kinds)), kinds] == 2
        after = count - 1 - kinds
        places = self._ends[:, None] - 1 - np.arange(count)
        rest = self._data[np.maximum(places, 0)]
        zeros = np.where((rest != 0).any(axis=1), (rest != 0).argmax(axis=1), count)
        fits = self._at + kinds + 1 <= self._ends - after
        return np.where(self._fine & begun & (zeros >= after) & fits, kinds, IRREGULAR)


def _fixed_size(kind: Any, schema: Schema) -> int:
    """Bytes of a `fixed`, which may be named by a definition further up."""
    if isinstance(kind, dict):
        return int(kind["size"])
    return _sizes(schema)[kind]


def _sizes(schema: Schema) -> dict[str, int]:
    """Sizes of the fixed types that the envelope defines."""
    found: dict[str, int] = {}
    for field in schema.definition["fields"]:
        branches = field["type"] if isinstance(field["type"], list) else [field["type"]]
        for branch in branches:
            if isinstance(branch, dict) and branch["type"] == "fixed":
                found[branch["name"]] = branch["size"]
    return found
