"""Batch work in both deployments, before a real engine, and what is particular to keys, files and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner

from ingest.gateway.keys import KIND, make
from schemas.events import SequenceFinished
from schemas.settings import GatewaySettings, Settings
from store.control import open_control
from tests.batch_case import BatchCase, Upstream, configured, ended, jsonl, lines_of, request, submit, texts_of
from tests.conftest import KafkaService, MinioService, VllmService, distributed
from tests.gateway_rig import Rig, broken
from tests.test_gateway import payloads
from tokentape.cli import main


class TestEmbedded(BatchCase):
    """Through the embedded log."""

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, tmp_path_factory: pytest.TempPathFactory) -> Settings:
        return Settings(data=tmp_path_factory.mktemp("batch"))


class TestKafka(BatchCase):
    """Through a topic for each model."""

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, tmp_path_factory: pytest.TempPathFactory, kafka: KafkaService, minio: MinioService) -> Settings:
        return distributed(tmp_path_factory.mktemp("batch"), kafka, minio)


def tokentape(*arguments: str) -> Any:
    """The command's result."""
    return CliRunner().invoke(main, list(arguments))


def test_command_line(tmp_path: Path, vllm: VllmService) -> None:
    """Submitted with nothing else running, worked off by a gateway before vLLM, with token ids on the tape; results by the command line."""
    settings = Settings(data=tmp_path / "data")
    options = ("--data", str(settings.data), "--set", f"gateway.upstream={vllm.url}", "batch")
    bad, good = tmp_path / "bad.jsonl", tmp_path / "good.jsonl"
    bad.write_bytes(jsonl(request("a", "x", "nobody")))
    good.write_bytes(jsonl(*(request(f"r{i}", "Hello.", vllm.model, more={"max_tokens": 4}) for i in range(3))))
    refused = tokentape(*options, "submit", str(bad))
    made = tokentape(*options, "submit", str(good), "--tag", "night")
    batch_id = made.output.strip()
    early = tokentape(*options, "results", batch_id)
    gateway = GatewaySettings(port=0, upstream=vllm.url)
    rig = Rig(settings.model_copy(update={"gateway": gateway}))
    results = tokentape(*options, "results", batch_id, "--wait")
    events = rig.events()
    rig.close()
    shown = json.loads(tokentape(*options, "show", batch_id, "--format", "json").output)
    lines = [json.loads(line) for line in results.stdout.splitlines() if line.startswith("{")]

    assert (refused.exit_code, f"line 1: no upstream serves the model 'nobody'; valid: {vllm.model}" in refused.output) == (2, True)
    assert (made.exit_code, early.exit_code) == (0, 2)
    assert "is in_progress: 0 of 3 requests have ended" in early.output
    assert [line["custom_id"] for line in lines] == ["r0", "r1", "r2"]
    assert all(line["response"]["status_code"] == 200 for line in lines)
    assert len(payloads(events, SequenceFinished)) == 3
    assert (shown["status"], shown["completed"], shown["failed"]) == ("completed", 3, 0)


def test_keys(tmp_path: Path) -> None:
    """With keys required a batch is its key's: others cannot see it, models are the key's, and no token is kept in the log."""
    upstream = Upstream()
    with broken(upstream.act, models=("m", "secret")) as server:
        upstream.server = server
        settings = configured(Settings(data=tmp_path / "data"), server.url)
        settings = settings.model_copy(update={"gateway": settings.gateway.model_copy(update={"auth": "required"})})
        control = open_control(settings)
        tokens = []
        for tenant in ("acme", "other"):
            token, key = make(owner="ann", tenant=tenant, models=("m",))
            control.append(KIND, key.key_id, key.model_dump(mode="json"))
            tokens.append(token)
        control.close()
        rig = Rig(settings)
        own, other = (rig.client(api_key=token) for token in tokens)
        made = submit(own, jsonl(request("a", "mine")))
        batch = ended(own, made.id)
        texts = texts_of(lines_of(own, batch.output_file_id))
        with pytest.raises(openai.BadRequestError, match="this key may not ask for the model 'secret'; valid: m"):
            submit(own, jsonl(request("a", "x", "secret")))
        with pytest.raises(openai.NotFoundError, match="no batch is called"):
            other.batches.retrieve(made.id)
        with pytest.raises(openai.NotFoundError, match="no file is called"):
            other.files.content(batch.output_file_id)
        with pytest.raises(openai.AuthenticationError):
            rig.client(api_key="tt-nothing").batches.list()
        tenants = {event.tenant for event in rig.events() if event.kind == "request_submitted"}
        rig.close()
    kept = b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())

    assert texts == {"a": "you said mine"}
    assert tenants == {"acme"}
    assert not any(token.encode() in kept for token in tokens)


def test_expired(tmp_path: Path) -> None:
    """What has not begun within the window ends as expired, with a line for each request; unknown purposes and windows are named."""
    upstream = Upstream()
    with broken(upstream.act, models=("m",)) as server:
        upstream.server = server
        settings = configured(Settings(data=tmp_path / "data"), server.url, window_h=0.0005)
        rig = Rig(settings)
        client = rig.client()
        with pytest.raises(openai.BadRequestError, match=r"'24h' is no window; hours or days such as 24h, at most 0.0005h"):
            submit(client, jsonl(request("a", "x")))
        with pytest.raises(openai.BadRequestError, match="purpose 'assistants' is not served; valid: batch"):
            client.files.create(file=("x", b"{}"), purpose="assistants")
        rig.close()
        path = tmp_path / "requests.jsonl"
        path.write_bytes(jsonl(request("a", "busy"), request("b", "busy too")))
        upstream.asked.update({"busy": -1000, "busy too": -1000})
        options = ("--data", str(settings.data), "--set", f"gateway.upstream={server.url}", "--set", "batch.window_h=0.0005", "batch")
        batch_id = tokentape(*options, "submit", str(path)).output.strip()
        rig = Rig(settings)
        batch = ended(rig.client(), batch_id, "expired")
        codes = [line["error"]["code"] for line in lines_of(rig.client(), batch.error_file_id)]
        rig.close()

    assert codes == ["batch_expired", "batch_expired"]
