"""Debug mode: real clients whose requests stop, people who edit them and let them go, and a tape that tells all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from schemas.errors import ConflictError, UnknownName, UsageError
from schemas.events import BreakpointHit, BreakpointReleased, RequestEdited, RequestSubmitted
from tests.debug_rig import Debugged, debugging, documents, folded, payloads
from tests.gateway_rig import DEADLINE_S, HELLO, Peer, broken
from tests.program import until


@pytest.fixture
def debugged(tmp_path: Path) -> Iterator[Debugged]:
    """A gateway before an upstream that repeats what it is told."""
    with debugging(tmp_path) as made:
        yield made


class TestStopping:
    def test_released_as_it_was(self, debugged: Debugged) -> None:
        """A stopped request waits, is listed without its content, and goes on byte for byte when somebody lets it."""
        name = debugged.stop(tag="debug", reason="look at it")
        free, held = debugged.ask(), debugged.ask(headers={"x-tokentape-tags": "a,debug"})
        (generation,) = debugged.waiting()
        row = debugged.desk.stopped()[0]

        assert free.result(DEADLINE_S) == HELLO[0]["content"]
        assert not held.done()
        assert (row["breakpoint"], row["state"], row["messages"], row["tags"]) == (name, "stopped", 1, ["a", "debug"])
        assert HELLO[0]["content"] not in json.dumps(row)
        assert debugged.desk.ask(generation[-6:], "release", reason="fine")["action"] == "as_is"
        assert held.result(DEADLINE_S) == HELLO[0]["content"]

        events = until(lambda: found if len(payloads(found := debugged.rig.events(), RequestSubmitted)) == 2 else None)
        hit, released = payloads(events, BreakpointHit)[0], payloads(events, BreakpointReleased)[0]

        assert (hit.breakpoint_id, hit.deadline_us, hit.default_action) == (name, 60_000_000, "release")
        assert (released.action, released.content.reason) == ("as_is", "fine")
        assert "user:ann" in {event.actor for event in events if event.kind == "breakpoint_released"}
        assert [generation.status for generation in folded(events)] == ["finished", "finished"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_edited(self, debugged: Debugged, stream: bool) -> None:
        """Only what was edited goes upstream; the tape shows the request as submitted and as edited, and who did it why."""
        debugged.stop()
        answer = debugged.ask(stream=stream, temperature=0.9)
        (generation,) = debugged.waiting()
        patch = [{"op": "replace", "path": "/messages/0/content", "value": "Speak of mountains."}, {"op": "remove", "path": "/temperature"}]
        first = debugged.desk.ask(generation, "edit", patch=patch, reason="the sea is sold out")
        second = debugged.other.ask(generation, "edit", patch=[{"op": "add", "path": "/max_tokens", "value": 7}])
        shown = debugged.desk.ask(generation, "show")
        released = debugged.desk.ask(generation, "release")

        assert answer.result(DEADLINE_S) == "Speak of mountains."
        assert (first["version"], second["version"], released["action"]) == (1, 2, "edited")
        assert [edit["actor"] for edit in shown["edits"]] == ["user:ann", "user:bob"]
        assert json.loads(shown["request"])["max_tokens"] == 7

        events = debugged.rig.wait_for("generation_finished")
        submitted, edited = documents(events)
        edits = payloads(events, RequestEdited)
        request = payloads(events, RequestSubmitted)[0]

        mountains = [{"role": "user", "content": "Speak of mountains."}]
        assert submitted == {"model": "m", "messages": HELLO, "stream": stream, "temperature": 0.9}
        assert edited == {"model": "m", "messages": mountains, "stream": stream, "max_tokens": 7}
        assert edits[0].digest_before == request.request_digest
        assert edits[0].digest_after == edits[1].digest_before
        assert (edits[0].content.reason, json.loads(edits[0].content.patch)) == ("the sea is sold out", patch)
        assert [event.actor for event in events if event.kind == "request_edited"] == ["user:ann", "user:bob"]
        assert [generation.status for generation in folded(events)] == ["finished"]

    def test_streaming_client_hears_that_it_waits(self, debugged: Debugged) -> None:
        """The head of the stream and comments come while the request is stopped, then the answer as ever."""
        debugged.stop()
        body = {"model": "m", "messages": HELLO, "stream": True}
        with httpx.stream("POST", f"{debugged.rig.url}/v1/chat/completions", json=body, timeout=DEADLINE_S) as answer:
            pieces = answer.iter_bytes()
            heard = b""
            while heard.count(b": stopped at a breakpoint\n\n") < 3:
                heard += next(pieces)
            (generation,) = debugged.waiting()
            debugged.desk.ask(generation, "release")
            rest = b"".join(pieces)

        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-tokentape-generation"] == generation
        assert b"data:" not in heard
        assert rest.endswith(b"data: [DONE]\n\n")

    def test_undo(self, debugged: Debugged) -> None:
        """Undoing is an event that names the edit; with all undone the client's own bytes go upstream."""
        debugged.stop()
        body = b'{ "model":"m",  "messages":[{"role":"user","content":"as it was"}], "temperature": 0.50 }'
        answer = debugged.pool.submit(debugged.rig.post, body)
        (generation,) = debugged.waiting()
        for temperature in (0.1, 0.2):
            debugged.desk.ask(generation, "edit", patch=[{"op": "replace", "path": "/temperature", "value": temperature}])
        undone = [debugged.other.ask(generation, "undo", reason="no")["patch"] for _ in range(2)]
        with pytest.raises(UsageError, match="no edit to undo"):
            debugged.desk.ask(generation, "undo")
        released = debugged.desk.ask(generation, "release")
        answer.result(DEADLINE_S)
        events = debugged.rig.wait_for("generation_finished")
        edits = payloads(events, RequestEdited)

        assert undone == [[{"op": "replace", "path": "/temperature", "value": value}] for value in (0.1, 0.5)]
        assert [edit.undo_of for edit in edits] == [None, None, edits[1].edit_id, edits[0].edit_id]
        assert edits[3].digest_after == edits[0].digest_before == payloads(events, RequestSubmitted)[0].request_digest
        assert released["action"] == "as_is"
        assert documents(events)[0] == documents(events)[1]
        assert folded(events)

    @pytest.mark.parametrize("stream", [False, True])
    def test_refused(self, debugged: Debugged, stream: bool) -> None:
        """A refusal is an error that the client's own library raises, with the reason; nothing went upstream."""
        debugged.stop()
        answer = debugged.ask(stream=stream)
        (generation,) = debugged.waiting()
        debugged.desk.ask(generation, "refuse", reason="not before noon")
        with pytest.raises(openai.APIError, match="refused at a breakpoint: not before noon") as caught:
            answer.result(DEADLINE_S)
        events = debugged.rig.wait_for("generation_failed")
        failure = debugged.rig.failure()

        assert stream or isinstance(caught.value, openai.PermissionDeniedError)
        assert (failure.error_type, failure.origin, failure.status, failure.retryable) == ("refused", "gateway", 403, False)
        assert [released.action for released in payloads(events, BreakpointReleased)] == ["refused"]
        assert [generation.status for generation in folded(events)] == ["failed"]
        assert "generation_started" not in {event.kind for event in events}

    @pytest.mark.parametrize(("default", "status"), [("release", 200), ("refuse", 403)])
    def test_deadline(self, debugged: Debugged, default: str, status: int) -> None:
        """A request that nobody looks at goes the way that its breakpoint says."""
        debugged.stop(deadline_s=0.3, default_action=default)
        answer = debugged.rig.post({"model": "m", "messages": HELLO})
        events = debugged.rig.wait_for("generation_finished" if status == 200 else "generation_failed")
        released = payloads(events, BreakpointReleased)[0]

        assert answer.status_code == status
        assert released.action == "expired"
        assert released.content.reason == f"nobody decided within 0.3 s: {default}d by default"
        assert folded(events)

    def test_client_hangs_up(self, debugged: Debugged) -> None:
        """A client that gives up while it waits is on the tape as that, and nothing is left at the desk."""
        debugged.stop()
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{debugged.rig.url}/v1/chat/completions", json={"model": "m", "messages": HELLO}, timeout=0.5)
        failure = debugged.rig.failure()
        events = debugged.rig.events()
        until(lambda: debugged.desk.stopped() == [])

        assert (failure.error_type, failure.origin) == ("client_disconnected", "client")
        assert [released.action for released in payloads(events, BreakpointReleased)] == ["abandoned"]
        assert [row["state"] for row in debugged.desk.stopped(settled=True)] == ["abandoned"]
        assert folded(events)

    def test_two_people_release_at_once(self, debugged: Debugged) -> None:
        """One of them is first; the other is told who, and so is whoever comes later."""
        debugged.stop()
        for _ in range(3):
            answer = debugged.ask()
            (generation,) = debugged.waiting()
            attempts = [debugged.pool.submit(desk.ask, generation, "release") for desk in (debugged.desk, debugged.other)]
            errors = [error for attempt in attempts if (error := attempt.exception(DEADLINE_S)) is not None]
            answer.result(DEADLINE_S)
            winner = next(name for name, attempt in zip(("ann", "bob"), attempts, strict=True) if attempt.exception() is None)

            assert [type(error) for error in errors] == [ConflictError]
            assert f"released as it was by user:{winner} at " in str(errors[0])
            with pytest.raises(ConflictError, match=f"by user:{winner}"):
                debugged.desk.ask(generation, "refuse")
        assert [released.action for released in payloads(debugged.rig.events(), BreakpointReleased)] == ["as_is"] * 3

    @pytest.mark.parametrize(
        ("patch", "says"),
        [
            ("nonsense", "a patch is an array of operations"),
            (
                [{"op": "replace", "path": "/mesages/0", "value": 1}],
                "replace /mesages/0: there is no 'mesages'",
            ),
            ([{"op": "test", "path": "/model", "value": "x"}], "test failed at '/model'"),
            ([{"op": "remove", "path": "/messages"}], "the edit makes the request invalid: messages must be an array"),
            ([{"op": "replace", "path": "", "value": [1]}], "the edit makes the request invalid: the body is not a JSON object"),
            ([{"op": "replace", "path": "/model", "value": 5}], "the edit makes the request invalid: model must be a text"),
            ([{"op": "add", "path": "/stream", "value": True}], "an edit cannot change stream"),
            ([{"op": "replace", "path": "/model", "value": "m"}], "the edit changes nothing"),
            ([{"op": "add", "path": "/user", "value": "x" * 5000}], "over the limit of 4096"),
        ],
    )
    def test_bad_edits(self, shared: Debugged, patch: Any, says: str) -> None:
        """One clear error, and the request stays stopped as it was."""
        (generation,) = shared.waiting()
        before = shared.desk.ask(generation, "show")
        with pytest.raises(UsageError) as caught:
            shared.desk.ask(generation, "edit", patch=patch)

        assert says in str(caught.value)
        assert caught.value.hint
        assert shared.desk.ask(generation, "show") == before

    def test_edited_meanwhile(self, shared: Debugged) -> None:
        """Who edits what another has changed since is told so, as is one who names nothing that is stopped."""
        (generation,) = shared.waiting()
        made = shared.desk.ask(generation, "edit", patch=[{"op": "add", "path": "/n", "value": 1}])
        with pytest.raises(ConflictError, match="edited meanwhile") as caught:
            shared.other.ask(generation, "edit", patch=[{"op": "add", "path": "/n", "value": 2}], version=made["version"] - 1)
        with pytest.raises(UnknownName, match="no stopped request is called 'ffffffff'"):
            shared.desk.ask("ffffffff", "show")

        assert "user:ann" in str(caught.value)

    def test_upstream_error_after_a_streamed_stop(self, tmp_path: Path) -> None:
        """What would have been a status is the last event of the stream that has begun."""

        async def act(peer: Peer) -> None:
            await peer.whole(b"404 Not Found", b"application/json", b'{"error":\n{"message": "no such model"}}')

        with broken(act) as upstream, debugging(tmp_path, upstream=upstream.url) as made:
            made.stop(deadline_s=0.2)
            with pytest.raises(openai.APIError, match="no such model"):
                made.ask(stream=True).result(DEADLINE_S)

            assert made.rig.failure().status == 404

    def test_no_more_than_the_limit(self, tmp_path: Path) -> None:
        """Above `stopped_max` the default action holds at once."""
        with debugging(tmp_path, debug={"stopped_max": 1}) as made:
            made.stop()
            first = made.ask()
            (generation,) = made.waiting()
            second = made.rig.post({"model": "m", "messages": HELLO})
            made.desk.ask(generation, "release")
            first.result(DEADLINE_S)
            events = until(lambda: found if len(payloads(found := made.rig.events(), BreakpointReleased)) == 2 else None)

        assert second.status_code == 200
        assert sorted(released.action for released in payloads(events, BreakpointReleased)) == ["as_is", "expired"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debugged]:
    """A gateway in which one request stays stopped."""
    with debugging(tmp_path_factory.mktemp("shared"), body_bytes_max=4096) as made:
        made.stop()
        made.ask()
        made.waiting()
        yield made


class TestConditions:
    @pytest.mark.parametrize(
        ("document", "stops"),
        [
            ({}, True),
            ({"tag": "debug"}, True),
            ({"tag": "debu"}, False),
            ({"model": "tiny-*"}, True),
            ({"model": "large"}, False),
            ({"where": 'contains(last, "sea") and n == 2 and params["top_p"] > 0.5'}, True),
            ({"where": 'user == "ann" and endpoint == "/v1/chat/completions"'}, True),
            ({"where": 'contains(last, "sea")', "tag": "other"}, False),
            ({"key": "nobody"}, False),
        ],
    )
    def test_what_stops(self, debugged: Debugged, document: dict[str, Any], stops: bool) -> None:
        """All conditions of a breakpoint must hold; the rest passes untouched."""
        debugged.stop(deadline_s=0.1, **document)
        debugged.ask(model="tiny-1", n=2, top_p=0.9, headers={"x-tokentape-tags": "debug", "x-tokentape-user": "ann"}).result(DEADLINE_S)
        events = debugged.rig.wait_for("generation_finished")

        assert bool(payloads(events, BreakpointHit)) == stops

    def test_a_key(self, debugged: Debugged) -> None:
        """A breakpoint on the key id that the tape gives stops the requests of that key."""
        debugged.ask().result(DEADLINE_S)
        key = payloads(debugged.rig.wait_for("generation_finished"), RequestSubmitted)[0].api_key_id
        debugged.stop(key=key, deadline_s=0.1)
        debugged.ask().result(DEADLINE_S)
        debugged.rig.wait_for("breakpoint_released")

    def test_names_are_unique_and_known(self, debugged: Debugged) -> None:
        """A second breakpoint of one name is refused; removing one that is not there says which there are."""
        debugged.desk.add({"breakpoint_id": "one"})
        with pytest.raises(ConflictError, match="'one' already"):
            debugged.desk.add({"breakpoint_id": "one"})
        with pytest.raises(UnknownName) as caught:
            debugged.desk.remove("two")
        debugged.desk.remove("one")

        assert "there are: one" in caught.value.hint
        assert debugged.desk.breakpoints() == []

    @pytest.mark.parametrize(
        ("document", "says"),
        [
            ({"breakpoint_id": "a b"}, "breakpoint_id: "),
            ({"deadline_s": 0}, "deadline_s: "),
            ({"deadline_s": 1e9}, "deadline_s: "),
            ({"default_action": "eat"}, "default_action: "),
            ({"tags": ["x"]}, "unknown field 'tags'"),
            ({"where": "modle == 1"}, "column 1: no name 'modle'"),
            ({"tag": ""}, "tag: "),
        ],
    )
    def test_bad_breakpoints(self, shared: Debugged, document: dict[str, Any], says: str) -> None:
        """One line that names the field and what is valid."""
        with pytest.raises(UsageError) as caught:
            shared.desk.add(document)

        assert says in str(caught.value)
