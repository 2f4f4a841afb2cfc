"""A timeline drawn for a terminal: one line per row, fitted to the width, wrapped only where something went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from replay.timeline import REPEATED, Row, Timeline, ttft_summary
from replay.words import clock, count, date, duration, printable, relative, uuid

WIDTH_MIN = 60
"""Below this nothing fits beside the times; lines are then cut by the terminal."""
WIDE = 100
"""From this width on names have more room."""
WHAT_CELLS = 10
QUOTE_CELLS_MIN = 28
"""A quote that would get less room beside its facts goes on a line of its own."""
LINES_MAX = {"bad": 4, "warn": 2}
"""Lines that facts or quote may take: a failure's message is what a responder came for, a quote of tokens is not."""
STYLES = {"plain": "", "good": "green", "dim": "dim", "warn": "yellow", "bad": "bold red"}
LANES = ("cyan", "magenta", "blue", "green", "bright_cyan", "bright_magenta")
"""Colours of generations, in turn; none is the colour of a warning."""
_BARS = " ▁▂▃▄▅▆▇█"


class TimelineView:
    """Draws a timeline; a rich renderable, so that a console decides about width and colour."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width, WIDTH_MIN)
        yield from _head(self.timeline, width)
        yield from _lines(self.timeline, width)
        yield from _foot(self.timeline, width)


def _head(timeline: Timeline, width: int) -> Iterator[Text]:
    state = timeline.state
    if state.session_id is None:
        yield Text("no events", style="dim")
        return
    span = duration((state.last_at or 0) - (state.first_at or 0))
    title = state.opened.content.title if state.opened and state.opened.content else None
    yield _fit(Text.assemble(("session ", "bold"), (uuid(state.session_id), "bold"), f"  tenant {printable(state.tenant)}"), width)
    if title:
        yield _fit(Text(f"“{printable(title)}”", style="italic"), width)
    facts = [f"{date(state.first_at or 0)} UTC", f"{span} long", count(state.events, "event")]
    facts += [count(len(state.generations), "generation"), count(state.tokens, "token")]
    yield _fit(Text(" · ".join(facts), style="dim"), width)
    yield _verdict(timeline, width)
    yield Text("")
    columns = _columns(timeline, width)
    heading = f"{'UTC':<12} {'ms':>8} {'gen':>{columns.lane}} {'who':<{columns.who}} what"
    yield Text(heading.ljust(width), style="dim underline")


def _verdict(timeline: Timeline, width: int) -> Text:
    """What went wrong in one line, or that nothing did."""
    state = timeline.state
    trouble = [count(timeline.failures, "failure")] if timeline.failures else []
    trouble += [count(timeline.stalls, "stall")] if timeline.stalls else []
    trouble += [f"{count(state.lost, 'event')} lost"] if state.lost else []
    trouble += [f"{count(len(state.anomalies), 'unexpected event')}"] if len(state.anomalies) else []
    edits = sum(len(generation.edits) for generation in state.generations.values())
    trouble += [count(edits, "edit")] if edits else []
    style = "bold red" if timeline.failures or state.lost else "yellow"
    line = Text.assemble((" · ".join(trouble), style) if trouble else ("nothing went wrong", "green"))
    line.append(f" · {ttft_summary(timeline.ttft_us)}", "dim")
    return _fit(line, width)


def _lines(timeline: Timeline, width: int) -> Iterator[Text]:
    columns = _columns(timeline, width)
    day = date(timeline.state.first_at or 0)
    for row in timeline.rows:
        if date(row.at) != day:
            day = date(row.at)
            yield Text(f"── {day} UTC ".ljust(width, "─"), style="dim")
        yield from _row(row, columns)


class _Columns(NamedTuple):
    """Widths in cells of a page."""

    width: int
    lane: int
    who: int

    @property
    def head(self) -> int:
        """Cells before what happened: time, milliseconds, generation, who and the spaces between."""
        return 12 + 1 + 8 + 1 + self.lane + 1 + self.who + 1


def _columns(timeline: Timeline, width: int) -> _Columns:
    return _Columns(width, max([3, *(len(row.lane) for row in timeline.rows)]), 12 if width >= WIDE else 8)


def _row(row: Row, columns: _Columns) -> Iterator[Text]:
    style = STYLES[row.level]
    head = Text(clock(row.at), "dim" if row.level == "dim" else "")
    head.append(f" {relative(row.since_us):>8} ", "dim")
    head.append(f"{row.lane:>{columns.lane}} ", _lane_style(row))
    head.append(set_cell_size(_cut(printable(row.who), columns.who), columns.who) + " ", "dim")
    room = columns.width - columns.head
    facts = Text(set_cell_size(row.what, max(WHAT_CELLS - 1, cell_len(row.what))) + " ", style or "bold")
    facts.append(printable(row.text), style)
    if row.what in REPEATED and row.events > 1:
        facts.append(f" · {row.events:,}×" + (f" in {duration(row.until - row.at)}" if row.until else ""), style)
    if row.pace and room - facts.cell_len > 16 + QUOTE_CELLS_MIN:
        facts.append(f" {_bars(row.pace)}", _lane_style(row))
    facts = _whole_facts(facts, room) if row.level not in LINES_MAX else facts
    lines = _with_quote(facts, row, room) if row.quote else _wrapped(facts, room, LINES_MAX.get(row.level, 1))
    for i, line in enumerate(lines):
        yield (head if i == 0 else Text(" " * columns.head)) + line


def _whole_facts(facts: Text, room: int) -> Text:
    """Facts that fit on one line, as many as do; a fact is not cut in the middle while another stands before it."""
    while facts.cell_len > room and " · " in facts.plain:
        facts = facts[: facts.plain.rindex(" · ")]
    return facts


def _with_quote(facts: Text, row: Row, room: int) -> Iterator[Text]:
    """Facts and their quote: side by side where both fit or enough room is left, else the quote below."""
    style, left = STYLES[row.level] or "italic", room - facts.cell_len - 1
    quote = f"“{printable((row.quote or '').strip())}”"
    if cell_len(quote) <= left or (left >= QUOTE_CELLS_MIN and row.level not in LINES_MAX):
        yield facts + Text(" ") + Text(_cut_quote(quote, left), style)
        return
    yield from _wrapped(facts, room, LINES_MAX.get(row.level, 1))
    indent = " " * WHAT_CELLS
    lines_max = LINES_MAX.get(row.level, 1)
    if lines_max == 1:
        yield Text(indent + _cut_quote(quote, room - WHAT_CELLS), style)
        return
    for line in _wrapped(Text(quote, style), room - WHAT_CELLS, lines_max):
        yield Text(indent) + line


def _lane_style(row: Row) -> str:
    number = row.lane.split(".")[0]
    return LANES[(int(number) - 1) % len(LANES)] if number.isdecimal() and int(number) else "dim"


def _bars(pace: tuple[int, ...]) -> str:
    top = max(pace) or 1
    return "".join(_BARS[-(-n * (len(_BARS) - 1) // top)] for n in pace)


def _cut(text: str, cells: int) -> str:
    return text if cell_len(text) <= cells else set_cell_size(text, max(0, cells - 1)).rstrip() + "…"


def _cut_quote(quote: str, cells: int) -> str:
    return quote if cell_len(quote) <= cells else _cut(quote, cells - 1).removesuffix("”") + "”"


def _wrapped(body: Text, room: int, lines_max: int) -> Iterator[Text]:
    """A text on at most so many lines; the last one is cut."""
    plain, at = body.plain, 0
    for i in range(lines_max):
        rest = plain[at:]
        size = len(rest) if i == lines_max - 1 or cell_len(rest) <= room else _break(rest, room)
        part = body[at : at + size]
        part.rstrip()
        if i:
            part = Text("").append_text(part)
        yield _fit(part, room)
        at += size
        if at >= len(plain):
            return


def _break(text: str, room: int) -> int:
    """How many characters of a text go on one line: up to a space in its second half, else as many as fit."""
    fits = len(chop_cells(text, room)[0])
    space = text.rfind(" ", fits // 2, fits + 1)
    return space + 1 if space > 0 else fits


def _fit(line: Text, width: int) -> Text:
    if line.cell_len > width:
        line = line.copy()
        line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line


def _foot(timeline: Timeline, width: int) -> Iterator[Text]:
    folded = [row for row in timeline.rows if row.what == "left out" or row.what.endswith("generations")]
    if folded:
        yield Text("")
        yield _fit(Text(f"{count(sum(row.events for row in folded), 'row')} folded; show them all with --full", style="dim"), width)
