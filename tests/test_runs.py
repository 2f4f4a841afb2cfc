"""Runs of tokens mean what their events mean one by one."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.gateway.runs import RunReader
from ingest.gateway.veil import Veil
from schemas.requests import dump, load

TEXTS = st.text(min_size=1, max_size=6) | st.sampled_from(['"', "\\", "\n", "東京", "\x00", "]}}"])
TOKENS = st.tuples(TEXTS, st.integers(0, 200_000), st.floats(-100, 0))


def event(text: str, token: int, logprob: Any, **changes: Any) -> bytes:
    """An event as vLLM writes it."""
    score = {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
    choice = {"index": 0, "delta": {"content": text}, "logprobs": {"content": [score]}, "finish_reason": None, "token_ids": [token]}
    chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice | changes]}
    return b"data: " + dump(chunk) + b"\n\n"


@given(st.lists(TOKENS, min_size=1, max_size=8), st.booleans(), st.booleans())
def test_a_run_is_what_its_events_are(tokens: list[tuple[str, int, float]], ids: bool, logprobs: bool) -> None:
    """The columns hold every token, and the client's bytes are those that the veil writes event by event."""
    events = [event(*token) for token in tokens]
    extra = ({"return_token_ids": True} if ids else {}) | ({"logprobs": True} if logprobs else {})
    veil = Veil(extra, "vllm", 1, None)
    shown = b"".join(veil.chunk(load(one[6:]), one) for one in events)
    read = RunReader(hide_ids=ids, hide_logprobs=logprobs).read(b"".join(events) + b"data: [DONE]\n\n")

    assert read is not None
    assert [*zip(read[0].texts, read[0].token_ids, read[0].logprobs, strict=True)] == tokens
    assert read[1:] == (shown, b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "odd",
    [
        event("", 1, -1.0),
        event("a", 1, -1.0, finish_reason="stop"),
        event("a", 1, -1.0, index=1),
        event("a", 1, -1.0, token_ids=[1, 2]),
        event("a", 1, -1.0, logprobs=None),
        event("a", 1, -1.0, delta={"reasoning": "a"}),
        event("a", 1, -1.0, stop_reason=None),
        event("a", 1, -1),
        event("a", 1, None),
        event("a", 1, True),
        event("a", 1, -1.0)[:-1],
        event("a", 1, -1.0).replace(b'"a"', b'"\xff"'),
        event("a", 1, -1.0).replace(b'"a"', b'"\\ud800"'),
        event("a", 1, -1.0).replace(b'"a"', b'"\\x"'),
        event("a", 1, -1.0).replace(b"\n\n", b"\r\n\r\n"),
        event("a", 1, -1.0).replace(b"[1]", b"[01]"),
        b": ping\n\n",
        b"data: " + orjson.dumps({"error": {"message": "out of memory"}}) + b"\n\n",
    ],
)
def test_what_has_another_shape_is_left_to_the_reader_of_single_events(odd: bytes) -> None:
    """A run ends before it, and none begins with it."""
    reader = RunReader(hide_ids=True, hide_logprobs=True)
    usual = event("b", 2, -0.5)
    read = reader.read(usual + odd)

    assert reader.read(odd) is None
    assert read is None or read[2] == odd
