"""A TCP proxy on localhost that swallows the reply to one request and hangs up, cuts replies off, or falls silent in the middle of one."""

from __future__ import annotations

import contextlib
import socket
import threading


class Proxy:
    """Forwards connections to `upstream` ("host:port") until its reply to a chosen request is to be lost.

    `sent` counts bytes that went to clients. `cut_after` of them in one connection it hangs up, `cuts` times; `silent_after` of
    them in all nothing more comes.
    """

    def __init__(self, upstream: str) -> None:
        host, port = upstream.rsplit(":", 1)
        self._upstream = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.drop_next_reply_to = b""
        self.dropped = 0
        self._swallow = False
        self.sent = 0
        self.cuts, self.cut_after = 0, 0
        self.silent_after: int | None = None

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream) as server, contextlib.suppress(OSError):  # a client that was killed
            threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
            passed = 0
            while data := _receive(server):
                if self.silent_after is not None and self.sent >= self.silent_after:
                    continue
                if self.cuts and passed + len(data) > self.cut_after:
                    self.cuts -= 1
                    client.sendall(data[: self.cut_after - passed])
                    client.shutdown(socket.SHUT_RDWR)
                    return
                passed += len(data)
                self.sent += len(data)
                if self._swallow:
                    self._swallow, self.dropped = False, self.dropped + 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        while data := _receive(client):
            if self.drop_next_reply_to and data.startswith(self.drop_next_reply_to):
                self.drop_next_reply_to, self._swallow = b"", True
            try:
                server.sendall(data)
            except OSError:
                return


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65_536)
    except OSError:
        return b""
