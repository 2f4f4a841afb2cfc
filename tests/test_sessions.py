"""Sessions: conversations found without a header, labels, annotations, and which sessions are recorded at all."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from google import genai
from google.genai import types

from ingest.gateway.conversations import Conversations, Said
from ingest.gateway.history import History
from ingest.gateway.sessions import Session
from ingest.pipeline import is_sampled
from schemas.errors import SettingsError
from schemas.events import Event, GenerationFinished, RecordsLost, RequestSubmitted, SessionAnnotated, SessionOpened
from schemas.requests import dump, read_chat
from schemas.settings import GatewaySettings, LogSettings, RecorderSettings, Settings
from schemas.sink import SessionContext, new_id
from tests.conftest import VllmService
from tests.gateway_rig import DONE, HELLO, Peer, Rig, broken, chunk
from tests.program import Program, until
from tokentape.config import load

FUNCTION: Any = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}]


def of_kind(events: list[Event], kind: type[Any]) -> list[Any]:
    """The payloads of one kind."""
    return [event.payload for event in events if isinstance(event.payload, kind)]


@contextmanager
def gateway(data: Path, upstream: str, **recorder: Any) -> Iterator[Rig]:
    """A gateway with settings of its recorder."""
    settings = Settings(
        data=data,
        gateway=GatewaySettings(port=0, upstream=upstream),
        log=LogSettings(partitions=2),
        recorder=RecorderSettings.model_validate({"coalesce_ms": 5.0, **recorder}),
    )
    rig = Rig(settings)
    try:
        assert rig.error is None, rig.error
        yield rig
    finally:
        rig.close()


def ended(rig: Rig, count: int) -> list[Event]:
    """All events, once so many generations have ended."""
    return until(lambda: found if len(of_kind(found := rig.events(), GenerationFinished)) >= count else None)


class Counting:
    """An upstream that answers with a number of its own each time, and now and then calls a tool."""

    def __init__(self) -> None:
        self.answers = 0

    async def __call__(self, peer: Peer) -> None:
        """One answer."""
        self.answers += 1
        call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": f'{{"n": {self.answers}}}'}}
        delta = {"tool_calls": [call]} if b'"tools"' in peer.body else {"content": f"Answer {self.answers}."}
        await peer.begin_chunked()
        await peer.chunk(chunk(delta=delta) + chunk(finish="stop") + DONE)
        await peer.chunk(b"")


def talk(client: Any, messages: list[Any], **more: Any) -> list[Any]:
    """One turn of a chat as a client of the SDK does it: the messages with the answer and the next question."""
    parts = list(client.chat.completions.create(model="m", messages=messages, stream=True, **more))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    calls = [call for part in parts if part.choices for call in part.choices[0].delta.tool_calls or []]
    if calls:
        made = [{"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": c.function.arguments}} for c in calls]
        return [
            *messages,
            {"role": "assistant", "content": None, "tool_calls": made},
            {"role": "tool", "tool_call_id": "c", "content": "7"},
        ]
    return [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]


def test_a_chat_without_header_is_one_session(tmp_path: Path) -> None:
    """Each turn joins the session of the answer that it goes on from, a tool call too; the client learns it from the header."""
    with broken(Counting()) as upstream, gateway(tmp_path, upstream.url) as rig:
        first, other, stranger = rig.client(), rig.client(), rig.client(api_key="sk-of-somebody-else")
        chat, parallel = talk(first, HELLO), talk(other, HELLO)
        chat, parallel = talk(first, chat, tools=[{"type": "function", "function": {"name": "f"}}]), talk(other, parallel)
        talk(first, chat)
        talk(stranger, parallel)
        events = ended(rig, 6)
    requests = Counter(event.session_id for event in events if isinstance(event.payload, RequestSubmitted))
    listed = [len(request.message_ids) for request in of_kind(events, RequestSubmitted)]

    assert sorted(requests.values()) == [1, 2, 3]
    assert len(of_kind(events, SessionOpened)) == 3
    assert sorted(listed) == [1, 1, 2, 2, 4, 5]


def test_a_session_found_in_a_real_chat(tmp_path: Path, vllm: VllmService) -> None:
    """The same before a real engine, whole answers."""
    with gateway(tmp_path, vllm.url) as rig:
        client, messages = rig.client(), list(HELLO)
        for _ in range(3):
            answer = client.chat.completions.create(model=vllm.model, messages=messages, max_tokens=5)
            messages += [answer.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "More."}]
        events = ended(rig, 3)

    assert len({event.session_id for event in events}) == 1


def test_conversations_of_every_endpoint(tmp_path: Path) -> None:
    """OpenAI's responses, Anthropic's messages and Gemini's contents as their own clients send them back, each one session."""
    with broken(Counting()) as upstream, gateway(tmp_path, upstream.url) as rig:
        responses, items = rig.client().responses, list[Any]()
        claude = rig.keep(anthropic.Anthropic(base_url=rig.url, api_key="sk-ant", max_retries=0))
        google = rig.keep(genai.Client(api_key="AIza", vertexai=False, http_options=types.HttpOptions(base_url=rig.url)))
        gemini, messages = google.chats.create(model="m"), list[Any](HELLO)
        for number in range(3):
            asked: Any = "The sea?" if number == 0 else [*items, {"role": "user", "content": "More."}]
            with responses.stream(model="m", input=asked, tools=FUNCTION if number == 1 else openai.omit) as stream:
                final = stream.get_final_response()
            asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            items = [*asked, *(item.model_dump(exclude_none=True) for item in final.output)]
            items += [{"type": "function_call_output", "call_id": "c", "output": "7"}] if number == 1 else []
            with claude.messages.stream(model="m", messages=messages, max_tokens=9) as told:
                messages += [{"role": "assistant", "content": told.get_final_message().content}, {"role": "user", "content": "More."}]
            list(gemini.send_message_stream("The sea?"))
        events = ended(rig, 9)
    requests = {(event.session_id, event.payload.endpoint) for event in events if isinstance(event.payload, RequestSubmitted)}

    assert sorted(endpoint for _, endpoint in requests) == ["/v1/messages", "/v1/responses", "/v1beta/models:streamGenerateContent"]


def test_conversations_that_cannot_be_told_apart_stay_apart() -> None:
    """The same opening and the same answer in two sessions: whoever goes on begins a new one."""
    conversations = Conversations(b"k" * 32)
    opening = read_chat(dump({"messages": HELLO}))
    turn = read_chat(dump({"messages": [*HELLO, {"role": "assistant", "content": "Salt. "}, {"role": "user", "content": "More."}]}))
    first, second = (Session(SessionContext(new_id(), "t", "gateway")) for _ in range(2))

    conversations.answered("a", opening, [Said("Salt.")], first)
    assert conversations.find("a", turn) is first
    assert conversations.find("b", turn) is None
    assert conversations.find("a", opening) is None
    conversations.answered("a", opening, [Said("Salt.")], second)

    assert conversations.find("a", turn) is None


@pytest.mark.parametrize("turns", [1, 7, 64, 200])
def test_a_history_is_listed_in_parts(turns: int) -> None:
    """Following each request back gives all of its messages, in few steps, and all lists together are short."""
    history, ids = History(), [new_id() for _ in range(2 * turns)]
    told: dict[bytes, tuple[bytes | None, int, list[bytes]]] = {}
    for turn in range(turns):
        own, generation = ids[: 2 * turn + 1], new_id()
        before = history.continued(generation, own)
        told[generation] = (before.generation_id, before.messages, own[before.messages :]) if before else (None, 0, own)
        found, at, steps = list[bytes](), generation, 0
        parts = []
        while at:
            parts.append(told[at])
            at, steps = told[at][0] or b"", steps + 1
        for _, kept, listed in reversed(parts):
            found = found[:kept] + listed

        assert found == own
        assert steps <= turn.bit_length() + 1

    assert sum(len(listed) for _, _, listed in told.values()) <= turns * (2 + turns.bit_length())


def test_labels_come_from_headers_and_metadata(tmp_path: Path) -> None:
    """Headers win; what only the request's metadata says is taken from there; tags that come later are an annotation."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"x-tokentape-session": str(uuid.UUID(int=5)), "x-tokentape-tags": "red, blue", "x-tokentape-workflow": "nightly"}
    with broken(Counting()) as upstream, gateway(tmp_path, upstream.url) as rig:
        client = rig.client(default_headers=headers)
        metadata = {"tags": "blue,green", "workflow": "ignored", "purpose": "triage"}
        talk(client, HELLO, metadata=metadata, user="u-1", extra_headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
        talk(client, HELLO, metadata={"tags": ["green", "late"]})
        events = ended(rig, 2)
    (opened,) = of_kind(events, SessionOpened)

    assert (opened.user, opened.workflow, opened.purpose, opened.tags) == ("u-1", "nightly", "triage", ["red", "blue", "green"])
    assert [annotation.tags_added for annotation in of_kind(events, SessionAnnotated)] == [["late"]]
    assert of_kind(events, RequestSubmitted)[0].trace_id == trace


def test_annotations_by_hand(tmp_path: Path) -> None:
    """Tags are put on and taken off, searched for, seen in SQL and in `show`; what is wrong is one line."""
    session = str(uuid.UUID(int=6))
    with broken(Counting()) as upstream, gateway(tmp_path / "data", upstream.url) as rig:
        talk(rig.client(default_headers={"x-tokentape-session": session, "x-tokentape-tags": "red"}), HELLO)
        talk(rig.client(), HELLO)
        ended(rig, 2)
    program = Program(tmp_path, rig.settings)
    program.batch(
        ["annotate", session, "--tag", "incident", "--tag", "it's", "--note", "look at the second answer"],
        ["annotate", session, "--untag", "red", "--visibility", "team"],
    )
    found, both, none, shown = program.batch(
        ["sessions", "--tag", "incident", "--format", "json"],
        ["sessions", "--tag", "incident", "--tag", "it's", "--format", "json"],
        ["sessions", "--tag", "red", "--format", "json"],
        ["show", session],
    )
    rows = program.sql("SELECT session_id FROM sessions WHERE list_contains(tags, 'incident')")

    assert [row["session_id"] for row in found.rows] == [row["session_id"] for row in both.rows] == [session]
    assert found.rows[0]["tags"] == ["incident", "it's"]
    assert none.rows == []
    assert rows == [{"session_id": session}]
    assert "look at the second answer" in shown.stdout.decode()
    assert "nothing to annotate" in program.fails("annotate", session, code=2)
    assert "both name 'a'" in program.fails("annotate", session, "--tag", "a", "--untag", "a", code=2)
    assert "no session" in program.fails("annotate", "0123", "--tag", "a", code=3)


RULES = [{"model": "secret-*", "rate": 0}, {"tag": "audit", "rate": 1}, {"key": "key-*", "rate": 0.5}]


def test_sampling_by_rule(tmp_path: Path) -> None:
    """The first rule that matches decides for the session; what was left out is counted on the tape and said with each answer."""
    with broken(Counting()) as upstream, gateway(tmp_path / "data", upstream.url, sampling=RULES, heartbeat_s=0.05, sample_rate=0) as rig:
        client = rig.client()
        for number in range(12):
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": str(number)}], stream=True).close()
        for model, tags in (("secret-1", "audit"), ("m", "audit")):
            headers = {"x-tokentape-session": str(uuid.uuid4()), "x-tokentape-tags": tags}
            list(client.chat.completions.create(model=model, messages=HELLO, stream=True, extra_headers=headers))
        events = rig.events()
        rig.stop()
        rig.recorder.close()
    opened = of_kind(events, SessionOpened)
    program = Program(tmp_path, Settings(data=tmp_path / "data", log=LogSettings(partitions=2)))
    ran = program.run(
        "sql", "SELECT sum(records_lost.count) AS n FROM events WHERE records_lost.reason = 'sampled_out'", "--format", "json"
    )

    assert {facts.sample_rate for facts in opened} <= {None, 0.5}
    assert [facts.sample_rate for facts in opened if facts.tags] == [None]
    assert {request.model for request in of_kind(events, RequestSubmitted)} == {"m"}
    assert ran.rows[0]["n"] == rig.recorder.stats.sampled_out > 0
    assert f"{ran.rows[0]['n']} sampled out" in ran.stderr.replace(",", "")


def test_a_session_is_recorded_whole_or_not_at_all(tmp_path: Path) -> None:
    """Whatever each request is like, the first decides."""
    with broken(Counting()) as upstream, gateway(tmp_path, upstream.url, sampling=[{"model": "keep", "rate": 1}], sample_rate=0) as rig:
        for models in (("keep", "drop"), ("drop", "keep")):
            client = rig.client(default_headers={"x-tokentape-session": str(uuid.uuid4())})
            for model in models:
                list(client.chat.completions.create(model=model, messages=HELLO, stream=True))
        events = ended(rig, 2)

    assert [request.model for request in of_kind(events, RequestSubmitted)] == ["keep", "drop"]
    assert of_kind(events, RecordsLost) == []


def test_a_rate_is_a_share() -> None:
    """A session's own rate beats the recorder's, and keeps about that share."""
    contexts = [SessionContext(new_id(), "t", "gateway", sample_rate=0.25) for _ in range(2000)]

    assert 400 < sum(is_sampled(context, 1.0) for context in contexts) < 600


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ("rate = 0.5", "a sampling rule needs tenant, model, tag or key"),
        ("model = 'x'", "Field required"),
        ("rate = 2\nmodel = 'x'", "less than or equal to 1"),
        ("rate = 1\nmodle = 'x'", "unknown setting 'modle'"),
    ],
)
def test_a_bad_sampling_rule_is_one_line(tmp_path: Path, rule: str, fault: str) -> None:
    """It says what is wrong and where."""
    file = tmp_path / "t.toml"
    file.write_text(f"[[recorder.sampling]]\n{rule}\n")

    with pytest.raises(SettingsError, match=fault) as caught:
        load(file=file, environ={})

    assert "recorder.sampling.0" in str(caught.value)


def test_a_header_that_is_no_session_is_refused(tmp_path: Path) -> None:
    """As before: named, and recorded in a session of its own."""
    with (
        broken(Counting()) as upstream,
        gateway(tmp_path, upstream.url) as rig,
        pytest.raises(openai.BadRequestError, match="must be a UUID"),
    ):
        talk(rig.client(default_headers={"x-tokentape-session": "mine"}), HELLO)
