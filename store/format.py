"""The data directory's format: which versions of this program may touch what stands in it.

`format.json` says the format and who wrote it last. It is read before anything else is opened, so that an older program
leaves the data of a newer one as they are. A directory without the file was written before there was one: format 1.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

from schemas.errors import CorruptStore, NewerFormat, StorageFull, StoreUnavailable

FORMAT = 1
"""Grows when an older program would misread or damage what a newer one writes. New nullable fields of events do not: schemas
have fingerprints of their own, and an indexer stops before one that it cannot hold."""

_NAME = "format.json"


def check_format(data: Path, version: str) -> None:
    """Refuse a data directory that a newer program made; nothing is written. `version` is that of this program.

    Raises:
        NewerFormat: it has a format that this program does not know.
        CorruptStore: the file cannot be understood. StoreUnavailable: it cannot be read.
    """
    found, writer = _noted(data, version)
    if found > FORMAT:
        fault = f"the directory has format {found}, written by tokentape {writer}; tokentape {version} reads up to format {FORMAT}"
        hint = f"run tokentape {writer} or later on it, or restore the backup from before the upgrade elsewhere; nothing was touched"
        raise NewerFormat(fault, operation="open", place=str(data), hint=hint)


def noted_format(data: Path) -> int:
    """The format of a data directory, as it is noted there.

    Raises:
        CorruptStore: the note cannot be understood. StoreUnavailable: it cannot be read.
    """
    return _noted(data, "")[0]


def _noted(data: Path, version: str) -> tuple[int, str]:
    path = data / _NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return 1, version
    except OSError as error:
        hint = "name another --data directory, or see to its permissions"
        raise StoreUnavailable(error.strerror or str(error), operation="open", place=str(path), hint=hint) from error
    try:
        document = json.loads(text)
        return int(document["format"]), str(document["written_by"])
    except (ValueError, KeyError, TypeError) as error:
        hint = f'put it back from a copy; a directory of this version says {{"format": {FORMAT}, "written_by": "{version}"}}'
        raise CorruptStore("the file does not say which format the directory has", operation="open", place=str(path), hint=hint) from error


def mark_format(data: Path, version: str) -> None:
    """Note the format of a data directory that has no note of it; made with the directory.

    Raises:
        StoreUnavailable, StorageFull: it cannot be written.
    """
    path, draft = data / _NAME, data / f".{_NAME}.{uuid.uuid4().hex}"
    if path.exists():
        return
    try:
        data.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"format": FORMAT, "written_by": version}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        kind = StorageFull if error.errno == 28 else StoreUnavailable
        hint = "see to the disk and the rights on the folder"
        raise kind(error.strerror or str(error), operation="open", place=str(data), hint=hint) from error
