"""Signed checkpoints that carry the partitions' running digests: proof starts at ingest, not at tiering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from store.catalog import Catalog
from store.ledger import Ledger, digest_line


@dataclass
class Checkpoints:
    """Writes a checkpoint when a partition has moved or the ledger has grown since the last one."""

    catalog: Catalog
    ledger: Ledger

    def run(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Write one if something changed."""
        digests = [digest_line(at.log_id, at.partition, at.offset_next, at.digest) for at in self.catalog.positions()]
        size = self.ledger.head()
        last = self.ledger.latest_checkpoint()
        if last is not None and last.size == size and _digests(last.extensions) == digests:
            return {"written": 0, "ledger_size": size}
        if dry_run:
            return {"would_write": 1, "ledger_size": size}
        checkpoint = self.ledger.checkpoint(digests)
        return {"written": 1, "ledger_size": checkpoint.size, "partitions": len(digests)}


def _digests(lines: Sequence[str]) -> list[str]:
    """The digest lines among a checkpoint's extension lines."""
    return [line for line in lines if line.startswith("digest ")]
