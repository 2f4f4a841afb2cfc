"""Whether somebody serves the models of a file: asked before it is accepted, so that a misspelt name is no batch of errors."""

from __future__ import annotations

import asyncio

from ingest.gateway.batch.lines import Survey
from ingest.gateway.routes import NAMES_SHOWN_MAX, Allowed, Routes
from schemas.errors import UsageError
from schemas.settings import GatewaySettings


async def probe(routes: Routes) -> None:
    """Ask the upstreams what they serve. One that is away is not asked twice: its models count as unknown."""
    await routes.probe()


def asked(settings: GatewaySettings) -> Routes:
    """The upstreams and what they serve, for a program that is no gateway; nothing of them stays open."""

    async def ask() -> Routes:
        routes = Routes(settings)
        await routes.open()
        try:
            await probe(routes)
        finally:
            await routes.close()
        return routes

    return asyncio.run(ask())


def check_models(routes: Routes, allowed: Allowed, found: Survey) -> None:
    """Refuse a file that asks for a model that nobody serves, or that its owner may not ask for.

    A model is taken where an upstream that may be asked for it does not answer now: its requests wait.

    Raises:
        UsageError: names the model, its first line, and the valid ones.
    """
    for model, number in found.models.items():
        if allowed(model) and any(lane.serves(model) for lane in routes.lanes):
            continue
        names = sorted({name for lane in routes.lanes for name in lane.names if allowed(name)})
        valid = ", ".join(names[:NAMES_SHOWN_MAX]) or "none"
        why = "no upstream serves" if allowed(model) else "this key may not ask for"
        hint = f"valid: {valid}"
        raise UsageError(f"line {number}: {why} the model {model[:200]!r}; {hint}", operation="submit", place="model", hint=hint)
