"""As much of the Debug Adapter Protocol as an editor needs to attach, step and let go."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

DEADLINE_S = 120.0


class Editor:
    """A client of debugpy. Every wait has a deadline, so that a deadlock in what is debugged is a failure."""

    def __init__(self, port: int, deadline_s: float = DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._socket = self._connected(port)
        self._file = self._socket.makefile("rb")
        self._sent = 0
        self._events: list[dict[str, Any]] = []

    def _connected(self, port: int) -> socket.socket:
        deadline = time.monotonic() + self._deadline_s
        while True:
            try:
                return socket.create_connection(("127.0.0.1", port), self._deadline_s)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()

    def attach(self) -> None:
        """Attach; other threads stand still while one is stepped, the case in which a held lock is a deadlock."""
        self.ask("initialize", adapterID="debugpy", linesStartAt1=True, columnsStartAt1=True, pathFormat="path")
        later = self._send("attach", justMyCode=False, subProcess=False, steppingResumesAllThreads=False)
        self.event("initialized")
        self.ask("configurationDone")
        self._answer(later)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The body of the answer to a request."""
        return self._answer(self._send(command, **arguments))

    def event(self, name: str) -> dict[str, Any]:
        """The next event of a name."""
        return self._until(lambda message: message["type"] == "event" and message["event"] == name)

    def step(self, kind: str, thread: int) -> dict[str, Any]:
        """One `stepIn`, `next` or `stepOut`; where it came to stand."""
        self.ask(kind, threadId=thread)
        self.event("stopped")
        return self.top(thread)

    def top(self, thread: int) -> dict[str, Any]:
        """The innermost frame."""
        frame: dict[str, Any] = self.ask("stackTrace", threadId=thread, startFrame=0, levels=1)["body"]["stackFrames"][0]
        return frame

    def _send(self, command: str, **arguments: Any) -> int:
        self._sent += 1
        body = json.dumps({"seq": self._sent, "type": "request", "command": command, "arguments": arguments}).encode()
        self._socket.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        return self._sent

    def _answer(self, number: int) -> dict[str, Any]:
        found = self._until(lambda message: message["type"] == "response" and message["request_seq"] == number)
        assert found["success"], found
        return found

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        for i, kept in enumerate(self._events):
            if wanted(kept):
                return self._events.pop(i)
        while True:
            message = self._read()
            if wanted(message):
                return message
            self._events.append(message)

    def _read(self) -> dict[str, Any]:
        size = 0
        while line := self._file.readline().strip():
            size = int(line.split(b":")[1])
        if not size:
            raise EOFError("the debugger hung up")
        message: dict[str, Any] = json.loads(self._file.read(size))
        return message
