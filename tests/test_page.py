"""The page in a real Chromium over a tape that a gateway and a test wrote: every view walked, looked at by axe, and played tricks on."""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import axe_playwright_python
import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from replay.compare import run_compare
from replay.engines.base import Scored
from replay.fold import fold
from replay.taped import taped
from schemas import events as e
from schemas.settings import ApiSettings, Settings, SqlSettings
from scripts.native import tools
from store.directory import SessionDirectory
from store.fences import FileLock, fence_path
from store.indexer import Indexer
from store.ledger.note import Signer
from store.ledger.rotation import rotate
from store.log import open_log
from tests.api_rig import Api, put, serving
from tests.debug_rig import Debugged, debugging
from tests.program import until
from tests.recording import events_of
from tests.tape import EVIL, QUESTION, SYSTEM, Tape, engine_run, environment, finish, incident, stream
from tests.test_compare import Scorer, Sink
from tests.tiered import tiered
from tokentape.api.page import BUNDLE, POLICY
from tokentape.installation import Installation

UI = BUNDLE.parent
TAPE = incident()
SESSION = str(uuid.UUID(bytes=TAPE.session_id))
TIMEOUT_MS = 60_000
GZIP_BYTES_MAX = 500_000
XSS = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
WITHOUT_ED25519 = """() => {
    const own = crypto.subtle.importKey.bind(crypto.subtle);
    crypto.subtle.importKey = (...given) => (given[2].name === "Ed25519" ? Promise.reject(new Error("unknown")) : own(...given));
}"""
AXE = Path(str(axe_playwright_python.__file__)).with_name("axe.min.js")


@dataclass
class Site:
    """A page over one installation, the gateway that records into it, and a way to make somebody with a key."""

    made: Debugged
    api: Api
    browser: Browser

    def open(self, view: str = "", *, token: str | None = None, dark: bool = False, width: int = 1440) -> Page:
        """A tab on a view; whatever the page's console complains of fails the test at `close`."""
        scheme: Any = "dark" if dark else "light"
        page = self.browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
        page.set_default_timeout(TIMEOUT_MS)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda said: self.complaints.append(said.text) if _complains(said.type, said.text) else None)
        if token:
            page.add_init_script(f"sessionStorage.setItem('tokentape.token', '{token}')")
        page.goto(f"{self.api.url}/#/{view}")
        return page

    def __post_init__(self) -> None:
        self.complaints: list[str] = []


def _complains(kind: str, text: str) -> bool:
    """Whether the console says that something is wrong; an answer that is a problem is told on the page itself."""
    return kind == "error" and "the server responded with a status of" not in text


@pytest.fixture
def site(shared: Site) -> Site:
    """The one of the file, of whose pages nothing was complained yet."""
    shared.complaints.clear()
    return shared


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One gateway, one API and one browser for the file."""
    program = tools.chromium(print)
    with debugging(tmp_path_factory.mktemp("page")) as made:
        settings = made.rig.settings.model_copy(update={"api": ApiSettings(port=0)})
        fill(settings)
        expect.set_options(timeout=TIMEOUT_MS)
        with serving(settings) as api, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            yield Site(made, api, browser)
            browser.close()


def fill(settings: Settings) -> None:
    """The incident in the cold tier, proven by a key that was handed over; hot a hostile session, two replays and a run of an engine."""
    put(settings, [stored.event for stored in TAPE.events])
    with tiered(settings) as rig:
        Indexer(settings, rig.log, rig.registry).run_once()
        rig.set_day("2026-11-23")
        rotate(settings, rig.objects)
        rig.tier()
        rig.checkpoint()
    put(settings, [stored.event for stored in _hostile().events])
    put(settings, [stored.event for name in TWICE for stored in _twice(name).events])
    put(settings, [stored.event for run in (None, "nightly") for stored in _replayed(run).events()])
    put(settings, engine_run())


def _hostile() -> Tape:
    """A session whose every text wants to be run, or to mislead."""
    tape = Tape("hostile")

    content = e.SessionContent(title=f"hostile {XSS}")
    tape.add(e.SessionOpened(client=XSS, user=XSS, workflow="'\"--><b>", tags=[XSS, "javascript:alert(1)"], content=content), 0)
    message = {"role": "user", "content": f"{XSS} {EVIL['content']}"}
    g = tape.request("h1", [SYSTEM, QUESTION, message], 5, parameters={"model": XSS, "stop": [XSS]}, model=XSS)
    tape.started(g, 60, 50, range(9))
    end = stream(tape, g, 9, 80, 12)
    call = e.ToolCallContent(call_id=XSS, name=XSS, arguments=XSS)
    tape.add(e.ToolCall(generation_id=g, index=0, call_index=0, offset_us=round(end * 1000), content=call), 9 + end)
    finish(tape, g, 9, [12], end + 2, XSS)
    return tape


TWICE = {"twice": ("sea", -0.4), "once more": ("sky", -1.6)}
"""Two sessions that say the same until their third token: which it is, and its logprob."""


def _twice(name: str) -> Tape:
    """One answer of three tokens of which the client asked what else they might have been."""
    tape = Tape(name)
    last, logprob = TWICE[name]
    texts, logprobs = ["The ", "calm ", last], [-0.1, -0.2, logprob]
    g = tape.request(name, [QUESTION], 0)
    tape.started(g, 1, 1, range(3))
    others = e.ChunkAlternatives(
        counts=[2, 2, 2],
        texts=["", "", "calm ", f"{name} ", "sea", "sky"],
        token_ids=[1, 9, 2, 8, 3, 4],
        logprobs=[-0.1, -3.0, -0.2, -2.0, -0.4, -1.6],
    )
    tape.tokens(g, 0, [1.0, 2.0, 3.0], texts, ids=[1, 2, len(name)], logprobs=logprobs, alternatives=others)
    finish(tape, g, 0, [3], 4)
    return tape


def _replayed(run: str | None) -> Sink:
    """What a replay of the incident recorded: noise, and in the first answer of a run one token that is far from it."""
    recorded = {}
    for generation in fold(TAPE.events).generations.values():
        for sequence in generation.sequences:
            kept = taped(sequence)
            recorded[kept.token_ids] = [value or 0.0 for value in kept.logprobs]
    first = next(iter(recorded))

    def view(ids: tuple[int, ...]) -> Scored:
        moved = [value - 0.002 * (i % 9) ** 2 for i, value in enumerate(recorded[ids])]
        if run and ids == first:
            moved[38:41] = [value - far for value, far in zip(moved[38:41], (0.4, 3.0, 0.3), strict=True)]
        return Scored(tuple(moved), tuple(1 + i % 5 for i in range(len(moved))), tuple(moved))

    sink = Sink()
    run_compare(TAPE.events, Scorer(view, environment("0.32.2", dtype="bfloat16")), sink, run=run)
    return sink


def _look(page: Page, name: str) -> None:
    """A picture for who wants to look: the folder is named in the environment."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(400)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def _sound(page: Page) -> None:
    """No violation that axe calls serious or critical."""
    page.evaluate(AXE.read_text(encoding="utf-8"))  # through the debugger, which the page's policy does not stop
    found = page.evaluate("async () => (await axe.run(document, {resultTypes: ['violations']})).violations")
    serious = [(one["id"], one["nodes"][0]["html"][:200], len(one["nodes"])) for one in found if one["impact"] in ("serious", "critical")]

    assert serious == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_view(site: Site, dark: bool) -> None:
    """Each view is asked for by its key, shows what is on the tape, and is sound for who cannot see it or has no mouse."""
    page = site.open(dark=dark)
    said = {
        "1": "Morning slowness",
        "2": "nightly",
        "3": "Who shared a step with whom",
        "5": "generations",
        "6": "Storage by tier",
        "7": "behind the log",
        "4": "No request is stopped",
    }
    for key, text in said.items():
        page.locator("body").press(key)
        expect(page.locator("main")).to_contain_text(text)
        expect(page.locator("[aria-current=page]")).to_contain_text(key)
        _look(page, f"view-{key}-{'dark' if dark else 'light'}")
        _sound(page)
        if not dark:
            page.set_viewport_size({"width": 400, "height": 860})
            _look(page, f"view-{key}-narrow")
            # Charts are drawn anew once they are told of their new size. (`wait_for_function` polls by eval, which the page forbids.)
            until(lambda: page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))
            page.set_viewport_size({"width": 1440, "height": 900})
    page.close()

    assert site.complaints == []


def test_what_happens_now_and_a_dead_upstream(site: Site) -> None:
    """A request that waits is under way; a search is kept under a name; an upstream that does not answer is seen."""
    site.made.stop(breakpoint_id="now", tag="now")
    answer = site.made.ask(headers={"x-tokentape-tags": "now"})
    page = site.open()
    expect(page.locator(".now")).to_contain_text("1 request under way in 1 session")
    page.get_by_role("button", name="show only these").click()
    expect(page.locator(".sessions li")).to_have_count(1)
    expect(page.locator(".session-title")).to_have_text("Say something about the sea.")
    _look(page, "sessions-now")
    page.get_by_role("button", name="save this search").click()
    page.get_by_label("Name of the search").fill("busy")
    page.keyboard.press("Enter")
    page.get_by_label("under way").uncheck()
    page.get_by_label("Saved searches").select_option("busy")
    expect(page).to_have_url(re.compile("under_way=true"))
    site.made.desk.remove("now")
    site.made.desk.ask(site.made.waiting()[0], "release")
    answer.result(60)
    expect(page.locator("main")).to_contain_text("No session is like that")
    dead = {"name": "upstream", "url": "http://127.0.0.1:9", "answers": False, "detail": "[Errno 111] Connection refused"}
    status = site.api("GET", "status")
    full = {"disk:hot": "the disk is 91% full"}
    page.route("**/api/v1/status", lambda route: route.fulfill(json={**status, "upstreams": [dead], "alerts": full}))
    page.goto(f"{site.api.url}/#/health")
    expect(page.get_by_role("alert").filter(has_text="the upstream is dead")).to_be_visible()
    expect(page.get_by_role("alert").filter(has_text="disk:hot the disk is 91% full")).to_be_visible()
    expect(page.get_by_role("region", name="What is watched")).to_contain_text("oldest event that no query sees yet")
    expect(page.get_by_role("region", name="Storage by tier").get_by_role("row")).to_have_count(1 + len(status["storage"]))
    _look(page, "health-dead")
    page.close()

    assert [one["answers"] for one in status["upstreams"]] == [True]
    assert site.complaints == []


def test_search_and_filters(site: Site) -> None:
    """Words find a session by what was said in it; the address keeps the question, and a tag narrows it."""
    page = site.open()
    page.locator("body").press("/")
    page.keyboard.type("lisbon 4711")
    expect(page.locator(".sessions li")).to_have_count(1)
    page.get_by_role("button", name="incident").click()
    expect(page).to_have_url(re.compile(r"#/sessions\?q=lisbon\+4711&tag=incident"))
    page.reload()
    expect(page.locator(".sessions li")).to_have_count(1)
    page.get_by_label("Kind").select_option("engine runs")
    page.get_by_label("Search sessions").fill("")
    page.get_by_role("button", name="Without the tag incident").click()
    expect(page.locator(".sessions li")).to_have_count(1)
    expect(page.locator(".session-marks")).to_contain_text("engine run")
    _look(page, "sessions-engine")
    page.get_by_label("Search sessions").fill("zebra")
    expect(page.locator("main")).to_contain_text("No session is like that")
    page.close()


def test_a_list_that_fills_up(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While older shards are read the newest sessions are listed, the page says what is missing and which figures may grow."""
    monkeypatch.setattr("store.directory._AT_ONCE", 0)
    monkeypatch.setattr("store.directory._PASS", 1)
    settings = Settings(data=tmp_path, api=ApiSettings(port=0))
    long, hostile = Tape("long"), _hostile().events
    long.add(e.SessionOpened(content=e.SessionContent(title="a long one")), 0)
    long.request("long", [QUESTION], 60_000)
    with Installation(settings) as installation:
        for events in (long.events[:1], hostile, long.events[1:]):
            put(settings, [stored.event for stored in events])
            installation.freshen()
    read, gate = SessionDirectory._read, threading.Event()
    permits = iter([True])

    def one(self: SessionDirectory, name: str, source: Any) -> bool:
        assert next(permits, False) or gate.wait(TIMEOUT_MS / 1000)
        return read(self, name, source)

    monkeypatch.setattr(SessionDirectory, "_read", one)
    with serving(settings) as api:
        page = Site(site.made, api, site.browser).open()
        expect(page.get_by_role("status")).to_contain_text(f"still missing here: {1 + len(hostile)} events left to read")
        expect(page.locator(".sessions li")).to_have_count(1)
        expect(page.locator(".figures")).to_contain_text("≥ 1 req")
        expect(page.locator(".whole")).to_contain_text("still being read")
        _look(page, "sessions-filling")
        _sound(page)
        gate.set()
        expect(page.locator(".sessions li")).to_have_count(2)
        expect(page.locator(".sessions")).not_to_contain_text("≥")
        expect(page.locator(".whole")).to_contain_text("nothing missing")
        page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_time_travel(site: Site, dark: bool) -> None:
    """The scrubber moves the conversation back and on; tokens tell themselves, edits stand side by side, failures are marked."""
    page = site.open(f"session/{SESSION}", dark=dark)
    slider = page.get_by_role("slider")
    expect(page.locator(".travel")).to_contain_text("event 105 of 105")
    expect(page.locator(".generation")).to_have_count(4)
    expect(page.locator(".diff .gone").first).to_contain_text('"temperature": 0.8')
    expect(page.locator(".generation .trouble").last).to_contain_text("upstream timeout")
    _look(page, f"session-{'dark' if dark else 'light'}")
    _sound(page)
    page.locator(".tokens [data-i='3']").first.hover()
    expect(page.locator(".token-facts").first).to_contain_text(re.compile(r"token 3 · id \d+ · p [\d.]+ %"))
    expect(page.locator(".token-facts").first).to_have_css("display", "block")
    expect(page.locator(".alternatives span")).to_have_count(3)
    expect(page.locator(".alternatives .chosen")).to_have_text(re.compile(r'^"[\w,.]+ "[\d.]+ %$'))
    page.locator(".generation").first.scroll_into_view_if_needed()
    _look(page, f"session-token-{'dark' if dark else 'light'}")
    slider.press("Home")
    expect(page.locator(".travel")).to_contain_text("event 1 of 105")
    expect(page.locator("main")).to_contain_text("No request had come yet")
    for _ in range(7):
        slider.press("ArrowRight")
    expect(page.locator(".generation")).to_have_count(1)
    _look(page, f"session-then-{'dark' if dark else 'light'}")
    page.locator("body").press("Escape")
    expect(page.locator(".travel")).to_contain_text("as it stands")
    if not dark:
        page.locator(".edit").scroll_into_view_if_needed()
        _look(page, "session-edit")
        page.set_viewport_size({"width": 420, "height": 860})
        _look(page, "session-narrow")
    page.close()

    assert site.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_compare(site: Site, dark: bool) -> None:
    """A run leads to its sessions and each to its tokens: drift against the floor, the token that tells, the environments in words."""
    page = site.open("compare", dark=dark)
    page.get_by_role("link", name="nightly").click()
    expect(page.get_by_role("button", name="model differs 1")).to_be_visible()
    _look(page, f"compare-run-{'dark' if dark else 'light'}")
    _sound(page)
    page.get_by_role("link", name=f"Compare session {SESSION}").click()
    expect(page.locator(".verdict-line")).to_contain_text("model differs")
    expect(page.locator(".lines")).to_contain_text("0.32.0")
    expect(page.locator(".tokens .telling").first).to_have_attribute("data-i", "38")
    page.locator(".tokens .telling").first.hover()
    expect(page.locator(".token-facts").first).to_contain_text(re.compile(r"token 38 · .*there p .*choice 4.* drift 0\.4\d? nats"))
    _look(page, f"compare-{'dark' if dark else 'light'}")
    _sound(page)
    if not dark:
        page.set_viewport_size({"width": 400, "height": 860})
        _look(page, "compare-narrow")
        page.get_by_role("link", name="…").first.click()
        page.set_viewport_size({"width": 1280, "height": 900})
        page.get_by_label("colour by").select_option("drift")
        expect(page.locator(".tokens.drift .h7").first).to_be_attached()
        _look(page, "session-drift")
        page.get_by_role("link", name="beside 1, which was asked the same").click()
        expect(page.locator("h1")).to_have_text("Two generations")
        expect(page.locator(".verdict-line")).to_contain_text("sampling differs")
        _look(page, "compare-generations")
        _sound(page)
    page.close()

    assert site.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_alternatives_beside_one_another(site: Site, dark: bool) -> None:
    """What a token might have been stands on both sides, also where they part; of a replay is said that it kept none."""
    ids = [str(uuid.UUID(bytes=Tape(name).session_id)) for name in TWICE]
    page = site.open(f"compare/{ids[0]}?with_session={ids[1]}", dark=dark)
    facts, rows = page.locator(".token-facts").first, page.locator(".token-facts").first.locator(".alternatives")
    page.locator(".tokens").first.locator("[data-i='1']").hover()
    expect(rows).to_have_text([re.compile(r'^first: among"calm ".*"twice "'), re.compile(r'^second: among"calm ".*"once more "')])
    page.locator(".tokens").first.locator("[data-i='0']").hover()
    expect(rows.locator(".chosen")).to_have_text([re.compile("^id 190.5 %$")] * 2)
    page.locator(".tokens").first.locator("[data-i='2']").hover()
    expect(facts).to_contain_text('"sea" · token 2')
    expect(rows.locator(".chosen")).to_have_text([re.compile('^"sea"67'), re.compile('^"sky"20')])
    _look(page, f"compare-alternatives-{'dark' if dark else 'light'}")
    _sound(page)
    (row,) = [one for one in site.api("GET", f"debug-sessions/{SESSION}/replays")["replays"] if one["run"]]
    page.goto(f"{site.api.url}/#/compare/{row['recorded_in']}")
    page.locator(".tokens .telling").first.hover()
    expect(rows).to_have_text([re.compile("^recorded: among"), "replayed: only what it thinks of this token was kept, no alternatives"])
    _look(page, f"compare-alternatives-replay-{'dark' if dark else 'light'}")
    page.locator(".tokens").first.locator("[data-i='0']").hover()
    expect(rows).to_have_text(["no alternatives were recorded"])
    page.close()

    assert site.complaints == []


def test_engine(site: Site) -> None:
    """Batches and cache over steps; keys walk through the steps, each says who shared it; the connector says why it found nothing."""
    page = site.open("engine")
    expect(page.locator(".chart canvas")).to_have_count(3)
    expect(page.locator("main")).to_contain_text("a new prompt: no request before shares its first block")
    page.get_by_label("Step", exact=True).fill("100")
    expect(page.locator("main")).to_contain_text("1 preempted")
    page.keyboard.press("k")
    expect(page.locator("main")).to_contain_text("Step 99")
    expect(page.get_by_role("region", name="Sequences in step 99").locator("tbody tr")).to_have_count(3)
    _look(page, "engine")
    _sound(page)
    page.set_viewport_size({"width": 400, "height": 860})
    _look(page, "engine-narrow")
    page.close()

    assert site.complaints == []


def test_a_hostile_session(site: Site) -> None:
    """Markup in titles, messages, tags, models and tool calls is shown as text, and nothing of it runs."""
    hostile = str(uuid.UUID(bytes=Tape("hostile").session_id))
    for view in (f"session/{hostile}", "sessions"):
        page = site.open(view)
        expect(page.locator("main")).to_contain_text("<img src=x onerror=")
        expect(page.locator("main img, main script")).to_have_count(0)
        _look(page, f"hostile-{view.split('/')[0]}")

        assert page.title() != "owned"
        assert page.locator("a[href^='javascript']").count() == 0
        page.close()

    assert site.complaints == []


def test_two_people_on_one_request(site: Site) -> None:
    """A stopped request is edited with validation; somebody else's edit is seen; who releases lets it go as edited."""
    site.made.stop(breakpoint_id="page", tag="page")
    answer = site.made.ask(headers={"x-tokentape-tags": "page"})
    page = site.open("debug")
    editor = page.get_by_label("The request as JSON")
    expect(page.locator(".stopped li")).to_have_count(1)
    expect(editor).to_have_value(re.compile("Say something about the sea"))
    _look(page, "debug")
    _sound(page)
    text = editor.input_value()
    editor.fill(text.replace('"model": "m"', '"model": 1'))
    expect(page.locator(".editor")).to_contain_text("model: a name is needed")
    expect(page.get_by_role("button", name="Release", exact=True)).to_be_disabled()
    editor.fill(text.replace("the sea", "the moon"))
    expect(page.locator(".diff .come")).to_contain_text("the moon")
    (generation,) = site.made.waiting()
    site.made.other.ask(generation, "edit", patch=[{"op": "add", "path": "/temperature", "value": 0}], reason="mine", version=0)
    expect(page.locator(".editor")).to_contain_text("Somebody else has edited this request")
    _look(page, "debug-overtaken")
    page.get_by_role("button", name="take theirs").click()
    expect(editor).to_have_value(re.compile('"temperature": 0'))
    editor.fill(editor.input_value().replace("the sea", "the moon"))
    page.get_by_label("Reason").fill("the moon it is")
    page.get_by_role("button", name="Save and release").click()
    expect(page.locator("main")).to_contain_text("No request is stopped")
    page.get_by_role("button", name="Remove page").click()
    expect(page.locator(".points")).to_contain_text("none is set")
    page.close()

    assert "the moon" in answer.result(60)
    assert site.complaints == []


def test_sql(site: Site) -> None:
    """A statement is run from the keyboard, shown, charted and taken away; what is refused is said as such."""
    page = site.open("sql")
    editor = page.get_by_label("SQL statement")
    editor.fill('SELECT "position", avg(gap_ms) AS gap_ms, min(logprob) AS logprob FROM tokens GROUP BY 1 ORDER BY 1')
    editor.press("Control+Enter")
    expect(page.locator(".result tbody tr")).to_have_count(64)
    page.get_by_role("button", name="Chart").click()
    expect(page.locator(".chart canvas")).to_be_visible()
    _look(page, "sql-chart")
    _sound(page)
    with page.expect_download() as taken:
        page.get_by_role("button", name="CSV").click()
    saved = Path(taken.value.path()).read_text()
    editor.fill("COPY events TO 'x'")
    editor.press("Control+Enter")
    expect(page.get_by_role("alert")).to_contain_text("COPY is not allowed")
    page.close()

    assert saved.startswith('"position","gap_ms","logprob"')
    assert site.complaints == []


def test_a_custodian(site: Site) -> None:
    """With a key the page signs acts of custody: a hold is placed and stands; without one it offers none."""
    anybody = site.open("custody")
    expect(anybody.locator("main")).to_contain_text("need a key")
    expect(anybody.get_by_role("button", name="Hold")).to_have_count(0)
    anybody.close()
    token = site.api.by("custodian", "reader", owner="ann", tenant="acme").headers["authorization"].removeprefix("Bearer ")
    page = site.open("custody", token=token)
    page.get_by_label("What to hold").fill(SESSION)
    page.get_by_label("Why to hold it").fill("matter 4711")
    page.get_by_role("button", name="Hold", exact=True).click()
    expect(page.locator("section", has_text="Legal holds")).to_contain_text("matter 4711")
    page.get_by_role("button", name="Verify everything").click()
    expect(page.locator("main")).to_contain_text("good")
    _look(page, "custody")
    _sound(page)
    page.close()

    assert site.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_an_erasure_by_two(site: Site, dark: bool) -> None:
    """One custodian sees what would go and asks for it, and cannot approve it; another one reads what and why, and approves."""
    ann, bob = (site.api.by("custodian", "admin", owner=name).headers["authorization"].removeprefix("Bearer ") for name in ("ann", "bob"))
    tape = Tape(f"forgotten {dark}")
    g = tape.request("f", [QUESTION], 0, actor="user:99")
    tape.started(g, 1, 1)
    finish(tape, g, 0, [3], stream(tape, g, 0, 5, 3))
    put(site.made.rig.settings, [stored.event for stored in tape.events])
    session = str(uuid.UUID(bytes=tape.session_id))
    page = site.open("custody", token=ann, dark=dark)
    card = page.locator("section[aria-labelledby=erasures]")
    if dark:
        page.get_by_label("Erase by").select_option("actor")
    page.get_by_label("What to erase").fill("user:99" if dark else session)
    expect(card.get_by_role("button", name="Ask for the erasure")).to_have_count(0)
    card.get_by_role("button", name="What would go").click()
    expect(card).to_contain_text(re.compile(r"The content of \d+ events? in \d+ sessions?"))
    page.get_by_label("Why to erase it").fill("asked to be forgotten")
    _look(page, f"custody-erasure-{'dark' if dark else 'light'}")
    _sound(page)
    card.get_by_role("button", name="Ask for the erasure").click()
    expect(card.get_by_role("row", name="asked to be forgotten").filter(has_text="waits for a second custodian")).to_have_count(1)
    expect(card.get_by_role("button", name="approve")).to_have_count(0)
    page.close()
    page = site.open("custody", token=bob, dark=dark)
    row = page.locator("section[aria-labelledby=erasures]").get_by_role("row").filter(has_text="waits for a second custodian")
    expect(row).to_contain_text("user:99" if dark else session)
    _look(page, f"custody-approval-{'dark' if dark else 'light'}")
    row.get_by_role("button", name="approve").click()
    expect(row).to_have_count(0)
    page.close()

    assert site.api("GET", f"debug-sessions/{session}")["erased"] > 0
    assert site.complaints == []


def _proven(page: Page, event: str) -> None:
    page.get_by_label("Event to prove").fill(event)
    page.get_by_role("button", name="Check").click()


def test_a_proof_in_the_browser(site: Site) -> None:
    """An event is proven from its bytes to the first key; one bit more anywhere, or another key, and what does not hold is named."""
    event = str(uuid.UUID(bytes=TAPE.events[2].event.event_id))
    proof = site.api("GET", f"custody/proofs/{event}")
    page = site.open("custody")
    expect(page.locator(".chain li")).to_have_count(2)
    _proven(page, event)
    expect(page.locator(".checked .badge")).to_have_text("proven")
    expect(page.locator(".steps")).to_contain_text("hands over to the key")
    expect(page.locator(".steps")).to_contain_text("with its content")
    _look(page, "custody-proof")
    _sound(page)
    altered = {
        "the event is not row": {"event": {**proof["event"], "content": base64.b64encode(b"other").decode()}},
        "the checkpoint: the signature is not by": {"checkpoint": proof["checkpoint"].replace("\nat 1", "\nat 2")},
        "is not among those that the checkpoint covers": {"entry": {**proof["entry"], "path": proof["entry"]["path"][1:]}},
        "the signature is not by": {"entry": {**proof["entry"], "json": proof["entry"]["json"].replace('"rows":', '"rows":1')}},
        "names another schema": {"event": {**proof["event"], "schema": proof["event"]["schema"] + " "}},
        "signed by": {"rotations": []},
    }
    for says, change in altered.items():
        page.route("**/custody/proofs/*", lambda route, _, change=change: route.fulfill(json={**proof, **change}))
        _proven(page, event)
        expect(page.locator(".steps .bad-text")).to_contain_text(says)
        expect(page.locator(".checked .badge")).to_have_text("not proven")
        page.unroute("**/custody/proofs/*")
    page.get_by_text("by the key that you were handed").click()
    page.get_by_label("Public key").fill(str(Signer.make("tokentape.local/ledger").verifier))
    _proven(page, event)
    expect(page.locator(".steps .bad-text")).to_contain_text("not by the key in force")
    page.close()

    assert site.complaints == []


def test_a_browser_without_ed25519(site: Site) -> None:
    """It says that the signatures were not checked, and where they can be; a session's rows lead to the proof of each."""
    page = site.open(f"session/{SESSION}")
    page.evaluate(WITHOUT_ED25519)
    page.get_by_role("link", name="prove this event").click()
    expect(page.locator(".checked .badge")).to_have_text("hashes hold, signatures unchecked")
    expect(page.locator(".checked")).to_contain_text("tokentape verify --proof")
    page.close()


def test_a_page_that_is_not_let_in(site: Site) -> None:
    """A key that opens nothing is told, and the page asks for another one; it stays with the tab."""
    page = site.open(token="tt-000000000000-" + "x" * 43)
    expect(page.locator("main")).to_contain_text("This key is not known here")
    token = site.api.by("reader", owner="eve", tenant="acme").headers["authorization"].removeprefix("Bearer ")
    page.locator("main").get_by_label("Key").fill(token)
    page.get_by_role("button", name="come in").click()
    expect(page.locator(".rail-foot")).to_contain_text("key:eve")
    expect(page.locator(".rail a", has_text="SQL")).to_have_count(0)
    other = site.open()
    expect(other.locator(".rail-foot")).to_contain_text("api:somebody")
    other.close()
    page.close()


def _one(title: str) -> Tape:
    """A session that has only begun."""
    tape = Tape(title)
    tape.add(e.SessionOpened(content=e.SessionContent(title=title)), 0)
    return tape


def test_the_indexer_is_away(site: Site, tmp_path: Path) -> None:
    """While an indexer holds what it does not index the page shows what there was, and how much waits; then it goes on by itself."""
    settings = Settings(data=tmp_path, api=ApiSettings(port=0))
    put(settings, [stored.event for stored in _one("the first").events])
    with Installation(settings) as installation:
        installation.freshen()
    locks = [FileLock.take(fence_path(tmp_path / "hot", partition), f"{partition:016x}") for partition in range(settings.log.partitions)]
    with serving(settings) as api:
        own = Site(site.made, api, site.browser)
        page, health = own.open(), own.open("health")
        expect(page.locator(".sessions li")).to_have_count(1)
        put(settings, [stored.event for stored in _one("the second").events])
        tile = health.locator(".tile", has_text="behind the log")
        with closing(open_log(settings.log, settings.data)) as log:  # each look at the page is an event too
            until(lambda: f"behind the log{len(events_of(log)) - 1} event" in (tile.text_content() or ""))
        _look(health, "health-indexer-away")
        expect(page.locator(".sessions li")).to_have_count(1)
        for lock in filter(None, locks):
            lock.release()
        expect(page.locator(".sessions li")).to_have_count(2)
        expect(health.locator(".tile", has_text="behind the log")).to_contain_text("0 events")
        for tab in (page, health):
            tab.close()

    assert None not in locks
    assert own.complaints == []


def test_a_page_left_open_for_a_day(site: Site, tmp_path: Path) -> None:
    """What is recorded a day later comes to a list and to a session that were open all the time, and neither has grown."""
    settings = Settings(data=tmp_path, api=ApiSettings(port=0))
    tape = _one("left open")
    put(settings, [stored.event for stored in tape.events])
    with serving(settings) as api:
        own = Site(site.made, api, site.browser)
        tabs = own.open(), own.open(f"session/{uuid.UUID(bytes=tape.session_id)}")
        for tab in tabs:
            tab.clock.install()
            tab.reload()
            expect(tab.locator("main")).to_contain_text("left open")
        before = [tab.evaluate("document.querySelectorAll('*').length") for tab in tabs]
        for _ in range(24):
            for tab in tabs:
                tab.clock.fast_forward("01:00:00")
        after = [tab.evaluate("document.querySelectorAll('*').length") for tab in tabs]
        tape.request("late", [QUESTION], 86_400_000)
        put(settings, [stored.event for stored in tape.events[1:]])
        expect(tabs[0].locator(".figures")).to_contain_text("1 req")
        expect(tabs[1].locator("main")).to_contain_text(str(QUESTION["content"])[:20])
        for tab in tabs:
            tab.close()

    assert after == before
    assert own.complaints == []


def test_a_query_that_takes_too_long(site: Site) -> None:
    """It is stopped, and the page says after how long and what to do."""
    settings = site.made.rig.settings.model_copy(update={"api": ApiSettings(port=0), "sql": SqlSettings(timeout_s=1.0)})
    with serving(settings) as api:
        page = Site(site.made, api, site.browser).open("sql")
        editor = page.get_by_label("SQL statement")
        editor.fill("SELECT count(*) FROM events a, events b, events c, events d, events e, events f WHERE a.kind < f.kind")
        editor.press("Control+Enter")
        expect(page.get_by_role("alert")).to_contain_text("stopped after 1 s")
        expect(page.get_by_role("alert")).to_contain_text("raise sql.timeout_s")
        _look(page, "sql-too-long")
        page.close()


def test_what_the_page_is_served_with(site: Site) -> None:
    """A strict policy, nothing inline, nothing from elsewhere, and no way out of the bundle's folder."""
    answer = httpx.get(site.api.url)
    assets = [httpx.get(f"{site.api.url}/{path}") for path in re.findall(r'(?:src|href)="\./([^"]+)"', answer.text)]
    away = [httpx.get(f"{site.api.url}/assets/{name}").status_code for name in ("..%2findex.html", "%2e%2e", "none.js", "..%5cx")]

    assert answer.headers["content-security-policy"] == POLICY
    assert "'unsafe" not in POLICY
    assert not re.search(r"<script(?![^>]*\ssrc=)|\sstyle=|\son\w+=|https?://", answer.text)
    assert [asset.status_code for asset in assets] == [200] * 3
    assert away == [404] * 4


def test_the_bundle_is_built_from_these_sources() -> None:
    """The committed bundle carries the digest of the sources it was built from, and is small."""
    names = ["index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.mjs"]
    names += [path.relative_to(UI).as_posix() for path in (UI / "src").rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + b"\n" + (UI / name).read_bytes() + b"\n")

    size = sum(len(gzip.compress(path.read_bytes())) for path in BUNDLE.rglob("*") if path.is_file())

    assert (BUNDLE / "sources.sha256").read_text().strip() == digest.hexdigest(), "run `make page`"
    assert size < GZIP_BYTES_MAX
    assert "resolved" not in (UI / "package-lock.json").read_text()
