"""Servers that a restore finds or fills: the bucket of the cold tier, and the control topic.

Nothing is ever written over what is there. What a restore that was interrupted has put is known again: objects by their names and
sizes, entries of the ledger by their bytes, a control topic by a fact that stands in it until all are told.
"""

from __future__ import annotations

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import orjson

from lifecycle.manifest import CONTROL, Item, Manifest, check_whole, copy_item, whole
from schemas import clock
from schemas.errors import ProofError, UsageError
from schemas.settings import ColdSettings
from store.control import ControlLog, standing
from store.control.embedded import EmbeddedControl
from store.crashpoints import crash_point
from store.ledger import Ledger
from store.ledger.entry import ENTRIES
from store.objects.base import NO_LOCK, Lock, ObjectStore
from store.objects.local import LOCKS

PROBES = "probe/"
"""Canaries in a bucket, which are nobody's data."""

_WRITERS = 8
"""Objects put at the same time."""

_MARK = "restore"
"""Kind of the fact that stands in a control topic while a restore writes into it; the key is the SHA-256 of its facts."""

_OBJECTS, _NOTES = "cold/", f"cold/{LOCKS}/"


def stands(ledger: Ledger, manifest: Manifest) -> bool:
    """Whether the bucket holds a ledger that begins with the one that was backed up."""
    size = manifest.ledger_size
    with contextlib.suppress(ProofError):
        return size > 0 and ledger.head() >= size and ledger.root(size).hex() == manifest.ledger_root
    return False


def fill(bucket: ObjectStore, manifest: Manifest, source: Path, cold: ColdSettings) -> int:
    """Put every object of the backup that is not there yet, entries of the ledger last; how many the bucket has then.

    Raises:
        UsageError: the bucket holds something else, or the backup has no objects.
        CorruptStore: one of them is damaged in the backup; nothing was put.
    """
    items = {item.path.removeprefix(_OBJECTS): item for item in manifest.items if _is_object(item)}
    _check_ours(bucket, items, cold.bucket)
    if manifest.elsewhere and manifest.ledger_size:
        fault = "the bucket does not hold the ledger that was backed up, and the backup has no objects"
        hint = f"name the bucket {manifest.elsewhere} or its replica in cold.endpoint and cold.bucket"
        raise UsageError(fault, operation="restore", place=cold.bucket, hint=hint)
    for item in items.values():
        check_whole(item, source)
    locks = {} if cold.lock == "none" else _locks(manifest, source)

    def put(key: str) -> None:
        bucket.create_from_file(key, source / items[key].at, lock=locks.get(key, NO_LOCK))
        crash_point("restore.put_one")

    entries = [key for key in items if key.startswith(ENTRIES)]
    for keys in ([key for key in items if not key.startswith(ENTRIES)], entries):
        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(put, keys))
    return len(items)


def _is_object(item: Item) -> bool:
    return item.path.startswith(_OBJECTS) and not item.path.startswith(_NOTES)


def _check_ours(bucket: ObjectStore, items: dict[str, Item], name: str) -> None:
    """Refuse a bucket with anything in it that this backup would not have put there."""
    for info in bucket.list(""):
        item = items.get(info.key)
        ours = item is not None and info.size == item.size
        if ours and item is not None and info.key.startswith(ENTRIES):
            ours = hashlib.sha256(bucket.get(info.key)).hexdigest() == item.sha256
        if not ours and not info.key.startswith(PROBES):
            hint = "name an empty bucket, or the one that was backed up; nothing is ever restored over data"
            raise UsageError(f"the bucket holds something else: {info.key}", operation="restore", place=name, hint=hint)


def _locks(manifest: Manifest, source: Path) -> dict[str, Lock]:
    """Locks by key, as they were noted, that have not ended."""
    found = {}
    for item in manifest.items:
        if item.path.startswith(_NOTES):
            note = orjson.loads(whole(item, source).read_bytes())
            if "until" in note and (until := datetime.fromisoformat(note["until"])) > clock.now():
                found[item.path.removeprefix(_NOTES)] = Lock(note.get("mode", "compliance"), until)
    return found


def tell(control: ControlLog, manifest: Manifest, source: Path, scratch: Path) -> int | None:
    """Write the facts of the backup into an empty control topic; how many. None where it was in use: its facts are newer and stay.

    Raises:
        CorruptStore: the facts are damaged in the backup.
    """
    item = next((item for item in manifest.items if item.path == CONTROL), None)
    if item is None:
        return 0
    records = control.follow(0)
    there, mark = standing(records), (_MARK, item.sha256)
    if records and mark not in there:
        return None
    copied = scratch / "tmp" / "control.sqlite"
    copy_item(item, source, copied)
    control.append(*mark, {})
    with contextlib.closing(EmbeddedControl(copied)) as backed_up:
        facts = standing(backed_up.follow(0))
    for (kind, key), value in facts.items():
        if (kind, key) not in there:
            control.append(kind, key, value)
            crash_point("restore.told_one")
    control.append(*mark, None)
    for left in copied.parent.glob(f"{copied.name}*"):
        left.unlink()
    return len(facts)
