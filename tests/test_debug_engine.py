"""`debug-engine`: a generation of a real vLLM single-stepped by an editor's protocol, and by pdb; logs that nobody can be stuck in."""

from __future__ import annotations

import json
import logging.config
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from scripts.native.processes import free_port
from tests.conftest import VllmService
from tests.dap import Editor
from tests.program import ROOT
from tokentape import debugging
from tokentape.cli import main

STEPS = 40
INSIDE = "vllm"


def started(data: Path, *arguments: str) -> subprocess.Popen[str]:
    """`debug-engine` in a process, on an installation of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "TOKENTAPE_"))}
    command = [sys.executable, "-m", "tokentape.cli", "--data", str(data), "debug-engine", *arguments]
    env["PYTHONPATH"] = str(ROOT)
    piped = subprocess.PIPE
    return subprocess.Popen(command, text=True, cwd=ROOT, env=env, stdin=piped, stdout=piped, stderr=subprocess.STDOUT)


@pytest.mark.timeout(1200)
def test_generate_is_single_stepped_and_ends(tmp_path: Path, vllm: VllmService) -> None:
    """An editor attaches, steps into `LLM.generate` and on while other threads stand still, lets go, and the text comes."""
    port = free_port()
    process = started(tmp_path, str(vllm.model_dir), "--debugger", "debugpy", "--port", str(port), "--max-tokens", "4")
    assert process.stdout is not None
    waits = any("waiting for an editor" in line for line in process.stdout)  # the engine has started by then, at its own pace
    editor = Editor(port, deadline_s=240)
    try:
        editor.attach()
        thread = editor.event("stopped")["body"]["threadId"]
        frames = [editor.top(thread)]
        while "llm.generate(" not in _line(frames[-1]):
            frames.append(editor.step("next", thread))
        frames += [editor.step("next" if i % 3 == 2 else "stepIn", thread) for i in range(STEPS)]
        editor.ask("continue", threadId=thread)
        editor.event("terminated")
        editor.close()  # debugpy's adapter keeps the pipes of what it debugged as long as somebody is attached
        said, _ = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
        editor.close()
    inside = [frame for frame in frames if f"{os.sep}{INSIDE}{os.sep}" in frame["source"]["path"]]

    assert waits
    assert "_generate" == frames[0]["name"]
    assert "generate" in {str(frame["name"]).rpartition(".")[2] for frame in inside}, frames
    assert len(inside) > STEPS // 2
    assert 0 == process.returncode, said[-2000:]
    assert len(said.strip().splitlines()[-1]) > 0
    assert "vllm" in (tmp_path / "debug" / "vllm.log").read_text()


def _line(frame: dict[str, object]) -> str:
    source = frame["source"]
    assert isinstance(source, dict)
    line = frame["line"]
    assert isinstance(line, int)
    return Path(source["path"]).read_text().splitlines()[line - 1]


@pytest.mark.timeout(1200)
def test_pdb_stops_in_the_scheduler(tmp_path: Path, vllm: VllmService) -> None:
    """pdb stops where the generation begins and at a method of the scheduler, in the same process; quitting is no error."""
    place = "vllm.v1.core.sched.scheduler:Scheduler.schedule"
    process = started(tmp_path, str(vllm.model_dir), "--break", place, "--max-tokens", "2")
    said, _ = process.communicate("continue\nwhere\nquit\n", timeout=900)

    assert 0 == process.returncode, said[-2000:]
    assert "_generate()" in said
    assert "schedule()" in said
    assert "left the debugger" in said


def test_a_thread_that_stands_still_in_logging_blocks_nobody(tmp_path: Path) -> None:
    """One thread is stopped while its record is being formatted, as by a debugger; another one's records come through."""
    log = tmp_path / "vllm.log"
    logging.config.dictConfig(debugging.logging_config(log))
    logger = logging.getLogger("vllm.here")
    inside, go = threading.Event(), threading.Event()

    class Stopped:
        def __str__(self) -> str:
            inside.set()
            assert go.wait(60)
            return "the first"

    stopped = threading.Thread(target=logger.info, args=("%s", Stopped()))
    stopped.start()
    assert inside.wait(60)
    other = threading.Thread(target=logger.info, args=("the second",))
    other.start()
    other.join(60)
    alone = log.read_text()
    go.set()
    stopped.join(60)
    for handler in logging.getLogger("vllm").handlers[:]:
        logging.getLogger("vllm").removeHandler(handler)
        handler.close()

    assert not other.is_alive()
    assert "the second" in alone
    assert "the first" not in alone
    assert ["the second", "the first"] == [line.rsplit(": ", 1)[1] for line in log.read_text().splitlines()]


def test_launch_configurations_start_what_there_is() -> None:
    """Each names commands and options that exist, and one engine in one process."""
    ran = CliRunner().invoke(main, ["debug-engine", "--launch-json", "--port", "5999"])
    found = json.loads(ran.stdout)
    launched = [each for each in found["configurations"] if each["request"] == "launch"]

    assert 0 == ran.exit_code
    assert 5999 == next(each["connect"]["port"] for each in found["configurations"] if each["request"] == "attach")
    for each in launched:
        assert "tokentape.cli" == each["module"]
        told = CliRunner().invoke(main, [each["args"][0], "--help"]).stdout
        assert all(word in told for word in each["args"] if word.startswith("--"))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "no model"),
        (["M", "--break", "a:b", "--debugger", "none"], "--break is for pdb"),
        (["M", "--break", "Scheduler"], "is no place"),
        (["M", "--break", "nowhere.at_all:X"], "no module nowhere.at_all"),
        (["M", "--break", "tokentape.debugging:Nobody.at_all"], "defines no Nobody.at_all"),
        (["/nowhere", "--debugger", "none"], "no model lies at /nowhere"),
    ],
)
def test_what_cannot_be_debugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], word: str) -> None:
    """One line, before an engine is started."""
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what `prepare` sets is for a process that ends
    ran = CliRunner().invoke(main, ["--data", str(tmp_path), "debug-engine", *arguments])

    assert 2 == ran.exit_code, ran.output
    assert word in ran.stderr
