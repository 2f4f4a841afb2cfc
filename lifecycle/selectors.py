"""Which events an act of custody is about, as SQL conditions over rows of hot and cold."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import duckdb
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from store.catalog import Segment
from store.reader import blob
from store.views import literal

_INLINE_MAX = 64
"""Sessions named in a condition itself; DuckDB skips row groups by them."""


class Selector(BaseModel):
    """Events that satisfy everything that is given. Times are `recorded_at` in µs since the epoch, the end exclusive.

    `sessions` are hex ids. A selector that names tenant, time or tag also takes events that are yet to come.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sessions: tuple[str, ...] = ()
    tenant: str | None = None
    since: int | None = None
    until: int | None = None
    tag: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What is given."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def text(self) -> str:
        """One line for people."""
        count = len(self.sessions)
        parts = [
            f"session {id_text(self.sessions[0])}" if count == 1 else f"{count:,} sessions" if count else "",
            f"tenant {self.tenant}" if self.tenant else "",
            f"tag {self.tag}" if self.tag else "",
            f"from {_time(self.since)}" if self.since is not None else "",
            f"to {_time(self.until)}" if self.until is not None else "",
        ]
        return ", ".join(filter(None, parts))

    def may_touch(self, segment: Segment) -> bool:
        """False when no row of a segment can be meant, by what the catalog knows of it."""
        first, last = segment.session_min.hex(), segment.session_max.hex()
        return (
            self.tenant in (None, segment.tenant)
            and (self.since is None or segment.time_max >= self.since)
            and (self.until is None or segment.time_min < self.until)
            and (not self.sessions or any(first <= session <= last for session in self.sessions))
        )

    def condition(self, matching: Matching) -> str:
        """The condition on rows; `matching` is what the connection knows by then."""
        parts = [
            matching.sessions(self.sessions) if self.sessions else "",
            f"tenant = {literal(self.tenant)}" if self.tenant is not None else "",
            f"epoch_us(recorded_at) >= {self.since}" if self.since is not None else "",
            f"epoch_us(recorded_at) < {self.until}" if self.until is not None else "",
            matching.tagged(self.tag, ever=True) if self.tag is not None else "",
        ]
        return "(" + " AND ".join(filter(None, parts)) + ")"


class Matching:
    """Conditions that need a table: long lists of sessions, and the sessions that carry a tag."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, events: Callable[[], AbstractContextManager[str]]) -> None:
        """`events` gives a SELECT over all rows of hot and cold; it is asked for when a tag is."""
        self.connection = connection
        self._events = events
        self._tables: dict[object, str] = {}

    def sessions(self, ids: Sequence[str]) -> str:
        """Condition that the session is one of these (hex)."""
        if len(ids) <= _INLINE_MAX:
            # BETWEEN, because equality on a BLOB can lose rows of Parquet files with bloom filters.
            return "(" + " OR ".join(f"session_id BETWEEN {blob(bytes.fromhex(i))} AND {blob(bytes.fromhex(i))}" for i in ids) + ")"
        return f"session_id IN (FROM {self.table(bytes.fromhex(i) for i in ids)})"

    def table(self, ids: Iterable[bytes]) -> str:
        """A table of sessions; its name."""
        key = tuple(ids)
        if key not in self._tables:
            name = self._tables[key] = f"matching_{len(self._tables)}"
            given = pa.table({"session_id": pa.array(key, pa.binary())})
            self.connection.register("given_ids", given)
            self.connection.execute(f"CREATE TEMP TABLE {name} AS SELECT session_id FROM given_ids")
            self.connection.unregister("given_ids")
        return self._tables[key]

    def tagged(self, tag: str, *, ever: bool = False) -> str:
        """Condition that the session carries a tag (the last that was said of it is that it was added), or ever did."""
        if (tag, ever) not in self._tables:
            name = f"matching_{len(self._tables)}"
            with self._events() as events:
                self.connection.execute(
                    f"""CREATE TEMP TABLE {name} AS WITH told AS (
                    SELECT session_id, "offset" AS place, coalesce(list_contains(session_opened.tags, {literal(tag)}), false)
                        OR coalesce(list_contains(session_annotated.tags_added, {literal(tag)}), false) AS added,
                        coalesce(list_contains(session_annotated.tags_removed, {literal(tag)}), false) AS removed
                    FROM ({events}) WHERE kind IN ('session_opened', 'session_annotated')
                    ) SELECT session_id FROM told WHERE added OR removed GROUP BY session_id
                    HAVING {"bool_or(added)" if ever else "arg_max(NOT removed, place)"}"""
                )
            self._tables[tag, ever] = name
        return f"session_id IN (FROM {self._tables[tag, ever]})"


def id_text(digits: str) -> str:
    """An id in hexadecimal digits, as the ledger has it, as people write it."""
    return str(uuid.UUID(digits))


def _time(at_us: int) -> str:
    return dt.datetime.fromtimestamp(at_us / 1e6, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
