"""The program as people run it: a settings file in a folder, its commands as processes, `up` with all that it starts."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from click.testing import CliRunner, Result
from pydantic import BaseModel, SecretStr

from schemas.settings import Settings
from tokentape.cli import main

ROOT = Path(__file__).parents[1]
DEADLINE_S = 90.0
DRIVER = """
import base64, contextlib, io, json, sys
from tokentape.cli import main
for words in json.load(sys.stdin):
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as ended:
            code = ended.code or 0
    print(json.dumps([code, base64.b64encode(out.buffer.getvalue()).decode(), err.getvalue()]), flush=True)
"""
"""Calls the command line again and again in one process: starting Python takes longer than most answers."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command did."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        """Standard output as text."""
        return self.stdout.decode()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Standard output as one JSON object a line."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def complaint(self) -> str:
        """The one line that says what went wrong; a hint may follow it, a warning about the answer stand before it."""
        lines = self.stderr.splitlines()
        first, *rest = [line for line in lines if not line.startswith("tokentape: the log does not answer, this is")]
        assert first.startswith("tokentape: "), self.stderr
        assert all(line.startswith("  hint: ") for line in rest), self.stderr
        assert len(rest) <= 1, self.stderr
        return first.removeprefix("tokentape: ")


class Program:
    """tokentape on one installation. `settings` go into `folder`/tokentape.toml."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings
        self.mark = uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "tokentape.toml"
        self.file.write_text(to_toml(settings))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = {**os.environ, "PROGRAM_MARK": self.mark, "PYTHONPATH": path}

    def command(self, *arguments: str) -> list[str]:
        """The command line with this installation's settings."""
        return [sys.executable, "-m", "tokentape.cli", "--config", str(self.file), *arguments]

    def run(self, *arguments: str, stdin: bytes | None = None, code: int | None = 0) -> Ran:
        """Run one command to its end; whatever happens, it shows no traceback and leaves no process."""
        command, given = self.command(*arguments), {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        ended = self._process(command, **given)
        return _checked(Ran(ended.returncode, ended.stdout, ended.stderr.decode()), arguments, code)

    def batch(self, *commands: Sequence[str], code: int | None = 0, timeout_s: float = DEADLINE_S) -> list[Ran]:
        """Run commands one after another in one process, each as `run` would."""
        calls = [["--config", str(self.file), *arguments] for arguments in commands]
        ended = self._process([sys.executable, "-c", DRIVER], input=json.dumps(calls).encode(), timeout=timeout_s)
        answers = [json.loads(line) for line in ended.stdout.splitlines()]
        assert len(answers) == len(calls), ended.stderr.decode()[-3000:]
        rans = [Ran(status, base64.b64decode(out), err) for status, out, err in answers]
        return [_checked(ran, arguments, code) for ran, arguments in zip(rans, commands, strict=True)]

    def _process(self, command: list[str], **how: Any) -> subprocess.CompletedProcess[bytes]:
        kept: Any = {"capture_output": True, "env": self.environment, "cwd": self.folder, "timeout": DEADLINE_S, **how}
        ended: subprocess.CompletedProcess[bytes] = subprocess.run(command, check=False, **kept)
        return ended

    def sql(self, statement: str) -> list[dict[str, Any]]:
        """The rows of a query."""
        return self.ask(statement)[0]

    def ask(self, *statements: str) -> list[list[dict[str, Any]]]:
        """The rows of each of some queries."""
        return [ran.rows for ran in self.batch(*(["sql", statement, "--format", "json"] for statement in statements))]

    @property
    def status(self) -> dict[str, Any]:
        """What `status` says."""
        found: dict[str, Any] = json.loads(self.run("status", "--format", "json").stdout)
        return found

    def fails(self, *arguments: str, code: int, stdin: bytes | None = None) -> str:
        """Run a command that must fail with this code and one line; returns the line."""
        return self.run(*arguments, code=code, stdin=stdin).complaint

    @contextlib.contextmanager
    def up(self, *arguments: str) -> Iterator[Up]:
        """`tokentape up` while the block runs, ready when it is entered; stopped by SIGTERM unless it has ended by itself."""
        said = self.folder / f"up-{uuid.uuid4().hex[:8]}.log"
        with said.open("wb") as stderr:
            process = subprocess.Popen(
                self.command("up", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=self.environment,
                cwd=self.folder,
            )
        running = Up(self, process, said)
        try:
            yield running
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(DEADLINE_S)
        assert "Traceback" not in running.said, running.said[-3000:]

    def parts(self) -> dict[str, dict[str, Any]]:
        """What each running part says about itself in `run/`, by its name."""
        found = {}
        for path in (self.settings.data / "run").glob("*.json"):
            with contextlib.suppress(OSError, ValueError):
                facts = json.loads(path.read_text())
                if _alive(facts["pid"]):
                    found[facts["part"]] = facts
        return found

    def processes(self) -> list[int]:
        """Every living process that this installation's commands started, and theirs."""
        return [pid for pid in _all_processes() if self.mark.encode() in _environment(pid)]


class Up:
    """A running `tokentape up`."""

    def __init__(self, program: Program, process: subprocess.Popen[bytes], log: Path) -> None:
        self.program = program
        self.process = process
        self._log = log

    @property
    def said(self) -> str:
        """Everything on standard output and error so far."""
        return self._log.read_text(errors="replace")

    def ready(self, parts: Sequence[str] = ("gateway", "api", "indexer", "scheduler")) -> Up:
        """Return when all of these parts run."""
        until(lambda: set(parts) <= self.program.parts().keys() or self._failed())
        return self

    def _failed(self) -> bool:
        assert self.process.poll() is None, self.said[-3000:]
        return False

    @property
    def url(self) -> str:
        """Base URL of the gateway that runs now."""
        return str(until(lambda: self.program.parts().get("gateway") or self._failed())["url"])  # type: ignore[index]

    def kill(self, *parts: str) -> None:
        """SIGKILL parts at once, and return when their successors run."""
        self.ready()
        victims = {part: self.program.parts()[part]["pid"] for part in parts}
        for victim in victims.values():
            os.kill(victim, signal.SIGKILL)
        until(lambda: self._replaced(victims) or self._failed())

    def _replaced(self, victims: dict[str, int]) -> bool:
        found = self.program.parts()
        return all(part in found and found[part]["pid"] != victim for part, victim in victims.items())

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(DEADLINE_S)


def invoke(settings: Settings, *words: str) -> Result:
    """A command of an installation, run in this process; its settings file lies beside the data."""
    file = settings.data.parent / "tokentape.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_toml(settings))
    return CliRunner().invoke(main, ["--config", str(file), *words])


def _checked(ran: Ran, arguments: Sequence[str], code: int | None) -> Ran:
    assert "Traceback" not in ran.stderr + ran.stdout.decode(errors="replace"), f"{arguments}: {ran.stderr[-3000:]}"
    assert code is None or ran.code == code, f"{arguments} ended with {ran.code}: {ran.stderr[-2000:]} {ran.stdout[-500:]!r}"
    return ran


def until(ask: Callable[[], T | None], seconds: float = DEADLINE_S) -> T:
    """The first answer that is not None or False."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = ask()
        if answer is not None and answer is not False:
            return answer
        time.sleep(0.02)
    raise AssertionError(f"nothing after {seconds} s")


def to_toml(settings: Settings) -> str:
    """A settings file with what differs from the defaults."""
    lines, sections = [], []
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            sections += [f"[{name}]", *(f"{key} = {_toml(getattr(value, key))}" for key in sorted(value.model_fields_set)), ""]
        else:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join([*lines, "", *sections])


def _toml(value: Any) -> str:
    plain = value.get_secret_value() if isinstance(value, SecretStr) else value
    return json.dumps(str(plain) if isinstance(plain, Path) else plain)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def _all_processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
