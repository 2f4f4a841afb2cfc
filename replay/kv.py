"""What the recorded calls of a KV connector tell: hit rates, why a lookup found nothing, and what is slow or grows."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median
from typing import Any

from replay.words import printable
from schemas.errors import UnknownSession

LOOKUP_P99_MS = 10.0
"""A lookup is made while the scheduler waits, so all requests wait for it: slower ones are flagged."""
GROWTH_BYTES, GROWTH_SHARE = 64 << 20, 0.10
"""Memory that grew by so much, and by this share, between the second and the last quarter of a recording is flagged."""
GROWTH_SAMPLES = 12
"""Fewer figures than this say nothing of growth; the first quarter is the engine warming up."""
HASH_BYTES = 8
"""Bytes of each block's hash on the tape."""


@dataclass(frozen=True, slots=True)
class Call:
    """One operation, or `calls` of them: a row of `kv_operations`. `ended` is when it came back."""

    ended: datetime
    operation: str
    role: str
    outcome: str
    duration_ms: float
    request: str | None = None
    generation_id: str | None = None
    asked: int | None = None
    matched: int | None = None
    local: int | None = None
    size: int | None = None
    calls: int = 1
    memory: int | None = None
    error: str = ""
    hashes: tuple[bytes, ...] = ()
    connector: str = ""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Call:
        """A row of the view `kv_operations`."""
        whole = row["block_hashes"] or b""
        hashes = tuple(whole[at : at + HASH_BYTES] for at in range(0, len(whole), HASH_BYTES))
        moved = (row["tokens_asked"], row["tokens_matched"], row["tokens_local"], row["bytes"], row["calls"], row["memory_bytes"])
        first = (
            row["recorded_at"],
            row["operation"],
            row["role"],
            row["outcome"],
            row["duration_ms"],
            row["request"],
            row["generation_id"],
        )
        return cls(*first, *moved, row["error"] or "", hashes, row["connector"])


@dataclass(frozen=True, slots=True)
class Looked:
    """What became of one request's lookup. `rate`: found tokens of those the engine lacked; None where no whole block was missing."""

    request: str
    generation_id: str | None
    tokens: int
    local: int
    matched: int
    rate: float | None
    duration_ms: float
    why: str


@dataclass(frozen=True, slots=True)
class Report:
    """All lookups that were asked about, and the engine's connector as a whole."""

    connector: str
    requests: list[Looked]
    rate: float | None
    lookup_p50_ms: float | None
    lookup_p99_ms: float | None
    saved_bytes: int
    save_rate: float | None
    loaded_bytes: int
    load_rate: float | None
    flags: list[str] = field(default_factory=list)


def report(calls: Sequence[Call], prompts: Mapping[str, Sequence[int]], only: Iterable[str] | None = None) -> Report:
    """Judge the calls of one engine. `prompts` are token ids by generation, `only` the generations to list.

    Raises:
        UnknownSession: no connector was recorded.
    """
    if not calls:
        hint = "record one: kv_connector_module_path = ingest.vllm.kv.connector, or engine.capture = on"
        raise UnknownSession("no call of a KV connector is on the tape", operation="kv", hint=hint)
    wanted = None if only is None else set(only)
    history = _History(calls, prompts)
    lookups = [call for call in calls if call.operation == "lookup"]
    listed = [_looked(call, history) for call in _last(lookups) if wanted is None or call.generation_id in wanted]
    took = sorted(call.duration_ms for call in lookups)
    saved, loaded = _moved(calls, "save"), _moved(calls, "load")
    return Report(
        *(calls[0].connector, listed, _rate(listed), _quantile(took, 0.5), _quantile(took, 0.99)),
        *(saved[0], saved[1], loaded[0], loaded[1]),
        list(_flags(calls, took)),
    )


def _last(lookups: Sequence[Call]) -> list[Call]:
    """A request may be looked up again, when it waited or was preempted: its first answer that was one, in the order of asking."""
    found: dict[str, Call] = {}
    for call in lookups:
        key = call.generation_id or call.request or ""
        if key not in found or found[key].outcome in ("pending", "hanging"):
            found[key] = call
    return list(found.values())


def _looked(call: Call, history: _History) -> Looked:
    asked, matched, local = call.asked or 0, call.matched or 0, call.local or 0
    rate = min(1.0, matched / asked) if call.hashes and asked >= history.block else None
    return Looked(call.request or "", call.generation_id, asked + local, local, matched, rate, call.duration_ms, history.why(call))


def _rate(listed: Sequence[Looked]) -> float | None:
    asked = sum(one.tokens - one.local for one in listed if one.rate is not None)
    return sum(one.matched for one in listed) / asked if asked else None


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _moved(calls: Sequence[Call], operation: str) -> tuple[int, float | None]:
    """Bytes offered, and bytes a second of the workers' time: only the scheduler knows what is loaded, only workers how long it takes."""
    told = [call for call in calls if call.operation == operation]
    size = sum(call.size or 0 for call in told)
    seconds = sum(call.duration_ms for call in told if call.role == "worker") / 1000
    return size, size / seconds if size and seconds else None


def _flags(calls: Sequence[Call], took: Sequence[float]) -> Iterable[str]:
    p99 = _quantile(took, 0.99)
    if p99 is not None and p99 > LOOKUP_P99_MS:
        yield f"lookups take {p99:.3g} ms at p99, over {LOOKUP_P99_MS:g} ms: the scheduler, and with it every request, waits for each"
    for call in calls:
        if call.outcome == "hanging":
            yield f"{call.operation} ({call.role}) of {call.request or 'a step'} had not come back after {call.duration_ms / 1000:.3g} s"
    failed = [call for call in calls if call.outcome in ("error", "failed")]
    for operation in dict.fromkeys((call.operation, call.role) for call in failed):
        those = [call for call in failed if (call.operation, call.role) == operation]
        error = printable(next((call.error for call in those if call.error), "blocks were not loaded"))
        yield f"{operation[0]} ({operation[1]}) failed {len(those)} time{'s' if len(those) > 1 else ''}: {error}"
    for role in dict.fromkeys(call.role for call in calls):
        figures = [call.memory for call in calls if call.role == role and call.memory]
        if (grown := growth(figures)) is not None:
            grew = f"{grown / (1 << 20):,.0f} MiB"
            yield f"the {role}'s process grew by {grew} while it was recorded: does the connector let go of what it holds?"


def growth(figures: Sequence[int]) -> int | None:
    """Bytes by which memory grew since the engine was warm; None where it did not, or too little is known."""
    quarter = len(figures) // 4
    if len(figures) < GROWTH_SAMPLES:
        return None
    before, after = median(figures[quarter : 2 * quarter]), median(figures[-quarter:])
    return int(after - before) if after - before > max(GROWTH_BYTES, GROWTH_SHARE * before) else None


class _History:
    """What an engine's connector had been asked and given before each moment."""

    def __init__(self, calls: Sequence[Call], prompts: Mapping[str, Sequence[int]]) -> None:
        self._prompts = prompts
        self._saves = sorted(
            (call for call in calls if call.operation == "save" and (call.size or call.error)), key=lambda call: call.ended
        )
        self._ends = [call.ended for call in self._saves]
        self._lookups = [call for call in calls if call.operation == "lookup"]
        self._firsts: dict[bytes, list[Call]] = {}
        self._texts: dict[tuple[int, ...], list[Call]] = {}
        lengths = [((call.asked or 0) + (call.local or 0)) // len(call.hashes) for call in self._lookups if call.hashes]
        self.block = min(lengths, default=16)
        for call in self._lookups:
            if call.hashes:
                self._firsts.setdefault(call.hashes[0], []).append(call)
            if text := self._text(call):
                self._texts.setdefault(text, []).append(call)

    def _text(self, call: Call) -> tuple[int, ...]:
        """The first block's tokens."""
        prompt = self._prompts.get(call.generation_id or "", ())
        return tuple(prompt[: self.block]) if len(prompt) >= self.block else ()

    def why(self, call: Call) -> str:
        """Why a lookup found nothing, or what is odd about what it found; empty where all is as it should be."""
        if call.outcome == "error":
            return f"the lookup failed: {printable(call.error)}"
        if call.outcome == "hanging":
            return "the lookup had not come back"
        if call.outcome == "pending":
            return "the connector did not know yet, and was not asked again"
        before = [other for other in self._firsts.get(call.hashes[0], ()) if other.ended < call.ended] if call.hashes else []
        salted = [
            other for other in self._texts.get(self._text(call), ()) if other.ended < call.ended and other.hashes[:1] != call.hashes[:1]
        ]
        if call.matched:
            if salted and not before:
                return f"found under another cache salt or adapter than {salted[0].request}'s: the connector does not tell these apart"
            return ""
        if not call.hashes:
            return f"shorter than a block of {self.block} tokens: nothing to look up"
        if (call.asked or 0) < self.block:
            return f"the engine's own cache had all whole blocks: {call.local} tokens"
        if before:
            return self._missed(call, before[-1])
        if salted:
            return f"the same tokens as {salted[0].request}, under other block hashes: another cache salt, adapter or hash seed"
        return "a new prompt: no request before shares its first block"

    def _missed(self, call: Call, before: Call) -> str:
        """Why blocks that an earlier request had were not found."""
        common = next(
            (i for i, (a, b) in enumerate(zip(call.hashes, before.hashes, strict=False)) if a != b),
            min(len(call.hashes), len(before.hashes)),
        )
        whose = f"{common} of {len(call.hashes)} blocks are {before.request}'s"
        saves = [save for save in self._saves if save.ended > before.ended]
        good = [save for save in saves if save.outcome == "ok"]
        if failed := [save for save in saves if save.outcome in ("error", "failed") and save.ended <= call.ended]:
            return f"{whose}, but saving failed: {printable(failed[-1].error)}"
        if not good:
            return f"{whose}, but the connector was never given them to save: is its role one that saves?"
        if bisect_left(self._ends, call.ended) == self._saves.index(good[0]):
            return f"{whose}, but their save had not ended when they were looked up"
        exact = "" if common == len(call.hashes) == len(before.hashes) else "; it may know whole prompts only"
        return f"{whose}, which were offered to be saved before: the store lost them or is another one, or it looks under other keys{exact}"
