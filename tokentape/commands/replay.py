"""`replay`: one session back, by hand, fast, or against an engine."""

from __future__ import annotations

import sys

import click

from replay.compare import run_compare
from replay.engines.openai import OpenAIEngine
from replay.player import Player
from replay.render import render_outcome, render_state, render_step
from tokentape.commands.common import with_installation
from tokentape.installation import Installation
from tokentape.output import err, out


@click.command()
@click.argument("session")
@click.option("--mode", type=click.Choice(["step", "fast", "compare"]), default="compare", show_default=True, help="How to replay.")
@click.option("--engine", metavar="URL", help="Base URL of the vLLM that scores the tokens.  [default: gateway.upstream]")
@click.option("--to", "target", metavar="EVENT|POSITION|breakpoint|end", default="end", show_default=True, help="fast: where to stop.")
@click.option("--strict/--loose", default=False, help="compare: refuse an environment that differs, or record the difference and go on.")
@with_installation
def replay(installation: Installation, session: str, mode: str, engine: str | None, target: str, strict: bool) -> None:
    """Play a recorded session back.

    \b
    step     walk through the events: Enter or n forwards, b backwards, g N to an event, q to stop
    fast     go to a position and show the session there
    compare  have a running vLLM score the recorded tokens, and give a verdict; recorded as events of its own
    """
    installation.freshen()
    with installation.accessing(f"replay {mode}", f"replay {session}") as access:
        events = list(installation.reader.session(installation.session_id(session)))
        access["rows"] = len(events)
        if mode == "compare":
            url = engine or installation.settings.gateway.upstream
            key = installation.settings.gateway.upstream_key
            with OpenAIEngine(url, key=key.get_secret_value() if key else None) as scorer:
                outcome = run_compare(events, scorer, installation.recorder, actor=installation.person(), strict=strict)
            render_outcome(outcome, out)
        elif mode == "fast":
            render_state(Player(events).fast(target), out)
        else:
            _walk(Player(events))


def _walk(player: Player) -> None:
    """Step through the events as the keys say; without a terminal, print each step once."""
    render_step(player, out)
    if not sys.stdin.isatty():
        while player.forward():
            render_step(player, out)
        return
    while (key := click.prompt("", default="n", show_default=False, prompt_suffix="[n/b/g N/q] ")) != "q":
        word, _, number = key.partition(" ")
        if word == "g" and number.isdecimal():
            player.seek(int(number))
        elif word not in ("n", "b"):
            err.print("n forwards, b backwards, g N to event N, q to stop")
            continue
        elif not (player.forward() if word == "n" else player.back()):
            err.print("[dim]there is nothing further that way[/dim]")
            continue
        render_step(player, out)


COMMANDS = [replay]
