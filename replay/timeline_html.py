"""A timeline as one page that opens offline: no script, no network, and no way for a recorded text to become markup.

Every recorded text goes through `html.escape` after what moves a cursor or hides has been made visible; the page's own policy
forbids scripts, frames, forms and loads besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from replay.sections import sections
from replay.timeline import REPEATED, Row, Timeline, ttft_summary
from replay.words import clock, content_text, count, date, duration, paragraph, printable, relative, short_id, uuid

LANES = 6
"""Colours of generations, in turn; the style sheet has as many."""
BAR_PX = 14
"""Height of one generation's bar in the overview."""
BARS_MAX = 60
"""Generations in the overview; the table has all."""
_WIDTH = 1000  # units of the overview from the first event to the last

_STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfd; --fg: #1d1f27; --dim: #6b7080; --line: #e3e5ec; --card: #fff; --bad: #c62134;
  --warn: #9a6200; --good: #167a3f; --badbg: #fdecee; --warnbg: #fff6e0; --l1: #2a6fdb; --l2: #a14bd0; --l3: #14868c; --l4: #c2571a;
  --l5: #5b6ee0; --l6: #b0347d; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161c; --fg: #e4e6ee; --dim: #8e95a8; --line: #2a2e3a; --card: #1b1e27;
  --bad: #ff7685; --warn: #f0b64c; --good: #5ecb88; --badbg: #3a1b22; --warnbg: #332813; --l1: #7aa7ff; --l2: #cf8ff5; --l3: #58c9cf;
  --l4: #f29a63; --l5: #9aa6ff; --l6: #ee7fbd; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 14px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 20px; margin: 0 0 2px; overflow-wrap: anywhere; } h2 { font-size: 15px; margin: 32px 0 10px; }
code, .t, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 12.5px; }
.dim { color: var(--dim); } .facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0 20px; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; min-width: 92px; }
.fact b { display: block; font-size: 17px; font-variant-numeric: tabular-nums; } .fact span { color: var(--dim); font-size: 12px; }
.fact.bad b { color: var(--bad); } .fact.warn b { color: var(--warn); } .fact.good b { color: var(--good); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 500; color: var(--dim); font-size: 12px;
  border-bottom: 1px solid var(--line); padding: 8px 10px; white-space: nowrap; position: sticky; top: 0; background: var(--card); }
td { padding: 4px 10px; vertical-align: top; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; } td.t, td.n { white-space: nowrap; color: var(--dim); } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums; } td.what { white-space: nowrap; font-weight: 600; } td.who { white-space: nowrap; }
tr.bad { background: var(--badbg); } tr.bad .what, tr.bad .x { color: var(--bad); } tr.warn { background: var(--warnbg); }
tr.warn .what, tr.warn .x { color: var(--warn); } tr.good .what { color: var(--good); } tr.dim td { color: var(--dim); }
q { color: var(--dim); font-style: italic; quotes: "“" "”"; } tr.bad q, tr.warn q { color: inherit; }
tr.day td { background: var(--bg); color: var(--dim); font-size: 12px; padding: 10px; }
.lane { display: inline-block; white-space: nowrap; min-width: 26px;
  text-align: center; border-radius: 9px; padding: 0 7px; font-size: 11.5px; color: #fff; }
.l1 { background: var(--l1); fill: var(--l1); } .l2 { background: var(--l2); fill: var(--l2); } .l3 { background: var(--l3);
  fill: var(--l3); } .l4 { background: var(--l4); fill: var(--l4); } .l5 { background: var(--l5); fill: var(--l5); }
.l6 { background: var(--l6); fill: var(--l6); }
@media (prefers-color-scheme: dark) { .lane { color: #10121a; } }
svg { display: block; width: 100%; } svg .wait { opacity: .35; } svg .stall { fill: var(--warn); } svg .fail { fill: var(--bad); }
svg text { fill: var(--dim); font: 10px ui-monospace, monospace; } .chart { padding: 12px 14px; }
details { border-bottom: 1px solid var(--line); } details:last-child { border-bottom: 0; } summary { cursor: pointer; padding: 9px 14px; }
.said { padding: 0 14px 12px 34px; } .said h3 { font-size: 12px; margin: 10px 0 2px; color: var(--dim); font-weight: 600; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
a { color: var(--l1); text-decoration: none; } a:hover { text-decoration: underline; }
@media print { th { position: static; } main { max-width: none; padding: 0; } details { break-inside: avoid; } }
"""
_README = "README.txt says what is in it, verify.py checks it."
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def session_page(made: Timeline) -> str:
    """A session's timeline as an HTML document."""
    state = made.state
    name = uuid(state.session_id) if state.session_id else "no events"
    title = state.opened.content.title if state.opened and state.opened.content else None
    body = [
        f"<h1>{_text(title or f'Session {name}')}</h1>",
        f'<div class="dim"><code>{_text(name)}</code> · tenant {_text(state.tenant or "")}</div>',
        _facts(made),
        "".join(_overview(made)),
        "<h2>Timeline</h2>",
        '<div class="card"><table><thead><tr><th>UTC</th><th class="n">ms</th><th>gen</th><th>who</th><th>what</th><th></th></tr></thead>',
        f"<tbody>{''.join(_rows(made.rows))}</tbody></table></div>",
        "".join(_conversation(made)),
    ]
    return _document(title or f"Session {name}", body)


def index_page(sessions: Sequence[Mapping[str, Any]], checkpoint: str) -> str:
    """The first page of a case: each session with a link to its timeline, and the signed checkpoint that all hang on.

    A session is a mapping with folder, session, tenant, first_at, title, events, not_in_ledger, generations, tokens, failures, stalls.
    """
    columns = ("events", "generations", "tokens", "failures", "stalls")
    head = "".join(f'<th class="n">{name}</th>' for name in columns)
    rows = []
    for item in sessions:
        figures = "".join(f'<td class="n">{item[name]:,}</td>' for name in columns)
        link = f'<a href="{_text(item["folder"])}/timeline.html">{_text(item["title"] or item["session"])}</a>'
        under = f'<div class="mono dim">{_text(item["session"])}</div>' if item["title"] else ""
        level = "bad" if item["failures"] else "warn" if item["stalls"] else ""
        first = _text((item["first_at"] or "").replace("T", " ")[:19])
        rows.append(f'<tr class="{level}"><td class="t">{first}</td><td>{link}{under}</td><td>{_text(item["tenant"])}</td>{figures}</tr>')
    total = sum(item["events"] for item in sessions)
    missing = sum(item["not_in_ledger"] for item in sessions)
    note = f'<p class="dim">{count(missing, "event")} not in the ledger yet when this was made.</p>' if missing else ""
    body = [
        "<h1>Case file</h1>",
        f'<div class="dim">{count(len(sessions), "session")}, {count(total, "event")}. {_README}</div>',
        note,
        f'<h2>Sessions</h2><div class="card"><table><thead><tr><th>began, UTC</th><th>session</th><th>tenant</th>{head}</tr></thead>',
        f"<tbody>{''.join(rows)}</tbody></table></div>",
        f'<h2>Checkpoint</h2><div class="card chart"><pre>{_text(checkpoint) or "none yet"}</pre></div>',
    ]
    return _document("Case file", body)


def _document(title: str, body: Iterable[str]) -> str:
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
    parts = "\n".join(part for part in body if part)
    named = f"<title>{_text(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}{view}{named}</head>\n<body><main>{parts}</main></body></html>\n"


def _text(text: str) -> str:
    """A recorded text as characters and nothing else, on one line."""
    return escape(printable(text))


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
    cards = "".join(f'<div class="fact {level}"><b>{_text(value)}</b><span>{name}</span></div>' for value, name, level in facts)
    return f'<div class="facts">{cards}</div><div class="dim">{_text(ttft_summary(made.ttft_us))}</div>'


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
        lane = f'<span class="lane {_lane(row.lane)}">{_text(row.lane)}</span>' if row.lane else ""
        facts = _text(row.text) + (f" · {row.events:,}×" if row.events > 1 and row.what in REPEATED else "")
        quote = f" <q>{_text(row.quote.strip())}</q>" if row.quote else ""
        place = f' title="event {uuid(row.event_id)}"' if row.event_id else ""
        yield (
            f'<tr class="{row.level}"{place}><td class="t">{clock(row.at)}</td><td class="n">{relative(row.since_us)}</td><td>{lane}</td>'
            f'<td class="who">{_text(row.who)}</td><td class="what">{_text(row.what)}</td><td class="x">{facts}{quote}</td></tr>'
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
        name = f'<span class="lane {_lane(str(number))}">{number}</span> {_text(" · ".join(filter(None, facts)))}'
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


def _block(name: str, text: str) -> str:
    return f"<h3>{_text(name)}</h3><pre>{escape(paragraph(text))}</pre>"
