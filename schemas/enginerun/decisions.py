"""What an engine decided in a step: who was in it with how many tokens, as differences to the step before, and its checksum."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from schemas.events import StepEntry

Place = tuple[bytes, int]
"""A sequence: its generation's id and its index."""

GONE = 0
"""Tokens of a sequence that was in the step before and is not in this one."""
PREEMPTED = -1
"""Tokens of a sequence that lost its blocks in this step."""
ANEW = -1
"""Index of an entry, under the id of the engine run, after which all that are in the step are listed, in their order."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One call of `schedule`: who computes how many tokens, in order; what those admitted had computed already; who was preempted."""

    numbers: tuple[int, ...]
    tokens: tuple[int, ...]
    computed: tuple[tuple[int, int], ...] = ()
    preempted: tuple[int, ...] = ()

    def checksum(self, finished: Iterable[int]) -> bytes:
        """Eight bytes over the decision and over who was finished by the step's result, in order."""
        computed = [value for pair in self.computed for value in pair]
        parts = (self.numbers, self.tokens, computed, self.preempted, tuple(finished))
        data = array("q", [value for part in parts for value in (len(part), *part)])
        return hashlib.blake2b(data.tobytes(), digest_size=8).digest()


def admitted(output: Any, numbers: Mapping[str, int]) -> list[tuple[int, int]]:
    """Requests with a number that a `SchedulerOutput` of vLLM admits, new or again, with the tokens that need no computing."""
    found = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
    cached = output.scheduled_cached_reqs
    if resumed := cached.resumed_req_ids:
        found += [pair for pair in zip(cached.req_ids, cached.num_computed_tokens, strict=True) if pair[0] in resumed]
    return [(numbers[name], tokens) for name, tokens in found if name in numbers]


def preempted(output: Any, numbers: Mapping[str, int]) -> list[int]:
    """Live requests that a `SchedulerOutput` of vLLM preempts, by number: one that a reset preempted may have been aborted since."""
    return sorted(numbers[name] for name in output.preempted_req_ids or () if name in numbers)


def decision_of(output: Any, numbers: Mapping[str, int]) -> Decision:
    """The decision in a `SchedulerOutput` of vLLM."""
    scheduled = output.num_scheduled_tokens
    rows = tuple(numbers[name] for name in scheduled)
    return Decision(rows, tuple(scheduled.values()), tuple(admitted(output, numbers)), tuple(preempted(output, numbers)))


class Differences:
    """Decisions as entries that say what changed, and back. One object per run and direction."""

    def __init__(self, engine_run: bytes) -> None:
        self._anew = StepEntry(generation_id=engine_run, index=ANEW, tokens=0)
        self._last: dict[int, int] = {}
        self._restart = False

    def restart(self) -> None:
        """The next decision follows none that is known: its entries list all that are in it."""
        self._last, self._restart = {}, True

    def entries(self, decision: Decision, place: Callable[[int], Place]) -> list[StepEntry]:
        """The entries of the next decision."""
        now = dict(zip(decision.numbers, decision.tokens, strict=True))
        out = set(decision.preempted)
        changed = {number: PREEMPTED if number in out else GONE for number in self._last if number not in now}
        changed |= dict.fromkeys(out - now.keys(), PREEMPTED)
        kept = [number for number in self._last if number in now]
        changed |= {number: tokens for number, tokens in now.items() if self._last.get(number) != tokens}
        anew = self._restart or [*kept, *(number for number in now if number not in self._last)] != list(now)
        self._restart = False
        if anew:
            changed = {**{number: tokens for number, tokens in changed.items() if number not in now}, **now}
        self._last = now
        entries = [StepEntry(generation_id=place(n)[0], index=place(n)[1], tokens=tokens) for n, tokens in changed.items()]
        return [self._anew, *entries] if anew else entries

    def rows(self, entries: Iterable[StepEntry], number: Callable[[Place], int]) -> dict[int, int]:
        """Who is in the step with how many tokens, in order, by the entries that follow those read before."""
        for entry in entries:
            if (entry.generation_id, entry.index) == (self._anew.generation_id, ANEW):
                self._last = {}
                continue
            at = number((entry.generation_id, entry.index))
            if entry.tokens > 0:
                self._last[at] = entry.tokens
            else:
                self._last.pop(at, None)
        return dict(self._last)
