"""The ledger's key pair in the data directory: made once, never overwritten, readable by its owner alone."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from pathlib import Path

from schemas.errors import SettingsError, StorageFull, StoreUnavailable, UsageError
from store.ledger.note import Signer, Verifier

PRIVATE = "ledger.key"
PUBLIC = "ledger.pub"


def load_or_make(folder: Path, name: str) -> Signer:
    """The key of this installation, made as `name` when there is none; several processes at once get the same one.

    The public half is written beside it (`name+hash+base64`), to be handed to whoever verifies.

    Raises:
        SettingsError: the file is damaged, belongs to another name, or others may read it.
        StoreUnavailable, StorageFull: the folder cannot be written.
    """
    path = folder / PRIVATE
    try:
        if not path.exists():
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


def load(folder: Path) -> Signer:
    """The private key.

    Raises:
        SettingsError: there is none, it is damaged, or others than its owner may read it.
    """
    path = folder / PRIVATE
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise SettingsError("others may read the private key", operation="load key", place=str(path), hint=f"chmod 600 {path}")
        return Signer.parse(path.read_text())
    except (OSError, UsageError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        hint = "put the key back from your safe copy; without it the ledger can be read but not continued"
        raise SettingsError(f"no usable key: {error}", operation="load key", place=str(path), hint=hint) from error


def load_public(path: Path) -> Verifier:
    """A public key file.

    Raises:
        SettingsError: it cannot be read or is no key.
    """
    try:
        return Verifier.parse(path.read_text())
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
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
