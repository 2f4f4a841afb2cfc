"""Makes proofs: of one event in the cold tier, and of the ledger's growth between two checkpoints."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lifecycle.selectors import id_text
from schemas.codec import encode_content, encode_metadata
from schemas.errors import CorruptStore, UnknownEvent, UsageError
from schemas.registry import SchemaRegistry
from store.catalog import Catalog, Segment
from store.cold import read_leaves
from store.ledger import Checkpoint, Ledger
from store.ledger.merkle import Tree
from store.ledger.proof import ConsistencyProof, EventProof, Leaf, Rotation
from store.objects.base import ObjectStore
from store.reader import EventReader
from store.rows import rows_to_datums
from store.stored_schemas import schema_key


@dataclass(frozen=True)
class Prover:
    """What proofs are made from; nothing is written."""

    reader: EventReader
    objects: ObjectStore
    ledger: Ledger
    registry: SchemaRegistry

    def event(self, event_id: bytes) -> EventProof:
        """The proof of one event.

        Raises:
            UnknownEvent: no such event.
            UsageError: it is not in the cold tier yet, or no checkpoint covers its entry.
            CorruptStore: its segment was altered.
        """
        segment = self._segment(event_id)
        data = self.objects.get(segment.key)
        tree = Tree(read_leaves(data, self.registry, sha256=segment.sha256, place=segment.key))
        row, datum, fingerprint = _row(data, event_id, segment.key)
        schema = self.registry.get(fingerprint)
        checkpoint = self._checkpoint(segment)
        content = encode_content(datum, schema)
        salt = datum.get("salt") if content is not None else None  # where there never was content it is part of nothing
        leaf = Leaf(encode_metadata(datum, schema), content, salt, datum.get("commitment"))
        return EventProof(
            public_key=str(self.ledger.verifier),
            rotations=self.rotations(checkpoint.size),
            event_id=event_id,
            leaf=leaf,
            schema=self.objects.get(schema_key(fingerprint)),
            segment=segment.key,
            row=row,
            rows=len(tree),
            row_path=tuple(tree.inclusion_proof(row)),
            entry=self.ledger.entry(segment.ledger_entry).data,
            entry_number=segment.ledger_entry,
            entry_path=tuple(self.ledger.inclusion_proof(segment.ledger_entry, checkpoint.size)),
            checkpoint=checkpoint.data,
        )

    def consistency(self, old: bytes, new: bytes | None = None) -> ConsistencyProof:
        """The proof that what stands under the checkpoint `new` (default: the newest) begins with what stood under `old`.

        Raises:
            ProofError: one of them is not a checkpoint of this ledger.
            UsageError: there is no newer one, or they are the wrong way round.
        """
        before = self.ledger.read_checkpoint(None, old)
        after = self.ledger.read_checkpoint(None, new) if new else self._newest()
        try:
            path = self.ledger.consistency_proof(before.size, after.size)
        except ValueError as error:
            raise UsageError(str(error), operation="prove", hint="name the earlier checkpoint first") from error
        return ConsistencyProof(str(self.ledger.verifier), before.data, after.data, tuple(path), self.rotations(after.size))

    def rotations(self, size: int) -> tuple[Rotation, ...]:
        """The entries among the first `size` that hand over to another key."""
        numbers = [span.number for span in self.ledger.chain().spans if 0 <= span.number < size]
        return tuple(Rotation(n, self.ledger.entry(n).data, tuple(self.ledger.inclusion_proof(n, size))) for n in numbers)

    def _segment(self, event_id: bytes) -> Segment:
        where = self.reader.place_of(event_id)
        if where is None:
            raise UnknownEvent(f"no event {id_text(event_id.hex())}", operation="prove", hint="event_id of the view events in SQL")
        if not isinstance(where, Segment):
            hint = "`tokentape tier --now` moves it to the cold tier and enters it in the ledger"
            raise UsageError(f"the event {id_text(event_id.hex())} is not in the ledger yet", operation="prove", hint=hint)
        return where

    def _checkpoint(self, segment: Segment) -> Checkpoint:
        newest = self._newest()
        if newest.size <= segment.ledger_entry:
            hint = "`tokentape jobs run checkpoint` signs one"
            raise UsageError(f"no checkpoint covers entry {segment.ledger_entry} yet", operation="prove", hint=hint)
        return newest

    def _newest(self) -> Checkpoint:
        newest = self.ledger.latest_checkpoint()
        if newest is None:
            raise UsageError("the ledger has no checkpoint yet", operation="prove", hint="`tokentape jobs run checkpoint` signs one")
        return newest


class SegmentRows:
    """Which rows of which segments the events of sessions are, segment after segment; a few segments are kept for the next session."""

    def __init__(self, prover: Prover, catalog: Catalog) -> None:
        self._prover = prover
        self._catalog = catalog
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self.entries: set[int] = set()
        """Numbers of the ledger entries that committed what was proven."""

    def of(self, session_id: bytes) -> dict[bytes, RowProof]:
        """The proof of each cold event of a session, by event id.

        Raises:
            CorruptStore: a segment was altered.
            StoreUnavailable: the store does not answer.
        """
        found: dict[bytes, RowProof] = {}
        for segment in self._catalog.snapshot(session=session_id).segments:
            held = self._read(segment)
            for row in np.flatnonzero(pc.equal(held.sessions, session_id).to_numpy(zero_copy_only=False)).tolist():
                found[held.events[row].as_py()] = RowProof(segment.key, row, tuple(held.tree.inclusion_proof(row)))
                self.entries.add(segment.ledger_entry)
        return found

    def _read(self, segment: Segment) -> _Held:
        if segment.key not in self._held:
            data = self._prover.objects.get(segment.key)
            tree = Tree(read_leaves(data, self._prover.registry, sha256=segment.sha256, place=segment.key))
            ids = pq.read_table(pa.BufferReader(data), columns=["session_id", "event_id"], use_threads=False).combine_chunks()
            self._held[segment.key] = _Held(tree, ids.column("session_id"), ids.column("event_id"))
            if len(self._held) > _HELD_MAX:
                self._held.popitem(last=False)
        self._held.move_to_end(segment.key)
        return self._held[segment.key]


@dataclass(frozen=True, slots=True)
class RowProof:
    """An event is this row of a segment, by its inclusion path under the segment's root."""

    segment: str
    row: int
    path: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Held:
    """A segment's leaves, and the ids of its rows."""

    tree: Tree
    sessions: pa.ChunkedArray
    events: pa.ChunkedArray


_HELD_MAX = 2  # segments: leaves and ids of a million rows are some 130 MB


def _row(data: bytes, event_id: bytes, place: str) -> tuple[int, dict[str, Any], bytes]:
    """Number, datum and schema fingerprint of an event in a segment."""
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    before = 0
    for batch in file.iter_batches(use_threads=False):
        ids = batch.column("event_id").to_pylist()
        if event_id in ids:
            at = ids.index(event_id)
            found = next(rows_to_datums(batch.slice(at, 1)))
            return before + at, found.datum, found.fingerprint
        before += len(ids)
    raise CorruptStore("the event is no longer in its segment", operation="prove", place=place)
