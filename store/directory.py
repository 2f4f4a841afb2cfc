"""The sessions of an installation, to be listed, filtered and searched, each only by who may see it.

A row per session is put together from one part per shard and segment. Those never change, so a part is read once and kept in
memory; a refresh reads only what was sealed since the one before, and forgets the parts of what was merged or rewritten.

Where the directory is followed, a thread of its own refreshes it, and nobody who looks waits for that: rows and what replaces them are
two states of one database. What may not be late is not: the catalog counts events that say who may see a session, and what was erased
or made anew (`Changes`). Where it has counted on, who looks first has the former read out of what is not listed yet, and waits for the
latter.

After a start the newest shards and segments are read first and listed at once, if there are many. Of all others no more is read before
than who may see what, so no list shows what a later one would hide. What stands in them is missing meanwhile, and rows say whether it may
be theirs: `final`. Who searches, or asks for verdicts and replays, waits for the whole.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import duckdb
import pyarrow as pa

from schemas.errors import TokentapeError
from schemas.settings import Settings
from store.catalog import Catalog, Changes, Segment, Shard
from store.directory_look import Answer, Answers, Look, Page, Said, Viewer, may_see, spans_of
from store.directory_search import Searches, alone, name_of, saying
from store.directory_sql import NEWS, NEWS_COLUMNS, OF_RUN, READ, REPLAYED, SESSIONS, SEVERITY
from store.reader import EventReader, blob
from store.sql import Completeness, completeness
from store.views import literal

__all__ = ["KINDS", "SESSION_KINDS", "VISIBILITIES", "Listing", "SessionDirectory", "Viewer", "Wanted"]

VISIBILITIES = ("private", "team", "public")
"""Who sees a session: its owners, its tenant (where nobody said otherwise), everybody who may come in."""

KINDS = {"replay": "replay", "engine run": "engine", "kv operations": "kv"}
"""Kinds of sessions by the purpose with which they were opened; all others are `conversation`."""
SESSION_KINDS = ("conversation", *KINDS.values())

_CASES = " ".join(f"WHEN {literal(purpose)} THEN {literal(kind)}" for purpose, kind in KINDS.items())
_KIND = f"CASE purpose {_CASES} ELSE 'conversation' END"
_FOLLOW_S = 0.5  # pause between two refreshes of a directory that is followed
_CUSTOMERS = "tenant <> '_platform'"
_ANSWERS_KEPT = 64  # answers of one state kept
_AT_ONCE = 200_000  # events that are read before anything is listed: a fraction of a second's work
_PASS = 500_000  # events read between two lists, where one of all takes longer
_YIELD_S = 0.01  # pause between two passes, in which others get their turn


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
    """One page of sessions, newest first, as columns of plain values, how many there are in all, and what may be missing here."""

    rows: list[dict[str, Any]]
    total: int
    completeness: Completeness


class SessionDirectory:
    """Lists sessions. Safe for threads."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._catalog = catalog
        # One each, so that neither a search nor what is new keeps the others waiting.
        self._reader = EventReader(settings, catalog)
        self._news_reader = EventReader(settings, catalog)
        self._searches = Searches(settings, catalog)
        self._database = duckdb.connect(":memory:", config={"threads": 1})
        self._connection = self._database.cursor()
        self._cursors: list[duckdb.DuckDBPyConnection] = []
        self._refreshing, self._heeding = threading.Lock(), threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None
        # The refresher's own: whose parts are read, and of which only who may see what is.
        self._known: dict[str, Shard | Segment] = {}
        self._heeded: set[str] = set()
        self._whole = False
        # What is listed, and what is known beyond that; one step with the tables of the database, which `_turn` makes it.
        self._turn = threading.Lock()
        self._listed: dict[str, Shard | Segment] = {}
        self._unread: dict[str, Shard | Segment] = {}
        self._made = False
        self._answers: Answers = {}
        self._seen: Changes | None = None
        self._completeness = Completeness(None, 0, 0, 0, 0)
        self._news: dict[bytes, tuple[int, Said]] = {}
        self._told: dict[int, tuple[bytes, str, str]] = {}
        self._count = 0

    def follow(self) -> None:
        """Refresh in a thread from now on, so that those who look need not; what goes wrong there is told to them."""
        self._thread = threading.Thread(target=self._follow, name="directory", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._over.is_set():
            try:
                self.refresh()
                self._fault = None
            except Exception as error:
                self._fault = error
            self._over.wait(_FOLLOW_S)

    def sessions(self, viewer: Viewer, wanted: Wanted, *, limit: int = 50, offset: int = 0) -> Listing:
        """A page of what the viewer may see and wants.

        Raises:
            CorruptStore, StoreUnavailable: a shard or segment cannot be read.
        """
        said = self._said(wanted.words) if wanted.words else None
        with self._looking(viewer, whole=wanted.verdict is not None or said is not None) as look:
            if not look.made:
                return Listing([], 0, look.completeness)
            condition = f"{look.may} AND {wanted.condition()}"
            if said is not None:
                condition += saying(look.cursor, wanted.words, said)
            page = condition, limit, offset
            if said is not None or (answer := look.answers.get(page)) is None:
                answer = look.page(*page)
                if said is None:
                    self._keep(look.answers, page, answer)
        rows, total = answer
        return Listing([look.told(row) for row in rows], total, look.completeness)

    @staticmethod
    def _keep(answers: Answers, page: Page, answer: Answer) -> None:
        """Whoever wants the same of the same state gets the same: a page is asked for every few seconds by each who has it open."""
        if len(answers) >= _ANSWERS_KEPT:
            answers.clear()
        answers[page] = answer

    def session(self, viewer: Viewer, session_id: bytes) -> dict[str, Any] | None:
        """One session as `sessions` lists it; None where there is none that this viewer may see, in what was catalogued at the call."""
        if (row := self._session(viewer, session_id)) is None and self._thread is not None:
            self.refresh()
            row = self._session(viewer, session_id)
        return row

    def _session(self, viewer: Viewer, session_id: bytes) -> dict[str, Any] | None:
        with self._looking(viewer) as look:
            rows = look.rows(f"SELECT * FROM session WHERE {look.may} AND session_id = {blob(session_id)}") if look.made else []
        return look.told(rows[0]) if rows else None

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
        severity = " ".join(f"WHEN {literal(verdict)} THEN {i}" for i, verdict in enumerate(SEVERITY))
        order = f"CASE verdict {severity} ELSE {len(SEVERITY)} END, drift_max DESC NULLS LAST, begun_at"
        return self._replayed(viewer, f"s.workflow = {literal(name)}", order, once=True)

    def _replayed(self, viewer: Viewer, where: str, order: str, *, once: bool = False) -> list[dict[str, Any]]:
        """Replays whose own session and subject may both be seen. `once`: of those of a subject in a run the one that ended last."""
        latest = "row_number() OVER (PARTITION BY subject, run ORDER BY verdict IS NULL, moment DESC) = 1"
        with self._looking(viewer, whole=True) as look:
            statement = f"SELECT * FROM ({OF_RUN.format(may=look.may)} AND {where}){f' QUALIFY {latest}' if once else ''}"
            return look.rows(f"{statement} ORDER BY {order}") if look.made else []

    def close(self) -> None:
        """Forget everything; safe to call twice."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        with self._refreshing, self._heeding:
            for part in (self._reader, self._news_reader, self._searches, self._database):
                part.close()

    # Who may see what, at once

    def tell(self, session_id: bytes, visibility: str, by: str) -> None:
        """From now on nobody sees a session whom this keeps from it, whenever the index has the event that says so."""
        with self._turn:
            self._count += 1
            self._told[self._count] = (session_id, visibility, by)

    @property
    def told(self) -> int:
        """A number for all that `tell` was told so far."""
        return self._count

    @contextlib.contextmanager
    def _looking(self, viewer: Viewer, *, whole: bool = False) -> Iterator[Look]:
        """One state of the tables, and what is known beyond it; `whole`: one in which nothing is unread."""
        self._heed()
        if whole and self._unread:
            self.refresh()
        with self._turn:
            cursor = self._cursors.pop() if self._cursors else self._database.cursor()
            cursor.execute("BEGIN")
            if self._made:
                cursor.execute("SELECT 1 FROM session LIMIT 0").fetchall()  # a state is taken by the first that is asked
            news = {session: said for session, (_, said) in self._news.items()}
            partly = spans_of(self._unread.values())
            may = may_see(viewer, news, list(self._told.values()), partly)
            look = Look(cursor, self._made, may, news, self._completeness, self._answers, partly)
        try:
            yield look
        finally:
            cursor.unregister("said")
            cursor.execute("ROLLBACK")
            self._cursors.append(cursor)

    def _heed(self) -> None:
        """Have what is listed hold all that an answer of now may not be without."""
        if self._thread is None:
            self.refresh()
            return
        if (fault := self._fault) is not None:
            raise fault
        if self._seen is None:
            self._begin()
        changes, seen = self._catalog.changes(), self._seen
        if seen is None or changes.rewritten != seen.rewritten:
            self.renew()
        elif changes.shown != seen.shown:
            self._read_news()

    def _read_news(self) -> None:
        """Read who may see what from all that is not listed yet, and nothing else of it."""
        with self._heeding:
            changes = self._catalog.changes()
            if self._seen is not None and changes.shown == self._seen.shown:
                return
            with self._turn:
                listed = self._listed
            while (found := self._news_of(listed)) is None:
                continue
            with self._turn:
                self._count += 1
                for session, said in found:
                    before = self._news.get(session)
                    if before is None or before[1].place <= said.place:
                        self._news[session] = (self._count, said)
                self._seen = Changes(changes.shown, self._seen.rewritten if self._seen else 0)

    def _news_of(self, listed: Collection[str]) -> list[tuple[bytes, Said]] | None:
        """Who may see which sessions, from what is catalogued and not listed; None where some of it was merged away meanwhile."""
        found = []
        sources = self._sources()
        for name in sources.keys() - listed:
            if (rows := self._ask_news(self._news_reader, sources[name])) is None:
                return None
            found += [(row["session_id"], Said(*row["shown"].values())) for row in rows.to_pylist()]
        return found

    def _ask_news(self, reader: EventReader, source: Shard | Segment) -> pa.Table | None:
        return self._ask(reader, source, NEWS, f"{_CUSTOMERS} AND kind = 'session_annotated'", NEWS_COLUMNS)

    # What is listed

    def refresh(self, told: int = 0) -> None:
        """List all that is catalogued at the call; what `tell` was told up to the number `told` is among it.

        Raises:
            CorruptStore, StoreUnavailable: a shard or segment cannot be read; what was listed before stays.
        """
        while not self._over.is_set():
            with self._refreshing:
                if self._pass(told, _PASS):
                    return
            self._over.wait(_YIELD_S)

    def renew(self, told: int = 0, *, patience_s: float = -1) -> None:
        """As `refresh`, but where the first reading is under way the list gets no more than what was sealed since, if that is little.

        With `patience_s` it does not get that either where something large is being read for longer: it will, before the next is read.
        """
        begun = self._seen is not None and not self._whole
        if self._refreshing.acquire(timeout=patience_s if begun else -1):
            try:
                self._pass(told, 0 if begun else _PASS)
            finally:
                self._refreshing.release()

    def _begin(self) -> None:
        """Wait for a first list."""
        with self._refreshing:
            if self._seen is None:
                self._pass(0, _PASS)

    def _pass(self, told: int, more: int) -> bool:
        """List what is due, with some `more` events of the first reading, and heed who may see the rest; whether there is none."""
        while not self._over.is_set():
            with self._heeding:
                beyond = _Beyond(self._count, told, self._catalog.changes(), completeness(self._catalog))
                sources = self._sources()
            due = self._due(sources, more)
            rest = sources.keys() - self._known.keys() - due.keys()
            if all(self._read(*one) for one in due.items()) and all(self._heed_who(name, sources[name]) for name in rest):
                self._list(sources, beyond, {name: sources[name] for name in rest})
                self._whole = self._whole or not rest
                return not rest
        return True

    def _due(self, sources: dict[str, Shard | Segment], more: int) -> dict[str, Shard | Segment]:
        """What is to be read before the next list: all, but for the first reading of a thread of its own. Then the newest come first.

        What holds the rows of something listed that was merged or tiered away is due, or sessions would vanish for a while.
        """
        unread = sorted((source for name, source in sources.items() if name not in self._known), key=lambda source: -source.time_max)
        if self._thread is None or self._whole or sum(source.rows for source in unread) <= _AT_ONCE:
            return {name_of(source): source for source in unread}
        gone = [self._known[name] for name in self._known.keys() - sources.keys()]
        due: dict[str, Shard | Segment] = {}
        rows = 0
        for source in unread:
            rows += source.rows
            if rows <= max(more, _AT_ONCE) or (more and not due) or any(_share(source, other) for other in gone):
                due[name_of(source)] = source
        return due

    def _sources(self) -> dict[str, Shard | Segment]:
        snapshot = self._catalog.snapshot()
        sources: dict[str, Shard | Segment] = {shard.name: shard for shard in snapshot.shards if shard.rows}
        return sources | {segment.key: segment for segment in snapshot.segments}

    def _read(self, name: str, source: Shard | Segment) -> bool:
        """Read the parts of one shard or segment; False where it was merged away meanwhile, for it comes again under another name."""
        parts = []
        for table, sql, kinds, columns in READ:
            rows = self._ask(self._reader, source, sql, f"{_CUSTOMERS} AND {kinds}", columns)
            if rows is None:
                return False
            parts.append((table, rows))
        with self._transaction():
            if name in self._heeded:
                self._connection.execute(f"DELETE FROM part WHERE source = {literal(name)}")
            for table, rows in parts:
                self._insert(name, table, rows)
            self._connection.execute("COMMIT")
        self._known[name] = source
        self._heeded.discard(name)
        return True

    def _heed_who(self, name: str, source: Shard | Segment) -> bool:
        """Read who may see what of one shard or segment, as a part that has nothing else; False where it was merged away meanwhile."""
        if name in self._heeded:
            return True
        if (rows := self._ask_news(self._reader, source)) is None:
            return False
        with self._transaction():
            self._insert(name, "part", rows)
            self._connection.execute("COMMIT")
        self._heeded.add(name)
        return True

    def _ask(self, reader: EventReader, source: Shard | Segment, sql: str, where: str, only: Collection[str]) -> pa.Table | None:
        """A query over one shard or segment; None where it was merged away meanwhile."""
        try:
            return reader.ask(alone(source), sql, where, only)
        except TokentapeError:
            if name_of(source) in self._sources():
                raise
            return None

    def _insert(self, name: str, table: str, rows: pa.Table) -> None:
        self._connection.register("rows", rows)
        made = f"SELECT {literal(name)} AS source, * FROM rows"
        self._connection.execute(f"CREATE TABLE IF NOT EXISTS {table} AS {made} WHERE false")
        self._connection.execute(f"INSERT INTO {table} BY NAME {made}")
        self._connection.unregister("rows")

    def _list(self, sources: dict[str, Shard | Segment], beyond: _Beyond, unread: dict[str, Shard | Segment]) -> None:
        """Make the rows anew of which the parts came or went, and let all that look have them at one moment."""
        gone = (self._known.keys() | self._heeded) - sources.keys()
        new = (self._known.keys() & sources.keys() - (self._listed.keys() - self._unread.keys())) | (unread.keys() - self._listed.keys())
        with self._transaction():
            if gone or new:
                changed = self._of(gone)
                for table in ("part", "replay"):
                    self._connection.execute(f"DELETE FROM {table} WHERE source IN ({', '.join(map(literal, gone)) or 'NULL'})")
                self._connection.execute(f"CREATE OR REPLACE TABLE replayed AS {REPLAYED}")
                self._put_together(changed | self._of(new))
            with self._turn:
                self._connection.execute("COMMIT")
                self._listed, self._unread = sources, unread
                self._made = self._made or bool(gone or new)
                self._completeness = replace(beyond.completeness, unread=sum(source.rows for source in unread.values()))
                self._answers = {} if gone or new else self._answers
                self._news = {session: news for session, news in self._news.items() if news[0] > beyond.count}
                self._told = {number: said for number, said in self._told.items() if number > beyond.told}
                newer = self._seen if self._seen is not None and self._count > beyond.count else beyond.changes
                self._seen = Changes(newer.shown, beyond.changes.rewritten)
        self._known = {name: source for name, source in self._known.items() if name not in gone}
        self._heeded -= gone

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All that the block commits, or nothing."""
        self._connection.execute("BEGIN")
        try:
            yield
        except BaseException:
            with contextlib.suppress(duckdb.Error):  # it is rolled back already where it failed to commit
                self._connection.execute("ROLLBACK")
            raise

    def _of(self, names: Collection[str]) -> set[bytes]:
        """The sessions that parts of some sources tell of, those included that are replayed there."""
        if not names or not self._made:
            return set()
        there = f"source IN ({', '.join(map(literal, names))})"
        replayed = f"SELECT subject FROM replayed WHERE subject IS NOT NULL AND replay IN (SELECT replay FROM replay WHERE {there})"
        rows = self._connection.execute(f"SELECT session_id FROM part WHERE {there} UNION {replayed}").fetchall()
        return {bytes(row[0]) for row in rows}

    def _put_together(self, changed: set[bytes]) -> None:
        """Make the rows of the sessions that changed anew, or all where those are most."""
        if not self._made or 2 * len(changed) > self._connection.execute("SELECT count(*) FROM session").fetchall()[0][0]:
            self._connection.execute(f"CREATE OR REPLACE TABLE session AS {SESSIONS.format(part='part')}")
            return
        self._connection.register("changed", pa.table({"session_id": pa.array(list(changed), pa.binary())}))
        those = "session_id IN (SELECT session_id FROM changed)"
        self._connection.execute(f"DELETE FROM session WHERE {those}")
        some = SESSIONS.format(part=f"(SELECT * FROM part WHERE {those})")
        self._connection.execute(f"INSERT INTO session BY NAME {some}")
        self._connection.unregister("changed")

    def _said(self, words: tuple[str, ...]) -> dict[str, int]:
        """By session (hex), a bit for each word that it says."""
        while True:
            self._heed()
            if (masks := self._searches.masks(words, self._listed)) is not None:
                return masks
            self.refresh()


@dataclass(frozen=True, slots=True)
class _Beyond:
    """Where the tape stood when a refresh began: what was told and read by then stands in the parts that it reads."""

    count: int
    told: int
    changes: Changes
    completeness: Completeness


def _share(one: Shard | Segment, other: Shard | Segment) -> bool:
    """Whether both hold what stood at the same offsets of a log."""
    return any(
        (a.log_id, a.partition) == (b.log_id, b.partition) and a.offset_first < b.offset_next and b.offset_first < a.offset_next
        for a in one.ranges
        for b in other.ranges
    )
