"""Signed checkpoints that carry the partitions' running digests: proof starts at ingest, not at tiering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from store.catalog import Catalog
from store.ledger import Digest, Ledger, digest_line


@dataclass
class Checkpoints:
    """Writes a checkpoint when a partition has moved or the ledger has grown since the last one."""

    catalog: Catalog
    ledger: Ledger

    def run(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Write one if something changed."""
        digests = [Digest(at.log_id, at.partition, at.offset_next, at.digest) for at in self.catalog.positions()]
        size = self.ledger.head()
        last = self.ledger.latest_checkpoint()
        if last is not None and last.size == size and last.digests == digests:
            return {"written": 0, "ledger_size": size}
        if dry_run:
            return {"would_write": 1, "ledger_size": size}
        checkpoint = self.ledger.checkpoint([digest_line(digest) for digest in digests])
        return {"written": 1, "ledger_size": checkpoint.size, "partitions": len(digests)}
