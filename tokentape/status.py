"""How an installation stands: what runs, how fresh the index is, what is missing, storage by tier, locks, proof, upstreams."""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from rich.table import Table

from ingest.gateway.upstream import without_credentials
from lifecycle.alerts import alerts_of
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


def collect(installation: Installation, *, age_s_max: float = 0.0) -> dict[str, Any]:
    """The status as a dict that `--format json` prints; a part that does not answer says so in its place.

    `storage`, `watch` and `alerts` are what metrics and the webhook tell, too; they may be `age_s_max` old.
    """
    log = _tried(_log, installation)
    measured = installation.watch.measure(age_s_max=age_s_max)
    return {
        "running": [{name: value for name, value in part.items() if name != "encoding"} for part in running(installation.settings.data)],
        "log": log,
        "storage": measured["storage"],
        "watch": {name: part for name, part in measured.items() if name != "storage"},
        "alerts": {alert.name: alert.detail for alert in alerts_of(measured, installation.settings)},
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
    place = without_credentials(entry.url).partition("?")[0]
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
    lines += (
        [("storage", _error(storage))]
        if "error" in storage
        else [(_NAMES.get(f"tier {tier}", tier), _tier_line(held)) for tier, held in storage.items()]
    )
    lines.append(
        (
            "missing",
            f"{missing['lost_in_gaps']:,} lost in gaps, {missing['quarantined']:,} quarantined, "
            f"{missing['duplicates_dropped']:,} duplicates dropped",
        )
    )
    lines.append(("object store", status["object_store"].get("detail") or _error(status["object_store"])))
    lines.append(("ledger", _ledger_line(status["checkpoint"])))
    lines += [(_NAMES.get(name, name), _error(part) if "error" in part else _WATCHED[name](part)) for name, part in status["watch"].items()]
    return [*lines, ("alerts", "\n".join(f"{name}: {detail}" for name, detail in status["alerts"].items()) or "none")]


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


def _tier_line(held: dict[str, Any]) -> str:
    events = f"{held['events']:,} events in " if "events" in held else ""
    files = f"{held['files']:,} files, " if "files" in held else ""
    parts = [f"{events}{files}{held['bytes'] / 1e6:,.1f} MB"]
    parts += [f"{held['share']:.0%} of what is allowed"] if held["share"] is not None else []
    return ", ".join(parts + ([f"disk {held['disk_share']:.0%} full"] if held["disk_share"] is not None else []))


def _waiting_line(part: dict[str, Any]) -> str:
    unsealed = f"{part['unsealed_events']:,} events not yet seen, the oldest {_span(part['unsealed_s'])} old"
    keeps = f"the log keeps {_span(part['retention_s'])}" if part["retention_s"] else "the log keeps all"
    return f"{unsealed}; oldest event that is not cold {_span(part['tiering_lag_s'])}, {keeps}"


def _jobs_line(part: dict[str, Any]) -> str:
    failed = [f"{job} {run['outcome']}: {run['error'] or 'its process died'}" for job, run in part["failed"].items()]
    return "\n".join(failed) or (f"{len(part['ran'])} have run, none failed the last time" if part["ran"] else "none has run")


def _verified_line(part: dict[str, Any]) -> str:
    return f"good {_span(part['since_s'])} ago" if part["good_at"] else "never; `tokentape jobs run verify`"


def _latency_line(part: dict[str, Any]) -> str:
    said = {"encode": "encoding an event", "snapshot": "saving snapshots"}
    lines = [f"{said[what]} P95 ≤ {of['p95_s']:g} s, P99 ≤ {of['p99_s']:g} s ({of['count']:,})" for what, of in part.items() if of["count"]]
    return "; ".join(lines) or "nothing measured"


def _replays_line(part: dict[str, Any]) -> str:
    return f"{part['ended'] - part['failed']:,} of {part['ended']:,} came to a verdict in the last {_span(part['window_s'])}"


def _format_line(part: dict[str, Any]) -> str:
    waits = [f"partition {partition} waits: {why}" for partition, why in part["waits"].items()]
    return "; ".join([f"data {part['data']}, program {part['program']}", *waits])


_WATCHED: dict[str, Callable[[dict[str, Any]], str]] = {
    "log": _waiting_line,
    "jobs": _jobs_line,
    "verify": _verified_line,
    "latency": _latency_line,
    "replays": _replays_line,
    "format": _format_line,
}


_NAMES = {"log": "waiting", "verify": "verified", "tier log": "log files"}
"""Lines that are called otherwise than what they are made of: another one is called so."""


def _span(seconds: float) -> str:
    """A length of time in its largest fitting unit."""
    for name, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:,.1f} s"


def _error(part: dict[str, Any]) -> str:
    return f"{part.get('error', 'unknown')}" + (f" ({part['hint']})" if part.get("hint") else "")
