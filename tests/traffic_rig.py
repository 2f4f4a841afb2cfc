"""Installations with real traffic on their tapes, and their commands run in this process: what forks, suites and drives start from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas.settings import GatewaySettings, Settings
from tests.conftest import VllmService
from tests.gateway_rig import Rig
from tests.program import invoke


class Traffic:
    """One installation before the shared vLLM."""

    def __init__(self, settings: Settings, vllm: VllmService) -> None:
        self.settings = settings.model_copy(update={"gateway": GatewaySettings(port=0, upstream=vllm.url)})
        self.model = vllm.model

    def record(self, documents: Sequence[dict[str, Any]], path: str = "/v1/chat/completions", **headers: str) -> list[dict[str, Any]]:
        """Ask each of these through a gateway that records, one after another; the answers."""
        rig = Rig(self.settings)
        try:
            answers = [rig.post({"model": self.model, **document}, path, **headers).json() for document in documents]
            assert all("choices" in answer for answer in answers), answers
            return answers
        finally:
            rig.close()

    def run(self, *words: str, code: int = 0) -> Any:
        """A command's result; it must end with this code and shows no traceback."""
        ran = invoke(self.settings, *words)
        assert (ran.exit_code, "Traceback" in ran.output) == (code, False), (words, ran.output[-3000:])
        return ran

    def rows(self, *words: str) -> list[dict[str, Any]]:
        """What a command prints as JSON, one object a line."""
        return [json.loads(line) for line in self.run(*words, "--format", "json").stdout.splitlines()]

    def sql(self, statement: str) -> list[dict[str, Any]]:
        """The rows of a query."""
        return self.rows("sql", statement)

    def complaint(self, *words: str, code: int = 2) -> str:
        """What a command says that must fail; at most one line and its hint."""
        lines = self.run(*words, code=code).stderr.splitlines()
        said = [line for line in lines if line.startswith("tokentape: ")]
        assert len(said) == 1, lines
        return str(said[0]).removeprefix("tokentape: ")

    @property
    def folder(self) -> Path:
        """Where files of a test can lie."""
        return self.settings.data.parent


def ask(text: str, **fields: Any) -> dict[str, Any]:
    """A request of one message."""
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 24, "temperature": 0, **fields}
