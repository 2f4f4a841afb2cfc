"""How an installation stands: what runs, how fresh the index is, what is missing, storage by tier, locks, proof, upstreams."""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from rich.table import Table

from replay.words import printable
from schemas.errors import TokentapeError
from schemas.settings import UpstreamSettings
from store.catalog import Catalog
from tokentape.installation import Installation
from tokentape.output import out, write_json
from tokentape.supervisor import running

PROBE_TIMEOUT_S = 2.0
"""An upstream that takes longer to say anything is told as dead."""
PROBE_EVERY_S = 5.0
_PROBES: dict[str, tuple[float, bool, str]] = {}
"""By address when it was asked, whether it answered, and how."""


def collect(installation: Installation) -> dict[str, Any]:
    """The status as a dict that `--format json` prints; a part that does not answer says so in its place."""
    return {
        "running": running(installation.settings.data),
        "log": _tried(_log, installation),
        "storage": _tried(_storage, installation),
        "missing": _missing(installation.catalog),
        "object_store": _tried(_store, installation),
        "checkpoint": _tried(_checkpoint, installation),
        "upstreams": _upstreams(installation.settings.gateway.every_upstream),
    }


def _tried(part: Any, installation: Installation) -> dict[str, Any]:
    try:
        result: dict[str, Any] = part(installation)
    except TokentapeError as error:
        return {"error": str(error), "hint": error.hint}
    return result


def _log(installation: Installation) -> dict[str, Any]:
    log, partitions = installation.log, []
    known = {at.partition: at for at in installation.catalog.positions() if at.log_id == log.log_id}
    for partition in range(log.partitions):
        first, end = log.bounds(partition)
        at = known.get(partition)
        next_offset = at.offset_next if at else 0
        partitions.append(
            {"partition": partition, "first": first, "end": end, "indexed": next_offset, "lag": end - max(next_offset, first)}
        )
    fresh = [at.fresh_to for at in known.values()] if len(known) == log.partitions else []
    return {
        "kind": installation.settings.log.kind,
        "log_id": log.log_id,
        "lag": sum(row["lag"] for row in partitions),
        "fresh_to": _utc(min(fresh)) if fresh else None,
        "partitions": partitions,
    }


def _storage(installation: Installation) -> dict[str, Any]:
    snapshot = installation.catalog.snapshot()
    return {
        "hot": {
            "files": len(snapshot.shards),
            "events": sum(shard.rows for shard in snapshot.shards),
            "bytes": sum(shard.bytes for shard in snapshot.shards),
        },
        "cold": {
            "files": len(snapshot.segments),
            "events": sum(segment.rows for segment in snapshot.segments),
            "bytes": sum(segment.bytes for segment in snapshot.segments),
        },
    }


def _missing(catalog: Catalog) -> dict[str, int]:
    return {
        "lost_in_gaps": sum(gap.count for gap in catalog.gaps()),
        "quarantined": len(catalog.quarantine()),
        "duplicates_dropped": sum(at.duplicates for at in catalog.positions()),
    }


def _store(installation: Installation) -> dict[str, Any]:
    probe = installation.objects.probe()
    return {"conditional_create": probe.conditional_create, "locks_enforced": probe.locks_enforced, "detail": probe.detail}


def _checkpoint(installation: Installation) -> dict[str, Any]:
    last = installation.ledger.latest_checkpoint()
    signed = None if last is None else {"size": last.size, "root": last.head.root.hex(), "at": _utc(last.at_us)}
    return {"ledger_entries": installation.ledger.head(), "last": signed}


def _upstreams(entries: Sequence[UpstreamSettings]) -> list[dict[str, Any]]:
    """Whether each upstream answers at all, whatever it answers: all asked at once, and none more often than every few seconds."""
    with ThreadPoolExecutor(len(entries), thread_name_prefix="probe") as pool:
        return list(pool.map(_probed, entries))


def _probed(entry: UpstreamSettings) -> dict[str, Any]:
    known = _PROBES.get(entry.url)
    if known is None or time.monotonic() - known[0] > PROBE_EVERY_S:
        known = _PROBES[entry.url] = (time.monotonic(), *_probe(entry))
    url = urlsplit(entry.url)
    place = f"{url.scheme}://{url.hostname}" + (f":{url.port}" if url.port else "") + url.path
    return {"name": entry.name, "url": place, "answers": known[1], "detail": known[2]}


def _probe(entry: UpstreamSettings) -> tuple[bool, str]:
    """Ask for its models, without a key: being refused is an answer, too."""
    url = urlsplit(entry.url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    try:
        connection = kind(url.hostname or "", url.port, timeout=PROBE_TIMEOUT_S)
        with contextlib.closing(connection):
            connection.request("GET", f"{url.path.rstrip('/')}{'/v1beta' if entry.kind == 'gemini' else '/v1'}/models")
            status = connection.getresponse().status
    except (OSError, ValueError, http.client.HTTPException) as error:
        return False, printable(str(error)) or f"no answer within {PROBE_TIMEOUT_S:g} s"
    return status < 500, f"status {status}"


def _utc(microseconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(microseconds / 1e6))


def render(status: dict[str, Any], fmt: str) -> None:
    """Print a status for a person or as JSON."""
    if fmt == "json":
        write_json(status, indent=True)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _lines(status):
        table.add_row(name, value)
    out.print(table)


def _lines(status: dict[str, Any]) -> list[tuple[str, str]]:
    parts = [f"{item['part']} (process {item['pid']}{', ' + item['url'] if 'url' in item else ''})" for item in status["running"]]
    missing, storage = status["missing"], status["storage"]
    lines = [("running", "\n".join(parts) or "nothing; commands index by themselves")]
    lines += [
        (
            "upstream",
            "\n".join(
                f"{one['name']} {one['url']}: {'answers' if one['answers'] else 'dead'}, {one['detail']}" for one in status["upstreams"]
            ),
        )
    ]
    lines += [("log", _log_line(status["log"]))]
    for tier in ("hot", "cold"):
        held = storage.get(tier)
        lines.append(
            (tier, f"{held['events']:,} events in {held['files']} files, {held['bytes'] / 1e6:,.1f} MB" if held else _error(storage))
        )
    lines.append(
        (
            "missing",
            f"{missing['lost_in_gaps']:,} lost in gaps, {missing['quarantined']:,} quarantined, "
            f"{missing['duplicates_dropped']:,} duplicates dropped",
        )
    )
    lines.append(("object store", status["object_store"].get("detail") or _error(status["object_store"])))
    return [*lines, ("ledger", _ledger_line(status["checkpoint"]))]


def _log_line(log: dict[str, Any]) -> str:
    if "error" in log:
        return _error(log)
    fresh = f"fresh to {log['fresh_to']}" if log["fresh_to"] else "not indexed yet"
    return f"{log['kind']}, {len(log['partitions'])} partitions, {log['lag']:,} events behind, {fresh}"


def _ledger_line(checkpoint: dict[str, Any]) -> str:
    if "error" in checkpoint:
        return _error(checkpoint)
    last = checkpoint["last"]
    signed = f"signed up to {last['size']} at {last['at']}, root {last['root'][:16]}…" if last else "no checkpoint yet"
    return f"{checkpoint['ledger_entries']:,} entries, {signed}"


def _error(part: dict[str, Any]) -> str:
    return f"{part.get('error', 'unknown')}" + (f" ({part['hint']})" if part.get("hint") else "")
