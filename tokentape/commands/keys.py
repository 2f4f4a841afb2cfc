"""Virtual keys of the gateway: `keys create | list | show | revoke`; those of the ledger are below `keys ledger`."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from pydantic import ValidationError

from ingest.gateway import quotas
from ingest.gateway.keys import KIND, ROLES, VirtualKey, make
from schemas import clock
from schemas.errors import UsageError
from store.control import ControlLog, open_control
from tokentape.commands.common import format_option, with_installation
from tokentape.commands.ledger_keys import ledger_keys
from tokentape.installation import Installation
from tokentape.output import err, write_rows

COLUMNS = ("key_id", "state", "owner", "tenant", "roles", "models", "requests_per_minute", "tokens_per_minute", "budget_tokens")
TIMES = ("created_at", "expires_at", "revoked_at")

_SPAN = re.compile(r"(\d+)([mhdw])")
_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@click.group()
def keys() -> None:
    """Keys of clients at the gateway: made, listed and revoked here, asked for where gateway.auth = required.

    Running gateways learn of each change within a second. The ledger's signing key is under `keys ledger`.
    """


keys.add_command(ledger_keys)


@keys.command()
@click.option("--owner", required=True, help="Opaque id of the person or program; the actor of its events.")
@click.option("--tenant", help="Owner of what is recorded with it.  [default: tenant of the settings]")
@click.option("--role", "roles", multiple=True, type=click.Choice(ROLES), help="What it may do beside asking; repeat for several.")
@click.option("--model", "models", multiple=True, help="Model or pattern it may ask for; repeat for several.  [default: *]")
@click.option("--no-models", is_flag=True, help="It may ask for no model: a key for its roles alone.")
@click.option("--requests-per-minute", type=click.IntRange(1), help="Requests in one minute of the clock.")
@click.option("--tokens-per-minute", type=click.IntRange(1), help="Tokens of prompts and answers in one minute.")
@click.option("--budget", "budget_tokens", type=click.IntRange(1), help="Tokens in all.")
@click.option("--expires", metavar="WHEN", help="After a span (30m, 12h, 90d, 4w) or at a time (2027-01-31, UTC).")
@with_installation
def create(installation: Installation, models: tuple[str, ...], no_models: bool, expires: str | None, **fields: Any) -> None:
    """Make a key. Its token is printed once, alone on standard output, and kept nowhere."""
    if models and no_models:
        raise UsageError("--model and --no-models exclude each other", operation="keys create", hint="keep one of them")
    fields["tenant"] = fields["tenant"] or installation.settings.tenant
    fields["models"] = () if no_models else models or ("*",)
    fields["expires_at"] = _moment(expires) if expires else None
    try:
        token, key = make(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--{first['loc'][0]}: {first['msg']}", operation="keys create", hint="tokentape keys create --help") from error
    with _control(installation) as control, installation.accessing("keys create", key.key_id):
        control.append(KIND, key.key_id, key.model_dump(mode="json"))
    err.print(f"{key.key_id} made; this is its token, which cannot be shown again:", markup=False)
    click.echo(token)


@keys.command("list")
@format_option
@with_installation
def list_(installation: Installation, fmt: str) -> None:
    """All keys, with what they used."""
    with _control(installation) as control:
        usage = control.latest(quotas.KIND)
        found = sorted(_keys(control), key=lambda key: key.created_at)
    write_rows([_row(key, usage) for key in found], fmt, (*COLUMNS, "tokens_used", *TIMES))


@keys.command()
@click.argument("key_id")
@format_option
@with_installation
def show(installation: Installation, key_id: str, fmt: str) -> None:
    """One key, with what it used."""
    with _control(installation) as control:
        row = _row(_find(control, key_id, "keys show"), control.latest(quotas.KIND))
    write_rows([row], fmt, (*COLUMNS, "tokens_used", *TIMES))


@keys.command()
@click.argument("key_id")
@with_installation
def revoke(installation: Installation, key_id: str) -> None:
    """Revoke a key for good. Answers that are under way with it end with an error within a second."""
    with _control(installation) as control:
        key = _find(control, key_id, "keys revoke")
        if key.revoked_at is not None:
            return click.echo(f"{key.key_id} was revoked before")
        with installation.accessing("keys revoke", key.key_id):
            control.append(KIND, key.key_id, key.model_copy(update={"revoked_at": clock.now_s()}).model_dump(mode="json"))
    return click.echo(f"{key.key_id} is revoked")


@contextmanager
def _control(installation: Installation) -> Iterator[ControlLog]:
    control = open_control(installation.settings)
    try:
        yield control
    finally:
        control.close()


def _keys(control: ControlLog) -> list[VirtualKey]:
    return [VirtualKey.model_validate(value) for value in control.latest(KIND).values()]


def _find(control: ControlLog, key_id: str, operation: str) -> VirtualKey:
    """The key of an id."""
    for key in _keys(control):
        if key.key_id == key_id:
            return key
    raise UsageError(f"no key is called {key_id[:20]!r}", operation=operation, hint="tokentape keys list shows all")


def _row(key: VirtualKey, usage: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(key, name) for name in COLUMNS if name != "state"}
    times = {name: getattr(key, name) for name in TIMES}
    return {
        **row,
        "roles": list(key.roles),
        "models": list(key.models),
        "state": key.state(clock.now_s()),
        "tokens_used": quotas.total_used(usage, key.key_id),
        **{name: dt.datetime.fromtimestamp(at, dt.UTC) if at else None for name, at in times.items()},
    }


def _moment(text: str) -> float:
    """Seconds since the epoch at the end of a span from now, or at a time in UTC."""
    if span := _SPAN.fullmatch(text.strip()):
        return clock.now_s() + int(span[1]) * _SECONDS[span[2]]
    try:
        at = dt.datetime.fromisoformat(text.strip())
    except ValueError as error:
        hint = "a span such as 30m, 12h, 90d, 4w, or a time such as 2027-01-31T12:00"
        raise UsageError(f"--expires: {text!r} is no time", operation="keys create", hint=hint) from error
    at = at if at.tzinfo else at.replace(tzinfo=dt.UTC)
    if at.timestamp() <= clock.now_s():
        raise UsageError(f"--expires: {text} is over", operation="keys create", hint="name a time to come")
    return at.timestamp()


COMMANDS = [keys]
