"""JSON Patch: applied as RFC 6902 says, read strictly, made from two documents."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.patch import apply_patch, assignment, diff, read_patch

PATCHES: list[tuple[Any, list[dict[str, Any]], Any]] = [
    ({"a": 1}, [{"op": "add", "path": "/b", "value": 2}], {"a": 1, "b": 2}),
    ({"a": [1, 2]}, [{"op": "add", "path": "/a/1", "value": 9}], {"a": [1, 9, 2]}),
    ({"a": [1]}, [{"op": "add", "path": "/a/-", "value": 9}], {"a": [1, 9]}),
    ({"a": 1, "b": 2}, [{"op": "remove", "path": "/a"}], {"b": 2}),
    ({"a": [1, 2]}, [{"op": "remove", "path": "/a/0"}], {"a": [2]}),
    ({"a~b/c": 1}, [{"op": "replace", "path": "/a~0b~1c", "value": 2}], {"a~b/c": 2}),
    ({"a": {"b": 1}}, [{"op": "move", "from": "/a/b", "path": "/c"}], {"a": {}, "c": 1}),
    (
        {"a": {"b": 1}},
        [{"op": "copy", "from": "/a", "path": "/c"}, {"op": "add", "path": "/c/d", "value": 1}],
        {"a": {"b": 1}, "c": {"b": 1, "d": 1}},
    ),
    ({"a": 1}, [{"op": "replace", "path": "", "value": {"x": 1}}], {"x": 1}),
    ({"a": 1.0}, [{"op": "test", "path": "/a", "value": 1}], {"a": 1.0}),
]


@pytest.mark.parametrize(("document", "patch", "expected"), PATCHES)
def test_patches_apply_as_rfc_6902_says(document: Any, patch: list[dict[str, Any]], expected: Any) -> None:
    """One case per operation; the document given stays as it was."""
    before = json.dumps(document)

    assert expected == apply_patch(document, patch)
    assert before == json.dumps(document)


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "remove", "path": "/x"},
        {"op": "replace", "path": "/x", "value": 1},
        {"op": "add", "path": "/l/3", "value": 1},
        {"op": "add", "path": "/l/01", "value": 1},
        {"op": "add", "path": "l", "value": 1},
        {"op": "add", "path": "/a"},
        {"op": "test", "path": "/t", "value": 1},
        {"op": "move", "from": "/o", "path": "/o/x"},
        {"op": "fly", "path": "/a"},
        {},
    ],
)
def test_a_patch_that_does_not_fit_is_refused(operation: dict[str, Any]) -> None:
    """Missing places, bad indexes, failed tests and unknown operations are one kind of error."""
    with pytest.raises(ValueError, match=r"."):
        apply_patch({"l": [1], "t": True, "o": {}, "a": 1}, [operation])


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        ({"op": "add"}, "a patch is an array"),
        ([], "a patch is an array"),
        ([1], "operation 1 is no object"),
        ([{"op": "add", "path": "/a", "value": 1}, {"op": "fly"}], "operation 2: op 'fly' is unknown, valid are add"),
        ([{"op": ["add"]}], "operation 1: op ['add'] is unknown"),
        ([{"op": "add", "value": 1}], "operation 1 (add) needs 'path'"),
        ([{"op": "add", "path": "/a"}], "operation 1 (add) needs a value"),
        ([{"op": "move", "path": "/a"}], "operation 1 (move) needs 'from'"),
        ([{"op": "remove", "path": "/a"}] * 1001, "1001 operations"),
    ],
)
def test_a_malformed_patch_says_what_is_valid(patch: Any, says: str) -> None:
    """What came from outside is read strictly; the error names the operation."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is what is looked at
        read_patch(patch)

    assert says in str(caught.value)


def test_an_error_names_the_operation_and_the_place() -> None:
    """One line that a person can act on."""
    patch = [{"op": "test", "path": "/a", "value": 1}, {"op": "replace", "path": "/b/c", "value": 1}]
    with pytest.raises(ValueError, match=r"^operation 2 does not apply: replace /b/c: there is no 'b'$"):
        apply_patch({"a": 1}, patch)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, "", "a", "ä", "a/b", "m~n"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["a", "b", "a/b", "m~n", ""]), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(JSON, JSON)
def test_a_difference_applied_gives_the_other_document(before: Any, after: Any) -> None:
    """`diff` and `apply_patch` are inverse, through JSON text, and equal documents differ in nothing."""
    operations = json.loads(json.dumps(diff(before, after)))

    assert diff(apply_patch(before, operations), after) == []
    assert diff(after, after) == []


def test_a_difference_is_as_small_as_the_change() -> None:
    """A message that was changed, put in or taken away is one operation, whatever stands around it."""
    before = {"model": "a", "messages": [{"role": "user", "content": str(i)} for i in range(5)], "n": 1}
    messages = before["messages"]
    assert isinstance(messages, list)
    changed = {**before, "messages": [*messages[:2], {"role": "user", "content": "new"}, *messages[3:]]}

    assert diff(before, changed) == [{"op": "replace", "path": "/messages/2/content", "value": "new"}]
    assert diff(before, {**before, "messages": messages[1:]}) == [{"op": "remove", "path": "/messages/0"}]
    assert [operation["op"] for operation in diff(before, {**before, "messages": [*messages[:1], 7, *messages[1:]]})] == ["add"]
    assert diff(before, {"model": "a", "messages": messages, "seed": 1}) == [
        {"op": "remove", "path": "/n"},
        {"op": "add", "path": "/seed", "value": 1},
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n=2", {"op": "replace", "path": "/n", "value": 2}),
        ("temperature=0", {"op": "add", "path": "/temperature", "value": 0}),
        ("messages.-1.content=Hello = you", {"op": "replace", "path": "/messages/1/content", "value": "Hello = you"}),
        ('/messages/0/content="1"', {"op": "replace", "path": "/messages/0/content", "value": "1"}),
        ('messages.-={"role": "user"}', {"op": "add", "path": "/messages/-", "value": {"role": "user"}}),
        ("user=ann", {"op": "add", "path": "/user", "value": "ann"}),
    ],
)
def test_assignments(text: str, expected: Any) -> None:
    """`path=value` for people: JSON where it is JSON, else text; indexes may count from the end."""
    document = {"n": 1, "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}

    assert expected == assignment(document, text)
    apply_patch(document, [assignment(document, text)])


@pytest.mark.parametrize("text", ["temperature", "=1", "nowhere.to.go=1", "messages.9.content=x"])
def test_assignments_to_nowhere(text: str) -> None:
    """A place that cannot be there is named."""
    with pytest.raises(ValueError, match=r"is no path=value|there is no"):
        assignment({"messages": []}, text)
