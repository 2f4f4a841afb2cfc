"""The player: forwards, backwards, to a moment, fast to a breakpoint, and the tape as an engine."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.engines.base import Refused, Request, Scored
from replay.engines.recorded import RecordedEngine
from replay.fold import Until, fold
from replay.player import Player, at_breakpoint, at_kind, at_trouble
from replay.state import EMPTY
from schemas.errors import UsageError
from tests.tape import ident, incident

INCIDENT = incident().events


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 40))
def test_however_one_gets_there_the_state_is_that_of_the_fold(rng: random.Random, keep_every: int) -> None:
    """Steps of any size in both directions and jumps lead to the state that folding up to that position gives."""
    player = Player(INCIDENT, keep_every=keep_every)
    for _ in range(12):
        move = rng.choice(("step", "back", "seek"))
        if move == "seek":
            player.seek(rng.randrange(len(INCIDENT) + 1))
        else:
            getattr(player, move)(rng.randrange(60))

    assert fold(INCIDENT[: player.position]) == player.state


def test_stepping_off_either_end_stays_there() -> None:
    """The start is the empty state, the end the whole session."""
    player = Player(INCIDENT)

    assert player.back() is EMPTY
    assert player.event is None
    assert fold(INCIDENT) == player.step(10_000)
    assert player.at_end
    assert player.step() is player.state


def test_fast_runs_to_each_breakpoint_and_then_to_the_end() -> None:
    """The one breakpoint stops it with the request still held; the next run goes to the end."""
    player = Player(INCIDENT)
    stop = player.fast(at_breakpoint)

    assert "condition" == stop.reason
    assert stop.event is not None
    assert "breakpoint_hit" == stop.event.event.kind
    assert 1 == len(stop.state.open_breakpoints)
    assert "end" == player.fast(at_breakpoint).reason


def test_fast_stops_at_trouble_at_a_kind_and_at_a_moment() -> None:
    """Any condition on event and state stops it, as does a moment."""
    player = Player(INCIDENT)
    player.fast(at_trouble)
    assert player.event is not None

    assert "generation_failed" == player.event.event.kind
    player.seek(0)
    assert "condition" == player.fast(lambda stored, state: state.tokens >= 100).reason
    assert 100 <= player.state.tokens < 110
    assert "condition" == player.fast(at_kind("tool_call")).reason
    assert "reached" == Player(INCIDENT).fast(until=Until("position", 9)).reason


def test_to_goes_to_an_event_an_offset_and_a_time_in_both_directions() -> None:
    """The moment is inclusive, and what lies before is found as well as what lies behind."""
    player = Player(INCIDENT)
    stored = INCIDENT[50]
    player.to(Until("event", stored.event.event_id))

    assert 51 == player.position
    player.to(Until("offset", INCIDENT[9].offset))
    assert 10 == player.position
    player.to(Until("time", stored.event.recorded_at))
    assert 51 == player.position
    with pytest.raises(UsageError):
        player.to(Until("event", bytes(16)))
    with pytest.raises(UsageError, match="valid is 0 to"):
        player.seek(-1)


def test_the_tape_answers_as_it_did() -> None:
    """The recorded engine gives the recorded answers and scores, and refuses what it never heard."""
    state = fold(INCIDENT)
    engine = RecordedEngine(state)
    found = state.generations.get(ident("g1"))
    assert found is not None
    document = state.edited(found)
    assert document is not None
    said = engine.generate(Request("tiny", document))
    assert not isinstance(said, Refused)

    assert [sequence.text() for sequence in found.sequences] == [spoken.text for spoken in said.sequences]
    forced = engine.force(Request("tiny"), said.prompt_token_ids, said.sequences[1].token_ids)
    assert isinstance(forced, Scored)
    assert said.sequences[1].logprobs == forced.logprobs
    assert isinstance(engine.generate(Request("tiny", {"never": "asked"})), Refused)
    assert isinstance(engine.force(Request("tiny"), (1,), (2,)), Refused)
    assert state.environments[-1].event == engine.fingerprint()
