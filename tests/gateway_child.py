"""A gateway in a process of its own, to be killed: `python -m tests.gateway_child DATA UPSTREAM [LOG [AUTH]]` prints its URL."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from ingest.gateway import serve
from ingest.recorder import Recorder
from schemas.settings import GatewaySettings, LogSettings, RecorderSettings, Settings
from store.log import open_log

if __name__ == "__main__":
    settings = Settings(
        data=Path(sys.argv[1]),
        gateway=GatewaySettings.model_validate({"port": 0, "upstream": sys.argv[2], "auth": sys.argv[4] if sys.argv[4:] else "off"}),
        recorder=RecorderSettings(mode="strict"),
        log=LogSettings.model_validate_json(sys.argv[3] if len(sys.argv) > 3 else "{}"),
    )
    recorder = Recorder(open_log(settings.log, settings.data), settings.recorder, source="gateway")
    serve(settings, recorder, threading.Event(), ready=lambda url: print(url, flush=True))  # noqa: T201  # the test reads it
