"""The official clients for Node before the gateway and real vLLM: what they saw is what the tape has."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.events import GenerationFailed
from scripts.native import tools
from tests.conftest import VllmService
from tests.gateway_rig import Peer, Rig, broken, chunk, running
from tests.test_gateway import payloads
from tests.told import told_of

FOLDER = Path(__file__).parent / "node"
ANSWERED = (
    "chat",
    "chat_streamed",
    "chat_tool",
    "chat_structured",
    "responses",
    "responses_streamed",
    "message",
    "message_streamed",
    "message_tool",
)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> Iterator[Rig]:
    """A gateway before vLLM."""
    with running(tmp_path_factory.mktemp("node"), vllm.url) as it:
        yield it


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A gateway before an upstream that ends every stream after its first token."""

    async def act(peer: Peer) -> None:
        await peer.begin_stream()
        await peer.send(chunk("Once"))

    with broken(act) as upstream, running(tmp_path_factory.mktemp("cut"), upstream.url) as it:
        yield it


@pytest.fixture(scope="module")
def seen(rig: Rig, cut: Rig, vllm: VllmService) -> Any:
    """What the clients saw, case by case; one process for all."""
    node, modules = tools.node_clients(FOLDER, print)
    script = modules / f"clients-{uuid.uuid4().hex}.mjs"  # Node looks for packages beside the script
    script.write_text((FOLDER / "clients.mjs").read_text(encoding="utf-8"), encoding="utf-8")
    try:
        ran = subprocess.run([node, str(script), rig.url, vllm.model, cut.url], capture_output=True, text=True, timeout=240, check=False)
    finally:
        script.unlink()
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("case", ANSWERED)
def test_the_tape_has_what_the_client_saw(rig: Rig, seen: Any, case: str) -> None:
    """Texts, tool calls, ends and counts of each answer."""
    saw, told = seen[case], told_of(rig.events(), seen[case]["generation"])

    assert len(told.choices) == (3 if case in ("chat", "chat_streamed") else 1)
    for choice, recorded in zip(saw["choices"], told.choices, strict=True):
        finish = "stop" if choice["finish"] == "tool_calls" else choice["finish"]  # vLLM calls the end of a demanded call a stop

        assert (choice["text"] or "", finish) == (recorded.text, recorded.finish)
        assert [call[:2] for call in choice["calls"]] == [[call.call_id, call.name] for call in recorded.calls]
    assert (saw["input"], saw["output"]) == (told.prompt_tokens, told.completion_tokens)
    assert told.ids == saw["output"]


def test_tools_and_forms(rig: Rig, seen: Any) -> None:
    """A call's arguments are the client's to read, as is an answer of a form; pieces of a stream make its text."""
    called = told_of(rig.events(), seen["chat_tool"]["generation"]).choices[0].calls

    assert [call.arguments for call in called] == [seen["chat_tool"]["choices"][0]["calls"][0][2]]
    assert seen["message_tool"]["choices"][0]["calls"][0][1] == "get_weather"
    assert seen["chat_structured"]["choices"][0]["text"].lstrip().startswith("{")
    assert seen["message_streamed"]["pieces"] == seen["message_streamed"]["choices"][0]["text"]
    assert seen["responses_streamed"]["status"] == "incomplete"


def test_errors_are_the_clients_own(rig: Rig, seen: Any, vllm: VllmService) -> None:
    """Each client raises its own exceptions, and the tape has a failure for each."""
    whole = {name: saw for name, saw in seen.items() if isinstance(saw, dict) and "raised" in saw and "text" not in saw}
    raised = {name: (saw["raised"], saw["status"]) for name, saw in whole.items()}

    assert raised == {
        "openai_no_model": ("NotFoundError", 404),
        "openai_bad": ("BadRequestError", 400),
        "openai_no_response": ("NotFoundError", 404),
        "anthropic_no_model": ("NotFoundError", 404),
        "anthropic_bad": ("BadRequestError", 400),
    }
    assert "resp_1" in seen["openai_no_response"]["message"]
    assert len(payloads(rig.events(), GenerationFailed)) == 5
    assert (seen["models"], seen["counted"] > 0) == ([vllm.model], True)


def test_a_stream_that_ends_badly(cut: Rig, seen: Any) -> None:
    """What had come is there, then each client raises its own exception; the tape says how far it got."""
    found = {name: (seen[name]["text"], seen[name]["raised"]) for name in ("chat_cut", "responses_cut", "message_cut")}
    failures = payloads(cut.events(), GenerationFailed)

    assert found == dict.fromkeys(found, ("Once", "APIError"))
    assert [(failure.error_type, failure.position) for failure in failures] == [("upstream_disconnected", 1)] * 3


def test_keys_are_nowhere(rig: Rig, seen: Any) -> None:
    """Neither client's key is on the tape."""
    assert not [value for value in rig.framed() if b"-node-0123456789" in value]
