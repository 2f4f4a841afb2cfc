"""What the ledger's entries cover of the log, by partition and day."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from lifecycle.tiering import ENTRY_TYPE
from store.ledger import Ledger


def coverage_rows(ledger: Ledger, *, day: str | None = None, partition: int | None = None) -> list[dict[str, Any]]:
    """One row for each span of offsets that an entry covers, and one, without an entry, for each gap between two.

    `covered_by` is the size of the newest checkpoint where it covers the entry, else None.

    Raises:
        StoreUnavailable: the store does not answer.
        ProofError: an entry is not what the key signed.
    """
    newest = ledger.latest_checkpoint()
    signed = newest.size if newest else 0
    spans: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for entry in ledger.entries():
        if entry.type != ENTRY_TYPE:
            continue
        for item in entry.body["coverage"]:
            covered = signed if entry.sequence < signed else None
            kept = {
                name: item[name] for name in ("log_id", "partition", "offset_first", "offset_next", "rows", "duplicates", "quarantined")
            }
            row = kept | {
                "day": entry.body["day"],
                "entry": entry.sequence,
                "covered_by": covered,
                "requeued": item["digest_first"] is None,
            }
            spans[item["log_id"], item["partition"]].append(row)
    rows = [row for where in sorted(spans) for row in _with_gaps(spans[where])]
    return [row for row in rows if day in (None, row["day"]) and partition in (None, row["partition"])]


def _with_gaps(spans: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Spans of one partition in order, with what lies between them; a requeued record lies inside an earlier span."""
    expected = 0
    for row in sorted(spans, key=lambda row: (row["offset_first"], row["entry"])):
        if not row.pop("requeued"):
            if row["offset_first"] > expected:
                yield row | {"offset_first": expected, "offset_next": row["offset_first"]} | dict.fromkeys(_UNKNOWN)
            expected = row["offset_next"]
        yield row


_UNKNOWN = ("rows", "duplicates", "quarantined", "entry", "covered_by")
"""What is not known of offsets in no entry."""
