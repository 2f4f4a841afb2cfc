"""Proof: `verify`."""

from __future__ import annotations

import datetime as dt
import uuid
from functools import partial
from pathlib import Path

import click
from rich.markup import escape

from lifecycle.verification import EVERYTHING, Scope, StoreCopy, Verification, Verified, outcome
from schemas.errors import UsageError
from schemas.registry import SchemaRegistry
from schemas.settings import Settings
from store.ledger import keys
from store.ledger.chain import KeyChain
from store.ledger.proof import read_proof
from store.ledger.verify import Kind, Report
from store.ledger.witness import anchors as witnessed
from store.ledger.witness import open_witness
from store.objects import open_store
from store.objects.base import ObjectStore
from store.stored_schemas import fetch_schema
from tokentape.output import err, out, write_json

_STYLES: dict[Kind, str] = {
    "modified": "red",
    "missing": "red",
    "unsigned": "red",
    "erased-with-proof": "cyan",
    "key-lost": "yellow",
    "orphan": "dim",
}


@click.command()
@click.option("--public-key", type=click.Path(path_type=Path), help="The ledger's public key.  [default: keys/ledger.pub]")
@click.option(
    "--store", "copy", type=click.Path(path_type=Path, file_okay=False, exists=True), help="A copy of the object store in a folder."
)
@click.option(
    "--anchor", "anchors", type=click.Path(path_type=Path), multiple=True, help="A checkpoint that was kept elsewhere, or a folder of them."
)
@click.option("--proof", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Check this proof instead.")
@click.option("--from", "first", metavar="DAY", help="Read objects and rows only from this day on (YYYY-MM-DD).")
@click.option("--to", "last", metavar="DAY", help="Read them only up to this day.")
@click.option("--session", metavar="UUID", help="Read only segments that may hold this session.")
@click.option("--shallow", is_flag=True, help="Ledger, signatures and SHA-256 of objects only; do not read the rows.")
@click.option("--format", "fmt", type=click.Choice(["text", "json"]), default="text", show_default=True, help="How to print it.")
@click.pass_obj
def verify(
    settings: Settings,
    public_key: Path | None,
    copy: Path | None,
    anchors: tuple[Path, ...],
    proof: Path | None,
    first: str | None,
    last: str | None,
    session: str | None,
    shallow: bool,
    fmt: str,
) -> None:
    """Prove that nothing recorded was changed or removed.

    Ledger entries, checkpoints, every object that they name and, unless --shallow, every row behind them are held
    against the public key alone. Works offline, also on a copy of the object store. Nothing is written.

    \b
    Exit codes: 0 good · 10 something was modified · 11 something is missing · 12 something is not signed by this key
    """
    path = public_key or settings.data / "keys" / keys.PUBLIC
    if public_key is None and not path.exists():
        raise UsageError("there is no public key", operation="verify", place=str(path), hint="name one with --public-key")
    if proof is not None:
        return _check(proof, keys.load_public(path), fmt)
    objects = _copy(copy) if copy else open_store(settings.cold, settings.data)
    kept = [data for anchor in anchors for data in _read(anchor)]
    if copy is None and (witness := open_witness(settings.witness)) is not None:
        kept += witnessed(witness)
    verification = Verification(
        objects, keys.load_public(path), SchemaRegistry(partial(fetch_schema, objects)), tuple(kept), _scope(first, last, session)
    )
    found = verification.report(deep=not shallow, progress=lambda key: err.print(f"[dim]reading {escape(key)}[/dim]"))
    if fmt == "json":
        write_json({"outcome": outcome(found), **found.to_dict()}, indent=True)
    else:
        _print(found, verification.scope, deep=not shallow, key=path)
    raise SystemExit(found.exit_code)


def _check(path: Path, key: KeyChain, fmt: str) -> None:
    """Say what a proof proves."""
    proven = read_proof(path.read_bytes()).check(key)
    if fmt == "json":
        write_json({"outcome": "good", "proven": proven}, indent=True)
        return
    for step in proven:
        out.print(step, markup=False, soft_wrap=True)
    out.print("[green]good[/green]: every step holds")


def _copy(folder: Path) -> ObjectStore:
    """A copy of the object store; the data directory's own `cold` folder may be meant by its parent."""
    for root in (folder, folder / "cold"):
        if (root / "ledger").is_dir():
            return StoreCopy(root)
    hint = "name the folder that holds ledger/, events/, coverage/ and schemas/"
    raise UsageError("there is no ledger in this folder", operation="verify", place=str(folder), hint=hint)


def _read(path: Path) -> list[bytes]:
    """The checkpoint of a file, or all of a folder, such as a witness keeps."""
    try:
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        found = [file.read_bytes() for file in files]
    except OSError as error:
        raise UsageError(error.strerror or str(error), operation="read anchor", place=str(path)) from error
    if not found:
        raise UsageError(
            "there is no checkpoint in this folder", operation="read anchor", place=str(path), hint="name a file or a folder of .txt files"
        )
    return found


def _scope(first: str | None, last: str | None, session: str | None) -> Scope:
    """What of objects and rows is to be read.

    Raises:
        UsageError: not a day, the wrong way round, or not a session id.
    """
    for day in filter(None, (first, last)):
        try:
            if dt.date.fromisoformat(day).isoformat() != day:
                raise ValueError(day)
        except ValueError:
            raise UsageError(f"{day!r} is no day", operation="verify", hint="YYYY-MM-DD, in UTC") from None
    if first and last and first > last:
        raise UsageError(f"--from {first} is after --to {last}", operation="verify", hint="name the earlier day with --from")
    try:
        return Scope(first or "", last or EVERYTHING.last, uuid.UUID(session).bytes if session else None)
    except ValueError:
        raise UsageError(
            f"{session!r} is no session id", operation="verify", hint="a whole UUID, as `tokentape sessions` shows it"
        ) from None


def _print(found: Verified, scope: Scope, *, deep: bool, key: Path) -> None:
    """Findings one a line, then what was held against what, then the verdict."""
    for finding in sorted(found.findings, key=lambda finding: list(_STYLES).index(finding.kind)):
        style = _STYLES[finding.kind]
        out.print(f"[{style}]{finding.kind:18}[/{style}] {escape(finding.key)}: {escape(finding.detail)}", soft_wrap=True)
    if found.findings:
        out.print()
    ledger = found.ledger
    rows = [
        ("public key", str(key)),
        *([("keys", _keys(ledger))] if len(ledger.chain.spans) > 1 else []),
        ("ledger", f"{_count(ledger.entries, 'entry', 'entries')}, {_count(ledger.checkpoints, 'checkpoint')}; {_covered(ledger)}"),
        *([] if scope.everything else [("scope", f"objects and rows of {scope}; all entries and checkpoints")]),
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


def _keys(ledger: Report) -> str:
    """The keys that followed the first one."""
    turns = [f"{'begun again' if span.how == 'lost' else 'handed over'} in entry {span.number}" for span in ledger.chain.spans[1:]]
    return f"{', '.join(turns)}; {ledger.chain.last.key.key_id} signs now"


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
    if not found.ledger.entries:
        return "there is nothing in the ledger yet"
    proven = sum(finding.kind == "erased-with-proof" for finding in found.findings)
    if proven:
        return f"nothing was changed or left unsigned; what is gone ({_count(proven, 'object')}) went with proof"
    return "nothing was changed, removed or left unsigned"


def _bad(found: Verified) -> str:
    kinds = [finding.kind for finding in found.findings]
    counted = [f"{kinds.count(kind)} {kind}" for kind in ("modified", "missing", "unsigned") if kind in kinds]
    return f"{', '.join(counted)}; see the lines above"


COMMANDS = [verify]
