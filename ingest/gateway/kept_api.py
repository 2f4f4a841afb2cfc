"""`GET` and `DELETE` of a response that this process remembers."""

from __future__ import annotations

from ingest.gateway import errors
from ingest.gateway.errors import Failure
from ingest.gateway.exchange import Exchange
from ingest.gateway.kept import owner_of
from ingest.gateway.parts import Parts
from schemas.requests import dump

PATH = "/v1/responses/"


async def kept_response(parts: Parts, exchange: Exchange) -> None:
    """`GET` and `DELETE` of a response. What is deleted here stays on the tape, which has rules of its own."""
    caller = await parts.keyring.caller(exchange)
    key_id = caller.key.key_id if caller.key else parts.sessions.key_id(caller.authorization)
    tenant = caller.key.tenant if caller.key else parts.settings.tenant
    owner = owner_of(tenant, key_id, exchange.client)
    name = exchange.scope["path"].removeprefix(PATH)
    try:
        if caller.refusal:
            raise caller.refusal
        if exchange.scope["method"] == "DELETE":
            parts.kept.forget(name, owner)
            return await exchange.respond(200, dump({"id": name, "object": "response", "deleted": True}), [errors.JSON])
        return await exchange.respond(200, parts.kept.find(name, owner).document, [errors.JSON])
    except Failure as failure:
        return await exchange.fail(failure, [])
