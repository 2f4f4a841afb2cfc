"""Tries each part for real and says what is wrong and its cure."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from typing import NamedTuple

from schemas.errors import TokentapeError
from store import duck
from store.ledger.keys import KeyFolder
from tokentape.installation import Installation

ROOM_WARN = 0.80
"""Share of the disk in use above which a warning is due."""


class Finding(NamedTuple):
    """One check: `state` is ok, warn or bad; `cure` says what to do about the last two."""

    check: str
    state: str
    detail: str
    cure: str = ""


def storage(installation: Installation) -> list[Finding]:
    """Data directory, room, DuckDB's extensions, log, object store with its locks, ledger key."""
    checks: list[tuple[str, Callable[[Installation], Finding]]] = [
        ("data directory", _directory),
        ("room", _room),
        ("duckdb extensions", _extensions),
        ("log", _log),
        ("object store", _objects),
        ("ledger key", _key),
    ]
    return [_tried(name, check, installation) for name, check in checks]


def _tried(name: str, check: Callable[[Installation], Finding], installation: Installation) -> Finding:
    try:
        return check(installation)
    except TokentapeError as error:
        return Finding(name, "bad", str(error), error.hint)
    except OSError as error:
        return Finding(name, "bad", str(error), "check the path and its permissions")


def _directory(installation: Installation) -> Finding:
    data = installation.settings.data
    data.mkdir(parents=True, exist_ok=True)
    canary = data / f".canary-{uuid.uuid4().hex}"
    with canary.open("wb") as file:
        file.write(b"tokentape")
        os.fsync(file.fileno())
    canary.unlink()
    return Finding("data directory", "ok", f"{data} is writable and syncs")


def _room(installation: Installation) -> Finding:
    usage = shutil.disk_usage(installation.settings.data)
    share = 1 - usage.free / usage.total
    detail = f"{usage.free / 1e9:.1f} GB free, {share:.0%} in use"
    if share > ROOM_WARN:
        return Finding("room", "warn", detail, "tier older days, shorten hot days, or add disk")
    return Finding("room", "ok", detail)


def _extensions(_: Installation) -> Finding:
    with duck.connect(extensions=("avro", "httpfs")) as connection:
        version = connection.execute("SELECT version()").fetchall()[0][0]
    return Finding("duckdb extensions", "ok", f"avro and httpfs load in DuckDB {version}")


def _log(installation: Installation) -> Finding:
    log = installation.log
    held = sum(end - first for first, end in (log.bounds(partition) for partition in range(log.partitions)))
    return Finding("log", "ok", f"{installation.settings.log.kind}, {log.partitions} partitions, {held:,} events held, id {log.log_id}")


def _objects(installation: Installation) -> Finding:
    probe = installation.objects.probe()
    if not probe.conditional_create:
        return Finding("object store", "bad", probe.detail, "use a store with If-None-Match: the ledger needs create-once")
    wants_lock = installation.settings.cold.kind == "minio" and installation.settings.cold.lock != "none"
    if wants_lock and not probe.locks_enforced:
        return Finding("object store", "warn", probe.detail, "create the bucket with object lock, or set cold.lock = none and know it")
    return Finding("object store", "ok", probe.detail)


def _key(installation: Installation) -> Finding:
    path = installation.settings.data / "keys"
    in_force = KeyFolder(path, installation.settings.ledger.origin).private(installation.ledger.chain().last.key).verifier
    loose = [p.name for p in path.glob("ledger.key*") if p.stat().st_mode & 0o077]
    if loose:
        return Finding("ledger key", "bad", f"{', '.join(loose)} can be read by others", f"chmod 600 {path}/*.key")
    return Finding("ledger key", "ok", f"{in_force.key_id} signs, readable by its owner only")
