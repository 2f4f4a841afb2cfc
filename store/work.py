"""The logs of batch work: one for each model, made when first needed, of the same kind as the event log.

Distributed it is the topic `<log.topic>.work.<model>`, embedded a log of its own under `work/`. Records are deleted as soon as
all before them have their results; what nobody ever works on is gone after `RETENTION_H`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from schemas.errors import CorruptStore, LogChanged
from schemas.settings import Settings
from store.fences import waiting
from store.log import open_log
from store.log.base import Batch, Entry, Log

log = structlog.get_logger(__name__)

RETENTION_H = 31 * 24
"""Longer than any batch may wait."""

_NAME_CHARACTERS_MAX = 80

_DAMAGED = ".damaged"


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
    _left: bool = False

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
            self._current.append(entries)

    def wait(self, offsets: dict[int, int], *, wait_s: float) -> set[int]:
        """See `Log.wait`."""
        with self._reading:
            return self._current.wait(offsets, wait_s=wait_s)

    def read(self, partition: int, offset: int, *, limit: int) -> Batch:
        """See `Log.read`."""
        with self._reading:
            return self._current.read(partition, offset, limit=limit)

    def bounds(self, partition: int) -> tuple[int, int]:
        """See `Log.bounds`."""
        with self._reading:
            return self._current.bounds(partition)

    def ends(self) -> list[int]:
        """The end of each partition."""
        return [self.bounds(partition)[1] for partition in range(self.partitions)]

    def trim(self, offsets: dict[int, int]) -> None:
        """Delete what lies before these offsets, and tell lag monitors."""
        with self._reading:
            current = self._current
            for partition, offset in offsets.items():
                if offset > current.bounds(partition)[0]:
                    current.trim(partition, offset)
            current.acknowledge(offsets)

    def close(self) -> None:
        """Close it once nobody is at work on it; who still holds it is told that it is closed."""
        with self._writing, self._reading:
            self.log.close()

    def leave(self) -> None:
        """Close it, as it is none that stands any more; who still holds it is told that it was replaced, and asks for the one of now."""
        self._left = True
        self.close()

    @property
    def _current(self) -> Log:
        if self._left:
            raise LogChanged("the log was replaced meanwhile", operation="use batch work", hint="it is opened again by whoever asks next")
        return self.log


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
                self._open[model] = WorkLog(self._opened(model))
            return self._open[model]

    def standing(self, model: str) -> WorkLog:
        """As `of`, but none that was removed, replaced or damaged: it is opened again, and made anew where there is none that is whole."""
        log_id = None
        try:
            work = self.of(model)
            log_id = work.log_id
            work.bounds(0)
        except LogChanged:
            self._let_go(model, log_id)
        except CorruptStore as error:
            log.error("batch work is damaged", model=model, error=str(error))
            self.set_aside(model, log_id)
        return self.of(model)

    def set_aside(self, model: str, log_id: str | None) -> None:
        """Move a damaged embedded log to `work/.damaged`, unless one that is whole and has another id has taken its place already.

        What waits in it is in the input files of its batches too. `log_id` is None where the log does not even say who it is.
        """
        self._let_go(model, log_id)
        folder = self._folder(model)
        with waiting(folder.with_name(f"{folder.name}.lock"), secrets.token_hex(8)):
            with contextlib.suppress(CorruptStore):
                work = self._opened(model)
                work.close()
                if work.log_id != log_id:
                    return
            aside = folder.with_name(_DAMAGED) / f"{folder.name}-{secrets.token_hex(4)}"
            aside.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.rename(aside)
        log.warning("a damaged log of batch work was set aside", model=model, place=str(aside))

    def forget(self, before_s: float) -> None:
        """Delete damaged logs that were set aside before a time, in seconds since the epoch."""
        for folder in self._settings.data.glob(f"work/{_DAMAGED}/*"):
            if folder.stat().st_ctime < before_s:
                shutil.rmtree(folder, ignore_errors=True)

    def _let_go(self, model: str, log_id: str | None) -> None:
        """Close a log, if it is still the one of this id that is open here."""
        with self._lock:
            work = self._open.get(model)
            if work is None or work.log_id != log_id:
                return
            del self._open[model]
        work.leave()

    def _folder(self, model: str) -> Path:
        return self._settings.data / "work" / work_name(model)

    def _opened(self, model: str) -> Log:
        settings = self._settings.log
        own = {"topic": f"{settings.topic}.work.{work_name(model)}", "group": f"{settings.group}.work", "retention_h": RETENTION_H}
        return open_log(settings.model_copy(update=own), self._folder(model))

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            for work in self._open.values():
                work.close()
            self._open.clear()
