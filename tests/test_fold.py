"""The fold: pure, total, the same in one go, in pieces and from a snapshot; time travel and edits."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replay.fold import Until, apply, fold, state_at, states
from replay.persistent import Map, Vector
from replay.snapshot import dump, load
from replay.state import EMPTY, Generation, SessionState
from schemas import events as e
from schemas.errors import CorruptStore, UsageError
from store.rows import StoredEvent
from tests.tape import FOLLOW_UP, QUESTION, START, SYSTEM, TEXT, Tape, environment, finish, ident, incident

INCIDENT = incident().events


def generation(state: SessionState, name: str) -> Generation:
    """A generation that must be there."""
    found = state.generations.get(ident(name))
    assert found is not None
    return found


def test_a_whole_session_is_folded_without_an_anomaly() -> None:
    """Requests, edits, tokens of n sequences, tool calls, failures, labels: all of it stands on the state."""
    state = fold(INCIDENT)

    assert [] == list(state.anomalies)
    assert ["finished", "finished", "failed", "failed"] == [g.status for g in state.generations.values()]
    assert 204 == state.tokens
    assert ("prod", "eu", "incident") == state.tags
    first = generation(state, "g1")
    assert [64, 64] == [sequence.tokens for sequence in first.sequences]
    assert first.sequences[0].text().startswith(TEXT)
    assert first.sequences[0].text() == first.sequences[1].text()
    second = generation(state, "g2")
    assert "" == second.sequences[0].text("content")
    assert second.sequences[0].text("reasoning").startswith("The incident")
    call = second.sequences[0].calls[0].content
    assert call is not None
    assert ("get_weather", '{"city": "Lisbon", "unit": "celsius"}') == (call.name, call.arguments)
    failure = generation(state, "g4").recording
    assert failure is not None
    assert "upstream_timeout" == failure.failures[0].event.error_type
    assert len(INCIDENT) == state.events


def test_messages_are_resolved_by_id_and_edits_are_applied() -> None:
    """The third request repeats no body, yet its document is whole; the edited one differs by the patch only."""
    state = fold(INCIDENT)
    second = generation(state, "g2")
    submitted, edited = state.submitted(second), state.edited(second)

    assert submitted is not None
    assert edited is not None
    assert [SYSTEM, QUESTION, FOLLOW_UP] == [submitted["messages"][i] for i in (0, 1, 3)]
    assert 0.8 == submitted["temperature"]
    assert {**submitted, "temperature": 0.0, "max_tokens": 48} == edited


def test_time_travel_stops_where_it_is_told() -> None:
    """Event, offset, time and position name the same moment, and the state knows nothing of what came after."""
    at = 40
    stored = INCIDENT[at - 1]
    moments = (
        Until("event", stored.event.event_id),
        Until("offset", stored.offset),
        Until("position", at),
        Until("time", stored.event.recorded_at),
    )
    folded = [fold(INCIDENT, until=until) for until in moments]

    assert [at] * 4 == [state.events for state in folded]
    assert folded[0] == folded[1] == folded[2] == folded[3]
    assert "streaming" == generation(folded[0], "g1").status


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#12", Until("position", 12)),
        ("@340", Until("offset", 340)),
        ("2026-11-23T14:05:17.123456Z", Until("time", START)),
        ("2026-11-23T15:05:17.123456+01:00", Until("time", START)),
        ("00000000-0000-0000-0000-000000000001", Until("event", bytes(15) + b"\1")),
    ],
)
def test_moments_are_read_from_text(text: str, expected: Until) -> None:
    """Position, offset, time and event each have their form."""

    assert expected == Until.parse(text)


@pytest.mark.parametrize("text", ["", "#", "@x", "yesterday", "2026-13-01"])
def test_a_moment_that_names_nothing_is_refused_with_a_hint(text: str) -> None:
    """The error says what forms there are."""
    with pytest.raises(UsageError) as caught:
        Until.parse(text)

    assert "#POSITION" in caught.value.hint


def test_an_unknown_event_and_a_time_before_the_start_are_said() -> None:
    """`state_at` answers for a named moment or not at all."""
    with pytest.raises(UsageError, match="no event"):
        state_at(INCIDENT, Until("event", bytes(16)))
    with pytest.raises(UsageError, match="nothing of this session"):
        state_at(INCIDENT, Until("time", START - 1))


def test_apply_leaves_the_old_state_as_it_was() -> None:
    """Every state along the way still says the same after the whole session was folded on top of it."""
    kept = list(states(INCIDENT))

    assert [fold(INCIDENT[: i + 1]) for i in range(0, len(INCIDENT), 7)] == kept[::7]


def _pieces(events: list[StoredEvent], cuts: list[int]) -> SessionState:
    state, at = EMPTY, 0
    for cut in [*sorted(cuts), len(events)]:
        state = fold(events[at:cut], start=state)
        at = max(at, cut)
    return state


NASTY = (float("-inf"), -0.0, -9999.0, -1e-30)


def _garbage(rng: random.Random, count: int) -> list[StoredEvent]:
    """Events of all kinds that fit nothing: unknown generations, wrong positions, broken patches, erased content."""
    tape = Tape("garbage")
    names = [ident(f"g{i}") for i in range(3)]
    for _ in range(count):
        tape.add(_nonsense(rng, rng.choice(names)), rng.uniform(-1e6, 1e6), source=rng.choice(("gateway", "engine")))
    return tape.events


def _nonsense(rng: random.Random, g: bytes) -> e.Payload:
    n, index = rng.randrange(-3, 60), rng.randrange(-1, 3)
    content = e.ChunkContent(token_ids=[1] * rng.randrange(3), text="\x00é\u202e", lengths=[n], logprobs=[rng.choice(NASTY)])
    makers: list[Any] = [
        lambda: e.TokenChunk(
            generation_id=g, index=index, position=n, offsets_us=[n] * rng.randrange(4), content=rng.choice([None, content])
        ),
        lambda: e.RequestSubmitted(
            generation_id=g, endpoint="", message_ids=[g], content=e.RequestContent(parameters=rng.choice(["{", "[]", "{}"]))
        ),
        lambda: e.RequestEdited(
            generation_id=g,
            edit_id=g,
            digest_before=bytes(32),
            digest_after=bytes([n % 2]) * 32,
            content=e.EditContent(patch=rng.choice(["nonsense", '{"op":1}', '[{"op":"remove","path":"/x"}]', "[]", "null", "[[]]"])),
        ),
        lambda: e.GenerationStarted(generation_id=g, authoritative=rng.choice(("gateway", "engine", "nobody")), attempt=n, offset_us=n),
        lambda: e.SequenceStarted(generation_id=g, index=index),
        lambda: e.SequenceFinished(generation_id=g, index=index, tokens=n),
        lambda: e.GenerationFinished(generation_id=g, sequences=n, tokens_recorded=n),
        lambda: e.GenerationFailed(
            generation_id=g, error_type="", origin="", content=rng.choice([None, e.FailureContent(message="\x1b[2J")])
        ),
        lambda: e.ToolCall(generation_id=g, index=index, call_index=n),
        lambda: e.BreakpointHit(breakpoint_id=str(n % 2), generation_id=g),
        lambda: e.BreakpointReleased(breakpoint_id=str(n % 2), generation_id=g, action="as_is"),
        lambda: e.SessionOpened(tags=["a"]),
        lambda: e.SessionAnnotated(tags_added=["b"], tags_removed=["a"], visibility=rng.choice([None, "x"])),
        lambda: e.SessionClosed(reason=""),
        lambda: e.EnvironmentCaptured(environment_id=bytes(32), origin=""),
        lambda: e.RecordsLost(reason="", count=n),
        lambda: e.KvOperation(operation="", role="", connector=""),
        lambda: e.ReplayStarted(replay_id=g, subject_session=g, mode="compare", engine="x", differences=[e.Difference(key="k")]),
        lambda: e.SequenceCompared(replay_id=g, generation_id=g, index=index, verdict="identical", drift_max=float("inf")),
        lambda: e.ReplayFinished(replay_id=g, verdict="identical"),
        lambda: e.AccessLogged(operation="show", outcome="ok"),
    ]
    payload: e.Payload = rng.choice(makers)()
    return payload


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False), st.integers(0, 80), st.booleans())
def test_in_one_go_in_pieces_and_from_a_snapshot_the_state_is_the_same(rng: random.Random, count: int, real: bool) -> None:
    """For good sessions, shuffled ones, repeated ones and garbage: pieces and snapshots change nothing, and nothing raises."""
    events = [*(INCIDENT if real else []), *_garbage(rng, count)]
    rng.shuffle(events)
    events += rng.sample(events, min(len(events), 3))
    whole = fold(events)
    cuts = [rng.randrange(len(events) + 1) for _ in range(3)]

    assert whole == _pieces(events, cuts)
    assert len(events) == whole.events
    cut = sorted(cuts)[0]
    assert whole == fold(events[cut:], start=load(dump(fold(events[:cut]))))
    assert whole == load(dump(whole))


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_tokens_in_any_order_give_the_same_text(rng: random.Random) -> None:
    """Chunks that come shuffled are put in order by their positions; what was out of order is noted."""
    tape = Tape()
    g = tape.request("g", [QUESTION], 0)
    tape.started(g, 1, 1)
    for i in range(40):
        tape.tokens(g, 0, [float(i)], [f"{i} "], position=i)
    head, chunks = tape.events[:3], tape.events[3:]
    rng.shuffle(chunks)
    numbered = [
        StoredEvent(stored.event.model_copy(update={"producer_seq": i}), "log", 0, i, 0) for i, stored in enumerate([*head, *chunks])
    ]
    state = fold(numbered)

    assert "".join(f"{i} " for i in range(40)) == generation(state, "g").sequences[0].text()
    assert 40 == state.tokens
    assert {"gap", "overlap"} >= {anomaly.what for anomaly in state.anomalies}


@pytest.mark.parametrize(
    ("what", "payload"),
    [
        ("early", e.SequenceFinished(generation_id=ident("nobody"), index=0, tokens=0)),
        ("again", e.SessionOpened()),
        ("gap", e.TokenChunk(generation_id=ident("g"), index=0, position=7, offsets_us=[1])),
        ("overlap", e.TokenChunk(generation_id=ident("g"), index=0, position=0, offsets_us=[1])),
        ("miscount", e.GenerationFinished(generation_id=ident("g"), sequences=1, tokens_recorded=99)),
        ("mismatched", e.RequestEdited(generation_id=ident("g"), edit_id=bytes(16), digest_before=bytes(32), digest_after=bytes(32),
                                       content=e.EditContent(patch='[{"op":"remove","path":"/nothing"}]'))),
        ("unheld", e.RequestSubmitted(generation_id=ident("h"), endpoint="", message_ids=[bytes(16)], content=e.RequestContent())),
    ],
)  # fmt: skip
def test_what_was_not_expected_is_recorded(what: str, payload: e.Payload) -> None:
    """Each kind of surprise has its name, with the event's place, and the fold goes on."""
    tape = Tape()
    tape.add(e.SessionOpened())
    g = tape.request("g", [QUESTION], 0)
    tape.tokens(g, 0, [1.0, 2.0, 3.0], ["a", "b", "c"])
    last = tape.add(payload, 5)
    state = fold(tape.events)

    assert [what] == [anomaly.what for anomaly in state.anomalies]
    place = state.anomalies[0].place
    assert place is not None
    assert last.event.event_id == place.event_id


def test_foreign_and_repeated_events_change_nothing_else() -> None:
    """An event of another session, or one whose producer's number came already, is only noted."""
    other = Tape("other")
    foreign = other.add(e.SessionClosed(reason="x"))
    state = fold(INCIDENT)
    after = apply(apply(state, foreign), INCIDENT[30])

    assert ["foreign", "repeated"] == [anomaly.what for anomaly in after.anomalies]
    assert (state.generations, state.counts, state.last) == (after.generations, after.counts, after.last)


@pytest.mark.parametrize("thing", [None, 7, "event", object()])
def test_even_what_is_no_event_does_not_stop_the_fold(thing: Any) -> None:
    """Total means total."""
    state = apply(EMPTY, thing)

    assert ["unreadable"] == [anomaly.what for anomaly in state.anomalies]


def test_two_sources_of_one_generation_are_kept_apart() -> None:
    """Gateway and engine both record it; views use the one that is named authoritative, the other stays beside it."""
    tape = Tape()
    g = tape.request("g", [QUESTION], 0)
    tape.started(g, 1, 1, authoritative="engine")
    tape.tokens(g, 0, [1.0], ["seen by the gateway"])
    tape.add(e.GenerationStarted(generation_id=g, authoritative="engine"), 1, source="engine")
    content = e.ChunkContent(text="told by the engine", lengths=[18])
    tape.add(e.TokenChunk(generation_id=g, index=0, position=0, offsets_us=[5], content=content), 2, source="engine")
    found = generation(fold(tape.events), "g")

    assert ["told by the engine"] == [sequence.text() for sequence in found.sequences]
    assert ["gateway", "engine"] == [recording.source for recording in found.recordings]


def test_a_second_attempt_begins_anew() -> None:
    """Tokens of an attempt that was given up do not mix with those of the next."""
    tape = Tape()
    g = tape.request("g", [QUESTION], 0)
    tape.started(g, 1, 1)
    tape.tokens(g, 0, [1.0], ["lost"])
    tape.started(g, 5, 1, attempt=2)
    tape.tokens(g, 4, [1.0], ["kept"])
    finish(tape, g, 4, [1], 2)
    state = fold(tape.events)

    assert ["kept"] == [sequence.text() for sequence in generation(state, "g").sequences]
    assert [] == list(state.anomalies)


def test_erased_content_leaves_counts_and_times() -> None:
    """After erasure texts are gone, and how many tokens came when is still known."""
    erased = []
    for stored in INCIDENT:
        payload = stored.event.payload
        if getattr(payload, "content", None) is not None:
            bare = payload.model_copy(update={"content": None})
            event = stored.event.model_copy(update={"payload": bare, "commitment": bytes(32), "salt": None})
            stored = StoredEvent(event, stored.log_id, stored.partition, stored.offset, stored.appended_at)
        erased.append(stored)
    state, before = fold(erased), fold(INCIDENT)

    assert before.tokens == state.tokens
    assert [] == list(state.anomalies)
    assert state.erased > 0
    first = generation(state, "g1")
    assert first.sequences[0].erased
    assert "" == first.sequences[0].text()
    assert state.submitted(first) is None


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"format":"tokentape.session-state","version":999}',
                                  b'{"format":"tokentape.session-state","version":1,"state":{"tags":5}}'])  # fmt: skip
def test_a_broken_snapshot_is_refused(data: bytes) -> None:
    """A snapshot is a cache: one that does not read says so and the events remain."""
    with pytest.raises(CorruptStore):
        load(data)


def test_thirty_thousand_chunks_fold_into_one_sequence() -> None:
    """A session of 30,000 events folds without copying what it holds: every thousandth state is kept and stays valid."""
    tape = Tape()
    g = tape.request("g", [QUESTION], 0)
    tape.started(g, 1, 1)
    template = tape.events[-1]
    payloads = (
        e.TokenChunk.model_construct(generation_id=g, index=0, position=i, channel="content", offsets_us=[i], content=None)
        for i in range(30_000)
    )
    events = (
        StoredEvent(template.event.model_copy(update={"producer_seq": i + 10, "payload": payload}), "log", 0, i + 10, 0)
        for i, payload in enumerate(payloads)
    )
    kept = [state for i, state in enumerate(states(events, start=fold(tape.events))) if i % 1000 == 999]

    assert list(range(1000, 30_001, 1000)) == [state.tokens for state in kept]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(), max_size=3000), st.lists(st.integers(), max_size=100))
def test_vectors_grow_without_changing_what_they_grew_from(first: list[int], more: list[int]) -> None:
    """A vector equals the list it was made of, before and after others grew out of it."""
    vector: Vector[int] = Vector(first)
    grown = vector
    for value in more:
        grown = grown.append(value)

    assert first == list(vector)
    assert [*first, *more] == list(grown) == [grown[i] for i in range(len(grown))]


class _Colliding(int):
    """Keys of which many share one hash."""

    def __hash__(self) -> int:
        return int(self) % 3

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and int(self) == int(other)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers()), max_size=600), st.booleans())
def test_maps_keep_order_and_old_versions(pairs: list[tuple[int, int]], collide: bool) -> None:
    """A map equals the dict of the same assignments, in order of insertion, even where hashes collide; old maps stay."""
    mapping: Map[int, int] = Map()
    versions, expected = [mapping], {}
    half: dict[int, int] = {}
    for i, (key, value) in enumerate(pairs):
        mapping = mapping.set(_Colliding(key) if collide else key, value)
        expected[key] = value
        versions.append(mapping)
        if i == len(pairs) // 2:
            half = dict(expected)

    assert list(expected.items()) == [(int(key), value) for key, value in mapping.items()]
    if pairs:
        assert list(half.items()) == [(int(key), value) for key, value in versions[len(pairs) // 2 + 1].items()]


def test_whose_answer_it_was() -> None:
    """A generation has the environment that it names, none where that is not known; where no generation says so, the last one."""
    tape = Tape()
    first, second = environment(), environment("0.33.0")
    named, other, unknown, silent = (
        tape.request(name, [QUESTION], at, environment_id=first.environment_id if asked else None)
        for at, (name, asked) in enumerate([("named", True), ("other", True), ("unknown", True), ("silent", False)])
    )
    tape.add(first)
    tape.started(other, 5, 1, upstream="u", environment_id=second.environment_id)
    tape.add(second)
    tape.started(unknown, 6, 1, upstream="u")
    state = fold(tape.events)
    found = {each.generation_id: state.environment_of(each) for each in state.generations.values()}
    lone = Tape()
    lone.request("silent", [QUESTION], 0)
    lone.add(first)
    alone = fold(lone.events)
    fallback = alone.environment_of(next(iter(alone.generations.values())))

    assert [first, second, None, None] == [each and each.event for each in map(found.get, (named, other, unknown, silent))]
    assert fallback is not None
    assert first == fallback.event
