"""Large bodies and attachments beside the events that name them: one object each, in the store of the cold tier.

A blob is named by the HMAC-SHA256 of its bytes under a key of its tenant (`keys/blobs/TENANT.key` in the data directory), so
that equal bodies of one tenant are stored once and the name says nothing to others. It stands at
`blobs/tenant=T/ab/abcd….zst`, or without `.zst` where it was not compressed. A blob is durable when `put` returns. One that
is wanted again on a later day than it was written gets a mark of that day under `blob-uses/`, so that `lifecycle.blobs`, which
takes away what no event refers to, can tell.

An attachment leaves `tokentape-blob:NAME:SIZE` in the message's text where its base64 stood: putting that back gives the
text as it was.
"""

from __future__ import annotations

import base64
import hmac
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from functools import lru_cache, partial
from pathlib import Path

import zstandard

from schemas import clock
from schemas.errors import CorruptStore, UsageError
from schemas.events import BlobRef, Message, RequestContent, RequestSubmitted
from store.keyfile import installation_key
from store.objects.base import ObjectStore
from store.rows import StoredEvent

BLOBS = "blobs/"
USES = "blob-uses/"
JSON_TYPE = "application/json"

MARK = re.compile(r"tokentape-blob:([0-9a-f]{64}):(\d+)")
"""What stands in a text for an attachment: name and size in bytes before compression."""

_KNOWN_MAX = 8192  # names of blobs that this process has stored, so that they are not sent again
_CACHED_MAX = 64  # blobs kept while a session is read: a message may be asked for again and again
_DENSE = re.compile(r"(image|audio|video)/(?!svg|bmp|x-ms-bmp|tiff|wav|x-wav|wave|pcm|l16)|application/(pdf|zip|gzip|zstd)")


class BlobStore:
    """The blobs of all tenants. Safe for threads."""

    def __init__(self, objects: ObjectStore, data: Path) -> None:
        """`data` is the data directory, which has the keys."""
        self._objects = objects
        self._keys = data / "keys" / "blobs"
        self._known: OrderedDict[str, date] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, tenant: str, data: bytes, media_type: str) -> BlobRef:
        """Store a body; it is durable when this returns. Storing it again changes nothing.

        Raises:
            StoreUnavailable, StorageFull: the store or the disk does not take it.
        """
        name = hmac.digest(installation_key(self._keys / f"{tenant}.key"), data, "sha256")
        ref = BlobRef(blob_id=name, size=len(data), media_type=media_type, encoding=encoding_of(media_type))
        key = key_of(tenant, name, ref.encoding)
        if not self._knows(key):
            stored = zstandard.ZstdCompressor(write_checksum=True).compress(data) if ref.encoding == "zstd" else data
            self._keep(key, stored)
            self._learn(key)
        return ref

    def _keep(self, key: str, stored: bytes) -> None:
        """Store what is not there; of what is there from another day say that it is used, then see that it was not taken away before."""
        found = self._objects.head(key)
        if found is not None and found.modified_at.date() != _today():
            self._objects.create(f"{use_prefix(key)}{_today()}", b"used")
            found = self._objects.head(key)
        if found is None:
            self._objects.create(key, stored)

    def get(self, tenant: str, name: bytes) -> bytes:
        """The bytes of a blob.

        Raises:
            KeyError: the tenant has no such blob.
            CorruptStore: its bytes are not those that its name was made of.
            StoreUnavailable: the store does not answer.
        """
        try:
            data = _decompressed(self._objects.get(key_of(tenant, name, "zstd")), name)
        except KeyError:
            data = self._objects.get(key_of(tenant, name, "none"))
        key = self._keys / f"{tenant}.key"
        if key.exists() and hmac.digest(key.read_bytes(), data, "sha256") != name:
            hint = "restore the object, or the tenant's key if it is another one than the gateway's"
            raise CorruptStore("the blob's bytes do not give its name", operation="read blob", place=name.hex(), hint=hint)
        return data

    def find(self, tenant: str, text: str) -> bytes:
        """The bytes of the blob that 64 hex digits name.

        Raises:
            UsageError: no such name, or no such blob.
        """
        hint = "the messages view has blob_id and attachments"
        if not re.fullmatch(r"[0-9a-f]{64}", text.lower()):
            raise UsageError(f"{text!r} is no blob id", operation="read blob", hint=f"64 hex digits; {hint}")
        try:
            return self.get(tenant, bytes.fromhex(text))
        except KeyError as error:
            raise UsageError(f"tenant {tenant} has no blob {text}", operation="read blob", hint=hint) from error

    def _knows(self, key: str) -> bool:
        with self._lock:
            return self._known.get(key) == _today()

    def _learn(self, key: str) -> None:
        with self._lock:
            self._known[key] = _today()
            if len(self._known) > _KNOWN_MAX:
                self._known.popitem(last=False)


def encoding_of(media_type: str) -> str:
    """How a kind of data is compressed: `zstd`, or `none` for what is compressed already."""
    return "none" if _DENSE.match(media_type) else "zstd"


def key_of(tenant: str, name: bytes, encoding: str) -> str:
    """Where a blob stands in the object store."""
    digits = name.hex()
    return f"{BLOBS}tenant={tenant}/{digits[:2]}/{digits}{'.zst' if encoding == 'zstd' else ''}"


def use_prefix(key: str) -> str:
    """Where the marks stand that say on which days a blob was wanted again."""
    return f"{USES}{key.removeprefix(BLOBS)}/"


def _today() -> date:
    return clock.now().date()


def mark_of(ref: BlobRef) -> str:
    """What stands in a text for an attachment."""
    return f"tokentape-blob:{ref.blob_id.hex()}:{ref.size}"


def with_blobs(events: Iterable[StoredEvent], open_blobs: Callable[[], BlobStore], *, attachments: bool = False) -> Iterator[StoredEvent]:
    """The events with message bodies and parameters put back from blobs, and attachments too if wanted.

    What is no longer there stays a reference. `open_blobs` is called when an event has a reference.

    Raises:
        CorruptStore, StoreUnavailable: as `BlobStore.get`.
    """

    @lru_cache(_CACHED_MAX)
    def read(tenant: str, name: bytes) -> bytes:
        return open_blobs().get(tenant, name)

    for stored in events:
        payload = stored.event.payload
        if isinstance(payload, RequestSubmitted) and payload.content is not None:
            content = _put_back(payload.content, partial(read, stored.event.tenant), attachments)
            if content != payload.content:
                event = stored.event.model_copy(update={"payload": payload.model_copy(update={"content": content})})
                stored = StoredEvent(event, stored.log_id, stored.partition, stored.offset, stored.appended_at)
        yield stored


Read = Callable[[bytes], bytes]


def _put_back(content: RequestContent, read: Read, attachments: bool) -> RequestContent:
    messages = [_body_back(message, read, attachments) for message in content.messages]
    parameters = content.parameters
    if content.parameters_blob is not None:
        parameters = _text(content.parameters_blob, read) or ""
    return content.model_copy(update={"messages": messages, "parameters": parameters})


def _body_back(message: Message, read: Read, attachments: bool) -> Message:
    body = message.body
    if body is None and message.blob is not None:
        body = _text(message.blob, read)
    elif body is not None and attachments:
        body = MARK.sub(lambda found: _base64(found, read), body)
    return message if body == message.body else message.model_copy(update={"body": body})


def _text(ref: BlobRef, read: Read) -> str | None:
    try:
        return read(ref.blob_id).decode()
    except KeyError:
        return None


def _base64(found: re.Match[str], read: Read) -> str:
    try:
        return base64.b64encode(read(bytes.fromhex(found[1]))).decode()
    except KeyError:
        return found[0]


def _decompressed(data: bytes, name: bytes) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        hint = "restore the object from a copy"
        raise CorruptStore(f"the blob is damaged: {error}", operation="read blob", place=name.hex(), hint=hint) from error
