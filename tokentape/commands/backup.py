"""Backups: `backup`, `restore`, `drill`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from rich.markup import escape

from lifecycle.backup import Backup
from lifecycle.drill import Drilled
from lifecycle.drill import drill as run_drill
from lifecycle.restore import restore as run_restore
from schemas import clock
from schemas.errors import ProofError
from schemas.settings import Settings
from tokentape import __version__
from tokentape.commands.common import format_option, with_installation
from tokentape.installation import Installation
from tokentape.output import out, write_rows


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--with-keys", is_flag=True, help="Take the private keys as well: whoever has the backup can sign as this installation.")
@click.option("--without-bucket", is_flag=True, help="Leave the objects of a bucket out, where that is replicated by its own means.")
@with_installation
def backup(installation: Installation, folder: Path, with_keys: bool, without_bucket: bool) -> None:
    """Back the installation up into DIR while it works; into the same DIR again, only what is new is copied.

    New are objects that it does not have and SQLite files that changed, the log among them, which are copied whole.

    Log, control log, job runs, calibrations, and the cold tier with ledger, schemas and blobs, in a bucket as in a folder. Of a
    Kafka topic the shards are taken, which hold what was sealed and is not cold, and the facts of its control topic; batch
    requests that wait in Kafka are not in it. An embedded index is made again by `restore`. Not included: the settings file, and
    without --with-keys all keys but the public one. What was removed or erased leaves the backup with the next run.
    """
    if installation.settings.log.kind != "embedded" and (installation.settings.data / "hot" / "catalog.sqlite").exists():
        installation.freshen()
    made = Backup(installation.settings, folder, __version__, with_keys, not without_bucket).run()
    with installation.accessing("backup", f"backup {folder}") as access:
        access["rows"] = sum(after - first for first, after in made.manifest.offsets)
    manifest = made.manifest
    events = sum(after - first for first, after in manifest.offsets)
    out.print(f"{len(manifest.items):,} files, {manifest.size:,} bytes; {made.copied:,} of them new, {made.copied_bytes:,} bytes")
    out.print(
        f"{events:,} events of the log, {manifest.ledger_size:,} ledger entries, at {clock.at(manifest.taken_at_us):%Y-%m-%d %H:%M:%S} UTC"
    )
    without = "not in it: without them the restore reads and verifies, but signs nothing and opens a gateway with new ones"
    out.print(f"keys: {'in it; keep the folder as safe as them' if with_keys else without}")
    if manifest.elsewhere:
        out.print(f"objects: not in it; they are in {escape(manifest.elsewhere)}, without which this is no backup")
    out.print("settings: not in it; keep your tokentape.toml elsewhere")


@click.command()
@click.argument("source", type=click.Path(path_type=Path), metavar="FROM")
@click.option(
    "--data", type=click.Path(path_type=Path), help="The directory to restore into, empty or not there.  [default: that of the settings]"
)
@click.pass_obj
def restore(settings: Settings, source: Path, data: Path | None) -> None:
    """Restore the backup in FROM into an empty directory: each file is checked, the index made anew, all of it verified.

    The directory appears whole or not at all. Nothing is restored over data: a bucket is filled if it is empty, and taken as it is
    if its ledger goes on from that of the backup; so is a control topic with facts. A topic that is still the same goes on, beside
    a new one the shards stay as they are. Interrupted, the same command goes on.
    """
    target = settings if data is None else settings.model_copy(update={"data": data})
    restored = run_restore(target, source, __version__)
    found, rebuilt = restored.verified, restored.rebuilt
    out.print(
        f"restored to {escape(str(target.data))} in {restored.seconds:.1f} s: {len(restored.manifest.items):,} files, each with its SHA-256"
    )
    if restored.put or restored.facts:
        out.print(f"put: {restored.put:,} objects into the bucket, {restored.facts:,} facts into the control log")
    if restored.kept:
        out.print(f"as it was found: {escape(', '.join(restored.kept))}")
    out.print(f"index: {rebuilt['events']:,} events again from the log, {rebuilt['digests_equal']} digests as before")
    out.print(
        f"verify: {found.ledger.entries:,} entries, {found.segments:,} segments, {found.events:,} events; root {restored.ledger_root[:16]}…"
    )
    if not restored.manifest.with_keys:
        out.print("keys: put keys/ back from your safe copy, or `tokentape keys ledger rotate --lost` begins again openly")
    restored.check()


@click.command()
@click.option(
    "--in",
    "room",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where there is room for two copies.  [default: the temporary folder]",
)
@format_option
@with_installation
def drill(installation: Installation, room: Path | None, fmt: str) -> None:
    """Rehearse an emergency: back up, restore elsewhere, compare with the original, measure RPO and RTO, and leave nothing behind.

    RPO is the age of the oldest event that the backup lacks, RTO the time until the restore is verified and has answered a
    query. Exit code 6 if anything differs.
    """
    installation.freshen()
    with tempfile.TemporaryDirectory(prefix="tokentape-drill-", dir=room) as folder:
        done = run_drill(installation.settings, Path(folder), __version__)
    write_rows(_rows(done), fmt, ["what", "original", "restored", "same"])
    if wrong := [line.what for line in done.lines if not line.same]:
        hint = "`tokentape verify` and `tokentape rebuild` say more about the original"
        raise ProofError(f"the restore is not the original: {', '.join(wrong)}", operation="drill", hint=hint)


def _rows(done: Drilled) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = [
        {"what": line.what, "original": line.original, "restored": line.restored, "same": line.same} for line in done.lines
    ]
    figures = {
        "RPO": f"{done.rpo_s:.3f} s, {done.lacking:,} events",
        "RTO": f"{done.rto_s:.3f} s",
        "backup": f"{done.backup_s:.3f} s, {done.size:,} bytes",
    }
    return lines + [{"what": what, "restored": text} for what, text in figures.items()]


COMMANDS = [backup, restore, drill]
