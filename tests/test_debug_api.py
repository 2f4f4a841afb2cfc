"""Debug mode over HTTP: the whole round, every error as a problem document, and who is let in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from schemas.events import BreakpointReleased, RequestEdited
from tests.debug_rig import Debugged, debugging, payloads
from tests.gateway_rig import DEADLINE_S
from tests.program import until


class Api:
    """The API of one gateway; answers are JSON, problems are checked."""

    def __init__(self, made: Debugged, **headers: str) -> None:
        self.made = made
        self.headers = headers

    def __call__(self, method: str, path: str, body: Any = None, *, status: int = 200, **headers: str) -> Any:
        """The JSON of an answer with this status."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = {"content-type": "application/json"} if body is not None else {}
        named = {name.replace("_", "-"): value for name, value in {**self.headers, **headers}.items()}
        answer = httpx.request(method, f"{self.made.rig.url}/api/v1/{path}", content=content, headers={**kind, **named}, timeout=DEADLINE_S)

        assert answer.status_code == status, answer.text
        if status >= 400:
            problem: dict[str, Any] = answer.json()
            assert answer.headers["content-type"] == "application/problem+json"
            assert problem.keys() >= {"type", "title", "status", "detail", "instance"}
            assert problem["status"] == status
            return problem
        return answer.json() if answer.content else None


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A gateway with one breakpoint for the tag x."""
    with debugging(tmp_path_factory.mktemp("api")) as made:
        yield Api(made)


def test_the_whole_round(api: Api) -> None:
    """Set, stop, look, edit, undo, edit, release, remove: each over HTTP, each on the tape under the name given."""
    made = api("POST", "breakpoints", {"breakpoint_id": "round", "tag": "x", "deadline_s": 50}, status=201, x_tokentape_user="eve")
    answer = api.made.ask(headers={"x-tokentape-tags": "x"})
    (row,) = until(lambda: api("GET", "stopped")["stopped"] or None)
    path = f"stopped/{row['generation']}"
    shown = api("GET", path)
    patch = [{"op": "replace", "path": "/messages/0/content", "value": "edited"}]
    api("POST", f"{path}/edits", {"patch": patch, "reason": "so", "version": 0}, status=201, x_tokentape_user="eve")
    api("POST", f"{path}/undo", status=201)
    content = json.dumps(patch).encode()
    headers = {"content-type": "application/json-patch+json"}
    again = httpx.post(f"{api.made.rig.url}/api/v1/{path}/edits", content=content, headers=headers)
    decided = api("POST", f"{path}/release", {"reason": "go"}, x_tokentape_user="eve")
    late = api("POST", f"{path}/refuse", status=409)

    assert (made["created_by"], api("GET", "breakpoints/round")) == ("api:eve", made)
    assert json.loads(shown["request"])["messages"] == json.loads(shown["submitted"])["messages"]
    assert again.status_code == 201
    assert (decided["action"], answer.result(DEADLINE_S)) == ("edited", "edited")
    assert "released as edited by api:eve" in late["detail"]

    until(lambda: api("GET", "stopped")["stopped"] == [])
    events = api.made.rig.events()

    assert [row["state"] for row in api("GET", "stopped?settled=true")["stopped"]] == ["edited"]
    assert [event.actor for event in events if event.kind == "request_edited"] == ["api:eve", "api:somebody", "api:somebody"]
    assert [edit.undo_of is None for edit in payloads(events, RequestEdited)] == [True, False, True]
    assert [released.content.reason for released in payloads(events, BreakpointReleased)] == ["go"]
    assert api("DELETE", "breakpoints/round", status=204) is None
    assert api("GET", "breakpoints") == {"breakpoints": []}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("GET", "nothing", None, 404, "/api/v1/nothing"),
        ("GET", "stopped/a/b/c", None, 404, "nothing is served"),
        ("PUT", "breakpoints", {}, 405, "GET or POST"),
        ("POST", "breakpoints", b"{", 400, "not valid JSON"),
        ("POST", "breakpoints", [], 400, "not a JSON object"),
        ("POST", "breakpoints", {"tags": 1}, 400, "unknown field 'tags'"),
        ("POST", "breakpoints", {"where": "last."}, 400, "column 6: invalid syntax"),
        ("POST", "breakpoints", {"deadline_s": "soon"}, 400, "deadline_s: "),
        ("DELETE", "breakpoints/none", None, 404, "no breakpoint is called 'none'"),
        ("GET", "stopped/ffffffff", None, 404, "no stopped request is called 'ffffffff'"),
        ("POST", "stopped/ffffffff/release", {"why": 1}, 400, "unknown field 'why'"),
        ("POST", "stopped/ffffffff/release", None, 404, "no stopped request"),
        ("GET", "stopped/ffffffff/release", None, 405, "takes POST"),
        ("POST", "breakpoints", b"x" * (33 << 20), 413, "over the limit"),
    ],
)
def test_problems(api: Api, method: str, path: str, body: Any, status: int, says: str) -> None:
    """What is wrong, as RFC 9457 has it; nothing is a 500."""
    problem = api(method, path, body, status=status)

    assert says in f"{problem['detail']} {problem.get('hint', '')}"


def test_bad_commands_on_a_stopped_request(api: Api) -> None:
    """Reason, version and patch of a wrong kind are refused by name; the request stays stopped."""
    api("POST", "breakpoints", {"breakpoint_id": "bad", "tag": "bad"}, status=201)
    answer = api.made.ask(headers={"x-tokentape-tags": "bad"})
    (row,) = until(lambda: api("GET", "stopped")["stopped"] or None)
    path = f"stopped/{row['generation'][-8:]}"
    problems = [
        api("POST", f"{path}/edits", {"patch": [], "reason": 5}, status=400),
        api("POST", f"{path}/edits", {"patch": [], "version": "one"}, status=400),
        api("POST", f"{path}/edits", {}, status=400),
        api("POST", f"{path}/edits", {"patch": [{"op": "remove", "path": "/messages"}]}, status=400),
        api("POST", f"{path}/edits", {"patch": [{"op": "add", "path": "/n", "value": 2}], "version": 7}, status=409),
    ]
    api("POST", f"{path}/release", {})
    api("DELETE", "breakpoints/bad", status=204)

    assert answer.result(DEADLINE_S)
    assert [
        word in problem["detail"] for problem, word in zip(problems, ("reason", "version", "a patch", "messages", "edited"), strict=True)
    ]
    assert all(
        word in problem["detail"] for problem, word in zip(problems, ("reason", "version", "a patch", "messages", "edited"), strict=True)
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "tokentape.example"},
        {"origin": "https://evil.example"},
        {"x_forwarded_for": "10.0.0.1"},
        {"host": "127.0.0.1.evil.example"},
    ],
)
def test_only_this_machine_without_a_token(api: Api, headers: dict[str, str]) -> None:
    """A page of another site, a name that was rebound and a caller behind a proxy are not this machine."""
    assert "only this machine" in api("GET", "breakpoints", status=403, **headers)["detail"]


def test_a_form_of_a_web_page_is_no_command(api: Api) -> None:
    """A body that a browser sends to other sites without asking is not read."""
    answer = httpx.post(f"{api.made.rig.url}/api/v1/breakpoints", content=b"{}", headers={"content-type": "text/plain"})

    assert answer.status_code == 415
    assert answer.json()["hint"] == "send content-type: application/json"


def test_a_token(tmp_path: Path) -> None:
    """With a token nobody is let in without it, from wherever it comes; it is on no tape."""
    with debugging(tmp_path, debug={"token": SecretStr("let-me-decide")}) as made:
        api = Api(made)
        missing = api("GET", "breakpoints", status=401)
        odd = httpx.get(f"{made.rig.url}/api/v1/stopped", headers={b"authorization": "Bearer wrong-ü".encode()})
        found = api("GET", "breakpoints", authorization="Bearer let-me-decide", host="tokentape.example")

        assert "token" in missing["detail"]
        assert odd.status_code == 401
        assert found == {"breakpoints": []}
