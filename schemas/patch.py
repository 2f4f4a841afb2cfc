"""JSON Patch (RFC 6902) over plain JSON documents: the language in which edits of requests are recorded."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

Operation = dict[str, Any]

OPERATIONS_MAX = 1000
"""Operations of one edit; a larger change is better written as one `replace`."""

_MEMBERS = {"add": "value", "replace": "value", "test": "value", "copy": "from", "move": "from", "remove": None}


def read_patch(value: Any) -> list[Operation]:
    """The operations of a patch as it came from outside.

    Raises:
        ValueError: it is no array of operations, or one of them is not as RFC 6902 has it; says which and what is valid.
    """
    if not isinstance(value, list) or not value:
        raise ValueError('a patch is an array of operations, such as [{"op": "replace", "path": "/temperature", "value": 0}]')
    if len(value) > OPERATIONS_MAX:
        raise ValueError(f"{len(value)} operations; one patch has at most {OPERATIONS_MAX}")
    for number, operation in enumerate(value, 1):
        _check_shape(number, operation)
    return value


def _check_shape(number: int, operation: Any) -> None:
    if not isinstance(operation, dict):
        raise ValueError(f"operation {number} is no object")
    op = operation.get("op")
    if not isinstance(op, str) or op not in _MEMBERS:
        raise ValueError(f"operation {number}: op {op!r} is unknown, valid are {', '.join(_MEMBERS)}")
    for name in ("path", "from") if _MEMBERS[op] == "from" else ("path",):
        if not isinstance(operation.get(name), str):
            raise ValueError(f"operation {number} ({op}) needs {name!r}, a JSON pointer such as /messages/0/content")
    if _MEMBERS[op] == "value" and "value" not in operation:
        raise ValueError(f"operation {number} ({op}) needs a value")


def apply_patch(document: Any, operations: Iterable[Mapping[str, Any]]) -> Any:
    """The document after all operations; the one given stays as it was.

    Raises:
        ValueError: an operation that is malformed, that names a place that is not there, or a test that fails.
    """
    result = copy.deepcopy(document)
    for number, operation in enumerate(operations, 1):
        try:
            result = _apply(result, operation)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"operation {number} does not apply: {_said(operation)}: {_cause(error)}") from error
    return result


def _said(operation: Any) -> str:
    """An operation in a few words."""
    if not isinstance(operation, Mapping):
        return f"{operation!r:.60}"
    source = f" from {operation['from']}" if "from" in operation else ""
    return f"{operation.get('op')} {operation.get('path')}{source}"


def _cause(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"there is no {error.args[0]!r}"
    if isinstance(error, ValueError):
        return str(error)
    return "there is nothing at that place that could hold it"


def diff(before: Any, after: Any, path: str = "") -> list[Operation]:
    """Operations that turn one document into the other: what is equal on both sides of a change stays out of it."""
    if isinstance(before, dict) and isinstance(after, dict):
        return _diff_objects(before, after, path)
    if isinstance(before, list) and isinstance(after, list):
        return _diff_arrays(before, after, path)
    return [] if _same(before, after) else [{"op": "replace", "path": path, "value": after}]


def _diff_objects(before: dict[str, Any], after: dict[str, Any], path: str) -> list[Operation]:
    found: list[Operation] = [{"op": "remove", "path": f"{path}/{_escaped(key)}"} for key in before if key not in after]
    for key, value in after.items():
        place = f"{path}/{_escaped(key)}"
        found += diff(before[key], value, place) if key in before else [{"op": "add", "path": place, "value": value}]
    return found


def _diff_arrays(before: list[Any], after: list[Any], path: str) -> list[Operation]:
    """What stands between the common beginning and the common end: changed in pairs, then the rest removed or added."""
    shorter = min(len(before), len(after))
    start = next((i for i in range(shorter) if not _same(before[i], after[i])), shorter)
    end = next((i for i in range(shorter - start) if not _same(before[-1 - i], after[-1 - i])), shorter - start)
    old, new = before[start : len(before) - end], after[start : len(after) - end]
    pairs = min(len(old), len(new))
    found = [operation for i in range(pairs) for operation in diff(old[i], new[i], f"{path}/{start + i}")]
    found += [{"op": "remove", "path": f"{path}/{start + i}"} for i in reversed(range(pairs, len(old)))]
    found += [{"op": "add", "path": f"{path}/{start + i}", "value": new[i]} for i in range(pairs, len(new))]
    return found


def value_at(document: Any, pointer: str) -> Any:
    """What stands at a place.

    Raises:
        ValueError: nothing does.
    """
    try:
        return _get(document, _tokens(pointer))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"there is nothing at {pointer!r}") from error


def assignment(document: Any, text: str) -> Operation:
    """The operation of `path=value`: a dotted path or a JSON pointer, the value JSON or else taken as a text.

    `messages.-1.content=…` counts from the end; a field that is not there yet is added.

    Raises:
        ValueError: no `=`, or the place it names cannot be there.
    """
    path, sign, value = text.partition("=")
    if not sign or not path.strip("./ "):
        raise ValueError(f"{text!r} is no path=value, such as temperature=0 or messages.-1.content=Hello")
    tokens = _tokens(path) if path.startswith("/") else path.strip().split(".")
    place: list[str] = []
    at = document
    for token in tokens[:-1]:
        place.append(_from_end(at, token))
        try:
            at = _get(at, place[-1:])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"there is no {'.'.join(place)!r} in the request") from error
    place.append(_from_end(at, tokens[-1]))
    there = isinstance(at, dict) and place[-1] not in at
    pointer = "".join(f"/{_escaped(token)}" for token in place)
    return {"op": "add" if there or place[-1] == "-" else "replace", "path": pointer, "value": _value(value)}


def _from_end(array: Any, token: str) -> str:
    """An index that counts from the end as one that counts from the start."""
    if isinstance(array, list) and token.startswith("-") and token[1:].isdecimal() and 0 < int(token[1:]) <= len(array):
        return str(len(array) - int(token[1:]))
    return token


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _escaped(token: str) -> str:
    return token.replace("~", "~0").replace("/", "~1")


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
