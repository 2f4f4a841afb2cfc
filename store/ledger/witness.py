"""Copies of checkpoints with somebody else, so that who holds the ledger's key cannot rewrite it unnoticed.

As C2SP's witnesses do, a copy is made only of a checkpoint that continues the last one copied. What stands with the
witness serves as an anchor of verification (`store.ledger.verify`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from schemas import clock
from schemas.errors import ProofError, SettingsError
from schemas.settings import ColdSettings, WitnessSettings
from store.ledger.entry import CHECKPOINTS, Checkpoint, is_checkpoint
from store.ledger.ledger import Ledger
from store.ledger.merkle import verify_consistency
from store.objects import open_store
from store.objects.base import NO_LOCK, Lock, ObjectStore
from store.objects.local import LocalStore


def open_witness(settings: WitnessSettings) -> ObjectStore | None:
    """Where copies go; None where the settings name nobody.

    Raises:
        SettingsError: a folder is asked for and none is named, or a bucket's credentials are refused.
        StoreUnavailable: it does not answer.
    """
    if settings.kind == "off":
        return None
    if settings.kind == "folder":
        if settings.folder is None:
            hint = "name a folder on another disk or machine"
            raise SettingsError("witness.kind is folder, and witness.folder is not set", operation="open witness", hint=hint)
        return LocalStore(settings.folder)
    names = ("endpoint", "secure", "region", "bucket", "access_key", "secret_key")
    return open_store(ColdSettings(kind="minio", **{name: getattr(settings, name) for name in names}), Path())


def anchors(store: ObjectStore) -> list[bytes]:
    """The checkpoints that a witness holds, oldest first.

    Raises:
        StoreUnavailable: it does not answer.
    """
    return [store.get(info.key) for info in store.list(CHECKPOINTS) if is_checkpoint(info.key)]


@dataclass
class Witness:
    """Copies the ledger's newest checkpoint to `store`; `lock_days` locks a copy in COMPLIANCE mode, 0 sends no lock."""

    ledger: Ledger
    store: ObjectStore
    lock_days: int = 0

    def run(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Copy the newest checkpoint if the witness has not got it.

        Raises:
            ProofError: the ledger does not continue what the witness has seen; nothing is copied.
            StoreUnavailable: ledger or witness do not answer.
        """
        newest, last = self.ledger.latest_checkpoint(), self._last()
        if newest is None or (last is not None and last.key == newest.key):
            return {"copied": 0, "witnessed": last.size if last else 0}
        self._check(last, newest)
        if not dry_run:
            until = clock.now() + timedelta(days=self.lock_days)
            self.store.create(newest.key, newest.data, lock=Lock("compliance", until) if self.lock_days else NO_LOCK)
        return {"would_copy" if dry_run else "copied": 1, "witnessed": newest.size}

    def _last(self) -> Checkpoint | None:
        keys = [info.key for info in self.store.list(CHECKPOINTS) if is_checkpoint(info.key)]
        return self.ledger.read_checkpoint(keys[-1], self.store.get(keys[-1])) if keys else None

    def _check(self, last: Checkpoint | None, newest: Checkpoint) -> None:
        """The ledger must hold what the witness has seen, unchanged."""
        if last is None:
            return
        path = self.ledger.consistency_proof(last.size, newest.size) if last.size <= newest.size else []
        if last.size > newest.size or not verify_consistency(last.size, newest.size, last.head.root, newest.head.root, path):
            hint = "`tokentape verify` says what was changed; the copies with the witness are evidence, keep them"
            raise ProofError(f"the ledger does not continue the {last.size} entries that the witness saw", operation="witness", hint=hint)
