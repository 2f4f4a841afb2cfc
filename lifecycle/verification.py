"""Verification: the ledger, its checkpoints, every object they vouch for, and every row behind the objects.

The ledger's own verifier (`store.ledger.verify`) holds objects against entries. This goes on from there: each segment's
rows are encoded again to the bytes that were in the log, whose Merkle root and running digests must be those that were
signed at tiering, continue one another from entry to entry, and agree with the digests that were signed at ingest. It
needs the object store, or a copy of it, and the public key; neither log nor index.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from lifecycle.selectors import id_text
from lifecycle.tiering import ENTRY_TYPE, REWRITTEN, says
from schemas.errors import CorruptStore, DataError
from schemas.events import Pair, VerificationFinished
from schemas.registry import SchemaRegistry
from schemas.sink import EventSink, platform_session
from store.catalog import Range
from store.cold import SegmentContent, read_content
from store.coverage import NONE_PLACED, Coverage, Placed, coverage_from_json, fold, from_parquet, place
from store.digest import DIGEST_START
from store.ledger.chain import KeyChain
from store.ledger.entry import CHECKPOINTS, ENTRIES, Entry, decode_entry, entry_number, is_checkpoint
from store.ledger.note import ModifiedNote, UnsignedNote, Verifier
from store.ledger.verify import Finding, Kind, Report, verify_ledger
from store.objects.base import ObjectStore
from store.objects.local import LocalStore

log = structlog.get_logger("tokentape.verification")

FINDINGS_MAX = 50
"""Findings that stand in the event of a run; the ledger and its objects can be asked again for the rest."""

_Where = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Verified:
    """A report and what was read again beyond it: `segments` and their `events`, and offsets of the log in `covered_offsets`."""

    ledger: Report
    segments: int = 0
    events: int = 0
    covered_offsets: int = 0
    digests: int = 0
    """Running digests of signed checkpoints that were met inside the segments, and held."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, the ledger's first."""
        return self.ledger.findings

    @property
    def exit_code(self) -> int:
        """As `Report.exit_code`."""
        return self.ledger.exit_code

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = {name: getattr(self, name) for name in ("segments", "events", "covered_offsets", "digests")}
        return own | self.ledger.to_dict()


@dataclass(frozen=True, slots=True)
class Scope:
    """Which objects and rows are read again: those of days from `first` to `last`, and of a session.

    Entries and checkpoints are always all checked: they are a chain.
    """

    first: str = ""
    last: str = "9999-12-31"
    session: bytes | None = None

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return self == Scope()

    def takes(self, entry: Entry) -> bool:
        """Whether an entry's day is among them; entries without one always are."""
        return self.first <= str(entry.body.get("day", self.first)) <= self.last

    def keeps(self, item: Mapping[str, Any]) -> bool:
        """Whether a segment, as its entry tells it, may hold the session."""
        session = self.session.hex() if self.session is not None else None
        return session is None or str(item["session_min"]) <= session <= str(item["session_max"])

    def leaves_out(self, entry: Entry, key: str) -> bool:
        """Whether an object that an entry names need not be read."""
        if not self.takes(entry):
            return True
        items = entry.body.get("segments")
        named = [item for item in items if isinstance(item, dict) and item.get("key") == key] if isinstance(items, list) else []
        return any(not self.keeps(item) for item in named)

    def __str__(self) -> str:
        days = "" if (self.first, self.last) == (Scope().first, Scope().last) else f"days {self.first or '…'} to {self.last}"
        session = f"session {id_text(self.session.hex())}" if self.session is not None else ""
        return ", ".join(filter(None, (days, session))) or "everything"


EVERYTHING = Scope()


@dataclass(frozen=True)
class Verification:
    """What is verified: a store or a copy of it, the ledger's public key, and the schemas that are known."""

    objects: ObjectStore
    verifier: Verifier | KeyChain
    registry: SchemaRegistry
    anchors: tuple[bytes, ...] = ()
    scope: Scope = EVERYTHING

    def run(self, sink: EventSink | None = None) -> dict[str, Any]:
        """Verify everything, record what came of it, and say so as a flat dict.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        began = time.perf_counter_ns()
        found = self.report()
        took = (time.perf_counter_ns() - began) // 1000
        if sink is not None:
            sink.record(platform_session("lifecycle", "job:verify"), _event(found, self.scope, took))
        if found.exit_code:
            log.error("verify.not_good", outcome=outcome(found), findings=len(found.findings), first=_line(found.findings[0]))
        counts = {"entries": found.ledger.entries, "segments": found.segments, "events": found.events}
        return {
            "outcome": outcome(found),
            **counts,
            "findings": [_line(finding) for finding in found.findings],
            "seconds": round(took / 1e6, 3),
        }

    def report(self, *, deep: bool = True, progress: Callable[[str], None] | None = None) -> Verified:
        """Verify the ledger and its objects, and with `deep` every row; `progress` is called with the key of each segment.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        report = verify_ledger(self.objects, self.verifier, anchors=self.anchors, leaves_out=self.scope.leaves_out)
        if not report.entries and any(finding.key.startswith("events/") for finding in report.findings):
            gone = Finding("missing", ENTRIES, "there are segments and not one entry")
            report = replace(report, findings=(*report.findings, gone))
        if not deep:
            return Verified(report)
        run = _Deep(self, report.chain, frozenset(finding.key for finding in report.findings), progress or (lambda key: None))
        run.check()
        whole = replace(report, findings=(*report.findings, *run.findings))
        return Verified(whole, run.segments, run.events, run.offsets, run.digests)


def outcome(found: Verified) -> str:
    """One word: good, modified, missing or unsigned."""
    return {0: "good", 10: "modified", 11: "missing", 12: "unsigned"}[found.exit_code]


def _event(found: Verified, scope: Scope, took_us: int) -> VerificationFinished:
    findings = [Pair(key=finding.kind, value=_line(finding)) for finding in found.findings[:FINDINGS_MAX]]
    return VerificationFinished(
        scope=str(scope),
        outcome=outcome(found),
        entries=found.ledger.entries,
        segments=found.segments,
        events=found.events,
        findings=findings,
        duration_us=took_us,
    )


def _line(finding: Finding) -> str:
    return f"{finding.kind} {finding.key}: {finding.detail}"


@dataclass
class _Deep:
    """One pass over the rows behind the entries, in the ledger's order; `faulty` are keys that stand in the report already."""

    of: Verification
    chain: KeyChain
    faulty: frozenset[str]
    progress: Callable[[str], None]
    findings: list[Finding] = field(default_factory=list)
    segments: int = 0
    events: int = 0
    offsets: int = 0
    digests: int = 0
    spans: dict[_Where, list[tuple[Range, str]]] = field(default_factory=lambda: defaultdict(list))
    dropped: dict[tuple[str, int, int], bytes] = field(default_factory=dict)
    """SHA-256 of records without a row, by log, partition and offset: a requeued one has a row in a later entry."""

    def check(self) -> None:
        """Check each entry's segments and coverage, then how the spans of all entries fit together."""
        signed = self._signed_digests()
        for entry in self._entries():
            if entry.type == ENTRY_TYPE:
                self._check_entry(entry, signed)
            elif entry.type == REWRITTEN:
                self._check_rewritten(entry)
        for where, spans in sorted(self.spans.items()):
            self._check_chain(where, spans)

    def _add(self, kind: Kind, key: str, detail: str) -> None:
        self.findings.append(Finding(kind, key, detail))

    def _entries(self) -> Iterator[Entry]:
        """Entries that the ledger's verifier found good."""
        numbers = [number for info in self.of.objects.list(ENTRIES) if (number := entry_number(info.key)) is not None]
        for number in sorted(numbers):
            try:
                entry = self.of.objects.get(f"{ENTRIES}{number:012d}.json")
                decoded = decode_entry(number, entry)
                self.chain.check(decoded, self.chain.name)
            except (KeyError, ModifiedNote, UnsignedNote, CorruptStore):
                continue
            if decoded.key not in self.faulty:
                yield decoded

    def _signed_digests(self) -> dict[_Where, dict[int, tuple[bytes, str]]]:
        """Running digests of all good checkpoints: by partition and offset, with the checkpoint's key."""
        found: dict[_Where, dict[int, tuple[bytes, str]]] = defaultdict(dict)
        for info in self.of.objects.list(CHECKPOINTS):
            if not is_checkpoint(info.key) or info.key in self.faulty:
                continue
            try:
                checkpoint = self.chain.read_checkpoint(info.key, self.of.objects.get(info.key), self.chain.name)
            except (KeyError, ModifiedNote, UnsignedNote, CorruptStore):
                continue
            for at in checkpoint.digests:
                found[at.log_id, at.partition].setdefault(at.offset_next, (at.sha256, info.key))
        return found

    # One entry

    def _check_entry(self, entry: Entry, signed: Mapping[_Where, Mapping[int, tuple[bytes, str]]]) -> None:
        try:
            items = [dict(item) for item in entry.body["segments"]]
            spans = [coverage_from_json(item) for item in entry.body["coverage"]]
            manifest = str(entry.body["coverage_key"])
            read = [item for item in items if self.of.scope.takes(entry) and self.of.scope.keeps(item)]
            contents = {str(item["key"]): self._content(entry, item) for item in read}
            keys = {str(item["key"]) for item in items}
        except (KeyError, TypeError, ValueError) as error:
            self._add("modified", entry.key, f"does not say what a segments entry says: {error!r}")
            return
        for item in spans:
            self.spans[item.span.log_id, item.span.partition].append((item.span, entry.key))
        if manifest in self.faulty or not self.of.scope.takes(entry):
            return
        try:
            covered = from_parquet(self.of.objects.get(manifest), spans, place=manifest)
        except (KeyError, CorruptStore) as error:
            self._add("modified", manifest, error.fault if isinstance(error, CorruptStore) else "removed while it was being read")
            return
        self._check_coverage(entry, covered, keys, contents, signed)

    def _check_rewritten(self, entry: Entry) -> None:
        """Segments that came in the place of others hold what is entered; where only content went, the leaves are the same."""
        try:
            items = [dict(item) for item in entry.body["segments"]]
            for item in items:
                self._content(entry, item)
            replaced = [dict(item) for item in entry.body["replaced"]]
            rows, before = sum(item["rows"] for item in items), sum(item["rows"] for item in replaced)
            same = len(replaced) == len(items) == 1 and entry.body["events"] == 0
            if before - rows != entry.body["events"] or {item["key"] for item in replaced} != set(entry.body["erased"]):
                self._add("modified", entry.key, "its counts of events do not add up")
            elif same and items[0]["root"] != replaced[0]["root"]:
                self._add("modified", entry.key, "no event went, and the leaves are not the same")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._add("modified", entry.key, f"does not say what a rewritten entry says: {error!r}")

    def _content(self, entry: Entry, item: Mapping[str, Any]) -> SegmentContent | None:
        """A segment read again; None where it is at fault, which then stands in the report."""
        key = str(item["key"])
        if key in self.faulty or not self._check_schemas(item):
            return None
        self.progress(key)
        try:
            content = read_content(self.of.objects.get(key), self.of.registry, sha256=str(item["sha256"]), place=key)
        except KeyError:
            return None  # erased with proof, or missing: in the report already
        except DataError as error:
            self._add("modified", key, error.fault)
            return None
        self.segments += 1
        self.events += content.rows
        if content.root.hex() != item["root"] or content.rows != item["rows"]:
            self._add("modified", key, f"its rows are not those that entry {entry.sequence} says (Merkle root differs)")
            return None
        return content

    def _check_schemas(self, item: Mapping[str, Any]) -> bool:
        """Whether the schemas that explain a segment are those that were stored with it."""
        good = True
        for key in item["schemas"]:
            fingerprint = bytes.fromhex(str(key).removeprefix("schemas/").removesuffix(".avsc"))
            try:
                stored = self.of.objects.get(key)
                if key not in self.faulty and says(stored, self.of.registry.get(fingerprint)):
                    continue
                fault = "" if key in self.faulty else "is another schema than the one that this program knows by its fingerprint"
            except KeyError:
                fault = ""
            except DataError as error:
                fault = error.fault
            good = False
            if fault:
                self._add("modified", str(key), fault)
        return good

    def _check_coverage(
        self,
        entry: Entry,
        covered: Sequence[Coverage],
        named_by_entry: set[str],
        contents: Mapping[str, SegmentContent | None],
        signed: Mapping[_Where, Mapping[int, tuple[bytes, str]]],
    ) -> None:
        known = {key: content for key, content in contents.items() if content is not None}
        try:
            placed = place(list(known.values()))
        except CorruptStore as error:
            self._add("modified", entry.key, error.fault)
            return
        keys = list(known)
        for item in covered:
            where = (item.span.log_id, item.span.partition)
            mine = placed.get(where, NONE_PLACED).between(item.span)
            named = {run.place for run in item.runs if run.sha256 is None}
            if strangers := named - named_by_entry:
                self._add("modified", entry.key, f"its coverage names {min(strangers)}, which the entry does not")
            elif named <= known.keys():
                self._check_span(entry, item, mine, keys, signed.get(where, {}))
        inside = sum(len(placed.get((c.span.log_id, c.span.partition), NONE_PLACED).between(c.span).offsets) for c in covered)
        if inside != sum(content.rows for content in known.values()):
            self._add("modified", entry.key, "its segments hold rows that its coverage does not list")

    def _check_span(self, entry: Entry, item: Coverage, mine: Placed, keys: Sequence[str], signed: Mapping[int, tuple[bytes, str]]) -> None:
        """The rows are where the coverage says, and give the digests that were signed."""
        span = item.span
        where = f"partition {span.partition}, offsets {span.offset_first} to {span.offset_next - 1}"
        self.offsets += span.offset_next - span.offset_first
        if not _as_listed(item, mine, keys):
            self._add("modified", entry.key, f"{where}: the rows are not where the coverage says")
            return
        lost = {run.offset_first: run.sha256 for run in item.runs if run.sha256 is not None}
        self.dropped.update({(span.log_id, span.partition, offset): sha256 for offset, sha256 in lost.items()})
        if span.digest_first is None:
            self._check_requeued(entry, span, mine)
            return
        at = {offset: b"" for offset in signed if span.offset_first < offset < span.offset_next}
        running = fold(span, mine, lost, at)
        if running != span.digest_next:
            self._add("modified", entry.key, f"{where}: the rows do not give the digest that was taken at ingest")
            return
        ends = {**at, span.offset_first: span.digest_first, span.offset_next: span.digest_next}
        for offset, digest in ends.items():
            if offset in signed and signed[offset][0] != digest:
                self._add("modified", signed[offset][1], f"its digest of partition {span.partition} up to {offset} is not that of the rows")
        self.digests += sum(offset in signed and signed[offset][0] == digest for offset, digest in ends.items())

    def _check_requeued(self, entry: Entry, span: Range, mine: Placed) -> None:
        """A record that had no row at first: its bytes must be those that were put into quarantine."""
        for offset, sha256 in zip(mine.offsets.tolist(), mine.hashes, strict=True):
            before = self.dropped.get((span.log_id, span.partition, offset))
            if before is not None and before != sha256.tobytes():
                detail = f"partition {span.partition}, offset {offset}: not the record that was in quarantine"
                self._add("modified", entry.key, detail)

    # All entries together

    def _check_chain(self, where: _Where, spans: Sequence[tuple[Range, str]]) -> None:
        """The spans of one partition follow one another without gap or overlap, each from the digest where the last ended.

        A gap is no finding of its own where entries are at fault themselves: what they cover is not known then.
        """
        explained = any(key.startswith(ENTRIES) for key in self.faulty)
        log_id, partition = where
        chained = sorted((item for item in spans if item[0].digest_first is not None), key=lambda item: item[0].offset_first)
        expected, digest = 0, DIGEST_START
        for span, key in chained:
            if span.offset_first > expected and explained:
                pass
            elif span.offset_first > expected:
                detail = f"offsets {expected} to {span.offset_first - 1} of partition {partition} of log {log_id} are in no entry"
                self._add("missing", key, detail)
            elif span.offset_first < expected:
                self._add("modified", key, f"offset {span.offset_first} of partition {partition} is in an earlier entry as well")
            elif span.digest_first != digest:
                self._add("modified", key, f"partition {partition}: does not begin with the digest where offset {expected - 1} ended")
            expected, digest = span.offset_next, span.digest_next or b""


def _as_listed(item: Coverage, mine: Placed, keys: Sequence[str]) -> bool:
    """Whether the rows of a span are exactly those of its runs."""
    done = 0
    for run in item.runs:
        if run.sha256 is not None:
            continue
        part = slice(done, done + run.count)
        offsets = mine.offsets[part]
        whole = len(offsets) == run.count and offsets[0] == run.offset_first and offsets[-1] == run.offset_first + run.count - 1
        if not whole or (mine.places[part] != keys.index(run.place)).any():
            return False
        done += run.count
    return done == len(mine.offsets)


class StoreCopy(LocalStore):
    """A copy of an object store in a folder, which is only read: nothing is made in it, so it may be write-protected."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
