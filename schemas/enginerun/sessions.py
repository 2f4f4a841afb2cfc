"""Where the events of an engine run stand."""

from __future__ import annotations

import hashlib

ENDED, CUT_OFF = "engine ended", "engine was cut off"
"""Reasons with which the sessions of a run are closed: it said that it ends or had no more work, or nothing more came of it."""


def steps_session(engine_run: bytes) -> bytes:
    """The platform session of a run's steps; its requests and tokens are in the session whose id is the run's own."""
    return hashlib.sha256(b"tokentape engine steps" + engine_run).digest()[:16]


def kv_session(engine_id: str) -> bytes:
    """The session of an engine's KV operations: all its processes know `kv_transfer_config.engine_id`, which vLLM makes anew each start."""
    return hashlib.sha256(b"tokentape kv operations" + engine_id.encode()).digest()[:16]
