"""Who may ask for what: admission by key, token or from this machine, and whose sessions somebody sees. There is no other gate."""

from __future__ import annotations

import hmac
import uuid
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from ingest.gateway.errors import Failure
from ingest.gateway.keys import ROLES, Keyring, Role
from ingest.gateway.local import from_here
from ingest.gateway.problems import Problem
from schemas.errors import UnknownSession
from schemas.settings import Settings
from store.directory import SessionDirectory, Viewer

NAME_CHARACTERS_MAX = 200

CONTENT: frozenset[Role] = frozenset({"reader", "analyst", "debugger"})
"""Who reads what was said."""
ANYBODY: frozenset[Role] = frozenset(ROLES)
"""Who may come in at all."""

_KEYLESS: tuple[Role, ...] = ("reader", "analyst", "debugger")
"""Where no keys are asked for; acts of custody are signed with a name, so they need one even then."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. `name` is recorded as the actor; `owner` is the key's, None without one; `tenant` None is not bound to one."""

    name: str
    roles: tuple[Role, ...]
    tenant: str | None = None
    owner: str | None = None

    @property
    def viewer(self) -> Viewer:
        """What of the sessions this is shown."""
        return Viewer(self.tenant, tuple(dict.fromkeys(name for name in (self.name, self.owner) if name)))

    def may(self, roles: frozenset[Role]) -> bool:
        """Whether one of these roles is held; an admin holds all."""
        return "admin" in self.roles or not roles.isdisjoint(self.roles)

    def bound(self, tenant: str | None) -> str | None:
        """The tenant that an act is about: the principal's own where it is bound to one.

        Raises:
            Problem: another one's.
        """
        if self.tenant is not None and tenant not in (None, self.tenant):
            raise Problem(403, f"this key is of tenant {self.tenant}", "leave the tenant out, or use a key of an admin")
        return tenant if self.tenant is None else self.tenant


class Gate:
    """Lets people in, and finds sessions for them."""

    def __init__(self, settings: Settings, keyring: Keyring, directory: SessionDirectory) -> None:
        self._settings = settings
        self._keyring = keyring
        self._directory = directory

    async def admit(self, request: Request, roles: frozenset[Role]) -> Principal:
        """Who asks, if that is somebody with one of these roles.

        Raises:
            Problem: nobody we know (401), not from this machine or without the role (403), keys cannot be read now (503).
        """
        principal = await self._principal(request)
        if not principal.may(roles):
            held, needed = ", ".join(principal.roles) or "none", " or ".join(role for role in ROLES if role in roles) or "admin"
            raise Problem(403, f"this needs the role {needed}; this caller has {held}", "use a key that was made with --role")
        return principal

    async def _principal(self, request: Request) -> Principal:
        scheme, _, given = request.headers.get("authorization", "").strip().partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        token = self._settings.debug.token
        named = f"api:{(request.headers.get('x-tokentape-user') or 'somebody')[:NAME_CHARACTERS_MAX]}"
        if token is not None and hmac.compare_digest(given.encode(), token.get_secret_value().encode()):
            return Principal(named, _KEYLESS)
        if given or self._settings.gateway.auth == "required":
            return await self._of_key(given)
        if token is not None:
            raise Problem(401, "this needs a token", "send Authorization: Bearer with a key, or with the value of debug.token")
        if request.headers.get("sec-fetch-site") == "cross-site" or not _from_here(request):
            raise Problem(403, "without a key only this machine may ask", "make one with `tokentape keys create --role reader`")
        return Principal(named, _KEYLESS)

    async def _of_key(self, given: str) -> Principal:
        try:
            key = await self._keyring.key_of(given or None)
        except Failure as failure:
            hint = "make one with `tokentape keys create --role reader`" if failure.status == 401 else "try again"
            raise Problem(failure.status, failure.message, hint) from failure
        return Principal(f"key:{key.owner}", key.roles, None if "admin" in key.roles else key.tenant, key.owner)

    def held(self, principal: Principal, text: str) -> bytes:
        """A session that this custodian may act on: one of the own tenant, private or not; its id.

        Raises:
            UnknownSession: there is none, or it is another tenant's.
        """
        session_id = _id(text)
        row = self._directory.session(Viewer(), session_id)
        if row is None or principal.tenant not in (None, row["tenant"]):
            raise _unknown(text)
        return session_id

    def session(self, principal: Principal, text: str) -> tuple[bytes, dict[str, Any]]:
        """A session that this caller may see: its id and its row of the directory.

        Raises:
            UnknownSession: there is none, or it is not for this caller: which of both is not told.
        """
        session_id = _id(text)
        row = self._directory.session(principal.viewer, session_id)
        if row is None:
            raise _unknown(text)
        return session_id, row


def _id(text: str) -> bytes:
    try:
        return uuid.UUID(text).bytes
    except ValueError:
        raise _unknown(text) from None


def _unknown(text: str) -> UnknownSession:
    return UnknownSession(f"no session {text[:40]!r}", operation="find session", hint="GET /api/v1/debug-sessions lists them")


def _from_here(request: Request) -> bool:
    return from_here(request.headers.get, request.client.host if request.client else None)
