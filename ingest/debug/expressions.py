"""Conditions of breakpoints: a small language over a request, written like Python and evaluated by nothing but this page.

Python's parser reads the text, an allow-list of its nodes is compiled to closures, and no name reaches an object of this
process. Every step is bounded: the text, its nodes and calls, the text that functions look at. `matches` runs RE2, whose
time grows with the text and never with the pattern's ambiguity.
"""

from __future__ import annotations

import ast
import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from schemas.errors import UsageError

Facts = Mapping[str, Any]
"""What an expression may ask about a request, by name; every name of `NAMES` is there."""

NAMES: dict[str, str] = {
    "model": "the model asked for",
    "messages": "the list of messages",
    "last": "the text of the last message",
    "tools": "the list of tools",
    "stream": "whether the client wants a stream",
    "temperature": "the temperature, null where none was sent",
    "max_tokens": "the limit of tokens, null where none was sent",
    "n": "how many sequences",
    "tags": "the request's tags",
    "key": "the API key's id",
    "user": "who asks, as the request says",
    "endpoint": "the path of the endpoint",
    "params": 'any field of the request: params["top_p"]',
}

TEXT_MAX = 2000
"""Characters of an expression."""
NODES_MAX = 300
"""Parts of an expression; each costs at most one look at the request."""
CALLS_MAX = 20
"""Calls in an expression: they are what looks at whole texts."""
DEPTH_MAX = 40
PATTERN_MAX = 500
"""Characters of a pattern for `matches`."""
LOOKED_AT_MAX = 1 << 17
"""Characters of a text, or of all texts of a list, that functions look at; what follows them is not seen."""

_Part = Callable[[Facts], Any]


@dataclass(frozen=True)
class Expression:
    """A condition that was read and found valid."""

    text: str
    _evaluate: _Part = field(repr=False, compare=False)

    def holds(self, facts: Facts) -> bool:
        """Whether the request is one of those meant. Never raises: what has no value is null, and compares as false."""
        try:
            return bool(self._evaluate(facts))
        except RecursionError:  # two values nested a thousand deep, compared
            return False


def read_expression(text: str) -> Expression:
    """The condition of a text.

    Raises:
        UsageError: it is not valid; says at which column, and what is valid there.
    """
    if not text.strip():
        raise UsageError("the expression is empty", operation="read expression", hint='for example: contains(last, "refund")')
    if len(text) > TEXT_MAX:
        raise UsageError(f"{len(text)} characters; an expression has at most {TEXT_MAX}", operation="read expression")
    body = _parse(text)
    nodes = list(ast.walk(body))
    calls = sum(isinstance(node, ast.Call) for node in nodes)
    if len(nodes) > NODES_MAX or calls > CALLS_MAX:
        fault = f"too long: {len(nodes)} parts and {calls} calls, at most {NODES_MAX} and {CALLS_MAX} are taken"
        raise UsageError(fault, operation="read expression", hint="make several breakpoints of it")
    return Expression(text, _Compiler(text).part(body, 0))


def _parse(text: str) -> ast.expr:
    line = text.replace("\n", " ").replace("\r", " ").replace("\t", " ")
    indent = len(line) - len(line.lstrip())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a pattern is what a person means
            return ast.parse(line.strip(), mode="eval").body
    except SyntaxError as error:
        said = (error.msg or "not an expression").removeprefix("invalid syntax. ")
        column = len(line.strip()) + 1 if error.offset == 0 else error.offset or 1  # 0: it ends too early
        raise _fault(said[:1].lower() + said[1:], column + indent) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise _fault("not an expression", 1) from error


def _fault(fault: str, column: int, hint: str = "") -> UsageError:
    return UsageError(f"column {column}: {fault}", operation="read expression", hint=hint or f"names: {', '.join(NAMES)}")


class _Compiler:
    """Turns allowed nodes into closures."""

    def __init__(self, text: str) -> None:
        self._line = text.lstrip().encode()
        self._indent = len(text) - len(text.lstrip())

    def part(self, node: ast.expr, depth: int) -> _Part:
        """A closure for one node and what stands below it."""
        if depth > DEPTH_MAX:
            raise self._at(node, f"nested more than {DEPTH_MAX} deep")
        for kind, compiled in _KINDS.items():
            if isinstance(node, kind):
                return compiled(self, node, depth + 1)
        raise self._at(node, _refused(node), "valid are names, values, lists, [ ], comparisons, in, and, or, not, and calls")

    def _at(self, node: ast.AST, fault: str, hint: str = "") -> UsageError:
        offset = getattr(node, "col_offset", 0)
        return _fault(fault, len(self._line[:offset].decode(errors="replace")) + self._indent + 1, hint)

    def constant(self, node: ast.Constant, depth: int) -> _Part:
        value = node.value
        if not isinstance(value, str | int | float | None):
            raise self._at(node, f"{value!r} is no text, number, true, false or null")
        return lambda facts: value

    def name(self, node: ast.Name, depth: int) -> _Part:
        name = node.id
        if name in _WORDS:
            word = _WORDS[name]
            return lambda facts: word
        if name not in NAMES:
            close = difflib.get_close_matches(name, [*NAMES, *_FUNCTIONS], n=1)
            raise self._at(node, f"no name {name!r}", f"did you mean {close[0]!r}?" if close else "")
        return lambda facts: facts[name]

    def sequence(self, node: ast.List | ast.Tuple, depth: int) -> _Part:
        parts = [self.part(element, depth) for element in node.elts]
        return lambda facts: [part(facts) for part in parts]

    def boolean(self, node: ast.BoolOp, depth: int) -> _Part:
        parts = [self.part(value, depth) for value in node.values]
        if isinstance(node.op, ast.And):
            return lambda facts: all(part(facts) for part in parts)
        return lambda facts: any(part(facts) for part in parts)

    def unary(self, node: ast.UnaryOp, depth: int) -> _Part:
        part = self.part(node.operand, depth)
        if isinstance(node.op, ast.Not):
            return lambda facts: not part(facts)
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int | float):
            return lambda facts: -part(facts)
        raise self._at(node, "only `not`, and `-` before a number, may stand here")

    def comparison(self, node: ast.Compare, depth: int) -> _Part:
        parts = [self.part(operand, depth) for operand in (node.left, *node.comparators)]
        signs = [self._sign(node, operator) for operator in node.ops]

        def compare(facts: Facts) -> bool:
            values = [part(facts) for part in parts]
            return all(sign(a, b) for sign, a, b in zip(signs, values, values[1:], strict=False))

        return compare

    def _sign(self, node: ast.Compare, operator: ast.cmpop) -> Callable[[Any, Any], bool]:
        sign = _SIGNS.get(type(operator))
        if sign is None:
            raise self._at(node, "`is` is not taken", "compare with ==")
        return sign

    def item(self, node: ast.Subscript, depth: int) -> _Part:
        of, at = self.part(node.value, depth), node.slice
        if isinstance(at, ast.UnaryOp) and isinstance(at.op, ast.USub) and isinstance(at.operand, ast.Constant):
            key: Any = -at.operand.value if isinstance(at.operand.value, int) else None
        else:
            key = at.value if isinstance(at, ast.Constant) else None
        if not isinstance(key, str | int):
            raise self._at(node, "only a number or a text may stand in [ ]", 'for example params["top_p"] or messages[-1]')
        return lambda facts: _item(of(facts), key)

    def call(self, node: ast.Call, depth: int) -> _Part:
        if not isinstance(node.func, ast.Name):
            raise self._at(node, _refused(node.func), f"functions: {', '.join(_FUNCTIONS)}")
        name = node.func.id
        if name not in _FUNCTIONS:
            close = difflib.get_close_matches(name, _FUNCTIONS, n=1)
            raise self._at(node, f"no function {name!r}", f"did you mean {close[0]!r}?" if close else f"functions: {', '.join(_FUNCTIONS)}")
        count, function = _FUNCTIONS[name]
        if len(node.args) != count or node.keywords:
            raise self._at(node, f"{name} takes {count} value{'s' if count > 1 else ''}")
        parts = [self.part(argument, depth) for argument in node.args]
        if name == "matches":
            return self._matches(node, parts[0])
        return lambda facts: function(*(part(facts) for part in parts))

    def _matches(self, node: ast.Call, text: _Part) -> _Part:
        pattern = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
        if not isinstance(pattern, str) or len(pattern) > PATTERN_MAX:
            raise self._at(node.args[1], f"a pattern is a text of at most {PATTERN_MAX} characters")
        try:
            _search(pattern, "")
        except ValueError as error:
            said = str(error).removeprefix("Invalid regular expression: ")
            hint = "RE2 patterns: no back references, no look-around"
            raise self._at(node.args[1], f"no valid pattern: {said}", hint) from error
        return lambda facts: any(_search(pattern, found) for found in _texts(text(facts)))


_KINDS: dict[type[ast.expr], Callable[[_Compiler, Any, int], _Part]] = {
    ast.Constant: _Compiler.constant,
    ast.Name: _Compiler.name,
    ast.List: _Compiler.sequence,
    ast.Tuple: _Compiler.sequence,
    ast.BoolOp: _Compiler.boolean,
    ast.UnaryOp: _Compiler.unary,
    ast.Compare: _Compiler.comparison,
    ast.Subscript: _Compiler.item,
    ast.Call: _Compiler.call,
}
"""The only nodes that are taken."""

_WORDS = {"true": True, "false": False, "null": None}
"""JSON's words, beside Python's True, False and None, which its parser knows."""


def _refused(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"no attributes: .{node.attr}"
    return f"{type(node).__name__} is not taken"


# What operators and functions do: JSON's values in, a value out, never an exception.


def _equal(a: Any, b: Any) -> bool:
    return (a is b) if isinstance(a, bool) or isinstance(b, bool) else bool(a == b)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """An order between two numbers or two texts; anything else is false."""

    def ordered(a: Any, b: Any) -> bool:
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (a, b))
        return bool(compare(a, b)) if numbers or (isinstance(a, str) and isinstance(b, str)) else False

    return ordered


def _within(a: Any, b: Any) -> bool:
    if isinstance(b, str):
        return isinstance(a, str) and a in b
    if isinstance(b, dict):
        return isinstance(a, str) and a in b
    return isinstance(b, list) and any(_equal(a, value) for value in b)


_SIGNS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: _equal,
    ast.NotEq: lambda a, b: not _equal(a, b),
    ast.Lt: _ordered(lambda a, b: a < b),
    ast.LtE: _ordered(lambda a, b: a <= b),
    ast.Gt: _ordered(lambda a, b: a > b),
    ast.GtE: _ordered(lambda a, b: a >= b),
    ast.In: _within,
    ast.NotIn: lambda a, b: not _within(a, b),
}


def _item(of: Any, key: str | int) -> Any:
    if isinstance(of, dict):
        return of.get(key)
    if isinstance(of, list) and isinstance(key, int) and -len(of) <= key < len(of):
        return of[key]
    return None


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | dict) else 0


def _lower(value: Any) -> Any:
    return value[:LOOKED_AT_MAX].lower() if isinstance(value, str) else None


def _contains(value: Any, needle: Any) -> bool:
    return isinstance(needle, str) and any(needle in text for text in _texts(value))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, up to the bound on all of them together."""
    left, waiting = LOOKED_AT_MAX, [value]
    while waiting and left > 0:
        found = waiting.pop()
        left -= 1
        if isinstance(found, str):
            yield found[:left]
            left -= len(found)
        elif isinstance(found, list):
            waiting += reversed(found[:left])
        elif isinstance(found, dict):
            waiting += reversed(list(found.values())[:left])


def _search(pattern: str, text: str) -> bool:
    """Whether RE2 finds the pattern. Raises ValueError for one that it does not take."""
    import pyarrow as pa  # a third of a second, paid by who uses patterns
    import pyarrow.compute as pc

    safe = text.encode("utf-8", "replace").decode()
    return bool(pc.match_substring_regex(pa.scalar(safe, pa.string()), pattern.encode("utf-8", "replace").decode()).as_py())


_FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "len": (1, _length),
    "lower": (1, _lower),
    "contains": (2, _contains),
    "matches": (2, lambda text, pattern: False),  # compiled apart: its pattern is checked beforehand
}
"""Functions by name, with how many values they take."""
