"""The signed log of segments: Merkle trees, signed notes, entries, checkpoints, and their offline verifier."""

from __future__ import annotations

from schemas.settings import Settings
from store.ledger.entry import Checkpoint, Digest, Entry, digest_line
from store.ledger.keys import KeyFolder
from store.ledger.ledger import Ledger
from store.objects.base import ObjectStore

__all__ = ["Checkpoint", "Digest", "Entry", "Ledger", "digest_line", "open_ledger"]


def open_ledger(settings: Settings, store: ObjectStore) -> Ledger:
    """The installation's ledger with its keys (`data/keys`, made when missing).

    Entries are locked for `cold.lock_days` unless `cold.lock` is "none".

    Raises:
        SettingsError: the key is damaged, readable by others, or of another origin.
    """
    lock_days = 0 if settings.cold.lock == "none" else settings.cold.lock_days
    return Ledger(store, KeyFolder(settings.data / "keys", settings.ledger.origin), settings.ledger.origin, lock_days=lock_days)
