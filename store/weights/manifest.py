"""What files a model has, by digest: the file that `sha256sum` writes, so that no tool of ours is needed to make or check one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from schemas.errors import DataError, UsageError

MANIFEST = "SHA256SUMS"
"""Its name beside the files; it is put last, so a model whose manifest is there is whole."""
CHUNK = 4 << 20
"""Bytes hashed at a time."""

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


@dataclass(frozen=True, slots=True)
class Manifest:
    """SHA-256 by file name, relative to the model's folder; `digest` stands for all of it."""

    files: dict[str, str]
    digest: str

    @classmethod
    def read(cls, data: bytes, *, place: str) -> Manifest:
        """A manifest as `sha256sum` writes it.

        Raises:
            DataError: it is none, or names a file outside of its folder.
        """
        files = {}
        for line in data.decode("utf-8", errors="replace").splitlines():
            found = _LINE.fullmatch(line)
            if found is None or not _inside(name := found[2].removeprefix("./")):
                hint = f"write it anew with: tokentape weights publish, or sha256sum * > {MANIFEST}"
                raise DataError(f"{line[:80]!r} is no line of a manifest", operation="fetch weights", place=place, hint=hint)
            files[name] = found[1]
        if not files:
            raise DataError("the manifest names no file", operation="fetch weights", place=place, hint="publish the model again")
        return cls(files, hashlib.sha256(data).hexdigest())

    @classmethod
    def of(cls, folder: Path) -> Manifest:
        """The manifest of a model's folder, hidden files and an old manifest left out.

        Raises:
            UsageError: there is nothing in it.
        """
        paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        names = [path.relative_to(folder).as_posix() for path in paths]
        files = {name: digest_of(folder / name) for name in names if name != MANIFEST and not name.startswith(".") and "/." not in name}
        if not files:
            hint = "name the folder that holds config.json and the weights"
            raise UsageError("no files are there", operation="publish weights", place=str(folder), hint=hint)
        return cls(files, hashlib.sha256(_text(files.items()).encode()).hexdigest())

    @property
    def data(self) -> bytes:
        """Its bytes, whose SHA-256 is `digest` if it was made here."""
        return _text(self.files.items()).encode()


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _text(files: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in files)


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and name not in ("", ".", MANIFEST)
