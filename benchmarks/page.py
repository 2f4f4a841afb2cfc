"""The page in Chromium: its bundle, its first view over many events, and a session of 100,000 tokens under the scrubber.

`BENCH_PAGE_EVENTS` scales the tape, `BENCH_PAGE_TOKENS` the session. Frames are counted where the browser draws them.
"""

from __future__ import annotations

import gzip
import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from benchmarks.query import fill_hot, made_files
from schemas import events as e
from schemas.settings import ApiSettings, Settings
from scripts.native import tools
from tests.api_rig import put, serving
from tests.program import until
from tests.tape import QUESTION, WORDS, Tape, finish
from tokentape.api.page import BUNDLE

EVENTS = int(os.environ.get("BENCH_PAGE_EVENTS", "10000000"))
TOKENS = int(os.environ.get("BENCH_PAGE_TOKENS", "100000"))
TABS = 5
"""Times that the first view is opened; the median counts."""
SCRUB_MS = 6_000
CHUNK = 16
"""Tokens of an event."""
TIMEOUT_MS = 300_000

# When the first row of the list is there, in ms since the tab began to load.
_FIRST_ROW = """
new MutationObserver((_, watch) => {
    if (!document.querySelector('.sessions li')) return;
    window.firstRow = performance.now();
    watch.disconnect();
}).observe(document, {childList: true, subtree: true});
"""
# The playhead is moved once for each frame, there and back over the whole session; the times between frames are the answer.
_SCRUB = """async (ms) => {
    const lanes = document.querySelector('.lanes'), box = lanes.getBoundingClientRect(), times = [];
    const began = await new Promise(requestAnimationFrame);
    for (let now = began; now - began < ms; ) {
        const share = 1 - Math.abs(1 - (2 * (now - began)) / ms);
        const at = {buttons: 1, bubbles: true, clientX: box.left + 50 + share * (box.width - 70), clientY: box.top + 30};
        lanes.dispatchEvent(new PointerEvent('pointermove', at));
        const next = await new Promise(requestAnimationFrame);
        times.push(next - now);
        now = next;
    }
    return times;
}"""


def run() -> list[dict[str, Any]]:
    """Rows: bundle, first view, scrubbing."""
    size = sum(len(gzip.compress(path.read_bytes())) for path in BUNDLE.rglob("*") if path.is_file())
    rows: list[dict[str, Any]] = [{"what": "bundle, gzip", "value": size / 1e3, "unit": "kB", "reach": "≤ 500 kB"}]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=tools.chromium(print), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900}, bypass_csp=True)  # for what waits in the page
        page.set_default_timeout(TIMEOUT_MS)
        with tempfile.TemporaryDirectory() as folder:
            rows += _first_view(page, Path(folder))
        with tempfile.TemporaryDirectory() as folder:
            rows += _scrub(page, Path(folder))
        browser.close()
    return rows


def _first_view(page: Page, folder: Path) -> list[dict[str, Any]]:
    settings = Settings(data=folder / "data", api=ApiSettings(port=0))
    files = made_files(folder, EVENTS)
    fill_hot(settings, files)
    for file in files:
        file.unlink()
    page.add_init_script(_FIRST_ROW)
    with serving(settings) as api:
        began = time.monotonic()
        first = api("GET", "debug-sessions?limit=1")
        once = time.monotonic() - began
        until(lambda: not api("GET", "debug-sessions?limit=1")["completeness"]["unread"])
        whole = time.monotonic() - began
        took = sorted(_opened(page, f"{api.url}/?{tab}") for tab in range(TABS))
    return [
        {"what": f"first view usable, {EVENTS:,} events, p50 of {TABS}", "value": took[TABS // 2], "unit": "ms", "reach": "≤ 1 s"},
        {"what": f"first list after the API's start, of {first['total']:,} sessions", "value": once, "unit": "s", "reach": "≤ 1 s"},
        {"what": "until all sessions are listed", "value": whole, "unit": "s"},
    ]


def _opened(page: Page, url: str) -> float:
    page.goto(url)
    page.wait_for_function("window.firstRow !== undefined")
    return float(page.evaluate("window.firstRow"))


def _scrub(page: Page, folder: Path) -> list[dict[str, Any]]:
    settings = Settings(data=folder, api=ApiSettings(port=0))
    tape = _long()
    put(settings, [stored.event for stored in tape.events])
    with serving(settings) as api:
        page.goto(f"{api.url}/#/session/{uuid.UUID(bytes=tape.session_id)}")
        page.wait_for_selector(".tokens [data-i]")
        times = sorted(page.evaluate(_SCRUB, SCRUB_MS))
        began = time.monotonic()
        page.keyboard.press("Escape")
        page.wait_for_function(
            "count => document.querySelector('.travel').textContent.includes(`event ${count} of ${count}`)", arg=len(tape.events)
        )
        settled = time.monotonic() - began
        page.goto("about:blank")  # lets go of the stream that it follows
    rate = 1000 * len(times) / sum(times)
    what = f"scrubbing a session of {TOKENS:,} tokens"
    return [
        {
            "what": what,
            "value": rate,
            "unit": "frames/s",
            "beside": "p95 of a frame, ms",
            "beside_value": times[95 * len(times) // 100],
            "reach": "≥ 30 frames/s",
        },
        {"what": "back to its end", "value": settled * 1e3, "unit": "ms"},
    ]


def _long() -> Tape:
    """One answer of `TOKENS` tokens, a token every 10 ms."""
    tape = Tape("long")
    tape.add(e.SessionOpened(client="bench", user="user:42"), 0)
    g = tape.request("g", [QUESTION], 1)
    tape.started(g, 10, 9)
    for first in range(0, TOKENS, CHUNK):
        places = range(first, min(TOKENS, first + CHUNK))
        texts = [f"{WORDS[i % len(WORDS)]} " for i in places]
        logprobs = [-0.01 * (i % 400) for i in places]
        tape.tokens(g, 0, [20.0 + 10 * i for i in places], texts, position=first, ids=list(places), logprobs=logprobs)
    finish(tape, g, 0, [TOKENS], 30.0 + 10 * TOKENS)
    return tape


if __name__ == "__main__":
    for row in run():
        print(row)
