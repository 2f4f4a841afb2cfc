"""Duplicates and gaps: what the numbers that producers gave their events say about a batch, whole arrays at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Judgement:
    """Places of records to drop; gaps as (place of the record that shows it, producer, first and last missing number);
    the new highest number of each producer that brought one."""

    duplicates: list[int] = field(default_factory=list)
    gaps: list[tuple[int, bytes, int, int]] = field(default_factory=list)
    marks: dict[bytes, int] = field(default_factory=dict)


def judge(producers: _Array, seqs: _Array, marks: Mapping[bytes, int]) -> Judgement:
    """Judge the records of one partition in offset order.

    A number at or below the highest seen of its producer is a duplicate. One that skips some leaves a gap: a producer
    sends in order, so what was skipped never comes. A producer begins with 0.

    Args:
        producers: each record's producer id as a big-endian 64-bit number.
        seqs: its `producer_seq`.
        marks: highest number seen before, by producer id.
    """
    judgement = Judgement()
    for producer, places in _by_producer(producers):
        key = int(producer).to_bytes(8, "big")
        mine = seqs[places]
        highest = np.maximum.accumulate(np.concatenate(([marks.get(key, -1)], mine)))
        before = highest[:-1]
        judgement.duplicates.extend(int(place) for place in places[mine <= before])
        for index in np.flatnonzero(mine > before + 1):
            judgement.gaps.append((int(places[index]), key, int(before[index]) + 1, int(mine[index]) - 1))
        if highest[-1] > marks.get(key, -1):
            judgement.marks[key] = int(highest[-1])
    judgement.duplicates.sort()
    return judgement


def _by_producer(producers: _Array) -> list[tuple[Any, _Array]]:
    """Each producer with the places of its records, in order."""
    if not len(producers):
        return []
    order = np.argsort(producers, kind="stable")
    cuts = np.flatnonzero(np.diff(producers[order])) + 1
    return [(producers[places[0]], places) for places in np.split(order, cuts)]
