"""One ledger entry: RFC 8785 JSON, numbered, chained to the one before, signed; and checkpoints over all of them."""

from __future__ import annotations

import base64
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import rfc8785

from schemas import clock
from schemas.errors import UsageError
from store.ledger.note import KEY_HASH_BYTES, ModifiedNote, Signer, TreeHead, UnsignedNote, Verifier, from_base64, note_bytes, open_note

ENTRIES = "ledger/entries/"
CHECKPOINTS = "ledger/checkpoints/"
_ENTRY_KEY = re.compile(re.escape(ENTRIES) + r"([0-9]{12})\.json")
_CHECKPOINT_KEY = re.compile(re.escape(CHECKPOINTS) + r"([0-9]{12})-([0-9]{16})\.txt")
_FIELDS = {"body", "id", "key_id", "origin", "previous", "recorded_at", "sequence", "signature", "type"}
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"
# Digits of a checkpoint's size, as `store.ledger.note` has it.
_DIGITS_MAX = 19
# Extension lines that the ledger itself writes: see `Checkpoint`.
_OWN_LINES = ("at ", "frontier ", "previous ")


@dataclass(frozen=True)
class Entry:
    """One entry as it was read or written; `data` are its exact bytes, which are the leaf of the ledger's tree.

    `previous` is the SHA-256 (hex) of the entry before, None for entry 0. `id` is random, so that two writers with
    equal news never make equal bytes. The signature is over the canonical JSON without the field `signature`.
    """

    sequence: int
    type: str
    recorded_at: datetime
    previous: str | None
    body: Mapping[str, Any]
    id: str
    origin: str
    key_id: str
    signature: bytes
    data: bytes

    @property
    def key(self) -> str:
        """Where it stands in the store."""
        return entry_key(self.sequence)

    @property
    def sha256(self) -> str:
        """Hex digest of its bytes: what the next entry names as `previous`."""
        return sha256(self.data).hexdigest()

    @property
    def signed(self) -> bytes:
        """The bytes that the signature is over, cut out of the canonical bytes instead of made again.

        The last `,"signature":"` is the field's own: no string holds a bare quote, and only `type` comes after it.
        """
        before, _, rest = self.data.rpartition(b',"signature":"')
        return before + rest.partition(b'"')[2]

    def check(self, verifier: Verifier, origin: str) -> None:
        """Hold the signature against the ledger's public key.

        Raises:
            UnsignedNote: another key claims to have signed it.
            ModifiedNote: the signature does not fit, or the entry belongs to another ledger.
        """
        if self.key_id != verifier.key_id:
            raise UnsignedNote(f"signed by {self.key_id[:80]!r}, not by {verifier.key_id}", operation="read entry", place=self.key)
        if not verifier.verify(self.signed, self.signature):
            raise ModifiedNote("the signature does not fit the entry", operation="read entry", place=self.key)
        if self.origin != origin:
            raise ModifiedNote(f"the entry belongs to the ledger {self.origin!r}", operation="read entry", place=self.key)


def make_entry(
    signer: Signer, origin: str, *, sequence: int, previous: str | None, type: str, body: Mapping[str, Any], now: datetime | None = None
) -> Entry:
    """A new, signed entry.

    Raises:
        UsageError: the body cannot be RFC 8785 JSON (integers beyond 2^53, NaN, lone surrogates, other types).
    """
    document: dict[str, Any] = {
        "body": dict(body),
        "id": uuid.uuid4().hex,
        "key_id": signer.verifier.key_id,
        "origin": origin,
        "previous": previous,
        "recorded_at": (now or clock.now()).strftime(_TIME),
        "sequence": sequence,
        "type": type,
    }
    document["signature"] = base64.b64encode(signer.sign(canonical(document))).decode()
    return decode_entry(sequence, canonical(document))


def decode_entry(sequence: int, data: bytes) -> Entry:
    """The entry that stands under number `sequence`; the signature is not checked here.

    Raises:
        ModifiedNote: not the one canonical spelling of an entry of that number.
    """
    try:
        document = json.loads(data)
        fits = isinstance(document, dict) and document.keys() == _FIELDS and canonical(document) == data
        if not fits:
            raise ValueError("not the canonical JSON of an entry")
        if type(document["sequence"]) is not int or document["sequence"] != sequence:
            raise ValueError(f"carries the number {document['sequence']!r}")
        return _entry(document, data)
    except (ValueError, TypeError, KeyError, RecursionError, UsageError) as error:
        raise ModifiedNote(f"not an entry: {str(error)[:200]}", operation="read entry", place=entry_key(sequence)) from None


def _entry(document: dict[str, Any], data: bytes) -> Entry:
    texts = [document[name] for name in ("type", "recorded_at", "id", "origin", "key_id", "signature")]
    previous = document["previous"]
    if not all(isinstance(text, str) for text in texts) or not isinstance(previous, str | None) or not isinstance(document["body"], dict):
        raise ValueError("a field has another type")
    return Entry(
        sequence=document["sequence"],
        type=document["type"],
        recorded_at=datetime.strptime(document["recorded_at"], _TIME).replace(tzinfo=UTC),
        previous=previous,
        body=document["body"],
        id=document["id"],
        origin=document["origin"],
        key_id=document["key_id"],
        signature=from_base64(document["signature"]),
        data=data,
    )


def canonical(document: Mapping[str, Any]) -> bytes:
    """RFC 8785 bytes of a JSON object.

    Raises:
        UsageError: the object has no canonical JSON.
    """
    try:
        return rfc8785.dumps(dict(document))
    except (rfc8785.CanonicalizationError, TypeError, ValueError, RecursionError) as error:
        hint = "strings, booleans, null, finite floats, integers below 2^53, lists and objects"
        raise UsageError(f"no canonical JSON: {str(error)[:200]}", operation="append", place="ledger", hint=hint) from error


@dataclass(frozen=True)
class Digest:
    """Running SHA-256 of a partition's raw bytes up to (not with) `offset_next`."""

    log_id: str
    partition: int
    offset_next: int
    sha256: bytes


@dataclass(frozen=True)
class Checkpoint:
    """A signed tree head of the ledger as stored.

    Among its extension lines the ledger's own are `at <unix micros>`, `frontier <base64>` (roots of the complete
    subtrees, largest first, so that a writer need not read all entries to go on) and `previous <base64 SHA-256>
    <key's last part>` (the checkpoint before, so that a removed one is missed).
    """

    key: str
    head: TreeHead
    data: bytes

    @property
    def size(self) -> int:
        """Number of entries covered."""
        return self.head.size

    @property
    def at_us(self) -> int:
        """When it was made, in microseconds since the epoch; part of what is signed."""
        line = self.line("at")
        return int(line) if line and line.isdecimal() else -1

    @property
    def digests(self) -> list[Digest]:
        """The partitions' running digests that it carries; lines of another form are left out."""
        found = (parse_digest(line) for line in self.head.extensions)
        return [digest for digest in found if digest is not None]

    def line(self, word: str) -> str | None:
        """The rest of the one extension line that starts with `word`."""
        found = [line.removeprefix(word + " ") for line in self.head.extensions if line.startswith(word + " ")]
        return found[0] if len(found) == 1 else None


def make_checkpoint(signer: Signer, head: TreeHead, *, at_us: int) -> Checkpoint:
    """Sign a tree head whose lines include `at`."""
    text = head.to_text()
    data = note_bytes(text, signer.verifier, signer.sign(text.encode()))
    return Checkpoint(checkpoint_key(head.size, at_us), head, data)


def read_checkpoint(key: str | None, data: bytes, verifier: Verifier, origin: str) -> Checkpoint:
    """A checkpoint, held against the public key, the ledger's name and its own key.

    `key` is None for a copy kept elsewhere: the key follows from size and time, which are among what is signed.

    Raises:
        ModifiedNote: malformed, wrongly signed, of another ledger, or moved to another key.
        UnsignedNote: not signed by this key.
    """
    place = key or "a copy"
    try:
        head = TreeHead.from_text(open_note(data, verifier))
    except (ModifiedNote, UnsignedNote) as error:
        raise type(error)(error.fault, operation="read checkpoint", place=place) from None
    found = Checkpoint(checkpoint_key(head.size, Checkpoint("", head, data).at_us), head, data)
    signature = base64.b64decode(data.split()[-1])[KEY_HASH_BYTES:]
    fault = ""
    if head.origin != origin:
        fault = f"belongs to the ledger {head.origin!r}"
    elif key is not None and found.key != key:
        fault = "stands under a key that is not its own"
    elif data != note_bytes(head.to_text(), verifier, signature):
        fault = "is not in its only spelling"
    if fault:
        raise ModifiedNote(f"the checkpoint {fault}", operation="read checkpoint", place=place)
    return found


def checkpoint_size(data: bytes) -> int:
    """The number of entries that a checkpoint says it covers, before anything of it was checked; 0 where it says none."""
    size = data.split(b"\n", 2)[1:2]
    return int(size[0]) if size and size[0].isdigit() and len(size[0]) <= _DIGITS_MAX else 0


def digest_line(digest: Digest) -> str:
    """The extension line of a running digest: `digest <log_id> <partition> <offset_next> <base64 sha256>`.

    Raises:
        UsageError: the log id is empty or holds white space.
    """
    if not re.fullmatch(r"\S+", digest.log_id):
        raise UsageError(f"log id {digest.log_id!r} holds white space", operation="checkpoint")
    return f"digest {digest.log_id} {digest.partition} {digest.offset_next} {base64.b64encode(digest.sha256).decode()}"


def parse_digest(line: str) -> Digest | None:
    """The running digest of an extension line, or None when it is another kind of line."""
    parts = line.split(" ")
    if len(parts) != 5 or parts[0] != "digest" or not (parts[2].isdecimal() and parts[3].isdecimal()):
        return None
    value = from_base64(parts[4])
    return Digest(parts[1], int(parts[2]), int(parts[3]), value) if len(value) == 32 else None


def check_extensions(lines: Iterable[str]) -> tuple[str, ...]:
    """Callers' extension lines.

    Raises:
        UsageError: a line begins as one of the ledger's own.
    """
    kept = tuple(lines)
    if any(line.startswith(_OWN_LINES) for line in kept):
        raise UsageError(f"extension lines may not begin with {', '.join(_OWN_LINES)}", operation="checkpoint")
    return kept


def entry_key(sequence: int) -> str:
    """Key of entry `sequence`."""
    return f"{ENTRIES}{sequence:012d}.json"


def checkpoint_key(size: int, at_us: int) -> str:
    """Key of the checkpoint over `size` entries made at `at_us`."""
    return f"{CHECKPOINTS}{size:012d}-{at_us:016d}.txt"


def entry_number(key: str) -> int | None:
    """The number in an entry's key, or None for another key."""
    match = _ENTRY_KEY.fullmatch(key)
    return int(match[1]) if match else None


def is_checkpoint(key: str) -> bool:
    """Whether the key is that of a checkpoint."""
    return _CHECKPOINT_KEY.fullmatch(key) is not None
