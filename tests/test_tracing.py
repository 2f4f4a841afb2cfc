"""Spans of the gateway: a real OTLP receiver after it, official clients before it, vLLM or an upstream on cue behind it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from schemas.events import GenerationFinished, RequestSubmitted
from scripts.native.processes import free_port
from tests.conftest import VllmService
from tests.gateway_rig import DONE, HELLO, Peer, Rig, broken, chunk, running
from tests.program import until
from tests.test_gateway import payloads
from tests.test_metrics import measured

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET_WORDS = [{"role": "user", "content": "xylophone-4711"}]


class Collector:
    """What an OTLP/HTTP collector was sent: spans with their attributes as Python values."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.url = ""

    @property
    def spans(self) -> list[Span]:
        """All spans so far."""
        return [span for scopes in self._resources() for scope in scopes.scope_spans for span in scope.spans]

    def resource(self) -> dict[str, Any]:
        """Attributes of the service that sent them."""
        return attributes(next(iter(self._resources())).resource)

    def _resources(self) -> Iterator[Any]:
        for body in list(self.bodies):
            yield from ExportTraceServiceRequest.FromString(body).resource_spans

    def wait_for(self, count: int) -> list[Span]:
        """The spans once there are so many, requests before attempts."""
        spans = until(lambda: found if len(found := self.spans) >= count else None)
        return sorted(spans, key=lambda span: span.kind)


def attributes(holder: Any) -> dict[str, Any]:
    """Attributes by name."""
    return {pair.key: value_of(pair.value) for pair in holder.attributes}


def value_of(value: AnyValue) -> Any:
    """A value as Python has it."""
    kind = value.WhichOneof("value")
    return [value_of(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, str(kind))


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a port of its own."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.bodies.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """One collector for the tests that look at spans; each looks at those of its own trace."""
    with collecting() as it:
        yield it


@contextmanager
def traced(data: Path, upstream: str, collector: str, **telemetry: Any) -> Iterator[Rig]:
    """A gateway that tells a collector."""
    with running(data, upstream, telemetry={"otlp_endpoint": collector, **telemetry}) as rig:
        yield rig


def ids(span: Span) -> tuple[str, str, str]:
    """Trace, span and parent."""
    return span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()


def test_a_stream_of_vllm(tmp_path: Path, vllm: VllmService) -> None:
    """The client's span is the parent, the numbers are the tape's, and nothing that was said is in it."""
    with collecting() as collector, traced(tmp_path, vllm.url, collector.url, service_name="entry") as rig:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
        asked: dict[str, Any] = {"model": vllm.model, "messages": SECRET_WORDS, "stream": True, "max_tokens": 6, "n": 2, "seed": 5}
        chunks = list(rig.client().chat.completions.create(**asked, extra_headers=headers))
        request, attempt = collector.wait_for(2)
        events = rig.wait_for("generation_finished")
        found = until(lambda: samples if (samples := measured(rig))["tokentape_spans_exported_total[]"] == 2 else None)
    submitted, finished = payloads(events, RequestSubmitted)[0], payloads(events, GenerationFinished)[0]
    told, session = attributes(attempt), next(event.session_id for event in events if event.payload is submitted)
    said = "".join(choice.delta.content or "" for each in chunks for choice in each.choices if choice.index == 0)

    assert ids(request) == (TRACE, request.span_id.hex(), PARENT)
    assert ids(attempt) == (TRACE, attempt.span_id.hex(), request.span_id.hex())
    assert (request.name, attempt.name) == ("POST /v1/chat/completions", f"chat {vllm.model}")
    assert (request.kind, attempt.kind) == (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT)
    assert (told["gen_ai.operation.name"], told["gen_ai.provider.name"], told["gen_ai.request.model"]) == ("chat", "vllm", vllm.model)
    assert (told["gen_ai.request.max_tokens"], told["gen_ai.request.choice.count"], told["gen_ai.request.seed"]) == (6, 2, 5)
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (finished.prompt_tokens, 12)
    assert (told["gen_ai.response.finish_reasons"], told["gen_ai.response.model"]) == (["length", "length"], vllm.model)
    assert told["gen_ai.response.id"] == chunks[0].id
    assert f"http://{told['server.address']}:{told['server.port']}" == vllm.url
    assert told["tokentape.session.id"].replace("-", "") == told["gen_ai.conversation.id"].replace("-", "") == session.hex()
    assert told["tokentape.generation.id"].replace("-", "") == submitted.generation_id.hex()
    assert "error.type" not in told
    assert submitted.trace_id == TRACE
    assert collector.resource()["service.name"] == "entry"
    assert not [body for body in collector.bodies if b"xylophone" in body or said.encode() in body]
    assert found["tokentape_spans_dropped_total[]"] == 0


def test_the_engine_joins_the_trace(tmp_path: Path, collector: Collector) -> None:
    """What goes upstream names the attempt as parent, also where the client brought no trace; two attempts are two spans."""

    async def act(peer: Peer) -> None:
        if len(upstream.heads) == 1:
            return  # closes the connection: the gateway tries again
        await peer.begin_stream()
        await peer.send(chunk("a", finish="stop") + DONE)

    with broken(act) as upstream, traced(tmp_path, upstream.url, collector.url) as rig:
        before = len(collector.spans)
        rig.post({"model": "m", "messages": HELLO, "stream": True})
        spans = collector.wait_for(before + 3)
        trace = payloads(rig.events(), RequestSubmitted)[0].trace_id
    request, first, second = sorted(
        (span for span in spans if span.trace_id.hex() == trace), key=lambda span: (span.kind, span.start_time_unix_nano)
    )
    sent = [line.split(b": ")[1].decode() for head in upstream.heads for line in head.splitlines() if line.startswith(b"traceparent")]

    assert [parent[:-2] for parent in sent] == [f"00-{trace}-{span.span_id.hex()}-" for span in (first, second)]
    assert request.parent_span_id == b""
    assert (attributes(first)["error.type"], first.status.code) == ("retried", Status.STATUS_CODE_ERROR)
    assert attributes(second)["gen_ai.response.finish_reasons"] == ["stop"]


def test_failures(tmp_path: Path, collector: Collector) -> None:
    """A span of a generation that failed says how; a request that nobody can read has one too."""

    async def act(peer: Peer) -> None:
        await peer.begin_stream()
        await peer.send(chunk("a"))

    with broken(act) as upstream, traced(tmp_path, upstream.url, collector.url) as rig:
        before = len(collector.spans)
        with pytest.raises(openai.APIError):
            list(rig.client().chat.completions.create(model="m", messages=HELLO, stream=True))
        rig.post(b"{", "/v1/messages")
        collector.wait_for(before + 3)
        traces = [request.trace_id for request in payloads(rig.events(), RequestSubmitted)]
    spans = {(span.trace_id.hex(), span.kind): attributes(span) for span in collector.spans}
    broke = next(trace for trace in traces if (trace, Span.SPAN_KIND_CLIENT) in spans)
    unread = next(trace for trace in traces if trace != broke)

    assert spans[broke, Span.SPAN_KIND_CLIENT]["error.type"] == "upstream_disconnected"
    assert spans[broke, Span.SPAN_KIND_SERVER]["tokentape.failure.position"] == 1
    assert spans[unread, Span.SPAN_KIND_SERVER]["error.type"] == "invalid_request"
    assert spans[unread, Span.SPAN_KIND_SERVER]["http.response.status_code"] == 400


def test_the_clients_decision_and_the_ratio(tmp_path: Path, collector: Collector) -> None:
    """A client's trace that is not sampled stays so, a ratio of none samples none: the trace goes upstream all the same."""

    async def act(peer: Peer) -> None:
        await peer.whole(b"200 OK", b"application/json", b'{"choices": []}')

    with broken(act) as upstream, traced(tmp_path, upstream.url, collector.url, sample_ratio=0) as rig:
        before = len(collector.spans)
        for parent in (f"00-{TRACE}-{PARENT}-00", "", f"00-{TRACE}-{PARENT}-01"):
            rig.post({"model": "m", "messages": HELLO}, **({"traceparent": parent} if parent else {}))
        spans = collector.wait_for(before + 2)
    sent = [line.split(b"-") for head in upstream.heads for line in head.splitlines() if line.startswith(b"traceparent")]

    assert [int(flags, 16) & 1 for *_, flags in sent] == [0, 0, 1]
    assert len(spans) == before + 2


def test_no_collector_holds_nothing_up(tmp_path: Path) -> None:
    """Without a collector requests are served as ever, and the spans that nobody took are counted."""

    async def act(peer: Peer) -> None:
        await peer.whole(b"200 OK", b"application/json", b'{"choices": []}')

    away = f"http://127.0.0.1:{free_port()}"
    with broken(act) as upstream, traced(tmp_path, upstream.url, away, queue_max=4, timeout_s=0.5) as rig:
        answers = [rig.post({"model": "m", "messages": HELLO}).status_code for _ in range(10)]
        found = until(lambda: samples if (samples := measured(rig))["tokentape_spans_dropped_total[]"] == 20 else None)

    assert answers == [200] * 10
    assert found["tokentape_spans_exported_total[]"] == 0


def test_off_by_default(tmp_path: Path) -> None:
    """Without the setting a client's trace passes through as it is, and no metric speaks of spans."""

    async def act(peer: Peer) -> None:
        await peer.whole(b"200 OK", b"application/json", b'{"choices": []}')

    with broken(act) as upstream, running(tmp_path, upstream.url) as rig:
        rig.post({"model": "m", "messages": HELLO}, traceparent=f"00-{TRACE}-{PARENT}-01")
        found = measured(rig)

    assert f"traceparent: 00-{TRACE}-{PARENT}-01".encode() in upstream.heads[0]
    assert not [name for name in found if "spans" in name]
