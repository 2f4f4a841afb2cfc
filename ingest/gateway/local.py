"""Whether a program on this machine asks, and no web page of another site, no proxy and nobody under a rebound name."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

_PASSED_ON = ("forwarded", "x-forwarded-for", "x-real-ip")


def from_here(header: Callable[[str], str | None], client: str | None) -> bool:
    """By the address it comes from, the name it used, and the page behind it; `header` gives a header by its lower-case name."""
    names = [_hostname(f"//{header('host') or ''}")]
    if origin := header("origin"):
        names.append(_hostname(origin))
    if any(header(name) for name in _PASSED_ON) or not _loopback(client or ""):
        return False
    return all(name == "localhost" or _loopback(name) for name in names)


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
