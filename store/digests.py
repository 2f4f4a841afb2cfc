"""Digests of large files by content, taken once: a file that kept its path, size, time and inode keeps its digest.

The cache is one JSON file, written by rename, so that several processes may use it at once; at worst one of them reads
a file again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

THREADS = 4
"""Files read at once: one thread does not fill a fast disk, and SHA-256 leaves the interpreter's lock."""


class FileDigests:
    """SHA-256 of files. `cache` is where digests are kept; without one each file is read every time."""

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache
        self._known = _read(cache) if cache else {}
        self.read_bytes = 0
        """Bytes that had to be read, since no digest of them was known."""

    def of(self, files: Iterable[Path]) -> dict[str, str]:
        """Name of each file to its digest, in hex.

        Raises:
            OSError: a file cannot be read.
        """
        paths = sorted(files)
        with ThreadPoolExecutor(THREADS, "digest") as pool:
            found = dict(zip((path.name for path in paths), pool.map(self._one, paths), strict=True))
        self._write()
        return found

    def _one(self, path: Path) -> str:
        status = path.stat()
        key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
        if key not in self._known:
            with path.open("rb") as file:
                self._known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            self.read_bytes += status.st_size
        return self._known[key]

    def _write(self) -> None:
        """Keep what is known; a cache that cannot be written costs the next process some seconds, and nothing else."""
        if self._cache is None or not self.read_bytes:
            return
        with contextlib.suppress(OSError):
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._cache.parent, delete=False) as file:
                json.dump({**_read(self._cache), **self._known}, file)
            os.replace(file.name, self._cache)


def combined(digests: dict[str, str]) -> str:
    """One digest of several files: over their names and contents, whatever folder they lie in."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _read(cache: Path) -> dict[str, str]:
    try:
        found = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
