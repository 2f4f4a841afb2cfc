"""The lifecycle jobs of an installation, put together from its parts."""

from __future__ import annotations

import contextlib
from typing import Any

import structlog

from lifecycle.alerts import Alerts
from lifecycle.blobs import UnreferencedBlobs
from lifecycle.checkpoints import Checkpoints
from lifecycle.compaction import Compaction
from lifecycle.erasure import Erasures
from lifecycle.iceberg import Iceberg
from lifecycle.log_retention import trim
from lifecycle.proving import Prover
from lifecycle.retention import Retention
from lifecycle.scheduler import Job
from lifecycle.tiering import Tiering
from lifecycle.verification import Verification
from replay.versioning import Versioning, open_versions
from schemas.errors import ProofError, TokentapeError
from store.control import ControlLog, open_control
from store.ledger.witness import Witness, anchors
from store.merge import merge
from tokentape.installation import Installation

log = structlog.get_logger("tokentape.jobs")


def all_jobs(installation: Installation) -> list[Job]:
    """All of them, with the schedule of the settings."""
    every = installation.settings.jobs
    return [
        Job("merge", "merge sealed shards into hour and day shards", every.merge_s, lambda dry: _merge(installation, dry)),
        Job("tier", "move closed days into cold segments", every.tier_s, lambda dry: _tier(installation, dry)),
        Job(
            "checkpoint",
            "sign the ledger's head and the partitions' digests",
            installation.settings.ledger.checkpoint_s,
            lambda dry: _checkpoints(installation).run(dry_run=dry),
        ),
        Job("retention", "remove what is due by the policies", every.retention_s, lambda dry: _retention(installation, dry)),
        Job(
            "erasures", "carry on erasures that a lock kept or that are pending", every.erasure_s, lambda dry: _erasures(installation, dry)
        ),
        Job("compact", "merge small cold segments", every.compact_s, lambda dry: _compact(installation, dry)),
        Job("witness", "copy the newest checkpoint to the witness", every.witness_s, lambda dry: _witness(installation, dry)),
        Job("blobs", "take blobs away that no event refers to", every.blobs_s, lambda dry: _blobs(installation).run(dry_run=dry)),
        Job(
            "snapshots",
            "keep versions of sessions that stopped at breakpoints",
            every.snapshots_s,
            lambda dry: versioning(installation).run(dry_run=dry),
        ),
        Job("iceberg", "bring the Iceberg table to the cold segments", every.iceberg_s, lambda dry: _iceberg(installation, dry)),
        Job("alerts", "tell what is not well, and when it is again", every.alerts_s, lambda dry: _alerts(installation).run(dry_run=dry)),
        Job("verify", "check ledger, checkpoints and every segment", every.verify_s, lambda dry: _verify(installation, dry)),
    ]


def tier_now(installation: Installation) -> Job:
    """Tiering of every sealed shard, today's included."""
    return Job("tier", "move all events into cold segments", 0, lambda dry: _tier(installation, dry, all_days=True))


def tiering_of(installation: Installation) -> Tiering:
    """Tiering over the installation's parts."""
    return Tiering(
        installation.settings,
        installation.catalog,
        installation.objects,
        installation.ledger,
        installation.registry,
        installation.recorder,
        withdraw=lambda: _follow(installation),
    )


def _tier(installation: Installation, dry_run: bool, *, all_days: bool = False) -> dict[str, Any]:
    """Tier, then sign the ledger's new head at once: until then its end could be cut off unnoticed."""
    summary = tiering_of(installation).run(all_days=all_days, dry_run=dry_run)
    if summary.get("segments"):
        summary["checkpoint"] = _checkpoints(installation).run()["ledger_size"]
        _follow(installation)
    return summary


def _follow(installation: Installation) -> None:
    """Publish what changed. A projection must not stop a job that keeps or removes data: the iceberg job tries again, and fails openly."""
    if installation.settings.iceberg.publish == "on":
        try:
            iceberg_of(installation).publish()
        except TokentapeError as error:
            log.warning("iceberg.behind", error=str(error))


def iceberg_of(installation: Installation) -> Iceberg:
    """The cold tier's table for other engines."""
    return Iceberg(installation.settings, installation.catalog)


def _iceberg(installation: Installation, dry_run: bool) -> dict[str, Any]:
    if installation.settings.iceberg.publish == "off":
        return {"added": 0, "iceberg": "off: set iceberg.publish"}
    table = iceberg_of(installation)
    return table.preview() if dry_run else table.publish().to_json()


def _checkpoints(installation: Installation) -> Checkpoints:
    return Checkpoints(installation.catalog, installation.ledger)


def _witness(installation: Installation, dry_run: bool) -> dict[str, Any]:
    if installation.witness is None:
        return {"copied": 0, "witness": "off: set witness"}
    return Witness(installation.ledger, installation.witness, installation.settings.witness.lock_days).run(dry_run=dry_run)


def _blobs(installation: Installation) -> UnreferencedBlobs:
    return UnreferencedBlobs(installation.settings, installation.catalog, installation.objects)


def _merge(installation: Installation, dry_run: bool) -> dict[str, Any]:
    """A tiering run that was killed after its commit has to be finished first: its shards must not be merged with others."""
    finished = 0 if dry_run else tiering_of(installation).reconcile()
    return {**merge(installation.settings, installation.catalog, dry_run=dry_run), "tiering_finished": finished}


def retention_of(installation: Installation) -> Retention:
    """Retention by the policies of the settings."""
    return Retention(tiering_of(installation), collect=_blobs(installation).run)


def _retention(installation: Installation, dry_run: bool) -> dict[str, Any]:
    """Remove what is due from tiers and log, then sign the ledger's new head."""
    if dry_run:
        due = [item.to_row() for item in retention_of(installation).preview()]
        return {"would_remove": [f"{row['policy']}: {row['events']:,} events, {row['contents']:,} contents of {row['key']}" for row in due]}
    summary = retention_of(installation).apply()
    summary["log_records"] = trim(installation.settings, installation.log, installation.catalog)
    if summary["entry"] is not None:
        summary["checkpoint"] = _checkpoints(installation).run()["ledger_size"]
    return summary


def sign(installation: Installation) -> None:
    """Sign the ledger's new head at once: until then its end could be cut off unnoticed."""
    _checkpoints(installation).run()


def erasures_of(installation: Installation, control: ControlLog) -> Erasures:
    """Erasures over the installation's parts."""
    forget = open_versions(installation.settings.data).forget
    return Erasures(tiering_of(installation), installation.log, control, collect=_blobs(installation).run, forget=forget)


def _erasures(installation: Installation, dry_run: bool) -> dict[str, Any]:
    with contextlib.closing(open_control(installation.settings)) as control:
        summary = erasures_of(installation, control).follow_up(dry_run=dry_run)
    if summary["open"] and not dry_run:
        sign(installation)
    return summary


def _compact(installation: Installation, dry_run: bool) -> dict[str, Any]:
    summary = Compaction(tiering_of(installation)).run(dry_run=dry_run)
    if summary.get("segments"):
        summary["checkpoint"] = _checkpoints(installation).run()["ledger_size"]
    return summary


def _verify(installation: Installation, dry_run: bool) -> dict[str, Any]:
    if dry_run:
        return {"would_verify_entries": installation.ledger.head()}
    summary = verification(installation).run(sink=installation.recorder)
    if summary["outcome"] != "good":
        raise ProofError(f"verification found {summary['outcome']} data", operation="verify", hint="`tokentape verify` names each object")
    return summary


def _alerts(installation: Installation) -> Alerts:
    return Alerts(installation.watch, installation.runs)


def versioning(installation: Installation) -> Versioning:
    """What derives the snapshots of the installation's sessions."""
    settings = installation.settings
    return Versioning(installation.reader, installation.catalog, open_versions(settings.data), settings.snapshots.session_bytes_max)


def prover(installation: Installation) -> Prover:
    """What makes proofs of the installation's events and of its ledger's growth."""
    return Prover(installation.reader, installation.objects, installation.ledger, installation.registry)


def verification(installation: Installation) -> Verification:
    """Verification with the installation's own store and public key, against what its witness has seen."""
    kept = tuple(anchors(installation.witness)) if installation.witness else ()
    return Verification(installation.objects, installation.trusted, installation.registry, kept)
