"""The page's files: the bundle that ships with the package, under a policy that lets nothing else in."""

from __future__ import annotations

import mimetypes
import re
from pathlib import Path as File

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as Path

BUNDLE = File(__file__).resolve().parents[1] / "ui" / "dist"
"""Built by `npm run build` in `tokentape/ui` and committed, so that users need no Node."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_NAME = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_.-]*[a-z0-9]")
"""Of a file of the bundle: nothing that leads elsewhere."""

HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def page_routes() -> list[Path]:
    """Where the page is served."""
    return [Path("/", _page), Path("/assets/{name}", _asset)]


async def _page(request: Request) -> Response:
    """The page itself; which view it shows stands behind the #, which servers are not told."""
    return await _file(BUNDLE / "index.html", "no-cache")


async def _asset(request: Request) -> Response:
    """A file of the bundle; its name changes with its content."""
    name = request.path_params["name"]
    if not _NAME.fullmatch(name):
        return Response("not there", 404, HEADERS, media_type="text/plain")
    return await _file(BUNDLE / "assets" / name, "public, max-age=31536000, immutable")


async def _file(path: File, cache: str) -> Response:
    try:
        data = await anyio.to_thread.run_sync(path.read_bytes)
    except OSError:
        return Response("the page is not built: run `npm ci && npm run build` in tokentape/ui", 404, HEADERS, media_type="text/plain")
    media = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return Response(data, 200, {**HEADERS, "cache-control": cache}, media_type=media)
