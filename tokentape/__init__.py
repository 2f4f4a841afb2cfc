"""The face of tokentape: command line, settings loading, services, and the Python API, which is what this module names.

`connect` opens an installation for a notebook; `Recorder`, `SessionContext`, `events` and `new_id` are for events of one's own, and
`tokentape.langchain` records what a LangChain program asks. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingest.recorder import Recorder
    from schemas import events
    from schemas.errors import TokentapeError
    from schemas.sink import SessionContext, new_id
    from tokentape.connection import Connection, connect

__version__ = "0.1.0"

__all__ = ["Connection", "Recorder", "SessionContext", "TokentapeError", "__version__", "connect", "events", "new_id"]

_HOMES = {
    "Connection": "tokentape.connection",
    "connect": "tokentape.connection",
    "Recorder": "ingest.recorder",
    "SessionContext": "schemas.sink",
    "new_id": "schemas.sink",
    "TokentapeError": "schemas.errors",
    "events": "schemas",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tokentape' has no attribute {name!r}")
    home = importlib.import_module("schemas.events") if name == "events" else getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = home
    return home


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
