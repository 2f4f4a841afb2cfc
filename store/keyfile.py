"""Secret keys of an installation that are random bytes in a file: made at the first use and kept."""

from __future__ import annotations

import os
from pathlib import Path

from schemas.errors import StorageFull

KEY_BYTES = 32


def installation_key(path: Path) -> bytes:
    """32 random bytes, made at the first start and kept; readable by their owner alone.

    Raises:
        StorageFull: they cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        if not path.exists():
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(os.urandom(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(draft, path)  # fails where another process was first: then its key is the key
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        return path.read_bytes()
    except OSError as error:
        hint = "make the data directory writable"
        raise StorageFull(error.strerror or str(error), operation="read key", place=str(path), hint=hint) from error
