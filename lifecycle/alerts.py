"""Alerts: what is not well by the thresholds of the settings, each logged and posted once when it begins and once when it ends.

What began, what ended and what the receiver was told stands in a table beside the runs of jobs, so a receiver that is away is
told later, and a process that dies between a post and its note posts the same id again. Posts are signed as Standard Webhooks are
(https://www.standardwebhooks.com): HMAC-SHA256 over id, time and body.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import orjson
import structlog
import urllib3

from lifecycle.runs import RunLedger
from lifecycle.watch import Watch
from schemas import clock
from schemas.errors import SettingsError, Unavailable
from schemas.settings import Settings, WatchSettings
from store.crashpoints import crash_point

log = structlog.get_logger("tokentape.alerts")

JOB = "alerts"
"""The job that tells. Its own failure is no alert: whoever would be told is who does not answer."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS alert (
  alert_id TEXT PRIMARY KEY, name TEXT NOT NULL, part TEXT NOT NULL, detail TEXT NOT NULL, began_at REAL NOT NULL, ended_at REAL,
  began_told INTEGER NOT NULL, ended_told INTEGER NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS alert_open ON alert (name) WHERE ended_at IS NULL;
"""

_KEEP_S = 90 * 86_400.0  # how long an alert that ended, and of which both was told, is remembered


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that is not well: `name` says what and of what, `part` which part of the measurement shows it."""

    part: str
    name: str
    detail: str


def alerts_of(measured: Mapping[str, Any], settings: Settings) -> list[Alert]:
    """What is not well in a measurement."""
    silent = [name for name, part in measured.items() if "error" in part]
    found = [Alert(f"unanswered:{name}", f"unanswered:{name}", measured[name]["error"]) for name in silent]
    for name, look in _LOOKS.items():
        if name not in silent:
            found += [Alert(name, *one) for one in look(measured[name], settings.watch)]
    return found


def _storage(tiers: Mapping[str, Any], watch: WatchSettings) -> list[tuple[str, str]]:
    """A disk counts once, under the first tier on it."""
    found, disks = [], dict[Any, str]()
    for name, tier in tiers.items():
        if watch.storage_share and (tier["share"] or 0) >= watch.storage_share:
            found.append((f"storage:{name}", f"{tier['bytes']:,} of {tier['allowed_bytes']:,} bytes allowed, {tier['share']:.0%}"))
        first = disks.setdefault(tier["disk"], name)
        if first == name and watch.storage_share and (tier["disk_share"] or 0) >= watch.storage_share:
            found.append((f"disk:{name}", f"the disk is {tier['disk_share']:.0%} full"))
    return found


def _log(of: Mapping[str, Any], watch: WatchSettings) -> list[tuple[str, str]]:
    found = []
    if watch.unsealed_s and of["unsealed_s"] > watch.unsealed_s:
        found.append(("unsealed", f"{of['unsealed_events']:,} events wait for an indexer, the oldest for {of['unsealed_s']:,.0f} s"))
    if watch.tiering_share and (of["retention_share"] or 0) >= watch.tiering_share:
        fault = f"an event of {of['tiering_lag_s'] / 3600:,.1f} h ago is not cold, the log keeps {of['retention_s'] / 3600:,.1f} h"
        found.append(("tiering", f"{fault}: {of['retention_share']:.0%}"))
    return found


def _jobs(of: Mapping[str, Any], watch: WatchSettings) -> list[tuple[str, str]]:
    failed = {job: run for job, run in of["failed"].items() if watch.failed_jobs and job != JOB}
    return [(f"job:{job}", f"{run['outcome']}: {run['error'] or 'its process died'}") for job, run in failed.items()]


def _verify(of: Mapping[str, Any], watch: WatchSettings) -> list[tuple[str, str]]:
    if not watch.verify_h or (of["since_s"] or 0) <= watch.verify_h * 3600:
        return []
    return [("verify", f"no good verification for {of['since_s'] / 3600:,.1f} h; `tokentape jobs history --job verify` says why")]


def _latency(of: Mapping[str, Any], watch: WatchSettings) -> list[tuple[str, str]]:
    found = []
    for what, times in of.items():
        limits = (("P95", times["p95_s"], watch.p95_s), ("P99", times["p99_s"], watch.p99_s))
        over = [f"{name} up to {value:g} s, at most {limit:g} s" for name, value, limit in limits if limit and (value or 0) > limit]
        found += [(f"latency:{what}", "; ".join(over))] if over else []
    return found


def _replays(of: Mapping[str, Any], watch: WatchSettings) -> list[tuple[str, str]]:
    if of["success"] is None or of["success"] >= watch.replay_success:
        return []
    return [("replays", f"{of['failed']:,} of {of['ended']:,} replays came to no verdict")]


def _format(of: Mapping[str, Any], _: WatchSettings) -> list[tuple[str, str]]:
    return [(f"waits:{partition}", why) for partition, why in of["waits"].items()]


_LOOKS = {
    "storage": _storage,
    "log": _log,
    "jobs": _jobs,
    "verify": _verify,
    "latency": _latency,
    "replays": _replays,
    "format": _format,
}


@dataclass(frozen=True)
class Alerts:
    """Notes what begins and ends, and tells it."""

    watch: Watch
    runs: RunLedger

    def run(self, *, dry_run: bool = False) -> dict[str, Any]:
        """Measure, note, tell; how many alerts there are, and what was told.

        Raises:
            Unavailable: the receiver did not take something; it is told by the next run.
        """
        settings = self.watch.settings
        measured = self.watch.measure()
        now = alerts_of(measured, settings)
        if dry_run:
            return {"alerts": [f"{alert.name}: {alert.detail}" for alert in now]}
        self._note(now, {name for name, part in measured.items() if "error" in part}, told=settings.watch.webhook is None)
        told, fault = (0, "") if settings.watch.webhook is None else self._tell(_Receiver.of(settings))
        if fault:
            hint = "what was not told waits and is told by the next run; see watch.webhook"
            raise Unavailable(fault, operation=JOB, hint=hint)
        return {"alerts": [alert.name for alert in now], "told": told}

    def _note(self, now: Sequence[Alert], silent: set[str], *, told: bool) -> None:
        """Enter what begins and what ends, in one transaction; of a part that did not answer nothing ends."""
        at, names = clock.now_s(), {alert.name for alert in now}
        with self.runs.connection() as connection:
            connection.executescript(_SCHEMA)
            connection.execute("BEGIN IMMEDIATE")
            standing = dict(connection.execute("SELECT name, part FROM alert WHERE ended_at IS NULL").fetchall())
            ended = [name for name, part in standing.items() if name not in names and part not in silent]
            begun = [alert for alert in now if alert.name not in standing]
            connection.executemany(
                "UPDATE alert SET ended_at = ?, ended_told = ? WHERE name = ? AND ended_at IS NULL", [(at, told, name) for name in ended]
            )
            rows = [(uuid.uuid4().hex, alert.name, alert.part, alert.detail, at, told) for alert in begun]
            connection.executemany("INSERT INTO alert VALUES (?, ?, ?, ?, ?, NULL, ?, 0)", rows)
            old = "DELETE FROM alert WHERE ended_at < ? AND began_told AND ended_told"
            connection.execute(old, (at - _KEEP_S,))
            connection.execute("COMMIT")
        for alert in begun:
            log.warning("alert.began", alert=alert.name, detail=alert.detail)
        for name in ended:
            log.warning("alert.ended", alert=name)
        crash_point("alerts.noted")

    def _tell(self, receiver: _Receiver) -> tuple[int, str]:
        """Post what was not told yet, the oldest first; how many posts were taken, and what went wrong.

        One that is refused holds up no other alert, a receiver that is away all of them.
        """
        with self.runs.connection() as connection:
            rows = connection.execute(
                "SELECT alert_id, name, detail, began_at, ended_at, began_told FROM alert "
                "WHERE NOT began_told OR (ended_at IS NOT NULL AND NOT ended_told) ORDER BY began_at, alert_id"
            ).fetchall()
        taken, fault = 0, ""
        for alert_id, name, detail, began_at, ended_at, began_told in rows:
            words = (*(() if began_told else ("began",)), *(() if ended_at is None else ("ended",)))
            for word in words:
                said = {"alert": name, "detail": detail, "began_at": began_at, "ended_at": ended_at if word == "ended" else None}
                try:
                    receiver.post(f"{alert_id}-{word}", f"alert.{word}", said)
                except _Away as error:
                    return taken, str(error)
                except _Refused as error:
                    fault = str(error)
                    break  # its end is told after its beginning
                crash_point("alerts.posted")
                with self.runs.connection() as connection:
                    connection.execute(f"UPDATE alert SET {word}_told = 1 WHERE alert_id = ?", (alert_id,))
                taken += 1
        return taken, fault


class _Away(Exception):
    """Nobody answers."""


class _Refused(Exception):
    """The receiver answered and did not take it."""


@dataclass(frozen=True)
class _Receiver:
    """Where posts go. Neither messages nor logs name more of the address than its host: the rest may be a credential."""

    url: urllib3.util.Url
    secret: bytes | None
    timeout_s: float
    origin: str

    @classmethod
    def of(cls, settings: Settings) -> _Receiver:
        watch = settings.watch
        assert watch.webhook is not None
        try:
            url = urllib3.util.parse_url(watch.webhook.get_secret_value())
        except ValueError:
            raise SettingsError("watch.webhook is no URL", operation=JOB, hint="https://HOST/PATH") from None
        given = watch.secret.get_secret_value() if watch.secret else None
        return cls(url, None if given is None else _key(given), watch.timeout_s, settings.ledger.origin)

    def post(self, post_id: str, kind: str, said: Mapping[str, Any]) -> None:
        """Post one document, whose `id` is the same however often it is sent.

        Raises:
            _Away: no answer in time. _Refused: an answer other than 2xx.
        """
        at = int(clock.now_s())
        body = orjson.dumps({"id": post_id, "type": kind, "timestamp": clock.now().isoformat(), "installation": self.origin, "data": said})
        headers = {"content-type": "application/json", "webhook-id": post_id, "webhook-timestamp": str(at)}
        if self.secret is not None:
            digest = hmac.digest(self.secret, f"{post_id}.{at}.".encode() + body, hashlib.sha256)
            headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
        if self.url.auth:
            headers |= urllib3.util.make_headers(basic_auth=unquote(self.url.auth))
        timeout = urllib3.Timeout(total=self.timeout_s)
        try:
            with urllib3.PoolManager() as pool:
                address = self.url._replace(auth=None).url
                answer = pool.request("POST", address, body=body, headers=headers, timeout=timeout, retries=False, redirect=False)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _Away(f"the webhook's receiver at {self.url.host} does not answer ({type(error).__name__})") from None
        if not 200 <= answer.status < 300:
            raise _Refused(f"the webhook's receiver at {self.url.host} answered {answer.status}")


def _key(secret: str) -> bytes:
    """The bytes of a secret; one that begins with `whsec_` is base64, as Standard Webhooks has it.

    Raises:
        SettingsError: it is not.
    """
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError:
        raise SettingsError("watch.secret begins with whsec_ and is no base64", operation=JOB, hint="generate it again") from None
