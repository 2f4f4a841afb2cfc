"""Small segments of one tenant, day and class become one, so that looking costs few requests.

A day that was tiered in pieces leaves a segment a piece. The merged one supersedes them by a ledger entry of its own. What
a compliance lock keeps from being removed is left as it is.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

from lifecycle.register import Register
from lifecycle.rewriting import Change, Done, rewriting
from lifecycle.tiering import WAIT_S, Tiering
from store.catalog import Segment

WHY = "merge"


@dataclass(frozen=True)
class Compaction:
    """A run that merges what fits into one segment."""

    tiering: Tiering

    def run(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Merge, or say what would be merged; what was done as a flat dict. Raises as `Rewriting.apply`."""
        if dry_run:
            return {"would_merge": [f"{group[0].tenant} {group[0].day}: {len(group)} segments" for group in self._groups()]}
        done = Done()
        with self.tiering.alone(wait_s=WAIT_S):
            self.tiering.reconcile_alone()
            register = Register.of(self.tiering.ledger)
            with rewriting(self.tiering, register) as run:
                run.sweep()
                for group in self._groups():
                    free = tuple(segment for segment in group if run.locked_until(segment) is None)
                    if len(free) > 1:
                        run.apply(partial(Change, WHY, free), done)
        return {"segments": done.segments, "segments_new": done.segments_new, "bytes": done.bytes_written}

    def _groups(self) -> list[list[Segment]]:
        """Segments of one place, smallest first, as many as fit into one; nothing that is alone."""
        places: dict[tuple[str, str, str], list[Segment]] = defaultdict(list)
        for segment in sorted(self.tiering.catalog.snapshot().segments, key=lambda segment: (segment.bytes, segment.key)):
            places[segment.tenant, segment.day, segment.retention_class].append(segment)
        groups = []
        for segments in places.values():
            group: list[Segment] = []
            for segment in segments:
                fits = sum(item.bytes for item in group) + segment.bytes <= self.tiering.segment_bytes_max
                if fits and sum(item.rows for item in group) + segment.rows <= self.tiering.segment_rows_max:
                    group.append(segment)
            if len(group) > 1:
                groups.append(group)
        return groups
