"""A worker of batches without a gateway before it: the same parts, and no port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import uvloop

from ingest.gateway.app import GRACE_S, create_app
from ingest.gateway.tape import Recording
from schemas.settings import Settings

_LOOK_S = 0.1


def work(
    settings: Settings, recorder: Recording, stop: threading.Event, *, ready: Callable[[], object] | None = None, grace_s: float = GRACE_S
) -> None:
    """Work on batches until `stop` is set; what is under way then may end, and is recorded.

    Raises:
        LogUnavailable: the control log does not answer.
        StorageFull: the data directory cannot be written.
    """
    gateway = create_app(settings, recorder)

    async def run() -> None:
        await gateway.open()
        if ready:
            ready()
        while not stop.is_set():  # noqa: ASYNC110  signals set it, in no loop
            await asyncio.sleep(_LOOK_S)
        await gateway.drain(grace_s)
        await gateway.shut()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())
    finally:
        gateway.close()
