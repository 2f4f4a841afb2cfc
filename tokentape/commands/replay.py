"""`replay`: one session back, by hand, fast, or against an engine."""

from __future__ import annotations

import sys

import click

from replay.compare import run_compare
from replay.comparison import generations_document, replay_document, subject_of
from replay.fold import Until, fold
from replay.player import Player, at_breakpoint, at_trouble
from replay.render import ComparisonView, OutcomeView, SessionPage
from schemas.errors import ConflictError, UsageError
from tokentape.commands.common import with_installation
from tokentape.engines import calibrations, engine_options, open_engine
from tokentape.installation import Installation
from tokentape.output import err, out, write_json


@click.command()
@click.argument("session")
@click.option("--mode", type=click.Choice(["step", "fast", "compare"]), default="compare", show_default=True, help="How to replay.")
@engine_options
@click.option(
    "--to", metavar="MOMENT|breakpoint|failure", help="fast: where to stop: an event id, #POSITION, a UTC time.  [default: the end]"
)
@click.option("--strict/--loose", default=False, help="compare: refuse an environment that differs, or record the difference and go on.")
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="compare: how to print it.")
@with_installation
def replay(
    installation: Installation,
    session: str,
    mode: str,
    engine: str | None,
    options: tuple[str, ...],
    model: str | None,
    to: str | None,
    strict: bool,
    fmt: str,
) -> None:
    """Play a recorded session back.

    \b
    step     walk through the events: n forwards, b backwards, g N to event N, q to stop
    fast     go to a moment and show the session there
    compare  have vLLM score the recorded tokens and give a verdict, recorded as events of its own

    Verdicts are sharpest after `tokentape calibrate` of the engine that recorded: drift is then tested against that engine's
    own noise, and seeded choices are made again. The chance of a false model or sampling verdict is then at most 1 in 1000.
    """
    installation.freshen()
    with installation.accessing(f"replay {mode}", f"replay {session}") as access:
        events = installation.session_events(session, attachments=mode == "compare")
        access["rows"] = len(events)
        if mode == "step":
            _walk(Player(events))
        elif mode == "fast":
            _fast(Player(events), to)
        else:
            scorer = open_engine(installation, engine, model, options, fold(events) if engine == "recorded" else None)
            outcome = run_compare(
                events, scorer, installation.recorder, strict=strict, actor=installation.person(), calibrations=calibrations(installation)
            )
            if fmt == "json":
                write_json(outcome.document())
            else:
                out.print(OutcomeView(outcome))
            if outcome.refused:
                raise ConflictError("the environment differs from the recorded one", operation="replay --strict", hint="--loose goes on")


def _fast(player: Player, to: str | None) -> None:
    stops = {"breakpoint": at_breakpoint, "failure": at_trouble}
    stop = player.fast(stops[to]) if to in stops else player.fast(until=Until.parse(to) if to else None)
    if to in stops and stop.reason != "condition":
        hint = "`tokentape timeline SESSION` shows what it has"
        raise UsageError(f"the session has no {to} from here on", operation="replay fast", hint=hint)
    out.print(SessionPage(stop.state, total=len(player)))


def _walk(player: Player) -> None:
    """Step through the events as the keys say; without a terminal, print each step once."""
    if not sys.stdin.isatty():
        while not player.at_end:
            player.step()
            _print_step(player)
        return
    player.step()
    _print_step(player)
    while (key := click.prompt("", default="n", show_default=False, prompt_suffix="[n/b/g N/q] ")) != "q":
        word, _, number = key.partition(" ")
        try:
            _move(player, word, number)
        except UsageError as error:
            err.print(f"[dim]{error}[/dim]")
            continue
        _print_step(player)


def _move(player: Player, word: str, number: str) -> None:
    if word == "n":
        player.step()
    elif word == "b":
        player.back()
    elif word == "g" and number.isdecimal():
        player.seek(int(number))
    else:
        raise UsageError("n forwards, b backwards, g N to event N, q to stop")


def _print_step(player: Player) -> None:
    """One line for the event just played, then what the sequences say so far."""
    stored = player.event
    out.rule(f"{player.position} of {len(player)} · {stored.event.kind if stored else 'before the first event'}", align="left")
    out.print(SessionPage(player.state, total=len(player)))


@click.command()
@click.argument("session")
@click.option("--generation", metavar="ID", help="Which of the session's generations.  [default: the last one with tokens]")
@click.option("--with", "other", metavar="SESSION", help="The session of the other generation.  [default: the same]")
@click.option("--with-generation", metavar="ID", help="Which of the other session's generations.  [default: the last one with tokens]")
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print it.")
@with_installation
def compare(
    installation: Installation, session: str, generation: str | None, other: str | None, with_generation: str | None, fmt: str
) -> None:
    """A replay beside what it replayed, or two generations, token by token, from the tape alone.

    SESSION is the one in which a replay was recorded (`replay` names it), or with the options above that of a generation. Two
    generations are compared as far as they say the same after the same prompt; where they part is the token that tells.
    """
    installation.freshen()
    named = any((generation, other, with_generation))
    with installation.accessing("compare", f"compare {session}" + (f" with {other or session}" if named else "")) as access:
        state = fold(installation.session_events(session))
        subject = subject_of(state)
        if not named and subject is not None:
            found = replay_document(state, fold(installation.session_events(subject.hex())))
        else:
            found = generations_document(state, fold(installation.session_events(other or session)), generation, with_generation)
        access["rows"] = sum(len(sequence["first"]["text"]) for sequence in found["sequences"])
    if fmt == "json":
        write_json(found)
    else:
        out.print(ComparisonView(found))


COMMANDS = [replay, compare]
