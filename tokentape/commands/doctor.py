"""`doctor storage | vllm | kv`: what is wrong with this installation, and its cure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.markup import escape

from replay.words import printable
from schemas.errors import UsageError
from tokentape import doctor as checks
from tokentape import doctor_kv, doctor_vllm
from tokentape.commands.common import format_option, with_installation
from tokentape.installation import Installation
from tokentape.output import out, write_rows

STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


@click.group()
def doctor() -> None:
    """What is wrong with this installation and its cure."""


@doctor.command()
@format_option
@with_installation
def storage(installation: Installation, fmt: str) -> None:
    """Try log, index, object store and ledger key for real: create-once, locks, room, readability."""
    _write(checks.storage(installation), fmt)


@doctor.command()
@format_option
def vllm(fmt: str) -> None:
    """Say what import hooks, plugins and patches do to the vLLM of this environment, and whether capture is in force.

    Asked in a process that starts as vLLM's own do, with the settings of the environment (TOKENTAPE_…), as an engine has them.
    """
    _write(doctor_vllm.vllm(), fmt)


@doctor.command()
@click.option("--connector", metavar="[MODULE:]CLASS", help="A connector without further configuration.")
@click.option("--config", metavar="JSON|@FILE", help="A kv_transfer_config, as vllm serve takes it.")
@click.option("--dtype", default="bfloat16", show_default=True, help="The dtype of the cache.")
@click.option("--device", default="cpu", show_default=True, help="Where the cache is: cpu, cuda or cuda:N.")
@click.option("--timeout", type=click.FloatRange(0.1, 600), default=10.0, show_default=True, help="Seconds that a transfer may take.")
@click.option(
    "--profile",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Drive it many times more, and write what its calls took to this file, for pstats and its viewers.",
)
@format_option
def kv(connector: str | None, config: str | None, dtype: str, device: str, timeout: float, profile: Path | None, fmt: str) -> None:
    """Find a KV connector, build it, and drive it by hand: look up, save a small tensor, look it up again, load it, compare.

    Needs vLLM, and no model. What it saves are three blocks of random tokens, which stay in the connector's store.
    """
    transfer = doctor_kv.transfer_of(connector, config)
    if profile is not None and not profile.absolute().parent.is_dir():
        raise UsageError("no folder there", operation="doctor kv", place=str(profile), hint="name a file in a folder that exists")
    _write(doctor_kv.kv(transfer, dtype=dtype, device=device, seconds=timeout, profile=profile), fmt)


def _write(findings: Sequence[checks.Finding], fmt: str) -> None:
    if fmt == "table":
        for finding in findings:
            out.print(f"[{STYLES[finding.state]}]{finding.state:4}[/] {finding.check:16} {escape(printable(finding.detail))}")
            if finding.cure:
                out.print(f"{'':22}[dim]{escape(printable(finding.cure))}[/dim]")
    else:
        write_rows([finding._asdict() for finding in findings], fmt, ["check", "state", "detail", "cure"])
    if any(finding.state == "bad" for finding in findings):
        raise SystemExit(8)


COMMANDS = [doctor]
