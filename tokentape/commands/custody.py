"""Proof: `verify`."""

from __future__ import annotations

from pathlib import Path

import click
import orjson
from rich.markup import escape

from lifecycle.verification import StoreCopy, Verification, Verified, fetch_schema, outcome
from schemas.errors import UsageError
from schemas.registry import SchemaRegistry
from schemas.settings import Settings
from store.ledger import keys
from store.ledger.verify import Kind, Report
from store.objects import open_store
from store.objects.base import ObjectStore
from tokentape.output import err, out

_STYLES: dict[Kind, str] = {"modified": "red", "missing": "red", "unsigned": "red", "erased-with-proof": "cyan", "orphan": "dim"}


@click.command()
@click.option("--public-key", type=click.Path(path_type=Path), help="The ledger's public key.  [default: keys/ledger.pub]")
@click.option(
    "--store", "copy", type=click.Path(path_type=Path, file_okay=False, exists=True), help="A copy of the object store in a folder."
)
@click.option("--anchor", "anchors", type=click.Path(path_type=Path), multiple=True, help="A checkpoint that was kept elsewhere.")
@click.option("--shallow", is_flag=True, help="Ledger, signatures and SHA-256 of objects only; do not read the rows.")
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print it.")
@click.pass_obj
def verify(settings: Settings, public_key: Path | None, copy: Path | None, anchors: tuple[Path, ...], shallow: bool, fmt: str) -> None:
    """Prove that nothing recorded was changed or removed.

    Ledger entries, checkpoints, every object that they name and, unless --shallow, every row behind them are held
    against the public key alone. Works offline, also on a copy of the object store. Nothing is written.

    \b
    Exit codes: 0 good · 10 something was modified · 11 something is missing · 12 something is not signed by this key
    """
    objects = _copy(copy) if copy else open_store(settings.cold, settings.data)
    path = public_key or settings.data / "keys" / keys.PUBLIC
    if public_key is None and not path.exists():
        raise UsageError("there is no public key", operation="verify", place=str(path), hint="name one with --public-key")
    kept = tuple(_read(anchor) for anchor in anchors)
    verification = Verification(objects, keys.load_public(path), SchemaRegistry(fetch_schema(objects)), kept)
    found = verification.report(deep=not shallow, progress=lambda key: err.print(f"[dim]reading {escape(key)}[/dim]"))
    if fmt == "json":
        click.echo(orjson.dumps({"outcome": outcome(found), **found.to_dict()}, option=orjson.OPT_INDENT_2))
    else:
        _print(found, deep=not shallow, key=path)
    raise SystemExit(found.exit_code)


def _copy(folder: Path) -> ObjectStore:
    """A copy of the object store; the data directory's own `cold` folder may be meant by its parent."""
    for root in (folder, folder / "cold"):
        if (root / "ledger").is_dir():
            return StoreCopy(root)
    hint = "name the folder that holds ledger/, events/, coverage/ and schemas/"
    raise UsageError("there is no ledger in this folder", operation="verify", place=str(folder), hint=hint)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(error.strerror or str(error), operation="read anchor", place=str(path)) from error


def _print(found: Verified, *, deep: bool, key: Path) -> None:
    """Findings one a line, then what was held against what, then the verdict."""
    for finding in sorted(found.findings, key=lambda finding: list(_STYLES).index(finding.kind)):
        style = _STYLES[finding.kind]
        out.print(f"[{style}]{finding.kind:18}[/{style}] {escape(finding.key)}: {escape(finding.detail)}", soft_wrap=True)
    if found.findings:
        out.print()
    ledger = found.ledger
    rows = [
        ("public key", str(key)),
        ("ledger", f"{_count(ledger.entries, 'entry', 'entries')}, {_count(ledger.checkpoints, 'checkpoint')}; {_covered(ledger)}"),
        ("objects", f"{_count(ledger.objects, 'object')} have the bytes that were entered"),
        ("rows", _rows(found) if deep else "not read (--shallow)"),
    ]
    for name, text in rows:
        out.print(f"{name:<12}{text}", markup=False, soft_wrap=True)
    good = found.exit_code == 0
    verdict = f"[green]good[/green]: {_good(found)}" if good else f"[red bold]{outcome(found)}[/red bold]: {_bad(found)}"
    out.print(f"{'verdict':<12}{verdict}", soft_wrap=True)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _covered(ledger: Report) -> str:
    if not ledger.checkpoints:
        return "no checkpoint yet, so that the end could be cut off unnoticed"
    if ledger.covered >= ledger.entries:
        return "a signed checkpoint covers all of them"
    return f"a signed checkpoint covers the first {ledger.covered:,}"


def _rows(found: Verified) -> str:
    events = f"{_count(found.events, 'event')} in {_count(found.segments, 'segment')} encoded again to the bytes of the log"
    return f"{events}; {_count(found.digests, 'digest')} signed at ingest met and held" if found.segments else events


def _good(found: Verified) -> str:
    return "nothing was changed, removed or left unsigned" if found.ledger.entries else "there is nothing in the ledger yet"


def _bad(found: Verified) -> str:
    kinds = [finding.kind for finding in found.findings]
    counted = [f"{kinds.count(kind)} {kind}" for kind in ("modified", "missing", "unsigned") if kind in kinds]
    return f"{', '.join(counted)}; see the lines above"


COMMANDS = [verify]
