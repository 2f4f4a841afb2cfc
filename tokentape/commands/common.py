"""What the commands share: the output option and opening the installation."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable, Sequence
from typing import Any

import click

from schemas.errors import UsageError
from tokentape.installation import Installation
from tokentape.output import FORMATS

format_option = click.option(
    "--format", "fmt", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print the answer."
)


def checked_tags(tags: Sequence[str], *, operation: str) -> tuple[str, ...]:
    """Tags of a command line.

    Raises:
        UsageError: one of them is none.
    """
    if wrong := [tag for tag in tags if not tag.strip() or "," in tag]:
        raise UsageError(f"{wrong[0]!r} is no tag", operation=operation, hint="a tag is a text without commas")
    return tuple(tags)


def with_installation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pass the opened installation as first argument and close it afterwards."""

    @click.pass_context
    @functools.wraps(function)
    def wrapper(ctx: click.Context, /, *args: Any, **kwargs: Any) -> Any:
        with Installation(ctx.obj) as installation:
            return function(installation, *args, **kwargs)

    return wrapper


def time_of(text: str | None, *, operation: str) -> int | None:
    """A time of a command line in µs since the epoch; UTC where it names no zone.

    Raises:
        UsageError: it is none.
    """
    if text is None:
        return None
    try:
        at = dt.datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text!r} is no time", operation=operation, hint="such as 2026-01-31 or 2026-01-31T12:00") from None
    at = at if at.tzinfo else at.replace(tzinfo=dt.UTC)
    return (at - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)


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
