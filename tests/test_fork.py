"""Forks: a live engine goes on from recorded tokens, forced by their ids; the child names its parent; what cannot be is one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from replay.child import run_fork
from replay.engines.openai import OpenAIEngine
from replay.engines.recorded import RecordedEngine
from replay.fold import Until, fold
from replay.fork import Ask, prepare
from schemas import events as e
from schemas.errors import ConflictError, TokentapeError
from schemas.settings import Settings
from tests.conftest import VllmService
from tests.tape import Tape, finish, ident
from tests.test_compare import Sink, server
from tests.traffic_rig import Traffic, ask

QUESTION = "Which request came first, and who changed it?"
TOKENS = 24


def test_a_fork_goes_on_where_the_answer_was(deployment: Settings, vllm: VllmService) -> None:
    """Greedy, the rest of the answer comes again from any token; the child names its parent and compares as its own."""
    traffic = Traffic(deployment, vllm)
    (answer,) = traffic.record([ask(QUESTION)])
    ((parent,), tokens, chunks) = (
        traffic.sql("SELECT session_id, generation_id, prompt_tokens FROM generations"),
        traffic.sql("SELECT token_id, text FROM tokens ORDER BY position"),
        traffic.sql(
            "SELECT event_id, token_chunk.position AS begins, len(token_chunk.offsets_us) AS n FROM events WHERE kind = 'token_chunk'"
        ),
    )
    (child,) = traffic.rows("fork", parent["session_id"], "--token", "9")
    shown = traffic.run("fork", parent["session_id"], "--token", "9").stdout
    (row,) = traffic.sql(f"SELECT * FROM sessions WHERE session_id = '{child['session']}'")
    ((event,), (request,)) = (
        traffic.sql(
            "SELECT uuid_text(session_opened.parent_event) AS id FROM events WHERE kind = 'session_opened' "
            f"AND session_id = uuid_blob('{child['session']}')"
        ),
        traffic.sql(f"SELECT * FROM generations WHERE session_id = '{child['session']}'"),
    )
    brought = next(chunk for chunk in chunks if chunk["begins"] < 9 <= chunk["begins"] + chunk["n"])

    assert [token["token_id"] for token in tokens[9:]] == child["sequences"][0]["token_ids"]
    assert answer["choices"][0]["message"]["content"] == "".join(t["text"] for t in tokens[:9]) + child["sequences"][0]["text"]
    assert answer["choices"][0]["message"]["content"] in shown.replace("\n", "")
    assert (row["parent_session_id"], row["purpose"], row["tags"]) == (parent["session_id"], "fork", ["fork", "fork:0:9"])
    assert (request["parent_generation_id"], request["prompt_tokens"]) == (parent["generation_id"], parent["prompt_tokens"] + 9)
    assert brought["event_id"] == event["id"]
    assert traffic.rows("replay", child["session"])[0]["verdict"] in ("identical", "numeric_drift")


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> tuple[Traffic, str]:
    """An installation with one sampled answer, and its session."""
    made = Traffic(Settings(data=tmp_path_factory.mktemp("fork") / "data"), vllm)
    made.record([ask(QUESTION, temperature=1.0, seed=5)])
    return made, made.sql("SELECT session_id FROM sessions WHERE requests > 0")[0]["session_id"]


def test_an_edit_makes_another_question_of_it(traffic: tuple[Traffic, str]) -> None:
    """Other messages are rendered anew and answered from the start, the same by the same seed; other parameters keep the recorded ids."""
    made, session = traffic
    asked = json.dumps([{"op": "replace", "path": "/messages/0/content", "value": "Weather in Oslo?"}])
    cooled = made.folder / "cooled.json"
    cooled.write_text(json.dumps([{"op": "replace", "path": "/temperature", "value": 0}]))
    (first,), (second,), (other,), (kept,) = (
        made.rows("fork", session, *words)
        for words in (
            ["--edit", asked],
            ["--edit", asked],
            ["--edit", asked, "--seed", "6", "--n", "2", "--max-tokens", "5"],
            ["--edit", f"@{cooled}", "--token", "3"],
        )
    )
    note = made.sql(f"SELECT session_annotated.content.note AS note FROM events WHERE session_id = uuid_blob('{first['session']}')")

    assert first["sequences"] == second["sequences"]
    assert (first["prompt_rendered_anew"], first["position"], first["seed"]) == (True, 0, 5)
    assert (other["seed"], [len(s["token_ids"]) for s in other["sequences"]]) == (6, [5, 5])
    assert other["sequences"][0]["token_ids"] != first["sequences"][0]["token_ids"][:5]
    assert (kept["prompt_rendered_anew"], kept["position"], len(kept["sequences"][0]["token_ids"])) == (False, 3, TOKENS - 3)
    assert [row["note"] for row in note if row["note"]] == [f"edited for the fork: {asked}"]


def test_what_cannot_be_forked_is_one_line(traffic: tuple[Traffic, str]) -> None:
    """Sessions, moments, tokens and engines that are not there, patches that are none, and nothing left to say; nothing is recorded."""
    made, session = traffic
    before = made.sql("SELECT count(*) AS n FROM sessions")
    remove = json.dumps([{"op": "remove", "path": "/no_such"}])
    for words, code, fault in (
        (["0" * 32, "--token", "1"], 3, "no session"),
        ([session, "--token", "99"], 2, "no token 99 in sequence 0"),
        ([session, "--token", "1", "--sequence", "4"], 2, "sequence 4 had said nothing by then"),
        ([session, "--at", "yesterday"], 2, "names no moment"),
        ([session, "--at", "2001-01-01T00:00:00"], 3, "no event of this session"),
        ([session, "--generation", "x"], 2, "'x' is no id"),
        ([session, "--generation", "0" * 32], 2, "no generation 00000000"),
        ([session, "--edit", "{"], 2, "--edit is no patch"),
        ([session, "--edit", remove], 2, "the edit does not apply"),
        ([session], 2, "nothing is left to say: the request allowed 24 tokens, and 24 stand"),
        ([session, "--token", "3", "--engine", "recorded"], 2, "the tape says only what was said"),
        ([session, "--token", "3", "--engine", "http://127.0.0.1:9"], 8, "does not answer"),
        ([session, "--token", "3", "--model", "nobody"], 2, "serves no model 'nobody'"),
    ):
        assert fault in made.complaint("fork", *words, code=code), words
    assert before == made.sql("SELECT count(*) AS n FROM sessions")


def _tape(ids: bool = True, **parameters: Any) -> Tape:
    tape = Tape("fork")
    tape.add(e.SessionOpened())
    g = tape.request("g", [{"role": "user", "content": "Hi"}], 1, parameters={"max_tokens": 30, **parameters})
    tape.started(g, 2, 1, (1, 2, 3) if ids else ())
    for position, at in ((0, 5.0), (2, 9.0)):
        tape.tokens(g, 2, [at, at + 1], ["a", "b"], position=position, ids=(7 + position, 8 + position) if ids else ())
    finish(tape, g, 2, [4], 12)
    return tape


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"use_beam_search": True}, "use_beam_search"),
    ],
)
def test_what_would_mean_another_thing_is_refused_by_name(parameters: dict[str, Any], name: str) -> None:
    """A field that looks at the whole answer stands against its rest; the hint takes it out."""
    events = _tape(**parameters).events
    engine = RecordedEngine(fold(events))
    with pytest.raises(ConflictError, match=f"an answer with {name} cannot") as caught:
        prepare(events, Ask(token=2), engine)

    assert f'"path": "/{name}"' in caught.value.hint


def test_a_fork_stands_where_the_session_stood() -> None:
    """`at` a chunk keeps what had been said by then, at the request nothing; without ids on the tape nothing can be forced."""
    tape = _tape()
    engine = RecordedEngine(fold(tape.events))
    chunk = next(s.event.event_id for s in tape.events if s.event.kind == "token_chunk")
    asked = next(s.event.event_id for s in tape.events if s.event.kind == "request_submitted")
    early = prepare(tape.events, Ask(at=Until("event", chunk)), engine)
    nothing = prepare(tape.events, Ask(at=Until("event", asked)), engine)
    end = prepare(tape.events, Ask(seed=4), engine)

    assert ((7, 8), "ab", chunk) == (early.prefix, early.prefix_text, early.place.event_id)
    assert [1, 2, 3, 7, 8] == early.request.document["prompt"]
    assert ((), [1, 2, 3], 30) == (nothing.prefix, nothing.request.document["prompt"], nothing.request.document["max_tokens"])
    assert ([1, 2, 3, 7, 8, 9, 10], 26, 4) == tuple(end.request.document[name] for name in ("prompt", "max_tokens", "seed"))
    assert ident("g") == end.place.generation_id
    with pytest.raises(ConflictError, match="the recording has no token ids"):
        prepare(_tape(ids=False).events, Ask(), engine)


def test_a_server_that_tells_no_ids_is_no_engine_for_a_fork() -> None:
    """It may have answered another text: refused, and nothing is recorded. So is one that changed the prompt."""
    fork = prepare(_tape().events, Ask(token=2), RecordedEngine(fold(_tape().events)))
    for choice, fault in (
        ({"text": "hm"}, "it tells no token ids"),
        ({"text": "hm", "token_ids": [4], "prompt_token_ids": [1]}, "other token ids"),
    ):
        body = json.dumps({"choices": [{"index": 0, **choice}]}).encode()
        sink = Sink()
        with server(200, body) as url, pytest.raises(TokentapeError, match=fault):
            run_fork(fork, _Deaf(url), sink)

        assert [] == sink.recorded


class _Deaf(OpenAIEngine):
    """A server whose environment is not asked."""

    def fingerprint(self, recorded: e.EnvironmentCaptured | None = None) -> e.EnvironmentCaptured:
        """Nothing is known."""
        return None  # type: ignore[return-value]  # as the contract allows
