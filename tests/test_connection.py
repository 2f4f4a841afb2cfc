"""`import tokentape`: the same questions by folder and over REST, what a notebook draws, events of one's own, and LangChain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from langchain_openai import ChatOpenAI

import tokentape as tt
from ingest.retelling import Answered
from replay.heat_html import heat_page
from replay.state import Entry
from schemas.errors import ConflictError, QueryError, SettingsError, Unavailable, UnknownSession, UsageError
from schemas.settings import ApiSettings, GatewaySettings, Settings
from tests.api_rig import Api, put, serving
from tests.conftest import VllmService
from tests.gateway_rig import HELLO
from tests.program import ROOT, to_toml
from tests.tape import incident
from tokentape.langchain import TapeHandler

TAPE = incident()
SESSION = str(uuid.UUID(bytes=TAPE.session_id))
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """An installation with the incident on its tape."""
    gateway = GatewaySettings.model_validate({"port": 0, "auth": "required"})
    made = Settings(data=tmp_path_factory.mktemp("connection") / "data", gateway=gateway, api=ApiSettings(port=0))
    put(made, [stored.event for stored in TAPE.events])
    return made


@pytest.fixture(scope="module")
def api(settings: Settings) -> Iterator[Api]:
    """Its REST API."""
    with serving(settings) as api:
        yield api


@pytest.fixture(scope="module", params=["folder", "service"])
def tape(request: pytest.FixtureRequest, settings: Settings, api: Api) -> Iterator[tt.Connection]:
    """The installation, by its folder and over REST."""
    analyst = api.by("analyst", "debugger", owner="ann", tenant="acme")
    where = (settings.data, None) if request.param == "folder" else (api.url, analyst.headers["authorization"].split()[1])
    with tt.connect(where[0], token=where[1]) as opened:
        yield opened


class TestBothWays:
    def test_sessions_are_found(self, tape: tt.Connection) -> None:
        """By words, by a condition and by the beginning of an id; what is not there is not found."""
        ways = [tape.sessions(), tape.sessions("lisbon"), tape.sessions(where="failures > 1 -- two")]

        assert [[each.id for each in found] for found in ways] == [[SESSION]] * 3
        assert (ways[0][0].facts["tokens"], ways[2][0].facts["tags"]) == (204, ["eu", "incident", "prod"])
        assert tape.session(SESSION[:9]).id == tape.session(SESSION).id == SESSION
        assert len(tape.sessions("zebra")) == 0

    def test_time_travel(self, tape: tt.Connection) -> None:
        """A session at an event, at a time and at its end, forwards and backwards."""
        session = tape.session(SESSION)
        end, tenth = session.at(), session.at(10)
        by_id = session.at(str(uuid.UUID(bytes=tenth.events[-1].event.event_id)))

        assert [event.event for event in end.events] == [stored.event for stored in TAPE.events]
        assert (len(tenth.events), len(tenth.state.generations), tenth.state.tokens) == (10, 1, 10)
        assert by_id.document == tenth.document
        assert session.at("2026-11-23T14:05:29.2").document["generations"][-1]["pauses"][0]["breakpoint"] == "tools"
        assert session.at().document["generations"][3]["failures"][0]["type"] == "upstream_timeout"

    def test_what_is_drawn(self, tape: tt.Connection) -> None:
        """Timeline, tokens, a table and a list are pages in frames that may run nothing."""
        session = tape.session(SESSION)
        tokens = session.tokens(1, 1)
        drawn: list[Any] = [session, session.timeline(), tokens, tokens.by("gap"), tape.sessions(), tape.sql("SELECT 1 AS one")]
        pages = [each._repr_html_() for each in drawn]

        assert all(page.startswith("<iframe sandbox srcdoc=") and "default-src &#x27;none&#x27;" in page for page in pages)
        assert "Morning slowness, ticket 4711" in pages[1]
        assert unescape(pages[2]).count('title="token ') == len(tokens) == 64
        assert tokens.arrow["logprob"].null_count == 0
        assert tokens.text.startswith("The incident began")

    def test_sql_is_arrow(self, tape: tt.Connection) -> None:
        """A table that whatever takes Arrow takes, and how complete it is."""
        answer = tape.sql("SELECT outcome, count(*) AS n FROM generations GROUP BY 1 ORDER BY 1")

        assert answer.arrow.to_pylist() == [{"outcome": "failed", "n": 2}, {"outcome": "finished", "n": 2}]
        assert pa.table(answer) == answer.arrow
        assert answer.completeness["lost"] == 0
        assert answer.completeness["fresh_to"]

    def test_a_comparison(self, tape: tt.Connection) -> None:
        """Against the tape itself everything is identical, and each sequence stands in the table."""
        found = tape.session(SESSION).compare("recorded")

        assert found.verdict == "identical"
        assert unescape(found._repr_html_()).count(">identical</td>") == 5

    def test_what_cannot_be(self, tape: tt.Connection) -> None:
        """Each is one line that says what is wrong."""
        session = tape.session(SESSION)

        with pytest.raises(QueryError, match="DELETE is not allowed"):
            tape.sql("DELETE FROM events")
        with pytest.raises(UnknownSession, match="no session 0123"):
            tape.session("0123")
        with pytest.raises(UsageError, match="q and where exclude each other"):
            tape.sessions("x", where="true")
        with pytest.raises(UsageError, match="no generation 9") as caught:
            session.tokens(9)
        assert caught.value.hint == "1 to 4"
        with pytest.raises(UsageError, match="generation 4 has no sequence 3"):
            session.tokens(4, 3)
        with pytest.raises(UsageError, match="no event"):
            session.at(SESSION)
        with pytest.raises(UsageError, match="'heat' colours nothing"):
            session.tokens().by("heat")  # type: ignore[arg-type]


def test_roles_bind_over_rest(settings: Settings, api: Api) -> None:
    """A reader's SQL and a stranger's key are refused, another tenant's session is not there, and looks are on the tape."""

    def token(*roles: str, **facts: Any) -> str:
        return api.by(*roles, **facts).headers["authorization"].split()[1]

    with tt.connect(f"{api.url}/api/v1/", token=token("reader", owner="rea", tenant="acme")) as reader:
        assert reader.session(SESSION).at().state.tokens == 204
        with pytest.raises(UsageError, match="needs the role analyst"):
            reader.sql("SELECT 1")
        with pytest.raises(UsageError, match="over REST events are not recorded one by one"):
            reader.begin()
        with pytest.raises(UsageError, match="over REST"):
            TapeHandler(reader)
    with tt.connect(api.url, token=token("reader", owner="eve", tenant="other")) as stranger, pytest.raises(UnknownSession):
        stranger.session(SESSION)
    with pytest.raises(UsageError, match="key is not known"):
        tt.connect(api.url, token="no-key")
    with tt.connect(settings.data) as tape:
        looks = tape.sql("SELECT subject FROM custody WHERE actor = 'key:rea'").arrow

    assert "export_session" in looks.column(0).to_pylist()


def test_what_is_no_installation(tmp_path: Path) -> None:
    """A folder that is not there, a settings file that is none, nobody at an address, a token for a folder."""
    with pytest.raises(UsageError, match="there is no installation"):
        tt.connect(tmp_path / "nowhere")
    (tmp_path / "tokentape.toml").write_text("data = 7 7")
    with pytest.raises(SettingsError, match="not TOML"):
        tt.connect(tmp_path / "tokentape.toml")
    with pytest.raises(Unavailable, match="no answer"):
        tt.connect("http://127.0.0.1:9")
    with pytest.raises(UsageError, match="a token is for an installation behind a URL"):
        tt.connect(tmp_path, token="x")


def test_importing_is_cheap() -> None:
    """`import tokentape` loads neither DuckDB nor Arrow, names what there is, and knows no other names."""
    code = "import sys, tokentape as t; print([m for m in ('duckdb', 'pyarrow', 'pydantic', 'starlette') if m in sys.modules], dir(t))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout

    assert said.startswith("[] [")
    assert all(f"'{name}'" in said for name in tt.__all__)
    assert all(getattr(tt, name) for name in tt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        tt.conect  # noqa: B018  a name that is none


def test_hostile_tokens() -> None:
    """What a model says never becomes markup, whatever it is."""
    page = heat_page([Entry(0, "content", 0, 1, -9.0, HOSTILE), Entry(1, HOSTILE, 5, None, None, None)], title=HOSTILE)

    assert "<script" not in page
    assert "&lt;script&gt;" in page


class TestOneself:
    @pytest.fixture(scope="class")
    @classmethod
    def tape(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tt.Connection]:
        """An empty installation whose rules take mail addresses of one tenant."""
        file = tmp_path_factory.mktemp("own") / "tokentape.toml"
        rules = '[redaction.tenants.shy]\nbuiltin = ["email"]\n[redaction.tenants.mute]\ncontent = "none"\n'
        file.write_text(f"data = {json.dumps(str(file.parent / 'data'))}\n{rules}")
        with tt.connect(file) as opened:
            yield opened

    def test_a_generation_told_as_it_happens(self, tape: tt.Connection) -> None:
        """Request, tokens as they came, a tool call and the end; messages that are said again are recorded once."""
        mine = tape.begin(user="ann", workflow="ranking", title="mine", tags=["own"])
        first = mine.ask(HELLO, model="compass", temperature=0.5, seed=7)
        for piece in ("Up, ", "", "on maps."):
            first.token(piece)
        first.finish(completion_tokens=2, prompt_tokens=3)
        second = mine.ask([*HELLO, {"role": "assistant", "content": "Up, on maps."}], model="compass")
        call = tt.events.ToolCallContent(call_id="c", name="turn", arguments='{"by":90}')
        second.finish(Answered(said={"content": "Turning."}, calls=[call], finish_reason="tool_calls"), model="compass-2")
        third = mine.ask(HELLO)
        third.fail("the needle is stuck")
        mine.record(tt.events.SessionAnnotated(tags_added=["seen"]))
        mine.close()
        assert tape.recorder.flush(30)
        session = tape.session(mine.id)
        state = session.at().state
        told = session.at().document["generations"]
        requests = [event.event.payload for event in session.events if isinstance(event.event.payload, tt.events.RequestSubmitted)]
        stored = [message for request in requests if request.content for message in request.content.messages]

        assert [row["request"]["status"] for row in told] == ["finished", "finished", "failed"]
        assert (told[0]["response"][0]["content"], told[0]["response"][0]["tokens"]) == ("Up, on maps.", 2)
        assert told[1]["response"][0]["tool_calls"] == [call.model_dump()]
        assert [message["content"] for message in told[1]["request"]["messages"]] == [HELLO[0]["content"], "Up, on maps."]
        assert len(stored) == 2
        assert (state.tags, state.closed.reason if state.closed else None, len(state.anomalies)) == (("own", "seen"), "done", 0)
        assert tape.sql("SELECT model, seed FROM generations WHERE seed = 7").arrow.to_pylist() == [{"model": "compass", "seed": 7}]
        with pytest.raises(ConflictError, match="ended already"):
            third.finish()

    def test_rules_hold(self, tape: tt.Connection) -> None:
        """What a rule takes is not on the tape, also where it came in two pieces; of a tenant without content nothing is."""
        shy, mute = tape.begin(tenant="shy"), tape.begin(tenant="mute")
        for session in (shy, mute):
            telling = session.ask([{"role": "user", "content": "I am ann@example.com"}], model="m")
            telling.token("Hello ann@")
            telling.token("example.com")
            telling.finish(Answered(said={"content": "Hello ann@example.com"}))
        assert tape.recorder.flush(30)
        answers = [tape.session(session.id).at().document["generations"][0]["response"][0] for session in (shy, mute)]

        assert answers[0]["content"] == "Hello [redacted:email]"
        assert answers[1].get("content") is None
        assert len(tape.sessions("example.com")) == 0

    def test_langchain(self, tape: tt.Connection, vllm: VllmService) -> None:
        """Streamed, whole and failed calls of a real model are generations; a thread is a session of its own."""
        common: dict[str, Any] = {"api_key": "none", "max_tokens": 12, "max_retries": 0}
        model = ChatOpenAI(model=vllm.model, base_url=f"{vllm.url}/v1", temperature=0, stream_usage=True, **common)
        handler = TapeHandler(tape, user="ann", tags=["chain"])
        with_us: Any = {"callbacks": [handler], "metadata": {"trip": "7"}}
        streamed = "".join(str(chunk.content) for chunk in model.stream("Hello", config=with_us))
        whole = model.invoke("Hello", config=with_us)
        threaded: Any = {**with_us, "metadata": {"thread_id": "t1"}}
        model.invoke("Hello", config=threaded)
        with pytest.raises(Exception, match="does not exist"):
            model.bind(model="nobody").invoke("Hello", config=with_us)
        assert tape.recorder.flush(30)
        first, thread = (tape.session(each).at() for each in handler.sessions)
        told = first.document["generations"]
        said = [row["response"][0]["content"] if row["response"] else None for row in told]

        assert said == [streamed, whole.content, None]
        assert told[0]["response"][0]["tokens"] > 1
        assert told[1]["completion_tokens"] == 12
        assert told[0]["request"]["messages"] == [{"role": "user", "content": "Hello"}]
        assert told[0]["request"]["parameters"]["metadata"]["trip"] == "7"
        assert "NotFoundError" in told[2]["failures"][0]["message"]
        assert (thread.document["metadata"]["title"], len(thread.state.generations)) == ("t1", 1)
        assert first.document["context"]["client"].startswith("langchain-core/")

    def test_without_langchain(self) -> None:
        """Where it is not installed, that is said and how to have it."""
        code = "import sys; sys.modules['langchain_core'] = None\nimport tokentape.langchain"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)

        assert ran.stderr.splitlines()[-1].startswith(
            "ImportError: tokentape.langchain needs langchain-core (pip install 'tokentape[langchain]')"
        )


EXECUTE = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=120, startup_timeout=120).execute()
nbformat.write(notebook, sys.argv[2])
"""
"""As Jupyter runs a notebook, in a process of its own: its kernel's sockets and loops are nobody else's."""


def test_the_notebook(settings: Settings) -> None:
    """`docs/notebook.ipynb` is committed without outputs, and every cell of it runs in a real kernel and draws what it should."""
    notebook, folder = ROOT / "docs" / "notebook.ipynb", settings.data.parent
    (folder / "tokentape.toml").write_text(to_toml(settings))
    command = [sys.executable, "-c", EXECUTE, str(notebook), "ran.ipynb"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ran.returncode == 0, ran.stderr[-3000:]
    outputs = [output for cell in json.loads((folder / "ran.ipynb").read_text())["cells"] for output in cell.get("outputs", [])]
    frames = [html for output in outputs if (html := "".join(output.get("data", {}).get("text/html", [])))]

    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in json.loads(notebook.read_text())["cells"])
    assert len(frames) == 7
    assert all(frame.startswith("<iframe sandbox") for frame in frames)
    assert {output["output_type"] for output in outputs} == {"execute_result"}
