"""LiteLLM's proxy as a rival of the gateway: its defaults, no database, in an environment of its own from `locks/rivals.txt`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "locks" / "rivals.txt"
ENVIRONMENT = ROOT / ".tokentape-rivals"

START_S = 180.0
"""It takes half a minute to start on a quiet machine."""

# Nothing is asked of the network; without a key for itself it wants to be told that this is meant.
_VARIABLES = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}


@contextmanager
def proxy(upstream: str, folder: Path) -> Iterator[tuple[str, int]]:
    """The URL and the process id of a proxy before an upstream that serves the model "tiny"."""
    program = _installed()
    config = folder / "litellm.yaml"
    model = f'{{model: openai/tiny, api_base: "{upstream}/v1", api_key: none}}'
    config.write_text(f"model_list:\n  - model_name: tiny\n    litellm_params: {model}\n", encoding="utf-8")
    port = _free_port()
    with (folder / "litellm.log").open("wb") as output:
        command: list[str | Path] = [program, "--config", config, "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(command, env={**os.environ, **_VARIABLES}, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, folder / "litellm.log")
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(30)


def _installed() -> Path:
    """Its program, installed by hash when the lock has changed since the last time."""
    stamp = ENVIRONMENT / "lock"
    if not stamp.exists() or stamp.read_bytes() != LOCK.read_bytes():
        uv = Path(sys.executable).parent / "uv"
        variables = {name: value for name, value in os.environ.items() if name not in ("UV_FIND_LINKS", "VIRTUAL_ENV")}
        python = ENVIRONMENT / "bin" / "python"
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, ENVIRONMENT], check=True, env=variables)
        install: list[str | Path] = [uv, "pip", "sync", "--quiet", "--python", python, "--require-hashes", LOCK]
        subprocess.run(install, check=True, env=variables)
        stamp.write_bytes(LOCK.read_bytes())
    return ENVIRONMENT / "bin" / "litellm"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait(url: str, process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health/liveliness", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"LiteLLM did not start: {output.read_text(errors='replace')[-500:]}")
