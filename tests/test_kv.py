"""KV connectors recorded: in a real vLLM, driven by hand where they hang and raise, and what the tape says of hits and misses."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pstats
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from replay.kv import Call, growth, report
from schemas.errors import UnknownSession
from schemas.events import Event, KvOperation
from tests.conftest import VllmService
from tests.engine_log import await_end, events_of
from tests.program import ROOT, until
from tokentape.cli import main

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
EXAMPLE = "vllm.distributed.kv_transfer.kv_connector.v1.example_connector:ExampleConnector"
TOKEN_BYTES = 2 * 2 * 2 * 32 * 2
"""What a token of the tiny model takes in the cache: layers, keys and values, heads, values of a head, bytes of bfloat16."""
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
A, B, C, D = (bytes([i]) * 8 for i in range(4))


def ran(data: Path, *arguments: str) -> list[str]:
    """The lines that a process with capture on prints."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TOKENTAPE_", "VLLM_"))}
    env |= {"TOKENTAPE_DATA": str(data), "TOKENTAPE_ENGINE__CAPTURE": "on", "PYTHONPATH": str(ROOT)}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-m", *arguments], env=env, cwd=ROOT, text=True, capture_output=True, check=False, timeout=900)
    assert ended.returncode in (0, 1), ended.stderr[-3000:]
    return ended.stdout.splitlines()


def operations(events: list[Event]) -> list[KvOperation]:
    """The calls of connectors on a tape."""
    return [event.payload for event in events if isinstance(event.payload, KvOperation)]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> tuple[Path, list[list[int]], list[Event]]:
    """The data directory, what each request got, and the tape."""
    folder = tmp_path_factory.mktemp("kv")
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    places = {"shared_storage_path": str(folder / "store"), "tokentape_profile": str(folder / "profile")}
    transfer |= {"kv_connector_extra_config": places}  # type: ignore[dict-item]  # JSON
    for place in places.values():
        Path(place).mkdir()
    said = ran(folder / "data", "tests.kv_load", str(vllm.model_dir), json.dumps(transfer))
    await_end(folder / "data")
    return folder / "data", [json.loads(line) for line in said if line.startswith("[")], events_of(folder / "data")


@needs_vllm
@pytest.mark.timeout(1500)
class TestEngine:
    """One run of a real engine with vLLM's example connector, whose class the plugin made a recording one."""

    def test_what_was_loaded_is_what_was_computed(self, told: tuple[Path, list[list[int]], list[Event]]) -> None:
        """The request whose prompt came from the store says what the one said that computed it."""
        _, said, _ = told

        assert 6 == len(said)
        assert said[0] == said[1]

    def test_a_profile_of_the_running_engine(self, told: tuple[Path, list[list[int]], list[Event]]) -> None:
        """Asked for while the engine stood ready: each side tells which of the connector's functions took how long."""
        files = sorted((told[0].parent / "profile").iterdir())
        functions = [set(pstats.Stats(str(file)).get_stats_profile().func_profiles) for file in files]

        assert ["scheduler", "worker"] == [file.name.partition("-")[0] for file in files]
        assert "get_num_new_matched_tokens" in functions[0]
        assert {"start_load_kv", "save_kv_layer"} <= functions[1]

    def test_calls_of_both_sides_are_on_the_tape(self, told: tuple[Path, list[list[int]], list[Event]]) -> None:
        """Each kind of call, by scheduler and worker, each of a request under the generation of that request."""
        events = told[2]
        found = operations(events)
        kinds = {(operation.operation, operation.role) for operation in found}
        generations = {event.payload.generation_id for event in events if event.kind == "request_submitted"}  # type: ignore[attr-defined]  # this kind has one
        lookups = [operation for operation in found if operation.operation == "lookup"]
        saved = [operation for operation in found if operation.operation == "save" and (operation.tokens_asked or 0) > 100]

        assert {(kind, "scheduler") for kind in ("construct", "lookup", "metadata", "load", "finish")} <= kinds
        assert {(kind, "worker") for kind in ("construct", "load", "save")} <= kinds
        assert {EXAMPLE} == {operation.connector for operation in found}
        assert generations == {operation.generation_id for operation in lookups}
        assert [0, 160, 0, 0, 0, 160] == [
            operation.tokens_matched for operation in sorted(lookups, key=lambda each: int(each.request or ""))
        ]
        assert len(saved) == 2  # of 163 tokens and of 133, in two layers of 2 heads × 32 values, keys and values, in the model's dtype
        assert saved[0].bytes is not None
        assert saved[0].bytes % 163 == 0

    def test_why_nothing_was_found(self, told: tuple[Path, list[list[int]], list[Event]]) -> None:
        """`tokentape kv` says it for each request, and what the connector mixes up."""
        data, _, events = told
        run = next(event.session_id for event in events if event.kind == "request_submitted")
        answer = CliRunner().invoke(main, ["--data", str(data), "kv", run.hex(), "--format", "json"])
        found = json.loads(answer.stdout)
        why = [one["why"] for one in found["requests"]]

        assert 0 == answer.exit_code, answer.output
        assert [0.0, 160 / 163, 0.0, None, None, 160 / 163] == [one["rate"] for one in found["requests"]]
        assert ["a new prompt: no request before shares its first block", ""] == why[:2]
        assert "the engine's own cache had all whole blocks: 128 tokens" == why[3]
        assert why[4].startswith("shorter than a block of 32 tokens")
        assert why[5].endswith("'s: the connector does not tell these apart")
        assert 2 * 160 * TOKEN_BYTES == found["loaded_bytes"]
        assert (163 + 133) * TOKEN_BYTES <= found["saved_bytes"]  # decoded tokens are counted where their step took long
        assert found["save_rate"] > 0


@needs_vllm
@pytest.mark.timeout(1200)
def test_a_connector_that_hangs_and_raises_is_recorded(tmp_path: Path) -> None:
    """By hand, through `kv_connector_module_path`: the hang while it lasts, the end of it, the exception, which passes on."""
    transfer = {
        "kv_connector": "tests.kv_connectors:Stumbling",
        "kv_role": "kv_both",
        "kv_connector_module_path": "ingest.vllm.kv.connector",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path), "tokentape_hang_s": 0.5},
    }
    data = tmp_path / "data"
    lines = ran(data, "ingest.vllm.kv.by_hand", json.dumps(transfer), "bfloat16", "cpu", "5")
    until(lambda: (data / "log" / "log.sqlite").exists() and any(event.kind == "session_closed" for event in events_of(data)))
    found = operations(events_of(data))
    lookups = [operation.outcome for operation in found if operation.operation == "lookup"]
    failed = [operation for operation in found if operation.outcome == "error"]

    assert ["store", "bad"] == json.loads(lines[-1])[:2]  # what it raised came to the driver, and was told by its right name
    assert ["hanging", "ok"] == lookups[:2]
    assert [("save", "worker")] == [(operation.operation, operation.role) for operation in failed]
    assert failed[0].content is not None
    assert "ConnectionRefusedError: the store at nowhere refused the connection" == failed[0].content.error
    assert {"tests.kv_connectors:Stumbling"} == {operation.connector for operation in found}


@needs_vllm
@pytest.mark.filterwarnings("ignore")  # vLLM in this process warns of its own and of torch's deprecations
def test_the_recording_class_is_the_connectors_own_kind() -> None:
    """Name, base classes and abstract methods as before; recorded twice is recorded once; a name that vLLM does not know is refused."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA
    from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    from ingest.vllm.kv import connector
    from tests.kv_connectors import Abstract

    made = connector.ExampleConnector
    multi: type = connector.recording(MultiConnector)

    assert issubclass(made, ExampleConnector)
    assert "ExampleConnector" == made.__name__
    assert made is connector.recording(ExampleConnector) is connector.recording(made)
    assert issubclass(multi, SupportsHMA)
    assert Abstract.__abstractmethods__ == connector.recording(Abstract).__abstractmethods__  # type: ignore[attr-defined]  # of a class made by ABCMeta
    with pytest.raises(AttributeError, match="no KV connector 'Nobody'"):
        connector.Nobody  # noqa: B018  # asking is the test


def call(at_ms: float, operation: str, request: str = "r", **more: Any) -> Call:
    """A call that came back `at_ms` after the beginning."""
    made = Call(
        BEGAN + timedelta(milliseconds=at_ms), operation, "worker" if operation == "save" else "scheduler", "ok", 0.2, request, request
    )
    return dataclasses.replace(made, **more)


def lookup(at_ms: float, request: str, hashes: tuple[bytes, ...], **more: Any) -> Call:
    """A lookup of whole blocks of 16 tokens and one more."""
    return call(at_ms, "lookup", request, **{"asked": 16 * len(hashes) + 1, "matched": 0, "local": 0, "hashes": hashes, **more})


FIRST = lookup(0, "first", (A, B))


@pytest.mark.parametrize(
    ("calls", "why"),
    [
        ([call(5, "save", size=9), lookup(9, "r", (A, B))], "2 of 2 blocks are first's, which were offered to be saved before"),
        ([call(5, "save", size=9), lookup(9, "r", (A, C))], "1 of 2 blocks are first's, which were offered to be saved before"),
        ([lookup(9, "r", (A, B))], "2 of 2 blocks are first's, but the connector was never given them to save"),
        ([lookup(9, "r", (A, B)), call(12, "save", size=9)], "2 of 2 blocks are first's, but their save had not ended when"),
        ([call(5, "save", outcome="error", error="OSError: full"), lookup(9, "r", (A, B))], "but saving failed: OSError: full"),
        ([lookup(9, "r", (C, D))], "the same tokens as first, under other block hashes"),
        ([lookup(9, "new", (C, D))], "a new prompt"),
        ([lookup(9, "r", (A, B), outcome="error", error="TimeoutError: store")], "the lookup failed: TimeoutError: store"),
        ([lookup(9, "r", (A, B), outcome="pending", matched=None)], "the connector did not know yet"),
        ([lookup(9, "r", (A, B), outcome="hanging", matched=None)], "the lookup had not come back"),
        ([lookup(9, "r", (), asked=9)], "shorter than a block"),
        ([lookup(9, "r", (A, B), asked=1, local=32)], "the engine's own cache had all whole blocks: 32 tokens"),
        ([lookup(9, "r", (C, D), matched=32)], "found under another cache salt or adapter than first's"),
    ],
)
def test_why(calls: list[Call], why: str) -> None:
    """Each cause of a miss, after a first request that had the same tokens."""
    prompts = {"first": list(range(33)), "r": list(range(33))}
    found = report([FIRST, *calls], prompts)

    assert why in found.requests[-1].why


def test_a_request_asked_for_again_counts_once() -> None:
    """A lookup that was not ready is replaced by the one that was."""
    found = report([FIRST, lookup(1, "r", (A, B), outcome="pending", matched=None), lookup(2, "r", (A, B), matched=32)], {})

    assert [("first", 0), ("r", 32)] == [(one.request, one.matched) for one in found.requests]
    assert 32 / 66 == found.rate


def test_flags() -> None:
    """Slow lookups, a hang, failures by kind, and memory that grows after the engine is warm."""
    memory = [call(i, "metadata", memory=(500 << 20) + (i << 23)) for i in range(40)]
    slow = [lookup(i, f"r{i}", (A,), duration_ms=1.0) for i in range(49)] + [lookup(50, "r50", (A,), duration_ms=12.5)]
    failed = [call(60, "load", outcome="failed"), call(61, "save", outcome="error", error="OSError: full")]
    hanging = [call(62, "finish", outcome="hanging", duration_ms=10_500.0)]
    flags = report([*memory, *slow, *failed, *hanging], {}).flags

    assert flags[0].startswith("lookups take 12.5 ms at p99, over 10 ms")
    assert "finish (scheduler) of r had not come back after 10.5 s" == flags[1]
    assert ["load (scheduler) failed 1 time: blocks were not loaded", "save (worker) failed 1 time: OSError: full"] == flags[2:4]
    assert flags[4].startswith("the scheduler's process grew by 160 MiB")
    assert 5 == len(flags)


def test_memory_that_only_warms_up_is_no_growth() -> None:
    """It rises in the first quarter and stays; too few figures say nothing."""

    assert growth([i << 26 for i in range(10)] + [10 << 26] * 30) is None
    assert growth([i << 30 for i in range(11)]) is None


def test_no_connector() -> None:
    """Nothing on the tape is said as that, with what to do."""
    with pytest.raises(UnknownSession, match="no call of a KV connector") as caught:
        report([], {})

    assert "kv_connector_module_path" in caught.value.hint
