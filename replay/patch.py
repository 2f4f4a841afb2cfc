"""JSON Patch (RFC 6902) over plain JSON documents: the language in which edits of requests are recorded."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any


def apply_patch(document: Any, operations: Iterable[Mapping[str, Any]]) -> Any:
    """The document after all operations; the one given stays as it was.

    Raises:
        ValueError: an operation that is malformed, that names a place that is not there, or a test that fails.
    """
    result = copy.deepcopy(document)
    for operation in operations:
        try:
            result = _apply(result, operation)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"patch does not apply: {operation!r}: {error!r}") from error
    return result


def _apply(document: Any, operation: Mapping[str, Any]) -> Any:
    op, path = operation["op"], _tokens(operation["path"])
    if op == "add":
        return _add(document, path, copy.deepcopy(operation["value"]))
    if op == "remove":
        return _remove(document, path)
    if op == "replace":
        return _replace(document, path, copy.deepcopy(operation["value"]))
    if op == "copy":
        return _add(document, path, copy.deepcopy(_get(document, _tokens(operation["from"]))))
    if op == "move":
        return _move(document, _tokens(operation["from"]), path)
    if op == "test":
        if not _same(_get(document, path), operation["value"]):
            raise ValueError(f"test failed at {operation['path']!r}")
        return document
    raise ValueError(f"unknown operation {op!r}, valid are add, remove, replace, move, copy, test")


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON values: true is not 1, as it is in Python."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _tokens(pointer: str) -> list[str]:
    """The reference tokens of a JSON pointer (RFC 6901)."""
    if pointer == "":
        return []
    if not pointer.startswith("/"):
        raise ValueError(f"pointer {pointer!r} does not begin with /")
    return [token.replace("~1", "/").replace("~0", "~") for token in pointer[1:].split("/")]


def _index(token: str, limit: int) -> int:
    if not (token.isascii() and token.isdecimal()) or (token[0] == "0" and token != "0"):
        raise ValueError(f"{token!r} is no index of an array")
    if int(token) >= limit:
        raise ValueError(f"index {token} is beyond the end")
    return int(token)


def _get(document: Any, path: list[str]) -> Any:
    for token in path:
        document = document[_index(token, len(document))] if isinstance(document, list) else document[token]
    return document


def _add(document: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    parent, last = _get(document, path[:-1]), path[-1]
    if isinstance(parent, list):
        parent.insert(len(parent) if last == "-" else _index(last, len(parent) + 1), value)
    else:
        parent[last] = value
    return document


def _remove(document: Any, path: list[str]) -> Any:
    if not path:
        return None
    parent, last = _get(document, path[:-1]), path[-1]
    del parent[_index(last, len(parent)) if isinstance(parent, list) else last]
    return document


def _replace(document: Any, path: list[str], value: Any) -> Any:
    _get(document, path)  # RFC 6902: the target must be there
    if not path:
        return value
    parent, last = _get(document, path[:-1]), path[-1]
    parent[_index(last, len(parent)) if isinstance(parent, list) else last] = value
    return document


def _move(document: Any, source: list[str], target: list[str]) -> Any:
    if target[: len(source)] == source and target != source:
        raise ValueError("a value cannot move into itself")
    value = _get(document, source)
    return _add(_remove(document, source), target, value)
