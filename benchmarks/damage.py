"""What passes: forged ledgers by class, and single bits flipped in every class of file. None may.

`BENCH_DAMAGE` says how many of each class (1,250 forgeries, 1,000 flips). A forgery counts as named right if the report's worst
finding is the one of its class. A flipped bit is *found* where it is told, *same* where nothing that anybody reads is changed by
it, and else *silent*.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import structlog

from ingest.spool import adopt, create
from lifecycle.verification import StoreCopy, Verification
from schemas.errors import TokentapeError
from schemas.registry import SchemaRegistry
from schemas.settings import ColdSettings, Settings
from store import duck
from store.blobs import BlobStore
from store.catalog import open_catalog
from store.control.embedded import EmbeddedControl
from store.crashpoints import watched
from store.indexer import Indexer
from store.ledger.entry import entry_key
from store.ledger.note import Signer
from store.ledger.verify import verify_ledger
from store.log.base import Entry
from store.log.embedded import EmbeddedLog
from store.objects.local import LocalStore
from store.rows import framed, rows_to_datums
from store.stored_schemas import fetch_schema
from store.views import events_sql
from tests.eventgen import Producer, conversation
from tests.signing import ORIGIN, SIGNER, flip, signed_ledger
from tests.tiered import tiered

EACH = int(os.environ.get("BENCH_DAMAGE", "0"))
FORGERIES, FLIPS = EACH or 1250, EACH or 1000

ENTRIES = 12
"""Entries of the ledger that is forged."""


def run() -> list[dict[str, Any]]:
    """Rows: forgeries and flips, by class."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as name, structlog.testing.capture_logs() as logs:
        return [*_forgeries(Path(name)), *_flips(Path(name), logs)]


# Forgeries


@dataclass
class _Forged:
    """A copy of a ledger to be forged: its bytes as they were, and what it can be forged with."""

    root: Path
    anchor: bytes
    rng: random.Random
    good: dict[Path, bytes] = field(default_factory=dict)
    other: dict[str, bytes] = field(default_factory=dict)

    def files(self, *under: str) -> list[Path]:
        """Files below folders of the store, in order."""
        return [path for path in self.good if any(path.is_relative_to(self.root / folder) for folder in under)]

    def entries(self, count: int) -> list[Path]:
        """So many entries that follow one another."""
        first = self.rng.randrange(ENTRIES - count + 1)
        return [self.root / entry_key(number) for number in range(first, first + count)]

    def write(self, path: Path, data: bytes) -> None:
        """Put other bytes under a name."""
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    def restore(self) -> None:
        """As it was."""
        for path in set(self.root.rglob("*")) - self.good.keys():
            if path.is_file():
                path.unlink()
        for path, data in self.good.items():
            if not path.exists() or path.read_bytes() != data:
                self.write(path, data)

    # Each returns nothing and leaves the store forged

    def mutate(self) -> None:
        """A byte of any file is another one."""
        path = self.rng.choice(self.files("ledger/entries", "ledger/checkpoints", "events"))
        at, data = self.rng.randrange(len(self.good[path])), self.good[path]
        self.write(path, data[:at] + bytes([data[at] ^ self.rng.randrange(1, 256)]) + data[at + 1 :])

    def drop(self) -> None:
        """One file is gone; of entries and checkpoints one that others follow, or it would be the end that was cut."""
        files = self.files("ledger/entries")[:-1] + self.files("events")
        self.rng.choice(files).unlink()

    def swap(self) -> None:
        """Two files of a kind have one another's bytes."""
        one, two = self.rng.sample(self.files(self.rng.choice(("ledger/entries", "ledger/checkpoints", "events"))), 2)
        self.write(one, self.good[two])
        self.write(two, self.good[one])

    def truncate(self) -> None:
        """A file ends before its end."""
        path = self.rng.choice(self.files("ledger/entries", "ledger/checkpoints", "events"))
        self.write(path, self.good[path][: self.rng.randrange(len(self.good[path]))])

    def reorder(self) -> None:
        """Entries that follow one another come in another order."""
        paths = self.entries(self.rng.randrange(2, 6))
        by = self.rng.randrange(1, len(paths))
        for path, other in zip(paths, paths[by:] + paths[:by], strict=True):
            self.write(path, self.good[other])

    def resign(self) -> None:
        """An entry, or a checkpoint, says what it said, or something else, under another key of the same name."""
        stranger = LocalStore(Path(tempfile.mkdtemp(dir=self.root.parent)))
        signed_ledger(stranger, Signer(ORIGIN, self.rng.randbytes(32)), self.rng.choice((4, self.rng.randrange(1 << 30))))
        under = self.rng.choice(("ledger/entries", "ledger/checkpoints"))
        theirs = sorted((stranger.root / under).iterdir())
        number = self.rng.randrange(len(theirs))
        self.write(self.files(under)[number], theirs[number].read_bytes())
        shutil.rmtree(stranger.root)

    def roll_back(self) -> None:
        """All is as it was at an earlier time, and fits; only who kept a checkpoint elsewhere can tell."""
        first = self.rng.randrange(1, ENTRIES)
        for path in self.files("ledger"):
            if _covers(path) >= first:
                path.unlink()

    def splice(self) -> None:
        """From an entry on it is another ledger of the same key, entries, checkpoints and objects."""
        first = self.rng.randrange(1, ENTRIES)
        for path in self.files("ledger"):
            if _covers(path) >= first:
                path.unlink()
        for key, data in self.other.items():
            if not key.startswith("ledger/") or _covers(Path(key)) >= first:
                self.write(self.root / key, data)

    def stale(self) -> None:
        """A checkpoint has the bytes of an earlier one."""
        paths = self.files("ledger/checkpoints")
        new = self.rng.randrange(1, len(paths))
        self.write(paths[new], self.good[paths[self.rng.randrange(new)]])


def _covers(path: Path) -> int:
    """The number of an entry, or of the last entry that a checkpoint covers."""
    return int(path.name[:12]) - ("checkpoints" in path.parts)


_RIGHT = {
    "mutate": {"modified", "unsigned"},
    "drop": {"missing"},
    "swap": {"modified"},
    "truncate": {"modified", "unsigned"},
    "reorder": {"modified"},
    "resign": {"unsigned"},
    "roll_back": {"missing"},
    "splice": {"modified"},
    "stale": {"modified"},
}
"""What the worst finding says of each class: changed bytes of a signature are no signature any more."""

_CODES = {0: "accepted", 10: "modified", 11: "missing", 12: "unsigned"}


def _forgeries(folder: Path) -> Iterator[dict[str, Any]]:
    root, rng = folder / "forged", random.Random(1)
    forged = _Forged(root, signed_ledger(LocalStore(root)), rng)
    forged.good = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    other = LocalStore(folder / "other")
    signed_ledger(other, seed=5)
    forged.other = {str(path.relative_to(other.root)): path.read_bytes() for path in sorted(other.root.rglob("*")) if path.is_file()}
    whole = Counter[str]()
    for name, right in _RIGHT.items():
        said: Counter[str] = Counter()
        while said.total() < FORGERIES:
            getattr(forged, name)()
            said[_CODES[verify_ledger(StoreCopy(root), str(SIGNER.verifier), anchors=[forged.anchor]).exit_code]] += 1
            forged.restore()
        whole += said
        named = sum(said[word] for word in right)
        words = ", ".join(f"{count:,} {word}" for word, count in said.most_common())
        yield _row(f"forgery, {name.replace('_', ' ')}: accepted", said["accepted"], said.total(), f"named right ({words})", named)
    if verify_ledger(StoreCopy(root), str(SIGNER.verifier), anchors=[forged.anchor]).exit_code:
        raise RuntimeError("the ledger is not good after all was put back")
    yield _row("forgeries accepted, all classes", whole["accepted"], whole.total(), "to reach: at least", 10_000)


def _row(what: str, value: int, of: int, beside: str, beside_value: int) -> dict[str, Any]:
    return {"what": what, "value": value, "unit": f"of {of:,}", "beside": beside, "beside_value": beside_value, "reach": "0"}


# Flipped bits


def _flips(folder: Path, logs: list[Any]) -> Iterator[dict[str, Any]]:
    for name, make in _CLASSES.items():
        rng = random.Random(name)
        home = folder / re.sub(r"\W+", "-", name)
        home.mkdir()
        said: Counter[str] = Counter()
        with contextlib.ExitStack() as stack:
            files, outcome = make(home, stack, logs)
            if (untouched := outcome()) != "same":
                raise RuntimeError(f"{name}: {untouched} without a flipped bit")
            while said.total() < FLIPS:
                path = rng.choices(files, [path.stat().st_size for path in files])[0]
                good = path.read_bytes()
                path.unlink()
                path.write_bytes(flip(good, rng.randrange(len(good) * 8)))
                said[outcome()] += 1
                path.unlink()
                path.write_bytes(good)
        yield _row(f"bit flipped, {name}: silent", said["silent"], said.total(), f"found ({said['same']:,} changed nothing)", said["found"])
        shutil.rmtree(home, ignore_errors=True)


_Class = tuple[Sequence[Path], Callable[[], str]]
"""The files of a class, and what comes of reading them: found, same or silent."""


def _told(read: Callable[[], Any], good: Any) -> str:
    try:
        return "same" if read() == good else "silent"
    except (TokentapeError, duckdb.Error):
        return "found"


def _cold(under: str, home: Path, stack: contextlib.ExitStack, logs: list[Any]) -> _Class:
    """Segments, coverage, entries or checkpoints of three tiered days, verified with the public key."""
    rig = stack.enter_context(tiered(Settings(data=home / "data", cold=ColdSettings(lock="none"))))
    for day in (1, 2, 3):
        rig.ingest(list(conversation(rig.producer, chunks=6)))
        rig.set_day(f"2026-11-0{day}")
        rig.tier()
        rig.checkpoint()
    objects, verifier = StoreCopy(home / "data" / "cold"), rig.ledger.verifier
    registry = SchemaRegistry(partial(fetch_schema, objects))

    def outcome() -> str:
        return "found" if Verification(objects, verifier, registry).report(deep=False).exit_code else "same"

    return sorted(path for path in (objects.root / under).rglob("*") if path.is_file()), outcome


def _blob(home: Path, stack: contextlib.ExitStack, logs: list[Any]) -> _Class:
    """Blobs, compressed and not, read by their names."""
    objects, rng = LocalStore(home / "cold"), random.Random(3)
    blobs = BlobStore(objects, home)
    bodies = {}
    for media_type in ("application/json", "image/png"):
        for size in (50, 5_000, 200_000):
            data = bytes(rng.choices(b'{"content": "tape"}', k=size))
            bodies[blobs.put("acme", data, media_type).blob_id] = data
    files = [path for path in (home / "cold" / "blobs").rglob("*") if path.is_file()]
    return files, lambda: _told(lambda: {name: blobs.get("acme", name) for name in bodies}, bodies)


def _spool(home: Path, stack: contextlib.ExitStack, logs: list[Any]) -> _Class:
    """The spool of a producer that died, adopted; what it lost is told where it lost something."""
    rng = random.Random(4)
    entries = [Entry(number % 4, number.to_bytes(16, "big"), rng.randbytes(rng.randrange(50, 400))) for number in range(300)]
    about: dict[str, Any] = {"log_id": "log", "partitions": 4, "bytes_max": 64 << 10}
    spool = create(home / "made", b"producer", **about)
    for start in range(0, len(entries), 5):
        if not spool.append(entries[start : start + 5]):
            entries = entries[:start]
            break
    spool.forget()

    def outcome() -> str:
        shutil.rmtree(home / "read", ignore_errors=True)
        shutil.copytree(home / "made", home / "read")
        logs.clear()
        found: list[Entry] = []
        for orphan in adopt(home / "read", **about):
            while batch := orphan.peek():
                found += batch
                orphan.acknowledge()
            orphan.close()
        if found == entries:
            return "same"
        left = iter(entries)
        whole = all(any(entry == other for other in left) for entry in found)  # nothing altered, nothing in another order
        return "found" if whole and any(line["log_level"] in ("warning", "error") for line in logs) else "silent"

    return sorted(path for path in (home / "made").rglob("*") if path.is_file() and path.stat().st_size), outcome


def _log(home: Path, stack: contextlib.ExitStack, logs: list[Any], *, wal: bool = False) -> _Class:
    """The embedded log as a process leaves it that closed it, or, with its write-ahead log, one that was killed."""
    rng = random.Random(5)
    values = [rng.randbytes(200) for _ in range(400)]
    log = EmbeddedLog(home / "made" / "log.sqlite", partitions=1)
    for start in range(0, len(values), 40):
        log.append([Entry(0, bytes(16), value) for value in values[start : start + 40]])
    if wal:
        shutil.copytree(home / "made", home / "left")
        stack.callback(log.close)
    else:
        log.close()
        (home / "made").rename(home / "left")

    def read() -> list[bytes]:
        shutil.rmtree(home / "read", ignore_errors=True)
        shutil.copytree(home / "left", home / "read", ignore=shutil.ignore_patterns("*-shm"))
        with contextlib.closing(EmbeddedLog(home / "read" / "log.sqlite", partitions=1, timeout_s=0.1)) as again:
            found: list[bytes] = []
            while (batch := again.read(0, len(found), limit=1000)).values:
                found += batch.values
            return found

    pattern = "*-wal" if wal else "log.sqlite"
    return sorted((home / "left").glob(pattern)), lambda: _told(read, values)


def _control(home: Path, stack: contextlib.ExitStack, logs: list[Any]) -> _Class:
    """The control log, with its write-ahead log, as a process leaves it that was killed."""
    control = EmbeddedControl(home / "made" / "control.sqlite")
    stack.callback(control.close)
    for number in range(100):
        control.append("hold", f"key {number}", {"reason": "matter 4711", "by": "ada", "n": number})
    shutil.copytree(home / "made", home / "left")

    def read() -> dict[str, Any]:
        shutil.rmtree(home / "read", ignore_errors=True)
        shutil.copytree(home / "left", home / "read", ignore=shutil.ignore_patterns("*-shm"))
        with contextlib.closing(EmbeddedControl(home / "read" / "control.sqlite", timeout_s=0.1)) as again:
            return again.latest("hold")

    good = control.latest("hold")
    return sorted((home / "left").glob("*-wal")), lambda: _told(read, good)


def _rows(settings: Settings, registry: SchemaRegistry) -> list[bytes]:
    """What SQL would answer from in hot, as the log's bytes."""
    with contextlib.closing(open_catalog(settings.data)) as catalog, duck.connect(threads=1) as connection:
        names = []
        for number, shard in enumerate(catalog.snapshot().shards):
            connection.execute(f"ATTACH '{shard.path}' AS s{number} (READ_ONLY)")
            names.append(f"s{number}")
        table = connection.execute(f'SELECT * FROM ({events_sql(names, [])}) ORDER BY "partition", "offset"').to_arrow_table()
    return [framed(row.datum, row.fingerprint, registry) for row in rows_to_datums(table)]


def _shard(home: Path, stack: contextlib.ExitStack, logs: list[Any]) -> _Class:
    """A sealed shard, read as SQL reads it."""
    settings = Settings(data=home / "data")
    rig = stack.enter_context(tiered(settings))
    rig.ingest([entry for _ in range(8) for entry in conversation(rig.producer, chunks=6)])
    good = _rows(settings, rig.registry)
    return [Path(shard.path) for shard in rig.catalog.snapshot().shards], lambda: _told(lambda: _rows(settings, rig.registry), good)


def _tail(home: Path, stack: contextlib.ExitStack, logs: list[Any]) -> _Class:
    """The write-ahead log of the tail of an indexer that was killed, recovered by the next one, which reads the log again from there."""
    made, left, read = (Settings(data=home / name) for name in ("made", "left", "read"))
    small = made.index.model_copy(update={"batch_events_max": 40})
    log, registry = EmbeddedLog(made.data / "log" / "log.sqlite", partitions=1), SchemaRegistry()
    stack.callback(log.close)
    producer = Producer(seed=6, partitions=1)
    log.append([entry for _ in range(12) for entry in conversation(producer, chunks=6)])

    def killed(label: str) -> None:
        if label == "indexer.before_seal":
            shutil.copytree(made.data, left.data)

    with watched(killed):
        Indexer(made.model_copy(update={"index": small}), log, registry).run_once()
    good = _rows(made, registry)

    def again() -> list[bytes]:
        shutil.rmtree(read.data, ignore_errors=True)
        shutil.copytree(left.data, read.data)
        Indexer(read, log, registry).run_once()
        return _rows(read, registry)

    return sorted((left.data / "hot" / "tail").glob("*.wal")), lambda: _told(again, good)


_CLASSES: dict[str, Callable[[Path, contextlib.ExitStack, list[Any]], _Class]] = {
    "segment": partial(_cold, "events"),
    "manifest": partial(_cold, "coverage"),
    "ledger entry": partial(_cold, "ledger/entries"),
    "checkpoint": partial(_cold, "ledger/checkpoints"),
    "blob": _blob,
    "spool": _spool,
    "log": _log,
    "log's WAL": partial(_log, wal=True),
    "control log's WAL": _control,
    "shard": _shard,
    "tail's WAL": _tail,
}
