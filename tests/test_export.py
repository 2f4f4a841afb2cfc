"""Exports: every event once in JSON Lines and Parquet, spans that a collector's own library reads, and sessions that come back."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from google.protobuf.json_format import Parse  # type: ignore[import-untyped]  # it brings no types
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from schemas.settings import Settings
from tests.eventgen import conversation
from tests.program import invoke
from tests.tape import incident
from tests.tiered import tiered
from tokentape.exports import FORMATS, export, spans_of
from tokentape.installation import Installation


def test_both_deployments(deployment: Settings, tmp_path: Path) -> None:
    """A cold session and a hot one: the same events in both formats, in one order, with the same values."""
    with tiered(deployment) as rig:
        contexts = [rig.producer.session() for _ in range(2)]
        rig.ingest(list(conversation(rig.producer, chunks=3, session=contexts[0])))
        rig.tier()
        rig.ingest(list(conversation(rig.producer, chunks=3, session=contexts[1])))
        sessions = [context.session_id for context in contexts]
        with Installation(deployment) as installation:
            counts = [export(installation, sessions, fmt, tmp_path / fmt) for fmt in ("jsonl", "parquet", "otlp")]
        lines = [json.loads(line) for line in (tmp_path / "jsonl").read_text().splitlines()]
        table = pq.read_table(tmp_path / "parquet")

        assert counts == [20, 20, 4]
        assert [line["event"]["event_id"] for line in lines] == [event.hex() for event in table["event_id"].to_pylist()]
        assert {line["event"]["session_id"] for line in lines} == {session.hex() for session in sessions}
        assert set(table.column_names) == set(rig.table().column_names)
        texts = [row["content"]["text"] for row in table["token_chunk"].to_pylist() if row]
        assert texts == [line["event"]["token_chunk"]["content"]["text"] for line in lines if "token_chunk" in line["event"]]


def test_spans_are_otlp() -> None:
    """Protobuf's own reader takes them; parents, times, errors and tokens are those of the tape."""
    spans = list(spans_of(incident().events))
    text = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [_in_base64(span) for span in spans]}]}]})
    request = Parse(text, ExportTraceServiceRequest())
    read = request.resource_spans[0].scope_spans[0].spans
    facts = [{item["key"]: item["value"] for item in span["attributes"]} for span in spans]

    assert [span.name for span in read] == ["POST /v1/chat/completions", "chat tiny"] * 4
    assert all(read[i + 1].parent_span_id == read[i].span_id for i in range(0, 8, 2))
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in read)
    assert [fact.get("error.type", {}).get("stringValue") for fact in facts[::2]] == [None, None, "client_disconnected", "upstream_timeout"]
    assert facts[0]["gen_ai.usage.output_tokens"] == {"intValue": "128"}
    assert facts[0]["gen_ai.response.finish_reasons"]["arrayValue"]["values"] == [{"stringValue": "length"}] * 2
    assert "Lisbon" not in text
    assert spans == list(spans_of(incident().events))


def _in_base64(span: Mapping[str, Any]) -> dict[str, Any]:
    """OTLP writes ids in hexadecimal where protobuf's JSON has base64."""
    names = [name for name in ("traceId", "spanId", "parentSpanId") if name in span]
    return {**span, **{name: base64.b64encode(bytes.fromhex(span[name])).decode() for name in names}}


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_theinvoke(settings_embedded: Settings, tmp_path: Path, fmt: str) -> None:
    """By name and by condition the same file; what cannot be leaves none."""
    with tiered(settings_embedded) as rig:
        context = rig.producer.session()
        rig.ingest(list(conversation(rig.producer, chunks=3, session=context)))

    def run(*words: str) -> tuple[int, str]:
        ran = invoke(settings_embedded, "export", "--format", fmt, *words)
        return ran.exit_code, ran.output

    session = str(uuid.UUID(bytes=context.session_id))
    assert run(session, "-o", str(tmp_path / "a"))[0] == 0
    assert run("--where", "tenant = 'acme'", "-o", str(tmp_path / "b"))[0] == 0
    code, said = run("--where", "false", "-o", str(tmp_path / "c"))
    again = run(session, "-o", str(tmp_path / "b"))
    forced = run(session, "-o", str(tmp_path / "b"), "--force")

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (code, "no session meets 'false'" in said) == (2, True)
    assert (again[0], "is there already" in again[1], forced[0]) == (2, True, 0)
    assert run("-o", str(tmp_path / "c"))[0] == 2
    assert not (tmp_path / "c").exists()


def _rows(settings: Settings, *words: str) -> list[dict[str, Any]]:
    """What a command answers in JSON."""
    ran = invoke(settings, *words, "--format", "json")
    assert ran.exit_code == 0, ran.output
    return [json.loads(line) for line in ran.stdout.splitlines()]


def _told(file: Path) -> list[list[tuple[str, str, Any]]]:
    """The events of each session of an export, without the ids that an import makes anew and what the new session adds."""
    documents = [json.loads(line) for line in file.read_text().splitlines()]
    return [[_without_ids(line) for line in document["events"]] for document in documents]


def _without_ids(line: Mapping[str, Any]) -> tuple[str, str, Any]:
    payload = {name: value for name, value in line["payload"].items() if name not in ("generation_id", "authoritative")}
    return line["kind"], line["recorded_at"], payload


def test_sessions_come_back(deployment: Settings, tmp_path: Path) -> None:
    """Exported, taken in beside the originals, and exported again: the same events at the same times, labelled, for both sessions."""
    with tiered(deployment) as rig:
        for _ in range(2):
            rig.ingest(list(conversation(rig.producer, chunks=3, session=rig.producer.session())))
            rig.tier()
    assert invoke(deployment, "export", "--where", "true", "--format", "session", "-o", str(tmp_path / "first")).exit_code == 0
    made = _rows(deployment, "import", str(tmp_path / "first"), "--tag", "again")
    names = [row["session_id"] for row in made]
    assert invoke(deployment, "export", *names, "--format", "session", "-o", str(tmp_path / "second")).exit_code == 0
    first, second = _told(tmp_path / "first"), _told(tmp_path / "second")
    found = _rows(deployment, "sql", "SELECT session_id, tags FROM sessions WHERE list_contains(tags, 'again')")

    assert len({*names, *(json.loads(line)["session_id"] for line in (tmp_path / "first").read_text().splitlines())}) == 4
    assert [told[:-1] for told in second] == first
    assert [told[-1][0] for told in second] == ["session_annotated"] * 2
    assert {row["session_id"] for row in found} == set(names)
    assert [row["events"] for row in made] == [len(told) for told in second]


CONVERSATION = {"request": {"model": "tiny", "messages": [{"role": "user", "content": "Is it safe?"}]}, "response": {"content": "Yes."}}


def test_a_conversation_goes_out_and_comes_back(settings_embedded: Settings, tmp_path: Path) -> None:
    """One that was held elsewhere, in a file over many lines, is a session; its export is taken in by another installation."""
    (tmp_path / "talk.json").write_text(json.dumps(CONVERSATION, indent=2))
    (made,) = _rows(settings_embedded, "import", str(tmp_path / "talk.json"))
    assert invoke(settings_embedded, "export", made["session_id"], "--format", "session", "-o", str(tmp_path / "out")).exit_code == 0
    other = Settings(data=tmp_path / "other" / "data")
    (again,) = _rows(other, "import", str(tmp_path / "out"))
    said = "SELECT role, body FROM messages ORDER BY 1"

    assert again["session_id"] != made["session_id"]
    assert _rows(other, "sql", said) == _rows(settings_embedded, "sql", said)
    assert [row["model"] for row in _rows(other, "sql", "SELECT model FROM generations")] == ["tiny"]


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        ({"format": "tokentape.session", "version": 9, "events": []}, "an export of version 9; this reads 1"),
        ({"format": "zip"}, "this is no tokentape.session"),
        ("text", "a session is an object"),
    ],
)
def test_what_cannot_be_taken_in(settings_embedded: Settings, tmp_path: Path, second: Any, complaint: str) -> None:
    """One line says what is wrong and where; of a file that is partly wrong nothing is taken in."""
    file = tmp_path / "both"
    file.write_text(f"{json.dumps(CONVERSATION)}\n{json.dumps(second)}\n")
    ran = invoke(settings_embedded, "import", str(file))

    assert ran.exit_code == 2
    assert ran.stderr.splitlines()[0] == f"tokentape: import: {complaint} ({file}, line 2)"
    assert _rows(settings_embedded, "sql", "SELECT 1 FROM sessions WHERE requests > 0") == []


def test_no_json(settings_embedded: Settings, tmp_path: Path) -> None:
    """A file that is none, and a tag that is none, are each told in a line."""
    (tmp_path / "x").write_text(f"{json.dumps(CONVERSATION)}\nhello\n")
    (tmp_path / "y").write_text(json.dumps(CONVERSATION))
    ran = invoke(settings_embedded, "import", str(tmp_path / "x"))
    tagged = invoke(settings_embedded, "import", str(tmp_path / "y"), "--tag", "a,b")

    assert (ran.exit_code, f"({tmp_path / 'x'}, line 2)" in ran.stderr) == (2, True)
    assert (tagged.exit_code, "'a,b' is no tag" in tagged.stderr) == (2, True)
    assert _rows(settings_embedded, "sql", "SELECT 1 FROM sessions WHERE requests > 0") == []


def test_a_file_of_version_1_is_read(settings_embedded: Settings) -> None:
    """The export that the first version of the format wrote is taken in whole; never write this file anew."""
    (made,) = _rows(settings_embedded, "import", str(Path(__file__).parent / "exported" / "session-1.json"))
    kinds = _rows(settings_embedded, "sql", "SELECT kind FROM events WHERE source = 'import' ORDER BY \"offset\"")

    assert made["events"] == 10
    assert [row["kind"] for row in kinds] == [
        "session_opened",
        "request_submitted",
        "generation_started",
        "sequence_started",
        *["token_chunk"] * 2,
        "sequence_finished",
        "generation_finished",
        "session_closed",
        "session_annotated",
    ]
