"""Virtual keys: who may come in at the gateway, what for, and how much; kept in the control log, where every worker follows them.

A token is `tt-` + the key's id + a secret of 256 bits. Only its SHA-256 is kept: a secret of that entropy cannot be guessed back, so
neither salt nor a slow hash would add anything. What a worker last read of the keys holds while the control log is away; keys made
meanwhile wait (503) until it is back.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args
from urllib.parse import parse_qs, unquote_plus

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ingest.gateway import errors
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Exchange
from ingest.gateway.headers import authorization_of
from schemas import clock
from store.control import ControlRecord, ControlView

log = structlog.get_logger(__name__)

Role = Literal["reader", "analyst", "debugger", "custodian", "admin"]

ROLES: tuple[Role, ...] = get_args(Role)

KIND = "key"
"""Of facts in the control log; their key is the key's id."""

TOKEN = re.compile(r"tt-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")

NEW_KEY_WAIT_S = 0.5
"""How long a key that is not known yet is waited for: it may have been made a moment ago."""

_LOOK_S = 0.02
_SWEEP_S = 0.25

# Where clients of OpenAI, Azure, Anthropic and Gemini put their key.
_HEADERS = ("authorization", "api-key", "x-api-key", "x-goog-api-key")
_NAMES = frozenset(name.encode() for name in _HEADERS)


class VirtualKey(BaseModel):
    """A key as it is kept: everything but the token. Times are seconds since the epoch, limits None where there are none."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    key_id: str
    digest: str
    owner: str = Field(min_length=1)
    tenant: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    roles: tuple[Role, ...] = ()
    models: tuple[str, ...] = ("*",)
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    budget_tokens: int | None = Field(default=None, ge=1)
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def state(self, now: float) -> Literal["active", "expired", "revoked"]:
        """Whether the key opens anything."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and now >= self.expires_at else "active"

    def allows(self, model: str) -> bool:
        """Whether its owner may ask for a model."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def has(self, role: Role) -> bool:
        """Whether it carries a role; an admin carries all."""
        return role in self.roles or "admin" in self.roles


def make(**fields: object) -> tuple[str, VirtualKey]:
    """A new token and its key; the token cannot be had again.

    Raises:
        ValidationError: a field is not valid.
    """
    number = secrets.token_hex(6)
    token = f"tt-{number}-{secrets.token_urlsafe(32)}"
    return token, VirtualKey.model_validate({"key_id": f"key-{number}", "digest": _digest(token), "created_at": clock.now_s(), **fields})


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True)
class Caller:
    """Who sent a request: `key` where a valid virtual key did, `refusal` where one was needed and not given."""

    key: VirtualKey | None = None
    credential: str | None = None  # as the client sent it; never recorded
    authorization: str | None = None  # the client's own Authorization header, where it is the upstream's to judge
    refusal: Failure | None = None


class Keyring:
    """The keys as one worker knows them, and the requests that are open under each."""

    def __init__(self, shared: ControlView, *, required: bool) -> None:
        self._shared = shared
        self._required = required
        self._keys: dict[str, VirtualKey] = {}
        self._open: defaultdict[str, set[Exchange]] = defaultdict(set)
        self._sweeping: asyncio.Task[None] | None = None
        shared.listen(self._heard)

    def open(self) -> None:
        """Begin to end what is open under keys that are no longer valid; call in the loop that serves."""
        if self._required:
            self._sweeping = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Stop."""
        if self._sweeping:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)

    def _heard(self, record: ControlRecord) -> None:
        """A fact of the control log; called in the following thread."""
        if record.kind != KIND:
            return
        if record.value is None:
            self._keys.pop(record.key, None)
            return
        try:
            self._keys[record.key] = VirtualKey.model_validate(record.value)
        except ValidationError as error:
            self._keys.pop(record.key, None)
            log.error("key not readable, so it opens nothing", key=record.key, error=str(error.errors()[0]["msg"]))

    async def caller(self, exchange: Exchange) -> Caller:
        """Who sent this request. A virtual key is taken out of what could go upstream."""
        credential = _credential(exchange)
        virtual = credential is not None and credential.startswith("tt-")
        authorization = None if virtual else authorization_of(exchange)
        _strip_query(exchange)
        if self._required or virtual:
            _strip(exchange)
        if not self._required:
            return Caller(None, credential, authorization)
        try:
            return Caller(await self.key_of(credential), credential)
        except Failure as failure:
            return Caller(None, credential, refusal=failure)

    def holder(self, key_id: str | None) -> Caller:
        """Who submitted batch work under a key, as the key is now; None is nobody's."""
        if not self._required:
            return Caller()
        key = self._keys.get(key_id or "")
        if key is None or key.state(clock.now_s()) != "active":
            state = key.state(clock.now_s()) if key else "unknown" if key_id else "needed, and the work came without one"
            return Caller(refusal=_unknown(f"The key of this batch is {state}."))
        return Caller(key)

    async def require(self, exchange: Exchange, role: Role) -> VirtualKey:
        """The caller's key, which carries this role.

        Raises:
            Failure: no valid key (401), or not with this role (403).
        """
        key = await self.key_of(_credential(exchange))
        if not key.has(role):
            held = ", ".join(key.roles) or "none"
            raise Failure(errors.FORBIDDEN, f"This needs a key with the role {role}; this key has {held}.")
        return key

    async def key_of(self, credential: str | None) -> VirtualKey:
        """The key whose token this is.

        Raises:
            Failure: there is none that is valid now (401), or it cannot be read now (503).
        """
        if not credential:
            raise _unknown("A key is needed: send it as 'Authorization: Bearer tt-…'.")
        found = TOKEN.fullmatch(credential)
        key = await self._look(f"key-{found[1]}") if found else None
        expected = key.digest if key else _digest("")
        if not hmac.compare_digest(_digest(credential), expected) or key is None:
            raise _unknown("This key is not known here.")
        if (state := key.state(clock.now_s())) != "active":
            raise _unknown(f"This key is {state}.")
        return key

    async def _look(self, key_id: str) -> VirtualKey | None:
        deadline = time.monotonic() + NEW_KEY_WAIT_S
        while (key := self._keys.get(key_id)) is None and time.monotonic() < deadline:
            if self._shared.away:
                message = "This key is not known yet, and new keys cannot be read now."
                raise Failure(errors.KEYS_AWAY, message, retry_after_s=5)
            await asyncio.sleep(_LOOK_S)
        return key

    def enter(self, key: VirtualKey, exchange: Exchange) -> None:
        """A request of this key is open now."""
        self._open[key.key_id].add(exchange)

    def leave(self, key: VirtualKey, exchange: Exchange) -> None:
        """It is over."""
        self._open[key.key_id].discard(exchange)
        if not self._open[key.key_id]:
            del self._open[key.key_id]

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = clock.now_s()
            for key_id, exchanges in list(self._open.items()):
                key = self._keys.get(key_id)
                state = key.state(now) if key else "revoked"
                if state != "active":
                    for exchange in list(exchanges):
                        exchange.abort(_unknown(f"This key was {state} while the answer was under way."))


def _unknown(message: str) -> Failure:
    return Failure(errors.UNKNOWN_KEY, message)


def _credential(exchange: Exchange) -> str | None:
    """What the client sent as its key, wherever its provider's clients put it."""
    for name in _HEADERS:
        token = (exchange.header(name) or "").strip().rpartition(" ")[2]
        if token and token.lower() != "bearer":
            return token
    named = parse_qs(exchange.scope["query_string"].decode("latin-1")).get("key")
    return named[0] if named else None


def _strip(exchange: Exchange) -> None:
    """Take every credential out of the headers that could go upstream."""
    exchange.scope["headers"] = [(name, value) for name, value in exchange.scope["headers"] if name not in _NAMES]


def _strip_query(exchange: Exchange) -> None:
    """Take a key out of the query, whoever's it is: addresses end up in logs. Upstreams are told keys in headers."""
    parts = exchange.scope["query_string"].split(b"&")
    kept = [part for part in parts if unquote_plus(part.partition(b"=")[0].decode("latin-1")) != "key"]
    exchange.scope["query_string"] = b"&".join(kept)
