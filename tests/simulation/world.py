"""One run: processes that work on one installation, are killed, wait too long, and begin anew."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from ingest.sender import Sender
from ingest.spool import Spool
from ingest.spool import adopt as adopt_spools
from ingest.spool import create as create_spool
from lifecycle.holds import Holds
from lifecycle.scheduler import find
from lifecycle.selectors import Selector
from schemas import clock
from schemas.errors import TokentapeError
from schemas.registry import SchemaRegistry
from schemas.settings import JobsSettings, LogSettings, RetentionPolicy, RetentionSettings, Settings
from store import cold, duck
from store.catalog import Catalog
from store.control import open_control
from store.crashpoints import watched
from store.fences import FileLock, waiting
from store.follower import Follower, Round
from store.indexer import Indexer
from store.ledger.entry import decode_entry
from store.log import open_log
from store.objects.local import LocalStore
from store.rebuild import rebuild
from store.recode import Recoded
from store.rows import framed, rows_to_datums
from store.views import events_sql
from tests.eventgen import Producer, conversation
from tests.simulation import lent, vocabulary
from tests.simulation.faults import Dice, FaultyLog, FaultyStore, Inline, Killed
from tests.simulation.truth import Truth
from tests.tiered import Sink
from tokentape.installation import Installation
from tokentape.jobs import all_jobs, erasures_of, tiering_of

START_US = 1_767_225_600_000_000 + 9 * 3_600_000_000
"""When a run begins: 1 January 2026, nine in the morning."""

_HOUR_US = 3_600_000_000
_ACTS = 5
"""What happens before nothing fails any more."""

_NESTED_MAX = 2
"""A process that waits may see one that waits as well."""

_INSIDE = ("catalog.before_commit",)
"""Steps inside a transaction of a file that others need: who waited there would only keep them waiting."""

REGISTRY = SchemaRegistry()
REGISTRY.add(vocabulary.SMALL.definition)

_WHOLE_EACH = 10
"""Of so many seeds one has the whole schema."""


@dataclass(frozen=True)
class Outcome:
    """What came of a seed."""

    seed: int
    violations: tuple[str, ...]
    faults: Counter[str]
    kills: Counter[str]
    steps: Counter[str]
    trace: tuple[str, ...]


@dataclass
class Process:
    """One process of the installation: its parts, its locks, and whether it is still alive."""

    name: str
    parts: Installation
    dead: bool = False
    locks: list[FileLock] = field(default_factory=list)
    left: dict[Path, bytes] = field(default_factory=dict)


@dataclass
class Recording:
    """A producer with its spool on disk and its sender."""

    made: Producer
    spool: Spool
    sender: Sender


def simulate(seed: int, *, odds: Mapping[str, float] | None = None) -> Outcome:
    """Run one seed; the same seed gives the same run. `odds` says which faults come how often, instead of the seed."""
    root = Path(tempfile.mkdtemp(prefix=f"simulation-{seed}-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    world = World(seed, root, odds)
    try:
        with world.driven():
            world.run()
    except Exception as error:  # outside of a process: the run names its seed all the same
        world.truth.violations.append(f"the run breaks off: {error!r}")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    dice = world.dice
    return Outcome(seed, tuple(world.truth.violations), dice.thrown, world.kills, world.steps, tuple(world.trace))


class World:
    """An installation, its virtual clock, and everything that happens to it."""

    def __init__(self, seed: int, root: Path, odds: Mapping[str, float] | None) -> None:
        self.seed, self.root = seed, root
        self.dice = Dice.of(seed, odds)
        self.trace: list[str] = []
        self.steps: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self._now_us, self._skew_us = START_US, 0
        self._stack: list[Process] = []
        rng = self.dice.rng
        self.settings = Settings(
            data=root / "data",
            log=LogSettings(partitions=2, retention_days=rng.choice((1.0, 3.0))),
            jobs=JobsSettings(tier_after_days=rng.choice((0.0, 1.0))),
            retention=RetentionSettings(policies=_policies(rng)),
        )
        self.truth = Truth(self.settings.retention.policies, self.settings.data / "cold", REGISTRY, self.say)
        self.store = FaultyStore(LocalStore(self.settings.data / "cold"), self.dice, self.breathe, self.sleep, self.truth.created)
        self._tenants = rng.choice((("acme",), ("zeta",), ("acme", "zeta")))
        self._classes = rng.choice((("standard",), ("long",), ("standard", "long")))
        self.producers: list[Recording] = []
        self._made = 0
        self.sessions: list[Any] = []

    # Time and death

    def now_us(self) -> int:
        """What the clock shows; not always what it is."""
        shown = self._now_us + self._skew_us
        self.truth.latest_us = max(self.truth.latest_us, shown)
        return shown

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self._now_us += int(seconds * 1e6)

    def say(self, what: str) -> None:
        """A line of the trace."""
        who = " > ".join(process.name for process in self._stack)
        self.trace.append(f"{clock.at(self._now_us + self._skew_us):%m-%d %H:%M:%S} {who:24} {what}")

    def breathe(self) -> None:
        """The dead do nothing."""
        if self._stack and self._stack[-1].dead:
            raise Killed

    def step(self, label: str) -> None:
        """A process comes to a step that changes durable state: it may die there, or wait while others go on."""
        if not self._stack:
            return
        process = self._stack[-1]
        self.breathe()
        self.steps[label] += 1
        rare = 1 / (1 + self.steps[label] / 3)
        if self.dice.falls("kill", rare):
            self.kills[label] += 1
            self.say(f"killed at {label}")
            process.dead = True
            process.left = {path: path.read_bytes() for path in (self.settings.data / "hot" / "tail").glob("*.duckdb*")}
            raise Killed
        if label not in _INSIDE and len(self._stack) <= _NESTED_MAX and self.dice.falls("pause", rare):
            self._pause(process, label)

    def _pause(self, process: Process, label: str) -> None:
        """Others work while this process stands still, perhaps after its fence was lost: then it wakes as a zombie."""
        self.say(f"waits at {label}")
        if self.dice.falls("fence lost"):
            for lock in process.locks:
                if lock.holds() and lock.path.parent.name == "fences":
                    self.say(f"loses {lock.path.name}")
                    lock.path.unlink()
        self.sleep(self.dice.rng.choice((1, 600, 7200)))
        self.look()
        self.act(self.dice.rng.choice(("index", "tier", "retention", "hold", "merge", "compact", "index")))
        self.say(f"goes on at {label}")

    # Processes

    @contextlib.contextmanager
    def process(self, name: str) -> Iterator[Process]:
        """A new process, until it ends or dies; whichever way, the kernel takes its locks back."""
        parts = Installation(self.settings)
        log = open_log(self.settings.log, self.settings.data)
        fill: dict[str, Any] = {"registry": REGISTRY, "objects": self.store, "recorder": Sink()}
        vars(parts).update(fill, log=FaultyLog(log, self.dice, self.breathe, self.truth.logged))
        process = Process(name, parts)
        self._stack.append(process)
        try:
            yield process
        finally:
            self._stack.pop()
            log.close()
            if "catalog" in vars(parts):
                parts.catalog.close()
            for lock in process.locks:
                lock.release()

    def act(self, name: str) -> None:
        """Let a process do one thing."""
        with self.process(name) as process:
            try:
                self.say("begins")
                getattr(self, f"do_{name}")(process.parts)
                self.say("ends")
            except Killed:
                self._bury(process)
            except TokentapeError as error:
                self.say(f"fails: {type(error).__name__}: {error}")
                if self.dice.calm:
                    self.truth.violations.append(f"{name} fails with nothing wrong any more: {error}")
            except Exception as error:
                self.say(f"crashes: {error!r}")
                self.truth.violations.append(f"{name} crashes: {error!r}")

    def _bury(self, process: Process) -> None:
        """What a process that was killed leaves: its tails as they were on disk then, for closing them tidied up, and no producer."""
        for path, data in process.left.items():
            path.write_bytes(data)
        if process.name == "produce" and self.producers:
            self.producers.pop().spool.forget()

    # What they do

    def do_index(self, parts: Installation) -> None:
        """Index what the log holds."""
        Indexer(self.settings, parts.log, REGISTRY).run_once()

    def do_rebuild(self, parts: Installation) -> None:
        """Make hot anew."""
        found = rebuild(self.settings, parts.log, parts.objects, parts.catalog, registry=REGISTRY)
        if found["differ"]:
            self.truth.violations.append(f"rebuild: {found['differ']}")

    def _job(self, parts: Installation, name: str) -> None:
        find(all_jobs(parts), name).work(False)

    def do_merge(self, parts: Installation) -> None:
        """The job."""
        self._job(parts, "merge")

    def do_tier(self, parts: Installation) -> None:
        """The job."""
        self._job(parts, "tier")

    def do_retention(self, parts: Installation) -> None:
        """The job."""
        self._job(parts, "retention")

    def do_compact(self, parts: Installation) -> None:
        """The job."""
        self._job(parts, "compact")

    def do_erasures(self, parts: Installation) -> None:
        """The job."""
        self._job(parts, "erasures")

    def do_checkpoint(self, parts: Installation) -> None:
        """The job."""
        self._job(parts, "checkpoint")

    def do_verify(self, parts: Installation) -> None:
        """The job."""
        self._job(parts, "verify")

    def do_hold(self, parts: Installation) -> None:
        """Place a hold, or end one."""
        rng = self.dice.rng
        with contextlib.closing(open_control(self.settings)) as control:
            holds = Holds(tiering_of(parts), control)
            if self.truth.holds and rng.random() < 0.4:
                holds.release(rng.choice(sorted(self.truth.holds)), by="custodian", reason="settled")
            elif self.sessions:
                session = rng.choice(self.sessions)
                by_tenant = Selector(tenant=session.tenant, until=self.now_us())
                selector = by_tenant if rng.random() < 0.3 else Selector(sessions=(session.session_id.hex(),))
                holds.place(selector, by="custodian", reason="matter 4711")

    def do_erase(self, parts: Installation) -> None:
        """Somebody asks to be forgotten, and another custodian approves."""
        if not self.sessions:
            return
        session = self.dice.rng.choice(self.sessions).session_id.hex()
        with contextlib.closing(open_control(self.settings)) as control:
            erasures = erasures_of(parts, control)
            erasure = erasures.request((session,), None, by="one", reason="asked to be forgotten")
            self.truth.asked[erasure.replace("-", "")] = session  # entries name it without dashes
            erasures.approve(erasure, by="two")

    # Producers

    def do_produce(self, parts: Installation) -> None:
        """A producer records part of a conversation, and sends what it can; sometimes it dies and another one follows."""
        if self.producers and self.dice.falls("kill"):
            self.say("the producer dies")
            self.producers.pop().spool.forget()
        if not self.producers:
            self.producers.append(self._producer(parts))
        mine = self.producers[-1]
        mine.made.clock_us = max(mine.made.clock_us, self.now_us())
        session = self._session(mine.made)
        entries = list(itertools.islice(conversation(mine.made, chunks=1, session=session), self.dice.rng.randint(2, 8)))
        facts = self.truth.sent(entries)
        if mine.spool.append(entries):
            for fact in facts:
                fact.acknowledged = True
        vars(mine.sender)["_log"] = parts.log
        for _ in range(3):
            mine.sender.step()

    def _producer(self, parts: Installation) -> Recording:
        self._made += 1
        made = Producer(seed=self.seed * 1000 + self._made, partitions=2, clock_us=self.now_us())
        root = self.settings.data / "spool"
        about: dict[str, Any] = {"log_id": parts.log.log_id, "partitions": 2, "bytes_max": 1 << 20}
        spool = create_spool(root, made.producer_id, **about)
        sender = Sender(parts.log, spool, adopt=lambda: adopt_spools(root, **about), progress=lambda: None, refused=lambda *_: None)
        return Recording(made, spool, sender)

    def _session(self, made: Producer) -> Any:
        """A new session, or one that goes on."""
        rng = self.dice.rng
        if self.sessions and rng.random() < 0.3:
            return rng.choice(self.sessions)
        session = replace(made.session(tenant=rng.choice(self._tenants)), retention_class=rng.choice(self._classes))
        self.sessions.append(session)
        return session

    # The run

    def run(self) -> None:
        """Some things happen at random; then nothing fails any more, and all has to come right."""
        rng = self.dice.rng
        self.act("produce")
        for _ in range(_ACTS):
            names = ("produce", "index", "tier", "retention", "merge", "compact", "hold", "erase", "erasures", "checkpoint", "rebuild")
            self.act(rng.choices(names, (5, 4, 3, 3, 1, 1, 2, 1, 1, 1, 1))[0])
            self.sleep(rng.choice((60, 3600, 30_000, 90_000)))
            if self.dice.falls("clock jump"):
                self._skew_us = rng.choice((-1, 0, 1)) * 24 * _HOUR_US
                self.say("the clock jumps")
        self.settle()

    def settle(self) -> None:
        """Without a fault any more everything runs to its end, and is held against the books."""
        self.dice.calm, self._skew_us = True, 0
        self.sleep(2 * 24 * 3600 + 7200)
        for _ in range(len(self.producers) + 1):
            self.act("produce")
        self.act("index")
        self.sleep(26 * 3600)
        for name in ("merge", "tier", "retention", "erasures", "compact", "checkpoint", "verify"):
            self.act(name)
        rows = self.look()
        self.truth.check_end(rows, self.now_us())
        with self.process("look") as process:
            catalog = process.parts.catalog
            live = {segment.key for segment in catalog.snapshot().segments}
            if left := {key for key, _ in self.store.remains("events/")} ^ live:
                self.truth.violations.append(f"objects that no live segment is, or segments without one: {sorted(left)}")
            if gaps := catalog.gaps():
                self.truth.violations.append(f"gaps are reported and nothing was lost: {gaps[0]}")

    def look(self) -> dict[bytes, list[tuple[bytes, bool]]]:
        """Everything that SQL would answer from, now."""
        catalog = Catalog(self.settings.data / "hot" / "catalog.sqlite")
        try:
            snapshot, positions = catalog.snapshot(), catalog.positions()
        finally:
            catalog.close()
        names: list[str] = []
        with duck.connect(threads=1) as connection:
            for number, shard in enumerate(snapshot.shards):
                connection.execute(f"ATTACH '{shard.path}' AS s{number} (READ_ONLY)")
                names.append(f"s{number}")
            files = [str(self.settings.data / "cold" / segment.key) for segment in snapshot.segments]
            try:
                table = connection.execute(f"SELECT * FROM ({events_sql(names, files)})").to_arrow_table()
            except Exception as error:
                self.truth.violations.append(f"what the catalog lists cannot be read: {str(error).splitlines()[0]}")
                return {}
        rows: dict[bytes, list[tuple[bytes, bool]]] = {}
        for row in rows_to_datums(table):
            raw = framed(row.datum, row.fingerprint, REGISTRY)
            rows.setdefault(row.datum["event_id"], []).append((raw, row.datum["salt"] is not None))
        self.truth.check_rows(rows, self.now_us(), {at.partition: at.offset_next for at in positions})
        return rows

    @contextlib.contextmanager
    def driven(self) -> Iterator[None]:
        """Everything of this process goes by the world's clock, dice and steps, and in one thread."""
        random_bytes = random.Random(-self.seed).randbytes  # apart from the dice: how many of them are drawn says nothing
        with contextlib.ExitStack() as stack:
            if self.seed % _WHOLE_EACH:
                stack.enter_context(vocabulary.reduced())
            stack.enter_context(clock.driven_by(self.now_us))
            stack.enter_context(watched(self.step))
            for target, value in self._patches(random_bytes).items():
                stack.enter_context(mock.patch(target, value))
            yield

    def _patches(self, random_bytes: Callable[[int], bytes]) -> dict[str, Any]:
        return {
            "os.urandom": random_bytes,
            "random._urandom": random_bytes,
            "duckdb.connect": lent.connect,
            "store.ledger.ledger.ThreadPoolExecutor": Inline,
            "store.ledger.ledger.decode_entry": functools.cache(decode_entry),  # a function of bytes, as the next one is
            "store.cold._recoded": _remembered(cold._recoded),
            "store.indexer.Follower": InlineFollower,
            "store.fences.FileLock.take": self._take,
            "store.sealing.waiting": _at_once,
            "store.rebuild.waiting": _at_once,
            "lifecycle.retention.WAIT_S": 0.0,
            "lifecycle.erasure.WAIT_S": 0.0,
            "lifecycle.compaction.WAIT_S": 0.0,
            "ingest.sender._BACKOFF_S": 0.0,
            "ingest.sender._BACKOFF_S_MAX": 0.0,
        }

    def _take(self, path: Path, token: str) -> FileLock | None:
        lock = _TAKE(path, token)
        if lock is not None and self._stack:
            self._stack[-1].locks.append(lock)
        return lock


_TAKE = FileLock.take


def _remembered(recoded: Callable[..., Iterator[Recoded]]) -> Callable[..., Iterator[Recoded]]:
    """What it made of the same bytes before, which is what takes longest in reading a segment."""
    found: dict[bytes, list[Recoded]] = {}

    def again(data: bytes, registry: SchemaRegistry, place: str) -> Iterator[Recoded]:
        if data not in found:
            found[data] = list(recoded(data, registry, place))
        return iter(found[data])

    return again


def _at_once(path: Path, token: str) -> contextlib.AbstractContextManager[FileLock]:
    """Whoever holds it stands still below on the stack: there is nothing to wait for."""
    return waiting(path, token, timeout_s=0)


class _Rounds:
    """Rounds of a follower, each made when it is asked for."""

    def __init__(self, make: Callable[[], Round | None]) -> None:
        self.get = make

    def full(self) -> bool:
        """A round is never cut short by the clock."""
        return True

    def empty(self) -> bool:
        """Nothing is made ahead."""
        return True


class InlineFollower(Follower):
    """A follower without a thread: what its loop does is done when the indexer wants a round."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rounds: Any = _Rounds(self._next)

    def start(self) -> None:
        """Nothing runs by itself."""

    def _next(self) -> Round | None:
        active = self._active()
        return self._round(active) if active else None


def _policies(rng: random.Random) -> list[RetentionPolicy]:
    """Some rules that meet one another."""
    found = [
        RetentionPolicy(name="short", tenant="zeta", max_days=rng.choice((1, 2))),
        RetentionPolicy(name="keep", retention_class="long", min_days=rng.choice((2, 30))),
        RetentionPolicy(name="tokens", kind="token_chunk", max_days=rng.choice((1, 3))),
        RetentionPolicy(name="words", tenant="acme", content_days=rng.choice((1, 2))),
    ]
    return [policy for policy in found if rng.random() < 0.7]
