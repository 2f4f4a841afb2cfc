"""Redaction: what patterns and field rules take out, what they leave, and that no byte of it reaches the tape."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.gateway.window import SCAN_CHARACTERS, WINDOW_CHARACTERS, Window
from ingest.patterns import BUILTINS
from ingest.redaction import Redactor
from replay.fold import fold
from schemas.errors import SettingsError
from schemas.events import Alternative, GenerationFinished, RequestSubmitted, SequenceFinished, SessionOpened, TokenChunk, ToolCall
from schemas.settings import GatewaySettings, LogSettings, RecorderSettings, RedactionPolicy, RedactionSettings, Settings
from schemas.sink import SessionContext, new_id
from store.rows import StoredEvent
from tests.gateway_rig import DONE, Peer, Rig, broken, chunk

FOUND = {
    "email": ["bob@example.com", "änne.o'neil+x@müller-gmbh.co.uk", "a@b.de"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "nl91abna0417164300"],
    "credit_card": ["4111111111111111", "4111 1111 1111 1111", "3782-822463-10005", "6011000990139424"],
    "ip": ["192.168.0.1", "2001:db8::8a2e:370:7334", "fe80::1", "::ffff:10.0.0.1"],
    "phone": ["+49 (0)30 1234567", "+1-202-555-0143", "030 / 1234 5678", "(202) 555-0143", "0049 171 1234567"],
}
LEFT = {
    "email": ["a@b", "@home", "me at example.com"],
    "iban": ["DE89 3704 0044 0532 0130 01", "AB12 3456 7890 1234 567", "XDE89370400440532013000"],
    "credit_card": ["4111111111111112", "1234567890123", "90000000000000000000000000"],
    "ip": ["1.2.3", "999.1.1.1", "12:30:45", "Abc::def", "std::vector"],
    "phone": ["0.12345678", "2026-11-25", "12345", "192.168.100.200", "v1.20.3"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in FOUND.items() for text in texts])
def test_a_pattern_finds_the_whole(name: str, text: str) -> None:
    """Each is found whole, alone and within a sentence."""
    redactor = Redactor(policy=RedactionPolicy(builtin=[name]))  # type: ignore[list-item]

    assert redactor(text) == (f"[redacted:{name}]", 1)
    assert redactor(f"see ({text}), 17 or «{text}».") == (f"see ([redacted:{name}]), 17 or «[redacted:{name}]».", 2)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in LEFT.items() for text in texts])
def test_a_pattern_leaves_what_only_looks_alike(name: str, text: str) -> None:
    """Check digits, lengths and surroundings tell them apart."""
    assert list(BUILTINS[name](f"x {text} y")) == []


def test_a_card_beside_other_numbers() -> None:
    """Groups of digits before and behind a card number stay."""
    assert Redactor(policy=RedactionPolicy(builtin=["credit_card"]))("no 12 4111 1111 1111 1111 123") == (
        "no 12 [redacted:credit_card] 123",
        1,
    )


def test_hostile_texts_take_linear_time() -> None:
    """A text made against backtracking is searched in a time that grows with its length alone."""
    policy = RedactionPolicy.model_validate({"builtin": sorted(BUILTINS), "rules": [{"name": "nested", "pattern": "(x+x+)+y"}]})
    redactor = Redactor(policy=policy)

    def took(text: str) -> float:
        began = time.perf_counter()
        redactor(text)
        return time.perf_counter() - began

    for unit in ("x", "1 ", "a@", "a.", "0", "DE12", "1.1.", "::", "(0"):
        short, long = (min(took(unit * length) for _ in range(2)) for length in (500, 5_000))
        assert long < 100 * max(short, 1e-4), unit


def test_fields_go_whatever_they_hold() -> None:
    """A name stands for every field of that name, also in JSON inside a string; a path for one place."""
    policy = RedactionPolicy.model_validate(
        {"rules": [{"name": "ssn", "field": "ssn"}, {"name": "who", "field": "$.messages[*].name"}, {"name": "deep", "field": "$..a[0].b"}]}
    )
    message = {
        "name": "Bob",
        "content": "hi",
        "tool_calls": [{"arguments": '{"ssn": 123, "keep": "x"}'}],
        "ssn": {"n": [1]},
        "a": [{"b": 1}],
    }

    text, taken = Redactor(policy=policy).document(message, "messages", 0)

    assert orjson.loads(text) == {
        "name": "[redacted:who]",
        "content": "hi",
        "tool_calls": [{"arguments": '{"ssn":"[redacted:ssn]","keep":"x"}'}],
        "ssn": "[redacted:ssn]",
        "a": [{"b": "[redacted:deep]"}],
    }
    assert taken == {"who": 1, "ssn": 2, "deep": 1}


def test_documents_stay_documents() -> None:
    """Strings are searched as they are, not as JSON escapes them; keys and large numbers too."""
    document = {
        "a": 'line\nbob@example.com\t"x"',
        "bob@example.com": 4111111111111111,
        "n": 12,
        "f": True,
        "nested": '{"t": "\\nbob@example.com"}',
    }

    text, taken = Redactor(policy=RedactionPolicy(builtin=["email", "credit_card"])).document(document)

    assert orjson.loads(text) == {
        "a": 'line\n[redacted:email]\t"x"',
        "[redacted:email]": "[redacted:credit_card]",
        "n": 12,
        "f": True,
        "nested": '{"t":"\\n[redacted:email]"}',
    }
    assert taken == {"email": 3, "credit_card": 1}


def test_a_document_nested_too_deeply_is_not_recorded() -> None:
    """What cannot be searched is taken whole."""
    deep: Any = "bob@example.com"
    for _ in range(5000):
        deep = [deep]

    assert Redactor(policy=RedactionPolicy(builtin=["email"])).document(deep) == ('"[redacted:too_deep]"', {"too_deep": 1})


@pytest.mark.parametrize(
    ("rule", "fault", "hint"),
    [
        ({"name": "x", "pattern": "(a"}, "the pattern is not valid: missing )", "RE2 syntax"),
        ({"name": "x", "pattern": r"(a)\1"}, "the pattern is not valid", "no look-around"),
        ({"name": "x", "pattern": "a*"}, "matches the empty text", "at least one character"),
        ({"name": "x", "pattern": "a" * 1001}, "1001 characters", "RE2 syntax"),
        ({"name": "x", "field": "$.a["}, "stuck at '['", "$.metadata.email"),
        ({"name": "x", "field": "$"}, "names the whole request", "$.metadata.email"),
    ],
)
def test_a_bad_rule_is_one_clear_line_at_start(rule: dict[str, str], fault: str, hint: str) -> None:
    """It says what is wrong, where it stands, and what is valid."""
    with pytest.raises(SettingsError) as caught:
        Redactor.of(Settings.model_validate({"redaction": {"tenants": {"acme": {"rules": [rule]}}}}))

    assert fault in str(caught.value)
    assert "(redaction.rules.0)" in str(caught.value)
    assert hint in caught.value.hint


class _Kept:
    """A recorder that keeps what it is given."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, tuple[int, ...], str, tuple[float, ...]]] = []

    def record(self, session: SessionContext, payload: Any) -> None:
        """Nothing."""

    def tokens(self, session: SessionContext, generation_id: bytes, index: int, position: int, offset_us: int, **delta: Any) -> int:
        assert not delta["alternatives"] if "alternatives" in delta else True
        self.entries.append((position, tuple(delta["token_ids"]), delta["text"], tuple(delta["logprobs"])))
        return position + (len(delta["token_ids"]) or 1)

    def run(
        self,
        session: SessionContext,
        generation_id: bytes,
        index: int,
        position: int,
        offset_us: int,
        token_ids: Sequence[int],
        texts: Sequence[str],
        logprobs: Sequence[float],
    ) -> int:
        for entry in zip(token_ids, texts, logprobs, strict=True):
            position = self.tokens(
                session, generation_id, index, position, offset_us, token_ids=entry[:1], text=entry[1], logprobs=entry[2:]
            )
        return position

    async def durable(self) -> None:
        """At once."""


SECRETS = {"email": "bob@example.com", "iban": "DE89370400440532013000", "ip": "192.168.0.77"}


@given(
    words=st.lists(st.sampled_from([*SECRETS.values(), " ", "a ", "Größe ", "\n", "x" * 97 + " ", "y" * 700 + " "]), max_size=40),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=20),
)
def test_no_split_of_an_answer_hides_a_match(words: list[str], sizes: list[int]) -> None:
    """However the pieces split it, the redacted text comes out, each position once, touched tokens without id, none with alternatives."""
    text = " ".join(words)
    kept, policy = _Kept(), RedactionPolicy(builtin=["email", "iban", "ip"])
    redactor = Redactor(policy=policy)
    window = Window(kept, redactor)
    session, generation = SessionContext(new_id(), "t", "gateway"), new_id()
    position = at = count = 0
    pieces = []
    others = [[Alternative("bob@example.com", 1, -1.0)]]
    while at < len(text):
        size = sizes[count % len(sizes)]
        pieces.append(text[at : at + size] if size or sizes.count(0) < len(sizes) else text[at : at + 1])
        at += len(pieces[-1])
        position = window.tokens(
            session, generation, 0, position, count, token_ids=[count], text=pieces[-1], logprobs=[-1.0], alternatives=others
        )
        count += 1
    window.record(session, SequenceFinished(generation_id=generation, index=0, tokens=position))

    assert [entry[0] for entry in kept.entries] == list(range(position))
    assert "".join(entry[2] for entry in kept.entries) == redactor(text)[0]
    for place, ids, piece, logprobs in kept.entries:
        assert (ids, piece, logprobs) == ((place,), pieces[place], (-1.0,)) or (ids, logprobs) == ((), ())


def test_an_answer_without_end_is_held_in_bounds() -> None:
    """One match longer than any window neither stops the answer nor grows in memory."""
    policy = RedactionPolicy.model_validate({"rules": [{"name": "digits", "pattern": "[0-9]+"}]})
    kept = _Kept()
    window = Window(kept, Redactor(policy=policy))
    session, generation, position = SessionContext(new_id(), "t", "gateway"), new_id(), 0
    for _ in range(5000):
        position = window.tokens(session, generation, 0, position, 0, text="123")

    assert position - len(kept.entries) <= (SCAN_CHARACTERS + WINDOW_CHARACTERS) // 3
    assert "".join(entry[2] for entry in kept.entries).replace("[redacted:digits]", "") == ""


@contextmanager
def gateway(data: Path, upstream: str, **redaction: Any) -> Iterator[Rig]:
    """A gateway with redaction rules."""
    settings = Settings(
        data=data,
        gateway=GatewaySettings(port=0, upstream=upstream),
        log=LogSettings(partitions=2),
        recorder=RecorderSettings(coalesce_ms=5.0),
        redaction=RedactionSettings.model_validate(redaction),
    )
    rig = Rig(settings)
    try:
        assert rig.error is None, rig.error
        yield rig
    finally:
        rig.close()


async def _leaky(peer: Peer) -> None:
    """An answer that spells secrets piece by piece, and calls a tool with one."""
    call = {"index": 0, "id": "c1", "function": {"name": "mail", "arguments": '{"to": "eve@'}}
    rest = {"index": 0, "function": {"arguments": 'evil.example", "ssn": 7}'}}
    await peer.begin_chunked()
    for text in ("Write to bo", "b@exam", "ple.com", " or 4111", " 1111 1111", " 1111 now."):
        await peer.chunk(chunk(text))
    await peer.chunk(chunk(delta={"tool_calls": [call]}) + chunk(delta={"tool_calls": [rest]}))
    await peer.chunk(chunk(finish="tool_calls") + DONE)
    await peer.chunk(b"")


REQUEST: dict[str, Any] = {
    "model": "m",
    "stream": True,
    "user": "bob@example.com",
    "metadata": {"ssn": "078-05-1120"},
    "messages": [{"role": "user", "content": "I am bob@example.com, card 4111 1111 1111 1111, badge K-12345."}],
}
TAKEN = ("bob@", "example.com", "4111", "1111 1111", "evil.example", "078-05", "K-12345", "127.0.0.1")


def test_no_byte_of_it_reaches_the_tape(tmp_path: Path) -> None:
    """Requests, headers, answers, tool calls and bodies that are none: all files are searched; the client sees everything."""
    rules = [{"name": "badge", "pattern": r"K-\d{5}"}, {"name": "ssn", "field": "ssn"}]
    with broken(_leaky) as upstream, gateway(tmp_path, upstream.url, builtin=["email", "credit_card", "ip"], rules=rules) as rig:
        answer = rig.post(REQUEST, x_tokentape_user="bob@example.com", x_request_id="for K-12345")
        rig.post(b'{"broken": "bob@example.com')
        events = rig.wait_for("generation_finished")
        recorded = b"".join(rig.framed())
    stored = recorded + b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    submitted = next(e.payload for e in events if isinstance(e.payload, RequestSubmitted) and e.payload.message_ids)
    chunks = [e.payload for e in events if isinstance(e.payload, TokenChunk) and e.payload.channel == "content"]
    text = "".join(part.content.text for part in chunks if part.content)
    call = next(e.payload for e in events if isinstance(e.payload, ToolCall))

    assert [secret for secret in TAKEN if secret.encode() in stored.replace(upstream.url.encode(), b"")] == []
    assert "4111" in answer.text
    assert {pair.key: pair.count for pair in submitted.redactions} == {"badge": 1, "credit_card": 1, "email": 2, "ip": 1, "ssn": 1}
    assert submitted.request_digest is None
    assert text == "Write to [redacted:email] or [redacted:credit_card] now."
    assert call.content is not None
    assert orjson.loads(call.content.arguments) == {"to": "[redacted:email]", "ssn": "[redacted:ssn]"}
    assert {e.payload.user for e in events if isinstance(e.payload, SessionOpened)} == {"[redacted:email]", None}
    assert next(e.payload.tokens_recorded for e in events if isinstance(e.payload, GenerationFinished)) == 8


def test_exact_answers(tmp_path: Path) -> None:
    """With `output = "exact"` only requests are under the rules: the answer is on the tape token for token."""
    with broken(_leaky) as upstream, gateway(tmp_path, upstream.url, builtin=["email"], output="exact") as rig:
        rig.post(REQUEST)
        events = rig.wait_for("generation_finished")

    chunks = [e.payload for e in events if isinstance(e.payload, TokenChunk)]
    assert "".join(c.content.text for c in chunks if c.content and c.channel == "content").startswith("Write to bob@example.com or 4111")


def test_metadata_only(tmp_path: Path) -> None:
    """With `content = "none"` no event has content, digests and counts stay, and the session folds without surprise."""
    with broken(_leaky) as upstream, gateway(tmp_path, upstream.url, tenants={"default": {"content": "none"}}) as rig:
        rig.post(REQUEST, x_tokentape_session=str(uuid.UUID(int=7)))
        events = rig.wait_for("generation_finished")
        framed = b"".join(rig.framed())
    submitted = next(e.payload for e in events if isinstance(e.payload, RequestSubmitted))
    state = fold(StoredEvent(event, "", 0, place, 0) for place, event in enumerate(events))

    assert {event.kind for event in events if getattr(event.payload, "content", None) is not None} == set()
    assert b"Write to" not in framed
    assert b"I am bob" not in framed
    assert submitted.request_digest is not None
    assert len(submitted.message_ids) == 1
    assert (state.tokens, state.gone) == (8, "not recorded")
    assert [anomaly.what for anomaly in state.anomalies] == []
