"""Which session a request belongs to, and what this process already recorded in each: bounded, least recently used go."""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field

from ingest.gateway import errors
from ingest.gateway.errors import Failure
from ingest.gateway.history import History
from schemas.settings import Settings
from schemas.sink import SessionContext, new_id
from store.keyfile import installation_key

SESSION_HEADER = "x-tokentape-session"
GENERATION_HEADER = "x-tokentape-generation"

SESSIONS_MAX = 10_000
"""Sessions remembered; one that comes back after being forgotten is opened again and stores its messages again."""

MESSAGES_MAX = 4096
"""Message ids remembered per session."""


@dataclass(slots=True)
class Session:
    """A session as this process knows it: which messages and environments it holds already."""

    context: SessionContext
    opened: bool = False
    environments: set[bytes] = field(default_factory=set)
    tags: set[str] = field(default_factory=set)
    history: History = field(default_factory=History)
    _messages: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    _name: str = ""
    _mac: hmac.HMAC | None = None  # keyed once; unlike `hmac.digest` it does not let other threads run before short texts

    @property
    def name(self) -> str:
        """The session id as people write it."""
        self._name = self._name or str(uuid.UUID(bytes=self.context.session_id))
        return self._name

    def digest(self, body: bytes) -> bytes:
        """HMAC-SHA256 of a body under the session's salt."""
        if self._mac is None:
            assert self.context.salt is not None
            self._mac = hmac.new(self.context.salt, digestmod="sha256")
        mac = self._mac.copy()
        mac.update(body)
        return mac.digest()

    def message_id(self, canonical: bytes) -> bytes:
        """The keyed digest of a message's canonical JSON, 16 bytes: the same text has another id in another session."""
        return self.digest(canonical)[:16]

    def first_seen(self, message_id: bytes) -> bool:
        """Whether the session does not hold this message yet; from now on it does."""
        if message_id in self._messages:
            self._messages.move_to_end(message_id)
            return False
        self._messages[message_id] = None
        if len(self._messages) > MESSAGES_MAX:
            self._messages.popitem(last=False)
        return True


class Sessions:
    """The sessions of one gateway process."""

    def __init__(self, settings: Settings) -> None:
        self._tenant = settings.tenant
        self._retention_class = settings.retention_class
        self._redaction = settings.redaction
        self._key = self.installation = installation_key(settings.data / "keys" / "gateway.key")
        self._sessions: OrderedDict[tuple[str, bytes], Session] = OrderedDict()

    def find(self, name: str | None, actor: str, tenant: str | None = None) -> Session:
        """The session of this name (a UUID), or a new one; `tenant` is the owner of the caller's key.

        Raises:
            Failure: the name is no UUID.
        """
        session_id = parse_session(name) if name else new_id()
        tenant = tenant or self._tenant
        session = self._sessions.get((tenant, session_id))
        if session is not None:
            self._sessions.move_to_end((tenant, session_id))
            return session
        content = self._redaction.of(tenant).content == "full"
        session = Session(SessionContext(session_id, tenant, "gateway", actor, self._retention_class, content=content))
        if name:  # a session without a name cannot come back
            self._sessions[tenant, session_id] = session
            if len(self._sessions) > SESSIONS_MAX:
                self._sessions.popitem(last=False)
        return session

    def key_id(self, authorization: str | None) -> str | None:
        """A stable name for a bearer token that says nothing about it: HMAC under a key of this installation."""
        token = (authorization or "").rpartition(" ")[2]
        return "key-" + hmac.new(self._key, token.encode(), hashlib.sha256).hexdigest()[:16] if token else None


def parse_session(name: str) -> bytes:
    """The session id of a header's value.

    Raises:
        Failure: no UUID.
    """
    try:
        return uuid.UUID(name.strip()).bytes
    except ValueError as error:
        raise Failure(errors.INVALID_REQUEST, f"{SESSION_HEADER} must be a UUID.", param=SESSION_HEADER) from error
