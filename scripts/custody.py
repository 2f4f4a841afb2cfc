"""A year of custody in minutes: policies, a hold, an erasure, a new key, a restore, and two verifiers that agree in the end.

    make custody [DEPLOYMENT=embedded|distributed] [DAYS=365]

Everything is the program's own, but the clock: `schemas.clock` is driven through the days. `distributed` keeps the cold tier
and the ledger in a real MinIO whose bucket has object lock; the log is the embedded one, because Kafka has a clock of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import structlog
from pydantic import SecretStr

from lifecycle.backup import Backup
from lifecycle.holds import Holds
from lifecycle.proving import Prover
from lifecycle.restore import restore
from lifecycle.scheduler import find
from lifecycle.selectors import Selector
from schemas import clock, events
from schemas.errors import TokentapeError
from schemas.settings import ColdSettings, LogSettings, RetentionPolicy, RetentionSettings, Settings, WitnessSettings
from schemas.sink import SessionContext, new_id
from scripts.native import tools
from scripts.native.processes import ServiceError
from scripts.services import Services
from store.control import ControlLog, open_control
from store.ledger.rotation import rotate
from store.sql import query
from tokentape import __version__
from tokentape.installation import Installation
from tokentape.jobs import all_jobs, erasures_of, retention_of, tiering_of, verification

DAY = dt.timedelta(days=1)

PROVEN = 8
"""Events whose proofs are handed to the verifier in Go."""

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Year:
    """A run through `days` days; ages of the policies shrink with them, so that a short run sees all that a year does."""

    settings: Settings
    days: int
    say: Callable[[str], None]
    now: dt.datetime = field(default_factory=lambda: clock.now().replace(hour=0, minute=0, second=0, microsecond=0))
    chance: random.Random = field(default_factory=lambda: random.Random(2026))
    sessions: list[SessionContext] = field(default_factory=list)
    sums: Counter[str] = field(default_factory=Counter)
    held: str = ""
    forgotten: str = ""
    first_checkpoint: bytes = b""
    restored: str = ""

    @cached_property
    def installation(self) -> Installation:
        """The installation; a new one after a restore."""
        return Installation(self.settings, source="lifecycle")

    def close(self) -> None:
        """End the installation and what was opened of it."""
        self.__dict__.pop("control", None)
        if (installation := self.__dict__.pop("installation", None)) is not None:  # a restore that fails leaves none
            installation.close()

    def run(self) -> dict[str, bool]:
        """Live through it; what must hold in the end, and whether it does."""
        start, left = self.now, list(CHAPTERS)
        self.say(_row(COLUMNS))
        with clock.driven_by(lambda: int(self.now.timestamp() * 1e6)):
            for day in range(self.days):
                self._day()
                while left and day >= left[0][0] * self.days:
                    _, name, chapter = left.pop(0)
                    self.say(f"{start + day * DAY:%Y-%m-%d}  {name}: {chapter(self)}")
                if (day + 1) % max(1, self.days // 12) == 0:
                    self._report()
            return self._end()

    # A day

    def _day(self) -> None:
        """Some conversations in the working hours, and the night's jobs on the next morning."""
        recorder, began = self.installation.recorder, self.now
        for number, (tenant, retention_class) in enumerate((t, c) for t in ("acme", "zeta") for c in ("standard", "regulated")):
            self.now = began + dt.timedelta(hours=9 + 2 * number)
            session = SessionContext(new_id(), tenant, "gateway", f"person-{self.chance.randrange(50)}", retention_class)
            self.sessions.append(session)
            for payload in conversation(self.chance):
                recorder.record(session, payload)
                self.sums["recorded"] += 1
            recorder.flush(60)
        self.installation.freshen()
        self.now = began + DAY + dt.timedelta(hours=1)
        for name in ("tier", "retention", "erasures", "checkpoint", "witness", *(("compact", "merge") if self.now.day == 1 else ())):
            done = find(all_jobs(self.installation), name).work(False)
            if name == "retention":
                self.sums.update({"gone": done["events"], "content gone": done["contents"], "bytes gone": done["bytes"]})
        if not self.first_checkpoint:
            newest = self.installation.ledger.latest_checkpoint()
            self.first_checkpoint = newest.data if newest is not None else b""
        self.now = began + DAY

    def _report(self) -> None:
        segments = self.installation.catalog.snapshot().segments
        held = len(Holds(tiering_of(self.installation), self.control).standing())
        cells = (f"{self.now:%Y-%m-%d}", self.sums["recorded"], sum(s.rows for s in segments), self.sums["gone"], self.sums["content gone"])
        self.say(_row((*cells, held, len(segments), sum(s.bytes for s in segments), self.installation.ledger.head())))

    @cached_property
    def control(self) -> ControlLog:
        """Where reasons and subjects stand."""
        control = open_control(self.installation.settings)
        self.installation.closing(control.close)
        return control

    # What happens

    def hold(self) -> str:
        """A court asks for a session."""
        self.held = self.sessions[-4 * max(1, self.days // 40)].session_id.hex()
        done = Holds(tiering_of(self.installation), self.control).place(Selector(sessions=(self.held,)), by="ada", reason="matter 4711")
        return f"session {self.held[:8]}, {done['events']} events, ledger entry {done['ledger_entry']}"

    def restore(self) -> str:
        """The machine is lost: its data directory comes back from the backup, beside the bucket as it is, and life goes on in it."""
        backup = self.settings.data.parent / "backup"
        self.installation.recorder.flush(60)
        Backup(self.settings, backup, __version__, with_keys=True).run()
        self.close()
        shutil.rmtree(self.settings.data)
        done = restore(self.settings, backup, __version__)
        done.check()
        self.restored = done.ledger_root
        found = f"{done.ledger_size:,} ledger entries with the same root, {done.verified.events:,} events verified"
        return f"{len(done.manifest.items):,} files back in {done.seconds:.1f} s, {found}"

    def release(self) -> str:
        """The matter is settled: what was kept beyond its time goes with the next run."""
        kept = self._rows(self.held)
        holds = Holds(tiering_of(self.installation), self.control)
        holds.release(holds.standing()[0]["hold"], by="ada", reason="settled")
        self.sums["kept by the hold"] = kept
        return f"{kept} events were kept until now"

    def erase(self) -> str:
        """A person asks to be forgotten; two custodians agree."""
        session = self.sessions[-2]
        self.forgotten = session.session_id.hex()
        erasures = erasures_of(self.installation, self.control)
        asked = erasures.request((self.forgotten,), None, by="ada", reason="asked to be forgotten")
        done = erasures.approve(asked, by="bob")
        return f"session {self.forgotten[:8]}, content of {done['contents']} events; {'; '.join(done['pending']) or 'nothing is pending'}"

    def rotate(self) -> str:
        """The ledger's key is handed over to a new one; who trusts the first follows."""
        entry = rotate(self.installation.settings, self.installation.objects)
        return f"ledger entry {entry.sequence}, signed by the old key, names the new one"

    def _rows(self, session: str, where: str = "true") -> int:
        sql = f"SELECT count(*) AS n FROM events WHERE lower(hex(session_id)) = '{session}' AND {where}"
        return int(query(self.installation.settings, sql).table.column("n")[0].as_py())

    # The end

    def _end(self) -> dict[str, bool]:
        installation = self.installation
        installation.recorder.flush(60)
        for name in ("erasures", "checkpoint"):
            find(all_jobs(installation), name).work(False)
        due = [item for item in retention_of(installation).preview() if item.anything]
        live = {segment.key for segment in installation.catalog.snapshot().segments}
        states = [item["state"] for item in erasures_of(installation, self.control).everything()]
        found = verification(installation).report()
        self.say(
            f"\nverify: {found.ledger.entries:,} entries, {found.ledger.checkpoints:,} checkpoints, {found.events:,} events read again"
        )
        good, refused = self._go()
        self.say(f"Go's verifier: {good} of {PROVEN + 1} proofs are good, and {refused} of {PROVEN + 1} with one byte changed are refused")
        return {
            "nothing is left that is due": not due,
            "what was held stayed until it was released": self.sums["kept by the hold"] > 0,
            "and went then": self._rows(self.held) == 0,
            "the person is forgotten, everywhere": states == ["finished"] and not self._rows(self.forgotten, "salt IS NOT NULL"),
            "the store holds the live segments and nothing else": {key for key, _ in installation.objects.remains("events/")} == live,
            "what was lost came back from the backup": bool(self.restored),
            "verify finds nothing": found.exit_code == 0,
            "Go finds the same": (good, refused) == (PROVEN + 1, PROVEN + 1),
        }

    def _go(self) -> tuple[int, int]:
        """How many proofs the independent verifier takes, and how many it refuses with one byte of them changed."""
        installation = self.installation
        prover = Prover(installation.reader, installation.objects, installation.ledger, installation.registry)
        everything = query(installation.settings, "SELECT lower(hex(event_id)) AS id FROM events ORDER BY hash(event_id)").table
        proofs = []
        for event_id in map(bytes.fromhex, everything.column("id").to_pylist()):
            with contextlib.suppress(TokentapeError):  # the last days are hot: they are not in the ledger yet
                proofs.append(prover.event(event_id).to_json())
            if len(proofs) == PROVEN:
                break
        proofs.append(prover.consistency(self.first_checkpoint).to_json())
        with tempfile.TemporaryDirectory() as folder:
            program = tools.go_verifier(Path(folder), self.say)
            checked = [_checked(program, Path(folder), str(installation.ledger.verifier), proof) for proof in proofs]
            forged = [_checked(program, Path(folder), str(installation.ledger.verifier), _forged(proof)) for proof in proofs]
        return sum(checked), forged.count(False)


CHAPTERS: list[tuple[float, str, Callable[[Year], str]]] = [
    (0.10, "hold", Year.hold),
    (0.30, "erasure", Year.erase),
    (0.50, "key rotation", Year.rotate),
    (0.60, "restore", Year.restore),
    (0.75, "release", Year.release),
]
"""What happens when this share of the year has passed."""

COLUMNS = ("day", "recorded", "cold rows", "gone", "content gone", "holds", "segments", "bytes", "ledger")


def _row(cells: Sequence[object]) -> str:
    return "  ".join(f"{cell:>12,}" if isinstance(cell, int) else f"{cell!s:>12}" for cell in cells)


def conversation(chance: random.Random) -> Iterator[events.Payload]:
    """What is recorded of one question and its answer."""
    generation, words = chance.randbytes(16), " ".join(chance.choice(("why", "is", "the", "order", "late")) for _ in range(30))
    yield events.SessionOpened(client="custody")
    content = events.RequestContent(messages=[events.Message(message_id=chance.randbytes(16), role="user", body=words)])
    yield events.RequestSubmitted(generation_id=generation, endpoint="/v1/chat/completions", model="tiny", stream=True, content=content)
    yield events.GenerationStarted(generation_id=generation, authoritative="gateway", status=200)
    text = events.ChunkContent(token_ids=[chance.randrange(32_000) for _ in range(8)], text=words)
    yield events.TokenChunk(generation_id=generation, index=0, position=0, offsets_us=list(range(8)), content=text)
    yield events.GenerationFinished(generation_id=generation, sequences=1, tokens_recorded=8, offset_us=9)
    yield events.SessionClosed(reason="done")


def settings_of(data: Path, cold: ColdSettings, days: int) -> Settings:
    """Policies whose ages are those of a year, shrunk to so many days."""

    def share(age: float) -> float:
        return max(1.0, round(age * days / 365))

    ages: dict[str, Any] = {"min_days": share(120), "content_days": share(150), "max_days": share(180)}
    policies = [
        RetentionPolicy(name="standard", retention_class="standard", max_days=share(90)),
        RetentionPolicy(name="regulated", retention_class="regulated", lock="governance", **ages),
        RetentionPolicy(name="words-of-acme", tenant="acme", retention_class="standard", content_days=share(30)),
        RetentionPolicy(name="platform", tenant=events.PLATFORM_TENANT, max_days=share(60)),
    ]
    return Settings(
        data=data,
        log=LogSettings(partitions=2, retention_days=share(14)),
        cold=cold,
        retention=RetentionSettings(policies=policies),
        witness=WitnessSettings(kind="folder", folder=data.parent / "witness"),
    )


def _checked(program: Path, folder: Path, key: str, document: dict[str, Any]) -> bool:
    """What Go says of a proof."""
    (folder / "key.pub").write_text(f"{key}\n")
    (folder / "proof.json").write_text(json.dumps(document))
    said = subprocess.run([program, folder / "key.pub", folder / "proof.json"], capture_output=True, text=True, check=False)
    return said.returncode == 0


def _forged(proof: dict[str, Any]) -> dict[str, Any]:
    """The proof with another signature at its end."""
    name = "checkpoint" if "checkpoint" in proof else "new"
    text = proof[name].rstrip("\n")
    place = len(text) - 12
    return {**proof, name: text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :] + "\n"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 when something does not hold or cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deployment", choices=("embedded", "distributed"), default="distributed")
    parser.add_argument("--days", type=int, default=365)
    given = parser.parse_args(argv)
    os.chdir(ROOT)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="custody-") as folder, contextlib.ExitStack() as stack:
            cold = _cold(given.deployment, Path(folder), stack)
            with contextlib.closing(Year(settings_of(Path(folder) / "data", cold, given.days), given.days, _say)) as year:
                holds = year.run()
    except (ServiceError, TokentapeError) as error:
        print(f"custody: {error}", file=sys.stderr)
        return 1
    _say("")
    for what, so in holds.items():
        _say(f"{'yes' if so else 'NO':>5}  {what}")
    _say(f"\n{given.days} days in {time.monotonic() - began:.0f} s")
    return int(not all(holds.values()))


def _say(text: str) -> None:
    print(text, flush=True)


def _cold(deployment: str, folder: Path, stack: contextlib.ExitStack) -> ColdSettings:
    """Where the cold tier is: a folder, or a bucket with object lock in a MinIO of this run's own."""
    if deployment == "embedded":
        return ColdSettings()
    services = Services(folder / "services", say=_say, tied=True)
    stack.callback(services.down)
    address = services.up(["minio"])["minio"]
    secret = SecretStr(address["secret_key"])
    return ColdSettings(kind="minio", endpoint=address["endpoint"], bucket="custody", access_key=address["access_key"], secret_key=secret)


if __name__ == "__main__":
    raise SystemExit(main())
