"""The sessions of an installation, to be listed, filtered and searched, each only by who may see it.

A row per session is put together from one part per shard and segment. Those never change, so a part is read once and kept in
memory; a look reads only what was sealed since the look before, and forgets the parts of what was merged or rewritten.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from schemas.errors import TokentapeError
from store.catalog import Catalog, Segment, Shard, Snapshot
from store.reader import EventReader, blob
from store.views import SPOKEN, literal

VISIBILITIES = ("private", "team", "public")
"""Who sees a session: its owners, its tenant (where nobody said otherwise), everybody who may come in."""

KINDS = {"replay": "replay", "engine run": "engine", "kv operations": "kv"}
"""Kinds of sessions by the purpose with which they were opened; all others are `conversation`."""

_CASES = " ".join(f"WHEN {literal(purpose)} THEN {literal(kind)}" for purpose, kind in KINDS.items())
_KIND = f"CASE purpose {_CASES} ELSE 'conversation' END"
_SEARCHES_KEPT = 32  # answers of searches kept: a page asks for the same one every few seconds
_ANEW_MAX = 5_000  # sessions whose rows are made anew one by one; of more, as after a merge, all are
_FIRST = (
    "regexp_extract(list_filter(request_submitted.content.messages, lambda m: m.role = 'user')[1].body, "
    r"""'(?:"(?:content|text)"\s*:\s*|^\s*)"((?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u]){1,200})', 1)"""
)  # the beginning of what a user said first, as JSON text: whole bodies of every session would not fit into memory
_ADDED = "list_concat(session_opened.tags, session_annotated.tags_added)"

_COLUMNS = (
    "kind", "session_id", "tenant", "recorded_at", "actor", "offset", "session_opened", "session_annotated", "request_submitted",
    "generation_finished", "generation_failed", "request_edited", "sequence_finished", "breakpoint_hit", "replay_started",
    "sequence_compared", "replay_finished", "access_logged",
)  # fmt: skip
_PART = f"""
    SELECT p.* REPLACE (coalesce(s.tokens, 0) AS tokens) FROM (SELECT {{source}} AS source, session_id, any_value(tenant) AS tenant,
        epoch_us(min(recorded_at)) AS first_at, epoch_us(max(recorded_at)) AS last_at,
        count(*) AS events, count(access_logged) AS looks, count(request_submitted) AS requests, count(generation_failed) AS failures,
        count(request_edited) AS edits, count(breakpoint_hit) AS stops, count(replay_started) AS replays,
        count(DISTINCT coalesce(generation_finished.generation_id, generation_failed.generation_id)) AS ended,
        CAST(NULL AS BIGINT) AS tokens, min({{{{'place': "offset", 'text': {{first}}}}}}) FILTER (len({{first}}) > 0) AS first_said,
        any_value(actor) FILTER (kind = 'session_opened') AS opened_by, any_value(actor) AS actor,
        any_value(session_opened."user") AS "user",
        any_value(session_opened.workflow) AS workflow, any_value(session_opened.purpose) AS purpose,
        any_value(session_opened.client) AS client, any_value(session_opened.content.title) AS title,
        list(DISTINCT request_submitted.model) FILTER (request_submitted.model IS NOT NULL) AS models,
        list({{{{'place': "offset" * 2 + 1, 'tags': {_ADDED}, 'there': true}}}}) FILTER (len({_ADDED}) > 0) AS added,
        list({{{{'place': "offset" * 2, 'tags': session_annotated.tags_removed, 'there': false}}}})
            FILTER (len(session_annotated.tags_removed) > 0) AS removed,
        max({{{{'place': "offset", 'visibility': session_annotated.visibility, 'by': actor}}}})
            FILTER (session_annotated.visibility IS NOT NULL) AS shown
    FROM events GROUP BY session_id) p LEFT JOIN ({SPOKEN}) s ON s.session_id = p.session_id"""
_REPLAYS = """
    SELECT {source} AS source, coalesce(replay_started.replay_id, sequence_compared.replay_id, replay_finished.replay_id) AS replay,
        any_value(session_id) AS session, any_value(replay_started.subject_session) AS subject, any_value(replay_started.engine) AS engine,
        any_value(replay_started.mode) AS mode, any_value(replay_finished.verdict) AS verdict, any_value(replay_finished.reason) AS reason,
        any_value(replay_finished.tokens) AS scored, max(sequence_compared.drift_max) AS drift_max,
        max(sequence_compared.noise_floor) AS noise_floor, epoch_us(min(recorded_at)) AS begun_at, epoch_us(max(recorded_at)) AS moment
    FROM events WHERE kind IN ('replay_started', 'sequence_compared', 'replay_finished') GROUP BY ALL"""
_REPLAYED = """
    SELECT replay, any_value(session) AS session, any_value(subject) AS subject, any_value(engine) AS engine, any_value(mode) AS mode,
        any_value(verdict) AS verdict, any_value(reason) AS reason, any_value(scored) AS scored, max(drift_max) AS drift_max,
        max(noise_floor) AS noise_floor, min(begun_at) AS begun_at, max(moment) AS moment
    FROM replay GROUP BY replay"""
_OF_RUN = """
    SELECT r.*, s.workflow AS run FROM replayed r JOIN session s ON s.session_id = r.session
    WHERE r.session IN (SELECT session_id FROM session WHERE {may}) AND r.subject IN (SELECT session_id FROM session WHERE {may})"""
_SEVERITY = ("model_differs", "sampling_differs", "inconclusive", "numeric_drift", "identical")

# Within one event a tag that is both added and removed is gone, as in the view `sessions`: the added one has the smaller place there.
_SESSIONS = """
    WITH told AS (
        SELECT session_id, list_sort(flatten(list(list_concat(coalesce(added, []), coalesce(removed, []))))) AS said
        FROM {part} GROUP BY ALL
    ), each AS (
        SELECT session_id, unnest(said) AS one FROM told
    ), flat AS (
        SELECT session_id, one.place AS place, one.there AS there, unnest(one.tags) AS tag FROM each
    ), tagged AS (
        SELECT session_id, tag, arg_max(there, CASE WHEN there THEN place - 1 ELSE place + 1 END) AS there FROM flat GROUP BY ALL
    ), labels AS (
        SELECT session_id, list(tag ORDER BY tag) AS tags FROM tagged WHERE there GROUP BY ALL
    ), verdicts AS (
        SELECT subject AS session_id, arg_max(verdict, moment) AS verdict, count(*) AS replayed
        FROM replayed WHERE subject IS NOT NULL GROUP BY subject
    ), summed AS (
        SELECT session_id, any_value(tenant) AS tenant, min(first_at) AS first_at, max(last_at) AS last_at,
            CAST(sum(events) AS BIGINT) AS events, CAST(sum(requests) AS BIGINT) AS requests, CAST(sum(failures) AS BIGINT) AS failures,
            CAST(sum(edits) AS BIGINT) AS edits, CAST(sum(stops) AS BIGINT) AS stops, CAST(sum(replays) AS BIGINT) AS replays,
            CAST(greatest(0, sum(requests) - sum(ended)) AS BIGINT) AS under_way, min(first_said) AS first_said,
            CAST(sum(tokens) AS BIGINT) AS tokens, coalesce(any_value(opened_by), any_value(actor)) AS owner, any_value("user") AS "user",
            any_value(workflow) AS workflow, any_value(purpose) AS purpose, any_value(client) AS client, any_value(title) AS title,
            list_sort(list_distinct(flatten(list(coalesce(models, []))))) AS models, max(shown) AS shown
        FROM {part} GROUP BY session_id HAVING sum(events) > sum(looks)
    )
    SELECT s.* EXCLUDE (shown, first_said), s.first_said.text AS first_message,
        coalesce(s.shown.visibility, 'team') AS visibility, s.shown.by AS shown_by,
        coalesce(l.tags, []) AS tags, v.verdict AS verdict, coalesce(v.replayed, 0) AS replayed
    FROM summed s LEFT JOIN labels l USING (session_id) LEFT JOIN verdicts v USING (session_id)"""


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks: `tenant` None sees all, another one's own tenant, of it nothing private of others, and what is public.

    `names` are the opaque ids under which the viewer is recorded as an actor or user.
    """

    tenant: str | None = None
    names: tuple[str, ...] = ()

    @property
    def condition(self) -> str:
        """The one condition on a session that may be seen."""
        if self.tenant is None:
            return "true"
        mine = ", ".join(map(literal, self.names)) or "NULL"
        own = f'(owner IN ({mine}) OR "user" IN ({mine}) OR shown_by IN ({mine}))'
        return f"(visibility = 'public' OR (tenant = {literal(self.tenant)} AND (visibility <> 'private' OR coalesce({own}, false))))"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which sessions: all that is given must hold. Times are µs since the epoch; a session counts by its last event.

    `under_way` wants a request without an end. Of other kinds than conversations (what replays, engines and KV connectors wrote in sessions
    of their own) there are none unless `kinds` asks for them; `replays` asks for those of replays as well.

    Each word of `text` must stand in a message, an answer, the title, a tag, the session's id or the names of who and what for.
    """

    text: str = ""
    since: int | None = None
    until: int | None = None
    model: str | None = None
    verdict: str | None = None
    tenant: str | None = None
    tags: tuple[str, ...] = ()
    failed: bool = False
    under_way: bool = False
    replays: bool = False
    kinds: tuple[str, ...] = ("conversation",)

    @property
    def words(self) -> tuple[str, ...]:
        """What is searched for."""
        return tuple(self.text.lower().split())

    def condition(self) -> str:
        """The condition on rows, the text left aside."""
        kinds = sorted({*self.kinds, "replay"} if self.replays else set(self.kinds))
        parts = [
            f"last_at >= {self.since}" if self.since is not None else "",
            f"last_at < {self.until}" if self.until is not None else "",
            f"list_contains(models, {literal(self.model)})" if self.model else "",
            f"verdict = {literal(self.verdict)}" if self.verdict else "",
            f"tenant = {literal(self.tenant)}" if self.tenant else "",
            *(f"list_contains(tags, {literal(tag)})" for tag in self.tags),
            "failures > 0" if self.failed else "",
            "under_way > 0" if self.under_way else "",
            f"{_KIND} IN ({', '.join(map(literal, kinds))})",
        ]
        return " AND ".join(filter(None, parts)) or "true"


@dataclass(frozen=True, slots=True)
class Listing:
    """One page of sessions, newest first, as columns of plain values, and how many there are in all."""

    rows: list[dict[str, Any]]
    total: int


class SessionDirectory:
    """Lists sessions. Safe for threads."""

    def __init__(self, catalog: Catalog, reader: EventReader) -> None:
        self._catalog = catalog
        self._reader = reader
        self._lock = threading.Lock()
        self._known: dict[str, Shard | Segment] = {}
        self._searches: OrderedDict[tuple[str, ...], dict[str, dict[str, int]]] = OrderedDict()
        self._connection = duckdb.connect(":memory:", config={"threads": 1})
        self._made = self._closed = False

    def warm(self) -> None:
        """Read what there is ahead of who looks first: of many events that takes seconds. What is wrong is told to whoever looks."""
        with self._lock, contextlib.suppress(TokentapeError):
            if not self._closed:
                self._refresh()

    def sessions(self, viewer: Viewer, wanted: Wanted, *, limit: int = 50, offset: int = 0) -> Listing:
        """A page of what the viewer may see and wants.

        Raises:
            CorruptStore, StoreUnavailable: a shard or segment cannot be read.
        """
        condition = f"{viewer.condition} AND {wanted.condition()}"
        with self._lock:
            self._refresh()
            if not self._made:
                return Listing([], 0)
            condition += self._saying(wanted.words)
            order = f"ORDER BY last_at DESC, session_id LIMIT {int(limit)} OFFSET {int(offset)}"
            rows = self._connection.execute(f"SELECT * FROM session WHERE {condition} {order}").to_arrow_table().to_pylist()
            total = len(rows) + offset
            if len(rows) == limit or not rows:
                total = self._connection.execute(f"SELECT count(*) FROM session WHERE {condition}").fetchall()[0][0]
        return Listing([_told(row) for row in rows], int(total))

    def session(self, viewer: Viewer, session_id: bytes) -> dict[str, Any] | None:
        """One session as `sessions` lists it; None where there is none that this viewer may see."""
        with self._lock:
            self._refresh()
            if not self._made:
                return None
            where = f"{viewer.condition} AND session_id = {blob(session_id)}"
            rows = self._connection.execute(f"SELECT * FROM session WHERE {where}").to_arrow_table().to_pylist()
        return _told(rows[0]) if rows else None

    def replays(self, viewer: Viewer, subject: bytes) -> list[dict[str, Any]]:
        """The replays of a session that the viewer may see, newest first; `session` is where each is recorded."""
        return self._replayed(viewer, f"r.subject = {blob(subject)}", "begun_at DESC")

    def runs(self, viewer: Viewer) -> list[dict[str, Any]]:
        """The named runs of `replay-batch`, newest first, with how many sessions got which verdict."""
        runs: dict[str, dict[str, Any]] = {}
        for row in self._replayed(viewer, "s.workflow IS NOT NULL", "begun_at DESC", once=True):
            run = runs.setdefault(row["run"], {"run": row["run"], "sessions": 0, "verdicts": {}, "engines": [], "ended_at": row["moment"]})
            run["sessions"] += 1
            verdict = row["verdict"] or "unfinished"
            run["verdicts"][verdict] = run["verdicts"].get(verdict, 0) + 1
            run["engines"] = list(dict.fromkeys([*run["engines"], row["engine"]]))
            run["begun_at"], run["ended_at"] = row["begun_at"], max(run["ended_at"], row["moment"])
        return list(runs.values())

    def run(self, viewer: Viewer, name: str) -> list[dict[str, Any]]:
        """What one run found, session by session: what differs first, and of that what moved most."""
        severity = " ".join(f"WHEN {literal(verdict)} THEN {i}" for i, verdict in enumerate(_SEVERITY))
        order = f"CASE verdict {severity} ELSE {len(_SEVERITY)} END, drift_max DESC NULLS LAST, begun_at"
        return self._replayed(viewer, f"s.workflow = {literal(name)}", order, once=True)

    def _replayed(self, viewer: Viewer, where: str, order: str, *, once: bool = False) -> list[dict[str, Any]]:
        """Replays whose own session and subject may both be seen. `once`: of those of a subject in a run the one that ended last."""
        latest = "row_number() OVER (PARTITION BY subject, run ORDER BY verdict IS NULL, moment DESC) = 1"
        with self._lock:
            self._refresh()
            if not self._made:
                return []
            statement = f"SELECT * FROM ({_OF_RUN.format(may=viewer.condition)} AND {where}){f' QUALIFY {latest}' if once else ''}"
            rows: list[dict[str, Any]] = self._connection.execute(f"{statement} ORDER BY {order}").to_arrow_table().to_pylist()
        return rows

    def close(self) -> None:
        """Forget everything; safe to call twice."""
        self._closed = True
        with self._lock:
            self._connection.close()

    def _refresh(self) -> None:
        """Read the parts of what is new, forget those of what is gone."""
        snapshot = self._catalog.snapshot()
        sources: dict[str, Shard | Segment] = {shard.name: shard for shard in snapshot.shards if shard.rows}
        sources |= {segment.key: segment for segment in snapshot.segments}
        if sources.keys() == self._known.keys():
            return
        gone = self._known.keys() - sources.keys()
        changed = self._of(gone)
        read = {}
        for name in sources.keys() - self._known.keys():
            if self._closed:
                return
            if self._read(name, sources[name]):
                read[name] = sources[name]
        for name in gone:
            for table in ("part", "replay"):
                self._connection.execute(f"DELETE FROM {table} WHERE source = {literal(name)}")
        self._known = {name: source for name, source in self._known.items() if name not in gone} | read
        if self._known or self._made:
            self._connection.execute(f"CREATE OR REPLACE TABLE replayed AS {_REPLAYED}")
            self._put_together(changed | self._of(read))

    def _of(self, names: Collection[str]) -> set[bytes]:
        """The sessions that parts of some sources tell of, those included that are replayed there."""
        if not names or not self._made:
            return set()
        there = f"source IN ({', '.join(map(literal, names))})"
        replayed = f"SELECT subject FROM replayed WHERE subject IS NOT NULL AND replay IN (SELECT replay FROM replay WHERE {there})"
        rows = self._connection.execute(f"SELECT session_id FROM part WHERE {there} UNION {replayed}").fetchall()
        return {bytes(row[0]) for row in rows}

    def _put_together(self, changed: set[bytes]) -> None:
        """Make the rows of the sessions that changed anew, or all where that are many: each look at the tape is news of it, too."""
        if not self._made or len(changed) > _ANEW_MAX:
            self._connection.execute(f"CREATE OR REPLACE TABLE session AS {_SESSIONS.format(part='part')}")
            self._made = True
            return
        self._connection.register("changed", pa.table({"session_id": pa.array(list(changed), pa.binary())}))
        those = "session_id IN (SELECT session_id FROM changed)"
        self._connection.execute(f"DELETE FROM session WHERE {those}")
        some = _SESSIONS.format(part=f"(SELECT * FROM part WHERE {those})")
        self._connection.execute(f"INSERT INTO session BY NAME {some}")
        self._connection.unregister("changed")

    def _read(self, name: str, source: Shard | Segment) -> bool:
        """Read one shard or segment; False where it was merged away meanwhile, for it comes again under another name."""
        one = _alone(source)
        try:
            parts = {
                table: self._reader.ask(one, sql.format(source=literal(name), first=_FIRST), "tenant <> '_platform'", _COLUMNS)
                for table, sql in (("part", _PART), ("replay", _REPLAYS))
            }
        except TokentapeError:
            now = self._catalog.snapshot()
            if name in {*(shard.name for shard in now.shards), *(segment.key for segment in now.segments)}:
                raise
            return False
        for table, rows in parts.items():
            self._insert(table, rows)
        return True

    def _insert(self, table: str, rows: pa.Table) -> None:
        self._connection.register("rows", rows)
        self._connection.execute(f"CREATE TABLE IF NOT EXISTS {table} AS SELECT * FROM rows WHERE false")
        self._connection.execute(f"INSERT INTO {table} SELECT * FROM rows")
        self._connection.unregister("rows")

    def _saying(self, words: Sequence[str]) -> str:
        """The condition that every word stands somewhere in the session."""
        if not words:
            return ""
        said = self._said(tuple(words))
        ids = [bytes.fromhex(session) for session in said]
        table = pa.table({"session_id": pa.array(ids, pa.binary()), "mask": pa.array(said.values(), pa.int64())})
        self._connection.register("said", table)
        uuid = "CAST(CAST(session_id AS UUID) AS VARCHAR)"
        names = f"{uuid}, replace({uuid}, '-', ''), title, owner, \"user\", workflow, purpose, array_to_string(tags, ' ')"
        return "".join(
            f" AND (contains(lower(concat_ws(' ', {names})), {literal(word)})"
            f" OR session_id IN (SELECT session_id FROM said WHERE mask & {1 << i} <> 0))"
            for i, word in enumerate(words)
        )

    def _said(self, words: tuple[str, ...]) -> dict[str, int]:
        """By session (hex), a bit for each word that it says; what was looked through before is not looked through again."""
        found = self._searches.setdefault(words, {})
        self._searches.move_to_end(words)
        while len(self._searches) > _SEARCHES_KEPT:
            self._searches.popitem(last=False)
        for name in found.keys() - self._known.keys():
            del found[name]
        for name in self._known.keys() - found.keys():
            found[name] = dict(self._reader.saying(_alone(self._known[name]), words))
        masks: dict[str, int] = {}
        for part in found.values():
            for session, mask in part.items():
                masks[session] = masks.get(session, 0) | mask
        return masks


def _told(row: dict[str, Any]) -> dict[str, Any]:
    """A row with what was said first as text; an escape that was cut in two is left out."""
    said = row["first_message"]
    if said is not None:
        with contextlib.suppress(ValueError):  # a body that is no JSON is shown as it is
            said = json.loads(f'"{said}"', strict=False).encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
    return {**row, "first_message": said}


def _alone(source: Shard | Segment) -> Snapshot:
    """One shard or segment, as a part of the catalog."""
    return Snapshot((source,), ()) if isinstance(source, Shard) else Snapshot((), (source,))
