"""What is asked about an environment, what it means, and that captures of one server agree."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.environment import capture_http, detect_kind
from ingest.gateway import upstream as gateway_upstream
from replay.fold import fold
from schemas.environment import capture, classify, compare
from schemas.errors import EngineUnavailable
from schemas.events import EnvironmentCaptured, Pair
from schemas.probe import PROBE_TEXT, VERSION, Ask, item, kind_of, questions
from schemas.requests import load
from scripts.native.processes import free_port
from store.rows import StoredEvent
from tests.conftest import VllmService
from tests.gateway_rig import DONE, HELLO, Peer, Rig, broken, chunk, running
from tests.program import until

ITEMS = st.dictionaries(st.sampled_from(["models", "version", "cache.block_size", "probe.choices", "kind"]), st.text(max_size=4))


def ask(url: str, **options: Any) -> EnvironmentCaptured:
    """One capture."""

    async def run() -> EnvironmentCaptured:
        async with aiohttp.ClientSession() as client:
            return await capture_http(client, url, **options)

    return asyncio.run(run())


def answered(answers: dict[str, Any], **options: Any) -> EnvironmentCaptured:
    """A capture from a server that gives these answers, by path, and none to other questions."""
    asking = questions("vllm", **options)
    question = next(asking)
    while True:
        answer = answers.get(question.path.partition("?")[0])
        try:
            question = asking.send(answer if answer is None or isinstance(answer, bytes) else orjson.dumps(answer))
        except StopIteration as end:
            event: EnvironmentCaptured = end.value
            return event


def scored(*logprobs: float) -> dict[str, Any]:
    """An answer of `/v1/completions` in which each token of the prompt has this logprob and is the model's own choice."""
    places = [{str(7 + at): {"logprob": logprob, "rank": 1}} for at, logprob in enumerate(logprobs)]
    return {"choices": [{"prompt_logprobs": [None, *places]}], "system_fingerprint": "f-1"}


VLLM: dict[str, Any] = {
    "/version": {"version": "0.32.0"},
    "/v1/models": {"data": [{"id": "m", "root": "org/m", "created": 1, "max_model_len": 2048}]},
    "/metrics": b'# HELP x\nvllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0"} 1.0\n',
    "/tokenize": {"tokens": [1, 2, 3]},
    "/v1/completions": scored(-1.0, -2.0),
}


class TestCapture:
    def test_vllm(self, vllm: VllmService) -> None:
        """The real vLLM tells enough for all three digests, twice the same, and names what it does not tell."""
        first, second = ask(vllm.url), ask(vllm.url)
        keys = {pair.key for pair in first.items}

        assert first == second
        assert {"kind", "version", "models", "system_fingerprint", "probe.tokenizer", "probe.chat_template", "probe.choices"} <= keys
        assert "cache.block_size" in keys
        assert "weights" in first.unknown
        assert len({first.semantic, first.numeric, first.scheduling}) == 3
        assert len(item(first, "probe.logprobs")) > 20

    def test_other_upstream(self) -> None:
        """A server of another kind is asked for its models only: a probe there would cost its owner money."""

        async def act(peer: Peer) -> None:
            await peer.gone()

        with broken(act) as upstream:
            event = ask(upstream.url)

        assert upstream.paths == ["/version", "/v1/models"]
        assert {pair.key: pair.value for pair in event.items} == {"kind": '"openai"'}
        assert {"models", "weights", "version"} <= set(event.unknown)

    def test_nothing_there(self) -> None:
        """Where nothing listens the error is our own, for the capture and for the kind."""

        async def detect() -> None:
            async with aiohttp.ClientSession() as client:
                await detect_kind(client, f"http://127.0.0.1:{free_port()}")

        with pytest.raises(EngineUnavailable):
            ask(f"http://127.0.0.1:{free_port()}")
        with pytest.raises(EngineUnavailable):
            asyncio.run(detect())

    def test_no_secret_is_kept(self) -> None:
        """What is named like a credential is left out at every depth."""
        config = {"model_config": {"dtype": "bfloat16", "hf_token": "s1", "tokenizer": "t"}, "api": {"nested": {"api_key": "s2", "x": 1}}}
        info = {
            "vllm_config": config,
            "vllm_env": {"VLLM_API_KEY": "s3", "VLLM_USE_V1": "1"},
            "system_env": {"aws_secret": "s4", "os": "l"},
        }
        event = answered({**VLLM, "/server_info": info})
        items = {pair.key: pair.value for pair in event.items}
        recorded = event.model_dump_json()

        assert not [secret for secret in ("s1", "s2", "s3", "s4") if f'"{secret}' in recorded or f'{secret}\\"' in recorded]
        assert (items["config.model_config.dtype"], items["config.model_config.tokenizer"]) == ('"bfloat16"', '"t"')
        assert (items["vllm_env.VLLM_USE_V1"], items["system_env.os"]) == ('"1"', '"l"')
        assert "configuration" not in event.unknown

    @pytest.mark.parametrize(
        "answer", [b"<html>", b"", b"[]", b'{"data": 3}', b'{"choices": []}', b'{"tokens": "x"}', b'{"version": 3}', b"\xff"]
    )
    def test_nonsense_is_unknown(self, answer: bytes) -> None:
        """A server that answers nonsense to everything gives an event with little in it and no exception."""
        event = answered(dict.fromkeys(VLLM, answer))

        assert {"models", "tokenizer", "probe"} <= set(event.unknown)

    @pytest.mark.parametrize(
        ("answers", "expected"),
        [
            ({}, None),
            (
                {"/v1/completions/render": [{"sampling_params": {"repetition_penalty": 1.05, "temperature": 1.0, "max_tokens": 16}}]},
                (1.05,),
            ),
            ({"/v1/completions/render": [{"sampling_params": {"stop": []}}]}, ()),
            ({"/v1/completions/render": b"{}"}, None),
            ({"/server_info": {"vllm_config": {"model_config": {"generation_config": "auto"}}}}, None),
            ({"/server_info": {"vllm_config": {"model_config": {"generation_config": "vllm"}}}}, ()),
            (
                {
                    "/server_info": {
                        "vllm_config": {
                            "model_config": {"generation_config": "vllm", "override_generation_config": {"repetition_penalty": 1.1}}
                        }
                    }
                },
                (1.1,),
            ),
        ],
    )
    def test_what_a_server_sets_for_all(self, answers: dict[str, Any], expected: tuple[float, ...] | None) -> None:
        """Told by the endpoint that renders, or by a configuration that reads no file of the model; else it is named as unknown."""
        event = answered({**VLLM, **answers})
        told = item(event, "sampling.defaults")

        assert (None if expected is None else dict(zip(("repetition_penalty",), expected, strict=False))) == told
        assert ("sampling" in event.unknown) is (expected is None)

    def test_noise_does_not_change_the_environment(self) -> None:
        """Scores that moved by noise keep the earlier ones; those that moved by more are another environment."""
        before = answered(VLLM)
        noisy = answered({**VLLM, "/v1/completions": scored(-1.01, -2.02)}, previous=before)
        other = answered({**VLLM, "/v1/completions": scored(-1.6, -2.0)}, previous=before)
        changed = {
            **scored(-1.0, -2.0),
            "choices": [{"prompt_logprobs": [None, {"9": {"logprob": -1.0, "rank": 1}}, {"9": {"logprob": -2.0, "rank": 1}}]}],
        }
        model = answered({**VLLM, "/v1/completions": changed}, previous=before)

        assert noisy == before
        assert [(d.key, d.digest) for d in compare(before, other)] == [("probe.logprobs", "numeric")]
        assert [(d.key, d.digest) for d in compare(before, model)] == [("probe.choices", "semantic")]

    def test_the_same_engine_started_again(self) -> None:
        """What vLLM draws anew at each start is no item, and none of a tape that has it; secrets among variables are left out."""

        def info(drawn: str) -> dict[str, Any]:
            shared = f"vllm_mm_{drawn}"
            lines = f"VLLM_NO_USAGE_STATS=1\nVLLM_OBJECT_STORAGE_SHM_BUFFER_NAME={shared}\nNVIDIA_X_KEY=s1\nOMP_NUM_THREADS=2\n"
            config = {"instance_id": drawn, "kv_transfer_config": {"kv_connector": "C", "engine_id": drawn}, "model_config": {"dtype": "x"}}
            return {
                "vllm_config": config,
                "vllm_env": {"VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME": shared, "VLLM_USE_V1": "1"},
                "system_env": {"env_vars": lines},
            }

        first, second = (answered({**VLLM, "/server_info": info(drawn)}) for drawn in ("1", "2"))
        drawn = [
            Pair(key="config.instance_id", value='"1"'),
            Pair(key="system_env.env_vars", value='"VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME=3\\nA=é"'),
        ]
        old, present = (
            EnvironmentCaptured(environment_id=bytes(32), origin="http", items=drawn),
            capture([("system_env.env_vars", '"A=é"')], origin="http"),
        )

        assert first == second
        assert "VLLM_NO_USAGE_STATS=1\nOMP_NUM_THREADS=2\n" == item(first, "system_env.env_vars")
        assert '"C"' == {pair.key: pair.value for pair in first.items}["config.kv_transfer_config.kv_connector"]
        assert [] == compare(old, present)

    def test_questions_carry_the_fixed_inputs(self) -> None:
        """The generator asks in one order, whoever drives it."""
        asking = questions()

        assert next(asking) == VERSION
        assert asking.send(b'{"version": "0.32.0"}') == Ask("/v1/models")
        assert kind_of(b'{"version": 1}') == "openai"
        assert PROBE_TEXT.isprintable() is False


class TestDigests:
    @given(ITEMS)
    def test_order_does_not_matter(self, items: dict[str, str]) -> None:
        """The same items give the same digests in any order."""
        assert capture(items.items(), origin="http") == capture(reversed(items.items()), origin="http")

    @given(ITEMS, ITEMS)
    def test_a_digest_changes_where_an_item_does(self, before: dict[str, str], after: dict[str, str]) -> None:
        """Exactly the digests differ to which a differing item belongs, and compare names those items."""
        a, b = capture(before.items(), origin="http"), capture(after.items(), origin="http")
        keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]

        assert [d.key for d in compare(a, b)] == keys
        assert {d.digest for d in compare(a, b)} == {
            kind for kind in ("semantic", "numeric", "scheduling") if getattr(a, kind) != getattr(b, kind)
        }
        assert (a.environment_id == b.environment_id) == (not keys)

    def test_a_dtype_is_one_whoever_tells_it(self) -> None:
        """Facts of an engine name it without the module that vLLM's own configuration puts before it."""
        engine, process = (capture([("config.model_config.dtype", value)], origin=value) for value in ('"bfloat16"', '"torch.bfloat16"'))

        assert [] == compare(engine, process)

    @pytest.mark.parametrize(
        ("key", "kind"),
        [
            ("probe.choices", "semantic"),
            ("probe.logprobs", "numeric"),
            ("cache.cache_dtype", "semantic"),
            ("cache.block_size", "scheduling"),
            ("config.model_config.dtype", "semantic"),
            ("config.parallel_config.tensor_parallel_size", "numeric"),
            ("version", "numeric"),
            ("anything.else", "numeric"),
        ],
    )
    def test_classes(self, key: str, kind: str) -> None:
        """Which digest an item belongs to."""
        assert classify(key) == kind


class TestInTheGateway:
    def test_another_fingerprint_is_another_capture(self, tmp_path: Path) -> None:
        """When an answer carries another fingerprint, the environment is asked for again, and later requests name the new one."""
        fingerprint = ["f-1"]

        async def act(peer: Peer) -> None:
            usage = {"id": "x", "choices": [], "usage": {"completion_tokens": 1}, "system_fingerprint": fingerprint[0]}
            await peer.begin_stream()
            await peer.send(chunk("one", finish="stop") + b"data: " + orjson.dumps(usage) + b"\n\ndata: [DONE]\n\n")

        with broken(act, version=b'{"version": "1"}') as upstream, running(tmp_path, upstream.url) as rig:
            rig.post({"model": "m", "messages": HELLO, "stream": True})
            asked = upstream.paths.count("/v1/models")
            rig.post({"model": "m", "messages": HELLO, "stream": True})
            again = upstream.paths.count("/v1/models")
            fingerprint[0] = "f-2"
            rig.post({"model": "m", "messages": HELLO, "stream": True})
            answer = rig.post({"model": "m", "messages": HELLO, "stream": True})
            until(lambda: upstream.paths.count("/v1/models") == 2)

        assert (asked, again) == (1, 1)
        assert b'"system_fingerprint":"f-2"' in answer.content
        assert b'"usage"' not in answer.content


class TestARestart:
    """Behind the address of one server another one: what the gateway files its generations under."""

    @pytest.mark.parametrize(
        ("version", "keeps"),
        [(b'{"version": "1"}', True), (b'{"version": "1"}', False), (None, True)],
        ids=["connections kept", "one for each request", "no vLLM"],
    )
    def test_no_generation_names_the_server_before(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: bytes | None, keeps: bool
    ) -> None:
        """The first answers of another server name no environment, or its own already; then all name its own."""
        monkeypatch.setattr(gateway_upstream, "AGAIN_AFTER_S", 0.0)
        monkeypatch.setattr(gateway_upstream, "SOON_S", 0.0)
        with restarts(version, keeps=keeps) as start, running(tmp_path, start(1)) as rig:
            until(lambda: served(rig, 1) == "first")
            start(2, "second")
            assert served(rig, 2) in (None, "second")
            until(lambda: served(rig, 2) == "second")
            start(3, "second")  # the same again
            assert served(rig, 3) in (None, "second")

    def test_who_answers_is_asked_beside_the_request(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An answer does not wait for the server to say which start of it this is, and where it did not say so names no environment."""
        with restarts(b'{"version": "1"}', keeps=False) as start, running(tmp_path, start(1)) as rig:
            assert "first" == served(rig, 1)
            monkeypatch.setattr(gateway_upstream, "SOON_S", 0.0)
            start(0, "first")
            assert [None, None] == [served(rig, 0), served(rig, 0)]

    def test_a_connection_is_held_that_tells(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a vLLM that does not say which start of it this is, a connection tells over which nothing is asked, until it ends."""
        monkeypatch.setattr(gateway_upstream, "SOON_S", 0.0)
        with restarts(b'{"version": "1"}', keeps=False) as start, running(tmp_path, start(0)) as rig:
            assert ["first", "first"] == [served(rig, 0), served(rig, 0)]
            start(0)
            assert served(rig, 0) is None

    def test_an_older_connection_tells(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """While a connection stands that is as old as what the server told, nobody is asked who answers over the next one."""
        both = threading.Barrier(2)

        async def act(peer: Peer) -> None:
            if b"wait" in orjson.dumps(load(peer.body)):
                await asyncio.to_thread(both.wait, 20)
            await peer.whole(b"200 OK", b"application/json", orjson.dumps({"id": "x", "model": "m", "choices": []}))

        with broken(act, version=b'{"version": "1"}', instance=1) as upstream, running(tmp_path, upstream.url) as rig:
            for _ in range(2):
                rig.post({"model": "m", "messages": HELLO})
            monkeypatch.setattr(gateway_upstream, "SOON_S", 0.0)
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda _: rig.post({"model": "m", "messages": HELLO, "user": "wait"}), range(2)))

        assert 4 == len(upstream.bodies)
        assert 2 == upstream.paths.count("/metrics")


def served(rig: Rig, start: int) -> str | None:
    """Ask for a stream; the model of the environment that the generation is filed under, None where it is filed under none."""
    answer = rig.post({"model": "m", "messages": HELLO, "stream": True})
    generation = uuid.UUID(answer.headers["x-tokentape-generation"]).bytes
    session = uuid.UUID(answer.headers["x-tokentape-session"]).bytes
    own = [event for event in rig.events() if event.session_id == session]
    state = fold(StoredEvent(event, "log", 0, at, 0) for at, event in enumerate(own))
    found = state.environment_of(next(each for each in state.generations.values() if each.generation_id == generation))

    assert f"answer {start}".encode() in answer.content
    return str(item(found.event, "models")[0]["id"]) if found else None


@contextlib.contextmanager
def restarts(version: bytes | None, *, keeps: bool) -> Iterator[Callable[..., str]]:
    """Servers behind one port, one after the other: each is started by its number and what it serves, and returns the address."""
    port = free_port()
    with contextlib.ExitStack() as stack:

        def start(number: int, model: str = "first") -> str:
            stack.close()

            async def act(peer: Peer) -> None:
                said = chunk(f"answer {number}", finish="stop") + DONE
                await asyncio.sleep(0.05)  # as an engine's first token takes a moment
                if keeps:
                    await peer.begin_chunked()
                    await peer.chunk(said)
                    await peer.chunk(b"")
                    peer.kept = True
                else:
                    await peer.begin_stream()
                    await peer.send(said)

            return stack.enter_context(broken(act, version=version, models=(model,), port=port, instance=number)).url

        yield start
