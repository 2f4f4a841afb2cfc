"""An engine that a person can step through: one process, logs in a file that nobody waits for, and no time-out that a pause would hit."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DAY_S = "86400"
"""How long somebody may look at a line before a part of vLLM gives another up."""

VARIABLES: Mapping[str, str] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler, worker and front end in the process that is looked at
    "VLLM_TRACE_FUNCTION": "0",  # vLLM's own tracer would take the debugger's place
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": DAY_S,
    "VLLM_ENGINE_ITERATION_TIMEOUT_S": DAY_S,
    "VLLM_ENGINE_READY_TIMEOUT_S": DAY_S,
    "VLLM_RPC_TIMEOUT": DAY_S + "000",  # milliseconds
    "VLLM_NO_USAGE_STATS": "1",  # a thread of its own that asks the network
    "OMP_NUM_THREADS": "1",  # the same numbers at each attempt, and no pool of threads to stop
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # debugpy's remark about frozen modules
}
"""What an engine under a debugger needs in its environment, before vLLM is imported."""
OPTIONS: Mapping[str, Any] = {"enforce_eager": True, "async_scheduling": False, "tensor_parallel_size": 1}
"""Engine arguments: no graphs that skip Python, no step that is prepared while another is looked at, no second rank."""


class LockFreeFile(logging.Handler):
    """A log file that is written without a lock.

    A debugger that stops one thread inside of `logging` leaves its lock held, and the thread that is stepped then waits for ever. Each
    record is one write to a file opened for appending, which the system keeps whole, so there is nothing to lock.
    """

    def __init__(self, filename: str) -> None:
        super().__init__()
        self._file = os.open(filename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def createLock(self) -> None:
        """None: `logging` then takes none."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            os.write(self._file, (self.format(record) + "\n").encode(errors="replace"))
        except (OSError, TypeError, ValueError):
            self.handleError(record)

    def close(self) -> None:
        """Close the file."""
        super().close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def logging_config(log: Path) -> dict[str, Any]:
    """A configuration of `logging` in which vLLM's records go to the file `log` alone."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(threadName)s %(name)s: %(message)s"}},
        "handlers": {"file": {"class": "tokentape.debugging.LockFreeFile", "filename": str(log), "formatter": "line"}},
        "loggers": {"vllm": {"handlers": ["file"], "level": "DEBUG", "propagate": False}},
    }


def prepare(log: Path) -> None:
    """Set this process up, before vLLM is imported; variables that are set already are somebody's decision and stay."""
    log.parent.mkdir(parents=True, exist_ok=True)
    config = log.with_suffix(".json")
    config.write_text(json.dumps(logging_config(log)), encoding="utf-8")
    for name, value in {**VARIABLES, "VLLM_LOGGING_CONFIG_PATH": str(config)}.items():
        os.environ.setdefault(name, value)


def launch_json(port: int) -> dict[str, Any]:
    """Launch configurations for VS Code: an engine started here, one to attach to, and a recorded run played again."""
    common = {"type": "debugpy", "justMyCode": False, "subProcess": False}
    start = {**common, "request": "launch", "module": "tokentape.cli", "console": "integratedTerminal"}
    return {
        "version": "0.2.0",
        "configurations": [
            {"name": "vLLM: step through a generation", **start, "args": ["debug-engine", "${input:model}", "--debugger", "none"]},
            {
                "name": "vLLM: attach to `tokentape debug-engine --debugger debugpy`",
                **common,
                "request": "attach",
                "connect": {"host": "127.0.0.1", "port": port},
            },
            {
                "name": "vLLM: play a recorded engine run again",
                **start,
                "args": ["replay-batch", "--exact", "--engine-run", "${input:run}"],
                "env": dict(VARIABLES),
            },
        ],
        "inputs": [
            {"id": "model", "type": "promptString", "description": "Folder of the model"},
            {"id": "run", "type": "promptString", "description": "Engine run, as `tokentape engine-runs` lists it"},
        ],
    }


def debugged() -> bool:
    """Does a debugger watch this process already?"""
    return sys.gettrace() is not None or "pydevd" in sys.modules
