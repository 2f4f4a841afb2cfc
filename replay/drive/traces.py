"""Public traces of LLM traffic: arrivals and lengths out of the CSV files of BurstGPT and of Azure's LLM inference traces.

BurstGPT (Wang et al. 2024) counts seconds; Azure's (2023, 2024) write dates. Both tell numbers of tokens and no texts.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from schemas.errors import DataError, UsageError

_OPERATION = "read trace"


class Row(NamedTuple):
    """One request of a trace; `at_us` counts from an origin that is the trace's own."""

    at_us: int
    prompt_tokens: int
    answer_tokens: int


class _Format(NamedTuple):
    """The columns of a trace, and how its time is read."""

    name: str
    at: str
    prompt: str
    answer: str
    time: Callable[[str], int]


def _seconds(text: str) -> int:
    return round(float(text) * 1e6)


def _date(text: str) -> int:
    moment = datetime.fromisoformat(text)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1e6)


FORMATS = (
    _Format("BurstGPT", "Timestamp", "Request tokens", "Response tokens", _seconds),
    _Format("Azure LLM inference", "TIMESTAMP", "ContextTokens", "GeneratedTokens", _date),
)


def read_trace(path: Path, *, limit: int | None = None) -> tuple[list[Row], int]:
    """The first `limit` requests of a trace, and how many rows were left out because nothing was answered in them.

    Raises:
        UsageError: there is no such file, or its columns are those of no known trace.
        DataError: a value is no number or time, or no row is left.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read(csv.DictReader(file), str(path), limit)
    except OSError as error:
        raise UsageError(error.strerror or "not readable", operation=_OPERATION, place=str(path), hint="name a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"it is no CSV file: {error}", operation=_OPERATION, place=str(path), hint=_valid()) from error


def _read(reader: csv.DictReader[str], place: str, limit: int | None) -> tuple[list[Row], int]:
    columns = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = columns
    known = next((f for f in FORMATS if {f.at, f.prompt, f.answer} <= set(columns)), None)
    if known is None:
        fault = f"no known trace has the columns {', '.join(columns)[:200] or 'of an empty file'}"
        raise UsageError(fault, operation=_OPERATION, place=place, hint=_valid())
    rows: list[Row] = []
    empty = 0
    for row in _rows(reader, known, place):
        if row.prompt_tokens < 1 or row.answer_tokens < 1:
            empty += 1
        elif limit is None or len(rows) < limit:
            rows.append(row)
        else:
            break
    if not rows:
        raise DataError("no row of it has tokens", operation=_OPERATION, place=place, hint=_valid())
    return rows, empty


def _rows(reader: csv.DictReader[str], known: _Format, place: str) -> Iterator[Row]:
    for values in reader:
        try:
            yield Row(known.time(values[known.at]), int(float(values[known.prompt])), int(float(values[known.answer])))
        except (ValueError, TypeError, OverflowError) as error:
            told = ", ".join(f"{name}={values.get(name)!r}" for name in (known.at, known.prompt, known.answer))
            raise DataError(f"line {reader.line_num}: {told}"[:300], operation=_OPERATION, place=place, hint=_valid()) from error


def _valid() -> str:
    return "; ".join(f"{f.name}: {f.at}, {f.prompt}, {f.answer}" for f in FORMATS)
