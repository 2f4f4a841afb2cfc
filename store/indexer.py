"""The indexer: follows the log and commits rows and offsets together, in a tail that it seals for readers.

Several indexers share the partitions of a log: each holds the fences of its share, takes over what a dead one left
within a second, and gives up what is above its share when another comes.
"""

from __future__ import annotations

import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from schemas import clock
from schemas.errors import Fenced, LogChanged, NewerSchema, TokentapeError
from schemas.registry import Schema, SchemaRegistry
from schemas.settings import Settings
from store.catalog import Catalog, Position
from store.container import MARK_BYTES
from store.crashpoints import crash_point
from store.fences import FileLock, fence_path, is_held
from store.follower import Cursor, Follower, Round
from store.freshness import Freshness, ensure_fresh
from store.ingest_batch import Prepared, Preparer
from store.log.base import Log
from store.sealing import recover, seal
from store.tail import Committed, PartitionState, Tail

__all__ = ["Freshness", "Indexed", "Indexer", "ensure_fresh"]

log = structlog.get_logger("tokentape.indexer")

# How often an idle indexer looks for requests to seal: a reader who asks for fresh waits for this.
_POLL_S = 0.02
# How often the share of partitions is looked at: a dead indexer's partitions are taken over within this.
_ASSIGN_S = 0.5
# How often an idle indexer notes that it has caught up.
_NOTE_S = 0.5
# A seal begins when this share of `seal_s` has passed, so that readers have the shard within it.
_SEAL_AT = 0.9
# Pause after a fault that may pass, doubled each time up to the second value.
_BACKOFF_S = (0.2, 5.0)


@dataclass(slots=True)
class Indexed:
    """What a run did, in records; `stopped` holds the partitions that wait for a newer version of this program."""

    rows: int = 0
    duplicates: int = 0
    quarantined: int = 0
    lost: int = 0
    shards: int = 0
    partitions: tuple[int, ...] = ()
    stopped: dict[int, NewerSchema] = field(default_factory=dict)

    def add(self, done: Committed) -> None:
        """Count one commit."""
        self.rows += done.rows
        self.duplicates += done.duplicates
        self.quarantined += done.quarantined
        self.lost += done.lost


class Indexer:
    """Indexes a log into `data/hot`. `on_schema` is called once for each writer schema that is met."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        registry: SchemaRegistry | None = None,
        *,
        hot: Path | None = None,
        on_schema: Callable[[Schema], None] | None = None,
    ) -> None:
        """Nothing is opened but the catalog; `hot` names another folder than `data/hot`, for a rebuild.

        Raises:
            LogChanged: the index belongs to another log, or the number of partitions has changed.
        """
        self.settings = settings
        self.log = log
        self.registry = registry or SchemaRegistry()
        self.hot = hot or settings.data / "hot"
        self.catalog = Catalog(self.hot / "catalog.sqlite")
        self.on_schema = on_schema
        check_same_log(self.catalog, log)

    def run_once(self, *, until: dict[int, int] | None = None) -> Indexed:
        """Index to the log's end as of now, or `until` these offsets, and seal.

        Only partitions that no other indexer holds; `Indexed.partitions` says which.

        Raises:
            LogChanged, LogUnavailable, CorruptStore, StorageFull: what was committed before stands.
        """
        with _Session(self, "once") as session:
            session.take(range(self.log.partitions))
            session.index_to(until)
            return session.done

    def run(self, stop: threading.Event) -> None:
        """Follow the log until `stop`; a fault that may pass is waited out, and what was committed is sealed at the end.

        Raises:
            LogChanged, CorruptStore: a fault that waiting does not cure.
        """
        pause = _BACKOFF_S[0]
        while not stop.is_set():
            try:
                with _Session(self, "indexer") as session:
                    session.follow(stop)
                pause = _BACKOFF_S[0]
            except TokentapeError as problem:
                if not problem.retryable and not isinstance(problem, Fenced):
                    raise
                log.warning("indexer.interrupted", error=str(problem), hint=problem.hint, again_in_s=pause)
                stop.wait(pause)
                pause = min(pause * 2, _BACKOFF_S[1])


def check_same_log(catalog: Catalog, log: Log) -> None:
    """Remember which log a catalog belongs to.

    Raises:
        LogChanged: it belongs to another one, or the number of partitions has changed.
    """
    known_id, known_count = catalog.remember("log_id", log.log_id), catalog.remember("partitions", str(log.partitions))
    hint = "name the log that was indexed, or run `tokentape rebuild` to index this one from its beginning"
    if known_id != log.log_id:
        fault = f"the index belongs to log {known_id}, this is {log.log_id}"
        raise LogChanged(fault, operation="index", place=str(catalog.path), hint=hint)
    if known_count != str(log.partitions):
        fault = f"the log has {log.partitions} partitions, it had {known_count} when it was indexed"
        raise LogChanged(fault, operation="index", place=str(catalog.path), hint=hint)


class _Session:
    """One indexer at work: its locks, its tail, its follower; closed as a whole and begun anew after a fault."""

    def __init__(self, indexer: Indexer, role: str) -> None:
        self._indexer = indexer
        self._settings, self._log, self._catalog = indexer.settings, indexer.log, indexer.catalog
        self.token = f"{role}-{os.getpid()}-{secrets.token_hex(4)}"
        self.done = Indexed()
        self._fences: dict[int, FileLock] = {}
        self._states: dict[int, PartitionState] = {}
        self._tail: Tail | None = None
        self._tail_since = 0.0
        self._tails = 0
        self._follower: Follower | None = None
        self._caught_up: dict[int, tuple[int, int]] = {}
        self._noted_at = 0.0
        self._request, self._wanted = 0, {}  # type: int, dict[int, int]

    def __enter__(self) -> _Session:
        settings = self._settings
        while (lock := FileLock.take(self._indexer.hot / "tail" / f"{self.token}.lock", self.token)) is None:
            time.sleep(0.001)  # another indexer that looks for dead ones tries every lock, and holds the new file for a moment
        self._owner = lock
        self._scratch = settings.data / "tmp" / self.token
        self._preparer = Preparer(self._indexer.registry, self._scratch, secrets.token_bytes(MARK_BYTES), settings.index.event_bytes_max)
        self._preparer.on_schema = self._indexer.on_schema
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._follower is not None:
            self._follower.stop()
        try:
            if self._tail is not None and kind is None:
                self._seal()
        finally:
            self._abandon()

    def _abandon(self) -> None:
        """Let go of everything; a tail that was not sealed is for whoever recovers it."""
        if self._tail is not None:
            self._tail.close()
        for fence in self._fences.values():
            fence.release()
        self._fences.clear()
        self._owner.release(remove=self._tail is None)
        for path in self._scratch.glob("*"):
            path.unlink(missing_ok=True)
        self._scratch.rmdir()

    # Partitions

    def take(self, wanted: Iterable[int], most: int | None = None) -> bool:
        """Take free fences of the partitions, `most` in all, and load where they stand; whether any was taken."""
        taken = []
        for partition in wanted:
            if partition in self._fences or (most is not None and len(self._fences) >= most):
                continue
            fence = FileLock.take(fence_path(self._indexer.hot, partition), self.token)
            if fence is not None:
                self._fences[partition] = fence
                taken.append(partition)
        if taken:
            # After the fences, so that nobody can add to what a dead owner left.
            recover(self._indexer.hot, self._catalog, self.token)
            self._load(taken)
        return bool(taken)

    def _load(self, partitions: list[int]) -> None:
        log_id = self._log.log_id
        known = {at.partition: at for at in self._catalog.positions() if at.log_id == log_id}
        for partition in partitions:
            at = known.get(partition)
            if at is None:
                at = self._catalog.begin(Position(log_id, partition, self._log.bounds(partition)[0]))
            state = PartitionState(partition, at.offset_next, at.digest, at.day, at.appended_at, at.duplicates, at.quarantined)
            state.marks = self._catalog.marks(log_id, partition)
            self._states[partition] = state
            self._catalog.alarm(partition, None)
        self.done.partitions = tuple(sorted(self._fences))

    def _start_follower(self, until: dict[int, int] | None = None) -> Follower:
        cursors = {partition: Cursor(state.offset_next, state.day) for partition, state in self._states.items()}
        limit = self._settings.index.batch_events_max
        self._follower = Follower(self._log, self._preparer, cursors, limit=limit, until=until)
        self._follower.start()
        return self._follower

    # Indexing

    def index_to(self, until: dict[int, int] | None) -> None:
        """Index the partitions up to these offsets, or to the log's end as of now, and seal."""
        if not self._fences:
            return
        before = clock.now_us()
        targets = until or {partition: self._log.bounds(partition)[1] for partition in self._fences}
        follower = self._start_follower(targets)
        while (found := follower.rounds.get()) is not None:
            self._handle(found)
        self._note_stopped(follower)
        if until is None:
            reached = {partition: state.offset_next for partition, state in self._states.items() if partition not in follower.newer}
            self._caught_up.update({partition: (offset, before) for partition, offset in reached.items()})
        self._seal()
        self._note_caught_up()

    def follow(self, stop: threading.Event) -> None:
        """Index what comes until `stop` or until the share of partitions changes."""
        self._assign()
        assigned_at = time.monotonic()
        follower = self._start_follower()
        while not stop.is_set():
            if self._fences:
                self._step(follower)
            else:
                stop.wait(_POLL_S)
            if time.monotonic() - assigned_at >= _ASSIGN_S:
                assigned_at = time.monotonic()
                if self._share_changed():
                    return

    def _step(self, follower: Follower) -> None:
        """Insert one round if there is one, then seal if it is time."""
        try:
            found = follower.rounds.get(timeout=_POLL_S)
            if found is None:
                found = Round()
            self._handle(found)
        except queue.Empty:
            pass
        self._note_stopped(follower)
        self._hear_requests(follower)
        old = time.monotonic() - self._tail_since >= self._settings.index.seal_s * _SEAL_AT
        if self._tail is not None and (old or (self._wanted and self._reached())):
            self._seal()
            follower.acknowledged = {partition: state.offset_next for partition, state in self._states.items()}
        if self._wanted and self._reached() and self._tail is None:
            self._wanted = {}
            follower.hurry.clear()
        if time.monotonic() - self._noted_at >= _NOTE_S:
            self._note_caught_up()

    def _handle(self, found: Round | BaseException) -> None:
        if isinstance(found, BaseException):
            raise found
        try:
            for day in sorted({item.day for item in found.prepared}):
                self._insert(day, [item for item in found.prepared if item.day == day])
        finally:
            self._preparer.discard(found.prepared)
        self._caught_up.update(found.caught_up)

    def _insert(self, day: str, prepared: list[Prepared]) -> None:
        if self._tail is not None and self._tail.day != day:
            self._seal()
        if self._tail is None:
            self._tail = self._new_tail(day)
        done = self._tail.commit(prepared, self._states, lambda: self._check_fences(prepared))
        self.done.add(done)
        if done.quarantined or done.lost:
            log.warning("indexer.incomplete", quarantined=done.quarantined, lost=done.lost, duplicates=done.duplicates)

    def _new_tail(self, day: str) -> Tail:
        self._tails += 1
        for state in self._states.values():
            state.begin()
        self._tail_since = time.monotonic()
        path = self._indexer.hot / "tail" / f"{self.token}-{self._tails:06d}.duckdb"
        return Tail(path, self._log.log_id, day, self._preparer)

    def _check_fences(self, prepared: list[Prepared]) -> None:
        self._owner.check()
        for partition in {item.partition for item in prepared}:
            self._fences[partition].check()

    def _seal(self) -> None:
        if self._tail is None:
            return
        tail = self._tail
        crash_point("indexer.before_seal")
        if seal(tail.connection, tail.path, self._catalog) is not None:
            self.done.shards += 1
        self._tail = None
        self._note_caught_up()

    # What others want to know

    def _hear_requests(self, follower: Follower) -> None:
        for number, targets in self._catalog.seal_requests(self._request):
            self._request = number
            for partition, offset in targets.items():
                self._wanted[partition] = max(offset, self._wanted.get(partition, 0))
            follower.hurry.set()

    def _reached(self) -> bool:
        """Whether every partition of ours is at the offset that somebody waits for; a stopped one never gets there."""
        stopped = self._follower.newer if self._follower is not None else {}
        return all(
            state.offset_next >= self._wanted.get(partition, 0) for partition, state in self._states.items() if partition not in stopped
        )

    def _note_caught_up(self) -> None:
        self._noted_at = time.monotonic()
        if self._caught_up:
            self._catalog.caught_up(self._log.log_id, self._caught_up)

    def _note_stopped(self, follower: Follower) -> None:
        for partition, problem in list(follower.newer.items()):
            if partition not in self.done.stopped:
                self.done.stopped[partition] = problem
                self._catalog.alarm(partition, str(problem))
                log.error("indexer.stopped", partition=partition, error=str(problem), hint=problem.hint)

    # Sharing partitions with other indexers

    def _assign(self) -> None:
        count = self._log.partitions
        start = int(self.token[-8:], 16) % count
        self.take([(start + i) % count for i in range(count)], most=self._share())

    def _share(self) -> int:
        """How many partitions are ours: all of them over the number of live indexers, rounded up."""
        folder = self._indexer.hot / "tail"
        others = [path for path in folder.glob("indexer-*.lock") if path.stem != self.token and is_held(path)]
        return -(-self._log.partitions // (1 + len(others)))

    def _share_changed(self) -> bool:
        """Whether partitions should be given up, or are free to be taken."""
        share = self._share()
        if len(self._fences) > share:
            return True
        if len(self._fences) == share:
            return False
        hot = self._indexer.hot
        free = [p for p in range(self._log.partitions) if p not in self._fences and not is_held(fence_path(hot, p))]
        return bool(free)
