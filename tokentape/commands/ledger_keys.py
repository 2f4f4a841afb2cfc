"""The ledger's own keys: `keys ledger list | rotate`."""

from __future__ import annotations

import click

from schemas.errors import UsageError
from store.ledger.rotation import begin_again, key_rows, rotate
from tokentape.commands.common import format_option, with_installation
from tokentape.installation import Installation
from tokentape.jobs import sign
from tokentape.output import err, out, write_rows


@click.group("ledger")
def ledger_keys() -> None:
    """The key that signs the ledger: which it is, which were before it, and handing over to a fresh one."""


@ledger_keys.command("list")
@format_option
@with_installation
def list_keys(installation: Installation, fmt: str) -> None:
    """Every key that signed, the first one first, and the entry that handed over to it."""
    write_rows(key_rows(installation.ledger), fmt, ["key_id", "how", "entry", "since"])


@ledger_keys.command("rotate")
@click.option("--lost", is_flag=True, help="The private key is gone: begin again with a fresh one, openly.")
@click.option("--reason", help="With --lost: what happened; it stands in the ledger.")
@with_installation
def rotate_key(installation: Installation, lost: bool, reason: str | None) -> None:
    """Hand the ledger over to a fresh key; the old private key is removed from this machine.

    The old key signs an entry that names the new one, so who has the first public key verifies everything as before and
    needs nothing new. Other machines that write to this ledger need the new keys/ledger.key.

    With --lost nobody can sign that. A fresh key begins again, the ledger says so for ever, and `verify` counts what comes
    after as unsigned until it is given the new line of keys/ledger.pub too: hand it to auditors by another way than the data.
    """
    if lost != bool(reason):
        fault = "--lost needs a --reason" if lost else "--reason goes with --lost only"
        raise UsageError(fault, operation="rotate", hint="tokentape keys ledger rotate --help")
    settings, store = installation.settings, installation.objects
    entry = begin_again(settings, store, reason=reason) if reason else rotate(settings, store)
    sign(installation)
    out.print(f"entry {entry.sequence}: {entry.body['key']}", markup=False, soft_wrap=True)
    if lost:
        err.print("give this public key to whoever verifies, by another way than the data", style="yellow")
