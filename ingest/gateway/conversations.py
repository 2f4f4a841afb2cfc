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
from schemas.requests.client import GeminiRequest, ResponsesRequest

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
        found = None
        for own, digest in self._digests(owner, request):
            if own:
                found = self._sessions.get(digest) or found
        return found

    def answered(self, owner: str, request: ClientRequest, answers: Iterable[Said], session: Session) -> None:
        """The session answered a request so: whoever goes on from there goes on with it."""
        opening = None
        for _, opening in self._digests(owner, request):  # noqa: B007  the last one counts
            pass
        if opening is None:
            return
        for said in answers:
            digest = _step(opening, _spoken(said.text, said.calls))
            known = self._sessions.setdefault(digest, session)
            self._sessions[digest] = session if known is session else None
            self._sessions.move_to_end(digest)
            while len(self._sessions) > ANSWERS_MAX:
                self._sessions.popitem(last=False)

    def _digests(self, owner: str, request: ClientRequest) -> Iterator[tuple[bool, bytes]]:
        """Whether each turn is an answer, and a digest of all up to and with it; of what is no conversation, nothing."""
        turns = _turns(request)
        if turns is None:
            return
        first = dump([owner, request.fields.get(_INSTRUCTIONS[request.FIELD])], sort_keys=True)
        digest = blake2b(first, key=self._key, digest_size=16).digest()
        for own, form in turns:
            digest = _step(digest, form)
            yield own, digest


_INSTRUCTIONS = {"messages": "system", "input": "instructions", "contents": "systemInstruction"}
"""The field that stands above a conversation, by the field that holds it."""


def _step(digest: bytes, form: bytes) -> bytes:
    return blake2b(digest + form, digest_size=16).digest()


def _turns(request: ClientRequest) -> Iterable[tuple[bool, bytes]] | None:
    """Each turn as it is compared, and whether it is an answer: of that only what it said, since clients send back less than they got."""
    if isinstance(request, GeminiRequest):
        return ((_role(content) == "model", _content(content)) for content in request.messages)
    if isinstance(request, ResponsesRequest):
        return _items(request.messages)
    if request.FIELD == "messages":
        return ((_role(message) == "assistant", _message(message)) for message in request.messages)
    return None


def _role(message: Any) -> str | None:
    return message.get("role") if isinstance(message, dict) else None


def _message(message: Any) -> bytes:
    """A message of OpenAI's chat completions or Anthropic's messages."""
    if _role(message) != "assistant":
        return dump(message, sort_keys=True)
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    parts = [part for part in parts if isinstance(part, dict)]
    used = [(str(part.get("name")), dump(part.get("input")).decode()) for part in parts if part.get("type") == "tool_use"]
    return _spoken(_texts(parts, "text"), [*_called(message.get("tool_calls")), *used])


def _content(content: Any) -> bytes:
    """A content of Gemini's; thoughts are left out."""
    if _role(content) != "model":
        return dump(content, sort_keys=True)
    parts = content.get("parts")
    parts = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    text = "".join(part["text"] for part in parts if isinstance(part.get("text"), str) and not part.get("thought"))
    called = [part["functionCall"] for part in parts if isinstance(part.get("functionCall"), dict)]
    return _spoken(text, [(str(call.get("name")), dump(call.get("args")).decode()) for call in called])


def _items(items: Iterable[Any]) -> Iterator[tuple[bool, bytes]]:
    """The items of OpenAI's responses: those that one answer was made of are one turn, its reasoning left out."""
    text, calls, own = "", list[tuple[str, str]](), False
    for item in items:
        kind = item.get("type", "message") if isinstance(item, dict) else "message"
        if kind in ("function_call", "reasoning") or (kind == "message" and _role(item) == "assistant"):
            own = True
            content = item.get("content")
            text += content if isinstance(content, str) else _texts(content, "output_text") if kind == "message" else ""
            calls += [(str(item.get("name")), str(item.get("arguments")))] if kind == "function_call" else []
            continue
        if own:
            yield True, _spoken(text, calls)
            text, calls, own = "", [], False
        yield False, dump(_plain(item), sort_keys=True)
    if own:
        yield True, _spoken(text, calls)


def _plain(item: Any) -> Any:
    """An input item whose text may stand alone, as content, or as a part of it: what a client sends back is written out."""
    if isinstance(item, str):
        return ["user", item]
    content = item.get("content") if isinstance(item, dict) and item.get("type", "message") == "message" else None
    if isinstance(content, str):
        return [item.get("role"), content]
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict) and content[0].get("type") == "input_text":
        return [item.get("role"), content[0].get("text")]
    return item


def _texts(parts: Any, kind: str) -> str:
    found = [part for part in parts if isinstance(part, dict) and part.get("type") == kind] if isinstance(parts, list) else []
    return "".join(part["text"] for part in found if isinstance(part.get("text"), str))


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
