"""What the commands share: the output option and opening the installation."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import click

from schemas.errors import UsageError
from tokentape.installation import Installation
from tokentape.output import FORMATS

format_option = click.option(
    "--format", "fmt", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print the answer."
)


CHOSEN = "SELECT session_id FROM sessions WHERE ({where}) ORDER BY started_at, session_id"


def chosen_sessions(installation: Installation, sessions: Sequence[str], where: str | None, *, operation: str) -> list[bytes]:
    """The sessions that a command line names, or those of a condition over the view `sessions`, oldest first.

    Raises:
        UsageError: neither or both are given, or no session meets the condition.
        UnknownSession: there is no such session.
        QueryError: the condition is no SQL, refused or over a limit.
    """
    if bool(sessions) == (where is not None):
        fault = "sessions and --where exclude each other" if sessions else "nothing says which sessions"
        raise UsageError(fault, operation=operation, hint=f"tokentape {operation} SESSION…, or --where \"started_at > '2026-11-01'\"")
    if where is None:
        return list(dict.fromkeys(installation.session_id(session) for session in sessions))
    found: list[bytes] = [as_id(row) for row in installation.sql.query(CHOSEN.format(where=where)).table.column(0).to_pylist()]
    if not found:
        raise UsageError(f"no session meets {where!r}", operation=operation, hint="`tokentape sessions` lists them")
    return found


def as_id(value: object) -> bytes:
    """A session's id as an answer of SQL has it."""
    return value if isinstance(value, bytes) else uuid.UUID(str(value)).bytes


def with_installation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pass the opened installation as first argument and close it afterwards."""

    @click.pass_context
    @functools.wraps(function)
    def wrapper(ctx: click.Context, /, *args: Any, **kwargs: Any) -> Any:
        with Installation(ctx.obj) as installation:
            return function(installation, *args, **kwargs)

    return wrapper


def id_of(text: str, option: str, *, operation: str) -> bytes:
    """The id that an option names.

    Raises:
        UsageError: it is none.
    """
    try:
        value = bytes.fromhex(text.replace("-", ""))
    except ValueError:
        value = b""
    if len(value) != 16:
        raise UsageError(f"{text!r} is no id", operation=operation, place=option, hint="a UUID, as the timeline and SQL show it")
    return value
