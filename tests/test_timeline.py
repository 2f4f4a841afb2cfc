"""The timeline and the page of a session: what an incident responder reads, at any width, whatever stands in the texts."""

from __future__ import annotations

import io
import json

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from replay.fold import Until, fold
from replay.render import SessionPage
from replay.timeline import ROWS_MAX, Row, timeline
from replay.timeline_view import TimelineView
from replay.words import duration, printable, shorten
from schemas import events as e
from tests.tape import EVIL, QUESTION, START, SYSTEM, Tape, finish, ident, incident, stream

INCIDENT = incident().events


def drawn(thing: RenderableType, width: int = 100) -> str:
    """What a terminal of this width shows, without colour."""
    console = Console(width=width, file=io.StringIO(), force_terminal=False, color_system=None)
    console.print(thing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows_of(what: str, rows: tuple[Row, ...]) -> list[Row]:
    """The rows of one kind."""
    return [row for row in rows if row.what == what]


def test_the_timeline_tells_who_what_and_when() -> None:
    """Rows come in order of time with who caused them, and time counts from the first event."""
    found = timeline(INCIDENT)
    story = [(row.what, row.lane) for row in found.rows if row.what not in ("tokens", "quiet", "answered", "1st token")]

    assert sorted(row.at for row in found.rows) == [row.at for row in found.rows]
    expected = [("session", ""), ("env", ""), ("request", "1"), ("stall", "1.0"), ("ended", "1.0"), ("ended", "1.1"), ("finished", "1")]
    expected += [("request", "2"), ("stopped", "2"), ("edited", "2"), ("released", "2"), ("tool call", "2"), ("finished", "2")]
    expected += [("env", ""), ("request", "3"), ("FAILED", "3"), ("request", "4"), ("SILENCE", "4"), ("FAILED", "4"), ("note", "")]
    assert expected == story
    assert "dev:bo" == rows_of("edited", found.rows)[0].who
    assert "client" == rows_of("FAILED", found.rows)[0].who
    assert "upstream" == rows_of("FAILED", found.rows)[1].who
    assert 7_000 == rows_of("request", found.rows)[0].since_us


def test_a_gap_of_ten_medians_and_200_ms_is_a_stall() -> None:
    """The stall has its length, the token before it and how many medians it is; shorter gaps make no row."""
    tape = Tape()
    g = tape.request("g", [QUESTION], 0)
    tape.started(g, 5, 5)
    offsets = [10.0, 20.0, 30.0, 40.0, 230.0, 240.0, 450.0, 460.0]
    tape.tokens(g, 0, offsets, list("abcdefgh"))
    found = timeline(tape.events)

    assert 1 == found.stalls
    (stall,) = rows_of("stall", found.rows)
    assert "210 ms after token 5 · 21× median gap" == stall.text
    assert ["abcdef", "gh"] == [row.quote for row in rows_of("tokens", found.rows)]
    assert (START + 240_000, START + 450_000) == (stall.at, stall.until)


def test_slow_streams_are_not_all_stalls() -> None:
    """Where the median gap is a second, two seconds are no stall."""
    tape = Tape()
    g = tape.request("g", [QUESTION], 0)
    tape.tokens(g, 0, [1000.0, 2000.0, 3000.0, 5000.0], list("abcd"))

    assert 0 == timeline(tape.events).stalls


def test_first_token_and_lanes() -> None:
    """Two sequences have a lane each; the time to first token is that of the earlier one."""
    found = timeline(INCIDENT)

    assert {"1.0", "1.1"} == {row.lane for row in rows_of("tokens", found.rows) if row.generation == ident("g1")}
    assert 82_000 == found.ttft_us[0]
    assert "after 82 ms" == rows_of("1st token", found.rows)[0].text


def test_a_changed_environment_is_named() -> None:
    """The second capture differs in version and dtype, and the row says so."""
    changed = rows_of("env", timeline(INCIDENT).rows)[1]

    assert changed.text.startswith("CHANGED: dtype, version")
    assert "warn" == changed.level


def test_what_is_open_when_the_record_ends_is_said() -> None:
    """A session that breaks off shows which generation was under way."""
    found = timeline(INCIDENT[:40])

    assert "streaming" in rows_of("open", found.rows)[0].text


def test_rows_are_json() -> None:
    """The same rows serve a program."""
    document = json.loads(json.dumps(timeline(INCIDENT).document()))

    assert 2 == document["failures"]
    assert "2026-11-23T14:05:17.123456Z" == document["rows"][0]["at"]
    assert {"at", "since_us", "who", "what", "text", "lane", "level", "quote", "generation"} <= document["rows"][0].keys()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_every_line_fits_the_width(width: int) -> None:
    """Timeline and page never overflow the terminal, wide characters counted as what they take."""
    for thing in (TimelineView(timeline(INCIDENT)), SessionPage(fold(INCIDENT), total=len(INCIDENT))):
        lines = drawn(thing, width).splitlines()

        assert [] == [line for line in lines if cell_len(line) > width]


def test_recorded_text_cannot_act_on_the_terminal() -> None:
    """Escape sequences and direction overrides in a message are shown as code points, in timeline and page."""
    tape = Tape()
    tape.add(e.SessionOpened(user="\x1b]0;owned\x07", content=e.SessionContent(title="\x1b[2Jgone")))
    g = tape.request("g", [EVIL], 0, actor="\x1b[31m", model="\x9b31m")
    tape.tokens(g, 0, [1.0], ["\x1b[8mhidden\u202e\r\n"])
    tape.add(e.ToolCall(generation_id=g, index=0, call_index=0, content=e.ToolCallContent(name="\x1b", arguments="\x07")))
    tape.add(e.GenerationFailed(generation_id=g, error_type="\x1b", origin="\x1b", content=e.FailureContent(message="\x1b[2J\n\x08")))
    tape.add(e.SessionAnnotated(content=e.AnnotationContent(note="\x1b")), actor="\x1b")
    tape.add(e.EnvironmentCaptured(environment_id=bytes(32), origin="\x1b", items=[e.Pair(key="\x1b", value='"\x1b"')], unknown=["\x1b"]))
    tape.add(e.KvOperation(operation="\x1b", role="\x1b", connector="\x1b"))
    tape.add(e.SessionClosed(reason="\x1b"))
    state = fold(tape.events)
    text = drawn(TimelineView(timeline(tape.events))) + drawn(SessionPage(state))

    assert set() == {c for c in text if ord(c) in (*range(10), *range(11, 32), *range(127, 160)) or c == "\u202e"}
    assert "‹001B›[8mhidden‹202E›”" in text


def test_quiet_generations_are_folded_and_troubled_ones_stay() -> None:
    """A session of 1,000 generations with two failures is a page: the failures stand out of the folded rest."""
    tape = Tape()
    for i in range(1000):
        zero = i * 500.0
        g = tape.request(f"g{i}", [SYSTEM, QUESTION], zero)
        tape.started(g, zero + 20, 20)
        tape.tokens(g, zero, [40.0, 60.0, 80.0], ["a", "b", "c"])
        if i in (300, 301):
            tape.add(
                e.GenerationFailed(generation_id=g, error_type="upstream_error", origin="upstream", position=3, offset_us=90_000), zero + 90
            )
        else:
            finish(tape, g, zero, [3], 90)
    found = timeline(tape.events)

    assert len(found.rows) < 20
    assert ["300 generations", "698 generations"] == [row.what for row in found.rows if row.what.endswith("generations")]
    assert 2 == len(rows_of("FAILED", found.rows))
    assert "went well · 2,094 tokens in 5 min 49 s" == next(row for row in found.rows if row.what == "698 generations").text
    assert len(timeline(tape.events, rows_max=None).rows) > 4000


def test_a_flood_of_the_same_failure_is_folded_too() -> None:
    """Thousands of failures of one kind are one row with their number; no timeline is longer than its limit."""
    tape = Tape()
    for i in range(900):
        g = tape.request(f"g{i}", [QUESTION], i * 10.0)
        kind = "upstream_unreachable" if i < 600 else ("a", "b")[i % 2]
        tape.add(e.GenerationFailed(generation_id=g, error_type=kind, origin="upstream"), i * 10.0 + 5)
    found = timeline(tape.events)

    assert "600 generations" == found.rows[0].what
    assert found.rows[0].text.startswith("failed: upstream unreachable")
    assert len(found.rows) <= ROWS_MAX + 1
    assert 900 == found.failures
    assert "show them all" in drawn(TimelineView(found))


def test_a_long_stream_is_one_run() -> None:
    """Twenty thousand tokens without a stall are one row with their pace."""
    tape = Tape()
    g = tape.request("g", [QUESTION], 0)
    tape.started(g, 5, 5)
    stream(tape, g, 0, 20, 20_000, gap_ms=10)
    (run,) = rows_of("tokens", timeline(tape.events).rows)

    assert 20_000 == run.events
    assert run.text.startswith("0–19999 in 3 min ")
    assert 20_000 == sum(run.pace)


def test_swarms_of_anomalies_are_one_row() -> None:
    """A repeated stretch of events does not fill the page."""
    found = timeline([*INCIDENT, *INCIDENT[:50]])

    assert [(50, "50× repeated, first: session_opened")] == [(row.events, row.text[:35]) for row in rows_of("anomaly", found.rows)]
    assert len(timeline(INCIDENT).rows) + 1 == len(found.rows)


def test_an_empty_session_is_drawn() -> None:
    """Nothing is said as nothing, without an error."""

    assert "no events" in drawn(TimelineView(timeline([])))
    assert "nothing has happened yet" in drawn(SessionPage(fold([])))


def test_the_page_shows_the_moment() -> None:
    """In mid-stream the page has the edit, the half answer with a cursor, and not yet what came later."""
    at = next(i for i, stored in enumerate(INCIDENT) if stored.event.kind == "breakpoint_released") + 5
    text = drawn(SessionPage(fold(INCIDENT, until=Until("position", at)), total=len(INCIDENT)))

    assert f"after event {at} of {len(INCIDENT)}" in text
    assert "replace /temperature = 0.0" in text
    assert "make the tool call repeatable" in text
    assert "▌" in text
    assert "FAILED" not in text
    assert "generation 3" not in text
    hit = next(i for i, stored in enumerate(INCIDENT) if stored.event.kind == "breakpoint_hit") + 1
    waiting = drawn(SessionPage(fold(INCIDENT, until=Until("position", hit))))
    assert "waits for a release" in waiting


@pytest.mark.parametrize(
    ("us", "expected"),
    [(7, "7 µs"), (1500, "1.5 ms"), (82_000, "82 ms"), (1_590_000, "1.59 s"), (9_998_000, "10.0 s"), (75_000_000, "1 min 15 s"),
     (7_260_000_000, "2 h 1 min"), (200_000_000_000, "2 d 7 h"), (-1500, "-1.5 ms")],
)  # fmt: skip
def test_durations_have_three_figures_that_matter(us: int, expected: str) -> None:
    """From microseconds to days."""

    assert expected == duration(us)


def test_shortened_text_says_what_is_left_out() -> None:
    """The count of characters not shown stands at the end; letters of all scripts stay."""

    assert "abc… (+4)" == shorten("abcdefg", 3)
    assert "東京 🦊 ‹202E›" == printable("東京 🦊 \u202e")
