"""OpenAI's Batch API at the gateway: `/v1/files` and `/v1/batches`, as the unmodified SDK asks for them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any
from urllib.parse import parse_qs

import structlog

from ingest.gateway import errors
from ingest.gateway.batch.desk import BatchDesk
from ingest.gateway.batch.facts import document
from ingest.gateway.batch.models import check_models, probe
from ingest.gateway.batch.uploads import Upload
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Exchange
from ingest.gateway.keys import Caller
from ingest.gateway.parts import Parts
from schemas.batches import Batch, BatchFile, Owner
from schemas.errors import ConflictError, TokentapeError, Unavailable, UnknownName, UsageError
from schemas.events import AccessContent, AccessLogged
from schemas.requests import dump, load
from schemas.sink import SessionContext, new_id

log = structlog.get_logger(__name__)

PREFIXES = ("/v1/files", "/v1/batches")

PAGE = 20
PAGE_MAX = 100

_NOT_FOUND = errors.Fault("not_found", "client", 404, False, "invalid_request_error")
_CONFLICT = errors.Fault("conflict", "client", 409, False, "invalid_request_error")
_AWAY = errors.Fault("store_unavailable", "gateway", 503, True, "server_error")

Json = dict[str, Any]


def serves(path: str) -> bool:
    """Whether a path belongs to this API."""
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in PREFIXES)


class BatchApi:
    """The API over one gateway's desk."""

    def __init__(self, parts: Parts, desk: BatchDesk) -> None:
        self._parts = parts
        self._desk = desk
        self._facts = desk.facts

    async def __call__(self, exchange: Exchange) -> None:
        """One request and its answer; errors in OpenAI's shape."""
        try:
            caller = await self._parts.keyring.caller(exchange)
            if caller.refusal:
                raise caller.refusal
            await self._route(exchange, self._owner(exchange, caller), caller)
        except Failure as failure:
            await exchange.fail(failure, [])
        except TokentapeError as error:
            await exchange.fail(_failure(error), [])

    def _owner(self, exchange: Exchange, caller: Caller) -> Owner:
        """Whose work it is: the key's owner, or whoever the caller says."""
        settings = self._parts.settings
        if caller.key:
            return Owner(tenant=caller.key.tenant, name=caller.key.owner, key_id=caller.key.key_id)
        clean = self._parts.redactor.for_tenant(settings.tenant).clean
        named = clean(exchange.header("x-tokentape-user")) or self._parts.sessions.key_id(caller.authorization) or "somebody"
        return Owner(tenant=settings.tenant, name=named[:200])

    async def _route(self, exchange: Exchange, owner: Owner, caller: Caller) -> None:
        path, method = exchange.scope["path"], exchange.scope["method"]
        for pattern, acts in _ROUTES:
            if found := pattern.fullmatch(path):
                if method not in acts:
                    body = errors.error_body(
                        f"{path} takes {' or '.join(acts)}, not {method}.", "invalid_request_error", "method_not_allowed"
                    )
                    return await exchange.respond(405, body, [errors.JSON, (b"allow", ", ".join(acts).encode())])
                return await acts[method](self, exchange, owner, caller, *found.groups())
        raise Failure(_NOT_FOUND, f"Nothing is served at {path[:200]}.")

    # Files

    async def upload(self, exchange: Exchange, owner: Owner, caller: Caller) -> None:
        """POST /v1/files."""
        with self._desk.scratch() as folder:
            path = folder / "upload"
            upload = Upload(exchange.header("content-type") or "", path, self._desk.settings.batch.file_bytes_max)
            await upload.read(exchange.pieces())
            if upload.fields.get("purpose") != "batch":
                fault = f"purpose {upload.fields.get('purpose', '')[:40]!r} is not served; valid: batch"
                raise UsageError(fault, operation="upload", place="purpose", hint="send purpose=batch")
            made = await asyncio.to_thread(self._desk.add_file, path, upload.filename or "", owner)
        await _respond(exchange, _file(made))

    async def list_files(self, exchange: Exchange, owner: Owner, caller: Caller) -> None:
        """GET /v1/files."""
        shown = [_file(file) for file in self._facts.files(owner.tenant)]
        await _respond(exchange, _page(exchange, shown))

    async def show_file(self, exchange: Exchange, owner: Owner, caller: Caller, file_id: str) -> None:
        """GET /v1/files/ID."""
        await _respond(exchange, _file(self._facts.file(file_id, owner.tenant)))

    async def delete_file(self, exchange: Exchange, owner: Owner, caller: Caller, file_id: str) -> None:
        """DELETE /v1/files/ID."""
        await asyncio.to_thread(self._desk.delete_file, self._facts.file(file_id, owner.tenant))
        self._accessed(owner, "batch delete file", file_id)
        await _respond(exchange, {"id": file_id, "object": "file", "deleted": True})

    async def content(self, exchange: Exchange, owner: Owner, caller: Caller, file_id: str) -> None:
        """GET /v1/files/ID/content; piece by piece, and no faster than the client reads."""
        file = self._facts.file(file_id, owner.tenant)
        self._accessed(owner, "batch content", file_id)
        pieces = self._desk.pieces(file)
        exchange.answer(200, [(b"content-type", b"application/octet-stream"), (b"content-length", b"%d" % file.bytes)])
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            await exchange.write(piece)
        await exchange.end()

    # Batches

    async def create(self, exchange: Exchange, owner: Owner, caller: Caller) -> None:
        """POST /v1/batches; the answer says that every request is durable."""
        asked = _object(await exchange.body())
        unknown = sorted(asked.keys() - {"input_file_id", "endpoint", "completion_window", "metadata"})
        if unknown:
            raise UsageError(f"{unknown[0][:40]} is not possible here", operation="submit", place=unknown[0][:40])
        for name in ("input_file_id", "endpoint", "completion_window"):
            if not isinstance(asked.get(name), str):
                raise UsageError(f"{name} must be a text", operation="submit", place=name)
        file = self._facts.file(asked["input_file_id"], owner.tenant)
        await probe(self._parts.routes)
        allowed = caller.key.allows if caller.key else lambda _: True
        submit = partial(self._desk.submit, endpoint=asked["endpoint"], window=asked["completion_window"], metadata=asked.get("metadata"))
        batch = await asyncio.to_thread(submit, file, owner, partial(check_models, self._parts.routes, allowed))
        self._accessed(owner, "batch submit", batch.batch_id)
        await _respond(exchange, document(self._facts, batch))

    async def list_batches(self, exchange: Exchange, owner: Owner, caller: Caller) -> None:
        """GET /v1/batches."""
        await _respond(exchange, _page(exchange, [document(self._facts, batch) for batch in self._facts.batches(owner.tenant)]))

    async def show(self, exchange: Exchange, owner: Owner, caller: Caller, batch_id: str) -> None:
        """GET /v1/batches/ID."""
        await _respond(exchange, document(self._facts, self._facts.batch(batch_id, owner.tenant)))

    async def cancel(self, exchange: Exchange, owner: Owner, caller: Caller, batch_id: str) -> None:
        """POST /v1/batches/ID/cancel."""
        batch: Batch = self._facts.batch(batch_id, owner.tenant)
        if not await asyncio.to_thread(self._desk.cancel, batch, owner.name):
            raise ConflictError(f"{batch_id} is {self._facts.status(batch)} already", operation="cancel")
        self._accessed(owner, "batch cancel", batch_id)
        await _respond(exchange, document(self._facts, batch))

    def _accessed(self, owner: Owner, operation: str, name: str) -> None:
        """What was done with batches is on the tape, whoever did it."""
        settings = self._parts.settings
        session = SessionContext(new_id(), owner.tenant, "gateway", owner.name, settings.retention_class)
        event = AccessLogged(operation=operation, outcome="ok", rows=None, duration_us=0, content=AccessContent(statement=name))
        self._parts.recorder.record(session, event)


Act = Callable[..., Awaitable[None]]

_ROUTES: tuple[tuple[re.Pattern[str], dict[str, Act]], ...] = (
    (re.compile(r"/v1/files/?"), {"GET": BatchApi.list_files, "POST": BatchApi.upload}),
    (re.compile(r"/v1/files/([^/]+)"), {"GET": BatchApi.show_file, "DELETE": BatchApi.delete_file}),
    (re.compile(r"/v1/files/([^/]+)/content"), {"GET": BatchApi.content}),
    (re.compile(r"/v1/batches/?"), {"GET": BatchApi.list_batches, "POST": BatchApi.create}),
    (re.compile(r"/v1/batches/([^/]+)"), {"GET": BatchApi.show}),
    (re.compile(r"/v1/batches/([^/]+)/cancel"), {"POST": BatchApi.cancel}),
)


async def _respond(exchange: Exchange, answer: Json) -> None:
    await exchange.respond(200, dump(answer), [errors.JSON])


def _object(body: bytes) -> Json:
    try:
        value = load(body)
    except ValueError as error:
        raise UsageError(f"the body is not valid JSON: {error}", operation="submit") from error
    if not isinstance(value, dict):
        raise UsageError("the body is not a JSON object", operation="submit")
    return value


def _file(file: BatchFile) -> Json:
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def _page(exchange: Exchange, shown: Iterable[Json]) -> Json:
    """A page of a list, as `limit` and `after` ask for it."""
    query = {name: values[0] for name, values in parse_qs(exchange.scope["query_string"].decode("latin-1")).items()}
    try:
        limit = int(query.get("limit", PAGE))
    except ValueError:
        limit = 0
    if not 1 <= limit <= PAGE_MAX:
        raise UsageError(f"limit must be a number from 1 to {PAGE_MAX}", operation="list", place="limit")
    found = list(shown)
    if after := query.get("after"):
        ids = [entry["id"] for entry in found]
        found = found[ids.index(after) + 1 :] if after in ids else []
    page = found[:limit]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return {"object": "list", "data": page, **ends, "has_more": len(found) > limit}


def _failure(error: TokentapeError) -> Failure:
    """An error of the desk as the gateway tells it."""
    for kind, fault in ((UnknownName, _NOT_FOUND), (UsageError, errors.INVALID_REQUEST), (ConflictError, _CONFLICT), (Unavailable, _AWAY)):
        if isinstance(error, kind):
            param = error.place if isinstance(error, UsageError) and error.place else None
            return Failure(fault, error.fault, param=param, retry_after_s=5 if fault is _AWAY else None)
    log.error("batch API failed", error=str(error))
    return Failure(errors.INTERNAL, str(error))
