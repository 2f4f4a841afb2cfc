"""Sessions of clients that name none: a request whose messages go on from an answer of ours joins the session of that answer.

Every answer is remembered by a digest of all messages before it and of what it said. The next turn of a chat brings both
back, so its session is found; two conversations that begin alike differ by their answers. Where they do not differ
(the same opening and word for word the same answer, in two sessions), nobody can tell whose turn it is, and a new session begins:
to have one conversation in two sessions is better than to have two people in one. The same holds for clients that shorten
or rewrite what was said. Kept in memory, for one key and one process: a restart, or another worker, begins a new session.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ingest.gateway.sessions import Session
from schemas.requests import ClientRequest, dump, load

ANSWERS_MAX = 10_000
"""Answers remembered; the oldest are forgotten first."""


@dataclass(frozen=True, slots=True)
class Said:
    """What one sequence of an answer said: its text, and name and arguments of each tool call."""

    text: str
    calls: tuple[tuple[str, str], ...] = ()


class Conversations:
    """The answers of one gateway process by what led to them. Digests are keyed: nothing here can be read back."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._sessions: OrderedDict[bytes, Session | None] = OrderedDict()

    def find(self, owner: str, request: ClientRequest) -> Session | None:
        """The session that a request goes on with; `owner` is the tenant and key that asks."""
        if request.FIELD != "messages":
            return None
        found = None
        for message, digest in zip(request.messages, self._digests(owner, request), strict=True):
            if _role(message) == "assistant":
                found = self._sessions.get(digest) or found
        return found

    def answered(self, owner: str, request: ClientRequest, answers: Iterable[Said], session: Session) -> None:
        """The session answered a request so: whoever goes on from there goes on with it."""
        if request.FIELD != "messages":
            return
        opening = self._start(owner, request)
        for opening in self._digests(owner, request):  # noqa: B007  the last one counts
            pass
        for said in answers:
            digest = _step(opening, _spoken(said.text, said.calls))
            known = self._sessions.setdefault(digest, session)
            self._sessions[digest] = session if known is session else None
            self._sessions.move_to_end(digest)
            while len(self._sessions) > ANSWERS_MAX:
                self._sessions.popitem(last=False)

    def _start(self, owner: str, request: ClientRequest) -> bytes:
        first = dump([owner, request.fields.get("system")], sort_keys=True)
        return blake2b(first, key=self._key, digest_size=16).digest()

    def _digests(self, owner: str, request: ClientRequest) -> Iterator[bytes]:
        """A digest of all up to and with each message."""
        digest = self._start(owner, request)
        for message in request.messages:
            digest = _step(digest, _form(message))
            yield digest


def _step(digest: bytes, form: bytes) -> bytes:
    return blake2b(digest + form, digest_size=16).digest()


def _role(message: Any) -> str | None:
    return message.get("role") if isinstance(message, dict) else None


def _form(message: Any) -> bytes:
    """A message as it is compared: of an assistant's only what it said, since clients send back less than they got."""
    if _role(message) != "assistant":
        return dump(message, sort_keys=True)
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    parts = [part for part in parts if isinstance(part, dict)]
    text = "".join(part["text"] for part in parts if part.get("type") == "text" and isinstance(part.get("text"), str))
    used = [(str(part.get("name")), dump(part.get("input")).decode()) for part in parts if part.get("type") == "tool_use"]
    return _spoken(text, [*_called(message.get("tool_calls")), *used])


def _called(calls: Any) -> Iterator[tuple[str, str]]:
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            yield str(function.get("name")), str(function.get("arguments"))


def _spoken(text: str, calls: Iterable[tuple[str, str]]) -> bytes:
    return dump([text.strip(), [[name, _arguments(arguments)] for name, arguments in calls]], sort_keys=True)


def _arguments(text: str) -> Any:
    try:
        return load(text.encode("utf-8", "surrogatepass"))
    except ValueError:
        return text
