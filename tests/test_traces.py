"""OpenTelemetry in: the SDK's own exporter and an instrumented library before the API, and files, are sessions on the tape, once."""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode

from ingest.importing import Owner
from ingest.traces.conventions import call_of
from ingest.traces.reading import from_document
from ingest.traces.taking import Traces
from schemas.errors import UsageError
from schemas.settings import Settings
from store.log import open_log
from tests.api_rig import DEADLINE_S, Api, serving
from tests.program import invoke, until
from tests.tape import incident
from tests.test_api import configured
from tokentape.exports import spans_of

TRACE = "5b8efff798038103d269b633813fc60c"
QUESTION = "Is it raining in Oslo?"
SAID: list[dict[str, Any]] = [
    {"role": "user", "parts": [{"type": "text", "content": QUESTION}]},
    {
        "role": "assistant",
        "parts": [
            {"type": "reasoning", "content": "Ask."},
            {"type": "tool_call", "id": "c1", "name": "weather", "arguments": {"city": "Oslo"}},
        ],
    },
    {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": {"rain": True}}]},
]
ANSWERED: list[dict[str, Any]] = [{"role": "assistant", "parts": [{"type": "text", "content": "It is."}], "finish_reason": "stop"}]
IN_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": QUESTION},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "Ask.",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": '{"rain":true}'},
]
FACTS: dict[str, Any] = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "tiny",
    "gen_ai.request.temperature": 0.5,
    "gen_ai.request.stop_sequences": ["\n"],
    "gen_ai.response.id": "r-1",
    "gen_ai.response.model": "tiny-2",
    "gen_ai.response.finish_reasons": ["stop"],
    "gen_ai.usage.input_tokens": 12,
    "gen_ai.usage.output_tokens": 3,
    "acme.experiment": {"arm": "b", "weight": 2},
}


def attributes(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Attributes as OTLP's JSON has them."""
    return [{"key": name, "value": _value(value)} for name, value in facts.items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"kvlistValue": {"values": attributes(value)}}
    if isinstance(value, list):
        return {"arrayValue": {"values": [_value(item) for item in value]}}
    kinds = {bool: "boolValue", int: "intValue", float: "doubleValue", str: "stringValue"}
    return {kinds[type(value)]: str(value) if type(value) is int else value}


def span(facts: Mapping[str, Any], *, number: int = 1, trace: str = TRACE, **fields: Any) -> dict[str, Any]:
    """A span that began `number` seconds after the trace and took half a second."""
    start = 1_795_442_717_000_000_000 + number * 1_000_000_000
    times = {"startTimeUnixNano": str(start), "endTimeUnixNano": str(start + 500_000_000)}
    ids = {"traceId": trace, "spanId": f"{number:016x}"}
    return {**ids, "name": "chat tiny", "kind": 3, **times, "attributes": attributes(facts), **fields}


def request(*spans: dict[str, Any]) -> dict[str, Any]:
    """A request to a collector, in JSON."""
    scoped = {"scope": {"name": "acme.client", "version": "3"}, "spans": list(spans)}
    service = {"service.name": "shop", "service.version": "1.2"}
    return {"resourceSpans": [{"resource": {"attributes": attributes(service)}, "scopeSpans": [scoped]}]}


def flat(message: dict[str, Any], place: str) -> dict[str, Any]:
    """A message in numbered attributes."""
    calls = {
        f"{place}.tool_calls.{i}.{name}": value
        for i, call in enumerate(message.get("tool_calls", []))
        for name, value in {"id": call["id"], **call["function"]}.items()
    }
    plain = {f"{place}.{name}": value for name, value in message.items() if isinstance(value, str)}
    return {**plain, **calls}


TOLD_AS = {
    "values": span({**FACTS, "gen_ai.input.messages": SAID, "gen_ai.output.messages": ANSWERED}),
    "json": span({**FACTS, "gen_ai.input.messages": json.dumps(SAID), "gen_ai.output.messages": json.dumps(ANSWERED)}),
    "details": span(
        FACTS,
        events=[
            {
                "name": "gen_ai.client.inference.operation.details",
                "attributes": attributes({"gen_ai.input.messages": SAID, "gen_ai.output.messages": json.dumps(ANSWERED)}),
            }
        ],
    ),
    "events": span(
        FACTS,
        events=[
            {"name": "gen_ai.user.message", "attributes": attributes({"gen_ai.system": "openai", "content": QUESTION})},
            {
                "name": "gen_ai.assistant.message",
                "attributes": attributes({"reasoning": "Ask.", "tool_calls": json.dumps(IN_CHAT[1]["tool_calls"])}),
            },
            {"name": "gen_ai.tool.message", "attributes": attributes({"tool_call_id": "c1", "content": '{"rain":true}'})},
            {"name": "gen_ai.choice", "attributes": attributes({"index": 0, "finish_reason": "stop", "message": '{"content": "It is."}'})},
        ],
    ),
    "in one": span(
        FACTS,
        events=[
            {"name": "gen_ai.content.prompt", "attributes": attributes({"gen_ai.prompt": json.dumps(IN_CHAT)})},
            {"name": "gen_ai.content.completion", "attributes": attributes({"gen_ai.completion": json.dumps([{"content": "It is."}])})},
        ],
    ),
    "numbered": span(
        {
            **FACTS,
            **{name: value for i, each in enumerate(IN_CHAT) for name, value in flat(each, f"gen_ai.prompt.{i}").items()},
            **flat({"role": "assistant", "content": "It is.", "finish_reason": "stop"}, "gen_ai.completion.0"),
        }
    ),
}


@pytest.mark.parametrize("way", list(TOLD_AS))
def test_each_generation_of_the_conventions(way: str) -> None:
    """Wherever the messages stand, the same is told; what is unknown survives as it was."""
    (read,) = from_document(request(TOLD_AS[way]))
    call = call_of(read)
    said = [{name: value for name, value in message.items() if value is not None} for message in call.asked.messages]
    told = [{name: json.loads(value) if name == "content" and value[:1] == "{" else value for name, value in each.items()} for each in said]
    wanted = [{name: value for name, value in message.items() if value is not None} for message in IN_CHAT]
    wanted[2]["content"] = {"rain": True}
    left = call.asked.parameters["metadata"]["otel"]

    assert told == wanted
    assert [(answer.said.get("content"), answer.finish_reason) for answer in call.answers] == [("It is.", "stop")]
    assert (call.prompt_tokens, call.completion_tokens, call.response_id, call.response_model) == (12, 3, "r-1", "tiny-2")
    assert {**call.asked.parameters, "metadata": None} == {"model": "tiny", "temperature": 0.5, "stop": ["\n"], "metadata": None}
    assert left["attributes"]["acme.experiment"] == {"arm": "b", "weight": 2}
    assert (left["resource"]["service.name"], left["scope"]["version"]) == ("shop", "3")
    assert not [name for name in left["attributes"] if name.startswith(("gen_ai.input", "gen_ai.output", "gen_ai.prompt", "gen_ai.comp"))]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An API that asks for keys, over an empty tape."""
    with serving(configured(Settings(data=tmp_path_factory.mktemp("traces")))) as api:
        yield api


def exporter(api: Api, path: str = "/v1/traces") -> OTLPSpanExporter:
    """The SDK's exporter, as a service sets it up."""
    return OTLPSpanExporter(endpoint=api.url + path, headers=api.headers)


def generations(api: Api, **of: str) -> list[Any]:
    """Rows of what is on the tape."""
    where = " AND ".join(f"{name} = '{value}'" for name, value in of.items())
    columns = "session_id, model, outcome, prompt_tokens, completion_tokens, error_type"
    rows: list[Any] = api("POST", "sql", {"query": f"SELECT {columns} FROM generations WHERE {where} ORDER BY submitted_at"})["rows"]
    return rows


def test_the_sdk_exports_to_us(api: Api) -> None:
    """Two calls of a conversation in two traces, with an agent around the first: one session, each message once, sent twice or not."""
    own = api.by("debugger", "analyst", owner="shop", tenant="red")
    sent: list[Any] = []

    class Twice(OTLPSpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            sent.extend(spans)
            return SpanExportResult.FAILURE if super().export(spans) is not SpanExportResult.SUCCESS else super().export(spans)

    provider = TracerProvider(resource=Resource({"service.name": "shop"}))
    provider.add_span_processor(SimpleSpanProcessor(Twice(endpoint=f"{own.url}/v1/traces", headers=own.headers)))
    tracer = provider.get_tracer("acme.client")
    talk = {"gen_ai.conversation.id": "talk-7", "user.id": "ann"}
    agent = {"gen_ai.operation.name": "invoke_agent", "gen_ai.request.model": "tiny", **talk}
    with (
        tracer.start_as_current_span("invoke_agent helper", attributes=agent),
        tracer.start_as_current_span("chat tiny", kind=SpanKind.CLIENT, attributes=talk) as first,
    ):
        first.set_attributes({name: value for name, value in FACTS.items() if not isinstance(value, dict)})
        first.set_attribute("gen_ai.input.messages", json.dumps(SAID[:1]))
        first.set_attribute("gen_ai.output.messages", json.dumps(ANSWERED))
    again = [*SAID[:1], {"role": "assistant", "parts": [{"type": "text", "content": "It is."}]}, SAID[0]]
    with tracer.start_as_current_span("chat tiny", attributes={**talk, "gen_ai.operation.name": "chat"}) as second:
        second.set_attributes({"gen_ai.request.model": "tiny", "gen_ai.input.messages": json.dumps(again), "error.type": "timeout"})
        second.set_status(Status(StatusCode.ERROR, "no answer in 30 s"))
    provider.shutdown()
    assert exporter(own).export(sent) is SpanExportResult.SUCCESS  # all of them once more, in another batch
    rows = until(lambda: found if len(found := generations(own, tenant="red")) == 2 else None, DEADLINE_S)
    shown = own("GET", f"debug-sessions/{rows[0][0]}")
    bodies = own("POST", "sql", {"query": "SELECT count(DISTINCT message_id) FROM messages"})["rows"]

    assert [row[1:] for row in rows] == [
        ["tiny", "finished", 12, 3, None],
        ["tiny", "failed", None, None, "upstream_timeout"],
    ]
    assert rows[0][0] == rows[1][0]
    assert [message["content"] for message in shown["generations"][1]["request"]["messages"]] == [QUESTION, "It is.", QUESTION]
    assert shown["generations"][0]["response"][0]["content"] == "It is."
    assert shown["generations"][1]["failures"][0]["message"] == "timeout: no answer in 30 s"
    assert (shown["context"]["user"], shown["context"]["client"], shown["session"]["tenant"]) == ("ann", "shop", "red")
    assert shown["anomalies"] == []
    assert bodies == [[2]]
    assert own("GET", f"debug-sessions?q={sent[0].context.trace_id:032x}")["total"] == 0
    assert api.by("reader", tenant="blue").send("GET", f"debug-sessions/{rows[0][0]}").status_code == 404


def test_json_and_compression(api: Api) -> None:
    """JSON, gzip and the answer of the protocol: what was left aside is said in the request's own format."""
    own = api.by("debugger", tenant="json", owner="json")
    body = json.dumps(request(TOLD_AS["values"], span({"http.route": "/"}, number=2))).encode()
    packed = own.send("POST", "traces", gzip.compress(body), content_type="application/json", content_encoding="gzip")
    empty = own.send("POST", f"{own.url}/v1/traces", b"", content_type="application/x-protobuf")
    answer = ExportTraceServiceResponse.FromString(empty.content)

    assert packed.json() == {"partialSuccess": {"errorMessage": "1 spans are no calls to a model and were left aside"}}
    assert (empty.headers["content-type"], answer.partial_success.rejected_spans) == ("application/x-protobuf", 0)
    assert until(lambda: own("GET", "debug-sessions?q=raining")["total"] or None) == 1


@pytest.mark.parametrize(
    ("body", "media", "status", "complaint"),
    [
        (b"\xff\xff", "application/x-protobuf", 400, "this is no OTLP"),
        (b"{", "application/json", 400, "not valid JSON"),
        (b'{"spans": []}', "application/json", 400, "there are no resourceSpans"),
        (json.dumps(request(span({}, trace="zz"))).encode(), "application/json", 400, "traceId is not 32 hexadecimal digits"),
        (json.dumps(request({"name": "x"})).encode(), "application/json", 400, "the span 'x' has no ids"),
        (b'{"resourceSpans": 7}', "application/json", 400, "this is no OTLP"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "a body of type application/x-www-form-urlencoded"),
    ],
)
def test_what_is_no_trace(api: Api, body: bytes, media: str, status: int, complaint: str) -> None:
    """One line says what is wrong; nobody without the role sends any."""
    own = api.by("debugger")

    assert complaint in own("POST", "traces", body, status=status, content_type=media)["detail"]
    assert api.send("POST", "traces", body, content_type=media).status_code == 401
    assert api.by("reader").send("POST", "traces", body, content_type=media).status_code == 403


def test_a_bomb(api: Api) -> None:
    """A small body that unpacks to a huge one is refused, as is one that is no gzip and one packed in another way."""
    own = api.by("debugger")
    headers = {**own.headers, "content-type": "application/json"}

    def sent(body: bytes, encoding: str) -> int:
        url = f"{own.url}/v1/traces"
        return httpx.post(url, content=body, headers={**headers, "content-encoding": encoding}, timeout=DEADLINE_S).status_code

    assert sent(gzip.compress(bytes(130 << 20), 1), "gzip") == 413
    assert (sent(b"{}", "gzip"), sent(b"{}", "br")) == (400, 415)


def test_nobody_looks_and_it_is_there_once(deployment: Settings) -> None:
    """Two programs that do not know of one another send the same request: the index leaves out what was said before."""
    spans, owner = from_document(request(TOLD_AS["json"])), Owner("acme", "somebody", ("t",), "team")
    log = open_log(deployment.log, deployment.data)
    try:
        first, second = (Traces(deployment, lambda sessions: {}).take(spans, owner, log) for _ in range(2))
    finally:
        log.close()
    rows = _rows(deployment, "sql", "SELECT kind, count(*) AS n FROM events WHERE source = 'import' GROUP BY 1 HAVING n > 1")

    assert first == second
    assert rows == []
    assert _rows(deployment, "sql", "SELECT tags, tokens FROM sessions") == [{"tags": ["t"], "tokens": 1}]


def test_exported_sessions_come_back(settings_embedded: Settings, tmp_path: Path) -> None:
    """What `export --format otlp` writes is taken in: each generation once, with its model, tokens, end and trace; again it is not."""
    spans = list(spans_of(incident().events))
    (tmp_path / "spans.json").write_text(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}))
    once, twice = (invoke(settings_embedded, "import", "--otlp", str(tmp_path / "spans.json"), "--format", "json") for _ in range(2))
    rows = _rows(settings_embedded, "sql", "SELECT model, outcome, completion_tokens, error_type FROM generations ORDER BY submitted_at")

    assert (once.exit_code, twice.exit_code) == (0, 0)
    assert [json.loads(line)["generations"] for line in once.stdout.splitlines()] == [4]
    assert (twice.stdout, "4 generations here already" in twice.stderr) == ("", True)
    assert [tuple(row.values()) for row in rows] == [
        ("tiny", "finished", 128, None),
        ("tiny", "finished", 30, None),
        ("tiny", "failed", None, "client_disconnected"),
        ("tiny", "failed", None, "upstream_timeout"),
    ]


def test_files_that_are_none(settings_embedded: Settings, tmp_path: Path) -> None:
    """The line is named, and nothing of the file is taken in."""
    file = tmp_path / "spans"
    file.write_text(json.dumps(request(TOLD_AS["json"])) + '\n{"resourceSpans": {}}\n')
    ran = invoke(settings_embedded, "import", "--otlp", str(file))

    assert (ran.exit_code, ran.stderr.startswith("tokentape: import: this is no OTLP")) == (2, True)
    assert f"({file}, line 2)" in ran.stderr
    assert _rows(settings_embedded, "sql", "SELECT 1 FROM sessions WHERE requests > 0") == []


def test_values_in_values() -> None:
    """However deep a document is, it is refused and not followed."""
    deep: dict[str, Any] = {"stringValue": "x"}
    for _ in range(200):
        deep = {"arrayValue": {"values": [deep]}}
    with pytest.raises(UsageError, match="this is no OTLP"):
        from_document(request({**span({}), "attributes": [{"key": "deep", "value": deep}]}))


def _rows(settings: Settings, *words: str) -> list[dict[str, Any]]:
    ran = invoke(settings, *words, "--format", "json")
    assert ran.exit_code == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_ids_do_not_cross_tenants(settings_embedded: Settings) -> None:
    """The same trace of two tenants is two sessions, whatever it says of itself."""
    spans = from_document(request(span({**FACTS, "gen_ai.conversation.id": "c", "tokentape.session.id": str(uuid.UUID(int=7))})))
    log = open_log(settings_embedded.log, settings_embedded.data)
    try:
        made = [Traces(settings_embedded, lambda sessions: {}).take(spans, Owner(tenant, "x"), log).sessions for tenant in ("a", "b")]
    finally:
        log.close()

    assert len({session for each in made for session in each}) == 2
    assert all(uuid.UUID(bytes=session).int != 7 for each in made for session in each)
