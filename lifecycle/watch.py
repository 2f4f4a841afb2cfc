"""What there is to watch about an installation, measured in one place: the status, the API, `/metrics` and alerts tell these numbers.

A part that does not answer says so in its place and keeps the others from nothing.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lifecycle.log_retention import cold_to
from lifecycle.runs import RunLedger
from schemas import clock
from schemas.errors import TokentapeError
from schemas.histogram import ENCODE_S, SAVE_S, Histogram
from schemas.settings import Settings
from store.catalog import Catalog
from store.format import FORMAT, noted_format
from store.log.base import Log, Taken
from store.reader import EventReader

REPLAY_ENDS_S = 3600.0
"""A replay without an end after so long has failed: its process died, or its engine did in a run."""

_DAY_S = 86_400.0


@dataclass
class Watch:
    """Measures one installation.

    `encoding` gives what its recorders tell of themselves: counts as `Histogram.to_json` has them. `open_log` opens a log that is
    closed again.
    """

    settings: Settings
    catalog: Catalog
    runs: RunLedger
    reader: EventReader
    encoding: Callable[[], Iterable[Mapping[str, int]]]
    open_log: Callable[[], Log]
    _appended: dict[tuple[str, int, int], int] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _last: tuple[float, dict[str, Any]] = field(default=(float("-inf"), {}), init=False, repr=False)

    def measure(self, *, age_s_max: float = 0.0) -> dict[str, Any]:
        """Everything, as JSON types; times are seconds, moments seconds since the epoch. It may be `age_s_max` old.

        May be called from several threads.
        """
        with self._lock:
            at, measured = self._last
            if time.monotonic() - at > age_s_max:
                self._last = at, measured = time.monotonic(), self._measure()
        return measured

    def _measure(self) -> dict[str, Any]:
        parts = {
            "storage": self._storage,
            "log": self._log,
            "jobs": self._jobs,
            "verify": self._verify,
            "latency": self._latency,
            "replays": self._replays,
            "format": self._format,
        }
        measured = {name: _tried(part) for name, part in parts.items()}
        if "error" not in measured["storage"] and (taken := measured["log"].pop("taken", None)):
            measured["storage"]["log"] = taken
        return measured

    def _storage(self) -> dict[str, Any]:
        """Each tier: what it takes, what it may take, and what of the disk under a local one is taken."""
        data, watch, snapshot = self.settings.data, self.settings.watch, self.catalog.snapshot()
        hot = {
            "files": len(snapshot.shards),
            "events": sum(shard.rows for shard in snapshot.shards),
            "bytes": sum(shard.bytes for shard in snapshot.shards),
        }
        cold = {
            "files": len(snapshot.segments),
            "events": sum(segment.rows for segment in snapshot.segments),
            "bytes": sum(segment.bytes for segment in snapshot.segments),
        }
        tiers = {"hot": _filled(hot, watch.hot_bytes_max, data / "hot")}
        tiers["cold"] = _filled(cold, watch.cold_bytes_max, data / "cold" if self.settings.cold.kind == "local" else None)
        counted = self.runs.summaries("blobs", since=clock.now_s() - 30 * _DAY_S, naming="blob_bytes")
        if counted:  # as the job counted them last: listing a bucket for each look would cost too much
            blobs = {"files": counted[-1]["blobs"], "bytes": counted[-1]["blob_bytes"]}
            tiers["blobs"] = _filled(blobs, watch.blob_bytes_max, data / "cold" if self.settings.cold.kind == "local" else None)
        if self.settings.log.kind != "embedded":
            tiers["spool"] = _filled(_files(data / "spool"), self.settings.recorder.spool_bytes_max, data / "spool")
        return tiers

    def _log(self) -> dict[str, Any]:
        """How old the oldest event is that no query sees, and the oldest that is not cold; and when the log forgets it."""
        with contextlib.closing(self.open_log()) as log:
            indexed = {at.partition: at.offset_next for at in self.catalog.positions() if at.log_id == log.log_id}
            cold, oldest, unsealed = cold_to(log, self.catalog), list[int](), list[int]()
            waiting = 0
            for partition in range(log.partitions):
                first, end = log.bounds(partition)
                unseen, warm = max(first, indexed.get(partition, 0)), max(first, cold.get(partition, 0))
                waiting += end - unseen
                unsealed += [self._appended_at(log, partition, unseen)] if unseen < end else []
                oldest += [self._appended_at(log, partition, warm)] if warm < end else []
            forgets, taken = log.retention_s, log.taken()
        keeps = self.settings.log.retention_days * _DAY_S if self.settings.log.kind == "embedded" else forgets
        lag = _age(min(oldest, default=None))
        return {
            "unsealed_events": waiting,
            "unsealed_s": _age(min(unsealed, default=None)),
            "tiering_lag_s": lag,
            "retention_s": keeps,
            "retention_share": lag / keeps if keeps else None,
            "taken": self._of_log(taken),
        }

    def _of_log(self, taken: Taken) -> dict[str, Any]:
        """The log as a tier of storage; the disks of brokers are theirs."""
        folder = self.settings.data / "log" if self.settings.log.kind == "embedded" else None
        tier = _filled({"bytes": taken.bytes}, self.settings.watch.log_bytes_max, folder)
        return {**tier, "disk": tier["disk"] or "brokers", "disk_share": taken.disk_share}

    def _appended_at(self, log: Log, partition: int, offset: int) -> int:
        """The log's time of a record (µs), which is read once: the oldest of them stands there for long."""
        key = log.log_id, partition, offset
        if key not in self._appended:
            if len(self._appended) > log.partitions * 4:
                self._appended.clear()
            self._appended[key] = log.read(partition, offset, limit=1).appended_at[0]
        return self._appended[key]

    def _jobs(self) -> dict[str, Any]:
        """Jobs whose last run did not end well: how, when, why."""
        ended = self.runs.standings()
        failed = [each for each in ended if each.outcome != "ok"]
        return {
            "ran": sorted(each.job for each in ended),
            "failed": {each.job: {"outcome": each.outcome, "at": each.ended_at, "error": each.error} for each in failed},
        }

    def _verify(self) -> dict[str, Any]:
        """The last good verification; without one the time is counted from the first run of any job."""
        last, first = self.runs.succeeded("verify")
        since = last if last is not None else first
        return {"good_at": last, "since_s": None if since is None else max(0.0, clock.now_s() - since)}

    def _latency(self) -> dict[str, Any]:
        """Encoding an event in the recorders that run now, saving a session's snapshots in the last day."""
        encode, save = Histogram(ENCODE_S), Histogram(SAVE_S)
        for counted in self.encoding():
            encode.add_json(counted)
        for summary in self.runs.summaries("snapshots", since=clock.now_s() - _DAY_S, naming="save_us"):
            save.add_json(summary["save_us"])
        return {name: _quantiles(times) for name, times in (("encode", encode), ("snapshot", save))}

    def _replays(self) -> dict[str, Any]:
        """Replays that began of late, and how many of them came to a verdict."""
        window_s, now = self.settings.watch.replay_h * 3600, clock.now_us()
        since = now - int(window_s * 1e6)
        snapshot = self.catalog.snapshot(time=(since, now))
        sql = (
            "SELECT epoch_us(min(recorded_at) FILTER (kind = 'replay_started')) AS began, count(replay_finished) AS ends FROM events "
            "GROUP BY coalesce(replay_started.replay_id, replay_finished.replay_id)"
        )
        kinds = "kind IN ('replay_started', 'replay_finished')"
        found = self.reader.ask(snapshot, sql, kinds, ("kind", "recorded_at", "replay_started", "replay_finished"))
        begun = [row for row in found.to_pylist() if row["began"] is not None and row["began"] >= since]
        good = sum(1 for row in begun if row["ends"])
        failed = sum(1 for row in begun if not row["ends"] and row["began"] < now - int(REPLAY_ENDS_S * 1e6))
        ended = good + failed
        return {"window_s": window_s, "ended": ended, "failed": failed, "success": good / ended if ended else None}

    def _format(self) -> dict[str, Any]:
        """Formats of the data directory and of this program, and partitions that wait for a newer one, with why."""
        waits = {str(partition): text for partition, text in self.catalog.alarms().items()}
        return {"data": noted_format(self.settings.data), "program": FORMAT, "waits": waits}


def _tried(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return part()
    except TokentapeError as error:
        return {"error": str(error), "hint": error.hint}
    except OSError as error:
        return {"error": f"{error.strerror or error} ({error.filename})", "hint": "check the disk and the rights on it"}


def _files(folder: Path) -> dict[str, Any]:
    """Files of a folder and below, and their bytes; those that go meanwhile are left out."""
    sizes = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            sizes += [path.stat().st_size] if path.is_file() else []
    return {"files": len(sizes), "bytes": sum(sizes)}


def _filled(tier: dict[str, Any], allowed: int, folder: Path | None) -> dict[str, Any]:
    """A tier with what it may take, the share of that, and the share of its disk that is taken, by whomever."""
    disk_share = device = None
    if folder is not None:
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        usage, device = shutil.disk_usage(there), there.stat().st_dev
        disk_share = usage.used / (usage.used + usage.free) if usage.used + usage.free else None
    return {
        **tier,
        "allowed_bytes": allowed or None,
        "share": tier["bytes"] / allowed if allowed else None,
        "disk": device,
        "disk_share": disk_share,
    }


def _age(appended_at: int | None) -> float:
    return 0.0 if appended_at is None else max(0.0, (clock.now_us() - appended_at) / 1e6)


def _quantiles(times: Histogram) -> dict[str, Any]:
    return {"count": times.total, "p95_s": times.quantile(0.95), "p99_s": times.quantile(0.99)}
