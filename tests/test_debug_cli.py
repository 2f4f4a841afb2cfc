"""Two terminals: a real client before real vLLM in one, the command line in the other; then everything that tells of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from ingest.debug.desk import Desk
from schemas.settings import DebugSettings, GatewaySettings, RecorderSettings, Settings
from store.control import open_control
from tests.conftest import VllmService, distributed
from tests.debug_rig import wait_known
from tests.program import Program, until

SESSION = "01990000-0000-7000-8000-00000000d1b0"
QUESTION = "My order 4711 has not arrived. I want a refund."
ANSWER_S = 120.0


@dataclass
class Terminals:
    """An installation that runs: the client's terminal and the debugger's."""

    program: Program
    client: Any
    model: str
    pool: ThreadPoolExecutor

    def ask(self, question: str, **options: Any) -> Future[Any]:
        """The client asks and waits."""
        return self.pool.submit(self._ask, question, options)

    def _ask(self, question: str, options: dict[str, Any]) -> Any:
        headers = {"x-tokentape-session": SESSION, "x-tokentape-tags": "refund"}
        messages = [{"role": "user", "content": question}]
        made = {"temperature": 0.0, "max_tokens": 12, **options}
        answer = self.client.chat.completions.create(model=self.model, messages=messages, extra_headers=headers, **made)
        if not made.get("stream"):
            return answer.choices[0].message.content
        return "".join(part.choices[0].delta.content or "" for part in answer if part.choices)

    def stopped(self, count: int = 1) -> list[str]:
        """The generations that wait, once so many do."""
        with contextlib.closing(open_control(self.program.settings)) as control:
            desk = Desk(control, "", answer_timeout_s=ANSWER_S)
            rows = until(lambda: found if len(found := desk.stopped()) == count else None)
        return [row["generation"] for row in rows]


@pytest.fixture(scope="module", params=["embedded", "distributed"])
def terminals(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> Iterator[Terminals]:
    """Each deployment in turn, with a breakpoint for the tag refund."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = Settings(data=folder / "data")
    if request.param == "distributed":
        settings = distributed(folder / "data", request.getfixturevalue("kafka"), request.getfixturevalue("minio"))
    parts = {"gateway": GatewaySettings(port=0, upstream=vllm.url), "recorder": RecorderSettings(mode="strict"), "debug": DebugSettings()}
    program = Program(folder, settings.model_copy(update=parts))
    with program.up("--only", "gateway,indexer") as up, ThreadPoolExecutor(3) as pool:
        url = up.ready(("gateway", "indexer")).url
        program.run("breakpoints", "add", "refunds", "--where", 'contains(last, "refund")', "--tag", "refund")
        wait_known(url, "refunds")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-test-0123456789", max_retries=0) as client:
            yield Terminals(program, client, vllm.model, pool)
    assert program.processes() == []


def test_stop_edit_release(terminals: Terminals) -> None:
    """The answers are those of the edited question, and SQL, page and timeline tell who changed what and why."""
    program = terminals.program
    instead = terminals.ask("Say something about the sea.").result(ANSWER_S)
    whole, streamed = terminals.ask(QUESTION), terminals.ask(QUESTION, stream=True)
    ids = terminals.stopped(2)
    ran = program.batch(
        *(["stopped", "edit", generation, "--set", "messages.-1.content=Say something about the sea."] for generation in ids),
        ["stopped", "edit", ids[0], "--patch", '[{"op": "replace", "path": "/max_tokens", "value": 3}]', "--reason", "shorter"],
        ["stopped", "undo", ids[0][-8:], "--reason", "no, whole"],
        ["stopped", "show", ids[0]],
        ["stopped", "release", *ids, "--reason", "as agreed"],
    )

    assert (whole.result(ANSWER_S), streamed.result(ANSWER_S)) == (instead, instead)
    assert "no, whole" in ran[4].text
    assert ran[5].text == "".join(f"{generation} edited\n" for generation in ids)

    edits, shown, line, settled = program.batch(
        ["sql", f"SELECT * FROM edits WHERE generation_id = '{ids[0]}' ORDER BY recorded_at", "--format", "json"],
        ["show", SESSION],
        ["timeline", SESSION],
        ["stopped", "list", "--settled", "--format", "json"],
    )
    rows = edits.rows

    assert [row["reason"] for row in rows] == [None, "shorter", "no, whole"]
    assert json.loads(rows[0]["patch"]) == [{"op": "replace", "path": "/messages/0/content", "value": "Say something about the sea."}]
    assert [row["undo_of"] for row in rows] == [None, None, rows[1]["edit_id"]]
    assert [rows[0]["digest_after"], rows[1]["digest_after"]] == [rows[1]["digest_before"], rows[2]["digest_before"]]
    assert rows[2]["digest_after"] == rows[0]["digest_after"]
    assert {row["actor"] for row in rows} == {row["by"] for row in settled.rows}
    assert {row["generation"]: row["state"] for row in settled.rows} == dict.fromkeys(ids, "edited")
    assert "stopped at breakpoint refunds" in shown.text
    assert f'(was "{QUESTION}")' in " ".join(shown.text.split())
    assert "refunds" in line.text
    assert "shorter" in line.text


@pytest.mark.parametrize("terminals", ["embedded"], indirect=True)
def test_mistakes_at_the_desk(terminals: Terminals) -> None:
    """Each is one line and an exit code, and the request stays stopped; refusing it is the client's error."""
    program = terminals.program
    answer = terminals.ask(QUESTION)
    short = terminals.stopped()[0][-8:]
    wrong = [
        (["stopped", "edit", short, "--set", "nowhere.to.go=1"], 2, "there is no 'nowhere'"),
        (["stopped", "edit", short, "--set", "temperature"], 2, "is no path=value"),
        (["stopped", "edit", short, "--patch", "[{]"], 2, "--patch is no JSON"),
        (["stopped", "edit", short, "--patch", "@nowhere.json"], 2, "nowhere.json"),
        (["stopped", "edit", short, "--patch", "[]", "--set", "n=1"], 2, "exclude each other"),
        (["stopped", "edit", short, "--patch", '[{"op": "remove", "path": "/messages"}]'], 2, "makes the request invalid"),
        (["stopped", "edit", short, "--set", "stream=true"], 2, "cannot change stream"),
        (["stopped", "undo", short], 2, "no edit to undo"),
        (["breakpoints", "add", "refunds", "--everything"], 7, "'refunds' already"),
    ]
    rans = program.batch(*(words for words, _, _ in wrong), code=None)
    program.run("stopped", "refuse", "--all", "--reason", "enough")
    with pytest.raises(openai.PermissionDeniedError, match="refused at a breakpoint: enough"):
        answer.result(ANSWER_S)
    late = program.fails("stopped", "release", short, code=7)

    found = [(ran.code, says in ran.complaint) for ran, (_, _, says) in zip(rans, wrong, strict=True)]

    assert found == [(code, True) for _, code, _ in wrong]
    assert "was refused by user:" in late


@pytest.mark.parametrize("terminals", ["embedded"], indirect=True)
def test_an_editor(terminals: Terminals, tmp_path: Path) -> None:
    """Without --set and --patch the request opens in $EDITOR; what was saved becomes a patch as small as the change."""
    program = terminals.program
    script = tmp_path / "editor.py"
    script.write_text("import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text().replace('4711', '42'))")
    answer = terminals.ask(QUESTION)
    short = terminals.stopped()[0][-8:]
    program.environment["EDITOR"] = f"{program.command()[0]} {script}"
    ran, again, _ = program.batch(["stopped", "edit", short], ["stopped", "edit", short], ["stopped", "release", short])
    answer.result(ANSWER_S)

    assert ran.text == f'replace /messages/0/content = "{QUESTION.replace("4711", "42")}"\n'
    assert again.text == "nothing changed\n"
