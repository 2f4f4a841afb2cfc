"""The server behind the gateway: one HTTP client, what kind of server it is, and the environment it last told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass

import aiohttp
import structlog
from yarl import URL

from ingest.environment import ENVIRONMENT_AGE_MAX_S, capture_http, detect_kind, instance_http
from ingest.gateway import errors
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Exchange, Headers
from ingest.gateway.headers import ANTHROPIC_VERSION, credential_header
from ingest.gateway.wire import KEEPALIVE_S, Wire
from schemas.errors import EngineUnavailable
from schemas.events import EnvironmentCaptured
from schemas.probe import item
from schemas.settings import GatewaySettings, UpstreamSettings

log = structlog.get_logger(__name__)

FIRST_CAPTURE_WAIT_S = 10.0
"""How long the first request waits for the environment; without it the request goes on and names none."""


AGAIN_AFTER_S = 30.0
"""A vLLM in doubt is asked for its environment no sooner than so long after the last time: behind one port may be several."""


SOON_S = 1.0
"""In so short a time no other server takes the place of one that just answered: an engine takes longer to start."""


@dataclass
class _Told:
    """What the server told, and how long it is known to have been the same server."""

    environment: EnvironmentCaptured
    instance: bytes | None
    """Which start of it told this; None where that is not known."""
    until: float
    """Whoever took a connection up to this time was the one that told it."""
    doubted: bool = False
    """Another server may have taken its place."""


class Upstream:
    """One upstream. Use from one event loop, between `open` and `close`.

    Another server may stand behind the same address at any time. What an environment was told by ends when its connections do, so a
    connection is known to lead to it if it is as old as what it told, or was opened while an older one stood: one is held for that.
    Where none stands, vLLM is asked beside the request which start of it answers. Of an upstream of another kind no process is known,
    only what it serves. Several servers behind one address that are not the same should be upstreams of their own.
    """

    def __init__(self, settings: GatewaySettings, entry: UpstreamSettings) -> None:
        self.settings = settings
        self.entry = entry
        self.url = entry.url.rstrip("/").removesuffix("/v1").removesuffix("/v1beta")
        self.name = without_credentials(self.url)
        self.kind: str | None = None if entry.kind == "auto" else entry.kind
        self.fingerprint: str | None = None
        self.refused: set[str] = set()  # additions that this upstream does not take
        self._told: _Told | None = None
        self._previous: EnvironmentCaptured | None = None
        self._captured_at = 0.0
        self._credential: str | None = None
        self.wire = Wire(self.url, settings.connect_timeout_s)
        """Requests that are recorded go this way."""
        self.wire.on_connect, self.wire.on_cut = self._look, self.doubt
        self._prefix = URL(self.url).raw_path.rstrip("/")
        self._client: aiohttp.ClientSession | None = None
        self._capture: asyncio.Task[None] | None = None
        self._check: asyncio.Task[None] | None = None
        self._detection = asyncio.Lock()

    async def open(self) -> None:
        """Make the client; nothing is asked before the first request."""
        timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=self.settings.connect_timeout_s)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=30)
        self._client = aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            auto_decompress=True,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )

    async def close(self) -> None:
        """Close all connections."""
        tasks = [task for task in (self._capture, self._check) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.wire.close()
        if self._client:
            await self._client.close()

    @property
    def client(self) -> aiohttp.ClientSession:
        """The HTTP client for questions of the gateway's own."""
        assert self._client is not None, "the upstream is not open"
        return self._client

    def authorization(self, of_client: str | None) -> str | None:
        """The Authorization header sent upstream: the configured key, else the client's own."""
        key = self.entry.key
        return f"Bearer {key.get_secret_value()}" if key else of_client

    def headers(self, authorization: str | None) -> Mapping[str, str]:
        """The headers of a question of the gateway's own."""
        version = {"anthropic-version": ANTHROPIC_VERSION} if self.kind == "anthropic" else {}
        return {**version, **dict([credential_header(authorization, self.kind)] if authorization else [])}

    def url_of(self, path: str, query: bytes) -> URL:
        """The address of an endpoint, with the client's query as it came."""
        return URL(self.url + path + (f"?{query.decode('latin-1')}" if query else ""), encoded=True)

    def target_of(self, path: str, query: bytes) -> str:
        """The same as a request over `wire` names it."""
        return self._prefix + path + (f"?{query.decode('latin-1')}" if query else "")

    async def ready(self, authorization: str | None) -> str:
        """The kind of the upstream; the environment is known too if it can be had soon.

        Raises:
            Failure: nothing listens there.
        """
        if self.kind is None:
            async with self._detection:
                await self._detect()
        if self.kind is None:
            return "openai"  # it answers, but not yet as itself: ask again with the next request
        self._credential = self.authorization(authorization)
        self._refresh_if_due()
        self._look(self.wire.oldest)
        if self._told is None and self._capture is not None:
            await asyncio.wait([self._capture], timeout=FIRST_CAPTURE_WAIT_S)
        return self.kind

    @property
    def environment(self) -> EnvironmentCaptured | None:
        """The environment that will answer, as far as is known; whether it did says `environment_over`."""
        return self._told.environment if self._told and not self._told.doubted else None

    def environment_over(self, since: float) -> EnvironmentCaptured | None:
        """The environment at the other end of a connection that is open since then; None where that is not certain."""
        told = self._told
        return self.environment if told and (self.kind != "vllm" or since <= told.until + SOON_S) else None

    def saw_fingerprint(self, fingerprint: str) -> None:
        """An answer carried this fingerprint: if it is another one than before, the environment is asked for again."""
        if fingerprint != self.fingerprint:
            if self.fingerprint is not None:
                self._captured_at = 0.0
                self.doubt()
            self.fingerprint = fingerprint

    def lost(self) -> None:
        """The upstream went away: whatever comes back may be another one."""
        if self.entry.kind == "auto":
            self.kind = None
        self._captured_at = 0.0
        self._told = None

    def doubt(self) -> None:
        """The upstream may have gone away: until that is known its environment is nobody's."""
        if self._told:
            self._told.doubted = True
            if self.kind != "vllm":
                self._captured_at = 0.0

    def _look(self, oldest: float | None) -> None:
        """A request comes, or has a connection of its own: who answers is asked beside it, where no older connection tells."""
        told, now = self._told, time.monotonic()
        if told is None or self.kind != "vllm":
            return
        if oldest is not None and oldest <= told.until + SOON_S:
            told.until = now
        elif now > told.until + SOON_S and self._check is None:
            self._check = asyncio.create_task(self._recheck(told))

    async def _recheck(self, told: _Told) -> None:
        try:
            instance = await instance_http(self.client, self.url)
            if instance is not None and instance == told.instance:
                await self.wire.stand()
                told.until, told.doubted = time.monotonic(), False
            else:
                told.doubted |= instance is not None
                self._refresh_if_due(unsure=True)
        except (EngineUnavailable, Failure) as error:
            log.info("upstream not asked whether it is the same", upstream=self.name, error=str(error))
        finally:
            self._check = None

    def _refresh_if_due(self, *, unsure: bool = False) -> None:
        age_s = time.monotonic() - self._captured_at
        unsure |= self._told is not None and self._told.doubted
        due = self._captured_at == 0.0 or age_s > (AGAIN_AFTER_S if unsure else ENVIRONMENT_AGE_MAX_S)
        if due and self._capture is None:
            self._capture = asyncio.create_task(self._refresh(self._credential))

    async def _detect(self) -> None:
        if self.kind is None:
            try:
                self.kind = await detect_kind(self.client, self.url, timeout_s=self.settings.connect_timeout_s)
            except EngineUnavailable as error:
                if isinstance(error.__cause__, TimeoutError):
                    raise Failure(errors.TIMEOUT, "The upstream does not answer in time.", detail=str(error)) from error
                raise unreachable(error) from error

    async def _refresh(self, authorization: str | None) -> None:
        headers = self.headers(authorization)
        try:
            instance = None
            if self.kind == "vllm":
                await self.wire.stand()
                instance = await instance_http(self.client, self.url)
            event = await capture_http(self.client, self.url, kind=self.kind or "", headers=headers, previous=self._previous)
            self._previous, self._captured_at = event, time.monotonic()
            self._told = _Told(event, instance, until=self._captured_at)
            self.fingerprint = item(event, "system_fingerprint") or self.fingerprint
        except (EngineUnavailable, Failure) as error:
            self.doubt()
            log.warning("environment not captured", upstream=self.name, error=str(error))
        except Exception:
            self._captured_at = time.monotonic()  # an answer that nobody can read will not be better a moment later
            log.exception("environment not captured", upstream=self.name)
        finally:
            self._capture = None


def without_credentials(url: str) -> str:
    """The address without user and password, as it may be recorded."""
    return str(URL(url).with_user(None)) if "@" in url else url


def unreachable(error: Exception) -> Failure:
    """The failure that an upstream which cannot be reached is for a client."""
    return Failure(errors.UNREACHABLE, "The upstream does not answer.", detail=str(error))


def failure_of(error: Exception) -> Failure:
    """The failure that an error of the HTTP client is: before or after the answer began."""
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ServerTimeoutError):
        return unreachable(error)
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.InvalidURL):
        return Failure(errors.MALFORMED, "The upstream sent something that is not HTTP.", detail=str(error))
    return Failure(errors.DISCONNECTED, "The upstream closed the connection before its answer was complete.", detail=str(error))


async def respond_with(exchange: Exchange, answer: Awaitable[tuple[int, bytes, Headers]]) -> None:
    """Give the client an answer that nobody records, status, body and headers, or the failure that kept it from coming."""
    try:
        status, body, headers = await answer
    except TimeoutError:
        return await exchange.fail(Failure(errors.TIMEOUT, "The upstream was silent."), [])
    except (aiohttp.ClientError, OSError) as error:
        return await exchange.fail(failure_of(error), [])
    except Failure as failure:
        return await exchange.fail(failure, [])
    return await exchange.respond(status, body, headers)
