"""Which upstream answers for a model: what each serves, how well it is, its share of the work, and what hardware was asked for.

An upstream is *live* when its server answers and *ready* when it tells what it serves. Several upstreams are asked every
`gateway.probe_s`; one that cannot be reached, or answers `EJECT_AFTER` times in a row with 5xx, is *ejected*: it gets no
request while another can, until a probe finds it ready again. With one upstream nothing is probed and nothing is ejected: a request
is the probe, and the upstream itself answers for models that it does not have.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import aiohttp
import structlog

from ingest.gateway import errors
from ingest.gateway.errors import Failure
from ingest.gateway.queueing import Priority, Turnstile
from ingest.gateway.upstream import Upstream
from schemas.requests import load
from schemas.settings import GatewaySettings, UpstreamSettings

log = structlog.get_logger(__name__)

HARDWARE_HEADER = "x-tokentape-hardware"

EJECT_AFTER = 3
"""Answers of 5xx in a row; a connection that fails ejects at once."""

PROBE_TIMEOUT_S = 5.0
"""How long a probe waits for an answer."""

NAMES_SHOWN_MAX = 40
"""Of the valid models this many are named to a client that asked for another."""

Allowed = Callable[[str], bool]


class Lane:
    """One upstream, the queue before it, and what is known about its health."""

    def __init__(self, settings: GatewaySettings, entry: UpstreamSettings, *, alone: bool = False) -> None:
        self.entry = entry
        self.alone = alone  # then there is nothing that requests could go to in its place
        self.upstream = Upstream(settings, entry)
        self.turnstile = Turnstile(
            entry.concurrency_max or settings.concurrency_max,
            settings.queue_max if entry.queue_max is None else entry.queue_max,
            settings.queue_timeout_s,
        )
        self.live: bool | None = None  # None: not asked yet
        self.ready: bool | None = None
        self.ejected = False
        self.served: dict[str, dict[str, Any]] | None = None  # entries of its list of models by name, None where it told none
        self.credit = 0.0
        self._faults = 0

    def serves(self, model: str | None) -> bool:
        """Whether a request for a model may go here; one that names no model may go anywhere."""
        if model is None or model in self.entry.models:
            return True
        return self.takes(model) and (self.served is None or model in self.served)

    def takes(self, model: str) -> bool:
        """Whether its settings let it be asked for a model."""
        return any(fnmatchcase(model, pattern) for pattern in self.entry.models)

    @property
    def names(self) -> list[str]:
        """The models that are known to be served here."""
        named = [model for model in self.entry.models if not any(mark in model for mark in "*?[")]
        return list(dict.fromkeys([*named, *(model for model in self.served or () if self.takes(model))]))

    def answered(self, status: int) -> None:
        """It answered a request with this status."""
        self.live = True
        self._faults = self._faults + 1 if status >= 500 else 0
        if self._faults >= EJECT_AFTER:
            self.eject(f"{self._faults} answers of 5xx in a row")

    def unreachable(self, why: str) -> None:
        """It could not be reached by a request."""
        self.live = self.ready = False
        self.eject(why)

    def eject(self, why: str) -> None:
        """Requests go elsewhere where they can."""
        if not self.ejected and not self.alone:
            self.ejected = True
            log.warning("upstream ejected", upstream=self.entry.name, url=self.upstream.name, why=why)

    async def probe(self) -> None:
        """Ask it how it is and what it serves."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                healthy = self.upstream.kind != "vllm" or await self._healthy()
                status, body = await self._ask("/v1beta/models" if self.upstream.kind == "gemini" else "/v1/models")
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return self.unreachable(str(error) or "no answer in time")
        self.live, self.ready = healthy, healthy and status < 500
        if status == 200:
            self.served = models_of(body)
        if not self.ready:
            return self.eject(f"its probe was answered with {status}")
        self._faults = 0
        if self.ejected:
            self.ejected = False
            log.info("upstream returned", upstream=self.entry.name, url=self.upstream.name)
        return None

    async def _healthy(self) -> bool:
        return (await self._ask("/health"))[0] == 200

    async def _ask(self, path: str) -> tuple[int, bytes]:
        headers = self.upstream.headers(self.upstream.authorization(None))
        async with self.upstream.client.get(self.upstream.url + path, headers=headers, allow_redirects=False) as answer:
            return answer.status, await answer.read()

    @property
    def facts(self) -> dict[str, Any]:
        """What `/health` says of it."""
        state = {"live": self.live, "ready": self.ready, "ejected": self.ejected}
        load = {"open": self.turnstile.open, "queued": self.turnstile.queued}
        return {"name": self.entry.name, **state, **load, "hardware": self.entry.hardware, "models": self.names}


def models_of(body: bytes) -> dict[str, dict[str, Any]] | None:
    """The entries of a list of models by name, whoever's list it is; None where it is none."""
    try:
        document = load(body)
        if "models" in document:  # Google's
            return {str(entry["name"]).removeprefix("models/"): _of_google(entry) for entry in document["models"]}
        return {str(entry["id"]): entry for entry in document["data"]}
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def _of_google(entry: dict[str, Any]) -> dict[str, Any]:
    return {"id": str(entry["name"]).removeprefix("models/"), "object": "model", "created": 0, "owned_by": "google"}


class Routes:
    """The upstreams of one gateway process."""

    def __init__(self, settings: GatewaySettings) -> None:
        entries = settings.every_upstream
        self.lanes = [Lane(settings, entry, alone=len(entries) == 1) for entry in entries]
        self.attempts_max = min(settings.attempts_max, len(self.lanes))
        self._probe_s = settings.probe_s
        self._probing: asyncio.Task[None] | None = None
        self._checked = asyncio.Event()
        self._asking: asyncio.Task[None] | None = None

    @property
    def several(self) -> bool:
        """Whether there is a choice."""
        return len(self.lanes) > 1

    async def open(self) -> None:
        """Make the clients; several upstreams are watched from here on."""
        for lane in self.lanes:
            await lane.upstream.open()
        if self.several:
            self._probing = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Close all connections."""
        tasks = [task for task in (self._probing, self._asking) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for lane in self.lanes:
            await lane.upstream.close()

    async def _watch(self) -> None:
        while True:
            await self.probe()
            self._checked.set()
            await asyncio.sleep(self._probe_s)

    async def probe(self) -> None:
        """Ask all upstreams how they are; callers at the same time share one answer."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._probe_all())
        await asyncio.shield(self._asking)

    async def _probe_all(self) -> None:
        for found in await asyncio.gather(*(lane.probe() for lane in self.lanes), return_exceptions=True):
            if isinstance(found, Exception):
                log.error("probe failed", error=repr(found))

    async def find(self, model: str | None, hardware: Sequence[str], priority: Priority, allowed: Allowed) -> Lane:
        """The upstream for a request.

        Raises:
            Failure: none serves the model; the message names those that are served and that the caller may ask for.
        """
        if not self.several and (model is None or self.lanes[0].takes(model)):
            return self.lanes[0]
        if self.several:
            await self._checked.wait()  # until what they serve was asked once
        lane = self.choose(model, hardware, priority)
        if lane is None:  # loaded a moment ago perhaps
            await self.probe()
            lane = self.choose(model, hardware, priority)
        if lane is None:
            raise Failure(errors.NO_MODEL, f"No upstream serves the model {str(model)[:200]!r}. {self._valid(allowed)}", param="model")
        return lane

    def choose(self, model: str | None, hardware: Sequence[str], priority: Priority, tried: Collection[Lane] = ()) -> Lane | None:
        """The best upstream that was not tried yet, None if there is none.

        Those that are not ejected go first, then those whose queue takes the request, then the preferred hardware, then those with
        a free place; among equals each gets its share by weight.
        """
        lanes = [lane for lane in self.lanes if lane not in tried and lane.serves(model)]
        ranks = {lane: self._rank(lane, hardware, priority) for lane in lanes}
        best = [lane for lane in lanes if ranks[lane] == min(ranks.values())]
        return _by_weight(best) if best else None

    def can_serve(self, model: str | None, tried: Collection[Lane]) -> bool:
        """Whether an upstream that was not tried yet serves the model."""
        return any(lane.serves(model) for lane in self.lanes if lane not in tried)

    def _rank(self, lane: Lane, hardware: Sequence[str], priority: Priority) -> tuple[bool, bool, int, bool]:
        wanted = hardware.index(lane.entry.hardware) if lane.entry.hardware in hardware else len(hardware)
        return lane.ejected, lane.turnstile.full(priority), wanted, not lane.turnstile.free

    def _valid(self, allowed: Allowed) -> str:
        names = sorted({name for lane in self.lanes for name in lane.names if allowed(name)})
        more = f" and {len(names) - NAMES_SHOWN_MAX} more" if len(names) > NAMES_SHOWN_MAX else ""
        return f"Valid: {', '.join(names[:NAMES_SHOWN_MAX])}{more}." if names else "No model is known to be served now."

    async def entries(self, allowed: Allowed) -> dict[str, dict[str, Any]]:
        """The models of all upstreams by name, each once, as OpenAI's list has them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self.probe()
        entries: dict[str, dict[str, Any]] = {}
        for lane in sorted(self.lanes, key=lambda lane: lane.ejected):
            for name in lane.names:
                told = (lane.served or {}).get(name)
                entries.setdefault(name, told or {"id": name, "object": "model", "created": 0, "owned_by": lane.entry.name})
        return {name: entry for name, entry in entries.items() if allowed(name)}


def _by_weight(lanes: Sequence[Lane]) -> Lane:
    """Smooth weighted round robin, as nginx does it: exact shares, and never long runs of one."""
    for lane in lanes:
        lane.credit += lane.entry.weight
    chosen = max(lanes, key=lambda lane: lane.credit)
    chosen.credit -= sum(lane.entry.weight for lane in lanes)
    return chosen


def wishes(value: str | None) -> list[str]:
    """The hardware labels that a header's value names, in order of preference."""
    return _unique(label.strip() for label in (value or "").split(",") if label.strip())


def _unique(labels: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(labels))
