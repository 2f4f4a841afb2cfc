"""A timeline as one page that opens offline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from replay.html import document, text
from replay.sections import sections
from replay.timeline import REPEATED, Row, Timeline, ttft_summary
from replay.words import clock, content_text, count, date, duration, paragraph, relative, short_id, uuid

LANES = 6
"""Colours of generations, in turn; the style sheet has as many."""
BAR_PX = 14
"""Height of one generation's bar in the overview."""
BARS_MAX = 60
"""Generations in the overview; the table has all."""
_WIDTH = 1000  # units of the overview from the first event to the last

_README = "README.txt says what is in it, verify.py checks it."


def session_page(made: Timeline) -> str:
    """A session's timeline as an HTML document."""
    state = made.state
    name = uuid(state.session_id) if state.session_id else "no events"
    title = state.opened.content.title if state.opened and state.opened.content else None
    body = [
        f"<h1>{text(title or f'Session {name}')}</h1>",
        f'<div class="dim"><code>{text(name)}</code> · tenant {text(state.tenant or "")}</div>',
        _facts(made),
        "".join(_overview(made)),
        "<h2>Timeline</h2>",
        '<div class="card"><table><thead><tr><th>UTC</th><th class="n">ms</th><th>gen</th><th>who</th><th>what</th><th></th></tr></thead>',
        f"<tbody>{''.join(_rows(made.rows))}</tbody></table></div>",
        "".join(_conversation(made)),
    ]
    return document(title or f"Session {name}", body)


def index_page(sessions: Sequence[Mapping[str, Any]], checkpoint: str) -> str:
    """The first page of a case: each session with a link to its timeline, and the signed checkpoint that all hang on.

    A session is a mapping with folder, session, tenant, first_at, title, events, not_in_ledger, generations, tokens, failures, stalls.
    """
    columns = ("events", "generations", "tokens", "failures", "stalls")
    head = "".join(f'<th class="n">{name}</th>' for name in columns)
    rows = []
    for item in sessions:
        figures = "".join(f'<td class="n">{item[name]:,}</td>' for name in columns)
        link = f'<a href="{text(item["folder"])}/timeline.html">{text(item["title"] or item["session"])}</a>'
        under = f'<div class="mono dim">{text(item["session"])}</div>' if item["title"] else ""
        level = "bad" if item["failures"] else "warn" if item["stalls"] else ""
        first = text((item["first_at"] or "").replace("T", " ")[:19])
        rows.append(f'<tr class="{level}"><td class="t">{first}</td><td>{link}{under}</td><td>{text(item["tenant"])}</td>{figures}</tr>')
    total = sum(item["events"] for item in sessions)
    missing = sum(item["not_in_ledger"] for item in sessions)
    note = f'<p class="dim">{count(missing, "event")} not in the ledger yet when this was made.</p>' if missing else ""
    body = [
        "<h1>Case file</h1>",
        f'<div class="dim">{count(len(sessions), "session")}, {count(total, "event")}. {_README}</div>',
        note,
        f'<h2>Sessions</h2><div class="card"><table><thead><tr><th>began, UTC</th><th>session</th><th>tenant</th>{head}</tr></thead>',
        f"<tbody>{''.join(rows)}</tbody></table></div>",
        f'<h2>Checkpoint</h2><div class="card chart"><pre>{text(checkpoint) or "none yet"}</pre></div>',
    ]
    return document("Case file", body)


def _facts(made: Timeline) -> str:
    state = made.state
    lasted = duration((state.last_at or 0) - (state.first_at or 0))
    edits = sum(len(generation.edits) for generation in state.generations.values())
    facts = [
        (f"{date(state.first_at or 0)} {clock(state.first_at or 0)[:8]}", "began, UTC", ""),
        (lasted, "long", ""),
        (f"{state.events:,}", "events", ""),
        (f"{len(state.generations):,}", "generations", ""),
        (f"{state.tokens:,}", "tokens", ""),
        (f"{made.failures:,}", "failures", "bad" if made.failures else "good"),
        (f"{made.stalls:,}", "stalls", "warn" if made.stalls else "good"),
        *([(f"{edits:,}", "edits", "warn")] if edits else []),
        *([(f"{state.lost:,}", "events lost", "bad")] if state.lost else []),
        *([(f"{len(state.anomalies):,}", "unexpected events", "warn")] if len(state.anomalies) else []),
    ]
    cards = "".join(f'<div class="fact {level}"><b>{text(value)}</b><span>{name}</span></div>' for value, name, level in facts)
    return f'<div class="facts">{cards}</div><div class="dim">{text(ttft_summary(made.ttft_us))}</div>'


def _overview(made: Timeline) -> Iterator[str]:
    """Bars of the generations over the session's time: pale until the first token, with stalls and failures on them."""
    first, last = made.state.first_at or 0, made.state.last_at or 0
    lanes: dict[str, list[Row]] = {}
    for row in made.rows:
        number = row.lane.partition(".")[0]
        if number.isdecimal():
            lanes.setdefault(number, []).append(row)
    if not lanes or last <= first:
        return

    def x(at: int) -> float:
        return round(_WIDTH * (min(max(at, first), last) - first) / (last - first), 1)

    yield '<h2>Overview</h2><div class="card chart">'
    shown = list(lanes.items())[:BARS_MAX]
    yield f'<svg viewBox="-26 0 {_WIDTH + 30} {len(shown) * (BAR_PX + 4) + 16}" role="img" aria-label="generations over time">'
    for at, (number, rows) in enumerate(shown):
        y, start, end = at * (BAR_PX + 4), min(row.at for row in rows), max(row.until or row.at for row in rows)
        yield f'<text x="-24" y="{y + 11}">{number}</text>'
        yield f'<rect class="wait {_lane(number)}" x="{x(start)}" y="{y}" width="{max(x(end) - x(start), 2)}" height="{BAR_PX}" rx="2"/>'
        for row in rows:
            kind = {"tokens": _lane(number), "stall": "stall", "FAILED": "fail"}.get(row.what)
            if kind:
                width = max(x(row.until or row.at) - x(row.at), 2)
                yield f'<rect class="{kind}" x="{x(row.at)}" y="{y}" width="{width}" height="{BAR_PX}" rx="1"/>'
    base = len(shown) * (BAR_PX + 4) + 11
    yield f'<text x="0" y="{base}">{clock(first)}</text><text x="{_WIDTH}" y="{base}" text-anchor="end">{clock(last)}</text></svg>'
    if len(lanes) > BARS_MAX:
        yield f'<div class="dim">{count(len(lanes) - BARS_MAX, "more generation")} in the table below</div>'
    yield "</div>"


def _lane(lane: str) -> str:
    number = lane.partition(".")[0]
    return f"l{(int(number) - 1) % LANES + 1}" if number.isdecimal() and int(number) else ""


def _rows(rows: Sequence[Row]) -> Iterator[str]:
    day = ""
    for row in rows:
        if date(row.at) != day:
            day = date(row.at)
            yield f'<tr class="day"><td colspan="6">{day} UTC</td></tr>'
        lane = f'<span class="lane {_lane(row.lane)}">{text(row.lane)}</span>' if row.lane else ""
        facts = text(row.text) + (f" · {row.events:,}×" if row.events > 1 and row.what in REPEATED else "")
        quote = f" <q>{text(row.quote.strip())}</q>" if row.quote else ""
        place = f' title="event {uuid(row.event_id)}"' if row.event_id else ""
        yield (
            f'<tr class="{row.level}"{place}><td class="t">{clock(row.at)}</td><td class="n">{relative(row.since_us)}</td><td>{lane}</td>'
            f'<td class="who">{text(row.who)}</td><td class="what">{text(row.what)}</td><td class="x">{facts}{quote}</td></tr>'
        )


def _conversation(made: Timeline) -> Iterator[str]:
    """What was said in each generation: messages as they went upstream, edits, answers."""
    if not made.state.generations:
        return
    yield '<h2>What was said</h2><div class="card">'
    for number, generation in enumerate(made.state.generations.values(), 1):
        told = sections(made.state, generation.generation_id)
        request = told["request"] or {}
        facts = [request.get("model") or "", request.get("endpoint") or "", request.get("status") or ""]
        name = f'<span class="lane {_lane(str(number))}">{number}</span> {text(" · ".join(filter(None, facts)))}'
        yield f'<details><summary>{name} <code class="dim">{short_id(generation.generation_id)}</code></summary><div class="said">'
        yield from _messages(request)
        for edit in told["edits"]:
            yield _block(f"edited by {edit['actor'] or 'somebody'} at {edit['at']}", f"{edit['reason'] or ''}\n{edit['patch']}".strip())
        for answer in told["response"]:
            yield from _answer(answer)
        yield "</div></details>"
    yield "</div>"


def _messages(request: Mapping[str, Any]) -> Iterator[str]:
    said = request.get("messages")
    if said is None:
        yield _block("request", f"[{request.get('document') or 'not recorded'}]")
    for item in said if isinstance(said, list) else [said] if said is not None else []:
        role = str(item.get("role") or item.get("type") or "") if isinstance(item, dict) else "prompt"
        yield _block(role, content_text(item.get("content", item.get("parts")) if isinstance(item, dict) else item))


def _answer(answer: Mapping[str, Any]) -> Iterator[str]:
    for channel in ("reasoning", "content", "refusal"):
        if answer.get(channel):
            yield _block(f"answer {answer['index']}, {channel}, ended by {answer['finish_reason'] or 'nothing'}", answer[channel])
    for call in answer["tool_calls"]:
        yield _block(f"answer {answer['index']}, tool call", f"{call['name']}({call['arguments']})" if call else "[erased]")


def _block(name: str, said: str) -> str:
    return f"<h3>{text(name)}</h3><pre>{escape(paragraph(said))}</pre>"
