"""One streamed request and what is measured of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from replay.drive.arrivals import Arrival
from schemas.errors import UsageError

IDLE_S = 600.0
"""A stream that is silent for so long is given up."""
SAYING = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")
"""Fields of a delta that carry what a model says."""


@dataclass(slots=True)
class Driven:
    """How one request went: planned and real time of its sending, in µs since the drive began; then µs since it was sent."""

    arrival: Arrival
    sent_us: int = 0
    late_us: int = 0
    first_token_us: int | None = None
    gaps_us: list[int] = field(default_factory=list)
    duration_us: int | None = None
    tokens: int = 0
    error: str | None = None


class Target:
    """An endpoint, by an address without /v1, under a client that keeps as many connections as there are requests."""

    def __init__(self, url: str, *, key: str | None = None, model: str | None = None) -> None:
        """`model` stands in for the recorded one; `key` is sent as a bearer token.

        Raises:
            UsageError: the key is no text for a header.
        """
        if key is not None and (not key.isascii() or not key.isprintable()):
            raise UsageError("the key is not one that a header can carry", operation="drive", hint="check the variable of --key-env")
        self.url, self.model = url, model
        self._headers = {"x-tokentape-workflow": "drive", "x-tokentape-tags": "drive"} | ({"authorization": f"Bearer {key}"} if key else {})

    def session(self) -> aiohttp.ClientSession:
        """The client; closed by the caller."""
        timeout = aiohttp.ClientTimeout(total=None, sock_read=IDLE_S)
        connector = aiohttp.TCPConnector(limit=0)
        return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)

    async def send(self, client: aiohttp.ClientSession, driven: Driven) -> None:
        """Send a request and fill in how it goes; never raises but when it is cancelled."""
        document = {**driven.arrival.document, "stream": True, "stream_options": {"include_usage": True}}
        if self.model:
            document["model"] = self.model
        began = time.monotonic_ns()
        try:
            async with client.post(self.url + driven.arrival.path, json=document) as answer:
                driven.error = f"status {answer.status}" if answer.status != 200 else await _measured(answer, driven, began)
        except asyncio.CancelledError:
            driven.error = "unfinished"
            raise
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            driven.error = _kind(error)
        driven.duration_us = _since(began)


async def _measured(answer: aiohttp.ClientResponse, driven: Driven, began: int) -> str | None:
    """Read a stream to its end; what was wrong with it, if anything was."""
    reading, rest = _Reading(driven), b""
    async for data in answer.content.iter_any():
        now = _since(began)  # what is read at once came at once
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (ended := reading.event(line[5:].strip(), now)) is not None:
                return ended or None
    reading.count()
    return "stream ended early"


class _Reading:
    """The events of one stream."""

    def __init__(self, driven: Driven) -> None:
        self._driven = driven
        self._last: dict[int, int] = {}
        self._counted = 0
        self._told: int | None = None

    def event(self, data: bytes, now: int) -> str | None:
        """Take an event; at the end of the stream an empty text, or what was wrong with it."""
        if data == b"[DONE]":
            self.count()
            return ""
        event = orjson.loads(data)
        if "error" in event:
            return "error in mid-stream"
        for choice in event.get("choices") or ():
            if _says(choice):
                self._said(choice.get("index") or 0, now)
        self._told = (event.get("usage") or {}).get("completion_tokens", self._told)
        return None

    def count(self) -> None:
        """Tokens as the usage counts them, else events that said something."""
        self._driven.tokens = self._counted if self._told is None else self._told

    def _said(self, index: int, now: int) -> None:
        driven, last = self._driven, self._last
        self._counted += 1
        if driven.first_token_us is None:
            driven.first_token_us = now
        if index in last and now > last[index]:
            driven.gaps_us.append(now - last[index])
        last[index] = now


def _says(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    return bool(choice.get("text")) if delta is None else any(delta.get(name) for name in SAYING)


def _since(began: int) -> int:
    return (time.monotonic_ns() - began) // 1000


def _kind(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return "cannot connect"
    if isinstance(error, TimeoutError):
        return "timed out"
    return "not a stream of events" if isinstance(error, ValueError) else "connection lost"
