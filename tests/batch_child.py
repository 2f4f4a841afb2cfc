"""A worker of batches in a process of its own, to be killed: `python -m tests.batch_child SETTINGS_JSON` says when it is ready."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

from ingest.gateway.batch.alone import work
from ingest.recorder import Recorder
from schemas.settings import Settings
from store.log import open_log

if __name__ == "__main__":
    given: dict[str, Any] = json.loads(sys.argv[1])
    settings = Settings.model_validate(given)
    recorder = Recorder(open_log(settings.log, settings.data), settings.recorder, source="gateway")
    work(settings, recorder, threading.Event(), ready=lambda: print("ready", flush=True))  # noqa: T201  # the test reads it
