"""How much of a key is used: requests and tokens a minute (of the clock), and a budget of tokens, shared by all workers.

Requests are leased before they are spent. A worker writes into the control log how many of the minute it wants in all, reads the
log up to its own entry, and may then spend what the others' entries left: the log's order decides, so that workers together never
go over a limit. A lease is a twentieth of the limit, which is also what an idle worker may leave unused.

Tokens are known when they are spent. A worker writes its sum within `SHARE_S`, and a request is let in while the sum of all is under
the limit: over it go at most the requests that are under way then, and those that others let in within `SHARE_S` and the way of an entry.

While the control log is away a worker gives out its equal part of each limit: the limit by the number of workers that used the key of late.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import structlog

from ingest.gateway import errors
from ingest.gateway.errors import Failure
from ingest.gateway.keys import VirtualKey
from schemas import clock
from schemas.errors import StorageFull, TokentapeError
from store.control import ControlLog, ControlRecord, ControlView, Value

log = structlog.get_logger(__name__)

KIND = "usage"
"""Of facts in the control log; their key is `<key id>/<worker>`."""

MINUTE_S = 60

LEASES = 20
"""A worker takes a limit in so many pieces."""

SHARE_S = 0.2
"""How long tokens that a limit counts may be known to their worker alone."""

SHARE_IDLE_S = 5.0
"""The same for keys without a limit on tokens, where nobody waits for it."""

LEASE_WAIT_S = 2.0
"""After this a lease that did not come is not waited for: the control log counts as away."""

SETTLE_S = 0.005
"""Entries that were read together are all taken in after this."""


@dataclass(frozen=True)
class Used:
    """What was used of a key: in the current minute, and in all."""

    requests: int = 0
    tokens: int = 0
    total: int = 0
    workers: int = 0


@dataclass
class _Account:
    """What this worker used of one key."""

    minute: int = 0
    leased: int = 0
    asked: int = 0  # of the minute's requests, as the others know it
    used: int = 0
    tokens: int = 0
    total: int = 0
    dirty_at: float | None = None
    seen: int = 0  # the position of the last entry of its own that came back
    news: asyncio.Event = field(default_factory=asyncio.Event)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    leasing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def roll(self, minute: int) -> None:
        """A new minute begins with nothing."""
        if minute != self.minute:
            self.minute, self.leased, self.asked, self.used, self.tokens = minute, 0, 0, 0, 0

    def fact(self) -> Value:
        return {"minute": self.minute, "requests": self.asked, "tokens": self.tokens, "total": self.total}


class Quotas:
    """The accounts of one worker. Use from one event loop."""

    def __init__(self, control: ControlLog, shared: ControlView, worker: str) -> None:
        self._control = control
        self._shared = shared
        self._worker = worker
        self._accounts: dict[str, _Account] = {}
        self._facts: defaultdict[str, dict[str, Value]] = defaultdict(dict)  # by key and worker, as the log has it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sharing: asyncio.Task[None] | None = None
        shared.listen(self._heard)

    def open(self) -> None:
        """Begin to share; call in the loop that serves."""
        self._loop = asyncio.get_running_loop()
        self._sharing = asyncio.create_task(self._share())

    async def close(self) -> None:
        """Write down what was not yet."""
        if self._sharing:
            self._sharing.cancel()
            await asyncio.gather(self._sharing, return_exceptions=True)
        for key_id, account in self._accounts.items():
            if account.dirty_at is not None:
                with contextlib.suppress(TokentapeError, TimeoutError):
                    await self._write(key_id, account)

    def used(self, key_id: str) -> Used:
        """What all workers used of a key, as far as this one knows."""
        others = self._others(key_id)
        mine = self._account(key_id)
        return Used(others.requests + mine.used, others.tokens + mine.tokens, others.total + mine.total, others.workers + 1)

    async def admit(self, key: VirtualKey) -> None:
        """Count one request of a key.

        Raises:
            Failure: a limit is reached; `retry_after_s` is when the minute ends.
        """
        account, used = self._account(key.key_id), self.used(key.key_id)
        if key.budget_tokens is not None and used.total >= key.budget_tokens:
            raise Failure(errors.SPENT, f"This key's budget of {key.budget_tokens} tokens is spent.", retry_after_s=math.inf)
        if key.tokens_per_minute is not None and self._out_of_tokens(key.key_id, account, key.tokens_per_minute):
            raise _limited(errors.TOKENS_LIMITED, f"This key's limit of {key.tokens_per_minute} tokens per minute is reached.")
        if key.requests_per_minute is not None:
            if account.used >= account.leased:
                async with account.leasing:
                    await self._lease(key.key_id, account, key.requests_per_minute)
            if account.used >= account.leased:
                raise _limited(errors.REQUESTS_LIMITED, f"This key's limit of {key.requests_per_minute} requests per minute is reached.")
        account.used += 1

    def spend(self, key: VirtualKey, tokens: int) -> None:
        """Count the tokens of a request that is over."""
        account = self._account(key.key_id)
        account.tokens += tokens
        account.total += tokens
        limited = key.tokens_per_minute is not None or key.budget_tokens is not None
        due = time.monotonic() + (SHARE_S if limited else SHARE_IDLE_S)
        account.dirty_at = min(due, account.dirty_at or due)

    def _account(self, key_id: str) -> _Account:
        minute = int(clock.now_s()) // MINUTE_S
        account = self._accounts.get(key_id)
        if account is None:
            before = self._facts[key_id].get(self._worker, {})  # of the process that had this worker's name before
            account = self._accounts[key_id] = _Account(total=before.get("total", 0), minute=minute)
            if before.get("minute") == minute:
                account.leased = account.asked = account.used = before["requests"]
                account.tokens = before["tokens"]
        account.roll(minute)
        return account

    def _others(self, key_id: str) -> Used:
        minute = int(clock.now_s()) // MINUTE_S
        facts = [fact for worker, fact in list(self._facts[key_id].items()) if worker != self._worker]
        now = [fact for fact in facts if fact["minute"] == minute]
        return Used(
            sum(fact["requests"] for fact in now),
            sum(fact["tokens"] for fact in now),
            sum(fact["total"] for fact in facts),
            sum(fact["minute"] >= minute - 1 for fact in facts),
        )

    def _out_of_tokens(self, key_id: str, account: _Account, limit: int) -> bool:
        """Whether the minute's tokens are used up: all of them, or this worker's part while it does not hear of the others."""
        others = self._others(key_id)
        if self._shared.away:
            return account.tokens >= math.ceil(limit / (others.workers + 1))
        return others.tokens + account.tokens >= limit

    async def _lease(self, key_id: str, account: _Account, limit: int) -> None:
        """Take a further piece of the minute's requests, if the others left one."""
        if account.used < account.leased:
            return
        minute = account.minute
        wanted = min(account.leased + math.ceil(limit / LEASES), limit - self._others(key_id).requests)
        if wanted <= account.leased:
            return
        account.asked = max(account.asked, wanted)
        try:
            if self._shared.away:
                raise TimeoutError
            async with asyncio.timeout(LEASE_WAIT_S):
                await self._come_back(account, await self._write(key_id, account))
        except (TimeoutError, TokentapeError) as error:
            part = limit // (self._others(key_id).workers + 1)
            log.warning("limits are not shared now", key=key_id, part=part, error=str(error))
            wanted = min(wanted, max(1, part))
        if account.minute != minute:
            return
        granted = min(wanted, limit - self._others(key_id).requests)
        account.leased = max(account.leased, granted)
        if account.asked > account.leased:  # the others may have what was asked for in vain
            account.asked = account.leased
            account.dirty_at = time.monotonic()

    async def _come_back(self, account: _Account, position: int) -> None:
        """Return when the log was read up to an entry of this worker's, with all that was read beside it."""
        while account.seen < position:
            account.news.clear()
            await account.news.wait()
        await asyncio.sleep(SETTLE_S)

    async def _write(self, key_id: str, account: _Account) -> int:
        """Write an account as it is now; its position. One entry at a time, so that a later one is never overtaken."""
        async with account.writing:
            account.dirty_at = None
            try:
                return await asyncio.to_thread(self._control.append, KIND, f"{key_id}/{self._worker}", account.fact())
            except BaseException:
                account.dirty_at = time.monotonic() + SHARE_S
                raise

    async def _share(self) -> None:
        while True:
            await asyncio.sleep(SHARE_S / 2)
            now = time.monotonic()
            due = [(key_id, account) for key_id, account in self._accounts.items() if account.dirty_at and account.dirty_at <= now]
            for key_id, account in due if not self._shared.away else []:
                try:
                    await self._write(key_id, account)
                except TokentapeError as error:
                    log.warning("usage not shared", key=key_id, error=str(error))
                except Exception:
                    log.exception("usage not shared", key=key_id)

    def _heard(self, record: ControlRecord) -> None:
        """A fact of the control log; called in the following thread."""
        if record.kind != KIND:
            return
        key_id, _, worker = record.key.partition("/")
        if record.value is None or not _whole(record.value):
            self._facts[key_id].pop(worker, None)
        else:
            self._facts[key_id][worker] = record.value
        if worker == self._worker and self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._came, key_id, record.position)

    def _came(self, key_id: str, position: int) -> None:
        account = self._accounts.get(key_id)
        if account:
            account.seen = position
            account.news.set()


def _whole(fact: Value) -> bool:
    return all(isinstance(fact.get(name), int) for name in ("minute", "requests", "tokens", "total"))


def _limited(fault: errors.Fault, message: str) -> Failure:
    return Failure(fault, message, retry_after_s=MINUTE_S - clock.now_s() % MINUTE_S)


def total_used(facts: dict[str, Any], key_id: str) -> int:
    """The tokens of a key in all, from the facts of this kind in the control log."""
    return sum(fact.get("total", 0) for name, fact in facts.items() if name.partition("/")[0] == key_id)


class WorkerName:
    """A name that one process has at a time and its successor takes over, so that names do not pile up with restarts."""

    def __init__(self, folder: Path, installation: bytes) -> None:
        """Take the first free name.

        Raises:
            StorageFull: the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file, number = _first_free(folder)
        except OSError as error:
            hint = "make the data directory writable"
            raise StorageFull(error.strerror or str(error), operation="name worker", place=str(folder), hint=hint) from error
        self.name = f"{hashlib.sha256(b'worker' + installation).hexdigest()[:8]}.{number}"

    def close(self) -> None:
        """Give the name back."""
        self._file.close()


def _first_free(folder: Path) -> tuple[IO[str], int]:
    number = 0
    while True:
        file = os.fdopen(os.open(folder / f"gateway-{number}.lock", os.O_RDWR | os.O_CREAT, 0o600), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            number += 1
        else:
            return file, number
