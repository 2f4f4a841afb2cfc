"""The API over a tape: sessions, SQL, custody; who may ask for what, what is shown to whom, and what is told of what is wrong."""

from __future__ import annotations

import io
import json
import re
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest

from ingest.gateway.keys import ROLES, Role
from schemas.errors import StoreUnavailable, TokentapeError
from schemas.requests import dump, load
from schemas.settings import ApiSettings, GatewaySettings, Settings
from tests.api_rig import DEADLINE_S, Api, put, serving
from tests.conftest import KafkaService, MinioService, distributed
from tests.gateway_rig import Peer, broken
from tests.program import ROOT, until
from tests.tape import QUESTION, Tape, incident
from tokentape.api.app import ROUTES
from tokentape.api.routing import Route
from tokentape.installation import Installation

TAPE = incident()
EVENTS = [stored.event for stored in TAPE.events]
SESSION = str(uuid.UUID(bytes=TAPE.session_id))
ONE = f"debug-sessions/{SESSION}"
GHOST = "01a2155d-0be7-7f6e-8274-4bfdc61fde49"
CONVERSATION = {
    "request": {"model": "tiny", "messages": [{"role": "user", "content": "Is the zebra striped?"}]},
    "response": {"content": "Yes."},
}

EXPORT: dict[str, Any] = {"format": "tokentape.session", "version": 1, "events": []}


def configured(settings: Settings, auth: str = "required") -> Settings:
    """These settings with a free port, and keys asked for or not."""
    gateway = GatewaySettings.model_validate({"port": 0, "auth": auth})
    return settings.model_copy(update={"gateway": gateway, "api": ApiSettings(port=0)})


class ApiCase:
    """What holds in each deployment, on the incident of `tests.tape`."""

    @pytest.fixture(scope="class")
    @classmethod
    def api(cls, settings: Settings) -> Iterator[Api]:
        """The API with an admin's key, over the incident."""
        put(settings, EVENTS)
        with serving(configured(settings)) as api:
            yield api.by("admin", owner="root")

    def test_sessions_are_found(self, api: Api) -> None:
        """By words of a message, of an answer, of the title, by tag, id, model and time; and not by what is not there."""
        asked = [
            "",
            "?q=LISBON",
            "?q=sentence.%20probabilities",
            "?q=4711&tag=eu&tag=prod",
            f"?q={SESSION[:13]}",
            "?model=tiny&failed=true",
        ]
        asked += ["?since=2026-11-23T14:06:00Z&until=2026-11-23T15:00:00Z", "?tenant=acme"]
        found = [[row["session_id"] for row in api("GET", f"debug-sessions{query}")["sessions"]] for query in asked]
        missed = [api("GET", f"debug-sessions{query}")["total"] for query in ("?q=zebra", "?tag=e", "?model=t", "?since=2026-11-24T00:00Z")]

        assert found == [[SESSION]] * len(asked)
        assert missed == [0, 0, 0, 0]

    def test_what_was_said_first_and_what_is_under_way(self, api: Api) -> None:
        """A row has the beginning of the first user message; all four requests of the incident have ended."""
        (row,) = api("GET", "debug-sessions?q=lisbon")["sessions"]

        assert row["first_message"] == "What happened to the answers this morning?\nPlease be exact about times."
        assert row["under_way"] == 0
        assert api("GET", "debug-sessions?q=lisbon&under_way=true")["total"] == 0

    def test_a_page_beyond_the_end(self, api: Api) -> None:
        """It is empty and still says how many there are."""
        page = api("GET", "debug-sessions?q=lisbon&offset=5&limit=1")

        assert (page["sessions"], page["total"], page["limit"]) == ([], 1, 1)

    def test_time_travel(self, api: Api) -> None:
        """A session as it stands and as it stood; edits come with the whole request before and after."""
        now, then = api("GET", ONE), api("GET", f"{ONE}?at=%2310")
        edit = now["generations"][1]["edits"][0]

        assert (now["position"], now["of"], len(now["generations"])) == (105, 105, 4)
        assert (then["position"], then["of"], len(then["generations"])) == (10, 105, 1)
        assert now["completeness"].keys() >= {"fresh_to", "lost", "quarantined"}
        assert (edit["before"]["temperature"], edit["after"]["temperature"], edit["actor"]) == (0.8, 0.0, "dev:bo")
        assert [failure["type"] for failure in now["generations"][3]["failures"]] == ["upstream_timeout"]

    def test_timeline_tokens_and_events(self, api: Api) -> None:
        """Rows of the timeline, columns of a sequence's tokens, and pages of the events."""
        generation = api("GET", ONE)["generations"][0]["request"]["generation_id"]
        rows = api("GET", f"{ONE}/timeline")["rows"]
        columns = api("GET", f"{ONE}/tokens?generation={generation}&index=1")
        page = api("GET", f"{ONE}/events?limit=3&offset=100")

        assert "stall" in {row["what"] for row in rows}
        assert [(one["text"], one["token_id"]) for one in columns["alternatives"][5]] == [
            (columns["text"][5], None),
            ("or ", None),
            ("\ufffd", None),
        ]
        assert columns["tokens"] == len(columns["logprob"]) == len(columns["text"]) == len(columns["offset_us"]) == 64
        assert ([line["position"] for line in page["events"]], page["total"]) == ([101, 102, 103], 105)

    def test_an_export_comes_back(self, api: Api) -> None:
        """Imported, a session stands beside the original: the same tokens and times, new ids, its own tags and visibility."""
        data = api("GET", f"{ONE}/export")
        made = api("POST", "debug-sessions", {"session_data": data, "tags": ["again"], "visibility": "public"}, status=201)
        lines = api.send("GET", f"{ONE}/export?format=jsonl").text.splitlines()
        first, second = api("GET", ONE), api("GET", f"debug-sessions/{made['session_id']}")

        assert [json.loads(line) for line in lines] == data["events"]
        assert second["session"]["visibility"] == "public"
        assert (second["tokens"], len(second["generations"]), second["first_at"]) == (first["tokens"], 4, first["first_at"])
        assert [g["response"] for g in second["generations"]] == [g["response"] for g in first["generations"]]
        assert api("GET", "debug-sessions?tag=again")["total"] == 1

    def test_a_conversation_is_taken_in(self, api: Api) -> None:
        """A request and its response, without tokens, become a session that is found by what was said."""
        made = api("POST", "debug-sessions", {"session_data": CONVERSATION, "visibility": "team"}, status=201)
        shown = api("GET", f"debug-sessions/{made['session_id']}")

        assert [row["session_id"] for row in api("GET", "debug-sessions?q=zebra%20yes.")["sessions"]] == [made["session_id"]]
        assert shown["generations"][0]["response"][0]["content"] == "Yes."

    def test_what_became_private_is_gone_at_once(self, api: Api) -> None:
        """The answer to who made it private is the last moment at which somebody else is shown it; made public, it is back."""
        made = api("POST", "debug-sessions", {"session_data": CONVERSATION, "tags": ["mine"], "visibility": "public"}, status=201)
        path, stranger = f"debug-sessions/{made['session_id']}", api.by("reader", owner="sid", tenant="blue")
        found = [stranger("GET", "debug-sessions?tag=mine")["total"]]
        for visibility in ("private", "public"):
            api("POST", f"{path}/annotations", {"visibility": visibility}, status=201)
            found.append(stranger("GET", "debug-sessions?tag=mine")["total"])
            stranger("GET", path, status=404 if visibility == "private" else 200)

        assert found == [1, 0, 1]

    def test_labels_and_a_stream(self, api: Api) -> None:
        """Who follows a session is told what is said of it; a stream goes on where it was cut off."""
        with httpx.stream("GET", f"{api.url}/api/v1/{ONE}/events?follow=true", headers=api.headers, timeout=DEADLINE_S) as stream:
            lines = stream.iter_lines()
            seen = [next(line for line in lines if line.startswith("id: ")) for _ in range(105)]
            api("POST", f"{ONE}/annotations", {"tags_added": ["seen"], "note": "looked at"}, status=201)
            told = [next(line for line in lines if line.startswith("data: ")) for _ in range(2)][-1]
        headers = {**api.headers, "last-event-id": "105", "accept": "text/event-stream"}
        with httpx.stream("GET", f"{api.url}/api/v1/{ONE}/events", headers=headers, timeout=DEADLINE_S) as stream:
            resumed = next(line for line in stream.iter_lines() if line.startswith("id: "))

        assert (seen[0], seen[-1], resumed) == ("id: 1", "id: 105", "id: 106")
        assert json.loads(told.removeprefix("data: "))["payload"]["tags_added"] == ["seen"]
        assert until(lambda: "seen" in api("GET", ONE)["session"]["tags"] or None)

    def test_replays_are_jobs(self, api: Api) -> None:
        """Against the tape itself everything is identical; step and fast stop where they are told, and say what is not there."""
        compared = api.job(api("POST", f"{ONE}/replay", {"mode": "compare", "compare_with": "recorded"}, status=202))
        fast = api.job(api("POST", f"{ONE}/replay", {"mode": "fast", "to": "failure"}, status=202))
        step = api.job(api("POST", f"{ONE}/replay", {"mode": "step", "to": "#4"}, status=202))
        missing = api.job(api("POST", f"{ONE}/replay", {"mode": "fast", "to": GHOST}, status=202))
        late = api("DELETE", f"jobs/{step['job']}", status=409)

        assert (compared["state"], compared["result"]["session"]) == ("done", SESSION)
        assert compared["progress"] == {"done": 5, "total": 5}
        assert until(lambda: api("GET", f"debug-sessions?verdict={compared['result']['verdict']}")["total"] or None) == 1
        assert fast["result"]["stopped"] == "condition"
        assert [line["position"] for line in step["result"]["steps"]] == [1, 2, 3, 4]
        assert (missing["state"], missing["problem"]["status"]) == ("failed", 400)
        assert "done already" in late["detail"]

    def test_sql_in_three_forms(self, api: Api) -> None:
        """JSON, CSV and an Arrow stream hold the same rows, each with how complete it is."""
        ask = {"query": f"SELECT kind, count(*) AS n FROM events WHERE session_id = uuid_blob('{SESSION}') GROUP BY 1 ORDER BY 1"}
        as_json = api("POST", "sql", ask)
        as_csv = api.send("POST", "sql", ask, accept="text/csv")
        as_arrow = api.send("POST", "sql", {**ask, "format": "arrow"})
        table = pa.ipc.open_stream(io.BytesIO(as_arrow.content)).read_all()
        refused = api("POST", "sql", {"query": "DELETE FROM events"}, status=422)

        assert [column["name"] for column in as_json["columns"]] == table.column_names == ["kind", "n"]
        assert [list(row.values()) for row in table.to_pylist()] == as_json["rows"]
        assert len(as_csv.text.splitlines()) == as_json["row_count"] + 1
        assert json.loads(as_csv.headers["x-tokentape-completeness"]).keys() == as_json["completeness"].keys()
        assert "DELETE is not allowed" in refused["detail"]

    def test_custody(self, api: Api, settings: Settings) -> None:
        """A hold keeps an erasure away; without it another custodian approves, and content is gone while the session stands.

        Acts are on what was recorded until then, however short a time ago the last look at the log was.
        """
        made = api("POST", "debug-sessions", {"session_data": CONVERSATION}, status=201)["session_id"]
        ann, bob = (api.by("custodian", owner=name) for name in ("ann", "bob"))
        hold = ann("POST", "custody/holds", {"sessions": [made], "reason": "matter 4711"}, status=201)
        standing = api("GET", "custody/holds")["holds"]
        foreseen = ann("POST", "custody/erasures/preview", {"sessions": [made]})
        tape = Tape("of a moment ago")
        tape.request("f", [QUESTION], 0, actor="user:99")
        put(settings, [stored.event for stored in tape.events])
        newest = api("POST", "custody/erasures/preview", {"sessions": [tape.session_id.hex()]})
        kept = ann("POST", "custody/erasures", {"sessions": [made], "reason": "asked"}, status=409)
        ann("POST", f"custody/holds/{hold['hold']}/release", {"reason": "settled"})
        asked = ann("POST", "custody/erasures", {"sessions": [made], "reason": "asked"}, status=201)
        waits = [who("GET", "custody/erasures")["erasures"][-1] for who in (ann, api.by("reader", owner="rob"))]
        alone = ann("POST", f"custody/erasures/{asked['erasure']}/approve", status=400)
        bob("POST", f"custody/erasures/{asked['erasure']}/approve")
        states = {row["erasure"]: row["state"] for row in api("GET", "custody/erasures")["erasures"]}
        verified = api.job(ann("POST", "custody/verify", {}, status=202))

        assert [row["reason"] for row in standing if row["hold"] == hold["hold"]] == ["matter 4711"]
        assert (foreseen["sessions"], [one["hold"] for one in foreseen["held"]]) == ([made], [hold["hold"]])
        assert foreseen["events"] == foreseen["held"][0]["events"] > foreseen["contents"] > 0
        assert newest["events"] == len(tape.events)
        assert [(row["what"], row["reason"]) for row in waits] == [(f"session {made}", "asked"), (None, None)]
        assert "hold" in kept["detail"]
        assert "requested it and cannot approve it" in alone["detail"]
        assert states[asked["erasure"]] in ("applied", "finished")
        assert api("GET", f"debug-sessions/{made}")["erased"] > 0
        assert verified["result"]["outcome"] == "good"
        assert bob.send("GET", f"custody/erasures/{asked['erasure']}/certificate").status_code == 200

    def test_a_proof(self, api: Api) -> None:
        """An event of the cold tier is proven by one document; one that is nowhere is not."""
        api.job(api("POST", "jobs/tier/runs", status=202))
        where = "SELECT event_id FROM events WHERE kind = 'session_opened' LIMIT 1"
        event = api("POST", "sql", {"query": where})["rows"][0][0]
        answer = api.send("GET", f"custody/proofs/{event}")

        assert answer.status_code in (200, 400)  # today's events may not be in the cold tier yet
        assert ("checkpoint" in answer.json()) == (answer.status_code == 200)
        assert "no event" in api("GET", f"custody/proofs/{GHOST}", status=404)["detail"]

    def test_every_look_is_on_the_tape(self, api: Api) -> None:
        """Reading, exporting and asking are events, with who and how much; what failed is one too."""
        eve = api.by("reader", "analyst", owner="eve", tenant="acme")
        eve("GET", ONE)
        eve("GET", f"{ONE}/export")
        eve("GET", f"debug-sessions/{GHOST}", status=404)
        eve("POST", "sql", {"query": "SELECT 42"})
        told = "SELECT subject, outcome, events, statement FROM custody WHERE actor = 'key:eve' ORDER BY recorded_at"
        rows = until(lambda: found if len(found := api("POST", "sql", {"query": told})["rows"]) == 4 else None, DEADLINE_S)

        assert [row[0] for row in rows] == ["show_session", "export_session", "show_session", "sql"]
        assert [row[1] for row in rows] == ["ok", "ok", "UnknownSession", "ok"]
        assert rows[0][2] >= 105
        assert rows[3][3] == "SELECT 42"

    def test_what_a_client_has_is_not_sent_again(self, api: Api) -> None:
        """The same answer has the same ETag; who polls, and is shown nothing new, is on the tape once, with what came first and last."""
        ivy = api.by("reader", "analyst", owner="ivy", tenant="acme")
        first = ivy.send("GET", f"{ONE}?at=%2310")
        again = [ivy.send("GET", f"{ONE}?at=%2310", if_none_match=first.headers["etag"]) for _ in range(3)]
        ivy("GET", f"{ONE}?at=%2311")
        told = "SELECT subject, statement FROM custody WHERE actor = 'key:ivy' ORDER BY recorded_at"
        rows = until(lambda: found if len(found := api("POST", "sql", {"query": told})["rows"]) >= 2 else None, DEADLINE_S)

        assert [(answer.status_code, answer.content) for answer in again] == [(304, b"")] * 3
        assert [(name, statement[-2:]) for name, statement in rows] == [("show_session", "10"), ("show_session", "11")]

    def test_a_write_that_is_sent_again(self, api: Api) -> None:
        """Under its key it is done once; another request under the same key is refused."""
        ask = {"session_data": CONVERSATION, "tags": ["once"]}
        first, second = (api("POST", "debug-sessions", ask, status=201, idempotency_key="a") for _ in range(2))
        other = api("POST", "debug-sessions", {**ask, "tags": ["twice"]}, status=422, idempotency_key="a")

        assert first == second
        assert "used for another request" in other["detail"]
        assert until(lambda: api("GET", "debug-sessions?tag=once")["total"] or None) == 1


class TestEmbedded(ApiCase):
    """The embedded deployment."""

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, tmp_path_factory: pytest.TempPathFactory) -> Settings:
        """Everything in one folder."""
        return Settings(data=tmp_path_factory.mktemp("api"))


class TestDistributed(ApiCase):
    """Kafka and MinIO."""

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, tmp_path_factory: pytest.TempPathFactory, kafka: KafkaService, minio: MinioService) -> Settings:
        """A topic and a bucket of its own."""
        return distributed(tmp_path_factory.mktemp("api"), kafka, minio)


# Who may ask for what


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An API that asks for keys, over the incident; keyless."""
    settings = configured(Settings(data=tmp_path_factory.mktemp("guarded")))
    put(settings, EVENTS)
    with serving(settings) as api:
        yield api


_BODIES: dict[str, Any] = {
    "import_session": {"session_data": {}},
    "sql": {"query": "SELECT"},
    "edit_stopped": {"patch": []},
    "place_hold": {"reason": "x", "sessions": [GHOST]},
    "release_hold": {"reason": "x"},
    "request_erasure": {"reason": "x", "sessions": [GHOST]},
    "preview_erasure": {"sessions": [GHOST]},
}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_each_role_on_each_route(guarded: Api, route: Route) -> None:
    """A role that the table names comes in, and an admin; every other one is told which it takes, and nobody comes without a key."""
    path = route.path.removeprefix("/").replace("{id}", GHOST)
    for name in ("{name}", "{hold}", "{erasure}", "{event}", "{job}", "{run}"):
        path = path.replace(name, "nothing")
    query = "?generation=x" if route.name == "show_tokens" else ""
    statuses: dict[Role | None, int] = {None: guarded.send(route.method, path + query, _BODIES.get(route.name)).status_code}
    for role in ROLES:
        statuses[role] = guarded.by(role).send(route.method, path + query, _BODIES.get(route.name)).status_code
    let_in = {role for role, status in statuses.items() if status not in (401, 403)}

    assert statuses[None] == 401
    assert let_in == set(route.roles) | {"admin"}


def test_tokens_that_open_nothing(guarded: Api) -> None:
    """Expired, revoked, made up, of another shape: each is a 401 that says which."""
    expired = guarded.by("reader", expires_at=1.0)("GET", "me", status=401)
    revoked = guarded.by("reader", revoked_at=1.0)("GET", "me", status=401)
    unknown = guarded.with_token(f"tt-{'0' * 12}-{'x' * 43}").send("GET", "me")
    odd = guarded.with_token("Bearer").send("GET", "me")

    assert "expired" in expired["detail"]
    assert "revoked" in revoked["detail"]
    assert unknown.status_code == odd.status_code == 401
    assert unknown.headers["www-authenticate"] == "Bearer"


def test_whose_sessions_are_seen(guarded: Api) -> None:
    """Private is its owner's, team its tenant's, public everybody's; what one may not see is not there, in any route."""
    owner, mate, stranger = (
        guarded.by("reader", "debugger", owner=name, tenant=tenant) for name, tenant in (("ann", "red"), ("amy", "red"), ("bob", "blue"))
    )
    made = {
        shown: owner("POST", "debug-sessions", {"session_data": CONVERSATION, "visibility": shown}, status=201)["session_id"]
        for shown in ("private", "team", "public")
    }
    admin = guarded.by("admin")

    def seen(api: Api) -> set[str]:
        listed = {row["session_id"] for row in api("GET", "debug-sessions?q=zebra")["sessions"]}
        opened = {one for one in made.values() if api.send("GET", f"debug-sessions/{one}").status_code == 200}
        assert listed == opened
        return {shown for shown, one in made.items() if one in listed}

    assert until(lambda: seen(owner) == {"private", "team", "public"} or None)
    assert (seen(mate), seen(stranger), seen(admin)) == ({"team", "public"}, {"public"}, set(made))
    for rest in ("/timeline", "/events", "/events?follow=true", "/export"):
        stranger("GET", f"debug-sessions/{made['team']}{rest}", status=404)
    for rest in ("/replay", "/annotations"):
        stranger("POST", f"debug-sessions/{made['team']}{rest}", {"tags_added": ["x"]} if rest != "/replay" else {}, status=404)


def test_sql_of_one_tenant(guarded: Api) -> None:
    """A key's analyst sees the rows of its tenant, and cannot name another one."""
    analyst = guarded.by("analyst", tenant="blue")
    rows = analyst("POST", "sql", {"query": "SELECT count(*) FROM sessions WHERE tenant <> 'blue'"})["rows"]
    other = analyst("POST", "sql", {"query": "SELECT 1", "tenant": "acme"}, status=403)

    assert rows == [[0]]
    assert "of tenant blue" in other["detail"]


def test_engines_that_only_an_admin_may_name(guarded: Api) -> None:
    """Nobody else makes this machine call an address or load a model."""
    path, ask = f"{ONE}/replay", {"compare_with": "http://169.254.169.254/"}
    refused = guarded.by("debugger", tenant="acme")("POST", path, ask, status=403)
    job = guarded.by("admin")("POST", path, {"compare_with": "vllm"}, status=400)

    assert "only an admin" in refused["detail"]
    assert "is no engine" in job["detail"]


def test_a_replay_whose_engine_dies(guarded: Api) -> None:
    """What was scored before keeps its verdict, the rest is inconclusive and says why, and the job ends."""

    async def once(peer: Peer) -> None:
        if len(upstream.bodies) > 1:
            return  # the connection ends, as that of a process that was killed
        prompt = load(peer.body)["prompt"]
        scores = [None, *({str(token): {"logprob": -1.0, "rank": 1}} for token in prompt[1:])]
        choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": scores}
        await peer.whole(b"200 OK", b"application/json", dump({"object": "text_completion", "model": "tiny", "choices": [choice]}))

    admin = guarded.by("admin", owner="root")
    with broken(once) as upstream:
        job = admin.job(admin("POST", f"{ONE}/replay", {"compare_with": upstream.url}, status=202))
    said = [sequence for generation in job["result"]["generations"] for sequence in generation["sequences"]]

    assert (job["state"], job["progress"]) == ("done", {"done": 5, "total": 5})
    assert [sequence["scored"] for sequence in said] == [64, 0, 0, 0, 0]
    assert {sequence["verdict"] for sequence in said[1:]} == {"inconclusive"}
    assert all("does not answer" in sequence["reason"] and upstream.url in sequence["reason"] for sequence in said[1:])


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("GET", "nothing", None, 404, "nothing is served"),
        ("GET", "debug-sessions/..%2f..%2fetc%2fpasswd", None, 404, "nothing is served"),
        ("GET", "debug-sessions/%2e%2e", None, 404, "no session"),
        ("GET", f"debug-sessions/{GHOST}", None, 404, "no session"),
        ("GET", "debug-sessions?limit=0", None, 400, "query limit"),
        ("GET", "debug-sessions?limt=1", None, 400, "query limt"),
        ("GET", "debug-sessions?since=soon", None, 400, "query since"),
        ("GET", f"{ONE}?at=never", None, 400, "never"),
        ("GET", f"{ONE}?at={GHOST}", None, 400, "no event"),
        ("GET", f"{ONE}/tokens?generation=x", None, 400, "no id"),
        ("GET", f"{ONE}/tokens?generation={GHOST}", None, 404, "no sequence 0"),
        ("PUT", "debug-sessions", {}, 405, "GET or POST"),
        ("POST", "debug-sessions", b"{", 415, "of type"),
        ("POST", "debug-sessions", [], 400, "not a JSON object"),
        ("POST", "debug-sessions", {"session_data": {}}, 400, "no request with messages"),
        ("POST", "debug-sessions", {"session_data": {"format": "zip"}}, 400, "this is no tokentape.session"),
        ("POST", "debug-sessions", {"session_data": {**EXPORT, "version": 9}}, 400, "of version 9"),
        ("POST", "debug-sessions", {"session_data": {**EXPORT, "events": [{"avro": "AA=="}]}}, 400, "event 0"),
        ("POST", "debug-sessions", {"session_data": CONVERSATION, "visibility": "secret"}, 400, "visibility"),
        ("POST", "debug-sessions", {"session_data": CONVERSATION, "tags": ["a,b"]}, 400, "tags"),
        ("POST", f"{ONE}/annotations", {}, 400, "nothing to annotate"),
        ("POST", f"{ONE}/replay", {"mode": "slow"}, 400, "mode"),
        ("POST", "sql", {"query": "SELEC"}, 422, "syntax error"),
        ("POST", "sql", {}, 400, "query"),
        ("GET", "jobs/none", None, 404, "no job"),
        ("POST", "jobs/none/runs", None, 400, "no job is called"),
        ("GET", "stopped/ffffffff", None, 404, "no stopped request"),
        ("POST", "custody/holds", {"reason": "x"}, 400, "nothing is selected"),
        ("POST", "custody/erasures", {"reason": "x"}, 400, "sessions or of an actor"),
        ("POST", "custody/erasures/none/approve", None, 404, "none"),
    ],
)  # fmt: skip
def test_problems(guarded: Api, method: str, path: str, body: Any, status: int, says: str) -> None:
    """What is wrong, in one line, as RFC 9457 has it."""
    problem = guarded.by("admin")(method, path, body, status=status)

    assert says in f"{problem['detail']} {problem.get('hint', '')}"


def test_without_keys_only_this_machine_may_ask(tmp_path: Any) -> None:
    """No page of another site, no rebound name, nobody behind a proxy; and acts of custody need a name even here."""
    with serving(configured(Settings(data=tmp_path), auth="off")) as api:
        refused = [
            api.send("GET", "me", **headers).status_code
            for headers in (
                {"host": "tokentape.example"},
                {"origin": "https://evil.example"},
                {"x_forwarded_for": "10.0.0.1"},
                {"sec_fetch_site": "cross-site"},
                {"host": "[broken"},
            )
        ]

        assert api("GET", "me")["roles"] == ["reader", "analyst", "debugger"]
        assert refused == [403] * 5
        assert "custodian" in api("POST", "custody/holds", {"reason": "x", "tenant": "default"}, status=403)["detail"]
        assert api.by("custodian", owner="ann")("GET", "me")["name"] == "key:ann"


def test_the_document_says_what_is_served(guarded: Api) -> None:
    """Each route of the table is described, with its roles and its problems; liveness and readiness need no key."""
    document = httpx.get(f"{guarded.url}/openapi.json").json()
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}

    assert described == {(route.method, f"/api/v1{route.path}") for route in ROUTES}
    assert len({route.name for route in ROUTES}) == len(ROUTES)
    assert httpx.get(f"{guarded.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{guarded.url}/ready", timeout=DEADLINE_S).json() == {"status": "ready"}


def test_the_calls_of_the_readme(tmp_path: Any) -> None:
    """Each call of curl in the section on the API is answered; a stream is left after a moment."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Look at it")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    settings = configured(Settings(data=tmp_path), auth="off")
    put(settings, EVENTS)
    ended = {}
    with serving(settings) as api:
        for line in re.sub(r" {2,}# .*", "", block).splitlines():
            words = line.replace("http://127.0.0.1:8401", api.url).replace("SESSION", SESSION).replace("curl ", "curl -f -m 10 ")
            stream = "follow=true" in line
            ran = subprocess.run(["sh", "-c", words.replace("-m 10", "-m 3") if stream else words], capture_output=True, check=False)
            ended[line] = ran.returncode == (28 if stream else 0) and bool(ran.stdout)

    assert len(ended) == 6
    assert ended == dict.fromkeys(ended, True)


def test_a_look_that_takes_long_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While much is in the log answers are of what is indexed; what is wrong with a look is told to those who come after it."""
    over, begun, faults = threading.Event(), threading.Event(), list[TokentapeError]()

    def freshen(installation: Installation, *, behind_max: int) -> bool:
        if faults:
            raise faults[0]
        if begun.is_set():
            assert over.wait(DEADLINE_S)
        begun.set()
        return behind_max > 0

    monkeypatch.setattr(Installation, "freshen", freshen)
    monkeypatch.setattr("tokentape.api.desk.PATIENCE_S", 0.1)
    for name in ("FRESH_S", "STALE_S"):
        monkeypatch.setattr(f"tokentape.api.desk.{name}", 0.0)
    with serving(Settings(data=tmp_path, api=ApiSettings(port=0))) as api:
        answers = [api("GET", "debug-sessions")["total"] for _ in range(3)]
        faults.append(StoreUnavailable("the store is away", operation="look"))
        over.set()
        until(lambda: api.send("GET", "debug-sessions").status_code != 200 or None)
        problem = api.send("GET", "debug-sessions")

    assert answers == [0, 0, 0]
    assert (problem.status_code, problem.json()["detail"]) == (503, "look: the store is away")
