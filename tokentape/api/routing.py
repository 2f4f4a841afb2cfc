"""What a route is: its path, who may ask, what it takes and gives. The OpenAPI document and the tests read the same table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from ingest.gateway.bodies import OBJECT, Schema
from ingest.gateway.keys import Role
from tokentape.api.access import Principal

if TYPE_CHECKING:
    from tokentape.api.desk import Desks

PREFIX = "/api/v1"


class Taken(BaseModel):
    """Base of what a route takes, in its query or its body; unknown names are refused so that a typo is never silent."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Nothing(Taken):
    """A route that takes nothing."""


@dataclass
class Call:
    """One request on its way: `rows` is what the tape will say that was looked at."""

    desks: Desks
    principal: Principal
    ids: Mapping[str, str]
    query: Any
    body: Any
    headers: Mapping[str, str]
    rows: int | None = None


@dataclass(frozen=True)
class Reply:
    """An answer: `document` is sent as JSON."""

    document: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[Call], Reply | Response]


@dataclass(frozen=True)
class Route:
    """One operation. `content` says that it shows or changes what people said, so each call is an `access_logged` event.

    `writes` makes an `Idempotency-Key` count. `reads` are readers of bodies by their media type, where those are no documents of ours.
    """

    method: str
    path: str
    name: str
    summary: str
    roles: frozenset[Role]
    handle: Handler
    query: type[Taken] = Nothing
    body: type[Taken] | None = None
    reads: Mapping[str, Callable[[bytes], Any]] = field(default_factory=dict)
    answer: Schema = field(default_factory=lambda: OBJECT)
    status: int = 200
    content: bool = False
    media: tuple[str, ...] = ("application/json",)

    @property
    def writes(self) -> bool:
        """Whether it changes anything."""
        return self.method != "GET" and self.name not in ("sql", "preview_erasure")
