"""Checks a tokentape case file with the standard library and `cryptography` alone; it imports nothing of tokentape.

    python verify.py [CASE.zip | FOLDER] [--key ledger.pub] [--json]

Every event's bytes are read with the Avro schema that the ledger names, and must be a row of a segment whose Merkle root stands in
a ledger entry under the signed checkpoint. Every other member must have the SHA-256 that the signed list says. Take this script
and the public key from somebody you trust, not from the archive that you doubt.

Exit codes: 0 good, 10 something was modified, 11 something is missing, 12 something is not signed by the key, 2 no case file.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import math
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
FORMAT = "tokentape-case/1"
KINDS = {"modified": 10, "missing": 11, "unsigned": 12, "erased-with-proof": 0, "not-in-ledger": 0}
Schema = Any


class Refused(Exception):
    """A check that failed: what kind of fault, and what it is."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


# Keys and signatures: C2SP signed notes with Ed25519.


class Key:
    """A public key in the form NAME+HASH+BASE64."""

    def __init__(self, text: str) -> None:
        try:
            self.name, self.hint, encoded = text.strip().split("+", 2)
            raw = base64.b64decode(encoded, validate=True)
        except ValueError:
            raise ValueError("not a public key") from None
        if raw[:1] != b"\x01" or len(raw) != 33 or hashlib.sha256(f"{self.name}\n".encode() + raw).digest()[:4].hex() != self.hint:
            raise ValueError("not a public key")
        self.raw = raw

    def signed(self, message: bytes, signature: bytes) -> bool:
        """Whether a signature is this key's."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw[1:]).verify(signature, message)
        except InvalidSignature:
            return False
        return True


def read_keys(text: str) -> list[Key]:
    """The keys of a file, the first one first."""
    keys = [Key(line) for line in text.split()]
    if not keys:
        raise ValueError("it holds no public key")
    return keys


def open_note(note: bytes, key: Key) -> list[str]:
    """The lines of a note that a key signed."""
    text, _, tail = note.decode().rpartition("\n\n")
    for line in tail.splitlines():
        dash, name, encoded = line.split(" ")
        raw = base64.b64decode(encoded, validate=True)
        if (dash, name, raw[:4].hex()) == ("—", key.name, key.hint):
            if not key.signed(f"{text}\n".encode(), raw[4:]) or base64.b64encode(raw).decode() != encoded or tail != f"{line}\n":
                raise Refused("modified", "the signature does not fit the text")
            return text.split("\n")
    raise Refused("unsigned", f"no signature by {key.name}+{key.hint}")


class Chain:
    """The keys of a ledger: the first, and each that an entry handed over to."""

    def __init__(self, trusted: list[Key]) -> None:
        self.trusted, self.turns = trusted, [(-1, trusted[0])]

    def at(self, number: int) -> Key:
        """The key in force once the entries before `number` stand."""
        return next(key for after, key in reversed(self.turns) if after < number)

    def follow(self, number: int, data: bytes) -> None:
        """One entry that hands over to another key."""
        entry = json.loads(data)
        key = Key(entry["body"]["key"])
        if entry["type"] == "key_lost":
            if key.raw not in [trusted.raw for trusted in self.trusted[1:]]:
                raise Refused("unsigned", f"the ledger's key was lost before entry {number}, and nobody vouches for the next one")
            by = key
        elif entry["type"] == "key_rotated":
            by = self.at(number)
        else:
            raise Refused("modified", f"entry {number} hands over to no key")
        check_entry(number, data, by)
        self.turns.append((number, key))


def check_entry(number: int, data: bytes, key: Key) -> dict[str, Any]:
    """A ledger entry that a key signed: the signature is over the bytes without that field, the last one but `type`."""
    entry: dict[str, Any] = json.loads(data)
    before, _, rest = data.rpartition(b',"signature":"')
    if entry["key_id"] != f"{key.name}+{key.hint}":
        raise Refused("unsigned", f"entry {number} is signed by {entry['key_id']}")
    fits = key.signed(before + rest.partition(b'"')[2], base64.b64decode(entry["signature"], validate=True))
    if not fits or entry["sequence"] != number or entry["origin"] != key.name:
        raise Refused("modified", f"the signature does not fit entry {number}")
    return entry


# Merkle trees: RFC 9162, section 2.1.


def leaf_hash(data: bytes) -> bytes:
    """SHA-256(00 ‖ data)."""
    return hashlib.sha256(b"\x00" + data).digest()


def included(leaf: bytes, index: int, size: int, path: list[bytes], root: bytes) -> bool:
    """RFC 9162, section 2.1.3.2."""
    if not 0 <= index < size:
        return False
    at, last, found = index, size - 1, leaf
    for step in path:
        if last == 0:
            return False
        if at & 1 or at == last:
            found = hashlib.sha256(b"\x01" + step + found).digest()
            while at and not at & 1:
                at, last = at >> 1, last >> 1
        else:
            found = hashlib.sha256(b"\x01" + found + step).digest()
        at, last = at >> 1, last >> 1
    return last == 0 and found == root


# Avro: as much of it as the events need.


class Avro:
    """Reads one datum after another, and remembers where in an event salt, commitment and content stand."""

    def __init__(self, data: bytes, position: int = 0) -> None:
        self.data, self.at = data, position
        self.spans: dict[str, tuple[int, int, int]] = {}

    def take(self, size: int) -> bytes:
        """So many bytes."""
        if size < 0 or self.at + size > len(self.data):
            raise Refused("modified", "the bytes end in the middle of an event")
        self.at += size
        return self.data[self.at - size : self.at]

    def long(self) -> int:
        """A zigzag number."""
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return (value >> 1) ^ -(value & 1)

    def read(self, schema: Schema, names: dict[str, Schema], within: str = "") -> Any:
        """One datum; bytes come as hex, as the case file's JSON has them."""
        if isinstance(schema, list):
            branch = self.long()
            return self.read(schema[branch], names, within)
        if isinstance(schema, str) and schema in names:
            schema = names[schema]
        kind = schema["type"] if isinstance(schema, dict) else schema
        return self.plain(kind, schema, names, within)

    def plain(self, kind: str, schema: Schema, names: dict[str, Schema], within: str) -> Any:
        """A datum of a named type."""
        if kind == "record":
            return {field["name"]: self.field(field, names, within) for field in schema["fields"]}
        if kind == "array":
            items = []
            while count := self.long():
                if count < 0:
                    count, _ = -count, self.long()
                items += [self.read(schema["items"], names, f"{within}[]") for _ in range(count)]
            return items
        if kind in ("int", "long"):
            return self.long()
        if kind in ("float", "double"):
            number = struct.unpack("<f" if kind == "float" else "<d", self.take(4 if kind == "float" else 8))[0]
            return number if math.isfinite(number) else str(number)
        if kind == "string":
            return self.take(self.long()).decode()
        if kind == "enum":
            return schema["symbols"][self.long()]
        if kind == "boolean":
            return self.take(1) == b"\x01"
        return None if kind == "null" else self.take(self.long() if kind == "bytes" else schema["size"]).hex()

    def field(self, field: dict[str, Any], names: dict[str, Schema], within: str) -> Any:
        """A field of a record; those that a leaf is made of leave their span: start, start of the value, end."""
        name, depth = field["name"], within.count(".")
        start = self.at
        value = self.read(field["type"], names, f"{within}.{name}")
        if value is not None and ((depth == 0 and name in ("salt", "commitment")) or (depth == 1 and name == "content")):
            self.spans[name] = (start, start + 1, self.at)  # the branch of a nullable type takes one byte
        return value


def named(schema: Schema) -> dict[str, Schema]:
    """Every type that a schema gives a name to."""
    if isinstance(schema, list):
        return {name: found for item in schema for name, found in named(item).items()}
    if not isinstance(schema, dict):
        return {}
    inner = [schema.get("items"), *(field["type"] for field in schema.get("fields", []))]
    return ({schema["name"]: schema} if "name" in schema else {}) | named([item for item in inner if item is not None])


def leaf_of(header: bytes, body: bytes, spans: dict[str, tuple[int, int, int]]) -> tuple[bytes, bool]:
    """The leaf's data, `metadata ‖ C`, and whether content was erased. Spans are relative to the body."""
    metadata, at = header, 0
    for start, _, end in sorted(spans.values()):
        metadata, at = metadata + body[at:start] + b"\x00", end
    metadata += body[at:]
    values = {name: body[value:end] for name, (_, value, end) in spans.items()}
    if "commitment" in values:
        if "content" in values or "salt" in values:
            raise Refused("modified", "content beside the commitment that stands in its place")
        return metadata + values["commitment"], True
    if "content" in values:
        return metadata + hmac.digest(values.get("salt", b""), values["content"], "sha256"), False
    return metadata + bytes(32), False


def containers(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The blocks of an Avro object container file: number of records and their bytes, which are not compressed."""
    reader = Avro(data)
    if reader.take(4) != b"Obj\x01":
        raise Refused("modified", "no Avro container")
    while count := reader.long():
        for _ in range(abs(count)):
            reader.take(reader.long())
            reader.take(reader.long())
    sync = reader.take(16)
    while reader.at < len(data):
        count, size = reader.long(), reader.long()
        yield count, reader.take(size)
        if reader.take(16) != sync:
            raise Refused("modified", "the Avro container is damaged")


# The case file.


class Case:
    """An archive, or a folder that it was unpacked into, and what was found so far."""

    def __init__(self, path: Path, keys: list[Key] | None) -> None:
        self.archive = None if path.is_dir() else zipfile.ZipFile(path)
        self.path, self.keys = path, keys
        self.findings: list[tuple[str, str, str]] = []
        self.counts: Counter[str] = Counter()
        self.segments: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {}
        self.signer = ""

    def names(self) -> set[str]:
        """All members."""
        if self.archive is not None:
            return {name for name in self.archive.namelist() if not name.endswith("/")}
        return {file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file()}

    def read(self, name: str) -> bytes:
        """A member's bytes."""
        try:
            return self.archive.read(name) if self.archive is not None else (self.path / name).read_bytes()
        except (KeyError, OSError):
            raise Refused("missing", "it is not there") from None
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
            raise Refused("modified", str(error)) from None

    def tried(self, name: str, check: Callable[[], None]) -> bool:
        """Whether a check holds; if not, that stands among the findings."""
        try:
            check()
            return True
        except Refused as refused:
            self.findings.append((refused.kind, name, refused.detail))
        except Exception as error:  # whatever bytes somebody wrote there, it is this member that is at fault
            self.findings.append(("modified", name, f"{type(error).__name__}: {error}"[:200]))
        return False

    def verify(self) -> None:
        """Everything."""
        try:
            keys = read_keys(self.read("ledger.pub").decode()) if self.keys is None else self.keys
        except ValueError as error:
            raise Refused("modified", f"ledger.pub of the case: {error}; give the ledger's own with --key") from None
        self.chain = Chain(keys)
        self.tried("ledger.json", self.check_ledger)
        self.manifest: dict[str, Any] = {}
        if self.tried(SIGNATURE, self.check_manifest):
            for name in sorted(self.names() | self.manifest["members"].keys()):
                if name not in (MANIFEST, SIGNATURE):
                    self.tried(name, lambda name=name: self.check_member(name))  # type: ignore[misc]  # mypy has no lambda defaults
        for session in self.manifest.get("sessions", []):
            self.tried(session["folder"], lambda session=session: self.check_session(session))  # type: ignore[misc]  # as above

    def check_ledger(self) -> None:
        """Checkpoint, the entries under it that the events stand in, and those that hand over to another key."""
        ledger = json.loads(self.read("ledger.json"))
        note = self.read("checkpoint.txt") if "checkpoint.txt" in self.names() else b""
        if not note and not ledger["entries"]:
            return
        for item in ledger["rotations"]:
            self.chain.follow(item["number"], item["json"].encode())
        size = int(note.split(b"\n", 2)[1])
        lines = open_note(note, self.chain.at(size))
        self.signer = f"{self.chain.at(size).name}+{self.chain.at(size).hint}, {size} entries"
        if lines[0] != self.chain.at(0).name:
            raise Refused("modified", "the checkpoint belongs to another ledger")
        root = base64.b64decode(lines[2])
        for item in [*ledger["rotations"], *ledger["entries"]]:
            data, number = item["json"].encode(), item["number"]
            path = [base64.b64decode(step) for step in item["path"]]
            if not included(leaf_hash(data), number, size, path, root):
                raise Refused("modified", f"entry {number} is not under the checkpoint")
        for item in ledger["entries"]:
            entry = check_entry(item["number"], item["json"].encode(), self.chain.at(item["number"]))
            objects = {found["key"]: found for found in entry["body"].get("objects", [])}
            self.segments |= {found["key"]: (item["number"], found, objects) for found in entry["body"]["segments"]}

    def check_manifest(self) -> None:
        """The list of members is signed by the last key that the case knows."""
        data = self.read(MANIFEST)
        lines = open_note(self.read(SIGNATURE), self.chain.turns[-1][1])
        if lines != ["tokentape case file", base64.b64encode(hashlib.sha256(data).digest()).decode()]:
            raise Refused("modified", f"{MANIFEST} is not what was signed")
        self.manifest = json.loads(data)
        if self.manifest["format"] != FORMAT:
            raise Refused("modified", f"the format {self.manifest['format']!r} is not {FORMAT}")

    def check_member(self, name: str) -> None:
        """A member has the bytes that the signed list says."""
        if name not in self.manifest["members"]:
            raise Refused("modified", "nobody signed that it is part of this case")
        if hashlib.sha256(self.read(name)).hexdigest() != self.manifest["members"][name]:
            raise Refused("modified", "not the bytes that were signed")
        self.counts["members"] += 1

    def check_session(self, session: dict[str, Any]) -> None:
        """Each event of a session against the ledger, and its line of JSON against its bytes."""
        folder = session["folder"]
        proofs = {item["id"]: item for item in json.loads(self.read(f"{folder}/proofs.json"))["events"]}
        told = {line["event"]["event_id"]: line for line in map(json.loads, self.read(f"{folder}/events.jsonl").splitlines())}
        seen = 0
        for fingerprint in session["schemas"]:
            for event, header, body, spans in self.events(f"{folder}/events-{fingerprint}.avro", fingerprint):
                seen += 1
                name = f"{folder} event {event['event_id']}"
                proof = proofs.get(event["event_id"])
                self.tried(name, lambda: self.check_event(event, header, body, spans, proof))  # noqa: B023 - it is called at once
                if told.get(event["event_id"], {}).get("event") != event:
                    self.findings.append(("modified", name, "its line in events.jsonl says something else than its bytes"))
        if seen != session["events"] or len(told) != seen:
            raise Refused("missing", f"{seen} of {session['events']} events are there")

    def events(self, name: str, fingerprint: str) -> Iterator[tuple[dict[str, Any], bytes, bytes, dict[str, tuple[int, int, int]]]]:
        """The events of a container: decoded, the header that stood before each in the log, their bytes, the spans in them."""
        schema = json.loads(self.read(f"schemas/{fingerprint}.avsc"))
        names = named(schema)
        for count, block in containers(self.read(name)):
            reader = Avro(block)
            for _ in range(count):
                start, reader.spans = reader.at, {}
                event = reader.read(schema, names)
                spans = {field: (a - start, b - start, c - start) for field, (a, b, c) in reader.spans.items()}
                shown = {field: value for field, value in event.items() if value is not None}
                yield shown, b"\xc3\x01" + bytes.fromhex(fingerprint), block[start : reader.at], spans
            if reader.at != len(block):
                raise Refused("modified", "the Avro container is damaged")

    def check_event(
        self, event: dict[str, Any], header: bytes, body: bytes, spans: dict[str, tuple[int, int, int]], proof: dict[str, Any] | None
    ) -> None:
        """One event is the row of a segment that it says it is."""
        if proof is None:
            raise Refused("missing", "there is no proof of it")
        data, erased = leaf_of(header, body, spans)
        if proof["segment"] is None:
            raise Refused("not-in-ledger", "it was not in the ledger yet when the case was made; only the maker's signature covers it")
        if proof["segment"] not in self.segments:
            raise Refused("missing", f"no entry of the ledger commits {proof['segment']}")
        number, segment, objects = self.segments[proof["segment"]]
        path = [base64.b64decode(step) for step in proof["path"]]
        if not included(leaf_hash(data), proof["row"], segment["rows"], path, bytes.fromhex(segment["root"])):
            raise Refused("modified", f"it is not row {proof['row']} of {proof['segment']}, entry {number}")
        schema = self.read(f"schemas/{header[2:].hex()}.avsc")
        if objects.get(f"schemas/{header[2:].hex()}.avsc", {}).get("sha256") != hashlib.sha256(schema).hexdigest():
            raise Refused("modified", f"entry {number} names another schema")
        self.counts["events"] += 1
        if erased:
            raise Refused("erased-with-proof", "its content was erased; what it was is committed to by the leaf that was signed")

    def document(self, code: int) -> str:
        """What was found, as JSON."""
        found = [{"kind": kind, "member": name, "detail": detail} for kind, name, detail in self.findings]
        counts = {"events": self.counts["events"], "members": self.counts["members"]}
        return json.dumps({"exit_code": code, **counts, "findings": found}) + "\n"

    def report(self, code: int, *, key_given: bool) -> str:
        """What was found, for a person."""
        lines = [f"{kind:18} {name}: {detail}" for kind, name, detail in self.findings]
        kinds = Counter(kind for kind, _, _ in self.findings)
        counted = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        whose = "the one that you gave" if key_given else "the one in the archive: compare it with the one that you were given"
        events, members = self.counts["events"], self.counts["members"]
        lines += [
            f"signed by   {self.signer or 'no checkpoint'}",
            f"public key  {whose}",
            f"proven      {events} events are rows of the ledger; {members} members have the bytes that were signed",
            f"verdict     {'good' if code == 0 else 'NOT GOOD'}{': ' if counted else ''}{counted}",
        ]
        return "".join(f"{line}\n" for line in lines)


def exit_code(kinds: Iterable[str]) -> int:
    """Of the worst finding."""
    return min((KINDS[kind] for kind in kinds if KINDS[kind]), default=0)


def main(words: list[str] | None = None) -> int:
    """Check a case file and say what was found."""
    parser = argparse.ArgumentParser(description="Check a tokentape case file.")
    parser.add_argument("case", nargs="?", type=Path, default=Path(__file__).parent, help="the archive, or the folder it was unpacked into")
    parser.add_argument("--key", type=Path, help="the ledger's public key, handed to you by another way than the case")
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    given = parser.parse_args(words)
    try:
        keys = read_keys(given.key.read_text()) if given.key else None
    except (OSError, ValueError) as error:
        sys.stderr.write(f"no public key that can be read: {given.key}: {getattr(error, 'strerror', None) or error}\n")
        return 2
    try:
        case = Case(given.case, keys)
        case.verify()
    except (OSError, ValueError, zipfile.BadZipFile, Refused) as error:
        sys.stderr.write(f"no case file that can be read: {error}\n")
        return 2
    code = exit_code(kind for kind, _, _ in case.findings)
    sys.stdout.write(case.document(code) if given.json else case.report(code, key_given=bool(given.key)))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
