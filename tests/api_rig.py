"""The API in a thread over a tape, keys for people with roles, and a client that checks what every answer must be."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from ingest.gateway.keys import KIND, make
from schemas.codec import encode
from schemas.events import Event
from schemas.settings import Settings
from store.control import ControlLog, open_control
from store.log import open_log
from store.log.base import Entry, partition_of
from tests.program import until
from tokentape.api.server import serve
from tokentape.installation import Installation

DEADLINE_S = 60.0


def put(settings: Settings, events: Sequence[Event]) -> None:
    """Append events as their producer would."""
    log = open_log(settings.log, settings.data)
    try:
        log.append([Entry(partition_of(event.session_id, log.partitions), event.session_id, encode(event)) for event in events])
    finally:
        log.close()


class Api:
    """A running API; `token` is sent with every request."""

    def __init__(self, url: str, control: ControlLog, token: str | None = None) -> None:
        self.url = url
        self._control = control
        self._token = token

    def by(self, *roles: str, owner: str = "ann", tenant: str = "default", **fields: Any) -> Api:
        """The same for somebody with a key of these roles."""
        token, key = make(owner=owner, tenant=tenant, roles=roles, models=(), **fields)
        self._control.append(KIND, key.key_id, key.model_dump(mode="json"))
        return self.with_token(token)

    def with_token(self, token: str | None) -> Api:
        """The same with another token."""
        return Api(self.url, self._control, token)

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {} if self._token is None else {"authorization": f"Bearer {self._token}"}

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """One request; whatever the answer, it is no 500, and a problem is one as RFC 9457 has it."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        given: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
        url = path if path.startswith("http") else f"{self.url}/api/v1/{path}"
        answer = httpx.request(method, url, headers={**self.headers, **named}, timeout=DEADLINE_S, **given)

        assert answer.status_code != 500, answer.text
        if answer.status_code >= 400:
            problem = answer.json()
            assert answer.headers["content-type"] == "application/problem+json"
            assert problem.keys() >= {"type", "title", "status", "detail", "instance"}
            assert problem["status"] == answer.status_code
        return answer

    def __call__(self, method: str, path: str, body: Any = None, *, status: int = 200, **headers: str) -> Any:
        """The JSON of an answer with this status."""
        answer = self.send(method, path, body, **headers)

        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    def job(self, begun: dict[str, Any]) -> dict[str, Any]:
        """A job once it has ended."""

        def ended() -> dict[str, Any] | None:
            found: dict[str, Any] = self("GET", f"jobs/{begun['job']}")
            return found if found["ended_at"] is not None else None

        return until(ended, DEADLINE_S)


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[Api]:
    """The API over an installation, in a thread, and nothing else."""
    stop, started, urls = threading.Event(), threading.Event(), list[str]()
    failures: list[BaseException] = []

    def ready(url: str) -> None:
        urls.append(url)
        started.set()

    def run() -> None:
        try:
            with Installation(settings) as installation:
                serve(installation, stop, ready=ready)
        except BaseException as error:
            failures.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run, name="api")
    thread.start()
    control = open_control(settings)
    try:
        assert started.wait(DEADLINE_S)
        assert failures == []
        yield Api(urls[0], control)
    finally:
        stop.set()
        thread.join(DEADLINE_S)
        control.close()
    assert not thread.is_alive()
    assert failures == []
