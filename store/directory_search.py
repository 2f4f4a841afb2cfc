"""Words in the messages and answers of sessions: each shard and segment is looked through once for what is asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import duckdb
import pyarrow as pa

from schemas.errors import TokentapeError
from schemas.settings import Settings
from store.catalog import Catalog, Segment, Shard, Snapshot
from store.reader import EventReader
from store.views import literal

_SEARCHES_KEPT = 32  # answers of searches kept: a page asks for the same one every few seconds


class Searches:
    """Searches with what they found by shard and segment. Safe for threads; one is looked for at a time."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._catalog = catalog
        self._reader = EventReader(settings, catalog)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, ...], dict[str, dict[str, int]]] = OrderedDict()

    def masks(self, words: tuple[str, ...], sources: Mapping[str, Shard | Segment]) -> dict[str, int] | None:
        """By session (hex), a bit for each word that it says in some shards and segments; None where one is no longer there.

        Raises:
            CorruptStore, StoreUnavailable: one cannot be read.
        """
        with self._lock:
            found = self._kept.setdefault(words, {})
            self._kept.move_to_end(words)
            while len(self._kept) > _SEARCHES_KEPT:
                self._kept.popitem(last=False)
            for name in found.keys() - sources.keys():
                del found[name]
            for name in sources.keys() - found.keys():
                try:
                    found[name] = dict(self._reader.saying(alone(sources[name]), words))
                except TokentapeError:
                    if name in self._names():
                        raise
                    return None
            masks: dict[str, int] = {}
            for part in found.values():
                for session, mask in part.items():
                    masks[session] = masks.get(session, 0) | mask
            return masks

    def _names(self) -> set[str]:
        snapshot = self._catalog.snapshot()
        return {*map(name_of, snapshot.shards), *map(name_of, snapshot.segments)}

    def close(self) -> None:
        """Release files; safe to call twice."""
        with self._lock:
            self._reader.close()


def saying(cursor: duckdb.DuckDBPyConnection, words: Sequence[str], said: Mapping[str, int]) -> str:
    """The condition that every word stands somewhere in the session."""
    ids = [bytes.fromhex(session) for session in said]
    table = pa.table({"session_id": pa.array(ids, pa.binary()), "mask": pa.array(said.values(), pa.int64())})
    cursor.register("said", table)
    uuid = "CAST(CAST(session_id AS UUID) AS VARCHAR)"
    names = f"{uuid}, replace({uuid}, '-', ''), title, owner, \"user\", workflow, purpose, array_to_string(tags, ' ')"
    return "".join(
        f" AND (contains(lower(concat_ws(' ', {names})), {literal(word)})"
        f" OR session_id IN (SELECT session_id FROM said WHERE mask & {1 << i} <> 0))"
        for i, word in enumerate(words)
    )


def name_of(source: Shard | Segment) -> str:
    """The name of a shard or the key of a segment."""
    return source.name if isinstance(source, Shard) else source.key


def alone(source: Shard | Segment) -> Snapshot:
    """One shard or segment, as a part of the catalog."""
    return Snapshot((source,), ()) if isinstance(source, Shard) else Snapshot((), (source,))
