"""Proofs that travel: one event, or one step of the ledger, checked with the public key and nothing else.

A proof is a JSON document. `docs/ledger.md` says what each field is and how to check it, so that an auditor can write a
verifier from that page; the tests hold one in Go against it.
"""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from schemas.codec import NO_CONTENT
from schemas.errors import ProofError, UsageError
from store.ledger.chain import KeyChain
from store.ledger.entry import Checkpoint, Entry, checkpoint_size, decode_entry
from store.ledger.merkle import leaf_hash, verify_consistency, verify_inclusion
from store.ledger.note import ModifiedNote, UnsignedNote, Verifier
from store.stored_schemas import schema_key

EVENT_FORMAT = "tokentape-event-proof/1"
CONSISTENCY_FORMAT = "tokentape-consistency-proof/1"


@dataclass(frozen=True, slots=True)
class Leaf:
    """An event in the form that its leaf hash is made of.

    `metadata` are its framed bytes with content, salt and commitment null; `content` the Avro bytes of its content record.
    Where the event was erased, `commitment` (32 bytes) stands in place of content and salt.
    """

    metadata: bytes
    content: bytes | None
    salt: bytes | None
    commitment: bytes | None

    def hash(self) -> bytes:
        """The RFC 9162 leaf hash.

        Raises:
            ProofError: content without a salt or with a commitment besides, or a salt without content.
        """
        if (self.content is None) != (self.salt is None) or (self.content is not None and self.commitment is not None):
            raise _refused("content and salt stand together, and without a commitment")
        if self.content is not None:
            committed = hmac.digest(self.salt or b"", self.content, "sha256")
        else:
            committed = self.commitment or NO_CONTENT
        return leaf_hash(self.metadata + committed)


@dataclass(frozen=True, slots=True)
class Rotation:
    """An entry that hands over to another key, and its inclusion path under the proof's (newer) checkpoint."""

    number: int
    entry: bytes
    path: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class EventProof:
    """An event is row `row` of a segment, the segment stands in a ledger entry, the entry under a signed checkpoint.

    `schema` is the stored Avro schema that reads the event's bytes; the entry names its SHA-256. `rotations` are those before
    the checkpoint.
    """

    public_key: str
    event_id: bytes
    leaf: Leaf
    schema: bytes
    segment: str
    row: int
    rows: int
    row_path: tuple[bytes, ...]
    entry: bytes
    entry_number: int
    entry_path: tuple[bytes, ...]
    checkpoint: bytes
    rotations: tuple[Rotation, ...] = ()

    def check(self, verifier: Verifier | KeyChain) -> list[str]:
        """What is proven, a sentence a step.

        Raises:
            ProofError: a step does not hold; the message says which.
        """
        chain, checkpoint = _signed(verifier, self.rotations, self.checkpoint)
        entry, _ = _entry(self.entry_number, self.entry, chain)
        if not verify_inclusion(leaf_hash(self.entry), self.entry_number, checkpoint.size, self.entry_path, checkpoint.head.root):
            raise _refused(f"entry {self.entry_number} is not among the {checkpoint.size} that the checkpoint covers")
        root = _segment_root(entry, self.segment, self.rows)
        if not verify_inclusion(self.leaf.hash(), self.row, self.rows, self.row_path, root):
            raise _refused(f"the event is not row {self.row} of the segment {self.segment}")
        if self.leaf.metadata[10:26] != self.event_id:
            raise _refused("the event's bytes carry another id")
        if not _names_schema(entry, self.leaf.metadata[2:10], self.schema):
            raise _refused(f"entry {self.entry_number} names another schema")
        erased = "; its content was erased, and its commitment stands" if self.leaf.commitment else ""
        return [
            f"signed by {_whom(chain, checkpoint)}: {checkpoint.size:,} entries, {_when(checkpoint)}",
            f"entry {self.entry_number} of {entry.recorded_at:%Y-%m-%d %H:%M:%S} UTC is one of them",
            f"it commits the segment {self.segment} of {self.rows:,} rows",
            f"the event is row {self.row:,} of it{erased}",
        ]

    def to_json(self) -> dict[str, Any]:
        """The document."""
        leaf = {name: _text(getattr(self.leaf, name)) for name in ("metadata", "content", "salt", "commitment")}
        segment = {"key": self.segment, "rows": self.rows, "row": self.row, "path": _texts(self.row_path)}
        entry = {"number": self.entry_number, "json": self.entry.decode(), "path": _texts(self.entry_path)}
        return {
            "format": EVENT_FORMAT,
            "public_key": self.public_key,
            "event": {"id": self.event_id.hex(), **leaf, "schema": self.schema.decode()},
            "segment": segment,
            "entry": entry,
            "checkpoint": self.checkpoint.decode(),
            **_rotations_json(self.rotations),
        }


@dataclass(frozen=True, slots=True)
class ConsistencyProof:
    """The ledger under the checkpoint `new` begins with all that stood under `old`: nothing was changed or removed."""

    public_key: str
    old: bytes
    new: bytes
    path: tuple[bytes, ...]
    rotations: tuple[Rotation, ...] = ()

    def check(self, verifier: Verifier | KeyChain) -> list[str]:
        """What is proven, a sentence a step.

        Raises:
            ProofError: a step does not hold; the message says which.
        """
        chain, new = _signed(verifier, self.rotations, self.new)
        old = _checkpoint(self.old, chain)
        if not verify_consistency(old.size, new.size, old.head.root, new.head.root, self.path):
            raise _refused(f"the ledger of {new.size} entries does not begin with the {old.size} that were signed before")
        return [
            f"signed by {_whom(chain, old)}: {old.size:,} entries, {_when(old)}",
            f"signed by {_whom(chain, new)}: {new.size:,} entries, {_when(new)}",
            "the second begins with the first: nothing in it was changed or removed in between",
        ]

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "format": CONSISTENCY_FORMAT,
            "public_key": self.public_key,
            "old": self.old.decode(),
            "new": self.new.decode(),
            "path": _texts(self.path),
            **_rotations_json(self.rotations),
        }


Proof = EventProof | ConsistencyProof


def read_proof(data: bytes) -> Proof:
    """A proof from its document; nothing is checked yet.

    Raises:
        UsageError: not a proof, or of a format that this version does not know.
    """
    try:
        document = json.loads(data)
        reader = _READERS.get(document["format"])
        if reader is None:
            raise _no_proof(f"its format is {str(document['format'])[:80]!r}")
        return reader(document)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _no_proof(f"{type(error).__name__}: {str(error)[:200]}") from error


def _event_proof(document: Mapping[str, Any]) -> EventProof:
    event, segment, entry = document["event"], document["segment"], document["entry"]
    return EventProof(
        public_key=str(document["public_key"]),
        event_id=bytes.fromhex(event["id"]),
        leaf=Leaf(_bytes(event["metadata"]) or b"", *(_bytes(event[name]) for name in ("content", "salt", "commitment"))),
        schema=event["schema"].encode(),
        segment=str(segment["key"]),
        row=_number(segment["row"]),
        rows=_number(segment["rows"]),
        row_path=_path(segment["path"]),
        entry=entry["json"].encode(),
        entry_number=_number(entry["number"]),
        entry_path=_path(entry["path"]),
        checkpoint=document["checkpoint"].encode(),
        rotations=_rotations(document),
    )


def _consistency_proof(document: Mapping[str, Any]) -> ConsistencyProof:
    old, new = document["old"].encode(), document["new"].encode()
    return ConsistencyProof(str(document["public_key"]), old, new, _path(document["path"]), _rotations(document))


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Proof]] = {EVENT_FORMAT: _event_proof, CONSISTENCY_FORMAT: _consistency_proof}


def _rotations(document: Mapping[str, Any]) -> tuple[Rotation, ...]:
    return tuple(Rotation(_number(item["number"]), item["json"].encode(), _path(item["path"])) for item in document.get("rotations", []))


def _rotations_json(rotations: Sequence[Rotation]) -> dict[str, Any]:
    """The field of a document; absent where the first key signed all, so that verifiers that know no rotation still read it."""
    items = [{"number": item.number, "json": item.entry.decode(), "path": _texts(item.path)} for item in rotations]
    return {"rotations": items} if items else {}


def _signed(keys: Verifier | KeyChain, rotations: Sequence[Rotation], data: bytes) -> tuple[KeyChain, Checkpoint]:
    """The keys up to a checkpoint, and the checkpoint, of whose entries each rotation must be one."""
    chain = KeyChain.of(keys)
    for item in rotations:
        before = chain
        _, chain = _entry(item.number, item.entry, chain)
        if chain is before or item.number >= checkpoint_size(data):
            raise _refused(f"entry {item.number} hands over to no key before the checkpoint")
    checkpoint = _checkpoint(data, chain)
    for item in rotations:
        if not verify_inclusion(leaf_hash(item.entry), item.number, checkpoint.size, item.path, checkpoint.head.root):
            raise _refused(f"the rotation of entry {item.number} is not among the entries that the checkpoint covers")
    return chain, checkpoint


def _whom(chain: KeyChain, checkpoint: Checkpoint) -> str:
    """The key that signed a checkpoint, and how it follows from the first one."""
    turns = [span for span in chain.spans[1:] if span.number < checkpoint.size]
    after = "".join(f", {'begun again' if turn.how == 'lost' else 'handed over to'} in entry {turn.number}" for turn in turns)
    return chain.at(checkpoint.size).key_id + after


def _checkpoint(data: bytes, chain: KeyChain) -> Checkpoint:
    try:
        return chain.read_checkpoint(None, data, chain.name)
    except (ModifiedNote, UnsignedNote) as error:
        raise _refused(f"the checkpoint: {error.fault}") from error


def _entry(number: int, data: bytes, chain: KeyChain) -> tuple[Entry, KeyChain]:
    """An entry that its key signed, and the keys after it."""
    try:
        entry = decode_entry(number, data)
        return entry, chain.check(entry, chain.name)
    except (ModifiedNote, UnsignedNote) as error:
        raise _refused(f"entry {number}: {error.fault}") from error


def _segment_root(entry: Entry, key: str, rows: int) -> bytes:
    """The root that an entry says of a segment of so many rows."""
    items = entry.body.get("segments")
    for item in items if isinstance(items, list) else []:
        if isinstance(item, dict) and item.get("key") == key and item.get("rows") == rows:
            return bytes.fromhex(str(item.get("root")))
    raise _refused(f"entry {entry.sequence} commits no segment {key} of {rows} rows")


def _names_schema(entry: Entry, fingerprint: bytes, schema: bytes) -> bool:
    """Whether an entry names these bytes as the schema of a fingerprint, of which 64 bits alone could be forged."""
    objects = entry.body.get("objects")
    wanted = {"key": schema_key(fingerprint), "bytes": len(schema), "sha256": sha256(schema).hexdigest()}
    return isinstance(objects, list) and wanted in objects


def _when(checkpoint: Checkpoint) -> str:
    return f"{datetime.fromtimestamp(checkpoint.at_us / 1e6, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _text(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode()


def _texts(path: Sequence[bytes]) -> list[str]:
    return [base64.b64encode(step).decode() for step in path]


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text, validate=True)


def _path(texts: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(base64.b64decode(text, validate=True) for text in texts)


def _number(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _refused(fault: str) -> ProofError:
    return ProofError(
        fault, operation="check proof", hint="the proof, or what it was made of, was altered; or the public key is another one"
    )


def _no_proof(fault: str) -> UsageError:
    return UsageError(f"not a proof: {fault}", operation="read proof", hint=f"valid formats: {', '.join(_READERS)}")
