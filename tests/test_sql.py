"""The views: what each says about sessions that are known to the last token, over hot, over cold, and over both."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from schemas import events as e
from schemas.codec import encode
from schemas.errors import CorruptStore
from schemas.events import PAYLOADS, Event, Payload
from schemas.settings import Settings
from schemas.sink import SessionContext, new_id
from store import views
from store.catalog import Catalog, Gap, Mark, Position, Quarantined, Range, Sealed, Shard, open_catalog
from store.directory import SessionDirectory, Viewer, Wanted
from store.log import open_log
from store.log.base import Entry, partition_of
from store.objects import open_store
from store.sql import SqlService, completeness, query
from tests.stored import DAY, LOG_ID, put_cold, put_hot
from tests.strategies import sample

START = 1_795_442_717_000_000
SESSION, GENERATION, BROKEN = new_id(), new_id(), new_id()
ENVIRONMENT = bytes(range(32))


class Tape:
    """Events of one session, each a millisecond after the one before."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, payload: Payload, source: e.Source = "gateway", actor: str = "user:42") -> None:
        """Record a payload."""
        self.events.append(
            Event(
                event_id=new_id(),
                session_id=SESSION,
                salt=bytes(16),
                tenant="acme",
                actor=actor,
                source=source,
                producer_id=b"producer",
                producer_seq=len(self.events),
                recorded_at=START + 1000 * len(self.events),
                payload=payload,
            )
        )


def _conversation() -> list[Event]:
    """A session with a generation of two sequences that an engine recorded too, one that broke, an edit, a replay, and custody."""
    tape = Tape()
    first, second = new_id(), new_id()
    question = e.Message(message_id=first, role="user", body='{"role":"user","content":"hi"}')
    image = e.Message(message_id=second, role="user", blob=e.BlobRef(blob_id=bytes(32), size=9, media_type="image/png", encoding="none"))
    tape.add(e.SessionOpened(client="cli", user="ann", tags=["a"], content=e.SessionContent(title="Greetings")))
    tape.add(e.SessionAnnotated(tags_added=["b"]))
    tape.add(e.EnvironmentCaptured(environment_id=ENVIRONMENT, origin="http", items=[e.Pair(key="version", value='"1"')]))
    tape.add(_request(GENERATION, [first], [question]))
    tape.add(
        e.RequestEdited(
            generation_id=GENERATION,
            edit_id=new_id(),
            digest_before=bytes(32),
            digest_after=ENVIRONMENT,
            content=e.EditContent(patch="[]", reason="why"),
        )
    )
    tape.add(e.GenerationStarted(generation_id=GENERATION, authoritative="gateway", model="tiny-1", status=200, prompt_tokens=7))
    tape.add(e.GenerationStarted(generation_id=GENERATION, authoritative="gateway", model="engine's name"), "engine")
    for index in (0, 1):
        tape.add(e.SequenceStarted(generation_id=GENERATION, index=index, offset_us=90_000))
        tape.add(_chunk(index, 0, [100_000, 110_000], ["he", "\U0001f44b"], [-0.5, float("-inf")], OTHERS))
        tape.add(_chunk(index, 0, [1, 2], ["no", "no"], [-9.0, -9.0]), "engine")
        tape.add(_chunk(index, 2, [150_000], ["llo"], [-0.25]))
        tape.add(
            e.SequenceFinished(generation_id=GENERATION, index=index, tokens=3, finish_reason=("stop", "length")[index], offset_us=151_000)
        )
    tape.add(
        e.ToolCall(
            generation_id=GENERATION,
            index=0,
            call_index=0,
            offset_us=150_000,
            content=e.ToolCallContent(name="f", arguments="{}", call_id="c"),
        )
    )
    tape.add(
        e.GenerationFinished(
            generation_id=GENERATION, sequences=2, tokens_recorded=6, completion_tokens=6, first_token_us=100_000, offset_us=152_000
        )
    )
    tape.add(_request(BROKEN, [first, second], [image]))
    tape.add(e.GenerationStarted(generation_id=BROKEN, authoritative="gateway", upstream="another"))
    tape.add(
        e.GenerationFailed(
            generation_id=BROKEN,
            error_type="client_disconnected",
            origin="client",
            offset_us=5_000,
            content=e.FailureContent(message="gone"),
        )
    )
    replay = new_id()
    tape.add(e.ReplayStarted(replay_id=replay, subject_session=SESSION, mode="compare", engine="openai"), "replay")
    tape.add(e.SequenceCompared(replay_id=replay, generation_id=GENERATION, index=0, verdict="identical", drift_max=0.01), "replay")
    tape.add(e.ReplayFinished(replay_id=replay, verdict="identical", tokens=6, duration_us=1500), "replay")
    tape.add(e.HoldPlaced(hold_id=new_id(), selector="{}", content=e.HoldContent(reason="court")), "lifecycle", "user:7")
    tape.add(
        e.EngineStep(engine_run=new_id(), step=1, duration_us=2500, entries=[e.StepEntry(generation_id=GENERATION, index=0, tokens=1)])
    )
    tape.add(e.KvOperation(operation="load", role="worker", connector="x", duration_us=1500))
    return tape.events


OTHERS = e.ChunkAlternatives(counts=[0, 2], texts=["\U0001f44b", "!"], logprobs=[float("-inf"), -0.5])


def _request(generation: bytes, ids: list[bytes], messages: list[e.Message]) -> e.RequestSubmitted:
    return e.RequestSubmitted(
        generation_id=generation,
        endpoint="/v1/chat/completions",
        model="tiny",
        stream=True,
        n=2,
        message_ids=ids,
        environment_id=ENVIRONMENT,
        content=e.RequestContent(messages=messages),
    )


def _chunk(
    index: int, position: int, offsets: list[int], texts: list[str], logprobs: list[float], others: e.ChunkAlternatives | None = None
) -> e.TokenChunk:
    lengths = [len(text) for text in texts]
    content = e.ChunkContent(
        token_ids=list(range(len(texts))), text="".join(texts), lengths=lengths, logprobs=logprobs, alternatives=others
    )
    return e.TokenChunk(generation_id=GENERATION, index=index, position=position, offsets_us=offsets, content=content)


Ask = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module", params=["hot", "cold", "both"])
def ask(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Asks about the conversation: kept in a shard, in a segment, or its beginning in a segment and the rest in two shards."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = Settings(data=folder / "data")
    catalog, objects = open_catalog(settings.data), open_store(settings.cold, settings.data)
    tape = _conversation()
    cold, hot = {"hot": (0, 0), "cold": (len(tape), len(tape)), "both": (9, 14)}[request.param]
    if cold:
        put_cold(catalog, objects, folder, tape[:cold], tenant="acme")
    for name, start, stop in (("first", cold, hot), ("second", hot, len(tape))):
        if start < stop:
            put_hot(catalog, name, tape[start:stop], offset=start)
    service = SqlService(settings, catalog=catalog, objects=objects, keep_warm=True)
    yield lambda statement: service.query(statement).table.to_pylist()
    service.close()


def test_every_event_is_there_once(ask: Ask) -> None:
    """Hot and cold together have each offset once and in order."""
    rows = ask('SELECT "offset" AS o, kind FROM events ORDER BY o')

    assert [(row["o"], row["kind"]) for row in rows] == [(i, event.kind) for i, event in enumerate(_conversation())]


def test_tokens_of_answers_that_broke_off(tmp_path: Path) -> None:
    """A failed generation counts as far as it came, and tokens of a sequence that had ended before it failed count once."""
    settings = Settings(data=tmp_path / "data")
    tape, half = Tape(), new_id()
    tape.add(e.GenerationFailed(generation_id=BROKEN, error_type="client_disconnected", origin="client", position=136))
    tape.add(e.SequenceFinished(generation_id=half, index=0, tokens=10, finish_reason="stop", offset_us=1))
    tape.add(e.GenerationFailed(generation_id=half, error_type="upstream_error", origin="upstream", position=17))
    catalog = open_catalog(settings.data)
    put_hot(catalog, "only", tape.events)
    (row,) = query(settings, "SELECT tokens, failures FROM sessions").table.to_pylist()
    directory = SessionDirectory(settings, catalog)
    (listed,) = directory.sessions(Viewer(), Wanted()).rows
    directory.close()

    assert row == {"tokens": 136 + 17, "failures": 2}
    assert listed["tokens"] == row["tokens"]


def test_sessions(ask: Ask) -> None:
    """A session says who, when and how much."""
    (row,) = ask("SELECT * FROM sessions")

    assert row["session_id"] == str(uuid.UUID(bytes=SESSION))
    assert (row["tenant"], row["client"], row["user"], row["title"], sorted(row["tags"])) == ("acme", "cli", "ann", "Greetings", ["a", "b"])
    assert (row["requests"], row["failures"], row["edits"], row["replays"], row["tokens"]) == (2, 1, 1, 1, 6)
    assert row["duration_ms"] == row["events"] - 1
    assert row["started_at"].replace(tzinfo=UTC) == datetime.fromtimestamp(START / 1e6, UTC)


def test_generations(ask: Ask) -> None:
    """A generation says how it went, by its authoritative source alone."""
    good, bad = ask("SELECT * FROM generations ORDER BY submitted_at")

    assert (good["generation_id"], good["outcome"], good["error_type"]) == (str(uuid.UUID(bytes=GENERATION)), "finished", None)
    assert (good["source"], good["model"], good["model_served"], good["n"]) == ("gateway", "tiny", "tiny-1", 2)
    assert (good["tokens"], good["sequences"], good["prompt_tokens"], good["completion_tokens"]) == (6, 2, 7, 6)
    assert (good["first_token_ms"], good["duration_ms"], good["finish_reasons"]) == (100, 152, ["stop", "length"])
    assert good["tokens_per_s"] == pytest.approx(6 / 0.05)
    assert (good["environment_id"], bad["environment_id"]) == (ENVIRONMENT.hex(), None)  # another upstream, which is not known
    assert (bad["outcome"], bad["error_type"], bad["duration_ms"], bad["tokens"]) == ("failed", "client_disconnected", 5, 0)


def test_tokens(ask: Ask) -> None:
    """Each token has its place, text, logprob, time, alternatives and the gap before it, across chunks and with characters of any width."""
    rows = ask('SELECT * FROM tokens WHERE "index" = 1 ORDER BY position')

    assert [(row["position"], row["text"], row["logprob"]) for row in rows] == [
        (0, "he", -0.5),
        (1, "\U0001f44b", float("-inf")),
        (2, "llo", -0.25),
    ]
    assert [(row["offset_ms"], row["gap_ms"]) for row in rows] == [(100, None), (110, 10), (150, 40)]
    assert [row["alternatives"] for row in rows] == [
        [],
        [{"token_id": None, "text": "\U0001f44b", "logprob": float("-inf")}, {"token_id": None, "text": "!", "logprob": -0.5}],
        None,
    ]
    assert ask("SELECT count(*) AS n FROM tokens") == [{"n": 6}]


def test_messages(ask: Ask) -> None:
    """Each request lists all its messages, with bodies that came with an earlier request too."""
    rows = ask("SELECT generation_id, position, role, body, blob_id FROM messages ORDER BY submitted_at, position")
    body = '{"role":"user","content":"hi"}'

    assert [(row["position"], row["role"], row["body"], row["blob_id"]) for row in rows] == [
        (1, "user", body, None),
        (1, "user", body, None),
        (2, "user", None, "00" * 32),
    ]


def test_edits_tool_calls_and_failures(ask: Ask) -> None:
    """What a person changed, what the model called, and what went wrong."""
    assert ask("SELECT patch, reason, digest_after, undo_of FROM edits") == [
        {"patch": "[]", "reason": "why", "digest_after": ENVIRONMENT.hex(), "undo_of": None}
    ]
    assert ask("SELECT name, arguments, call_id, offset_ms FROM tool_calls") == [
        {"name": "f", "arguments": "{}", "call_id": "c", "offset_ms": 150}
    ]
    assert ask("SELECT error_type, origin, message FROM failures") == [
        {"error_type": "client_disconnected", "origin": "client", "message": "gone"}
    ]


def test_environments_replays_and_custody(ask: Ask) -> None:
    """What produced the tokens, what was replayed with which verdict, and who did what to the record."""
    assert ask("SELECT environment_id, origin, captures FROM environments") == [
        {"environment_id": ENVIRONMENT.hex(), "origin": "http", "captures": 1}
    ]
    assert ask("SELECT subject_session_id, mode, verdict, tokens, drift_max, duration_ms FROM replays") == [
        {
            "subject_session_id": str(uuid.UUID(bytes=SESSION)),
            "mode": "compare",
            "verdict": "identical",
            "tokens": 6,
            "drift_max": 0.01,
            "duration_ms": 1.5,
        }
    ]
    assert ask("SELECT kind, actor, reason FROM custody") == [{"kind": "hold_placed", "actor": "user:7", "reason": "court"}]


def test_engine_steps_and_kv_operations(ask: Ask) -> None:
    """What the engine did, with durations in milliseconds."""
    assert ask("SELECT step, duration_ms, entries[1].generation_id AS g FROM engine_steps") == [
        {"step": 1, "duration_ms": 2.5, "g": str(uuid.UUID(bytes=GENERATION))}
    ]
    assert ask("SELECT operation, duration_ms, outcome FROM kv_operations") == [{"operation": "load", "duration_ms": 1.5, "outcome": "ok"}]


def test_ids_are_looked_up_by_text(ask: Ask) -> None:
    """`uuid_blob` turns a text into the id that `events` has, and `uuid_text` back."""
    text = str(uuid.UUID(bytes=SESSION))

    assert ask(f"SELECT count(*) > 20 AS found FROM events WHERE session_id = uuid_blob('{text.upper()}')") == [{"found": True}]
    assert ask("SELECT DISTINCT uuid_text(session_id) AS s FROM events") == [{"s": text}]


def test_sums_are_integers(ask: Ask) -> None:
    """A sum of integers is a 64-bit integer where it fits, and exact where it does not."""
    assert ask("SELECT sum(tokens) AS n FROM generations") == [{"n": 6}]
    assert ask("SELECT sum(9223372036854775807) AS n FROM range(3)") == [{"n": 3 * 9223372036854775807}]


@pytest.mark.parametrize("name", sorted(views.NAMES))
def test_every_view_takes_every_value(name: str, nasty: SqlService) -> None:
    """No view fails on events with nothing in them or with nasty values in all of them."""
    table = nasty.query(f"SELECT * FROM {name}").table

    # The sampled generations name sources that recorded nothing as their authoritative ones.
    assert table.num_rows > 0 or name in ("tokens", "tool_calls")
    assert [(column, kind) for column, kind in next(view for view in views.describe() if view.name == name).columns] == [
        (row["column_name"], row["column_type"]) for row in nasty.query(f"DESCRIBE {name}").table.to_pylist()
    ]


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqlService]:
    """Asks about events of every kind with nothing in them, and with nasty values."""
    settings = Settings(data=tmp_path_factory.mktemp("nasty"))
    catalog = open_catalog(settings.data)
    put_hot(
        catalog, "nasty", [sample(kind, full=full, turn=turn) for kind in sorted(PAYLOADS) for full in (True, False) for turn in (0, 4, 9)]
    )
    service = SqlService(settings, catalog=catalog, keep_warm=True)
    yield service
    service.close()


def test_nothing_recorded_is_no_error(settings_embedded: Settings) -> None:
    """An installation without events has views without rows, and says that nothing was indexed yet."""
    answer = query(settings_embedded, "SELECT * FROM sessions")

    assert answer.table.num_rows == 0
    assert "session_id" in answer.table.column_names
    assert answer.completeness.fresh_to is None


def _seal(catalog: Catalog, **found: Any) -> None:
    shard = Shard(
        "empty", catalog.shards_folder / "empty.duckdb", "sealed", DAY, (Range(LOG_ID, 0, 0, 3),), b"\xff" * 16, bytes(16), 0, 0, 0, 0
    )
    positions = (Position(LOG_ID, 0, 3, appended_at=2_000_000, duplicates=2),)
    catalog.register(Sealed(shard=shard, positions=positions, **found))


def test_answers_say_what_is_missing(settings_embedded: Settings) -> None:
    """Gaps, quarantine and duplicates of the range are counted, and `fresh_to` is that of the partition farthest behind."""
    catalog = open_catalog(settings_embedded.data)
    _seal(
        catalog,
        marks=(Mark(LOG_ID, 0, b"producer", 9),),
        gaps=(Gap(LOG_ID, 0, b"producer", 4, 7, "jump", 1, 2_000_000),),
        quarantined=(Quarantined(LOG_ID, 0, 2, 2_000_000, "no header", 1, bytes(32)),),
        raw=(b"x",),
    )
    said = completeness(catalog)

    assert said.fresh_to == datetime.fromtimestamp(2, UTC)
    assert (said.gaps, said.lost, said.quarantined, said.duplicates) == (1, 4, 1, 2)
    assert query(settings_embedded, "SELECT count(*) AS n FROM events").completeness == said


@pytest.mark.filterwarnings("ignore:(read|open)_text is deprecated:DeprecationWarning")  # kafka-python's import on Python 3.11
def test_fresh_answers_have_what_was_acknowledged(deployment: Settings) -> None:
    """What the log acknowledged before the question is in the answer, though no indexer runs."""
    log = open_log(deployment.log, deployment.data)
    context = SessionContext(new_id(), "acme", "sdk")
    event = sample("session_opened", full=False).model_copy(update={"session_id": context.session_id, "tenant": "acme"})
    log.append([Entry(partition_of(context.session_id, log.partitions), context.session_id, encode(event))])
    log.close()
    answer = query(deployment, "SELECT session_id FROM sessions", fresh=True)

    assert answer.table.to_pylist() == [{"session_id": str(uuid.UUID(bytes=context.session_id))}]
    assert answer.completeness.fresh_to is not None


def test_damaged_shard_is_named(settings_embedded: Settings) -> None:
    """A shard that is no database is one line with a cure."""
    catalog = open_catalog(settings_embedded.data)
    shard = put_hot(catalog, "bad", [sample("session_opened", full=False)])
    Path(shard.path).write_bytes(b"nothing that DuckDB knows" * 100)
    with pytest.raises(CorruptStore, match="bad") as caught:
        query(settings_embedded, "SELECT * FROM events")

    assert "rebuild" in caught.value.hint
