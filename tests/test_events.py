"""The event: its schema, its bytes and the leaf that proofs stand on, for every kind and the values that storage gets wrong."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas import codec
from schemas.avro import derive
from schemas.codec import decode, decode_datum, encode, encode_datum, encode_payload, encode_session, erase, join, leaf_hash
from schemas.encoder import encode_model
from schemas.errors import InvalidEvent, NewerSchema, UnknownSchema
from schemas.events import PAYLOADS, ChunkContent, Event, ProducerHeartbeat, SequenceStarted, TokenChunk
from schemas.registry import CURRENT, HEADER_BYTES, Schema, SchemaRegistry
from store.columns import LOG_COLUMNS, columns
from store.duck import connect
from store.rows import framed, rows_to_datums, stored_events
from tests.golden_write import ROOT, jsonable
from tests.stored import insert
from tests.strategies import LONGS, TEXTS, events, sample

KINDS = sorted(PAYLOADS)
REGISTRY = SchemaRegistry()
GOLDEN = [(folder.name, path.stem) for folder in sorted(ROOT.iterdir()) for path in sorted(folder.glob("*.bin"))]

quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
few = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


# The schema


def test_stored_schema_is_the_derived_one() -> None:
    """`event.avsc` says what the models say."""
    path = Path(codec.__file__).parent / "event.avsc"

    assert json.loads(path.read_text(encoding="utf-8")) == derive()


def test_current_schema_stands_in_the_history() -> None:
    """Each file of the history is named by its schema's fingerprint, and the current one is among them."""
    names = {path.stem: path for path in (Path(codec.__file__).parent / "history").glob("*.avsc")}

    assert {Schema(json.loads(path.read_text(encoding="utf-8"))).fingerprint.hex() for path in names.values()} == set(names)
    assert CURRENT.fingerprint.hex() in names


def test_every_kind_has_its_golden_file() -> None:
    """`python -m tests.golden_write` was run for the current schema."""
    written = {kind for fingerprint, kind in GOLDEN if fingerprint == CURRENT.fingerprint.hex()}

    assert written == set(PAYLOADS)


@pytest.mark.parametrize(("fingerprint", "kind"), GOLDEN)
def test_golden_event_is_read_as_it_was_written(fingerprint: str, kind: str) -> None:
    """An event of any past version still says the same, has the same bytes and leaf, and can be upcast."""
    raw = (ROOT / fingerprint / f"{kind}.bin").read_bytes()
    said = json.loads((ROOT / fingerprint / f"{kind}.json").read_text(encoding="utf-8"))
    datum, schema = decode_datum(raw, REGISTRY)

    assert jsonable({name: value for name, value in datum.items() if value is not None or name in said["datum"]}) == said["datum"]
    assert encode_datum(datum, schema) == raw
    assert leaf_hash(datum, schema).hex() == said["leaf"]
    assert decode(raw, REGISTRY).kind == kind


# Bytes


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(data=st.data())
def test_decoding_gives_the_event_back(kind: str, data: st.DataObject) -> None:
    """decode(encode(e)) = e, through bytes that plain fastavro with the whole schema writes too, and the recorder's short cut."""
    event = data.draw(events(kind))
    raw = encode(event)
    plain = io.BytesIO()
    fastavro.schemaless_writer(plain, CURRENT.parsed, event.to_datum())
    session = encode_session(event.session_id, event.salt, event.tenant, event.retention_class, event.actor, event.source)
    payload = encode_payload(kind, event.payload.model_dump())

    assert encode_model(event.payload) == payload
    assert decode(raw, REGISTRY) == event
    assert raw == CURRENT.header + plain.getvalue()
    assert raw == join(event.event_id, session, event.producer_id, event.producer_seq, event.recorded_at, payload)


@pytest.mark.parametrize(
    "wrong",
    [{"generation_id": b"short"}, {"generation_id": "sixteen letters."}, {"index": 1.5}, {"index": 1 << 64}, {"role": 7}, {"index": None}],
)
def test_a_wrong_value_has_no_bytes(wrong: dict[str, Any]) -> None:
    """A record that was made without looking at its values is refused when it is encoded."""
    payload = SequenceStarted.known(**{"generation_id": bytes(16), "index": 0, **wrong})

    with pytest.raises(InvalidEvent, match=r"sequence_started|64 bits"):
        encode_model(payload)


def test_a_known_record_is_the_record() -> None:
    """Made without looking it equals the one that was looked at, defaults and cleaned texts included; a wrong name is refused."""
    values: dict[str, Any] = {"generation_id": bytes(16), "index": 3, "role": "a\ud800b"}

    assert SequenceStarted.known(**values) == SequenceStarted(**values)
    assert SequenceStarted.known(**values).model_dump() == SequenceStarted(**values).model_dump()
    with pytest.raises(TypeError, match="SequenceStarted has the fields generation_id, index, role, offset_us, not"):
        SequenceStarted.known(**values, rôle="x")
    with pytest.raises(TypeError, match="SequenceStarted has the fields"):
        SequenceStarted.known(index=3)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(data=st.data())
def test_erasing_keeps_the_leaf(kind: str, data: st.DataObject) -> None:
    """After erasure content and salt are gone, the leaf is the same, and the erased event is a valid event."""
    datum = data.draw(events(kind)).to_datum()
    erased = erase(datum, CURRENT)

    assert leaf_hash(erased, CURRENT) == leaf_hash(datum, CURRENT)
    assert erased["salt"] is None
    assert erased[kind].get("content") is None
    assert decode(encode_datum(erased, CURRENT), REGISTRY).to_datum() == erased


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(data=st.data())
def test_leaf_commits_to_everything(kind: str, data: st.DataObject) -> None:
    """Two events whose bytes differ have different leaves."""
    first, second = data.draw(events(kind)), data.draw(events(kind))
    leaves = {leaf_hash(event.to_datum(), CURRENT) for event in (first, second)}
    # The salt is only in the leaf where it hides content.
    bytes_ = {
        encode(event if event.payload.model_dump().get("content") else event.model_copy(update={"salt": None})) for event in (first, second)
    }

    assert len(leaves) == len(bytes_)


def test_equal_values_have_equal_bytes() -> None:
    """-0.0 is 0.0, logprobs are 32-bit, and lone surrogates are U+FFFD before they are encoded."""
    content = ChunkContent(text="a\ud800", logprobs=[-0.0, 0.1])

    assert content.text == "a\ufffd"
    assert [str(value) for value in content.logprobs] == ["0.0", "0.10000000149011612"]


@pytest.mark.parametrize("value", [float("nan"), -float("nan")])
def test_nan_is_refused(value: float) -> None:
    """NaN has many bit patterns, so no canonical bytes."""
    with pytest.raises(ValueError, match="NaN"):
        ChunkContent(logprobs=[value])


def _token_event() -> Event:
    return sample("token_chunk", full=True)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda raw: raw + b"\0", InvalidEvent, "1 trailing bytes"),
        (lambda raw: raw[:-1], InvalidEvent, "does not decode"),
        (lambda raw: raw[:HEADER_BYTES], InvalidEvent, "does not decode"),
        (lambda raw: raw[:5], InvalidEvent, "header"),
        (lambda raw: b"", InvalidEvent, "header"),
        (lambda raw: b"\xc3\x02" + raw[2:], InvalidEvent, "header"),
        (lambda raw: b"\x00\x00\x00\x00\x01" + raw, InvalidEvent, "header"),
        (lambda raw: raw[:2] + b"\x01" * 8 + raw[10:], UnknownSchema, "0101010101010101"),
    ],
)
def test_bytes_that_are_no_event_are_refused(change: Any, error: type[Exception], words: str) -> None:
    """Each damage has its own clear error."""
    with pytest.raises(error, match=words):
        decode(change(encode(_token_event())), REGISTRY)


@few
@given(cut=st.integers(0, 2000), flip=st.integers(0, 2000), bit=st.integers(0, 7))
def test_damaged_bytes_never_raise_anything_else(cut: int, flip: int, bit: int) -> None:
    """A flipped bit or a cut gives another event or one of our errors."""
    raw = bytearray(encode(_token_event()))
    raw[flip % len(raw)] ^= 1 << bit
    damaged = bytes(raw[: max(len(raw) - cut % 7, 0)])
    try:
        event = decode(damaged, REGISTRY)
    except (InvalidEvent, UnknownSchema, NewerSchema):
        return

    assert isinstance(event, Event)


def test_content_without_a_salt_has_no_leaf() -> None:
    """Nobody could erase it, so nobody may commit to it."""
    datum = _token_event().model_copy(update={"salt": None}).to_datum()

    with pytest.raises(InvalidEvent, match="salt"):
        leaf_hash(datum, CURRENT)


# Rows


def _batch() -> list[Event]:
    """Every kind, with nothing and with everything, at many turns of the nasty values."""
    return [sample(kind, full=full, turn=turn) for kind in KINDS for full in (False, True) for turn in range(len(LONGS))]


@pytest.fixture
def duck(tmp_path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to a shard's file."""
    with connect(tmp_path / "shard.duckdb", extensions=("avro",)) as connection:
        yield connection


def _insert(duck: duckdb.DuckDBPyConnection, folder: Path, raws: list[bytes], schema: Schema = CURRENT) -> None:
    """Fill the table with framed events at partition 3, offsets from 0, append times from 7."""
    duck.execute("DROP TABLE IF EXISTS events")
    insert(duck, folder, raws, partition=3, appended_at=7, schema=schema)


def _rows(duck: duckdb.DuckDBPyConnection, folder: Path) -> dict[str, pa.Table]:
    """The table's rows as DuckDB gives them, and out of a Parquet file that DuckDB wrote, read by DuckDB and by Arrow."""
    path = folder / "segment.parquet"
    path.unlink(missing_ok=True)
    ordered = 'SELECT * FROM events ORDER BY "offset"'
    duck.execute(f"COPY ({ordered}) TO '{path}' (FORMAT parquet, COMPRESSION zstd, PARQUET_VERSION v2, WRITE_BLOOM_FILTER false)")
    return {
        "duckdb": duck.execute(ordered).to_arrow_table(),
        "parquet by duckdb": duck.execute(f"SELECT * FROM read_parquet('{path}')").to_arrow_table(),
        "parquet by arrow": pq.read_table(path),
    }


def _log_bytes(rows: pa.Table) -> list[bytes]:
    return [framed(row.datum, row.fingerprint, REGISTRY) for row in rows_to_datums(rows)]


def test_rows_give_the_bytes_of_the_log(duck: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    """Every kind with every nasty value, out of a DuckDB row and out of a Parquet row, is the very bytes that were in the log."""
    raws = [encode(event) for event in _batch()]
    _insert(duck, tmp_path, raws)

    for rows in _rows(duck, tmp_path).values():
        assert _log_bytes(rows) == raws


@few
@given(batch=st.lists(events(), min_size=1, max_size=12))
def test_rows_of_any_events_give_the_bytes_of_the_log(tmp_path_factory: pytest.TempPathFactory, batch: list[Event]) -> None:
    """The same for whatever Hypothesis thinks of."""
    folder = tmp_path_factory.mktemp("rows")
    raws = [encode(event) for event in batch]
    with connect(extensions=("avro",)) as duck:
        _insert(duck, folder, raws)

        for rows in _rows(duck, folder).values():
            assert _log_bytes(rows) == raws


def test_rows_are_events_with_their_place(duck: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    """Stored events carry the event, and where and when the log took it."""
    batch = _batch()
    _insert(duck, tmp_path, [encode(event) for event in batch])
    found = list(stored_events(_rows(duck, tmp_path)["duckdb"]))

    assert [stored.event for stored in found] == batch
    assert [(s.log_id, s.partition, s.offset, s.appended_at) for s in found] == [("log", 3, i, 7 + i) for i in range(len(batch))]


def test_slices_of_rows_are_the_same_rows(duck: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    """An Arrow slice, whose buffers begin elsewhere, gives its own rows; so does a single batch."""
    raws = [encode(event) for event in _batch()]
    _insert(duck, tmp_path, raws)
    table = _rows(duck, tmp_path)["duckdb"].combine_chunks()

    assert _log_bytes(table.slice(13, 101)) == raws[13:114]
    assert _log_bytes(table.slice(5, 50).to_batches()[0]) == raws[5:55]
    assert _log_bytes(table.slice(0, 0)) == []


def test_columns_are_those_that_duckdb_reads(tmp_path: Path) -> None:
    """The columns derived from the schema alone are those that DuckDB's Avro reader gives, but for the enum."""
    path = tmp_path / "one.avro"
    with path.open("wb") as file:
        fastavro.writer(file, fastavro.parse_schema(CURRENT.definition), [_token_event().to_datum()])
    with connect(extensions=("avro",)) as duck:
        read = duck.execute("DESCRIBE SELECT * FROM read_avro(?)", [str(path)]).fetchall()
        typed = {name: _type_of(duck, kind) for name, kind in columns(CURRENT.definition).items() if name not in LOG_COLUMNS}

    assert typed == {name: "VARCHAR" if name == "source" else kind for name, kind, *_ in read}


def _type_of(duck: duckdb.DuckDBPyConnection, text: str) -> str:
    row = duck.execute(f"SELECT typeof(CAST(NULL AS {text}))").fetchone()
    return str(row[0]) if row else ""


def test_nasty_texts_survive_the_row(duck: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    """Each text by itself, so that a failure names it."""
    events_ = [sample("token_chunk", full=True).model_copy(update={"actor": ChunkContent(text=text).text}) for text in TEXTS]
    _insert(duck, tmp_path, [encode(event) for event in events_])

    assert [row.datum["actor"] for row in rows_to_datums(_rows(duck, tmp_path)["parquet by duckdb"])] == [e.actor for e in events_]


# Other versions


def _newer(*, value: Any) -> tuple[SchemaRegistry, bytes]:
    """A registry that knows a version with one more field and one more kind, and a token chunk of that version."""
    definition = copy.deepcopy(CURRENT.definition)
    chunk = next(field for field in definition["fields"] if field["name"] == "token_chunk")
    chunk["type"][1]["fields"].append({"name": "mood", "type": ["null", "string"], "default": None})
    content = next(field for field in chunk["type"][1]["fields"] if field["name"] == "content")
    content["type"][1]["fields"].append({"name": "tone", "type": ["null", "string"], "default": None})
    later = {"type": "record", "name": "Later", "fields": [{"name": "note", "type": "string"}]}
    definition["fields"].append({"name": "later", "type": ["null", later], "default": None})
    registry = SchemaRegistry()
    schema = registry.add(definition)
    datum = _token_event().to_datum()
    datum["token_chunk"]["mood"] = value
    return registry, encode_datum(datum, schema)


def test_newer_version_that_says_nothing_new_is_read() -> None:
    """New fields that are null change nothing."""
    registry, raw = _newer(value=None)

    assert decode(raw, registry) == _token_event()


def test_newer_version_that_says_more_is_refused() -> None:
    """A field that this version lacks is named, never dropped."""
    registry, raw = _newer(value="blue")

    with pytest.raises(NewerSchema, match=r"token_chunk.*mood"):
        decode(raw, registry)


def test_newer_kind_is_refused() -> None:
    """So is a kind that this version lacks."""
    registry, _ = _newer(value=None)
    schema = next(schema for schema in registry.all() if "later" in schema.kinds)
    datum = {**_token_event().to_datum(), "token_chunk": None, "later": {"note": "x"}}

    with pytest.raises(NewerSchema, match="later"):
        decode(encode_datum(datum, schema), registry)


def test_unknown_fingerprint_is_asked_for_once() -> None:
    """The registry fetches a writer schema that it lacks, checks that it is the one, and remembers it."""
    known, raw = _newer(value=None)
    definition = next(schema for schema in known.all() if "later" in schema.kinds).definition
    asked: list[bytes] = []

    def fetch(fingerprint: bytes) -> dict[str, Any]:
        asked.append(fingerprint)
        return definition

    registry = SchemaRegistry(fetch=fetch)

    assert decode(raw, registry) == decode(raw, registry) == _token_event()
    assert asked == [raw[2:HEADER_BYTES]]
    with pytest.raises(UnknownSchema, match="ff" * 8):
        decode(b"\xc3\x01" + b"\xff" * 8 + raw[HEADER_BYTES:], registry)


def _older() -> Schema:
    """A version before `text`'s neighbour `logprobs`, before `purpose`, and before the last kind."""
    definition = copy.deepcopy(CURRENT.definition)
    del definition["fields"][-1]
    opened = next(field for field in definition["fields"] if field["name"] == "session_opened")["type"][1]
    opened["fields"] = [field for field in opened["fields"] if field["name"] != "purpose"]
    finished = next(field for field in definition["fields"] if field["name"] == "sequence_finished")["type"][1]
    finished["fields"] = [field for field in finished["fields"] if field["name"] != "stop_reason"]
    return Schema(definition)


def test_older_version_is_upcast_and_keeps_its_bytes(duck: duckdb.DuckDBPyConnection, tmp_path: Path) -> None:
    """What an older version lacks is None in the event and NULL in the row, and the row re-encodes under its writer schema."""
    registry = SchemaRegistry()
    schema = registry.add(_older().definition)
    raws = [encode_datum(sample(kind, full=True).to_datum(), schema) for kind in ("session_opened", "sequence_finished", "token_chunk")]
    _insert(duck, tmp_path, raws, schema)

    assert [decode(raw, registry).payload.model_dump().get("purpose", "-") for raw in raws] == [None, "-", "-"]
    for rows in _rows(duck, tmp_path).values():
        assert [framed(row.datum, row.fingerprint, registry) for row in rows_to_datums(rows)] == raws
        assert [stored.event for stored in stored_events(rows)] == [decode(raw, registry) for raw in raws]


def test_two_payloads_or_none_are_refused() -> None:
    """An event has exactly one payload."""
    datum = _token_event().to_datum()
    none = {**datum, "token_chunk": None}
    two = {**datum, "producer_heartbeat": ProducerHeartbeat().model_dump()}

    for wrong in (none, two):
        with pytest.raises(InvalidEvent, match="payloads in one event"):
            encode_datum(wrong, CURRENT)
        with pytest.raises(InvalidEvent, match="payloads in one event"):
            Event.from_datum(wrong)


def test_values_of_the_wrong_type_are_named() -> None:
    """What the schema does not take is an InvalidEvent that names the kind."""
    datum = _token_event().to_datum()
    datum["token_chunk"]["index"] = "first"

    with pytest.raises(InvalidEvent, match="token_chunk"):
        encode_datum(datum, CURRENT)
    with pytest.raises(ValueError, match="index"):
        TokenChunk.model_validate({"generation_id": bytes(16), "index": 2**63, "position": 0})
