"""What every part that causes events needs: the session it speaks for and somewhere to record."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from schemas import clock
from schemas.codec import encode_session, uuid7
from schemas.events import PLATFORM_TENANT, Payload

_POOL_BYTES = 4096
"""Fetched from the system's generator at a time: each call of it lets other threads run first, which is dear where tokens wait."""

_pool: deque[bytes] = deque()
os.register_at_fork(after_in_child=_pool.clear)  # a child MUST NOT give out what its parent gives out


def random16() -> bytes:
    """Sixteen bytes of the system's generator, given out once."""
    try:
        return _pool.pop()
    except IndexError:
        block = os.urandom(_POOL_BYTES)
        _pool.extend(block[at : at + 16] for at in range(16, _POOL_BYTES, 16))
        return block[:16]


@dataclass(frozen=True)
class SessionContext:
    """The envelope fields that all events of one session share in one process.

    `salt` hides the content commitments of the session; a platform session without content may do without. Where
    `content` is False the recorder leaves the content of every event out, for tenants that want metadata only;
    `sample_rate` beats the recorder's own.
    """

    session_id: bytes
    tenant: str
    source: str
    actor: str = ""
    retention_class: str = "standard"
    salt: bytes | None = field(default_factory=random16, repr=False)
    content: bool = True
    sample_rate: float | None = None

    @cached_property
    def encoded(self) -> bytes:
        """These fields as they stand in every event's bytes."""
        return encode_session(self.session_id, self.salt, self.tenant, self.retention_class, self.actor, self.source)


class EventSink(Protocol):
    """Where events go: the recorder, as seen by those who may not import it."""

    def record(self, session: SessionContext, payload: Payload) -> None:
        """Record one event now; returns in microseconds and never raises for a slow or absent log."""
        ...


def new_id() -> bytes:
    """A fresh random UUIDv7 as 16 bytes: for sessions, generations and replays."""
    tail = int.from_bytes(random16()[:10], "big")
    return uuid7(clock.now_us() // 1000, tail >> 64, tail)


def platform_session(source: str, actor: str = "") -> SessionContext:
    """A session of its own for events that belong to no customer, without content."""
    return SessionContext(new_id(), PLATFORM_TENANT, source, actor, salt=None)
