"""The API as a server, in a process of its own: a query or a fold never takes the interpreter from a stream of tokens."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import uvicorn
import uvloop
from starlette.applications import Starlette

from ingest.gateway.app import listen, url_of
from ingest.gateway.keys import Keyring
from store.control import ControlView, open_control
from store.directory import SessionDirectory
from tokentape.api.access import Gate
from tokentape.api.app import make_app
from tokentape.api.desk import Desks
from tokentape.api.work import Works
from tokentape.installation import Installation

_GRACE_S = 3
"""Streams that are followed have no end of their own."""


@contextlib.contextmanager
def opened(installation: Installation) -> Iterator[Desks]:
    """The parts of the API over an installation.

    Raises:
        LogUnavailable: the control log does not answer.
    """
    settings = installation.settings
    with ExitStack() as stack:
        control = open_control(settings)
        stack.callback(control.close)
        shared = ControlView(control)
        stack.callback(shared.close)
        keyring = Keyring(shared, required=settings.gateway.auth == "required")
        directory = SessionDirectory(settings, installation.catalog)
        stack.callback(directory.close)
        directory.follow()
        works = Works()
        stack.callback(works.close)
        gate = Gate(settings, keyring, directory)
        desks = Desks(installation, control, directory, gate, works, installation.runs)
        stack.callback(desks.close)
        yield desks


def serve(
    installation: Installation, stop: threading.Event, *, ready: Callable[[str], AbstractContextManager[Any] | None] | None = None
) -> None:
    """Serve until `stop` is set. `ready` is called with the base URL; a context manager that it returns is left at the end.

    Raises:
        ConflictError: the port is in use.
        SettingsError: there is no such address.
        LogUnavailable: the control log does not answer.
    """
    settings = installation.settings
    listener = listen(settings.api.host, settings.api_port, section="api")
    with ExitStack() as stack:
        stack.callback(listener.close)
        desks = stack.enter_context(opened(installation))

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            stopping = asyncio.create_task(_stopped(stop, server))
            context = ready(url_of(listener)) if ready else None
            if context is not None:
                stack.enter_context(context)
            yield
            stopping.cancel()

        config = uvicorn.Config(
            make_app(desks, lifespan),
            loop="none",
            http="httptools",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        server = _Server(config)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve(sockets=[listener]))


class _Server(uvicorn.Server):
    """Uvicorn whose signals are the caller's: they set the event."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing is captured."""
        yield


async def _stopped(stop: threading.Event, server: uvicorn.Server) -> None:
    while not stop.is_set():  # noqa: ASYNC110  another thread, or a signal handler, sets it
        await asyncio.sleep(0.1)
    server.should_exit = True
