"""Engines and environments: `env list | show | diff`, and `calibrate`."""

from __future__ import annotations

import json
from typing import Any

import click

from replay.calibration import FALSE_ALARM, Calibration
from replay.differences import MEANING, name_of, report
from replay.measurement import SEQUENCES, TOKENS, measure
from replay.words import printable, shorten
from schemas.environment import CLASSES, classify, compare
from schemas.errors import UnknownName, UsageError
from schemas.events import EnvironmentCaptured, Pair
from schemas.probe import item
from tokentape.commands.common import format_option, with_installation
from tokentape.engines import calibrations, engine_options, open_engine
from tokentape.installation import Installation
from tokentape.output import err, write_json, write_rows

LISTED = (
    "SELECT environment_id, origin, first_seen, last_seen, captures, semantic, numeric, scheduling FROM environments ORDER BY first_seen"
)
FOUND = (
    "SELECT environment_id, origin, semantic, numeric, scheduling, items, unknown FROM environments "
    "WHERE starts_with(environment_id, '{beginning}') ORDER BY first_seen LIMIT 2"
)
SHORT = 12
"""Hex digits of a digest in a table; any unique beginning names an environment."""

VALUE_CHARACTERS = 160

json_option = click.option(
    "--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print it."
)


@click.group()
def env() -> None:
    """Environments that produced tokens: what the model was, what computed it, how work was packed.

    Each has three digests: semantic, numeric and scheduling. Two engines with the same digest are alike in all of that class
    that could be asked; what could not is listed as not told.
    """


@env.command("list")
@format_option
@with_installation
def list_(installation: Installation, fmt: str) -> None:
    """All environments on the tape, in the order in which they were first seen."""
    rows = _rows(installation, LISTED, "env list")
    for row in rows:
        digests = ("environment_id", *CLASSES)
        row.update({name: (row[name] or "")[:SHORT] for name in digests} if fmt == "table" else {})
    write_rows(rows, fmt, ["environment_id", "origin", "first_seen", "last_seen", "captures", *CLASSES])


@env.command()
@click.argument("environment")
@json_option
@with_installation
def show(installation: Installation, environment: str, fmt: str) -> None:
    """What is known of an environment. ENVIRONMENT is its id, or a unique beginning of one."""
    found = _environment(installation, environment)
    if fmt == "json":
        write_json({"environment_id": found.environment_id.hex(), "items": _items(found), "unknown": found.unknown})
        return
    click.echo(f"environment {found.environment_id.hex()}, captured by {found.origin}")
    for kind in CLASSES:
        digest = getattr(found, kind)
        click.echo(f"\n{kind} {digest.hex()[:SHORT] if digest else 'untold'}: {MEANING[kind]}")
        for pair in found.items:
            if classify(pair.key) == kind:
                click.echo(f"  {printable(pair.key)} = {shorten(pair.value, VALUE_CHARACTERS)}")
    if found.unknown:
        click.echo(f"\nnot told: {printable(', '.join(found.unknown))}")


@env.command()
@click.argument("first")
@click.argument("second")
@json_option
@with_installation
def diff(installation: Installation, first: str, second: str, fmt: str) -> None:
    """How two environments differ, in words. FIRST and SECOND are ids, or unique beginnings."""
    before, after = _environment(installation, first), _environment(installation, second)
    differences = compare(before, after)
    if fmt == "json":
        write_json([{**difference.model_dump(), "name": name_of(difference.key)} for difference in differences])
        return
    for line in report(before, after, differences):
        click.echo(printable(line))


def _rows(installation: Installation, statement: str, operation: str) -> list[dict[str, Any]]:
    installation.freshen()
    with installation.accessing(operation, statement) as access:
        rows: list[dict[str, Any]] = installation.sql.query(statement).table.to_pylist()
        access["rows"] = len(rows)
    return rows


def _environment(installation: Installation, beginning: str) -> EnvironmentCaptured:
    """The environment of an id, or of the unique beginning of one.

    Raises:
        UnknownName: none, or more than one, begins like that.
    """
    plain = beginning.lower()
    hexadecimal = bool(plain) and all(digit in "0123456789abcdef" for digit in plain)
    rows = _rows(installation, FOUND.format(beginning=plain), "env show") if hexadecimal else []
    if len(rows) != 1:
        fault = f"more than one environment begins with {beginning!r}" if rows else f"no environment {beginning!r} is known"
        raise UnknownName(fault, operation="find environment", hint="list them with: tokentape env list")
    row = rows[0]
    digests = {name: bytes.fromhex(row[name]) if row[name] else None for name in CLASSES}
    items = [Pair(**pair) for pair in row["items"]]
    return EnvironmentCaptured(
        environment_id=bytes.fromhex(row["environment_id"]), origin=row["origin"], items=items, unknown=row["unknown"] or [], **digests
    )


def _items(environment: EnvironmentCaptured) -> dict[str, Any]:
    return {pair.key: {"value": json.loads(pair.value), "digest": classify(pair.key)} for pair in environment.items}


@click.command()
@engine_options
@click.option("--sequences", type=click.IntRange(8, 10_000), default=SEQUENCES, show_default=True, help="How many sequences it says.")
@click.option("--tokens", type=click.IntRange(16, 100_000), default=TOKENS, show_default=True, help="How long each is.")
@json_option
@with_installation
def calibrate(
    installation: Installation, engine: str | None, options: tuple[str, ...], model: str | None, sequences: int, tokens: int, fmt: str
) -> None:
    """Measure the drift of an engine against itself, so that compare replays can tell noise from a change.

    The engine speaks alone and in batches, and scores what it said alone and in other batches. The result is kept in
    DATA/calibrations and holds for recordings of the same environment, by its semantic and numeric items.
    """
    scorer = open_engine(installation, engine, model, options)
    name = model or _served(scorer.fingerprint())
    found = measure(scorer, name, sequences=sequences, tokens=tokens, say=lambda line: err.print(f"[dim]{line}[/dim]"))
    path = calibrations(installation).save(found)
    if fmt == "json":
        write_json(found.model_dump(mode="json", exclude={"environment", "samples"}))
        return
    _print(found)
    click.echo(f"kept in {path}")


def _served(environment: EnvironmentCaptured | None) -> str | None:
    """The name of the one model that a server serves; None for an engine that has but one.

    Raises:
        UsageError: it serves several, and none was named.
    """
    models: list[dict[str, Any]] = (item(environment, "models") if environment else None) or []
    names = [str(entry.get("id")) for entry in models]
    if len(names) > 1:
        raise UsageError("this engine serves several models", operation="calibrate", hint=f"--model is one of: {', '.join(names)}")
    return names[0] if names else None


def _print(found: Calibration) -> None:
    columns = ("condition", "sequences", "tokens", "drift p50", "p99", "max, nats")
    rows = [
        dict(zip(columns, (c.name, c.sequences, c.tokens, f"{c.p50:.2g}", f"{c.p99:.2g}", f"{c.max:.2g}"), strict=True))
        for c in found.conditions
    ]
    write_rows(rows, "table", columns)
    varies = found.dispersion(found.tokens_median)
    click.echo(f"one token tells beyond {found.far_nats:.2g} nats; sequences vary {varies:.3g} times as much as independent tokens would")
    if found.noise:
        again = f"{found.noise_tokens - found.noise_misses:,} of {found.noise_tokens:,} seeded choices"
        click.echo(f"seeded tokens are drawn by {found.noise}: it makes {again} again")
    else:
        click.echo("the noise behind seeded tokens is not known for this engine: sampled choices are not recomputed")
    click.echo(f"verdicts by it: false alarms at most {FALSE_ALARM:g} per sequence and per session")


COMMANDS = [env, calibrate]
