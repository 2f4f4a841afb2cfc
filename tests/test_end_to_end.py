"""The whole line on both deployments: official client, `tokentape up`, real vLLM, and every question people come with."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import minio
import openai
import pytest

from schemas.settings import GatewaySettings, RecorderSettings, Settings
from tests.conftest import VllmService, distributed
from tests.program import Program, Up, until

SESSION = "01990000-0000-7000-8000-00000000cafe"
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]
SPOKEN = """
    SELECT m.body AS question, t."index" AS "index", string_agg(t.text, '' ORDER BY t."position") AS answer
    FROM tokens t JOIN messages m USING (generation_id) WHERE m."position" = 1 GROUP BY ALL ORDER BY question, "index" """
KINDS = "SELECT kind, count(*) AS n FROM events WHERE kind NOT IN ({}) GROUP BY kind ORDER BY kind"
OWN_DOINGS = "'access_logged', 'producer_heartbeat', 'segment_sealed', 'verification_finished'"


@dataclass
class Recording:
    """An installation that runs, and what clients saw of it: each answer's text by question and choice."""

    program: Program
    up: Up
    client: Any
    model: str
    seen: dict[tuple[str, int], str]
    missed: int = 0

    def ask(self, question: str, *, session: str = "", **options: Any) -> Any:
        """A chat completion of one question."""
        headers = {"x-tokentape-session": session} if session else {}
        options = {"max_tokens": 24, "temperature": 0.8, "seed": 7, **options}
        messages = [{"role": "user", "content": question}]
        return self.client.chat.completions.create(model=self.model, messages=messages, extra_headers=headers, **options)


@pytest.fixture(scope="module", params=["embedded", "distributed"])
def recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> Iterator[Recording]:
    """Each deployment in turn with everything running and a day's conversations on its tape."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = Settings(data=folder / "data")
    if request.param == "distributed":
        settings = distributed(folder / "data", request.getfixturevalue("kafka"), request.getfixturevalue("minio"))
    entry = GatewaySettings(port=0, upstream=vllm.url)
    program = Program(folder, settings.model_copy(update={"gateway": entry, "recorder": RecorderSettings(mode="strict")}))
    with program.up() as up, openai.OpenAI(base_url=f"{up.ready().url}/v1", api_key="sk-test-0123456789", max_retries=0) as client:
        made = Recording(program, up, client, vllm.model, {})
        _talk(made)
        yield made
    assert program.processes() == []


def _talk(made: Recording) -> None:
    """Streamed with two choices, whole, with tools, a client that hangs up, a request that fails."""
    texts = ["", ""]
    for chunk in made.ask("two at once", stream=True, n=2, session=SESSION):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    made.seen.update({("two at once", index): text for index, text in enumerate(texts)})
    whole = made.ask("in one piece", session=SESSION)
    made.seen["in one piece", 0] = whole.choices[0].message.content
    made.ask("weather in Lisbon", tools=TOOLS, temperature=0.0)
    while not _hung_up(made):
        made.missed += 1
    with pytest.raises(openai.NotFoundError):
        made.client.chat.completions.create(model="gpt-nonexistent", messages=[{"role": "user", "content": "hello"}])


def _hung_up(made: Recording) -> bool:
    """Hang up in mid-answer; False where all of it had come by then: an engine may say nothing for seconds, then all at once."""
    with made.ask("tell me everything", stream=True, max_tokens=1500) as stream:
        for _ in zip(range(12), stream, strict=False):
            continue
    until(lambda: "tokentape_generations_open 0.0" in httpx.get(f"{made.up.ready().url}/metrics").text)
    return 'error_type="client_disconnected"' in httpx.get(f"{made.up.ready().url}/metrics").text


def test_acknowledged_events_show_in_sql_at_once(recording: Recording) -> None:
    """What a client has seen the end of is in the answer of the next query, word by word; the rest follows."""
    rows = recording.program.sql(SPOKEN)
    said = {(json.loads(row["question"])["content"], row["index"]): row["answer"] for row in rows}

    assert {key: said.get(key) for key in recording.seen} == recording.seen

    ask = "SELECT outcome, error_type, count(*) AS n FROM generations GROUP BY ALL ORDER BY outcome, n DESC, error_type"
    outcomes = until(lambda: _settled(recording.program.sql(ask)))

    assert [(row["outcome"], row["n"]) for row in outcomes] == [("failed", 1), ("failed", 1), ("finished", 3 + recording.missed)]
    assert "client_disconnected" in {row["error_type"] for row in outcomes}


def _settled(rows: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Rows of outcomes once no generation is open: a hang-up is noticed when the next token comes."""
    return rows if all(row["outcome"] != "open" for row in rows) else None


def test_sessions_timeline_and_time_travel(recording: Recording) -> None:
    """A responder finds the session, reads its timeline, and sees it as it stood at any event."""
    program = recording.program
    first = program.sql(
        f"SELECT event_id FROM events WHERE session_id = uuid_blob('{SESSION}') AND kind = 'generation_started' ORDER BY \"offset\" LIMIT 1"
    )[0]["event_id"]
    listed, document, page, whole, end, then = program.batch(
        ["sessions", "--format", "json"],
        ["timeline", SESSION, "--format", "json"],
        ["timeline", SESSION],
        ["show", SESSION, "--full"],
        ["show", SESSION, "--format", "json"],
        ["show", SESSION[:20], "--at", first, "--format", "json"],
    )

    assert {row["session_id"]: row["requests"] for row in listed.rows}[SESSION] == 2
    assert SESSION in json.dumps(document.rows)
    assert page.text.strip()
    assert "two at once" in whole.text
    assert _tokens(then.rows) == 0
    assert _tokens(end.rows) > 0


def _tokens(state: Any) -> int:
    """How many tokens a state's document holds, wherever they stand."""
    if isinstance(state, dict):
        return len(state.get("offsets_us", [])) + sum(map(_tokens, state.values()))
    return sum(map(_tokens, state)) if isinstance(state, list) else 0


def test_replay_against_the_same_engine_agrees(recording: Recording, vllm: VllmService) -> None:
    """vLLM gives the recorded tokens the recorded probabilities; the verdict is an event that SQL finds.

    Scoring is prefill: where a processor rounds that otherwise than decoding (AMX), agreement is numeric drift, not identity.
    """
    made = recording.program.run("replay", SESSION, "--mode", "compare", "--engine", vllm.url, "--format", "json")
    steps, verdicts = recording.program.batch(
        ["replay", SESSION, "--mode", "step"], ["sql", "SELECT verdict FROM replays", "--format", "json"]
    )

    verdict = json.loads(made.stdout)["verdict"]
    assert verdict in ("identical", "numeric_drift")
    assert verdicts.rows == [{"verdict": verdict}]
    assert "two at once" in steps.text


def test_cold_answers_as_hot_did_and_is_proved(recording: Recording) -> None:
    """The same SQL gives the same rows after tiering; verify passes, finds one flipped bit, and passes again."""
    program = recording.program
    kinds, spoken = KINDS.format(OWN_DOINGS), "SELECT * FROM tokens ORDER BY ALL"
    hot = program.ask(kinds, spoken)
    program.run("tier", "--now")
    cold = program.ask(kinds, spoken)
    until(lambda: program.parts()["gateway"]["encoding"] or None)
    status = program.status

    assert cold == hot
    assert status["storage"]["cold"]["files"] > 0
    assert status["watch"]["latency"]["encode"]["count"] > 20  # told by the gateway, which is another process
    assert {part["part"] for part in status["running"]} == {"gateway", "api", "indexer", "scheduler"}

    program.run("verify")
    with flipped_bit(program.settings):
        program.run("verify", code=10)
    program.run("verify")


@contextlib.contextmanager
def flipped_bit(settings: Settings) -> Iterator[None]:
    """One bit of one segment is wrong while the block runs."""
    put = _in_folder(settings.data / "cold" / "events") if settings.cold.kind == "local" else _in_bucket(settings)
    put(True)
    yield
    put(False)


def _in_folder(folder: Path) -> Callable[[bool], None]:
    path = min(folder.rglob("*.parquet"))
    good = path.read_bytes()

    def put(wrong: bool) -> None:
        path.chmod(0o600)
        path.write_bytes(_flip(good) if wrong else good)

    return put


def _in_bucket(settings: Settings) -> Callable[[bool], None]:
    """The locked version stays; another is put on top of it, and taken away."""
    cold = settings.cold
    client = minio.Minio(cold.endpoint, cold.access_key, cold.secret_key.get_secret_value(), secure=False)
    key = str(next(iter(client.list_objects(cold.bucket, prefix="events/", recursive=True))).object_name)
    versions: list[str | None] = []

    def put(wrong: bool) -> None:
        if wrong:
            answer = client.get_object(cold.bucket, key)
            good = answer.read()
            answer.close()
            versions.append(client.put_object(cold.bucket, key, io.BytesIO(_flip(good)), len(good)).version_id)
        else:
            client.remove_object(cold.bucket, key, version_id=versions.pop())

    return put


def _flip(good: bytes) -> bytes:
    middle = len(good) // 2
    return good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]


def test_sigterm_in_mid_stream_loses_nothing(recording: Recording) -> None:
    """A stream that is open at SIGTERM ends or fails as `shutdown`, told and recorded; all processes go, with exit code 0."""
    client_saw: dict[str, Any] = {"text": "", "error": None}
    begun = threading.Event()

    def listen() -> None:
        try:
            for chunk in recording.ask("go on and on", stream=True, max_tokens=1900, extra_body={"ignore_eos": True}):
                client_saw["text"] += "".join(choice.delta.content or "" for choice in chunk.choices)
                begun.set()
        except openai.APIError as error:
            client_saw["error"] = error

    thread = threading.Thread(target=listen)
    thread.start()
    begun.wait(60)
    code = recording.up.stop()
    thread.join()
    ended = recording.program.sql(
        "SELECT g.outcome, g.error_type, g.generation_id FROM generations g JOIN messages m USING (generation_id)"
        " WHERE json_extract_string(m.body, '$.content') = 'go on and on'"
    )
    taped = recording.program.sql(
        f"SELECT string_agg(text, '' ORDER BY \"position\") AS text FROM tokens WHERE generation_id = '{ended[0]['generation_id']}'"
    )[0]["text"]

    assert code == 0
    assert recording.program.processes() == []
    assert [row["outcome"] for row in ended] == ["failed" if client_saw["error"] else "finished"]
    assert ended[0]["error_type"] == ("shutdown" if client_saw["error"] else None)
    assert taped == client_saw["text"]
