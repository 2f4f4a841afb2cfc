"""The recorder's thread: takes what was recorded, coalesces tokens, encodes, and hands entries to the sender."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from ingest import spool as spools
from ingest.attachments import Deferred
from ingest.coalesce import Chunk, Coalescer
from ingest.encoding import Stamp, encode
from ingest.inbox import Inbox
from ingest.outbox import SEND_BYTES_MAX, MemoryOutbox, Outbox
from ingest.sender import Sender
from schemas import clock
from schemas.errors import InvalidEvent, LogUnavailable, StorageFull, Unavailable
from schemas.events import PLATFORM_TENANT, SAMPLED_OUT, Count, Payload, ProducerHeartbeat, RecordsLost, SequencePosition, TokenChunk
from schemas.histogram import ENCODE_S, Histogram
from schemas.settings import RecorderSettings
from schemas.sink import SessionContext, platform_session
from store.log.base import Entry, Log, partition_of

logger = structlog.get_logger("tokentape.recorder")

# Items encoded at a time: a few milliseconds, after which chunks, marks and the outbox have their turn.
_TAKE = 256
# After the first item of a quiet time the thread waits this long for company: one wake-up, one batch, one commit. A wake-up
# costs as much as encoding some ten events, and takes the interpreter from whoever passes tokens on. Where tokens may wait
# longer than usual, so may all else, for as large a share of that time: every commit takes the processor from an engine beside it.
_GATHER_S, _GATHER_MAX_S = 0.02, 0.25
_GATHER_SHARE = 0.4
# While somebody waits for durability or room, state is looked at this often should a signal be missed.
_RECHECK_S = 0.05
# When the recorder is closed, a log that is slow but has not failed is given this long before the rest is left in the spool.
_GOODBYE_S = 5.0


@dataclass(slots=True, eq=False)
class Mark:
    """Somebody who waits until all entries before `position` are durable, in the log if `in_log`."""

    in_log: bool
    done: Future[None]
    position: int = 0

    def settle(self, problem: Exception | None = None) -> None:
        """Tell whoever waits, if anybody still does."""
        with contextlib.suppress(InvalidStateError):
            if problem is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(problem)


class Pipeline:
    """Queue, threads, producer id and outbox of one recorder in one process; a forked child makes another.

    Nothing runs before the first event. Fields without underscore are read by the recorder.
    """

    def __init__(self, log: Log, settings: RecorderSettings, *, spool: Path | None, source: str, host: str | None) -> None:
        self.inbox = Inbox(items_max=settings.queue_max, enough=_TAKE, shed=settings.mode == "shed", source=source, start=self._start)
        self.taken = 0
        self.sampled_out = 0
        self.sender: Sender | None = None
        self.encoding = Histogram(ENCODE_S)
        self._log = log
        self._settings = settings
        self._spool = spool
        self._source = source
        self._host = host or socket.gethostname()
        self._coalescer = Coalescer(span_s=settings.coalesce_ms / 1000, tokens_max=settings.coalesce_tokens)
        self._stamp = Stamp(log.partitions)
        self._outbox: Outbox | None = None
        self._pending: list[Entry] = []
        self._pending_bytes = 0
        self._produced = 0
        self._marks: list[Mark] = []
        self._skipped: Counter[str] = Counter()
        self._skipped_since = 0
        self._skips = platform_session(source, "recorder")
        self._pulses: dict[int, SessionContext] = {}
        self._told: dict[int, int] = {}
        self._beat_due = math.inf
        self._trouble = ""
        self._progress = threading.Event()
        self._closing = False
        self._abandoned = False
        self._thread: threading.Thread | None = None
        self._life = threading.Lock()

    # Called by any thread

    def mark(self, *, in_log: bool) -> Future[None]:
        """A future that is done when all recorded before is durable; fails with LogUnavailable when that will not be."""
        mark = Mark(in_log, Future())
        if self._closing or (self._thread is None and self.inbox.idle):
            mark.settle(LogUnavailable("the recorder is closed", operation="wait until durable") if self._closing else None)
        else:
            self.inbox.put_mark(mark)
        return mark.done

    def close(self, timeout_s: float) -> None:
        """Encode what waits, say goodbye, wait for the log; what it does not take in time stays in the spool or is lost."""
        deadline = time.monotonic() + timeout_s
        self.inbox.close()
        self._closing = True
        with self._life:
            thread = self._thread
        if thread is None:
            return
        self.inbox.wake()
        thread.join(timeout_s)
        self._abandoned = True
        self._progress.set()
        thread.join(1.0)
        if self._outbox is not None and self.sender is not None:
            self._drain(deadline)
            self.sender.stop(min(1.0, max(0.05, deadline - time.monotonic())))
            self._report_end(self._outbox)
            self._outbox.close()
        for mark in self._marks:
            mark.settle(LogUnavailable("the recorder was closed before the log answered", operation="close recorder"))

    def forget(self) -> None:
        """Leave what came over a fork to the parent."""
        orphans = self.sender.orphans if self.sender is not None else []
        for outbox in (self._outbox, *orphans):
            if isinstance(outbox, spools.Spool):
                outbox.forget()

    def _start(self) -> None:
        with self._life:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="tokentape-recorder", daemon=True)
                self._thread.start()

    def _drain(self, deadline: float) -> None:
        """Wait for the log, unless it is away and the spool keeps everything."""
        assert self._outbox is not None
        assert self.sender is not None
        patient_until = time.monotonic() + _GOODBYE_S
        while not self._outbox.empty and time.monotonic() < deadline:
            away = self.sender.failed or (not self.sender.available and time.monotonic() > patient_until)
            if self._spool is not None and away and self._sync():
                break
            self._progress.clear()
            self._progress.wait(_RECHECK_S)

    def _report_end(self, outbox: Outbox) -> None:
        lost = len(self.inbox.queue) + len(self._pending)
        if self._spool is None:
            lost += self._produced - len(self._pending) - (self.sender.acknowledged if self.sender else 0)
        elif isinstance(outbox, spools.Spool) and not outbox.empty:
            lost += outbox.volatile
            logger.warning("recorder_left_spool", bytes=outbox.disk_bytes, hint="the next recorder sends it")
        if lost > 0:
            logger.error("recorder_lost_events", count=lost, reason="the log did not take them before the recorder was closed")

    # The thread

    def _run(self) -> None:
        with self._open() as outbox:
            if outbox is None:
                return
            self._outbox = outbox
            self.sender = Sender(self._log, outbox, adopt=self._adopt, progress=self._on_progress, refused=self._on_refused)
            self.sender.start()
            while not (self._closing and self.inbox.idle) and not self._abandoned:
                if not self._closing:
                    due_s = self._rest_s()
                    self.inbox.rest(due_s, gather_s=self._gather_s(due_s))
                with self._surviving():
                    self._round()
            with self._surviving():
                self._finish()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Recording stops for no fault that nobody thought of; what is pending is handed on in the next round."""
        try:
            yield
        except Exception:
            logger.exception("recorder_fault")
            self._progress.wait(_RECHECK_S)

    @contextlib.contextmanager
    def _open(self) -> Iterator[Outbox | None]:
        """The outbox, as soon as the disk lets us have one."""
        while not self._abandoned:
            try:
                outbox = self._make_outbox()
                break
            except Unavailable as problem:
                self._complain("recorder_spool_unavailable", problem)
                self._progress.wait(1.0)
        else:
            yield None
            return
        yield outbox

    def _make_outbox(self) -> Outbox:
        if self._spool is None:
            return MemoryOutbox()
        return spools.create(
            self._spool,
            self._stamp.producer_id,
            log_id=self._log.log_id,
            partitions=self._log.partitions,
            bytes_max=self._settings.spool_bytes_max,
        )

    def _adopt(self) -> Iterator[Outbox]:
        if self._spool is None:
            return iter(())
        log = self._log
        return spools.adopt(self._spool, log_id=log.log_id, partitions=log.partitions, bytes_max=self._settings.spool_bytes_max)

    def _rest_s(self) -> float | None:
        due = min(self._coalescer.deadline_s, self._beat_due)
        if self._marks:
            due = min(due, time.monotonic() + _RECHECK_S)
        return None if math.isinf(due) else max(due - time.monotonic(), 0.0)

    def _gather_s(self, due_s: float | None) -> float:
        """How long to wait for company: not beyond what is due."""
        wished_s = min(_GATHER_SHARE * self._settings.coalesce_ms / 1000, _GATHER_MAX_S, math.inf if due_s is None else due_s)
        return max(_GATHER_S, wished_s)

    def _round(self) -> None:
        """Encode what waits and what is due, and hand it on."""
        now_s = time.monotonic()
        for session, payload, at in self.inbox.take(_TAKE):
            if session is None:
                self._take_mark(payload)
            else:
                self.taken += 1
                self._take(session, payload, at, now_s)
        self._add_chunks(self._coalescer.due(now_s))
        if self._beat_due <= now_s:
            self._beat(closed=False)
        elif math.isinf(self._beat_due) and (self._skipped or self._stamp.seqs != self._told):
            self._beat_due = now_s + self._settings.heartbeat_s
        self._ship()
        self._settle()

    def _finish(self) -> None:
        self._add_chunks(self._coalescer.end_all())
        while not self.inbox.idle and not self._abandoned:
            self._round()
            self._add_chunks(self._coalescer.end_all())  # a caller who had found room before the inbox closed may come late
        self._beat(closed=True)
        self._ship()
        if self._outbox is not None and not self._abandoned:
            with contextlib.suppress(Unavailable):
                self._outbox.sync()
        self._settle()

    def _take(self, session: SessionContext, payload: Any, at: int, now_s: float) -> None:
        if not is_sampled(session, self._settings.sample_rate):
            self._skip(TokenChunk.KIND if payload.__class__ is tuple else payload.KIND, at)
            return
        if payload.__class__ is tuple:
            try:
                done = self._coalescer.add(session, payload, at, now_s)
            except Exception as problem:  # a caller's mistake, such as a number that is None
                self._invalid(session, TokenChunk.KIND, at, problem)
            else:
                self._add_chunks(done)
            return
        self._add_chunks(self._coalescer.end(session.session_id))
        self._add(session, payload, at)

    def _skip(self, kind: str, at: int) -> None:
        """Count what sampling leaves out."""
        self.sampled_out += 1
        self._skipped_since = self._skipped_since or at
        self._skipped[kind] += 1

    def _tell_skipped(self) -> None:
        """Put the count of what sampling left out since the last time on the tape."""
        if self._skipped:
            kinds = [Count(key=kind, count=count) for kind, count in sorted(self._skipped.items())]
            span = {"first_recorded_at": self._skipped_since, "last_recorded_at": clock.now_us()}
            self._add(self._skips, RecordsLost(reason=SAMPLED_OUT, count=self._skipped.total(), kinds=kinds, **span), clock.now_us())
            self._skipped, self._skipped_since = Counter(), 0

    def _take_mark(self, mark: Mark) -> None:
        self._add_chunks(self._coalescer.end_all())
        mark.position = self._produced
        self._marks.append(mark)

    def _add_chunks(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self._add(chunk.session, chunk, chunk.recorded_at)

    def _add(self, session: SessionContext, payload: Payload | Chunk | Deferred, at: int) -> None:
        """Encode one event; one that cannot be encoded is counted as lost and told in its session."""
        if isinstance(payload, Deferred):
            payload = payload.settled()
        kind = TokenChunk.KIND if isinstance(payload, Chunk) else payload.KIND
        began = time.perf_counter_ns()
        try:
            if not session.content and getattr(payload, "content", None) is not None:
                payload = payload.model_copy(update={"content": None})  # type: ignore[union-attr]  # chunks see to it themselves
            if session.salt is None and (isinstance(payload, Chunk) or getattr(payload, "content", None) is not None):
                raise InvalidEvent("content in a session without a salt could never be erased", operation="record")
            data = payload.encode() if isinstance(payload, Chunk) else encode(payload)
            entry = self._stamp.entry(session, data, at)
        except Exception as problem:  # whatever a caller put into a payload, the thread goes on
            self._invalid(session, kind, at, problem)
            return
        self.encoding.observe((time.perf_counter_ns() - began) // 1000)
        self._pending.append(entry)
        self._pending_bytes += len(entry.value)
        self._produced += 1
        if self._pending_bytes > SEND_BYTES_MAX:
            self._ship()

    def _invalid(self, session: SessionContext, kind: str, at: int, problem: Exception) -> None:
        logger.error("recorder_event_invalid", kind=kind, problem=str(problem), exc_info=not isinstance(problem, InvalidEvent))
        if kind != RecordsLost.KIND:
            self.inbox.lose(session, kind, "invalid_event", at)

    # Heartbeats

    def _beat(self, *, closed: bool) -> None:
        """One heartbeat into each partition that got events since the last one, or ever when it is the last."""
        self._tell_skipped()
        seqs = dict(self._stamp.seqs)
        positions = [SequencePosition(partition=partition, seq=seq) for partition, seq in sorted(seqs.items())]
        payload = ProducerHeartbeat(positions=positions, closed=closed, host=self._host, pid=os.getpid())
        for partition, seq in seqs.items():
            if closed or self._told.get(partition) != seq:
                self._add(self._pulse(partition), payload, clock.now_us())
        self._told = dict(self._stamp.seqs)
        self._beat_due = math.inf

    def _pulse(self, partition: int) -> SessionContext:
        """The platform session for heartbeats in one partition."""
        while partition not in self._pulses:
            session = platform_session(self._source, "recorder")
            self._pulses.setdefault(partition_of(session.session_id, self._stamp.partitions), session)
        return self._pulses[partition]

    # Handing on

    def _ship(self) -> None:
        """Put what was encoded into the outbox, waiting for room as long as it takes; the queue fills meanwhile."""
        if not self._pending or self._outbox is None or self.sender is None:
            return
        while not self._offer(self._outbox):
            if self._abandoned:
                return
            self._progress.clear()
            self._progress.wait(_RECHECK_S)
            self._settle()
        self._pending, self._pending_bytes = [], 0
        self.sender.kick()
        if self._spool is not None and not self.sender.available:
            self._sync()

    def _offer(self, outbox: Outbox) -> bool:
        """Whether the outbox took what is pending."""
        try:
            taken = outbox.append(self._pending)
        except Unavailable as problem:
            self._complain("recorder_spool_unavailable", problem)
            return self._bypass(outbox, problem)
        if taken and self._trouble:
            logger.info("recorder_spool_back", bytes=outbox.disk_bytes)
            self._trouble = ""
        elif not taken and self._spool is not None:
            self._complain("recorder_spool_full", StorageFull(f"{outbox.disk_bytes} bytes", hint="raise recorder.spool_bytes_max"))
        return taken

    def _bypass(self, outbox: Outbox, problem: Unavailable) -> bool:
        """A full disk does not stop events that the log can take at once."""
        if isinstance(outbox, spools.Spool) and outbox.empty and self.sender is not None and self.sender.available:
            outbox.append_volatile(self._pending)
            return True
        return False

    def _sync(self) -> bool:
        assert self._outbox is not None
        try:
            return self._outbox.sync()
        except Unavailable as problem:
            self._complain("recorder_spool_unavailable", problem)
            return False

    def _settle(self) -> None:
        """Tell those who wait for what is durable by now."""
        if not self._marks or self.sender is None:
            return
        acknowledged = self.sender.acknowledged
        spooled = self._produced - len(self._pending)
        synced = self._spool is not None and not self.sender.available and any(not mark.in_log for mark in self._marks) and self._sync()
        for mark in list(self._marks):
            if mark.position <= acknowledged or (synced and not mark.in_log and mark.position <= spooled):
                self._marks.remove(mark)
                mark.settle()

    def _complain(self, event: str, problem: Unavailable) -> None:
        """One line when the trouble begins."""
        if self._trouble != event:
            logger.error(event, problem=str(problem), hint=problem.hint, mode=self._settings.mode)
            self._trouble = event

    def _on_progress(self) -> None:
        self._progress.set()
        if self._marks:
            self.inbox.wake()

    def _on_refused(self, entry: Entry, problem: InvalidEvent) -> None:
        self.inbox.lose(platform_session(self._source, "recorder"), "unknown", f"refused_by_log: {problem.fault}", clock.now_us())


def sampled(session_id: bytes, rate: float, tenant: str = "") -> bool:
    """Whether a session is recorded: decided by its id, so that every process and restart decides alike."""
    return rate >= 1 or tenant == PLATFORM_TENANT or _lot(session_id) < rate


def is_sampled(session: SessionContext, rate: float) -> bool:
    """Whether the events of a session are recorded; its own rate beats the one given."""
    own = session.sample_rate if session.sample_rate is not None else rate
    return own >= 1 or sampled(session.session_id, own, session.tenant)


@functools.lru_cache(maxsize=65_536)
def _lot(session_id: bytes) -> float:
    return float(int.from_bytes(hashlib.sha256(session_id).digest()[:7], "big") / (1 << 56))
