"""The tokens of one sequence as a heat map: coloured by how sure the model was, or by how long each took to come."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from html import escape
from typing import Literal

from replay.html import document, text
from replay.state import Entry
from replay.words import count, duration, paragraph
from schemas.events import Alternative

Measure = Literal["logprob", "gap"]

STEPS = 7
"""Shades; the page of the REST API draws the same ones."""
TOKENS_MAX = 5000
"""Tokens in one map; that is more than ten pages of text."""


def heat_page(entries: Sequence[Entry], *, title: str, by: Measure = "logprob") -> str:
    """A page of the tokens. Point at one for its id, probability and time; those that are not content are dimmed."""
    gaps = [0, *(later.offset_us - earlier.offset_us for earlier, later in itertools.pairwise(entries))]
    usual = max(1.0, statistics.median(gaps[1:])) if len(gaps) > 1 else 1.0
    shades = [_late(gap, usual) for gap in gaps] if by == "gap" else [_unsure(entry.logprob) for entry in entries]
    shown = list(zip(entries, gaps, shades, strict=True))[:TOKENS_MAX]
    left = f", the first {TOKENS_MAX:,} are shown" if len(entries) > TOKENS_MAX else ""
    known = "" if by == "gap" or any(entry.logprob is not None for entry in entries) else "; no logprobs were recorded"
    legend = "by the time since the token before" if by == "gap" else "by how unlikely the model found each"
    body = [
        f"<h1>{text(title)}</h1>",
        f'<div class="dim lead">{count(len(entries), "token")}, {legend}{known}{left}</div>',
        f'<div class="card"><p class="tokens {by}">{"".join(_token(*each) for each in shown)}</p></div>',
    ]
    return document(title, body)


def _token(entry: Entry, gap: int, shade: int) -> str:
    said = "▒" if entry.text is None else paragraph(entry.text) or "·"
    named = "" if entry.token_id is None else f" · id {entry.token_id}"
    sure = "" if entry.logprob is None else f" · p {100 * math.exp(entry.logprob):.1f} % (logprob {entry.logprob:.3f})"
    facts = f"token {entry.position}{named}{sure} · at {duration(entry.offset_us)} · +{duration(gap)} · {entry.channel}"
    if entry.alternatives:
        facts += " · or " + ", ".join(_alternative(one) for one in entry.alternatives)
    aside = "" if entry.channel == "content" else " aside"
    return f'<span class="h{shade}{aside}" title="{escape(facts)}">{escape(said)}</span>'


def _alternative(one: Alternative) -> str:
    said = json.dumps(paragraph(one.text), ensure_ascii=False) if one.text or one.token_id is None else f"id {one.token_id}"
    return f"{said} {100 * math.exp(min(one.logprob, 0.0)):.1f} %"


def _unsure(logprob: float | None) -> int:
    return 0 if logprob is None else min(STEPS, math.floor(min(6.0, max(0.0, -logprob)) * 1.3))


def _late(gap: int, usual: float) -> int:
    return 0 if gap <= 1.3 * usual else min(STEPS, 1 + math.floor(math.log2(gap / usual)))
