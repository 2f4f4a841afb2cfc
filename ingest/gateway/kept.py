"""The responses that a later request may go on from (`previous_response_id`), as this process remembers them.

They are on the tape in any case, unless their client said `store: false`; here they are found without reading it. Kept in
memory, for the key that asked and up to a bound: a response that is forgotten, or that another worker gave, is answered with 404.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ingest.gateway import errors
from ingest.gateway.errors import Failure
from ingest.gateway.sessions import Session
from schemas.requests import dump, load, text_of
from schemas.requests.client import ResponsesRequest

KEPT_MAX = 1000
"""Responses remembered; the oldest are forgotten first."""

KEPT_BYTES_MAX = 64 << 20
"""The bytes of all that is remembered, histories included."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response and all that led to it, as JSON."""

    owner: str
    session: Session
    items: bytes
    """Input and output of the whole conversation: what stands before the next input."""
    document: bytes


class Kept:
    """The responses of one gateway process."""

    def __init__(self, count_max: int = KEPT_MAX, bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._responses: OrderedDict[str, Response] = OrderedDict()
        self._count_max, self._bytes_max = count_max, bytes_max
        self._bytes = 0

    def keep(self, owner: str, session: Session, items: list[Any], document: dict[str, Any]) -> None:
        """Remember a response."""
        response = Response(owner, session, dump(items), dump(document))
        self._responses[document["id"]] = response
        self._bytes += _size(response)
        while self._responses and (len(self._responses) > self._count_max or self._bytes > self._bytes_max):
            self._bytes -= _size(self._responses.popitem(last=False)[1])

    def find(self, name: str, owner: str) -> Response:
        """A response of this owner's.

        Raises:
            Failure: it is not known.
        """
        found = self._responses.get(name)
        if found is None or found.owner != owner:
            message = f"Previous response with id {name[:200]!r} not found: it is not kept (store: false), forgotten, or another worker's."
            raise Failure(errors.NO_RESPONSE, message, param="previous_response_id")
        self._responses.move_to_end(name)
        return found

    def forget(self, name: str, owner: str) -> None:
        """Let go of a response.

        Raises:
            Failure: it is not known.
        """
        self._bytes -= _size(self.find(name, owner))
        del self._responses[name]


def history(response: Response) -> list[Any]:
    """The items before the next input."""
    items: list[Any] = load(response.items)
    return items


def continued(
    kept: Kept, owner: str, request: ResponsesRequest, session: Callable[[], Session]
) -> tuple[ResponsesRequest, Response | None]:
    """The request with what was said before in front of its own input, and the response that it goes on from.

    Raises:
        Failure: that response is not known.
    """
    fields = dict(request.fields)
    name = fields.pop("previous_response_id", None)
    items = [{"role": "user", "content": item} if isinstance(item, str) else item for item in request.messages]
    earlier = kept.find(str(name), owner) if name is not None else None
    if earlier is not None:
        items = [*history(earlier), *items]
        fields["input"] = items
    stored = fields.get("store") is not False

    def keep(document: dict[str, Any]) -> None:
        if stored:
            kept.keep(owner, session(), [*items, *document["output"]], document)

    messages = request.messages if earlier is None else items
    return ResponsesRequest(request.body, fields, messages, previous=text_of(name), keep=keep), earlier


def _size(response: Response) -> int:
    return len(response.items) + len(response.document)


def owner_of(tenant: str, key_id: str | None, address: str | None) -> str:
    """Who may go on from a response: whoever has the key, or where nobody sent one, the address."""
    return f"{tenant}\n{key_id or address or ''}"
