"""Which session a readable request belongs to, how it is labelled, and whether it is recorded: decided once, before its first event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ingest.gateway.conversations import Conversations
from ingest.gateway.exchange import Exchange
from ingest.gateway.headers import HEADER_CHARACTERS_MAX, Clean, session_facts, tags_of
from ingest.gateway.sessions import SESSION_HEADER, Session
from schemas.requests import ClientRequest, text_of
from schemas.settings import RecorderSettings

LABELS = ("user", "workflow", "purpose")
"""Facts of a session that a request's `metadata` may name, where no header does."""


@dataclass(frozen=True)
class Asker:
    """Whose request it is: the key by its id on the tape, and where nobody sent one the client's address tells them apart."""

    tenant: str
    key_id: str | None
    address: str | None

    @property
    def name(self) -> str:
        """What conversations are kept apart by."""
        return f"{self.tenant}\n{self.key_id or self.address or ''}"


class Placement:
    """Places the requests of one gateway process."""

    def __init__(self, settings: RecorderSettings, key: bytes) -> None:
        """`key` keys what is remembered of conversations."""
        self._settings = settings
        self._conversations = Conversations(key)

    def place(self, exchange: Exchange, request: ClientRequest, session: Session, asker: Asker, clean: Clean) -> Session:
        """The session of a request, which is `session` if it named one; a new one is told its rate."""
        if not exchange.header(SESSION_HEADER):
            session = self._conversations.find(asker.name, request) or session
        if not session.opened and session.context.sample_rate is None:
            rate = self._rate(request.model or "", tags_named(exchange, request.fields, clean) if self._settings.sampling else (), asker)
            session.context = replace(session.context, sample_rate=rate)
        return session

    def answered(self, exchange: Exchange, request: ClientRequest, session: Session, asker: Asker, answers: Sequence[Any]) -> None:
        """An answer ended, well or not: what goes on from it joins its session."""
        if answers and not exchange.header(SESSION_HEADER):
            self._conversations.answered(asker.name, request, answers, session)

    def _rate(self, model: str, tags: Sequence[str], asker: Asker) -> float:
        for rule in self._settings.sampling:
            alike = (
                rule.tenant is None or fnmatchcase(asker.tenant, rule.tenant),
                rule.model is None or fnmatchcase(model, rule.model),
                rule.key is None or fnmatchcase(asker.key_id or "", rule.key),
                rule.tag is None or any(fnmatchcase(tag, rule.tag) for tag in tags),
            )
            if all(alike):
                return rule.rate
        return self._settings.sample_rate


def labels(exchange: Exchange, fields: dict[str, Any], clean: Clean, sample_rate: float) -> dict[str, Any]:
    """Fields of `session_opened`: from headers, else from the request's `metadata`, its `user` and its `safety_identifier`."""
    facts = session_facts(exchange, clean, sample_rate)
    metadata = fields.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    found = {name: text_of(metadata.get(name)) for name in LABELS}
    found["user"] = (
        found["user"] or text_of(metadata.get("user_id")) or text_of(fields.get("safety_identifier")) or text_of(fields.get("user"))
    )
    for name in LABELS:
        facts[name] = facts[name] or (clean(found[name]) or "")[:HEADER_CHARACTERS_MAX] or None
    facts["tags"] = tags_named(exchange, fields, clean)
    return facts


def tags_named(exchange: Exchange, fields: dict[str, Any], clean: Clean) -> list[str]:
    """The tags that a request names in its header and in its `metadata`, each once."""
    metadata = fields.get("metadata")
    named = metadata.get("tags") if isinstance(metadata, dict) else None
    return list(dict.fromkeys([*tags_of(exchange, clean), *_tags(named, clean)]))


def _tags(value: Any, clean: Clean) -> list[str]:
    """The tags of `metadata`: a list, or a text with commas, since OpenAI's metadata holds texts only."""
    listed = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    tags = [(clean(tag.strip()) or "")[:HEADER_CHARACTERS_MAX] for tag in listed if isinstance(tag, str)]
    return [tag for tag in tags if tag]
