"""The recorder: events go in within microseconds and come out in the log, whatever the log is doing meanwhile."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path

from ingest.attachments import Deferred
from ingest.coalesce import delta_of
from ingest.pipeline import Pipeline, sampled
from schemas.errors import LogUnavailable
from schemas.events import Alternative, Payload, TokenChunk
from schemas.histogram import Histogram
from schemas.settings import RecorderSettings
from schemas.sink import SessionContext
from store.log.base import Log


@dataclass(frozen=True, slots=True)
class RecorderStats:
    """Counts since the recorder was made in this process.

    `recorded`: calls of `record`, `tokens` and `run` that were taken in; a token delta or a run counts as one, whatever
    becomes one event. `acknowledged`: events of this producer that the log has durably. `adopted`: events of dead producers
    that were sent for them. `shed`: calls and events that were let go, for whatever reason. `sampled_out`: calls that
    sampling left out. `queue_depth`: calls that wait for the thread. `spool_bytes`: bytes on disk. `log_available`:
    False from a failed or overlong append until the next that succeeds.
    """

    recorded: int
    acknowledged: int
    adopted: int
    shed: int
    sampled_out: int
    queue_depth: int
    spool_bytes: int
    log_available: bool


class Recorder:
    """Where this process records. Any thread may call it; one thread encodes, one sends.

    What each mode can lose:

    - ``shed`` never blocks. When `queue_max` calls wait, further ones are let go; how many of which kind stands in
      a `records_lost` event of their session. A killed process loses what was in the queue, some twenty
      milliseconds of events while the log keeps up (a fifth of a second where `coalesce_ms` is 500, as in the recorder
      of an engine), and with a spool nothing that was spooled.
    - ``block`` waits for room instead, for ever if need be: an outage longer than the spool is large stops the
      process, and in an event loop all that runs in it. A killed process loses as in ``shed``.
    - ``strict`` is ``block`` for `record`; the caller awaits `durable` where losing would matter: before a request is
      forwarded, before a client sees the end. A killed process loses only what nobody waited for.

    The queue fills when the log is away and either there is no spool (embedded) or the spool has reached
    `spool_bytes_max` or its disk is full. A power cut may take spooled events from the time before the log was seen
    to be away (about a second); those waited for with `durable` are on disk. In mode ``block`` and ``strict`` events
    that cannot be encoded, and calls after `close`, are lost too, counted and told.

    Order: events of one session reach the log in the order of the calls, except that tokens wait for company up to
    `coalesce_ms` or `coalesce_tokens` per sequence; anything else recorded in the session goes after the tokens
    before it. A killed producer's spool is sent by the next recorder on the same spool folder, before its own events,
    byte for byte.

    Heartbeats: each partition that got events gets a `producer_heartbeat` of its own every `heartbeat_s` and a last
    one with `closed`, in a platform session whose id falls into that partition. Partitions are indexed apart, so only
    an event of the same partition comes surely after the events it vouches for: there the heartbeat's own sequence
    number shows a gap before it, and the missing `closed` one a tail that may be lost. Each also lists the positions
    of all partitions at that time, by which a whole partition that stays silent is seen from another.

    After a fork the child starts with a new producer id, an empty queue and threads of its own when it first
    records; what waited is the parent's. `close` is called at exit, but not in a child that ends by `os._exit`.
    """

    def __init__(
        self, log: Log, settings: RecorderSettings, *, spool: Path | None = None, source: str = "sdk", host: str | None = None
    ) -> None:
        """`spool` is the folder of all spools (distributed), None when the log is its own spool (embedded).

        `source` and `host` go into heartbeats; the host's name is taken by default. The log stays the caller's to close,
        after `close`.
        """
        self._log = log
        self._settings = settings
        self._spool = spool
        self._source = source
        self._host = host
        self._begin()
        _recorders.add(self)

    def record(self, session: SessionContext, payload: Payload | Deferred) -> None:
        """Record one event with the time of now. The payload MUST NOT be changed afterwards."""
        self._put(session, payload, payload.KIND)

    def tokens(
        self,
        session: SessionContext,
        generation_id: bytes,
        index: int,
        position: int,
        offset_us: int,
        *,
        channel: str = "content",
        token_ids: Sequence[int] = (),
        text: str = "",
        logprobs: Sequence[float] = (),
        alternatives: Sequence[Sequence[Alternative]] = (),
    ) -> int:
        """Record one delta of sequence `index` and return the position of the next.

        With token ids the delta is one entry per token, and all of its text belongs to the last; without, it is one
        entry. `offset_us` counts from the generation's start. `logprobs` has one number per entry; with another
        length, or a NaN in it, it counts as unknown. `alternatives` has what else each entry might have been, of which
        `ALTERNATIVES_MAX` are kept; with another length it counts as unknown. Lone surrogates in texts become U+FFFD.
        """
        ids = tuple(token_ids)
        delta = delta_of(generation_id, index, position, offset_us, channel, ids, text, tuple(logprobs), alternatives)
        self._put(session, delta, TokenChunk.KIND)
        return position + (len(ids) or 1)

    def run(
        self,
        session: SessionContext,
        generation_id: bytes,
        index: int,
        position: int,
        offset_us: int,
        token_ids: Sequence[int],
        texts: Sequence[str],
        logprobs: Sequence[float],
    ) -> int:
        """Record tokens of content that came at once and return the position of the next: one text and one logprob per id."""
        at_most = self._settings.coalesce_tokens
        for start in range(0, len(token_ids), at_most):
            part = slice(start, start + at_most)
            delta = generation_id, index, position + start, offset_us, "content", token_ids[part], texts[part], logprobs[part], ()
            self._put(session, delta, TokenChunk.KIND)
        return position + len(token_ids)

    def sampled(self, session_id: bytes) -> bool:
        """Whether this session is among those that `sample_rate` keeps; `record` ignores the others."""
        return sampled(session_id, self._settings.sample_rate)

    async def durable(self) -> None:
        """Return when everything recorded by now is durable: in the log, or synced in the spool if the log is away.

        Raises:
            LogUnavailable: the recorder was closed before that.
        """
        await asyncio.wrap_future(self._pipeline.mark(in_log=False))

    def wait_durable(self, timeout_s: float | None = None) -> bool:
        """`durable` for callers without an event loop; False when the time is over first."""
        return self._wait(timeout_s, in_log=False)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Whether the log has everything recorded by now, waiting up to `timeout_s`; tokens no longer wait for company."""
        return self._wait(timeout_s, in_log=True)

    def close(self, timeout_s: float = 30.0) -> None:
        """Bring everything into the log, each partition's last heartbeat included; safe to call twice.

        What the log does not take stays in the spool for the next recorder; without a spool it is lost after
        `timeout_s`, counted in one line of the process's log.
        """
        if self in _recorders:
            _recorders.discard(self)
            self._pipeline.close(timeout_s)

    @property
    def stats(self) -> RecorderStats:
        """The counts of now; not a consistent cut while events flow."""
        inbox, sender = self._pipeline.inbox, self._pipeline.sender
        depth = len(inbox.queue)
        return RecorderStats(
            recorded=self._pipeline.taken + depth,
            acknowledged=sender.acknowledged if sender else 0,
            adopted=sender.adopted if sender else 0,
            shed=inbox.lost,
            sampled_out=self._pipeline.sampled_out,
            queue_depth=depth,
            spool_bytes=sender.disk_bytes if sender else 0,
            log_available=sender.available if sender else True,
        )

    @property
    def encoding(self) -> Histogram:
        """How long encoding each event took, since the recorder was made in this process."""
        return self._pipeline.encoding

    def _begin(self) -> None:
        self._pipeline = Pipeline(self._log, self._settings, spool=self._spool, source=self._source, host=self._host)
        self._put = self._pipeline.inbox.put

    def _wait(self, timeout_s: float | None, *, in_log: bool) -> bool:
        with contextlib.suppress(FutureTimeoutError, LogUnavailable):
            self._pipeline.mark(in_log=in_log).result(timeout_s)
            return True
        return False

    def _after_fork(self) -> None:
        self._pipeline.forget()
        self._begin()


_recorders: set[Recorder] = set()
"""Recorders of this process that are not closed."""


def _renew_all() -> None:
    for recorder in _recorders:
        recorder._after_fork()


def _close_all() -> None:
    for recorder in list(_recorders):
        recorder.close()


os.register_at_fork(after_in_child=_renew_all)
atexit.register(_close_all)
