"""The logs of batch work: one for each model, made when first needed, of the same kind as the event log.

Distributed it is the topic `<log.topic>.work.<model>`, embedded a log of its own under `work/`. Records are deleted as soon as
all before them have their results; what nobody ever works on is gone after `RETENTION_H`.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from schemas.settings import Settings
from store.log import open_log
from store.log.base import Batch, Entry, Log

RETENTION_H = 31 * 24
"""Longer than any batch may wait."""

_NAME_CHARACTERS_MAX = 80


def work_name(model: str) -> str:
    """A model's name as a part of a topic's or folder's name: legal characters, and a digest where that changed anything."""
    legal = re.sub(r"[^A-Za-z0-9-]", "-", model)[:_NAME_CHARACTERS_MAX]
    return legal if legal == model else f"{legal}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


@dataclass
class WorkLog:
    """The log of one model. May be used by several threads."""

    log: Log
    _writing: threading.Lock = field(default_factory=threading.Lock)
    _reading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def log_id(self) -> str:
        """Identity of the log: offsets of another one mean nothing in it."""
        return self.log.log_id

    @property
    def partitions(self) -> int:
        """Number of partitions."""
        return self.log.partitions

    def append(self, entries: Sequence[Entry]) -> None:
        """See `Log.append`."""
        with self._writing:
            self.log.append(entries)

    def wait(self, offsets: dict[int, int], *, wait_s: float) -> set[int]:
        """See `Log.wait`."""
        with self._reading:
            return self.log.wait(offsets, wait_s=wait_s)

    def read(self, partition: int, offset: int, *, limit: int) -> Batch:
        """See `Log.read`."""
        with self._reading:
            return self.log.read(partition, offset, limit=limit)

    def bounds(self, partition: int) -> tuple[int, int]:
        """See `Log.bounds`."""
        with self._reading:
            return self.log.bounds(partition)

    def ends(self) -> list[int]:
        """The end of each partition."""
        return [self.bounds(partition)[1] for partition in range(self.partitions)]

    def trim(self, offsets: dict[int, int]) -> None:
        """Delete what lies before these offsets, and tell lag monitors."""
        with self._reading:
            for partition, offset in offsets.items():
                if offset > self.log.bounds(partition)[0]:
                    self.log.trim(partition, offset)
            self.log.acknowledge(offsets)


class WorkLogs:
    """The logs of all models, each opened when first asked for."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open: dict[str, WorkLog] = {}
        self._lock = threading.Lock()

    def of(self, model: str) -> WorkLog:
        """The log of a model.

        Raises:
            LogUnavailable: it does not answer.
        """
        with self._lock:
            if model not in self._open:
                self._open[model] = WorkLog(self._opened(work_name(model)))
            return self._open[model]

    def _opened(self, name: str) -> Log:
        settings = self._settings.log
        own = {"topic": f"{settings.topic}.work.{name}", "group": f"{settings.group}.work", "retention_h": RETENTION_H}
        return open_log(settings.model_copy(update=own), self._settings.data / "work" / name)

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            for work in self._open.values():
                work.log.close()
            self._open.clear()
