"""Every command that the README and the pages of docs/ show is run as it stands there, on an installation with a session on its tape."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import openai
import pytest

from schemas.settings import GatewaySettings, Settings
from tests.conftest import VllmService
from tests.debug_rig import wait_known
from tests.program import ROOT, Program, Ran, until

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = ("git clone", "make ", "docker ", "curl ")
"""Beginnings of commands that set up a machine or are a client; the frame's, the services' and other tests run those."""
DEBUGGING = "## Stop a request, edit it, let it go"
BATCHES = "## Batch work"
GATEWAY = "http://127.0.0.1:8400"
"""Where the README's reader has a gateway."""
ENGINE = "http://127.0.0.1:8000"
"""Where the README's reader has an engine."""


def shown() -> list[str]:
    """The command lines in shell blocks, each once, comments taken away."""
    blocks = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)]
    lines = [re.sub(r"\s+# .*", "", line).strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def runnable() -> list[str]:
    """Those that end by themselves and need nothing that the tests do not have; batches are worked off in a test of their own."""
    return [
        line for line in shown() if not line.startswith(ELSEWHERE) and not re.search(r"\bup$|REQUEST|BATCH|MODEL|tokentape batch", line)
    ]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory, vllm: VllmService) -> Program:
    """An installation on whose tape a real client talked to a real engine, and a folder in which `tokentape` is a command."""
    folder = tmp_path_factory.mktemp("readme")
    made = Program(folder, Settings(data=folder / "data", gateway=GatewaySettings(port=0, upstream=vllm.url)))
    with made.up() as up, openai.OpenAI(base_url=f"{up.ready().url}/v1", api_key="sk-test-0123456789", max_retries=0) as client:
        client.chat.completions.create(model=vllm.model, messages=[{"role": "user", "content": "hello"}], max_tokens=8)
    _install(folder)
    return made


def _install(folder: Path) -> None:
    """`tokentape` on the PATH and `.venv/bin/tokentape`, as in a checkout that was set up."""
    program = folder / ".venv" / "bin" / "tokentape"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tokentape.cli "$@"\n')
    program.chmod(0o755)


def test_commands_of_the_readme(program: Program, vllm: VllmService) -> None:
    """Each ends with exit code 0, says nothing of an error, and leaves an answer where there is one."""
    session = program.sql("SELECT session_id, started_at FROM sessions WHERE requests > 0")[0]
    event = program.sql("SELECT event_id FROM events WHERE kind = 'request_submitted'")[0]["event_id"]
    key = f"key-{program.run('keys', 'create', '--owner', 'ann').text.split('-')[1]}"
    moment = str(session["started_at"])[:23].replace(" ", "T")
    lines = [line.replace("SESSION", session["session_id"]).replace(ENGINE, vllm.url) for line in runnable()]
    lines = [re.sub(r"--at \S+", f"--at {moment}", re.sub(r"\bEVENT\b", event, re.sub(r"\bKEY\b", key, line))) for line in lines]
    wrong = {}
    for needs_shell, several in groupby(lines, lambda line: "> " in line):
        for line, ran in (_in_a_shell if needs_shell else _in_one_process)(program, list(several)):
            if ran.code or "tokentape: " in ran.stderr or not (ran.stdout or re.search("> |--out ", line)):
                wrong[line] = (ran.code, ran.stdout[-300:], ran.stderr[-1000:])

    assert wrong == {}
    assert (program.folder / "failures.csv").read_text().startswith('"session_id"')


def _in_one_process(program: Program, lines: list[str]) -> Iterable[tuple[str, Ran]]:
    """Command lines that a shell would only take apart, run one after another without starting Python for each."""
    calls = [shlex.split(line)[1:] for line in lines]
    return zip(lines, program.batch(*calls, code=None, timeout_s=250), strict=True)


def _in_a_shell(program: Program, lines: list[str]) -> Iterable[tuple[str, Ran]]:
    """Command lines as a shell runs them, with `tokentape` on its path."""
    search = f"{program.folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    how: Any = {"capture_output": True, "cwd": program.folder, "env": {**program.environment, "PATH": search}, "timeout": 90}
    for line in lines:
        ran = subprocess.run(["sh", "-c", line], check=False, **how)
        yield line, Ran(ran.returncode, ran.stdout, ran.stderr.decode())


def test_two_terminals(program: Program, vllm: VllmService) -> None:
    """The section on debug mode, done: one terminal waits while the other edits and releases; the tape tells of it."""
    section = README.read_text(encoding="utf-8").partition(DEBUGGING)[2].partition("\n## ")[0]
    first, second = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (setup, client), commands = first.splitlines(), [re.sub(r"\s+# .*", "", line) for line in second.splitlines()]
    search = f"{program.folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    how: Any = {"text": True, "cwd": program.folder, "env": {**program.environment, "PATH": search}}
    with program.up("--only", "gateway") as up:
        client = client.replace(GATEWAY, up.ready(("gateway",)).url).replace("MODEL", vllm.model)
        subprocess.run(["sh", "-c", setup], check=True, stdout=subprocess.DEVNULL, **how)
        wait_known(up.url, "refunds")
        waiting = subprocess.Popen(["sh", "-c", client], stdout=subprocess.PIPE, **how)
        rows = until(lambda: program.run("stopped", "list", "--format", "json").rows or None)
        said = []
        for line in commands:
            words = line.replace("REQUEST", rows[0]["generation"][-8:])
            ran = subprocess.run(["sh", "-c", words], capture_output=True, timeout=90, check=False, **how)
            assert (ran.returncode, "tokentape: " in ran.stderr) == (0, False), (words, ran.stderr)
            said.append(ran.stdout)
        answer = waiting.communicate(timeout=90)[0]

    assert re.match(r"(: stopped at a breakpoint\n\n)+data: {", answer)
    assert answer.endswith("data: [DONE]\n\n")
    assert "I want a refund." in said[1]
    assert said[5].endswith("edited\n")
    assert "no refunds today" in said[6]
    assert said[6].count("messages") == 3


def test_the_readme_shows_the_main_commands() -> None:
    """The five jobs are there, so that the test above has something to run."""
    commands = {line.split()[1] for line in runnable()}

    assert {"sessions", "sql", "timeline", "show", "replay", "tier", "verify", "jobs"} <= commands
    assert [line for line in shown() if line.endswith(" up")] != []


def test_targets_of_the_readme() -> None:
    """Every `make` target that it names is one."""
    named = {word for line in shown() if line.startswith("make ") for word in line.split()[1:] if "=" not in word}
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))

    assert "demo" in named
    assert named - there == set()


def test_batch_work(program: Program, vllm: VllmService) -> None:
    """The section on batch work, done: a file is submitted, worked off and found again; a worker comes and goes."""
    section = README.read_text(encoding="utf-8").partition(BATCHES)[2].partition("\n## ")[0]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    search = f"{program.folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    how: Any = {"text": True, "cwd": program.folder, "env": {**program.environment, "PATH": search}}
    batch, said = "", {}
    with program.up("--only", "gateway") as up:
        up.ready(("gateway",))
        for line in block.splitlines():
            words = re.sub(r"\s+# .*", "", line).replace("MODEL", vllm.model).replace("BATCH", batch)
            if words.endswith("batch work"):
                worker = subprocess.Popen(["sh", "-c", f"exec {words}"], stderr=subprocess.PIPE, **how)
                worker.send_signal(signal.SIGTERM)
                worker.communicate(timeout=90)
                continue
            ran = subprocess.run(["sh", "-c", words], capture_output=True, timeout=90, check=False, **how)
            assert (ran.returncode, "Traceback" in ran.stderr) == (0, False), (words, ran.stderr)
            said[words.replace(batch, "BATCH") if batch else words] = ran.stdout
            if "batch submit" in words:
                batch = ran.stdout.split()[0]

    assert '"custom_id":"r1"' in said["tokentape batch results BATCH --wait"].replace(" ", "")
    assert batch in said["tokentape sessions --tag BATCH"]
