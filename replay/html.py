"""Pages that open offline: no script, no network, and no way for a recorded text to become markup.

Every recorded text goes through `html.escape` after what moves a cursor or hides has been made visible; a page's own policy
forbids scripts, frames, forms and loads besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from replay.words import printable

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
td.s { white-space: nowrap; } .lead { margin-bottom: 10px; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; line-height: 1.75; padding: 12px 14px; }
.tokens span { border-radius: 3px; padding: 1px 0; cursor: default; } .tokens .aside { opacity: .6; font-style: italic; }
.logprob .h1 { background: rgb(196 92 0 / 0.09); } .gap .h1 { background: rgb(42 111 219 / 0.08); }
.logprob .h2 { background: rgb(196 92 0 / 0.16); } .gap .h2 { background: rgb(42 111 219 / 0.14); }
.logprob .h3 { background: rgb(196 92 0 / 0.23); } .gap .h3 { background: rgb(42 111 219 / 0.20); }
.logprob .h4 { background: rgb(196 92 0 / 0.30); } .gap .h4 { background: rgb(42 111 219 / 0.26); }
.logprob .h5 { background: rgb(196 92 0 / 0.37); } .gap .h5 { background: rgb(42 111 219 / 0.32); }
.logprob .h6 { background: rgb(196 92 0 / 0.44); } .gap .h6 { background: rgb(42 111 219 / 0.38); }
.logprob .h7 { background: rgb(196 92 0 / 0.51); } .gap .h7 { background: rgb(42 111 219 / 0.44); }
"""
SHORT = 40
"""Characters of a cell that is not broken into lines."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(title: str, body: Iterable[str]) -> str:
    """A page of parts that are markup already."""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
    parts = "\n".join(part for part in body if part)
    named = f"<title>{text(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html>\n<html lang=en><head>{head}{view}{named}</head>\n<body><main>{parts}</main></body></html>\n"


def text(recorded: str) -> str:
    """A recorded text as characters and nothing else, on one line."""
    return escape(printable(recorded))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of recorded values; what is not known is left empty, numbers stand right."""
    head = "".join(f"<th>{text(name)}</th>" for name in columns)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td class="n">{value:,}</td>' if isinstance(value, int) else f'<td class="n">{value:.6g}</td>'
    shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)
    return f"<td{' class=s' if len(shown) <= SHORT else ''}>{text(shown)}</td>"


def framed(page: str, *, height: int) -> str:
    """A page as a part of another one, a notebook's say, whose styles it neither takes nor gives."""
    look = f"width: 100%; height: {height}px; border: 1px solid #8884; border-radius: 8px"
    return f'<iframe sandbox srcdoc="{escape(page)}" style="{look}"></iframe>'
