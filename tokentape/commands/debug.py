"""`breakpoints` and `stopped`: stop requests, look at them, edit them, let them go."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ingest.debug.desk import Desk
from schemas import clock
from schemas.errors import UsageError
from schemas.patch import Operation, apply_patch, assignment, diff
from store.control import open_control
from tokentape.commands.common import format_option, with_installation
from tokentape.installation import Installation
from tokentape.output import err, out, write_rows

BREAKPOINT_COLUMNS = ["breakpoint", "stops", "deadline_s", "default", "by", "reason"]
STOPPED_COLUMNS = ["generation", "state", "waits", "left", "then", "breakpoint", "model", "messages", "edits", "by", "session"]

_reason = click.option("--reason", help="Why; it is recorded. A refused client is told.")
_all = click.option("--all", "every", is_flag=True, help="All that are stopped now.")


def _desk(installation: Installation) -> Desk:
    settings = installation.settings
    control = open_control(settings)
    installation.closing(control.close)
    return Desk(control, installation.person(), answer_timeout_s=settings.debug.answer_timeout_s)


def _with_desk(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pass the desk as first argument."""

    def opened(installation: Installation, *args: Any, **kwargs: Any) -> Any:
        return function(_desk(installation), *args, **kwargs)

    opened.__name__, opened.__doc__ = function.__name__, function.__doc__
    opened.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]  # click keeps options there
    return with_installation(opened)


# Breakpoints


@click.group(invoke_without_command=True)
@click.pass_context
def breakpoints(ctx: click.Context) -> None:
    """Where requests stop: list, add, remove; alone, the breakpoints and what is stopped at them."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_breakpoints, fmt="table")
        ctx.invoke(list_stopped, fmt="table", settled=False)


@breakpoints.command("list")
@format_option
@_with_desk
def list_breakpoints(desk: Desk, fmt: str) -> None:
    """The breakpoints, the oldest first."""
    rows = [
        {
            "breakpoint": known.breakpoint_id,
            "stops": known.condition,
            "deadline_s": known.deadline_s,
            "default": known.default_action,
            "by": known.created_by,
            "reason": known.reason,
        }
        for known in desk.breakpoints()
    ]
    write_rows(rows, fmt, BREAKPOINT_COLUMNS)


@breakpoints.command("add")
@click.argument("name", required=False)
@click.option("--everything", is_flag=True, help="Stop every request.")
@click.option("--tag", help="Stop requests with this tag (header x-tokentape-tags).")
@click.option("--model", help="Stop requests for this model; * and ? stand for anything.")
@click.option("--key", help="Stop requests of this API key, by the id that the tape gives it.")
@click.option("--where", metavar="EXPRESSION", help="Stop where this holds, e.g. 'contains(last, \"refund\") and temperature > 0.5'.")
@click.option("--deadline", "deadline_s", type=float, metavar="SECONDS", help="How long one may wait.  [default: debug.deadline_s]")
@click.option("--default", "default_action", help="release or refuse, at the deadline.  [default: debug.default_action]")
@click.option("--reason", help="What it is for.")
@_with_desk
def add_breakpoint(desk: Desk, name: str | None, everything: bool, **conditions: Any) -> None:
    """Set a breakpoint, under a NAME if given; of several conditions all must hold.

    \b
    An expression knows the names model, messages, last (the last message's text), tools, stream, temperature,
    max_tokens, n, tags, key, user, endpoint, params["any field"]; and or not, comparisons, in, [ ];
    len(x), lower(text), contains(x, text), matches(x, "RE2 pattern").
    """
    named = [conditions[name] for name in ("tag", "model", "key", "where") if conditions[name] is not None]
    if bool(named) == everything:
        hint = "--everything, or some of --tag, --model, --key and --where"
        raise UsageError("say which requests to stop", operation="breakpoints add", hint=hint)
    made = desk.add({"breakpoint_id": name, **conditions})
    out.print(f"{made.breakpoint_id} stops {made.condition}", markup=False)


@breakpoints.command("remove")
@click.argument("name")
@_with_desk
def remove_breakpoint(desk: Desk, name: str) -> None:
    """Take a breakpoint away; what it stopped stays stopped."""
    desk.remove(name)
    out.print(f"{name} removed", markup=False)


# Stopped requests


@click.group(invoke_without_command=True)
@click.pass_context
def stopped(ctx: click.Context) -> None:
    """Requests that wait at a breakpoint: list, show, edit, undo, release, refuse.

    A request is named by its generation id, or by the beginning or the end of it.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_stopped, fmt="table", settled=False)


@stopped.command("list")
@click.option("--settled", is_flag=True, help="Also what was decided in the last ten minutes, and by whom.")
@format_option
@_with_desk
def list_stopped(desk: Desk, settled: bool, fmt: str) -> None:
    """What waits, the oldest first."""
    write_rows([_row(row) for row in desk.stopped(settled=settled)], fmt, STOPPED_COLUMNS)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    now = clock.now_s()
    open_ = row["outcome"] is None
    return {
        **row,
        "waits": _seconds((now if open_ else row["outcome"]["at"]) - row["stopped_at"]),
        "left": _seconds(row["deadline_at"] - now) if open_ else None,
        "then": row["default_action"] if open_ else None,
        "by": row["decided_by"] or row["actor"],
    }


def _seconds(value: float) -> float:
    return round(max(0.0, value), 1)


@stopped.command("show")
@click.argument("request")
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print it.")
@_with_desk
def show_stopped(desk: Desk, request: str, fmt: str) -> None:
    """One stopped request as it stands, and each edit of it."""
    found = desk.ask(request, "show")
    found["submitted"], found["request"] = json.loads(found["submitted"]), json.loads(found["request"])
    if fmt == "json":
        sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")
        return
    out.print(f"{found['generation']}  session {found['session']}", markup=False)
    left = _seconds(found["deadline_at"] - clock.now_s())
    out.print(f"stopped at {found['breakpoint']['breakpoint_id']}, {found['default_action']} in {left:g} s", markup=False, style="yellow")
    out.print(_printable(json.dumps(found["request"], ensure_ascii=False, indent=2)), markup=False)
    for edit in found["edits"]:
        what = "undone" if edit["undo_of"] else "edited"
        why = f": {edit['reason']}" if edit["reason"] else ""
        out.print(_printable(f"{what} by {edit['actor']}{why}"), markup=False, style="yellow")
        for operation in edit["patch"]:
            out.print(_printable(f"  {_said(operation)}"), markup=False, style="yellow")


def _printable(text: str) -> str:
    """A text that cannot act on the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else f"‹{ord(c):04X}›" for c in text)


def _said(operation: Operation) -> str:
    value = f" = {json.dumps(operation['value'], ensure_ascii=False)}" if "value" in operation else ""
    source = f" from {operation['from']}" if "from" in operation else ""
    return f"{operation['op']} {operation['path']}{value}{source}"


@stopped.command("edit")
@click.argument("request")
@click.option("--set", "assignments", multiple=True, metavar="PATH=VALUE", help="One field: temperature=0, messages.-1.content=Hello.")
@click.option("--patch", metavar="JSON|@FILE", help="An RFC 6902 patch, or a file that holds one.")
@_reason
@_with_desk
def edit_stopped(desk: Desk, request: str, assignments: tuple[str, ...], patch: str | None, reason: str | None) -> None:
    """Change a stopped request; it stays stopped. Without --set and --patch, in $EDITOR."""
    if patch is not None and assignments:
        raise UsageError("--patch and --set exclude each other", operation="stopped edit", hint="give one of them")
    version = None
    if patch is not None:
        operations = _patch(patch)
    else:
        found = desk.ask(request, "show")
        version, document = found["version"], json.loads(found["request"])
        operations = _assigned(document, assignments) if assignments else _in_editor(document)
    if not operations:
        out.print("nothing changed")
        return
    made = desk.ask(request, "edit", patch=operations, reason=reason, version=version)
    for operation in made["patch"]:
        out.print(_printable(_said(operation)), markup=False)


def _patch(text: str) -> Any:
    try:
        return json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text)
    except ValueError as error:
        hint = """for example '[{"op": "replace", "path": "/temperature", "value": 0}]'"""
        raise UsageError(f"--patch is no JSON: {error}", operation="stopped edit", hint=hint) from error


def _assigned(document: Any, assignments: tuple[str, ...]) -> list[Operation]:
    """The operations of `path=value` texts, each on what those before it made."""
    operations: list[Operation] = []
    try:
        for text in assignments:
            operations.append(assignment(document, text))
            document = apply_patch(document, operations[-1:])
    except ValueError as error:
        raise UsageError(str(error), operation="stopped edit", hint="`tokentape stopped show` shows the request") from error
    return operations


def _in_editor(document: Any) -> list[Operation]:
    text = click.edit(json.dumps(document, ensure_ascii=False, indent=2) + "\n", extension=".json")
    if text is None or not text.strip():
        return []
    try:
        return diff(document, json.loads(text))
    except ValueError as error:
        raise UsageError(f"what was saved is no JSON: {error}", operation="stopped edit", hint="edit again; nothing was changed") from error


@stopped.command("undo")
@click.argument("request")
@_reason
@_with_desk
def undo_edit(desk: Desk, request: str, reason: str | None) -> None:
    """Take back the last edit that stands; undoing is an event too."""
    made = desk.ask(request, "undo", reason=reason)
    for operation in made["patch"]:
        out.print(_printable(_said(operation)), markup=False)


@stopped.command("release")
@click.argument("requests", nargs=-1, metavar="REQUEST...")
@_all
@_reason
@_with_desk
def release_stopped(desk: Desk, requests: tuple[str, ...], every: bool, reason: str | None) -> None:
    """Let requests go: as they were submitted, or as edited."""
    _decide(desk, "release", requests, every, reason)


@stopped.command("refuse")
@click.argument("requests", nargs=-1, metavar="REQUEST...")
@_all
@_reason
@_with_desk
def refuse_stopped(desk: Desk, requests: tuple[str, ...], every: bool, reason: str | None) -> None:
    """Answer requests with an error instead of forwarding them."""
    _decide(desk, "refuse", requests, every, reason)


def _decide(desk: Desk, verb: str, requests: tuple[str, ...], every: bool, reason: str | None) -> None:
    if bool(requests) == every:
        raise UsageError("say which requests", operation=f"stopped {verb}", hint="ids as `tokentape stopped` lists them, or --all")
    names = [row["generation"] for row in desk.stopped() if row["state"] == "stopped"] if every else list(requests)
    for name in names:
        outcome = desk.ask(name, verb, reason=reason)
        out.print(f"{name} {outcome['action'].replace('_', ' ')}", markup=False)
    if not names:
        err.print("[dim]nothing is stopped[/dim]")


COMMANDS = [breakpoints, stopped]
