"""The application: every request comes in by one way, in which it is admitted, read, recorded, done and answered."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import anyio.to_thread
import orjson
import structlog
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as Path

from ingest.gateway.problems import PROBLEM_JSON, Problem, problem_document, status_of
from schemas.errors import TokentapeError
from tokentape.api import comparing, custody, debug, engines, operation, query, sessions, traces
from tokentape.api.desk import Desks
from tokentape.api.idempotency import Idempotency
from tokentape.api.metrics import Metrics
from tokentape.api.openapi import document
from tokentape.api.page import page_routes
from tokentape.api.routing import PREFIX, Call, Nothing, Reply, Route
from tokentape.output import plain

log = structlog.get_logger(__name__)

BODY_BYTES_MAX = 128 << 20
"""An import may hold a long session."""

ROUTES: tuple[Route, ...] = (
    *(*sessions.ROUTES, *comparing.ROUTES, *engines.ROUTES, *debug.ROUTES),
    *(*query.ROUTES, *custody.ROUTES, *operation.ROUTES, *traces.ROUTES),
)
"""Everything under `/api/v1`."""

OTLP_PATH = "/v1/traces"
"""Where exporters look by default; with `/api` in their endpoint they find the route of the table."""
_STATEMENT_CHARACTERS = 20_000
_JSON_OPTIONS = orjson.OPT_NAIVE_UTC | orjson.OPT_NON_STR_KEYS


class Api:
    """The endpoints of one installation."""

    def __init__(self, desks: Desks) -> None:
        self._desks = desks
        self._idempotency = Idempotency()

    def endpoint(self, routes: Mapping[str, Route]) -> Callable[[Request], Awaitable[Response]]:
        """What serves one path; `routes` by method."""

        async def serve(request: Request) -> Response:
            route = routes.get("GET" if request.method == "HEAD" else request.method)
            try:
                if route is None:
                    raise Problem(405, f"this takes {' or '.join(routes)}, not {request.method}", allow=", ".join(routes))
                return await self._serve(route, request)
            except Problem as problem:
                return refused(request, problem.status, problem.detail, problem.hint, problem.allow)
            except TokentapeError as error:
                return refused(request, status_of(error), str(error), error.hint)
            except Exception as error:
                log.exception("api failed", path=request.url.path)
                return refused(request, 500, f"unexpected {type(error).__name__}", "the log of the API says where")

        return serve

    async def _serve(self, route: Route, request: Request) -> Response:
        principal = await self._desks.gate.admit(request, route.roles)
        body = await _body(request)
        asked = _query(route, request)
        given = _document(route, request, body) if route.body else _read(route, request, body) if route.reads else None
        call = Call(self._desks, principal, request.path_params, asked, given, request.headers)
        key = request.headers.get("idempotency-key") if route.writes else None
        if key is None:
            return await anyio.to_thread.run_sync(partial(self._do, route, call, request))
        place = f"{request.method} {request.url.path}"
        if (before := self._idempotency.begin(principal.name, place, key, body)) is not None:
            return before
        try:
            response = await anyio.to_thread.run_sync(partial(self._do, route, call, request))
        except BaseException:
            self._idempotency.forget(principal.name, place, key)
            raise
        self._idempotency.finish(principal.name, place, key, response)
        return response

    def _do(self, route: Route, call: Call, request: Request) -> Response:
        """Do it, in a thread; where it is about content, with who, what and how much on the tape.

        Who asks again for what it has, and is told that nothing changed, is shown nothing: of that nothing is recorded.
        """
        if not route.content:
            return _tagged(request, _response(route, route.handle(call)))
        statement = f"{request.method} {request.url.path}" + (f"?{request.url.query}" if request.url.query else "")
        if route.name == "sql":
            statement = call.body.query
        name, tenant = call.principal.name, call.principal.tenant or ""
        with self._desks.installation.accessing(route.name, statement[:_STATEMENT_CHARACTERS], actor=name, tenant=tenant) as access:
            answer = route.handle(call)
            response = _tagged(request, _response(route, answer))
            access["rows"], access["shown"] = call.rows, response.status_code != 304
        return response


def make_app(desks: Desks, lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]] | None = None) -> Starlette:
    """The application: the API, its document, liveness and readiness, and the page."""
    api, by_path = Api(desks), dict[str, dict[str, Route]]()
    for route in ROUTES:
        by_path.setdefault(route.path, {})[route.method] = route
    every = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    paths = [Path(PREFIX + path, api.endpoint(routes), methods=every) for path, routes in by_path.items()]
    paths.append(Path(OTLP_PATH, api.endpoint(by_path["/traces"]), methods=every))
    described = orjson.dumps(document(ROUTES))

    async def openapi(request: Request) -> Response:
        return Response(described, media_type="application/json")

    async def health(request: Request) -> Response:
        return Response(b'{"status":"ok"}', media_type="application/json")

    async def ready(request: Request) -> Response:
        answer = await anyio.to_thread.run_sync(operation.ready, desks)
        return Response(_json(answer.document), answer.status, media_type="application/json")

    metrics = Metrics(desks.installation)

    async def measured(request: Request) -> Response:
        return Response(await anyio.to_thread.run_sync(metrics.text), media_type=CONTENT_TYPE_LATEST)

    own = [Path(path, act) for path, act in (("/openapi.json", openapi), ("/health", health), ("/ready", ready), ("/metrics", measured))]
    return Starlette(routes=[*paths, *own, *page_routes()], exception_handlers={HTTPException: _nothing_there}, lifespan=lifespan)


def _nothing_there(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        return refused(request, 405, "this takes GET", allow="GET")
    return refused(request, status, f"nothing is served at {request.url.path[:200]}", "/openapi.json lists what is")


def refused(request: Request, status: int, detail: str, hint: str = "", allow: str = "") -> Response:
    """A problem."""
    headers = ({"www-authenticate": "Bearer"} if status == 401 else {}) | ({"allow": allow} if allow else {})
    problem = problem_document(status, detail, hint, request.url.path)
    return Response(orjson.dumps(problem), status, {**headers, "cache-control": "no-store"}, media_type=PROBLEM_JSON)


# Reading


async def _body(request: Request) -> bytes:
    """The body. It is read before anything is done, so that an answer never meets a client that still sends."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > BODY_BYTES_MAX:
            raise Problem(413, f"the body is over the limit of {BODY_BYTES_MAX:,} bytes", "send less")
        parts.append(part)
    return b"".join(parts)


def _query(route: Route, request: Request) -> BaseModel:
    known = route.query.model_fields
    given: dict[str, Any] = {}
    for name in request.query_params:
        values = request.query_params.getlist(name)
        listed = name in known and str(known[name].annotation).startswith("tuple")
        given[name] = values if listed else values[-1]
    return _checked(route.query, given, "query")


def _read(route: Route, request: Request, body: bytes) -> Any:
    """A body of somebody else's format, compressed or not."""
    kind, encoding = _media(request), request.headers.get("content-encoding", "identity").lower()
    if kind not in route.reads:
        raise Problem(415, f"a body of type {kind or 'unknown'}", f"send content-type: {' or '.join(route.reads)}")
    if encoding == "gzip":
        body = _unpacked(body)
    elif encoding != "identity":
        raise Problem(415, f"a body with content-encoding {encoding[:40]}", "send it as it is, or with gzip")
    return route.reads[kind](body)


def _unpacked(body: bytes) -> bytes:
    reader = zlib.decompressobj(wbits=31)  # gzip
    try:
        unpacked = reader.decompress(body, BODY_BYTES_MAX)
    except zlib.error as error:
        raise Problem(400, f"the body is no gzip: {error}", "send it as it is") from error
    if reader.unconsumed_tail:
        raise Problem(413, f"the body is over the limit of {BODY_BYTES_MAX:,} bytes", "send less")
    return unpacked


def _media(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _document(route: Route, request: Request, body: bytes) -> BaseModel:
    assert route.body is not None
    kind = _media(request)
    if not body:
        return _checked(route.body, {}, "body")
    if kind != "application/json":
        raise Problem(415, f"a body of type {kind or 'unknown'}", "send content-type: application/json")
    try:
        value = orjson.loads(body)
    except ValueError as error:
        raise Problem(400, f"the body is not valid JSON: {error}", "send one JSON object") from error
    if not isinstance(value, dict):
        raise Problem(400, "the body is not a JSON object", "send one JSON object")
    return _checked(route.body, value, "body")


def _checked(model: type[BaseModel], value: Any, where: str) -> BaseModel:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        hint = f"valid: {', '.join(model.model_fields)}" if model.model_fields and model is not Nothing else "it takes nothing"
        raise Problem(400, f"{where} {place}: {first['msg']}", hint) from error


# Answering


def _json(value: Any) -> bytes:
    return orjson.dumps(value, default=plain, option=_JSON_OPTIONS)


def _response(route: Route, answer: Reply | Response) -> Response:
    if isinstance(answer, Reply):
        answer = Response(_json(answer.document), answer.status, dict(answer.headers), media_type="application/json")
    # What was said is for who asked: no cache keeps it, and the tag only spares sending it again.
    answer.headers.setdefault("cache-control", "private, no-cache" if route.method == "GET" else "no-store")
    answer.headers.setdefault("x-content-type-options", "nosniff")
    return answer


_FRESH = re.compile(rb'"completeness":\{[^}]*\}')
"""What changes with every look, though nothing of the answer did."""


def _tagged(request: Request, response: Response) -> Response:
    """The answer under an ETag, or nothing at all where the client has it."""
    if request.method != "GET" or response.status_code != 200 or not isinstance(getattr(response, "body", None), bytes):
        return response
    tag = f'W/"{hashlib.sha256(_FRESH.sub(b"", bytes(response.body))).hexdigest()[:32]}"'
    if tag in (word.strip() for word in request.headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers={"etag": tag, "cache-control": response.headers["cache-control"]})
    response.headers["etag"] = tag
    return response
