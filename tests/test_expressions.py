"""The language of breakpoints: what it says about requests, what it refuses and where, and that nothing in it runs away."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.debug.expressions import CALLS_MAX, NAMES, NODES_MAX, TEXT_MAX, read_expression
from ingest.debug.facts import RequestFacts
from schemas.errors import UsageError
from schemas.requests import dump, read_chat

REQUEST: dict[str, Any] = {
    "model": "tiny-llama",
    "temperature": 0.8,
    "stream": True,
    "top_p": None,
    "messages": [
        {"role": "system", "content": "Be calm."},
        {"role": "user", "content": [{"type": "text", "text": "Where is my REFUND"}, {"type": "text", "text": "of 12 €?"}]},
    ],
    "tools": [{"type": "function", "function": {"name": "pay"}}],
    "metadata": {"team": "shop"},
}


def facts(request: Any = None) -> RequestFacts:
    """The facts of a request."""
    made = read_chat(dump(REQUEST if request is None else request))
    return RequestFacts(made, endpoint="/v1/chat/completions", tags=["debug", "eu"], key="key-1", user=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('model == "tiny-llama"', True),
        ('model in ["a", "tiny-llama"] and stream', True),
        ('"llama" in model', True),
        ('not ("x" in tags) and "eu" in tags', True),
        ("0.5 < temperature <= 0.8", True),
        ("temperature > 1 or n == 1", True),
        ('lower(last) == "where is my refund of 12 €?"', True),
        ('contains(messages, "calm")', True),
        ('contains(last, "calm")', False),
        (r'matches(last, "(?i)refund.*\d+ €")', True),
        ('matches(last, "^refund")', False),
        ("len(messages) == 2 and len(tools) > 0", True),
        ('messages[-1]["role"] == "user"', True),
        ('messages[7]["role"] == null', True),
        ('params["metadata"]["team"] == "shop"', True),
        ('params["metadata"]["nobody"]["there"] == None', True),
        ('"metadata" in params', True),
        ('params["top_p"] < 1', False),
        ("user == null", True),
        ('max_tokens > "a"', False),
        ("true and not false", True),
        ("n == true", False),
        ("temperature > -1", True),
        ("len(temperature) == 0", True),
        ('matches(messages, "calm")', True),
        ('endpoint != "/v1/embeddings" and key == "key-1"', True),
    ],
)
def test_what_holds(text: str, expected: bool) -> None:
    """Names, operators and functions over one request; what is missing is null, and null compares as false."""
    assert read_expression(text).holds(facts()) is expected


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("modle == 1", 1, "no name 'modle'"),
        ("   model == modle", 13, "no name 'modle'"),
        ('"ü" == modle', 8, "no name 'modle'"),
        ("n > 1 and last.lower()", 11, "no attributes: .lower"),
        ("().__class__", 1, "no attributes: .__class__"),
        ('__import__("os").system("true")', 1, "no attributes: .system"),
        ('eval("1")', 1, "no function 'eval'"),
        ("[x for x in messages]", 1, "ListComp is not taken"),
        ("lambda: 1", 1, "Lambda is not taken"),
        ('f"{model}"', 1, "JoinedStr is not taken"),
        ("2 ** 99999999", 1, "BinOp is not taken"),
        ('"a" * 99999999', 1, "BinOp is not taken"),
        ("n is 1", 1, "`is` is not taken"),
        ("len(1, 2)", 1, "len takes 1 value"),
        ("len(*messages)", 5, "Starred is not taken"),
        ("messages[n]", 1, "only a number or a text"),
        ("messages[0:2]", 1, "only a number or a text"),
        ('matches(last, "(")', 15, "no valid pattern"),
        (r'matches(last, "(a)\\1")', 15, "no valid pattern"),
        ("matches(last, model)", 15, "a pattern is a text"),
        ("model ==", 9, "invalid syntax"),
        ("(model", 1, "'(' was never closed"),
        ("b'x' == model", 1, "is no text, number"),
        ("...", 1, "is no text, number"),
        ("-model", 1, "before a number"),
        ("(" * 120 + "1" + ")" * 120, None, ""),
        ("not " * 45 + "n", 165, "nested more than"),
        ("n\0", 1, "column"),
    ],
)
def test_what_is_refused_and_where(text: str, column: int | None, says: str) -> None:
    """One line with the column; nothing but names, values and the listed operators gets through."""
    if column is None:
        read_expression(text)
        return
    with pytest.raises(UsageError) as caught:
        read_expression(text)

    assert says in str(caught.value)
    assert f"column {column}:" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "  ", "n" * (TEXT_MAX + 1), "[" + "1," * NODES_MAX + "1]", " or ".join(["len(n)"] * (CALLS_MAX + 1))])
def test_what_is_too_long(text: str) -> None:
    """The size of an expression is bounded before anything of it is compiled."""
    with pytest.raises(UsageError):
        read_expression(text)


def test_the_worst_that_can_be_asked_is_quick() -> None:
    """Patterns that ruin backtracking engines, over texts of megabytes, as often as may be."""
    request = {**REQUEST, "messages": [{"role": "user", "content": "a" * 4_000_000}] * 3}
    worst = " or ".join([r'matches(messages, "(a|a)*(a+a+)+b$")', r'matches(last, "(a*)*(a*)*(a*)*c")', 'contains(messages, "ab")'] * 6)
    asked = facts(request)
    began = time.process_time()
    assert read_expression(worst).holds(asked) is False

    assert time.process_time() - began < 10  # a backtracking engine would take longer than the universe has


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abmodelnst()[]\"'.,=<>!- +*\\0123é\n", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Nothing but a `UsageError` comes out, and what was read holds or does not."""
    try:
        read = read_expression(text)
    except UsageError:
        return
    assert read.holds(facts()) in (True, False)


def test_every_name_has_a_value() -> None:
    """The names of the language are those that a request answers to, however odd it is."""
    odd: dict[str, Any] = {"messages": [], "tools": "x", "n": None, "temperature": "hot", "model": 5}
    for asked in (facts(), facts(odd)):
        assert set(asked) == set(NAMES)
        for name in NAMES:
            read_expression(f"{name} == 1 or contains({name}, 'x') or len({name}) > 3").holds(asked)
