"""Signed notes and checkpoints in the formats of C2SP: `signed-note` with Ed25519 keys, and `tlog-checkpoint`.

Sources: https://c2sp.org/signed-note, https://c2sp.org/tlog-checkpoint. Any tool that reads those formats can check a
checkpoint of tokentape with the public key alone.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cached_property

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from schemas.errors import ProofError, SettingsError, UsageError

ALGORITHM = b"\x01"  # Ed25519 in signed-note's list of signature types
PRIVATE_PREFIX = "PRIVATE+KEY+"
KEY_HASH_BYTES = 4  # of a key, before its signatures
SIGNATURES_MAX = 100  # more than that is an attack, says Go's implementation
_NAME = re.compile(r"[^\s+{][^\s+]*")  # "{" would let a signed entry pass for a note's text
_SIGNATURE = re.compile(r"— (\S+) (\S+)")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


class ModifiedNote(ProofError):
    """A note that is malformed, or whose text is not what the known key signed."""


class UnsignedNote(ProofError):
    """A note without a signature by the known key."""


@dataclass(frozen=True)
class Verifier:
    """A public key and its name; the name is part of the key's identity."""

    name: str
    public: bytes

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(f"{self.name!r} cannot name a key", operation="read key", hint="no white space, no plus sign, no { in front")

    @classmethod
    def parse(cls, text: str) -> Verifier:
        """From `name+hash+base64`, the form of a signed-note verifier key.

        Raises:
            UsageError: the text is not such a key, or its hash does not fit.
        """
        name, hint, encoded = _three(text.strip())
        public = _key_bytes(encoded)
        key = cls(name, public)
        if key.hash.hex() != hint:
            raise _bad_key()
        return key

    @property
    def hash(self) -> bytes:
        """Four bytes that tell the key of a signature."""
        return hashlib.sha256(self.name.encode() + b"\n" + ALGORITHM + self.public).digest()[:KEY_HASH_BYTES]

    @property
    def key_id(self) -> str:
        """Name and hash of the key."""
        return f"{self.name}+{self.hash.hex()}"

    @property
    def trusted(self) -> tuple[Verifier, ...]:
        """The public keys that a ledger opened with it is held against: itself."""
        return (self,)

    def private(self, verifier: Verifier) -> Signer:
        """Raises UsageError: nothing can be signed with a public key."""
        raise UsageError("this ledger was opened with the public key alone", operation="append", place=verifier.key_id)

    @cached_property
    def _key(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(self.public)

    def verify(self, message: bytes, signature: bytes) -> bool:
        """Whether `signature` (64 bytes) is this key's over `message`."""
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def __str__(self) -> str:
        return f"{self.key_id}+{base64.b64encode(ALGORITHM + self.public).decode()}"


@dataclass(frozen=True)
class Signer:
    """A private key; `str` and `repr` never show it, `secret` does."""

    name: str
    _seed: bytes

    def __repr__(self) -> str:
        return f"Signer({self.verifier.key_id})"

    @classmethod
    def make(cls, name: str) -> Signer:
        """A fresh key."""
        return cls(name, Ed25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def parse(cls, text: str) -> Signer:
        """From `PRIVATE+KEY+name+hash+base64`, the form that Go's note package writes.

        Raises:
            UsageError: the text is not such a key. The message never quotes it.
        """
        if not text.startswith(PRIVATE_PREFIX):
            raise _bad_key()
        name, hint, encoded = _three(text.strip().removeprefix(PRIVATE_PREFIX))
        key = cls(name, _key_bytes(encoded))
        if key.verifier.hash.hex() != hint:
            raise _bad_key()
        return key

    @cached_property
    def _key(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self._seed)

    @cached_property
    def verifier(self) -> Verifier:
        """The public half."""
        return Verifier(self.name, self._key.public_key().public_bytes_raw())

    @property
    def trusted(self) -> tuple[Verifier, ...]:
        """As `Verifier.trusted`."""
        return (self.verifier,)

    def private(self, verifier: Verifier) -> Signer:
        """Itself, where it is the private half of the key that is asked for.

        Raises:
            SettingsError: it is not.
        """
        if self.verifier != verifier:
            raise other_key(verifier, self.verifier.key_id)
        return self

    @property
    def secret(self) -> str:
        """The key in the form that `parse` reads."""
        return f"{PRIVATE_PREFIX}{self.verifier.key_id}+{base64.b64encode(ALGORITHM + self._seed).decode()}"

    def sign(self, message: bytes) -> bytes:
        """Signature of 64 bytes."""
        return self._key.sign(message)


def sign_note(text: str, signer: Signer) -> bytes:
    """The note: text, empty line, one signature line.

    Raises:
        UsageError: the text does not end with a newline, or holds other control characters.
    """
    if not text.endswith("\n") or _has_control(text):
        raise UsageError("a note's text ends with a newline and holds no other control character", operation="sign note")
    return note_bytes(text, signer.verifier, signer.sign(text.encode()))


def note_bytes(text: str, key: Verifier, signature: bytes) -> bytes:
    """A note with one signature, in its only spelling."""
    return f"{text}\n— {key.name} {base64.b64encode(key.hash + signature).decode()}\n".encode()


def open_note(data: bytes, key: Verifier) -> str:
    """The text of a note that `key` signed; signatures of other keys are passed over, as the format asks.

    Raises:
        ModifiedNote: malformed, or the signature does not fit the text.
        UnsignedNote: no signature by this key.
    """
    text, lines = _split_note(data)
    signatures = [_signature(line) for line in lines]
    mine = [signature for name, hint, signature in signatures if name == key.name and hint == key.hash]
    if not mine:
        raise UnsignedNote(f"no signature by {key.key_id}", operation="read note")
    if not all(key.verify(text.encode(), signature) for signature in mine):
        raise ModifiedNote(f"the signature by {key.key_id} does not fit the text", operation="read note")
    return text


@dataclass(frozen=True, slots=True)
class TreeHead:
    """What a checkpoint says: origin (name of the log), number of leaves, root hash, and extension lines."""

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    def to_text(self) -> str:
        """The note's text.

        Raises:
            UsageError: a line is empty or holds a newline or another control character.
        """
        lines = [self.origin, str(self.size), base64.b64encode(self.root).decode(), *self.extensions]
        if any(not line or _has_control(line) or "\n" in line for line in lines):
            raise UsageError("lines of a checkpoint are not empty and hold no control character", operation="checkpoint")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_text(cls, text: str) -> TreeHead:
        """Read `to_text`'s form.

        Raises:
            ModifiedNote: the text is not a checkpoint.
        """
        lines = text.split("\n")
        if len(lines) < 4 or lines.pop() != "" or not all(lines) or not _SIZE.fullmatch(lines[1]):
            raise ModifiedNote("not a checkpoint: origin, size, root and a final newline are due", operation="read checkpoint")
        root = from_base64(lines[2])
        if len(root) != 32:
            raise ModifiedNote("not a checkpoint: the root is no SHA-256 in base64", operation="read checkpoint")
        return cls(lines[0], int(lines[1]), root, tuple(lines[3:]))


def from_base64(text: str) -> bytes:
    """What base64 stands for, empty when it is none or not the only spelling: unused bits of the last character are zero."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        return b""
    return raw if base64.b64encode(raw).decode() == text else b""


def signers(data: bytes) -> set[str]:
    """Ids of the keys that claim to have signed a note; none where it is malformed."""
    try:
        return {f"{name}+{hint.hex()}" for name, hint, _ in map(_signature, _split_note(data)[1])}
    except ModifiedNote:
        return set()


def other_key(wanted: Verifier, held: str) -> SettingsError:
    """The error of who holds a private key that is not the one in force."""
    hint = "put the private key of the last rotation into keys/ledger.key; if it is lost: `tokentape keys ledger rotate --lost`"
    return SettingsError(f"the ledger is signed by {wanted.key_id} now, and the private key here is {held}", operation="sign", hint=hint)


def _split_note(data: bytes) -> tuple[str, list[str]]:
    try:
        whole = data.decode()
    except UnicodeDecodeError:
        raise ModifiedNote("not UTF-8", operation="read note") from None
    body, found, tail = whole.rpartition("\n\n")
    lines = tail.split("\n")
    if not found or lines.pop() != "" or not 0 < len(lines) <= SIGNATURES_MAX or _has_control(whole):
        raise ModifiedNote("not a signed note: text, an empty line and signature lines are due", operation="read note")
    return body + "\n", lines


def _signature(line: str) -> tuple[str, bytes, bytes]:
    """Key name, key hash and signature of one line."""
    match = _SIGNATURE.fullmatch(line)
    raw = from_base64(match[2]) if match else b""
    if match is None or len(raw) <= KEY_HASH_BYTES:
        raise ModifiedNote("not a signed note: a signature line is malformed", operation="read note")
    return match[1], raw[:KEY_HASH_BYTES], raw[KEY_HASH_BYTES:]


def _has_control(text: str) -> bool:
    return _CONTROL.search(text) is not None


def _three(text: str) -> tuple[str, str, str]:
    parts = text.split("+", 2)  # base64 may hold plus signs, names and hashes may not
    if len(parts) != 3:
        raise _bad_key()
    return parts[0], parts[1], parts[2]


def _key_bytes(encoded: str) -> bytes:
    raw = from_base64(encoded)
    if len(raw) != 33 or raw[:1] != ALGORITHM:
        raise _bad_key()
    return raw[1:]


def _bad_key() -> UsageError:
    return UsageError("not a signed-note Ed25519 key", operation="read key", hint="keys look like name+0123abcd+base64")
