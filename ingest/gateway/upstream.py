"""The server behind the gateway: one HTTP client, what kind of server it is, and the environment it last told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping

import aiohttp
import structlog
from yarl import URL

from ingest.environment import capture_http, detect_kind
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

ENVIRONMENT_AGE_MAX_S = 3600.0
"""After this the environment is asked for again."""

FIRST_CAPTURE_WAIT_S = 10.0
"""How long the first request waits for the environment; without it the request goes on and names none."""


class Upstream:
    """One upstream. Use from one event loop, between `open` and `close`."""

    def __init__(self, settings: GatewaySettings, entry: UpstreamSettings) -> None:
        self.settings = settings
        self.entry = entry
        self.url = entry.url.rstrip("/").removesuffix("/v1").removesuffix("/v1beta")
        self.name = without_credentials(self.url)
        self.kind: str | None = None if entry.kind == "auto" else entry.kind
        self.environment: EnvironmentCaptured | None = None
        self.fingerprint: str | None = None
        self.refused: set[str] = set()  # additions that this upstream does not take
        self._captured_at = 0.0
        self.wire = Wire(self.url, settings.connect_timeout_s)
        """Requests that are recorded go this way."""
        self._prefix = URL(self.url).raw_path.rstrip("/")
        self._client: aiohttp.ClientSession | None = None
        self._capture: asyncio.Task[None] | None = None
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
        if self._capture:
            self._capture.cancel()
            await asyncio.gather(self._capture, return_exceptions=True)
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
        if self._stale() and self._capture is None:
            self._capture = asyncio.create_task(self._refresh(self.authorization(authorization)))
        if self.environment is None and self._capture is not None:
            await asyncio.wait([self._capture], timeout=FIRST_CAPTURE_WAIT_S)
        return self.kind

    def saw_fingerprint(self, fingerprint: str) -> None:
        """An answer carried this fingerprint: if it is another one than before, the environment is asked for again."""
        if fingerprint != self.fingerprint:
            if self.fingerprint is not None:
                self._captured_at = 0.0
            self.fingerprint = fingerprint

    def lost(self) -> None:
        """The upstream went away: whatever comes back may be another one."""
        if self.entry.kind == "auto":
            self.kind = None
        self._captured_at = 0.0

    def _stale(self) -> bool:
        return self._captured_at == 0.0 or time.monotonic() - self._captured_at > ENVIRONMENT_AGE_MAX_S

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
            event = await capture_http(self.client, self.url, kind=self.kind or "", headers=headers, previous=self.environment)
            self.environment, self._captured_at = event, time.monotonic()
            self.fingerprint = item(event, "system_fingerprint") or self.fingerprint
        except EngineUnavailable as error:
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
