"""The ledger's keys in the data directory: the private one that signs now, readable by its owner alone, and the public ones.

`ledger.pub` holds the first public key, and below it those that a fresh start after a loss began with. Rotations leave it as it is.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from pathlib import Path

from schemas.errors import SettingsError, StorageFull, StoreUnavailable, UsageError
from store.ledger.chain import KeyChain
from store.ledger.note import Signer, Verifier, other_key

PRIVATE = "ledger.key"
PUBLIC = "ledger.pub"
NEXT = "ledger.key.next"
"""The private key that a rotation is handing over to: it signs once its entry stands, and takes the other's place then."""


class KeyFolder:
    """The key files of an installation. The private key is read when something is to be signed, so reading needs the public ones only."""

    def __init__(self, folder: Path, name: str) -> None:
        """A key is made where there is none yet. Raises as `load_or_make` and `load_public`."""
        self.folder = folder
        if (folder / PRIVATE).exists() or not (folder / PUBLIC).exists():
            load_or_make(folder, name)
        self.trusted = load_public(folder / PUBLIC).trusted
        self._held: Signer | None = None

    def private(self, verifier: Verifier) -> Signer:
        """The private half of the key in force. Where a rotation was interrupted after its entry stood, it is finished here.

        Raises:
            SettingsError: it is not here.
        """
        if self._held is None or self._held.verifier != verifier:
            self._held = self._read(verifier)
        return self._held

    def draft(self) -> Signer:
        """The key that is to follow, made when there is none yet; it signs nothing before `promote`."""
        path = self.folder / NEXT
        if not path.exists():
            _write_new(path, Signer.make(self.trusted[0].name).secret, 0o600)
        return load(self.folder, NEXT)

    def promote(self) -> None:
        """Put the drafted key in the place of the one before, which is gone then."""
        os.replace(self.folder / NEXT, self.folder / PRIVATE)
        _sync(self.folder)

    def trust(self, verifier: Verifier) -> None:
        """Add a public key to those that are trusted: one that began again after a loss."""
        path = self.folder / PUBLIC
        if verifier not in self.trusted:
            new = path.with_name(f".{PUBLIC}.{uuid.uuid4().hex}")
            _write_new(new, "\n".join(map(str, (*self.trusted, verifier))), 0o444)
            os.replace(new, path)
            _sync(self.folder)
            self.trusted = (*self.trusted, verifier)

    def _read(self, verifier: Verifier) -> Signer:
        following = load(self.folder, NEXT) if (self.folder / NEXT).exists() else None
        if following is not None and following.verifier == verifier:
            self.promote()
            return following
        signer = load(self.folder)
        if signer.verifier != verifier:
            raise other_key(verifier, signer.verifier.key_id)
        return signer


def load_or_make(folder: Path, name: str) -> Signer:
    """The key of this installation, made as `name` when there is none; several processes at once get the same one.

    The public half is written beside it (`name+hash+base64`), to be handed to whoever verifies.

    Raises:
        SettingsError: the file is damaged, belongs to another name, or others may read it.
        StoreUnavailable, StorageFull: the folder cannot be written.
    """
    path = folder / PRIVATE
    try:
        if not path.exists() and not (folder / PUBLIC).exists():
            folder.mkdir(parents=True, exist_ok=True)
            _write_new(path, Signer.make(name).secret, 0o600)
        signer = load(folder)
        if not (folder / PUBLIC).exists():
            _write_new(folder / PUBLIC, str(signer.verifier), 0o444)
    except OSError as error:
        kind = StorageFull if error.errno == 28 else StoreUnavailable
        raise kind(error.strerror or str(error), operation="make key", place=str(path)) from error
    if signer.name != name:
        hint = f"set ledger.origin to {signer.name}, or start a new ledger with a new key"
        raise SettingsError(f"the key belongs to {signer.name}, not to {name}", operation="load key", place=str(path), hint=hint)
    return signer


def load(folder: Path, file: str = PRIVATE) -> Signer:
    """The private key.

    Raises:
        SettingsError: there is none, it is damaged, or others than its owner may read it.
    """
    path = folder / file
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise SettingsError("others may read the private key", operation="load key", place=str(path), hint=f"chmod 600 {path}")
        return Signer.parse(path.read_text())
    except (OSError, UsageError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        hint = "put the key back from your safe copy; if there is none: `tokentape keys ledger rotate --lost`"
        raise SettingsError(f"no usable key: {error}", operation="load key", place=str(path), hint=hint) from error


def load_public(path: Path) -> KeyChain:
    """A public key file: the ledger's first key, and on lines of their own those that began again after a loss.

    Raises:
        SettingsError: it cannot be read or is no key.
    """
    try:
        return KeyChain.of(Verifier.parse(line) for line in path.read_text().splitlines() or [""])
    except (OSError, UsageError, ValueError) as error:
        hint = "name the file ledger.pub of the installation that signed"
        raise SettingsError(f"no usable public key: {error}", operation="load key", place=str(path), hint=hint) from error


def _write_new(path: Path, text: str, mode: int) -> None:
    """Write a file durably under a name that is free; another process that was first wins silently."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
