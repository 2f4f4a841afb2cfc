"""Several upstreams behind one gateway: who is asked, who is left out, who comes back, and what the tape says of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from schemas.errors import SettingsError
from schemas.events import EnvironmentCaptured, GenerationFailed, GenerationFinished, GenerationStarted, RequestSubmitted
from schemas.settings import GatewaySettings, RecorderSettings, Settings, UpstreamSettings
from scripts.native.processes import free_port
from tests.conftest import VllmService
from tests.gateway_rig import HELLO, Peer, Rig, broken, chunk
from tests.program import until
from tests.test_gateway import payloads
from tokentape.config import load


def upstream(name: str, url: str, **options: Any) -> dict[str, Any]:
    """One entry of `gateway.upstreams`."""
    return {"name": name, "url": url, "kind": "openai", **options}


@contextlib.contextmanager
def routed(data: Path, *upstreams: dict[str, Any], **gateway: Any) -> Iterator[Rig]:
    """A gateway before several upstreams."""
    entries = [UpstreamSettings.model_validate(entry) for entry in upstreams]
    settings = Settings(
        data=data,
        gateway=GatewaySettings(port=0, upstreams=entries, **{"probe_s": 0.05, **gateway}),
        recorder=RecorderSettings(coalesce_ms=5.0),
    )
    rig = Rig(settings)
    try:
        assert rig.error is None
        yield rig
    finally:
        rig.close()


async def _answers(peer: Peer) -> None:
    body = {"id": "x", "model": "m", "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}
    await peer.whole(b"200 OK", b"application/json", orjson.dumps(body | {"usage": {"prompt_tokens": 3, "completion_tokens": 1}}))


async def _unavailable(peer: Peer) -> None:
    await peer.whole(b"503 Service Unavailable", b"application/json", b'{"error": {"message": "loading"}}')


async def _fails(peer: Peer) -> None:
    await peer.whole(b"500 Internal Server Error", b"application/json", b'{"error": {"message": "it broke"}}')


async def _closes(peer: Peer) -> None:
    return


async def _cut_after_one(peer: Peer) -> None:
    await peer.begin_chunked()
    await peer.chunk(chunk("one"))


def ask(rig: Rig, model: str = "m", **headers: str) -> httpx.Response:
    """A question; the answer with its status."""
    return rig.post({"model": model, "messages": HELLO}, **headers)


def health(rig: Rig, name: str) -> dict[str, Any]:
    """What the gateway knows of an upstream."""
    found = httpx.get(f"{rig.url}/health").json()["upstreams"]
    return next(facts for facts in found if facts["name"] == name)


class TestChoice:
    def test_by_what_they_serve(self, tmp_path: Path) -> None:
        """A model goes to the upstream that serves it, by its list or by its settings, and the list is that of all."""
        with (
            broken(_answers, models=("small", "shared")) as a,
            broken(_answers, models=("large", "shared")) as b,
            routed(tmp_path, upstream("a", a.url), upstream("b", b.url, models=["large", "alias"])) as rig,
        ):
            statuses = [ask(rig, model).status_code for model in ("small", "large", "alias", "small")]
            listed = [model.id for model in rig.client().models.list()]

        assert statuses == [200] * 4
        assert [body["model"] for body in a.bodies] == ["small", "small"]
        assert [body["model"] for body in b.bodies] == ["large", "alias"]
        assert sorted(listed) == ["alias", "large", "shared", "small"]

    def test_unknown_model(self, tmp_path: Path) -> None:
        """A model that nobody serves is a 404 in OpenAI's shape that names those that are, recorded with the request."""
        with (
            broken(_answers, models=("small",)) as a,
            broken(_answers, models=("large",)) as b,
            routed(tmp_path, upstream("a", a.url), upstream("b", b.url)) as rig,
        ):
            with pytest.raises(openai.NotFoundError, match=r"'tiny'.*Valid: large, small") as raised:
                rig.client().chat.completions.create(model="tiny", messages=HELLO)
            failure = rig.failure()
            submitted = payloads(rig.events(), RequestSubmitted)[0]

        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
        assert (failure.error_type, failure.status) == ("model_not_found", 404)
        assert (submitted.model, submitted.upstream, a.bodies + b.bodies) == ("tiny", None, [])

    def test_one_upstream_bound_to_models(self, tmp_path: Path) -> None:
        """Also a single upstream is asked only for what its settings name."""
        with broken(_answers, models=("m-1", "other")) as a, routed(tmp_path, upstream("a", a.url, models=["m-*"])) as rig:
            good, bad = ask(rig, "m-1"), ask(rig, "other")

        assert (good.status_code, bad.status_code) == (200, 404)
        assert "Valid: m-1." in bad.json()["error"]["message"]

    def test_by_weight(self, tmp_path: Path) -> None:
        """Shares of the work are those of the weights."""
        with (
            broken(_answers) as a,
            broken(_answers) as b,
            routed(tmp_path, upstream("a", a.url, weight=3), upstream("b", b.url)) as rig,
            httpx.Client() as client,
        ):
            for _ in range(12):
                client.post(f"{rig.url}/v1/chat/completions", json={"model": "m", "messages": HELLO})

        assert (len(a.bodies), len(b.bodies)) == (9, 3)

    def test_by_hardware(self, tmp_path: Path) -> None:
        """The preferred hardware is asked while it can be, in the order of preference; none that has it is no obstacle."""
        with (
            broken(_answers) as a,
            broken(_answers) as b,
            routed(tmp_path, upstream("a", a.url, hardware="a100"), upstream("b", b.url, hardware="h100")) as rig,
        ):
            wanted = ["h100", "tpu, h100", "h100,a100", "a100"]
            statuses = [ask(rig, x_tokentape_hardware=label).status_code for label in [*wanted, "abacus"]]
            heads = b"".join(a.heads + b.heads).lower()

        assert statuses == [200] * 5
        assert len(b.bodies) in (3, 4)
        assert b"x-tokentape-hardware" not in heads


class TestFailure:
    @pytest.mark.parametrize("act", [_unavailable, _closes, None])
    def test_another_is_asked(self, tmp_path: Path, act: Any) -> None:
        """What fails before the first byte is asked of another upstream; the tape says that it was the second attempt, and where."""
        with contextlib.ExitStack() as stack:
            bad = stack.enter_context(broken(act)).url if act else f"http://127.0.0.1:{free_port()}"
            good = stack.enter_context(broken(_answers))
            entries = [upstream("bad", bad, hardware="x", kind="auto"), upstream("good", good.url)]
            rig = stack.enter_context(routed(tmp_path, *entries, probe_s=60.0))
            probed(rig)
            answer = ask(rig, x_tokentape_hardware="x")
            events = rig.wait_for("generation_finished")

        started, submitted = payloads(events, GenerationStarted), payloads(events, RequestSubmitted)
        assert answer.status_code == 200
        assert payloads(events, GenerationFailed) == []
        assert len(good.bodies) == 1
        if act:
            assert [(part.attempt, part.upstream) for part in started] == [(2, good.url)]
            assert submitted[0].upstream == bad

    @pytest.mark.parametrize(("act", "status"), [(_fails, 500), (_cut_after_one, 200)])
    def test_nobody_else_is_asked(self, tmp_path: Path, act: Any, status: int) -> None:
        """An error that may be the request's own, and one after the first byte, are the client's answer."""
        with (
            broken(act) as bad,
            broken(_answers) as good,
            routed(tmp_path, upstream("bad", bad.url, hardware="x"), upstream("good", good.url)) as rig,
        ):
            answer = rig.post({"model": "m", "messages": HELLO, "stream": True}, x_tokentape_hardware="x")
            failure = rig.failure()

        assert answer.status_code == status
        assert b'"error"' in answer.content
        assert failure.position == (1 if status == 200 else 0)
        assert good.bodies == []

    def test_all_fail(self, tmp_path: Path) -> None:
        """Where the last one fails too, the client hears of that, in the upstream's own words, and it is one failure."""
        with (
            broken(_unavailable) as a,
            broken(_unavailable) as b,
            routed(tmp_path, upstream("a", a.url), upstream("b", b.url)) as rig,
        ):
            answer = ask(rig)
            failure = rig.failure()

        assert (answer.status_code, answer.json()) == (503, {"error": {"message": "loading"}})
        assert (failure.error_type, failure.status, len(a.bodies), len(b.bodies)) == ("upstream_error", 503, 1, 1)

    def test_ejected_and_back(self, tmp_path: Path) -> None:
        """An upstream that cannot be reached gets nothing, although it has all the weight, until it answers a probe."""
        port = free_port()
        with broken(_answers) as good:
            entries = [upstream("away", f"http://127.0.0.1:{port}", weight=99), upstream("good", good.url)]
            with routed(tmp_path, *entries) as rig:
                assert [ask(rig).status_code for _ in range(3)] == [200] * 3
                away = health(rig, "away")
                ready = httpx.get(f"{rig.url}/ready")
                with broken(_answers, port=port) as back:
                    until(lambda: health(rig, "away")["ready"])
                    ask(rig)
                    returned = len(back.bodies)

        assert (away["live"], away["ready"], away["ejected"]) == (False, False, True)
        assert (ready.status_code, ready.json()["status"]) == (200, "ready")
        assert (len(good.bodies), returned) == (3, 1)

    def test_nobody_is_ready(self, tmp_path: Path) -> None:
        """`/ready` is 503 where no upstream answers; `/health` is about the gateway."""
        entries = [upstream(name, f"http://127.0.0.1:{free_port()}") for name in "ab"]
        with routed(tmp_path, *entries) as rig:
            ready, alive, answer = httpx.get(f"{rig.url}/ready"), httpx.get(f"{rig.url}/health"), ask(rig)

        assert (ready.status_code, alive.status_code, answer.status_code) == (503, 200, 502)


def probed(rig: Rig) -> None:
    """Wait for the probe at the start."""
    until(lambda: all(facts["ready"] is not None for facts in httpx.get(f"{rig.url}/health").json()["upstreams"]))


class TestQueue:
    def test_beyond_the_bound(self, tmp_path: Path) -> None:
        """One is at work, one waits, one is refused with 503 and Retry-After; the one that waits hangs up and leaves."""
        go = threading.Event()

        async def act(peer: Peer) -> None:
            await asyncio.to_thread(go.wait)
            await _answers(peer)

        with broken(act) as slow, routed(tmp_path, upstream("slow", slow.url), concurrency_max=1, queue_max=1) as rig:
            first = threading.Thread(target=ask, args=(rig,))
            first.start()
            until(lambda: health(rig, "slow")["open"] == 1)
            with _connection(rig, priority="batch") as waiting:
                until(lambda: health(rig, "slow")["queued"] == 1)
                with pytest.raises(openai.InternalServerError) as refused:
                    rig.client().chat.completions.create(model="m", messages=HELLO)
                waiting.shutdown(socket.SHUT_RDWR)
                until(lambda: health(rig, "slow")["queued"] == 0)
            second = threading.Thread(target=ask, args=(rig,))
            second.start()
            until(lambda: health(rig, "slow")["queued"] == 1)
            go.set()
            first.join()
            second.join()
            events = until(lambda: found if len(payloads(found := rig.events(), GenerationFinished)) == 2 else None)

        failures = payloads(events, GenerationFailed)
        assert (refused.value.status_code, refused.value.code) == (503, "overloaded")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert Counter(part.error_type for part in failures) == {"overloaded": 1, "client_disconnected": 1}
        assert sorted(part.queued_us is not None for part in payloads(events, GenerationStarted)) == [False, True]
        assert Counter(part.priority for part in payloads(events, RequestSubmitted)) == {"interactive": 3, "batch": 1}
        assert len(slow.bodies) == 2

    def test_unknown_priority(self, tmp_path: Path) -> None:
        """A priority that does not exist is a 400 that names those that do."""
        with broken(_answers) as a, routed(tmp_path, upstream("a", a.url)) as rig:
            answer = ask(rig, x_tokentape_priority="urgent")
            failure = rig.failure()

        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-tokentape-priority")
        assert failure.error_type == "invalid_request"


@contextlib.contextmanager
def _connection(rig: Rig, *, priority: str) -> Iterator[socket.socket]:
    """A request whose answer nobody reads."""
    body = orjson.dumps({"model": "m", "messages": HELLO})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nx-tokentape-priority: {priority}\r\ncontent-length: {len(body)}\r\n\r\n"
    host, port = rig.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        yield connection


class TestWithVllm:
    def test_beside_a_dead_one(self, tmp_path: Path, vllm: VllmService) -> None:
        """A stream of the official client is answered by the vLLM that is there; its environment is the generation's."""
        dead = {"name": "dead", "url": f"http://127.0.0.1:{free_port()}", "hardware": "x", "models": [vllm.model]}
        alive = {"name": "alive", "url": vllm.url, "models": ["t*"], "hardware": "cpu"}
        with routed(tmp_path, dead, alive) as rig:
            client = rig.client(default_headers={"x-tokentape-hardware": "x"})
            stream = client.chat.completions.create(model=vllm.model, messages=HELLO, stream=True, max_tokens=4)
            text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
            events = rig.wait_for("generation_finished")
            listed = [model.id for model in client.models.list()]
            facts = health(rig, "alive")
        environment = payloads(events, EnvironmentCaptured)[0].environment_id

        assert text
        assert listed == [vllm.model]
        assert (facts["live"], facts["ready"]) == (True, True)
        assert payloads(events, RequestSubmitted)[0].environment_id == environment
        assert payloads(events, GenerationFinished)[0].completion_tokens == 4


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("upstream = 'http://a'\n[[gateway.upstreams]]\nname = 'b'\nurl = 'http://b'", "are both set: keep one of them"),
        ("[[gateway.upstreams]]\nname = 'b'\nurl = 'http://b'\n[[gateway.upstreams]]\nname = 'b'\nurl = 'http://c'", "called 'b'"),
        ("[[gateway.upstreams]]\nurl = 'http://b'\nkey = 'sk-hidden'", "Field required"),
        ("[[gateway.upstreams]]\nname = 'b'\nurl = 'b:80'", "should match pattern"),
        ("[[gateway.upstreams]]\nname = 'b'\nurl = 'http://b'\nwieght = 2", "unknown setting 'wieght'"),
        ("[[gateway.upstreams]]\nname = 'b'\nurl = 'http://b'\nweight = 0", "greater than 0"),
        ("[[gateway.upstreams]]\nname = 'b'\nurl = 'http://b'\nmodels = []", "at least 1 item"),
    ],
)
def test_wrong_settings(tmp_path: Path, text: str, fault: str) -> None:
    """Each mistake in the list of upstreams is one line that names it, and shows no key."""
    file = tmp_path / "t.toml"
    file.write_text(f"[gateway]\n{text}\n")
    with pytest.raises(SettingsError, match=fault) as caught:
        load(file=file, environ={})

    assert "sk-hidden" not in str(caught.value)
