"""Large bodies and attachments on their way to the blob store, while their event waits in the recorder's queue.

The request path only hands over: a few threads store what is large, and the recorder's thread waits for them before it
encodes the event. So a blob is durable before the event that names it, in every mode of the recorder, and no stream waits
for a store. Where the store does not answer in time, or more than `UNDER_WAY_MAX` bytes are under way, the body
stays in its event, whole.
"""

from __future__ import annotations

import base64
import binascii
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import structlog

from schemas.errors import TokentapeError
from schemas.events import Message, RequestContent, RequestSubmitted
from schemas.requests import load
from schemas.settings import BlobSettings
from store.blobs import JSON_TYPE, BlobStore, mark_of

log = structlog.get_logger("tokentape.recorder")

ATTACHMENT_CHARACTERS_MIN = 1024
"""Shorter base64 stays in its message."""

UNDER_WAY_MAX = 128 << 20
"""Characters of bodies that may wait to be stored."""

PAUSE_S = 10.0
"""After the store failed bodies stay in their events for so long, before it is tried again."""

_THREADS = 4
_HINTS = (";base64,", '"data":"')
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)[^,]{0,200};base64,")


class Deferred:
    """A request whose large parts are being stored; the recorder asks for what is to be recorded when its turn comes."""

    KIND = RequestSubmitted.KIND

    def __init__(self, payload: RequestSubmitted, moved: Future[RequestContent], give_up_at: float, failed: Callable[[str], None]) -> None:
        """`give_up_at` is on the monotonic clock."""
        self._payload = payload
        self._moved = moved
        self._give_up_at = give_up_at
        self._failed = failed

    def settled(self) -> RequestSubmitted:
        """The request with references to what was stored, else with everything in it."""
        try:
            content = self._moved.result(max(0.0, self._give_up_at - time.monotonic()))
        except TimeoutError:
            self._failed("it does not answer in time")
        except TokentapeError as error:
            self._failed(str(error))
        except Exception as error:  # whatever it was, the body is at hand
            self._failed(repr(error))
        else:
            return self._payload.model_copy(update={"content": content})
        return self._payload


class Attachments:
    """Moves what is large out of requests. `open_blobs` is called by the first that needs it, in a thread of its own."""

    def __init__(self, settings: BlobSettings, open_blobs: Callable[[], BlobStore]) -> None:
        self.stored = self.kept = 0
        self._settings = settings
        self._open_blobs = open_blobs
        self._blobs: BlobStore | None = None
        self._opening = threading.Lock()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokentape-blobs")
        self._counting = threading.Lock()
        self._under_way = 0
        self._paused_until = 0.0

    def defer(self, tenant: str, payload: RequestSubmitted) -> RequestSubmitted | Deferred:
        """The request, or what becomes of it once its large parts are stored."""
        content = payload.content
        if content is None or not self._settings.inline_bytes_max or not self._has_large(content):
            return payload
        size = sum(len(message.body or "") for message in content.messages) + len(content.parameters)
        if time.monotonic() < self._paused_until or self._under_way + size > UNDER_WAY_MAX:
            self.kept += 1
            return payload
        self._count(size)
        moved = self._pool.submit(self._move, tenant, content)
        moved.add_done_callback(lambda _: self._count(-size))
        return Deferred(payload, moved, time.monotonic() + self._settings.wait_s, self._failed)

    def close(self) -> None:
        """Take nothing more; what is under way ends by itself."""
        self._pool.shutdown(wait=False)

    def _has_large(self, content: RequestContent) -> bool:
        most = self._settings.inline_bytes_max
        bodies = [message.body for message in content.messages if message.body and len(message.body) > min(most, ATTACHMENT_CHARACTERS_MIN)]
        return _is_larger(content.parameters, most) or any(_is_larger(body, most) or any(h in body for h in _HINTS) for body in bodies)

    def _move(self, tenant: str, content: RequestContent) -> RequestContent:
        """The content with its large parts stored and named."""
        blobs = self._store()
        changes: dict[str, Any] = {"messages": [self._moved(blobs, tenant, message) for message in content.messages]}
        if _is_larger(content.parameters, self._settings.inline_bytes_max):
            changes |= {"parameters": "", "parameters_blob": blobs.put(tenant, content.parameters.encode(), JSON_TYPE)}
            self.stored += 1
        return content.model_copy(update=changes)

    def _moved(self, blobs: BlobStore, tenant: str, message: Message) -> Message:
        body = rest = message.body or ""
        found = list(attachments(body))
        for written, _, _ in found:
            rest = rest.replace(written, "")
        if _is_larger(rest, self._settings.inline_bytes_max):
            self.stored += 1
            return message.model_copy(update={"body": None, "blob": blobs.put(tenant, body.encode(), JSON_TYPE)})
        for written, data, media_type in found:
            body = body.replace(written, mark_of(blobs.put(tenant, data, media_type)))
            self.stored += 1
        return message.model_copy(update={"body": body}) if found else message

    def _store(self) -> BlobStore:
        with self._opening:
            if self._blobs is None:
                self._blobs = self._open_blobs()
            return self._blobs

    def _failed(self, why: str) -> None:
        """A body stays in its event, and those that come soon will too."""
        self.kept += 1
        now = time.monotonic()
        if now >= self._paused_until:
            log.warning("blobs_stay_inline", problem=why, for_s=PAUSE_S)
        self._paused_until = now + PAUSE_S

    def _count(self, size: int) -> None:
        with self._counting:
            self._under_way += size


def attachments(body: str) -> Iterator[tuple[str, bytes, str]]:
    """The base64 texts in a message that are attachments: each as written, its bytes and its media type.

    Known are data URLs anywhere, and objects with `data` beside `format` (OpenAI's audio) or a media type (Anthropic, Gemini).
    What base64 would not write the same way again is left where it is, so that a message can be put together as it was.
    """
    if not any(hint in body for hint in _HINTS):
        return
    try:
        document = load(body.encode())
    except ValueError:
        return
    seen: set[str] = set()
    for written, media_type in _encoded(document):
        if len(written) >= ATTACHMENT_CHARACTERS_MIN and written not in seen and (data := _decoded(written)) is not None:
            seen.add(written)
            yield written, data, media_type


def _encoded(value: Any) -> Iterator[tuple[str, str]]:
    """Texts that may be base64, with their media types."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str) and (url := _DATA_URL.match(item)):
            yield item[url.end() :], url[1]
        elif isinstance(item, dict):
            if isinstance(item.get("data"), str) and (media_type := _media_type(item)):
                yield item["data"], media_type
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _media_type(item: dict[str, Any]) -> str | None:
    for name in ("media_type", "mime_type", "mimeType"):
        if isinstance(item.get(name), str):
            return str(item[name])
    return f"audio/{item['format']}" if isinstance(item.get("format"), str) else None


def _decoded(written: str) -> bytes | None:
    try:
        data = base64.b64decode(written, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if base64.b64encode(data) == written.encode() else None


def _is_larger(text: str, most: int) -> bool:
    return len(text) > most or (len(text) * 4 > most and len(text.encode()) > most)
