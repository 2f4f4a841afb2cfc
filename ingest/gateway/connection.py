"""A client's connection with limits: on the time that the head of a request may take, and on how many connections are open.

Uvicorn waits for a head as long as it takes, so that one that comes a byte at a time would hold its connection for ever.
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ingest.gateway.errors import error_body

RETRY_S = 1
"""After what time a client that found every connection taken may come back."""


class Connection(HttpToolsProtocol):
    """One connection. The body's time is limited where it is read, in `Exchange.body`."""

    connections_max: int
    head_timeout_s: float
    _timer: TimerHandle | None = None
    _begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or refuse it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.connections_max:
            body = error_body(f"All {self.connections_max} connections are taken.", "server_error", "overloaded")
            return self._refuse(b"503 Service Unavailable", body, b"retry-after: %d\r\n" % RETRY_S)
        return self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the timer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Something came; only a head that is not complete with it needs a clock."""
        super().data_received(data)
        if self._begun and self._timer is None:
            self._wait()

    def on_message_begin(self) -> None:
        """The first byte of a head."""
        super().on_message_begin()
        self._begun = True

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._begun = False
        self._stop_waiting()
        super().on_headers_complete()

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout_s, self._overdue)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _overdue(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return self._wait()  # the answer to the request before this one is not to be cut
        if not self._begun:
            return self.transport.close()
        message = f"The head of the request was not complete after {self.head_timeout_s:g} s."
        return self._refuse(b"408 Request Timeout", error_body(message, "invalid_request_error", "invalid_request"))

    def _refuse(self, status: bytes, body: bytes, headers: bytes = b"") -> None:
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
        self.transport.write(b"HTTP/1.1 " + status + b"\r\n" + headers + head + b"\r\n" + body)
        self.transport.close()


def limited(connections_max: int, head_timeout_s: float) -> type[asyncio.Protocol]:
    """The protocol of a server whose connections have these limits."""
    return type("LimitedConnection", (Connection,), {"connections_max": connections_max, "head_timeout_s": head_timeout_s})
