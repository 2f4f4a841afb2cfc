"""One recorded engine run as a tour looks at it, and how one is recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replay.exact.run import Run, load
from replay.words import printable, uuid
from schemas.enginerun.calls import Arrive, ArriveBeside, Cached, Preempt
from schemas.enginerun.sessions import steps_session
from schemas.errors import EngineUnavailable, UsageError
from schemas.events import EngineStep, TokenChunk
from tokentape.installation import Installation
from tokentape.tours.engine import load as requests_of

START_S = 900.0
"""How long an engine may take to start and to work the load off."""
RECORDER_S = 120.0
"""How long its recorder may take to write the last of it."""
OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 3,
    "block_size": 32,
    "enable_prefix_caching": True,
    "async_scheduling": False,
    "seed": 0,
    "num_gpu_blocks_override": 64,
}
"""A small engine: three sequences at once, and blocks that can be counted."""
CLOSED = "SELECT DISTINCT uuid_text(session_id) AS id FROM events WHERE kind = 'session_closed' AND source = 'engine'"
OPENED = "SELECT uuid_text(session_id) AS id FROM events WHERE kind = 'session_opened' AND session_opened.purpose = 'engine run'"


@dataclass(frozen=True, slots=True)
class Row:
    """One step: who computed how many tokens, and what the engine said of itself. `computed` is each one's tokens after it."""

    number: int
    tokens: dict[int, int]
    computed: dict[int, int]
    arrived: tuple[int, ...]
    cached: dict[int, int]
    preempted: tuple[int, ...]
    duration_us: int
    waiting: int
    running: int
    kv_used: float | None


@dataclass(frozen=True)
class Tape:
    """A run, its steps in order, and when each token of each sequence came, in µs after its request."""

    run: Run
    rows: tuple[Row, ...]
    offsets: dict[int, list[int]]

    @property
    def block(self) -> int:
        """Tokens in a block."""
        return int(self.run.facts.get("config.cache_config.block_size") or 16)

    @property
    def blocks(self) -> int:
        """Blocks of the engine."""
        return int(self.run.facts.get("config.cache_config.blocks") or 0)

    def name(self, number: int) -> str:
        """What its client called a request."""
        return str(self.run.requests[number].document["request_id"]).rsplit("-", 1)[0]

    def said(self, number: int) -> list[int]:
        """A sequence's tokens."""
        return list(self.run.said[self.run.requests[number].place].token_ids)

    def logprobs(self, number: int) -> list[float]:
        """… and their logprobs."""
        return list(self.run.said[self.run.requests[number].place].logprobs)

    def words(self, number: int) -> list[str]:
        """… as text, where the model's tokenizer is here; else their ids."""
        ids = self.said(number)
        try:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.run.facts["config.model_config.model"])
            return [printable(tokenizer.decode([token])) for token in ids]
        except (ImportError, OSError, ValueError, KeyError):
            return [f"#{token}" for token in ids]


def read(installation: Installation, engine_run: bytes) -> Tape:
    """A run from the tape.

    Raises:
        UnknownSession: there is none of that id.
    """
    installation.freshen()
    owned, stepped = list(installation.reader.session(engine_run)), list(installation.reader.session(steps_session(engine_run)))
    run = load(engine_run, owned, stepped)
    payloads = [stored.event.payload for stored in stepped if isinstance(stored.event.payload, EngineStep)]
    numbers = {request.place: number for number, request in run.requests.items()}
    offsets: dict[int, list[int]] = {number: [] for number in run.requests}
    for stored in owned:
        chunk = stored.event.payload
        if isinstance(chunk, TokenChunk):
            offsets[numbers[chunk.generation_id, chunk.index]] += chunk.offsets_us
    return Tape(run, tuple(_rows(run, payloads)), offsets)


def _rows(run: Run, payloads: list[EngineStep]) -> Iterator[Row]:
    computed: dict[int, int] = {}
    arrivals = iter(sorted(run.requests))
    for step, payload in zip(run.steps, payloads, strict=True):
        arrived = tuple(next(arrivals) for call in step.calls if isinstance(call, Arrive | ArriveBeside))
        cached = {call.number: call.tokens for call in step.calls if isinstance(call, Cached)}
        preempted = tuple(number for call in step.calls if isinstance(call, Preempt) for number in call.numbers)
        for number in preempted:
            computed[number] = 0
        for number, tokens in step.rows.items():
            computed[number] = computed.get(number, 0) + cached.get(number, 0) + tokens
        here = {number: computed[number] for number in step.rows}
        state = (payload.duration_us, payload.waiting, payload.running, payload.kv_used)
        yield Row(step.number, dict(step.rows), here, arrived, cached, preempted, *state)


def record(installation: Installation, model: Path, kind: str, **options: Any) -> Tape:
    """Start an engine on a load, wait until it and its recorder have ended, and read what they wrote.

    Raises:
        EngineUnavailable: it does not start, or is not recorded.
    """
    installation.freshen()
    before = _ids(installation, CLOSED)
    spec = {"model": str(model), "options": {**OPTIONS, **options}, "load": requests_of(kind)}
    settings = installation.settings
    environment = {
        **os.environ,
        "TOKENTAPE_DATA": str(settings.data.resolve()),
        "TOKENTAPE_ENGINE__CAPTURE": "on",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # By itself vLLM gives each rank a NUMA node of its own, and most machines have one.
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
    }
    command = [sys.executable, "-m", "tokentape.tours.engine", json.dumps(spec)]
    log = settings.data / "tour" / "engine.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    hint = f"its log is {log}"
    with log.open("wb") as file:
        try:
            ended = subprocess.run(command, env=environment, stdout=file, stderr=file, timeout=START_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise EngineUnavailable(f"it had not ended after {START_S:g} s", operation="tour", place=str(model), hint=hint) from error
    if ended.returncode:
        raise EngineUnavailable(f"the engine ended with {ended.returncode}", operation="tour", place=str(model), hint=hint)
    return read(installation, _await(installation, before, hint))


def _await(installation: Installation, before: set[str], hint: str) -> bytes:
    """The run whose two sessions are closed now and were not before."""
    deadline = time.monotonic() + RECORDER_S
    while time.monotonic() < deadline:
        installation.freshen()
        closed = _ids(installation, CLOSED) - before
        runs = closed & _ids(installation, OPENED)
        for run in runs:
            engine_run = bytes.fromhex(run.replace("-", ""))
            if uuid(steps_session(engine_run)) in closed:
                return engine_run
        time.sleep(0.5)
    raise EngineUnavailable("the engine ran and was not recorded", operation="tour", hint=hint)


def _ids(installation: Installation, statement: str) -> set[str]:
    return {row["id"] for row in installation.sql.query(statement).table.to_pylist()}


def tiny_model(folder: Path) -> Path:
    """The tiny model of a checkout, made once.

    Raises:
        UsageError: this is no checkout, so there is nothing to make it with.
    """
    if not (folder / "config.json").exists():
        try:
            from scripts.tiny_model import make  # of the repository, not of the package
        except ImportError as error:
            hint = "--model FOLDER: any small model will do; a checkout of tokentape makes a tiny one"
            raise UsageError("there is no model to look at", operation="tour", hint=hint) from error
        make(folder)
    return folder
