"""Virtual keys at the gateway: who gets in, what the tape says of it, how much goes through, and what several workers make of a limit."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import orjson
import pytest
from pydantic import SecretStr

from ingest.gateway import keys
from ingest.gateway.keys import VirtualKey, make
from ingest.gateway.quotas import LEASES, MINUTE_S
from schemas.events import GenerationFailed, RequestSubmitted
from schemas.settings import GatewaySettings, RecorderSettings, Settings, UpstreamSettings
from store.control import open_control
from tests.conftest import VllmService
from tests.gateway_rig import HELLO, Peer, Rig, broken, chunk
from tests.program import ROOT, Program, until
from tests.test_gateway import payloads

UPSTREAM_KEY = "sk-upstream-5b1d9e7720aa41c3"
T = TypeVar("T")


async def _answers(peer: Peer) -> None:
    message = {"role": "assistant", "content": "hi"}
    body = {"id": "x", "model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    await peer.whole(b"200 OK", b"application/json", orjson.dumps(body | {"usage": {"prompt_tokens": 7, "completion_tokens": 3}}))


async def _talks_until_gone(peer: Peer) -> None:
    await peer.begin_chunked()
    while True:
        await peer.chunk(chunk("on "))
        await asyncio.sleep(0.01)


class Keys:
    """The keys of an installation, written as the command line writes them."""

    def __init__(self, settings: Settings) -> None:
        self.control = open_control(settings)

    def add(self, **fields: Any) -> tuple[str, VirtualKey]:
        """A new key and its token."""
        token, key = make(**{"owner": "ann", "tenant": "acme", **fields})
        self.write(key)
        return token, key

    def write(self, key: VirtualKey) -> None:
        """Write a key as it is now."""
        self.control.append(keys.KIND, key.key_id, key.model_dump(mode="json"))

    def revoke(self, key: VirtualKey) -> None:
        """Revoke a key."""
        self.write(key.model_copy(update={"revoked_at": time.time()}))


@contextlib.contextmanager
def guarded(data: Path, upstream: str, **gateway: Any) -> Iterator[tuple[Rig, Keys]]:
    """A gateway that wants keys, before an upstream that wants one too."""
    entry = UpstreamSettings(name="up", url=upstream, kind="openai", key=SecretStr(UPSTREAM_KEY))
    settings = Settings(
        data=data,
        gateway=GatewaySettings.model_validate({"port": 0, "upstreams": [entry], "auth": "required", **gateway}),
        recorder=RecorderSettings(coalesce_ms=5.0),
    )
    made = Keys(settings)
    rig = Rig(settings)
    try:
        assert rig.error is None
        yield rig, made
    finally:
        rig.close()
        made.control.close()


def ask(url: str, token: str | None = None, model: str = "m", **headers: str) -> httpx.Response:
    """A question under a key."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()} | ({"authorization": f"Bearer {token}"} if token else {})
    return httpx.post(f"{url}/v1/chat/completions", json={"model": model, "messages": HELLO}, headers=sent, timeout=30)


def in_one_minute(story: Callable[[], T]) -> T:
    """What a story gives that began and ended in the same minute of the clock."""
    while True:
        minute = int(time.time()) // MINUTE_S
        told = story()
        if int(time.time()) // MINUTE_S == minute:
            return told


class TestWho:
    def test_key_is_owner_and_tenant(self, tmp_path: Path) -> None:
        """Tenant and owner of the key are those of the events, whatever the client says of itself."""
        with broken(_answers) as upstream, guarded(tmp_path, upstream.url) as (rig, made):
            token, key = made.add()
            rig.client(api_key=token, default_headers={"x-tokentape-user": "bob"}).chat.completions.create(model="m", messages=HELLO)
            events = rig.wait_for("generation_finished")

        assert {(event.tenant, event.actor) for event in events} == {("acme", "ann")}
        assert payloads(events, RequestSubmitted)[0].api_key_id == key.key_id
        assert b"authorization: bearer " + UPSTREAM_KEY.encode() in upstream.heads[0].lower()

    def test_no_key_is_seen_where_it_should_not_be(self, tmp_path: Path) -> None:
        """No byte of the data directory or of an answer has a token or the upstream's key, and no virtual key goes upstream."""
        with broken(_answers) as upstream, guarded(tmp_path, upstream.url) as (rig, made):
            token, _ = made.add()
            answers = [
                ask(rig.url, token, x_request_id=token),
                ask(rig.url, x_api_key=token),
                ask(rig.url, api_key=token),
                httpx.post(f"{rig.url}/v1/chat/completions?key={token}&v=1", json={"model": "m", "messages": HELLO}),
                httpx.get(f"{rig.url}/v1/models", headers={"authorization": f"Bearer {token}"}),
                httpx.get(f"{rig.url}/health"),
                ask(rig.url, token[:-1] + "x"),
            ]
            said = {"role": "user", "content": f"my key is {token}, theirs {UPSTREAM_KEY}"}
            body = {"model": "m", "messages": [said], "user": token}
            httpx.post(f"{rig.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {token}"})
            until(lambda: len(payloads(rig.events(), RequestSubmitted)) == 6)
            tape = b"".join(rig.framed())
            heads = b"".join(upstream.heads)
        files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        told = b"".join(answer.content + repr(answer.headers).encode() for answer in answers)

        assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 404, 200, 401]
        for secret in (token.encode(), UPSTREAM_KEY.encode()):
            assert secret not in tape
            assert secret not in files
            assert secret not in told
        assert token.encode() not in heads.replace(b"x-request-id: " + token.encode(), b"")
        assert b"?v=1 HTTP" in heads

    @pytest.mark.parametrize("state", ["none", "unknown", "shapeless", "revoked", "expired", "altered"])
    def test_no_valid_key(self, tmp_path: Path, state: str) -> None:
        """Without a valid key a request is a 401 that the client raises as its own error; nothing of its body is recorded."""
        with broken(_answers) as upstream, guarded(tmp_path, upstream.url) as (rig, made):
            token, key = made.add(expires_at=time.time() - 1 if state == "expired" else None)
            if state == "revoked":
                made.revoke(key)
                until(lambda: ask(rig.url, token).status_code == 401)
            altered, unknown = token[:-4] + "AAAA", make(owner="x", tenant="x")[0]
            given = {"none": None, "unknown": unknown, "shapeless": "sk-1", "altered": altered}.get(state, token)
            refused = ask(rig.url, given)
            with pytest.raises(openai.AuthenticationError):
                rig.client(api_key=given or "x").chat.completions.create(model="m", messages=HELLO)
            events = rig.wait_for("generation_failed")

        submitted, failed = payloads(events, RequestSubmitted)[-1], payloads(events, GenerationFailed)[-1]
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert upstream.bodies == []
        assert (submitted.content.messages, submitted.content.parameters, submitted.api_key_id) == ([], "", None)
        assert (failed.error_type, failed.status, failed.origin) == ("invalid_api_key", 401, "client")
        assert {event.tenant for event in events} == {"default"}

    def test_same_session_name_of_two_tenants(self, tmp_path: Path) -> None:
        """A tenant that names another's session gets one of its own: it learns nothing of what that session holds."""
        name = str(uuid.uuid4())
        with broken(_answers) as upstream, guarded(tmp_path, upstream.url) as (rig, made):
            for tenant in ("acme", "blue"):
                assert ask(rig.url, made.add(tenant=tenant)[0], x_tokentape_session=name).status_code == 200
            events = until(lambda: found if len(payloads(found := rig.events(), RequestSubmitted)) == 2 else None)

        assert [len(part.content.messages) for part in payloads(events, RequestSubmitted)] == [1, 1]
        assert {event.tenant for event in events if event.kind == "session_opened"} == {"acme", "blue"}

    def test_off_is_as_before(self, tmp_path: Path) -> None:
        """Without `gateway.auth` the client's own credential is the upstream's business; a virtual key does not leave the house."""
        with broken(_answers) as upstream:
            settings = Settings(data=tmp_path, gateway=GatewaySettings(port=0, upstream=upstream.url, upstream_kind="openai"))
            rig = Rig(settings)
            token = make(owner="x", tenant="x")[0]
            statuses = [ask(rig.url, given).status_code for given in ("sk-client-000000000000", token)]
            rig.close()

        assert statuses == [200, 200]
        assert b"sk-client-000000000000" in upstream.heads[0]
        assert b"authorization" not in upstream.heads[1].lower()


def test_roles(tmp_path: Path) -> None:
    """The debug API takes a debugger's or an admin's key and records its owner; another key is a 403 that names both, none a 401."""
    with broken(_answers) as upstream, guarded(tmp_path, upstream.url) as (rig, made):
        tokens = [made.add(roles=roles)[0] for roles in (("debugger",), ("admin",), ())]
        sent = [{"authorization": f"Bearer {token}"} for token in tokens] + [{}]
        told = [httpx.post(f"{rig.url}/api/v1/breakpoints", json={"tag": f"t{i}"}, headers=headers) for i, headers in enumerate(sent)]

    assert [answer.status_code for answer in told] == [201, 201, 403, 401]
    assert told[0].json()["created_by"] == "key:ann"
    assert told[2].json()["detail"] == "This needs a key with the role debugger; this key has none."
    assert told[3].json()["detail"].startswith("A key is needed")


class TestWhat:
    def test_models(self, tmp_path: Path) -> None:
        """A key opens the models that it names: others are a 403, and are not listed."""
        with broken(_answers, models=("small", "small-2", "large")) as upstream, guarded(tmp_path, upstream.url) as (rig, made):
            client = rig.client(api_key=made.add(models=("small*",))[0])
            client.chat.completions.create(model="small-2", messages=HELLO)
            with pytest.raises(openai.PermissionDeniedError, match=r"may not ask for the model 'large'. It may ask for: small\*") as raised:
                client.chat.completions.create(model="large", messages=HELLO)
            with pytest.raises(openai.PermissionDeniedError, match="none"):
                rig.client(api_key=made.add(models=())[0]).chat.completions.create(model="small", messages=HELLO)
            listed = [model.id for model in client.models.list()]
            failed = payloads(rig.wait_for("generation_failed"), GenerationFailed)[0]

        assert listed == ["small", "small-2"]
        assert (raised.value.code, failed.error_type, failed.status) == ("permission_denied", "permission_denied", 403)

    @pytest.mark.parametrize("way", ["revoked", "expired"])
    def test_key_ends_in_mid_stream(self, tmp_path: Path, way: str) -> None:
        """A stream under a key that is revoked or expires ends with an error that the client raises, the upstream is let go."""
        with broken(_talks_until_gone) as upstream, guarded(tmp_path, upstream.url) as (rig, made):
            token, key = made.add(expires_at=time.time() + 1.0 if way == "expired" else None)
            stream = rig.client(api_key=token).chat.completions.create(model="m", messages=HELLO, stream=True)
            next(stream)
            if way == "revoked":
                made.revoke(key)
            with pytest.raises(openai.APIError, match=f"This key was {way} while the answer was under way"):
                list(stream)
            failure = rig.failure()
            upstream.left.wait(10)

        assert (failure.error_type, failure.status, failure.position > 0) == ("invalid_api_key", 401, True)
        assert upstream.left.is_set()


class TestHowMuch:
    def test_requests(self, tmp_path: Path) -> None:
        """The request over the limit is a 429 that says when to come again; the next minute is a new one."""

        def story() -> tuple[list[int], httpx.Response]:
            token, _ = made.add(requests_per_minute=3)
            return [ask(rig.url, token).status_code for _ in range(3)], ask(rig.url, token)

        with broken(_answers) as upstream, guarded(tmp_path, upstream.url) as (rig, made):
            passed, refused = in_one_minute(story)
            failure = payloads(rig.wait_for("generation_failed"), GenerationFailed)[-1]

        assert passed == [200] * 3
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= MINUTE_S
        assert (failure.error_type, failure.status, failure.retryable) == ("rate_limit_exceeded", 429, True)

    def test_tokens(self, tmp_path: Path) -> None:
        """Tokens of prompt and answer count as the upstream says; the request after the limit was reached is a 429."""

        def story() -> list[int]:
            token, _ = made.add(tokens_per_minute=15)
            return [ask(rig.url, token).status_code for _ in range(3)]

        with broken(_answers) as upstream, guarded(tmp_path, upstream.url) as (rig, made):
            assert in_one_minute(story) == [200, 200, 429]

    def test_budget(self, tmp_path: Path) -> None:
        """A budget that is spent is a 429 after which clients do not ask again, also of a gateway that was started anew."""
        with broken(_answers) as upstream:
            with guarded(tmp_path, upstream.url) as (rig, made):
                token, _ = made.add(budget_tokens=10)
                first = ask(rig.url, token)
                with pytest.raises(openai.RateLimitError) as raised:
                    rig.client(api_key=token, max_retries=5).chat.completions.create(model="m", messages=HELLO)
            with guarded(tmp_path, upstream.url) as (rig, _):
                again = ask(rig.url, token)

        assert (first.status_code, again.status_code, len(upstream.bodies)) == (200, 429, 1)
        assert (raised.value.code, raised.value.response.headers["x-should-retry"]) == ("insufficient_quota", "false")

    def test_counted_where_nobody_says(self, tmp_path: Path) -> None:
        """Where the upstream tells no usage, or the stream is cut, what was recorded counts."""

        async def act(peer: Peer) -> None:
            await peer.begin_chunked()
            await peer.chunk(chunk("one") + chunk("two"))

        def story() -> list[int]:
            token, _ = made.add(tokens_per_minute=3)
            return [_stream(rig, token) for _ in range(3)]

        with broken(act) as upstream, guarded(tmp_path, upstream.url) as (rig, made):
            assert in_one_minute(story) == [200, 200, 429]


def _stream(rig: Rig, token: str) -> int:
    body = {"model": "m", "messages": HELLO, "stream": True}
    return httpx.post(f"{rig.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {token}"}, timeout=30).status_code


@contextlib.contextmanager
def worker(data: Path, upstream: str) -> Iterator[str]:
    """A gateway in a process of its own, which wants keys."""
    command = [sys.executable, "-m", "tests.gateway_child", str(data), upstream, "{}", "required"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close() if process.stdout else None


class TestWorkers:
    def test_two_workers_share_a_limit(self, tmp_path: Path) -> None:
        """However requests rain on two processes, together they let no more through than the limit, and less only by a lease."""
        limit = 60

        def story() -> Counter[int]:
            token, _ = made.add(requests_per_minute=limit)
            with ThreadPoolExecutor(8) as pool:
                return Counter(pool.map(lambda number: ask(urls[number % 2], token).status_code, range(2 * limit)))

        with broken(_answers) as upstream, contextlib.ExitStack() as stack:
            urls = [stack.enter_context(worker(tmp_path, upstream.url)) for _ in range(2)]
            made = Keys(Settings(data=tmp_path))
            stack.callback(made.control.close)
            counts = in_one_minute(story)

        assert set(counts) == {200, 429}
        assert limit - limit // LEASES <= counts[200] <= limit

    def test_two_workers_share_tokens(self, tmp_path: Path) -> None:
        """What one worker spent stops the other, as soon as it has read of it."""

        def story() -> tuple[list[int], bool]:
            token, _ = made.add(tokens_per_minute=20)
            spent = [ask(urls[0], token).status_code for _ in range(2)]
            return spent, until(lambda: ask(urls[1], token).status_code == 429 or None)

        with broken(_answers) as upstream, contextlib.ExitStack() as stack:
            urls = [stack.enter_context(worker(tmp_path, upstream.url)) for _ in range(2)]
            made = Keys(Settings(data=tmp_path))
            stack.callback(made.control.close)
            spent, stopped = in_one_minute(story)

        assert (spent, stopped) == ([200, 200], True)

    def test_two_workers_share_a_limit_through_kafka(self, settings_distributed: Settings) -> None:
        """The same where the control log is a topic, and each worker has a data directory of its own."""
        limit = 40

        def story() -> Counter[int]:
            token, _ = made.add(requests_per_minute=limit)
            with ThreadPoolExecutor(8) as pool:
                return Counter(pool.map(lambda number: ask(rigs[number % 2].url, token).status_code, range(2 * limit)))

        with broken(_answers) as upstream, contextlib.ExitStack() as stack:
            gateway = GatewaySettings.model_validate({"port": 0, "upstream": upstream.url, "upstream_kind": "openai", "auth": "required"})
            settings = settings_distributed.model_copy(update={"gateway": gateway})
            rigs = [Rig(settings.model_copy(update={"data": settings.data / name})) for name in "ab"]
            for rig in rigs:
                stack.callback(rig.close)
            made = Keys(settings)
            stack.callback(made.control.close)
            counts = in_one_minute(story)

        assert set(counts) == {200, 429}
        assert limit - limit // LEASES <= counts[200] <= limit

    def test_control_log_away(self, tmp_path: Path) -> None:
        """While the control log is away known keys go on within their worker's part of a limit, and new ones wait."""
        with broken(_answers) as upstream, guarded(tmp_path, upstream.url) as (rig, made):
            known, _ = made.add(requests_per_minute=1000)
            assert ask(rig.url, known).status_code == 200
            new, key = make(owner="ann", tenant="acme")
            with _away(tmp_path):
                waits = until(lambda: answer if (answer := ask(rig.url, new)).status_code == 503 else None)
                on = [ask(rig.url, known).status_code for _ in range(3)]
            made.write(key)
            until(lambda: ask(rig.url, new).status_code == 200)

        assert on == [200] * 3
        assert (waits.json()["error"]["code"], waits.headers["retry-after"]) == ("keys_unavailable", "5")


@contextlib.contextmanager
def _away(data: Path) -> Iterator[None]:
    """The table of the control log is not where it was."""
    with contextlib.closing(sqlite3.connect(data / "control" / "control.sqlite", isolation_level=None)) as file:
        file.execute("ALTER TABLE fact RENAME TO elsewhere")
        try:
            yield
        finally:
            file.execute("ALTER TABLE elsewhere RENAME TO fact")


class TestWithVllm:
    def test_usage_is_vllms(self, tmp_path: Path, vllm: VllmService) -> None:
        """Tokens used are those that vLLM says, streamed and whole."""
        with guarded(tmp_path, vllm.url) as (rig, made):
            token, key = made.add(budget_tokens=1_000_000)
            client = rig.client(api_key=token)
            whole = client.chat.completions.create(model=vllm.model, messages=HELLO, max_tokens=3)
            list(client.chat.completions.create(model=vllm.model, messages=HELLO, max_tokens=3, stream=True))
            until(lambda: sum(fact["total"] for fact in _usage(made, key)) == 2 * whole.usage.total_tokens)

        assert whole.usage.total_tokens > 3


def _usage(made: Keys, key: VirtualKey) -> list[dict[str, Any]]:
    return [fact for name, fact in made.control.latest("usage").items() if name.startswith(key.key_id)]


class TestCommands:
    def test_life_of_a_key(self, tmp_path: Path) -> None:
        """Made, listed, used, shown and revoked on the command line while a gateway runs; the token is printed once and kept nowhere."""
        with broken(_answers) as upstream, guarded(tmp_path / "data", upstream.url) as (rig, _):
            program = Program(tmp_path, Settings(data=tmp_path / "data"))
            limits = ["--requests-per-minute", "60", "--tokens-per-minute", "9000", "--budget", "5000"]
            made = program.run("keys", "create", "--owner", "ann", "--role", "debugger", "--model", "m*", "--expires", "30d", *limits)
            token = made.text.strip()
            key_id = f"key-{token.split('-')[1]}"
            answers = [ask(rig.url, token).status_code]
            until(lambda: rig.recorder.flush(10))
            listed, shown = program.batch(["keys", "list", "--format", "json"], ["keys", "show", key_id, "--format", "json"])
            program.batch(["keys", "revoke", key_id], ["keys", "revoke", key_id])
            until(lambda: ask(rig.url, token).status_code == 401)
            after = program.run("keys", "list", "--format", "json").rows[0]

        assert answers == [200]
        assert keys.TOKEN.fullmatch(token)
        assert listed.rows[0]["key_id"] == shown.rows[0]["key_id"] == key_id
        assert (shown.rows[0]["state"], shown.rows[0]["roles"], shown.rows[0]["models"]) == ("active", ["debugger"], ["m*"])
        assert (shown.rows[0]["tenant"], shown.rows[0]["budget_tokens"]) == ("default", 5000)
        assert (after["state"], after["revoked_at"] is not None) == ("revoked", True)
        assert token.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    def test_mistakes(self, tmp_path: Path) -> None:
        """Each mistake is one line that says what is wrong, and leaves no key behind."""
        program = Program(tmp_path, Settings(data=tmp_path / "data"))
        owner = ["keys", "create", "--owner", "ann"]
        asked = {
            "no key is called 'key-none'": ["keys", "show", "key-none"],
            "no key is called": ["keys", "revoke", "key-none"],
            "--expires: 'soon' is no time": [*owner, "--expires", "soon"],
            "--expires: 2001-01-01 is over": [*owner, "--expires", "2001-01-01"],
            "--tenant: String should match": [*owner, "--tenant", "a b"],
            "exclude each other": [*owner, "--model", "m", "--no-models"],
            "Missing option '--owner'": ["keys", "create"],
            "is not one of": [*owner, "--role", "king"],
            "is not in the range": [*owner, "--budget", "0"],
        }
        for fault, ran in zip(asked, program.batch(*asked.values(), code=2), strict=True):
            assert fault in ran.complaint
        assert program.run("keys", "list", "--format", "json").rows == []
