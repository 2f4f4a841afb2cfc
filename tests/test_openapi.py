"""The OpenAPI document, and hostile requests that schemathesis makes of it: no 500, no hang, no lost event, only answers it promises."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import checks

from ingest.gateway.app import ENDPOINTS
from ingest.gateway.openapi import document
from schemas.events import GenerationFailed, GenerationFinished, RequestSubmitted
from tests.gateway_rig import DEADLINE_S, DONE, Peer, Rig, broken, running
from tests.test_gateway import payloads

schema = schemathesis.openapi.from_dict(document(ENDPOINTS))
GENERATING = {endpoint.path for endpoint in ENDPOINTS}
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.unsupported_method,
]
"""Whether a request was rightly taken or refused is the engine's to say, and the one here takes everything."""
FEW = settings(
    max_examples=8,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "x"}, "text": "x", "finish_reason": "stop"}
USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
STREAM = b"data: " + orjson.dumps({"id": "c", "model": "m", "choices": [{**CHOICE, "delta": {"content": "x"}}]}) + b"\n\n" + DONE
ANSWER = orjson.dumps({"id": "c", "model": "m", "choices": [CHOICE], "data": [{"index": 0, "embedding": [0.5]}], "usage": USAGE})


class Bench:
    """A gateway before an upstream that answers whatever it is asked."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.asked: list[str] = []

    def ask(self, case: Any) -> None:
        """Send one request and hold its answer against the document."""
        answer = case.call(base_url=self.rig.url, timeout=DEADLINE_S)
        if case.operation.path in GENERATING and answer.request.method == "POST":
            self.asked.append(hashlib.sha256(answer.request.body or b"").hexdigest())
        fair = [check for check in CHECKS if case.operation.path != "/ready" or check is not checks.not_a_server_error]  # 503 is an answer
        case.validate_response(answer, checks=fair)

    def check(self) -> None:
        """Each request is on the tape, with one end, and none of them is the gateway's own failure."""
        events = self.rig.events()
        submitted = [request.generation_id for request in payloads(events, RequestSubmitted)]
        failed = payloads(events, GenerationFailed)
        ended = [end.generation_id for end in (*payloads(events, GenerationFinished), *failed)]

        assert len(submitted) == len(self.asked) > 50
        assert sorted(submitted) == sorted(ended)
        assert not [failure for failure in failed if failure.error_type == "gateway_error"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One gateway for all requests, and at the end a look at its tape."""

    async def act(peer: Peer) -> None:
        if b'"stream":true' in peer.body.replace(b" ", b""):
            await peer.begin_chunked()
            await peer.chunk(STREAM)
            await peer.chunk(b"")
            peer.kept = True
        else:
            await peer.whole(b"200 OK", b"application/json", ANSWER)

    with (
        broken(act, version=b'{"version":"1"}', models=("m",)) as upstream,
        running(tmp_path_factory.mktemp("openapi"), upstream.url) as rig,
    ):
        bench = Bench(rig)
        yield bench
        bench.check()


@schema.parametrize()
@FEW
def test_hostile_requests(case: Any, bench: Bench) -> None:
    """Each operation of the document, with what fits it and what does not."""
    bench.ask(case)


def test_the_document_is_served(bench: Bench) -> None:
    """It is the document of this gateway, and names every path that a wrong one is told of."""
    served = httpx.get(f"{bench.rig.url}/openapi.json").json()
    told = httpx.get(f"{bench.rig.url}/nowhere").json()["error"]["message"].partition("Served: ")[2].rstrip(".")
    methods = {(method.upper(), path) for path, item in served["paths"].items() for method in item if method in ("get", "post", "delete")}

    assert served == document(ENDPOINTS)
    assert {tuple(entry.split()) for entry in told.split(", ")} == {pair for pair in methods if not pair[1].startswith("/api/v1/")}
    assert served["openapi"] == "3.1.0"
