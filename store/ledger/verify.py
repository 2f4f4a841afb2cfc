"""Proof that nothing was changed: everything the ledger vouches for is held against it, with the public key alone.

Works on the live store and on a copy (`LocalStore` over a folder), offline. What it can and cannot find:

- any change to an entry, a checkpoint, or an object that an entry names;
- any entry, checkpoint or named object that was removed, but for the *end* of the ledger: entries after the last
  checkpoint, and the last checkpoint itself, can be cut off unnoticed unless a checkpoint that was kept elsewhere is
  passed as an anchor;
- nothing against who holds the private key and rewrites all of it, again unless there is an anchor.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Literal

from schemas.errors import CorruptStore, UsageError
from schemas.registry import Schema
from store.ledger.chain import LOST, KeyChain
from store.ledger.entry import CHECKPOINTS, Checkpoint, Digest, Entry, checkpoint_size, decode_entry, entry_key, entry_number, is_checkpoint
from store.ledger.merkle import CompactRange, leaf_hash
from store.ledger.note import ModifiedNote, UnsignedNote, Verifier, signers
from store.objects.base import ObjectStore
from store.stored_schemas import schema_key

LEDGER = "ledger/"
NAMED = ("events/", "schemas/")  # where every object should be named by an entry
CHUNK = 8 << 20  # bytes of an object hashed at a time

Kind = Literal["modified", "missing", "unsigned", "erased-with-proof", "key-lost", "orphan"]
# From worst to harmless; a report's exit code is that of its worst finding. An orphan is an object that no entry
# names: a writer that died between object and entry leaves one, and nothing reads it. A lost key is told where a trusted one took
# its place; where none did, what comes after is unsigned.
EXIT_CODES: Mapping[Kind, int] = {"modified": 10, "missing": 11, "unsigned": 12, "erased-with-proof": 0, "key-lost": 0, "orphan": 0}


_REMOVED = {"retention": "removed by retention", "erasure": "rewritten by an erasure", "merge": "merged"}
"""What an entry that removed objects says of why, in words."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: what kind, at which object, and one line of detail."""

    kind: Kind
    key: str
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome. `covered` is the size of the largest good checkpoint: entries after it are signed and chained only."""

    entries: int
    checkpoints: int
    objects: int
    bytes: int
    covered: int
    findings: tuple[Finding, ...]
    chain: KeyChain
    """The keys that signed, as far as the entries hand over from one to the next."""

    @property
    def exit_code(self) -> int:
        """0 when nothing is wrong; else 10 modified, 11 missing, 12 unsigned: the first of these that was found."""
        kinds = {finding.kind for finding in self.findings}
        return next((code for kind, code in EXIT_CODES.items() if kind in kinds and code), 0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        counts = {name: getattr(self, name) for name in ("entries", "checkpoints", "objects", "bytes", "covered", "exit_code")}
        keys = [{"key_id": span.key.key_id, "after_entry": span.number, "how": span.how} for span in self.chain.spans]
        return counts | {"keys": keys, "findings": [{"kind": f.kind, "key": f.key, "detail": f.detail} for f in self.findings]}


@dataclass(frozen=True, slots=True)
class Claim:
    """What an entry says of an object: its size and SHA-256 (hex)."""

    entry: Entry
    key: str
    bytes: int
    sha256: str


def verify_ledger(
    store: ObjectStore,
    verifier: KeyChain | Verifier | str,
    *,
    origin: str | None = None,
    check_segment: Callable[[Entry], list[Finding]] | None = None,
    anchors: Sequence[bytes] = (),
    leaves_out: Callable[[Entry, str], bool] = lambda entry, key: False,
) -> Report:
    """Check the whole ledger and every object that it names.

    `verifier` is the first public key (or its text), or it and those that began again after a loss,
    `origin` the ledger's name (default: the key's). `check_segment` is
    called for each `segment` entry whose object has the right bytes. `anchors` are checkpoints kept elsewhere: the
    ledger must continue them and still hold them. `leaves_out` says of an entry and a key that it names that the object
    is not to be read.

    Raises:
        StoreUnavailable: the store does not answer.
        UsageError: the public key is none.
    """
    key = Verifier.parse(verifier) if isinstance(verifier, str) else verifier
    chain = KeyChain.of(key)
    return _Run(store, chain, origin or chain.name, check_segment, anchors, leaves_out).report()


@dataclass
class _Run:
    """One verification: what was found so far."""

    store: ObjectStore
    chain: KeyChain
    origin: str
    check_segment: Callable[[Entry], list[Finding]] | None
    anchors: Sequence[bytes]
    leaves_out: Callable[[Entry, str], bool]
    findings: list[Finding] = field(default_factory=list)
    entries: dict[int, Entry] = field(default_factory=dict)  # good ones
    bytes_read: int = 0
    objects: int = 0
    covered: int = 0
    length: int = 0  # one more than the largest entry number that stands
    heads: dict[int, bytes] = field(default_factory=dict)  # roots at the sizes that somebody asks for
    strangers: dict[frozenset[str], list[str]] = field(default_factory=dict)  # what keys signed that are not the ledger's

    def report(self) -> Report:
        """Run all checks. The ledger is listed once, and checkpoints sort before entries: a writer meanwhile does no harm."""
        keys = [info.key for info in self.store.list(LEDGER)]
        numbers = [number for number in map(entry_number, keys) if number is not None]
        checkpoint_keys = [key for key in keys if is_checkpoint(key)]
        for key in keys:
            if entry_number(key) is None and not is_checkpoint(key):
                self._add("unsigned", key, "nothing in the ledger has such a key")
        stored = {key: data for key in checkpoint_keys if (data := self._get(key)) is not None}
        self._check_entries(numbers, {checkpoint_size(data) for data in (*stored.values(), *self.anchors)})
        anchors = [found for data in self.anchors if (found := self._read_checkpoint(None, data))]
        checkpoints = {key: found for key, data in stored.items() if (found := self._read_checkpoint(key, data))}
        self._check_checkpoints(checkpoints, set(checkpoint_keys))
        self._check_anchors(anchors, checkpoints)
        self._check_objects()
        return Report(len(numbers), len(checkpoint_keys), self.objects, self.bytes_read, self.covered, tuple(self._counted()), self.chain)

    def _add(self, kind: Kind, key: str, detail: str) -> None:
        self.findings.append(Finding(kind, key, detail))

    def _get(self, key: str) -> bytes | None:
        """An object's bytes; None, with a finding, when it cannot be had."""
        try:
            return self.store.get(key)
        except KeyError:
            self._add("missing", key, "removed while it was being read")
        except (CorruptStore, UsageError) as error:
            self._add("modified", key, str(error))
        return None

    # Entries.

    def _check_entries(self, numbers: Sequence[int], sizes: set[int]) -> None:
        """Each entry by itself and after the one before; roots at `sizes` as long as there is no fault."""
        edge, before, expected = CompactRange(), None, 0
        self.heads[0] = edge.root()
        for number in sorted(numbers):
            if number > expected:
                self._add("missing", entry_key(expected), f"entries {expected} to {number - 1} are missing")
            entry = self._check_entry(number, before)
            if entry is not None and edge.size == number:
                edge.append(leaf_hash(entry.data))
                if edge.size in sizes:
                    self.heads[edge.size] = edge.root()
            before, expected = entry, number + 1
        self.length = expected

    def _check_entry(self, number: int, before: Entry | None) -> Entry | None:
        key = entry_key(number)
        data = self._get(key)
        if data is None:
            return None
        try:
            entry = decode_entry(number, data)
            self.chain = self.chain.check(entry, self.origin)
        except ModifiedNote as error:
            self._add("modified", key, error.fault)
            return None
        except UnsignedNote as error:
            self._add_unsigned(key, error.fault, {entry.key_id})
            return None
        if entry.type == LOST:
            fault = f"{entry.body.get('lost')} was lost; {entry.key_id}, which you trust, signs from here on"
            self._add("key-lost", key, fault)
        # Where the one before is at fault itself, its successor is not accused as well.
        known = before is not None and before.sequence == number - 1
        if (known and before and entry.previous != before.sha256) or (number == 0 and entry.previous is not None):
            self._add("modified", key, "does not follow the entry before it")
            return None
        self.bytes_read += len(data)
        self.entries[number] = entry
        return entry

    # Checkpoints.

    def _read_checkpoint(self, key: str | None, data: bytes) -> Checkpoint | None:
        """A checkpoint of the store, or an anchor, whose key is None."""
        try:
            return self.chain.read_checkpoint(key, data, self.origin)
        except ModifiedNote as error:
            self._add("modified", key or "anchor", error.fault)
        except UnsignedNote as error:
            self._add_unsigned(key or "anchor", error.fault, signers(data))
        return None

    def _add_unsigned(self, key: str, fault: str, by: set[str]) -> None:
        """Report what another key signed, once for each key: where a rotation is lost, all that comes after it is by such a key."""
        signed = self.strangers.setdefault(frozenset(by), [])
        signed.append(key)
        if len(signed) == 1 or not by:
            self._add("unsigned", key, fault)

    def _counted(self) -> Iterator[Finding]:
        """The findings; what is unsigned says how much else the same key signed."""
        more = {keys[0]: len(keys) - 1 for by, keys in self.strangers.items() if by}
        for found in self.findings:
            others = more.get(found.key, 0) if found.kind == "unsigned" else 0
            yield replace(found, detail=f"{found.detail}; and so are {others} more entries and checkpoints") if others else found

    def _check_checkpoints(self, checkpoints: Mapping[str, Checkpoint], present: set[str]) -> None:
        seen: dict[tuple[str, int, int], Digest] = {}
        for found in checkpoints.values():
            self.bytes_read += len(found.data)
            if self._check_root(found, found.key):
                self.covered = max(self.covered, found.size)
            self._check_previous(found, checkpoints, present)
            for digest in found.digests:
                if seen.setdefault((digest.log_id, digest.partition, digest.offset_next), digest) != digest:
                    where = f"partition {digest.partition} up to {digest.offset_next}"
                    self._add("modified", found.key, f"two checkpoints give different digests of {where}")

    def _check_root(self, found: Checkpoint, key: str) -> bool:
        """Whether the entries are those that the checkpoint covered. Where one of them is at fault, that stands in the report."""
        known = self.heads.get(found.size)
        if known == found.head.root:
            return True
        if known is not None:
            self._add("modified", key, f"its root is not that of the first {found.size} entries")
        elif found.size > self.length:
            gone = entry_key(self.length)
            if not any(finding.key == gone for finding in self.findings):
                self._add("missing", gone, f"{key} covers {found.size} entries")
        return False

    def _check_previous(self, found: Checkpoint, checkpoints: Mapping[str, Checkpoint], present: set[str]) -> None:
        """The checkpoint that this one names as the one before must be there with its bytes."""
        line = found.line("previous")
        if line is None:
            return
        digest, _, name = line.partition(" ")
        key = CHECKPOINTS + name
        if key not in present:
            self._add("missing", key, f"the checkpoint {found.key} names it as the one before")
        elif key in checkpoints and base64.b64encode(sha256(checkpoints[key].data).digest()).decode() != digest:
            self._add("modified", key, f"not the bytes that {found.key} names")

    def _check_anchors(self, anchors: Sequence[Checkpoint], checkpoints: Mapping[str, Checkpoint]) -> None:
        for anchor in anchors:
            self._check_root(anchor, "anchor")
            stored = checkpoints.get(anchor.key)
            if stored is None and not any(finding.key == anchor.key for finding in self.findings):
                self._add("missing", anchor.key, "the anchor is a copy of it")
            elif stored is not None and stored.data != anchor.data:
                self._add("modified", anchor.key, "differs from the anchor")

    # Objects.

    def _check_objects(self) -> None:
        erased = self._erased()
        named: set[str] = set()
        for entry in self.entries.values():
            for claim in self._claims(entry):
                named.add(claim.key)
                if self.leaves_out(entry, claim.key):
                    continue
                by = erased.get(claim.key)
                if self._check_object(claim, by) and entry.type == "segment" and self.check_segment:
                    self.findings += self.check_segment(entry)
        for prefix in NAMED:
            for info in self.store.list(prefix):
                if info.key not in named and not self._explains_itself(info.key):
                    self._add("orphan", info.key, "no entry names it; nothing reads it")

    def _explains_itself(self, key: str) -> bool:
        """Whether it is a schema under its own fingerprint: all known ones are stored before any segment needs them."""
        if not key.startswith("schemas/"):
            return False
        data = self.store.get(key)
        try:
            return schema_key(Schema(json.loads(data)).fingerprint) == key
        except Exception:  # whatever else stands there leads to: it is no schema of ours
            return False

    def _erased(self) -> dict[str, Entry]:
        """Objects that a signed entry says were erased: its body lists their keys under `erased`."""
        found: dict[str, Entry] = {}
        for entry in self.entries.values():
            keys = entry.body.get("erased")
            if isinstance(keys, list):
                found.update({key: entry for key in keys if isinstance(key, str)})
        return found

    def _claims(self, entry: Entry) -> Iterator[Claim]:
        """What the entry says of objects: `key`, `bytes`, `sha256` of its body, and of each item of the body's `objects`."""
        items: list[Any] = [entry.body] if entry.type == "segment" or {"key", "bytes", "sha256"} <= entry.body.keys() else []
        listed = entry.body.get("objects")
        for item in [*items, *(listed if isinstance(listed, list) else [])]:
            values = [item.get(name) for name in ("key", "bytes", "sha256")] if isinstance(item, dict) else []
            match values:
                case [str(key), int(size), str(digest)]:
                    yield Claim(entry, key, size, digest)
                case _:
                    self._add("modified", entry.key, "names an object without key, bytes and sha256")

    def _check_object(self, claim: Claim, erased_by: Entry | None) -> bool:
        """Whether the object stands as it was entered."""
        try:
            info = self.store.head(claim.key)
            if info is None:
                self._add_absent(claim, erased_by)
                return False
            if info.size != claim.bytes:
                self._add("modified", claim.key, f"has {info.size} bytes, entry {claim.entry.sequence} says {claim.bytes}")
                return False
            if self._digest(claim) != claim.sha256:
                self._add("modified", claim.key, f"its SHA-256 is not that of entry {claim.entry.sequence}")
                return False
        except KeyError:
            self._add_absent(claim, erased_by)
            return False
        except (CorruptStore, UsageError) as error:
            self._add("modified", claim.key, str(error))
            return False
        if erased_by is not None and erased_by.sequence > claim.entry.sequence:
            self._add("orphan", claim.key, f"entry {erased_by.sequence} says that it is gone; the next run removes it")
        self.objects += 1
        self.bytes_read += claim.bytes
        return True

    def _erased_since(self) -> dict[str, Entry]:
        """Objects that went while this was running: what removes one enters it first."""
        found: dict[str, Entry] = {}
        number = self.length
        while True:
            try:
                entry = decode_entry(number, self.store.get(entry_key(number)))
                self.chain.check(entry, self.origin)
            except (KeyError, ModifiedNote, UnsignedNote, CorruptStore, UsageError):
                return found
            keys = entry.body.get("erased")
            found.update(dict.fromkeys(keys, entry) if isinstance(keys, list) else {})
            number += 1

    def _add_absent(self, claim: Claim, erased_by: Entry | None) -> None:
        erased_by = erased_by or self._erased_since().get(claim.key)
        if erased_by is not None and erased_by.sequence > claim.entry.sequence:
            why = _REMOVED.get(str(erased_by.body.get("why")), "erased")
            self._add("erased-with-proof", claim.key, f"entered by {claim.entry.sequence}, {why} by {erased_by.sequence}")
        else:
            self._add("missing", claim.key, f"entry {claim.entry.sequence} names it")

    def _digest(self, claim: Claim) -> str:
        digest = sha256()
        for start in range(0, claim.bytes, CHUNK):
            digest.update(self.store.get_range(claim.key, start, CHUNK))
        return digest.hexdigest()
