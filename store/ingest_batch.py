"""Records on their way into a tail: grouped by schema and table, written as containers, and the guilty found when one fails."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import duckdb
import numpy as np

from schemas.codec import ID_SLICE, decode_datum, kind_of
from schemas.errors import DataError, InvalidEvent, NewerSchema, UnknownSchema
from schemas.registry import HEADER_BYTES, MAGIC, Schema, SchemaRegistry
from store import container, tables
from store.container import Records
from store.digest import record_hashes
from store.envelope import IRREGULAR, kinds_of
from store.log.base import Batch

# From here down a failing batch is decoded record by record: below this a container file costs more than decoding.
_SINGLY = 256
_DAY_US = 86_400_000_000


@dataclass(frozen=True, slots=True)
class Bad:
    """A record for the quarantine."""

    offset: int
    appended_at: int
    error: str
    sha256: bytes
    raw: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Group:
    """Records that one schema wrote, of one narrow kind or (None) of any other, and the container file that holds them."""

    schema: Schema
    kind: str | None
    records: Records
    path: Path


@dataclass(frozen=True, slots=True)
class Prepared:
    """Contiguous records of one partition and one day, ready to insert. `hashes` has one entry for each offset."""

    partition: int
    offset_first: int
    day: str
    appended_at: int
    hashes: list[bytes] = field(repr=False)
    groups: list[Group] = field(repr=False)
    bad: list[Bad] = field(repr=False)

    @property
    def offset_next(self) -> int:
        """The offset after the last record."""
        return self.offset_first + len(self.hashes)


class Preparer:
    """Turns batches of a log into `Prepared`; files go into `folder` and are removed by `discard`."""

    def __init__(self, registry: SchemaRegistry, folder: Path, mark: bytes, bytes_max: int) -> None:
        self.registry = registry
        self.mark = mark
        self._folder = folder
        self._bytes_max = bytes_max
        self._numbers = itertools.count()
        self.on_schema: Callable[[Schema], None] | None = None
        self._seen: set[bytes] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self, batch: Batch, day: str) -> tuple[list[Prepared], NewerSchema | None]:
        """The batch by days, the first not before `day`; what a newer schema wrote is left out from there on.

        Raises:
            StoreUnavailable: a schema had to be fetched, and the store did not answer.
        """
        schemas, errors, newer = self._schemas({value[:HEADER_BYTES] for value in batch.values})
        batch = _before(batch, newer)
        parts = [self._prepare(part, own, schemas, errors) for own, part in _by_day(batch, day)]
        return parts, next(iter(newer.values()), None)

    def _schemas(self, headers: set[bytes]) -> tuple[dict[bytes, Schema], dict[bytes, DataError], dict[bytes, NewerSchema]]:
        """What each header means: a schema, an error that sends its records to quarantine, or a reason to stop."""
        schemas: dict[bytes, Schema] = {}
        errors: dict[bytes, DataError] = {}
        newer: dict[bytes, NewerSchema] = {}
        for header in headers:
            try:
                schemas[header] = self._schema(header)
            except NewerSchema as error:
                newer[header] = error
            except (UnknownSchema, InvalidEvent) as error:
                errors[header] = error
        return schemas, errors, newer

    def _schema(self, header: bytes) -> Schema:
        if header[:2] != MAGIC or len(header) < HEADER_BYTES:
            raise InvalidEvent("no Avro single-object header (C3 01)", operation="index")
        schema = self.registry.get(header[2:])
        tables.check_columns(schema)
        if header not in self._seen and self.on_schema is not None:
            self.on_schema(schema)
        self._seen.add(header)
        return schema

    def _prepare(self, batch: Batch, day: str, schemas: dict[bytes, Schema], errors: dict[bytes, DataError]) -> Prepared:
        hashes = record_hashes(batch.values)
        whole = Records(batch.partition, range(batch.offset_first, batch.offset_next), batch.appended_at, batch.values)
        prepared = Prepared(batch.partition, batch.offset_first, day, batch.appended_at[-1], hashes, [], [])
        if len(schemas) == 1 and not errors and max(map(len, batch.values)) <= self._bytes_max:
            return self._add_groups(prepared, next(iter(schemas.values())), whole)
        places: dict[bytes, list[int]] = {}
        for index, value in enumerate(batch.values):
            error = errors.get(value[:HEADER_BYTES]) or self._too_large(value)
            if error is None:
                places.setdefault(value[:HEADER_BYTES], []).append(index)
            else:
                prepared.bad.append(_bad(whole, index, error, hashes[index]))
        for header, indexes in places.items():
            self._add_groups(prepared, schemas[header], whole.pick(indexes))
        return prepared

    def _add_groups(self, prepared: Prepared, schema: Schema, records: Records) -> Prepared:
        """Add records of one schema, those of a narrow kind apart; those whose kind cannot be made out are bad."""
        kinds = kinds_of(records.values, schema)
        wide = kinds != IRREGULAR
        for kind in tables.NARROW:
            chosen = kinds == list(schema.kinds).index(kind)
            if np.count_nonzero(chosen) >= tables.NARROW_ROWS_MIN:
                prepared.groups.append(self._group(schema, kind, records.pick(np.flatnonzero(chosen).tolist())))
                wide &= ~chosen
        places = np.flatnonzero(wide).tolist()
        if places:
            rest = records if len(places) == len(records) else records.pick(places)
            prepared.groups.append(self._group(schema, None, rest))
        for index in np.flatnonzero(kinds == IRREGULAR).tolist():
            error = self._fault(records.values[index]) or InvalidEvent("the bytes are not canonical", operation="index")
            prepared.bad.append(_bad(records, index, error, prepared.hashes[records.offsets[index] - prepared.offset_first]))
        return prepared

    def _too_large(self, value: bytes) -> DataError | None:
        if len(value) <= self._bytes_max:
            return None
        return InvalidEvent(f"an event of {len(value)} bytes; the index takes {self._bytes_max}", operation="index")

    def _group(self, schema: Schema, kind: str | None, records: Records) -> Group:
        path = self._folder / f"{next(self._numbers)}.avro"
        container.write(path, schema, records, self.mark, kind=kind)
        return Group(schema, kind, records, path)

    def discard(self, prepared: Sequence[Prepared]) -> None:
        """Remove the files."""
        for item in prepared:
            for group in item.groups:
                group.path.unlink(missing_ok=True)

    # When a batch did not come out one to one

    def sift(self, prepared: Prepared, connection: duckdb.DuckDBPyConnection) -> Prepared:
        """The same without the records that cannot be read; those are `bad`."""
        groups: list[Group] = []
        bad = list(prepared.bad)
        for group in prepared.groups:
            guilty = dict(self._guilty(group, group.records, 0, connection))
            if not guilty:
                groups.append(group)
                continue
            group.path.unlink(missing_ok=True)
            first = prepared.offset_first
            bad += [_bad(group.records, i, error, prepared.hashes[group.records.offsets[i] - first]) for i, error in guilty.items()]
            left = [index for index in range(len(group.records)) if index not in guilty]
            if left:
                groups.append(self._group(group.schema, group.kind, group.records.pick(left)))
        return replace(prepared, groups=groups, bad=sorted(bad, key=lambda item: item.offset))

    def _guilty(self, group: Group, records: Records, start: int, connection: duckdb.DuckDBPyConnection) -> list[tuple[int, DataError]]:
        """Place and fault of each record that cannot be read: halves of a failing batch, then records one by one."""
        if self._comes_out(group, records, connection):
            return []
        if len(records) > _SINGLY:
            half = len(records) // 2
            left = self._guilty(group, records.part(0, half), start, connection)
            return left + self._guilty(group, records.part(half, len(records)), start + half, connection)
        found = [(start + i, error) for i, value in enumerate(records.values) if (error := self._fault(value)) is not None]
        guilty = {index - start for index, _ in found}
        left_over = [index for index in range(len(records)) if index not in guilty]
        if not left_over or self._comes_out(group, records.pick(left_over), connection):
            return found
        refused = InvalidEvent("decodes singly, but DuckDB does not read it", operation="index")
        alone = [i for i in left_over if not self._comes_out(group, records.pick([i]), connection)]
        return sorted(found + [(start + i, refused) for i in alone], key=lambda item: item[0])

    def _comes_out(self, like: Group, records: Records, connection: duckdb.DuckDBPyConnection) -> bool:
        """Whether DuckDB reads exactly these records from a container of them."""
        group = self._group(like.schema, like.kind, records)
        try:
            query = tables.select_container(group.schema, "", self.mark, kind=group.kind)
            rows = connection.execute(f'SELECT "offset", event_id FROM ({query})', [[str(group.path)]]).fetchall()
        except duckdb.Error:
            return False
        finally:
            group.path.unlink(missing_ok=True)
        return rows == [(offset, value[ID_SLICE]) for offset, value in zip(records.offsets, records.values, strict=True)]

    def _fault(self, value: bytes) -> DataError | None:
        """What is wrong with a record when it is decoded singly."""
        try:
            kind_of(*decode_datum(value, self.registry))
        except DataError as error:
            return error
        return None


def day_of(appended_at: int) -> str:
    """UTC day of a time in µs, as YYYY-MM-DD."""
    return time.strftime("%Y-%m-%d", time.gmtime(appended_at // 1_000_000))


def _by_day(batch: Batch, day: str) -> list[tuple[str, Batch]]:
    """The batch cut where the day changes; a clock that steps back never reopens a day."""
    parts: list[tuple[str, Batch]] = []
    start = 0
    numbers = [moment // _DAY_US for moment in batch.appended_at]
    cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1]] if numbers and min(numbers) != max(numbers) else []
    for stop in [*cuts, len(numbers)]:
        if stop == start:
            continue
        day = max(day, day_of(batch.appended_at[start]))
        part = Batch(batch.partition, batch.offset_first + start, batch.appended_at[start:stop], batch.values[start:stop])
        if parts and parts[-1][0] == day:
            before = parts.pop()[1]
            part = Batch(batch.partition, before.offset_first, before.appended_at + part.appended_at, before.values + part.values)
        parts.append((day, part))
        start = stop
    return parts


def _before(batch: Batch, newer: dict[bytes, NewerSchema]) -> Batch:
    """The records before the first that a newer schema wrote."""
    if not newer:
        return batch
    stop = next(index for index, value in enumerate(batch.values) if value[:HEADER_BYTES] in newer)
    return Batch(batch.partition, batch.offset_first, batch.appended_at[:stop], batch.values[:stop])


def _bad(records: Records, index: int, error: DataError, sha256: bytes) -> Bad:
    return Bad(records.offsets[index], records.appended_at[index], str(error), sha256, records.values[index])
