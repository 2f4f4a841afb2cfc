"""`weights publish | fetch | list`: models in an S3 store, and the cache of this machine."""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from schemas.settings import Settings
from store.weights import Manifest, Remote, WeightCache
from tokentape.commands.common import format_option
from tokentape.output import err, write_rows


@click.group()
def weights() -> None:
    """Models in an S3-compatible store, and the folder in which this machine keeps them.

    `vllm serve $(tokentape weights fetch s3://BUCKET/MODEL)` starts an engine on one. Settings are in the section [weights].
    """


@weights.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("address", metavar="s3://BUCKET/PREFIX")
@click.pass_obj
def publish(settings: Settings, folder: Path, address: str) -> None:
    """Put a model's files into a store, and SHA256SUMS over them last. Prints the digest that stands for all of it."""
    remote = Remote(settings.weights, address)
    manifest = Manifest.of(folder)
    remote.publish(folder, manifest)
    click.echo(manifest.digest)


@weights.command()
@click.argument("address", metavar="s3://BUCKET/PREFIX")
@click.option("--digest", metavar="HEX", help="Refuse any other version than this: what `publish` printed.")
@click.pass_obj
def fetch(settings: Settings, address: str, digest: str | None) -> None:
    """Print the folder of a model, fetched and checked if it is not there yet.

    Another process that fetches the same model is waited for. What was cut off or killed goes on where it was.
    """
    click.echo(fetched(settings, address, digest))


@weights.command("list")
@format_option
@click.pass_obj
def list_(settings: Settings, fmt: str) -> None:
    """The models in this machine's cache; the first would be the first to go."""
    rows = [
        {"digest": name, "bytes": size, "used": dt.datetime.fromtimestamp(used, dt.UTC).replace(microsecond=0)}
        for name, size, used in WeightCache(settings.weights).models()
    ]
    write_rows(rows, fmt, ["digest", "bytes", "used"])


def fetched(settings: Settings, address: str, digest: str | None = None) -> Path:
    """The folder of a model, with a bar on standard error while it comes."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True, console=err, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("weights", total=None)
        cache = WeightCache(settings.weights)
        return cache.fetch(
            Remote(settings.weights, address), digest=digest, progress=lambda done, size: bar.update(task, completed=done, total=size)
        )


COMMANDS = [weights]
