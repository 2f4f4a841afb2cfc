"""A drive beside its record: times at p50 and p99, throughput, errors, and the ratio of the two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from replay.drive.arrivals import Past
from replay.drive.client import Driven
from replay.drive.driver import Driving
from replay.words import count, duration


class Measure(NamedTuple):
    """Percentiles of one time in µs; None where nothing was measured."""

    p50: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Iterable[int | None]) -> Measure:
        """The percentiles of those values that are known."""
        known = [value for value in values if value is not None]
        return cls(*(float(value) for value in np.percentile(known, (50, 99)))) if known else cls(None, None)


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the report. Rates are over the seconds from the first request to the last end."""

    requests: int
    failed: int
    tokens: int
    seconds: float | None
    first_token: Measure
    between_tokens: Measure
    whole: Measure

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens answered per second."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def requests_per_s(self) -> float | None:
        """Requests sent per second."""
        return self.requests / self.seconds if self.seconds else None


@dataclass(frozen=True, slots=True)
class Report:
    """What a drive found; `record` is None where the past is not known (a trace)."""

    driven: Side
    record: Side | None
    errors: dict[str, int]
    lateness: Measure
    planned: int
    stopped: bool

    def document(self) -> dict[str, Any]:
        """The report as JSON types; times in milliseconds."""
        return {
            "driven": _document(self.driven),
            "record": _document(self.record) if self.record else None,
            "ratio": {name: _ratio(get, self) for name, (get, _) in ROWS.items()},
            "errors": self.errors,
            "lateness_ms": {"p50": _ms(self.lateness.p50), "p99": _ms(self.lateness.p99)},
            "planned": self.planned,
            "stopped": self.stopped,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=None, header_style="bold", pad_edge=False, show_edge=False, padding=(0, 3, 0, 0))
        table.add_column("")
        for title in ("record", "driven", "ratio"):
            table.add_column(title, justify="right", no_wrap=True)
        for name, (get, show) in ROWS.items():
            ratio = _ratio(get, self)
            record = get(self.record) if self.record else None
            table.add_row(name, show(record), show(get(self.driven)), "–" if ratio is None else f"{ratio:.3g}")
        yield table
        if self.errors:
            yield "errors: " + ", ".join(f"{number:,} {name}" for name, number in self.errors.items())
        if self.lateness.p50 is not None:
            yield f"sent late by {_time(self.lateness.p50)} at p50, {_time(self.lateness.p99)} at p99"
        if self.stopped:
            yield f"stopped after {self.driven.requests:,} of {count(self.planned, 'request')}"


def report_of(driving: Driving) -> Report:
    """The report of a drive, finished or stopped. The record's side is of the same requests."""
    driven = driving.driven
    pasts = [(each.arrival.at_us, each.arrival.past) for each in driven if each.arrival.past is not None]
    errors = Counter(each.error for each in driven if each.error is not None)
    record = _record(pasts) if pasts else None
    lateness = Measure.of(each.late_us for each in driven if driving.paced)
    return Report(_driven(driven, driving.seconds), record, dict(errors.most_common()), lateness, driving.planned, driving.stopped)


def _driven(driven: Sequence[Driven], seconds: float) -> Side:
    well = [each for each in driven if each.error is None]
    return Side(
        len(driven),
        len(driven) - len(well),
        sum(each.tokens for each in driven),
        seconds,
        Measure.of(each.first_token_us for each in driven),
        Measure.of(gap for each in driven for gap in each.gaps_us),
        Measure.of(each.duration_us for each in well),
    )


def _record(pasts: Sequence[tuple[int, Past]]) -> Side:
    ends = [at + past.duration_us for at, past in pasts if past.duration_us is not None]
    well = [past for _, past in pasts if not past.failed]
    return Side(
        len(pasts),
        len(pasts) - len(well),
        sum(past.tokens for _, past in pasts),
        (max(ends) - min(at for at, _ in pasts)) / 1e6 if ends else None,
        Measure.of(past.first_token_us for _, past in pasts),
        Measure.of(gap for _, past in pasts for gap in past.gaps_us),
        Measure.of(past.duration_us for past in well),
    )


def _time(us: float | None) -> str:
    return "–" if us is None else duration(round(us))


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


Get = Callable[[Side], float | None]

ROWS: dict[str, tuple[Get, Callable[[float | None], str]]] = {
    "requests": (lambda side: side.requests, _number),
    "failed": (lambda side: side.failed, _number),
    "first token p50": (lambda side: side.first_token.p50, _time),
    "first token p99": (lambda side: side.first_token.p99, _time),
    "between tokens p50": (lambda side: side.between_tokens.p50, _time),
    "between tokens p99": (lambda side: side.between_tokens.p99, _time),
    "whole answer p50": (lambda side: side.whole.p50, _time),
    "whole answer p99": (lambda side: side.whole.p99, _time),
    "tokens": (lambda side: side.tokens, _number),
    "tokens/s": (lambda side: side.tokens_per_s, _rate),
    "requests/s": (lambda side: side.requests_per_s, _rate),
}
"""The lines of the report: what is taken of a side, and how it is shown."""


def _ratio(get: Get, report: Report) -> float | None:
    """Driven over record."""
    before, now = get(report.record) if report.record else None, get(report.driven)
    return now / before if before and now is not None else None


def _ms(us: float | None) -> float | None:
    return None if us is None else round(us / 1000, 3)


def _document(side: Side) -> dict[str, Any]:
    times = {"first_token_ms": side.first_token, "between_tokens_ms": side.between_tokens, "whole_ms": side.whole}
    rates = {"tokens_per_s": side.tokens_per_s, "requests_per_s": side.requests_per_s}
    counts = {"requests": side.requests, "failed": side.failed, "tokens": side.tokens, "seconds": side.seconds}
    return {**counts, **{name: {"p50": _ms(m.p50), "p99": _ms(m.p99)} for name, m in times.items()}, **rates}
