"""Immutable collections that share what they have in common, so that a state per event costs a few tuples and no copy.

`Vector` is Bagwell's and Hickey's trie of 32-wide nodes with a tail; `Map` is a hash trie that keeps the order of insertion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

_BITS = 5
"""Bits of an index that one level of a trie consumes: nodes are 32 wide."""
_WIDTH = 1 << _BITS
_MASK = _WIDTH - 1
_HASH_BITS = 60
"""Bits of a hash that a map's trie uses; below its last level a leaf holds all that collide."""

Node = tuple[Any, ...]


class Vector(Generic[T]):
    """An immutable sequence; `append` costs O(log32 n) and leaves the old vector as it was."""

    __slots__ = ("_count", "_root", "_shift", "_tail")

    def __init__(self, values: Iterable[T] = ()) -> None:
        self._count, self._shift = 0, _BITS
        self._root: Node = ()
        self._tail: tuple[T, ...] = ()
        for block in _blocks(tuple(values)):
            self._count, self._shift, self._root, self._tail = self._with_block(block)

    def _with_block(self, tail: tuple[T, ...]) -> tuple[int, int, Node, tuple[T, ...]]:
        """The parts of a vector whose full tail went into the trie and whose new tail is `tail`."""
        root, shift = self._root, self._shift
        if self._tail:
            index = self._count - len(self._tail)
            if index >> _BITS >= 1 << shift:
                root, shift = (root, _path(shift, self._tail)), shift + _BITS
            else:
                root = _push(root, shift, index, self._tail)
        return self._count + len(tail), shift, root, tail

    def append(self, value: T) -> Vector[T]:
        """This vector and one more value."""
        new: Vector[T] = Vector.__new__(Vector)
        if len(self._tail) < _WIDTH:
            new._count, new._shift, new._root, new._tail = self._count + 1, self._shift, self._root, (*self._tail, value)
        else:
            new._count, new._shift, new._root, new._tail = self._with_block((value,))
        return new

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> T:
        at = index + self._count if index < 0 else index
        if not 0 <= at < self._count:
            raise IndexError(f"{index} in a vector of {self._count}")
        if at >= self._count - len(self._tail):
            return self._tail[at - self._count + len(self._tail)]
        node, shift = self._root, self._shift
        while shift:
            node, shift = node[(at >> shift) & _MASK], shift - _BITS
        return node[at & _MASK]  # type: ignore[no-any-return]  # nodes of several depths have no common type

    def __iter__(self) -> Iterator[T]:
        yield from _walk(self._root, self._shift)
        yield from self._tail

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vector):
            return NotImplemented
        return self is other or (len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True)))

    __hash__ = None  # type: ignore[assignment]  # values need not be hashable

    def __repr__(self) -> str:
        return f"Vector({list(self)!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        item = handler(get_args(source)[0])
        return core_schema.no_info_after_validator_function(cls, core_schema.list_schema(item))


def _blocks(values: tuple[T, ...]) -> Iterator[tuple[T, ...]]:
    return (values[at : at + _WIDTH] for at in range(0, len(values), _WIDTH))


def _path(shift: int, leaf: Node) -> Node:
    """A branch of single children down to a leaf."""
    while shift:
        leaf, shift = (leaf,), shift - _BITS
    return leaf


def _push(node: Node, shift: int, index: int, leaf: Node) -> Node:
    at = (index >> shift) & _MASK
    if at == len(node):
        return (*node, _path(shift - _BITS, leaf))
    return (*node[:at], _push(node[at], shift - _BITS, index, leaf), *node[at + 1 :])


def _walk(node: Node, shift: int) -> Iterator[Any]:
    if shift == 0:
        yield from node
        return
    for child in node:
        yield from _walk(child, shift - _BITS)


class Map(Generic[K, V]):
    """An immutable mapping in order of insertion; `set` costs O(log32 n) and leaves the old map as it was."""

    __slots__ = ("_order", "_root")

    def __init__(self, pairs: Iterable[tuple[K, V]] = ()) -> None:
        self._root: Any = {}
        self._order: Vector[K] = Vector()
        for key, value in pairs:
            self._root, self._order = self._with(key, value)

    def _with(self, key: K, value: V) -> tuple[Any, Vector[K]]:
        order = self._order if key in self else self._order.append(key)
        return _put(self._root, key, value, _hash(key), 0), order

    def set(self, key: K, value: V) -> Map[K, V]:
        """This map with one entry set; a new key goes to the end, a known one keeps its place."""
        new: Map[K, V] = Map.__new__(Map)
        new._root, new._order = self._with(key, value)
        return new

    def get(self, key: K) -> V | None:
        """The value of a key, or None."""
        node, bits = self._root, _hash(key)
        while type(node) is tuple:
            node, bits = node[bits & _MASK], bits >> _BITS
        return node.get(key)  # type: ignore[no-any-return]  # leaves and branches have no common type

    def __contains__(self, key: K) -> bool:
        return self.get(key) is not None

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[K]:
        return iter(self._order)

    def values(self) -> Iterator[V]:
        """The values in order of insertion of their keys."""
        return (value for _, value in self.items())

    def items(self) -> Iterator[tuple[K, V]]:
        """Keys and values in order of insertion."""
        for key in self._order:
            value = self.get(key)
            assert value is not None
            yield key, value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Map):
            return NotImplemented
        return self is other or (self._order == other._order and all(self.get(key) == other.get(key) for key in self))

    __hash__ = None  # type: ignore[assignment]  # values need not be hashable

    def __repr__(self) -> str:
        return f"Map({list(self.items())!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        key, value = (handler(argument) for argument in get_args(source))
        pair = core_schema.tuple_positional_schema([key, value])
        return core_schema.no_info_after_validator_function(cls, core_schema.list_schema(pair))


def _hash(key: Any) -> int:
    return hash(key) & ((1 << _HASH_BITS) - 1)


def _put(node: Any, key: Any, value: Any, bits: int, level: int) -> Any:
    """A node with one entry set; a leaf (dict) of more than 32 entries becomes a branch of leaves."""
    if type(node) is dict:
        leaf = {**node, key: value}
        return leaf if len(leaf) <= _WIDTH or level >= _HASH_BITS else _branch(leaf, level)
    at = bits & _MASK
    return (*node[:at], _put(node[at], key, value, bits >> _BITS, level + _BITS), *node[at + 1 :])


def _branch(leaf: dict[Any, Any], level: int) -> Node:
    children: list[dict[Any, Any]] = [{} for _ in range(_WIDTH)]
    for key, value in leaf.items():
        children[(_hash(key) >> level) & _MASK][key] = value
    return tuple(children)
