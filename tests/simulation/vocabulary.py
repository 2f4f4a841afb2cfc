"""The schema of a run: of ten runs one has all of it, the others the kinds and fields that are written or asked for by name in a run.

Every statement reads and writes each of the 180 fields of a row, whichever are null, so with a third of them a seed takes half the time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from schemas.registry import CURRENT, Schema, _define, _named
from store import columns, erasing, tables

_KINDS = {
    "session_opened", "session_annotated", "session_closed", "request_submitted", "generation_started", "sequence_started", "token_chunk",
    "sequence_finished", "generation_finished", "producer_heartbeat", "records_lost",
}  # fmt: skip

_OF_A_REQUEST = {"generation_id", "endpoint", "model", "stream", "content"}


def _small() -> Schema:
    named, local = _named(CURRENT.definition), set[str]()
    asked = named["RequestSubmitted"]
    named["RequestSubmitted"] = {**asked, "fields": [field for field in asked["fields"] if field["name"] in _OF_A_REQUEST]}
    kept = [field for field in CURRENT.definition["fields"] if field["name"] not in CURRENT.kinds or field["name"] in _KINDS]
    by_name = [{**field, "type": ["null", field["type"][1]["name"]] if field["name"] in _KINDS else field["type"]} for field in kept]
    return Schema({**CURRENT.definition, "fields": [{**field, "type": _define(field["type"], named, local)} for field in by_name]})


SMALL = _small()


@contextlib.contextmanager
def reduced() -> Iterator[None]:
    """The current schema of this process is `SMALL` inside."""
    whole = dict(vars(CURRENT))
    with mock.patch("store.columns.columns", return_value=columns.columns(SMALL.definition)):
        _become(vars(SMALL))
        try:
            yield
        finally:
            _become(whole)


def _become(what: dict[str, Any]) -> None:
    """Many hold the current schema, so it is changed in place; what was derived from it is forgotten."""
    vars(CURRENT).clear()
    vars(CURRENT).update(what)
    for derived in (columns.current_columns, erasing._emptied, tables._paths):
        derived.cache_clear()
