"""Workers and submitters in processes of their own, to be killed.

`python -m tests.batch_child` imports once and forks one for each line on its standard input, a JSON object with the settings and,
for a submitter, the path of its file. A worker says that it is ready, a submitter the id of its batch; each with its process id.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from ingest.gateway.batch.alone import work
from ingest.recorder import Recorder
from schemas.settings import Settings
from store.control import ControlView, open_control
from store.log import open_log
from store.work import WorkLogs
from tests.batch_case import desk_of, submit_at

_SAID = os.dup(1)
"""Where the test reads; what is logged goes elsewhere."""


def _work(settings: Settings) -> None:
    recorder = Recorder(open_log(settings.log, settings.data), settings.recorder, source="gateway")
    work(settings, recorder, threading.Event(), ready=lambda: _say("ready"))


def _submit(settings: Settings, path: Path) -> None:
    control = open_control(settings)
    _say(submit_at(desk_of(settings, control, ControlView(control), WorkLogs(settings)), path).batch_id)


def _say(what: str) -> None:
    os.write(_SAID, f"{os.getpid()} {what}\n".encode())


def _child(given: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    settings = Settings.model_validate(given["settings"])
    _submit(settings, Path(given["path"])) if given["path"] else _work(settings)


if __name__ == "__main__":
    os.dup2(2, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how they ended
    _say("ready")
    for line in sys.stdin:
        if not (pid := os.fork()):
            try:
                _child(json.loads(line))
            finally:
                os._exit(0)
        os.write(_SAID, f"{pid} begun\n".encode())
