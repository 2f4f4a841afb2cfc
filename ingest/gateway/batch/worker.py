"""A worker of batches: reads the log of each model that it can ask, has each request answered, keeps the result, then commits.

Which worker reads which partition is a rule over the workers that live, which each works out for itself; a lease keeps a partition
until what was read of it is done. Where two hold one all the same, as after a crash, a request may be asked twice; its result is
created once, so the first counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, TypeVar

import structlog

from ingest.debug import workers
from ingest.gateway.batch import facts as f
from ingest.gateway.batch.attempt import Answer, attempt, worn_out
from ingest.gateway.batch.desk import BatchDesk, parse_item, result_of
from ingest.gateway.batch.finish import finish, forget, give_up
from ingest.gateway.batch.requeue import bereft, requeue
from ingest.gateway.batch.submission import end_abandoned
from ingest.gateway.batch.window import Window, done_with
from ingest.gateway.endpoints.base import Endpoint
from ingest.gateway.exchange import Exchange
from ingest.gateway.parts import Parts
from schemas.batches import ENDED, Batch, Counts, WorkItem
from schemas.errors import AlreadyExists, CorruptStore, LogChanged, TokentapeError, UsageError
from schemas.requests import dump
from store.work import WorkLog

log = structlog.get_logger(__name__)

TURN_S = 0.25
"""How often a worker looks who lives, commits, and sees what has ended."""

TIDY_S = 2.0
"""How often it deletes what is worked off, and measures what waits."""

FORGET_S = 600.0
"""How often it deletes what is too old."""

BACKOFF_S_MAX = 60.0

AHEAD_MAX = 1000
"""A partition is read at most so far beyond its first request without a result, so that what a crash repeats is bounded."""

T = TypeVar("T")


@dataclass(frozen=True)
class Backlog:
    """What waits for one model, when it was last measured."""

    requests: int
    oldest_at: float | None


class Worker:
    """Use from the loop of a gateway, between `start` and `close`; it begins when the first model has work."""

    def __init__(self, parts: Parts, desk: BatchDesk, active: set[Exchange], endpoints: Mapping[str, Endpoint]) -> None:
        """`active` are the open exchanges of the gateway, which ends them when it stops."""
        self.backlog: dict[str, Backlog] = {}
        self.ended: Counter[str] = Counter()
        self._parts, self._desk, self._facts = parts, desk, desk.facts
        self._settings = parts.settings.batch
        self._active, self._endpoints = active, endpoints
        self._worker = workers.Worker()
        self._others = workers.Workers()
        self._pool = ThreadPoolExecutor(self._settings.concurrency + 8, thread_name_prefix="batch")
        self._ending = asyncio.Event()
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._windows: dict[tuple[str, int], Window] = {}
        self._items: defaultdict[str, set[asyncio.Task[None]]] = defaultdict(set)
        self._alone: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By model: of the requests that a dead worker had begun one is asked at a time, so that a further death is told from which."""
        self._counts: dict[str, Counts] = {}
        self._counted: set[str] = set()  # batches whose counts are not written yet
        self._announced_at = 0.0
        self._done_at = {"requeue": 0.0, "tidy": 0.0, "forget": time.monotonic()}
        self._loop: asyncio.Task[None] | None = None
        self._ender: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for work."""
        if self._settings.concurrency:
            self._loop = asyncio.create_task(self._run())

    def end(self) -> None:
        """Begin nothing more."""
        self._ending.set()

    async def close(self) -> None:
        """Stop; what is not finished is another worker's, or this one's when it starts again."""
        self.end()
        tasks = [*self._readers.values(), *chain.from_iterable(self._items.values()), *(task for task in (self._loop, self._ender) if task)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            if self._announced_at:
                await self._thread(self._write_progress)
                await self._thread(self._facts.write, f.WORKER, self._worker.worker_id, None)
        except TokentapeError as error:
            log.warning("the end of batch work is not written", error=str(error))
        self._pool.shutdown()
        self._desk.works.close()

    async def _thread(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *args)

    # What comes again and again

    async def _run(self) -> None:
        while not self._ending.is_set():
            try:
                await self._turn()
            except TokentapeError as error:
                log.warning("batch work waits", error=str(error))
            except Exception:
                log.exception("batch work failed")
            await self._pause(TURN_S)

    async def _turn(self) -> None:
        await self._thread(end_abandoned, self._facts, lambda: self._parts.recorder, self._parts.settings)
        models = [model for model in self._facts.latest(f.MODEL) if self._takes(model)]
        if not models:
            return
        await self._announce()
        for model in models:
            reader = self._readers.get(model)
            if reader is None or reader.done():
                self._readers[model] = asyncio.create_task(self._read_on(model))
        await self._thread(self._write_progress)
        if self._ender is None or self._ender.done():  # results of a long file take longer than a heartbeat
            self._ender = asyncio.create_task(self._end_batches())
        if self._due("tidy", TIDY_S):
            await self._thread(self._tidy, models)
        if self._due("forget", FORGET_S) and self._first():
            await self._thread(forget, self._desk)

    def _due(self, name: str, every_s: float) -> bool:
        if time.monotonic() - self._done_at[name] < every_s:
            return False
        self._done_at[name] = time.monotonic()
        return True

    async def _announce(self) -> None:
        """Say that this worker lives, and take away the facts of those that do not."""
        if time.monotonic() - self._announced_at < workers.HEARTBEAT_S and self._announced_at:
            return
        document = {**self._worker.document(), "models": self._patterns}
        await self._thread(self._facts.write, f.WORKER, self._worker.worker_id, document)
        self._announced_at = time.monotonic()
        known = self._facts.latest(f.WORKER)
        for worker in known.keys() - self._alive().keys():
            await self._thread(self._facts.write, f.WORKER, worker, None)

    @property
    def _patterns(self) -> list[str]:
        return sorted({pattern for lane in self._parts.routes.lanes for pattern in lane.entry.models})

    def _takes(self, model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in self._patterns)

    def _alive(self) -> dict[str, list[str]]:
        """The workers that live, in one order for all, and what they can ask."""
        known = self._facts.latest(f.WORKER)
        own = self._worker.worker_id
        alive = {worker for worker in known if worker == own or not self._others.dead(worker, known)}
        return {worker: [str(pattern) for pattern in known[worker].get("models", [])] for worker in sorted(alive)}

    def _first(self) -> bool:
        """Whether this worker does what one alone has to do. Two that think so do no harm."""
        return next(iter(self._alive()), None) == self._worker.worker_id

    def _mine(self, model: str, partitions: int) -> set[int]:
        """The partitions of a model that are this worker's."""
        able = [worker for worker, patterns in self._alive().items() if any(fnmatchcase(model, pattern) for pattern in patterns)]
        return {p for p in range(partitions) if able and able[p % len(able)] == self._worker.worker_id}

    # Reading

    async def _read_on(self, model: str) -> None:
        """Read the partitions of a model that are this worker's; an answer that is slow keeps no other model waiting."""
        log_id = None
        try:
            work = await self._thread(self._desk.works.standing, model)
            log_id = work.log_id
            self._leave(model, log_id)
            while not self._ending.is_set():
                ready = await self._ready(model, work)
                for partition in sorted(ready):
                    await self._read(work, self._windows[model, partition], max(1, self._free(model) // len(ready)))
        except LogChanged as error:
            log.warning("batch work is read again", model=model, error=str(error))
            self._leave(model)
        except CorruptStore as error:
            log.error("batch work is damaged", model=model, error=str(error))
            self._leave(model)
            await self._thread(self._desk.works.set_aside, model, log_id)
        except TokentapeError as error:
            log.warning("batch work cannot be read", model=model, error=str(error))
            await self._pause(1.0)

    def _leave(self, model: str, log_id: str | None = None) -> None:
        """Forget the places in a model's log, but not those in the one of this id."""
        for key in [key for key, window in self._windows.items() if key[0] == model and window.log_id != log_id]:
            del self._windows[key]

    async def _ready(self, model: str, work: WorkLog) -> set[int]:
        """Partitions of ours with something to read."""
        mine = self._mine(model, work.partitions)
        held = {partition for named, partition in self._windows if named == model}
        for partition in held - mine:
            await self._let_go(model, partition)
        for partition in mine - held:
            if await self._thread(self._lease, model, partition):
                self._windows[model, partition] = await self._thread(Window.open, self._facts, work, model, partition)
        windows = {partition: self._windows[model, partition] for partition in mine if (model, partition) in self._windows}
        offsets = {p: window.read for p, window in windows.items() if window.read - window.offset < AHEAD_MAX}
        if self._items[model] and not self._free(model):
            await asyncio.wait(self._items[model], timeout=TURN_S, return_when=asyncio.FIRST_COMPLETED)
            return set()
        if not offsets:
            await self._pause(TURN_S)
            return set()
        return await self._thread(lambda: work.wait(offsets, wait_s=TURN_S))

    def _free(self, model: str) -> int:
        """How many more requests of a model may be at work here."""
        return max(0, self._settings.concurrency - len(self._items[model]))

    def _lease(self, model: str, partition: int) -> bool:
        """Take a partition, unless a worker that lives still has requests of it under way."""
        key, own = f"{partition}/{model}", self._worker.worker_id
        holder = (self._facts.get(f.LEASE, key) or {}).get("worker")
        if holder not in (None, own) and not self._others.dead(str(holder), self._facts.latest(f.WORKER)):
            return False
        self._facts.write(f.LEASE, key, {"worker": own})
        return self._facts.get(f.LEASE, key) == {"worker": own}

    async def _let_go(self, model: str, partition: int) -> None:
        """Leave a partition to another worker once all that was read of it has its results and is committed."""
        window = self._windows[model, partition]
        if window.offset == window.read and window.written >= window.offset:
            del self._windows[model, partition]
            await self._thread(self._facts.write, f.LEASE, f"{partition}/{model}", None)

    async def _read(self, work: WorkLog, window: Window, limit: int) -> None:
        """Begin the next requests of a partition, as long as there is room for more."""
        model = window.model
        if not self._free(model):
            return
        batch = await self._thread(lambda: work.read(window.partition, window.read, limit=min(limit, self._free(model))))
        for offset, value in enumerate(batch.values, batch.offset_first):
            window.read = offset + 1
            task = asyncio.create_task(self._item(window, offset, value))
            self._items[model].add(task)
            task.add_done_callback(self._items[model].discard)

    # One request

    async def _item(self, window: Window, offset: int, value: bytes) -> None:
        """Have a record's request answered. Where that is interrupted the record is not done, and is read again."""
        try:
            item = parse_item(value)
        except ValueError as error:
            log.error("a record of batch work is none, and is passed over", error=str(error)[:200])
            return window.finish(offset)
        while not self._ending.is_set():
            try:
                if await self._answered(item, window, offset):
                    return window.finish(offset)
            except TokentapeError as error:
                log.warning("a batch request waits", batch=item.batch_id, line=item.number, error=str(error))
            except Exception:
                log.exception("a batch request waits", batch=item.batch_id, line=item.number)
            await self._pause(self._settings.backoff_s)
        return None

    async def _answered(self, item: WorkItem, window: Window, offset: int) -> bool:
        """Whether an item needs no more: it has its result, or none is wanted."""
        batch = await self._batch_of(item)
        if batch is None or not self._facts.wanted(batch):
            return True
        if await self._thread(self._desk.objects.head, result_of(batch, item.number)):
            return True
        return await self._ask(batch, item, window, offset) or not (self._ending.is_set() or self._facts.wanted(batch))

    async def _keep(self, batch: Batch, item: WorkItem, answer: Answer) -> None:
        """Make an answer durable, unless there is one already."""
        try:
            await self._thread(self._desk.objects.create, result_of(batch, item.number), dump(answer.line(item)))
        except AlreadyExists:
            return
        self._count(batch.batch_id, good=answer.status < 400)

    async def _batch_of(self, item: WorkItem) -> Batch | None:
        """The batch of an item once all of it is submitted; None where it never will be, or is forgotten."""
        deadline = time.monotonic() + f.READ_BACK_S
        while not self._ending.is_set():
            batch = self._facts.find(item.batch_id)
            if batch is not None and (batch.ends is not None or not self._facts.wanted(batch)):
                return batch
            if batch is None and time.monotonic() > deadline and not self._facts.away:
                return None
            await self._pause(0.05)
        raise asyncio.CancelledError

    async def _ask(self, batch: Batch, item: WorkItem, window: Window, offset: int) -> bool:
        """Get an answer and keep it; False where this worker stops or nobody wants it any more.

        What may have killed a worker is asked alone, and none after it before its answer is kept: the next one may be what kills.
        """
        waited, answer = 0, None
        suspect = window.attempts.get(offset, 0) > 0
        while window.attempts.get(offset, 0) < self._settings.attempts_max:
            async with self._alone[window.model] if suspect else contextlib.nullcontext():
                if self._ending.is_set() or not self._facts.wanted(batch):
                    return False
                answer = await self._attempt(batch, item, window, offset)
                if answer.interrupted:
                    return False
                if answer.final:
                    await self._keep(batch, item, answer)
                    return True
            waited += 1
            pause_s = min(max(answer.wait_s, self._settings.backoff_s * 2 ** min(waited - 1, 10)), BACKOFF_S_MAX)
            if window.attempts[offset] < self._settings.attempts_max and not await self._wait(batch, pause_s):
                return False
        await self._keep(batch, item, answer or worn_out(window.attempts[offset]))
        return True

    async def _attempt(self, batch: Batch, item: WorkItem, window: Window, offset: int) -> Answer:
        """Ask once. That it begins is durable first, so that a request which kills its process is not begun for ever."""
        before = window.attempts.get(offset, 0)
        window.attempts[offset] = before + 1
        try:
            await self._thread(window.note_attempts, self._facts)
            asking = attempt(self._parts, self._active, self._endpoints[item.url], batch, item)
            answer = await asyncio.create_task(asking, name=f"{batch.batch_id}/{item.number}")
        except (asyncio.CancelledError, TokentapeError):
            window.attempts[offset] = before
            raise
        if answer.interrupted or answer.away:
            window.attempts[offset] = before
        return answer

    async def _wait(self, batch: Batch, seconds: float) -> bool:
        """Wait before the next attempt; False where there shall be none."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._ending.is_set() and self._facts.wanted(batch):
            await self._pause(min(left, TURN_S))
        return not self._ending.is_set() and self._facts.wanted(batch)

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond the end of this worker."""
        try:
            await asyncio.wait_for(self._ending.wait(), seconds)
        except TimeoutError:
            return

    def _count(self, batch_id: str, *, good: bool) -> None:
        self.ended["completed" if good else "failed"] += 1
        self._counts[batch_id] = self._counts.get(batch_id, Counts()) + Counts(completed=int(good), failed=int(not good))
        self._counted.add(batch_id)

    # What is written down, in threads

    def _write_progress(self) -> None:
        """Counts first: once the last offset is committed anybody may end the batch."""
        for batch_id in list(self._counted):
            self._counted.discard(batch_id)
            if self._facts.ended(batch_id) is None:
                self._facts.write(f.COUNTS, f"{batch_id}/{self._worker.worker_id}", self._counts[batch_id])
            else:
                self._counts.pop(batch_id, None)
        for window in list(self._windows.values()):
            window.commit(self._facts)
            window.note_attempts(self._facts)

    def _tidy(self, models: list[str]) -> None:
        for model in models:
            work = self._desk.works.of(model)
            work.trim(done_with(list(self._windows.values()), model, work.log_id))
            self.backlog[model] = self._measured(model)

    def _measured(self, model: str) -> Backlog:
        work, requests, oldest = self._desk.works.of(model), 0, []
        for partition in range(work.partitions):
            log_id, committed = self._facts.committed(model, partition)
            first, end = work.bounds(partition)
            start = max(first, committed if log_id == work.log_id else 0)
            requests += max(0, end - start)
            if start < end:
                oldest += [at / 1e6 for at in work.read(partition, start, limit=1).appended_at]
        return Backlog(requests, min(oldest, default=None))

    async def _end_batches(self) -> None:
        """End the batches whose every record is done with, and have those go on whose records are gone."""
        if not self._first():
            return
        batches = self._facts.batches()
        gone = await self._thread(bereft, self._desk, batches) if self._due("requeue", TIDY_S) else {}
        for batch in batches:
            if batch.batch_id in gone:
                await self._thread(self._bring_on, requeue, batch)
            elif self._facts.status(batch) not in ENDED and self._facts.worked_off(batch):
                await self._thread(self._bring_on, finish, batch)

    def _bring_on(self, call: Callable[[BatchDesk, Batch], None], batch: Batch) -> None:
        """Do what brings a batch nearer to its end; one for which that fails keeps no other waiting."""
        try:
            try:
                call(self._desk, batch)
            except UsageError as error:
                give_up(self._desk, batch, error.fault)
        except TokentapeError as error:
            log.warning("the end of a batch waits", batch=batch.batch_id, error=str(error))
        except Exception:
            log.exception("the end of a batch failed", batch=batch.batch_id)
