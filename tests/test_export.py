"""Exports: every event once in JSON Lines and Parquet, and spans that a collector's own library reads."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from google.protobuf.json_format import Parse  # type: ignore[import-untyped]  # it brings no types
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from schemas.settings import Settings
from tests.eventgen import conversation
from tests.program import to_toml
from tests.tape import incident
from tests.tiered import tiered
from tokentape.cli import main
from tokentape.exports import export, spans_of
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


@pytest.mark.parametrize("fmt", ["jsonl", "parquet", "otlp"])
def test_the_command(settings_embedded: Settings, tmp_path: Path, fmt: str) -> None:
    """By name and by condition the same file; what cannot be leaves none."""
    with tiered(settings_embedded) as rig:
        context = rig.producer.session()
        rig.ingest(list(conversation(rig.producer, chunks=3, session=context)))
    file = tmp_path / "tokentape.toml"
    file.write_text(to_toml(settings_embedded))

    def run(*words: str) -> tuple[int, str]:
        ran = CliRunner().invoke(main, ["--config", str(file), "export", "--format", fmt, *words])
        return ran.exit_code, ran.output

    session = str(uuid.UUID(bytes=context.session_id))
    assert run(session, "-o", str(tmp_path / "a"))[0] == 0
    assert run("--where", "tenant = 'acme'", "-o", str(tmp_path / "b"))[0] == 0
    code, said = run("--where", "false", "-o", str(tmp_path / "c"))

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (code, "no session meets 'false'" in said) == (2, True)
    assert run("-o", str(tmp_path / "c"))[0] == 2
    assert not (tmp_path / "c").exists()
