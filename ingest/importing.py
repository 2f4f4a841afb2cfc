"""A session taken in whole: an export of one, or a conversation that was held elsewhere, as events of source `import`.

It becomes a session of its own, with new ids for itself and its generations, so that one that is taken back into the installation
it came from stands beside the original. Its events keep the times at which they were recorded. They are written as those of one
producer that ends with them, in one batch: the log has all of them or, where it fails, some may be there and the answer is an error.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ingest.redaction import Redactor
from ingest.retelling import Answered, Asked, Bodies, answers_of, request_of
from schemas import clock
from schemas import events as e
from schemas.codec import decode, encode
from schemas.errors import DataError, UsageError
from schemas.registry import SchemaRegistry
from schemas.settings import Settings
from schemas.sink import new_id
from store.log.base import Entry, Log, partition_of
from store.rows import StoredEvent

FORMAT = "tokentape.session"
VERSION = 1
"""Of the export; raised when an older importer could not read it."""

_HINT = 'a session is what an export gives, or {"request": {"model": …, "messages": […]}, "response": {"content": …}}'
_NOT_TAKEN = frozenset({"access_logged", "producer_heartbeat", "records_lost"})
"""Kinds that tell of the installation they were recorded in."""
_LINKS = ("generation_id", "parent_generation", "history_generation")
"""Fields that name a generation of the same session."""


@dataclass(frozen=True)
class Owner:
    """Whose the new session is, and how it is labelled."""

    tenant: str
    actor: str
    tags: tuple[str, ...] = ()
    visibility: str | None = None


def export_document(events: Sequence[StoredEvent], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The export of a session: each of `lines` (its events as people read them) with the very event in Avro beside it."""
    told = [{**line, "avro": base64.b64encode(encode(stored.event)).decode()} for line, stored in zip(lines, events, strict=True)]
    return {"format": FORMAT, "version": VERSION, "session_id": events[0].event.session_id.hex(), "events": told}


Recorded = tuple[e.Payload, int]
"""What happened, and when it was recorded (µs since 1970)."""


def read_session(data: Any, registry: SchemaRegistry) -> list[Recorded]:
    """What `import_session` would take in, with new ids for its generations.

    Raises:
        UsageError: neither an export nor a conversation, or of a later version.
    """
    found = list(_exported(data, registry) if _is_export(data) else _conversation(data))
    if not found:
        raise UsageError("the session has no events", operation="import", hint=_HINT)
    return found


def import_session(data: Any, owner: Owner, *, log: Log, registry: SchemaRegistry, settings: Settings) -> tuple[bytes, int]:
    """Take a session in; its new id and the number of its events. They are durable when this returns.

    Raises:
        UsageError: as `read_session`.
        LogUnavailable: the log does not take it.
    """
    found = read_session(data, registry)
    found += _labels(owner, found[-1][1])
    strand = Strand(new_id(), os.urandom(16), os.urandom(8))
    entries = entries_of(found, strand, owner, log=log, settings=settings)
    log.append(entries)
    return strand.session_id, len(entries)


@dataclass(frozen=True)
class Strand:
    """Where events go: their session, its salt, and the producer that they are numbered by, from 0."""

    session_id: bytes
    salt: bytes
    producer_id: bytes


def entries_of(found: Sequence[Recorded], strand: Strand, owner: Owner, *, log: Log, settings: Settings) -> list[Entry]:
    """What happened in a session as events of source `import`, redacted as the owner's tenant is, for `log` to take.

    They are all that this producer ever records, so the same ones written again are duplicates, which the index leaves out.
    """
    redactor = Redactor.of(settings).for_tenant(owner.tenant)
    content = settings.redaction.of(owner.tenant).content == "full"
    partition = partition_of(strand.session_id, log.partitions)
    entries = []
    for number, (payload, at) in enumerate(found):
        event = e.Event(
            event_id=new_id(),
            session_id=strand.session_id,
            salt=strand.salt,
            tenant=owner.tenant,
            retention_class=settings.retention_class,
            actor=owner.actor,
            source="import",
            producer_id=strand.producer_id,
            producer_seq=number,
            recorded_at=at,
            payload=redacted(payload, redactor) if content else _without_content(payload),
        )
        entries.append(Entry(partition, strand.session_id, encode(event)))
    return entries


def _labels(owner: Owner, at: int) -> list[Recorded]:
    if not owner.tags and owner.visibility is None:
        return []
    return [(e.SessionAnnotated(tags_added=list(owner.tags), visibility=owner.visibility), at)]


# An export


def _is_export(data: Any) -> bool:
    if not isinstance(data, Mapping):
        raise UsageError("a session is an object", operation="import", hint=_HINT)
    if "format" not in data:
        return False
    if data["format"] != FORMAT or not isinstance(data.get("events"), list):
        raise UsageError(f"this is no {FORMAT}", operation="import", hint=_HINT)
    if data.get("version") != VERSION:
        hint = "use the version of tokentape that made it, or a newer one"
        raise UsageError(f"an export of version {data.get('version')!r}; this reads {VERSION}", operation="import", hint=hint)
    return True


def _exported(data: Mapping[str, Any], registry: SchemaRegistry) -> Iterator[Recorded]:
    """The events of an export, by the source that counts, with new ids for its generations."""
    events = [_event(i, line, registry) for i, line in enumerate(data["events"])]
    counts = {
        event.payload.generation_id: event.payload.authoritative for event in events if isinstance(event.payload, e.GenerationStarted)
    }
    renamed: dict[bytes, bytes] = {}
    for event in events:
        generation = getattr(event.payload, "generation_id", None)
        if event.kind in _NOT_TAKEN or counts.get(generation or b"", event.source) != event.source:
            continue
        yield _renamed(event.payload, renamed), event.recorded_at


def _event(number: int, line: Any, registry: SchemaRegistry) -> e.Event:
    try:
        return decode(base64.b64decode(line["avro"], validate=True), registry)
    except (ValueError, KeyError, TypeError, DataError) as error:
        raise UsageError(f"event {number} does not read: {error}", operation="import", hint=_HINT) from error


def _renamed(payload: e.Payload, renamed: dict[bytes, bytes]) -> e.Payload:
    links = {name: getattr(payload, name) for name in _LINKS if getattr(payload, name, None) is not None}
    changes: dict[str, Any] = {name: renamed.setdefault(value, new_id()) for name, value in links.items()}
    if isinstance(payload, e.GenerationStarted):
        changes["authoritative"] = "import"
    return payload.model_copy(update=changes) if changes else payload


# A conversation


def _conversation(data: Mapping[str, Any]) -> Iterator[Recorded]:
    """The events of a request and its answer as they are known afterwards: without ids, logprobs and times of tokens."""
    request, response = data.get("request"), data.get("response") or {}
    messages = request.get("messages") if isinstance(request, Mapping) else None
    if (
        not isinstance(request, Mapping)
        or not isinstance(messages, list)
        or not all(isinstance(m, Mapping) for m in messages)
        or not messages
    ):
        raise UsageError("there is no request with messages", operation="import", hint=_HINT)
    if not isinstance(response, Mapping):
        raise UsageError("response is no object", operation="import", hint=_HINT)
    text, model, title = response.get("content"), request.get("model"), data.get("title")
    for name, value in (("response.content", text), ("request.model", model), ("title", title)):
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{name} is no text", operation="import", hint=_HINT)
    at, generation = clock.now_us(), new_id()
    yield e.SessionOpened(content=e.SessionContent(title=title) if title else None), at
    asked = Asked(messages, {name: value for name, value in request.items() if name != "messages"})
    yield request_of(generation, asked, Bodies()), at
    if text is None:
        return
    yield e.GenerationStarted(generation_id=generation, status=200, authoritative="import", offset_us=0), at
    answers = [Answered(said={"content": text}, finish_reason=str(response.get("finish_reason") or "stop"))]
    for payload in answers_of(generation, answers):
        yield payload, at
    yield e.GenerationFinished(generation_id=generation, sequences=1, tokens_recorded=1, offset_us=0), at


# Redaction comes before the log, whoever brings an event


def _without_content(payload: e.Payload) -> e.Payload:
    return payload.model_copy(update={"content": None}) if "content" in type(payload).model_fields else payload


def redacted(payload: e.Payload, redactor: Redactor) -> e.Payload:
    """The payload without what the rules take."""
    content = getattr(payload, "content", None)
    if content is None or not redactor.searches:
        return payload
    plain = content.model_dump()
    cleaned = _cleaned(plain, redactor)
    if cleaned == plain:
        return payload
    if isinstance(payload, e.TokenChunk):
        # Ids would give back what was taken, and lengths no longer fit.
        cleaned |= {"token_ids": [], "logprobs": [], "lengths": []}
    return payload.model_copy(update={"content": type(content).model_validate(cleaned)})


def _cleaned(value: Any, redactor: Redactor) -> Any:
    if isinstance(value, str):
        return _cleaned_text(value, redactor)
    if isinstance(value, list):
        return [_cleaned(item, redactor) for item in value]
    return {name: _cleaned(item, redactor) for name, item in value.items()} if isinstance(value, dict) else value


def _cleaned_text(text: str, redactor: Redactor) -> str:
    """JSON text is searched as the document it is, so that what stands there stays JSON."""
    if text[:1] in "{[":
        try:
            return redactor.document(json.loads(text))[0]
        except ValueError:
            pass
    return redactor.clean(text) or ""
