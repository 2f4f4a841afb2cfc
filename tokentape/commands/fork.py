"""`fork`: go on from any token of a recorded session, in a live engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from replay.child import Child, run_fork
from replay.fold import Until
from replay.fork import Ask, prepare
from replay.words import count, paragraph, uuid
from schemas.errors import UsageError
from schemas.patch import read_patch
from tokentape.commands.common import id_of, with_installation
from tokentape.engines import engine_options, open_engine
from tokentape.installation import Installation
from tokentape.output import out, write_json


@click.command()
@click.argument("session")
@click.option("--at", metavar="EVENT|TIME", help="From the session as it stood then: an event id, #POSITION, a UTC time.")
@click.option("--token", type=click.IntRange(0), metavar="N", help="Keep the answer's first N tokens; 0 says it anew.  [default: all]")
@click.option("--generation", metavar="ID", help="Which answer.  [default: that of --at, else the last one]")
@click.option("--sequence", "index", type=click.IntRange(0), default=0, show_default=True, help="Which sequence of the answer.")
@click.option("--edit", metavar="PATCH|@FILE", help="An RFC 6902 patch of the request; alone, the answer is said anew.")
@engine_options
@click.option("--seed", type=int, help="Seed of the continuation.  [default: the request's, else a new one]")
@click.option("--max-tokens", type=click.IntRange(1), help="Tokens to go on for.  [default: what the request leaves]")
@click.option("--n", type=click.IntRange(1), default=1, show_default=True, help="Continuations.")
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print the child.")
@with_installation
def fork(installation: Installation, session: str, fmt: str, **asked: Any) -> None:
    """Go on from any token of a recorded SESSION in a live engine, as it was asked or as edited.

    What stands before the fork is forced by its recorded token ids. The continuation is a new session, whose parent is this one.
    Structured output and penalties on repetition look at an answer from its start, so they are refused from the middle of one.
    """
    ask = Ask(
        at=Until.parse(asked["at"]) if asked["at"] else None,
        token=asked["token"],
        generation=id_of(asked["generation"], "--generation", operation="fork") if asked["generation"] else None,
        index=asked["index"],
        edit=_patch(asked["edit"]) if asked["edit"] else (),
        **{name: asked[name] for name in ("seed", "max_tokens", "n")},
    )
    if asked["engine"] == "recorded":
        raise UsageError("the tape says only what was said", operation="fork", hint="name a URL or vllm:MODEL")
    installation.freshen()
    with installation.accessing("fork", f"fork {session}") as access:
        events = installation.session_events(session)
        access["rows"] = len(events)
        engine = open_engine(installation, asked["engine"], asked["model"], asked["options"])
        child = run_fork(prepare(events, ask, engine), engine, installation.recorder, actor=installation.person())
    _print(child, fmt)


def _print(child: Child, fmt: str) -> None:
    if fmt == "json":
        write_json(child.document())
        return
    place, forced = child.fork.place, len(child.fork.prompt_token_ids) + child.fork.place.position
    said = f"{count(forced, 'token')} forced, of them {place.position:,} of the answer"
    out.print(f"[bold]{uuid(child.session_id)}[/bold]  {said}; parent generation {uuid(place.generation_id)}")
    for spoken in child.said.sequences:
        out.print(paragraph(child.fork.prefix_text), style="dim", end="", markup=False)
        out.print(paragraph(spoken.text), markup=False)
        out.print(f"{count(len(spoken.token_ids), 'token')}, {spoken.finish_reason}", style="dim")


def _patch(text: str) -> Any:
    try:
        return read_patch(json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text))
    except ValueError as error:
        hint = """for example '[{"op": "replace", "path": "/temperature", "value": 0}]'"""
        raise UsageError(f"--edit is no patch: {error}", operation="fork", hint=hint) from error


COMMANDS = [fork]
